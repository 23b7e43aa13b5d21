"""What the benchmark notebook and the GPU script measure, at toy size: the work is the same for all, the counts are right, they run."""
import ast
import gzip
import importlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import ended, forked
from test_pipeline import write_texts
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scilm_adapt.files import staged_folder
from scilm_adapt.models import hidden_states, logits_of, save
from scilm_adapt.running import MALLOC

FOLDER = Path(__file__).resolve().parents[1]/'nbs'/'_benchmark'


sys.path.insert(0, str(FOLDER))  # as when a script there is run
reading, steps, gpu, growth, parts = map(importlib.import_module, ('reading', 'steps', 'gpu', 'growth', 'parts'))
needs_trl = pytest.mark.skipif(find_spec('trl') is None, reason='TRL is not installed')


@pytest.fixture(scope='module')
def models(tmp_path_factory) -> Path:
    steps.prepare(folder := tmp_path_factory.mktemp('models'), small=True)
    return folder


@pytest.fixture(scope='module')
def sharp(tmp_path_factory) -> Path:
    "The same with larger weights, so that a token feels what was before it."
    steps.prepare(folder := tmp_path_factory.mktemp('sharp'), small=True)
    lm = steps.open_model(folder, 'student')
    with torch.no_grad(): [weight.mul_(6) for weight in lm.model.parameters() if weight.ndim > 1]
    with staged_folder(folder/'student') as aside: save(lm, aside)
    return folder


def asked(what: str, folder: Path, script: str = 'steps', **settings) -> dict:
    "As the notebook asks: in a process of its own."
    done = subprocess.run([sys.executable, FOLDER/f'{script}.py', what, folder, json.dumps(settings)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_trl
def test_all_contestants_have_the_same_loss_in_every_round(models):
    found = steps.contest(models, ['ours', 'gkd', 'gold'], rounds=1)
    for name in ('ours', 'gkd', 'gold'):
        assert found['loss'][name] == pytest.approx([found['loss']['ours'][0]]*(1 + steps.WARM), rel=1e-5) and found['seconds'][name] > 0


@needs_trl
def test_on_policy_everybody_writes_answers_of_full_length(models):
    found = steps.contest(models, ['ours', 'gkd', 'distillation'], rounds=1, on_policy=True)
    for losses in found['loss'].values():
        assert len(set(losses)) > 1                                     # other answers every time
        assert losses == pytest.approx([found['loss']['ours'][0]]*len(losses), rel=0.3)
    student = steps.open_model(models, 'student')
    batch = steps.our_batch(models, student, True)()
    assert batch['input_ids'].shape == (4, 16) and int(batch['count']) == 4*8
    assert torch.equal(batch['input_ids'][:, :8], steps.conversations(models).batch([0, 1, 2, 3])['input_ids'][:, :8])


def test_ours_runs_without_trl(models):
    found = steps.contest(models, ['ours'], rounds=1)
    assert found['seconds']['ours'] > 0 and found['MiB'] >= 0 and len(found['rounds']['ours']) == 1 + steps.WARM


def alone(folder: Path) -> tuple[float, int]:
    "The loss of a token and the number of them, of documents that are read one by one."
    model, nats, count = steps.open_model(folder, 'student').model, 0.0, 0
    with torch.no_grad():
        for ids in reading.documents(folder):
            logits = model(torch.tensor([ids])).logits[0]
            nats += torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction='sum').item()
            count += len(ids) - 1
    return nats/count, count


@needs_trl
def test_all_readers_have_the_loss_of_documents_read_one_by_one(sharp, monkeypatch):
    monkeypatch.setattr(reading, 'USEFUL', 0.0)                         # whole documents for ours, too
    found = reading.contest(sharp, ['ours', *reading.OTHERS], rounds=1)
    loss, count = alone(sharp)
    assert found['targets'] == count and found['seconds'].keys() == found['loss'].keys() == {'ours', *reading.OTHERS}
    for losses in found['loss'].values(): assert losses == pytest.approx([loss]*(1 + steps.WARM), rel=1e-5)


def test_ours_and_the_plain_loop_read_the_same_where_documents_are_cut(sharp):
    found = reading.contest(sharp, ['ours', 'plain'], rounds=1)
    assert found['loss']['ours'] == pytest.approx(found['loss']['plain'], rel=1e-5)
    assert found['targets'] == alone(sharp)[1]                          # each is learnt once, as in whole documents


@needs_trl
def test_a_reader_of_trl_learns_every_token_but_each_documents_first(models):
    steps_of, counts = reading.trl_step, []
    def counting(trainer):
        step = steps_of(trainer)
        return lambda inputs, count: counts.append(int(count)) or step(inputs, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, 'trl_step', counting)
        for name in ('sft', 'sft, packed'): reading.OTHERS[name](models, 'no')()
    assert sum(counts) == 2*sum(len(ids) - 1 for ids in reading.documents(models)) and len(counts) > 2


def test_token_contrast_is_added_to_the_same_step(models):
    found = reading.token(models, ['without', 'with'], rounds=1)
    assert found['loss']['with'] == pytest.approx(found['loss']['without'], rel=1e-6)
    assert len(found['token']) == len(found['loss']['with']) == 1 + reading.WARM and min(found['token']) > 0
    only = reading.token(models, ['without'], rounds=1)
    assert not only['token'] and only['loss']['without'] == pytest.approx(found['loss']['without'])


def test_every_part_of_the_loss_is_added_to_the_same_reading_in_turns(models):
    found = reading.parts(models, rounds=2)
    assert {way: len(times) for way, times in found['rounds'].items()} == dict.fromkeys([*reading.PARTS, 'chains'], 2 + reading.WARM)
    assert found['parts'] == dict(alone=[], chains=[]) | {name: [name] for name in reading.PARTS if name != 'alone'}
    assert all(value > 0 for value in found['seconds'].values()) and 1 < found['papers'] <= 5
    same = [found['lm'][way] for way in reading.PARTS]  # the same rows and weights: what is added does not change what reading is
    assert all(losses == pytest.approx(same[0], rel=1e-5) for losses in same)


def test_papers_that_are_unlike_make_the_same_batch_without_being_compared(models):
    texts, tokenizer = reading.papers(16, 30), steps.open_model(models, 'student').tokenizer
    wanted, found = (batch['pairs'] for batch in (reading.pair_batch(tokenizer, texts, 64), parts.unlike(tokenizer, texts, 64)))
    for one, other in ((wanted.rows, found.rows), (wanted.whole, found.whole)):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_pairs_in_little_memory_have_the_same_loss(models):
    whole, little = reading.pairs(models, 12), reading.pairs(models, 12, chunk=4)
    assert little['loss'] == pytest.approx(whole['loss'], rel=1e-5) and little['MiB'] > 0


def test_both_ways_of_writing_write_equally_much(models):
    found = reading.writing(models, rounds=1)
    size = reading.SMALL
    assert found['shape'] == dict.fromkeys(('greedy', 'contrastive'), [size['prompts'], size['prompt'] + size['answer']])


def test_a_contest_of_readers_is_a_process_of_its_own(models):
    assert asked('contest', models, 'reading', names=['ours', 'plain'], rounds=1)['seconds'].keys() == {'ours', 'plain'}


@pytest.mark.parametrize('kind', ['jsd', 'forward_kl'])
def test_the_naive_loss_is_the_same_as_the_chunked_one(models, kind):
    found = steps.loss_alone(models, ['naive', 'chunked'], kind, vocabulary=300, tokens=50, width=16, rounds=1)
    assert found['loss']['chunked'] == pytest.approx(found['loss']['naive'], rel=1e-5)


def test_the_peak_is_that_of_the_block_and_not_of_before():
    torch.ones(2**26)                                                   # 256 MiB, given back
    with steps.Peak() as peak: torch.ones(2**24)                        # 64 MiB
    assert 60 < peak.MiB < 110


def test_cached_and_live_epochs_compare_the_same_words(models):
    found = steps.cache(models, rounds=1, batches=2, k=64)
    assert found['bytes'] == 64*2 + 2 and found['read'] > found['used'] > 0
    assert found['loss']['cached'][0] == pytest.approx(found['loss']['live'][0], rel=0.5)


@pytest.mark.parametrize('name', ['student', 'teacher', 'large'])
def test_operations_are_those_that_torch_counts(models, name):
    lm, ids = steps.open_model(models, name), torch.randint(400, (4, 16))
    batch = dict(input_ids=ids, position_ids=torch.arange(16).expand(4, 16))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits_of(lm.model, hidden_states(lm.model, batch)[:, 8:])
    attention = lm.model.config.num_hidden_layers*2*4*16*16*lm.model.config.hidden_size  # as whole products it is counted twice
    for of in (steps.forward_operations, gpu.operations):
        assert of(lm.model.config, 4, 16, 32) + attention == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_shares_of_the_machine_are_shares(models):
    found = steps.use(models, rounds=1)
    assert len(found['share']) == 3 and all(0 < share < 2 for share in found['share'].values()) and found['rate'] > 1e8


def test_the_gpu_script_runs_small_without_what_a_gpu_machine_lacks(tmp_path):
    blocked = ['datasets', 'pyarrow', 'nbdev', 'papermill', 'IPython', 'trl', 'matplotlib', 'seaborn', 'sklearn', 'datasketch', 'ftfy']
    program = (f'import sys, runpy\nfor name in {blocked!r}: sys.modules[name] = None\nsys.argv = ["gpu.py", {str(tmp_path/"r.json")!r}, '
               f'"--small", "--rounds", "1"]\nrunpy.run_path({str(FOLDER/"gpu.py")!r}, run_name="__main__")')
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path/'r.json').read_text())
    assert {'date', 'hardware', 'versions', 'rate', 'shapes', 'minutes', 'losses', 'writing'} <= result.keys()
    assert result['ways'].keys() == {'naive', 'ours', 'cached'}
    assert result['ways']['ours']['loss'] == pytest.approx(result['ways']['naive']['loss'], rel=0.02)  # 16-bit products
    steps = [*result['ways'].values(), *result['reading'].values(), *result['large_reading'].values(), *result['large_ways'].values()]
    assert len(steps) == 6 and all(row['tokens_per_second'] > 0 and row['share'] > 0 for row in steps)
    kinds = {name.partition(', ')[2].partition(',')[0] for name in result['losses']}
    assert kinds == {*reading.PARTS, *gpu.divergences}
    rows = {row['name']: row for row in result['rows']}
    assert all(rows[f'{name}: 32 from 64 bits']['met'] for name in result['losses']), result['losses']
    assert len(rows) == len(result['rows']) and all(row.keys() == {'name', 'value', 'target', 'met'} for row in result['rows'])
    assert rows["stage 2, TRL's loss"]['value'] == 'not installed'
    wanted = sorted(row['target'] for name, row in rows.items() if 'share of the rate' in name and row['met'] is not None)
    assert wanted == ['≥ 0.4', '≥ 0.4', '≥ 0.45', '≥ 0.45']


def test_what_has_no_room_or_no_time_on_a_gpu_is_named_and_the_rest_goes_on(monkeypatch, capsys):
    def full(*_, **__): raise torch.OutOfMemoryError
    monkeypatch.setattr(gpu, 'writing', full)
    monkeypatch.setattr(gpu, 'exactness', lambda device: dict(one=0.0, other=1.0))
    done = gpu.measured(gpu.SMALL, 1, 'cpu')
    met = {row['name']: row['met'] for row in done['rows']}
    assert met['other: 32 from 64 bits'] is False and met['one: 32 from 64 bits'] and 'NOT MET' in capsys.readouterr().out
    assert 'out of memory' in [row['value'] for row in done['rows']] and done['large_ways']['ours']['loss'] > 0
    late = gpu.measured(gpu.SMALL, 1, 'cpu', minutes=0)
    assert [row['value'] for row in late['rows'][1:]] == ['no time was left']*6 and not any(row['met'] for row in late['rows'][1:])


@needs_trl
def test_in_the_gpu_script_trl_computes_the_same_loss():
    shapes = gpu.SMALL
    student, teacher = (gpu.model(shapes[name], shapes['vocabulary'], 32, 'cpu', torch.float32, seed)
                        for seed, name in enumerate(('student', 'teacher')))
    losses = gpu.ways(student.train(), teacher.eval(), gpu.tokens(shapes, 'cpu'))
    values = {name: losses[name]().item() for name in ('naive', 'ours', 'trl')}
    assert values == pytest.approx(dict.fromkeys(values, values['naive']), rel=1e-4)


def notebook_code() -> list[str]:
    "Sources of the benchmark's code cells."
    notebook = json.loads((FOLDER.parent/'benchmark.ipynb').read_text(encoding='utf-8'))
    return [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code']


def test_the_notebook_reads_papers_pdfs_and_tokens(tmp_path, capsys):
    """Its cells above the contests. One measurement is the process of its own that it is for a reader, all others are forks of this one,
    each with nothing but its own imports: ten times to import torch would be a minute."""
    write_texts(tmp_path/'papers.jsonl', 'papers')
    (tmp_path/'papers.jsonl.gz').write_bytes(gzip.compress((tmp_path/'papers.jsonl').read_bytes()))
    sources, scope = notebook_code(), {}
    first, begin = (next(n for n, source in enumerate(sources) if source.startswith(start)) for start in ('import gzip', 'scripts = '))
    asked = dict(papers=tmp_path/'papers.jsonl.gz', vocabulary=400, context=64, repeats=2, small=True)
    def measured(code: str) -> dict:
        def action() -> None:
            os.chdir(scope['work'])
            with open(tmp_path/'said', 'w') as said, redirect_stdout(said): exec(code, dict(__name__='__main__'))
        assert ended(forked(action)) == 0, code
        print((tmp_path/'said').read_text())
        return dict(seconds=1.0, MiB=1.0)
    for source in sources[first:begin]:
        exec(source, scope)
        if source.startswith('papers: str'): scope.update(asked)
        if 'def measured' in source:
            # memory is looked at ten times a second, and the import alone may take less
            alone = scope['measured']("import scilm_adapt, time\n# begin\ntime.sleep(0.4)\nprint('began')")
            scope['measured'] = measured
    shutil.rmtree(scope['work'])
    printed = capsys.readouterr().out
    assert 0.4 < alone['seconds'] < 10 and alone['MiB'] > 1 and 'began' in printed
    assert '  200  ' in printed and 'kept' in printed and printed.count('of the places hold text') == 2 and 'rows of 64' in printed
    assert printed.count('ms a question') == 2 and printed.count('plain, once / ours, once: 1.00 in time') == 2
    if find_spec('typst'): assert 'pages, ' in printed


# --- growth

def test_synthetic_records_repeat_each_other_as_they_say():
    found = [*growth.records(3000)]
    assert found == [*growth.records(3000)] and found[:500] == [*growth.records(500)], 'more of them begin with the fewer'
    assert len({record['id'] for record in found}) == 3000
    texts = [record['abstract'] for record in found]
    assert 0.06 < 1 - len({*texts})/3000 < 0.10  # copies and what has no text of its own; a word changed is another text
    assert sum(text is None for text in texts) > 10 and abs(np.mean([len(text.split()) for text in texts if text]) - 100) < 8


def test_what_work_takes_is_seen(tmp_path):
    program = """
import json, time, growth, numpy as np
def work():
    block, pages = np.ones(40*2**20, np.uint8), np.memmap('FILE', np.uint8, 'r')
    assert pages.sum() == 50*2**20
    start, used = time.perf_counter(), time.process_time()  # of which the second also runs for who watches
    while min(time.perf_counter() - start, time.process_time() - used) < 0.3: block += 1
print(json.dumps(growth.measured(work)))"""  # in a process of its own: one that has done other work has memory lying about
    (tmp_path/'file').write_bytes(b'\1'*(50*2**20))
    program = program.replace('FILE', str(tmp_path/'file'))
    done = subprocess.run([sys.executable, '-c', program], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert 0.3 <= found['seconds'] < 1 and 35 < found['own'] < 75 and 85 < found['MiB'] < 130 and found['wall'] >= 0.3


def test_a_step_of_a_larger_model_takes_more(tmp_path):
    small, large = (asked('step', tmp_path, 'growth', context=32, vocabulary=512, shape=shape, steps=2)
                    for shape in ((32, 1, 2), (384, 4, 4)))
    assert large['weights'] > 10*small['weights'] and large['seconds'] > 0 < small['seconds']
    assert large['MiB'] > 0.8*4*4*large['weights']/2**20, 'weights, gradients and two moments of four bytes, but for what lay about'


@needs_trl
@pytest.mark.slow
def test_malloc_is_as_it_comes_also_where_who_runs_the_page_has_tuned_it(tmp_path, monkeypatch):
    cells = json.loads((FOLDER.parent/'benchmark.ipynb').read_text(encoding='utf-8'))['cells']
    source = next(text for cell in cells if 'def ask(' in (text := ''.join(cell['source'])))
    wanted = next(node for node in ast.parse(source).body if getattr(node, 'name', '') == 'ask')
    names = dict(os=os, sys=sys, json=json, subprocess=subprocess, MALLOC=MALLOC, scripts=tmp_path, work=tmp_path)
    exec(compile(ast.Module([wanted], []), 'ask', 'exec'), names)
    (tmp_path/'steps.py').write_text('import json, os\nprint(json.dumps({k: v for k, v in os.environ.items() if k.startswith("MALLOC")}))')
    for name, value in MALLOC.items(): monkeypatch.setenv(name, value)
    assert names['ask']('contest') == {} and names['ask']('contest', tuned=True) == MALLOC


def test_the_notebook_prints_every_goal_with_what_was_reached(tmp_path, capsys):
    "Its cells on reading and distillation, with `ask` calling the functions here: processes of their own would take minutes."
    sources = notebook_code()
    begin = next(n for n, source in enumerate(sources) if source.startswith('scripts = '))
    scope = dict(rounds=1, small=True, growth=False, work=tmp_path)
    imports = next(source for source in sources if source.startswith('import gzip'))
    exec(imports, scope)
    scope['mixed_precision'] = lambda device: 'bf16'                    # on every machine also what only some of them measure
    body, _, last = sources[begin].rpartition('\n\n\n')
    exec(body, scope)
    assert scope['ask']('prepare', small=True)['student'] == 36512      # the real one, once
    known = {}                                                          # tuned or not is the same here, and measured once
    def ask(what: str, tuned: bool = False, script: str = 'steps', environment: dict | None = None, **settings) -> dict:
        if (key := json.dumps([script, what, settings])) not in known:
            known[key] = getattr(dict(steps=steps, reading=reading, growth=growth)[script], what)(tmp_path/'models', **settings)
        return known[key]
    scope['ask'] = ask
    for source in [last, *sources[begin + 1:-1]]: exec(source, scope)
    printed = capsys.readouterr().out
    for goal in ("gkd's time / ours, default malloc", "gold's time / ours, tuned malloc", "distillation's time / ours, default malloc",
                 "our memory / gkd's, tuned malloc", 'jsd, 152,000 words: our memory / naive', 'forward_kl, 32,000 words: our time / naive',
                 'live / cached epoch', 'three live / building and three cached', 'tokens read / tokens used',
                 'distillation, large from teacher', "our time / plain loop's, tuned malloc", "our tokens/s / SFTTrainer's, default malloc",
                 "our tokens/s / Trainer's, tuned malloc",
                 "largest difference of our loss from the plain loop's", 'token contrast: time with / without',
                 'token contrast: memory with / without', 'memory of 1,024 pairs / 32', "contrastive search's time / greedy's, large",
                 "chains: a token's time / alone", "mistakes: a token's time with / without",
                 'busy machine: time as it is / GOMP_SPINCOUNT=0', "a real model's shape: our learnt tokens/s / gkd's, tuned malloc"):
        line = next(line for line in printed.splitlines() if goal in line)
        assert line.rstrip().endswith('reached')
    table = json.loads((tmp_path/'bench-cpu.json').read_text())
    assert [row['name'] for row in table['rows'] if row['met'] is None] == ['Liger']
    assert printed.count('reached') == len(table['rows']) - 1 == 55 and {'torch', 'trl'} <= table['versions'].keys() and table['hardware']
    assert all(row.keys() == {'name', 'value', 'target', 'met'} for row in table['rows'])
    missed = dict(name='one', value=3.0, target='≥ 4', met=False)
    assert '#ffc9c9' in scope['coloured'](missed) and 'missed' in scope['coloured'](missed)
    assert '#ffc9c9' not in scope['coloured'](missed | dict(value='not installed', met=None))
