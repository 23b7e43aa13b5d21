"""Continuations: the same alone and together, as a plain loop, the library and the formulas give them; what goes in circles counted."""
import inspect
import math
from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LogitsProcessorList, MaxTimeCriteria, StoppingCriteriaList
from transformers.generation import MinPLogitsWarper, TopPLogitsWarper
from world import loud, prompts_of

from scilm_adapt import decoding
from scilm_adapt.decoding import (
    DECODERS,
    _custom_contrastive_search,
    contrastive_decoding,
    contrastive_search,
    decoders_against,
    diversity,
    next_probabilities,
    penalised,
    plain,
    repetition,
    sample,
)
from scilm_adapt.errors import InputError
from scilm_adapt.models import families, hidden_states, logits_of, tiny
from scilm_adapt.tokens import pad


@pytest.fixture(scope='module', params=families(1, 1, 1, 1, 1))
def babbler(request):
    return loud(request.param)


@pytest.fixture(scope='module')
def lm():
    return loud()


class Flat(nn.Module):
    "An output head that holds these logits at every place; all words alike, if None."
    def __init__(self, head, logits=None):
        super().__init__()
        self.weight, self.logits = head.weight, torch.zeros(len(head.weight)) if logits is None else logits

    def forward(self, hidden): return self.logits.expand(*hidden.shape[:-1], -1)


# --- chance

@given(st.integers(0, 999), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0]))
def test_probabilities_are_those_of_the_library(seed, temperature, top_p):
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))*3
    expected = TopPLogitsWarper(top_p)(None, logits/temperature) if top_p < 1 else logits/temperature
    assert torch.allclose(next_probabilities(logits, temperature, top_p), expected.softmax(-1), atol=1e-6)


@settings(max_examples=40)
@given(st.integers(1, 5), st.sampled_from([1, 2, 7, 60]), st.sampled_from([1e-9, 0.3, 0.5, 0.95, 0.999]), st.booleans(), st.integers(0, 99))
def test_the_nucleus_is_that_of_a_whole_stable_sort_however_few_are_sorted_at_first(rows, words, top_p, equals, seed):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 3, (rows, 2, words), generator=draw).float() if equals else 3*torch.randn(rows, 2, words, generator=draw)
    values, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    values = values.masked_fill(values.cumsum(-1) - values >= top_p, 0)
    wanted = torch.zeros_like(values).scatter(-1, order, values/values.sum(-1, keepdim=True))
    for likely in (1, 3, 1024):
        with patch.object(decoding, '_LIKELY', likely): found = next_probabilities(logits, 1.0, top_p)
        assert torch.equal(found > 0, wanted > 0) and torch.allclose(found, wanted, atol=1e-6)


def test_the_nucleus_keeps_at_least_one_token_and_temperature_zero_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 0.0]])
    assert next_probabilities(logits, 1.0, 1e-9).tolist() == next_probabilities(logits, 0.0).tolist() == [[0, 1, 0], [1, 0, 0]]


# --- the loop itself

def padded(prompts): return pad(prompts, 0, left=True)


@torch.no_grad()
def library(lm, batch, new, ends):
    "Greedy decoding by transformers' own loop."
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=ends, pad_token_id=ends[0] if ends else 0)
    with plain(lm.model): return lm.model.generate(**batch, generation_config=settings)


def test_greedy_samples_are_those_of_the_library(babbler):
    prompts = prompts_of(babbler)
    alone = [library(babbler, padded([prompt]), 16, None)[0, len(prompt):].tolist() for prompt in prompts]
    ends = [alone[0][5], alone[3][9]]
    for chosen in (None, ends):
        batch = padded(prompts)
        ids = sample(babbler.model, **batch, max_new_tokens=16, temperature=0, eos_token_id=chosen)
        assert torch.equal(ids, library(babbler, batch, 16, chosen))
        for prompt, row in zip(prompts, ids.tolist()):
            one = sample(babbler.model, **padded([prompt]), max_new_tokens=16, temperature=0, eos_token_id=chosen)
            new = one[0, len(prompt):].tolist()
            start = batch['input_ids'].shape[1]
            assert row[start:start + len(new)] == new and set(row[start + len(new):]) <= set(ends[:1])


def test_rows_that_end_make_room_and_change_nobody(babbler):
    prompts, widths = prompts_of(babbler), []
    draw = lambda ends: sample(babbler.model, **padded(prompts), max_new_tokens=14, eos_token_id=ends,
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
    assert decoding.pick(logits, torch.tensor([2.0**-24, 0.5, 1.0]), 1.0, 1.0, 0.0).tolist() == [1, 1, 3]


def test_a_generator_decides_what_is_drawn(lm):
    draw = lambda seed: sample(lm.model, **padded(prompts_of(lm)), max_new_tokens=12, generator=torch.Generator().manual_seed(seed))
    state = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2)) and torch.equal(torch.get_rng_state(), state)


def test_samples_come_from_a_model_at_rest_and_can_be_learnt_from(lm):
    lm.model.train()
    lm.model.model.layers[0].self_attn.attention_dropout = 0.9
    try:
        batch = padded(prompts_of(lm))
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



def test_sampling_has_no_hidden_top_k():
    lm = loud()
    lm.model.lm_head = Flat(lm.model.lm_head)
    ids = sample(lm.model, torch.full((40, 1), 5), torch.ones(40, 1), 20, 0.7, generator=torch.Generator().manual_seed(1))
    assert len(ids[:, 1:].unique()) > 200

# --- what goes in circles

@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_repetition_counts_all_n_grams_with_the_last(ids, n):
    seen, again = [], 0
    for at in range(len(ids) - n + 1):
        again += ids[at:at + n] in seen
        seen.append(ids[at:at + n])
    assert math.isclose(repetition(ids, n), again/max(len(seen), 1), abs_tol=1e-12)
    assert math.isclose(diversity(ids), (1 - repetition(ids, 2))*(1 - repetition(ids, 3))*(1 - repetition(ids, 4)), abs_tol=1e-12)


@pytest.mark.parametrize('ids, share', [([], 0), ([1, 1, 1], 0), ([1, 2, 3, 4], 0), ([5]*8, 4/5), ([1, 2]*4, 3/5),
                                        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1/6)])
def test_repetition_of_known_texts(ids, share): assert math.isclose(repetition(ids, 4), share, abs_tol=1e-12)


# --- contrastive search

SMALL = dict(vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
             max_position_embeddings=128, pad_token_id=0, bos_token_id=0, eos_token_id=0)
BESIDE = {  # families whose candidates are read side by side
    'llama, grouped heads': ('llama', SMALL), 'llama, eager': ('llama', SMALL | dict(attn_implementation='eager')),
    'mistral, wide window': ('mistral', SMALL | dict(sliding_window=64)), 'qwen3': ('qwen3', SMALL | dict(head_dim=8)),
    'gemma2, wide window': ('gemma2', SMALL | dict(head_dim=8, sliding_window=64)), 'phi': ('phi', SMALL),
    'opt': ('opt', SMALL | dict(ffn_dim=64, word_embed_proj_dim=32)), 'gpt_neox': ('gpt_neox', SMALL),
    'gpt2': ('gpt2', dict(vocab_size=300, n_embd=32, n_layer=2, n_head=4)), 'granite': ('granite', SMALL | dict(logits_scaling=2.0)),
    'mixtral': ('mixtral', SMALL | dict(num_local_experts=4))}
APART = {  # narrow windows, windows in some layers only, masks of their own
    'mistral, narrow window': ('mistral', SMALL | dict(sliding_window=5)),
    'gemma2, narrow window': ('gemma2', SMALL | dict(head_dim=8, sliding_window=5)),
    'bloom': ('bloom', dict(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)),
    'gpt_neo': ('gpt_neo', dict(vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[['global', 'local'], 1]],
                                window_size=5, max_position_embeddings=128)),
    'falcon': ('falcon', dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))}
PROMPTS = [[9, 8, 7], [5, 17, 33, 40, 41, 90, 91, 92, 17, 33, 29], [60, 61, 62, 63, 64, 65], [4]]


def babble(family: str, **sizes):
    "An untrained model of a family of transformers that does not repeat a single token."
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), attn_implementation=sizes.get('attn_implementation'))
    for parameter in model.parameters(): parameter.data *= 3
    return model.eval()


@torch.no_grad()
def reference(model, ids: list[int], k: int, alpha: float, new: int) -> list[int]:
    """Contrastive search by its formula: no cache, no batch, one candidate after the other, all read anew.

    In 32 bits, which some of the families need, so no choice may be so narrow that another order of the same sums decides otherwise.
    """
    ids = list(ids)
    for _ in range(new):
        states = model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        scores = {}
        for p, candidate in zip(*model(torch.tensor([ids]), use_cache=False).logits[0, -1].softmax(-1).topk(k)):
            mine = model.base_model(torch.tensor([[*ids, int(candidate)]]), use_cache=False).last_hidden_state[0, -1]
            scores[int(candidate)] = (1 - alpha)*p.item() - alpha*torch.cosine_similarity(mine, states, dim=-1).max().item()
        ids.append(max(scores, key=scores.get))
        first, second = sorted(scores.values(), reverse=True)[:2]
        assert first - second > 2e-5  # of numbers of size 1, each a sum of at most 100 products: 100*1.2e-7, and some to spare
    return ids


def of_prompt(rows: torch.Tensor, prompts: list[list[int]], new: int) -> list[list[int]]:
    "Each row without its filling."
    return [row[-len(prompt) - new:] for row, prompt in zip(rows.tolist(), prompts)]


@pytest.mark.parametrize('name', [*BESIDE, *APART])
def test_contrastive_search_is_its_formula_alone_and_together_in_every_family(name, monkeypatch):
    family, sizes = (BESIDE | APART)[name]
    model, widths = babble(family, **sizes), set()
    expected = [reference(model, prompt, 4, 0.6, 8) for prompt in PROMPTS]
    assert len({i for ids in expected for i in ids}) > 12
    assert all(decoding.reads_on(model).values())  # asked now, so that only the search is watched
    hook = model.base_model.register_forward_pre_hook(lambda m, a, kw: widths.add(tuple(kw['input_ids'].shape)), with_kwargs=True)
    assert of_prompt(contrastive_search(model, **pad(PROMPTS, 0, left=True), max_new_tokens=8), PROMPTS, 8) == expected
    hook.remove()
    assert widths == {(4, 11), (4, 4) if name in BESIDE else (16, 1)}
    alone = [contrastive_search(model, **pad([prompt], 0, left=True), max_new_tokens=8)[0].tolist() for prompt in PROMPTS]
    assert alone == expected
    monkeypatch.setattr(decoding, '_fits_beside', lambda *a: False)
    assert of_prompt(contrastive_search(model, **pad(PROMPTS, 0, left=True), max_new_tokens=8), PROMPTS, 8) == expected


@pytest.mark.parametrize('k, alpha', [(2, 0.3), (6, 0.9), (3, 1.0), (40, 0.6)])
def test_contrastive_search_is_its_formula_for_other_settings(k, alpha):
    model = babble('llama', **SMALL)
    expected = [reference(model, prompt, k, alpha, 5) for prompt in PROMPTS[:2]]
    found = contrastive_search(model, **pad(PROMPTS[:2], 0, left=True), k=k, alpha=alpha, max_new_tokens=5)
    assert of_prompt(found, PROMPTS, 5) == expected


@pytest.mark.parametrize('settings', [dict(k=1), dict(alpha=0.0), dict(k=1, alpha=0.0)])
def test_one_candidate_or_no_contrast_is_greedy(babbler, settings):
    batch = padded(prompts_of(babbler))
    greedy = sample(babbler.model, **batch, max_new_tokens=10, temperature=0)
    assert torch.equal(contrastive_search(babbler.model, **batch, **settings, max_new_tokens=10), greedy)
    nearly = contrastive_search(babbler.model, **batch, max_new_tokens=10, alpha=1e-9)  # through the search itself
    assert torch.equal(nearly, greedy)


@pytest.mark.parametrize('name', ['llama, grouped heads', 'mistral, narrow window'])
def test_rows_of_a_search_that_end_make_room_and_change_nobody(name):
    model, widths = babble((BESIDE | APART)[name][0], **(BESIDE | APART)[name][1]), []
    batch = pad(PROMPTS, 0, left=True)
    free = contrastive_search(model, **batch, max_new_tokens=12)[:, 11:].tolist()
    ends = sorted({free[0][2], free[3][6]})
    hook = model.base_model.register_forward_pre_hook(lambda m, a, kw: widths.append(kw['input_ids'].numel()), with_kwargs=True)
    ended = contrastive_search(model, **batch, max_new_tokens=12, eos_token_id=ends)[:, 11:].tolist()
    hook.remove()
    for whole, row in zip(free, ended):
        stop = next((n + 1 for n, i in enumerate(whole) if i in ends), len(whole))
        assert row[:stop] == whole[:stop] and set(row[stop:]) <= {ends[0]}
    assert widths[1] == 16 and widths[-1] < 16 and widths[1:] == sorted(widths[1:], reverse=True)
    first = contrastive_search(model, **pad(PROMPTS[:1], 0), max_new_tokens=12, eos_token_id=free[0][2])
    assert first.shape[1] == 3 + free[0].index(free[0][2]) + 1  # and when all have ended, it is over


def test_the_last_places_of_the_context_can_be_searched():
    for family in families(1, 1, 1, 1, 1):
        lm = loud(family, context=24)
        prompts = [list(range(5, 21)), [7, 8]]
        found = contrastive_search(lm.model, **padded(prompts), max_new_tokens=8)
        assert of_prompt(found, prompts, 8) == [reference(lm.model, prompt, 4, 0.6, 8) for prompt in prompts]


def test_a_search_is_at_rest_leaves_the_model_as_it_was_and_can_be_learnt_from(lm):
    expected = contrastive_search(lm.model, **padded(prompts_of(lm)), max_new_tokens=6)
    kept, lm.model.generation_config = lm.model.generation_config, GenerationConfig(repetition_penalty=3.0, max_length=7)
    foreign, state = lm.model.generation_config, torch.get_rng_state()
    lm.model.train()
    lm.model.model.layers[0].self_attn.attention_dropout = 0.9
    try:
        ids = contrastive_search(lm.model, **padded(prompts_of(lm)), max_new_tokens=6)
        assert torch.equal(ids, expected) and lm.model.training and lm.model.generation_config is foreign
        assert torch.equal(state, torch.get_rng_state())
        lm.model(ids).logits.sum().backward()
    finally:
        lm.model.model.layers[0].self_attn.attention_dropout, lm.model.generation_config = 0.0, kept
        lm.model.zero_grad()
        lm.model.eval()


@pytest.mark.parametrize('change, named', [
    (dict(max_new_tokens=511), r'A prompt of 2 tokens and max_new_tokens = 511.*512.*at most 510'),
    (dict(max_new_tokens=0), 'max_new_tokens is 0'), (dict(k=0), 'k is 0'), (dict(k=401), 'k is 401.*at most 354'),
    (dict(alpha=-0.1), 'alpha is -0.1'), (dict(alpha=1.1), 'alpha is 1.1'), (dict(alpha=float('nan')), 'alpha is nan'),
    (dict(attention_mask=torch.tensor([[1, 1], [0, 0]])), 'Row 1 of attention_mask marks no token'),
    (dict(attention_mask=torch.tensor([[1, 0], [1, 1]])), 'Row 0 is filled up on the right')])
def test_what_a_search_cannot_do_is_named_before_anything_is_computed(lm, monkeypatch, change, named):
    monkeypatch.setattr(decoding, '_search', lambda *a: pytest.fail('the search began'))
    arguments = dict(input_ids=torch.tensor([[5, 6], [7, 8]]), attention_mask=torch.ones(2, 2), max_new_tokens=4) | change
    with pytest.raises(InputError, match=named): contrastive_search(lm.model, **arguments)


def test_a_model_without_hidden_states_and_one_of_nan_are_named():
    lm = loud()
    lm.model.base_model_prefix = 'none'  # so that its base model is itself, which gives logits only
    batch = dict(input_ids=torch.tensor([[5]]), attention_mask=torch.ones(1, 1))
    with pytest.raises(InputError, match='model: .*gives no hidden states'): contrastive_search(lm.model, **batch)
    lm = loud()
    next(lm.model.parameters()).data[:] = float('nan')
    with pytest.raises(FloatingPointError, match='NaN'): contrastive_search(lm.model, **batch)


# --- from within the library

def through_library(model, batch, **settings): return model.generate(**batch, custom_generate=_custom_contrastive_search, **settings)


def test_the_library_runs_the_search_as_its_own(babbler):
    model, batch = babbler.model, padded(prompts_of(babbler))
    length = batch['input_ids'].shape[1]
    with plain(model):
        direct = contrastive_search(model, **batch, k=5, alpha=0.4, max_new_tokens=9)
        assert torch.equal(through_library(model, batch, k=5, alpha=0.4, max_new_tokens=9), direct)
        assert torch.equal(through_library(model, batch, max_length=length + 9), contrastive_search(model, **batch, max_new_tokens=9))
        config = GenerationConfig(max_new_tokens=9)
        assert torch.equal(through_library(model, batch, k=5, alpha=0.4, generation_config=config), direct)
        alone = dict(input_ids=batch['input_ids'][:1, -3:])  # no mask, no filling
        assert torch.equal(through_library(model, alone, max_new_tokens=5),
                           contrastive_search(model, **alone, attention_mask=torch.ones(1, 3), max_new_tokens=5))
        end = [int(direct[0, length + 2]), int(direct[1, length + 4])]
        ended = through_library(model, batch, k=5, alpha=0.4, max_new_tokens=9, eos_token_id=end, pad_token_id=3)
        for whole, row in zip(direct[:, length:].tolist(), ended[:, length:].tolist()):
            stop = next((n + 1 for n, i in enumerate(whole) if i in end), len(whole))
            assert row[:stop] == whole[:stop] and set(row[stop:]) <= {3}


def test_the_models_own_end_and_length_act_in_the_library():
    lm = loud()
    batch = padded(prompts_of(lm)[:1])
    free = contrastive_search(lm.model, **batch, max_new_tokens=9)[0, batch['input_ids'].shape[1]:].tolist()
    lm.model.generation_config = GenerationConfig(max_new_tokens=9, eos_token_id=free[3])
    found = through_library(lm.model, batch)[0, batch['input_ids'].shape[1]:].tolist()
    assert found == free[:free.index(free[3]) + 1]


@pytest.mark.parametrize('settings, named', [
    (dict(repetition_penalty=1.2), 'RepetitionPenalty'), (dict(do_sample=True, top_p=0.9), 'do_sample'), (dict(num_beams=2), 'num_beams'),
    (dict(return_dict_in_generate=True), 'return_dict_in_generate'), (dict(max_time=1.0), 'MaxTime'),
    (dict(stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(1.0)])), 'MaxTime'),
    (dict(logits_processor=LogitsProcessorList([TopPLogitsWarper(0.5)])), 'TopP')])
def test_what_the_library_was_told_besides_is_refused(lm, settings, named):
    with plain(lm.model), pytest.raises(InputError, match=f'custom_contrastive_search.*{named}'):
        through_library(lm.model, dict(input_ids=torch.tensor([[5, 6]])), max_new_tokens=4, **settings)


def test_bad_settings_are_named_within_the_library_too(lm):
    with plain(lm.model), pytest.raises(InputError, match='k is 0'):
        through_library(lm.model, dict(input_ids=torch.tensor([[5, 6]])), k=0, max_new_tokens=4)


def test_the_library_can_tell_the_searchs_arguments_from_its_own():
    own = inspect.signature(_custom_contrastive_search).parameters
    assert {'k', 'alpha'} <= set(own) and not {'k', 'alpha'} & set(GenerationConfig().to_dict())


# --- the decoders by name

def test_decoders_by_name_are_the_functions_and_take_the_same(lm):
    batch, chance = padded(prompts_of(lm)), lambda: torch.Generator().manual_seed(4)
    expected = {'greedy': sample(lm.model, **batch, max_new_tokens=9, temperature=0),
                'sampling': sample(lm.model, **batch, max_new_tokens=9, top_p=0.95, generator=chance()),
                'contrastive search': contrastive_search(lm.model, **batch, max_new_tokens=9),
                'repetition penalty': sample(lm.model, **batch, max_new_tokens=9, temperature=0, bend=penalised)}
    assert DECODERS.keys() == expected.keys()
    for name, decode in DECODERS.items():
        assert torch.equal(decode(lm.model, **batch, max_new_tokens=9, eos_token_id=None, generator=chance()), expected[name])


def test_a_penalty_falls_on_what_stands_there_and_on_no_filling(lm):
    logits = torch.tensor([[2.0, -2.0, 3.0, 0.0, 1.0]]*2)
    ids, mask = torch.tensor([[4, 0, 1], [0, 2, 2]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    found = penalised(logits, ids, mask, torch.arange(2), 2.0)
    assert found.tolist() == [[1.0, -4.0, 3.0, 0.0, 1.0], [1.0, -2.0, 1.5, 0.0, 1.0]]
    prompts = prompts_of(lm)
    together = sample(lm.model, **padded(prompts), max_new_tokens=9, temperature=0, bend=penalised)
    for row, prompt in zip(together.tolist(), prompts):
        alone = sample(lm.model, **padded([prompt]), max_new_tokens=9, temperature=0, bend=penalised)[0].tolist()
        assert row[-len(alone):] == alone
    greedy = sample(lm.model, **padded(prompts), max_new_tokens=9, temperature=0)
    assert torch.equal(greedy, sample(lm.model, **padded(prompts), max_new_tokens=9, temperature=0, bend=partial(penalised, penalty=1.0)))
    assert not torch.equal(greedy, together)


@torch.no_grad()
def set_against(ids: list[int], expert, amateur, plausible: float, new: int, ends: tuple[int, ...] = ()) -> list[int]:
    "Contrastive decoding by its definition, one text, everything read anew."
    for _ in range(new):
        given = dict(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
        said, known = (logits_of(model, hidden_states(model, given))[0, -1].float().log_softmax(-1) for model in (expert, amateur))
        scores = [float(a - b) if a.exp() >= plausible*said.exp().max()*(1 - 1e-6) else -math.inf for a, b in zip(said, known)]
        ids = [*ids, scores.index(max(scores))]
        if ids[-1] in ends: break
    return ids


@pytest.mark.parametrize('keeps', [True, False])
def test_contrastive_decoding_is_its_definition_also_when_rows_end_before_others(monkeypatch, lm, keeps, plausible=0.3):
    expert, amateur = lm, loud(seed=1)
    monkeypatch.setattr(decoding, 'reads_on', lambda model: {True: keeps, False: keeps})
    prompts = prompts_of(expert)
    wanted = [set_against(prompt, expert.model, amateur.model, plausible, 6) for prompt in prompts]
    ends = [wanted[1][len(prompts[1]) + 2], wanted[3][len(prompts[3]) + 4]]
    for stop in ([], ends):
        rows = contrastive_decoding(expert.model, **padded(prompts), amateur=amateur.model, plausible=plausible, max_new_tokens=6,
                                    eos_token_id=stop or None)
        longest = max(map(len, prompts))
        for row, prompt in zip(rows.tolist(), prompts):
            alone = set_against(prompt, expert.model, amateur.model, plausible, 6, tuple(stop))
            assert row[longest - len(prompt):][:len(alone)] == alone and {*row[longest - len(prompt) + len(alone):]} <= {*stop[:1]}


def test_against_itself_nothing_is_left_but_what_is_plausible(lm):
    "All plausible tokens are equal then, and the first of them is taken."
    ids = contrastive_decoding(lm.model, **padded(prompts_of(lm)), amateur=lm.model, plausible=1.0, max_new_tokens=5)
    assert torch.equal(ids, sample(lm.model, **padded(prompts_of(lm)), max_new_tokens=5, temperature=0))
    decode = decoders_against(lm.model)
    assert decode.keys() == DECODERS.keys() | {'contrastive decoding'}
    assert decode['contrastive decoding'](lm.model, **padded(prompts_of(lm)), max_new_tokens=5, generator=None).shape == ids.shape


@pytest.mark.parametrize('plausible', [0.0, -1.0, 1.5, float('nan')])
def test_a_share_that_is_none_is_named(lm, plausible):
    with pytest.raises(InputError, match=f'plausible is {plausible}; set it above 0'):
        contrastive_decoding(lm.model, **padded(prompts_of(lm)), amateur=lm.model, plausible=plausible)


def test_models_of_other_tokens_are_refused(lm):
    other = tiny(['one two three'], size=300)
    with pytest.raises(InputError, match='contrastive decoding takes two with the same'):
        contrastive_decoding(lm.model, **padded(prompts_of(lm)), amateur=other.model)
