"""A distillation step on a GPU: a student of half a billion weights under a teacher of the shape of a 7B model, weights at random.

    python nbs/_benchmark/gpu.py results.json              # on the first CUDA device
    python nbs/_benchmark/gpu.py results.json --small      # tiny models, on whatever there is: shows that it runs

Needs torch, transformers and scilm_adapt (the folder above this one's is enough), no tokenizer, no data, no network. Each way has the
same weights and the same tokens and takes turns with the others; medians are kept. The ways:

    naive    all logits of both models, JSD(1/2) as one would write it down, autograd
    ours     `divergence.chunked_loss`, through `teacher.OpenTeacher` as in training
    cached   forward KL from 16 kept words a token, no teacher: what the second epoch costs
    trl      GKDTrainer.generalized_jsd_loss of TRL on all logits of the conversation, as its compute_loss does; if TRL is installed

The share is of the rate of bfloat16 products of two 8192 x 8192 matrices, measured in the same run. Operations are counted by need: three
forward passes of the student and one of the teacher, heads at learnt tokens only, so that what a way does in vain is not to its credit.
"""
import argparse
import gc
import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scilm_adapt.divergence import head_of, sparse_loss
from scilm_adapt.models import LanguageModel, hidden_states, logits_of, parameter_count
from scilm_adapt.teacher import LiveTeacher
from scilm_adapt.training import adamw, target_states

# Qwen2.5 0.5B and 7B, with the teacher's vocabulary for both; rows of 256 tokens of question and 768 of answer.
FULL = dict(vocabulary=152064, student=(896, 4864, 24, 14, 2), teacher=(3584, 18944, 28, 28, 4), rows=8, prompt=256, answer=768)
SMALL = dict(vocabulary=512, student=(32, 64, 2, 4, 2), teacher=(64, 128, 2, 4, 2), rows=4, prompt=8, answer=24)


def model(shape: tuple[int, ...], vocabulary: int, context: int, device: str, dtype: torch.dtype, seed: int) -> torch.nn.Module:
    "A Qwen2 model of (hidden, inner, layers, heads, key-value heads), its weights drawn on the device."
    hidden, inner, layers, heads, shared = shape
    config = Qwen2Config(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=shared, max_position_embeddings=context, tie_word_embeddings=True)
    torch.manual_seed(seed)
    with torch.device(device): return AutoModelForCausalLM.from_config(config, dtype=dtype)


def tokens(shapes: dict, device: str) -> dict[str, torch.Tensor]:
    "A packed batch of random conversations, one a row, of which the answers are learnt."
    rows, length = shapes['rows'], shapes['prompt'] + shapes['answer']
    ids = torch.randint(shapes['vocabulary'], (rows, length), generator=torch.Generator().manual_seed(0))
    places = torch.arange(length).expand(rows, length)
    batch = dict(input_ids=ids, position_ids=places, loss_mask=places >= shapes['prompt'])
    return {name: value.to(device) for name, value in batch.items()}


def ways(student: torch.nn.Module, teacher: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, Callable]:
    "The loss of each way, as a function without arguments."
    count = int(batch['loss_mask'][:, 1:].sum())
    live, ids = LiveTeacher(LanguageModel(teacher, None, 'teacher')), batch['input_ids']
    chance = torch.Generator().manual_seed(1)
    token_ids = torch.randint(student.config.vocab_size, (count, 16), generator=chance).to(ids.device)
    def naive() -> torch.Tensor:
        own = logits_of(student, target_states(hidden_states(student, batch), batch)[0]).float().log_softmax(-1)
        with torch.no_grad(): said = logits_of(teacher, target_states(hidden_states(teacher, batch), batch)[0]).float().log_softmax(-1)
        middle = torch.logsumexp(torch.stack([own, said]), 0) - torch.tensor(2.0).log()
        return 0.5*sum(F.kl_div(middle, one, log_target=True, reduction='sum') for one in (said, own))/count
    def ours() -> torch.Tensor:
        states, _ = target_states(hidden_states(student, batch), batch)
        return live.loss(batch, states, head_of(student), 'jsd scaled=false')
    def cached() -> torch.Tensor:
        states, _ = target_states(hidden_states(student, batch), batch)
        everything = torch.ones(count, dtype=torch.bool, device=ids.device)
        weights = torch.full((count, 16), 1/16, device=ids.device)
        return sparse_loss(states, head_of(student), token_ids, weights, everything, targets='sampled')
    found = dict(naive=naive, ours=ours, cached=cached)
    try: gkd = importlib.import_module('trl.experimental.gkd').GKDTrainer
    except (ImportError, RuntimeError): return found
    labels, mask = torch.where(batch['loss_mask'], ids, -100), torch.ones_like(ids)
    def trl() -> torch.Tensor:
        own = student(input_ids=ids, attention_mask=mask).logits[:, :-1]
        with torch.no_grad(): said = teacher(input_ids=ids, attention_mask=mask).logits[:, :-1]
        return gkd.generalized_jsd_loss(own, said, labels[:, 1:], beta=0.5, num_items_in_batch=count)
    return found | dict(trl=trl)


def wait(device: str) -> float:
    "Seconds on the clock when the device has done what it was asked to."
    if device == 'cuda': torch.cuda.synchronize()
    return time.perf_counter()


def taken(call: Callable, device: str) -> float:
    "Seconds that a call takes."
    start = wait(device)
    call()
    return wait(device) - start


def product_rate(size: int, device: str, rounds: int = 20) -> float:
    "Operations a second of a bfloat16 product of two square matrices: the median."
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2*size**3/statistics.median(taken(lambda: one @ other, device) for _ in range(rounds))


def operations(config: object, rows: int, length: int, predicted: int) -> float:
    "Operations of a forward pass, `predicted` tokens through the head; attention counts as half of its square."
    wide, inner, all_tokens = config.hidden_size, config.intermediate_size, rows*length
    shared = config.num_key_value_heads/config.num_attention_heads
    layer = 2*all_tokens*((2 + 2*shared)*wide**2 + 3*wide*inner) + 2*all_tokens*length*wide
    return config.num_hidden_layers*layer + 2*predicted*wide*config.vocab_size


def measured(shapes: dict, rounds: int, device: str) -> dict:
    "For each way 'seconds' of a step, 'tokens_per_second' (all that are read), 'GiB' above the weights at the highest, 'share', 'loss'."
    length = shapes['prompt'] + shapes['answer']
    student = model(shapes['student'], shapes['vocabulary'], length, device, torch.float32, 0)
    teacher = model(shapes['teacher'], shapes['vocabulary'], length, device, torch.bfloat16, 1).eval()
    batch, (optimizer,) = tokens(shapes, device), adamw(student, 0.0)
    count, losses, gone = int(batch['loss_mask'][:, 1:].sum()), ways(student, teacher, batch), {}
    rate = product_rate(8192 if device == 'cuda' else 128, device)
    found = {name: dict(seconds=[], GiB=0.0) for name in losses}
    def step(name: str) -> None:
        with torch.autocast(device, torch.bfloat16): loss = losses[name]()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found[name]['loss'] = loss.item()
    student.train()
    for number in range(2 + rounds):
        for name in list(losses)[::1 if number % 2 else -1]:
            if name in gone: continue
            gc.collect()
            if device == 'cuda':
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            try: seconds = taken(lambda name=name: step(name), device)
            except torch.OutOfMemoryError:  # that one cannot, the others go on
                gone[name] = 'out of memory'
                optimizer.zero_grad()
                continue
            if number >= 2: found[name]['seconds'].append(seconds)
            if device == 'cuda': found[name]['GiB'] = max(found[name]['GiB'], (torch.cuda.max_memory_allocated() - before)/2**30)
    for name, values in found.items():
        if name in gone: continue
        need = 3*operations(student.config, shapes['rows'], length, count)
        if name != 'cached': need += operations(teacher.config, shapes['rows'], length, count)
        values['seconds'] = statistics.median(values['seconds'])
        values |= dict(tokens_per_second=shapes['rows']*length/values['seconds'], share=need/values['seconds']/rate)
    ran = {name: dict(failed=gone[name]) if name in gone else values for name, values in found.items()}
    return dict(rate=rate, weights=dict(student=parameter_count(student), teacher=parameter_count(teacher)), ways=ran)


def main() -> None:
    "Measure, print a table and write the file."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('file', type=Path)
    parser.add_argument('--small', action='store_true', help='tiny models')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--rows', type=int, help='conversations in the batch')
    asked = parser.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cpu' and not asked.small: parser.error('there is no CUDA device; --small tries the script out on a processor')
    shapes = (SMALL if asked.small else FULL) | (dict(rows=asked.rows) if asked.rows else {})
    result = dict(date=datetime.now(UTC).isoformat(timespec='seconds'), shapes=shapes, rounds=asked.rounds,
                  hardware=torch.cuda.get_device_name() if device == 'cuda' else f'{platform.machine()} processor',
                  versions=dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__))
    result |= measured(shapes, asked.rounds, device)
    if 'trl' in result['ways']: result['versions']['trl'] = __import__('trl').__version__
    print(f"{result['hardware']}: {result['rate']/1e12:,.2f} TFLOP/s in bfloat16 products; " +
          ', '.join(f'{name} {size:,} weights' for name, size in result['weights'].items()))
    for name, row in result['ways'].items():
        if 'failed' in row: print(f"{name:8} {row['failed']}")
        else: print(f"{name:8}{row['tokens_per_second']:12,.0f} tokens/s {row['GiB']:8.2f} GiB {row['share']:8.1%}  loss {row['loss']:.5f}")
    asked.file.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__': main()
