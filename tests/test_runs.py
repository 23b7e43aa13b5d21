"""Stages that are kept, run again, or fail; writers that are killed; and chance by address."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scilm_adapt.runs import (
    Run,
    content_hash,
    file_hash,
    key_of,
    progress,
    read_json,
    read_manifest,
    rng,
    stage,
    write_json,
    write_text,
)

LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
JSON = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3), max_leaves=5)


def writer(calls: list, name: str = 'stage', text: str = 'all of it'):
    "A build function that notes its call."
    def build(folder: Path) -> None:
        calls.append(name)
        write_text(folder/'deep'/'result.txt', text)
    return build


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


@pytest.mark.parametrize('damage', ['truncate', 'delete', 'grow', 'manifest gone', 'manifest cut', 'manifest foreign', 'manifest a list'])
def test_a_damaged_stage_runs_again(tmp_path, damage):
    calls, run = [], Run(tmp_path)
    folder = stage(run, 'model', {}, writer(calls))
    file, manifest = folder/'deep'/'result.txt', folder/'manifest.json'
    if damage == 'truncate': os.truncate(file, 3)
    if damage == 'delete': file.unlink()
    if damage == 'grow': file.write_text('all of it, twice')
    if damage == 'manifest gone': manifest.unlink()
    if damage == 'manifest cut': os.truncate(manifest, 20)
    if damage == 'manifest foreign': manifest.write_text('{"name": "of another program"}')
    if damage == 'manifest a list': manifest.write_text('[1, 2]')
    assert read_manifest(folder) is None
    stage(run, 'model', {}, writer(calls))
    assert len(calls) == 2 and file.read_text() == 'all of it' and read_manifest(folder)


def test_the_manifest_names_every_file_with_size_and_hash(tmp_path):
    folder = stage(Run(tmp_path), 'model', dict(steps=3, path=Path('a/b')), writer([]))
    manifest = json.loads((folder/'manifest.json').read_text())
    assert manifest['files'] == {'deep/result.txt': dict(bytes=9, sha256=file_hash(folder/'deep'/'result.txt'))}
    assert manifest['name'] == 'model' and manifest['config'] == dict(steps=3, path='a/b') and manifest['key'] == key_of(folder)


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
from scilm_adapt.runs import staged_folder
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
from scilm_adapt.runs import write_json
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
        texts = [path.read_text() for path in (tmp_path/'model').iterdir()]
        assert len(texts) == 3000 and len(set(texts)) == 1


@pytest.mark.parametrize('seconds', [0.0, 0.03])
def test_a_killed_writer_leaves_a_whole_file(tmp_path, seconds):
    start_and_kill(KILLED_FILE, tmp_path, seconds)
    values = read_json(tmp_path/'result.json')['values']
    assert len(values) == 50_000 and len(set(values)) == 1


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
    assert list(progress([1, 2, 3], 'reading')) == [1, 2, 3]
    with progress(5, 'training', unit='step') as bar:
        bar.update(2)
        assert (bar.n, bar.total, bar.unit) == (2, 5, 'step')
