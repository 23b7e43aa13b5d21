"""Stages that are kept, run again, or fail; writers that are killed; locks, full disks and signals; and chance by address."""
import errno
import json
import math
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from scilm_adapt import files, runs
from scilm_adapt.errors import InputError, Stopped, progress_bar, stop_gently
from scilm_adapt.files import (
    Damaged,
    check_space,
    content_hash,
    file_hash,
    hashed,
    read_json,
    read_manifest,
    seal,
    verified,
    write_json,
    write_text,
)
from scilm_adapt.runs import Run, _lock, _unlock, key_of, rng, stage, survey

LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
JSON = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3), max_leaves=5)


def writer(calls: list, name: str = 'stage', text: str = 'all of it'):
    "A build function that notes its call."
    def build(folder: Path) -> None:
        calls.append(name)
        write_text(folder/'deep'/'result.txt', text)
    return build


def names(folder: Path) -> list[str]:
    "What lies in a folder; what hides there must be the lock."
    hidden = {path.name for path in folder.iterdir() if path.name.startswith('.')}
    assert hidden <= {runs._LOCK, runs._HOLDER, files._LEDGER, files.SEEN, runs._DAMAGED}, hidden
    return sorted(path.name for path in folder.iterdir() if path.name not in hidden)


def damage(path: Path, how: str) -> None:
    "One of the ways in which files go bad; the size stays the same where it can."
    content = path.read_bytes()
    if how == 'truncate': os.truncate(path, len(content)//2)
    if how == 'zero': path.write_bytes(bytes(len(content)))
    if how == 'delete': path.unlink()
    if how == 'grow': path.write_bytes(content + b' ')
    if how == 'flip': path.write_bytes(content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])


# --- stages -----------------------------------------------------------------------------------------------------------------------

def test_a_stage_is_kept_while_its_configuration_holds(tmp_path, capsys):
    calls = []
    first = stage(Run(tmp_path), 'corpus', dict(a=1, b='тепло'), writer(calls))
    again = stage(run := Run(tmp_path), 'corpus', dict(b='тепло', a=1), writer(calls))  # another process, another order of keys
    assert first == again == tmp_path/'corpus' and calls == ['stage']
    assert 'kept' in capsys.readouterr().out
    assert run.seconds['corpus'] == read_manifest(first)['seconds']  # the time it took then is known now


@pytest.mark.parametrize('other', [dict(a=2), dict(a='1'), dict(a=1, b=None), dict(a=[1]), {}], ids=str)
def test_a_changed_configuration_runs_the_stage_again(tmp_path, other):
    calls, run = [], Run(tmp_path)
    stage(run, 'corpus', dict(a=1), writer(calls, text='old'))
    stage(run, 'corpus', other, writer(calls, text='new'))
    assert len(calls) == 2 and (tmp_path/'corpus'/'deep'/'result.txt').read_text() == 'new'
    assert names(tmp_path) == ['corpus']


def test_what_the_old_build_wrote_is_gone_after_the_new_one(tmp_path):
    run = Run(tmp_path)
    stage(run, 'model', dict(v=1), lambda folder: write_text(folder/'shard-2', 'x'))
    stage(run, 'model', dict(v=2), lambda folder: write_text(folder/'shard-1', 'x'))
    assert names(tmp_path/'model') == ['manifest.json', 'shard-1']


def test_a_changed_parent_runs_the_stages_below_it_and_no_others(tmp_path):
    calls, run = [], Run(tmp_path)
    def pipeline(clean):
        corpus = stage(run, 'corpus', dict(clean=clean), writer(calls, 'corpus'))
        stage(run, 'tokenizer', {}, writer(calls, 'tokenizer'))
        model = stage(run, 'models/contrast', {}, writer(calls, 'model'), parents=[corpus])
        stage(run, 'report', {}, writer(calls, 'report'), parents=[model])
    pipeline(True); pipeline(True)
    assert calls == ['corpus', 'tokenizer', 'model', 'report']
    calls.clear(); pipeline(False)
    assert calls == ['corpus', 'model', 'report']
    calls.clear(); pipeline(False)
    assert calls == []


def test_a_parent_that_is_a_plain_folder_counts_by_its_files(tmp_path):
    calls, run, parent = [], Run(tmp_path/'run'), tmp_path/'given'
    write_text(parent/'a'/'weights', 'one')
    stage(run, 'model', {}, writer(calls), parents=[parent])
    stage(run, 'model', {}, writer(calls), parents=[parent])
    assert len(calls) == 1
    write_text(parent/'a'/'weights', 'two')
    stage(run, 'model', {}, writer(calls), parents=[parent])
    assert len(calls) == 2


@pytest.mark.parametrize('file', ['deep/result.txt', 'manifest.json'])
@pytest.mark.parametrize('how', ['truncate', 'zero', 'delete', 'grow', 'flip'])
def test_a_damaged_stage_is_named_and_made_anew(tmp_path, capsys, file, how):
    calls, run = [], Run(tmp_path)
    folder = stage(run, 'model', {}, writer(calls))
    assert read_manifest(folder)
    damage(folder/file, how)
    assert read_manifest(folder) is None or (file, how) == ('manifest.json', 'grow')  # a space behind JSON says nothing
    if (file, how) == ('manifest.json', 'grow'): return
    with pytest.raises(Damaged, match=file): verified(folder)
    if (file, how) != ('manifest.json', 'delete'):  # such a folder is a plain one
        with pytest.raises(InputError, match=f'{file}.*built on it'): stage(run, 'below', {}, writer(calls), [folder])
    stage(run, 'model', {}, writer(calls))
    assert calls == ['stage']*2 and verified(folder, deep=True) and (folder/'deep'/'result.txt').read_text() == 'all of it'
    said = [line for line in capsys.readouterr().out.splitlines() if 'made anew' in line]
    assert len(said) == 1 and f'model: model/{file} ' in said[0] and str(tmp_path) not in said[0]


@pytest.mark.parametrize('manifest', ['{"name": "of another program"}', '[1, 2]', None])
def test_a_folder_of_another_program_or_version_is_no_stage(tmp_path, manifest):
    calls, run, folder = [], Run(tmp_path), stage(Run(tmp_path), 'model', {}, writer([]))
    old = {name: value for name, value in read_json(folder/'manifest.json').items() if name not in ('hash', 'parents', 'code', 'made')}
    (folder/'manifest.json').write_text(manifest or json.dumps(old))
    assert read_manifest(folder) is None
    stage(run, 'model', {}, writer(calls))
    assert calls == ['stage'] and read_manifest(folder)


def test_damage_that_is_mended_changes_nothing_below(tmp_path):
    calls, run = [], Run(tmp_path)
    def pipeline(): return stage(run, 'model', {}, writer(calls, 'model'), [stage(run, 'corpus', {}, writer(calls, 'corpus'))])
    pipeline()
    damage(tmp_path/'corpus'/'deep'/'result.txt', 'flip')
    pipeline()
    assert calls == ['corpus', 'model', 'corpus']


def test_bytes_are_hashed_once_and_then_only_when_their_file_changed(tmp_path, monkeypatch):
    folder, hashed = stage(Run(tmp_path), 'model', {}, writer([])), []
    file = folder/'deep'/'result.txt'
    os.utime(file, ns=(10**18, 10**18))
    monkeypatch.setattr(files, 'file_hash', lambda path: hashed.append(path.name) or file_hash(path))
    assert verified(folder) and verified(folder) and hashed == ['result.txt']*2  # as fresh as this, it may change within a tick
    monkeypatch.setattr(files, 'SETTLED', -1.0)
    assert verified(folder) and verified(folder) and hashed == ['result.txt']*3
    assert verified(folder, deep=True) and hashed == ['result.txt']*4
    before = file.stat()
    file.write_bytes(b'all of iT')
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and time of before: what changed is the entry's own time
    with pytest.raises(Damaged, match='result.txt has other content'): verified(folder)
    file.write_bytes(b'all of it')
    (folder/files.SEEN).write_text('{"spoilt": ')
    assert verified(folder)


def test_a_folder_for_reading_only_is_read(tmp_path):
    folder = stage(Run(tmp_path), 'model', {}, writer([]))
    (folder/files.SEEN).unlink(missing_ok=True)
    (folder/files.SEEN).mkdir()  # nothing can be written there
    assert verified(folder)


def test_no_stage_starts_on_a_parent_that_did_not_finish(tmp_path):
    run, calls = Run(tmp_path), []
    with pytest.raises(ZeroDivisionError): stage(run, 'corpus', {}, lambda folder: 1/0)
    with pytest.raises(InputError, match='corpus is missing or was not finished'):
        stage(run, 'model', {}, writer(calls), [tmp_path/'corpus'])
    assert calls == []


def test_the_manifest_names_every_file_with_size_and_hash(tmp_path):
    folder = stage(Run(tmp_path), 'model', dict(steps=3, path=Path('a/b')), writer([]))
    manifest = json.loads((folder/'manifest.json').read_text())
    assert manifest['files'] == {'deep/result.txt': dict(bytes=9, sha256=file_hash(folder/'deep'/'result.txt'))}
    assert manifest['name'] == 'model' and manifest['config'] == dict(steps=3, path='a/b') and manifest['key'] == key_of(folder)
    below = stage(Run(tmp_path), 'models/below', {}, writer([]), [folder])
    manifest = json.loads((below/'manifest.json').read_text())
    assert manifest['parents'] == dict(model=key_of(folder)) and manifest['made'].endswith('+00:00')
    assert manifest['code'].keys() == {'version', 'sources'} and len(manifest['hash']) == 64


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_stage_that_crashes_leaves_nothing_under_its_name(tmp_path, error):
    def build(folder):
        write_text(folder/'weights', 'half of the wei')
        raise error
    with pytest.raises(error): stage(Run(tmp_path), 'models/contrast', {}, build)
    assert names(tmp_path/'models') == []


def test_a_stage_that_crashes_keeps_the_result_of_before(tmp_path):
    calls, run = [], Run(tmp_path)
    stage(run, 'model', dict(v=1), writer(calls))
    with pytest.raises(ZeroDivisionError): stage(run, 'model', dict(v=2), lambda folder: 1/0)
    assert (tmp_path/'model'/'deep'/'result.txt').read_text() == 'all of it' and names(tmp_path) == ['model']
    stage(run, 'model', dict(v=1), writer(calls))
    assert calls == ['stage']


# --- writers that are killed ------------------------------------------------------------------------------------------------------

KILLED_FOLDER = '''
import sys
from pathlib import Path
from scilm_adapt.runs import Run, stage
def build(folder):
    for number in range(40): (folder/f'part-{number}').write_bytes(VERSION*20_000)
print('ready', flush=True)
for version in range(10**6):
    VERSION = b'%d' % (version % 10)
    stage(Run(Path(sys.argv[1])), 'model', dict(version=version), build)
'''
KILLED_SWAP = '''
import sys
from pathlib import Path
from scilm_adapt.files import staged_folder
final = Path(sys.argv[1])/'model'
def fill(folder, text):
    for number in range(3000): (folder/f'part-{number}').write_text(text)
with staged_folder(final) as folder: fill(folder, 'old')
with staged_folder(final) as folder:
    fill(folder, 'new')
    print('ready', flush=True)
'''
KILLED_FILE = '''
import sys
from scilm_adapt.files import write_json
print('ready', flush=True)
for version in range(10**6): write_json(sys.argv[1] + '/result.json', dict(values=[version]*50_000))
'''


def start_and_kill(script: str, folder: Path, seconds: float, ends: bool = False) -> None:
    "Run a script in a process of its own and kill it, when it has published something, so that it can do nothing any more."
    with subprocess.Popen([sys.executable, '-c', script, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b'ready\n', process.stderr.read()
        while not ends and not any(path.name[0] != '.' for path in folder.iterdir()): time.sleep(0.002)
        time.sleep(seconds)
        process.kill()
    assert process.returncode == -signal.SIGKILL or ends and process.returncode == 0


@pytest.mark.parametrize('seconds', [0.0, 0.011, 0.027, 0.05])
def test_a_killed_stage_leaves_a_whole_folder_or_none(tmp_path, seconds):
    start_and_kill(KILLED_FOLDER, tmp_path, seconds)
    folder = tmp_path/'model'
    if folder.exists():  # killed between two renames, the name may be free; but what has the name is whole
        assert read_manifest(folder) is not None
        parts = [folder/f'part-{number}' for number in range(40)]
        assert len({part.read_bytes() for part in parts}) == 1 and parts[0].stat().st_size == 20_000
    calls = []  # and the next run goes on as if nothing had happened
    stage(Run(tmp_path), 'model', dict(other=True), writer(calls))
    assert calls == ['stage'] and (folder/'deep'/'result.txt').read_text() == 'all of it'


@pytest.mark.parametrize('seconds', [0.0, 0.02])
def test_a_folder_killed_while_it_is_replaced_is_the_old_one_or_the_new_one(tmp_path, seconds):
    start_and_kill(KILLED_SWAP, tmp_path, seconds, ends=True)
    if (tmp_path/'model').exists():
        texts = [path.read_text() for path in (tmp_path/'model').glob('part-*')]
        assert len(texts) == 3000 and len(set(texts)) == 1


@pytest.mark.parametrize('seconds', [0.0, 0.03])
def test_a_killed_writer_leaves_a_whole_file(tmp_path, seconds):
    start_and_kill(KILLED_FILE, tmp_path, seconds)
    values = read_json(tmp_path/'result.json')['values']
    assert len(values) == 50_000 and len(set(values)) == 1


# --- what survives ----------------------------------------------------------------------------------------------------------------

def test_what_a_killed_process_left_is_finished_or_removed(tmp_path):
    dead = subprocess.Popen(['true'])
    dead.wait()
    run, calls = Run(tmp_path/'a'), []
    stage(run, 'model', dict(v=2), writer(calls, text='new'))
    os.replace(run.folder/'model', run.folder/f'.model.{dead.pid}-0123abcd')  # the new one, complete, and the old one: neither has the name
    stage(Run(tmp_path/'b'), 'model', dict(v=1), writer(calls, text='old'))
    os.replace(tmp_path/'b'/'model', run.folder/f'.model.{dead.pid}-0123abcd.old')
    half = run.folder/f'.other.{dead.pid}-0123abcd'
    write_text(half/'half', 'of another stage')
    write_json(half/files.WORK, hashed(dict(of='other', process=dead.pid, machine=platform.node())))
    write_text(run.folder/f'.other.{dead.pid}-4567cdef'/'thesis', 'of somebody, though the name looks like ours')
    calls.clear()
    folder = stage(run, 'model', dict(v=2), writer(calls))
    assert calls == [] and (folder/'deep'/'result.txt').read_text() == 'new'
    stage(run, 'other', {}, writer(calls))
    shutil.rmtree(run.folder/f'.other.{dead.pid}-4567cdef')
    assert names(run.folder) == ['model', 'other']


def counter(calls: list, dies: int | None = None):
    "A build function that goes on where it was."
    def build(folder: Path, scratch: Path) -> None:
        for number in range(int((scratch/'n').read_text()) + 1 if (scratch/'n').exists() else 0, 5):
            if number == dies: raise RuntimeError('dies')
            calls.append(number)
            write_text(scratch/'n', str(number))
        write_text(folder/'result', 'five')
    return build


def test_what_is_written_in_the_scratch_folder_survives_a_crash(tmp_path):
    run, calls = Run(tmp_path), []
    with pytest.raises(RuntimeError): stage(run, 'models/deep', dict(v=1), counter(calls, dies=3), resumable=True)
    scratch, = (tmp_path/'.unfinished'/'models').iterdir()
    assert scratch.name.startswith('deep-') and survey(tmp_path)[0]['state'] == 'unfinished'
    stage(run, 'models/deep', dict(v=1), counter(calls), resumable=True)
    assert calls == [0, 1, 2, 3, 4] and not (tmp_path/'.unfinished').exists()
    assert names(tmp_path/'models'/'deep') == ['manifest.json', 'result']


def test_another_key_begins_anew_and_removes_the_scratch_of_before(tmp_path):
    run, calls = Run(tmp_path), []
    for v, other in ((1, 'deep'), (2, 'deep'), (1, 'deep-blue')):
        with pytest.raises(RuntimeError): stage(run, other, dict(v=v), counter(calls, dies=2), resumable=True)
    assert calls == [0, 1]*3 and len(list((tmp_path/'.unfinished').iterdir())) == 2  # one of each stage
    stage(run, 'deep', dict(v=1), counter(calls), resumable=True)
    assert calls == [0, 1]*3 + [0, 1, 2, 3, 4] and [p.name[:10] for p in (tmp_path/'.unfinished').iterdir()] == ['deep-blue-']


@pytest.mark.parametrize('name', ['deep', 'models/deep'])
def test_what_is_right_for_any_key_goes_on_into_the_next_try(tmp_path, name):
    def build(folder: Path, scratch: Path, word: str = '', dies: bool = True) -> None:
        seen.append((scratch/'said').read_text() if (scratch/'said').exists() else '')
        assert not (scratch/'step').exists(), 'what belongs to another key is gone'
        for file in ('said', 'step') if word else ():
            with open(scratch/file, 'a') as out: out.write(word)
        if dies: raise RuntimeError('dies')
        write_text(folder/'result', 'made')
    run, seen = Run(tmp_path), []
    def tried(v: int, **how) -> None: stage(run, name, dict(v=v), partial(build, **how), resumable=True, inherited=['said'])
    for v, word in enumerate(('one ', 'two ', '', 'three ')):
        with pytest.raises(RuntimeError): tried(v, word=word)
    tried(9, dies=False)
    assert seen == ['', 'one ', 'one two ', 'one two ', 'one two three ']
    assert names(tmp_path/name) == ['manifest.json', 'result'] and not (tmp_path/'.unfinished').exists()


def in_another(folder: Path, settings: dict | None = None, then: str = '') -> subprocess.Popen:
    "Another process that builds a stage, and says 'built', or why not."
    script = f'''
import sys, time
from scilm_adapt.files import write_text
from scilm_adapt.runs import InputError, Run, stage
try: stage(Run(sys.argv[1]), 'other', {{}}, lambda folder: write_text(folder/'x', 'y'))
except InputError as error: print(error, flush=True)
else: print('built', flush=True)
{then}'''
    return subprocess.Popen([sys.executable, '-c', script, folder], stdout=subprocess.PIPE, text=True, env=os.environ | (settings or {}))


def test_a_second_process_is_refused_by_the_number_of_the_first(tmp_path):
    run, calls = Run(tmp_path), []
    def nested(folder):
        stage(Run(tmp_path), 'inner', {}, writer(calls))  # the same process may, also by another Run
        calls.append(in_another(tmp_path).communicate()[0])
    stage(run, 'outer', {}, nested)
    assert calls[1].startswith(f'{tmp_path} is in use by process {os.getpid()};')
    assert in_another(tmp_path).communicate()[0].count('in use') == 1  # until this one ends
    run.close()
    assert in_another(tmp_path).communicate()[0] == 'built\n'


def test_a_finished_stage_is_found_while_another_process_builds(tmp_path):
    stage(run := Run(tmp_path), 'other', {}, writer([]))
    said = []
    def busy(folder): said.append(in_another(tmp_path).communicate()[0])
    stage(run, 'more', {}, busy)
    assert 'already done' in said[0] and 'built' in said[0]


def test_a_lock_left_by_a_killed_process_is_taken_over_at_once(tmp_path):
    with in_another(tmp_path, then='time.sleep(60)') as process:
        assert process.stdout.readline() == 'built\n'
        with pytest.raises(InputError, match=f'in use by process {process.pid};'): stage(Run(tmp_path), 'mine', {}, writer([]))
        process.kill()
    stage(Run(tmp_path), 'mine', {}, writer([]))
    _unlock(tmp_path)


def test_of_several_ranks_the_first_locks_and_publishes(tmp_path):
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = str(free.getsockname()[1])
    settings = dict(WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=port)
    first, second = (in_another(tmp_path, settings | dict(RANK=str(rank), LOCAL_RANK=str(rank))) for rank in (0, 1))
    assert [process.communicate()[0].split()[-1] for process in (first, second)] == ['built']*2
    assert names(tmp_path) == ['other'] and (tmp_path/runs._HOLDER).read_text() == f'{first.pid}\n'


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path, monkeypatch, capsys):
    def cannot(*_, **__): raise NotImplementedError
    monkeypatch.setattr(FileLock, 'acquire', cannot)
    _lock(tmp_path)
    assert 'see that no other process uses it' in capsys.readouterr().out


# --- disks and signals ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), OSError(errno.EDQUOT, 'quota'),
                                   RuntimeError('I/O error: No space left on device (os error 28)')])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path, error):
    run, calls = Run(tmp_path), []
    stage(run, 'model', dict(v=1), writer(calls))
    def build(folder):
        write_text(folder/'weights', 'half')
        raise error  # whichever it is by then
    with pytest.raises(InputError, match=r'model does not fit on the disk: after 4 bytes in .*model.*, [\d,]+ are free.*untouched'):
        stage(run, 'model', dict(v=2), build)
    assert verified(tmp_path/'model', deep=True) and names(tmp_path) == ['model']
    error = OSError('something else')
    with pytest.raises(OSError, match='something else'): stage(run, 'model', dict(v=3), build)


def test_space_is_checked_where_the_folder_would_be(tmp_path):
    check_space(tmp_path/'not'/'yet', 1000, 'A model')
    with pytest.raises(InputError, match=r'A model takes 1,000,000,000,000,000 bytes in .*not, where [\d,]+ are free'):
        check_space(tmp_path/'not', 10**15, 'A model')


def test_the_first_signal_is_a_wish_and_the_second_stops_at_once():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    reached = []
    with pytest.raises(Stopped) as stopped, stop_gently() as stop_requested:
        signal.raise_signal(signal.SIGTERM)
        reached.append(stop_requested == [signal.SIGTERM])
        signal.raise_signal(signal.SIGINT)
        reached.append('never')
    assert reached == [True] and stopped.value.number == signal.SIGINT and isinstance(stopped.value, KeyboardInterrupt)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# --- the state of a run -----------------------------------------------------------------------------------------------------------

def graph(run: Run, v: int = 1) -> None:
    "A corpus, a tokenizer, and two models one below the other."
    corpus = stage(run, 'corpus', dict(v=v), writer([]))
    stage(run, 'tokens', {}, writer([]))
    first = stage(run, 'models/a', {}, writer([]), [corpus])
    stage(run, 'models/b', {}, writer([]), [first])


def states(folder: Path, **options) -> dict[str, str]:
    return {row['name']: row['state'] for row in survey(folder, **options)}


def test_a_survey_tells_what_is_done_stale_broken_and_missing(tmp_path):
    run = Run(tmp_path)
    graph(run)
    write_text(tmp_path/'figures'/'a.png', 'no stage')
    assert states(tmp_path) == {'corpus': 'done', 'tokens': 'done', 'models/a': 'done', 'models/b': 'done'}
    row = next(row for row in survey(tmp_path) if row['name'] == 'models/a')
    assert row['bytes'] == 9 and row['seconds'] >= 0 and row['made'] and set(row['parents']) == {'corpus'} and row['reason'] == ''
    stage(run, 'corpus', dict(v=2), writer([]))
    assert states(tmp_path) == {'corpus': 'done', 'tokens': 'done', 'models/a': 'stale', 'models/b': 'stale'}
    damage(tmp_path/'models'/'a'/'deep'/'result.txt', 'flip')
    (tmp_path/'corpus').rename(tmp_path/f'.corpus.{os.getpid()}-0123abcd')
    assert states(tmp_path) == {'corpus': 'unfinished', 'tokens': 'done', 'models/a': 'broken', 'models/b': 'stale'}
    (tmp_path/f'.corpus.{os.getpid()}-0123abcd').rename(tmp_path.parent/f'{tmp_path.name}-away')
    assert states(tmp_path)['corpus'] == 'missing'
    assert next(row['reason'] for row in survey(tmp_path) if row['state'] == 'broken').startswith('models/a/deep/result.txt has other')


def test_a_deep_survey_sees_what_the_file_system_did_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'SETTLED', -1.0)
    graph(Run(tmp_path))
    file = tmp_path/'tokens'/'deep'/'result.txt'
    assert verified(tmp_path/'tokens')
    file.write_bytes(b'all of iT')
    known = json.loads((tmp_path/'tokens'/files.SEEN).read_text())
    for entries in known.values(): entries['deep/result.txt'] = files._stamp(file)  # a bit that the disk lost by itself
    (tmp_path/'tokens'/files.SEEN).write_text(json.dumps(known))
    assert states(tmp_path)['tokens'] == 'done' and states(tmp_path, deep=True)['tokens'] == 'broken'


def test_a_stage_that_is_done_costs_a_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'SETTLED', -1.0)
    build = lambda folder: (folder/'weights').write_bytes(bytes(10**6))
    stage(Run(tmp_path), 'model', {}, build)
    stage(Run(tmp_path), 'model', {}, build)
    of, read = files.file_hash, []
    monkeypatch.setattr(files, 'file_hash', lambda path: (read.append(path.name), of(path))[1])
    stage(Run(tmp_path), 'model', {}, build)
    assert 'weights' not in read


def test_a_seal_is_broken_by_another_manifest(tmp_path):
    write_text(tmp_path/'a', 'x')
    seal(tmp_path, step=1)
    assert verified(tmp_path)['step'] == 1
    (tmp_path/'manifest.json').write_text((tmp_path/'manifest.json').read_text().replace('"step": 1', '"step": 2'))
    with pytest.raises(Damaged, match='manifest.json has changed'): verified(tmp_path)


# --- files ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('number', [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_not_written(tmp_path, number):
    write_json(tmp_path/'metrics.json', dict(loss=1.5))
    with pytest.raises(ValueError): write_json(tmp_path/'metrics.json', dict(loss=[number]))
    assert read_json(tmp_path/'metrics.json') == dict(loss=1.5) and names(tmp_path) == ['metrics.json']


def test_text_is_written_as_utf_8_with_line_feeds(tmp_path):
    assert write_text(tmp_path/'new'/'a.txt', 'Тепло\nHeat\n').read_bytes() == 'Тепло\nHeat\n'.encode()
    assert write_json(tmp_path/'a.json', dict(слово='тепло')).read_text(encoding='utf-8') == '{\n "слово": "тепло"\n}\n'


@settings(max_examples=50)
@given(JSON)
def test_json_comes_back_as_it_was(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp()/'value.json'
    try: write_json(path, value)
    except UnicodeEncodeError: return  # a lone surrogate is no text; nothing is written
    assert read_json(path) == value


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=3), LEAVES, min_size=2, max_size=4))
def test_the_hash_does_not_depend_on_the_order_of_keys(value):
    assert content_hash(value) == content_hash(dict(reversed(value.items())))


@settings(max_examples=50)
@given(JSON, JSON)
def test_different_values_have_different_hashes(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)  # in JSON's sense: true is not 1
    assert (content_hash(one) == content_hash(other)) == same


# --- chance -----------------------------------------------------------------------------------------------------------------------

def test_a_generator_is_a_function_of_its_address():
    import numpy as np
    np.random.seed(3)
    first = rng('shuffle', 0, 1).random(4)
    np.random.seed(5); rng('something else').random(1000)
    assert (rng('shuffle', 0, 1).random(4) == first).all()
    script = 'from scilm_adapt.runs import rng; print(rng("shuffle", 0, 1).random(4).tolist())'
    other = subprocess.run([sys.executable, '-c', script], env=os.environ | dict(PYTHONHASHSEED='7'), capture_output=True, text=True)
    assert json.loads(other.stdout) == first.tolist()  # also in another process


def test_addresses_do_not_run_into_each_other():
    addresses = [('a', 1, 2), ('a', 12), ('a', '1', 2), ('a', 2, 1), ('a', [1, 2]), ('a1', 2), ('a', 1, 2, 0), ()]
    assert len({rng(*address).integers(2**62) for address in addresses}) == len(addresses)


def test_a_progress_bar_counts_things_and_steps():
    assert list(progress_bar([1, 2, 3], 'reading')) == [1, 2, 3]
    with progress_bar(5, 'training', unit='step') as bar:
        bar.update(2)
        assert (bar.n, bar.total, bar.unit) == (2, 5, 'step')
