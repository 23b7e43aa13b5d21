"""Pages that take hours, executed with toys: what they print is of no worth, that they still run and follow from their numbers is."""
import json
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from IPython.display import display

from scilm_adapt import runs
from scilm_adapt.papers import read
from scilm_adapt.processes import script_of
from scilm_adapt.running import read_parameters

ROOT = Path(__file__).parents[1]
NOUNS = 'heat light sound gravity friction pressure salt iron water glass copper helium'.split()
SIZES = dict(student='zoo:student', limit=0, seeds=2, context=128, batch_size=2, steps=2, documents=6, continued=8, again=4, skipped=4,
             before=2)
INSIDE = dict(asked=4, near=2, far=1, window=64, drafts=2, judged_papers=12, characters=60)  # what cells below the parameters set


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
    page, scope = ROOT/'nbs'/f'{name}.ipynb', dict(__name__='page', display=display)
    parameters = {dial: changes[dial] for dial in read_parameters(page).keys() & changes.keys()}
    for place, source in script_of(page, parameters):
        exec(compile(source, f'{page.name} {place}', 'exec'), scope)
        scope |= {dial: inside[dial] for dial in scope.keys() & inside.keys()}
    return scope


@pytest.mark.parametrize('name, claims', [
    ('chains', ['first', 'second']), ('view', ['tested', 'seeing']), ('contrasts', ['claimed', 'tested']), ('writing', ['tested']),
    ('finding', ['tested'])])
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


ARMS = dict(student='zoo:student', teacher='zoo:teacher', seeds=2, context=128, batch_size=2, contrast_steps=2,
            distil_steps=2, conversations=40, teacher_answers=4, taught=24, documents=6, questions=4, continued=3, other_steps=2,
            other_vocabulary=400)


def test_the_comparison_of_methods_runs_and_holds_each_against_its_control(tmp_path, texts, capsys):
    out, known = tmp_path/'out', tmp_path/'known.jsonl'  # the toy teacher has answers about the texts it knows only
    known.write_text('\n'.join(json.dumps(record) for record in read('installed-docs')[:400]))
    scope = executed('compare', ARMS | texts | dict(out_dir=str(out), papers=str(known)), {})
    assert 'scilm: run complete' in capsys.readouterr().out
    compared = json.loads((out/'compared.json').read_text(encoding='utf-8'))
    assert compared['tables'].keys() == {'stage_1', 'continuations', 'methods', 'other_tokenizer'}
    assert {'plain', 'answers only', 'chat vector', 'without stage 1'} <= compared['tables']['methods'].keys()
    assert scope['aligned'].name == 'zoo:teacher' and (out/'compared.png').exists()


def test_what_keeps_general_abilities_is_held_against_the_line_that_costs_nothing(tmp_path, texts, capsys):
    out = tmp_path/'out'
    small = dict(student='zoo:student', teacher='zoo:teacher', seeds=2, context=128, batch_size=2, steps=4, documents=6, conversations=6)
    scope = executed('keeping', small | texts | dict(out_dir=str(out)), {})
    assert 'scilm: run complete' in capsys.readouterr().out and (out/'keeping.png').exists()
    kept = json.loads((out/'keeping.json').read_text(encoding='utf-8'))
    assert kept['claims'].keys() == {'replay', 'anchor', 'replay and anchor', 'LoRA', 'slower LoRA'}
    assert kept['means'].keys() == kept['table'].keys() == {*scope['arms'], 'untouched', 'keeping 0.25', 'keeping 0.5', 'keeping 0.75'}
    science = {name: about['science_bpb'] for name, about in kept['means'].items()}
    assert science['reading'] < science['keeping 0.5'] < science['untouched']
    for seed in range(2):  # the ends of the line are the models at its ends, and between them lies what reads as well as was asked for
        ends = [scope['rows_of'](name, seed) for name in ('untouched', 'reading')]
        worth = [scope['chosen']['science_bpb'].value(rows['science_bpb']) for rows in ends]
        for rows, wanted, share in zip(ends, (worth[0] + 1e-9, worth[1] + 1e-9), (0, 1)):
            found, at = scope['on_the_line'](seed, wanted)
            assert at == pytest.approx(share, abs=0.01) and found['teacher_kl'] == pytest.approx(rows['teacher_kl'], abs=0.05)
        found, at = scope['on_the_line'](seed, sum(worth)/2)
        assert 0 < at < 1 and scope['chosen']['science_bpb'].value(found['science_bpb']) == pytest.approx(sum(worth)/2, rel=0.01)
        assert scope['on_the_line'](seed, 0.0)[1] == 1.0  # nothing reads that well: all of the reading


def test_a_model_and_itself_is_one_model_in_every_number(tmp_path, texts, capsys):
    small = dict(model='zoo:teacher', context=128, steps=2, distil_steps=2, conversations=30, general_share=0.2, documents=6, questions=4)
    scope = executed('itself', small | texts | dict(out_dir=str(tmp_path/'out')), {})
    found = scope['result']['models']
    assert found['base'] == found['teacher'] and found['control']['science_bpb'] != found['contrast']['science_bpb']
    assert {one['against'] for one in scope['against']['differences']} >= {'control'} and 'repetition penalty' in capsys.readouterr().out


def test_the_page_of_real_papers_counts_every_one(tmp_path, texts):
    scope = executed('corpus', dict(papers=texts['papers'], sample=40, out_dir=str(tmp_path/'out')), {})
    assert scope['report']['total']['read'] == 260 == sum(scope['report']['splits'].values())
    assert len(scope['chats']) == sum(scope['made']['kinds']['train'].values()) and scope['repeats'].empty


def test_the_page_of_times_adds_up(tmp_path):
    run = runs.Run(tmp_path/'small')
    for name in ('corpus', 'models/contrast'): runs.stage(run, name, {}, lambda folder: (time.sleep(0.05), (folder/'made').write_text('x')))
    scope = executed('profile', dict(run_folders=str(run.folder)), {})
    assert [*scope['wide'].index] == ['corpus', 'models/contrast', 'all']
    assert scope['wide']['small']['all'] == pytest.approx(sum(row['seconds'] for row in runs.survey(run.folder)))
