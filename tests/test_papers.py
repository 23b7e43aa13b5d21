"""Every row is accounted for: kept, quarantined, duplicate, filtered or decontaminated; splits share nothing; nothing depends on chance."""
import gzip
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scilm_adapt import cli
from scilm_adapt.duplicates import fingerprint
from scilm_adapt.errors import InputError
from scilm_adapt.files import SEEN, read_json
from scilm_adapt.papers import (
    OUTCOMES,
    SPLITS,
    Corpus,
    _find_fields,
    _sections_of,
    _split_of,
    _to_record,
    _words_of,
    build,
    count_table,
    document,
    open_papers,
    prepare,
    read,
    split,
)
from scilm_adapt.runs import Run

HEAT = 'Heat flows from warm bodies to cold bodies, and it never flows back by itself, as everyone has seen who leaves a cup of hot tea.'
ТЕПЛО = ('Теплота переходит от тёплых тел к холодным и никогда сама собой не идёт обратно: это видел всякий, кто оставлял на столе '
         'горячий чай.')


def jsonl(rows) -> str:
    return ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)


def many(name: str, count: int) -> list[dict]:
    "Different papers of a length that no filter minds."
    things = 'heat light sound mass charge spin water carbon tissue protein'.split()
    deeds = 'flows spreads decays grows oscillates scatters binds folds'.split()
    rows = []
    for n, (thing, deed, m) in enumerate(itertools.islice(itertools.product(things, deeds, range(10**6)), count*37)):
        if n % 37: continue
        rows.append(dict(id=f'{name}-{n}', title=f'On {thing} that {deed} {n}',
                         abstract=f'We ask how {thing} {deed} in sample {n} of {name}. The answer of the {m}th trial, counted '
                                  f'with care {n + 1} times, is that {thing} of kind {m} {deed} as {name} number {n + 2} predicts.'))
    return rows


def papers_file(folder, name: str, count: int) -> str:
    (folder/f'{name}.jsonl').write_text(jsonl(many(name, count)), encoding='utf-8')
    return str(folder/f'{name}.jsonl')


def total(report) -> dict:
    "The total, after a look that every line adds up."
    lines = [*report['files'], report['total']]
    assert all(line['read'] == sum(line[name] for name in OUTCOMES) for line in lines)
    assert all(report['total'][name] == sum(line[name] for line in report['files']) for name in report['total'])
    assert sum(report['splits'].values()) == sum(report['languages'].values()) == report['total']['kept']
    return {name: count for name, count in report['total'].items() if count}


# --- fields -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('row', 'given', 'wanted'), [
    (dict(paper_title='T', summary='S'), {}, ('T', 'S')),
    ({'Title': 'T', 'Abstract': 'A'}, {}, ('T', 'A')),
    ({'Paper Title': 'T', 'Paper-Abstract': 'A'}, {}, ('T', 'A')),
    ({'название': 'Т', 'аннотация': 'А'}, {}, ('Т', 'А')),
    (dict(title='T', abstract='A', text='full text'), {}, ('T', 'A')),
    (dict(title='T', abstract='A', text='full text'), dict(text='text'), ('T', 'full text')),
    (dict(kopf='T', rumpf='S'), dict(title='kopf', text='rumpf'), ('T', 'S')),
    (dict(text='S'), {}, ('', 'S')), (dict(title=None, text='S'), {}, ('', 'S')), (dict(title=' a ', text=' c '), {}, ('a', 'c')),
], ids=str)
def test_fields_are_found_or_named(row, given, wanted):
    record = _to_record(row, _find_fields(row, given))
    assert (record['title'], record['text']) == wanted and record['id']


@pytest.mark.parametrize(('row', 'reason'), [
    (dict(abstract=None), "'abstract' is empty"), (dict(abstract=''), 'is empty'), (dict(abstract=' \n\t'), 'is empty'),
    (dict(abstract=3), "'abstract' holds a number"), (dict(abstract=float('nan')), 'holds a number'), (dict(abstract=True), 'number'),
    (dict(abstract=['a', 1]), "'abstract' holds a number"), (dict(abstract={}), 'is empty'),
    (dict(abstract={'url': 'a'}), "an object of 'url'"),
    (dict(title=3, abstract='a'), "'title' holds a number"), (dict(abstract=[]), 'is empty'),
    (dict(body2='a', title='t'), "no field with text among 'body2', 'title'; name it with text_field"), ({}, 'no field with text'),
    (dict(abstract='half \ud835'), 'half of a character'),
], ids=str)
def test_text_that_is_no_text_is_refused_by_name(row, reason):
    with pytest.raises(ValueError, match=reason): _to_record(row, _find_fields(row, {}))


def test_every_record_has_every_field():
    row = dict(arxiv_id=1234, title='T', abstract='A', categories='cs.LG stat.ML', keywords='heat; cold', tldr='t', language='ru', year=1)
    assert _to_record(row, _find_fields(row, {})) == dict(id='1234', title='T', text='A', lang='ru', topics=['cs.LG', 'stat.ML'],
                                                        keywords=['heat', 'cold'], tldr='t', sections=[])


def test_a_record_without_id_gets_one_from_its_content():
    rows = [dict(title=title, text=text, year=year) for title, text, year in (('T', 'S', 1), ('T', 'S', 2), ('T', 'R', 1), ('', 'TS', 1))]
    ids = [_to_record(row, _find_fields(row, {}))['id'] for row in rows]
    assert ids[0] == ids[1] and len(set(ids)) == 3


@pytest.mark.parametrize(('value', 'wanted'), [
    ('cs.LG stat.ML', ['cs.LG', 'stat.ML']), ('cs.LG', ['cs.LG']), ('hep-th', ['hep-th']), ('hot water, ice', ['hot water', 'ice']),
    ('a, b; c', ['a, b', 'c']), (['a', 3, ' b ', ''], ['a', 'b']), (None, []), (3, []), ({}, []), ('', []),
], ids=str)
def test_topics_and_keywords_are_lists_of_short_texts(value, wanted):
    assert _words_of(value) == wanted


def test_sections_are_read_in_their_usual_forms_and_belong_to_the_document():
    value = [dict(heading='Method', text='We heat.'), 'We cool.', dict(title='Empty', text=' '), 3, dict(section='End', content='Done.')]
    sections = _sections_of(value)
    assert sections == [dict(title='Method', text='We heat.'), dict(title='', text='We cool.'), dict(title='End', text='Done.')]
    row = dict(title='T', abstract='A', sections=value)
    assert document(_to_record(row, _find_fields(row, {}))) == 'T\n\nA\n\nMethod\n\nWe heat.\n\nWe cool.\n\nEnd\n\nDone.'


# --- reading small things ---------------------------------------------------------------------------------------------------------

def test_read_says_what_it_refuses_and_strict_ends_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'a.jsonl').write_text(jsonl([dict(text='a'), dict(text=None), dict(text='b')]) + 'no json\n')
    assert [record['text'] for record in read('a.jsonl')] == ['a', 'b']
    assert "a.jsonl: 2 of 4 refused, the first at a.jsonl:2: field 'text' is empty" in capsys.readouterr().out
    with pytest.raises(InputError, match="a.jsonl:2: field 'text' is empty"): read('a.jsonl', strict=True)
    with pytest.raises(InputError, match="a.jsonl:1: there is no field 'headline'"): read('a.jsonl', title_field='headline')


def test_a_limit_reads_no_further(tmp_path):
    path = papers_file(tmp_path, 'science', 300)
    with open(path, 'a') as file: file.write('not JSON, but far behind\n')
    assert len(read(path, limit=300, strict=True)) == 300


@pytest.mark.parametrize('source', ['./missing.jsonl', '/nowhere/papers', '~/no such file.csv', 'missing.parquet', 'missing.jsonl.gz',
                                    'nobody/no-such-data-set', 'no such name', 'empty.jsonl'])
def test_a_source_that_is_not_there_is_named(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'empty.jsonl').touch()
    with pytest.raises(InputError) as caught: read(source)
    assert source in str(caught.value) and '\n' not in str(caught.value)


# --- the folder -------------------------------------------------------------------------------------------------------------------

DIRTY = [dict(id='1', title='On heat', abstract=f'<p>{HEAT}</p>'), dict(id='2', title='Again', abstract=HEAT.upper()),
         dict(id='3', title='О теплоте', abstract=ТЕПЛО), dict(id='4', abstract=None), dict(id='5', abstract='Too short.'),
         dict(id='6', title='On heat', abstract=HEAT.replace('hot tea', 'warm milk')),
         dict(id='7', abstract='Der Mensch ist, was er isst, und die Wärme geht immer vom warmen zum kalten Körper über, niemals zurück.'),
         dict(id='8', abstract='It is known that the seven colours of the rainbow are seen in the same order in every rainbow that was '
                               'ever seen.')]
RAINBOW = 'the seven colours of the rainbow are seen in the same order in every rainbow that was ever'
EVALUATION = dict(question='Name them.', choices=['none', RAINBOW])


@pytest.fixture
def dirty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'dirty.jsonl').write_text(jsonl(DIRTY) + '{"id": 9, "abs', encoding='utf-8')
    (tmp_path/'exam.jsonl').write_text(jsonl([EVALUATION]), encoding='utf-8')
    return tmp_path


def test_every_row_is_accounted_for(dirty):
    report = build('out', ['dirty.jsonl'], evaluation=['exam.jsonl'])
    assert total(report) == dict(read=9, kept=2, quarantined=2, duplicates=2, filtered=2, decontaminated=1)
    assert report == read_json('out/report.json')
    assert list(report['files'][0]) == ['file', 'read', 'kept', 'quarantined', 'duplicates', 'filtered', 'decontaminated']
    quarantine = [json.loads(line) for line in open('out/quarantine.jsonl', encoding='utf-8')]
    assert [(q['file'], q['line']) for q in quarantine] == [('dirty.jsonl', 4), ('dirty.jsonl', 9)]
    assert all(q['reason'] and q['raw'] for q in quarantine) and quarantine[1]['raw'].startswith('{"id": 9, "abs')
    removed = {row['id']: row for row in map(json.loads, open('out/removed.jsonl', encoding='utf-8'))}
    assert {i: row['outcome'] for i, row in removed.items()} == {'2': 'duplicates', '5': 'filtered', '6': 'duplicates', '7': 'filtered',
                                                                 '8': 'decontaminated'}
    assert ' of 1, ' in removed['2']['reason'] and ' of 1, ' in removed['6']['reason'] and 'rainbow' in removed['8']['reason']
    kept = [record for part in datasets.load_from_disk('out').values() for record in part]
    assert {record['id']: (record['text'], record['lang']) for record in kept} == {'1': (HEAT, 'en'), '3': (ТЕПЛО, 'ru')}


def test_strict_stops_at_the_first_and_leaves_what_was_there(dirty):
    build('out', ['dirty.jsonl'])
    before = {path: path.read_bytes() for path in Path('out').rglob('*') if path.is_file()}
    with pytest.raises(InputError, match="dirty.jsonl:4: field 'abstract' is empty"): build('out', ['dirty.jsonl'], strict=True)
    assert {path: path.read_bytes() for path in Path('out').rglob('*') if path.is_file() and path.name != SEEN} == before
    assert sorted(os.listdir('.')) == ['dirty.jsonl', 'exam.jsonl', 'out']


def test_a_corpus_of_nothing_is_refused_with_the_counts(dirty):
    (dirty/'bad.jsonl').write_text(jsonl(DIRTY[3:5]))
    with pytest.raises(InputError, match=r'bad.jsonl: none of 2 records could be kept \(1 quarantined, 1 filtered'):
        build('out', ['bad.jsonl'])
    assert not (dirty/'out').exists()


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path):
    rows = many('x', 2500)
    for n in range(0, 2500, 100): rows[n] |= rows[n - 1] | dict(id=f'near-{n}', abstract=rows[n - 1]['abstract'] + ' Truly.') if n else {}
    (tmp_path/'a.jsonl').write_text(jsonl(rows) + 'broken\n')
    reports = [build(tmp_path/f'out{workers}', [str(tmp_path/'a.jsonl')], workers=workers) for workers in (1, 3)]
    assert reports[0] == reports[1] and total(reports[0])['duplicates'] >= 24
    one, three = ([list(part) for part in datasets.load_from_disk(tmp_path/f'out{workers}').values()] for workers in (1, 3))
    assert one == three


def test_repeats_are_found_across_files_and_counted_where_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = many('x', 20)
    (tmp_path/'a.jsonl').write_text(jsonl(rows))
    with gzip.open(tmp_path/'b.jsonl.gz', 'wt') as file: file.write(jsonl(rows[:5] + many('y', 3)))
    report = build('out', ['*.jsonl*'])
    assert {line['file']: (line['kept'], line['duplicates']) for line in report['files']} == {'a.jsonl': (20, 0), 'b.jsonl.gz': (3, 5)}
    assert total(report) == dict(read=28, kept=23, duplicates=5)
    lines = count_table(report).splitlines()
    assert len(lines) == 5 and lines[-1].split() == ['total', '28', '23', '0', '5', '0', '0']


def test_what_is_built_can_be_read_again_and_loses_nothing(tmp_path):
    build(tmp_path/'once', [papers_file(tmp_path, 'science', 200)])
    report = build(tmp_path/'twice', [str(tmp_path/'once')])
    assert total(report) == dict(read=200, kept=200)
    once, twice = (datasets.load_from_disk(tmp_path/name) for name in ('once', 'twice'))
    for name in SPLITS: assert sorted(map(str, once[name])) == sorted(map(str, twice[name]))


def test_rules_can_be_switched_off_and_unknown_ones_are_named(dirty):
    from scilm_adapt.cleaning import filters, rules
    kept = total(build('all', ['dirty.jsonl'], without=[*rules, *filters]))['kept']
    assert kept > total(build('out', ['dirty.jsonl']))['kept']
    with pytest.raises(InputError, match='no such rule'): build('no', ['dirty.jsonl'], without=['no such rule'])


def test_a_splits_folder_looks_like_a_list(tmp_path):
    build(tmp_path/'out', [papers_file(tmp_path, 'science', 300)])
    train = open_papers(tmp_path/'out')['train']
    whole = list(train)
    assert len(train) == len(whole) and train[3] == whole[3] and train[-1] == whole[-1] and train[2:5] == whole[2:5]
    assert [r['id'] for r in whole] == [r['id'] for r in split(read(papers_file(tmp_path, 'science', 300)))['train']]
    with pytest.raises(InputError, match='no folder of papers'): open_papers(tmp_path)


# --- splits -----------------------------------------------------------------------------------------------------------------------

@given(st.lists(st.text(min_size=1), unique=True), st.lists(st.text(min_size=1), unique=True))
def test_the_split_of_a_record_does_not_depend_on_the_others(ids, others):
    def sides(names): return {r['id']: name for name, part in split([dict(id=i) for i in names]).items() for r in part}
    alone, together = sides(ids), sides([*others, *(i for i in ids if i not in others)])
    assert set(alone) == set(ids) and all(together[i] == alone[i] == _split_of(i) for i in ids)


@settings(max_examples=30)
@given(st.permutations([f'paper-{n}' for n in range(60)]))
def test_the_order_of_the_file_does_not_matter(ids):
    assert split([dict(id=i) for i in ids]) == split([dict(id=f'paper-{n}') for n in range(60)])


KNOWN = {'heat-1': 'train', 'paper-26': 'valid', 'paper-32': 'test', 'статья-8': 'test', 'статья-9': 'valid'}


def test_known_ids_stay_where_they_are():
    "Written down once: if this changes, tomorrow's training reads what was tested today."
    assert {i: _split_of(i) for i in KNOWN} == KNOWN
    shares = [_split_of(f'paper-{n}') for n in range(20_000)]
    assert abs(shares.count('test')/20_000 - 0.05) < 0.005 and abs(shares.count('valid')/20_000 - 0.05) < 0.005


# --- the stage --------------------------------------------------------------------------------------------------------------------

def everything(corpus: Corpus) -> dict:
    return {(side, name): list(part) for side in ('science', 'general') for name, part in getattr(corpus, side).items()}


def test_the_stage_keeps_a_corpus_whose_parts_share_nothing(tmp_path, capsys):
    science, general = papers_file(tmp_path, 'science', 400), papers_file(tmp_path, 'general', 300)
    rows = open(science, encoding='utf-8').read().splitlines()
    with open(general, 'a', encoding='utf-8') as file:  # papers under other ids on the general side
        for row in map(json.loads, rows[:50]): file.write(json.dumps(dict(id='copy-' + row['id'], text=row['abstract'].upper())) + '\n')
    corpus = prepare(Run(tmp_path/'run'), science, general)
    parts = everything(corpus)
    marks = [fingerprint(record['text']) for part in parts.values() for record in part]
    assert len(marks) == len(set(marks)) == 700
    assert sum(map(len, corpus.science.values())) == 400  # where both have a text, the paper wins
    assert total(read_json(corpus.folder/'general'/'report.json')) == dict(read=350, kept=300, duplicates=50)
    assert '350 read = 300 kept + 50 duplicates' in capsys.readouterr().out
    assert everything(prepare(Run(tmp_path/'run'), science, general)) == parts  # kept, and the same when it is read again


def test_evaluation_texts_are_kept_out_of_both_sides(tmp_path):
    science, general = papers_file(tmp_path, 'science', 300), papers_file(tmp_path, 'general', 300)
    evaluation_texts = [many('science', 300)[7]['abstract'], many('general', 300)[8]['abstract']]
    (tmp_path/'exam.jsonl').write_text(jsonl([dict(question=text) for text in evaluation_texts]))
    corpus = prepare(Run(tmp_path/'run'), science, general, evaluation=str(tmp_path/'exam.jsonl'))
    texts = {record['text'] for part in everything(corpus).values() for record in part}
    assert not texts & set(evaluation_texts) and len(texts) >= 560
    sides = [total(read_json(corpus.folder/side/'report.json')) for side in ('science', 'general')]
    assert all(side['decontaminated'] >= 1 for side in sides)


def test_a_paper_added_later_moves_no_other(tmp_path):
    general = papers_file(tmp_path, 'general', 300)
    before = prepare(Run(tmp_path/'a'), papers_file(tmp_path, 'science', 300), general).science
    after = prepare(Run(tmp_path/'b'), papers_file(tmp_path, 'science', 500), general).science
    for name in before: assert {r['id'] for r in before[name]} <= {r['id'] for r in after[name]}


def test_other_content_under_the_same_name_is_read_again(tmp_path):
    general, science = papers_file(tmp_path, 'general', 300), papers_file(tmp_path, 'science', 300)
    assert sum(map(len, prepare(Run(tmp_path/'run'), science, general).science.values())) == 300
    papers_file(tmp_path, 'science', 310)
    assert sum(map(len, prepare(Run(tmp_path/'run'), science, general).science.values())) == 310


def test_other_content_in_a_folder_of_the_same_name_is_read_again(tmp_path):
    general, folder = papers_file(tmp_path, 'general', 300), tmp_path/'papers'
    folder.mkdir()
    os.replace(papers_file(tmp_path, 'science', 300), folder/'train.jsonl')
    assert sum(map(len, prepare(Run(tmp_path/'run'), str(folder), general).science.values())) == 300
    time.sleep(0.02)
    os.replace(papers_file(tmp_path, 'science', 310), folder/'train.jsonl')
    assert sum(map(len, prepare(Run(tmp_path/'run'), str(folder), general).science.values())) == 310


@pytest.mark.parametrize('count', [1, 5])
def test_a_corpus_too_small_to_be_split_is_refused(tmp_path, count):
    general = papers_file(tmp_path, 'general', 300)
    with pytest.raises(InputError, match=rf'science.jsonl.*only {count} different.*a few hundred'):
        prepare(Run(tmp_path/'run'), papers_file(tmp_path, 'science', count), general)
    assert [path.name for path in (tmp_path/'run').iterdir() if path.name[0] != '.'] == []


# --- the command ------------------------------------------------------------------------------------------------------------------

def test_the_command_builds_the_folder_and_shows_the_counts(dirty, capsys):
    done = subprocess.run([sys.executable, '-m', 'scilm_adapt.cli', 'papers', 'dirty.jsonl', '-o', 'out', '--decontaminate', 'exam.jsonl'],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[2].split() == ['dirty.jsonl', '9', '2', '2', '2', '2', '1'] and 'fields: text ← abstract' in done.stdout
    assert {'report.json', 'quarantine.jsonl', 'removed.jsonl', 'dataset_dict.json'} <= set(os.listdir('out'))
    assert cli.main(['papers', 'dirty.jsonl', '-o', 'out', '--strict']) == 2
    assert capsys.readouterr().err.endswith("scilm: dirty.jsonl:4: field 'abstract' is empty.\n")
    assert {'report.json', 'dataset_dict.json'} <= set(os.listdir('out'))  # what was there stays


@pytest.mark.parametrize(('arguments', 'said'), [
    (['missing.jsonl', '-o', 'out'], 'missing.jsonl'), (['dirty.jsonl', '-o', 'out', '--without', 'unicorn'], 'unicorn'),
    (['dirty.jsonl', '-o', 'out', '--decontaminate', 'nothing.jsonl'], 'nothing.jsonl'),
    (['dirty.jsonl', '-o', 'out', '--text-field', 'x'], "'x'"),
    (['dirty.jsonl', '-o', 'out', '--encoding', 'klingon'], 'klingon')])
def test_the_command_names_what_is_wrong(dirty, capsys, arguments, said):
    assert cli.main(['papers', *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.rstrip().count('\n') == 0 and not (dirty/'out').exists()


def test_many_files_are_counted_by_their_kind():
    row = dict(read=2, kept=1, quarantined=1, duplicates=0, filtered=0, decontaminated=0)
    files = [dict(file=f'a/{n}.{kind}', **row) for n in range(30) for kind in ('pdf', 'tex')]
    table = count_table(dict(files=files, total={name: 60*count for name, count in row.items()}, untitled=[])).splitlines()
    assert [line.split()[:3] for line in table[2:4]] == [['30', '×', '*.pdf'], ['30', '×', '*.tex']] and len(table) == 5
    assert [line.split()[3:5] for line in table[2:4]] == [['60', '30']]*2 and table[4].split()[:2] == ['total', '120']
