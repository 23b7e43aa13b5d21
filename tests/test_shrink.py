"""A cut model computes what the full one computes of what is left: more than forty families, tokenizers of three kinds, any text."""
import copy
import itertools
import json
import re
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import PROMPTS, written
from test_tokens import TOKENIZERS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from world import FAMILIES, HEADS, of_family

from scilm_adapt.alignment import PLAIN as TEMPLATE
from scilm_adapt.decoding import DECODERS
from scilm_adapt.errors import InputError
from scilm_adapt.models import LanguageModel, context_of, distance, load, parameter_count, same_vocabulary, save, tiny
from scilm_adapt.shrink import (
    block_influence,
    cut_neurons,
    cut_tokenizer,
    cut_vocabulary,
    drop_layers,
    influence_figure,
    kept_tokens,
    neuron_influence,
    shrink,
)
from scilm_adapt.tokens import control_tokens, encode, encode_chat, encode_document, encode_many, end_of_turn, train_tokenizer

ENGLISH = ['Heat flows from warm bodies to cold ones, and never back by itself.', 'Light is a wave and light is a particle.',
           'Salt dissolves in water, and iron does not.']
RUSSIAN = ['Тепло переходит от тёплых тел к холодным.', 'Свет — это волна и частица.', 'Соль растворяется в воде, а железо нет.']
UNSEEN = ['Whether glass breaks depends on how it is held.', 'Ёлка, иголка и объём: щёлочь съела медь.']
TEXTS = [*ENGLISH, *RUSSIAN]
TOKENIZER = train_tokenizer([*TEXTS, *UNSEEN], 480)
TOKENIZER.chat_template = TEMPLATE
each_family = pytest.mark.parametrize('name', FAMILIES)
DEPTHS = 'num_hidden_layers', 'n_layer', 'n_layers', 'num_layers', 'num_blocks', 'layer_types'
MIXED = 'lfm2', 'bamba', 'granitemoehybrid', 'qwen3_next'  # families with two kinds of layers in turn


@lru_cache
def deep(name: str) -> LanguageModel:
    "A model of the family with twice the layers that it has elsewhere."
    more = dict(gpt_neo=dict(attention_types=[[['global', 'local'], 2]]), bamba=dict(attn_layer_indices=[1, 3]),
                gemma2=dict(sliding_window=6))
    return of_family(name, TOKENIZER, **{key: 2*value for key, value in FAMILIES[name][1].items() if key in DEPTHS} | more.get(name, {}))


def close(lm: LanguageModel) -> float: return 1e-9 if lm.model.dtype == torch.float64 else 1e-5


@torch.no_grad()
def logits(lm: LanguageModel, ids: list[int]) -> torch.Tensor:
    "The model's own logits [L, V] of a document."
    given = torch.tensor([ids])
    return lm.model(input_ids=given, attention_mask=torch.ones_like(given), use_cache=False).logits[0]


def blocks_of(lm: LanguageModel) -> list[nn.Module]: return next([*m] for m in lm.model.modules() if isinstance(m, nn.ModuleList))


def bypassed(lm: LanguageModel, drop: list[int], ids: list[int]) -> torch.Tensor:
    "The logits when these blocks give back what they get."
    def back(module, args, named, found):
        states = named['hidden_states'] if not args else args[0]
        return (states, *found[1:]) if isinstance(found, tuple) else states
    with ExitStack() as stack:
        for number in drop: stack.enter_context(blocks_of(lm)[number].register_forward_hook(back, with_kwargs=True))
        return logits(lm, ids)


def refusal(function, *given, **named) -> str:
    "The one sentence with which something is refused."
    with pytest.raises(InputError) as caught: function(*given, **named)
    said = str(caught.value)
    assert said.endswith('.') and '\n' not in said and len(said) < 420
    return said


# --- depth ------------------------------------------------------------------------------------------------------------------------

@each_family
def test_every_family_can_lose_layers(tmp_path, name):
    "What is left is what the full model computes around them; it can be saved, opened and asked, with what it keeps of a text."
    lm, ids = deep(name), encode_document(TOKENIZER, ' '.join(TEXTS))[:60]
    for drop in ([1, 2], [0, 3]):
        cut = drop_layers(lm, drop)
        expected = bypassed(lm, drop, ids)
        assert distance(logits(cut, ids), expected) < close(lm) and distance(expected, logits(lm, ids)) > 1e-3
        assert len(blocks_of(cut)) == len(blocks_of(lm)) - 2
        lost = {id(p): p.numel() for number in drop for p in blocks_of(lm)[number].parameters()}
        assert parameter_count(cut.model) == parameter_count(lm.model) - sum(lost.values())
    opened = load(save(cut, tmp_path/'cut'), 'cpu', dtype=lm.model.dtype)
    assert distance(logits(opened, ids), expected) < 1e-6 and type(opened.model) is type(lm.model)
    single = copy.deepcopy(opened.model).float()
    rows = [[n % 300 for n in prompt] for prompt in PROMPTS if len(prompt) == 3]
    answers = DECODERS['greedy'](single, input_ids=torch.tensor(rows), attention_mask=torch.ones(2, 3, dtype=torch.long), max_new_tokens=5)
    assert answers[:, 3:].tolist() == [written(single, row, 5) for row in rows]


@pytest.mark.parametrize('name', MIXED)
def test_a_hybrid_keeps_its_kinds_of_layers(name):
    "Its last attention cannot go, as the cache needs it; its last layer of the other kind can."
    lm, ids = deep(name), encode_document(TOKENIZER, RUSSIAN[0])
    said = refusal(drop_layers, lm, [1, 3])
    assert said.startswith(f"'{name}' cannot be without layers 1, 3: the rest could not read on with a cache; drop others")
    assert distance(logits(drop_layers(lm, [0, 2]), ids), bypassed(lm, [0, 2], ids)) < close(lm)


def test_what_is_listed_for_each_layer_moves_with_it():
    neo, gemma, bamba = (drop_layers(deep(name), [0, 3]).model.config for name in ('gpt_neo', 'gemma2', 'bamba'))
    assert (neo.attention_layers, neo.num_layers, neo.num_hidden_layers) == (['local', 'global'], 2, 2)
    assert gemma.layer_types == ['full_attention', 'sliding_attention'] and bamba.attn_layer_indices == [0]
    griffin = drop_layers(deep('recurrent_gemma'), [0, 1, 3, 4]).model.config
    assert griffin.block_types == ['attention']*2 and drop_layers(deep('xlstm'), [0]).model.config.num_blocks == 3


def test_windows_that_short_texts_do_not_show_stay_with_their_layers(monkeypatch):
    "A wrong list is found although eight tokens fit into every window."
    from scilm_adapt import shrink as module
    lm = of_family('gemma2', TOKENIZER, num_hidden_layers=4)  # windows of 4,096
    assert drop_layers(lm, [0]).model.config.layer_types == ['full_attention', 'sliding_attention', 'full_attention']
    monkeypatch.setattr(module, '_cut_setting', lambda name, value, kept, layers, fractions:
                        value[:len(kept)] if name == 'layer_types' else value)
    assert 'layer 1 would change its ' in refusal(drop_layers, lm, [0])
    monkeypatch.setattr(module, '_traits', lambda block: {})  # which is not the only look at it
    inverse = of_family('gpt2', TOKENIZER, n_layer=3, scale_attn_by_inverse_layer_idx=True)
    assert 'the rest would compute something else' in refusal(drop_layers, inverse, [1])


@pytest.mark.parametrize('kind, changes, drop, said', [
    ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), [1], 'layer 2 would change its attn.scaling'),
    ('mixtral', dict(), [5], "'mixtral' has the layers 0 to 3, so layer 5 cannot be taken out"),
    ('llama', dict(), [-1], 'has the layers 0 to 3, so layer -1 cannot'),
    ('llama', dict(), [0, 1, 2, 3], 'has 4 layers, and at least one must stay; drop fewer')])
def test_layers_that_cannot_go_are_refused(kind, changes, drop, said):
    lm = of_family(kind, TOKENIZER, **{key: 4 for key in FAMILIES[kind][1] if key in DEPTHS}, **changes)
    assert said in refusal(drop_layers, lm, drop)


@pytest.mark.parametrize('name', ['llama', 'opt', 'mamba', 'xlstm', 'falcon_h1', 'bert'])
def test_influence_is_one_minus_the_mean_cosine_of_all_tokens(name):
    "Each text alone, whether the family can pack or not; long ones in windows; no filling counts, nor a state of zeros."
    lm, seen = deep(name), [[] for _ in blocks_of(deep(name))]
    texts = [*TEXTS, 'a', ' '.join(ENGLISH)]
    def note(number: int):
        def add(module, args, named, found):
            before, after = args[0] if args else named['hidden_states'], found[0] if isinstance(found, tuple) else found
            seen[number].append(1 - (before*after).sum(-1)/(before.norm(dim=-1)*after.norm(dim=-1)))
        return add
    with ExitStack() as stack:
        for number, block in enumerate(blocks_of(lm)): stack.enter_context(block.register_forward_hook(note(number), with_kwargs=True))
        for text in texts:
            ids = encode_document(TOKENIZER, text)
            for at in range(0, max(1, len(ids) - 1), 47): logits(lm, ids[at:at + 48])
    np.testing.assert_allclose(block_influence(lm, texts, context=48, rows=2),
                               [torch.cat([*map(torch.flatten, found)]).nanmean().item() for found in seen], atol=1e-9)


def test_a_layer_that_does_nothing_has_no_influence_and_goes_first():
    lm = tiny(TEXTS, layers=5)
    for name, parameter in lm.model.model.layers[2].named_parameters():
        if 'o_proj' in name or 'down_proj' in name: parameter.data.zero_()
    small = shrink(lm, TEXTS, layers=4)
    assert small.dropped == [2] and abs(small.influence[2]) < 1e-6 < small.influence.min(initial=1, where=np.arange(5) != 2)
    ids = encode_document(lm.tokenizer, TEXTS[0])
    assert distance(logits(small.lm, ids), logits(lm, ids)) < 1e-6
    bars = influence_figure(small.influence, small.dropped).axes[0].patches
    shown = sorted((bar.get_x() + bar.get_width()/2, bar.get_height()) for bar in bars)
    np.testing.assert_allclose(shown, [*enumerate(small.influence)], atol=1e-12)


# --- width ------------------------------------------------------------------------------------------------------------------------

# experts, half of a setting, states in place of neurons, a multiple of another size, a rounded number
NO_NEURONS = dict(mixtral='in layer 0 are 0 matrices', recurrent_gemma='in layer 0 are 0 matrices', xlstm='in layer 0 are 0 matrices',
                  mamba='in layer 0 are 2 matrices', mamba2='none of its settings', bloom='none of its settings',
                  mpt='none of its settings', lfm2='none of its settings')


def reading(block: nn.Module, width: int) -> nn.Module:
    "The one module of a block that reads its neurons, found by its size."
    found = [module for module in block.modules() if type(module).__name__ == 'Conv1D' and module.weight.shape[0] == width or
             isinstance(module, nn.Linear) and module.weight.shape[1] == width]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize('name', [name for name in FAMILIES if name not in NO_NEURONS])
def test_a_family_can_have_narrower_layers(tmp_path, name):
    "What is left is what the full model computes when the others are silent; it can be saved, opened and trained."
    lm, ids, chance = deep(name), encode_document(TOKENIZER, ' '.join(TEXTS))[:60], np.random.default_rng(3)
    writes = neuron_influence(lm, TEXTS, context=48)
    assert writes.shape[0] == len(blocks_of(lm)) and np.isfinite(writes).all() and writes.min() >= 0
    width = writes.shape[1]
    kept = [sorted(chance.permutation(width)[:width//3].tolist()) for _ in writes]
    cut = cut_neurons(lm, kept)
    def silent(some: list[int]): return lambda module, args: (args[0]*torch.isin(torch.arange(width), torch.tensor(some)), *args[1:])
    with ExitStack() as stack:
        for block, some in zip(blocks_of(lm), kept):
            stack.enter_context(reading(block, width).register_forward_pre_hook(silent(some)))
        expected = logits(lm, ids)
    assert distance(logits(cut, ids), expected) < close(lm) and distance(expected, logits(lm, ids)) > 1e-3
    gone = sum(reading(block, width).weight[:, :1].numel() for block in blocks_of(lm))
    assert parameter_count(cut.model) < parameter_count(lm.model) - gone
    opened = load(save(cut, tmp_path/'cut'), 'cpu', dtype=lm.model.dtype)
    assert distance(logits(opened, ids), expected) < 1e-6 and type(opened.model) is type(lm.model)
    assert not {p.data_ptr() for p in cut.model.parameters()} & {p.data_ptr() for p in lm.model.parameters()}


@pytest.mark.parametrize('name', NO_NEURONS)
def test_a_family_without_neurons_of_its_own_is_refused(name):
    said = refusal(cut_neurons, deep(name), [[0]])
    assert said.startswith(f"The neurons of '{name}' cannot be told apart: {NO_NEURONS[name]}") and 'another family.' in said


@pytest.mark.parametrize('name', ['llama', 'phi3', 'gpt2', 'opt', 'falcon_h1'])
def test_a_neurons_influence_is_how_much_it_writes(name):
    "Each document alone, as a plain loop; no filling counts; of conversations so many as make up their share."
    lm, seen = deep(name), []
    chats = [[dict(role='user', content=ENGLISH[n]), dict(role='assistant', content=RUSSIAN[n])] for n in range(3)]*20
    block = blocks_of(lm)[1]
    width = neuron_influence(lm, TEXTS[:1]).shape[1]
    reader = reading(block, width)
    with reader.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, width))):
        documents = [encode_document(TOKENIZER, text) for text in TEXTS]
        read, said = sum(map(len, documents)), 0
        for ids in documents: logits(lm, ids)
        for messages in chats:
            if said >= read: break
            ids = encode_chat(TOKENIZER, messages)[0]
            logits(lm, ids)
            said += len(ids)
    columns = reader.weight.T if type(reader).__name__ == 'Conv1D' else reader.weight
    expected = [(torch.cat(seen)[:, n].square().mean().sqrt()*columns[:, n].norm()).item() for n in range(width)]
    np.testing.assert_allclose(neuron_influence(lm, TEXTS, chats, 0.5, context=96, rows=2)[1], expected, rtol=1e-6)


def test_neurons_that_do_nothing_go_first_and_layers_keep_their_own():
    lm, chance = tiny(TEXTS, layers=4), np.random.default_rng(0)
    width = lm.model.config.intermediate_size
    dead = [sorted(chance.permutation(width)[:10].tolist()) for _ in range(4)]
    for layer, some in zip(lm.model.model.layers, dead): layer.mlp.down_proj.weight.data[:, some] = 0
    small = shrink(lm, TEXTS, neurons=width - 10)
    assert small.neurons == [[n for n in range(width) if n not in some] for some in dead] and small.dropped == []
    ids = encode_document(lm.tokenizer, TEXTS[0])
    assert distance(logits(small.lm, ids), logits(lm, ids)) < 1e-6 and f'{width - 10} neurons in each' in str(small)
    both = shrink(lm, TEXTS, layers=2, neurons=width - 10, tokens=400)
    assert both.neurons == [small.neurons[n] for n in range(4) if n not in both.dropped]
    assert parameter_count(both.lm.model) == both.parameters[1] and 'neurons' not in str(shrink(lm, TEXTS, layers=2))


def test_conversations_have_their_share_in_which_neurons_stay():
    lm = tiny(TEXTS, layers=2)
    chats = [[dict(role='user', content=text), dict(role='assistant', content=text)] for text in TEXTS]
    alone, both = neuron_influence(lm, TEXTS), neuron_influence(lm, TEXTS, chats, 0.9)
    assert not np.allclose(alone, both)
    share = [shrink(lm, TEXTS, neurons=8, conversations=chats, conversation_share=part).neurons for part in (0.01, 0.9)]
    expected = np.sort(np.argsort(-both, kind='stable')[:, :8]).tolist()
    assert share[1] == expected and share[0] != share[1]


@pytest.mark.parametrize('kept, said', [([[0]], 'for each of the 2 layers'), ([[0], [0, 1]], 'equally many'),
                                        ([[0], [999]], 'equally many'), ([[], []], "neurons is 0, and each layer of 'tiny' has")])
def test_neurons_that_are_not_there_are_refused(kept, said):
    lm = tiny(TEXTS, layers=2)
    assert said in refusal(cut_neurons, lm, kept)
    lm.model.is_quantized = True
    assert "'tiny' is quantised" in refusal(cut_neurons, lm, [[0], [0]])


def test_a_wrong_guess_at_the_neurons_is_noticed(monkeypatch):
    "Of two matrices in one, the second's rows are taken where the first's should be."
    from scilm_adapt import shrink as module
    monkeypatch.setattr(module, 'narrowed', lambda tensor, shape, neurons: tensor[tuple(slice(size) for size in shape)])
    assert 'the rest would compute something else' in refusal(cut_neurons, deep('phi3'), [[*range(10, 20)]]*4)


# --- vocabulary -------------------------------------------------------------------------------------------------------------------

@each_family
def test_probabilities_of_kept_tokens_are_the_full_ones_renormalised(tmp_path, name):
    "In 64 bits, on English and Russian; with tables that are padded, tied or not, with and without a bias."
    lm = of_family(name, TOKENIZER, vocab_size=len(TOKENIZER) + 7)
    with torch.no_grad():
        for bias in (p for n, p in lm.model.named_parameters() if n.endswith('bias')): bias.normal_()
    kept = kept_tokens(TOKENIZER, TEXTS)
    cut = cut_vocabulary(lm, kept)
    assert len(cut.tokenizer) == len(kept) < len(TOKENIZER) == lm.model.config.vocab_size - 7
    for text in TEXTS:
        full = logits(lm, encode_document(TOKENIZER, text)).double().softmax(-1)[:, kept]
        found = logits(cut, encode_document(cut.tokenizer, text)).double().log_softmax(-1)
        torch.testing.assert_close(found, (full/full.sum(-1, keepdim=True)).log(), rtol=0, atol=1e-8 if close(lm) < 1e-8 else 1e-4)
    assert cut.model.config.vocab_size == len(kept) == cut.model.get_output_embeddings().weight.shape[0]
    assert cut.model.config.eos_token_id == cut.tokenizer.eos_token_id == 0 and context_of(cut.model.config) == context_of(lm.model.config)
    tied = lm.model.get_input_embeddings().weight is lm.model.get_output_embeddings().weight
    assert (cut.model.get_input_embeddings().weight is cut.model.get_output_embeddings().weight) == tied
    opened = load(save(cut, tmp_path/'cut'), 'cpu', dtype=lm.model.dtype)
    assert same_vocabulary(opened.tokenizer, cut.tokenizer) and opened.tokenizer.chat_template == TOKENIZER.chat_template
    ids = encode_document(opened.tokenizer, UNSEEN[1])
    assert distance(logits(opened, ids), logits(cut, ids)) < 1e-6 and encode_document(cut.tokenizer, UNSEEN[1]) == ids


def learnt(kind: str) -> PreTrainedTokenizerFast:
    "A tokenizer of English and Russian: bytes as letters, pieces with bytes for what is unknown, or pieces and an unknown token."
    if kind == 'bytes':
        core = Tokenizer(models.BPE())
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=['<unk>', '<s>', '</s>'], show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    elif kind == 'pieces':
        core, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(vocab_size=200, special_tokens=['<unk>', '<s>', '</s>'],
                                                                             unk_token='<unk>', show_progress=False)
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.train_from_iterator([*TEXTS, *UNSEEN], trainer)
    core.post_processor = processors.TemplateProcessing(single='<s> $A </s>', special_tokens=[('<s>', 1), ('</s>', 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token='<s>', eos_token='</s>', unk_token='<unk>', pad_token='</s>',
                                   chat_template=TEMPLATE, model_max_length=77, padding_side='left')


CUT = {name: tokenizer for name, tokenizer in TOKENIZERS.items() if name not in ('slow', 'wordpiece', 'words')}
CUT |= dict(bytes=learnt('bytes'), pieces=learnt('pieces'))
each_tokenizer = pytest.mark.parametrize('name', CUT)


@lru_cache
def shortened(name: str, at_most: int | None = None) -> tuple[list[int], object]:
    kept = kept_tokens(CUT[name], TEXTS[1::2], at_most)
    return kept, cut_tokenizer(CUT[name], kept)


def words_of(tokenizer, text: str) -> list[str]: return tokenizer.convert_ids_to_tokens(encode(tokenizer, text))


@each_tokenizer
@settings(max_examples=60)
@given(words=st.lists(st.sampled_from(re.findall(r'\w+|\W', ' '.join([*TEXTS, *UNSEEN]))), max_size=8))
def test_texts_of_kept_tokens_are_read_as_before(name, words):
    "Whatever is put together of words; with the ids that the order of the old ones gives."
    (kept, cut), full = shortened(name), CUT[name]
    for text in [''.join(words), *TEXTS[1::2]]:
        ids = encode(full, text)
        if {*ids} <= {*kept}: assert encode(cut, text) == [kept.index(i) for i in ids]
        if {*full(text)['input_ids']} <= {*kept}: assert cut(text)['input_ids'] == [kept.index(i) for i in full(text)['input_ids']]


@each_tokenizer
@settings(max_examples=60)
@given(text=st.text(max_size=12) | st.lists(st.sampled_from([*UNSEEN, *TEXTS, '<s>', '<|im_end|>', '  ', '\n']), max_size=3).map(''.join))
def test_any_text_comes_back_as_from_the_full_tokenizer(name, text):
    "Random characters, Russian that was not seen, names of control tokens: no more of it becomes unknown."
    (_, cut), full = shortened(name), CUT[name]
    assert cut.decode(encode(cut, text)) == full.decode(encode(full, text))
    if full.unk_token_id is not None: assert encode(cut, text).count(cut.unk_token_id) == encode(full, text).count(full.unk_token_id)
    if name in ('plain', 'bytes'): assert cut.decode(encode(cut, text)) == text


@each_tokenizer
def test_controls_template_and_habits_stay(tmp_path, name):
    (kept, cut), full = shortened(name), CUT[name]
    assert [*control_tokens(cut)] == [*control_tokens(full)] and {*control_tokens(full).values()} <= {*kept}
    assert all(kept[i] == control_tokens(full)[token] for token, i in control_tokens(cut).items())
    for word in ('bos', 'eos', 'pad', 'unk'):
        assert getattr(cut, f'{word}_token') == getattr(full, f'{word}_token')
    steps = [json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (full, cut)]
    assert all(steps[0][step] == steps[1][step] for step in ('normalizer', 'pre_tokenizer', 'decoder'))
    assert (cut.padding_side, cut.model_max_length, cut.name_or_path) == (full.padding_side, full.model_max_length, full.name_or_path)
    cut.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in [*TEXTS, *UNSEEN]: assert again(text)['input_ids'] == cut(text)['input_ids'] and encode(again, text) == encode(cut, text)
    assert full.name_or_path == CUT[name].name_or_path and len(full) > len(cut)  # which itself is untouched


def test_conversations_are_laid_out_as_before():
    chat = [dict(role='system', content='Свет'), dict(role='user', content=ENGLISH[0]), dict(role='assistant', content=RUSSIAN[0])]
    for template in (TOKENIZER.chat_template, train_tokenizer(TEXTS, 300).chat_template):
        full = copy.deepcopy(TOKENIZER)
        full.chat_template = template
        kept = kept_tokens(full, ['a'], conversations=[chat])
        cut = cut_tokenizer(full, kept)
        ids, learnt_ones = encode_chat(full, chat)
        assert encode_chat(cut, chat) == ([kept.index(i) for i in ids], learnt_ones) and kept[end_of_turn(cut)] == end_of_turn(full)
        assert cut.apply_chat_template(chat, tokenize=False) == full.apply_chat_template(chat, tokenize=False)
        assert {*encode_chat(full, [dict(chat[1], content='')], True)[0]} <= {*kept_tokens(full, ['a'])}


def test_conversations_have_their_share_of_what_is_counted_however_few_there_are():
    chat = [dict(role='user', content='волна'), dict(role='assistant', content='волна волна')]
    texts, wave = ENGLISH*40, {*encode(TOKENIZER, ' волна')}
    least = len(kept_tokens(TOKENIZER, ['a']))
    everything = len(kept_tokens(TOKENIZER, texts, conversations=[chat]))
    def kept(share: float, conversations: list) -> set[int]:
        return {*kept_tokens(TOKENIZER, texts, (least + everything)//2, conversations, share)}
    assert not wave <= kept(0.0, [chat]) and wave <= kept(0.5, [chat])  # said three times, and read about hundreds of other words
    assert kept(0.3, [chat]) == kept(0.3, [chat]*50), 'how many there are makes no difference'
    assert kept(0.3, []) == {*kept_tokens(TOKENIZER, texts, (least + everything)//2)}, 'without any, texts alone decide'
    sizes = [len(kept(share, [chat])) for share in (0.0, 0.3, 0.9)]
    assert max(sizes) <= (least + everything)//2


def test_the_parts_of_all_merges_that_give_a_token_are_kept():
    "With those of one of them alone, the last text would become ba, bc."
    merges = [('a', 'b'), ('b', 'a'), ('b', 'c'), ('ab', 'c'), ('a', 'bc')]
    vocabulary = {token: n for n, token in enumerate(['</s>', 'a', 'b', 'c', 'ab', 'ba', 'bc', 'cc', 'abc'])}
    full = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [*merges, ('c', 'c')])), eos_token='</s>')
    cut = cut_tokenizer(full, kept_tokens(full, ['abc', 'ba']))
    assert [*cut.get_vocab()].count('cc') == 0 and len(cut) == 8 and words_of(full, 'babc') == words_of(cut, 'babc') == ['b', 'abc']


def every_text(letters: str) -> list[str]:
    "All texts of one to five of these letters."
    return [''.join(text) for length in range(1, 6) for text in itertools.product(letters, repeat=length)]


@settings(max_examples=200)
@given(pairs=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=2, max_size=8), chosen=st.sets(st.integers(0, 10)),
       whole=st.booleans())
def test_merges_stay_closed_whatever_they_are(pairs, chosen, whole):
    "Small random grammars, in which several merges give one token; against every text of up to five letters."
    tokens, merges = ['a', 'b', 'c'], []
    for one, other in pairs:
        pair = tokens[one % len(tokens)], tokens[other % len(tokens)]
        if pair not in merges and len(''.join(pair)) < 7: merges.append(pair)
        if ''.join(pair) not in tokens: tokens.append(''.join(pair))
    vocabulary = {token: n for n, token in enumerate(['</s>', *tokens])}
    full = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole)), eos_token='</s>')
    wanted = [tokens[n % len(tokens)] for n in chosen] or ['a']
    kept = kept_tokens(full, wanted)
    cut, exact = cut_tokenizer(full, kept), 0
    for text, ids, found in zip(texts := every_text('abc'), encode_many(full, texts), encode_many(cut, texts)):
        if {*ids} <= {*kept}: assert found == [kept.index(i) for i in ids], (text, merges)
        exact += {*ids} <= {*kept}
        assert ''.join(cut.convert_ids_to_tokens(found)) == text
    assert exact


@settings(max_examples=200)
@given(scores=st.lists(st.integers(1, 60), min_size=6, max_size=12), chosen=st.sets(st.integers(0, 20)),
       fallback=st.booleans())
def test_scores_still_choose_the_same_pieces(scores, chosen, fallback):
    "Small random Unigram models, one letter of which is unknown or written in bytes, against every text of up to five letters."
    pieces = ['a', 'b', 'ab', 'ba', 'aab', 'bab', 'bb', 'abab', 'xa', 'ax', 'xb', 'bxb'][:len(scores)]
    weighed = [(piece, -score - n/1000) for n, (piece, score) in enumerate(zip(pieces, scores))]
    weighed += [(f'<0x{byte:02X}>', 0.0) for byte in range(256)]*fallback
    core = Tokenizer(models.Unigram([('</s>', 0.0), ('<unk>', 0.0), *weighed], 1, byte_fallback=fallback))
    full = PreTrainedTokenizerFast(tokenizer_object=core, eos_token='</s>', unk_token='<unk>')
    kept = kept_tokens(full, [pieces[n % len(pieces)] for n in chosen] or ['a'])
    cut = cut_tokenizer(full, kept)
    for text, ids, found in zip(texts := every_text('abx'), encode_many(full, texts), encode_many(cut, texts)):
        if {*ids} <= {*kept}: assert found == [kept.index(i) for i in ids], (text, scores)


def test_the_most_frequent_tokens_are_kept_first():
    texts = ['волна и волна и волна', *ENGLISH[:1]]
    sizes = [len(kept_tokens(TOKENIZER, ['a'])), len(kept_tokens(TOKENIZER, texts))]
    least, last = kept_tokens(TOKENIZER, ['a'], at_most=sizes[0]), set()
    for size in range(sizes[0], sizes[1] + 1, 5):
        kept = kept_tokens(TOKENIZER, texts, at_most=size)
        assert len(kept) <= size and {*least} - {*kept} <= {*encode(TOKENIZER, 'a')}
        vocabulary = TOKENIZER.get_vocab()
        for left, right in json.loads(TOKENIZER.backend_tokenizer.to_str())['model']['merges']:
            if vocabulary[left + right] in kept: assert {vocabulary[left], vocabulary[right]} <= {*kept}
        if size > sizes[0] + 12: assert TOKENIZER.convert_tokens_to_ids(words_of(TOKENIZER, ' волна')[-1]) in kept
        last = kept
    assert len(last) > sizes[1] - 5 and kept_tokens(TOKENIZER, texts, at_most=10**6) == kept_tokens(TOKENIZER, texts)


@pytest.mark.parametrize('rows, said', [(480, 'its model.embed_tokens_per_layer.weight has a row for each token, too'),
                                        (500, 'it has other weights for each token than embedding and head')])
def test_further_tables_of_words_are_found(rows, said):
    "By their shape, and where that tells nothing, by what the model computes."
    wide = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=rows, laurel_rank=4, num_kv_shared_layers=0,
                layer_types=['full_attention']*2, activation_sparsity_pattern=[0.0]*2)
    config = AutoConfig.for_model('gemma3n_text', vocab_size=480, pad_token_id=0, bos_token_id=0, eos_token_id=0, **HEADS | wide)
    torch.manual_seed(0)
    lm = LanguageModel(AutoModelForCausalLM.from_config(config).eval(), TOKENIZER, 'gemma3n')
    for parameter in lm.model.parameters(): parameter.data.normal_(std=0.3)
    kept = kept_tokens(TOKENIZER, TEXTS[::2])
    assert refusal(cut_vocabulary, lm, kept) == (f"The vocabulary of 'gemma3n' cannot be cut: {said}; keep all tokens, or choose a model "
                                                 f"of another family.")
    assert 'want model.embed_tokens_per_layer.weight of shape' in refusal(drop_layers, lm, [0])


def test_a_vocabulary_that_cannot_be_cut_is_refused():
    lm, kept = tiny(TEXTS, size=480), kept_tokens(tiny(TEXTS, size=480).tokenizer, TEXTS[:2])
    least = len(kept_tokens(lm.tokenizer, ['']))
    assert f'set the number of tokens to at least {least}.' in refusal(kept_tokens, lm.tokenizer, TEXTS, at_most=least - 1)
    assert len(kept_tokens(lm.tokenizer, TEXTS, at_most=least)) == least
    assert refusal(kept_tokens, lm.tokenizer, []).startswith('texts is an empty list')
    assert 'is a WordPiece, and only fast ones' in refusal(kept_tokens, TOKENIZERS['wordpiece'], TEXTS)
    assert 'is a program in Python, and only fast ones' in refusal(kept_tokens, TOKENIZERS['slow'], TEXTS)
    assert "kept lacks the token '<|im_end|>'" in refusal(cut_vocabulary, lm, [i for i in kept if i != end_of_turn(lm.tokenizer)])
    inner = next(i for i in kept if len(lm.tokenizer.convert_ids_to_tokens(i)) == 2)
    assert 'kept lacks the token' in refusal(cut_tokenizer, lm.tokenizer, sorted({*kept} - {inner}))
    assert 'kept has the id 9999' in refusal(cut_tokenizer, lm.tokenizer, [*kept, 9999])
    lm.model.is_quantized = True
    for cut, what in ((drop_layers, [0]), (cut_vocabulary, kept), (shrink, TEXTS)): assert "'tiny' is quantised" in refusal(cut, lm, what)


# --- both -------------------------------------------------------------------------------------------------------------------------

def test_a_model_is_shrunk_and_the_teacher_read_through_the_same_cut(tmp_path):
    lm = replace(of_family('gemma2', TOKENIZER, num_hidden_layers=6), name='teacher')
    state = torch.get_rng_state()
    small = shrink(lm, TEXTS, layers=4, tokens=400, context=64)
    assert torch.equal(state, torch.get_rng_state())  # no chance of the caller's is used
    assert small.dropped == sorted(np.argsort(small.influence)[:2]) and len(small.kept) <= 400
    teacher = cut_vocabulary(lm, small.kept)
    assert same_vocabulary(teacher.tokenizer, small.lm.tokenizer)
    ids = encode_document(teacher.tokenizer, UNSEEN[1])
    assert distance(logits(small.lm, ids), bypassed(teacher, small.dropped, ids)) < 1e-9
    assert small.parameters == (parameter_count(lm.model), parameter_count(small.lm.model))
    lengths = [np.mean([len(encode(tokenizer, text)) for text in TEXTS]) for tokenizer in (TOKENIZER, small.lm.tokenizer)]
    assert small.tokens_a_text == pytest.approx(lengths) and lengths[0] < lengths[1]
    assert re.fullmatch(r'[\d,]+ → [\d,]+ weights \(\d+%\): 4 of 6 layers, \d+ tokens, texts \d+\.\d% longer', str(small))
    small.lm.model(torch.tensor([ids])).logits.sum().backward()  # it can be trained, and the teacher's weights are not its own
    assert not {p.data_ptr() for p in small.lm.model.parameters()} & {p.data_ptr() for p in lm.model.parameters()}
    assert all(p.grad is None for p in lm.model.parameters()) and small.lm.model.training is False
    opened = load(save(small.lm, tmp_path/'small'), 'cpu', dtype=torch.float64)
    assert distance(logits(opened, ids), logits(small.lm, ids)) < 1e-6


def test_what_is_not_asked_for_stays():
    lm = tiny(TEXTS, layers=3)
    small = shrink(lm, TEXTS)
    assert small.dropped == [] and small.neurons == [] and small.lm is lm
    assert small.kept == [*range(len(lm.tokenizer))] and '0.0% longer' in str(small)
    assert shrink(lm, TEXTS, tokens=len(lm.tokenizer)).kept == kept_tokens(lm.tokenizer, TEXTS)
    few = shrink(lm, TEXTS, tokens=len(lm.tokenizer), probe=2)  # all texts say which tokens are used, and two how much layers do
    np.testing.assert_array_equal(few.influence, block_influence(lm, [TEXTS[0], TEXTS[-1]]))
    assert few.kept == kept_tokens(lm.tokenizer, TEXTS)


@pytest.mark.parametrize('given, said', [(dict(layers=4), "layers is 4, and 'tiny' has 3; set how many remain, from 1 to 3."),
                                         (dict(layers=0), "layers is 0, and 'tiny' has 3"),
                                         (dict(neurons=999), "neurons is 999, and each layer of 'tiny' has"),
                                         (dict(neurons=0), 'neurons is 0'), (dict(tokens=9), '9 tokens are too few')])
def test_what_cannot_remain_is_said_before_any_work(given, said, monkeypatch):
    lm = tiny(TEXTS, layers=3)
    monkeypatch.setattr(type(lm.model), 'forward', lambda *given, **named: pytest.fail('it is measured already'))
    assert said in refusal(shrink, lm, TEXTS, **given)
    assert 'texts is an empty list' in refusal(shrink, lm, [], layers=2) and 'empty list' in refusal(block_influence, lm, [])
