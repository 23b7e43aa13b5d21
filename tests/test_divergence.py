"""The distillation losses against a naive float64 loop, TRL and finite differences, and what must not change them."""
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scilm_adapt.divergence import dense_loss, divergences, forward_kl, jsd, reverse_kl
from scilm_adapt.runs import InputError

INF = math.inf
KINDS = [('forward_kl', {}), ('reverse_kl', {}), *(('jsd', dict(beta=b)) for b in (0.0, 0.1, 0.5, 0.9, 1.0)),
         ('jsd', dict(scaled=False))]
each_kind = pytest.mark.parametrize(('kind', 'options'), KINDS, ids=str)


def logits(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return scale*torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive_kl(p: list[float], q: list[float]) -> float:
    return sum(a*math.log(a/b) for a, b in zip(p, q) if a > 0)


def naive(teacher: list[float], student: list[float], kind: str, temperature: float, beta: float = 0.5, scaled=True) -> float:
    "One token's divergence from logits, in plain Python floats (64 bits)."
    def softmax(z):
        e = [math.exp((x - max(z))/temperature) for x in z]
        return [x/sum(e) for x in e]
    p, q = softmax(teacher), softmax(student)
    if kind == 'forward_kl': return naive_kl(p, q)
    if kind == 'reverse_kl': return naive_kl(q, p)
    if beta in (0, 1): return (naive_kl(p, q) if beta == 0 else naive_kl(q, p))*scaled
    m = [beta*a + (1 - beta)*b for a, b in zip(p, q)]
    return (beta*naive_kl(p, m) + (1 - beta)*naive_kl(q, m))/(beta*(1 - beta) if scaled else 1)


@each_kind
@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
def test_equals_a_naive_loop(kind, options, temperature):
    student, teacher, mask = logits(20, 11), logits(20, 11, seed=1), torch.arange(20) % 3 != 0
    wanted = [naive(t, s, kind, temperature, **options)
              for s, t, m in zip(student.tolist(), teacher.tolist(), mask.tolist()) if m]
    got = dense_loss(student, teacher, mask, kind, temperature=temperature, **options).item()
    assert math.isclose(got, temperature**2*sum(wanted)/len(wanted), rel_tol=1e-12, abs_tol=1e-14)


@pytest.fixture(scope='module')
def trl_loss():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return pytest.importorskip('trl.experimental.gkd').GKDTrainer.generalized_jsd_loss


@pytest.mark.parametrize('beta', [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize('temperature', [0.7, 1.0, 3.0])
def test_equals_trl_in_value_and_gradient(trl_loss, beta, temperature):
    "TRL's is the plain JSD, but the full KL at both ends, and it leaves T squared out."
    student, teacher, mask = logits(4, 6, 9).requires_grad_(), logits(4, 6, 9, seed=1), logits(4, 6, seed=2) > 0
    theirs = trl_loss(student, teacher, labels=torch.where(mask, 0, -100), beta=beta, temperature=temperature)
    ours = dense_loss(student.flatten(0, 1), teacher.flatten(0, 1), mask.flatten(), 'jsd', temperature=temperature, beta=beta,
                      scaled=beta in (0, 1))/temperature**2
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)       # TRL holds beta in 32 bits
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)), rtol=1e-5, atol=1e-9)


@each_kind
def test_gradient_equals_finite_differences(kind, options):
    student, teacher, mask = logits(5, 6).requires_grad_(), logits(5, 7, seed=1), torch.tensor([1, 1, 0, 1, 0]).bool()
    assert torch.autograd.gradcheck(lambda z: dense_loss(z, teacher, mask, kind, temperature=1.5, **options), student)


def test_gradient_of_forward_kl_is_the_difference_of_probabilities():
    student, teacher = logits(5, 6).requires_grad_(), logits(5, 6, seed=1)
    dense_loss(student, teacher, torch.ones(5, dtype=torch.bool)).backward()
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach()/5)


@each_kind
@given(seed=st.integers(0, 999), scale=st.floats(0.01, 20), words=st.integers(2, 30))
def test_is_a_divergence(kind, options, seed, scale, words):
    teacher, student = (logits(8, words, seed=seed + n, scale=scale).log_softmax(-1) for n in (0, 1000))
    value = divergences[kind](teacher, student, **options)
    assert value.shape == (8,) and (value >= -1e-12).all() and value.isfinite().all()
    assert divergences[kind](teacher, teacher, **options).abs().max() < 1e-10


@given(beta=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_jsd_bounds_and_symmetry(beta, seed):
    teacher, student = logits(8, 6, seed=seed, scale=5).log_softmax(-1), logits(8, 6, seed=seed + 100, scale=5).log_softmax(-1)
    plain = jsd(teacher, student, beta, scaled=False)
    assert plain.max() <= math.log(2) + 1e-12
    torch.testing.assert_close(plain, jsd(student, teacher, 1 - beta, scaled=False))
    torch.testing.assert_close(jsd(teacher, student, beta), plain/(beta*(1 - beta)))


def test_scale_of_jsd_is_continuous_at_its_ends():
    teacher, student = (logits(8, 6, seed=n, scale=1.0).log_softmax(-1) for n in (0, 1))
    for end, limit in ((0.0, forward_kl), (1.0, reverse_kl)):
        wanted = limit(teacher, student)
        assert torch.equal(jsd(teacher, student, end), wanted)
        errors = [(jsd(teacher, student, abs(end - step)) - wanted).abs().max().item() for step in (1e-2, 1e-4, 1e-6)]
        assert errors[0] > 10*errors[1] > 100*errors[2] and errors[2] < 1e-4*wanted.max()
        assert not jsd(teacher, student, end, scaled=False).any()      # as the plain one does


def test_divergences_agree_near_agreement():
    "One learning rate serves all: value and gradient have the same size wherever the student is close."
    teacher = logits(6, 9)
    student = (teacher + 1e-4*logits(6, 9, seed=1)).requires_grad_()
    mask, gradients = torch.ones(6, dtype=torch.bool), []
    for kind, options in KINDS[:-1]:
        gradients.append(torch.autograd.grad(dense_loss(student, teacher, mask, kind, **options), student)[0])
        torch.testing.assert_close(gradients[-1], gradients[0], rtol=1e-2, atol=1e-8)


@each_kind
def test_invariances(kind, options):
    student, teacher, mask = logits(16, 9), logits(16, 9, seed=1), logits(16, seed=2) > -1
    value = dense_loss(student, teacher, mask, kind, **options)
    order, words = torch.randperm(16), torch.randperm(9)
    same = dict(rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(dense_loss(student[order], teacher[order], mask[order], kind, **options), value, **same)
    torch.testing.assert_close(dense_loss(student[:, words], teacher[:, words], mask, kind, **options), value, **same)
    shifted = student + logits(16, 1, seed=3), teacher - logits(16, 1, seed=4)   # a constant added to a row's logits
    torch.testing.assert_close(dense_loss(*shifted, mask, kind, **options), value, **same)
    torch.testing.assert_close(dense_loss(student[mask], teacher[mask], mask[mask], kind, **options), value, **same)


@each_kind
@pytest.mark.parametrize('rows', [1, 4, 16])
def test_micro_batches_add_up_in_value_and_gradient(kind, options, rows):
    "1 x 16 = 4 x 4 = 16 x 1, whatever each part holds of the loss tokens."
    student, teacher, mask = logits(16, 9).requires_grad_(), logits(16, 9, seed=1), torch.arange(16) > 5
    whole = dense_loss(student, teacher, mask, kind, temperature=2.0, **options)
    parts = sum(dense_loss(student[part], teacher[part], mask[part], kind, temperature=2.0, count=mask.sum(), **options)
                for part in torch.arange(16).split(rows))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (parts, whole)), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize('count', [10, 10.0, torch.tensor(10), torch.tensor(10.0)])
def test_count_may_be_a_number_or_a_tensor(count):
    student, teacher, mask = logits(5, 6), logits(5, 6, seed=1), torch.ones(5, dtype=torch.bool)
    torch.testing.assert_close(dense_loss(student, teacher, mask, count=count), dense_loss(student, teacher, mask)/2)


@each_kind
@pytest.mark.parametrize('tokens', [0, 4])
def test_no_loss_tokens_give_zero_and_a_zero_gradient(kind, options, tokens):
    student, teacher, mask = logits(tokens, 6).requires_grad_(), logits(tokens, 6, seed=1), torch.zeros(tokens, dtype=torch.bool)
    for count in (None, 0, 7):
        value = dense_loss(student, teacher, mask, kind, count=count, **options)
        gradient, = torch.autograd.grad(value, student)
        assert value == 0 and not gradient.any()


@each_kind
@pytest.mark.parametrize('hole', [-INF, torch.finfo(torch.float32).min])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('where', ['student', 'teacher', 'both', 'crossed'])
def test_ruled_out_tokens_give_numbers(kind, options, hole, dtype, where):
    student, teacher = logits(4, 6, dtype=dtype), logits(4, 6, seed=1, dtype=dtype)
    if where in ('student', 'both', 'crossed'): student[:, 2] = hole
    if where in ('teacher', 'both'): teacher[:, 2] = hole
    if where == 'crossed': teacher[:, 3] = hole
    student.requires_grad_()
    mask = torch.ones(4, dtype=torch.bool)
    value = dense_loss(student, teacher, mask, kind, temperature=2.0, **options)
    gradient, = torch.autograd.grad(value, student)
    assert value.isfinite() and gradient.isfinite().all()
    if where == 'both':                                                # as if the word were not there
        kept = [0, 1, 3, 4, 5]
        torch.testing.assert_close(value, dense_loss(student[:, kept], teacher[:, kept], mask, kind, temperature=2.0, **options))


def test_masked_tokens_may_hold_anything():
    student, teacher, mask = logits(4, 6), logits(4, 6, seed=1), torch.tensor([1, 0, 1, 1]).bool()
    wanted = dense_loss(student, teacher, mask)
    student[1], teacher[1] = math.nan, -INF
    student.requires_grad_()
    value = dense_loss(student, teacher, mask)
    assert value == wanted and torch.autograd.grad(value, student)[0].isfinite().all()


@each_kind
def test_padding_rows_of_either_vocabulary_change_nothing(kind, options):
    student, teacher, mask = logits(4, 6), logits(4, 6, seed=1), torch.ones(4, dtype=torch.bool)
    rows = torch.full((4, 5), 9.0, dtype=torch.float64)
    value = dense_loss(student, teacher, mask, kind, **options)
    assert value == dense_loss(student, torch.cat([teacher, rows], 1), mask, kind, **options)
    wide = torch.cat([student, rows], 1).requires_grad_()
    loss = dense_loss(wide, teacher, mask, kind, **options)
    assert value == loss and not torch.autograd.grad(loss, wide)[0][:, 6:].any()


@each_kind
def test_small_numbers_are_computed_in_32_bits(kind, options):
    student, teacher, mask = *(logits(8, 50, seed=n, dtype=torch.bfloat16) for n in (0, 1)), torch.ones(8, dtype=torch.bool)
    value = dense_loss(student, teacher, mask, kind, **options)
    assert value.dtype == torch.float32
    exact = dense_loss(student.double(), teacher.double(), mask, kind, **options)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(dense_loss(student, teacher, mask, kind, **options), value)


def test_no_gradient_reaches_the_teacher():
    student, teacher = logits(4, 6).requires_grad_(), logits(4, 6, seed=1).requires_grad_()
    dense_loss(student, teacher, torch.ones(4, dtype=torch.bool)).backward()
    assert teacher.grad is None and student.grad.any()


@pytest.mark.parametrize(('change', 'message'), [
    (dict(kind='kl'), "'kl' is no known divergence; choose one of forward_kl"),
    (dict(temperature=0.0), 'temperature is 0.0'),
    (dict(temperature=math.nan), 'temperature is nan'),
    (dict(kind='jsd', beta=1.5), 'beta is 1.5'),
    (dict(kind='jsd', beta=-0.1), 'beta is -0.1'),
    (dict(mask=torch.ones(3, dtype=torch.bool)), '4, 4 and 3 tokens'),
    (dict(teacher_logits=torch.zeros(5, 6)), '4, 5 and 4 tokens')])
def test_what_does_not_fit_is_named(change, message):
    arguments = dict(student_logits=logits(4, 6), teacher_logits=logits(4, 6), mask=torch.ones(4, dtype=torch.bool)) | change
    with pytest.raises(InputError, match=message): dense_loss(**arguments)


def test_a_divergence_can_be_added(monkeypatch):
    "The registry is a plain dictionary: total variation, for example."
    monkeypatch.setitem(divergences, 'total_variation', lambda t, s: 0.5*(t.exp() - s.exp()).abs().sum(-1))
    value = dense_loss(logits(4, 6), logits(4, 6, seed=1), torch.ones(4, dtype=torch.bool), 'total_variation')
    assert 0 < value < 1
