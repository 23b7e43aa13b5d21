"""Contrasts with a model's own mistakes: candidates, losses and slopes against loops, lessons in repetition, and what is refused."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from world import exact, of_family, reader

from scilm_adapt import mistakes as module
from scilm_adapt.contrast import Recipe, contrast_loss
from scilm_adapt.errors import InputError
from scilm_adapt.mistakes import (
    MISTAKES,
    Ditto,
    Mistakes,
    check_ditto,
    check_mistakes,
    ditto,
    ditto_batch,
    ditto_loss,
    earlier_tokens,
    likely_ones,
    mistakes_loss,
    spin,
)
from scilm_adapt.models import hidden_states, logits_of
from scilm_adapt.papers import document
from scilm_adapt.preference import Preference, _make_pairs
from scilm_adapt.tokens import document_ends, encode_document, pack
from scilm_adapt.training import lm_loss, micro_batches, target_logits, target_states

PAPERS = [dict(id=str(n), title=f'On {name}', text=f'We study {name} and {name} in {n} experiments. The {name} was measured, and measured.')
          for n, name in enumerate(('heat', 'light', 'sound', 'salt', 'iron', 'water'))]


@pytest.fixture(scope='module')
def student(): return exact(reader(PAPERS, 128))


@pytest.fixture(scope='module')
def batch(student): return pack([encode_document(student.tokenizer, document(paper)) for paper in PAPERS], 64).batch([0, 1, 2])


def loop(kind: str, logits: torch.Tensor, target: int, candidates: set[int], most: int) -> torch.Tensor:
    "The loss at one place, by the formula."
    kept = [c for c in candidates if not most or (logits > logits[c]).sum() < most]
    said, nothing = logits.exp()/logits.exp().sum(), logits.sum()*0
    if kind == 'unlikelihood': return sum((-(1 - said[c]).log() for c in kept), nothing)
    return (1 + sum(((logits[c] - logits[target]).exp() for c in kept), nothing)).log()


@pytest.mark.parametrize('window', [1, 3, 64])
def test_candidates_are_the_different_words_said_before_in_the_text(batch, window):
    found, place = earlier_tokens(batch, window), 0
    for ids, segments in zip(batch['input_ids'].tolist(), batch['segments'].tolist()):
        for number in sorted({*segments} - {0}):
            text = [i for i, owner in zip(ids, segments) if owner == number]
            for end in range(1, len(text)):
                kept = [i for i in found[place].tolist() if i >= 0]
                assert {*kept} == {*text[max(1, end - window):end]} - {text[end]} and len({*kept}) == len(kept)
                place += 1
    assert place == len(found) == int(batch['count'])


@settings(max_examples=40)
@given(st.sampled_from([*MISTAKES]), st.sampled_from([0, 1, 4, 99]), st.integers(0, 99))
def test_value_and_slope_are_those_of_the_formula(kind, most, seed):
    chance = torch.Generator().manual_seed(seed)
    logits = (4*torch.randn(5, 12, dtype=torch.float64, generator=chance)).requires_grad_()
    targets = torch.randint(12, (5,), generator=chance)
    candidates = torch.stack([torch.randperm(12, generator=chance)[:4] for _ in targets])
    candidates = candidates.masked_fill((candidates == targets[:, None]) | (torch.rand(5, 4, generator=chance) < 0.3), -1)
    found = MISTAKES[kind](logits, targets, candidates, likely_ones(logits, candidates, most))
    wanted = torch.stack([loop(kind, row, int(y), {*some} - {-1}, most) for row, y, some in zip(logits, targets, candidates.tolist())])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(values.sum(), logits)[0] for values in (found, wanted)), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize('kind', MISTAKES)
def test_nothing_said_before_costs_nothing_and_a_certain_mistake_stays_finite(kind):
    logits = torch.tensor([[0.0, 1e4, 0.0]]*2, requires_grad=True)
    candidates = torch.tensor([[-1, -1], [1, -1]])
    found = MISTAKES[kind](logits, torch.tensor([0, 0]), candidates, candidates >= 0)
    slope = torch.autograd.grad(found.sum(), logits)[0]
    assert found[0] == 0 and found[1] > 1 and found.isfinite().all() and slope.isfinite().all() and not slope[0].any()


@pytest.mark.parametrize('family', ['llama', 'gemma2', 'cohere'])  # plain, with a soft cap, with scaled logits
@pytest.mark.parametrize('settings', [Mistakes(), Mistakes('unlikelihood', 5, 0), Mistakes('contrastive token', 64, 3)],
                         ids=lambda settings: settings.kind)
def test_the_part_is_the_mean_over_all_targets_and_adds_up_in_parts(student, batch, family, settings):
    model = of_family(family, student.tokenizer).model.requires_grad_(True)
    def slopes(value): return [p for p in torch.autograd.grad(value, [*model.parameters()], allow_unused=True) if p is not None]
    states, targets = target_states(hidden_states(model, batch), batch)
    logits, candidates = logits_of(model, states), earlier_tokens(batch, settings.window)
    wanted = torch.stack([loop(settings.kind, *row, settings.likely) for row in
                          zip(logits, targets.tolist(), [{*some} - {-1} for some in candidates.tolist()])]).mean()
    whole = mistakes_loss(target_logits(model, batch), batch, settings)
    cut = sum(mistakes_loss(target_logits(model, part), part, settings) for part in micro_batches(batch, 1))
    assert wanted > 1e-3
    for value in (whole, cut):
        assert value.item() == pytest.approx(wanted.item(), rel=1e-6)
        for one, other in zip(slopes(value), slopes(wanted), strict=True): torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
        wanted = mistakes_loss(target_logits(model, batch), batch, settings)


def test_no_second_table_of_tokens_and_words_is_kept(student, batch):
    kept, predicted = [], target_logits(student.model, batch)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        mistakes_loss(predicted, batch)
    tables = [tensor for tensor in kept if tensor.numel() >= predicted[0].numel()]
    assert kept and all(tensor.data_ptr() == predicted[0].data_ptr() for tensor in tables)


def test_reading_and_the_part_share_one_product_with_the_output_head(student, batch, monkeypatch):
    asked = []
    monkeypatch.setattr('scilm_adapt.training.logits_of', lambda model, states: asked.append(len(states)) or logits_of(model, states))
    loss = contrast_loss(Recipe(steps=1, token_weight=0, pairs_weight=0, mistakes_weight=0.3))(student.model, batch)
    assert asked == [int(batch['count'])] and loss['loss'].item() == pytest.approx((loss['lm'] + 0.3*loss['mistakes']).item())
    torch.testing.assert_close(loss['lm'], lm_loss(student.model, batch))
    torch.testing.assert_close(loss['mistakes'], mistakes_loss(target_logits(student.model, batch), batch))


# --- lessons in repetition

def test_rows_repeat_a_sentence_of_a_paper_and_are_a_function_of_seed_and_step(student):
    make = lambda step, seed: ditto_batch(student.tokenizer, PAPERS, Ditto(batch=3, length=40), step, seed)  # noqa: E731
    one = make(5, 0)
    assert all(torch.equal(one[name], make(5, 0)[name]) for name in one)
    assert not torch.equal(one['ditto_input_ids'], make(6, 0)['ditto_input_ids'])
    assert not torch.equal(one['ditto_input_ids'], make(5, 1)['ditto_input_ids'])
    papers = [' '.join(paper['text'].split()) for paper in PAPERS]
    for ids, period in zip(one['ditto_input_ids'].tolist(), one['ditto_period'].tolist()):
        assert ids[0] == document_ends(student.tokenizer)[0] and len(ids) == 40 and 4 <= period <= 19
        assert all(ids[at] == ids[at - period] for at in range(1 + period, 40))
        sentence = ' '.join(student.tokenizer.decode(ids[1:1 + period]).split())
        assert any(sentence in text for text in papers)
    assert int(one['ditto_count']) == sum(39 - period for period in one['ditto_period'].tolist())


@pytest.mark.parametrize('at_once', [2**23, 1000])
@pytest.mark.parametrize('decay', [0.0, 0.5, 1.0])
def test_each_round_is_held_against_the_one_before(student, monkeypatch, decay, at_once):
    monkeypatch.setattr(module, '_AT_ONCE', at_once)
    lessons, total, number = ditto_batch(student.tokenizer, PAPERS, Ditto(batch=3, length=30), 0, 0), 0.0, 0
    for ids, period in zip(lessons['ditto_input_ids'], lessons['ditto_period'].tolist()):
        hidden = hidden_states(student.model, dict(input_ids=ids[None], attention_mask=torch.ones(1, 30)))[0]
        said = [logits_of(student.model, hidden[at - 1]).softmax(-1)[ids[at]] for at in range(1, 30)]
        for at in range(period, 29):
            total, number = total - (1 - (said[at] - decay*said[at - period].detach()).abs()).log(), number + 1
    parts = micro_batches(dict(input_ids=torch.zeros(4, 1)) | lessons, 1)  # one of them has no row
    parameters = [p for p in student.model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(total/number, parameters)
    for found in (ditto_loss(student.model, lessons, decay), sum(ditto_loss(student.model, part, decay) for part in parts)):
        assert found.item() == pytest.approx((total/number).item(), rel=1e-9)
        for one, other in zip(torch.autograd.grad(found, parameters), wanted): torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)


def test_the_round_before_gets_no_gradient_and_a_certain_word_stays_finite():
    said, before = torch.tensor([0.3, 1.0, 0.2], requires_grad=True), torch.tensor([0.4, 0.0, 0.4], requires_grad=True)
    losses = ditto(said, before)
    slope, = torch.autograd.grad(losses.sum(), said)
    assert not losses.requires_grad or before.grad is None
    assert losses.tolist() == pytest.approx([-math.log(0.9), -math.log(1e-5), 0.0], rel=0.03) and slope.isfinite().all()
    with pytest.raises(RuntimeError, match='not have been used'): torch.autograd.grad(ditto(said, before).sum(), before)


def test_papers_without_a_sentence_are_named(student):
    with pytest.raises(InputError, match='No paper has a sentence of four tokens.*ditto_weight to 0'):
        ditto_batch(student.tokenizer, [dict(text=''), dict(text='')], Ditto(), 0, 0)


# --- real against own

def test_a_round_of_spin_prefers_the_real_and_its_control_the_own_continuation(student):
    long = [paper | dict(text=' '.join([paper['text']]*3)) for paper in PAPERS]
    told = {name: _make_pairs(student, long, Preference(**spin(**control), length=60))
            for name, control in dict(real=dict(), reversed=dict(reversed=True), shuffled=dict(shuffled=True)).items()}
    assert {pair.corruption for pair in told['real']} == {'own'} and all(pair.reference for pair in told['real'])
    def both(pair): return pair.chosen, pair.rejected
    assert [both(pair) for pair in told['reversed']] == [both(pair)[::-1] for pair in told['real']]
    for one, mixed in zip(told['real'], told['shuffled']): assert both(mixed) in (both(one), both(one)[::-1])


@pytest.mark.parametrize('check, named', [
    (lambda: check_mistakes(Mistakes('likelihood')), "kind is 'likelihood'; choose contrastive token or unlikelihood"),
    (lambda: check_mistakes(Mistakes(window=0)), 'window is 0; set it to 1'),
    (lambda: check_mistakes(Mistakes(likely=-1)), 'likely is -1; set it to 0'),
    (lambda: check_ditto(Ditto(batch=0), 64), 'batch is 0 rows'),
    (lambda: check_ditto(Ditto(length=65), 64), 'length is 65 tokens.*at most the 64'),
    (lambda: check_ditto(Ditto(length=8), 64), 'length is 8 tokens.*9 or more'),
    (lambda: check_ditto(Ditto(length=32, decay=math.nan), 64), 'decay is nan')])
def test_what_cannot_work_is_named(check, named):
    with pytest.raises(InputError, match=named): check()
