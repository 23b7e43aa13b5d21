"""`nbdev_test`, with each exported cell compiled under the file name and line numbers of the module it becomes.

A stage notebook defines what it exports and asserts on it there and then: the very text that nbdev copies to scilm_adapt/.
Python would call that text `<ipython-input-…>`, and a coverage report would not know it for the lines of scilm_adapt/x.py.
Here a cell whose text stands in a module is compiled as those lines of that module: coverage counts what the notebook ran,
and a traceback points to the line a user has installed. A cell that differs from its module by one character is not counted."""
import gc
import importlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from execnb.shell import CaptureShell
from IPython.core.compilerop import CachingCompiler

PACKAGE = Path(__file__).resolve().parents[1]/'scilm_adapt'
MARKER = re.compile(r'^# %% .*\n', re.MULTILINE)


def shipped_cells(package: Path = PACKAGE) -> dict[str, tuple[str, int]]:
    "Text of every exported cell -> (its module's path, the number of lines above it)."
    cells = {}
    for path in sorted(package.glob('[!_]*.py')):
        text = path.read_text(encoding='utf-8')
        marks = list(MARKER.finditer(text))
        for mark, following in zip(marks, [*marks[1:], None], strict=True):
            cell = text[mark.end():following.start() if following else len(text)].rstrip()
            cells[cell] = (str(path), text.count('\n', 0, mark.end()))
    return cells


class ShippedLines(CachingCompiler):
    "IPython's compiler, which takes a cell's file name and first line from the module that ships the cell."
    cells: dict[str, tuple[str, int]] = {}

    def cache(self, transformed_code, number=0, raw_code=None):
        if (shipped := self.cells.get(transformed_code.rstrip())): return shipped[0]
        return super().cache(transformed_code, number, raw_code)

    def ast_parse(self, source, filename='<unknown>', symbol='exec'):
        lines_above = self.cells.get(source.rstrip(), ('', 0))[1]
        return super().ast_parse('\n'*lines_above + source, filename, symbol)


# Of two processes that share out notebooks, one would end with the longest alone: they come first.
LONG = ['distill', 'contrast', 'preference', 'running', 'rollouts', 'pairs', 'papers', 'report', 'tokens', 'collapse', 'evaluate']


def longest_first(files: Iterable, **how) -> list:
    "As `sorted`, which nbdev_test calls; what is sorted by nothing else are notebooks: the longest first, the others by name."
    def place(path: Path) -> int:
        name = re.sub(r'^\d+_', '', path.stem)
        return LONG.index(name) if name in LONG else len(LONG)
    return sorted(files, **how or dict(key=lambda path: (place(path), path)))


def load_once() -> None:
    "Import what nearly all notebooks import, so that the forked workers have it, and look through it for garbage no more."
    for name in ('torch', 'transformers', 'datasets', 'accelerate', 'pandas', 'scipy.stats'): importlib.import_module(name)
    importlib.import_module('transformers').AutoModelForCausalLM  # noqa: B018, which loads what transformers loads late
    gc.collect()
    gc.freeze()


def main() -> None:
    "Run nbdev_test on the notebooks of this checkout."
    from nbdev import test
    os.environ.setdefault('OMP_NUM_THREADS', '1')      # one worker per core, set before torch is imported
    load_once()
    ShippedLines.cells = shipped_cells()
    CaptureShell.compiler_class = ShippedLines
    test.sorted = longest_first
    test.nbdev_test(timing=True)


if __name__ == '__main__': main()
