"""Faults injected on purpose into a small pipeline over all stages, and whether everything that was promised still holds.

    python tests/faults.py            # a few of each kind, to see that it works
    python tests/faults.py --full     # as many as nbs/results/faults.json reports, which it writes
    python tests/faults.py kill disk  # these kinds only

The processes are real ones, forked from this one once everything is imported, and so are their ends: `kill -9`, signals, a
disk of a few megabytes. One process, one thread, no network, nothing outside a temporary folder."""
import argparse
import hashlib
import io
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='agg')

import datasets  # noqa: F401 - imported once, and not by every process anew
import forks  # noqa: F401, which gives forked processes locks of their own
import numpy as np
import torch
import transformers
import yaml
from safetensors.torch import load_file

import scilm_adapt
from scilm_adapt import collapse, contrast, distill, evaluate, files, instruct, models, recipe, running, runs
from scilm_adapt.checkpoints import Checkpoints
from scilm_adapt.errors import InputError, Stopped, on_signals
from scilm_adapt.files import Damaged, read_json, verified, write_json
from scilm_adapt.models import LanguageModel
from scilm_adapt.papers import prepare
from scilm_adapt.processes import run_script
from scilm_adapt.rollouts import OnPolicy
from scilm_adapt.runs import Run, stage, survey

RESULTS = Path(__file__).resolve().parents[1]/'nbs'/'results'/'faults.json'
STAGES = ['main/corpus', 'main/tokens', 'main/models/contrast', 'main/chats', 'main/models/distilled', 'cached/targets', 'cached/tokens',
          'cached/models/distilled', 'main/evaluation']
RESULT = [*(f'{name}/model.safetensors' for name in STAGES if 'models/' in name), 'main/evaluation/measured.json']
STEPS, SAVES = 5, 2  # steps of each training, and from one checkpoint to the next


# --- a small pipeline -------------------------------------------------------------------------------------------------------------

THINGS = 'heat light sound water iron salt wind glass sand steam'.split()
DOES = 'moves rests grows bends breaks shines cools warms sinks rises'.split()


def write_texts(path: Path, about: str) -> str:
    "A hundred small records about two things each, as JSON Lines."
    with open(path, 'w', encoding='utf-8') as file:
        for one in THINGS:
            for other, does in zip(THINGS, DOES):
                text = (f'In {about} we ask when {one} {does} near {other}. We find that {one} {does} slowly where {other} is cold. '
                        f'Where {other} is warm, {one} hardly {does} at all. This holds for {one} and {other} alike.')
                file.write(json.dumps(dict(title=f'How {one} {does} near {other}', abstract=text)) + '\n')
    return str(path)


@dataclass
class World:
    "What all trials share: texts, two tiny models, and what the run that nobody disturbed came to."
    folder: Path
    chance: np.random.Generator
    papers: str = ''
    tales: str = ''
    student: LanguageModel | None = None
    teacher: LanguageModel | None = None
    whole: str = ''       # the digest of its results
    seconds: float = 0.0  # that it took
    saving: float = 0.0   # seconds that writing a checkpoint took in the middle
    trials: int = 0

    def place(self) -> Path:
        "A new empty folder for a trial."
        self.trials += 1
        (place := self.folder/f'trial-{self.trials:04}').mkdir()
        return place


def pipeline(world: World, folder: Path) -> None:
    "From texts to an evaluation, by way of own answers with a buffer, and of a teacher that is asked once."
    run, student, teacher = Run(folder/'main'), world.student, world.teacher
    corpus = prepare(run, world.papers, world.tales)
    steps = dict(steps=STEPS, batch_size=4, context=128, learning_rate=1e-3)
    contrasted = contrast.train(run, student, corpus, pairs_weight=0.1, **steps)
    chats = instruct.prepare(run, corpus, teacher, conversations=24, teacher_answers=2, held_out=4, context=128)
    policy = OnPolicy(share=0.5, max_new_tokens=6, replay=4)
    distilled = distill.train(run, contrasted, teacher, chats, corpus, on_policy=policy, warm_up=1, probe_every=3,
                           divergence='forward_kl', **steps)
    cached = distill.train(Run(folder/'cached'), contrasted, teacher, chats, corpus, cache=4, probe_every=0, **steps)
    evaluate.compare(run, dict(contrast=contrasted, distilled=distilled, cached=cached), corpus, chats, documents=4, answers=4,
                     max_new_tokens=4, context=128)


def digest(folder: Path) -> str:
    "SHA-256 of all weights and measurements of a run, in one."
    return hashlib.sha256(b''.join(hashlib.sha256((folder/name).read_bytes()).digest() for name in RESULT)).hexdigest()


def rows(folder: Path, deep: bool = False) -> list[dict]:
    "What is in the run folders in there."
    return [row | dict(name=f'{run.name}/{row["name"]}') for run in sorted(folder.iterdir()) if run.is_dir() for row in survey(run, deep)]


def states(folder: Path, deep: bool = False) -> dict[str, str]:
    "Name -> state of their stages."
    return {row['name']: row['state'] for row in rows(folder, deep)}


# --- processes that are ended -----------------------------------------------------------------------------------------------------

class Told(Checkpoints):
    "Checkpoints every few steps, that say on a pipe when one begins and when it is written."
    pipe: int | None = None

    def save(self, done, parts):
        if self.pipe is not None: os.write(self.pipe, b'(')
        start, path = time.perf_counter(), super().save(done, parts)
        if self.pipe is not None: os.write(self.pipe, b')')
        spent.append(time.perf_counter() - start)
        return path


spent: list[float] = []


@dataclass
class Child:
    "A process that works in `folder`; `recognised_by` is read from, and what it prints is in `log`."
    pid: int
    told: int
    log: Path
    code: int | None = None
    text: str = field(default='', repr=False)

    def heard(self, brackets: int, which: bytes) -> bool:
        "Wait until it has said so many of these; whether it did before it ended."
        count = 0
        while count < brackets:
            if not (one := os.read(self.told, 1)): return False
            count += one == which
        return True

    def end(self, number: int | None = None) -> 'Child':
        "Send it a signal, if one is given, and wait for its end, at most two minutes: code is minus the signal that killed it."
        if number: os.kill(self.pid, number)
        patience = time.monotonic() + 120
        while not (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > patience: os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.002)
        self.code, self.text = os.waitstatus_to_exitcode(found[1]), self.log.read_text(errors='replace')
        os.close(self.told)
        return self


def child(world: World, folder: Path, work: Callable | None = None) -> Child:
    "Start the pipeline (or `work()`) in `folder`, in a process that ends as the command does; it has begun when this returns."
    log, (told, tell) = world.folder/f'{folder.name}.log', os.pipe()
    log.write_bytes(b'')
    if pid := os.fork():
        os.close(tell)
        started = Child(pid, told, log)
        started.heard(1, b'!')
        return started
    code = 1
    try:
        os.close(told)
        for number in (1, 2): os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
        with on_signals(running.stop):
            Told.pipe = tell
            os.write(tell, b'!')
            (work or partial(pipeline, world, folder))()
        code = 0
    except InputError as error: print(f'scilm: {error}'); code = 2
    except Stopped as error: code = 128 + error.number
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)


def finishes(world: World, folder: Path, again: Child | None = None) -> str:
    "'' if the same command now goes on to the results of the run that nobody disturbed; else what is wrong."
    again = (again or child(world, folder)).end()
    if again.code: return f'the second run ended with {again.code}: {again.text[-1500:]}'
    if digest(folder) != world.whole: return 'other results'
    wrong = {name: state for name, state in states(folder).items() if state != 'done'}
    return f'not done: {wrong}' if wrong else ''


def undisturbed(world: World) -> None:
    "The run all others are held against, and how long it takes; the results are the same twice."
    world.papers, world.tales = (write_texts(world.folder/f'{name}.jsonl', name) for name in ('papers', 'tales'))
    words = [json.loads(line)['abstract'] for line in Path(world.papers).read_text().splitlines()]
    world.student, world.teacher = (models.tiny(words, 'llama', hidden=hidden, layers=1, context=256) for hidden in (32, 48))
    recipe.Checkpoints = partial(Told, steps=SAVES)
    distill.collapse_monitor = partial(collapse.collapse_monitor, max_new_tokens=8)
    found = []
    for _ in range(2):
        place, start = world.place(), time.perf_counter()
        process = child(world, place)
        begun = []
        while True:  # how long a checkpoint takes
            one = os.read(process.told, 1)
            if not one: break
            if one == b'(': begun.append(time.perf_counter())
            if one == b')': begun[-1] = time.perf_counter() - begun[-1]
        assert process.end().code == 0, process.text
        found.append((digest(place), time.perf_counter() - start, sorted(begun)[len(begun)//2]))
    assert found[0][0] == found[1][0], 'the same run twice gave two results'
    world.whole, world.seconds, world.saving = found[1]


# --- the faults: each gives the number of those that were injected, and what is wrong with the trials that failed ------------------------

def killed(world: World, count: int) -> dict:
    "kill -9 at random times over all stages"
    wrong, inside = [], Counter()
    while sum(inside.values()) < count:
        folder = world.place()
        process = child(world, folder)
        time.sleep(world.chance.uniform(0, 0.98*world.seconds))
        if process.end(signal.SIGKILL).code != -signal.SIGKILL: continue  # it was through
        done = states(folder)
        inside[next((name for name in STAGES if done.get(name) != 'done'), STAGES[-1])] += 1
        if 'broken' in done.values(): wrong.append(f'half a stage: {done}')
        elif said := finishes(world, folder): wrong.append(said)
        shutil.rmtree(folder)
    return dict(injected=count, wrong=wrong, inside={name: inside[name] for name in STAGES if inside[name]})


def killed_saving(world: World, count: int) -> dict:
    "kill -9 while a checkpoint is written"
    wrong, injected, stages = [], 0, [STEPS//SAVES]*3  # checkpoints of each training
    while injected < count:
        folder, number = world.place(), int(world.chance.integers(sum(stages)))
        process = child(world, folder)
        process.heard(number + 1, b'(')
        time.sleep(world.chance.uniform(0, world.saving))
        os.kill(process.pid, signal.SIGKILL)
        if process.heard(1, b')'):
            process.end()
            continue  # it was through
        process.end()
        injected += 1
        first = number in np.cumsum([0, *stages])
        found = [path for path in folder.glob('*/.unfinished/**/step-*') if path.is_dir()]
        if not first and not found: wrong.append('the checkpoint before is gone')
        for path in found:
            try: verified(path, deep=True)
            except Damaged as error: wrong.append(f'half a checkpoint: {error}')
        if said := finishes(world, folder): wrong.append(said)
        shutil.rmtree(folder)
    return dict(injected=injected, wrong=wrong)


def damage(path: Path, how: str, chance: np.random.Generator) -> None:
    "Spoil a file in one of four ways."
    content = bytearray(path.read_bytes())
    if how == 'truncated': os.truncate(path, len(content)//2)
    if how == 'zeroed': path.write_bytes(bytes(len(content)))
    if how == 'deleted': path.unlink()
    if how == 'one bit flipped':
        content[chance.integers(len(content))] ^= 1 << int(chance.integers(8))
        path.write_bytes(content)


HOW = ('truncated', 'zeroed', 'deleted', 'one bit flipped')
FINISHED = {'main/corpus/science/train/*.arrow': '', 'main/chats/train/*.arrow': '', 'main/models/contrast/manifest.json': '',
            'main/models/distilled/model.safetensors': '', 'main/tokens/ids.bin': 'main/models/contrast', 'cached/targets/shard-00000.bin':
            'cached/models/distilled', 'cached/targets/targets.json': 'cached/models/distilled'}  # file -> what is to be made from it again
BEGUN = ('manifest.json', 'rank-00000.json', 'rank-00000.safetensors')


def corrupted(world: World, count: int) -> dict:
    "files truncated, zeroed, deleted, or with one bit flipped"
    wrong, kinds, finished, begun = [], Counter(), world.place(), world.place()
    assert child(world, finished).end().code == 0
    time.sleep(files.SETTLED + 0.1)
    rows(finished)  # so that it is known which files are well, and these are not hashed again
    process = child(world, begun)
    process.heard(4, b')')  # two of the first training, and two of the second
    process.end(signal.SIGKILL)
    trials = [(name, how) for how in HOW for name in (*FINISHED, *BEGUN)]
    for name, how in [trials[n*len(trials)//count] for n in range(count)]:
        kinds[how] += 1
        folder = finished
        if name in BEGUN:
            shutil.copytree(begun, folder := world.place(), dirs_exist_ok=True)
            file = max(folder.glob('main/.unfinished/models/distilled-*/step-*'))/name
        else: file, = folder.glob(name)
        damage(file, how, world.chance)
        if name in FINISHED:
            reasons = [row['reason'] for row in rows(folder) if row['state'] == 'broken']
            named = Path(*file.relative_to(folder).parts[1:]).as_posix()
            if not any(named in reason for reason in reasons): wrong.append(f'{name} {how}: not seen, {reasons}')
            if FINISHED[name]: shutil.rmtree(folder/FINISHED[name])
        said = finishes(world, folder, again := child(world, folder))
        words = [line for line in again.text.splitlines() if file.name in line and ('made anew' in line or 'set aside' in line)]
        if said or not words: wrong.append(f'{name} {how}: {said or "not named"}')
    return dict(injected=count, wrong=wrong, kinds=dict(kinds))


def spoilt(module: object, loss: str, step: int, how: str) -> None:
    "From now on the loss of a stage is NaN or infinite at a step, or its gradient is NaN."
    maker, real = module.batch_maker, getattr(module, loss)
    def batch_maker(*arguments, **options):
        batch_at = maker(*arguments, **options)
        return lambda number: batch_at(number) | dict(spoilt=torch.tensor(number == step))
    def loss_maker(*arguments, **options):
        usual = real(*arguments, **options)
        def of(model, batch):
            values = usual(model, batch)
            if not batch['spoilt']: return values
            value = values['loss']
            if how == 'gradient': value.register_hook(lambda gradient: gradient*torch.nan)
            return values | dict(loss=value if how == 'gradient' else value*float(how))
        return of
    module.batch_maker = batch_maker
    setattr(module, loss, loss_maker)


def bad_numbers(world: World, count: int) -> dict:
    "a loss that is NaN or infinite, or a gradient that is NaN, at a step"
    wrong, parts = [], [(contrast, 'contrast_loss', 'contrast', 0), (distill, 'distil_loss', 'distil', 1)]
    for n in range(count):
        module, loss, stage_name, least = parts[n % 2]
        how, step, folder = ('nan', 'inf', 'gradient')[n % 3], int(world.chance.integers(least, STEPS)), world.place()
        def work(module=module, loss=loss, step=step, how=how, folder=folder):
            spoilt(module, loss, step, how)
            pipeline(world, folder)
        process = child(world, folder, work).end()
        if process.code in (0, None) or f'{stage_name}: step {step} gave' not in process.text or 'its records: ' not in process.text:
            wrong.append(f'{how} at step {step} of {stage_name}: ended with {process.code}: {process.text[-500:]}')
        for path in folder.rglob('*.safetensors'):
            if not all(tensor.isfinite().all() for tensor in load_file(path).values() if tensor.is_floating_point()):
                wrong.append(f'{path} is not finite')
        if said := finishes(world, folder): wrong.append(said)
        shutil.rmtree(folder)
    return dict(injected=count, wrong=wrong)


def terminated(world: World, count: int) -> dict:
    "SIGTERM at random times"
    wrong, injected = [], 0
    while injected < count:
        folder = world.place()
        process = child(world, folder)
        time.sleep(world.chance.uniform(0, 0.95*world.seconds))
        if process.end(signal.SIGTERM).code == 0: continue  # it was through
        injected += 1
        if process.code != 143: wrong.append(f'ended with {process.code}: {process.text[-500:]}')
        done = states(folder)
        number = next((n for n, name in enumerate(STAGES) if done.get(name) != 'done'), len(STAGES))
        if later := [name for name in STAGES[number:] if done.get(name) == 'done']: wrong.append(f'{later} without {STAGES[number]}')
        if number < len(STAGES):
            try:
                stage(Run(folder/'main'), 'below', {}, lambda folder: None, [folder/STAGES[number]])
                wrong.append(f'something was built on {STAGES[number]}')
            except InputError: pass
        if said := finishes(world, folder): wrong.append(said)
        shutil.rmtree(folder)
    return dict(injected=injected, wrong=wrong)


@contextmanager
def small_disk(world: World, size: int = 2**26):
    "A folder on a disk of so many bytes; None where this is not allowed."
    (place := world.folder/'disk').mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', place]
    mounted = bool(shutil.which('mount')) and subprocess.run(command, capture_output=True).returncode == 0
    try: yield place if mounted else None
    finally:
        if mounted: subprocess.run(['umount', place], check=True)


def disk_full(world: World, count: int) -> dict:
    "a disk that is full after so many bytes"
    wrong, injected = [], 0
    with small_disk(world) as disk:
        if disk is None: return dict(injected=0, wrong=[], skipped='mounting a small disk is not allowed here')
        folder, ballast = disk/'run', disk/'ballast'
        def free() -> int: return os.statvfs(disk).f_bavail*os.statvfs(disk).f_frsize
        empty = free()
        assert child(world, folder).end().code == 0
        needed = empty - free()
        for size in np.linspace(0.1, 0.9, count)*needed:
            shutil.rmtree(folder)
            with open(ballast, 'wb') as file: os.posix_fallocate(file.fileno(), 0, int(empty - size))
            process = child(world, folder).end()
            if process.code == 0: continue
            injected += 1
            last = process.text.splitlines()[-1]
            if process.code != 2 or str(folder) not in last or 'bytes' not in last or 'free' not in last:
                wrong.append(f'ended with {process.code}: {process.text[-1500:]}')
            if 'broken' in (found := states(folder, deep=True)).values(): wrong.append(f'half a stage: {found}')
            ballast.unlink()
            if said := finishes(world, folder): wrong.append(said)
    return dict(injected=injected, wrong=wrong)


BATCH = '''import os, signal, threading, time
from pathlib import Path
from scilm_adapt.files import write_text
from scilm_adapt.runs import Run, stage
def end(): {end}
'''
ENDS = {'kernel killed': 'os.kill(os.getpid(), signal.SIGKILL)', 'cell failing': 'raise ValueError("no")',
        'cell interrupted': 'os.kill(os.getpid(), signal.SIGINT); time.sleep(5)'}
CODES = {'kernel killed': 1, 'cell failing': 1, 'cell interrupted': 130}


def notebooks(world: World, count: int) -> dict:
    "a kernel killed, a cell failing, a cell interrupted"
    wrong, kinds = [], Counter()
    for n in range(count):
        how, at, folder = [*ENDS][n % 3], int(world.chance.integers(1, 5)), world.place()
        sources = ['steps: int = 1  # any', BATCH.format(end=ENDS[how]), *(f"stage(Run(Path(out_dir)), 'part-{k}', {{}}, lambda folder: "
                   f"write_text(folder/'x', 'x'))" + ('\nend()' if k == at else '') for k in range(1, 5)), f"print('{running.SENTINEL}')"]
        sources[0] += "\nout_dir: str = 'x'  # where"
        parts = [dict(cell_type='code', id=f'c{k}', execution_count=None, outputs=[], source=source,
                      metadata=dict(tags=['parameters'] if k == 0 else [])) for k, source in enumerate(sources)]
        about = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
        (notebook := folder/'small.ipynb').write_text(json.dumps(dict(cells=parts, metadata=about, nbformat=4, nbformat_minor=5)))
        before = 'an earlier success' if n % 2 else None
        if before: files.write_own(Run(folder/'out').folder, 'run.ipynb', before)
        process = child(world, folder, partial(running.run_notebook, notebook, dict(out_dir=str(folder/'out')), folder/'out')).end()
        kinds[how] += 1
        if process.code != CODES[how]: wrong.append(f'{how}: ended with {process.code}: {process.text[-500:]}')
        there = folder/'out'/'run.ipynb'
        if (there.read_text() if there.exists() else None) != before: wrong.append(f'{how} in part {at}: published')
        if not (folder/'out'/'run.failed.ipynb').exists(): wrong.append(f'{how} in part {at}: no notebook of the failure')
        if [row for row in survey(folder/'out') if int(row['name'][5:]) > at]: wrong.append(f'{how} in part {at}: a later cell ran')
        shutil.rmtree(folder)
    return dict(injected=count, wrong=wrong, kinds=dict(kinds))


def no_network(world: World, count: int) -> dict:
    "a run without any network"
    wrong, folder = [], world.place()
    command = [sys.executable, __file__, '--alone', str(world.folder), str(folder)]
    apart = next((way for way in (['unshare', '-n'], ['unshare', '-rn']) if shutil.which('unshare') and
                  subprocess.run([*way, 'true'], capture_output=True).returncode == 0), [])
    done = subprocess.run([*apart, *command], capture_output=True, text=True)
    if done.returncode: wrong.append(done.stderr[-1500:])
    elif digest(folder) != world.whole: wrong.append('other results')
    return dict(injected=1, wrong=wrong, how='network namespace of its own' if apart else 'sockets refused')


def alone(folder: Path, place: Path) -> None:
    "The pipeline in a process in which no socket can be opened but those that join processes of this machine by a file."
    import socket
    class Refused(socket.socket):
        def connect(self, address):
            if self.family != socket.AF_UNIX: raise OSError(f'no network: {address}')
            return super().connect(address)
    socket.socket = Refused
    world = World(folder, np.random.default_rng(0), str(folder/'papers.jsonl'), str(folder/'tales.jsonl'))
    words = [json.loads(line)['abstract'] for line in Path(world.papers).read_text().splitlines()]
    world.student, world.teacher = (models.tiny(words, 'llama', hidden=hidden, layers=1, context=256) for hidden in (32, 48))
    distill.collapse_monitor = partial(collapse.collapse_monitor, max_new_tokens=8)
    pipeline(world, place)


@contextmanager
def timed(seconds: Counter):
    "Within the block the time that goes into checkpoints, hashes and the disk is counted, once where one calls the other."
    depth = []
    def count(module, name):
        real = getattr(module, name)
        def counting(*arguments, **options):
            start = time.perf_counter()
            depth.append(name)
            try: return real(*arguments, **options)
            finally:
                depth.pop()
                if not depth: seconds[name] += time.perf_counter() - start
        setattr(module, name, counting)
        undo.callback(setattr, module, name, real)
    with ExitStack() as undo:
        count(Checkpoints, 'save')
        for module, name in ((runs, 'seal'), (runs, 'verified'), (runs, 'key_of'), (files, 'sync')): count(module, name)
        yield


def toy_run(folder: Path, changes: dict) -> None:
    "Execute run.ipynb in this process, with the parameters of the toy preset and these changes of them."
    nbs = RESULTS.parents[1]
    toy = yaml.safe_load((nbs/'presets'/'toy.yaml').read_text(encoding='utf-8'))
    run_script(nbs/'run.ipynb', toy | dict(out_dir=str(folder)) | changes)


def cost(world: World, count: int) -> dict:
    "what checkpoints and hashes cost in the run of the toys, and what a stage costs that is done"
    folder, seconds, wrong = world.place()/'toys', Counter(), []
    short = {'contrast.steps': 2, 'distil.steps': 2}
    changes = {} if count > 1 else short | dict(papers=world.papers, general=world.tales, conversations=20, teacher_answers=2, documents=4,
                                                questions=4)
    recipe.Checkpoints = Checkpoints  # as often as usual
    with timed(seconds), open(os.devnull, 'w') as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        start = time.perf_counter()
        toy_run(folder, changes)
        whole = time.perf_counter() - start
    recipe.Checkpoints = partial(Told, steps=SAVES)
    again = []
    for _ in range(5):
        config, start = read_json(folder/'models'/'contrast'/'manifest.json')['config'], time.perf_counter()
        with redirect_stdout(io.StringIO()): stage(Run(folder), 'models/contrast', config, None, [folder/'corpus'])
        again.append(time.perf_counter() - start)
    share = sum(seconds.values())/whole
    if share > 0.03 and count > 1: wrong.append(f'{share:.1%} of the time')
    if sorted(again)[2] > 0.2: wrong.append(f'{sorted(again)[2]:.3f} s for a stage that is done')
    return dict(wrong=wrong, share=round(share, 4), seconds=round(whole, 1), done=round(sorted(again)[2], 4),
                parts={name: round(value, 3) for name, value in seconds.items()})


FAULTS = dict(kill=killed, saving=killed_saving, corruption=corrupted, numbers=bad_numbers, sigterm=terminated, disk=disk_full,
              notebook=notebooks, network=no_network, cost=cost)
FULL = dict(kill=100, saving=50, corruption=40, numbers=20, sigterm=20, disk=10, notebook=15, network=1, cost=2)
BRIEF = dict(kill=3, saving=1, corruption=3, numbers=1, sigterm=1, disk=1, notebook=3, network=1, cost=1)


def main() -> int:
    "Inject, tell, and give the exit code 1 if anything did not hold."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('kinds', nargs='*', metavar='KIND', help=f'what to inject (default: all): {", ".join(FAULTS)}')
    parser.add_argument('--full', action='store_true', help=f'as many as are reported; writes nbs/results/{RESULTS.name}')
    parser.add_argument('--share', type=float, default=1.0, help='of the full counts, such as 0.1')
    parser.add_argument('--seed', type=int, default=0, help='of the times and places')
    parser.add_argument('--out', type=Path, help='a JSON file for the result')
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = options.out or (RESULTS if options.full else None)
    counts = {name: math.ceil(options.share*count) for name, count in FULL.items()} if options.full else BRIEF
    found = read_json(out)['faults'] if options.kinds and out and out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), np.random.default_rng(options.seed))
        undisturbed(world)
        print(f'undisturbed: {world.seconds:.2f} s, a checkpoint {1000*world.saving:.1f} ms, results {world.whole[:12]}', flush=True)
        for name in options.kinds or FAULTS:
            start, result = time.perf_counter(), FAULTS[name](world, counts[name])
            wrong = result.pop('wrong')
            result |= dict(what=FAULTS[name].__doc__, took=round(time.perf_counter() - start, 1))
            if 'injected' in result: result['survived'] = result['injected'] - len(wrong)
            found[name] = result
            print(f'{name}: ' + ', '.join(f'{key} {value}' for key, value in result.items()), *wrong, sep='\n  ', flush=True)
            if wrong: found[name]['wrong'] = [line.replace(folder, '…')[:300] for line in wrong]
            if out: write_json(out, about_this(world) | dict(faults=found))
    return int(any('wrong' in result for result in found.values()))


def about_this(world: World) -> dict:
    "When, where and with what the faults were injected."
    return dict(date=datetime.now(UTC).date().isoformat(), system=f'{platform.system()}, {platform.machine()}, {os.cpu_count()} cores',
                versions=dict(scilm_adapt=scilm_adapt.__version__, python=platform.python_version(), torch=torch.__version__,
                              transformers=transformers.__version__), pipeline_seconds=round(world.seconds, 2))


if __name__ == '__main__':
    if sys.argv[1:2] == ['--alone']:
        torch.set_num_threads(1)
        sys.exit(alone(Path(sys.argv[2]), Path(sys.argv[3])))
    sys.exit(main())
