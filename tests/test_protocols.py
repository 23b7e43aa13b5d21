"""Pages that take hours, executed with toys: what they print is of no worth, that they still run and follow from their numbers is."""
import json
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from scilm_adapt import runs
from scilm_adapt.processes import script_of
from scilm_adapt.running import read_parameters

ROOT = Path(__file__).parents[1]
NOUNS = 'heat light sound gravity friction pressure salt iron water glass copper helium'.split()
SIZES = dict(student='zoo:student', limit=0, seeds=2, context=128, batch_size=2, steps=2, documents=6, continued=8, again=4, skipped=4,
             before=2)
INSIDE = dict(asked=4, near=2, far=1, window=64, drafts=2, judged_papers=12)  # what the second protocol of contrasts.ipynb sets itself


def paper(number: int, kind: str) -> dict:
    draw = np.random.default_rng([number, len(kind)])
    sentences = [f'The {a} of {b} number {n} was kept beside {c} for {n + 2} days.'
                 for (a, b, c), n in zip(draw.choice(NOUNS, (8, 3)), draw.integers(1, 999, 8))]
    return dict(id=f'{kind}{number}', title=f'{kind} {number} on {" and ".join(draw.choice(NOUNS, 2))}', text=' '.join(sentences))


@pytest.fixture(scope='module')
def texts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp('texts')
    for kind, number in dict(papers=260, general=60).items():
        (folder/f'{kind}.jsonl').write_text('\n'.join(json.dumps(paper(n, kind)) for n in range(number)))
    return {kind: str(folder/f'{kind}.jsonl') for kind in ('papers', 'general')}


def executed(name: str, changes: dict, inside: dict) -> dict:
    "The names that a notebook's code cells leave behind, executed in this process with these parameters, and with those set `inside`."
    matplotlib.use('agg')
    page, scope = ROOT/'nbs'/f'{name}.ipynb', dict(__name__='page')
    parameters = {dial: changes[dial] for dial in read_parameters(page).keys() & changes.keys()}
    for place, source in script_of(page, parameters):
        exec(compile(source, f'{page.name} {place}', 'exec'), scope)
        scope |= {dial: inside[dial] for dial in scope.keys() & inside.keys()}
    return scope


@pytest.mark.parametrize('name, claims', [
    ('chains', ['first', 'second']), ('view', ['tested']), ('contrasts', ['claimed', 'tested'])])
def test_a_protocol_runs_and_its_verdicts_follow_from_its_numbers(tmp_path, texts, capsys, name, claims):
    scope = executed(name, SIZES | texts | dict(out_dir=str(tmp_path/'out')), INSIDE)
    assert 'scilm: run complete' in capsys.readouterr().out
    kept = json.loads((tmp_path/'out'/f'{name}.json').read_text(encoding='utf-8'))
    assert kept['settings']['test_sha256'] == scope['test_hash']
    for found in (scope[variable] for variable in claims):
        for about in found.values() if 'verdict' not in found else [found]:
            beaten = all(interval['high'] < 0 for interval in about['differences'].values())
            assert beaten or about['verdict'] == 'not shown'
            assert about['p_value'] <= about['holm'] and (about['holm'] < 0.05) == (about['verdict'] != 'not shown')


def test_the_page_of_times_adds_up(tmp_path):
    run = runs.Run(tmp_path/'small')
    for name in ('corpus', 'models/contrast'): runs.stage(run, name, {}, lambda folder: (time.sleep(0.05), (folder/'made').write_text('x')))
    scope = executed('profile', dict(run_folders=str(run.folder)), {})
    assert [*scope['wide'].index] == ['corpus', 'models/contrast', 'all']
    assert scope['wide']['small']['all'] == pytest.approx(sum(row['seconds'] for row in runs.survey(run.folder)))
