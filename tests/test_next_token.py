"""The contrast at the next token: its sets, its value and its slope against loops, and what is refused."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from world import reader

from scilm_adapt import next_token as module
from scilm_adapt.errors import InputError
from scilm_adapt.models import hidden_states
from scilm_adapt.next_token import NextToken, keys_of, next_token_contrast, next_token_part, places, shuffled_classes
from scilm_adapt.papers import document
from scilm_adapt.tokens import encode_document, pack
from scilm_adapt.training import micro_batches

PAPERS = [dict(id=str(n), title=f'On {name}', text=f'We study {name} in {n} experiments. The {name} was measured.')
          for n, name in enumerate(('heat', 'light', 'sound', 'salt', 'iron', 'water'))]


def naive(states: torch.Tensor, classes: list[int], texts: list[int], temperature: float) -> torch.Tensor:
    "The formula, place by place."
    units, losses = [state/max(state.norm(), 1e-12) for state in states], []
    for i, unit in enumerate(units):
        keys = [j for j in range(len(units)) if texts[j] != texts[i] or j < i]
        weights = {j: (unit @ units[j]/temperature).exp() for j in keys}
        alike = [weights[j] for j in keys if classes[j] == classes[i]]
        if alike: losses.append(-(sum(alike)/sum(weights.values())).log())
    return sum(losses)/len(losses) if losses else states.sum()*0


@pytest.fixture(scope='module')
def student(): return reader(PAPERS)


@pytest.fixture(scope='module')
def packed(student): return pack([encode_document(student.tokenizer, document(paper)) for paper in PAPERS], 48)


def whole(packed, rows: list[int]) -> dict[str, torch.Tensor]:
    return packed.batch(rows) | dict(rows=torch.tensor(float(len(rows))))


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.03, 0.07, 1.0]), st.sampled_from([1, 7, 2**22]),
       st.integers(0, 99))
def test_value_and_slope_are_those_of_the_formula_in_chunks_of_any_size(size, classes, texts, temperature, at_once, seed):
    chance = torch.Generator().manual_seed(seed)
    states = torch.randn(size, 4, dtype=torch.float64, generator=chance, requires_grad=True)
    kinds = torch.randint(classes, (size,), generator=chance)
    owners = torch.randint(texts, (size,), generator=chance).sort().values
    wanted = naive(states, kinds.tolist(), owners.tolist(), temperature)
    before, module._AT_ONCE = module._AT_ONCE, at_once
    try:
        found = next_token_contrast(states, kinds, owners, temperature)
        slopes = [torch.autograd.grad(loss, states)[0] for loss in (found, wanted)]
    finally: module._AT_ONCE = before
    assert found.item() == pytest.approx(wanted.item(), rel=1e-10, abs=1e-12)
    torch.testing.assert_close(*slopes, rtol=1e-7, atol=1e-10)


def test_the_slope_is_that_of_small_steps():
    states = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    kinds, owners = torch.tensor([1, 2, 1, 3, 2, 1, 4, 2, 1]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    assert torch.autograd.gradcheck(lambda states: next_token_contrast(states, kinds, owners, 0.5), states)


def test_places_without_a_positive_say_nothing_and_a_batch_of_them_gives_zero_and_no_slope():
    states = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    kinds, owners = torch.tensor([1, 2, 3, 1, 9]), torch.tensor([0, 0, 0, 0, 0])
    alone = next_token_contrast(states, kinds, owners)  # only place 3 has one
    units = torch.nn.functional.normalize(states, dim=-1)
    wanted = (units[3] @ units[:3].T/0.07).log_softmax(-1)[0]
    assert alone.item() == pytest.approx(-wanted.item(), rel=1e-12)
    slope = torch.autograd.grad(alone, states)[0]
    assert (slope[:4] != 0).any(1).all() and not slope[4].any()
    nothing = next_token_contrast(states, torch.arange(5), owners)
    assert nothing == 0 and not torch.autograd.grad(nothing, states)[0].any()
    assert next_token_contrast(states[:0], kinds[:0], owners[:0]) == 0


def test_keys_are_what_came_before_in_the_text_and_all_of_other_texts(packed):
    batch = whole(packed, [*range(len(packed))])
    mask, classes, texts = places(batch)
    keys, positives = keys_of(classes, texts, torch.arange(len(classes)))
    at = [(row, column) for row, marks in enumerate(mask.tolist()) for column, marked in enumerate(marks) if marked]
    assert len(at) == int(batch['count'])
    def text(place): return place[0], int(batch['segments'][place[0], place[1] + 1])
    def following(place): return int(batch['input_ids'][place[0], place[1] + 1])
    for i, one in enumerate(at):
        assert batch['segments'][one] == batch['segments'][one[0], one[1] + 1] > 0  # no place reaches over a border, or is padding
        for j, other in enumerate(at):
            assert keys[i, j] == (text(one) != text(other) or other[1] < one[1])
            assert positives[i, j] == (keys[i, j] and following(one) == following(other))
    assert positives.any(-1).any() and not positives.any(-1).all()


def test_what_stands_in_no_set_changes_nothing(student, packed):
    "Padding, and the places at which a text ends."
    batch = whole(packed, [0, 1])
    hidden = hidden_states(student.model, batch).detach().double()
    found = next_token_part(batch, hidden)
    idle = torch.ones(hidden.shape[:2], dtype=torch.bool)
    idle[:, :-1] = ~batch['loss_mask'][:, 1:]
    assert idle[:, :-1].any()
    changed = hidden.masked_fill(idle[..., None], 1e3)
    filler = batch['input_ids'].masked_fill(batch['segments'] == 0, 7)
    assert next_token_part(batch | dict(input_ids=filler), changed) == found
    assert next_token_part(batch, hidden + 0.1) != found


def test_texts_in_one_row_or_in_two_are_the_same_to_it(student):
    ids = [encode_document(student.tokenizer, document(paper)) for paper in PAPERS[:2]]
    together, apart = pack(ids, 2*max(map(len, ids))), pack(ids, max(map(len, ids)))
    assert (len(together), len(apart)) == (1, 2)
    model = student.model.double()
    found = [next_token_part(batch, hidden_states(model, batch).detach()) for batch in (whole(together, [0]), whole(apart, [0, 1]))]
    assert found[0].item() == pytest.approx(found[1].item(), rel=1e-9)
    student.model.float()


def test_shuffled_classes_are_the_same_ones_elsewhere_and_a_function_of_seed_and_step(packed):
    batch = whole(packed, [0, 1])
    mask = batch['loss_mask'][:, 1:]
    one = shuffled_classes(batch, 3, 0)
    assert torch.equal(one, shuffled_classes(batch, 3, 0)) and not torch.equal(one, shuffled_classes(batch, 4, 0))
    assert not torch.equal(one, shuffled_classes(batch, 3, 1))
    moved, real = one[:, 1:], batch['input_ids'][:, 1:]
    assert sorted(moved[mask].tolist()) == sorted(real[mask].tolist()) and (moved[mask] != real[mask]).float().mean() > 0.5
    assert torch.equal(moved[~mask], real[~mask])
    _, classes, _ = places(batch | dict(classes=one))
    assert torch.equal(classes, moved[mask])


@pytest.mark.parametrize('temperature', [0.0, -1.0, math.nan])
def test_a_temperature_that_cannot_be_is_named(temperature):
    with pytest.raises(InputError, match=f'temperature is {temperature}.*above 0'):
        next_token_contrast(torch.ones(3, 2), torch.ones(3), torch.ones(3), temperature)


def test_lengths_that_do_not_fit_are_named():
    with pytest.raises(InputError, match='3 states, 2 classes and 3 texts'):
        next_token_contrast(torch.ones(3, 2), torch.ones(2), torch.ones(3))


def test_a_part_of_a_batch_is_refused_and_nothing_is_computed_in_silence(student, packed):
    batch = whole(packed, [0, 1, 2])
    for part in micro_batches(batch, 2):
        with pytest.raises(InputError, match='compares the 3 rows of a batch.*set micro_batch to 0'):
            next_token_part(part, hidden_states(student.model, part))
    assert NextToken().temperature == 0.07


def test_no_table_of_all_places_is_kept(student, packed, monkeypatch):
    batch, kept = whole(packed, [0, 1, 2]), []
    hidden = hidden_states(student.model, batch)
    number = int(batch['count'])
    monkeypatch.setattr(module, '_AT_ONCE', 2*number)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        next_token_part(batch, hidden)
    assert 0 < max(kept) <= hidden.numel() < number**2


def test_cosines_are_taken_in_32_bits_where_the_rest_is_computed_in_16():
    states = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    kinds, owners = torch.arange(40) % 5, torch.arange(40)//10
    wanted = next_token_contrast(states.double(), kinds, owners, 0.03)
    with torch.autocast('cpu', torch.bfloat16): found = next_token_contrast(states, kinds, owners, 0.03)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(wanted.item(), rel=1e-5)
