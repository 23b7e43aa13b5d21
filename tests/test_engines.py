"""An engine keeps the same papers as one process does, to the byte, whoever is killed on the way; what is done is not done again."""
import json
import os
import signal
import threading
import time
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from scilm_adapt import cli, engines
from scilm_adapt.duplicates import Signature
from scilm_adapt.engines import Step, _compare, _write_rows, _write_signatures, engine, spread
from scilm_adapt.errors import InputError
from scilm_adapt.files import MANIFEST, SEEN
from scilm_adapt.papers import Checked, Job, build, prepare
from scilm_adapt.runs import Run
from scilm_adapt.tokens import spread_tokens, store_tokens, train_tokenizer

needs_datatrove = pytest.mark.skipif(engines.find_spec('datatrove') is None, reason='datatrove is not installed')
WORDS = 'heat light sound mass charge spin water carbon tissue protein flows spreads decays grows binds folds slowly often here'.split()


def paper(n: int, seed: int, doi: str = '') -> dict:
    "A paper of sixty words, which its seed decides."
    draw = np.random.default_rng(seed)
    text = ' '.join(draw.choice(WORDS, 60)) + f' as the {seed}th sample of the {seed + 1}th kind shows.'
    return dict(id=doi or f'p{n}', title=f'On the {seed}th sample of it', abstract=text)


def rows(number: int, first: int = 0) -> list[dict]:
    "Papers of which every fifth comes again: as it was, in capitals, with a word more, with another text but its DOI."
    found = [paper(n, n, f'10.1234/{n}') if n % 10 == 0 else paper(n, n) for n in range(first, first + number)]
    for n in range(0, number, 5):
        again = dict(found[n*7 % (n + 1)], id=f'again-{first + n}')
        if n % 4 == 1: again['abstract'] = again['abstract'].upper()
        if n % 4 == 2: again['abstract'] += ' Indeed.'
        if n % 4 == 3: again = dict(found[n//10*10], abstract=paper(n, 10**6 + first + n)['abstract'])
        found.insert(n, again)
    return found


def jsonl(path: Path, found: list[dict], more: str = '') -> None:
    path.write_text('\n'.join(map(json.dumps, found)) + more, encoding='utf-8')


@pytest.fixture(scope='module')
def mess(tmp_path_factory) -> Path:
    "A folder of files that are cut off, empty, packed, in several forms, and of other people's; some hold what others hold."
    folder = tmp_path_factory.mktemp('mess')
    jsonl(folder/'a.jsonl', rows(700), '\n{"id": 7, "abs')
    jsonl(folder/'b.jsonl', [*rows(400, 500), dict(id=1, abstract=None), dict(id=2, abstract='half \ud800'),
                            dict(id=3, abstract='Too short.')])
    (folder/'c.csv').write_text('title,abstract\n' + '\n'.join(f'{row["title"]},{row["abstract"]}' for row in rows(30, 650)))
    (folder/'d.bin').write_bytes(bytes(range(256))*9)
    (folder/'e.jsonl').touch()
    with zipfile.ZipFile(folder/'f.zip', 'w') as archive: archive.writestr('papers/x.jsonl', '\n'.join(map(json.dumps, rows(800, 2000))))
    jsonl(folder.parent/'exam.jsonl', [dict(question=paper(3, 3)['abstract'])])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    "The files of a corpus by name, but what holds the time at which it was made."
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*'))
            if path.is_file() and path.name not in (MANIFEST, SEEN, 'state.json')}


@pytest.fixture(scope='module')
def alone(mess, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp('alone')/'corpus'
    build(folder, [mess], evaluation=[mess.parent/'exam.jsonl'], without=['short'], workers=1)
    report = json.loads((folder/'report.json').read_text())['total']
    assert min(report['duplicates'], report['kept']) > 100 and report['quarantined'] == 4 and report['decontaminated'] > 0
    return contents(folder)


def kill_one_worker(work: Path, after: int) -> list[int]:
    "Kill a child of this process as soon as so many files have been cleaned; returns a list that its number will join."
    before, killed = {child.pid for child in psutil.Process().children()}, []
    def watch() -> None:
        while len(list(work.glob('*/clean/completions/*'))) < after: time.sleep(0.01)
        children = [child for child in psutil.Process().children() if child.pid not in before]
        os.kill(max(children, key=lambda child: sum(child.cpu_times()[:2])).pid, signal.SIGKILL)
        killed.append(after)
    threading.Thread(target=watch, daemon=True).start()
    return killed


@needs_datatrove
def test_a_killed_worker_changes_nothing(mess, alone, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engines, '_SHARD', 100)
    killed = kill_one_worker(tmp_path/'.corpus.reading', after=9)
    options = dict(evaluation=[mess.parent/'exam.jsonl'], without=['short'])
    report = build(tmp_path/'corpus', [mess], engine=engine('datatrove'), workers=2, **options)
    assert killed and 'a worker was lost' in capsys.readouterr().out
    assert report['total']['read'] > 2200 and contents(tmp_path/'corpus') == alone
    assert [path.name for path in tmp_path.iterdir()] == ['corpus'], 'what was needed on the way is gone'


CLEAN = engines._clean


def fails_once(folder: Path, job: Job, tasks: int, task: int) -> None:
    "Note what is cleaned, and fail when the second file is begun."
    noted = Path(os.environ['DONE'])
    (noted/f'{task}-{time.time_ns()}').touch()
    if len(list(noted.iterdir())) == 2: raise OSError('the disk is gone')
    CLEAN(folder, job, tasks, task)


@needs_datatrove
def test_the_command_goes_on_where_it_ended(mess, alone, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engines, '_SHARD', 500)
    monkeypatch.setattr(engines, '_clean', fails_once)
    monkeypatch.setenv('DONE', str(done := tmp_path/'done'))
    done.mkdir()
    given = [str(mess), '--decontaminate', str(mess.parent/'exam.jsonl'), '--without', 'short', '--engine', 'datatrove']
    monkeypatch.setattr(engines.os, 'cpu_count', lambda: 1)
    with pytest.raises(OSError, match='the disk is gone'): cli.papers([*given, '-o', str(tmp_path/'corpus')])
    assert not (tmp_path/'corpus').exists()
    assert cli.papers([*given, '-o', str(tmp_path/'corpus')]) == 0
    assert contents(tmp_path/'corpus') == alone
    times = Counter(int(path.name.partition('-')[0]) for path in done.iterdir())
    assert times == Counter(range(len(times))) + Counter([1]), 'the first task was not done again, the second was'


@needs_datatrove
@pytest.mark.parametrize('options', [dict(limit=50), dict(title_field='id', text_field='abstract'), dict(strict=True)])
def test_options_mean_the_same(mess, tmp_path, options):
    said = []
    for name in ('', 'datatrove'):
        try: said.append(build(tmp_path/f'corpus{name}', [mess/'a.jsonl', mess/'f.zip'], engine=engine(name), workers=1, **options))
        except InputError as error: said.append(str(error))
    assert said[0] == said[1] and isinstance(said[0], str) == ('strict' in options)
    if 'strict' not in options: assert contents(tmp_path/'corpus') == contents(tmp_path/'corpusdatatrove')


@needs_datatrove
def test_both_sides_of_a_run_and_its_tokens(tmp_path):
    jsonl(tmp_path/'papers.jsonl', rows(300))
    jsonl(tmp_path/'general.jsonl', rows(300, 200))  # a third of them are papers, which win
    runs = {name: Run(tmp_path/f'run{name}') for name in ('', 'datatrove')}
    sources = [str(tmp_path/f'{name}.jsonl') for name in ('papers', 'general')]
    corpora = {name: prepare(run, *sources, engine=engine(name)) for name, run in runs.items()}
    assert contents(corpora[''].folder) == contents(corpora['datatrove'].folder)
    texts = [record['text'] for record in corpora[''].science['train']]
    tokenizer = train_tokenizer(texts, 400)
    spread_tokens('datatrove', runs['datatrove'], corpora['datatrove'], tokenizer, workers=2)
    found = {name: store_tokens(run, 'tokens', (f"{r['title']}\n\n{r['text']}" for r in corpora[name].science['train']), tokenizer,
                                [corpora[name].folder]) for name, run in runs.items()}
    assert len(found['']) > 200 and contents(runs[''].folder/'tokens') == contents(runs['datatrove'].folder/'tokens')


# --- steps

def work(folder: Path, deed: str, task: int) -> None:
    "Note that a task was begun; then die at the first time, or always, or fail."
    (folder/f'begun-{task}-{time.time_ns()}').touch()
    if task == 3 and (deed == 'always' or deed == 'once' and len(list(folder.glob('begun-3-*'))) == 1): os.kill(os.getpid(), signal.SIGKILL)
    if task == 3 and deed == 'fail': raise InputError('page 3 cannot be read; leave it out.')
    (folder/f'done-{task}').touch()


def done(folder: Path) -> list[str]: return sorted(path.name for path in folder.glob('done-*'))


@needs_datatrove
def test_what_is_done_is_not_done_again(tmp_path, capsys):
    step = Step('deeds', 6, partial(work, tmp_path, 'once'))
    spread('datatrove', tmp_path, step, workers=2)
    begun = len(list(tmp_path.glob('begun-*')))
    assert done(tmp_path) == [f'done-{task}' for task in range(6)] and 7 <= begun <= 9  # a pool that breaks takes its other worker along
    assert capsys.readouterr().out.count('a worker was lost') == 1
    spread('datatrove', tmp_path, step, workers=3)
    assert len(list(tmp_path.glob('begun-*'))) == begun


@needs_datatrove
def test_a_task_that_kills_its_workers_is_given_up_and_the_rest_is_kept(tmp_path):
    with pytest.raises(InputError, match='deeds: 5 workers in a row were lost, and nothing was done; is there enough memory'):
        spread('datatrove', tmp_path, Step('deeds', 4, partial(work, tmp_path, 'always')), workers=1)
    assert done(tmp_path) == ['done-0', 'done-1', 'done-2']


@needs_datatrove
def test_a_fault_is_said_as_it_is_without_a_log_on_the_screen(tmp_path, capfd):
    with pytest.raises(InputError, match='^page 3 cannot be read; leave it out.$'):
        spread('datatrove', tmp_path, Step('deeds', 4, partial(work, tmp_path, 'fail')), workers=1)
    assert 'Traceback' not in capfd.readouterr().err
    assert 'page 3 cannot be read' in (tmp_path/'deeds'/'logs'/'task_00003.log').read_text()


def test_an_engine_that_is_not_there_is_named(monkeypatch):
    with pytest.raises(InputError, match="no engine 'datatrov'; choose among: datatrove. Did you mean 'datatrove'"): engine('datatrov')
    monkeypatch.setattr(engines, 'find_spec', lambda name: None)
    with pytest.raises(InputError, match=r"datatrove is not installed; pip install 'scilm_adapt\[engines\]' brings it"): engine('datatrove')
    assert engine('') is None


@pytest.mark.parametrize('tasks', [1, 3, 7])
def test_rows_with_a_key_in_common_are_found_in_every_division_of_the_keys(tmp_path, tasks):
    draw, keys = np.random.default_rng(tasks), {}
    edges = [n*2**64//tasks for n in range(tasks)]
    for number in range(4):
        name = f'0-0000-{number:06}.jsonl'
        _write_rows(tmp_path/'rows'/name, [Checked('a', n) for n in range(20)])
        found = {}
        for place in sorted(draw.choice(20, 12, replace=False).tolist() if number < 3 else []):  # the last file has no record that is kept
            pool = [0, 2**64 - 1, *edges, *(int(k) for k in draw.integers(1, 2**64, 40, np.uint64)), *range(1, 9)]
            mine = np.array([pool[n] for n in draw.choice(len(pool), 2)], np.uint64)
            found[place], keys[number << 32 | place] = Signature(mine, np.arange(3, dtype=np.uint64)), mine.tolist()
        _write_signatures(tmp_path/'signatures'/name, found)
    for task in range(tasks): _compare(tmp_path, tasks, task)
    shared = {int(row) for path in (tmp_path/'shared').glob('*.npy') for row in np.load(path)}
    naive = {one for one in keys for other in keys if one != other and set(keys[one]) & set(keys[other]) - {0}}
    twice = {one for one, mine in keys.items() if mine[0] == mine[1] != 0}  # a row that meets itself is looked at for nothing
    assert naive and naive <= shared <= naive | twice
