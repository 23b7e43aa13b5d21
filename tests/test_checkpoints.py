"""Checkpoints that are killed while they are written, damaged, too large for the disk, or shared out over two processes."""
import json
import math
import os
import pickle
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import ended, forked
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import distributed, nn

from scilm_adapt import checkpoints
from scilm_adapt.checkpoints import Checkpoints, OptimizerState, RngState, SettingsState, Weights, _flat, _restored
from scilm_adapt.errors import InputError
from scilm_adapt.files import _stamp, verified

torch.set_num_threads(1)
FILES = ['rank-00000.safetensors', 'rank-00000.json', 'manifest.json']


def model_of(step: int, size: int = 8) -> nn.Module:
    "A model whose weights are a function of the step."
    torch.manual_seed(step)
    return nn.Linear(size, size)


def save(kept: Checkpoints, step: int, **more: object) -> Path:
    return kept.save(step, dict(weights=Weights(model_of(step)), **more))


def loaded(kept: Checkpoints) -> int:
    "The step that was loaded, after the weights were found to be those of that step."
    model = model_of(10**6)
    step = kept.load(dict(weights=Weights(model)))
    assert not step or torch.equal(model.weight, model_of(step).weight)
    return step


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == 'truncate': os.truncate(path, len(content)//2)
    if how == 'zero': path.write_bytes(bytes(len(content)))
    if how == 'delete': path.unlink()
    if how == 'flip': path.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])


# --- state ------------------------------------------------------------------------------------------------------------------------

TENSORS = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]).flatmap(
    lambda kind: st.lists(st.integers(0, 2), max_size=3).map(lambda shape: torch.arange(math.prod(shape)).reshape(shape).to(kind)))
KEYS = st.text(max_size=3) | st.integers(0, 9) | st.just('$')
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3) | TENSORS
TREES = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.lists(x, max_size=3).map(tuple) | st.dictionaries(KEYS, x, max_size=3),
                     max_leaves=8)


def same(one: object, other: object) -> bool:
    if type(one) is not type(other): return False
    if isinstance(one, torch.Tensor): return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict): return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)): return len(one) == len(other) and all(map(same, one, other))
    return one == other


@settings(max_examples=100)
@given(TREES)
def test_any_state_comes_back_as_it_was(tree):
    tensors = {}
    text = json.dumps(_flat(tree, tensors, 'x'))
    assert same(_restored(json.loads(text), lambda mark: tensors[mark['at']]), tree)


def test_what_is_neither_number_nor_text_nor_tensor_is_named():
    with pytest.raises(InputError, match='state/3/odd is a set, which a checkpoint cannot hold'): _flat({3: dict(odd={1})}, {}, 'state')
    assert _flat(np.float32(0.5), {}, 'x') == 0.5 and math.isnan(json.loads(json.dumps(_flat(math.nan, {}, 'x'))))
    tensors = {}
    assert (_restored(_flat(np.arange(3), tensors, 'x'), lambda mark: tensors[mark['at']]) == np.arange(3)).all()


@pytest.mark.parametrize('optimizer', [lambda p: torch.optim.AdamW(p, fused=True), lambda p: torch.optim.Muon([next(iter(p))]),
                                       lambda p: torch.optim.SGD(p, momentum=0.9)])
def test_optimisers_scaler_and_generators_go_on_where_they_were(tmp_path, optimizer):
    def half(model, optimizer, scaler, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(2, 8)).square().sum()*random.random()*np.random.random()).backward()
            scaler.step(optimizer)
            scaler.update()
    ends = []
    for broken in (False, True):
        random.seed(1), np.random.seed(1)
        def fresh():
            model = model_of(0)
            chosen, scaler = optimizer(model.parameters()), torch.amp.GradScaler('cpu', init_scale=2.0**40, growth_interval=2)
            return (model, chosen, scaler), dict(weights=Weights(model), moments=OptimizerState(chosen), scaler=scaler, chance=RngState())
        training, parts = fresh()
        half(*training, 3)
        if broken:
            Checkpoints(tmp_path).save(3, parts)
            torch.rand(5), random.random(), np.random.random()
            training, parts = fresh()
            assert Checkpoints(tmp_path).load(parts) == 3
        half(*training, 4)
        ends.append((training[0].weight, training[2].get_scale(), torch.rand(2), random.random(), np.random.random()))
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*ends)) and ends[0][1] != 2.0**40


def test_tied_frozen_and_derived_tensors_are_not_written_twice_or_at_all(tmp_path):
    model = nn.ModuleDict(dict(a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.BatchNorm1d(4), d=nn.Linear(4, 4)))
    model['b'].weight = model['a'].weight
    model['d'].requires_grad_(False)
    model.register_buffer('derived', torch.ones(3), persistent=False)
    assert set(Weights(model).tensors()) == {'a.weight', 'a.bias', 'b.bias', 'c.weight', 'c.bias', 'c.running_mean', 'c.running_var',
                                             'c.num_batches_tracked'}


# --- what lies on the disk --------------------------------------------------------------------------------------------------------

def test_the_newest_is_loaded_and_the_oldest_go(tmp_path):
    kept = Checkpoints(tmp_path, steps=1, keep=3)
    assert loaded(kept) == 0
    for step in (1, 2, 9, 10): save(kept, step)
    assert [path.name for path in kept.found()] == ['step-00000010', 'step-00000009', 'step-00000002'] and loaded(kept) == 10
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in kept.found()}
    assert {path.name for path in kept.found()[0].iterdir()} - {'.verified.json'} == set(FILES)  # nothing that could run
    save(kept, 10)  # once more, as after a signal
    assert loaded(kept) == 10


@pytest.mark.parametrize('how', ['truncate', 'zero', 'delete', 'flip'])
@pytest.mark.parametrize('file', FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(tmp_path, capsys, file, how):
    kept = Checkpoints(tmp_path)
    for step in (5, 6): save(kept, step)
    damage(tmp_path/'step-00000006'/file, how)
    assert loaded(kept) == 5
    said, = capsys.readouterr().out.splitlines()
    assert said.startswith(f'  step-00000006/{file} ') and said.endswith('; set aside')
    assert len(list(tmp_path.glob('.damaged-step-00000006-*'))) == 1 and [path.name for path in kept.found()] == ['step-00000005']
    save(kept, 6)
    assert loaded(kept) == 6


def test_without_a_whole_one_it_begins_anew(tmp_path, capsys):
    kept = Checkpoints(tmp_path)
    for step in (5, 6):
        save(kept, step)
        damage(tmp_path/f'step-{step:08}'/FILES[step - 5], 'flip')
    assert loaded(kept) == 0 and capsys.readouterr().out.count('set aside') == 2


class Slow:
    "A state that takes a while to write: 0.8 MB."
    def state_dict(self): return dict(values=torch.arange(10**5))

    def load_state_dict(self, state): assert torch.equal(state['values'], torch.arange(10**5))


def test_killed_inside_a_save_the_one_before_is_whole(tmp_path):
    "Real processes, killed at moments spread over a save, from its first file to the rename and the rotation."
    def endless():
        kept = Checkpoints(tmp_path)
        step = kept.load(dict(weights=Weights(model_of(0)), slow=Slow()))
        while True:
            step += 1
            save(kept, step, slow=Slow())
    inside, last = 0, 0
    def begun() -> list | None: return _stamp(tmp_path/'.saving') if Checkpoints(tmp_path).found() else None
    for trial in range(24):
        before = begun()  # what the process before this one left
        child, deadline = forked(endless), time.monotonic() + 20
        while time.monotonic() < deadline and begun() in (None, before): time.sleep(0.0005)
        time.sleep(0.008*trial)
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        inside += (tmp_path/'.saving').exists()
        kept, model = Checkpoints(tmp_path), model_of(0)
        assert all(verified(path, deep=True) for path in kept.found())  # whatever has a name is whole
        step = kept.load(dict(weights=Weights(model), slow=Slow()))
        assert step >= last and torch.equal(model.weight, model_of(step).weight)
        last = step
    assert inside > 8 and last > 5, (inside, last)


def test_a_training_that_was_set_otherwise_is_refused(tmp_path):
    kept, model = Checkpoints(tmp_path), model_of(1)
    kept.save(1, dict(settings=SettingsState(dict(steps=10, learning_rate=0.1)), weights=Weights(model)))
    other = dict(settings=SettingsState(dict(steps=10, learning_rate=0.2)), weights=Weights(before := model_of(2)))
    with pytest.raises(InputError, match='made with learning_rate=0.1, and now learning_rate is 0.2'): kept.load(other)
    assert torch.equal(before.weight, model_of(2).weight)
    with pytest.raises(InputError, match='only one of them has replay'): kept.load(other | dict(replay=RngState()))
    with pytest.raises(InputError, match='one of another model: weight differs'):
        kept.load(dict(settings=SettingsState(dict(steps=10, learning_rate=0.1)), weights=Weights(nn.Linear(8, 9))))
    with pytest.raises(InputError, match='keep is 0'): Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize('number', [math.nan, math.inf])
def test_weights_that_are_not_finite_are_never_written(tmp_path, number):
    kept, model = Checkpoints(tmp_path), model_of(2)
    save(kept, 1)
    model.bias.data[3] = number
    with pytest.raises(FloatingPointError, match='bias are not finite'): kept.save(2, dict(weights=Weights(model)))
    assert loaded(kept) == 1 and not (tmp_path/'.saving').exists()


def test_what_was_not_written_as_it_was_meant_is_noticed_before_rotation(tmp_path, monkeypatch):
    kept, whole = Checkpoints(tmp_path, keep=1), checkpoints.save_file
    save(kept, 1)
    monkeypatch.setattr(checkpoints, 'save_file', lambda tensors, path: whole({n: t + 1 for n, t in tensors.items()}, path))
    with pytest.raises(OSError, match='is not what was written; check the disk'): save(kept, 2)
    monkeypatch.undo()
    assert loaded(kept) == 1


def test_one_is_due_by_time_or_by_steps(tmp_path):
    kept = Checkpoints(tmp_path, seconds=10)
    assert not kept.due(1)
    kept.saved -= 11
    assert kept.due(1)
    kept.took = 1.0  # 3 % of 33 seconds
    assert not kept.due(1)
    kept.saved -= 23
    assert kept.due(1)
    assert [step for step in range(1, 9) if Checkpoints(tmp_path, steps=3).due(step)] == [3, 6]


# --- full disks -------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def small_disk(tmp_path):
    "A disk of 3 MB."
    disk = tmp_path/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('a disk can be mounted by root only')
    yield disk
    subprocess.run(['umount', disk], check=True)


@pytest.mark.parametrize('checked', [True, False])
def test_a_full_disk_leaves_the_one_before_and_goes_on_when_there_is_room(small_disk, monkeypatch, checked):
    def parts(step): return dict(weights=Weights(model_of(step, 512)))  # 1 MB
    if not checked: monkeypatch.setattr(checkpoints, 'check_space', lambda *_: None)
    kept = Checkpoints(small_disk/'kept')
    kept.save(1, parts(1))
    (small_disk/'others').write_bytes(bytes(1_500_000))
    with pytest.raises(InputError) as error: kept.save(2, parts(2))
    assert ('A checkpoint takes 1,1' if checked else 'A checkpoint does not fit on the disk: after ') in str(error.value)
    assert str(small_disk/'kept') in str(error.value) and (checked or 'The one before is untouched' in str(error.value))
    assert kept.load(parts(3)) == 1 and not (small_disk/'kept'/'.saving').exists()
    (small_disk/'others').unlink()
    kept.save(2, parts(2))
    assert kept.load(parts(3)) == 2


def test_a_file_that_must_not_grow_is_said_in_a_sentence(tmp_path):
    def limited():
        kept = Checkpoints(tmp_path)
        save(kept, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(InputError, match='does not fit on the disk'): kept.save(2, dict(weights=Weights(model_of(2, 512))))
        assert loaded(kept) == 1
    assert ended(forked(limited)) == 0


# --- several processes ------------------------------------------------------------------------------------------------------------

def in_two(folder: Path, action: Callable[[int], None]) -> list[int]:
    "Exit codes of two processes of one training."
    def each(rank: int) -> None:
        distributed.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=2)
        action(rank)
        distributed.destroy_process_group()
    return [ended(child) for child in [forked(lambda rank=rank: each(rank)) for rank in (0, 1)]]


def shared_training(folder: Path, steps: int, saves: int | None = None) -> dict[str, torch.Tensor]:
    "A model of which each process holds half (FSDP2), trained with AdamW, dropout and batches that differ; its whole weights."
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), nn.Linear(5, 3))
    fully_shard(model, mesh=init_device_mesh('cpu', (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    kept, parts = Checkpoints(folder), dict(weights=Weights(model), moments=OptimizerState(optimizer), chance=RngState())
    torch.manual_seed(distributed.get_rank())
    for step in range(kept.load(parts), steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        if saves and step + 1 in (saves - 1, saves): kept.save(step + 1, parts)
    return {name: p.full_tensor() for name, p in model.named_parameters()}


@pytest.mark.parametrize('how', [None, 'flip', 'delete'])
def test_two_processes_that_share_the_weights_go_on_to_the_same_end(tmp_path, how):
    def work(rank):
        whole = shared_training(tmp_path/'whole', 6)
        shared_training(tmp_path/'halves', 4, saves=4)
        if rank == 0 and how: damage(tmp_path/'halves'/'step-00000004'/'rank-00001.safetensors', how)  # of the other process
        distributed.barrier()
        again = shared_training(tmp_path/'halves', 6)
        assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert in_two(tmp_path, work) == [0, 0]
    folder, = (path for path in (tmp_path/'halves').iterdir() if path.name == f'step-{3 if how else 4:08}')
    sizes = [(folder/f'rank-{rank:05}.safetensors').stat().st_size for rank in (0, 1)]
    assert len(set(sizes)) <= 2 and any((tmp_path/'halves').glob('.damaged-step-00000004-*')) == bool(how)


def alone_training(folder: Path, steps: int, saves: int | None = None) -> dict[str, torch.Tensor]:
    "The model and optimiser of `shared_training` in one process, without chance: batches that are a function of the step."
    return training_of(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), folder, steps, saves)


def training_of(model: nn.Module, folder: Path, steps: int, saves: int | None) -> dict[str, torch.Tensor]:
    "AdamW on a batch for each step, the same in all processes; weights and moments are in checkpoints."
    with torch.no_grad():
        for n, p in enumerate(model.parameters()): (p.to_local() if hasattr(p, 'to_local') else p).zero_().add_(0.1*(n + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    kept, parts = Checkpoints(folder), dict(weights=Weights(model), moments=OptimizerState(optimizer))
    for step in range(kept.load(parts), steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        if step + 1 == saves: kept.save(step + 1, parts)
    return {name: p.full_tensor() if hasattr(p, 'full_tensor') else p.detach() for name, p in model.named_parameters()}


def test_a_training_goes_on_with_another_number_of_processes_and_another_way_to_share(tmp_path):
    def work(rank):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
        fully_shard(model, mesh=init_device_mesh('cpu', (2,)))
        for name, saves in (('one, then two', None), ('two, then one', 3)):
            shared = training_of(model, tmp_path/name, saves or 6, saves)
            if rank == 0 and not saves: save_file(shared, tmp_path/'shared.safetensors')
    whole = alone_training(tmp_path/'whole', 6)
    alone_training(tmp_path/'one, then two', 3, saves=3)
    assert in_two(tmp_path, work) == [0, 0]
    for found in (load_file(tmp_path/'shared.safetensors'), alone_training(tmp_path/'two, then one', 6)):
        assert all(torch.allclose(found[name], whole[name], rtol=0, atol=1e-6) for name in whole)
    assert (whole['1.bias'] - 0.4).abs().max() > 0.05  # something was learnt


def test_when_one_of_two_processes_cannot_write_neither_goes_on(tmp_path):
    class Fails:
        def state_dict(self): return {1, 2} if distributed.get_rank() else {}
    def work(rank):
        kept = Checkpoints(tmp_path/'kept')
        kept.save(1, dict(weights=Weights(model_of(1))))
        with pytest.raises(InputError, match='cannot hold.*tensors.$' if rank else r'cannot hold.*in process 1'):
            kept.save(2, dict(weights=Weights(model_of(2)), fails=Fails()))
        assert loaded(kept) == 1
        assert kept.due(1) is False
    assert in_two(tmp_path, work) == [0, 0]
    assert [path.name for path in (tmp_path/'kept').iterdir()] == ['step-00000001']
    assert {path.name for path in (tmp_path/'kept'/'step-00000001').iterdir()} == {*FILES, 'rank-00001.json'}  # one wrote the weights


def test_no_pickle_is_written_or_read(tmp_path):
    def work():
        def never(*_, **__): raise AssertionError('pickle')
        for name in ('dump', 'dumps', 'load', 'loads', 'Pickler', 'Unpickler'): setattr(pickle, name, never)
        save(Checkpoints(tmp_path), 1)
        assert loaded(Checkpoints(tmp_path)) == 1
    assert ended(forked(work)) == 0
