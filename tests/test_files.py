"""Nothing that is somebody else's is ever touched: by any command, with any folder to write into, also when it is killed at any moment."""
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scilm_adapt import files, papers, runs
from scilm_adapt.checkpoints import Checkpoints
from scilm_adapt.cli import main
from scilm_adapt.endpoint import appending, finished
from scilm_adapt.errors import InputError
from scilm_adapt.files import check_apart, check_free, look, seal, staged_folder, target_folder, verified, write_own, write_text
from scilm_adapt.instruct import build as instruct
from scilm_adapt.models import save, tiny
from scilm_adapt.runs import Run, stage
from scilm_adapt.teacher import begin_cache

SUBJECTS = ('heat', 'light', 'sound', 'salt', 'iron', 'rain')
ABSTRACT = ('We measure how {0} moves through {1} in the long winter of a northern town. The flow of {0} grows with the depth of {1}, '
            'which nobody had seen before. We propose a model of {0} that has one constant and fits all of the samples.')
RECORDS = [dict(title=f'The flow of {one} in {other}', abstract=ABSTRACT.format(one, other))
           for one in SUBJECTS for other in SUBJECTS if one != other]


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> Path:
    "A folder with a file of papers."
    folder = tmp_path_factory.mktemp('source')
    (folder/'papers.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in RECORDS))
    return folder


@pytest.fixture(scope='module')
def made(source, tmp_path_factory) -> Path:
    "A folder that `scilm papers` made."
    folder = tmp_path_factory.mktemp('made')/'papers'
    papers.build(folder, [source/'papers.jsonl'], workers=1)
    return folder


def snapshot(root: Path) -> dict[str, object]:
    "What lies below a folder: the bytes of files, the targets of links, None for folders."
    found = {}
    for place, inner, names in os.walk(root):
        for path in (Path(place, name) for name in (*inner, *names)):
            link = os.readlink(path) if path.is_symlink() else None
            found[path.relative_to(root).as_posix()] = link or (None if path.is_dir() else path.read_bytes())
    return found


def kept(before: dict[str, object], root: Path) -> bool:
    "Whether all that was there is there still."
    return before.items() <= snapshot(root).items()


# --- any tree, any command, any folder ---------------------------------------------------------------------------------------------

NAMES = ('mine', 'notes.txt', 'заметки', files.MANIFEST, files.WORK, files.SEEN, files._LEDGER, runs._LOCK, runs._HOLDER, runs.UNFINISHED,
         runs._DAMAGED, 'train', 'report.json', 'quarantine.jsonl', 'dataset_dict.json', 'answers.jsonl', 'corpus', 'models', 'figures',
         'report.md', 'run.ipynb', 'metrics.json', 'README.md', '.mine.1-0123abcd', '.mine.1-0123abcd.old', '.mine.answers', '.mine.kept',
         '.scilm.1-0123abcd', 'stage-0123456789ab', 'stage', 'step-00000001', '.saving', 'targets.json', 'shard-00000.bin')
CONTENTS = (b'', b'years of work', b'{}', b'{"files": {}, "hash": ""}', b'{"of": "mine", "process": 1, "machine": ""}', b'123\n', b'[1')
OWN = json.dumps(files.hashed(dict(files={'gone': dict(bytes=1, sha256='0'*64)}))).encode()  # true to itself, as of an earlier call
PATHS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map('/'.join)
THINGS = st.one_of(st.sampled_from(CONTENTS), st.just(None), st.sampled_from(['..', '.', 'mine', '/nowhere', 'notes.txt', '../source']))
TREES = st.dictionaries(PATHS, THINGS, max_size=8)


def plant(root: Path, tree: dict[str, object]) -> dict[str, object]:
    "Lay a tree out in a folder, what fits; returns its snapshot."
    (root/'tree').mkdir(parents=True)
    for name, thing in sorted(tree.items()):
        path = root/'tree'/name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if thing is None: path.mkdir(exist_ok=True)
            elif isinstance(thing, bytes): path.write_bytes(thing)
            else: path.symlink_to(thing)
        except OSError: pass  # its name or a part of its path is taken by another kind of thing
    return snapshot(root)


def small_stage(out: str) -> None:
    "What every stage and the report do in a run folder."
    run = Run(out)
    def build(folder: Path, scratch: Path) -> None:
        write_text(scratch/'note', 'on the way')
        write_text(folder/'deep'/'result', 'all of it')
    for config in (1, 2): stage(run, 'stage', dict(config=config), build, resumable=True)
    stage(run, 'models/base', {}, build, resumable=True)
    with staged_folder(run.folder/'figures', files.ledger(run.folder, 'figures')) as folder: write_text(folder/'a.png', 'a figure')
    for name in ('report.md', 'models/base/README.md'):
        for text in ('first', 'second'): write_own(run.folder, name, text)
    run.close()


def small_checkpoints(out: str) -> None:
    "What a training does with the folder of its checkpoints."
    kept_here = Checkpoints(target_folder(out))
    class Part:
        def state_dict(self): return dict(a=torch.ones(2))
        def load_state_dict(self, state): pass
    for step in range(1, 5): kept_here.save(step, dict(part=Part()))
    kept_here.load(dict(part=Part()))


def commands(source: Path, made: Path) -> dict:
    "Everything that writes, as a function of the folder to write into."
    return dict(papers=lambda out: papers.build(out, [source/'papers.jsonl'], workers=1), stage=small_stage, checkpoints=small_checkpoints,
                instruct=lambda out: instruct(made, out, kinds='title', per_paper=1))


def attempt(work, out: str) -> str:
    "'done', or the sentence with which it was refused."
    try: work(out)
    except InputError as error:
        assert '\n' not in str(error)
        return str(error)
    finally: [runs._unlock(folder) for folder in [*runs.locks]]
    return 'done'


@pytest.mark.parametrize('name', ['papers', 'instruct', 'stage', 'checkpoints'])
@settings(max_examples=25)
@given(tree=TREES, out=st.one_of(PATHS, st.just('.')), data=st.data())
def test_nothing_foreign_is_lost(source, made, tmp_path_factory, name, tree, out, data):
    root = tmp_path_factory.mktemp('any')
    before, here = plant(root, tree), os.getcwd()
    os.chdir(root/'tree')
    try:
        first = attempt(commands(source, made)[name], out)
        assert kept(before, root), first
        again = attempt(commands(source, made)[name], out)
        assert kept(before, root) and (again == 'done') == (first == 'done'), (first, again)
    finally:
        os.chdir(here)
        shutil.rmtree(root)


def killed(work, out: Path, seconds: float) -> None:
    "Do it in a process of its own, which is killed after so many seconds, if it is not done by then."
    if not (child := os.fork()):
        try:
            os.setsid()
            work(str(out))
        finally: os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize('name', ['papers', 'instruct', 'stage', 'checkpoints'])
@pytest.mark.parametrize('where', ['new', 'replaced', 'here'])
def test_killed_at_any_moment_it_loses_nothing_and_goes_on(source, made, tmp_path, monkeypatch, name, where):
    chance, work = random.Random(f'{name} {where}'), commands(source, made)[name]
    before = plant(tmp_path, {'notes.txt': b'years of work', '.out.1-0123abcd/x': b'named as ours', 'other/a': b'a', 'out.kept/b': b'b'})
    out = tmp_path/'tree'/'out'
    if where == 'here':
        out.mkdir()
        monkeypatch.chdir(out)
    start = time.perf_counter()
    if where != 'new': work(str(out))
    else: work(str(tmp_path/'probe'))
    runs._unlock(out), runs._unlock(tmp_path/'probe')
    whole = time.perf_counter() - start
    for _ in range(6):
        killed(work, out, chance.uniform(0, 1.1*whole))
        assert kept(before, tmp_path)
    assert attempt(work, str(out)) == 'done' and kept(before, tmp_path)
    left = [path.name for path in (tmp_path/'tree').iterdir() if path.name.startswith('.out.') and f'tree/{path.name}' not in before]
    assert not left or name == 'checkpoints', left


@pytest.mark.parametrize('begun', [False, True])
@pytest.mark.parametrize('inside', [False, True])
def test_a_folder_that_was_not_marked_yet_is_in_nobodys_way(source, tmp_path, monkeypatch, inside, begun):
    """Killed between making a folder and marking it, or between emptying and removing it, a process leaves an empty one, and killed
    when the mark's file is there and its words are not, one with an empty mark."""
    process = subprocess.Popen(['true'])
    process.wait()
    out = tmp_path/'out'
    left = out/f'.scilm.{process.pid}-0123abcd' if inside else tmp_path/f'.out.{process.pid}-0123abcd'
    left.mkdir(parents=True)
    if begun: (left/files.WORK).touch()
    monkeypatch.chdir(out if inside else tmp_path)
    for _ in range(2): assert scilm('papers', source/'papers.jsonl', '-o', '.' if inside else 'out') == 0
    assert is_papers(out) and not left.exists()


def test_a_folder_named_like_ours_with_something_in_it_is_not_ours(source, tmp_path, monkeypatch, capsys):
    process = subprocess.Popen(['true'])
    process.wait()
    theirs = tmp_path/f'.scilm.{process.pid}-0123abcd'/'thesis.txt'
    theirs.parent.mkdir()
    theirs.write_text('three years')
    monkeypatch.chdir(tmp_path)
    assert scilm('papers', source/'papers.jsonl', '-o', '.') == 2 and theirs.read_text() == 'three years'


# --- what -o may be ---------------------------------------------------------------------------------------------------------------

def scilm(*arguments: object) -> int: return main([*map(str, arguments)])


def is_papers(folder: Path) -> bool: return sum(map(len, papers.open_papers(folder).values())) == len(RECORDS)


@pytest.mark.parametrize('out', ['new', 'new/below', 'empty', '.', './', 'link', 'empty/../other', 'linked/new'])
def test_a_folder_that_is_free_just_works(source, tmp_path, monkeypatch, out):
    (tmp_path/'here').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    if out not in ('.', './'):
        for name in ('empty', 'elsewhere'): Path(name).mkdir()
        Path('link').symlink_to('elsewhere')
        Path('linked').symlink_to('elsewhere')
    for _ in range(2): assert scilm('papers', source/'papers.jsonl', '-o', out) == 0  # and one of an earlier call is replaced
    assert is_papers(Path(out)) and verified(Path(out), deep=True)
    if out == 'link': assert Path('link').is_symlink() and is_papers(Path('elsewhere'))
    assert not [name for name in os.listdir('..') if name != 'here']  # nothing is left beside


def test_where_one_stands_is_not_moved_away(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.stat('.').st_ino
    for _ in range(2): assert scilm('papers', source/'papers.jsonl', '-o', '.') == 0
    assert os.stat(tmp_path).st_ino == os.stat('.').st_ino == before and is_papers(tmp_path)


REFUSED = {'a file': ('thesis.txt', 'is a file'), 'below a file': ('thesis.txt/out', 'is a file'),
           'a link to nothing': ('nowhere', 'link to nothing'),
           'a link to a file': ('to-thesis', 'is a file'), 'a folder with a file': ('full', 'was not made by scilm'),
           'with a hidden file': ('hidden', 'was not made by scilm'), 'with an empty folder': ('nested', 'was not made by scilm'),
           'with a dangling link': ('dangling', 'was not made by scilm'), 'a link to a full folder': ('to-full', 'was not made by scilm'),
           'the source': ('source', 'is what is read'), 'above the source': ('.', 'holds what is read'),
           'below the source': ('source/out', 'lies inside what is read'), 'the source by a link': ('to-source', 'is what is read'),
           'ours with a note': ('noted', 'notes.txt in it was not made'), 'ours, edited': ('edited', 'report.json in it was changed'),
           'ours without its manifest': ('bare', 'was not made by scilm')}


@pytest.mark.parametrize('command', ['papers', 'instruct'])
@pytest.mark.parametrize('case', REFUSED)
def test_what_is_not_free_is_refused_before_any_work(source, made, tmp_path, monkeypatch, capsys, case, command):
    monkeypatch.chdir(tmp_path)
    out, sentence = REFUSED[case]
    Path('thesis.txt').write_text('years of work')
    links = {'nowhere': 'gone', 'to-thesis': 'thesis.txt', 'to-full': 'full', 'to-source': 'source'}
    for link, target in links.items(): Path(link).symlink_to(target)
    for name in ('full/a.txt', 'hidden/.a', 'nested/a/', 'dangling/'):
        (Path(name) if name[-1] == '/' else Path(name).parent).mkdir(parents=True)
        if name[-1] != '/': Path(name).write_text('a')
    Path('dangling/a').symlink_to('gone')
    for name in ('noted', 'edited', 'bare'): shutil.copytree(made, name)
    Path('noted/notes.txt').write_text('a remark')
    Path('edited/report.json').write_text(Path('edited/report.json').read_text() + ' ')
    Path('bare/manifest.json').unlink()
    shutil.copytree(source if command == 'papers' else made, 'source')
    before = snapshot(tmp_path)
    read = 'source/papers.jsonl' if command == 'papers' and out == '.' else 'source'
    assert scilm(command, read, '-o', out) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said and '\n' not in said and said.startswith('scilm: ')
    assert snapshot(tmp_path) == before


def test_evaluation_files_are_sources_too(source, made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(source, 'exam')
    for command, read in (('papers', source), ('instruct', made)):
        assert scilm(command, read, '--decontaminate', 'exam/papers.jsonl', '-o', 'exam') == 2
        assert 'holds what is read' in capsys.readouterr().err
    assert os.listdir('exam') == ['papers.jsonl']


IN_THE_WAY = ['run.ipynb', 'run.failed.ipynb', *runs._FILES, *runs._STAGES, *(f'{name}/mine.txt' for name in runs._STAGES), runs._LOCK,
              files._LEDGER, 'models']


@pytest.mark.parametrize('name', IN_THE_WAY)
def test_a_run_refuses_what_is_in_its_way_before_it_begins(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path/'out'/name, 'years of work')
    before = snapshot(tmp_path)
    assert scilm('run', '-o', 'out', '-p', 'papers', 'installed-docs') == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'not made by scilm' in said or 'is a file' in said
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize('out, sentence', [('data', 'is what is read'), ('.', 'holds what is read'),
                                           ('data/run', 'lies inside what is read')])
def test_a_run_does_not_go_into_what_it_reads(tmp_path, monkeypatch, capsys, out, sentence):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path/'data'/'a.jsonl', '{}\n')
    assert scilm('run', '-o', out, '-p', 'papers', 'data') == 2
    assert sentence in capsys.readouterr().err and snapshot(tmp_path) == {'data': None, 'data/a.jsonl': b'{}\n'}


# --- pieces -----------------------------------------------------------------------------------------------------------------------

def test_look_tells_strange_from_changed(tmp_path):
    write_text(tmp_path/'deep'/'a', 'one')
    write_text(tmp_path/'b', 'two')
    seal(tmp_path)
    assert look(tmp_path) == ([], [])
    (tmp_path/'b').write_text('two!')
    (tmp_path/'deep'/'c').symlink_to('a')
    (tmp_path/'empty').mkdir()
    assert look(tmp_path) == ([tmp_path/'empty', tmp_path/'deep'/'c'], [tmp_path/'b'])
    known = dict(b=[files.file_hash(tmp_path/'b')])
    assert look(tmp_path, known)[1] == [tmp_path/'b']  # what the manifest says of a file counts
    (tmp_path/'manifest.json').unlink()
    assert look(tmp_path, known)[0] == [tmp_path/'deep', tmp_path/'empty'] and look(tmp_path, known)[1] == []


def test_a_changed_file_of_a_stage_is_kept_aside(tmp_path, capsys):
    run = Run(tmp_path)
    def build(folder: Path) -> None: write_text(folder/'deep'/'result.txt', 'all of it')
    folder = stage(run, 'corpus', {}, build)
    (folder/'deep'/'result.txt').write_text('all of it, and a remark')
    stage(run, 'corpus', {}, build)
    assert (folder/'deep'/'result.txt').read_text() == 'all of it'
    assert (tmp_path/runs._DAMAGED/'1'/'deep'/'result.txt').read_text() == 'all of it, and a remark'
    assert str(Path(runs._DAMAGED, '1')) in capsys.readouterr().out


def test_a_stage_with_something_strange_in_it_is_refused(tmp_path):
    run, calls = Run(tmp_path), []
    folder = stage(run, 'corpus', dict(v=1), lambda folder: write_text(folder/'a', 'x'))
    write_text(folder/'notes.txt', 'a remark')
    with pytest.raises(InputError, match='notes.txt in it was not made by scilm'): stage(run, 'corpus', dict(v=2), calls.append)
    with pytest.raises(InputError, match='notes.txt in it was not made by scilm'): Run(tmp_path)
    assert calls == [] and (folder/'a').exists()


def test_a_report_that_somebody_edited_is_not_written_over(tmp_path):
    write_own(tmp_path, 'report.md', 'first')
    write_own(tmp_path, 'report.md', 'second')
    (tmp_path/'report.md').write_text('second, and a remark')
    with pytest.raises(InputError, match='report.md is in the way.*changed'): write_own(tmp_path, 'report.md', 'third')
    assert (tmp_path/'report.md').read_text() == 'second, and a remark'


def test_a_ledger_that_somebody_edited_is_no_proof(tmp_path):
    write_own(tmp_path, 'report.md', 'first')
    (tmp_path/files._LEDGER).write_text((tmp_path/files._LEDGER).read_text().replace('report.md', 'thesis.md'))
    write_text(tmp_path/'thesis.md', 'first')
    with pytest.raises(InputError, match=f'{files._LEDGER} was not made'): write_own(tmp_path, 'thesis.md', 'second')


def test_what_comes_in_while_a_folder_is_made_is_kept(tmp_path, capsys):
    with staged_folder(tmp_path/'out') as folder: write_text(folder/'a', 'old')
    with staged_folder(tmp_path/'out') as folder:
        write_text(folder/'a', 'new')
        write_text(tmp_path/'out'/'thesis.txt', 'years of work')
    assert (tmp_path/'out'/'a').read_text() == 'new' and not (tmp_path/'out'/'thesis.txt').exists()
    assert (tmp_path/'out.kept'/'1'/'thesis.txt').read_text() == 'years of work' and 'out.kept/1' in capsys.readouterr().out


def test_a_folder_of_another_machine_at_work_is_left(tmp_path):
    aside = tmp_path/'.out.1-0123abcd'
    aside.mkdir()
    (aside/files.WORK).write_text(json.dumps(files.hashed(dict(of='out', process=2**22 + 1, machine='another'))))
    with staged_folder(tmp_path/'out') as folder: write_text(folder/'a', 'x')
    assert aside.is_dir()
    (aside/files.WORK).write_text(json.dumps(files.hashed(dict(of='out', process=2**22 + 1, machine=files.platform.node()))))
    with staged_folder(tmp_path/'out') as folder: write_text(folder/'a', 'y')
    assert sorted(os.listdir(tmp_path)) == ['out']


@pytest.mark.parametrize('sources, wanted', [(['data'], 'lies inside'), (['data/out/a'], 'holds'), (['data/out'], 'is'), ([], ''),
                                             (['other'], ''),
                                             (['data/outer'], ''), (['link'], 'lies inside')])
def test_check_apart(tmp_path, monkeypatch, sources, wanted):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path/'data'/'out'/'a', 'x')
    Path('link').symlink_to('data')
    if not wanted: return check_apart('data/out', sources)
    with pytest.raises(InputError, match=f'data/out, {wanted} what is read, {sources[0]};'): check_apart('data/out', sources)


def test_check_free_says_what_is_there(tmp_path):
    assert check_free(tmp_path/'new') == tmp_path/'new' and check_free(tmp_path) == tmp_path
    write_text(tmp_path/'a'/'b', 'x')
    with pytest.raises(InputError, match='is not empty, and a in it was not made by scilm: nothing was touched'): check_free(tmp_path)


# --- writers of the package that are not commands -----------------------------------------------------------------------------------

def test_a_model_is_not_saved_over_another(tmp_path):
    lm = tiny(hidden=32, layers=1)
    save(lm, tmp_path/'model')
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match='holds a model already'): save(lm, tmp_path/'model')
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize('text, refused', [('years of work\n', True), ('{"a": 1}\n{"b": 2}', True), ('[1]\n\n', True),
                                           ('no end', False), ('', False)])
def test_answers_are_added_only_to_a_file_of_answers(tmp_path, text, refused):
    file = tmp_path/'answers.jsonl'
    file.write_text(text)
    if refused:
        with pytest.raises(InputError, match='answers.jsonl holds no answers of a teacher'), appending(file): pass
        assert file.read_text() == text
        return
    for number in (1, 2):
        with appending(file) as append: append(dict(key=str(number), text='heat'))
    file.write_text(file.read_text() + '{"key": "3", "te')  # killed within a line
    with appending(file) as append: append(dict(key='4', text='light'))
    assert sorted(finished(file)) == ['1', '2', '4']
    assert [path.read_text() for path in tmp_path.glob('answers.jsonl.torn-*')] == ([text] if text else [])


def test_a_cache_of_targets_takes_no_folder_of_somebody_else(tmp_path):
    write_text(tmp_path/'shard-00000.bin', 'years of work')
    with pytest.raises(InputError, match='shard-00000.bin in it was not made by scilm'): begin_cache(tmp_path, dict(made={}))
    begin_cache(tmp_path/'new', dict(made={}, shards={}))
    begin_cache(tmp_path/'new', dict(made={}, shards={}))
    assert os.listdir(tmp_path/'new') == ['targets.json']


def test_papermill_may_write_its_notebook_into_the_run_folder(tmp_path):
    write_text(tmp_path/'run.ipynb', '{}')  # papermill writes it, again and again, from the beginning
    small_stage(str(tmp_path))
    assert (tmp_path/'run.ipynb').read_text() == '{}'
