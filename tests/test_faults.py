"""A few of the faults of tests/faults.py, on every change; `make faults` injects as many as the documentation reports."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KINDS = ['kill', 'saving', 'corruption', 'numbers', 'sigterm', 'disk', 'notebook', 'network']


@pytest.fixture(scope='module')
def apart() -> list[str]:
    "What starts a process without a network, where that is allowed."
    for way in (['unshare', '-n'], ['unshare', '-rn']):
        if shutil.which('unshare') and subprocess.run([*way, 'true'], capture_output=True).returncode == 0: return way
    return []


def test_a_few_faults_of_each_kind_are_survived_without_a_network(apart, tmp_path):
    "Kernels want a local network; tests/test_cli.py kills and interrupts them."
    asked = ['kill', 'saving', 'corruption', 'numbers', 'sigterm', 'disk', 'cost']
    plain = {name: value for name, value in os.environ.items() if not name.startswith('COVERAGE')}  # it handles SIGTERM itself
    done = subprocess.run([*apart, sys.executable, ROOT/'tests'/'faults.py', *asked, '--out', tmp_path/'found.json'], env=plain,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads((tmp_path/'found.json').read_text())['faults']
    assert list(found) == asked and all(one['survived'] == one['injected'] for name, one in found.items() if name != 'cost')
    assert all(found[name]['injected'] for name in ('kill', 'saving', 'corruption', 'numbers', 'sigterm'))
    if 'skipped' in found['disk']: print(found['disk']['skipped'])


def test_what_is_reported_was_injected_and_survived():
    about = json.loads((ROOT/'nbs'/'results'/'faults.json').read_text(encoding='utf-8'))
    assert about['faults'].keys() == {*KINDS, 'cost'} and not [one for one in about['faults'].values() if 'wrong' in one]
    least = dict(kill=100, saving=50, corruption=40, numbers=20, sigterm=20, disk=10, notebook=15, network=1)
    assert all(about['faults'][name]['survived'] == about['faults'][name]['injected'] >= count for name, count in least.items())
    assert about['faults']['cost']['share'] <= 0.03 and about['faults']['cost']['done'] < 0.2
    assert re.fullmatch(r'\d{4}-\d\d-\d\d', about['date']) and about['versions'].keys() >= {'torch', 'transformers', 'python'}
