"""Repeats and evaluation texts: planted ones of known similarity are found, and nothing else is."""
import gzip
import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scilm_adapt.duplicates import (
    EvaluationSet,
    Seen,
    _Buckets,
    _jaccard,
    decontaminate,
    deduplicate,
    fingerprint,
    read_evaluation_texts,
    shingles,
    signature,
    texts_in,
    words,
)
from scilm_adapt.errors import InputError

ALPHABETS = dict(en='abcdefghijklmnopqrstuvwxyz', ru='абвгдежзийклмнопрстуфхцчшщъыьэюя')
PAIRS = 250


def vocabulary(lang: str) -> list[str]:
    "Three thousand made-up words."
    draw = random.Random(lang)
    return sorted({''.join(draw.choices(ALPHABETS[lang], k=draw.randint(4, 9))) for _ in range(3000)})


WORDS = {lang: vocabulary(lang) for lang in ALPHABETS}


def record(text: list[str] | str, identity: str = 'x', title: str = '') -> dict:
    return dict(id=identity, title=title, text=text if isinstance(text, str) else ' '.join(text))


def planted(changes: int, seed: object, lang: str = 'en') -> tuple[dict, dict]:
    """Two records with a Jaccard similarity of exactly 1 - changes/20: of the first's 200 - 5*changes shingles each changed word,
    none near another, replaces five. The title is a part of it."""
    draw = random.Random(f'{changes} {seed} {lang}')
    first = draw.sample(WORDS[lang], 204 - 5*changes)
    second = list(first)
    for k in range(changes): second[9 + 17*k] = f'new{k}'
    return tuple(record(text[8:], f'{name}-{changes}-{seed}', ' '.join(text[:8])) for name, text in (('one', first), ('two', second)))


def naive(a: dict, b: dict) -> float:
    "Jaccard similarity of title and text by sets of tuples of words."
    found = [f"{r['title']} {r['text']}".lower().split() for r in (a, b)]
    a, b = ({tuple(some[k:k + 5]) for k in range(len(some) - 4)} for some in found)
    return len(a & b)/len(a | b)


# --- near copies

@pytest.mark.parametrize('lang', ['en', 'ru'])
@pytest.mark.parametrize('changes, recall', [(1, 0.99), (2, 0.99), (3, 0.99), (4, 0.95), (5, 0), (6, 0)])
def test_planted_pairs_are_found_from_a_similarity_of_four_fifths_and_never_below(changes, recall, lang):
    pairs = [planted(changes, seed, lang) for seed in range(PAIRS)]
    assert all(naive(*pair) == (20 - changes)/20 for pair in pairs[:20])
    seen = Seen()
    assert not [r for first, _ in pairs if (r := seen.find(first))], 'unrelated texts were taken for repeats'
    matches = [seen.find(second) for _, second in pairs]
    right = [match and (match.id, match.similarity, match.how) == (first['id'], (20 - changes)/20, 'near')
             for (first, _), match in zip(pairs, matches)]
    assert sum(map(bool, right)) >= recall*PAIRS
    assert not [match for match, ok in zip(matches, right) if match and not ok], 'a wrong partner, or a wrong similarity'
    if not recall: assert not any(matches)


def test_a_higher_threshold_reports_only_what_reaches_it():
    pairs = {changes: [planted(changes, seed) for seed in range(40)] for changes in (1, 2, 3)}
    seen = Seen(0.9)
    for some in pairs.values():
        for first, _ in some: seen.find(first)
    found = {changes: sum(seen.find(second) is not None for _, second in some) for changes, some in pairs.items()}
    assert found == {1: 40, 2: 40, 3: 0}


@pytest.mark.parametrize('threshold', [0.5, 0.79, 1.01, float('nan')])
def test_a_threshold_for_which_the_bands_are_not_made_is_refused(threshold):
    with pytest.raises(InputError, match='threshold'): Seen(threshold)


def test_counts_do_not_depend_on_the_order():
    records = [r for changes in (0, 1, 2, 3, 6) for seed in range(40) for r in planted(changes, seed)]
    counts = set()
    for seed in range(3):
        random.Random(seed).shuffle(records)
        counts.add(len(deduplicate(records)))
    assert counts == {40*4 + 2*40}


def test_the_first_occurrence_is_kept_in_its_place():
    one, two = planted(2, 'order')
    other = planted(0, 'other')[0]
    assert deduplicate([one, other, two]) == [one, other] and deduplicate([two, other, one]) == [two, other]


@pytest.mark.parametrize('kept, similarity', [(196, 0.96), (174, 0.85), (162, 0.79)])
def test_a_shortened_copy_is_found_like_a_changed_one(kept, similarity):
    wholes = [random.Random(seed).sample(WORDS['en'], 204) for seed in range(100)]
    pairs = [(whole, whole[:kept]) for whole in wholes]
    assert (kept - 4)/200 == similarity
    for order in (1, -1):
        found = [len(deduplicate([record(text) for text in pair[::order]])) == 1 for pair in pairs]
        assert sum(found) >= 99 if similarity > 0.8 else not any(found)


def test_of_several_near_copies_the_most_similar_is_named():
    one, far = planted(4, 'several')
    near = one | dict(id='near', text=one['text'] + ' ending')
    seen = Seen(0.8)
    seen.add('far', signature(far))
    seen.add('near', signature(near))
    seen.add('near-again', signature(near))
    match = seen.find(one)
    assert match.id == 'near' and match.similarity == naive(one, near)


def test_sections_are_not_compared_nearly_unless_they_are_all_there_is():
    one, two = planted(2, 'sections')
    first, second, *bodies = ([dict(title='', text=r['text'])] for r in (one, two, planted(0, 'body')[0], planted(0, 'another')[0]))
    assert len(deduplicate([one | dict(sections=bodies[0]), two | dict(sections=bodies[1])])) == 1
    bare = record('', title='The same title of two different papers')
    others = [bare | dict(sections=body) for body in bodies]
    assert deduplicate(others) == others
    assert len(deduplicate([bare | dict(sections=first), bare | dict(sections=second)])) == 1


@pytest.mark.parametrize('text', ['One, two: three!', 'один два', 'слово'])
def test_texts_of_fewer_than_five_words_are_compared_as_a_whole(text):
    assert deduplicate([record(text), record(text + ' more'), record(text.upper() + '.')]) == [record(text), record(text + ' more')]


def test_texts_without_words_are_compared_as_they_stand():
    records = [record(text) for text in ('', '+ =', '∀ → ∃', '++')]
    assert deduplicate(records) == records
    assert deduplicate([*records, record(' '), record('∀ → ∃')]) == records


def test_a_repeated_text_under_another_title_is_found_and_a_stock_phrase_is_not():
    text = 'Heat flows from warm bodies to cold ones.'
    seen = Seen()
    assert seen.find(record(text, 'a', 'On the nature of heat')) is None
    assert seen.find(record(text.upper(), 'b', 'Something else altogether')).how == 'exact text'
    assert seen.find(record(text, 'c')).how == 'exact text'
    assert seen.find(record(text, 'd', 'on the nature of HEAT')).how == 'exact'
    assert len(seen) == 1
    stock = [record('No abstract available.', title=' '.join(WORDS['en'][k:k + 9])) for k in (0, 20)]
    assert deduplicate(stock) == stock


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.text(ALPHABETS['en'] + ALPHABETS['ru'] + 'ёé0189', min_size=1, max_size=8),
                          st.sampled_from([' ', '\n', ', ', ' – ', '.\t', '!  (', '» ', '\u00a0', ''])), min_size=1, max_size=40),
       st.sampled_from([str.upper, str.title, str.lower, str.swapcase]))
def test_copies_with_other_case_space_and_punctuation_are_always_found(pairs, change):
    parts, copy = [part for part, _ in pairs], ''.join(change(part) + gap for part, gap in pairs)
    seen = Seen()
    seen.find(record(' '.join(parts), 'first'))
    match = seen.find(record(copy))
    assert (match.id, match.similarity, match.how) == ('first', 1, 'exact') and fingerprint(copy) == fingerprint(' '.join(parts))


@settings(max_examples=100, deadline=None)
@given(*[st.lists(st.sampled_from('a b c'.split()), max_size=30)]*2)
def test_similarity_is_that_of_the_sets_of_five_words(a, b):
    sets = [{tuple(found[k:k + 5]) for k in range(max(1, len(found) - 4))} - {()} for found in (a, b)]
    union = len(sets[0] | sets[1])
    assert _jaccard(shingles(' '.join(a)), shingles(' '.join(b))) == (len(sets[0] & sets[1])/union if union else 1)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200), st.text(max_size=20))
def test_any_text_at_all_has_a_signature_and_repeats_itself(text, title):
    seen = Seen()
    assert seen.find(record(text, '\ud800', title)) is None and seen.find(record(text, 'b', title)).id == '\ud800'


def test_text_with_half_a_character_is_compared():
    assert deduplicate([record('half \ud83d a character'), record('half \ud83d a character')]) == [record('half \ud83d a character')]


# --- signatures and the index

def test_a_signature_is_the_same_in_every_process():
    one = planted(0, 'process', 'ru')[0]
    program = ('import json, sys; from scilm_adapt.duplicates import signature; s = signature(json.loads(sys.argv[1]))\n'
               'print(json.dumps([s.keys.tolist(), s.shingles.tolist()]))')
    for seed in ('1', '2'):
        done = subprocess.run([sys.executable, '-c', program, json.dumps(one)], capture_output=True, text=True, check=True,
                              env=dict(PYTHONHASHSEED=seed, OMP_NUM_THREADS='1'))
        assert json.loads(done.stdout) == [signature(one).keys.tolist(), signature(one).shingles.tolist()]


def test_a_signature_computed_elsewhere_serves_as_well_and_travels_cheaply():
    one, two = planted(1, 'travel')
    sent = [pickle.dumps(signature(r)) for r in (one, two)]
    seen = Seen()
    assert seen.find(one, pickle.loads(sent[0])) is None and seen.find(two, pickle.loads(sent[1])).similarity == 0.95
    assert len(sent[0]) < 8*195 + 600


def test_merging_loses_nothing():
    seen, records = Seen(), [planted(0, seed)[0] for seed in range(60)]
    for number, one in enumerate(records):
        seen.find(one)
        if number % 20 == 19: seen.buckets.merge()
    assert not seen.buckets.recent and [seen.find(one).id for one in records] == [one['id'] for one in records]


def test_the_index_keeps_a_few_hundred_bytes_a_record_however_long_the_records_are():
    buckets, draw = _Buckets(), np.random.default_rng(0)
    for number in range(40_000): buckets.add(draw.integers(1, 2**64, 12, dtype=np.uint64), number)
    assert len(buckets.recent) <= 2**16 and len(buckets.keys) > 12*30_000
    assert buckets.keys.nbytes + buckets.numbers.nbytes <= 12*12*40_000
    seen = Seen()
    seen.find(record([f'w{k}' for k in range(300_000)]))
    assert seen.ends[-1] > 8*299_000
    assert not [value for value in vars(seen).values() if isinstance(value, np.ndarray | bytes | list)], 'shingles stay in the file'


# --- evaluation texts

LONG = 'Why does the water of the northern sea become so warm late in August each year?'  # 16 words
SHORT = 'How warm is the northern sea?'


@pytest.mark.parametrize('shared, found', [(13, True), (14, True), (16, True), (12, False)])
def test_thirteen_words_in_a_row_contaminate_and_twelve_do_not(shared, found):
    text = 'As one asks: ' + ' '.join(LONG.upper().split()[:shared]) + ' and so on, for a long time.'
    match = EvaluationSet([LONG]).match(text)
    assert bool(match) == found and match == (' '.join(words(LONG)[:13]) if found else '')


def test_a_changed_word_in_the_middle_breaks_the_run():
    assert not EvaluationSet([LONG]).match(LONG.replace('northern', 'southern'))


@pytest.mark.parametrize('text, found', [
    (f'We ask: {SHORT} Nobody knows.', True), ('how warm, is THE northern sea', True), (SHORT, True), ('How warm is the northern', False),
    ('How warm is the northern seaside?', False), ('warm is the northern sea', False),
    ('How warm was the northern pole in the wintertime', False), ('How warm really is the northern sea?', False)])
def test_a_short_text_counts_only_as_a_whole(text, found):
    assert EvaluationSet([SHORT, 'How warm was the northern pole in the winter?']).match(text) == (' '.join(words(SHORT)) if found else '')


@pytest.mark.parametrize('text', ['', 'Yes.', 'I, II, III and IV', 'the sea is warm now'])
def test_trivially_short_texts_are_not_looked_for(text):
    assert not EvaluationSet([text]).match(f'Here {text} {text} and more words, so that it is long enough for all.')


def test_an_evaluation_without_texts_matches_nothing():
    assert not EvaluationSet([]).match(LONG) and decontaminate([record(LONG)], []) == ([record(LONG)], [])


def test_russian_evaluation_texts_are_found_in_either_case():
    question = 'Почему вода северного моря в конце августа каждого года становится такой тёплой, как нигде больше?'
    assert EvaluationSet([question]).match(f'Известно. {question.upper()}') == ' '.join(words(question)[:13])


def test_papers_and_chats_lose_what_holds_an_evaluation_text_anywhere():
    clean = [record('Nothing of the kind is said here.', 'clean'), dict(paper_id='p', messages=[dict(role='user', content='Say hello.')])]
    dirty = [record(f'It was asked: {LONG}', 'text'), record('A text.', 'title', LONG),
             record('A text.', 'section') | dict(sections=[dict(title='Start', text=f'So. {LONG}')]),
             dict(paper_id='p', kind='question', messages=[dict(role='user', content='Hello.'), dict(role='assistant', content=LONG)]),
             dict(paper_id='p', kind='question', messages=[dict(role='user', content=SHORT), dict(role='assistant', content='Very.')])]
    kept, removed = decontaminate([clean[0], *dirty, clean[1]], [LONG, SHORT])
    assert kept == clean and [r for r, _ in removed] == dirty
    assert [found for _, found in removed] == [' '.join(words(LONG)[:13])]*4 + [' '.join(words(SHORT))]
    assert decontaminate(dirty, EvaluationSet([LONG, SHORT]))[0] == []
    assert len(decontaminate(dirty, [LONG], n=16)[1]) == 4 and not decontaminate(dirty[:1], [LONG + ' Why?'], n=17)[1]


@pytest.mark.parametrize('n', [0, 5, 33])
def test_a_run_of_too_few_or_too_many_words_is_refused(n):
    with pytest.raises(InputError, match='n is'): EvaluationSet([LONG], n)


def test_texts_are_taken_from_nested_fields_and_not_from_names():
    row = dict(id='an id of six whole words here', paper_id='too', lang='en', source='from some place', question='Q?', number=3, none=None,
               choices=['yes', 'no'], context=dict(labels=['A'], parts=[dict(text='deep')]), messages=[dict(role='user', content='said')])
    assert list(texts_in(row)) == ['Q?', 'yes', 'no', 'yes no', 'A', 'deep', 'said']


def test_evaluations_cut_into_words_are_found():
    assert EvaluationSet(texts_in(dict(tokens=LONG.split()))).match(LONG)


def test_evaluation_files_of_several_forms_are_read(tmp_path):
    row = dict(id='a-1', messages=[dict(role='user', content='From JSON')])
    with gzip.open(tmp_path/'a.jsonl.gz', 'wt') as file: file.write(json.dumps(row))
    (tmp_path/'b.csv').write_text('id,question,answer\n1,"From CSV, quoted",7\n')
    assert sorted(read_evaluation_texts([str(tmp_path)])) == ['7', 'From CSV, quoted', 'From JSON']


def test_an_evaluation_that_cannot_be_read_stops_the_run(tmp_path):
    (tmp_path/'a.jsonl').write_text('{"question": "Whole?"}\n{"question": "Cut\n')
    with pytest.raises(InputError, match=r'a\.jsonl:2'): read_evaluation_texts([str(tmp_path/'a.jsonl')])
    (tmp_path/'a.jsonl').write_text('{"number": 3}\n')
    with pytest.raises(InputError, match='no text'): read_evaluation_texts([str(tmp_path/'a.jsonl')])
