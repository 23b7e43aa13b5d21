"""The one loop: micro-batches, processes, dropout and order change nothing they should not; numbers that are none change nothing at all."""
import json
import math
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from forks import ended, forked
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from world import descent

from scilm_adapt.checkpoints import Checkpoints
from scilm_adapt.errors import InputError, Stopped
from scilm_adapt.files import verified
from scilm_adapt.models import LanguageModel, hidden_states, logits_of, tiny, weights_hash
from scilm_adapt.recipe import lora
from scilm_adapt.tokens import batch_rows, encode_document, pack
from scilm_adapt.training import (
    Trackers,
    _bad_numbers,
    _set_seed,
    adamw,
    document_nats,
    fit,
    lm_loss,
    micro_batches,
    muon,
    schedule,
    trackers_of,
)

torch.set_num_threads(1)
# Of very different lengths, so that micro-batches have very different numbers of targets.
TEXTS = [('Heat flows from warm bodies to cold ones. ', 'Свет — это волна и частица. ')[n % 2]*(1 + n*n % 5) + str(n) for n in range(24)]


def model_of(family: str = 'llama', bits: int = 32, **sizes) -> LanguageModel:
    lm = tiny(TEXTS, family, **dict(hidden=32, layers=2, heads=2) | sizes)
    lm.model.to(getattr(torch, f'float{bits}'))
    return lm


def without_dropout(lm: LanguageModel) -> LanguageModel:
    for module in lm.model.modules():
        if isinstance(module, torch.nn.Dropout): module.p = 0.0
    return lm


def ragged(lm: LanguageModel, length: int = 48):
    "Packed rows of which some hold two targets only."
    documents = [encode_document(lm.tokenizer, text)[:2 + 7*n % 40] for n, text in enumerate(TEXTS)]
    return pack(documents, length, [[1]*len(ids) if n % 3 else [0]*(len(ids) - 1) + [1] for n, ids in enumerate(documents)])


def plain_loss(model, batch): return dict(loss=lm_loss(model, batch))


def train(lm: LanguageModel, packed, rows: int = 16, steps: int = 4, **options) -> list[dict]:
    options = dict(learning_rate=3e-3, precision='no') | options
    return fit(lm.model, lambda step: packed.batch(batch_rows(len(packed), rows, step, seed=0)), plain_loss, steps, **options)


def furthest(one, other) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one.parameters(), other.parameters()))


# What is the same sum in another order is compared in 64 bits. n numbers of size 1 added in two orders lie at most n*2.2e-16 apart, and
# here at most 16*48 targets are added: 1.7e-13. AdamW divides a gradient by its size plus 1e-8, so where a gradient is nothing but
# rounding (that of the keys' biases, which the softmax takes out again), a step of 3e-3 may differ by 3e-3*1.7e-13/1e-8 = 5e-8.
SUMS = 16*48*torch.finfo(torch.float64).eps
STEPS = 4*3e-3*SUMS/1e-8


# --- micro-batches ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', ['llama', 'gpt2'])
@pytest.mark.parametrize('micro_batch', [1, 4, 5, 16])
def test_the_size_of_a_micro_batch_changes_nothing(family, micro_batch):
    "1 x 16 = 4 x 4 = 16 x 1, and parts of unequal size: the mistake that most libraries have shipped once."
    whole, parts = (without_dropout(model_of(family, bits=64)) for _ in range(2))  # (dropout is drawn per micro-batch)
    packed = ragged(whole)
    counts = {int(packed.batch([row])['count']) for row in range(len(packed))}
    assert min(counts)*3 < max(counts)  # the parts are really unequal
    one, other = train(whole, packed), train(parts, packed, micro_batch=micro_batch)
    for a, b in zip(one, other):
        assert math.isclose(a['loss'], b['loss'], rel_tol=STEPS), (a, b)
        assert math.isclose(a['grad_norm'], b['grad_norm'], rel_tol=STEPS)
    assert math.isclose(one[0]['loss'], other[0]['loss'], rel_tol=SUMS)  # before AdamW has a part in it
    assert furthest(whole.model, parts.model) < STEPS


@pytest.mark.parametrize('micro_batch', [1, 4, 16])
def test_losses_of_micro_batches_add_up_to_those_of_the_batch_at_every_step(micro_batch):
    "With plain gradient descent nothing blows rounding up, and each step's loss agrees up to the order of its sums."
    whole, parts = model_of(bits=64), model_of(bits=64)
    packed = ragged(whole)
    one = train(whole, packed, optimizers=descent, learning_rate=0.1)
    other = train(parts, packed, optimizers=descent, learning_rate=0.1, micro_batch=micro_batch)
    assert all(math.isclose(a['loss'], b['loss'], rel_tol=4*SUMS) for a, b in zip(one, other))
    assert furthest(whole.model, parts.model) < 4*SUMS and one[-1]['loss'] < one[0]['loss']


def test_the_gradient_is_that_of_the_definition():
    "One step of plain descent against autograd over the naive mean of all targets."
    lm, twin = model_of(bits=64), model_of(bits=64)
    packed = ragged(lm)
    batch = packed.batch(list(range(len(packed))))
    history = fit(lm.model, lambda step: batch, plain_loss, 1, learning_rate=0.1, precision='no', micro_batch=2, clip=1e9,
                  optimizers=descent)
    nats = []
    for row in range(len(packed)):
        one = packed.batch([row])
        log_probabilities = logits_of(twin.model, hidden_states(twin.model, one))[0].log_softmax(-1)
        nats += [-log_probabilities[t - 1, one['input_ids'][0, t]] for t in range(48) if packed.loss_mask[row, t]]
    loss = torch.stack(nats).mean()
    loss.backward()
    assert len(nats) < 16*48 and math.isclose(history[0]['loss'], loss.item(), rel_tol=SUMS)
    with torch.no_grad():
        for parameter in twin.model.parameters(): parameter -= 0.1*parameter.grad
    assert furthest(lm.model, twin.model) < SUMS


@given(st.integers(1, 40), st.none() | st.integers(1, 50), st.integers(1, 4))
def test_every_row_is_in_one_part_of_one_process(size, rows, ranks):
    batch = dict(input_ids=torch.arange(size)[:, None], other=torch.arange(size)*10, count=torch.tensor(7.0))
    if size < ranks:
        with pytest.raises(InputError, match=f'{size} rows.*{ranks} processes'): micro_batches(batch, rows, 0, ranks)
        return
    shares = [micro_batches(batch, rows, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1  # processes exchange gradients, so all have equally many parts
    parts = [part for share in shares for part in share]
    assert sorted(row for part in parts for row in part['input_ids'][:, 0].tolist()) == list(range(size))
    assert all(part['count'] == 7 and (part['other'] == part['input_ids'][:, 0]*10).all() for part in parts)
    most = max(rows or size, 1 + (ranks > 1))  # one row a part, and a row over: one part holds two
    assert all(0 < len(part['input_ids']) <= most for part in parts)


# --- processes --------------------------------------------------------------------------------------------------------------------

def in_two(action: Callable[[int], None]) -> None:
    "Two processes of one training, as torchrun would start them."
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    def each(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=str(port))
        AcceleratorState._reset_state(reset_partial_state=True)
        action(rank)
    assert [ended(child) for child in [forked(partial(each, rank)) for rank in (0, 1)]] == [0, 0]


def test_two_processes_train_as_one(tmp_path):
    cases = dict(even=(16, 3), a_row_too_few=(5, 1))
    def work(rank: int) -> None:
        for name, (rows, micro_batch) in cases.items():
            lm = model_of(bits=64)
            history = train(lm, ragged(lm), rows=rows, micro_batch=micro_batch)
            if rank == 0: save_file({n: p.detach().clone() for n, p in lm.model.named_parameters()}, tmp_path/f'{name}.safetensors')
            (tmp_path/f'{name}.{rank}').write_text(json.dumps(dict(history=history, hash=weights_hash(lm.model))))
    in_two(work)
    for name, (rows, _) in cases.items():
        first, second = (json.loads((tmp_path/f'{name}.{rank}').read_text()) for rank in (0, 1))
        assert first['hash'] == second['hash']  # both hold the same weights
        lm = model_of(bits=64)
        history = train(lm, ragged(lm), rows=rows)
        for alone, a, b in zip(history, first['history'], second['history'], strict=True):
            assert a['loss'] == b['loss'] and math.isclose(alone['loss'], a['loss'], rel_tol=STEPS)
            assert math.isclose(alone['grad_norm'], a['grad_norm'], rel_tol=STEPS)
        weights = load_file(tmp_path/f'{name}.safetensors')
        apart = max((weights[n] - p).abs().max().item() for n, p in lm.model.named_parameters())
        assert apart < STEPS, apart


# --- chance -----------------------------------------------------------------------------------------------------------------------

def dropout_model() -> LanguageModel:
    lm = model_of('gpt2')
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in lm.model.modules())
    return lm


def test_global_generators_do_not_matter():
    hashes = set()
    for seed in (0, 1234):
        torch.manual_seed(seed); np.random.seed(seed); torch.rand(seed % 7)
        lm = dropout_model()
        train(lm, ragged(lm), steps=3)
        hashes.add(weights_hash(lm.model))
    assert len(hashes) == 1


def test_another_seed_draws_another_dropout():
    runs = []
    for seed in (0, 0, 1):
        lm = dropout_model()
        runs.append(train(lm, ragged(lm), steps=2, seed=seed)[0]['loss'])
    assert runs[0] == runs[1] != runs[2]


def test_dropout_of_a_step_does_not_depend_on_the_steps_before():
    def first_numbers(seed, step):
        _set_seed(seed, step)
        return torch.rand(3).tolist()
    wanted = first_numbers(0, 731)
    first_numbers(0, 730); torch.rand(100)
    assert first_numbers(0, 731) == wanted
    assert len({tuple(first_numbers(seed, step)) for seed in range(5) for step in range(20)}) == 100
    losses = []
    for drawn_before in (0, 1000):  # also in the loop: a batch function that draws from torch's generator moves no dropout
        lm = dropout_model()
        packed = ragged(lm)
        def batch_at(step, packed=packed, drawn_before=drawn_before):
            if step == 1: torch.manual_seed(drawn_before)
            return packed.batch(batch_rows(len(packed), 4, step, seed=0))
        losses.append([h['loss'] for h in fit(lm.model, batch_at, plain_loss, 3, learning_rate=0.0, precision='no')])
    assert losses[0][0] == losses[1][0] and losses[0][2] == losses[1][2]


def test_the_order_of_rows_does_not_matter():
    histories = []
    for order in (1, -1):
        lm = model_of(bits=64)
        packed = ragged(lm)
        rows = list(range(len(packed)))[::order]
        histories.append(fit(lm.model, lambda step, p=packed, r=rows: p.batch(r), plain_loss, 3, learning_rate=3e-3, precision='no'))
    assert all(math.isclose(a['loss'], b['loss'], rel_tol=STEPS) for a, b in zip(*histories))


def test_batches_are_asked_for_in_order_and_once():
    lm, asked = model_of(), []
    packed = ragged(lm)
    def batch_at(step):
        asked.append(step)
        return packed.batch(batch_rows(len(packed), 2, step, seed=0))
    history = fit(lm.model, batch_at, plain_loss, 5, learning_rate=1e-3)
    assert asked == [h['step'] for h in history] == list(range(5))
    assert {'loss', 'learning_rate', 'grad_norm', 'tokens_per_second'} <= set(history[0]) and not lm.model.training
    json.dumps(history, allow_nan=False)


# --- numbers that are none --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('micro_batch', [None, 1])
def test_a_loss_that_is_no_number_stops_before_the_weights_change(bad, micro_batch):
    lm = model_of()
    packed, seen = ragged(lm), []
    def batch_at(step):
        if step == 2: seen.append(weights_hash(lm.model))
        return packed.batch(batch_rows(len(packed), 4, step, seed=0)) | dict(poison=torch.tensor([0., 0., 0., float(step == 2)]))
    def loss(model, batch):
        value = lm_loss(model, batch)
        return dict(loss=value + value*bad if batch['poison'].any() else value)
    with pytest.raises(FloatingPointError, match='step 2.*weights of step 1 are kept'):
        fit(lm.model, batch_at, loss, 5, learning_rate=1e-2, precision='no', micro_batch=micro_batch)
    assert [weights_hash(lm.model)] == seen and all(torch.isfinite(p).all() for p in lm.model.parameters())


def test_a_gradient_that_is_no_number_stops_as_well():
    lm = model_of()
    before = weights_hash(lm.model)
    packed = ragged(lm)
    def loss(model, batch):  # the value is fine, its slope at zero is not
        return dict(loss=lm_loss(model, batch) + (next(model.parameters())*0).abs().sum().sqrt())
    with pytest.raises(FloatingPointError, match='step 0'):
        fit(lm.model, lambda step: packed.batch([0, 1]), loss, 2, learning_rate=1e-2, precision='no')
    assert weights_hash(lm.model) == before


def spoilt(packed, bad: dict[int, float], before: Callable[[int], None] = lambda step: None):
    "Batches, and a loss that is multiplied by what `bad` says of their step."
    def batch_at(step):
        before(step)
        return packed.batch(batch_rows(len(packed), 4, step, seed=0)) | dict(factor=torch.full((4,), bad.get(step, 1.0)))
    return batch_at, lambda model, batch: dict(loss=lm_loss(model, batch)*batch['factor'][0])


@pytest.mark.parametrize(('factor', 'step', 'said'), [
    (math.nan, 3, 'a loss of nan'), (math.inf, 3, 'a loss of inf'), (-math.inf, 24, 'a loss of -inf'),
    (50.0, 24, r'a loss of [\d.]+, where [\d.]+ is usual')])
def test_bad_numbers_name_the_step_and_its_records_and_reach_no_checkpoint(tmp_path, factor, step, said):
    lm, hashes = model_of(layers=1), []
    batch_at, loss = spoilt(ragged(lm), {step: factor}, lambda step: hashes.append(weights_hash(lm.model)))
    def records_at(step): return [f'paper-{step}-{n}' for n in range(25)]
    named = f'the weights of step {step - 1} are kept.*look at its records: paper-{step}-0, .*paper-{step}-19 and 5 more'
    with pytest.raises(FloatingPointError, match=f'step {step} gave {said}.*; {named}'):
        fit(lm.model, batch_at, loss, 30, learning_rate=1e-3, precision='no', checkpoints=Checkpoints(tmp_path, steps=1),
            records_at=records_at)
    assert weights_hash(lm.model) == hashes[step]
    assert [path.name for path in Checkpoints(tmp_path).found()] == [f'step-{n:08}' for n in (step, step - 1)]
    assert all(tensor.isfinite().all() for path in Checkpoints(tmp_path).found()
               for tensor in load_file(path/'rank-00000.safetensors').values() if tensor.is_floating_point())


def test_bad_steps_are_skipped_and_counted_up_to_a_limit(capsys):
    lm, hashes = model_of(layers=1), []
    batch_at, loss = spoilt(ragged(lm), {2: math.nan, 4: math.inf, 6: math.nan}, lambda step: hashes.append(weights_hash(lm.model)))
    options = dict(learning_rate=1e-3, precision='no')
    history = fit(lm.model, batch_at, loss, 6, skip_bad=2, **options)
    assert [row.get('skipped', 0) for row in history] == [0, 0, 1, 0, 1, 0]
    assert hashes[2] == hashes[3] and hashes[4] == hashes[5] != hashes[3]
    assert all(p.isfinite().all() for p in lm.model.parameters()) and 'skipped (2 of at most 2)' in capsys.readouterr().out
    with pytest.raises(FloatingPointError, match='step 6'): fit(lm.model, batch_at, loss, 9, skip_bad=2, **options)


def test_only_what_is_far_above_the_usual_is_bad():
    def rows(losses, norm=1.0): return [dict(loss=loss, grad_norm=norm) for loss in losses]
    falling = rows(np.geomspace(11, 2, 60))
    assert not any(_bad_numbers(row['loss'], 1.0, falling[:n], False) for n, row in enumerate(falling))
    calm = rows([1.9, 2.0, 2.1]*20)
    assert _bad_numbers(7.1, 1.0, calm, False) and not _bad_numbers(6.9, 1.0, calm, False)
    turns = [row for calm_row in calm for row in (calm_row | dict(distil=1.0), dict(loss=9.0, grad_norm=1.0, retention=9.0))]
    assert _bad_numbers(9.0, 1.0, turns[::2], False) and not _bad_numbers(9.0, 1.0, turns, False, ('loss', 'retention'))
    assert _bad_numbers(9.0, 1.0, turns, False, ('loss', 'distil'))                # steps that learn alternately are judged by their kind
    assert not _bad_numbers(50.0, 1e9, falling[:19], False)                # nothing is usual yet
    assert not _bad_numbers(0.9, 30.0, rows([1e-3]*50, 1e-4), False)       # learnt by heart, then a sentence that is new
    assert _bad_numbers(2.0, 1e4, falling, False) and not _bad_numbers(2.0, math.inf, falling, True)
    assert _bad_numbers(2.0, math.inf, falling, False) and _bad_numbers(math.nan, 1.0, falling, True)
    skipped = [row | dict(skipped=1, loss=99.0) for row in calm]
    assert _bad_numbers(9.0, 1.0, calm + skipped[:30], False)              # what was skipped is not usual


# --- memory -----------------------------------------------------------------------------------------------------------------------

def scarce(rows: int, error: Callable[[], BaseException] = lambda: torch.OutOfMemoryError('CUDA out of memory')):
    "A loss for which the memory suffices for so many rows only."
    def loss(model, batch):
        if len(batch['input_ids']) > rows: raise error()
        return plain_loss(model, batch)
    return loss


@pytest.mark.parametrize('error', [lambda: torch.OutOfMemoryError('CUDA out of memory'), lambda: MemoryError(),
                                   lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_a_micro_batch_too_large_is_halved_and_nothing_else_changes(capsys, error):
    ends, asked = [], []
    for loss, micro_batch in ((scarce(3, error), 8), (plain_loss, 2)):
        lm = dropout_model()
        packed = ragged(lm)
        def batch_at(step, packed=packed):
            asked.append(step)
            return packed.batch(batch_rows(len(packed), 10, step, seed=0))
        history = fit(lm.model, batch_at, loss, 3, learning_rate=3e-3, precision='no', micro_batch=micro_batch)
        ends.append((weights_hash(lm.model), [row['loss'] for row in history]))
    assert ends[0] == ends[1] and asked == [0, 1, 2]*2  # a batch may be asked for only once
    said = capsys.readouterr().out.splitlines()
    assert [line.split('suffice for ')[1] for line in said] == [f'{n} rows at once: {n//2} from now on, the batch stays 10' for n in (8, 4)]


def test_where_not_even_one_row_fits_it_is_said():
    lm = model_of()
    packed = ragged(lm)
    def run(**options): return fit(lm.model, lambda step: packed.batch([0, 1, 2]), scarce(0), 1, learning_rate=1e-3, **options)
    with pytest.raises(InputError, match='does not suffice for 1 rows at once, and fewer are not possible; set a shorter context'): run()
    with pytest.raises(InputError, match='does not suffice for 2 rows'): run(micro_batch=2, least_rows=2)
    other = RuntimeError('shapes differ')
    with pytest.raises(RuntimeError, match='shapes differ'):
        fit(lm.model, lambda step: packed.batch([0]), scarce(0, lambda: other), 1, learning_rate=1e-3)


def test_real_memory_that_is_too_small_halves_the_micro_batch(tmp_path):
    def work():
        lm = tiny(TEXTS, hidden=64, layers=2, heads=2, context=512)
        packed = pack([encode_document(lm.tokenizer, ' '.join(TEXTS))[:128]]*64, 128)
        options = dict(learning_rate=1e-3, precision='no')
        fit(lm.model, lambda step: packed.batch([0]), plain_loss, 1, **options)
        used = int(Path('/proc/self/statm').read_text().split()[0])*os.sysconf('SC_PAGE_SIZE')
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, resource.RLIM_INFINITY))
        said = []
        import builtins
        builtins.print = lambda *words, **_: said.append(words[0])
        history = fit(lm.model, lambda step: packed.batch(range(64)), plain_loss, 1, **options)
        assert said and 'the memory does not suffice for 64 rows at once: 32 from now on, the batch stays 64' in said[0]
        assert math.isfinite(history[0]['loss'])
    assert ended(forked(work)) == 0


def test_several_processes_say_which_one_had_too_little(tmp_path):
    def work(rank: int) -> None:
        lm = model_of(layers=1)
        packed = ragged(lm)
        with pytest.raises(InputError, match=f'8 rows at once in process {rank} of 2; set micro_batch to 4'):
            fit(lm.model, lambda step: packed.batch([0]*16), scarce(7), 1, learning_rate=1e-3)
    in_two(work)


# --- stopping and going on --------------------------------------------------------------------------------------------------------

class Buffer:
    "Something that remembers along the way: a batch depends on all before it."
    def __init__(self): self.rows = [0]

    def state_dict(self): return dict(rows=self.rows, last=torch.tensor(self.rows[-1:]))

    def load_state_dict(self, state): self.rows = state['rows'] if state['last'].tolist() == state['rows'][-1:] else None


KINDS = dict(dropout_in_16_bits=dict(family='gpt2', precision='bf16'), muon_short_of_memory=dict(optimizers=muon, loss=scarce(2)),
             adapters=dict(rank=2))


def longer(folder: Path | None, steps: int = 8, pause: float = 0.0, on_step_end=None, family: str = 'llama', rank: int = 0, loss=plain_loss,
           kept: Checkpoints | None = None, **options) -> tuple[str, list[dict]]:
    "A training with checkpoints in `folder` after each step; the hash of its weights and its history without the times."
    lm, buffer = model_of(family, layers=1), Buffer()
    packed = ragged(lm)
    if rank: lora(lm.model, rank)
    def batch_at(step):
        time.sleep(pause)
        buffer.rows.append((buffer.rows[-1]*5 + step) % 7)
        return packed.batch([*batch_rows(len(packed), 3, step, seed=0), buffer.rows[-1]])
    history = fit(lm.model, batch_at, loss, steps, **dict(learning_rate=3e-3, precision='no') | options, on_step_end=on_step_end,
                  checkpoints=kept or folder and Checkpoints(folder, steps=1), state=dict(buffer=buffer))
    return weights_hash(lm.model), [{name: value for name, value in row.items() if name != 'tokens_per_second'} for row in history]


@pytest.mark.parametrize('kind', KINDS)
def test_a_training_killed_again_and_again_ends_with_the_same_bits(tmp_path, kind):
    whole = longer(tmp_path/'whole', **KINDS[kind])
    def once(): (tmp_path/'end.json').write_text(json.dumps(longer(tmp_path/'kept', pause=0.1, **KINDS[kind])))
    kills, moments = 0, np.random.default_rng(len(kind))
    def newest() -> str: return max((path.name for path in (tmp_path/'kept').glob('step-*')), default='')
    for _ in range(20):
        before, child = newest(), forked(once)
        while newest() == before and not (dead := os.waitpid(child, os.WNOHANG)[0]): time.sleep(0.002)
        if dead: break
        time.sleep(moments.uniform(0, 0.15))  # between steps, inside one, or inside a save
        os.kill(child, signal.SIGKILL)
        kills += ended(child) == -signal.SIGKILL
        if (tmp_path/'end.json').exists(): break
    assert kills >= 2 and tuple(json.loads((tmp_path/'end.json').read_text())) == whole
    last = [load_file(path/'step-00000008'/'rank-00000.safetensors') for path in (tmp_path/'whole', tmp_path/'kept')]
    assert last[0].keys() == last[1].keys() and all(torch.equal(last[0][name], last[1][name]) for name in last[0])  # averages, too


@pytest.mark.parametrize('file', ['rank-00000.safetensors', 'rank-00000.json', 'manifest.json'])
def test_a_checkpoint_that_went_bad_is_not_resumed(tmp_path, capsys, file):
    def stop(step, model):
        if step == 5: raise RuntimeError('dies')
    whole = longer(None)
    with pytest.raises(RuntimeError): longer(tmp_path, on_step_end=stop)
    path = tmp_path/'step-00000005'/file
    content = path.read_bytes()
    path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    assert longer(tmp_path) == whole and f'step-00000005/{file}' in capsys.readouterr().out


def test_a_training_that_is_complete_is_not_repeated(tmp_path):
    def never(step, model): raise AssertionError
    whole = longer(tmp_path)
    assert longer(tmp_path, on_step_end=never) == whole
    with pytest.raises(InputError, match='made with steps=8, and now steps is 9'): longer(tmp_path, steps=9)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('step', [0, 3, 7])
def test_a_signal_lets_the_step_end_and_keeps_it(tmp_path, number, step):
    reached, handlers = [], [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    def after(at, model):
        reached.append(at)
        if at == step: signal.raise_signal(number)
    with pytest.raises(Stopped) as stopped: longer(tmp_path, on_step_end=after, kept=Checkpoints(tmp_path))
    assert stopped.value.number == number and reached == list(range(step + 1))
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    kept, = Checkpoints(tmp_path).found()
    assert kept.name == f'step-{step + 1:08}' and verified(kept, deep=True)
    assert longer(tmp_path) == longer(None)


def test_a_second_signal_stops_at_once_and_harms_nothing(tmp_path):
    def after(at, model):
        for _ in range(2 if at == 3 else 0): signal.raise_signal(signal.SIGINT)
    with pytest.raises(Stopped): longer(tmp_path, on_step_end=after)
    assert Checkpoints(tmp_path).found()[0].name == 'step-00000003' and longer(tmp_path) == longer(None)


def test_without_checkpoints_a_signal_leaves_a_whole_step():
    lm = model_of(layers=1)
    packed, hashes = ragged(lm), []
    def loss(model, batch):
        if len(hashes) == 2: signal.raise_signal(signal.SIGINT)  # in the midst of a step
        return plain_loss(model, batch)
    with pytest.raises(KeyboardInterrupt):
        fit(lm.model, lambda step: packed.batch([0, 1]), loss, 9, learning_rate=1e-3,
            on_step_end=lambda *_: hashes.append(weights_hash(lm.model)))
    assert len(hashes) == 3 and weights_hash(lm.model) == hashes[-1]


def test_two_processes_go_on_where_both_were(tmp_path):
    def work(rank: int) -> None:
        whole = longer(None)
        def stop(step, model):
            if step == 4 and rank == 1: signal.raise_signal(signal.SIGTERM)  # one of them hears it, and both stop
        with pytest.raises(Stopped): longer(tmp_path, on_step_end=stop)
        assert longer(tmp_path) == whole
    in_two(work)
    assert Checkpoints(tmp_path).found()[0].name == 'step-00000008'


# --- parts of the loop ------------------------------------------------------------------------------------------------------------

def test_what_a_loss_gives_besides_is_summed_over_micro_batches():
    lm = model_of()
    packed = ragged(lm)
    def loss(model, batch):
        value = lm_loss(model, batch)
        return dict(loss=2*value, science=value, rows=torch.tensor(float(len(batch['input_ids']))))
    history = fit(lm.model, lambda step: packed.batch([0, 1, 2, 3, 4]), loss, 1, learning_rate=1e-3, micro_batch=2, precision='no')
    assert history[0]['rows'] == 5 and math.isclose(history[0]['loss'], 2*history[0]['science'], rel_tol=1e-6)


@settings(max_examples=40)
@given(st.integers(1, 3000), st.floats(0.0, 0.3))
def test_the_learning_rate_rises_and_falls(steps, warmup):
    factors = [schedule(step, steps, warmup) for step in range(steps)]
    top = factors.index(max(factors))
    assert max(factors) == 1 and min(factors) > 0 and factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[:top + 1] == sorted(factors[:top + 1]) and top <= max(1, round(warmup*steps))
    if steps > 500: assert factors[-1] < 0.11


def test_the_learning_rate_of_each_step_is_the_schedules():
    lm = model_of()
    history = train(lm, ragged(lm), steps=8, learning_rate=0.01)
    assert [h['learning_rate'] for h in history] == [0.01*schedule(step, 8) for step in range(8)]


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'gpt_neox', 'qwen2'])
@pytest.mark.parametrize('optimizers', [adamw, muon])
def test_every_weight_has_one_optimiser_and_learns(family, optimizers):
    lm = model_of(family)
    weights = [p for optimizer in optimizers(lm.model, 1e-3) for group in optimizer.param_groups for p in group['params']]
    assert len(weights) == len({id(p) for p in weights}) == len(list(lm.model.parameters()))
    before = {name: tensor.clone() for name, tensor in lm.model.named_parameters()}
    history = train(lm, ragged(lm), steps=12, optimizers=optimizers, learning_rate=1e-2)
    assert history[-1]['loss'] < history[0]['loss'] - 0.3
    unmoved = [name for name, tensor in lm.model.named_parameters() if torch.equal(tensor, before[name])]
    assert not unmoved


def test_decay_pulls_on_matrices_only():
    groups = adamw(model_of('gpt2').model, 1e-3, weight_decay=0.5)[0].param_groups
    assert [group['weight_decay'] for group in groups] == [0.5, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]['params']) and all(p.ndim < 2 for p in groups[1]['params']) and groups[1]['params']


def test_frozen_weights_stay():
    lm = model_of()
    lm.model.get_input_embeddings().requires_grad_(False)
    before = lm.model.get_input_embeddings().weight.clone()
    train(lm, ragged(lm), steps=2)
    assert torch.equal(before, lm.model.get_input_embeddings().weight)


def test_the_precision_may_change_between_trainings_of_a_process():
    losses = []
    for precision in ('no', 'bf16', 'no'):
        lm = model_of()
        losses.append(train(lm, ragged(lm), steps=2, precision=precision)[-1]['loss'])
        assert lm.model.dtype == torch.float32
    assert losses[0] == losses[2] != losses[1] and math.isclose(losses[0], losses[1], rel_tol=0.02)


# --- what comes in between, and memory -------------------------------------------------------------------------------------------

def test_what_is_called_after_a_step_sees_it_done_and_may_stop_it():
    lm, plain, seen = model_of(), model_of(), []
    packed, stop = ragged(lm), RuntimeError('enough')
    def after(step, model):
        seen.append((step, weights_hash(model), model.training))
        model.eval()
        torch.rand(7)
        if step == 3: raise stop
        return dict(seen=step/2) if step else None
    with pytest.raises(RuntimeError) as found: train(lm, packed, steps=9, on_step_end=after)
    assert found.value is stop and [step for step, *_ in seen] == [0, 1, 2, 3] and all(training for *_, training in seen)
    assert weights_hash(lm.model) == seen[-1][1] != seen[-2][1] and not lm.model.training
    history = train(plain, packed, steps=3, on_step_end=lambda step, model: dict(seen=1.5) if step else None)
    assert ['seen' in row for row in history] == [False, True, True]


def test_a_watched_training_is_the_same_as_one_that_is_not():
    hashes = set()
    for after in (None, lambda step, model: model.eval() and None):  # in evaluation mode dropout would be gone
        lm = dropout_model()
        train(lm, ragged(lm), steps=3, on_step_end=after)
        hashes.add(weights_hash(lm.model))
    assert len(hashes) == 1


# --- trackers ---------------------------------------------------------------------------------------------------------------------

def test_trackers_are_told_of_every_step_once_also_where_a_training_goes_on(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    told = dict(trackers=Trackers(['tensorboard'], tmp_path/'told', dict(margin=0.5, pairs=dict(batch=32))))
    def stop(step, model):
        if step == 5: raise RuntimeError('dies')
    with pytest.raises(RuntimeError): longer(None, kept=Checkpoints(tmp_path/'kept', steps=3), on_step_end=stop, **told)  # none kept
    found, history = longer(None, kept=Checkpoints(tmp_path/'kept', steps=3), **told)
    assert found == longer(None)[0]
    events = EventAccumulator(str(tmp_path/'told'/'training')).Reload()
    for name in ('loss', 'learning_rate', 'grad_norm', 'tokens_per_second'):
        assert [event.step for event in events.Scalars(name)] == list(range(8))
    assert [event.value for event in events.Scalars('loss')] == pytest.approx([row['loss'] for row in history], rel=1e-6)
    noted = [path.read_text() for path in (tmp_path/'told').rglob('hparams.yml')]
    assert len(noted) == 2 and all('margin: 0.5' in text and 'learning_rate: 0.003' in text for text in noted)


def test_weights_and_biases_is_told_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    def work():
        lm = model_of()
        history = train(lm, ragged(lm), steps=2, trackers=Trackers(['wandb'], tmp_path))
        (tmp_path/'history.json').write_text(json.dumps(history))
    assert ended(forked(work)) == 0
    kept, = tmp_path.glob('wandb/offline-run-*/*.wandb')
    for row in json.loads((tmp_path/'history.json').read_text()):  # a process of its own writes them, and may lag behind
        patience = time.monotonic() + 60
        while json.dumps(row['loss']).encode() not in kept.read_bytes(): assert time.monotonic() < patience and not time.sleep(0.1)


def test_without_trackers_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lm = model_of()
    train(lm, ragged(lm), steps=1, trackers=Trackers(trackers_of(' '), tmp_path/'told'))
    assert not list(tmp_path.iterdir())


def test_trackers_that_cannot_be_told_are_named():
    assert trackers_of('tensorboard, wandb') == ['tensorboard', 'wandb']
    with pytest.raises(InputError, match="trackers names 'tensorbord', which Accelerate does not know; it knows .*tensorboard"):
        trackers_of('wandb tensorbord')
    missing = next(str(name) for name in LoggerType if str(name) != 'all' and name not in get_available_trackers())
    with pytest.raises(InputError, match=f"'{missing}', which is not installed; install it, or leave it out"): trackers_of(missing)


class Held:
    "Bytes of all that autograd keeps for the backward pass within this context, the weights themselves left out."
    def __init__(self, model): self.bytes, self.weights = 0, {p.data_ptr() for p in model.parameters()}

    def __call__(self, tensor):
        if tensor.data_ptr() not in self.weights: self.bytes += tensor.numel()*tensor.element_size()
        return tensor


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
@pytest.mark.parametrize('micro_batch', [None, 3])
def test_gradient_checkpointing_changes_memory_and_nothing_else(family, micro_batch):
    histories, models, held = [], [], []
    for on in (False, True):
        lm = model_of(family, bits=64, layers=4)
        packed, keeper = ragged(lm), Held(lm.model)
        def loss(model, batch, keeper=keeper):
            with torch.autograd.graph.saved_tensors_hooks(keeper, lambda tensor: tensor): return plain_loss(model, batch)
        histories.append(fit(lm.model, lambda step, packed=packed: packed.batch(batch_rows(len(packed), 8, step, seed=0)), loss, 3,
                             learning_rate=3e-3, precision='no', micro_batch=micro_batch, gradient_checkpointing=on))
        models.append(lm.model)
        held.append(keeper.bytes)
    assert all(math.isclose(a['loss'], b['loss'], rel_tol=STEPS) for a, b in zip(*histories)) and furthest(*models) < STEPS
    assert held[1] < 0.6*held[0], held
    assert not any(getattr(module, 'gradient_checkpointing', False) for module in models[1].modules())  # switched off again


def test_gradient_checkpointing_is_refused_where_there_is_none():
    module = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match='Linear cannot do it'):
        fit(module, lambda step: None, None, 1, learning_rate=1.0, gradient_checkpointing=True)


# --- measuring --------------------------------------------------------------------------------------------------------------------

def naive_nats(lm: LanguageModel, ids: list[int], mask: list[int], length: int) -> float:
    "Windows that begin with the last token of the one before, each read alone: every token but the first is predicted once."
    total = 0.0
    with torch.inference_mode():
        for at in range(0, max(1, len(ids) - 1), length - 1):
            window = torch.tensor(ids[at:at + length])
            if len(window) < 2: continue
            nats = F.cross_entropy(lm.model(window[None]).logits[0, :-1], window[1:], reduction='none')
            total += sum(value for value, m in zip(nats.tolist(), mask[at + 1:at + length]) if m)
    return total


@pytest.mark.parametrize('context', [8, 17, 64, 10_000])
@pytest.mark.parametrize('marked', [False, True])
def test_the_surprise_of_documents_is_that_of_a_naive_loop(context, marked):
    lm = model_of(context=128, bits=64)
    documents = [encode_document(lm.tokenizer, text) for text in TEXTS] + [encode_document(lm.tokenizer, ' '.join(TEXTS))]
    assert max(map(len, documents)) > 128
    masks = [[int(n % 3 > 0) for n in range(len(ids))] if marked else [1]*len(ids) for ids in documents]
    nats = document_nats(lm, documents, masks if marked else None, rows=3, context=context)
    assert np.allclose(nats, [naive_nats(lm, ids, mask, min(context, 128)) for ids, mask in zip(documents, masks)], rtol=1e-10)


def test_a_processor_that_multiplies_16_bits_reads_in_them_and_keeps_the_third_digit(monkeypatch):
    lm, halves = model_of(), []
    documents = [encode_document(lm.tokenizer, text) for text in TEXTS*3]
    expected = document_nats(lm, documents)
    monkeypatch.setattr('scilm_adapt.models.mixed_precision', lambda device: 'bf16')
    assert np.array_equal(document_nats(lm, documents), expected), 'for a tiny model rounding its weights costs more than it saves'
    monkeypatch.setattr('scilm_adapt.models._WORTH_ROUNDING', 0)
    lm.model.get_output_embeddings().register_forward_hook(lambda module, given, logits: halves.append((given[0].dtype, logits.dtype)))
    found = document_nats(lm, documents)
    assert not np.array_equal(found, expected) and abs(found.sum()/expected.sum() - 1) < 1e-3
    assert {*halves} == {(torch.float32, torch.float32)}, 'logits of 16 bits know two digits'
    lm.model.double()
    assert np.allclose(document_nats(lm, documents), expected, rtol=1e-5), 'who asks for 64 bits gets them'


def test_a_model_of_16_bits_is_read_as_it_is_where_the_processor_multiplies_them(monkeypatch):
    lm = model_of()
    lm.model.bfloat16()
    documents = [encode_document(lm.tokenizer, text) for text in TEXTS]
    expected = document_nats(lm, documents)
    monkeypatch.setattr('scilm_adapt.models.mixed_precision', lambda device: 'bf16')
    monkeypatch.setattr('scilm_adapt.models._WORTH_ROUNDING', 0)
    assert np.array_equal(document_nats(lm, documents), expected)


def test_documents_with_nothing_to_predict_have_no_surprise():
    lm = model_of()
    nats = document_nats(lm, [[5], [5, 6, 7], [5, 6]], [[1], [0, 1, 1], [1, 0]])
    assert nats[0] == nats[2] == 0 < nats[1]


def test_measuring_changes_nothing():
    lm = model_of(bits=64)
    before, state = weights_hash(lm.model), torch.random.get_rng_state()
    one, other = (document_nats(lm, [encode_document(lm.tokenizer, text) for text in TEXTS], rows=rows) for rows in (1, 16))
    assert np.allclose(one, other, rtol=1e-10) and weights_hash(lm.model) == before and torch.equal(state, torch.random.get_rng_state())
