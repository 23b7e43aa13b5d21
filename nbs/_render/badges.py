"""What stands in several places, written from one: `make export` runs this.

The Colab badge and install cell of every notebook and the badges of README.md come from settings.ini, the map of the notebooks in
README.md and on the index page from the sidebar in _quarto.yml.
"""
import json
import re
from configparser import ConfigParser
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
BLOCK = '<!-- {0}: written by nbs/_render/badges.py -->\n{1}\n<!-- /{0} -->'
# A section of the sidebar, and what happens there. A notebook imports from wings before its own, and from lower numbers of its own.
WINGS = {
    'Core': 'what a person is told, folders that are whole or not there and nothing of yours ever touched, and how sure a number is',
    'Papers': 'every form that papers come in, every kind of dirt, every record accounted for',
    'Language models': 'tokens, models of many families, exact checkpoints, one loop of training, one way to make a stage, and writing',
    'Contrast': 'stage 1: reading papers, with contrasts between tokens, texts and ways to go on',
    'Conversations': 'questions and answers out of papers that nobody has labelled',
    'Distillation': 'stage 2: how far student and teacher are apart, teachers of all kinds, what is checked and watched, and learning',
    'Evidence': 'the proof: numbers, intervals, figures, model cards',
    'Command': 'notebooks run in batch, and the `scilm` command',
    'Runs': 'to run: the pipeline, a kind of your own, real papers, methods compared, speed, faults, and how the models here were made'}


def settings(root: Path = ROOT) -> dict[str, str]:
    "The values of settings.ini."
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    return dict(ini['DEFAULT'])


def colab_badge(cfg: dict[str, str], notebook: str) -> str:
    "Markdown of the badge that opens nbs/`notebook` in Colab; `git_url` is https://github.com/USER/REPO."
    path = cfg['git_url'].removeprefix('https://github.com/')
    return ('[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]'
            f"(https://colab.research.google.com/github/{path}/blob/{cfg['branch']}/nbs/{notebook})")


def install_cell(cfg: dict[str, str]) -> str:
    "Code that installs the package in Colab and does nothing elsewhere (two lines: the one-line form is no Python)."
    return f"#| hide\nif 'google.colab' in str(get_ipython()):\n    %pip install -q git+{cfg['git_url']}"


def readme_badges(cfg: dict[str, str]) -> str:
    "Markdown of the badges for tests, coverage, site and Colab."
    git, site = cfg['git_url'], cfg['doc_host'] + cfg['doc_baseurl']
    coverage = f'https://img.shields.io/endpoint?url={site}/coverage.json'
    return '\n'.join([f'[![tests]({git}/actions/workflows/test.yaml/badge.svg)]({git}/actions/workflows/test.yaml)',
                      f'[![coverage]({coverage})]({git}/actions/workflows/test.yaml)',
                      f'[![site]({git}/actions/workflows/site.yaml/badge.svg)]({site})',
                      colab_badge(cfg, 'run.ipynb')])


def is_badge(cell: dict) -> bool:
    return cell['cell_type'] == 'markdown' and ''.join(cell['source']).startswith('[![Open in Colab]')


def is_install(cell: dict) -> bool:
    return cell['cell_type'] == 'code' and "'google.colab' in str(get_ipython())" in ''.join(cell['source'])


def write_notebook(path: Path, nb: dict) -> None:
    "Write a notebook in the form of nbdev_clean, so that the two never undo each other."
    path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def update_notebook(path: Path, cfg: dict[str, str]) -> bool:
    """Put the badge below the title and the install cell below `#| default_exp` (or below the badge); True if this changed
    anything. The badge has a cell of its own because nbdev takes the title cell for front matter and shows nothing else of it."""
    nb = json.loads(path.read_text(encoding='utf-8'))
    cells = [cell for cell in nb['cells'] if not is_badge(cell) and not is_install(cell)]
    badge = dict(cell_type='markdown', id='colab-badge', metadata={}, source=[colab_badge(cfg, path.name)])
    install = dict(cell_type='code', execution_count=None, id='colab-install', metadata={}, outputs=[],
                   source=install_cell(cfg).splitlines(keepends=True))
    numbered = ''.join(cells[1]['source']).startswith('#| default_exp')
    cells[1:1] = [badge]
    cells[2 + numbered:2 + numbered] = [install]
    if cells == nb['cells']: return False
    nb['cells'] = cells
    write_notebook(path, nb)
    return True


def sidebar(root: Path = ROOT) -> dict[str, list[str]]:
    "The sections of the sidebar and the notebooks in them, in order."
    contents = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    return {item['section']: item['contents'] for item in contents if isinstance(item, dict)}


def house_map(folder: str, root: Path = ROOT) -> str:
    "Markdown of a table of the wings, what happens there, and links to their notebooks in `folder`."
    rows = ['| | | |', '|---|---|---|']
    for wing, names in sidebar(root).items():
        links = ', '.join(f"[{Path(name).stem.replace('_', ' ')}]({folder}{name})" for name in names)
        rows.append(f'| **{wing}** | {WINGS[wing]} | {links} |')
    return '\n'.join(rows)


def update_block(text: str, name: str, contents: str) -> str:
    "The text with what stands between the two comments `name` made new; a text without them stays as it is."
    first, last = (re.escape(part) for part in BLOCK.format(name, '\0').split('\n\0\n'))
    return re.sub(f'{first}.*?{last}', lambda _: BLOCK.format(name, contents), text, flags=re.DOTALL)


def update_readme(path: Path, cfg: dict[str, str], root: Path = ROOT) -> bool:
    "Rewrite the badges and the map in README.md; True if this changed anything."
    old = path.read_text(encoding='utf-8')
    new = update_block(update_block(old, 'badges', readme_badges(cfg)), 'map', house_map('nbs/', root))
    path.write_text(new, encoding='utf-8')
    return new != old


def update_index(path: Path, root: Path = ROOT) -> bool:
    "Rewrite the map on the index page; True if this changed anything."
    nb = json.loads(path.read_text(encoding='utf-8'))
    cell = next(cell for cell in nb['cells'] if cell['id'] == 'house-map')
    old, cell['source'] = cell['source'], f"## The house\n\n{house_map('', root)}".splitlines(keepends=True)
    if old == cell['source']: return False
    write_notebook(path, nb)
    return True


if __name__ == '__main__':
    cfg = settings()
    changed = [p.name for p in sorted((ROOT/'nbs').glob('*.ipynb')) if update_notebook(p, cfg)]
    if update_readme(ROOT/'README.md', cfg): changed.append('README.md')
    if update_index(ROOT/'nbs'/'index.ipynb'): changed.append('the map of index.ipynb')
    if changed: print('badges:', ', '.join(changed))
