"""A judge of continuations: its loss against loops, drafts that all choices see alike, pairs out of them, measures of other families."""
import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from world import reader

from scilm_adapt.decoding import DECODERS, sample
from scilm_adapt.errors import InputError
from scilm_adapt.files import read_json, write_text
from scilm_adapt.generate import continuations, respond
from scilm_adapt.judge import (
    CHOICES,
    Judging,
    auc_parts,
    best_drafts,
    best_of,
    check_judging,
    decoders_judged,
    drafts_of,
    elsewhere,
    frontier,
    frontier_distance,
    histograms,
    judge_loss,
    judged_pairs,
    open_judge,
    prepare,
    teach,
    told_apart,
    wrong_ones,
)
from scilm_adapt.models import weights_hash
from scilm_adapt.papers import Corpus
from scilm_adapt.preference import passages, prompt_ids
from scilm_adapt.runs import Run
from scilm_adapt.tokens import document_ends, pad
from scilm_adapt.training import document_nats

NOUNS = 'heat light sound gravity friction pressure salt iron water glass copper helium'.split()


def paper(number: int) -> dict:
    draw = np.random.default_rng(number)
    noun = NOUNS[number % 12]
    sentences = [f'The {noun} of {a} was kept beside {b} for a day.' for a, b in draw.choice(NOUNS, (6, 2))]
    return dict(id=f'p{number}', title=f'On {noun} {number}', text=' '.join(sentences), sections=[])


PAPERS = [paper(number) for number in range(40)]
SMALL = Judging(papers=16, length=64, steps=10, batch=8)


@pytest.fixture(scope='module')
def student(): return reader(PAPERS, context=128)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp('run'))
    write_text(run.folder/'corpus'/'science.jsonl', 'its content stands for the stage that made it')
    return run, Corpus(dict(train=PAPERS[:32], valid=[], test=PAPERS[32:]), dict(train=[], valid=[], test=[]), run.folder/'corpus')


@pytest.fixture(scope='module')
def judge(world, student): return prepare(world[0], student, world[1], SMALL)


@pytest.fixture(scope='module')
def begun(student): return passages(student.tokenizer, PAPERS, 64, 6)


def batch_of(student, begun) -> dict[str, torch.Tensor]:
    return pad([prompt_ids(student.tokenizer, one) for one in begun], 0, left=True)


# --- the loss

@settings(max_examples=12)
@given(st.integers(1, 5), st.integers(0, 3), st.sampled_from([0.05, 0.1, 1.0]), st.integers(0, 99))
def test_value_and_slope_are_those_of_the_formula(rows, wrong, tau, seed):
    draw = torch.Generator().manual_seed(seed)
    a, b, w = (torch.randn(*shape, 4, dtype=torch.float64, generator=draw).requires_grad_() for shape in ((rows,), (rows,), (rows, wrong)))
    there = torch.rand(rows, wrong, generator=draw) > 0.4
    def cosine(x, y): return (x*y).sum()/x.norm()/y.norm()
    losses = []
    for n in range(rows):
        every = [(cosine(a[n], b[m])/tau).exp() for m in range(rows)]
        own = [(cosine(a[n], w[n, k])/tau).exp() for k in range(wrong) if there[n, k]]
        losses.append(-(every[n]/(sum(every) + sum(own))).log())
    wanted, found = sum(losses)/rows, judge_loss(a, b, w, there, tau)
    slopes = [torch.autograd.grad(value, (a, b, w), allow_unused=True, materialize_grads=True) for value in (found, wanted)]
    assert found.dtype == torch.float64 and found.item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-12)
    for pair in zip(*slopes): torch.testing.assert_close(*pair, rtol=1e-7, atol=1e-11)
    assert not slopes[0][2][~there].any()


def test_the_slope_is_that_of_small_steps_and_length_does_not_count():
    draw = torch.Generator().manual_seed(0)
    a, b, w = (torch.randn(*shape, 3, dtype=torch.float64, generator=draw, requires_grad=True) for shape in ((3,), (3,), (3, 2)))
    assert torch.autograd.gradcheck(lambda *given: judge_loss(*given, temperature=0.5), (a, b, w))
    assert judge_loss(a, b, w).item() == pytest.approx(judge_loss(3*a, 0.1*b, 9*w).item(), rel=1e-9)
    assert judge_loss(a[:1], b[:1]).item() == 0 and judge_loss(a, b).item() < judge_loss(a, b, w).item()


# --- wrong continuations

def test_wrong_continuations_are_real_stretches_or_own_ones_and_no_longer_than_the_real_one(student, begun):
    texts = {record['id']: record['text'] for record in PAPERS}
    rows = wrong_ones(student, begun, texts, samples=2, new_tokens=8)
    assert all(len(row) == 4 for row in rows)
    for passage, row in zip(begun, rows):
        assert all(text is None or 0 < len(text) <= len(passage.continuation) for text in row)
        assert passage.prompt.startswith(row[0]) and row[1] != passage.continuation
        assert row[1] in texts[passage.paper] or sorted(row[1].split()) == sorted(passage.continuation.split())
    assert rows == wrong_ones(student, begun, texts, samples=2, new_tokens=8)
    assert all(len(row) == 2 for row in wrong_ones(student, begun, texts, samples=0))


def test_of_a_short_paper_the_sentences_change_places_and_one_sentence_has_no_elsewhere(begun):
    chance = np.random.default_rng(0)
    class Passage: continuation = 'It is warm. It is cold. It is dry.'
    other = elsewhere(Passage, f'Well. {Passage.continuation}', chance)
    assert other != Passage.continuation and sorted(other.split()) == sorted(Passage.continuation.split())
    Passage.continuation = 'It is warm and nothing else.'
    assert elsewhere(Passage, Passage.continuation, chance) is None
    assert elsewhere(Passage, f'{Passage.continuation} And then it is cold again.', chance) == 'And then it is cold again.'


# --- the judge

def test_a_judge_harms_nothing_and_is_kept_and_found_again(world, student, judge, capsys):
    weights = weights_hash(student.model)
    again = prepare(world[0], student, world[1], SMALL)
    assert 'judge: already done' in capsys.readouterr().out and weights_hash(again.head) == weights_hash(judge.head)
    prepare(Run(world[0].folder.parent/'new'), student, world[1], SMALL)
    assert weights_hash(student.model) == weights and all(weight.grad is None for weight in student.model.parameters())
    other = copy.deepcopy(student)
    other.model.lm_head.weight.data += 1
    with pytest.raises(InputError, match='reads the states of another model'): open_judge(world[0].folder/'judge', other)
    with pytest.raises(InputError, match='is no judge; make one'): open_judge(world[0].folder/'corpus', student)
    assert read_json(world[0].folder/'judge'/'judge.json')['passages'] == 16


def test_a_score_does_not_depend_on_the_company(judge, begun):
    beginnings, drafts = [one.prompt for one in begun], [[one.continuation, one.prompt] for one in begun]
    together = judge.scores(beginnings, drafts)
    alone = np.stack([judge.scores([a], [b])[0] for a, b in zip(beginnings, drafts)])
    assert together.shape == (len(begun), 2) and np.allclose(together, alone, atol=1e-5) and (np.abs(together) <= 1 + 1e-6).all()


def test_a_shuffled_judge_learns_another_thing(world, student, judge):
    mixed = prepare(Run(world[0].folder.parent/'mixed'), student, world[1], Judging(**{**vars(SMALL), 'shuffled': True}))
    assert weights_hash(mixed.head) != weights_hash(judge.head)


@pytest.mark.parametrize('change, message', [(dict(papers=1), 'papers is 1'), (dict(batch=1), 'batch is 1; set it to 2'),
                                             (dict(temperature=0.0), 'temperature is 0.0; set it above 0')])
def test_settings_that_cannot_work_are_refused_by_name(change, message):
    with pytest.raises(InputError, match=message): check_judging(Judging(**change))


def test_too_few_passages_are_refused(world, student):
    short = Corpus(dict(train=[PAPERS[0] | dict(text='Short.')], valid=[], test=[]), {}, world[1].folder)
    with pytest.raises(InputError, match='0 papers have a beginning.*raise length'):
        prepare(Run(world[0].folder.parent/'short'), student, short, SMALL)


# --- the best of several drafts

def test_every_choice_takes_the_draft_it_scores_highest_and_all_see_the_same(student, judge, begun):
    given = dict(max_new_tokens=9, eos_token_id=[document_ends(student.tokenizer)[1]])
    def chance(): return torch.Generator().manual_seed(3)
    batch = batch_of(student, begun)
    ids, scores = drafts_of(student.model, *batch.values(), 3, judge, CHOICES, generator=chance(), **given)
    plain = sample(student.model, *(values.repeat_interleave(3, 0) for values in batch.values()), top_p=0.95, generator=chance(), **given)
    assert torch.equal(ids.flatten(0, 1), plain), 'the drafts are plain samples'
    for choice, values in scores.items():
        best = best_of(student.model, *batch.values(), judge, choice, 3, generator=chance(), **given)
        assert torch.equal(best, torch.stack([row[at] for row, at in zip(ids, values.argmax(1))])), choice
    assert len({tuple(values.argmax(1)) for values in scores.values()}) > 1


def test_scores_are_what_their_names_say(student, judge, begun):
    end, batch = document_ends(student.tokenizer)[1], batch_of(student, begun)
    ids, scores = drafts_of(student.model, *batch.values(), 2, judge, CHOICES, eos_token_id=[end], max_new_tokens=12,
                            generator=torch.Generator().manual_seed(0))
    wide = batch['input_ids'].shape[1]
    for row, passage in enumerate(begun):
        prompt = prompt_ids(student.tokenizer, passage)
        for place in range(2):
            draft = ids[row, place, wide:].tolist()
            draft = draft[:draft.index(end) + 1] if end in draft else draft
            nats = document_nats(student, [prompt + draft], [[0]*len(prompt) + [1]*len(draft)], context=128)[0]
            assert scores['likelihood'][row, place] == pytest.approx(-nats/len(draft), rel=1e-3)
            text = student.tokenizer.decode(draft, skip_special_tokens=True).strip() or ' '
            assert scores['judge'][row, place] == pytest.approx(judge.scores([passage.prompt], [[text]])[0, 0], abs=1e-3)
    assert (scores['overlap'] >= 0).all() and (scores['overlap'] <= 1).all()


def test_best_of_n_is_a_decoder_like_others_and_an_answer_may_be_one(student, judge, begun):
    decoders, prompts = decoders_judged(judge, 2), [prompt_ids(student.tokenizer, one) for one in begun[:3]]
    assert decoders.keys() == DECODERS.keys() | {f'best of 2, {choice}' for choice in CHOICES}
    written = [continuations(student, prompts, 'best of 2, judge', 8, seed, decoders=decoders) for seed in (0, 0, 1)]
    texts = [[answer.ids for answer in some] for some in written]
    assert texts[0] == texts[1] != texts[2]
    answers = respond(student, prompts, 6, temperature=1.0, repetition_penalty=1.1, decode=partial(best_of, judge=judge, n=2))
    assert len(answers) == 3 and all(len(answer.ids) <= 6 for answer in answers)


@pytest.mark.parametrize('given, message', [(dict(choice='judg'), "choice is 'judg'; choose one of: judge"), (dict(n=0), 'n is 0 drafts'),
                                            (dict(temperature=0.0), 'At temperature 0 all of 4 drafts are the same')])
def test_drafts_that_cannot_be_are_refused(student, judge, begun, given, message):
    with pytest.raises(InputError, match=message): best_of(student.model, *batch_of(student, begun).values(), judge=judge, **given)


def test_a_judge_with_other_tokens_is_refused(student, judge, begun):
    other = reader(PAPERS[:3], context=128, size=300)
    with pytest.raises(InputError, match='take a judge that was made for this model'):
        best_of(other.model, *batch_of(student, begun).values(), judge=judge)


def test_texts_of_all_choices_are_of_the_same_drafts(student, judge, begun):
    texts = best_drafts(student, judge, begun, n=3, new_tokens=12, batch_size=4, seed=1)
    assert texts.keys() == CHOICES.keys() and {len(some) for some in texts.values()} == {len(begun)}
    assert texts == best_drafts(student, judge, begun, n=3, new_tokens=12, batch_size=4, seed=1)
    assert len({*map(tuple, texts.values())}) > 1, 'all choices take the same draft of every passage'
    alone = best_drafts(student, judge, begun, n=1, new_tokens=12, batch_size=4)
    assert len({*map(tuple, alone.values())}) == 1 and alone != best_drafts(student, judge, begun, n=1, new_tokens=12, batch_size=4, seed=1)


# --- taught back

def test_pairs_are_best_and_worst_of_own_drafts_of_equal_length(student, judge, begun):
    pairs = judged_pairs(student, judge, begun, n=3, new_tokens=12, batch_size=4)
    assert pairs and pairs == judged_pairs(student, judge, begun, n=3, new_tokens=12, batch_size=4)
    for pair in pairs:
        assert len(pair.chosen) == len(pair.rejected) >= 8 and pair.chosen != pair.rejected and pair.corruption == 'judged, judge'
    drawn = judged_pairs(student, judge, begun, n=3, new_tokens=12, choice='random', batch_size=4)
    assert [pair.chosen for pair in drawn] != [pair.chosen for pair in pairs]


@pytest.mark.parametrize('kind', ['simpo', 'dpo'])
def test_what_the_judge_prefers_is_learnt_beside_the_reading(world, student, judge, kind):
    weights = weights_hash(student.model)
    taught = teach(Run(world[0].folder.parent/kind), student, judge, world[1], n=2, steps=2, context=64, learning_rate=1e-3,
                   preference=dict(kind=kind, pairs=6, batch=2, length=48))
    history = read_json(world[0].folder.parent/kind/'models'/'taught'/'history.json')
    assert {'lm', 'preference'} <= history[0].keys() and weights_hash(taught.model) != weights == weights_hash(student.model)


# --- measures

@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=20))
def test_the_parts_of_an_auc_have_it_as_their_mean(scores):
    real, written = np.array(scores, float).T
    parts = auc_parts(real, written)
    counted = np.mean([[1.0 if a > b else 0.5 if a == b else 0.0 for b in written] for a in real])
    assert len(parts) == len(scores) and parts.mean() == pytest.approx(counted)
    assert counted == pytest.approx(roc_auc_score(np.repeat([1, 0], len(real)), np.r_[real, written]))


def test_the_spread_of_the_parts_is_that_of_the_auc_over_other_papers():
    chance, size = np.random.default_rng(0), 60
    draws = [(chance.normal(0.8, 1, size), chance.normal(0, 1, size)) for _ in range(400)]
    found = np.std([auc_parts(*one).mean() for one in draws])
    assert np.mean([auc_parts(*one).std(ddof=1)/size**0.5 for one in draws]) == pytest.approx(found, rel=0.15)


def test_a_classifier_tells_apart_what_differs_and_no_paper_is_judged_by_one_that_saw_it():
    chance = np.random.default_rng(0)
    def text(words): return ' '.join(chance.choice(words, 12))
    real, same, other = ([text(words) for _ in range(30)] for words in (NOUNS, NOUNS, [noun[::-1] for noun in NOUNS]))
    areas = [auc_parts(*told_apart(real, some)).mean() for some in (same, other)]
    assert 0.25 < areas[0] < 0.75 and areas[1] > 0.98
    unseen = [f'{n}{n}{n} zzqq' for n in range(10)]  # texts that only a classifier that saw them could tell from the others
    assert auc_parts(*told_apart(unseen, unseen[::-1], folds=10)).mean() < 0.8
    with pytest.raises(InputError, match='3 real and 3 written texts'): told_apart(real[:3], other[:3])
    with pytest.raises(InputError, match='4 real and 5 written'): told_apart(real[:4], other[:5])


def histogram(values): return np.array(values)/sum(values)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=6).filter(lambda some: all(map(sum, zip(*some)))))
def test_the_frontier_is_that_of_the_formula_and_its_distance_between_none_and_one(counts):
    p, q = (histogram(values) for values in zip(*counts))
    curve = frontier(p, q, scaling=5, points=3)
    for share, (x, y) in zip((1 - 1e-6, 0.5, 1e-6), curve[1:-1]):
        r = [share*a + (1 - share)*b for a, b in zip(p, q)]
        kl = [sum(a*np.log(a/c) for a, c in zip(one, r) if a) for one in (q, p)]
        assert x == pytest.approx(np.exp(-5*kl[0])) and y == pytest.approx(np.exp(-5*kl[1]))
    distance = frontier_distance(p, q)
    assert -1e-9 <= distance <= 1 and distance == pytest.approx(frontier_distance(q, p), abs=0.03)
    assert frontier_distance(p, p) == pytest.approx(0, abs=1e-4)


def test_histograms_of_the_same_texts_are_equal_and_far_ones_are_far():
    texts = [' '.join(np.random.default_rng(n).choice(NOUNS, 8)) for n in range(30)]
    p, q = histograms(texts, texts, 4)
    assert np.array_equal(p, q) and p.sum() == pytest.approx(1) and len(p) == 4
    far = histograms(texts, [text[::-1].upper() for text in texts], 4)
    assert frontier_distance(*far) > 0.5 > frontier_distance(p, q)
