"""Papers found by a title or a question among many, without what repeats or is held out; and an order in which neighbours meet."""
import json
from collections import Counter
from itertools import pairwise
from math import log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from scilm_adapt import related
from scilm_adapt.duplicates import fingerprint
from scilm_adapt.errors import InputError
from scilm_adapt.files import read_json, write_text
from scilm_adapt.papers import Corpus, build, open_papers
from scilm_adapt.related import (
    FAR,
    NEAR_DUPLICATE,
    Library,
    brief,
    chain_starts,
    library_of,
    named,
    neighbours,
    open_library,
    orders,
    prepare,
    reading_order,
    some_chains,
    telling,
    walk,
    write_index,
)
from scilm_adapt.runs import Run, stage

NOUNS = 'heat light sound gravity friction pressure salt iron water glass copper helium'.split()
VERBS = 'flows bends travels falls burns presses dissolves rusts boils breaks conducts rises'.split()


def paper(number: int, seed: int = 0) -> dict:
    draw = np.random.default_rng([number, seed])
    noun, verb = NOUNS[number % 12], VERBS[number//12 % 12]
    rest = ' '.join(draw.choice([f'{noun}{n}' for n in range(40)] + NOUNS + VERBS, 12))
    return dict(id=f'10.1/{number}', title=f'How {noun} {verb}', text=f'The {noun} {verb}: {rest}.', sections=[])


PAPERS = [paper(number) for number in range(150)]


def library_in(folder, papers: list[dict]) -> Library:
    folder.mkdir(exist_ok=True)
    write_index(folder, map(brief, papers))
    return open_library(folder, papers)


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    return library_in(tmp_path_factory.mktemp('index'), PAPERS)


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    write_text(tmp_path/'corpus'/'science.jsonl', 'its content stands for the stage that made it')
    parts = dict(train=PAPERS[:120], valid=[*PAPERS[130:140], PAPERS[7]], test=[*PAPERS[120:130], PAPERS[3] | dict(id='again')])
    return Corpus(parts, dict(train=[], valid=[], test=[]), tmp_path/'corpus')


def naive_vectors(texts: list[str]) -> list[dict[str, float]]:
    "TF-IDF written down as it is defined, in 64 bits, with words instead of places."
    counts = [Counter(telling(text)) for text in texts]
    having = Counter(word for count in counts for word in count)
    vectors = [{word: (1 + log(times))*(1 + log((1 + len(texts))/(1 + having[word]))) for word, times in count.items()}
               for count in counts]
    return [{word: value/sqrt(sum(v*v for v in vector.values())) for word, value in vector.items()} for vector in vectors]


def test_cosines_are_those_of_the_definition(library):
    vectors = naive_vectors([brief(one) for one in PAPERS])
    cosines = (library.papers @ library.words).toarray()
    for one, other in [(0, 12), (3, 3), (5, 77), (140, 149), (0, 144)]:
        expected = sum(value*vectors[other].get(word, 0) for word, value in vectors[one].items())
        assert cosines[one, other] == pytest.approx(expected, abs=1e-6)


def test_both_ways_on_disk_hold_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(related, '_BLOCK', 35)  # blocks that do not come out even
    parted = library_in(tmp_path/'parted', PAPERS)
    assert (parted.papers != parted.words.T.tocsr()).nnz == 0
    monkeypatch.setattr(related, '_BLOCK', 10**6)
    whole = library_in(tmp_path/'whole', PAPERS)
    assert (parted.papers != whole.papers).nnz == 0
    for values in (whole.papers.data, whole.papers.indices, whole.words.data, whole.words.indices): assert is_mapped(values)


def is_mapped(values: np.ndarray) -> bool:
    "Whether the numbers lie in a file and not in memory."
    while values is not None and not isinstance(values, np.memmap): values = values.base
    return values is not None


def test_a_word_of_most_papers_is_left_out_of_many_and_kept_in_few(tmp_path, monkeypatch):
    monkeypatch.setattr(related, '_COMMON', 20)
    many = [dict(title=f'common {n} word{n}', text='', id=str(n)) for n in range(60)]
    found = library_in(tmp_path/'many', many)
    assert found.related(['common']) == [[]] and [one['id'] for one in found.related(['word7 common'])[0]] == ['7']
    assert len(library_in(tmp_path/'few', many[:12]).related(['common'])[0]) == 4


@pytest.mark.parametrize('at_once', [2**23, 1])
def test_the_nearest_are_those_of_a_full_search(library, monkeypatch, at_once):
    monkeypatch.setattr(related, '_AT_ONCE', at_once)
    titles, whole = library.vectors(one['title'] for one in PAPERS), library.papers
    found, cosines = library.nearest(titles, 3, whole, np.arange(len(PAPERS)))
    near, same = (titles @ library.words).toarray(), (whole @ library.words).toarray()
    for number in range(len(PAPERS)):
        wanted = [other for other in np.lexsort((np.arange(len(PAPERS)), -near[number]))
                  if other != number and same[number, other] <= NEAR_DUPLICATE and near[number, other] >= FAR][:3]
        assert found[number][found[number] >= 0].tolist() == wanted
        assert cosines[number][:len(wanted)] == pytest.approx(near[number][wanted])


def test_neither_the_paper_itself_nor_a_repeat_is_found_for_a_paper(tmp_path):
    repeat = PAPERS[0] | dict(id='repeat', text=PAPERS[0]['text'] + ' Indeed.')
    found = library_in(tmp_path/'index', [*PAPERS[:30], repeat])
    near, cosines = neighbours(found, 5)
    assert not (near == np.arange(31)[:, None]).any() and 30 not in near[0] and 0 not in near[30]
    assert (np.diff(cosines, axis=1) <= 0).all() and (near[0] >= 0).all()
    by_title = found.related([PAPERS[0]['title']], 5, [brief(PAPERS[0])])[0]
    assert not {'repeat', PAPERS[0]['id']} & {one['id'] for one in by_title} and len(by_title) == 5
    assert {'repeat', PAPERS[0]['id']} <= {one['id'] for one in found.related([PAPERS[0]['title']], 5)[0]}  # a question may have them


def test_papers_of_the_test_and_validation_split_are_never_found(tmp_path, corpus, capsys):
    found = prepare(Run(tmp_path/'run'), corpus)
    held_out = {fingerprint(brief(one)) for part in ('valid', 'test') for one in corpus.science[part]}
    asked = [one['title'] for part in corpus.science.values() for one in part]
    for papers in found.related(asked, 20): assert not held_out & {fingerprint(brief(one)) for one in papers}
    assert found.papers[[3, 7]].nnz == 0 and found.papers[4].nnz  # the two training papers that also stand there
    assert read_json(tmp_path/'run'/'related'/'related.json') == dict(papers=120, left_out=2)
    near, _ = neighbours(found)
    assert not {3, 7} & {*near.ravel().tolist()}
    capsys.readouterr()


def test_the_index_is_kept_while_the_corpus_is_the_same(tmp_path, corpus, monkeypatch):
    run = Run(tmp_path/'run')
    first = prepare(run, corpus)
    monkeypatch.setattr(related, 'write_index', None)  # would fail
    again = prepare(run, corpus)
    assert (first.papers != again.papers).nnz == 0 and (tmp_path/'run'/'related'/'manifest.json').is_file()
    write_text(corpus.folder/'science.jsonl', 'another corpus')
    with pytest.raises(TypeError): prepare(run, corpus)


def test_an_index_of_other_papers_is_refused(tmp_path, library):
    library_in(tmp_path/'index', PAPERS[:5])
    with pytest.raises(InputError, match='5 other papers'): open_library(tmp_path/'index', PAPERS)


@pytest.mark.parametrize('papers', [[], [dict(title='', text='', id='1', sections=[])], [dict(title='the', text='—', id='1', sections=[])]])
def test_papers_without_a_word_are_refused(tmp_path, papers):
    with pytest.raises(InputError, match='no word in these papers'): library_in(tmp_path/'index', papers)


@given(some.integers(1, 60).flatmap(lambda n: some.tuples(
    some.just(n), some.lists(some.tuples(some.integers(0, n - 1), some.integers(0, n - 1), some.floats(0.06, 1)), max_size=120))))
def test_a_walk_reads_each_paper_once_and_joins_only_neighbours(drawn):
    papers, links = drawn
    near, cosines = np.full((papers, 4), -1), np.zeros((papers, 4))
    for one, other, cosine in links:
        free = np.flatnonzero(near[one] < 0)
        if one != other and len(free) and other not in near[one]: near[one, free[0]], cosines[one, free[0]] = other, cosine
    order, joined = walk(near, cosines, seed=1)
    assert sorted(order.tolist()) == [*range(papers)] and not joined[0]
    read = set()
    for place, (here, near_by) in enumerate(zip(order.tolist(), joined.tolist())):
        linked = {other: max(cosines[a][near[a] == b].max(initial=0) for a, b in ((before, other), (other, before)))
                  for before in order[place - 1:place].tolist() for other in {*near[before][near[before] >= 0].tolist(),
                  *np.flatnonzero((near == before).any(1)).tolist()} - read}
        assert near_by == bool(linked) and (not near_by or linked[here] == max(linked.values()))  # the nearest that is unread
        read.add(here)


def test_a_walk_begins_where_links_are_fewest_and_chance_decides_only_there():
    near = np.array([[1, -1], [0, 2], [1, -1], [-1, -1], [5, -1], [4, -1]])
    orders_found = {tuple(walk(near, np.where(near >= 0, 0.5, 0), seed)[0].tolist()) for seed in range(20)}
    assert all(order[0] == 3 and order.index(1) not in (1, 5) for order in orders_found) and len(orders_found) > 1
    assert np.array_equal(*(walk(near, np.where(near >= 0, 0.5, 0), 4)[0] for _ in range(2)))


def test_neighbours_in_the_walk_are_nearer_than_by_chance(tmp_path, corpus, capsys):
    run, cosines = Run(tmp_path/'run'), {}
    found = prepare(run, corpus)
    for kind in orders:
        order, joined, folder = reading_order(run, corpus, kind)
        assert sorted(order.tolist()) == [*range(120)] and joined.mean() > 0.8 and (folder/'manifest.json').is_file()
        beside = np.asarray(found.papers[order[1:]].multiply(found.papers[order[:-1]]).sum(1)).ravel()
        cosines[kind] = beside[joined[1:]].mean()
    assert cosines['related'] > 3*cosines['random']
    assert not np.array_equal(order, reading_order(run, corpus, 'random', seed=1)[0])
    capsys.readouterr()


@given(some.lists(some.tuples(some.booleans(), some.integers(1, 30)), min_size=1, max_size=60), some.integers(1, 5), some.integers(1, 60))
def test_chains_are_stretches_of_neighbours_that_fit(papers, most, room):
    joined, sizes = (np.array(values) for values in zip(*papers))
    starts = chain_starts(joined, sizes, most, room)
    assert starts[0] == 0 and starts[-1] == len(papers) and (np.diff(starts) > 0).all()  # every paper once, none left out
    for begin, end in zip(starts, starts[1:]):
        assert end - begin <= most and joined[begin + 1:end].all() and (end - begin == 1 or sizes[begin:end].sum() <= room)
        if end < len(papers) and joined[end]: assert end - begin == most or sizes[begin:end + 1].sum() > room  # no shorter than need be


@given(some.lists(some.integers(1, 5), min_size=1, max_size=40), some.floats(0, 1), some.integers(0, 3))
def test_a_share_of_chains_stays_and_the_papers_of_the_others_stand_alone(sizes, share, seed):
    starts = np.r_[0, np.cumsum(sizes)]
    found = some_chains(starts, share, seed)
    whole, parts = set(pairwise(starts.tolist())), set(pairwise(found.tolist()))
    assert found[0] == 0 and found[-1] == starts[-1] and all(end - begin == 1 or (begin, end) in whole for begin, end in parts)
    alone = sum(size == 1 for size in sizes)
    stayed, asked = sum((one in parts) for one in whole), int(np.ceil(share*len(sizes)))
    assert asked <= stayed <= asked + alone
    assert np.array_equal(some_chains(starts, 1.0), starts) and np.array_equal(some_chains(starts, 0.0), np.arange(starts[-1] + 1))


def test_a_library_of_what_people_have(tmp_path, capsys):
    lines = [json.dumps(dict(title=one['title'], abstract=one['text'], doi=one['id'])) for one in PAPERS[:40]]
    (tmp_path/'papers').mkdir()
    (tmp_path/'papers'/'some.jsonl').write_text('\n'.join(lines))
    for source in (tmp_path/'papers', tmp_path/'papers'/'some.jsonl'):
        found = library_of(str(source))
        assert len(found) == 40 and named(found.related(['How light flows'])[0][0]) == 'How light flows (10.1/1)'
    build(tmp_path/'built', [str(tmp_path/'papers')])
    assert 30 < len(library_of(str(tmp_path/'built'))) <= 40
    capsys.readouterr()


def test_of_a_run_only_training_papers_are_leant_on_and_its_index_is_kept(tmp_path, capsys):
    (tmp_path/'science.jsonl').write_text('\n'.join(map(json.dumps, PAPERS)))
    def make(folder): [build(folder/side, [str(tmp_path/'science.jsonl')], workers=1) for side in ('science', 'general')]
    corpus = open_papers(stage(Run(tmp_path/'run'), 'corpus', {}, make)/'science')
    found = library_of(str(tmp_path/'run'))
    assert {one['id'] for one in found.records} == {one['id'] for one in corpus['train']} and len(corpus['test'])
    assert (tmp_path/'run'/'related'/'manifest.json').is_file() and 'already done' not in capsys.readouterr().out.partition('related')[2]
    assert (library_of(str(tmp_path/'run'/'corpus')).papers != found.papers).nnz == 0
    assert 'related: already done' in capsys.readouterr().out


@pytest.mark.parametrize(('content', 'said'), [(None, 'no such file'), ('', 'no record'), ('\x00\x01\x02'*50, 'binary'),
                                               ('{"name": 3}\n', 'no field with text')])
def test_what_is_no_paper_is_said_in_one_sentence(tmp_path, content, said):
    if content is not None: (tmp_path/'papers.jsonl').write_text(content)
    with pytest.raises(InputError, match=said) as error: library_of(str(tmp_path/'papers.jsonl'))
    assert '\n' not in str(error.value)


def test_an_id_that_we_made_is_not_shown():
    assert named(dict(id='0123456789abcdef', title='On heat', text='')) == 'On heat'
    assert named(dict(id='arXiv:1', title='', text='Heat flows.')) == 'Heat flows.… (arXiv:1)'


def test_questions_are_found_by_what_they_ask_about(library):
    english, russian = library.related(['What should we know about how copper conducts?', 'Что такое соль?'], 2)
    assert all({'copper', 'conducts'} & {*one['title'].split()} for one in english) and russian == [] and library.related([]) == []
