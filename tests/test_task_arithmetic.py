"""Training-free starts: the chat vector against a loop over single numbers, proxy tuning against one without caches or batches."""
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from scilm_adapt.decoding import next_probabilities
from scilm_adapt.errors import InputError
from scilm_adapt.generate import chat_prompt, halt_ids, respond, stop_ids, to_answer
from scilm_adapt.models import LanguageModel, build, load, logits_of, save
from scilm_adapt.task_arithmetic import _proxy_nats, _proxy_respond, chat_vector, check_interpolation, interpolate
from scilm_adapt.teacher import LiveTeacher, ShiftedTeacher
from scilm_adapt.tokens import _CHATML, TURN_END, TURN_START, encode_chat, train_tokenizer
from scilm_adapt.training import document_nats

torch.set_num_threads(1)
TEXTS = ['heat and light and salt make a wave of iron', 'What is heat? Heat is motion.']
TOKENIZER = train_tokenizer(TEXTS, 300)
QUESTIONS = ['heat?', 'what is light, and what is salt made of, if not of iron', 'a', 'wave of iron and light']


def lm_of(seed: int, family: str = 'llama', hidden: int = 32, tokenizer=TOKENIZER, name: str = '', sharp: float = 7.0) -> LanguageModel:
    "A random model with opinions."
    lm = build(tokenizer, family, hidden=hidden, layers=2, context=256, seed=seed, name=name or f'lm{seed}')
    with torch.no_grad():
        for weight in lm.model.parameters():  # or only the last token would matter
            if weight.ndim == 2: weight.mul_(4.0)
        lm.model.get_input_embeddings().weight.mul_(sharp/4 if family != 'gpt2' else 0.75)
    return lm


def untied(lm: LanguageModel) -> LanguageModel:
    "The same model with an output head of its own."
    config = copy.deepcopy(lm.model.config)
    config.tie_word_embeddings = False
    model = type(lm.model)(config)
    model.load_state_dict(lm.model.state_dict())
    order = torch.randperm(len(TOKENIZER), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight[order]/2)  # or it repeats itself
    return replace(lm, model=model.eval())


# --- chat vector ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', ['llama', 'qwen2', 'gpt2', 'gpt_neox'])
@pytest.mark.parametrize('strength', [0.0, 0.7, 1.0, -0.5])
def test_every_number_is_the_sum_of_three(family, strength):
    three = [lm_of(seed, family) for seed in range(3)]
    before = [copy.deepcopy(lm.model.state_dict()) for lm in three]
    result = chat_vector(*three, strength)
    for name, weight in result.model.state_dict().items():
        science, instruct, base = (lm.model.state_dict()[name] for lm in three)
        torch.testing.assert_close(weight, science + strength*(instruct - base), rtol=1e-5, atol=1e-6)
    assert result.model.get_output_embeddings().weight is result.model.get_input_embeddings().weight, 'tied weights stay tied'
    for lm, state in zip(three, before):
        for name, weight in lm.model.state_dict().items(): assert torch.equal(weight, state[name]), 'the given models are not changed'


def test_heads_of_their_own_stay_so_and_16_bits_are_added_in_32():
    three = [untied(lm_of(seed)) for seed in range(3)]
    three = [replace(lm, model=lm.model.to(torch.bfloat16)) for lm in three]
    result = chat_vector(*three)
    head, table = result.model.get_output_embeddings().weight, result.model.get_input_embeddings().weight
    assert head is not table and head.dtype == torch.float32
    science, instruct, base = (lm.model.get_output_embeddings().weight.float() for lm in three)
    torch.testing.assert_close(head, science + (instruct - base), rtol=1e-6, atol=1e-6)


def with_turns(lm: LanguageModel, rows: int, shuffled: bool = False) -> LanguageModel:
    "A model whose tokenizer lacks the tokens of turns gets them, and its tables `rows` rows, as instruct models do."
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.add_special_tokens(dict(additional_special_tokens=[TURN_END, TURN_START] if shuffled else [TURN_START, TURN_END]))
    tokenizer.chat_template = _CHATML
    model = copy.deepcopy(lm.model)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return replace(lm, model=model, tokenizer=tokenizer)


def bare() -> object:
    "A tokenizer without tokens for turns and without a template."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=['<|endoftext|>'], show_progress=False,
                                                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token='<|endoftext|>', pad_token='<|endoftext|>')


@pytest.mark.parametrize('rows', [0, 18])
def test_rows_are_matched_by_token_and_new_ones_copied(rows, tmp_path):
    "The instruct model has two tokens more and a padded table; the base has them too, at other rows."
    tokenizer = bare()
    size = len(tokenizer)
    science, plain = (lm_of(seed, tokenizer=tokenizer, name=f'lm{seed}') for seed in (0, 2))
    instruct = with_turns(lm_of(1, tokenizer=tokenizer), size + 2 + rows)
    base = with_turns(plain, size + 5, shuffled=True)
    result = chat_vector(science, instruct, base, 0.5)
    tables = [lm.model.get_input_embeddings().weight for lm in (result, science, instruct, base)]
    assert len(tables[0]) == size + 2 + rows == result.model.config.vocab_size
    for token, i in instruct.tokenizer.get_vocab().items():
        assert result.tokenizer.get_vocab()[token] == i
        own, other = science.tokenizer.get_vocab().get(token), base.tokenizer.get_vocab()[token]
        wanted = tables[2][i] if own is None else tables[1][own] + 0.5*(tables[2][i] - tables[3][other])
        torch.testing.assert_close(tables[0][i], wanted, rtol=1e-5, atol=1e-6)
    assert result.model.get_output_embeddings().weight is tables[0] and result.tokenizer.chat_template == _CHATML
    [answer] = respond(result, [chat_prompt(result, [dict(role='user', content='heat?')])], 4)
    opened = load(save(result, tmp_path/'start'), 'cpu')
    assert respond(opened, [chat_prompt(opened, [dict(role='user', content='heat?')])], 4) == [answer]


def test_rows_that_only_pad_are_the_scientists_own():
    science, instruct, base = (lm_of(seed) for seed in range(3))
    science.model.resize_token_embeddings(len(TOKENIZER) + 6, mean_resizing=False)
    table = chat_vector(science, instruct, base).model.get_input_embeddings().weight
    assert torch.equal(table[len(TOKENIZER):], science.model.get_input_embeddings().weight[len(TOKENIZER):])


def renamed(lm: LanguageModel, **settings) -> LanguageModel:
    model = copy.deepcopy(lm.model)
    for name, value in settings.items(): setattr(model.config, name, value)
    return replace(lm, model=model)


@pytest.mark.parametrize(('which', 'changed', 'sentence'), [
    (1, lambda lm: lm_of(5, hidden=48), "'lm0' and 'lm5' are built differently: the setting head_dim is 8 and 12"),
    (2, lambda lm: lm_of(5, 'gpt2'), "'lm0' and 'lm5' are built differently: the setting"),
    (1, lambda lm: renamed(lm, rms_norm_eps=0.5), 'the setting rms_norm_eps is'), (2, untied, 'the setting tie_word_embeddings is'),
    (1, lambda lm: lm_of(5, tokenizer=train_tokenizer(['something else entirely'], 280)), "knows the token '.*' and 'lm5' does not"),
    (1, lambda lm: replace(lm, tokenizer=bare()), "knows the token '<.im_start.>' and 'lm1' does not")])
def test_what_was_not_made_of_one_base_is_refused_by_name(which, changed, sentence):
    three = [lm_of(seed) for seed in range(3)]
    three[which] = changed(three[which])
    with pytest.raises(InputError, match=sentence): chat_vector(*three)


def test_another_shape_and_whole_numbers_are_refused_by_name():
    three = [lm_of(seed) for seed in range(3)]
    layer = three[1].model.model.layers[0].mlp
    layer.up_proj = torch.nn.Linear(32, 17, bias=False)
    with pytest.raises(InputError, match=r'weight model\.layers\.0\.mlp\.up_proj\.weight is'): chat_vector(*three)
    whole = torch.zeros(three[0].model.model.layers[0].mlp.up_proj.weight.shape, dtype=torch.int8)
    layer.up_proj.weight = torch.nn.Parameter(whole, requires_grad=False)
    with pytest.raises(InputError, match='unquantised'): chat_vector(*three)


def test_what_does_not_matter_may_differ_and_a_strength_is_a_number():
    three = [lm_of(seed) for seed in range(3)]
    chat_vector(three[0], renamed(three[1], eos_token_id=2, attention_dropout=0.1, max_position_embeddings=9000), three[2])
    with pytest.raises(InputError, match='strength is nan'): chat_vector(*three, float('nan'))
    silent = replace(three[1], tokenizer=copy.deepcopy(TOKENIZER))
    silent.tokenizer.chat_template = None
    with pytest.raises(InputError, match='no chat template'): chat_vector(three[0], silent, three[2])


# --- interpolation ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', ['llama', 'gpt2', 'gpt_neox'])
@pytest.mark.parametrize('share', [0.0, 0.25, 0.5, 1.0])
def test_every_number_lies_between_the_two(family, share):
    before, after = (lm_of(seed, family) for seed in range(2))
    states = [copy.deepcopy(lm.model.state_dict()) for lm in (before, after)]
    result = interpolate(before, after, share)
    for name, weight in result.model.state_dict().items():
        torch.testing.assert_close(weight, (1 - share)*states[0][name] + share*states[1][name], rtol=1e-5, atol=1e-6)
        if share in (0, 1): assert torch.equal(weight, states[int(share)][name])
    assert result.model.get_output_embeddings().weight is result.model.get_input_embeddings().weight, 'tied weights stay tied'
    for lm, state in zip((before, after), states):
        assert all(torch.equal(weight, state[name]) for name, weight in lm.model.state_dict().items()), 'the given models are not changed'
    assert result.tokenizer is not after.tokenizer and result.tokenizer.chat_template == after.tokenizer.chat_template
    assert result.name == f'{share:g} of the way from lm0 to lm1'


def test_between_16_bits_it_is_32_and_the_result_can_be_kept(tmp_path):
    before, after = (replace(untied(lm_of(seed)), model=untied(lm_of(seed)).model.to(torch.bfloat16)) for seed in range(2))
    result = interpolate(before, after, 0.3)
    one, other, head = (lm.model.get_output_embeddings().weight for lm in (before, after, result))
    torch.testing.assert_close(head, 0.7*one.float() + 0.3*other.float(), rtol=1e-6, atol=1e-6)
    assert head.dtype == torch.float32 and head is not result.model.get_input_embeddings().weight
    opened = load(save(result, tmp_path/'between'), 'cpu')
    assert all(torch.equal(weight, opened.model.state_dict()[name]) for name, weight in result.model.state_dict().items())


@pytest.mark.parametrize('share', [-0.1, 1.1, float('nan'), float('inf')])
def test_a_share_is_between_none_and_all(share):
    with pytest.raises(InputError, match=f'The interpolation is {share}; .* from 0 .* to 1'): interpolate(lm_of(0), lm_of(1), share)
    with pytest.raises(InputError, match='The interpolation is'): check_interpolation(share)


@pytest.mark.parametrize(('changed', 'sentence'), [
    (lambda lm: lm_of(5, hidden=48), "'lm0' and 'lm5' are built differently: the setting head_dim is 8 and 12"),
    (lambda lm: lm_of(5, 'gpt2'), "'lm0' and 'lm5' are built differently: the setting"), (untied, 'the setting tie_word_embeddings is'),
    (lambda lm: with_turns(lm, len(TOKENIZER) + 8), "the weight .* is"),
    (lambda lm: replace(lm, tokenizer=train_tokenizer(['тепло и свет'], len(TOKENIZER))), 'have different vocabularies')])
def test_nothing_lies_between_models_of_different_makes(changed, sentence):
    with pytest.raises(InputError, match=sentence): interpolate(lm_of(0), changed(lm_of(1)), 0.5)


# --- proxy tuning -----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def shifted() -> ShiftedTeacher:
    large, science = untied(lm_of(0, hidden=64, name='large')), untied(lm_of(1, name='science'))
    return ShiftedTeacher(LiveTeacher(large), science, lm_of(2, 'gpt2', name='base'), 0.7)


def prompts_of(shifted) -> list[list[int]]:
    return [chat_prompt(shifted.lm, [dict(role='user', content=text)]) for text in QUESTIONS]


@torch.no_grad()
def naive(shifted: ShiftedTeacher, prompt: list[int], steps: int, temperature: float = 0.0, numbers=None, top_p: float = 1.0) -> list[int]:
    "One text at a time, read anew for every word, the sum written out."
    ids = list(prompt)
    for step in range(steps):
        z = [lm.model(torch.tensor([ids])).logits[0, -1].double() for lm in (shifted.lm, shifted.adapted, shifted.base)]
        z = z[0] + shifted.alpha*(z[1] - z[2])
        if temperature: ids.append(int(torch.searchsorted(next_probabilities(z, temperature, top_p).cumsum(0), numbers[step], right=True)))
        else: ids.append(int(z.argmax()))
        if ids[-1] in halt_ids(shifted.lm): break
    return ids[len(prompt):]


def test_greedy_answers_are_those_of_the_naive_sum(shifted):
    answers = _proxy_respond(shifted, prompts_of(shifted), 24)
    wanted = [naive(shifted, prompt, 24) for prompt in prompts_of(shifted)]
    assert [answer.ids for answer in answers] == wanted
    assert answers == [to_answer(shifted.lm, ids, halt_ids(shifted.lm), stop_ids(shifted.lm)) for ids in wanted]
    assert len(set(sum(wanted, []))) > 20 and wanted != [answer.ids for answer in respond(shifted.lm, prompts_of(shifted), 24)]


@pytest.mark.parametrize('top_p', [1.0, 0.8])
def test_answers_drawn_by_chance_are_those_of_the_naive_sum(shifted, top_p):
    from scilm_adapt.runs import rng
    answers = _proxy_respond(shifted, prompts_of(shifted), 16, temperature=0.9, top_p=top_p, seed=3)
    for n, prompt in enumerate(prompts_of(shifted)):
        assert answers[n].ids == naive(shifted, prompt, 16, 0.9, rng('proxy', 3, n).random(16), top_p)


def test_neighbours_change_nothing_and_the_seed_everything(shifted):
    for temperature in (0.0, 1.0):
        runs = [_proxy_respond(shifted, prompts_of(shifted), 16, temperature, seed=1, batch_size=size) for size in (1, 3, 16)]
        assert runs[0] == runs[1] == runs[2]
    assert runs[0] != _proxy_respond(shifted, prompts_of(shifted), 16, 1.0, seed=2)
    assert _proxy_respond(shifted, [], 16) == []


def test_without_shift_it_is_the_large_model(shifted):
    still = replace(shifted, alpha=0.0)
    assert _proxy_respond(still, prompts_of(shifted), 24) == respond(shifted.lm, prompts_of(shifted), 24)
    assert _proxy_respond(LiveTeacher(shifted.lm), prompts_of(shifted), 24) == respond(shifted.lm, prompts_of(shifted), 24)


def test_words_drawn_follow_the_shifted_distribution(shifted):
    prompt = prompts_of(shifted)[0]
    first = [answer.ids[0] for answer in _proxy_respond(shifted, [prompt]*1500, 1, temperature=0.2, batch_size=500)]
    with torch.no_grad(): z = [lm.model(torch.tensor([prompt])).logits[0, -1] for lm in (shifted.lm, shifted.adapted, shifted.base)]
    wanted = ((z[0] + shifted.alpha*(z[1] - z[2]))/0.2).softmax(-1)
    seen = torch.bincount(torch.tensor(first), minlength=len(wanted))/len(first)
    assert (seen - wanted).abs().sum()/2 < 0.12


def test_a_shifted_teacher_may_be_shifted_again(shifted):
    twice = ShiftedTeacher(shifted, lm_of(7), lm_of(8), -0.3)
    assert [round(weight, 3) for _, weight in twice.summands()] == [1.0, 0.7, -0.7, -0.3, 0.3]
    prompt = prompts_of(shifted)[1]
    with torch.no_grad(): z = sum(weight*lm.model(torch.tensor([prompt])).logits[0, -1] for lm, weight in twice.summands())
    assert _proxy_respond(twice, [prompt], 1)[0].ids == [int(z.argmax())]


def test_a_padded_head_is_cut_and_settings_come_back(shifted):
    padded = copy.deepcopy(shifted.lm.model)
    padded.resize_token_embeddings(len(TOKENIZER) + 8, mean_resizing=False)
    with torch.no_grad(): padded.get_output_embeddings().weight[len(TOKENIZER):] = 100*padded.get_output_embeddings().weight[5]
    padded.train()
    padded.generation_config.temperature = 0.3
    wide = replace(shifted, teacher=LiveTeacher(replace(shifted.lm, model=padded)))
    assert _proxy_respond(wide, prompts_of(shifted), 12) == _proxy_respond(shifted, prompts_of(shifted), 12)
    assert padded.training and padded.generation_config.temperature == 0.3


def test_what_cannot_be_answered_is_said(shifted):
    with pytest.raises(InputError, match='exceed the 256'): _proxy_respond(shifted, prompts_of(shifted), 250)
    with pytest.raises(InputError, match='alpha changes'): _proxy_respond(replace(shifted, alpha=lambda step: 0.5), prompts_of(shifted), 4)
    with pytest.raises(InputError, match='alpha is inf'): _proxy_respond(replace(shifted, alpha=float('inf')), prompts_of(shifted), 4)
    with pytest.raises(InputError, match='temperature is -1'): _proxy_respond(shifted, prompts_of(shifted), 4, temperature=-1)
    broken = copy.deepcopy(shifted.adapted.model)
    with torch.no_grad(): next(broken.parameters())[:] = float('nan')
    with pytest.raises(FloatingPointError, match="'science'"):
        _proxy_respond(replace(shifted, adapted=replace(shifted.adapted, model=broken)), prompts_of(shifted), 4)


@torch.no_grad()
def test_nats_are_those_of_the_naive_sum(shifted):
    pairs = [encode_chat(TOKENIZER, [dict(role='user', content=q), dict(role='assistant', content=q[::-1])]) for q in QUESTIONS]
    ids, masks = ([pair[n] for pair in pairs] for n in (0, 1))
    wanted = []
    for document, mask in pairs:
        states = [lm.model.base_model(torch.tensor([document])).last_hidden_state[0] for lm in (shifted.lm, shifted.adapted, shifted.base)]
        z = [logits_of(lm.model, state).double() for lm, state in zip((shifted.lm, shifted.adapted, shifted.base), states)]
        logprobs = (z[0] + shifted.alpha*(z[1] - z[2])).log_softmax(-1)
        wanted.append(-sum(float(logprobs[n - 1, i]) for n, i in enumerate(document) if n and mask[n]))
    np.testing.assert_allclose(_proxy_nats(shifted, ids, masks), wanted, rtol=1e-5)
    np.testing.assert_allclose(_proxy_nats(LiveTeacher(shifted.lm), ids, masks), document_nats(shifted.lm, ids, masks), rtol=1e-5)
    np.testing.assert_allclose(_proxy_nats(shifted.teacher, ids, context=20), document_nats(shifted.lm, ids, context=20), rtol=1e-5)
