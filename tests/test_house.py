"""The rules of the house, each as a test that a breach fails: notebooks, generated code, packaging, what may be committed."""
import ast
import configparser
import importlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import fields
from functools import cache
from importlib.metadata import version as installed_version
from pathlib import Path

import pytest
import yaml
from in_sync import expected, out_of_sync
from IPython.core.inputtransformer2 import TransformerManager
from nbdev.frontmatter import _md2dict
from packaging.requirements import Requirement
from run_notebooks import ShippedLines, shipped_cells

from scilm_adapt import contrast, distill, recipe, running

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'nbs'/'_render'))
badges = importlib.import_module('badges')

CFG = badges.settings(ROOT)
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
NUMBERED = [p for p in NOTEBOOKS if p.name[0].isdigit()]
MODULES = sorted((ROOT/'scilm_adapt').glob('[!_]*.py'))
PRESETS = sorted((ROOT/'nbs'/'presets').glob('*.yaml'))
TRAINING_MODULES = ['shards', 'checkpoints', 'training', 'recipe', 'intervals', 'decoding', 'geometry', 'pairs', 'preference', 'next_token',
                    'mistakes', 'contrast', 'finder', 'judge', 'divergence',
                    'teacher', 'alignment', 'rollouts', 'collapse', 'task_arithmetic', 'distill', 'evaluate']
SELF_EVIDENT = {'self', 'cls', 'tokenizer', 'model'}    # also tokenizer_a, model_b: they are transformers', whatever their class
LAST_CELL = '#| hide\nimport nbdev; nbdev.nbdev_export()'

each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
each_numbered = pytest.mark.parametrize('path', NUMBERED, ids=lambda p: p.stem)
each_module = pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
each_preset = pytest.mark.parametrize('path', PRESETS, ids=lambda p: p.stem)


# --- reading

def cells(path: Path) -> list[dict]:
    "The notebook's cells, each with its source as one string."
    nb = json.loads(path.read_text(encoding='utf-8'))
    return [dict(cell, source=''.join(cell['source'])) for cell in nb['cells']]


def code(path: Path) -> list[str]:
    "Sources of the code cells."
    return [cell['source'] for cell in cells(path) if cell['cell_type'] == 'code']


def parse(source: str) -> ast.Module:
    "Syntax tree of a cell or file; `%magic` and `!shell` lines become calls."
    try: return ast.parse(source)  # as nearly all cells are
    except SyntaxError: return ast.parse(TransformerManager().transform_cell(source))


@cache
def trees(path: Path) -> list[ast.Module]:
    "Syntax trees of a notebook's cells, or of a Python file."
    return [parse(source) for source in code(path)] if path.suffix == '.ipynb' else [ast.parse(path.read_text('utf-8'))]


def module_of(path: Path) -> str | None:
    "The module a notebook exports to, if any."
    found = re.search(r'^#\| default_exp (\S+)', '\n'.join(code(path)), re.MULTILINE)
    return found and found[1]


def committed(root: Path = ROOT) -> list[Path]:
    "The files that are or would be committed; without git, all but what .gitignore names."
    git = ['git', '-C', root, 'ls-files', '--cached', '--others', '--exclude-standard', '-z']
    if shutil.which('git') and (root/'.git').exists():
        names = subprocess.run(git, check=True, capture_output=True, text=True).stdout.split('\0')
        return sorted(root/name for name in set(names) if name and (root/name).is_file())
    skipped = {'.venv', '.git', '_proc', '_docs', 'build', 'dist', 'outputs', '__pycache__', '.pytest_cache', '.hypothesis',
               '.ruff_cache', '.ipynb_checkpoints', 'scilm_adapt.egg-info'}
    return sorted(p for p in root.rglob('*') if p.is_file() and not skipped & set(p.relative_to(root).parts)
                  and not p.name.startswith('.coverage'))


def text_of(path: Path) -> str:
    "The file's text, or '' for a binary one."
    data = path.read_bytes()
    return '' if b'\0' in data[:4096] else data.decode('utf-8', 'replace')


# --- notebooks

def imported_modules(tree: ast.Module) -> set[str]:
    "Modules of the package that `tree` imports anywhere, inside functions too."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.split('.')[1] for a in node.names if a.name.startswith('scilm_adapt.')}
        elif isinstance(node, ast.ImportFrom):
            package, _, name = (node.module or '').partition('.') if not node.level else ('scilm_adapt', '', node.module or '')
            if package == 'scilm_adapt': found |= {name.split('.')[0]} if name else {a.name for a in node.names}
    return found


@each_numbered
def test_imports_run_one_way(path):
    number_of = {module_of(p): p.name[:2] for p in NUMBERED}
    module = ROOT/'scilm_adapt'/f'{module_of(path)}.py'
    imported = set().union(*map(imported_modules, trees(path) + (trees(module) if module.exists() else [])))
    upward = {name for name in imported & set(number_of) if number_of[name] >= path.name[:2]}
    assert not upward, f'{path.name} may import only from lower numbers, and imports {sorted(upward)}'


def test_kinds_of_input_errors_live_in_errors():
    "A kernel tells no more of an error than its name, by which `running` finds it there again."
    kind = re.compile(r'class \w+\(.*InputError')
    assert not [path.name for path in MODULES if path.stem != 'errors' and kind.search(path.read_text(encoding='utf-8'))]


def test_a_wing_imports_only_from_wings_before_it():
    wing_of = {name[3:].removesuffix('.ipynb'): number for number, names in enumerate(badges.sidebar(ROOT).values()) for name in names}
    assert list(badges.WINGS) == list(badges.sidebar(ROOT)), 'each section of the sidebar is explained in the map'
    for path in NUMBERED:
        module = ROOT/'scilm_adapt'/f'{module_of(path)}.py'
        late = {name for name in imported_modules(trees(module)[0]) if wing_of.get(name, 0) > wing_of[module_of(path)]}
        assert not late, f'{path.name} imports from a later wing: {sorted(late)}'
        beside = {(wing_of[module_of(path)], wing_of[name]) for name in imported_modules(trees(module)[0]) if name in wing_of}
        apart = [tuple(map([*badges.WINGS].index, pair)) for pair in (('Distillation', 'Contrast'), ('Evidence', 'Distillation'))]
        assert not beside & {*apart}, f'{path.name}: contrast and distillation know nothing of each other, nor distillation and evidence'


def defined(module: Path) -> set[str]:
    "The names that a module defines itself."
    found = set()
    for node in trees(module)[0].body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): found.add(node.name)
        single = [node.target] if isinstance(node, (ast.AnnAssign, ast.AugAssign)) else []
        targets = node.targets if isinstance(node, ast.Assign) else single
        found |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return found


def test_every_name_is_imported_from_the_module_that_defines_it():
    defines, wrong = {path.stem: defined(path) for path in MODULES}, []
    for path in [*MODULES, *NOTEBOOKS, *sorted((ROOT/'tests').glob('*.py')), *sorted((ROOT/'nbs'/'_benchmark').glob('*.py'))]:
        for node in (node for tree in trees(path) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
            module = (node.module or '').removeprefix('scilm_adapt.')
            if (node.level or module != node.module) and module in defines:
                wrong += [f'{path.name}: {name.name} from {module}' for name in node.names if name.name not in defines[module]]
    assert not wrong, wrong


def test_imports_are_seen_in_every_form():
    lines = ['import scilm_adapt.a, os', 'from scilm_adapt.b import x', 'from scilm_adapt import c', 'from torch import nn',
             'def f():', '    from .d import y', '    from . import e']
    assert imported_modules(ast.parse('\n'.join(lines))) == {'a', 'b', 'c', 'd', 'e'}


@each_notebook
def test_notebook_opens_with_title_badge_and_install_cell(path):
    first = cells(path)
    front = _md2dict(first[0]['source'])
    assert first[0]['cell_type'] == 'markdown' and {'title', 'description'} <= front.keys(), 'cell 1: `# Title`, `> one line`'
    assert front.get('skip_showdoc') is True, 'cell 1: `- skip_showdoc: true`, so that the site executes nothing'
    assert first[1]['source'] == badges.colab_badge(CFG, path.name), 'cell 2: the Colab badge; `make export` writes it'
    numbered = path in NUMBERED
    if numbered: assert first[2]['source'] == f'#| default_exp {path.stem[3:]}', 'cell 3: the module has the name of the notebook'
    assert first[2 + numbered]['source'] == badges.install_cell(CFG), 'then the install cell; `make export` writes it'


@each_numbered
def test_stage_notebook_ends_with_the_export(path):
    assert code(path)[-1] == LAST_CELL
    assert cells(path)[-1]['source'] == LAST_CELL


@each_notebook
def test_imports_stand_alone(path):
    for source in code(path):
        if source == LAST_CELL: continue
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in parse(source).body}
        assert len(kinds) < 2, f'this cell of {path.name} mixes imports with other code, which breaks the site:\n{source}'


@each_notebook
def test_notebook_is_short_and_explained(path):
    all_cells = cells(path)
    assert len(all_cells) <= 45, f'{path.name} has {len(all_cells)} cells; split it'
    prose = sum(c['cell_type'] == 'markdown' for c in all_cells) - 2         # without title and badge
    bare = [c for c in all_cells if c['cell_type'] == 'code' and not re.match(r'#\| (default_exp|hide)\b', c['source'])]
    if path in NUMBERED: assert prose >= len(bare)/2, f'{path.name}: {prose} cells of prose for {len(bare)} of code'


@each_notebook
def test_run_notebooks_only_import(path):
    if path not in NUMBERED: assert module_of(path) is None, f'{path.name} has no number, so it must not export'


@each_numbered
def test_stage_notebook_asserts_something(path):
    assert any(isinstance(node, ast.Assert) for tree in trees(path) for node in ast.walk(tree)), f'{path.name} asserts nothing'


# --- generated code

def definitions(tree: ast.Module):
    "Public functions and classes, and public methods of a class that inherits none, with their qualified names."
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
        yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.bases:
            yield from ((f'{node.name}.{sub.name}', sub) for sub in node.body
                        if isinstance(sub, ast.FunctionDef) and not sub.name.startswith('_'))


@each_module
def test_public_definitions_are_documented_and_typed(path):
    bare, untyped = [], []
    for name, node in definitions(trees(path)[0]):
        if not ast.get_docstring(node): bare.append(name)
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if any(a.annotation is None and a.arg.split('_')[0] not in SELF_EVIDENT for a in arguments): untyped.append(name)
    assert not bare, f'{path.name}: no docstring on {bare}'
    assert not untyped, f'{path.name}: an argument without a type in {untyped}'


@each_module
def test_functions_are_short(path):
    long = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(trees(path)[0])
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 45}
    assert not long, f'{path.name}: more than 45 lines in {long}'


@pytest.mark.parametrize('path', [*MODULES, *NOTEBOOKS], ids=lambda p: p.name)
def test_nothing_loads_code_from_data(path):
    "A model folder or a data file is data: no remote code, no pickle."
    for node in (n for tree in trees(path) for n in ast.walk(tree)):
        if isinstance(node, ast.keyword) and node.arg in ('trust_remote_code', 'allow_pickle'):
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f'{path.name}: {node.arg} is not False'
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {a.name.split('.')[0] for a in node.names} | {(getattr(node, 'module', '') or '').split('.')[0]}
            assert not names & {'pickle', 'dill', 'cloudpickle', 'joblib'}, f'{path.name} imports {names}'
        if isinstance(node, ast.Call) and ast.unparse(node.func) == 'torch.load':
            assert 'weights_only=True' in ast.unparse(node), f'{path.name}: torch.load without weights_only=True'


def test_package_needs_no_notebook_tools_and_training_no_datasets():
    """In a fresh Python without any of them. A GPU machine often has torch, transformers and accelerate, and nothing else: first the
    modules that train are imported without datasets, too, then all others with it; torch and transformers are read once for both."""
    tools, data = ['nbdev', 'fastcore', 'execnb', 'papermill', 'IPython', 'trl', 'peft', 'bitsandbytes'], ['datasets', 'pyarrow']
    program = (f'import sys, importlib\nfor name in {tools + data!r}: sys.modules[name] = None\n'
               f'for name in {TRAINING_MODULES!r}: importlib.import_module("scilm_adapt." + name)\n'
               f'for name in {data!r}: del sys.modules[name]\n'
               f'for name in {[p.stem for p in MODULES]!r}: importlib.import_module("scilm_adapt." + name)')
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# --- the checks themselves

def test_sync_check_sees_an_edited_and_an_orphaned_module(tmp_path):
    "In a copy with the first three notebooks; `make test` checks all of them."
    later = '0[3-9]_*', '[1-9]*_*'
    shutil.copytree(ROOT/'nbs', tmp_path/'nbs', symlinks=True, ignore=shutil.ignore_patterns('__pycache__', 'results', *later))
    (tmp_path/'scilm_adapt').mkdir()
    for name in ('__init__', 'errors', 'files', 'runs'): shutil.copy(ROOT/'scilm_adapt'/f'{name}.py', tmp_path/'scilm_adapt')
    for name in ('settings.ini', 'README.md', '_quarto.yml'): shutil.copy(ROOT/name, tmp_path)
    edited, orphan = tmp_path/'scilm_adapt'/'runs.py', tmp_path/'scilm_adapt'/'orphan.py'
    whole = edited.read_text(encoding='utf-8')
    edited.write_text(f'{whole}\n# edited by hand\n', encoding='utf-8')
    orphan.write_text('x = 1\n')
    wanted = expected(tmp_path)
    seen = set(out_of_sync(tmp_path, wanted))
    edited.write_text(whole, encoding='utf-8')
    orphan.unlink()
    assert seen - {*out_of_sync(tmp_path, wanted)} == {'scilm_adapt/runs.py: differs', 'scilm_adapt/orphan.py: no notebook exports it'}


def test_notebook_cells_run_as_the_lines_they_export(tmp_path, monkeypatch):
    package = tmp_path/'scilm_adapt'
    package.mkdir()
    (package/'demo.py').write_text('"""Demo."""\n\n# %% ../nbs/00_demo.ipynb #ab\ndef f():\n    return 1\n\n# %% x #cd\nX = 2\n')
    shipped = shipped_cells(package)
    assert shipped == {'def f():\n    return 1': (str(package/'demo.py'), 3), 'X = 2': (str(package/'demo.py'), 7)}
    monkeypatch.setattr(ShippedLines, 'cells', shipped)
    compiler, source, scope = ShippedLines(), 'def f():\n    return 1\n', {}
    exec(compile(compiler.ast_parse(source), compiler.cache(source), 'exec'), scope)
    assert (scope['f'].__code__.co_filename, scope['f'].__code__.co_firstlineno) == (str(package/'demo.py'), 4)
    assert compiler.cache('def f():\n    return 2\n') != str(package/'demo.py')


# --- what may be committed

def test_no_path_of_a_machine_is_committed():
    machine = re.compile(r'(?<![\w.~$}])/(?:work|root|home|Users)/[\w.]')
    found = [f'{p.relative_to(ROOT)}: …{text[m.start():m.start() + 60]!r}' for p in committed() if (text := text_of(p))
             for m in machine.finditer(text)]
    assert not found, '\n'.join(found)


@each_notebook
def test_stored_outputs_name_no_temporary_folder(path):
    outputs = json.dumps([cell.get('outputs', []) for cell in cells(path)])
    assert not re.search(r'(?<![\w.])/(?:tmp|var|opt|usr)/', outputs), f'an output of {path.name} names a folder of a machine'


def test_committed_files_are_small():
    zoo = ROOT/'scilm_adapt'/'zoo'
    sizes = {folder.name: sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) for folder in zoo.iterdir()}
    assert sizes.pop('smollm2-80m') <= 24*2**20, 'the default student may have 24 MiB'
    assert sum(sizes.values()) <= 16*2**20, 'the toys may have 16 MiB in all'
    large = [str(p.relative_to(ROOT)) for p in committed() if p.stat().st_size > 2**20 and zoo not in p.parents]
    assert not large, f'more than 1 MiB: {large}'


def test_ruff():
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--output-format=concise', '--no-cache', '.'], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- settings, presets, packaging

def test_one_version_and_one_address():
    citation = yaml.safe_load((ROOT/'CITATION.cff').read_text())
    namespace = {}
    exec((ROOT/'scilm_adapt'/'__init__.py').read_text(), namespace)
    assert CFG['version'] == namespace['__version__'] == citation['version'] == installed_version('scilm_adapt')
    assert citation['repository-code'] == CFG['git_url'] and citation['url'] == CFG['doc_host'] + CFG['doc_baseurl']
    assert f"## [{CFG['version']}]" in (ROOT/'CHANGELOG.md').read_text()


def test_readme_has_the_badges_and_the_two_lines():
    readme = (ROOT/'README.md').read_text()
    assert badges.readme_badges(CFG) in readme, '`make export` writes them between the two comments'
    assert 'make run' in readme and 'make test' in readme


def test_constraints_are_within_the_requirements():
    lines = (ROOT/'constraints.txt').read_text().splitlines()
    pins = dict(line.split('==') for line in lines if line and line[0] != '#')
    for text in (CFG['requirements'] + ' ' + CFG['dev_requirements']).split():
        requirement = Requirement(text)
        pin = pins.get(requirement.name)
        assert pin is None or requirement.specifier.contains(pin), f'constraints.txt pins {pin}, settings.ini wants {text}'


def test_nbdev_and_quarto_read_one_file():
    assert (ROOT/'nbs'/'_quarto.yml').samefile(ROOT/'_quarto.yml'), 'nbs/_quarto.yml is a link'


def test_ci_runs_make_test():
    assert (ROOT/'.ci'/'run').read_text().rstrip().endswith('exec make test')
    assert (ROOT/'.ci'/'run').stat().st_mode & 0o111
    workflow = yaml.safe_load((ROOT/'.github'/'workflows'/'test.yaml').read_text())
    job = workflow['jobs']['test']
    assert job['strategy']['matrix']['python'] == ['3.11', '3.12']
    assert any(step.get('run') == '.ci/run' for step in job['steps'])


def run_parameters() -> dict[str, running.Parameter]:
    "The parameters of run.ipynb by name."
    tagged = [c for c in cells(ROOT/'nbs'/'run.ipynb') if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1, 'run.ipynb has exactly one cell tagged `parameters`'
    return running.read_parameters(ROOT/'nbs'/'run.ipynb')


def test_presets_exist():
    assert {'quickstart', 'toy', 'real', 'colab', 'h200'} <= {p.stem for p in PRESETS}


@each_preset
def test_preset_sets_only_parameters_of_the_run_notebook(path):
    preset = running.read_preset(path)
    assert running.check_parameters(preset, run_parameters(), path.name) == preset, f'{path.name}: another type than is wanted'
    lines = path.read_text().splitlines()
    bare = [line for line in lines if re.match(r'[\w.]+:', line) and '#' not in line]
    assert not bare, f'{path.name}: no comment on {bare}'


def test_defaults_of_the_run_notebook_are_the_quickstart():
    parameters, preset = run_parameters(), running.read_preset(ROOT/'nbs'/'presets'/'quickstart.yaml')
    assert preset == {name: parameters[name].default for name in preset}


def test_a_setting_has_one_name_and_one_default():
    "What both stages share stands in the notebook's cell and in the recipe; all else in one place."
    parameters = run_parameters()
    shared = {one.name: one for one in fields(recipe.Recipe) if one.name not in recipe._OWN}
    assert {name: parameters[name].default for name in shared} == {name: one.default for name, one in shared.items()}
    for stage, kind in dict(contrast=contrast.Recipe, distil=distill.Recipe).items():
        listed = {name.removeprefix(f'{stage}.') for name, one in parameters.items() if one.listed and name.startswith(f'{stage}.')}
        assert listed == recipe.Settings(kind).values().keys()
        for name in listed:
            value, told = recipe.Settings(kind).values()[name], parameters[f'{stage}.{name}'].default
            assert told == value or isinstance(told, str) and not isinstance(value, str), name  # what is no literal is shown as it is


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    "A wheel built as `python -m build` does it: from the source distribution, from committed files alone."
    folder = tmp_path_factory.mktemp('wheel')
    for path in committed():
        target = folder/'src'/path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    done = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder/'dist', folder/'src'],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return zipfile.ZipFile(next((folder/'dist').glob('*.whl')))


def test_wheel_takes_notebook_presets_and_models_along(wheel):
    names = set(wheel.namelist())
    assert {f'scilm_adapt/notebooks/presets/{p.name}' for p in PRESETS} | {'scilm_adapt/notebooks/run.ipynb'} <= names
    assert {f'scilm_adapt/{p.name}' for p in MODULES} | {'scilm_adapt/__main__.py'} <= names
    assert {f'scilm_adapt/notebooks/presets/accelerate/{p.name}' for p in (ROOT/'nbs'/'presets'/'accelerate').iterdir()} <= names
    zoo = {str(p.relative_to(ROOT)) for p in committed() if (ROOT/'scilm_adapt'/'zoo') in p.parents}
    assert zoo and zoo <= names
    for model in ('student', 'teacher'): assert f'scilm_adapt/zoo/{model}/model.safetensors' in names
    assert not [n for n in names if n.startswith(('tests/', 'nbs/', 'build/'))]


def test_wheel_has_the_command_and_the_metadata(wheel):
    info = f"scilm_adapt-{CFG['version']}.dist-info"
    entry = configparser.ConfigParser()
    entry.read_string(wheel.read(f'{info}/entry_points.txt').decode())
    assert entry['console_scripts']['scilm'] == 'scilm_adapt.cli:main'
    metadata = wheel.read(f'{info}/METADATA').decode()
    assert re.search(r'^License(-Expression)?: Apache-2.0$', metadata, re.MULTILINE)
    assert f"Requires-Python: >={CFG['min_python']}" in metadata
    for text in CFG['requirements'].split(): assert f'Requires-Dist: {Requirement(text).name}' in metadata


def test_readme_shows_the_numbers_that_were_measured():
    sys.path.insert(0, str(ROOT/'nbs'/'_render'))
    import results
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert results.readme(text) == text, 'run `.venv/bin/python nbs/_render/results.py`: the README shows other numbers than nbs/results'
    assert {name for _, name, _ in results.BLOCK.findall(text)} == results.BLOCKS.keys(), 'a block that the README shows is not written'
    assert '| distilled |' in text.replace('  ', ' ').replace('  ', ' ')
