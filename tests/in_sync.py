"""Do the generated files say what the notebooks say? Export, clean and badge a copy, and compare: `python tests/in_sync.py`.

The check works in a copy, so it changes nothing, needs no git and does not mind uncommitted work."""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAY_OUT = '`make export` writes them from the notebooks; look at the difference, then commit.'


def copy_sources(root: Path, copy: Path) -> None:
    "Copy to `copy` what the generators read and write, without the modules: a module no notebook exports must not survive."
    shutil.copytree(root/'nbs', copy/'nbs', symlinks=True, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    (copy/'scilm_adapt').mkdir()
    for name in ('settings.ini', 'README.md', '_quarto.yml', 'scilm_adapt/__init__.py', 'scilm_adapt/__main__.py'):
        if (root/name).exists(): shutil.copy2(root/name, copy/name)


def generated(root: Path) -> dict[str, bytes]:
    "Bytes of every file the generators write, by its path below `root`."
    paths = [*root.glob('nbs/*.ipynb'), *root.glob('scilm_adapt/*.py'), root/'README.md']
    return {str(p.relative_to(root)): p.read_bytes() for p in paths if p.exists()}


def generate(root: Path) -> None:
    "What `make export` does, in `root`."
    tools = Path(sys.executable).parent
    for command in ([sys.executable, 'nbs/_render/badges.py'], [tools/'nbdev_export'], [tools/'nbdev_clean']):
        subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL)


def expected(root: Path) -> dict[str, bytes]:
    "What `generated` gives where every file below `root` says what its notebook says."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_sources(root, copy)
        generate(copy)
        return generated(copy)


def out_of_sync(root: Path, want: dict[str, bytes]) -> list[str]:
    "One line for each file below `root` that differs from what is wanted."
    have = generated(root)
    notes = [(name, 'missing' if name not in have else 'no notebook exports it' if name not in want else 'differs')
             for name in sorted(have.keys() | want.keys()) if have.get(name) != want.get(name)]
    return [f'{name}: {note}' for name, note in notes]


if __name__ == '__main__':
    if lines := out_of_sync(ROOT, expected(ROOT)):
        sys.exit('\n'.join(['Out of step with the notebooks:', *(f'  {line}' for line in lines), WAY_OUT]))
    print('generated files say what the notebooks say')
