"""Distillation by two real processes: gradients exchanged, or the weights themselves shared out, it is the training of one."""
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from torch import distributed
from world import WORDS, descent, two_processes

from scilm_adapt.distill import batch_maker, distil_loss
from scilm_adapt.models import LanguageModel, build
from scilm_adapt.runs import rng
from scilm_adapt.shards import is_shared_out, whole_model
from scilm_adapt.teacher import LiveTeacher
from scilm_adapt.tokens import encode_chat, encode_document, pack, train_tokenizer
from scilm_adapt.training import _accelerator_for, _LossModule, adamw, fit, micro_batches, schedule

torch.set_num_threads(1)
# Rows of conversations and of papers in a step, rows computed at once, bits of a number, divergence, processes' way. AdamW divides a
# gradient by its size plus 1e-8, which in 64 bits is far above rounding; in 32 bits it is plain descent that can be compared.
CASES = dict(
    even=dict(rows=4, papers=4, micro_batch=None, bits=64, divergence='forward_kl'),
    micro_batches=dict(rows=8, papers=4, micro_batch=1, bits=64, divergence='jsd'),
    a_row_too_few_and_a_process_without_papers=dict(rows=5, papers=1, micro_batch=2, bits=64, divergence='reverse_kl'),
    in_32_bits=dict(rows=5, papers=3, micro_batch=2, bits=32, divergence='forward_kl', plain=True),
    shared_weights=dict(rows=6, papers=3, micro_batch=2, bits=64, divergence='jsd', shared=True),
    shared_weights_of_a_layer=dict(rows=5, papers=3, micro_batch=None, bits=64, divergence='forward_kl', shared=True),
    shared_weights_by_accelerate=dict(rows=5, papers=3, micro_batch=2, bits=64, divergence='jsd', accelerate=True))


def sentence(seed: int, words: int) -> str: return ' '.join(rng('sentence', seed).choice(WORDS, words)).capitalize() + '.'


def world(rows: int, papers: int, bits: int, divergence: str, **_):
    "A fresh student, its batches and its loss: the same in every process. Answers differ much in length."
    tokenizer = train_tokenizer([sentence(n, 12) for n in range(40)], 400)
    student, teacher = (build(tokenizer, hidden=hidden, layers=2, heads=2, context=64, seed=hidden) for hidden in (32, 48))
    for lm in (student, teacher): lm.model.to(getattr(torch, f'float{bits}'))
    asked = [(sentence(n, 3), sentence(n + 50, 1 + 9*(n % 2))) for n in range(24)]
    encoded = [encode_chat(tokenizer, [dict(role='user', content=one), dict(role='assistant', content=other)]) for one, other in asked]
    conversations = pack([ids for ids, _ in encoded], 48, [mask for _, mask in encoded])
    science = pack([encode_document(tokenizer, sentence(n + 100, 12)) for n in range(24)], 48)
    loss = distil_loss(LiveTeacher(teacher), divergence, retention_weight=0.5, answer_weight=0.3)
    return student, batch_maker(conversations, science, rows, papers, seed=0), loss


def train(case: dict) -> tuple[list[dict], LanguageModel]:
    student, batch_at, loss = world(**case)
    optimizer = dict(optimizers=descent, learning_rate=0.1) if case.get('plain') else dict(learning_rate=3e-3)
    return fit(student.model, batch_at, loss, 3, micro_batch=case['micro_batch'], precision='no', **optimizer), student


def train_shared(case: dict, layers: bool) -> tuple[list[dict], dict[str, torch.Tensor]]:
    "The loop in short, each process holding half of every weight (FSDP2); its root is the module whose forward pass is the loss."
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    (student, batch_at, loss), ranks = world(**case), distributed.get_world_size()
    mesh, module = init_device_mesh('cpu', (ranks,)), _LossModule(student.model, loss)
    for part in [*student.model.base_model.layers] if layers else []: fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)
    assert all(2*p.to_local().numel() == p.numel() for p in module.parameters() if len(p) % ranks == 0)
    optimizer, history = adamw(student.model, 3e-3)[0], []
    student.model.train()
    for step in range(3):
        total = torch.zeros((), dtype=torch.float64)
        for part in micro_batches(batch_at(step), case['micro_batch'], distributed.get_rank(), ranks):
            value = module(part)['loss']
            (value*ranks).backward()  # gradients are averaged over processes, as in fit
            total += value.detach()
        distributed.all_reduce(total)
        norm = torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0).full_tensor()
        for group in optimizer.param_groups: group['lr'] = 3e-3*schedule(step, 3)
        optimizer.step()
        optimizer.zero_grad()
        history.append(dict(loss=total.item(), grad_norm=norm.item()))
    return history, {name: p.full_tensor() for name, p in student.model.named_parameters()}


FSDP2 = dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2', FSDP_AUTO_WRAP_POLICY='TRANSFORMER_BASED_WRAP', FSDP_STATE_DICT_TYPE=
             'SHARDED_STATE_DICT', FSDP_RESHARD_AFTER_FORWARD='true', FSDP_CPU_RAM_EFFICIENT_LOADING='false')  # as in fsdp2.yaml


def train_by_accelerate(case: dict) -> tuple[list[dict], dict[str, torch.Tensor]]:
    "`fit` with FSDP2 as Accelerate does it. All that is overruled is that it does so on cards only."
    def sharing(*settings):
        accelerator = _accelerator_for(*settings)
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
        return accelerator
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FSDP2.items(): patch.setenv(name, value)
        patch.setattr('scilm_adapt.training._accelerator_for', sharing)
        history, student = train(case)
    assert is_shared_out(student.model)
    whole = whole_model(student.model)
    batch = dict(input_ids=torch.tensor([[5, 6, 7]]))
    assert not is_shared_out(whole) and whole(**batch).logits.isfinite().all()
    return history, dict(whole.named_parameters())


def work(folder: Path) -> None:
    "What each of two processes does: all cases, one after the other."
    rank = os.environ['RANK']
    for name, case in CASES.items():
        if case.get('shared'): history, weights = train_shared(case, layers=name.endswith('layer'))
        elif case.get('accelerate'): history, weights = train_by_accelerate(case)
        else:
            history, student = train(case)
            weights = dict(student.model.named_parameters())
        save_file({key: value.detach().clone() for key, value in weights.items()}, folder/f'{name}.{rank}.safetensors')
        (folder/f'{name}.{rank}.json').write_text(json.dumps(history))
    distributed.destroy_process_group()


@pytest.fixture(scope='module')
def together(tmp_path_factory) -> Path:
    "The folder in which two processes left what they found."
    folder = tmp_path_factory.mktemp('processes')
    two_processes(__file__, folder)
    return folder


@pytest.mark.parametrize('name', CASES)
def test_two_processes_distil_as_one(together, name):
    alone, student = train(CASES[name])
    first, second = (json.loads((together/f'{name}.{rank}.json').read_text()) for rank in (0, 1))
    # At most 8 rows of 48 numbers are added, each of which is rounded; three steps go as far as their learning rates.
    sums = 8*48*torch.finfo(getattr(torch, f'float{CASES[name]["bits"]}')).eps
    near = 3*0.1*sums if CASES[name].get('plain') else 3*3e-3*sums/1e-8
    for one, a, b in zip(alone, first, second, strict=True):
        assert a['loss'] == b['loss'] and math.isclose(one['loss'], a['loss'], rel_tol=sums + near)
        assert math.isclose(one['grad_norm'], a['grad_norm'], rel_tol=sums + near)
        assert all(math.isclose(one[part], a[part], rel_tol=sums + near) for part in ('distil', 'retention', 'answers') if part in a)
    assert abs(alone[0]['loss'] - alone[2]['loss']) > 0.01  # something was learnt, or nothing was compared
    weights, others = (load_file(together/f'{name}.{rank}.safetensors') for rank in (0, 1))
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    apart = max((weights[key] - parameter).abs().max().item() for key, parameter in student.model.named_parameters())
    assert apart < near, apart


if __name__ == '__main__': work(Path(sys.argv[1]))
