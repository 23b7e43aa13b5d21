"""A world of a few words for tests: sentences, conversations, models that babble, and two processes that work together."""
import copy
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from scilm_adapt.models import LanguageModel, tiny
from scilm_adapt.tokens import encode

WORDS = 'heat light salt iron wave cold warm slow metal field flow air'.split()


def sentence(seed: int, words: int) -> str:
    chosen = np.random.default_rng(seed).choice(WORDS, words)
    return ' '.join(chosen).capitalize() + '.'


def conversation(number: int) -> dict:
    answer = sentence(number + 1000, 3 + number % 5)
    messages = [dict(role='user', content=sentence(number, 4 + number % 3)), dict(role='assistant', content=answer)]
    return dict(paper_id=str(number), kind='explanation', messages=messages, reference=answer, author='paper')


def changed(lm: LanguageModel, **changes) -> LanguageModel:
    lm = replace(lm, tokenizer=copy.deepcopy(lm.tokenizer))
    for name, value in changes.items(): setattr(lm.tokenizer, name, value)
    return lm


def exact(lm: LanguageModel) -> LanguageModel:
    "A copy in 64 bits. There a sum of n numbers is the same in any order up to n*2.2e-16 of their size, on every processor."
    return replace(lm, model=copy.deepcopy(lm.model).double())


BABBLE = ('Heat flows.', 'Light is a wave and a particle, and both of them at once; which of them depends on the question that one asks.',
          'Sound.', 'Salt dissolves in water, and iron does not.', 'Glass breaks.')


def loud(family: str = 'llama', **sizes) -> LanguageModel:
    """An untrained model that does not repeat a single token: its weights are larger than usual.

    In 64 bits, or two words that are nearly equally likely change places where a batch of another shape is added up in another order.
    """
    lm = exact(tiny(BABBLE, family, hidden=32, **sizes))
    for parameter in lm.model.parameters(): parameter.data *= 4
    return lm


def prompts_of(lm: LanguageModel) -> list[list[int]]: return [encode(lm.tokenizer, text) for text in BABBLE]


def two_processes(script: str, *arguments: str | Path) -> None:
    "Run a script with these arguments in two processes that torchrun starts; both have to end well."
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', str(port), script, *arguments]
    settings = os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', ACCELERATE_USE_CPU='true')
    launched = subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True)
    try: told = launched.communicate(timeout=240)[1]
    except subprocess.TimeoutExpired:  # they wait for each other: torchrun ends them when it is asked to
        launched.terminate()
        told = launched.communicate()[1]
    assert launched.returncode == 0, told[-3000:]
