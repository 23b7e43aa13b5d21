"""The Colab badge and install cell of every notebook, and the badges of README.md, from settings.ini: `make export` runs this."""
import json
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPEN, CLOSE = '<!-- badges: written by nbs/_render/badges.py -->', '<!-- /badges -->'


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
    return '\n'.join([OPEN, f'[![tests]({git}/actions/workflows/test.yaml/badge.svg)]({git}/actions/workflows/test.yaml)',
                      f'[![coverage]({coverage})]({git}/actions/workflows/test.yaml)',
                      f'[![site]({git}/actions/workflows/site.yaml/badge.svg)]({site})',
                      colab_badge(cfg, 'run.ipynb'), CLOSE])


def is_badge(cell: dict) -> bool:
    return cell['cell_type'] == 'markdown' and ''.join(cell['source']).startswith('[![Open in Colab]')


def is_install(cell: dict) -> bool:
    return cell['cell_type'] == 'code' and "'google.colab' in str(get_ipython())" in ''.join(cell['source'])


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
    # The form nbdev_clean writes, so that the two never undo each other.
    path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    return True


def update_readme(path: Path, cfg: dict[str, str]) -> bool:
    "Rewrite what stands between the two badge comments of `path`; True if this changed anything."
    old = path.read_text(encoding='utf-8')
    if OPEN not in old or CLOSE not in old: return False
    before, rest = old.split(OPEN, 1)
    new = before + readme_badges(cfg) + rest.split(CLOSE, 1)[1]
    path.write_text(new, encoding='utf-8')
    return new != old


if __name__ == '__main__':
    cfg = settings()
    changed = [p.name for p in sorted((ROOT/'nbs').glob('*.ipynb')) if update_notebook(p, cfg)]
    if update_readme(ROOT/'README.md', cfg): changed.append('README.md')
    if changed: print('badges:', ', '.join(changed))
