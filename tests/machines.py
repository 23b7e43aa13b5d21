"""The tests and the notebooks as other machines compute: `python tests/machines.py [SETTING …] [-- what pytest gets]`, then a table.

Each setting sets what decides the order in which numbers are added, or the precision, before torch is loaded: threads, vector units,
the library for products of matrices. Two more stand for machines that cannot be had by a setting. `bf16` is told that this processor
multiplies in 16 bits, as some Xeons do, and then it does so, slowly. `sums` adds up products of matrices in another order for each
shape of a batch and for every second row, as blocked kernels do; a comparison that holds only for one order fails there."""
import importlib.abc
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = dict(
    as_it_is={},
    one_thread=dict(OMP_NUM_THREADS='1'),
    two_threads=dict(OMP_NUM_THREADS='2'),
    aten_default=dict(ATEN_CPU_CAPABILITY='default'),
    aten_avx2=dict(ATEN_CPU_CAPABILITY='avx2'),
    onednn_avx2=dict(ONEDNN_MAX_CPU_ISA='AVX2'),
    onednn_sse41=dict(ONEDNN_MAX_CPU_ISA='SSE41'),
    blas=dict(MKL_CBWR='COMPATIBLE', OPENBLAS_CORETYPE='Nehalem'),
    bf16={},
    sums={})


# --- in the processes under test --------------------------------------------------------------------------------------------------

def bf16(torch) -> None:
    "Say that this processor multiplies in 16 bits."
    torch.cpu._is_amx_tile_supported = lambda: True


def sums(torch) -> None:
    "Add up products of matrices in an order of their own for each shape, and in the usual one in every second row."
    def product(op: str) -> Callable:
        plain = getattr(torch.ops.aten, op).out
        def one(a, b):
            found = plain(a, b, out=a.new_empty(*a.shape[:-1], b.shape[-1]))
            if not a.is_floating_point() or not found.numel() or a.shape[-1] < 2: return found
            chance = torch.Generator().manual_seed(hash((*a.shape, *b.shape)) % 2**32)
            order = torch.randperm(a.shape[-1], generator=chance)
            other = plain(a[..., order].contiguous(), b[..., order, :].contiguous(), out=torch.empty_like(found))
            found[..., ::2, :] = other[..., ::2, :]
            return found
        return one
    mm, bmm = product('mm'), product('bmm')
    def addmm(bias, a, b, *, beta=1, alpha=1): return beta*bias + alpha*mm(a, b)
    def baddbmm(bias, a, b, *, beta=1, alpha=1): return beta*bias + alpha*bmm(a, b)
    torch.machines = library = torch.library.Library('aten', 'IMPL')  # it holds as long as it is kept
    for name, kernel in dict(mm=mm, bmm=bmm, addmm=addmm, baddbmm=baddbmm).items(): library.impl(name, kernel, 'CPU')
    torch.backends.cuda.enable_flash_sdp(False)                      # attention as such products, on the processor too


class Hook(importlib.abc.MetaPathFinder):
    "Calls `change(torch)` as soon as torch has been imported, and imports nothing by itself."
    def __init__(self, change: Callable): self.change = change

    def find_spec(self, name, path=None, target=None):
        if name != 'torch': return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            self.change(module)
        spec.loader.exec_module = exec_module
        return spec


SITE = '''import importlib.util, sys
spec = importlib.util.spec_from_file_location('scilm_machines', {file!r})
spec.loader.exec_module(machines := importlib.util.module_from_spec(spec))
sys.meta_path.insert(0, machines.Hook(machines.{name}))
'''


# --- from outside -----------------------------------------------------------------------------------------------------------------

def run(command: list[str], setting: str, hooks: Path) -> tuple[str, float]:
    "The output of a command under a setting, and its seconds."
    settings = {name: value for name, value in os.environ.items() if not any(name in one for one in SETTINGS.values())}
    if setting in ('bf16', 'sums'):
        (hooks/'sitecustomize.py').write_text(SITE.format(file=__file__, name=setting), encoding='utf-8')
        settings['PYTHONPATH'] = os.pathsep.join(filter(None, [str(hooks), os.environ.get('PYTHONPATH')]))
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=settings | SETTINGS[setting], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout, time.monotonic() - start


def main(arguments: list[str]) -> int:
    "Run what is asked under each setting; the exit code is 1 if anything failed."
    cut = arguments.index('--') if '--' in arguments else len(arguments)
    chosen, asked = arguments[:cut] or [*SETTINGS], arguments[cut + 1:]
    if unknown := set(chosen) - set(SETTINGS): sys.exit(f'{", ".join(unknown)}: no such setting; there are {", ".join(SETTINGS)}.')
    tests = [sys.executable, '-m', 'pytest', *(asked or ['-n', '2', '--dist', 'loadfile', '--no-loadscope-reorder'])]
    rows, failures = [], []
    with tempfile.TemporaryDirectory() as hooks:
        for setting in chosen:
            said, seconds = run(tests, setting, Path(hooks))
            counts = {word: int(number) for number, word in re.findall(r'(\d+) (passed|failed|error)', said.splitlines()[-1])}
            wrong = re.findall(r'^(?:FAILED|ERROR) (\S+)', said, re.MULTILINE)
            if not counts and not wrong: wrong = [f'no count of tests was printed: {said[-500:]}']  # killed, or told to say less
            if not asked:
                told, more = run([sys.executable, 'tests/run_notebooks.py'], setting, Path(hooks))
                wrong, seconds = wrong + re.findall(r'^\t(\S+\.ipynb)$', told, re.MULTILINE), seconds + more
                if 'Success' not in told and not wrong: wrong = [told[-500:]]
            failures += [f'{setting}: {name}' for name in wrong]
            rows.append(f'{setting:14} {counts.get("passed", 0):7} {len(wrong):7} {seconds:8.0f} s')
            print(rows[-1], *failures[len(failures) - len(wrong):], sep='\n  ', flush=True)
    print(f'\n{"setting":14} {"passed":>7} {"failed":>7} {"seconds":>10}', *rows, sep='\n')
    return bool(failures)


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
