"""Preference contrast: corruptions that really differ, pairs of equal length, losses against their formulas, batches that add up."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from world import exact, reader

from scilm_adapt import preference as module
from scilm_adapt.errors import InputError
from scilm_adapt.models import build, logits_of, tiny
from scilm_adapt.preference import (
    _DEFAULTS,
    _NUMBER,
    _OWN,
    _SHORTEST,
    _TERM,
    CORRUPTIONS,
    PREFERENCES,
    Preference,
    _log_likelihoods,
    _make_pairs,
    _margins,
    _pair_nats,
    _passage_of,
    _shape,
    _token_nats,
    passages,
    preference_accuracy,
    preference_batch,
    preference_loss,
    preference_part,
    prepare,
    sentence_parts,
)
from scilm_adapt.runs import Run, rng
from scilm_adapt.tokens import encode_document
from scilm_adapt.training import fit, micro_batches

SUBJECTS = ('heat', 'light', 'sound', 'gravity', 'friction', 'pressure', 'salt', 'iron', 'water', 'glass', 'copper', 'helium')
PAPERS = [dict(id=name, title=f'On {name}', text=f'{name.capitalize()} is seen in many experiments. We measured the {name}ation of '
               f'{n + 10} samples for {n}.5 hours. The results show less {name} with every collection. Nothing was said of this before, '
               'e.g. by us.') for n, name in enumerate(SUBJECTS)]
TEXTS = [' '.join(sentence_parts(paper['text'])[2::2]) for paper in PAPERS]


@pytest.fixture(scope='module')
def student():
    return reader(PAPERS, 160)


@pytest.fixture(scope='module')
def pairs(student):
    return _make_pairs(student, PAPERS, Preference(length=120))


# --- passages

@pytest.mark.parametrize('text, sentences', [
    ('One is here. Two is there.', 2), ('See e.g. The S. Smith rule. Then stop! Why? Because.', 4), ('Это первое. Это второе.', 2),
    ('Value of 3.5 and 4. 7 more', 1), ('Line one.\n\nLine two (as said). Line three.', 3), ('', 1)])
def test_a_text_is_the_join_of_its_sentences(text, sentences):
    assert ''.join(sentence_parts(text)) == text and len(sentence_parts(text)[::2]) == sentences


@given(st.text(alphabet='aB. \n1)', max_size=80))
def test_sentences_lose_nothing(text):
    assert ''.join(sentence_parts(text)) == text.strip()


@pytest.mark.parametrize('length', [60, 90, 160])
def test_a_passage_is_a_piece_of_the_paper_cut_between_sentences(student, length):
    for paper in PAPERS:
        passage = _passage_of(student.tokenizer, paper, length)
        whole = f"{paper['title']}\n\n{paper['text']}"
        assert whole.startswith(passage.prompt + passage.gap + passage.continuation) and passage.gap.isspace()
        assert passage.prompt.startswith(paper['title']) and passage.continuation.endswith('.')
        assert len(encode_document(student.tokenizer, passage.prompt)) <= length//2 + 2


@pytest.mark.parametrize('change', [dict(text=''), dict(text='A word.'), dict(title='', text=PAPERS[0]['text'].split('. ')[0] + '.'),
                                    dict(title='On heat and light '*20)])
def test_a_paper_without_a_continuation_gives_no_passage(student, change):
    assert _passage_of(student.tokenizer, PAPERS[0] | change, 100) is None


def test_a_title_that_the_text_repeats_is_read_once(student):
    paper = PAPERS[2]
    assert _passage_of(student.tokenizer, paper | dict(text=f"{paper['title']}\n{paper['text']}"), 100) == \
        _passage_of(student.tokenizer, paper, 100)
    untitled = _passage_of(student.tokenizer, paper | dict(title=''), 100)
    assert untitled.prompt == sentence_parts(paper['text'])[0] and untitled.gap == ' '


def test_of_a_very_long_paper_only_the_beginning_is_tokenised(student, monkeypatch):
    seen, encode_many = [], module.encode_many
    monkeypatch.setattr(module, 'encode_many', lambda tokenizer, texts: seen.extend(texts) or encode_many(tokenizer, texts))
    long = PAPERS[0] | dict(text=' '.join(TEXTS*50))
    assert _passage_of(student.tokenizer, long, 60) and sum(map(len, seen)) <= 16*60 + 20
    assert all(text.endswith(('.', 'heat')) for text in seen)  # nor is a sentence cut by that


# --- corruptions

@given(st.sampled_from(sorted(CORRUPTIONS)), st.integers(0, len(TEXTS) - 1), st.integers(0, 999))
def test_a_corruption_differs_and_is_a_function_of_its_generator(name, at, seed):
    others = TEXTS[:at] + TEXTS[at + 1:]
    spoilt = CORRUPTIONS[name](TEXTS[at], others, rng(seed))
    assert spoilt and spoilt != TEXTS[at] and spoilt == CORRUPTIONS[name](TEXTS[at], others, rng(seed))


@pytest.mark.parametrize('name', CORRUPTIONS)
def test_what_cannot_be_spoilt_is_left_alone(name):
    assert CORRUPTIONS[name]('Same here. Same here.', ['Same here. Same here.'], rng(0)) is None
    assert CORRUPTIONS[name]('Of 42.', [], rng(0)) is None


@pytest.mark.parametrize('seed', range(5))
def test_each_corruption_changes_what_it_names_and_nothing_else(seed):
    text, others = TEXTS[3], TEXTS[:3] + TEXTS[4:]
    spoilt = {name: corrupt(text, others, rng(seed)) for name, corrupt in CORRUPTIONS.items()}
    assert sorted(sentence_parts(spoilt['sentences'])) == sorted(sentence_parts(text))
    assert _NUMBER.sub('#', spoilt['numbers']) == _NUMBER.sub('#', text)
    assert all(a != b and _shape(a) == _shape(b) for a, b in zip(_NUMBER.findall(spoilt['numbers']), _NUMBER.findall(text)))
    assert _TERM.sub('#', spoilt['terms']) == _TERM.sub('#', text)
    exchanged = [(a, b) for a, b in zip(_TERM.findall(text), _TERM.findall(spoilt['terms'])) if a != b]
    assert exchanged and all(_shape(a) == _shape(b) and b not in text and any(b in other for other in others) for a, b in exchanged)
    assert spoilt['paper'] in others


def test_a_number_without_one_of_its_form_becomes_any_other():
    assert CORRUPTIONS['numbers']('At 2014.', ['With 3.5.'], rng(0)) == 'At 3.5.'


# --- pairs

def test_pairs_have_one_prompt_and_equal_lengths(student, pairs):
    found = {passage.paper: passage for passage in passages(student.tokenizer, PAPERS, 120, 99)}
    assert {pair.corruption for pair in pairs} == {*CORRUPTIONS, _OWN} and len(pairs) == len(PAPERS)
    for pair in pairs:
        passage = found[pair.paper]
        assert len(pair.chosen) == len(pair.rejected) >= _SHORTEST and len(pair.prompt + pair.chosen) <= 120
        assert pair.chosen != pair.rejected and pair.reference is None
        assert pair.prompt == encode_document(student.tokenizer, passage.prompt)[:-1]
        real = encode_document(student.tokenizer, passage.prompt + passage.gap + passage.continuation)
        assert real[:len(pair.prompt + pair.chosen)] == pair.prompt + pair.chosen


def test_pairs_are_a_function_of_papers_settings_and_seed(student, pairs):
    again = _make_pairs(student, PAPERS, Preference(length=120, batch=3, beta=0.5))
    assert again == pairs != _make_pairs(student, PAPERS, Preference(length=120), seed=1)
    assert len(_make_pairs(student, PAPERS, Preference(length=120, pairs=5))) == 5


def test_own_continuations_are_what_the_student_writes_greedily(student):
    for pair in _make_pairs(student, PAPERS, Preference(length=120, corruptions=(_OWN,))):
        ids = list(pair.prompt)
        for _ in pair.rejected:
            with torch.no_grad(): ids.append(int(student.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert pair.corruption == _OWN and ids[len(pair.prompt):] == pair.rejected


def test_a_student_that_writes_nothing_gets_other_corruptions(student, monkeypatch):
    monkeypatch.setattr(module, 'continued', lambda lm, prompts, halts, *a, **k: iter([{n: halts[:1] for n in range(len(prompts))}]))
    assert {pair.corruption for pair in _make_pairs(student, PAPERS, Preference(length=120, corruptions=(_OWN, 'paper')))} == {'paper'}
    with pytest.raises(InputError, match="corruptions = 'own'.*sentences"):
        _make_pairs(student, PAPERS, Preference(length=120, corruptions=(_OWN,)))


def test_the_negative_control_changes_some_pairs_over_and_nothing_else(student, pairs):
    control = _make_pairs(student, PAPERS, Preference(length=120, shuffled=True))
    turned = [(a.chosen, a.rejected) == (b.rejected, b.chosen) for a, b in zip(pairs, control)]
    same = [a == b for a, b in zip(pairs, control)]
    assert all(np.logical_xor(turned, same)) and 0 < sum(turned) < len(turned)


@pytest.mark.parametrize('change, named', [
    (dict(kind='ppo'), r"kind is 'ppo'; choose dpo, simpo, cpo"), (dict(corruptions=('typos',)), r"corruptions is 'typos'.*numbers.*own"),
    (dict(corruptions=()), r'corruptions is'), (dict(length=161), r'length is 161.*at most the 160'), (dict(length=8), r'length is 8'),
    (dict(batch=0), r'batch is 0'), (dict(pairs=1), r'pairs is 1'), (dict(beta=0), r'beta is 0.*above 0'), (dict(gamma=-1), r'gamma is -1'),
    (dict(likelihood=math.nan), r'likelihood is nan'), (dict(records=[dict(id='1', title='', text='Short.')]), r'0 of 1 papers.*length'),
    (dict(records=PAPERS[:1]), r'1 of 1 papers.*two are needed')])
def test_what_cannot_work_is_named_before_anything_is_written(tmp_path, student, change, named):
    change = dict(change)
    records, run = change.pop('records', PAPERS), Run(tmp_path)
    with pytest.raises(InputError, match=named): prepare(run, student, records, Preference(**(dict(length=120) | change)))
    assert not (tmp_path/'preferences').exists()


def test_pairs_are_kept_and_made_anew_when_their_makings_change(tmp_path, student, monkeypatch):
    run, calls, make = Run(tmp_path), [], module._make_pairs
    monkeypatch.setattr(module, '_make_pairs', lambda *a: calls.append(a) or make(*a))
    settings = dict(length=120, corruptions=('paper', 'terms'))
    first = prepare(run, student, PAPERS, Preference(**settings))
    other = build(student.tokenizer, hidden=32, context=160, seed=1)
    assert first == prepare(run, other, PAPERS, Preference(**settings, beta=0.3, batch=2)) and len(calls) == 1  # no model was asked
    for number, change in enumerate((dict(seed=1), dict(preference=Preference(**settings, kind='dpo')), dict(lm=other), dict(
            preference=Preference(**settings, shuffled=True)))):
        given = dict(lm=student, records=PAPERS, preference=Preference(**settings, kind='dpo' if number == 2 else 'cpo')) | change
        prepare(run, **given)
        assert len(calls) == number + 2


# --- the losses

def numbers(seed: int, size: int = 6) -> list[torch.Tensor]:
    "Log-likelihoods, tokens and references of pairs, as `preference_loss` takes them."
    generator = torch.Generator().manual_seed(seed)
    likely = [-50*torch.rand(size, dtype=torch.float64, generator=generator) for _ in range(4)]
    return [*likely[:2], *torch.randint(1, 40, (2, size), generator=generator), *likely[2:]]


def naive(chosen, rejected, tokens, others, start, other_start, kind, beta, gamma, likelihood):
    z = dict(dpo=beta*(chosen - start - rejected + other_start), cpo=beta*(chosen - rejected),
             simpo=beta*chosen/tokens - beta*rejected/others - gamma)[kind]
    if kind != 'simpo': z -= gamma
    return math.log1p(math.exp(-z)) - likelihood*chosen/tokens


@given(st.integers(0, 999), st.sampled_from(sorted(PREFERENCES)), st.sampled_from([None, (0.3, 0.7, 0.4), (2.0, 0.0, 0.0)]))
def test_a_loss_is_its_formula(seed, kind, settings):
    given = numbers(seed)
    found = preference_loss(*given, kind, *(settings or (None, None, None)))
    wanted = [naive(*row, kind, *(settings or _DEFAULTS[kind].values())) for row in zip(*(value.tolist() for value in given))]
    assert np.allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize('kind', PREFERENCES)
def test_a_loss_has_the_right_gradient(kind):
    chosen, rejected, *rest = numbers(0)
    assert torch.autograd.gradcheck(lambda a, b: preference_loss(a, b, *rest, kind, likelihood=0.3),
                                    (chosen.requires_grad_(), rejected.requires_grad_()))


def test_losses_are_those_of_trl():
    trainer = pytest.importorskip('trl.experimental.cpo').CPOTrainer
    chosen, rejected, tokens, others, start, other_start = numbers(1)
    def trl(a, b, kind, beta, gamma=0.0):
        setting = SimpleNamespace(alpha=0.0, beta=beta, simpo_gamma=gamma, label_smoothing=0.0, loss_type=kind,
                                  accelerator=SimpleNamespace(device='cpu'))
        return trainer.cpo_loss(setting, a, b)[0]
    def ours(kind, **settings): return preference_loss(chosen, rejected, tokens, others, start, other_start, kind, **settings)
    assert torch.allclose(ours('cpo', likelihood=0), trl(chosen, rejected, 'sigmoid', 0.1), rtol=1e-12)
    assert torch.allclose(ours('simpo'), trl(chosen/tokens, rejected/others, 'simpo', 2.5, 1.375), rtol=1e-12)
    assert torch.allclose(ours('dpo'), trl(chosen - start, rejected - other_start, 'sigmoid', 0.1), rtol=1e-12)


@pytest.mark.parametrize('kind', PREFERENCES)
def test_a_loss_stays_finite_far_out(kind):
    far = torch.tensor([-1e5, -1e-5]).requires_grad_()
    losses = preference_loss(far, far.flip(0), torch.ones(2), torch.ones(2), torch.zeros(2), torch.zeros(2), kind, likelihood=0)
    losses.sum().backward()
    assert losses.isfinite().all() and far.grad.isfinite().all() and losses[0] > 1e3 and losses[1] < 1e-3


def test_a_loss_names_what_it_lacks():
    values = numbers(2)
    with pytest.raises(InputError, match='chosen_reference.*simpo'): preference_loss(*values[:4], kind='dpo')
    with pytest.raises(InputError, match='dpo, simpo, cpo'): preference_loss(*values, kind='orpo')


# --- in a batch

def test_log_likelihoods_are_those_of_each_continuation_alone(student, pairs):
    student = exact(student)
    with torch.no_grad():
        values, tokens = _log_likelihoods(student.model, preference_batch(pairs))
        for pair, likely, size in zip(pairs, values.tolist(), tokens.tolist()):
            for ids, found, number in zip((pair.chosen, pair.rejected), likely, size):
                logits = student.model(torch.tensor([pair.prompt + ids])).logits[0].log_softmax(-1)
                wanted = sum(logits[len(pair.prompt) + at - 1, i].item() for at, i in enumerate(ids))
                assert found == pytest.approx(wanted, rel=1e-10) and number == len(ids)
    assert np.allclose(-_pair_nats(student, pairs), values, rtol=1e-10)


@pytest.mark.parametrize('kind', PREFERENCES)
@pytest.mark.parametrize('rows', [1, 4])
def test_parts_of_a_batch_add_up_in_loss_and_gradient(student, kind, rows):
    student = exact(student)
    chosen = _make_pairs(student, PAPERS, Preference(kind=kind, length=80, corruptions=('paper', 'terms')))[:8]
    batch = preference_batch(chosen) | dict(input_ids=torch.zeros(16, 1))  # more rows of text than pairs: some parts have none
    def gradient(parts):
        student.model.zero_grad()
        losses = [preference_part(student.model, part, kind, likelihood=0.5) for part in parts]
        for loss in losses: loss.backward()  # those of empty parts too
        return sum(losses).item(), torch.cat([p.grad.flatten() for p in student.model.parameters()])
    (whole, wanted), (parts, found) = gradient([batch]), gradient(micro_batches(batch, rows))
    assert parts == pytest.approx(whole, rel=1e-10) and torch.allclose(found, wanted, atol=1e-10)
    ranks = [part for rank in range(3) for part in micro_batches(batch, rows, rank, 3)]
    assert sum(preference_part(student.model, part, kind, likelihood=0.5).item() for part in ranks) == pytest.approx(whole, rel=1e-10)
    assert sum(len(part['preference_input_ids']) == 0 for part in micro_batches(batch, 1)) == 8


def test_portions_of_logits_change_neither_loss_nor_gradient(student):
    student = exact(student)
    states, targets = torch.randn(11, 32, dtype=torch.float64), torch.arange(11)
    head, size = student.model.get_output_embeddings().weight, len(student.tokenizer)
    found = []
    for most in (2**25, 3*size, 1):
        leaf = states.clone().requires_grad_()
        nats = _token_nats(student.model, leaf, targets, most)
        found.append((nats, *torch.autograd.grad((nats*torch.arange(11)).sum(), (leaf, head))))
    wanted = -logits_of(student.model, states).log_softmax(-1)[torch.arange(11), targets]
    assert torch.allclose(found[0][0], wanted, atol=1e-12)
    for other in found[1:]: assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found[0], other))


def test_dpo_starts_even_and_carries_no_second_model(student):
    student = exact(student)
    batch = preference_batch(_make_pairs(student, PAPERS, Preference(kind='dpo', length=120)))
    with torch.no_grad():
        assert preference_part(student.model, batch, 'dpo').item() == pytest.approx(math.log(2), abs=1e-6)
        other = build(student.tokenizer, hidden=32, context=160, seed=1)
        assert abs(preference_part(other.model, batch, 'dpo').item() - math.log(2)) > 1e-3


# --- what it teaches

def test_accuracy_is_the_share_of_positive_margins_and_a_tie_counts_against(student, pairs, monkeypatch):
    found = _margins(student, pairs)
    likely = -_pair_nats(student, pairs)
    assert np.allclose(found, [(a - b)/len(pair.chosen) for (a, b), pair in zip(likely, pairs)])
    assert preference_accuracy(student, pairs) == np.mean(found > 0)
    monkeypatch.setattr(module, '_margins', lambda *a: np.array([0.0, 0.1, -0.1, 1.0]))
    assert preference_accuracy(student, pairs) == 0.5


@pytest.mark.parametrize('kind', PREFERENCES)
def test_training_widens_the_margin_and_the_control_does_not(kind):
    found = {}
    for shuffled in (False, True):
        lm = tiny([paper['text'] for paper in PAPERS], hidden=32, context=160)
        settings = Preference(kind=kind, length=100, corruptions=('sentences', 'paper'))
        real = _make_pairs(lm, PAPERS, settings)
        taught = _make_pairs(lm, PAPERS, Preference(kind=kind, length=100, corruptions=('sentences', 'paper'), shuffled=shuffled))
        batch = preference_batch(taught) | dict(input_ids=torch.zeros(len(taught), 1), count=torch.tensor(1.0))
        before, loss = _margins(lm, real).mean(), lambda model, part: dict(loss=preference_part(model, part, kind))
        fit(lm.model, lambda step, batch=batch: batch, loss, 12, learning_rate=3e-3, precision='no')
        found[shuffled] = _margins(lm, real).mean() - before
    assert found[False] > 0.1 and found[True] < 0.5*found[False]


def test_every_way_to_spoil_is_taken_by_default():
    assert set(Preference().corruptions) == {*CORRUPTIONS, _OWN}
