"""The whole pipeline, from files to a report, on tiny local folders of the families that the presets load from the Hub."""
import gzip
import importlib
import json
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from world import Serve

from scilm_adapt import cli, contrast, distill, evaluate, instruct, models, report, runs
from scilm_adapt.errors import InputError
from scilm_adapt.files import content_hash
from scilm_adapt.papers import _split_of, open_papers, prepare
from scilm_adapt.runs import Run

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'nbs'/'_pdf'))
samples = importlib.import_module('samples')
SUBJECTS = ['heat', 'light', 'sound', 'water', 'iron', 'salt', 'wind', 'glass', 'sand', 'steam']
VERBS = ['moves', 'rests', 'grows', 'bends', 'breaks', 'shines', 'cools', 'warms', 'sinks', 'rises']


def write_texts(path: Path, about: str) -> Path:
    "A hundred small records about two things each, as JSON Lines."
    with open(path, 'w', encoding='utf-8') as file:
        for one in SUBJECTS:
            for n, verb in enumerate(VERBS):
                other = SUBJECTS[n]
                text = (f'In {about} we ask when {one} {verb} near {other}. We find that {one} {verb} slowly where {other} is cold. '
                        f'Where {other} is warm, {one} hardly {verb} at all. This holds for {one} and {other} alike.')
                file.write(json.dumps(dict(title=f'How {one} {verb} near {other}', abstract=text)) + '\n')
    return path


@pytest.fixture(scope='module')
def texts(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp('texts')
    return {name: write_texts(folder/f'{name}.jsonl', name) for name in ('papers', 'tales')}


def save_pair(folder: Path, family: str, texts: dict[str, Path]) -> tuple[Path, Path]:
    "Folders of a student and a wider teacher of one family with one tokenizer; the student's tokenizer has no chat template."
    words = [json.loads(line)['abstract'] for path in texts.values() for line in path.read_text().splitlines()]
    pair = []
    for name, hidden in (('student', 32), ('teacher', 48)):
        lm = models.tiny(words, family, hidden=hidden, context=256)
        if name == 'student': lm.tokenizer.chat_template = None
        pair.append(models.save(lm, folder/name))
    return tuple(pair)


def scilm(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    "`scilm ARGUMENTS` to its end, in a folder."
    command = [sys.executable, '-m', 'scilm_adapt.cli', *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize('family', models.families(1, 1, 1, 1, 1))
def test_every_family_goes_all_the_way(family, texts, tmp_path):
    run = Run(tmp_path/'run')
    student, teacher = map(models.load, save_pair(tmp_path, family, texts))
    corpus = prepare(run, str(texts['papers']), str(texts['tales']))
    models.adopt_chat(student, teacher)
    for lm, name in ((student, 'base'), (teacher, 'teacher')): report.keep(run, lm, name)
    contrasted = contrast.train(run, student, corpus, steps=3, batch_size=4, context=128, learning_rate=1e-2)
    chats = instruct.prepare(run, corpus, teacher, conversations=40, teacher_answers=4, held_out=8, context=128)
    distilled = distill.train(run, contrasted, teacher, chats, corpus, steps=2, batch_size=4, context=128, learning_rate=1e-2)
    result = evaluate.compare(run, dict(base=student, contrast=contrasted, distilled=distilled, teacher=teacher), corpus, chats,
                              documents=8, answers=4, max_new_tokens=8, context=128)
    metrics = json.loads(report.publish(run, result, dict(student='tiny', teacher='tiny', seed=0), corpus).read_text())
    assert set(metrics['models']) == {'base', 'contrast', 'distilled', 'teacher'}
    for name, numbers in metrics['models'].items():
        assert numbers['params'] > 0
        for metric in ('science_bpb', 'general_bpb', 'answer_bpb', 'stop_rate'):
            assert numbers[metric]['low'] <= numbers[metric]['value'] <= numbers[metric]['high']
        again = AutoModelForCausalLM.from_pretrained(run.folder/'models'/name)
        assert again.config.model_type == family and list((run.folder/'models'/name).glob('*.safetensors'))
        assert AutoTokenizer.from_pretrained(run.folder/'models'/name).chat_template
    for path in run.folder.rglob('*'):  # a run says beforehand what it writes, so that it can refuse what is in the way
        name = path.relative_to(run.folder).as_posix()
        known = name.startswith(('.scilm.', *(f'{stage}/' for stage in runs._STAGES))) or name in (*runs._FILES, *runs._STAGES, 'models')
        assert known, name
    assert Run(run.folder).folder == run.folder  # and nothing of it is in its own way
    trained = metrics['models']['contrast']['science_bpb']['value'], metrics['models']['base']['science_bpb']['value']
    assert trained[0] < trained[1]  # three steps from random weights are enough to see it learn


def test_a_run_cuts_its_student_out_of_a_model_heals_it_and_rehearses(texts, tmp_path):
    preset = dict(student='zoo:teacher', teacher='zoo:teacher', papers=str(texts['papers']), general=str(texts['tales']), context=128,
                  batch_size=4, conversations=24, turns=2, teacher_answers=0, general_share=0.6, documents=4, questions=2,
                  interpolation=0.5)
    preset |= {'heal.layers': 4, 'heal.neurons': 100, 'heal.vocabulary': 1500, 'heal.steps': 2, 'contrast.steps': 1,
               'contrast.anchor_weight': 0.1, 'contrast.replay_share': 0.25, 'distil.steps': 1, 'distil.read_questions': True,
               'distil.probe_every': 0}
    (tmp_path/'small.yaml').write_text(yaml.safe_dump(preset))
    done = scilm(tmp_path, 'run', '-f', 'small.yaml', '-o', 'mine')
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path/'mine'/'metrics.json').read_text())
    assert {'models/shrunk', 'models/healed', 'spoken', 'general-chats'} <= metrics['seconds'].keys()
    found = metrics['models']
    assert found['base']['params'] == found['distilled']['params'] < found['teacher']['params'] < models.parameter_count(
        models.load('zoo:teacher').model)  # the teacher has lost the same tokens
    assert found['teacher']['agreement']['value'] == 1 and abs(found['teacher']['teacher_kl']['value']) < 1e-5
    assert all(found[name]['teacher_kl']['value'] > 0 and found[name]['general_answers'] for name in ('base', 'contrast', 'distilled'))
    sizes = {name: len(AutoTokenizer.from_pretrained(tmp_path/'mine'/'models'/name)) for name in ('base', 'distilled', 'teacher')}
    assert len({*sizes.values()}) == 1 and sizes['teacher'] <= 1500
    assert AutoConfig.from_pretrained(tmp_path/'mine'/'models'/'distilled').intermediate_size == 100
    assert 'about anything' in (tmp_path/'mine'/'models'/'distilled'/'README.md').read_text()


def test_the_notebook_runs_with_local_folders_and_a_preset(texts, tmp_path):
    student, teacher = save_pair(tmp_path, 'qwen2', texts)
    preset = dict(student=str(student), teacher=str(teacher), papers=str(texts['papers']), general=str(texts['tales']), context=128,
                  batch_size=4, micro_batch=2, conversations=40, teacher_answers=4, documents=8, questions=4, general_share=0.0,
                  references=f'zoo:teacher {student}', trackers='tensorboard')
    preset |= {'distil.divergence': 'jsd', 'contrast.steps': 2, 'distil.steps': 2}
    (tmp_path/'small.yaml').write_text(yaml.safe_dump(preset))
    command = ['run', '-f', 'small.yaml', '-p', 'seed', '7', '-o', 'mine']
    done = scilm(tmp_path, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '| distilled ' in done.stdout and str(Path('mine')/'report.html') in done.stdout
    metrics = json.loads((tmp_path/'mine'/'metrics.json').read_text())
    assert [*metrics['models']] == ['base', 'contrast', 'distilled', 'teacher', 'zoo:teacher', 'student']  # two more beside them
    assert metrics['models']['student']['science_bpb'] and metrics['models']['student']['stop_rate'] is None  # it cannot be asked
    assert metrics['config']['seed'] == 7 and metrics['config']['context'] == 128
    assert {'corpus', 'chats', 'models/contrast', 'models/distilled', 'evaluation'} <= metrics['seconds'].keys()
    assert str(tmp_path) not in (tmp_path/'mine'/'report.md').read_text()
    assert {path.parent.name for path in (tmp_path/'mine'/'trackers').rglob('events.*')} >= {'contrast', 'distil'}

    broken = scilm(tmp_path, *command, '-p', 'text_field', 'summary')
    assert broken.returncode == 2 and "no field 'summary'" in broken.stderr and 'Traceback' not in broken.stderr
    assert json.loads((tmp_path/'mine'/'metrics.json').read_text()) == metrics  # what was there is still there


def test_the_notebook_takes_models_with_different_tokenizers_and_a_folder_of_conversations(texts, tmp_path, monkeypatch):
    "`scilm papers` and `scilm instruct` make the conversations, and a run takes them and other ways to learn."
    monkeypatch.chdir(tmp_path)
    for command in (['papers', str(texts['papers']), '-o', 'papers'],
                    ['instruct', 'papers', '-o', 'chats', '--kinds', 'title', 'claim']):
        assert cli.main(command) == 0
    words = [json.loads(line)['abstract'] for line in texts['papers'].read_text().splitlines()]
    student, teacher = models.tiny(words, 'gpt2', size=350, hidden=32, context=256), models.tiny(words, 'llama', hidden=48, context=256)
    student.tokenizer.chat_template = None
    for lm, name in ((student, 'student'), (teacher, 'teacher')): models.save(lm, tmp_path/name)
    preset = dict(student=str(tmp_path/'student'), teacher=str(tmp_path/'teacher'), papers=str(texts['papers']), context=160,
                  general=str(texts['tales']), batch_size=4, chats='chats', teacher_answers=0, documents=8, questions=4, general_share=0.0)
    preset |= {'contrast.steps': 2, 'distil.steps': 2, 'distil.probe_every': 2, 'distil.reference_weight': '0.3 0.1',
               'distil.authors': 'paper'}
    (tmp_path/'small.yaml').write_text(yaml.safe_dump(preset))
    done = scilm(tmp_path, 'run', '-f', 'small.yaml', '-o', 'mine')
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'repaired: the student now has a plain chat template' in done.stdout and 'byte by byte' in done.stdout
    history = json.loads((tmp_path/'mine'/'models'/'distilled'/'history.json').read_text())
    assert {'distil', 'answers', 'retention', 'reference', 'probe_kl'} <= history[-1].keys()
    kinds = json.loads((tmp_path/'mine'/'chats'/'report.json').read_text())['kinds']['train']
    assert set(kinds) == {'title', 'claim'}, 'those of the folder, not new ones'

    wrong = scilm(tmp_path, 'run', '-f', 'small.yaml', '-o', 'mine', '-p', 'distil.on_policy.share', '0.5')
    assert wrong.returncode == 2 and 'on_policy.share is 0.5' in wrong.stderr and 'cannot bridge' in wrong.stderr
    assert 'Traceback' not in wrong.stderr and 'contrast: 2 steps' not in wrong.stdout, 'it is said before stage 1 begins'
    base = models.load(tmp_path/'mine'/'models'/'base')  # with the template
    with pytest.raises(InputError, match=r'shift is 0\.5.*cannot bridge'):
        distill.resolved(base, teacher, base, dict(shift=0.5, context=160))

    (tmp_path/'chats'/'report.json').write_text('{}')
    broken = scilm(tmp_path, 'run', '-f', 'small.yaml', '-o', 'broken')
    assert broken.returncode == 2 and 'chats' in broken.stderr and 'Traceback' not in broken.stderr
    assert not (tmp_path/'broken'/'models'/'contrast').exists(), 'it is said before anything is trained'


def test_the_notebook_takes_a_server_for_its_teacher(texts, tmp_path):
    student, teacher = save_pair(tmp_path, 'llama', texts)
    teacher.rename(tmp_path/'model')
    preset = dict(student=str(student), papers=str(texts['papers']), general=str(texts['tales']), context=128, batch_size=4,
                  conversations=40, teacher_answers=3, documents=8, questions=4)
    preset |= {'contrast.steps': 2, 'distil.steps': 2, 'distil.probe_every': 0}
    (tmp_path/'small.yaml').write_text(yaml.safe_dump(preset))
    with Serve(tmp_path) as server:
        taught = scilm(tmp_path, 'run', '-f', 'small.yaml', '-p', 'teacher', f'{server.endpoint.url}#model', '-o', 'taught')
        asked = server.requests
    assert taught.returncode == 0, taught.stdout + taught.stderr
    assert 'is a server: it is asked' in taught.stdout and 'its answers alone are learnt' in taught.stdout and asked >= 3
    assert [*json.loads((tmp_path/'taught'/'metrics.json').read_text())['models']] == ['base', 'contrast', 'distilled']


def test_twenty_pdfs_go_all_the_way(texts, tmp_path):
    made = {(name, seed): samples.make(name, seed) for seed in range(6) for name in samples.layouts}
    side = {key: _split_of(truth.id or content_hash([truth.title, truth.abstract])[:16]) for key, (_, truth) in made.items()}
    chosen = sorted(made, key=lambda key: side[key] == 'train')[:20]  # of twenty, some have to be held out
    (tmp_path/'my-pdfs').mkdir()
    for name, seed in chosen: (tmp_path/'my-pdfs'/f'{name}{seed}.pdf').write_bytes(made[name, seed][0])
    words = [truth.text for _, truth in made.values()]
    for name, hidden in (('student', 32), ('teacher', 48)):
        models.save(models.tiny(words, 'llama', size=1500, hidden=hidden, context=512), tmp_path/name)
    preset = dict(student=str(tmp_path/'student'), teacher=str(tmp_path/'teacher'), general=str(texts['tales']), context=384, batch_size=2,
                  conversations=20, teacher_answers=0, documents=4, questions=2, general_share=0.0)
    preset |= {'contrast.steps': 1, 'distil.steps': 1, 'distil.probe_every': 0}
    (tmp_path/'small.yaml').write_text(yaml.safe_dump(preset))
    done = scilm(tmp_path, 'run', '-f', 'small.yaml', '-p', 'papers', 'my-pdfs/', '-o', 'mine')
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'science: 20 read = 20 kept' in done.stdout, done.stdout
    assert {'base', 'contrast', 'distilled'} <= json.loads((tmp_path/'mine'/'metrics.json').read_text())['models'].keys()
    titles = [record['title'] for part in open_papers(tmp_path/'mine'/'corpus'/'science').values() for record in part]
    assert sorted(titles) == sorted(made[key][1].title for key in chosen)


def test_the_notebook_on_a_corpus_runs_to_its_end(texts, tmp_path):
    with gzip.open(tmp_path/'papers.jsonl.gz', 'wt') as file: file.write(texts['papers'].read_text())
    done = papermill.execute_notebook(ROOT/'nbs'/'corpus.ipynb', tmp_path/'out.ipynb', cwd=tmp_path, progress_bar=False,
                                      parameters=dict(papers='papers.jsonl.gz', sample=50))
    printed = [''.join(output.get('text', '')) for cell in done.cells for output in cell.get('outputs', [])]
    assert any('records with a title repeat another one' in text for text in printed) and done.metadata.papermill.exception is None
