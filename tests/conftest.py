"""What every test needs: no network, no display, reproducible examples, and where the checkout is."""
import gc
import os
import signal
import sys
from pathlib import Path

# Before anything imports torch, transformers or matplotlib; the subprocesses that tests start inherit them.
os.environ.update(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='agg')
# One test runs on each core, so a second thread of a subprocess has none to run on: whoever waits for it would spin.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

# What a shell starts in the background ignores Ctrl-C, and so would all processes that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)

import forks  # noqa: F401, which gives forked processes locks of their own
import pytest
from hypothesis import HealthCheck, settings

# The same examples on every machine, and no deadline: CI shares its cores with others.
settings.register_profile('house', derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('house')


# Of two processes that share out files, one would end with the longest alone: they come first (with --no-loadscope-reorder).
LONG = ['test_pipeline', 'test_together', 'test_cli', 'test_files', 'test_instruct', 'test_endpoint', 'test_distill', 'test_benchmark',
        'test_site', 'test_house', 'test_alignment', 'test_faults', 'test_training']


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "The files that take longest first, the others as they were."
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_collection_finish() -> None:
    """What is loaded by now stays. It is half a million objects, and every full collection of garbage would look through them for half a
    second; in forked processes that also copies the memory they lie in."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope='session')
def root() -> Path:
    "The checkout: the folder that holds settings.ini."
    return Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_figure_is_left():
    "What a test draws is its own: the next one finds no open figure, whichever ran before it in this process."
    yield
    if 'matplotlib.pyplot' in sys.modules: sys.modules['matplotlib.pyplot'].close('all')
