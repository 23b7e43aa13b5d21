"""What the contestants of steps.py and reading.py have in common: models, memory, turns, and a step of TRL's trainers."""
import gc
import inspect
import json
import random
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from transformers.utils import logging as transformers_logging

from scilm_adapt.files import staged_folder, write_json
from scilm_adapt.models import LanguageModel, build, load, parameter_count, save
from scilm_adapt.tokens import train_tokenizer

# (hidden, layers, heads); 'large' is the model of at least 5 million weights whose steps are held against the machine.
FULL = dict(vocabulary=8192, student=(192, 4, 4), teacher=(384, 6, 6), large=(256, 5, 4), rows=16, prompt=32, answer=96)
# A student of the shape of SmolLM2-135M and a teacher as large; four of five tokens are papers to be read, which are not learnt.
REAL = dict(vocabulary=49152, student=(576, 30, 9), teacher=(576, 30, 9), rows=4, prompt=400, answer=100)
SMALL = dict(vocabulary=400, student=(32, 2, 4), teacher=(48, 2, 4), large=(40, 2, 4), rows=4, prompt=8, answer=8)
WARM = 2  # rounds that are not counted


# --- models

def prepare(folder: Path, small: bool = False, real: bool = False) -> dict:
    """Write the models with random weights and a tokenizer of the wished size; returns their numbers of weights.

    `real` are others, in a folder of that name: of the shape of a real model or, if `small`, with as few tokens to learn as there.
    """
    shapes, draw = SMALL if small else FULL, random.Random(0)
    if real: folder, shapes = folder/'real', SMALL | dict(prompt=16, answer=4) if small else REAL
    words = [''.join(draw.choices('etaoinshrdlu', k=draw.randint(2, 9))) for _ in range(80_000)]
    tokenizer = train_tokenizer((' '.join(words[at:at + 200]) for at in range(0, len(words), 200)), min(8192, shapes['vocabulary']))
    sizes = {}
    for seed, name in enumerate(one for one in ('student', 'teacher', 'large') if one in shapes):
        hidden, layers, heads = shapes[name]
        lm = build(tokenizer, 'llama', hidden, layers, heads, 512, seed)
        if shapes['vocabulary'] > len(tokenizer): lm.model.resize_token_embeddings(shapes['vocabulary'])  # words that nobody says
        with staged_folder(folder/name) as aside: save(lm, aside)  # those of an earlier call are replaced
        sizes[name] = parameter_count(lm.model)
    write_json(folder/'shapes.json', shapes)
    return sizes


def open_model(folder: Path, name: str) -> LanguageModel:
    "A model that no token ends, so that all answers come out equally long."
    lm = load(folder/name, 'cpu')
    lm.model.generation_config.eos_token_id = None
    return lm


# --- what a fresh process needs

def resident() -> int:
    "Bytes of memory that this process has now."
    return psutil.Process().memory_info().rss


def highest() -> int:
    "The most bytes that this process has had (on Linux in kilobytes)."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform == 'darwin' else 1024)


class Peak:
    "MiB that a block needs at its highest over what there was before it: `with Peak() as peak: ...; peak.MiB`."

    def __enter__(self):
        gc.collect()
        try: Path('/proc/self/clear_refs').write_text('5')  # on Linux, the high-water mark of before is forgotten
        except OSError: pass
        self.before = resident()
        return self

    def __exit__(self, *_):
        status = Path('/proc/self/status')
        lines = status.read_text().splitlines() if status.exists() else []
        most = next((int(line.split()[1])*1024 for line in lines if line.startswith('VmHWM:')), highest())
        self.MiB = max(most - self.before, 4096)/2**20  # a page at least: what is small may fit into what was there already


def summary(seconds: dict[str, list[float]], **more) -> dict:
    "Median seconds of each, over the rounds that count."
    return dict(seconds={name: statistics.median(times[WARM:] or times) for name, times in seconds.items()}, rounds=seconds, **more)


def in_turns(others: dict[str, Callable[[], float]], ours: Callable[[Callable[[int], None]], list[float]] | None, rounds: int,
             steps: int = 1) -> dict:
    """Rounds of the contestants in turn, the order of the others changing from round to round; see `contest`.

    Each of `others` does a round and returns its loss. `ours(before)` trains for all rounds, of `steps` steps each, calls `before(step)`
    ahead of each step, and returns the losses of its rounds; between two of its rounds everybody else has a turn. None leaves it out.
    """
    names, begun = (['ours'] if ours else []) + list(others), [0.0]
    seconds, losses = {name: [] for name in names}, {name: [] for name in names}
    def turns(number: int) -> None:
        for name in list(others)[::1 if number % 2 else -1]:
            start = time.perf_counter()
            losses[name].append(others[name]())
            seconds[name].append(time.perf_counter() - start)
    def before(step: int) -> None:
        if step % steps: return
        if step: seconds['ours'].append(time.perf_counter() - begun[0])
        turns(step//steps)
        begun[0] = time.perf_counter()
    with Peak() as peak:
        if ours: losses['ours'] = ours(before)
        else: [turns(number) for number in range(WARM + rounds)]
    if ours: seconds['ours'].append(time.perf_counter() - begun[0])
    return summary(seconds, loss=losses, MiB=peak.MiB)


# --- TRL's trainers

def trl_settings(kind: type, precision: str, rows: int, **settings) -> object:
    "A trainer's configuration with what all contestants have in common."
    wanted = dict(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows, learning_rate=0.0, bf16=precision == 'bf16', fp16=False,
                  gradient_checkpointing=False, use_cpu=True, report_to='none', disable_tqdm=True, beta=0.5, temperature=1.0,
                  optim='adamw_torch_fused', max_grad_norm=1.0) | settings
    known = inspect.signature(kind).parameters
    return kind(**{name: value for name, value in wanted.items() if name in known})


def trl_step(trainer: object) -> Callable[[object, torch.Tensor | None], float]:
    "A step of a trainer, as a function of a batch and the number of its targets that returns the loss."
    trainer.create_optimizer()
    trainer.model_wrapped, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # which `Trainer.train` would say
    def step(inputs: object, count: torch.Tensor | None) -> float:
        loss = trainer.training_step(trainer.model_wrapped, inputs.copy(), count)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        trainer.model.zero_grad()
        return float(loss)
    return step


# --- a process

def main(known: dict[str, Callable[..., dict]], what: str, folder: str, settings: str = '{}') -> None:
    "Run one of the `known` functions and print what it returns."
    warnings.simplefilter('ignore')
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print(json.dumps(known[what](Path(folder), **json.loads(settings))))
