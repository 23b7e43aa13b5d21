"""A finder whose label is the model's own gain: losses against loops, a head that harms nothing, searches that leave out what they must."""
import copy
import io
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from world import reader

from scilm_adapt import cli
from scilm_adapt import finder as module
from scilm_adapt.errors import InputError
from scilm_adapt.files import read_json, write_json, write_text
from scilm_adapt.finder import (
    FUSIONS,
    LOSSES,
    WAYS,
    Finder,
    Finding,
    Head,
    answering_states,
    asking_states,
    better_head,
    candidates,
    check_finding,
    chosen_on_validation,
    dealt_out,
    finder_batch,
    finder_part,
    gain_of_first,
    gains,
    library_for,
    likelihood_supervised,
    open_finder,
    prepare,
    text_states,
    train,
    trained_head,
)
from scilm_adapt.generate import after_title, preceding, respond_with
from scilm_adapt.models import hidden_states, logits_of, save, weights_hash
from scilm_adapt.papers import Corpus, build, open_corpus
from scilm_adapt.related import brief
from scilm_adapt.related import prepare as prepare_library
from scilm_adapt.runs import Run, stage
from scilm_adapt.tokens import document_ends, encode
from scilm_adapt.training import document_nats, micro_batches

NOUNS = 'heat light sound gravity friction pressure salt iron water glass copper helium'.split()
VERBS = 'flows bends travels falls burns presses dissolves rusts boils breaks conducts rises'.split()


def paper(number: int) -> dict:
    draw = np.random.default_rng(number)
    noun, verb = NOUNS[number % 12], VERBS[number//12 % 12]
    rest = ' '.join(draw.choice([f'{noun}{n}' for n in range(9)] + NOUNS + VERBS, 12))
    return dict(id=f'p{number}', title=f'How {noun} {verb} {number}', text=f'The {noun} {verb}: {rest}.', sections=[])


PAPERS = [paper(number) for number in range(60)]
SMALL = Finding(papers=8, near=3, far=1, steps=20, length=32, batch=4)


@pytest.fixture(scope='module')
def student(): return reader(PAPERS, context=128)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A run, its corpus, of which one training paper is also a test paper, and its library."
    run = Run(tmp_path_factory.mktemp('run'))
    write_text(run.folder/'corpus'/'science.jsonl', 'its content stands for the stage that made it')
    corpus = Corpus(dict(train=PAPERS[:40], valid=PAPERS[40:50], test=[*PAPERS[50:], PAPERS[3] | dict(id='again')]),
                    dict(train=[], valid=[], test=[]), run.folder/'corpus')
    return run, corpus, prepare_library(run, corpus)


@pytest.fixture(scope='module')
def found(world, student):
    run, corpus, _ = world
    return prepare(run, student, corpus, SMALL)


# --- losses

def naive(kind: str, similarity, gain, there, tau: float, beta: float):
    "The two formulas, row by row and candidate by candidate."
    losses = []
    for s, g, here in zip(similarity, gain, there.tolist()):
        some = [n for n, known in enumerate(here) if known]
        if kind == 'likelihood':
            p, q = ([(values[n]/t).exp() for n in some] for values, t in ((s, tau), (g, beta)))
            losses.append(sum(a/sum(p)*((a/sum(p)).log() - (b/sum(q)).log()) for a, b in zip(p, q)))
        else:
            order = sorted(some, key=lambda n: float(g[n]))
            compared = {order[-1], *order[:(len(order) + 1)//2]}
            losses.append(-((s[order[-1]]/tau).exp()/sum((s[n]/tau).exp() for n in compared)).log())
    return sum(losses)/len(losses)


@settings(max_examples=12)
@given(st.sampled_from(sorted(LOSSES)), st.integers(1, 5), st.integers(1, 7), st.sampled_from([0.05, 0.1, 1.0]), st.integers(0, 99))
def test_losses_and_slopes_are_those_of_the_formulas(kind, rows, columns, tau, seed):
    draw = torch.Generator().manual_seed(seed)
    similarity = (2*torch.rand(rows, columns, dtype=torch.float64, generator=draw) - 1).requires_grad_()
    gain, there = 0.05*torch.randn(rows, columns, dtype=torch.float64, generator=draw), torch.rand(rows, columns, generator=draw) > 0.3
    there[:, 0] |= ~there.any(1)
    wanted, got = naive(kind, similarity, gain, there, tau, 0.02), LOSSES[kind](similarity, gain, there, tau, 0.02)
    slopes = [torch.autograd.grad(value, similarity)[0] for value in (got, wanted)]
    assert got.dtype == torch.float64 and got.item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(*slopes, rtol=1e-7, atol=1e-11)
    assert not slopes[0][~there].any()  # what is no candidate is not moved


def test_what_a_candidate_that_is_not_there_would_be_worth_does_not_matter():
    similarity, there = torch.randn(3, 4, dtype=torch.float64), torch.tensor([[1, 1, 0, 1]]*3, dtype=torch.bool)
    gain = torch.randn(3, 4, dtype=torch.float64)
    for loss in LOSSES.values():
        values = [loss(similarity, gain.masked_fill(~there, filled), there) for filled in (0.0, 99.0, float('nan'))]
        assert values[0] == values[1] == values[2] and values[0].isfinite()


def test_the_slope_is_that_of_small_steps():
    draw = torch.Generator().manual_seed(1)
    similarity = torch.randn(3, 4, dtype=torch.float64, generator=draw, requires_grad=True)
    gain, there = torch.randn(3, 4, dtype=torch.float64, generator=draw), torch.ones(3, 4, dtype=torch.bool)
    for loss in LOSSES.values(): assert torch.autograd.gradcheck(lambda s, f=loss: f(s, gain, there, 0.5, 0.5), similarity)
    assert likelihood_supervised(gain, gain, there, 0.5, 0.5).abs() < 1e-15


# --- gains and candidates

def test_a_gain_is_the_difference_of_two_readings(student):
    records, tried = PAPERS[:2], [[PAPERS[12], None], [PAPERS[20], PAPERS[13]]]
    found = gains(student, records, tried)
    assert np.isnan(found[0, 1]) and np.isfinite(found[[0, 1, 1], [0, 0, 1]]).all()
    for row, column in ((0, 0), (1, 0), (1, 1)):
        nats, text = [], records[row]['text']
        for papers in ([], [tried[row][column]]):
            before = [document_ends(student.tokenizer)[0], *preceding(student.tokenizer, papers, 90),
                      *encode(student.tokenizer, f"{records[row]['title']}\n\n")]
            body = encode(student.tokenizer, text)
            nats.append(document_nats(student, [before + body], [[0]*len(before) + [1]*len(body)], context=128)[0])
        assert len(before) + len(body) <= 128
        assert found[row, column] == pytest.approx((nats[0] - nats[1])/np.log(2)/len(text.encode()), rel=1e-4)


@pytest.mark.parametrize('reach', [4, 40, 64, 128])
def test_text_and_title_are_whole_and_papers_take_what_is_left(student, reach):
    ids, mask = after_title(student.tokenizer, PAPERS[0]['title'], PAPERS[0]['text'], PAPERS[10:14], reach)
    alone, _ = after_title(student.tokenizer, PAPERS[0]['title'], PAPERS[0]['text'], [], reach)
    assert len(ids) == len(mask) <= max(reach, len(alone)) and ids[-len(alone) + 1:] == alone[1:] and ids[0] == alone[0]
    assert sum(mask) == len(encode(student.tokenizer, PAPERS[0]['text'])) and all(mask[-sum(mask):])


def test_candidates_are_near_ones_and_some_by_chance_and_never_the_paper_a_repeat_or_one_held_out(world):
    _, corpus, library = world
    own = np.arange(0, 40, 3)
    numbers = candidates(library, [library.records[n] for n in own], own, near=4, far=6, seed=1)
    assert numbers.shape == (len(own), 10) and not (numbers == own[:, None]).any()
    assert not (numbers == 3).any(), 'paper 3 is also a test paper'
    again = candidates(library, [library.records[n] for n in own], own, near=4, far=6, seed=1)
    assert np.array_equal(numbers, again)
    twin = [library.records[5] | dict(id='twin')]  # a held-out record that repeats a training paper
    assert not (candidates(library, twin, None, near=8, far=30) == 5).any()


def test_gains_are_dealt_out_within_a_row_only():
    gain = np.array([[1.0, 2, np.nan, 3], [4, np.nan, 5, 6]])
    mixed = [dealt_out(gain, seed) for seed in range(9)]
    for one in mixed:
        assert np.array_equal(np.isnan(one), np.isnan(gain)) and np.array_equal(np.sort(one), np.sort(gain), equal_nan=True)
    assert any(not np.array_equal(one, gain, equal_nan=True) for one in mixed) and gain[0, 0] == 1


@pytest.mark.parametrize('factor', [1e-4, 1.0, 7.0])
def test_gains_of_any_size_have_the_same_spread_and_order(factor):
    gain = factor*np.array([[0.0, 2, np.nan], [1, 1, 4], [np.nan, np.nan, np.nan]])
    found = module.in_spreads(gain)
    assert np.allclose(found, module.in_spreads(gain/factor), equal_nan=True) and np.array_equal(np.isnan(found), np.isnan(gain))
    off = [values - values.mean() for row in found if len(values := row[~np.isnan(row)])]
    assert np.sqrt(np.mean(np.concatenate(off)**2)) == pytest.approx(1)
    assert np.isfinite(module.in_spreads(np.zeros((2, 2)))).all()


# --- the head

def test_training_a_head_leaves_the_model_the_same_to_the_bit(world, student):
    run, corpus, library = world
    ids = torch.arange(5, 25)[None]
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    def logits():
        with torch.no_grad(): return logits_of(student.model, hidden_states(student.model, batch))
    weights, before, modes = weights_hash(student.model), logits(), [m.training for m in student.model.modules()]
    prepare(Run(run.folder.parent/'other'), student, Corpus(corpus.science, corpus.general, corpus.folder), SMALL)
    assert weights_hash(student.model) == weights and torch.equal(logits(), before)
    assert all(weight.grad is None for weight in student.model.parameters()) and modes == [m.training for m in student.model.modules()]


def test_no_gradient_goes_into_states_that_would_take_one():
    states = torch.randn(4, 6, requires_grad=True), torch.randn(4, 3, 6, requires_grad=True)
    trained_head(*states, np.random.default_rng(0).normal(size=(4, 3)), Finding(steps=3, size=4))
    assert all(one.grad is None for one in states)


def test_a_head_learns_what_gains_say_and_not_what_they_do_not():
    "The gain is a function of the states, so papers that were not learnt from are put right; of gains dealt out they are not."
    draw = torch.Generator().manual_seed(0)
    titles, papers = torch.randn(150, 12, generator=draw), torch.randn(150, 6, 12, generator=draw)
    gain = 0.02*torch.einsum('nd,nmd->nm', titles[:, :6], papers[:, :, 6:]).numpy()
    right = {}
    for shuffled in (False, True):
        taught = Finding(steps=150, size=12, learning_rate=0.03, shuffled=shuffled)
        head, _ = trained_head(titles[:100], papers[:100], gain[:100], taught)
        with torch.no_grad():
            asked, found = head.vectors(titles[100:], 'asking'), head.vectors(papers[100:], 'answering')
            scores = torch.einsum('nd,nmd->nm', asked, found).numpy()
        right[shuffled] = gain_of_first(scores, gain[100:]).mean()/gain[100:].max(1).mean()
    assert right[False] > 0.5 and right[False] > right[True] + 0.3, right


def test_vectors_have_length_one_and_begin_as_one_projection():
    head, states = Head(6, 4), torch.randn(5, 6)
    assert torch.equal(head.vectors(states, 'asking'), head.vectors(states, 'answering'))
    assert torch.allclose(head.vectors(states, 'asking').norm(dim=-1), torch.ones(5))
    head.settle(torch.full((3, 6), 2.0), states)
    asked, found = (head.vectors(states, kind) for kind in ('asking', 'answering'))
    assert asked.isfinite().all() and not torch.equal(asked, found)


def test_a_text_has_the_same_states_in_any_company(student):
    texts = [paper['text'] for paper in PAPERS[:5]] + ['', 'heat']
    together, alone = text_states(student, texts, 16), torch.cat([text_states(student, [text], 16) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5) and together.shape == (7, 64)


def test_a_paper_is_known_by_its_title_and_as_a_whole_and_a_question_is_asked_of_both(student):
    states = answering_states(student, [PAPERS[0], PAPERS[1] | dict(title=' ')], 16)
    titles = text_states(student, [PAPERS[0]['title'], brief(PAPERS[1] | dict(title=' '))], 16)
    assert states.shape == (2, 128) and torch.allclose(states[:, :64], titles, atol=1e-5)
    assert torch.allclose(states[:1, 64:], text_states(student, [brief(PAPERS[0])], 16), atol=1e-5)
    asked = asking_states(student, [PAPERS[0]['title']], 16)
    assert torch.equal(asked[:, :64], asked[:, 64:]) and torch.allclose(asked[:, :64], states[:1, :64], atol=1e-5)


@pytest.mark.parametrize('helps', [True, False])
def test_a_head_is_kept_as_it_ends_only_where_that_finds_more_on_validation(helps):
    draw, shapes = torch.Generator().manual_seed(1), dict(train=60, valid=40)
    asking = {part: torch.randn(rows, 8, generator=draw) for part, rows in shapes.items()}
    answering = {part: torch.randn(rows, 5, 8, generator=draw) for part, rows in shapes.items()}
    settings = Finding(steps=150, learning_rate=0.03, size=16)
    begun = trained_head(asking['train'], answering['train'], np.random.default_rng(0).random((60, 5)), Finding(steps=0, size=16))[0]
    def gain(part, sign, turn):
        answers = begun.vectors(answering[part].roll(turn, -1), 'answering')
        return sign*torch.einsum('nd,nmd->nm', begun.vectors(asking[part], 'asking'), answers).detach().numpy()
    # either the label is what the states do not say yet, or it is the opposite of what they rightly say
    known = {part: gain(part, 1, 3) if helps else gain(part, 1 if part == 'valid' else -1, 0) for part in shapes}
    head, about = better_head(asking, answering, known, np.zeros((40, 5)), settings)
    assert about['learnt'] == helps and len(about['losses']) == 150*helps
    assert helps or about['validation']['finder'] == pytest.approx(about['validation']['best'])
    assert torch.equal(head.asking, begun.asking) != helps


# --- searching

@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 99))
def test_fusions_agree_with_ways_that_agree_and_reciprocal_ranks_with_their_definition(values, seed):
    one = np.array(values) + np.arange(len(values))/100
    for fuse in FUSIONS.values(): assert np.array_equal(np.argsort(-fuse(one, 3*one + 1), kind='stable'), np.argsort(-one, kind='stable'))
    other = np.random.default_rng(seed).random(len(one))
    def rank(scores, n): return 1 + sum(score > scores[n] for score in scores)
    wanted = [1/(60 + rank(one, n)) + 1/(60 + rank(other, n)) for n in range(len(one))]
    assert np.allclose(FUSIONS['ranks'](one, other), wanted)


@pytest.mark.parametrize('way', WAYS)
def test_no_way_finds_what_repeats_a_text_or_is_held_out(world, found, way):
    _, corpus, library = world
    finder = Finder(found.library, found.lm, found.head, found.vectors, found.length, way)
    near = finder.related([record['title'] for record in PAPERS[:6]], 39, [brief(record) for record in PAPERS[:6]])
    for record, papers in zip(PAPERS, near):
        ids = [one['id'] for one in papers]
        assert record['id'] not in ids and 'p3' not in ids and len({*ids}) == len(ids) and ids
    assert finder.related([]) == [] and len(finder) == 40


def test_the_finder_alone_orders_by_its_similarity_and_words_do_not_matter_to_it(found):
    finder = Finder(found.library, found.lm, found.head, found.vectors, found.length, 'finder')
    question = 'salt dissolves'
    similarity = finder.similarity([question])[0]
    similarity[3] = -2  # held out
    best = [found.library.records[n]['id'] for n in np.argsort(-similarity)[:5]]
    assert [one['id'] for one in finder.related([question], 5)[0]] == best


def test_the_fusion_is_the_one_with_the_higher_gain_on_validation():
    words, states = np.array([[3.0, 2, 1], [9, 1, 0]]), np.array([[1.0, 2, 30], [1, 2, 3]])
    gain = np.array([[0.0, 0.1, 0.3], [0.2, np.nan, 0.1]])
    chosen = chosen_on_validation(words, states, gain)
    assert chosen['fused'][chosen['fusion']] == max(chosen['fused'].values())
    assert chosen['validation']['tfidf'] == pytest.approx(0.1) and chosen['validation']['finder'] == pytest.approx(0.2)
    assert chosen['validation']['best'] == pytest.approx(0.25) and chosen['papers'] == 2


def test_answers_lean_on_what_a_finder_finds(found, student):
    class Asked(Finder):
        def related(self, *given): return [[PAPERS[20]]]
    assert respond_with.__annotations__['library']  # any library will do
    assert Asked(found.library, student, found.head, found.vectors).related(['x'], 2) == [[PAPERS[20]]]


# --- the stage

def test_a_finder_is_kept_and_found_again_and_gains_serve_several_heads(world, student, capsys):
    run, corpus, library = world
    first = prepare(run, student, corpus, SMALL)
    capsys.readouterr()
    again = prepare(run, student, corpus, SMALL)
    assert 'finder: already done' in capsys.readouterr().out
    assert np.array_equal(first.vectors, again.vectors) and first.fusion == again.fusion in FUSIONS
    prepare(run, student, corpus, Finding(**{**vars(SMALL), 'shuffled': True}))
    assert 'gains: already done' in capsys.readouterr().out
    prepare(run, student, corpus, SMALL)
    about = read_json(run.folder/'finder'/'finder.json')
    assert about['validation'].keys() == {*WAYS, 'best', 'any'} and len(about['losses']) == SMALL.steps*about['learnt']


def test_vectors_are_those_of_the_head_in_blocks_of_any_size(world, found, student, monkeypatch, tmp_path):
    monkeypatch.setattr(module, '_AT_ONCE', 7)
    module.write_vectors(tmp_path/'v.npy', found.head, found.library, lambda some: answering_states(student, some, 32))
    assert np.allclose(np.load(tmp_path/'v.npy'), found.vectors, atol=2e-3) and len(found.vectors) == 40


def test_another_models_finder_and_wrong_names_are_refused(world, found, student, tmp_path):
    run, _, library = world
    about = read_json(run.folder/'finder'/'finder.json')
    other = copy.deepcopy(student)
    other.model.lm_head.weight.data += 1
    with pytest.raises(InputError, match="another model's.*make one for it, or find by tfidf"):
        open_finder(run.folder/'finder', other, library)
    with pytest.raises(InputError, match="The way 'fusd' to find papers is none.*fused"):
        open_finder(run.folder/'finder', student, library, 'fusd')
    for nowhere in ('corpus', 'corpus/science.jsonl'):  # a folder that holds another thing, and a file
        with pytest.raises(InputError, match='is no finder; make one'): open_finder(run.folder/nowhere, student, library)
    stage(before := Run(tmp_path/'before'), 'finder', {}, lambda folder: [  # as earlier versions wrote them
        write_json(folder/'finder.json', {name: value for name, value in about.items() if name != 'learnt'}),
        shutil.copy(run.folder/'finder'/'head.safetensors', folder)])
    with pytest.raises(InputError, match='of an earlier version; make it anew'): open_finder(before.folder/'finder', student, library)
    shutil.copytree(run.folder/'finder', tmp_path/'spoilt')
    (tmp_path/'spoilt'/'finder.json').write_text('{')
    with pytest.raises(InputError, match='make it anew'): open_finder(tmp_path/'spoilt', student, library)


@pytest.fixture
def run(tmp_path) -> Run:
    "A run that has read its papers, and done nothing else."
    (tmp_path/'science.jsonl').write_text('\n'.join(map(json.dumps, PAPERS)))
    def make(folder): [build(folder/side, [str(tmp_path/'science.jsonl')], workers=1) for side in ('science', 'general')]
    stage(run := Run(tmp_path/'run'), 'corpus', {}, make)
    return run


def test_a_chat_finds_the_papers_of_a_run_in_any_way_that_was_made_for_it(run, student):
    with pytest.raises(InputError, match=r'is no finder; make one with `scilm finder` \(or finder.prepare\), or find by tfidf'):
        library_for(str(run.folder), student, 'fused')
    corpus = open_corpus(run.folder)
    made = prepare(run, student, corpus, SMALL)
    opened, plain = (library_for(str(run.folder), student, way) for way in ('fused', 'tfidf'))
    assert opened.fingerprint() == made.fingerprint() != plain.fingerprint() and len(opened) == len(plain) == len(corpus.science['train'])
    assert opened.related(['How heat flows'], 3) == made.related(['How heat flows'], 3)


def test_the_command_makes_a_finder_that_a_chat_uses_and_says_what_each_way_is_worth(run, student, monkeypatch, capsys):
    assert cli.main(['finder', str(run.folder)]) == 2 and 'holds no model' in capsys.readouterr().err
    stage(run, 'models/distilled', {}, lambda folder: save(student, folder))
    assert cli.main(['finder', str(run.folder/'models'/'distilled')]) == 2 and 'holds no corpus' in capsys.readouterr().err
    assert cli.main(['finder', str(run.folder), '--papers', '1']) == 2 and 'papers is 1; set it to 2 or more' in capsys.readouterr().err
    assert cli.main(['finder', str(run.folder), '--papers', '6']) == 0
    said = capsys.readouterr().out
    assert all(f' by {way}' in said for way in WAYS) and f'--papers {run.folder}' in said.splitlines()[-1]
    monkeypatch.setattr('sys.stdin', io.StringIO('How heat flows\n'))
    assert cli.main(['chat', str(run.folder), '--max-new-tokens', '4', '--papers', str(run.folder), '--find', 'fused']) == 0
    assert '[1]' in capsys.readouterr().out


@pytest.mark.parametrize('change, message', [
    (dict(loss='likely'), "loss is 'likely'.*likelihood or ranked"), (dict(papers=1), 'papers is 1'), (dict(near=0), 'near is 0'),
    (dict(near=1, far=0), 'one candidate has nothing to choose'), (dict(temperature=0.0), 'temperature is 0.0; set it above 0'),
    (dict(gain_temperature=float('nan')), 'gain_temperature is nan')])
def test_settings_that_cannot_work_are_refused_by_name(change, message):
    with pytest.raises(InputError, match=message): check_finding(Finding(**change))


# --- into the trunk

def test_the_part_of_a_batch_is_the_loss_of_its_cosines_in_one_piece_whatever_the_micro_batch(student):
    gain = np.array([[0.1, 0.0, np.nan], [0.02, 0.05, 0.03]])
    texts = [[PAPERS[n]['text'] for n in (4, 5)] + [None], [PAPERS[n]['text'] for n in (6, 7, 8)]]
    batch = finder_batch(student.tokenizer, [PAPERS[0]['title'], PAPERS[1]['title']], texts, gain, 24)
    whole = finder_part(student.model, batch, SMALL)
    def unit(text):
        states = text_states(student, [text], 24)[0, 32:]
        return states/states.norm()
    similarity = torch.tensor([[float(unit(PAPERS[row]['title']) @ unit(text or ' ')) for text in some] for row, some in enumerate(texts)])
    wanted = LOSSES['likelihood'](similarity, torch.tensor(gain).nan_to_num(), ~torch.tensor(gain).isnan(), 0.1, 1.0)
    assert whole.item() == pytest.approx(wanted.item(), rel=1e-4)
    whole.backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in student.model.parameters())
    student.model.zero_grad(set_to_none=True)
    parts = micro_batches(batch | dict(input_ids=torch.zeros(4, 3)), 1)
    assert sum(finder_part(student.model, part, SMALL).item() for part in parts) == pytest.approx(whole.item(), rel=1e-6)


def test_gradients_into_the_trunk_are_a_weight_beside_the_reading_of_stage_1(world, student):
    from scilm_adapt import contrast
    run, corpus, _ = world
    given = dict(steps=2, batch_size=2, context=64, learning_rate=1e-3)
    weights = weights_hash(student.model)
    alone = train(run, student, corpus, **given, weight=0.0, finding=SMALL)
    plain = contrast.train(Run(run.folder.parent/'plain'), student, corpus, chain=1, **given)
    assert weights_hash(alone.model) == weights_hash(plain.model), 'at weight 0 it is stage 1, to the bit'
    learnt = train(run, student, corpus, **given, weight=0.5, finding=SMALL)
    history = read_json(run.folder/'models'/'finder'/'history.json')
    assert history[0]['loss'] == pytest.approx(history[0]['lm'] + 0.5*history[0]['finder'], rel=1e-5)
    assert weights_hash(learnt.model) != weights_hash(alone.model) and weights_hash(student.model) == weights
    with pytest.raises(InputError, match='weight is -1'): train(run, student, corpus, **given, weight=-1, finding=SMALL)
