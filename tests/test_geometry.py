"""The geometry of states: each measure and the token contrast against loops, whatever the packing, and a probe that follows the loss."""
import copy
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from world import exact, sentence

from scilm_adapt import geometry
from scilm_adapt.errors import InputError
from scilm_adapt.geometry import _similarities, alignment, isotropy, probe, similarity_figure, token_contrast, token_pairs, uniformity
from scilm_adapt.models import hidden_states, tiny
from scilm_adapt.tokens import encode_documents, pack
from scilm_adapt.training import fit, lm_loss, micro_batches

TEXTS = [sentence(number, 6 + 5*(number % 5)) for number in range(40)]


@pytest.fixture(scope='module')
def lm():
    return tiny(TEXTS, hidden=32, context=64)


def narrowed(lm, strength=0.03):
    "The model with one direction added to all its word vectors."
    lm = replace(lm, model=copy.deepcopy(lm.model))
    with torch.no_grad(): lm.model.get_input_embeddings().weight += strength*torch.randn(32, generator=torch.Generator().manual_seed(0))
    return lm


def world(seed, rows=3, length=11, size=4, kind=torch.float64):
    "States that share a direction, and segments with padding anywhere and documents that need not be in one piece."
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, size, dtype=torch.float64, generator=generator) + 0.7
    return hidden.to(kind).requires_grad_(), torch.randint(0, 4, (rows, length), generator=generator)


def naive_pairs(hidden, segments, band=0):
    "Cosines of all ordered pairs of different tokens of one document that are more than `band` of its tokens apart."
    for row, labels in zip(hidden, segments.tolist()):
        for label in set(labels) - {0}:
            own = [row[i] for i, other in enumerate(labels) if other == label]
            yield from ((x @ y)/(x.norm()*y.norm()) for i, x in enumerate(own) for j, y in enumerate(own) if abs(i - j) > band)


def naive(hidden, segments, margin=0.5, band=0, count=None):
    losses = [torch.clamp(margin - 1 + cosine, min=0) for cosine in naive_pairs(hidden, segments, band)]
    return sum(losses, torch.zeros((), dtype=hidden.dtype))/(count or max(1, len(losses)))


def gradient(loss, states):
    return torch.autograd.grad(loss, states, allow_unused=True)[0]


# --- the measures

@given(st.integers(0, 9999), st.integers(1, 4), st.integers(1, 12), st.integers(0, 3))
def test_isotropy_and_the_number_of_pairs_are_those_of_a_double_loop(seed, rows, length, band):
    hidden, segments = world(seed, rows, length)
    cosines = list(naive_pairs(hidden.detach(), segments))
    assert torch.isclose(isotropy(hidden, segments), sum(cosines, torch.zeros(()).double())/max(1, len(cosines)), rtol=1e-9, atol=1e-12)
    assert token_pairs(segments, band) == len(list(naive_pairs(hidden.detach(), segments, band)))


def test_alignment_and_uniformity_are_their_definitions():
    a, b = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, y = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    near = [torch.exp(-2*((x[i] - x[j])**2).sum()) for i in range(7) for j in range(i)]
    assert torch.isclose(alignment(a, 3*b), sum(((p - q)**2).sum() for p, q in zip(x, y))/7, rtol=1e-12)
    assert torch.isclose(uniformity(2*a), torch.stack(near).mean().log(), rtol=1e-10)
    for f in (lambda a: alignment(a, b), uniformity): assert torch.autograd.gradcheck(f, a.clone().requires_grad_())


def test_the_halves_of_a_document_are_its_own_tokens():
    hidden, segments = torch.arange(14.0).view(2, 7, 1), torch.tensor([[1, 1, 1, 2, 3, 3, 0], [0, 1, 1, 1, 1, 0, 0]])
    means = geometry._half_means(hidden, segments)[..., 0]  # one token has no halves
    assert torch.equal(means, torch.tensor([[0.5, 2], [4, 5], [8.5, 10.5]]))


# --- token contrast

@settings(max_examples=60)
@given(st.integers(0, 9999), st.sampled_from([0.1, 0.5, 1.0, 2.0]), st.integers(0, 3), st.sampled_from([1, 2, 5, 64]),
       st.sampled_from([None, 7.0]))
def test_token_contrast_and_its_gradient_are_those_of_a_double_loop(seed, margin, band, chunk, count):
    hidden, segments = world(seed)
    wanted = naive(hidden, segments, margin, band, count)
    loss = token_contrast(hidden, segments, margin, band=band, count=count, chunk=chunk)
    assert torch.isclose(loss, wanted, rtol=1e-10, atol=1e-12)
    slope = gradient(wanted, hidden) if wanted.requires_grad else None
    assert torch.allclose(gradient(loss, hidden), torch.zeros_like(hidden) if slope is None else slope, rtol=1e-9, atol=1e-12)


def test_token_contrast_has_the_right_gradient():
    hidden, segments = world(3)
    assert torch.autograd.gradcheck(lambda hidden: 3*token_contrast(hidden, segments, 0.6, band=1, chunk=4), hidden)


@pytest.mark.parametrize('margin', [0.3, 1.0])
def test_packing_padding_and_the_order_of_rows_do_not_matter(margin):
    lengths, generator = (9, 1, 5, 2, 7), torch.Generator().manual_seed(1)
    documents = [torch.randn(n, 6, dtype=torch.float64, generator=generator) + 0.5 for n in lengths]
    def laid(rows, length):
        hidden, segments = torch.full((len(rows), length, 6), 1e3, dtype=torch.float64), torch.zeros(len(rows), length, dtype=torch.long)
        for row, (start, *numbers) in enumerate(rows):
            for label, number in enumerate(numbers, 1):
                hidden[row, start:start + lengths[number]], segments[row, start:start + lengths[number]] = documents[number], label
                start += lengths[number]
        return hidden, segments
    layouts = [[(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)], [(0, 0, 1, 2), (2, 3, 4)], [(5, 4, 3), (0, 2, 1, 0)], [(1, 0, 1, 2, 3, 4)]]
    layouts = [laid(rows, 26) for rows in layouts]
    for measure in (isotropy, lambda h, s: token_contrast(h, s, margin, chunk=4), lambda h, s: token_contrast(h, s, margin, band=2)):
        values = torch.stack([measure(*layout) for layout in layouts])
        assert values[0] > 0 and torch.allclose(values, values[0], rtol=1e-12)


def test_padding_is_not_even_looked_at():
    hidden, segments = world(5)
    ill = hidden.detach().masked_fill((segments == 0)[..., None], float('nan')).requires_grad_()
    loss = token_contrast(ill, segments)
    assert torch.equal(loss, token_contrast(hidden, segments)) and isotropy(ill, segments).isfinite()
    slope = gradient(loss, ill)
    assert slope.isfinite().all() and not slope[segments == 0].any()


@pytest.mark.parametrize('segments', [[[0, 0, 0]], [[1, 2, 3]], [[0, 1, 2]]])
def test_without_pairs_the_loss_is_zero_and_so_is_its_gradient(segments):
    hidden, segments = torch.randn(1, 3, 4, requires_grad=True), torch.tensor(segments)
    loss = token_contrast(hidden, segments)
    assert loss == 0 and not gradient(loss, hidden).any() and isotropy(hidden, segments) == 0 and token_pairs(segments) == 0
    full = torch.ones(1, 3, dtype=torch.long)
    assert token_contrast(hidden, full, band=2) == 0 and token_contrast(hidden, full, tokens=2, band=2) == 0


def test_a_state_of_zero_has_no_direction_and_is_not_pushed():
    hidden = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]], requires_grad=True)
    loss = token_contrast(hidden, torch.ones(1, 3, dtype=torch.long), margin=1.5)
    assert torch.isclose(loss, torch.tensor(0.5 + 0.5 + 0.5 + 0.5**0.5)/3)
    slope = gradient(loss, hidden)
    assert slope.isfinite().all() and not slope[0, 0].any() and slope[0, 1].any()


def test_pairs_on_the_flat_side_are_not_pushed():
    corners = torch.eye(4)[None].requires_grad_()
    loss = token_contrast(corners, torch.ones(1, 4, dtype=torch.long))
    assert loss == 0 and not gradient(loss, corners).any()


@pytest.mark.parametrize('band', [0, 1])
def test_a_draw_of_tokens_is_right_on_average_and_a_function_of_its_generator(band):
    hidden, segments = world(8, rows=2, length=14)
    def estimate(seed): return token_contrast(hidden, segments, tokens=5, band=band, generator=torch.Generator().manual_seed(seed))
    losses = torch.stack([estimate(seed) for seed in range(600)])
    wanted = token_contrast(hidden, segments, band=band)
    assert torch.equal(estimate(7), losses[7]) and losses.std() > 0
    assert abs(losses.mean() - wanted) < 4*losses.std()/600**0.5
    far, right = gradient(losses.mean(), hidden), gradient(wanted, hidden)
    assert (far - right).norm() < 0.25*right.norm()
    assert torch.isclose(token_contrast(hidden, segments, tokens=14), token_contrast(hidden, segments), rtol=1e-12)


@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16])
def test_states_of_16_bits_are_compared_in_32(kind):
    hidden, segments = world(2, kind=kind)
    exact = hidden.detach().float().requires_grad_()
    wanted = token_contrast(exact, segments)
    with torch.autocast('cpu', torch.bfloat16):
        losses = token_contrast(hidden, segments), token_contrast(exact, segments)
        measures = isotropy(hidden, segments), isotropy(exact, segments)
    assert all(loss.dtype == torch.float32 and torch.equal(loss, wanted) for loss in losses) and torch.equal(*measures)
    slope = gradient(losses[0], hidden)
    assert slope.dtype == kind and torch.allclose(slope.float(), gradient(wanted, exact), rtol=1e-2, atol=1e-4)


def test_no_table_of_all_pairs_is_made():
    sizes = []
    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
            return out
    rows, length, size, chunk = 2, 512, 8, 16
    hidden = torch.randn(rows, length, size)
    with Watch(): geometry._pair_hinge(F.normalize(hidden.flatten(0, 1), dim=-1), torch.arange(rows).repeat_interleave(length),
                             torch.arange(rows*length), torch.ones(rows*length), 0.5, chunk=chunk, wanted=True)
    assert sizes and max(sizes) <= rows*length*max(chunk, size)


# --- in training

def text_batch(lm, rows, length=48):
    packed = pack(list(encode_documents(lm.tokenizer, TEXTS)), length)
    batch = packed.batch([number % len(packed) for number in range(rows)])
    return batch | dict(token_pairs=token_pairs(batch['segments']))


@pytest.mark.parametrize('rows', [1, 4, 5, 16])
def test_micro_batches_add_up_to_the_batch(lm, rows):
    lm, batch = exact(narrowed(lm)), text_batch(lm, 16)
    def loss(part):
        states = hidden_states(lm.model, part)
        return token_contrast(states, part['segments'], count=part['token_pairs'])
    def slopes(loss): return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [p for p in lm.model.parameters()])])
    whole, parts = loss(batch), [loss(part) for part in micro_batches(batch, rows)]
    assert whole > 0.1 and torch.isclose(sum(parts), whole, rtol=1e-12)
    assert torch.allclose(sum(map(slopes, parts)), slopes(whole), rtol=1e-10, atol=1e-12)


def test_a_few_steps_lower_the_mean_cosine_and_reading_alone_does_not(lm):
    def after(weight):
        def loss(model, batch):
            hidden = hidden_states(model, batch)
            return dict(loss=lm_loss(model, batch, hidden) + weight*token_contrast(hidden, batch['segments'], count=batch['token_pairs']))
        trained = narrowed(lm)
        fit(trained.model, lambda step: text_batch(lm, 6), loss, 25, learning_rate=3e-3, precision='no')
        return probe(trained, TEXTS)['isotropy']
    assert after(1.0) < 0.7 < probe(narrowed(lm), TEXTS)['isotropy'] < after(0.0)


# --- the probe

def test_the_probe_gives_what_the_losses_give(lm):
    lm = exact(narrowed(lm))
    found = probe(lm, TEXTS, rows=3)
    packed = pack(list(encode_documents(lm.tokenizer, TEXTS)), 48)
    batch = packed.batch(range(len(packed)))
    with torch.no_grad(): hidden = hidden_states(lm.model, batch)
    cosines = torch.stack(list(naive_pairs(hidden, batch['segments'])))
    assert found['isotropy'] == pytest.approx(isotropy(hidden, batch['segments']).item(), abs=1e-10)
    assert found['token_contrast'] == pytest.approx(token_contrast(hidden, batch['segments']).item(), abs=1e-10)
    assert found['active'] == pytest.approx((cosines > 0.5).float().mean().item(), abs=1e-4)
    a, b = geometry._half_means(hidden, batch['segments']).unbind(1)
    assert len(a) == len(TEXTS) and found['alignment'] == pytest.approx(alignment(a, b).item(), abs=1e-10)
    assert found['uniformity'] == pytest.approx(uniformity(a).item(), abs=1e-10)


def test_the_probe_reads_no_further_than_the_context(lm):
    lm = exact(lm)
    long = [' '.join(TEXTS), ' '.join(TEXTS[::-1])]
    assert probe(lm, long, context=16) == pytest.approx(probe(lm, [' '.join(text.split()[:40]) for text in long], context=16))
    assert probe(lm, long)['isotropy'] == pytest.approx(probe(lm, long, context=64)['isotropy'])  # the model was built for 64


def test_the_weight_follows_the_hinge(lm):
    narrow, fresh = probe(narrowed(lm), TEXTS), probe(lm, TEXTS)
    assert (geometry.token_weight(narrow), geometry.token_weight(fresh)) == (1, 0)
    assert narrow['token_contrast'] >= narrow['isotropy'] - 0.5 - 1e-6 > 0.2  # Jensen: the loss cannot vanish
    assert geometry.token_weight(fresh | dict(margin=1.0 - fresh['isotropy'] + 0.01)) == 1  # a wider margin reaches what is there
    for found, weight in ((narrow, 1), (fresh, 0)):
        said = geometry.weight_reason(found)
        assert said.count('.') - said.count('0.') == 1 and f"{found['isotropy']:.2f}" in said and f'weight {weight}:' in said


def test_the_picture_shows_every_model_on_one_scale(lm):
    table = _similarities(narrowed(lm), TEXTS[4], tokens=9)
    assert table.shape == (9, 9) and torch.allclose(table, table.T) and torch.allclose(table.diagonal(), torch.ones(9))
    figure = similarity_figure(dict(before=narrowed(lm), after=lm), TEXTS[4])
    meshes = [axis.collections[0] for axis in figure.axes[:2]]
    assert isinstance(figure, Figure) and len({mesh.get_clim() for mesh in meshes}) == 1
    assert [axis.get_title(loc='left').split('\n')[0] for axis in figure.axes[:2]] == ['before', 'after']
    plt.close(figure)


# --- what cannot work

class Mute(torch.nn.Linear):
    config, base_model = None, property(lambda self: lambda **inputs: inputs['input_ids'])


@pytest.mark.parametrize('wrong, named', [
    (lambda lm: token_contrast(torch.zeros(2, 3, 4), torch.ones(2, 3), margin=0), 'margin'),
    (lambda lm: token_contrast(torch.zeros(2, 3, 4), torch.ones(2, 3), margin=2.1), 'margin'),
    (lambda lm: token_contrast(torch.zeros(2, 3, 4), torch.ones(2, 3), margin=float('nan')), 'margin'),
    (lambda lm: token_contrast(torch.zeros(2, 3, 4), torch.ones(2, 3), band=-1), 'band'),
    (lambda lm: token_contrast(torch.zeros(2, 3, 4), torch.ones(2, 3), tokens=1), 'tokens'),
    (lambda lm: token_contrast(torch.zeros(2, 3), torch.ones(2, 3)), 'hidden'),
    (lambda lm: isotropy(torch.zeros(2, 3, 4), torch.ones(2, 4)), 'segments'),
    (lambda lm: alignment(torch.zeros(2, 3), torch.zeros(3, 3)), 'alignment'),
    (lambda lm: uniformity(torch.zeros(1, 3)), 'uniformity'),
    (lambda lm: probe(lm, TEXTS[:1]), 'documents'),
    (lambda lm: probe(lm, TEXTS, margin=-1), 'margin'),
    (lambda lm: probe(replace(lm, model=Mute(1, 1), name='mute'), TEXTS), 'mute'),
    (lambda lm: _similarities(lm, TEXTS[0], tokens=1), 'tokens')])
def test_what_cannot_work_is_said_in_a_sentence(lm, wrong, named):
    with pytest.raises(InputError, match=named) as error: wrong(lm)
    assert str(error.value).endswith('.')


def test_importing_the_module_draws_no_plotting_library():
    assert not {'plt', 'sns'} & vars(geometry).keys()
