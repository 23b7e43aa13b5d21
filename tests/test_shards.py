"DeepSpeed's ZeRO-3 by two real processes: the training of one, looked at before each step, and continued with one process or two."
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pipeline import save_pair, write_texts
from test_processes import train
from world import WORDS, descent, free_port, two_processes
from yaml import safe_dump

from scilm_adapt.checkpoints import Checkpoints
from scilm_adapt.errors import InputError
from scilm_adapt.models import tiny
from scilm_adapt.processes import run_script
from scilm_adapt.running import shipped_notebook
from scilm_adapt.runs import rng
from scilm_adapt.shards import Zero3, is_shared_out, local_part, own_part, shared, whole_model
from scilm_adapt.tokens import encode_document, pack
from scilm_adapt.training import fit, lm_loss, muon

torch.set_num_threads(1)
PRESET = Path(__file__).resolve().parents[1]/'nbs'/'presets'/'accelerate'/'zero3.yaml'
# As in test_processes; DeepSpeed adds up gradients in 32 bits, where plain descent can be compared.
CASES = dict(micro_batches=dict(rows=5, papers=3, micro_batch=2, bits=32, divergence='forward_kl', plain=True),
             whole_batches=dict(rows=8, papers=4, micro_batch=None, bits=32, divergence='jsd', plain=True),
             adamw=dict(rows=6, papers=3, micro_batch=1, bits=32, divergence='reverse_kl'))


def reading(folder: Path | None = None, steps: int = 6, optimizers=None, loss=None, own_head: bool = False, hidden: int = 32, **options):
    "A small student that reads, with checkpoints in `folder` after each third step; its history, and the student."
    texts = [' '.join(rng('text', n).choice(WORDS, 12)) for n in range(24)]
    lm = tiny(texts, 'llama', hidden=hidden, seed=3)
    if own_head:
        lm.model.lm_head.weight = torch.nn.Parameter(lm.model.lm_head.weight.detach().flip(0))
        lm.model.config.tie_word_embeddings = False
    packed = pack([encode_document(lm.tokenizer, text) for text in texts], 48)
    def batch_at(step: int) -> dict:
        batch = packed.batch([(2*step + n) % len(packed) for n in range(2)])
        return batch | dict(step=torch.tensor(float(step)))
    kept = Checkpoints(folder, steps=3) if folder else None
    setting = dict(optimizers=optimizers, learning_rate=0.1) if optimizers else dict(learning_rate=3e-3)
    history = fit(lm.model, batch_at, loss or (lambda model, batch: dict(loss=lm_loss(model, batch))), steps, checkpoints=kept,
                  **setting | dict(precision='no') | options)
    return history, lm


def stopped(folder: Path, steps: int = 6, **options) -> None:
    "The same, ended after four steps, as if the machine had gone: a checkpoint of the third step is left."
    def end(step: int, model: torch.nn.Module) -> None:
        if step == 3: raise KeyError('gone')
    with pytest.raises(KeyError): reading(folder, steps, on_step_end=end, **options)


def turns(model: torch.nn.Module, batch: dict) -> dict:
    "A loss that needs nothing but the embedding in odd steps."
    if not batch['step'] % 2: return dict(loss=lm_loss(model, batch))
    return dict(loss=model.get_input_embeddings()(batch['input_ids']).square().mean()*len(batch['input_ids'])/2)


def broken(model: torch.nn.Module, batch: dict) -> dict:
    "A loss that is no number in the second step, after the gradients were formed as usual."
    return dict(loss=lm_loss(model, batch)*(math.nan if batch['step'] == 1 else 1.0))


WAYS = dict(
    turns=dict(loss=turns, optimizers=descent),
    broken=dict(loss=broken, optimizers=descent, skip_bad=1),
    own_head=dict(own_head=True, optimizers=descent),
    checkpointing=dict(gradient_checkpointing=True, optimizers=descent),
    clipped=dict(clip=0.01, optimizers=descent),
    half=dict(precision='bf16', optimizers=descent))


def line() -> torch.nn.Module:
    "A model that is none of transformers', trained for a few steps."
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    def batch_at(step: int) -> dict:
        return dict(input_ids=torch.randn(4, 4, generator=torch.Generator().manual_seed(step)), count=torch.tensor(4.0))
    fit(model, batch_at, lambda model, batch: dict(loss=model(batch['input_ids']).square().sum()/batch['count']), 3, learning_rate=0.1,
        optimizers=descent, precision='no')
    return model


def numbers(history: list[dict]) -> list[list[float]]:
    return [[row['loss'], row['grad_norm'], row.get('skipped', 0)] for row in history]


def said(action) -> str:
    "What an InputError says that an action raises."
    try: action()
    except InputError as error: return str(error)
    return ''


def work(folder: Path) -> None:
    "What each of two processes does; it writes down what it saw."
    os.environ.update(ACCELERATE_USE_DEEPSPEED='true', ACCELERATE_DEEPSPEED_ZERO_STAGE='3')
    rank, seen, engines = os.environ['RANK'], {}, []
    prepare = Zero3.prepare
    def watched(self, *parts):
        prepared = prepare(self, *parts)
        engines.append(prepared[0])
        return prepared
    Zero3.prepare = watched
    def keep(name: str, history: list[dict], lm) -> None:
        assert is_shared_out(lm.model), name
        assert sum(local_part(shared(p)).numel() for p in lm.model.parameters()) < 0.6*sum(p.ds_numel for p in lm.model.parameters())
        whole = whole_model(lm.model)
        assert whole(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()
        save_file({key: value.detach().clone() for key, value in whole.named_parameters()}, folder/f'{name}.{rank}.safetensors')
        seen[name] = numbers(history)
    for name, case in CASES.items(): keep(name, *train(case))
    for name, options in WAYS.items(): keep(name, *reading(**options))
    stopped(folder/'two, then one')
    stopped(folder/'two, then two')
    keep('two, then two', *reading(folder/'two, then two'))
    keep('one, then two', *reading(folder/'one, then two'))
    seen['line'] = [shared(p).full_tensor().tolist() for p in line().parameters()]
    seen['muon'] = said(lambda: reading(optimizers=muon))
    seen['fp16'] = said(lambda: reading(precision='fp16'))
    seen['other'] = said(lambda: reading(folder/'two, then two', hidden=16))
    seen['left'] = sum(flat.untyped_storage().nbytes() for engine in engines for flat in engine.optimizer.fp32_partitioned_groups_flat)
    (folder/f'seen.{rank}').write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def together(tmp_path_factory) -> Path:
    "The folder in which two processes left what they found."
    pytest.importorskip('deepspeed')
    folder = tmp_path_factory.mktemp('shards')
    stopped(folder/'one, then two')
    two_processes(__file__, folder)
    return folder


def found(together: Path, name: str) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    "What both processes found: the history and the weights, which are the same in both."
    (first, weights), (second, others) = ((json.loads((together/f'seen.{rank}').read_text())[name],
                                           load_file(together/f'{name}.{rank}.safetensors')) for rank in (0, 1))
    assert repr(first) == repr(second) and all(torch.equal(weights[key], others[key]) for key in weights)
    return first, weights


def apart(weights: dict[str, torch.Tensor], model: torch.nn.Module) -> torch.Tensor:
    "How far each weight is from that of the model."
    return torch.cat([(weights[key] - p.detach()).abs().flatten() for key, p in model.named_parameters()])


def near(history: list, expected: list[dict], bound: float) -> bool:
    return all(math.isclose(one, other, rel_tol=bound) or (math.isnan(one) and math.isnan(other))
               for row, others in zip(history, numbers(expected), strict=True) for one, other in zip(row, others, strict=True))


@pytest.mark.parametrize('name', CASES)
def test_two_processes_with_zero3_distil_as_one(together, name):
    history, weights = found(together, name)
    expected, student = train(CASES[name])
    assert near(history, expected, 2e-5) and abs(history[0][0] - history[2][0]) > 0.01
    distance = apart(weights, student.model)
    if CASES[name].get('plain'): assert distance.max() < 1e-6
    else: assert distance.quantile(0.999) < 1e-6 and distance.max() < 1e-3  # AdamW makes a step of a gradient that is all rounding


@pytest.mark.parametrize('name', ['turns', 'broken', 'own_head', 'checkpointing', 'clipped'])
def test_steps_that_leave_weights_out_or_are_left_out_are_those_of_one_process(together, name):
    history, weights = found(together, name)
    expected, lm = reading(**WAYS[name])
    assert near(history, expected, 1e-5) and apart(weights, lm.model).max() < 1e-6
    assert [row[2] for row in history] == ([0, 1, 0, 0, 0, 0] if name == 'broken' else [0]*6)


def test_products_of_16_bits_are_on_where_they_are_asked_for(together):
    history, _ = found(together, 'half')
    expected, _ = reading(**WAYS['half'])
    exact, _ = reading(optimizers=descent)
    assert near(history, expected, 2e-2) and not near(history, exact, 1e-6)


@pytest.mark.parametrize('name', ['one, then two', 'two, then two', 'two, then one'])
def test_a_training_goes_on_with_one_process_or_two(together, name):
    expected, whole = reading()
    if name == 'two, then one':
        history, lm = reading(together/name)
        history, weights = numbers(history), dict(lm.model.named_parameters())
    else: history, weights = found(together, name)
    assert near(history, expected, 1e-4)
    distance = apart(weights, whole.model)
    assert distance.quantile(0.99) < 1e-5 and distance.max() < 2e-3, (distance.quantile(0.99), distance.max())


def test_any_module_can_be_shared_out(together):
    expected = [p.flatten().tolist() for p in line().parameters()]
    for rank in (0, 1):
        for one, other in zip(json.loads((together/f'seen.{rank}').read_text())['line'], expected, strict=True):
            assert one == pytest.approx(other, abs=1e-6)


def test_what_zero3_cannot_do_is_said_and_its_memory_is_given_back(together):
    seen = json.loads((together/'seen.0').read_text())
    assert 'several; take ddp.yaml' in seen['muon'] and 'precision is fp16' in seen['fp16'] and 'another model' in seen['other']
    assert seen['left'] == 0


def test_a_value_of_another_shape_is_not_taken_for_the_whole():
    weight = torch.zeros(4, 3)
    for value in (torch.arange(12.0).reshape(4, 3), torch.arange(12.0)): assert own_part(weight, value).shape == (4, 3)
    assert own_part(weight, torch.zeros(3, 4)).shape == (3, 4)  # which a checkpoint refuses by its shape


def test_a_whole_run_with_zero3_is_that_of_one_process(tmp_path):
    pytest.importorskip('deepspeed')
    texts = {name: write_texts(tmp_path/f'{name}.jsonl', name) for name in ('papers', 'tales')}
    student, teacher = save_pair(tmp_path, 'llama', texts)
    preset = dict(student=str(student), teacher=str(teacher), papers=str(texts['papers']), general=str(texts['tales']), context=128,
                  batch_size=4, micro_batch=2, conversations=70, teacher_answers=70, documents=6, questions=2, general_share=0.0)
    preset |= {'contrast.steps': 3, 'distil.steps': 4, 'distil.probe_every': 2, 'distil.warm_up': 1}
    (tmp_path/'small.yaml').write_text(safe_dump(preset))
    run_script(shipped_notebook(), preset | dict(out_dir=str(tmp_path/'alone')))
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', PRESET, '--num_processes', '2', '--main_process_port',
               str(free_port()), '-m', 'scilm_adapt', 'run', '-f', 'small.yaml', '-o', 'shared']
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''), capture_output=True,
                          text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('| distilled ') == 1 and (tmp_path/'shared'/'run.ipynb').exists()
    for name, bound in dict(base=0.0, contrast=1e-6, distilled=1e-5).items():
        one, other = (load_file(tmp_path/folder/'models'/name/'model.safetensors') for folder in ('alone', 'shared'))
        distance = torch.cat([(one[key] - other[key]).abs().flatten() for key in one])
        assert distance.quantile(0.99) <= bound, (name, distance.quantile(0.99))
    def keys(folder: Path) -> dict[str, str]:
        return {path.parent.relative_to(folder).as_posix(): json.loads(path.read_text()).get('key')
                for path in folder.rglob('manifest.json') if not path.parent.name.startswith('.')}
    alone, together = keys(tmp_path/'alone'), keys(tmp_path/'shared')
    follow = {'models/distilled', 'evaluation'}  # what they are made of are the weights of stage 1, which rounding has changed
    assert alone.keys() == together.keys() and {name for name in alone if alone[name] != together[name]} <= follow


if __name__ == '__main__': work(Path(sys.argv[1]))
