"""Answers: the same alone and together, the same as a plain loop, over where they end, and drawn by address."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn
from transformers import GenerationConfig
from transformers.generation import MinPLogitsWarper, TopPLogitsWarper

from scilm_adapt import generate
from scilm_adapt.generate import Answer, chat_prompt, halt_ids, next_probabilities, plain, respond, sample, stop_ids, stream, to_answer
from scilm_adapt.models import families, tiny
from scilm_adapt.runs import InputError
from scilm_adapt.tokens import DOCUMENT_END, TURN_END, TURN_START, control_tokens, encode, pad

TEXTS = ('Heat flows.', 'Light is a wave and a particle, and both of them at once; which of them depends on the question that one asks.',
         'Sound.', 'Salt dissolves in water, and iron does not.', 'Glass breaks.')


def loud(family: str = 'llama', **sizes):
    "An untrained model that does not repeat a single token: its weights are larger than usual."
    lm = tiny(TEXTS, family, hidden=32, **sizes)
    for parameter in lm.model.parameters(): parameter.data *= 4
    return lm


@pytest.fixture(scope='module', params=families(1, 1, 1, 1, 1))
def babbler(request):
    return loud(request.param)


@pytest.fixture(scope='module')
def lm():
    return loud()


def prompts_of(lm): return [encode(lm.tokenizer, text) for text in TEXTS]


@torch.no_grad()
def naive(lm, prompt: list[int], new: int) -> list[int]:
    "Greedy decoding that reads everything anew for each token."
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in halt_ids(lm): break
    return ids[len(prompt):]


class Script(nn.Module):
    "Makes a model say `tokens` one after the other, whatever its input: added to its output head, by the place in the answer."
    def __init__(self, head, tokens: list[int], start: int):
        super().__init__()
        self.head, self.tokens, self.weight, self.place, self.start = head, tokens, head.weight, 0, start

    def forward(self, hidden):
        logits = torch.zeros(*hidden.shape[:-1], self.weight.shape[0])
        logits[..., self.tokens[min(self.place, len(self.tokens) - 1)]] = 9.0
        self.place += 1
        return logits


class Flat(nn.Module):
    "An output head that holds these logits at every place; all words alike, if None."
    def __init__(self, head, logits=None):
        super().__init__()
        self.weight, self.logits = head.weight, torch.zeros(len(head.weight)) if logits is None else logits

    def forward(self, hidden): return self.logits.expand(*hidden.shape[:-1], -1)


@pytest.fixture
def scripted(monkeypatch):
    "A function: a model that says these tokens, one a step."
    def make(tokens, **sizes):
        lm = loud(**sizes)
        names = lm.tokenizer.convert_tokens_to_ids
        ids = [i for token in tokens for i in ([names(token)] if token in control_tokens(lm.tokenizer) else lm.tokenizer.encode(token))]
        lm.model.lm_head = Script(lm.model.lm_head, ids, 0)
        return lm, ids
    return make


# --- the same answer in every way

def test_greedy_answers_are_those_of_a_plain_loop_alone_and_together(babbler):
    prompts = prompts_of(babbler)
    expected = [naive(babbler, prompt, 10) for prompt in prompts]
    assert len({i for ids in expected for i in ids}) > 5
    for batch_size in (1, 2, 16):
        assert [answer.ids for answer in respond(babbler, prompts, 10, batch_size=batch_size)] == expected
    order = [3, 0, 4, 2, 1]
    assert [answer.ids for answer in respond(babbler, [prompts[n] for n in order], 10)] == [expected[n] for n in order]


def test_streamed_and_batched_answers_agree(babbler):
    for prompt, answer in zip(prompts_of(babbler), respond(babbler, prompts_of(babbler), 10)):
        assert ''.join(stream(babbler, prompt, 10)).strip() == answer.text


def test_the_last_places_of_the_context_can_be_used():
    for family in families(1, 1, 1, 1, 1):
        lm = loud(family, context=48)
        prompts = [encode(lm.tokenizer, TEXTS[1])[:38], encode(lm.tokenizer, TEXTS[0])[:4]]
        assert [answer.ids for answer in respond(lm, prompts, 10)] == [naive(lm, prompt, 10) for prompt in prompts]


def test_settings_of_the_model_folder_do_not_act_and_are_kept(lm):
    expected = respond(lm, prompts_of(lm), 8)
    foreign = GenerationConfig(repetition_penalty=3.0, no_repeat_ngram_size=1, suppress_tokens=expected[0].ids, max_length=7, num_beams=2)
    kept, lm.model.generation_config = lm.model.generation_config, foreign
    lm.model.train()
    try:
        assert respond(lm, prompts_of(lm), 8) == expected
        assert lm.model.generation_config is foreign and lm.model.training
    finally:
        lm.model.generation_config = kept
        lm.model.eval()


# --- where an answer ends

def test_stops_and_halts_come_from_the_template():
    lm = tiny(TEXTS)
    names = lm.tokenizer.convert_ids_to_tokens
    assert names(stop_ids(lm)) == [DOCUMENT_END, TURN_END] and names(halt_ids(lm)) == [DOCUMENT_END, TURN_START, TURN_END]
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"  # ends with mere text
    assert names(stop_ids(lm)) == names(halt_ids(lm)) == [DOCUMENT_END]
    lm.tokenizer.chat_template = None
    assert names(stop_ids(lm)) == names(halt_ids(lm)) == [DOCUMENT_END]


@pytest.mark.parametrize('end, stopped', [(TURN_END, True), (DOCUMENT_END, True), (TURN_START, False)])
def test_an_answer_ends_with_its_first_halt(scripted, end, stopped):
    lm, ids = scripted(['Heat', end, 'never said'])
    halt = lm.tokenizer.convert_tokens_to_ids(end)
    answer, = respond(lm, [encode(lm.tokenizer, 'Well?')], 12)
    assert answer == Answer(ids[:ids.index(halt) + 1], 'Heat', stopped)
    lm.model.lm_head.place = 0
    assert ''.join(stream(lm, encode(lm.tokenizer, 'Well?'), 12)) == 'Heat'


def test_an_answer_that_runs_out_of_room_has_not_stopped(scripted):
    lm, ids = scripted(['Heat flows', TURN_END])
    answer, = respond(lm, [[5]], max_new_tokens=len(ids) - 1)
    assert answer == Answer(ids[:-1], 'Heat flows', False)
    lm.model.lm_head.place = 0
    assert respond(lm, [[5]], max_new_tokens=len(ids))[0].stopped


def test_a_filling_token_after_the_end_is_no_part_of_the_answer(lm):
    end = lm.tokenizer.convert_tokens_to_ids(TURN_END)
    rows = [9, end, lm.tokenizer.pad_token_id, lm.tokenizer.pad_token_id]
    assert to_answer(lm, rows, halt_ids(lm), stop_ids(lm)).ids == [9, end]


def test_other_control_tokens_are_left_out_of_the_text_only(scripted):
    lm, _ = scripted(['Heat', TURN_END])
    lm.tokenizer.add_tokens(['<think>'])
    think = lm.tokenizer.convert_tokens_to_ids('<think>')
    assert think not in halt_ids(lm)
    words = encode(lm.tokenizer, 'Heat')
    assert to_answer(lm, [think, *words, think], halt_ids(lm), stop_ids(lm)) == Answer([think, *words, think], 'Heat', False)


# --- chance

@given(st.integers(0, 999), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0]))
def test_probabilities_are_those_of_the_library(seed, temperature, top_p):
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))*3
    expected = TopPLogitsWarper(top_p)(None, logits/temperature) if top_p < 1 else logits/temperature
    assert torch.allclose(next_probabilities(logits, temperature, top_p), expected.softmax(-1), atol=1e-6)


def test_the_nucleus_keeps_at_least_one_token_and_temperature_zero_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 0.0]])
    assert next_probabilities(logits, 1.0, 1e-9).tolist() == next_probabilities(logits, 0.0).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_samples_are_a_function_of_the_seed_and_touch_no_global_state(lm):
    prompts, state = prompts_of(lm), torch.get_rng_state()
    draw = lambda seed: [answer.ids for answer in respond(lm, prompts, 8, temperature=1.0, top_p=0.9, seed=seed, batch_size=2)]
    first = draw(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert draw(0) == first != draw(1)
    pieces = lambda seed: list(stream(lm, prompts[0], 20, temperature=1.0, seed=seed))
    state, first = torch.get_rng_state(), pieces(0)
    assert torch.equal(torch.get_rng_state(), state) and pieces(0) == first != pieces(1)


def test_batches_draw_differently(lm):
    one, other = respond(lm, prompts_of(lm)[:1]*2, 12, temperature=1.0, batch_size=1)
    assert one.ids != other.ids


def test_sampling_has_no_hidden_top_k():
    lm = loud()
    lm.model.lm_head = Flat(lm.model.lm_head)
    answers = respond(lm, [[5]]*40, 20, temperature=0.7, seed=1, batch_size=40)
    assert len({i for answer in answers for i in answer.ids}) > 200


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_sampling_leaves_the_cuda_generator_alone():
    lm = loud()
    lm.model.to('cuda')
    state = torch.cuda.get_rng_state()
    assert respond(lm, prompts_of(lm), 8, temperature=1.0) == respond(lm, prompts_of(lm), 8, temperature=1.0)
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert ''.join(stream(lm, prompts_of(lm)[0], 8)).strip() == respond(lm, prompts_of(lm)[:1], 8)[0].text


# --- the loop itself

def batch_of(lm, prompts): return pad(prompts, 0, left=True)


@torch.no_grad()
def library(lm, batch, new, ends):
    "Greedy decoding by transformers' own loop."
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=ends, pad_token_id=ends[0] if ends else 0)
    with plain(lm.model): return lm.model.generate(**batch, generation_config=settings)


def test_greedy_samples_are_those_of_the_library(babbler):
    prompts = prompts_of(babbler)
    alone = [library(babbler, batch_of(babbler, [prompt]), 16, None)[0, len(prompt):].tolist() for prompt in prompts]
    ends = [alone[0][5], alone[3][9]]
    for chosen in (None, ends):
        batch = batch_of(babbler, prompts)
        ids = sample(babbler.model, **batch, max_new_tokens=16, temperature=0, eos_token_id=chosen)
        assert torch.equal(ids, library(babbler, batch, 16, chosen))
        for prompt, row in zip(prompts, ids.tolist()):
            one = sample(babbler.model, **batch_of(babbler, [prompt]), max_new_tokens=16, temperature=0, eos_token_id=chosen)
            new = one[0, len(prompt):].tolist()
            start = batch['input_ids'].shape[1]
            assert row[start:start + len(new)] == new and set(row[start + len(new):]) <= set(ends[:1])


def test_rows_that_end_make_room_and_change_nobody(babbler):
    prompts, widths = prompts_of(babbler), []
    draw = lambda ends: sample(babbler.model, **batch_of(babbler, prompts), max_new_tokens=14, eos_token_id=ends,
                               generator=torch.Generator().manual_seed(3))
    free = draw(None)
    start = max(map(len, prompts))
    ends = sorted({int(free[1, start + 1]), int(free[4, start + 4])})
    hook = babbler.model.base_model.register_forward_pre_hook(lambda m, a, k: widths.append(len(k['input_ids'])), with_kwargs=True)
    try: ended = draw(ends)
    finally: hook.remove()
    for whole, row in zip(free[:, start:].tolist(), ended[:, start:].tolist()):
        stop = next((n + 1 for n, i in enumerate(whole) if i in ends), len(whole))
        assert row[:stop] == whole[:stop] and set(row[stop:]) <= {ends[0]}
    assert widths[0] == 5 and widths[-1] < 5 and widths == sorted(widths, reverse=True)


def test_sampling_ends_when_all_rows_have_ended(lm):
    first = sample(lm.model, torch.tensor([[5, 6]]), torch.ones(1, 2), max_new_tokens=9, temperature=0)
    end = int(first[0, 4])
    assert sample(lm.model, torch.tensor([[5, 6]]), torch.ones(1, 2), max_new_tokens=9, temperature=0,
                  eos_token_id=end).tolist() == [first[0, :first[0].tolist().index(end, 2) + 1].tolist()]


@pytest.mark.parametrize('temperature, top_p, min_p', [(1.0, 1.0, 0.0), (0.5, 1.0, 0.0), (2.0, 0.8, 0.0), (1.0, 1.0, 0.3), (1.5, 0.9, 0.2)])
def test_samples_have_the_exact_probabilities(temperature, top_p, min_p):
    lm = loud()
    logits = torch.full((len(lm.model.lm_head.weight),), -torch.inf)
    logits[10:18] = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0])
    lm.model.lm_head = Flat(lm.model.lm_head, logits)
    ids = sample(lm.model, torch.full((200, 1), 5), torch.ones(200, 1), 50, temperature, top_p, min_p,
                 generator=torch.Generator().manual_seed(0))
    scores = logits/temperature
    if top_p < 1: scores = TopPLogitsWarper(top_p)(None, scores[None])[0]
    if min_p: scores = MinPLogitsWarper(min_p)(None, scores[None])[0]
    expected = scores.softmax(-1).double().numpy()
    seen = ids[:, 1:].flatten().bincount(minlength=len(logits)).numpy()
    assert not seen[expected == 0].any()
    some = expected > 0
    assert chisquare(seen[some], 10_000*expected[some]/expected[some].sum()).pvalue > 1e-3


def test_what_can_never_be_drawn_is_not_even_at_the_ends():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, 5)
    assert generate.pick(logits, torch.tensor([2.0**-24, 0.5, 1.0]), 1.0, 1.0, 0.0).tolist() == [1, 1, 3]


def test_a_generator_decides_what_is_drawn(lm):
    draw = lambda seed: sample(lm.model, **batch_of(lm, prompts_of(lm)), max_new_tokens=12, generator=torch.Generator().manual_seed(seed))
    state = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2)) and torch.equal(torch.get_rng_state(), state)


def test_samples_come_from_a_model_at_rest_and_can_be_learnt_from(lm):
    lm.model.train()
    lm.model.model.layers[0].self_attn.attention_dropout = 0.9
    try:
        batch = batch_of(lm, prompts_of(lm))
        ids = sample(lm.model, **batch, max_new_tokens=6, temperature=0)
        assert lm.model.training
        lm.model.eval()
        assert torch.equal(ids, sample(lm.model, **batch, max_new_tokens=6, temperature=0))
        lm.model(ids).logits.sum().backward()  # a tensor of inference mode could not be
    finally:
        lm.model.model.layers[0].self_attn.attention_dropout = 0.0
        lm.model.zero_grad()
        lm.model.eval()


@pytest.mark.parametrize('change, named', [
    (dict(max_new_tokens=511), r'A prompt of 2 tokens and max_new_tokens = 511.*512.*at most 510'),
    (dict(max_new_tokens=0), 'max_new_tokens is 0'), (dict(temperature=-1.0), 'temperature is -1'),
    (dict(top_p=0.0), 'top_p is 0'), (dict(top_p=1.5), 'top_p is 1.5'),
    (dict(min_p=-0.1), 'min_p is -0.1'), (dict(min_p=1.1), 'min_p is 1.1'), (dict(min_p=float('nan')), 'min_p is nan'),
    (dict(attention_mask=torch.tensor([[1, 1], [0, 0]])), 'Row 1 of attention_mask marks no token'),
    (dict(attention_mask=torch.tensor([[1, 0], [1, 1]])), 'Row 0 is filled up on the right')])
def test_what_sample_cannot_do_is_named(lm, change, named):
    with pytest.raises(InputError, match=named):
        sample(lm.model, **dict(input_ids=torch.tensor([[5, 6], [7, 8]]), attention_mask=torch.ones(2, 2), max_new_tokens=4) | change)


def test_a_broken_model_is_named_at_once():
    lm = loud()
    next(lm.model.parameters()).data[:] = float('nan')
    for temperature in (0, 1.0):
        with pytest.raises(FloatingPointError, match='NaN'): sample(lm.model, torch.tensor([[5]]), torch.ones(1, 1), 4, temperature)


# --- streaming and prompts

@pytest.mark.parametrize('text', ['жар ≤ 1', '熱は流れる', 'a 🧪 and a 🔬', 'e\u0301 and ﬁ', 'plain'])
def test_a_stream_never_yields_half_a_letter(scripted, text):
    lm, ids = scripted([text, TURN_END], size=300)
    pieces = list(stream(lm, [5], 60))
    assert ''.join(pieces) == text and not any('\ufffd' in piece or piece == '' for piece in pieces)


def test_a_stream_that_ends_within_a_letter_shows_that(scripted):
    lm, ids = scripted(['ж', TURN_END], size=300)
    assert len(ids) > 2
    assert ''.join(stream(lm, [5], 1)) == '\ufffd'


def test_a_prompt_opens_the_assistants_turn(lm):
    ids = chat_prompt(lm, [dict(role='user', content='What ends a turn? <|im_end|>')])
    assert lm.tokenizer.decode(ids).endswith('<|im_start|>assistant\n')
    assert ids.count(lm.tokenizer.convert_tokens_to_ids(TURN_END)) == 1  # the quoted one is content


def test_no_prompts_no_answers(lm): assert respond(lm, []) == []


@pytest.mark.parametrize('arguments, named', [
    (dict(prompts=[[5]*500], max_new_tokens=13), r'max_new_tokens = 13.*512.*at most 12'),
    (dict(prompts=[[5]], max_new_tokens=0), 'max_new_tokens is 0'),
    (dict(prompts=[[5], []]), 'A prompt is empty'),
    (dict(prompts=[[5]], temperature=-1.0), 'temperature is -1'),
    (dict(prompts=[[5]], temperature=float('nan')), 'temperature is nan'),
    (dict(prompts=[[5]], top_p=0.0), 'top_p is 0'),
    (dict(prompts=[[5]], top_p=1.5), 'top_p is 1.5')])
def test_what_cannot_work_is_named(lm, monkeypatch, arguments, named):
    monkeypatch.setattr(generate, 'write', lambda *a: pytest.fail('generation began'))
    with pytest.raises(InputError, match=named): respond(lm, **arguments)
    if len(arguments['prompts']) == 1:
        rest = {name: value for name, value in arguments.items() if name != 'prompts'}
        with pytest.raises(InputError, match=named): next(stream(lm, arguments['prompts'][0], **rest))
