"""Pairs: the loss against its definition, what counts as a pair, and a gradient that no cutting, sharing or saving of memory changes."""
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training import in_two
from torch import distributed
from world import exact, reader

from scilm_adapt.errors import InputError
from scilm_adapt.models import build, families, tiny
from scilm_adapt.pairs import (
    _WINDOW,
    POOLINGS,
    VIEWS,
    Pairs,
    Together,
    _alike,
    _borders,
    _Cached,
    _check_pairs,
    _circles,
    _neighbours,
    _pool,
    _view_ids,
    embed,
    info_nce,
    pair_batch,
    pair_loss,
    pair_maker,
    retrieval,
    vectors_of,
    views,
)
from scilm_adapt.papers import document
from scilm_adapt.tokens import encode_document, pack, train_tokenizer
from scilm_adapt.training import fit, lm_loss, micro_batches

torch.set_num_threads(1)
SUBJECTS = ('heat', 'light', 'sound', 'gravity', 'friction', 'pressure', 'salt', 'iron', 'water', 'glass', 'copper', 'helium')
PAPERS = [dict(id=name, title=f'On {name}', text=f'We study {name} in {number} experiments. The {name} was measured.', tldr=f'{name}!',
               topics=['even' if number % 2 else 'odd'])
          for number, name in enumerate(SUBJECTS)]


@pytest.fixture(scope='module')
def student():
    return reader(PAPERS)


# --- the loss

def naive(a, b, temperature, same, negatives=(), excluded=None):
    "Symmetric InfoNCE, one pair and one wrong answer after the other."
    def log_share(own, others): return own - torch.stack([own, *others]).logsumexp(0)
    def score(x, y): return (x @ y)/(x.norm()*y.norm())/temperature
    total = 0.0
    for i in range(len(a)):
        others = [b[j] for j in range(len(a)) if j != i and not same[i, j]]
        others += [more for m, more in enumerate(negatives) if excluded is None or not excluded[i, m]]
        total -= log_share(score(a[i], b[i]), [score(a[i], other) for other in others])
        others = [j for j in range(len(a)) if j != i and not same[j, i]]
        total -= log_share(score(a[i], b[i]), [score(a[j], b[i]) for j in others])
    return total/(2*len(a))


def vectors(seed, number, size=5):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, number, size, dtype=torch.float64, generator=generator)
    return a.requires_grad_(), b.requires_grad_(), torch.rand(number, number, generator=generator) < 0.3


@given(st.integers(0, 999), st.integers(1, 7), st.integers(1, 4), st.sampled_from([0.05, 0.5, 1.0]))
def test_info_nce_is_its_definition(seed, number, more, temperature):
    a, b, same = vectors(seed, number)  # `same` is not even symmetric here
    negatives, excluded = vectors(seed + 1, more)[0], torch.rand(number, more) < 0.3
    close = lambda one, other: torch.isclose(one, other, rtol=1e-10, atol=1e-12)
    assert close(info_nce(a, b, temperature, same), naive(a, b, temperature, same))
    assert close(info_nce(a, b, temperature), naive(a, b, temperature, torch.zeros_like(same)))
    assert close(info_nce(a, b, temperature, same, negatives, excluded), naive(a, b, temperature, same, negatives, excluded))
    assert close(info_nce(a, b, temperature, same, negatives), naive(a, b, temperature, same, negatives))


@pytest.mark.parametrize('masked', [False, True])
def test_info_nce_has_the_right_gradient(masked):
    (a, b, same), (more, _, _) = vectors(1, 5), vectors(2, 3)
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a, b, 0.3, same if masked else None), (a, b))
    assert torch.autograd.gradcheck(lambda a, b, more: info_nce(a, b, 0.3, same, more, same[:, :3] if masked else None), (a, b, more))


def test_info_nce_sees_directions_only_and_both_sides_alike():
    a, b, _ = vectors(2, 6)
    assert torch.isclose(info_nce(a, b), info_nce(3*a, b/7)) and torch.isclose(info_nce(a, b), info_nce(b, a))


@pytest.mark.parametrize('same', [None, torch.ones(3, 3, dtype=torch.bool)])
def test_a_pair_without_wrong_answers_costs_nothing_and_stays_finite(same):
    a, b, _ = vectors(3, 3 if same is not None else 1)
    loss = info_nce(a, b, same=same)
    loss.backward()
    assert loss == 0 and not a.grad.any() and not b.grad.any()


def test_info_nce_is_exact_under_autocast():
    a, b = (x.detach().float() for x in vectors(4, 8, 32)[:2])
    with torch.autocast('cpu', torch.bfloat16): low = info_nce(a.bfloat16(), b.bfloat16())
    assert low.dtype == torch.float32 and torch.isclose(low, info_nce(a.bfloat16().float(), b.bfloat16().float()))


@pytest.mark.parametrize('name', POOLINGS)
def test_pooling_is_its_definition_and_ignores_what_is_not_marked(name):
    hidden = torch.randn(4, 6, 3, dtype=torch.float64)
    masks = torch.tensor([[1]*6, [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 0]])
    found = POOLINGS[name](hidden, masks)
    for states, mask, vector in zip(hidden, masks, found):
        states = states[mask.bool()]
        weights = dict(mean=np.ones, last=lambda n: np.eye(n)[-1], weighted=lambda n: np.arange(1, n + 1))[name](len(states))
        assert torch.allclose(vector, sum(w*state for w, state in zip(weights, states))/sum(weights), rtol=1e-12)
    assert torch.equal(POOLINGS[name](torch.where(masks[..., None] > 0, hidden, 1e6), masks), found)
    assert POOLINGS[name](hidden.bfloat16(), masks).dtype == torch.float32 and found.dtype == torch.float64
    assert torch.autograd.gradcheck(lambda states: POOLINGS[name](states, masks), hidden.requires_grad_())


def test_pool_is_the_mean(): assert POOLINGS['mean'] is _pool


def test_retrieval_counts_ties_against_the_model():
    a = torch.eye(4)
    assert retrieval(a, a) == {'mrr': 1.0, 'recall@1': 1.0, 'recall@10': 1.0}
    assert retrieval(a, a.roll(1, 0))['recall@1'] == 0
    assert retrieval(torch.ones(4, 3), torch.ones(4, 3)) == {'mrr': 0.25, 'recall@1': 0.0, 'recall@10': 1.0}
    b = torch.tensor([[1.0, 0, 0, 0], [0.9, 1, 0, 0], [0, 0, 1, 0], [2, 0, 0, 0.1]])  # the fourth points at the first
    assert retrieval(a, b)['recall@1'] == 1.0
    assert retrieval(b, a) == pytest.approx({'mrr': 0.875, 'recall@1': 0.75, 'recall@10': 1.0})


def test_retrieval_ranks_among_all_candidates_however_many():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(1500, 4, generator=generator), torch.randn(2100, 4, generator=generator)
    b[:1500] += a
    a, b = (vectors/vectors.norm(dim=1, keepdim=True) for vectors in (a, b))
    scores = (a.double() @ b.double().T).numpy()
    ranks = np.array([1 + sum(scores[i] > scores[i, i]) for i in range(1500)])
    found = retrieval(a, b)
    assert found['mrr'] == pytest.approx((1/ranks).mean(), rel=1e-3) and 0 < found['recall@1'] < found['recall@10'] < 1
    for k in (1, 10): assert found[f'recall@{k}'] == pytest.approx((ranks <= k).mean(), abs=2e-3)


# --- pairs

def test_the_title_is_no_part_of_the_other_view():
    assert views(PAPERS[0]) == (PAPERS[0]['title'], PAPERS[0]['text'])
    assert views(dict(title='On heat', text='On heat. It flows.')) == ('On heat', '. It flows.')
    assert views(dict(title='', text=' kept as it is')) == ('', ' kept as it is')


@pytest.mark.parametrize('family', families(1, 1, 1, 1, 1))
def test_a_text_has_one_vector_alone_and_in_a_batch(family):
    lm, texts = exact(tiny(SUBJECTS, family, hidden=32)), ['iron', PAPERS[3]['text'], 'salt and water']
    together = embed(lm, texts)
    assert torch.allclose(together, torch.cat([embed(lm, [text]) for text in texts]), atol=1e-10)
    assert torch.allclose(together, embed(lm, texts, batch_size=2), atol=1e-10)


def test_a_view_is_cut_to_its_beginning(student):
    long = ' '.join(paper['text'] for paper in PAPERS)*50
    assert _view_ids(student.tokenizer, long, 8) == encode_document(student.tokenizer, long)[:8]


# --- views

def test_a_view_is_two_texts_or_none():
    paper = PAPERS[2]
    assert VIEWS['title'](paper) == views(paper) and VIEWS['tldr'](paper) == ('sound!', paper['text'])
    assert VIEWS['halves'](paper) == VIEWS['first'](paper) == ('We study sound in 2 experiments. ', 'The sound was measured.')
    bare = dict(title=' ', text='one sentence, which is never parted')
    assert not any(take(bare) for take in VIEWS.values())


@pytest.mark.parametrize('text, expected', [
    ('A b. C d! E f? g h. 3 i.', ['C d! ', 'E f? g h. ', '3 i.']), ('It is, e.g. here. "So." We go.', ['"So." ', 'We go.']),
    ('Первое. Второе. третье', ['Второе. третье']), ('一。二。三', ['二。', '三']), ('No end', []), ('One. ', [])])
def test_sentences_begin_where_they_do(text, expected):
    places = _borders(text)
    assert [text[one:other] for one, other in zip(places, [*places[1:], None])] == expected


def test_halves_meet_near_the_middle_or_not_at_all():
    text = 'A. ' + 'B '*20 + 'c. ' + 'D '*15 + 'e.'
    a, b = VIEWS['halves'](dict(title='', text=text))
    assert a + b == text and b.startswith('D ')
    assert VIEWS['halves'](dict(title='', text='A. ' + 'B '*20)) is None


# --- which pairs are wrong answers

def test_pairs_with_the_same_title_or_text_are_no_negatives(student):
    records = [dict(title='Editorial', text='On salt.'), dict(title='editorial.', text='On iron.'), dict(title='A note', text='On Iron'),
               dict(title='Glass', text='It flows.')]
    same = pair_batch(student.tokenizer, records, 32)['pairs'].whole['same']
    assert same.tolist() == [[True, True, False, False], [True, True, True, False], [False, True, True, False], [False]*3 + [True]]


def long_paper(number: int, changed: int = 0) -> dict:
    words = [f'w{number}x{k}' for k in range(60)]
    for k in range(changed): words[20*k + 5] = 'other'
    return dict(id=f'{number}', title=f'Title {number} {changed}', text=' '.join(words))


def test_near_copies_are_no_negatives_and_others_are(student):
    papers = [long_paper(0), long_paper(1), long_paper(0, 1), long_paper(2)]
    assert _alike(papers, papers).int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    pairs = pair_batch(student.tokenizer, papers, 32, hard=[long_paper(1, 1), long_paper(3)])['pairs']
    assert torch.equal(pairs.whole['same'], _alike(papers, papers))
    assert pairs.whole['excluded'].int().tolist() == [[0, 0], [1, 0], [0, 0], [0, 0]]
    lm = exact(reader(papers))
    batch = pair_batch(lm.tokenizer, papers, 32, hard=[long_paper(1, 1), long_paper(3)])
    a, b, hard = (vectors_of(lm.model, batch['pairs'], side, 'mean', None) for side in ('a', 'b', 'hard'))
    expected = naive(a, b, 0.05, pairs.whole['same'], hard, pairs.whole['excluded'])
    assert torch.isclose(pair_loss(lm.model, batch), expected, rtol=1e-10)


def test_with_partners_the_papers_of_both_sides_are_compared(student):
    papers, partners = [long_paper(k) for k in range(4)], [long_paper(4), long_paper(0, 1), long_paper(5), long_paper(4, 1)]
    same = pair_batch(student.tokenizer, papers, 32, partners=partners)['pairs'].whole['same']
    assert same.int().tolist() == [[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]  # 0 and 1 by paper 0, 0 and 3 by paper 4


def test_of_one_topic_no_paper_is_a_wrong_answer_for_another(student):
    pairs = pair_maker(student.tokenizer, PAPERS, Pairs(views=('topic',), batch=12), 0)(0)['pairs']
    chosen = [next(paper for paper in PAPERS
                   if torch.equal(row[mask.bool()], torch.tensor(_view_ids(student.tokenizer, paper['text'], 64))))
              for row, mask in zip(pairs.rows['a_input_ids'], pairs.rows['a_attention_mask'])]
    assert pairs.whole['same'].tolist() == [[one['topics'] == other['topics'] for one in chosen] for other in chosen]


def read_back(student, pairs: Together, side: str) -> list[str]:
    return [student.tokenizer.decode(row[mask.bool()], skip_special_tokens=True).strip()
            for row, mask in zip(pairs.rows[f'{side}_input_ids'], pairs.rows[f'{side}_attention_mask'])]


def test_partners_are_other_papers_of_the_topic_and_change_with_the_epoch(student):
    pairs_at = pair_maker(student.tokenizer, PAPERS, Pairs(views=('topic',), batch=6), 0)
    topic_of, found = {paper['text']: paper['topics'] for paper in PAPERS}, {}
    for step in range(8):
        for a, b in zip(*(read_back(student, pairs_at(step)['pairs'], side) for side in 'ab')):
            assert a != b and topic_of[a] == topic_of[b]
            found.setdefault(a, set()).add(b)
    assert len(found) == 12 and max(map(len, found.values())) > 1


def test_shuffled_pairs_have_one_wrong_partner_each(student):
    pairs_at, own, found = pair_maker(student.tokenizer, PAPERS, Pairs(batch=6, shuffled=True), 0), dict(map(views, PAPERS)), {}
    for step in range(6):
        for a, b in zip(*(read_back(student, pairs_at(step)['pairs'], side) for side in 'ab')): found.setdefault(a, set()).add(b)
    assert all(len(partners) == 1 and own[title] not in partners for title, partners in found.items())
    assert set().union(*found.values()) == set(own.values())


@given(st.lists(st.sampled_from('abc'), max_size=12), st.integers(0, 9))
def test_circles_lead_through_all_of_a_label_and_back(labels, seed):
    following = _circles(labels, seed)
    assert sorted(following) == sorted(following.values()) == list(range(len(labels)))
    for start in following:
        place, seen = following[start], {start}
        while place != start: seen.add(place); place = following[place]
        assert seen == {other for other, label in enumerate(labels) if label == labels[start]}


def test_hard_negatives_are_of_the_field_and_similar_but_not_the_nearest():
    papers = [dict(title='', text=f'{"salt "*(40 - k)} {"iron "*(k + 1)} n{k}', topics=['a' if k < 30 else 'b']) for k in range(40)]
    window = _neighbours(papers)(0)
    assert len(window) == _WINDOW[1] - _WINDOW[0] + 1 and 0 not in window and max(window) < 30
    few = [paper | dict(topics=['a' if k < 5 else 'b']) for k, paper in enumerate(papers)]
    assert set(_neighbours(few)(0)[:3]) < {1, 2, 3, 4} and len(_neighbours(few)(0)) == 19
    words = [dict(title='', text=f'common{k} {" ".join(f"word{j}" for j in range(k, k + 8))}', topics=[]) for k in range(60)]
    assert {29, 31} & set(_neighbours(words)(30)[:3]) and len({29, 31} & set(_neighbours(words)(30))) == 1  # the very nearest is left out


def test_hard_negatives_are_drawn_for_each_pair(student):
    papers = [dict(title=f'On {k}', text=f'Number {k} of the numbers.', topics=['even' if k % 2 else 'odd']) for k in range(50)]
    pairs = pair_maker(student.tokenizer, papers, Pairs(batch=5, hard=3), 0)(0)['pairs']
    hard = [int(text.split()[1]) for text in read_back(student, pairs, 'hard')]
    own = [int(text.split()[1]) for text in read_back(student, pairs, 'a')]
    assert len(hard) == 15 and all(hard[k] % 2 == own[k//3] % 2 and hard[k] != own[k//3] for k in range(15))
    assert all(len(set(hard[k:k + 3])) == 3 for k in (0, 3, 6, 9, 12)) and pairs.whole['excluded'].shape == (5, 15)


def test_views_take_turns_and_a_batch_is_a_function_of_seed_and_step(student):
    settings = Pairs(views=('title', 'tldr'), batch=4)
    make = lambda seed: pair_maker(student.tokenizer, PAPERS, settings, seed)
    same = lambda x, y: all(torch.equal(x['pairs'].rows[name], y['pairs'].rows[name]) for name in x['pairs'].rows if 'ids' in name)
    first = make(1)
    for step in (4, 0, 2): first(step)
    assert same(first(3), make(1)(3)) and not same(first(2), first(4)) and not same(first(2), make(2)(2))
    assert all(text.startswith('On ') for text in read_back(student, first(0)['pairs'], 'a'))
    assert all(text.endswith('!') for text in read_back(student, first(1)['pairs'], 'a'))
    alone = pair_maker(student.tokenizer, PAPERS, Pairs(batch=4), 1)
    assert same(first(2), alone(1)) and same(first(4), alone(2))


@pytest.mark.parametrize('change, named', [
    (dict(views=('abstract',)), r"views=….*'abstract'.*title"), (dict(views=()), 'views'),
    (dict(pooling='max'), r"pooling=….*'max'.*weighted"),
    (dict(batch=1), r'batch=1.*at least 2'), (dict(length=1), 'length=1'), (dict(chunk=0), 'chunk=0'), (dict(hard=-1), 'hard=-1'),
    (dict(temperature=0.0), 'temperature=0.0'), (dict(hard=1, views=('title', 'topic')), "hard.*'topic'"), (dict(hard=11), 'hard=11.*10'),
    (dict(untitled=True), "view 'title'.*none.*title_field"), (dict(untitled=True, views=('tldr',)), "view 'tldr'.*'first'"),
    (dict(untitled=True, views=('topic',)), "view 'topic'.*topic"), (dict(untitled=True, views=('halves',)), "view 'halves'.*sentences")])
def test_pairs_that_cannot_be_made_are_named_at_once(student, change, named):
    settings = dict(change)
    papers = [dict(title='', text=paper['title'], topics=[paper['id']]) for paper in PAPERS] if settings.pop('untitled', False) else PAPERS
    with pytest.raises(InputError, match=named): _check_pairs(Pairs(**settings), papers)
    with pytest.raises(InputError, match=named): pair_maker(student.tokenizer, papers, Pairs(**settings), 0)


def test_every_process_needs_a_pair(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '8')
    with pytest.raises(InputError, match='batch=4.*at least 8'): _check_pairs(Pairs(batch=4), PAPERS)


# --- the gradient, cached or not, cut or not

def with_dropout(family: str = 'gpt2'):
    lm = reader(PAPERS, family=family, layers=2)
    lm.model.double().train()
    if family == 'llama':
        for layer in lm.model.base_model.layers: layer.self_attn.attention_dropout = 0.2
    return lm


def gradient(model, loss) -> tuple[float, torch.Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    value = loss()
    value.backward()
    return value.item(), torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize('family', ['gpt2', 'llama'])
@pytest.mark.parametrize('pooling', POOLINGS)
def test_a_cached_gradient_is_the_gradient_with_dropout_replayed(family, pooling):
    lm = with_dropout(family)
    batch, model = pair_batch(lm.tokenizer, PAPERS[:7], 32, hard=PAPERS[7:10]), lm.model
    def keeping_everything():
        pairs = batch['pairs']
        def vectors(side): return torch.cat([vectors_of(model, pairs[at:at + 3], side, pooling, None)
                                             for at in range(0, len(pairs.rows[f'{side}_input_ids']), 3)])
        a, b, hard = map(vectors, ('a', 'b', 'hard'))
        return info_nce(a, b, 0.05, pairs.whole['same'], hard, pairs.whole['excluded'])
    value, cached = gradient(model, lambda: pair_loss(model, batch, pooling=pooling, chunk=3))
    expected, whole = gradient(model, keeping_everything)
    assert abs(value - expected) < 1e-12 and (cached - whole).abs().max() < 1e-12 and whole.abs().max() > 1e-3
    again = gradient(model, lambda: pair_loss(model, batch, pooling=pooling))[1]  # other dropout: it matters
    assert (again - whole).abs().max() > 1e-3
    model.eval()
    for chunk in (1, 4, 7):
        value, cached = gradient(model, lambda: pair_loss(model, batch, pooling=pooling, chunk=chunk))  # noqa: B023
        expected, whole = gradient(model, lambda: pair_loss(model, batch, pooling=pooling))
        assert abs(value - expected) < 1e-12 and (cached - whole).abs().max() < 1e-12


def test_cached_has_the_right_gradient_and_leaves_the_random_numbers_alone():
    weights = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True), torch.randn(2, dtype=torch.float64, requires_grad=True)]
    unused, x = torch.randn(1, requires_grad=True, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    def run(*weights):
        torch.manual_seed(0)
        embed = lambda part: torch.nn.functional.dropout(part @ weights[0], 0.5).tanh() + weights[1]
        return _Cached.apply(embed, [(x[:2],), (x[2:4],), (x[4:],)], x.device, *weights, unused)
    assert torch.autograd.gradcheck(run, weights)
    torch.manual_seed(0)
    whole = run(*weights)
    state = torch.get_rng_state()
    whole.sum().backward()
    assert torch.equal(state, torch.get_rng_state()) and unused.grad is None


def test_a_cached_gradient_works_under_checkpointing_autocast_and_with_frozen_weights():
    lm = with_dropout('llama')
    model, batch = lm.model.float().eval(), pair_batch(lm.tokenizer, PAPERS[:6], 32)
    expected = gradient(model, lambda: pair_loss(model, batch))[1]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    model.train()
    for layer in model.base_model.layers: layer.self_attn.attention_dropout = 0.0
    assert torch.allclose(gradient(model, lambda: pair_loss(model, batch, chunk=2))[1], expected, atol=1e-5)
    model.gradient_checkpointing_disable()
    with torch.autocast('cpu', torch.bfloat16): low = pair_loss(model, batch, chunk=2)
    model.zero_grad()
    low.backward()  # outside, as Accelerate does it
    rounded = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert 1e-6 < (rounded - expected).norm()/expected.norm() < 0.1
    frozen = model.base_model.embed_tokens.weight.requires_grad_(False)
    model.zero_grad()
    pair_loss(model, batch, chunk=2).backward()
    assert frozen.grad is None and model.base_model.layers[0].mlp.up_proj.weight.grad.any()


def test_texts_are_embedded_again_in_the_precision_of_the_first_time():
    weight, seen = torch.randn(3, 2, requires_grad=True), []
    def embed(part):
        seen.append((out := part @ weight).dtype)
        return out.float()
    with torch.autocast('cpu', torch.bfloat16): found = _Cached.apply(embed, [(torch.ones(2, 3),)]*2, weight.device, weight)
    found.sum().backward()  # outside, as Accelerate does it
    assert seen == [torch.bfloat16]*4


def memory() -> None:
    "Prints by how much (MiB) the process's highest memory rises with 32 pairs, then with 512 in chunks, then with 256 at once."
    papers = [dict(title=f'On {n}', text=' '.join(SUBJECTS[(n*k + k*k) % 12] for k in range(3, 60))) for n in range(512)]
    lm = tiny([paper['text'] for paper in papers[:20]], hidden=96, layers=2, context=64)
    batches = {number: pair_batch(lm.tokenizer, papers[:number], 32) for number in (2, 32, 512, 256)}
    def highest(number: int, chunk: int | None) -> float:
        pair_loss(lm.model, batches[number], chunk=chunk).backward()
        lines = Path('/proc/self/status').read_text().splitlines()  # getrusage counts what started this process, too
        return next(int(line.split()[1])/1024 for line in lines if line.startswith('VmHWM:'))
    before = highest(2, None)
    print(*(highest(number, chunk) - before for number, chunk in ((32, None), (512, 32), (256, None))))


@pytest.mark.skipif(sys.platform != 'linux', reason='memory is measured as Linux does')
def test_memory_does_not_grow_with_the_batch():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-2000:]
    few, many, large = map(float, done.stdout.split())
    assert many < 1.5*few + 16 < large/2, (few, many, large)  # a table of cosines takes 1 MiB, and a few are needed


@pytest.mark.parametrize('chunk', [None, 3])
@pytest.mark.parametrize('rows', [1, 4])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(rows, chunk):
    lm = reader(PAPERS)
    model = lm.model.double()
    packed = pack([encode_document(lm.tokenizer, document(paper)) for paper in PAPERS*3], 48)
    batch = packed.batch(range(16)) | pair_batch(lm.tokenizer, PAPERS[:9], 32)
    def total(parts, **options):
        return gradient(model, lambda: sum(lm_loss(model, part) + pair_loss(model, part, **options) for part in parts))
    value, whole = total([batch])
    cut, sum_of_parts = total(micro_batches(batch, rows), chunk=chunk)
    assert len(micro_batches(batch, rows)) == 16//rows and abs(value - cut) < 1e-9 and (whole - sum_of_parts).abs().max() < 1e-9


def test_pairs_are_shared_out_among_processes_and_whole_in_the_first_part():
    batch = dict(input_ids=torch.zeros(7, 2), pairs=Together(dict(a=torch.arange(5), hard=torch.arange(10)), dict(same=torch.eye(5))))
    for ranks in (1, 2, 3):
        shares = [micro_batches(batch, 1, rank, ranks) for rank in range(ranks)]
        firsts = [parts[0]['pairs'] for parts in shares]
        assert sorted(torch.cat([first.rows['a'] for first in firsts]).tolist()) == list(range(5))
        assert sorted(torch.cat([first.rows['hard'] for first in firsts]).tolist()) == list(range(10))
        assert all(len(first.whole['same']) == 5 for first in firsts)
        assert not any(len(part['pairs']) for parts in shares for part in parts[1:])


# --- several processes

CASES = dict(whole=dict(pairs=6, micro_batch=None), parts=dict(pairs=7, micro_batch=1), cached=dict(pairs=9, micro_batch=2, chunk=2),
             hard=dict(pairs=5, micro_batch=None, chunk=1, hard=2))


def trained(pairs: int, micro_batch: int | None, chunk: int | None = None, hard: int = 0) -> tuple[list[dict], dict]:
    papers = PAPERS + [dict(title=f'{a} {b}', text=f'{a} of {b}. So {b}.', topics=['odd']) for a in SUBJECTS[:5] for b in SUBJECTS[:5]]
    lm = build(train_tokenizer([document(paper) for paper in papers], 400), hidden=32, layers=2, heads=2, context=64)
    lm.model.double()
    packed = pack([encode_document(lm.tokenizer, document(paper)) for paper in papers], 48)
    pairs_at = pair_maker(lm.tokenizer, papers, Pairs(batch=pairs, length=24, hard=hard), 0)
    def loss(model, batch):
        parts = dict(lm=lm_loss(model, batch), pairs=pair_loss(model, batch, chunk=chunk))
        return dict(loss=parts['lm'] + 0.5*parts['pairs'], **parts)
    history = fit(lm.model, lambda step: packed.batch(range(step, step + 5)) | pairs_at(step), loss, 3, learning_rate=3e-3,
                  micro_batch=micro_batch, precision='no')
    return history, {name: p.detach().tolist() for name, p in lm.model.named_parameters() if 'layers.1' in name}


def work(folder: Path, rank: int) -> None:
    "What each of two processes does: all cases, one after the other."
    for name, case in CASES.items(): (folder/f'{name}.{rank}.json').write_text(json.dumps(trained(**case)))
    distributed.destroy_process_group()


@pytest.fixture(scope='module')
def together(tmp_path_factory) -> Path:
    "The folder in which two processes left what they found."
    folder = tmp_path_factory.mktemp('processes')
    in_two(partial(work, folder))
    return folder


@pytest.mark.parametrize('name', CASES)
def test_two_processes_contrast_as_one(together, name):
    history, weights = trained(**CASES[name])
    found = [json.loads((together/f'{name}.{rank}.json').read_text()) for rank in (0, 1)]
    assert found[0][1] == found[1][1]
    for one, other in zip(history, found[0][0], strict=True):
        for part in ('loss', 'lm', 'pairs', 'grad_norm'): assert math.isclose(one[part], other[part], rel_tol=1e-9), part
    assert history[0]['pairs'] > 0.1 and abs(history[0]['loss'] - history[2]['loss']) > 0.01  # something was asked and learnt
    for key, values in weights.items(): assert torch.allclose(torch.tensor(values), torch.tensor(found[0][1][key]), atol=1e-7), key


if __name__ == '__main__': memory()
