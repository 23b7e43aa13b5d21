"""The distillation losses against a naive float64 loop, TRL, finite differences and each other, and what must not change them."""
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from world import BABBLE, of_family

from scilm_adapt.divergence import (
    Divergence,
    Head,
    _adaptive_alpha,
    _by_autograd,
    _probability_gap,
    adaptive_skew_kl,
    alpha_beta,
    chunked_loss,
    counterpart_of,
    dense_loss,
    divergences,
    forward_kl,
    head_of,
    jsd,
    make_divergence,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    sparse_loss,
)
from scilm_adapt.errors import InputError
from scilm_adapt.models import hidden_states, logits_of
from scilm_adapt.tokens import train_tokenizer

INF = math.inf
ALIKE = [('forward_kl', {}), ('reverse_kl', {}), *(('jsd', dict(beta=b)) for b in (0.0, 0.1, 0.5, 0.9, 1.0))]  # near agreement
KINDS = [*ALIKE, ('jsd', dict(scaled=False)), ('skew_kl', {}), ('skew_reverse_kl', dict(alpha=0.3)), ('adaptive_skew_kl', {}),
         ('adaptive_skew_reverse_kl', dict(usual=0.2)), ('total_variation', {}), ('alpha_beta', {}),
         ('alpha_beta', dict(alpha=0.0, beta=0.5)), ('alpha_beta', dict(alpha=1.5, beta=0.0))]
KINDS = [divergences[name].bind(**options) for name, options in KINDS]
each_divergence = pytest.mark.parametrize('divergence', KINDS, ids=str)


def logits(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return scale*torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive_kl(p: list[float], q: list[float]) -> float:
    return sum(a*math.log(a/b) for a, b in zip(p, q) if a > 0)


def naive_skew(p: list[float], q: list[float], alpha: float) -> float:
    return naive_kl(p, [alpha*a + (1 - alpha)*b for a, b in zip(p, q)])


def naive_adaptive(p: list[float], q: list[float], usual: float = 0.1, alpha: float = 0.1) -> float:
    gap = max(sum(a*(a - b) for a, b in zip(p, q)), 0) + 1e-5
    return naive_skew(p, q, min(max(1 - (1 - alpha)*usual/gap, 0.01), alpha))


def naive_jsd(p: list[float], q: list[float], beta: float = 0.5, scaled: bool = True) -> float:
    if beta in (0, 1): return (naive_kl(p, q) if beta == 0 else naive_kl(q, p))*scaled
    m = [beta*a + (1 - beta)*b for a, b in zip(p, q)]
    return (beta*naive_kl(p, m) + (1 - beta)*naive_kl(q, m))/(beta*(1 - beta) if scaled else 1)


def naive_alpha_beta(p: list[float], q: list[float], alpha: float = 0.2, beta: float = 0.7) -> float:
    if alpha == 0: return naive_alpha_beta(q, p, beta, alpha)
    if beta == 0: return sum(a**alpha*math.log(a**alpha/b**alpha) - a**alpha + b**alpha for a, b in zip(p, q))/alpha**2
    both = alpha + beta
    return -sum(a**alpha*b**beta - alpha/both*a**both - beta/both*b**both for a, b in zip(p, q))/(alpha*beta)


NAIVE = dict(forward_kl=naive_kl, reverse_kl=lambda p, q: naive_kl(q, p), jsd=naive_jsd, alpha_beta=naive_alpha_beta,
             skew_kl=lambda p, q, alpha=0.1: naive_skew(p, q, alpha), skew_reverse_kl=lambda p, q, alpha=0.1: naive_skew(q, p, alpha),
             adaptive_skew_kl=naive_adaptive, adaptive_skew_reverse_kl=lambda p, q, **options: naive_adaptive(q, p, **options),
             total_variation=lambda p, q: sum(abs(a - b) for a, b in zip(p, q))/2)


def naive(teacher: list[float], student: list[float], divergence: Divergence, temperature: float) -> float:
    "One token's divergence from logits, in plain Python floats (64 bits)."
    def softmax(z):
        e = [math.exp((x - max(z))/temperature) for x in z]
        return [x/sum(e) for x in e]
    return NAIVE[divergence.name](softmax(teacher), softmax(student), **divergence.options)


def test_every_divergence_is_checked():
    assert set(divergences) == set(NAIVE) == {one.name for one in KINDS} and all(name == one.name for name, one in divergences.items())


@each_divergence
@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
def test_equals_a_naive_loop(divergence, temperature):
    student, teacher, mask = logits(20, 11), logits(20, 11, seed=1), torch.arange(20) % 3 != 0
    wanted = [naive(t, s, divergence, temperature)
              for s, t, m in zip(student.tolist(), teacher.tolist(), mask.tolist()) if m]
    got = dense_loss(student, teacher, mask, divergence, temperature=temperature).item()
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
    ours = dense_loss(student.flatten(0, 1), teacher.flatten(0, 1), mask.flatten(), f'jsd beta={beta} scaled={beta in (0, 1)}',
                      temperature=temperature)/temperature**2
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)       # TRL holds beta in 32 bits
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)), rtol=1e-5, atol=1e-9)


@each_divergence
def test_gradient_equals_finite_differences(divergence):
    student, teacher, mask = logits(5, 6).requires_grad_(), logits(5, 7, seed=1), torch.tensor([1, 1, 0, 1, 0]).bool()
    assert torch.autograd.gradcheck(lambda z: dense_loss(z, teacher, mask, divergence, temperature=1.5), student)


def test_gradient_of_forward_kl_is_the_difference_of_probabilities():
    student, teacher = logits(5, 6).requires_grad_(), logits(5, 6, seed=1)
    dense_loss(student, teacher, torch.ones(5, dtype=torch.bool)).backward()
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach()/5)


@each_divergence
@given(seed=st.integers(0, 999), scale=st.floats(0.01, 20), words=st.integers(2, 30))
def test_is_a_divergence(divergence, seed, scale, words):
    teacher, student = (logits(8, words, seed=seed + n, scale=scale).log_softmax(-1) for n in (0, 1000))
    value = divergence(teacher, student)
    assert value.shape == (8,) and (value >= -1e-12).all() and value.isfinite().all()
    assert divergence(teacher, teacher).abs().max() < 1e-10


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
    for divergence in KINDS[:len(ALIKE)]:
        gradients.append(torch.autograd.grad(dense_loss(student, teacher, mask, divergence), student)[0])
        torch.testing.assert_close(gradients[-1], gradients[0], rtol=1e-2, atol=1e-8)


@each_divergence
def test_invariances(divergence):
    student, teacher, mask = logits(16, 9), logits(16, 9, seed=1), logits(16, seed=2) > -1
    value = dense_loss(student, teacher, mask, divergence)
    order, words = torch.randperm(16), torch.randperm(9)
    same = dict(rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(dense_loss(student[order], teacher[order], mask[order], divergence), value, **same)
    torch.testing.assert_close(dense_loss(student[:, words], teacher[:, words], mask, divergence), value, **same)
    shifted = student + logits(16, 1, seed=3), teacher - logits(16, 1, seed=4)   # a constant added to a row's logits
    torch.testing.assert_close(dense_loss(*shifted, mask, divergence), value, **same)
    torch.testing.assert_close(dense_loss(student[mask], teacher[mask], mask[mask], divergence), value, **same)


@each_divergence
@pytest.mark.parametrize('rows', [1, 4, 16])
def test_micro_batches_add_up_in_value_and_gradient(divergence, rows):
    "1 x 16 = 4 x 4 = 16 x 1, whatever each part holds of the loss tokens."
    student, teacher, mask = logits(16, 9).requires_grad_(), logits(16, 9, seed=1), torch.arange(16) > 5
    whole = dense_loss(student, teacher, mask, divergence, temperature=2.0)
    parts = sum(dense_loss(student[part], teacher[part], mask[part], divergence, temperature=2.0, count=mask.sum())
                for part in torch.arange(16).split(rows))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (parts, whole)), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize('count', [10, 10.0, torch.tensor(10), torch.tensor(10.0)])
def test_count_may_be_a_number_or_a_tensor(count):
    student, teacher, mask = logits(5, 6), logits(5, 6, seed=1), torch.ones(5, dtype=torch.bool)
    torch.testing.assert_close(dense_loss(student, teacher, mask, count=count), dense_loss(student, teacher, mask)/2)


@each_divergence
@pytest.mark.parametrize('tokens', [0, 4])
def test_no_loss_tokens_give_zero_and_a_zero_gradient(divergence, tokens):
    student, teacher, mask = logits(tokens, 6).requires_grad_(), logits(tokens, 6, seed=1), torch.zeros(tokens, dtype=torch.bool)
    for count in (None, 0, 7):
        value = dense_loss(student, teacher, mask, divergence, count=count)
        gradient, = torch.autograd.grad(value, student)
        assert value == 0 and not gradient.any()


@each_divergence
@pytest.mark.parametrize('hole', [-INF, torch.finfo(torch.float32).min])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('where', ['student', 'teacher', 'both', 'crossed'])
def test_ruled_out_tokens_give_numbers(divergence, hole, dtype, where):
    student, teacher = logits(4, 6, dtype=dtype), logits(4, 6, seed=1, dtype=dtype)
    if where in ('student', 'both', 'crossed'): student[:, 2] = hole
    if where in ('teacher', 'both'): teacher[:, 2] = hole
    if where == 'crossed': teacher[:, 3] = hole
    student.requires_grad_()
    mask = torch.ones(4, dtype=torch.bool)
    value = dense_loss(student, teacher, mask, divergence, temperature=2.0)
    gradient, = torch.autograd.grad(value, student)
    assert value.isfinite() and gradient.isfinite().all()
    if where == 'both':                                                # as if the word were not there
        kept = [0, 1, 3, 4, 5]
        torch.testing.assert_close(value, dense_loss(student[:, kept], teacher[:, kept], mask, divergence, temperature=2.0))


def test_masked_tokens_may_hold_anything():
    student, teacher, mask = logits(4, 6), logits(4, 6, seed=1), torch.tensor([1, 0, 1, 1]).bool()
    wanted = dense_loss(student, teacher, mask)
    student[1], teacher[1] = math.nan, -INF
    student.requires_grad_()
    value = dense_loss(student, teacher, mask)
    assert value == wanted and torch.autograd.grad(value, student)[0].isfinite().all()


@each_divergence
def test_padding_rows_of_either_vocabulary_change_nothing(divergence):
    student, teacher, mask = logits(4, 6), logits(4, 6, seed=1), torch.ones(4, dtype=torch.bool)
    rows = torch.full((4, 5), 9.0, dtype=torch.float64)
    value = dense_loss(student, teacher, mask, divergence)
    assert value == dense_loss(student, torch.cat([teacher, rows], 1), mask, divergence)
    wide = torch.cat([student, rows], 1).requires_grad_()
    loss = dense_loss(wide, teacher, mask, divergence)
    assert value == loss and not torch.autograd.grad(loss, wide)[0][:, 6:].any()


@each_divergence
def test_small_numbers_are_computed_in_32_bits(divergence):
    student, teacher, mask = *(logits(8, 50, seed=n, dtype=torch.bfloat16) for n in (0, 1)), torch.ones(8, dtype=torch.bool)
    value = dense_loss(student, teacher, mask, divergence)
    assert value.dtype == torch.float32
    exact = dense_loss(student.double(), teacher.double(), mask, divergence)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(dense_loss(student, teacher, mask, divergence), value)


def test_no_gradient_reaches_the_teacher():
    student, teacher = logits(4, 6).requires_grad_(), logits(4, 6, seed=1).requires_grad_()
    dense_loss(student, teacher, torch.ones(4, dtype=torch.bool)).backward()
    assert teacher.grad is None and student.grad.any()


@pytest.mark.parametrize(('change', 'message'), [
    (dict(divergence='kl'), "'kl' is no known divergence.* Choose one of forward_kl"),
    (dict(temperature=0.0), 'temperature is 0.0'),
    (dict(temperature=math.nan), 'temperature is nan'),
    (dict(divergence='jsd beta=1.5'), 'beta is 1.5'),
    (dict(divergence='jsd beta=-0.1'), 'beta is -0.1'),
    (dict(divergence='skew_kl alpha=0'), 'alpha is 0.0'),
    (dict(divergence='alpha_beta alpha=-0.5'), 'alpha is -0.5 and beta 0.7'),
    (dict(divergence='alpha_beta alpha=0 beta=0'), 'one must be more than 0'),
    (dict(vocabulary=7), 'at most 6'),
    (dict(vocabulary=0), 'vocabulary is 0'),
    (dict(mask=torch.ones(3, dtype=torch.bool)), '4, 4 and 3 tokens'),
    (dict(teacher_logits=torch.zeros(5, 6)), '4, 5 and 4 tokens')])
def test_what_does_not_fit_is_named(change, message):
    arguments = dict(student_logits=logits(4, 6), teacher_logits=logits(4, 6), mask=torch.ones(4, dtype=torch.bool)) | change
    with pytest.raises(InputError, match=message): dense_loss(**arguments)


def hellinger(teacher, student, weight=1.0): return weight*((teacher/2).exp() - (student/2).exp()).square().sum(-1)/2


def test_a_divergence_can_be_added(monkeypatch):
    "The registry is a plain dictionary: the distance of Hellinger, for example, with an option of its own."
    monkeypatch.setitem(divergences, 'hellinger', Divergence('hellinger', 'Hellinger', hellinger, sparse=('top_k',)))
    teacher, student, mask = logits(4, 6, seed=1), logits(4, 6), torch.ones(4, dtype=torch.bool)
    by_hand = hellinger(teacher.log_softmax(-1), student.log_softmax(-1)).mean()
    torch.testing.assert_close(dense_loss(student, teacher, mask, 'hellinger'), by_hand)
    torch.testing.assert_close(dense_loss(student, teacher, mask, 'hellinger weight=3'), 3*by_hand)
    p, top = problem(), truth(problem()).exp().topk(17)
    torch.testing.assert_close(as_sparse(p, *top[::-1], 'top_k', divergence='hellinger'), as_dense(p, divergence='hellinger'))
    with pytest.raises(InputError, match='choose forward_kl or skew_kl or hellinger'): as_sparse(p, *top[::-1], 'top_k', divergence='jsd')


# --- as objects

@pytest.mark.parametrize(('text', 'name', 'options'), [
    ('jsd', 'jsd', {}), ('jsd beta=0.1', 'jsd', dict(beta=0.1)), ('jsd beta=0.5 scaled=true', 'jsd', {}),
    ('jsd scaled=False', 'jsd', dict(scaled=False)),
    ('alpha_beta beta=0.3  alpha=1', 'alpha_beta', dict(alpha=1.0, beta=0.3)), ('skew_kl alpha=0.3', 'skew_kl', dict(alpha=0.3))])
def test_a_text_becomes_a_bound_divergence_and_text_again(text, name, options):
    found = make_divergence(text)
    assert (found.name, found.options) == (name, options) and make_divergence(str(found)) == found == make_divergence(found)
    teacher, student = logits(5, 6).log_softmax(-1), logits(5, 6, seed=1).log_softmax(-1)
    assert torch.equal(found(teacher, student), divergences[name].function(teacher, student, **options))


def test_what_its_settings_are_does_not_depend_on_how_they_were_written():
    assert make_divergence('jsd').settings == make_divergence('jsd beta=0.5').settings == dict(name='jsd', beta=0.5, scaled=True)
    assert make_divergence('total_variation').settings == dict(name='total_variation')
    assert str(make_divergence('jsd').bind(beta=0.2)) == 'jsd beta=0.2'
    assert make_divergence('jsd beta=0.1').bind(beta=0.5) == divergences['jsd']


@pytest.mark.parametrize(('text', 'message'), [
    ('jds', "'jds' is no known divergence. Did you mean 'jsd'"), ('', "'' is no known divergence"),
    ('jsd alpha=0.1', "'jsd' has no option 'alpha'. It has beta, scaled"),
    ('jsd bta=0.1', "no option 'bta'. Did you mean 'beta'"), ('jsd beta=half', "'beta=half' is no option of 'jsd'; write a name"),
    ('jsd 0.1', "'0.1' is no option"), ('jsd beta=2', 'beta is 2.0; it mixes'), ('skew_reverse_kl alpha=0', 'alpha is 0.0'),
    ('adaptive_skew_kl alpha=1.5', 'alpha is 1.5 and usual 0.1'), ('adaptive_skew_kl usual=-1', 'usual -1.0'),
    ('forward_kl beta=1', 'It has none')])
def test_a_text_that_is_no_divergence_is_refused_with_what_is_near(text, message):
    with pytest.raises(InputError, match=message): make_divergence(text)


@pytest.mark.parametrize(('text', 'other'), [('skew_kl', 'skew_reverse_kl'), ('skew_kl alpha=0.3', 'skew_reverse_kl alpha=0.3'),
                                             ('adaptive_skew_kl usual=0.2', 'adaptive_skew_reverse_kl usual=0.2')])
def test_a_counterpart_takes_over_the_options(text, other):
    assert counterpart_of(text) == make_divergence(other)
    teacher, student = logits(5, 6).log_softmax(-1), logits(5, 6, seed=1).log_softmax(-1)
    torch.testing.assert_close(counterpart_of(text)(teacher, student), make_divergence(text)(student, teacher))


def test_without_a_counterpart_that_is_said():
    with pytest.raises(InputError, match="'jsd' pulls .* choose skew_kl or adaptive_skew_kl"): counterpart_of('jsd beta=0.1')


# --- the single divergences

@each_divergence
def test_gradient_of_a_divergence_equals_finite_differences_for_both_sides(divergence):
    "The function itself, and for the teacher too, as it is for anyone to use."
    def value(teacher, student): return divergence(teacher.log_softmax(-1), student.log_softmax(-1))
    teacher, student = logits(4, 5, scale=1.0).requires_grad_(), logits(4, 5, seed=1, scale=1.0).requires_grad_()
    kind, options = divergence.name, divergence.options
    if not kind.startswith('adaptive'): assert torch.autograd.gradcheck(value, (teacher, student))
    else:                                        # the skew itself is held fixed
        alpha = _adaptive_alpha(_probability_gap(*(z.log_softmax(-1) for z in ((student, teacher) if 'reverse' in kind else
                                                                             (teacher, student)))), options.get('usual', 0.1))
        fixed = dict(adaptive_skew_kl=skew_kl, adaptive_skew_reverse_kl=skew_reverse_kl)[kind]
        assert alpha.unique().numel() > 1 and not alpha.requires_grad
        wanted = fixed(teacher.log_softmax(-1), student.log_softmax(-1), alpha)
        torch.testing.assert_close(value(teacher, student), wanted)
        torch.testing.assert_close(*(torch.autograd.grad(v.sum(), student)[0] for v in (value(teacher, student), wanted)))


@pytest.mark.parametrize('options', [{}, dict(beta=0.1), dict(beta=0.9, scaled=False), dict(beta=0.0), dict(beta=1.0)], ids=str)
def test_written_out_slope_of_jsd_is_that_of_autograd(options):
    teacher, student = logits(6, 9).log_softmax(-1), logits(6, 9, seed=1)
    teacher[0, 2] = student[1, 3] = teacher[2, 4] = student[2, 4] = -INF
    wanted = _by_autograd(jsd, teacher, student, **options)
    found = divergences['jsd'].bind(**options).slope_at(teacher.clone(), student)
    for a, b in zip(found, wanted): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_bounds_and_ends_of_the_others():
    teacher, student = (logits(50, 6, seed=n, scale=9.0).log_softmax(-1) for n in (0, 1))
    assert forward_kl(teacher, student).max() > 5 and skew_kl(teacher, student, 0.1).max() <= -math.log(0.1)
    assert skew_kl(teacher, student, 1.0).abs().max() < 1e-12 and divergences['total_variation'](teacher, student).max() <= 1
    torch.testing.assert_close(alpha_beta(teacher, student, 1.0, 0.0), forward_kl(teacher, student))
    torch.testing.assert_close(alpha_beta(teacher, student, 0.0, 1.0), reverse_kl(teacher, student))
    torch.testing.assert_close(alpha_beta(teacher, student, 1.0, 1e-7), forward_kl(teacher, student), rtol=1e-4, atol=1e-4)


def test_adaptive_skew_is_bolder_where_the_student_is_near():
    gaps = torch.tensor([-0.5, 0.0, 0.05, 0.0915, 0.095, 0.1, 0.9])
    alphas = _adaptive_alpha(gaps, usual=0.1, alpha=0.1)
    assert (alphas.diff() >= 0).all() and alphas[:3].eq(0.01).all() and alphas[4] < alphas[5] and alphas[-1] == 0.1
    teacher, student = logits(40, 6).log_softmax(-1), logits(40, 6, seed=1).log_softmax(-1)
    low, high = skew_kl(teacher, student, 0.01), skew_kl(teacher, student, 0.1)
    found = adaptive_skew_kl(teacher, student)
    assert (found <= low + 1e-12).all() and (found >= high - 1e-12).all() and (found > high + 1e-6).any() and (found < low - 1e-6).any()


# --- from hidden states

def problem(tokens: int = 23, words: int = 17, extra: int = 3, dtype: torch.dtype = torch.float64) -> dict:
    "Two models of different width, padding, bias, scale and cap; every third token is none of the loss."
    weight, bias = logits(words, 5, seed=2, dtype=dtype).requires_grad_(), logits(words, seed=3, dtype=dtype).requires_grad_()
    return dict(hidden=logits(tokens, 5, scale=0.5, dtype=dtype).requires_grad_(), head=Head(weight, bias, 0.7, 4.0),
                teacher=logits(tokens, 8, seed=1, scale=0.5, dtype=dtype), mask=torch.arange(tokens) % 3 > 0,
                teacher_head=Head(logits(words + extra, 8, seed=4, dtype=dtype), None, 1.3, 6.0))


def as_chunked(p: dict, **options) -> torch.Tensor:
    return chunked_loss(p['hidden'], p['head'], p['teacher'], p['teacher_head'], p['mask'], **options)


def as_dense(p: dict, **options) -> torch.Tensor:
    "The same by ordinary autograd through the logits."
    def of(hidden, head):
        z = head.scale*(hidden @ head.weight.T + (0 if head.bias is None else head.bias))
        return head.cap*torch.tanh(z/head.cap)
    return dense_loss(of(p['hidden'], p['head']), of(p['teacher'], p['teacher_head']), p['mask'], **options)


def with_gradients(loss: torch.Tensor, p: dict) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, (p['hidden'], p['head'].weight, p['head'].bias))]


@each_divergence
@pytest.mark.parametrize('chunk', [1, 7, 1000, None])
@pytest.mark.parametrize('temperature', [1.0, 2.5])
def test_chunked_equals_dense_in_value_and_gradient(divergence, chunk, temperature):
    p = problem()
    for vocabulary, count in ((None, None), (11, 40)):
        more = dict(divergence=divergence, temperature=temperature, vocabulary=vocabulary, count=count)
        for a, b in zip(with_gradients(as_chunked(p, chunk=chunk, **more), p), with_gradients(as_dense(p, **more), p)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
            assert b.any()


@each_divergence
def test_gradient_of_chunked_equals_finite_differences(divergence):
    p = problem(tokens=5, words=4)
    def value(hidden, weight, bias):
        return as_chunked(p | dict(hidden=hidden, head=Head(weight, bias, 0.7, 4.0)), divergence=divergence, temperature=1.5, chunk=2)
    assert torch.autograd.gradcheck(value, (p['hidden'], p['head'].weight, p['head'].bias))


@each_divergence
def test_chunked_is_invariant_too(divergence):
    "Order of rows, padding with anything, and 1 x 24 = 4 x 6 = 24 x 1."
    p = problem(tokens=24)
    whole = with_gradients(as_chunked(p, divergence=divergence, chunk=5), p)
    def rows(which): return p | {name: p[name][which] for name in ('hidden', 'teacher', 'mask')}
    def same(loss):
        for a, b in zip(with_gradients(loss, p), whole): torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    same(as_chunked(rows(torch.randperm(24)), divergence=divergence, chunk=5))
    for size in (1, 6):
        same(sum(as_chunked(rows(part), divergence=divergence, count=p['mask'].sum()) for part in torch.arange(24).split(size)))
    garbage = torch.where(p['mask'][:, None], 0.0, torch.tensor(math.nan))
    dirty = p | dict(hidden=p['hidden'] + garbage, teacher=torch.where(p['mask'][:, None], p['teacher'], INF))
    value = as_chunked(dirty, divergence=divergence)
    gradient, = torch.autograd.grad(value, p['head'].weight)
    torch.testing.assert_close(value, whole[0]), torch.testing.assert_close(gradient, whole[2])


def test_what_is_not_wanted_gets_no_gradient():
    p = problem()
    frozen = p | dict(head=Head(p['head'].weight.detach(), p['head'].bias.detach(), 0.7, 4.0))
    wanted = with_gradients(as_dense(p), p)
    torch.testing.assert_close(torch.autograd.grad(as_chunked(frozen), p['hidden'])[0], wanted[1])
    only = as_chunked(p | dict(hidden=p['hidden'].detach()))
    torch.testing.assert_close(torch.autograd.grad(only, p['head'].weight)[0], wanted[2])
    with torch.no_grad(): torch.testing.assert_close(as_chunked(p), wanted[0]); assert not as_chunked(p).requires_grad
    teacher = p['teacher'].clone().requires_grad_()
    as_chunked(p | dict(teacher=teacher)).backward()
    assert teacher.grad is None


def test_gradient_is_scaled_by_what_comes_in_and_can_be_taken_twice():
    p = problem()
    loss = as_chunked(p)
    once = torch.autograd.grad(loss, p['hidden'], retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(3*loss + loss**2, p['hidden'])[0], (3 + 2*loss.detach())*once)


def test_tied_embeddings_get_both_gradients():
    p, ids = problem(), torch.arange(23) % 17
    weight = p['head'].weight
    for_both = []
    for way in (as_dense, as_chunked):
        tied = p | dict(hidden=torch.tanh(weight[ids]))
        for_both.append(torch.autograd.grad(way(tied), weight)[0])
    torch.testing.assert_close(*for_both, rtol=1e-12, atol=1e-14)


class Largest(TorchDispatchMode):
    "Watches the largest array that an operation makes."
    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        arrays = [x for x in (made if isinstance(made, tuple | list) else [made]) if isinstance(x, torch.Tensor)]
        self.size = max([self.size, *(x.numel() for x in arrays)])
        return made


@each_divergence
def test_nothing_of_tokens_times_vocabulary_is_made_or_kept(divergence):
    p, kept = problem(tokens=300, words=120), []
    with Largest() as largest, saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        as_chunked(p, divergence=divergence, chunk=10).backward()
    assert largest.size < 300*120/10 and kept and max(kept) <= 300*8
    ids = torch.arange(300*4).view(300, 4) % 120
    if divergence.name == 'forward_kl':
        with Largest() as largest:
            sparse_loss(p['hidden'], p['head'], ids, torch.full((300, 4), 0.2), p['mask'], divergence, targets='top_k', chunk=10).backward()
        assert largest.size < 300*120/10


def test_dense_keeps_one_array_for_the_way_back():
    student, teacher, kept = logits(64, 50).requires_grad_(), logits(64, 50, seed=1), []
    with saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        dense_loss(student, teacher, torch.ones(64, dtype=torch.bool), 'jsd')
    assert sum(kept) < 1.1*64*50


@each_divergence
def test_mixed_precision_comes_near_and_sums_in_32_bits(divergence):
    p, near = problem(tokens=64, words=40, dtype=torch.float32), 0.2 if divergence.name == 'total_variation' else 0.05  # that has a kink
    exact = with_gradients(as_chunked(p, divergence=divergence), p)
    with torch.autocast('cpu', torch.bfloat16): loss = as_chunked(p, divergence=divergence, chunk=9)
    assert loss.dtype == torch.float32
    for a, b in zip(with_gradients(loss, p), exact):
        assert a.dtype == torch.float32 and (a - b).norm() < near*b.norm()
    half = Head(p['head'].weight.detach().bfloat16().requires_grad_(), p['head'].bias.detach().bfloat16().requires_grad_(), 0.7, 4.0)
    found = with_gradients(as_chunked(p | dict(head=half), divergence=divergence), p | dict(head=half))
    assert found[2].dtype == torch.bfloat16 and (found[2] - exact[2]).norm() < near*exact[2].norm()


def test_the_gradient_of_a_16_bit_head_is_summed_in_32_bits():
    "A sum of 600 equal parts one by one, which in 16 bits would stop growing at 256."
    head = Head(logits(9, 5).bfloat16().requires_grad_())
    hidden, teacher, mask = (x.expand(600, -1) for x in (logits(1, 5).bfloat16(), logits(1, 5, seed=1).bfloat16(), torch.ones(1, 1)))
    found, wanted = (torch.autograd.grad(chunked_loss(hidden[:n], head, teacher[:n], head, mask[:n, 0].bool(), chunk=1), head.weight)[0]
                     for n in (600, 1))
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=1e-4)


def test_pieces_of_a_chunk_make_no_difference():
    "With so many words a chunk is compared token by token."
    words, alpha = 2**18 + 1, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    student, teacher = logits(5, words).requires_grad_(), logits(5, words, seed=1)
    mask, head = torch.tensor([1, 1, 0, 1, 1]).bool(), logits(words, 2, seed=2)
    wanted = 4*skew_kl((teacher/2).log_softmax(-1), (student/2).log_softmax(-1), alpha)[mask].mean()
    found = dense_loss(student, teacher, mask, divergences['skew_kl'].bind(alpha=alpha), 2.0)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (found, wanted)), rtol=1e-9, atol=1e-15)
    hidden = logits(5, 2, seed=3).requires_grad_()
    ids, weights = torch.arange(15).view(5, 3), torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64).expand(5, 3)*alpha[:, None]
    for chunked, dense in ((chunked_loss(hidden, head, teacher[:, :2], head, mask, divergences['skew_kl'].bind(alpha=alpha)),
                            dense_loss(hidden @ head.T, teacher[:, :2] @ head.T, mask, divergences['skew_kl'].bind(alpha=alpha))),
                           (sparse_loss(hidden, head, ids, weights, mask, targets='sampled'),
                            -(weights*(hidden @ head.T).log_softmax(-1)[:, :15].gather(1, ids))[mask].sum(-1).mean())):
        torch.testing.assert_close(chunked, dense, rtol=1e-12, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in (chunked, dense)), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize('tokens', [0, 6])
def test_chunked_without_loss_tokens_is_zero_with_a_zero_gradient(tokens):
    p = problem(tokens=tokens) | dict(mask=torch.zeros(tokens, dtype=torch.bool))
    for value in with_gradients(as_chunked(p, divergence='jsd'), p): assert not value.any()
    ids, weights = torch.zeros(tokens, 3, dtype=torch.long), torch.ones(tokens, 3)
    for value in with_gradients(sparse_loss(p['hidden'], p['head'], ids, weights, p['mask'], targets='sampled'), p): assert not value.any()


def test_an_option_may_differ_from_token_to_token():
    p, alpha = problem(), torch.linspace(0.05, 0.9, 23, dtype=torch.float64)
    apart = [as_chunked(p | dict(mask=torch.arange(23) == n), divergence=f'skew_kl alpha={alpha[n].item()}')
             for n in p['mask'].nonzero()[:, 0]]
    each = divergences['skew_kl'].bind(alpha=alpha)
    for loss in (as_chunked(p, divergence=each, chunk=4), as_dense(p, divergence=each)):
        torch.testing.assert_close(loss, sum(apart)/len(apart))


def test_infinite_logits_from_a_bias_are_numbers():
    p = problem()
    for divergence in divergences.values():
        bias = p['head'].bias.detach().clone()
        bias[3] = -INF
        head = Head(p['head'].weight, bias.requires_grad_())
        infinite = p | dict(head=head)
        for value in with_gradients(as_chunked(infinite, divergence=divergence), infinite): assert value.isfinite().all()
    for targets in ('sampled', 'top_k'):
        loss = as_sparse(p | dict(head=head), torch.arange(2, 5).expand(23, 3), torch.full((23, 3), 0.3), targets)
        for value in with_gradients(loss, p | dict(head=head)): assert value.isfinite().all()


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'granite', 'cohere', 'gemma2', 'falcon_h1', 'recurrent_gemma'])
def test_chunked_loss_of_real_models_equals_that_of_their_logits(family):
    tokenizer = train_tokenizer(BABBLE, 300)
    student, teacher = of_family(family, tokenizer).model, of_family('qwen2', tokenizer).model
    batch = dict(input_ids=torch.arange(24).view(2, 12), attention_mask=torch.ones(2, 12, dtype=torch.long))
    states = [hidden_states(model, batch).flatten(0, 1) for model in (student, teacher)]
    assert torch.allclose(logits_of(student, states[0]), student(**batch).logits.flatten(0, 1), rtol=1e-9, atol=1e-12)
    mask = torch.arange(24) % 5 > 0
    losses = (dense_loss(logits_of(student, states[0]), logits_of(teacher, states[1]), mask, 'jsd'),
              chunked_loss(states[0], head_of(student), states[1], head_of(teacher), mask, 'jsd', chunk=5))
    first, second = (torch.autograd.grad(loss, list(student.parameters()), retain_graph=True) for loss in losses)
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-14)
    for a, b in zip(first, second): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


# --- from kept words

def truth(p: dict, temperature: float = 1.0) -> torch.Tensor:
    "The teacher's log-probabilities [N, V] of the words that the student knows too."
    return (p['teacher_head'].logits(p['teacher'])[:, :len(p['head'].weight)]/temperature).log_softmax(-1)


def as_sparse(p: dict, ids: torch.Tensor, weights: torch.Tensor, targets: str, **options) -> torch.Tensor:
    return sparse_loss(p['hidden'], p['head'], ids, weights, p['mask'], targets=targets, **options)


@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_sampled_targets_give_the_gradient_of_forward_kl_in_expectation(temperature):
    "Exactly: the expectation over every word that might be drawn."
    p = problem()
    p = p | dict(teacher=p['teacher']/2)
    teacher, every = truth(p, temperature).exp(), torch.arange(17).expand(23, 17)
    loss = as_sparse(p, every, teacher, 'sampled', temperature=temperature, chunk=4)
    wanted = with_gradients(as_dense(p, temperature=temperature), p)
    for a, b in zip(with_gradients(loss, p)[1:], wanted[1:]): torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    entropy = -(teacher*teacher.log()).sum(-1)[p['mask']].mean()
    torch.testing.assert_close(loss, wanted[0] + temperature**2*entropy)


def test_sampled_targets_have_no_bias():
    "The mean over 1,024 draws of 4 words lies within its standard error of the truth, and comes nearer with their number."
    p, draws = problem(), 1024
    wanted = with_gradients(as_dense(p), p)[1]
    words = torch.multinomial(truth(p).exp(), 4*draws, replacement=True, generator=torch.Generator().manual_seed(0)).view(23, draws, 4)
    found = torch.stack([torch.autograd.grad(as_sparse(p, words[:, n], torch.full((23, 4), 0.25), 'sampled'), p['hidden'])[0]
                         for n in range(draws)])
    distance = {n: ((found[:n].mean(0) - wanted).norm()/wanted.norm()).item() for n in (1, 64, draws)}
    assert distance[1] > 3*distance[64] > 6*distance[draws] and distance[draws] < 0.05
    z = (found.mean(0) - wanted)[p['mask']]/(found.std(0)[p['mask']]/draws**0.5)
    assert 0.7 < z.square().mean() < 1.4


@pytest.mark.parametrize('divergence', ['forward_kl', 'skew_kl', 'skew_kl alpha=0.4'])
def test_all_words_kept_is_the_whole_teacher(divergence):
    p = problem()
    top = truth(p, 2.0).exp().topk(17)
    for a, b in zip(with_gradients(as_sparse(p, *top[::-1], 'top_k', divergence=divergence, temperature=2.0, chunk=5), p),
                    with_gradients(as_dense(p, divergence=divergence, temperature=2.0), p)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize('kind', ['forward_kl', 'skew_kl'])
def test_top_words_with_a_tail_are_a_divergence_of_their_own(kind):
    "As with the tail as one word, by hand; never negative, and growing towards the whole with the number of words."
    p, values = problem(), []
    teacher, student = truth(p), p['head'].logits(p['hidden']).log_softmax(-1)
    for k in (1, 4, 16):
        top = teacher.exp().topk(k)
        p_tail, q_kept = 1 - top.values.sum(-1, keepdim=True), student.exp().gather(-1, top.indices)
        by_hand = divergences[kind](torch.cat([top.values, p_tail], -1).log(),
                                    torch.cat([q_kept, 1 - q_kept.sum(-1, keepdim=True)], -1).log())[p['mask']].mean()
        values.append(as_sparse(p, top.indices, top.values, 'top_k', divergence=kind))
        torch.testing.assert_close(values[-1], by_hand)
    assert 0 < values[0] < values[1] < values[2] <= as_dense(p, divergence=kind) + 1e-12


def test_probabilities_of_16_bits_that_exceed_1_are_no_negative_tail():
    p = problem()
    top = torch.tensor([0.9, 0.09, 0.0101]).expand(23, 3)
    value = as_sparse(p, torch.arange(3).expand(23, 3), top.half(), 'top_k')
    assert value.isfinite() and value > 0
    exact = top.half().double()
    torch.testing.assert_close(value, as_sparse(p, torch.arange(3).expand(23, 3), exact/exact.sum(-1, True), 'top_k'))
    for gradient in with_gradients(value, p)[1:]: assert gradient.isfinite().all()


@pytest.mark.parametrize('targets', ['sampled', 'top_k'])
def test_sparse_is_invariant_too(targets):
    p = problem(tokens=24)
    ids, weights = torch.randint(17, (24, 1), generator=torch.Generator().manual_seed(0)).repeat(1, 3), torch.full((24, 3), 0.3)
    if targets == 'top_k': ids = (ids + torch.arange(3)) % 17
    whole = with_gradients(as_sparse(p, ids, weights, targets), p)
    ids[~p['mask']], weights[~p['mask']] = 10**6, math.nan           # outside of the loss anything may stand
    for order in (torch.arange(24), torch.randperm(24)):
        parts = sum(as_sparse(p | dict(hidden=p['hidden'][part], mask=p['mask'][part]), ids[part].int(), weights[part], targets,
                              count=p['mask'].sum(), chunk=2) for part in order.split(5))
        for a, b in zip(with_gradients(parts, p), whole): torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize('dtype', [torch.uint16, torch.uint32, torch.int32])
def test_ids_may_be_as_a_cache_holds_them(dtype):
    p, ids, weights = problem(), torch.arange(46).view(23, 2) % 17, torch.full((23, 2), 0.5)
    torch.testing.assert_close(as_sparse(p, ids.to(dtype), weights.half(), 'sampled'), as_sparse(p, ids, weights, 'sampled'))


@pytest.mark.parametrize(('change', 'message'), [
    (dict(divergence='reverse_kl', targets='sampled'), 'cannot be had from sampled targets, because draws tell .* choose forward_kl'),
    (dict(divergence='skew_kl', targets='sampled'), 'cannot be had from sampled'),
    *((dict(divergence=kind), 'cannot be had from top_k targets, because .* choose forward_kl or skew_kl')
      for kind in divergences if kind not in ('forward_kl', 'skew_kl')),
    (dict(divergence='kl'), 'no known divergence'),
    (dict(targets='all'), 'choose one of sampled, top_k'),
    (dict(ids=torch.full((23, 2), 17)), 'ids up to 17, and the student knows 17'),
    (dict(ids=torch.full((23, 2), -1)), 'another vocabulary'),
    (dict(vocabulary=5), 'the student knows 5'),
    (dict(weights=torch.ones(22, 2)), '23, 23, 22 and 23 tokens'),
    (dict(weights=torch.ones(23, 3)), '2 ids and 3 weights')], ids=str)
def test_kept_words_that_cannot_serve_are_refused(change, message):
    given = dict(ids=torch.arange(46).view(23, 2) % 17, weights=torch.full((23, 2), 0.4), targets='top_k') | change
    with pytest.raises(InputError, match=message): as_sparse(problem(), **given)
