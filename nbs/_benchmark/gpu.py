"""Stages 1 and 2 on one GPU at the shapes of real models, weights at random: `make bench-gpu`, or

    python nbs/_benchmark/gpu.py results.json              # on the first CUDA device, in less than nine minutes on an H100
    python nbs/_benchmark/gpu.py results.json --small      # tiny models, on whatever there is: the same code, which shows that it runs

Needs torch, transformers, accelerate, scipy, tabulate and scilm_adapt (the folder above this one's is enough), no data, no network:

    losses    every loss of both stages in 32 bits on the device, value and gradient, against 64 bits on the processor
    stage 1   a step of reading: a student of half a billion weights, and one of 7 billion with weights and averages in 16 bits
    stage 2   a step of JSD(1/2) from a teacher of 7 billion: half a billion weights in several ways, and 7 billion
    answers   that the student writes itself, beside transformers' generate

The ways of stage 2 take turns, have the same weights and tokens, and the median counts:

    naive    all logits of both models, JSD(1/2) as one would write it down, autograd
    ours     `divergence.chunked_loss`, through `teacher.OpenTeacher` as in training
    cached   forward KL from 16 kept words a token, no teacher: what the second epoch costs
    liger    LigerFusedLinearJSDLoss of Liger from the states of learnt tokens; if Liger is installed
    trl      GKDTrainer.generalized_jsd_loss of TRL on all logits of the conversation, as its compute_loss does; if TRL is installed

The share is of the rate of bfloat16 products of two 8192 x 8192 matrices, measured in the same run. Operations are counted by need: three
forward passes of the student and one of the teacher, heads at learnt tokens only, so that what a way does in vain is not to its credit.
What does not fit into the memory of the device, or into the minutes, is named, and the rest goes on.
"""
import argparse
import copy
import gc
import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from accelerate.utils import send_to_device
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from parts import PARTS, papers, part_maker

from scilm_adapt.contrast import Recipe, contrast_loss
from scilm_adapt.decoding import sample
from scilm_adapt.divergence import divergences, head_of, sparse_loss
from scilm_adapt.models import LanguageModel, build, hidden_states, logits_of, parameter_count
from scilm_adapt.teacher import LiveTeacher
from scilm_adapt.tokens import pack, train_tokenizer
from scilm_adapt.training import adamw, lm_loss, target_states

# Qwen2.5 0.5B and 7B, with the teacher's vocabulary for both; rows of 256 tokens of question and 768 of answer, `large_rows` of them where
# the student has 7 billion weights; `prompts` are answered together.
FULL = dict(vocabulary=152064, student=(896, 4864, 24, 14, 2), teacher=(3584, 18944, 28, 28, 4), rows=8, large_rows=2, prompt=256,
            answer=768, prompts=32, written=128)
SMALL = dict(vocabulary=512, student=(32, 64, 2, 4, 2), teacher=(64, 128, 2, 4, 2), rows=4, large_rows=2, prompt=8, answer=24, prompts=2,
             written=8)
# How far 32 bits may be from 64, as a share. The gradient of total variation is made of signs, some of which are the other way where two
# probabilities are equal to seven digits; powers of probabilities near 0 lose a digit or two.
NEAR = {'stage 2, total_variation': 1e-2, 'stage 2, alpha_beta': 1e-3}
NEAR_ELSE = 2e-5


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
    def liger() -> torch.Tensor:
        states, targets = target_states(hidden_states(student, batch), batch)
        with torch.no_grad(): said = target_states(hidden_states(teacher, batch), batch)[0]
        own, its = (lm.get_output_embeddings().weight for lm in (student, teacher))
        loss = importlib.import_module('liger_kernel.chunked_loss').LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)
        return loss(states, own, said, its, targets)
    found = dict(naive=naive, ours=ours, cached=cached) | (dict(liger=liger) if find_spec('liger_kernel') else {})
    try: gkd = importlib.import_module('trl.experimental.gkd').GKDTrainer
    except (ImportError, RuntimeError): return found
    labels, mask = torch.where(batch['loss_mask'], ids, -100), torch.ones_like(ids)
    def trl() -> torch.Tensor:
        own = student(input_ids=ids, attention_mask=mask).logits[:, :-1]
        with torch.no_grad(): said = teacher(input_ids=ids, attention_mask=mask).logits[:, :-1]
        return gkd.generalized_jsd_loss(own, said, labels[:, 1:], beta=0.5, num_items_in_batch=count)
    return found | dict(trl=trl)


# --- time and memory

def wait(device: str) -> float:
    "Seconds on the clock when the device has done what it was asked to."
    if device == 'cuda': torch.cuda.synchronize()
    return time.perf_counter()


def taken(call: Callable, device: str) -> float:
    "Seconds that a call takes."
    start = wait(device)
    call()
    return wait(device) - start


def emptied(device: str) -> int:
    "Bytes that are in use on the device once all that is free was given back, from where a new peak is counted."
    gc.collect()
    if device != 'cuda': return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


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


def in_turns(student: torch.nn.Module, losses: dict[str, Callable], needs: dict[str, float], read: int, rate: float, rounds: int,
             device: str) -> dict[str, dict]:
    """Steps with each of `losses` in turn, for which `needs` says the operations: the median 'seconds', 'tokens_per_second' of the `read`,
    'GiB' above what there was, 'share' of the `rate`, 'loss'; or 'failed'."""
    (optimizer,), found, gone = adamw(student, 0.0), {name: dict(seconds=[], GiB=0.0) for name in losses}, {}
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
            before = emptied(device)
            try: seconds = taken(lambda name=name: step(name), device)
            except torch.OutOfMemoryError:  # that one cannot, the others go on
                gone[name] = dict(failed='out of memory')
                optimizer.zero_grad()
                continue
            if number >= 2: found[name]['seconds'].append(seconds)
            if device == 'cuda': found[name]['GiB'] = max(found[name]['GiB'], (torch.cuda.max_memory_allocated() - before)/2**30)
    for name, values in found.items():
        if name in gone: continue
        values['seconds'] = statistics.median(values['seconds'])
        values |= dict(tokens_per_second=read/values['seconds'], share=needs[name]/values['seconds']/rate)
    return found | gone


# --- the sections

def distillation(shapes: dict, rate: float, rounds: int, device: str, large: bool = False) -> dict[str, dict]:
    "Stage 2: the ways of a step of the small student; or of a `large` one, in 16 bits and our way alone."
    length = shapes['prompt'] + shapes['answer']
    if large: shapes = shapes | dict(student=shapes['teacher'], rows=shapes['large_rows'])
    student = model(shapes['student'], shapes['vocabulary'], length, device, torch.bfloat16 if large else torch.float32, 0)
    teacher = model(shapes['teacher'], shapes['vocabulary'], length, device, torch.bfloat16, 1).eval()
    batch = tokens(shapes, device)
    count, losses = int(batch['loss_mask'][:, 1:].sum()), ways(student, teacher, batch)
    if large: losses = dict(ours=losses['ours'])
    learnt, asked = (operations(lm.config, shapes['rows'], length, count) for lm in (student, teacher))
    needs = {name: 3*learnt + (0 if name == 'cached' else asked) for name in losses}
    return in_turns(student, losses, needs, shapes['rows']*length, rate, rounds, device)


def reading(shapes: dict, rate: float, rounds: int, device: str, large: bool = False) -> dict[str, dict]:
    "Stage 1 without contrasts: a row is one document, of which every token but the first is learnt."
    length, rows = shapes['prompt'] + shapes['answer'], shapes['large_rows' if large else 'rows']
    shape, dtype = (shapes['teacher'], torch.bfloat16) if large else (shapes['student'], torch.float32)
    student = model(shape, shapes['vocabulary'], length, device, dtype, 0)
    ids = torch.randint(shapes['vocabulary'], (rows, length), generator=torch.Generator().manual_seed(0)).tolist()
    batch = send_to_device(pack(ids, length).batch(list(range(rows))), device)
    needs = dict(reading=3*operations(student.config, rows, length, int(batch['count'])))
    return in_turns(student, dict(reading=lambda: lm_loss(student, batch)), needs, rows*length, rate, rounds, device)


def writing(shapes: dict, rounds: int, device: str) -> dict[str, dict]:
    "Answers of the small student in 16 bits, all of the same length, by ours and by transformers' generate in turn: tokens a second."
    student = model(shapes['student'], shapes['vocabulary'], 4096, device, torch.bfloat16, 0).eval()
    student.generation_config.eos_token_id = None
    ids = torch.randint(shapes['vocabulary'], (shapes['prompts'], shapes['prompt']), generator=torch.Generator().manual_seed(0)).to(device)
    mask, new = torch.ones_like(ids), shapes['written']
    def generate() -> torch.Tensor:
        return student.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0)
    calls, seconds, sizes = dict(ours=lambda: sample(student, ids, mask, new), generate=generate), {}, {}
    for number in range(1 + rounds):
        for name in list(calls)[::1 if number % 2 else -1]:
            took = taken(lambda name=name: sizes.update({name: calls[name]().shape[1]}), device)
            if number: seconds.setdefault(name, []).append(took)
    assert {*sizes.values()} == {shapes['prompt'] + new}, sizes
    return {name: dict(seconds=(median := statistics.median(times)), tokens_per_second=shapes['prompts']*new/median)
            for name, times in seconds.items()}


def exactness(device: str) -> dict[str, float]:
    """For every loss of both stages, how far its value and its gradient in 32 bits on the device are from 64 bits on the processor: the
    larger one, as a share of the value or of the gradient's length."""
    texts = papers(64, 40)
    tokenizer = train_tokenizer([paper['text'] for paper in texts], 400)
    student, teacher = (build(tokenizer, 'qwen2', hidden=hidden, layers=2, context=64, seed=seed) for seed, hidden in enumerate((32, 48)))
    ids = torch.randint(3, 400, (8, 64), generator=torch.Generator().manual_seed(0)).tolist()
    rows = pack([ids[n // 3][n % 3*20:n % 3*20 + 20] for n in range(24)], 64)  # three documents in a row
    chats = pack(ids, 64, [[0]*24 + [1]*40]*8).batch(list(range(8)))
    recipes = {name: Recipe(steps=1, batch_size=4, context=64, **dict(token_weight=0.0) | weights) for name, weights in PARTS.items()}
    batches = {name: part_maker(rows, recipe, tokenizer, texts, compared=False)(0) for name, recipe in recipes.items()}
    def found(device: str, dtype: torch.dtype) -> dict[str, tuple[float, torch.Tensor]]:
        own, other = (copy.deepcopy(lm.model).to(device, dtype) for lm in (student, teacher))
        live, given = LiveTeacher(LanguageModel(other, None, 'teacher')), send_to_device(chats, device)
        def part(name: str) -> torch.Tensor:
            values = contrast_loss(recipes[name], before)(own, send_to_device(batches[name], device))
            return values['lm' if name == 'alone' else name]
        def states() -> torch.Tensor: return target_states(hidden_states(own, given), given)[0]
        before = build(tokenizer, 'qwen2', hidden=32, layers=2, context=64, seed=2).model.to(device, dtype)  # what the anchor holds on to
        calls = {f'stage 1, {name}': lambda name=name: part(name) for name in PARTS}
        calls |= {f'stage 2, {name}': lambda name=name: live.loss(given, states(), head_of(own), name) for name in divergences}
        for how, name in (('sampled', 'forward_kl'), ('top_k', 'forward_kl'), ('top_k', 'skew_kl')):
            calls[f'stage 2, {name}, {how}'] = lambda how=how, name=name: kept_words(states(), own, how, name)
        values = {}
        for name, call in calls.items():
            own.zero_grad()
            (loss := call()).backward()
            slopes = torch.cat([p.grad.reshape(-1) for p in own.parameters() if p.grad is not None])
            values[name] = loss.item(), slopes.cpu().double()
        return values
    torch.backends.cuda.matmul.allow_tf32 = False
    exact, here = found('cpu', torch.float64), found(device, torch.float32)
    return {name: max(abs(here[name][0]/value - 1), ((here[name][1] - slopes).norm()/slopes.norm()).item())
            for name, (value, slopes) in exact.items()}


def kept_words(states: torch.Tensor, student: torch.nn.Module, how: str, divergence: str) -> torch.Tensor:
    "A loss from eight kept words a token, the same on every device."
    number, draw = len(states), torch.Generator().manual_seed(2)
    ids = torch.rand(number, 400, generator=draw).topk(8).indices.to(states.device)
    weights = torch.full((number, 8), 1/8 if how == 'sampled' else 0.9/8, dtype=states.dtype, device=states.device)
    everything = torch.ones(number, dtype=torch.bool, device=states.device)
    return sparse_loss(states, head_of(student), ids, weights, everything, divergence, targets=how)


# --- the whole

def row(name: str, value: object, sign: str = '', target: float | None = None) -> dict:
    "A line of the table: what was measured, what is wanted, and whether that was met (None where nothing is wanted)."
    met = None if target is None else bool(value >= target if sign == '≥' else value <= target) if not isinstance(value, str) else False
    return dict(name=name, value=value, target='' if target is None else f'{sign} {target:g}', met=met)


def rows_of(title: str, found: dict[str, dict], least: float | None = None) -> list[dict]:
    "What a section says of each of its ways; of ours and of reading a share of at least `least` is wanted."
    rows = []
    for name, values in found.items():
        about, wanted = f'{title}, {name}', least if name in ('ours', 'reading') else None
        if 'failed' in values: rows.append(row(f'{about}: share of the rate', values['failed'], '≥', wanted)); continue
        rows.append(row(f'{about}: tokens/s', round(values['tokens_per_second'], 1)))
        if 'share' not in values: continue
        rows += [row(f'{about}: share of the rate', round(values['share'], 4), '≥', wanted), row(f'{about}: GiB', round(values['GiB'], 2))]
    return rows


def measured(shapes: dict, rounds: int, device: str, minutes: float = 8.0) -> dict:
    "All sections, as long as there are minutes left to begin one: their numbers, and the 'rows' of the table."
    begun, rate = time.monotonic(), product_rate(8192 if device == 'cuda' else 128, device)
    named = dict(distilled=f"{parameter_count(model(shapes['student'], shapes['vocabulary'], 64, 'meta', torch.float32, 0)):,}",
                 teacher=f"{parameter_count(model(shapes['teacher'], shapes['vocabulary'], 64, 'meta', torch.float32, 0)):,}")
    sections = dict(losses=lambda: exactness(device), ways=lambda: distillation(shapes, rate, rounds, device),
                    reading=lambda: reading(shapes, rate, rounds, device), writing=lambda: writing(shapes, min(rounds, 3), device),
                    large_reading=lambda: reading(shapes, rate, rounds, device, large=True),
                    large_ways=lambda: distillation(shapes, rate, rounds, device, large=True))
    titles = dict(ways=(f"stage 2, {named['distilled']} weights from {named['teacher']}", 0.40),
                  reading=(f"stage 1, {named['distilled']} weights", 0.45), writing=(f"answers of {named['distilled']} weights", None),
                  large_reading=(f"stage 1, {named['teacher']} weights", 0.45),
                  large_ways=(f"stage 2, {named['teacher']} weights from as many", 0.40))
    found, rows = {}, [row('bfloat16 products: TFLOP/s', round(rate/1e12, 4))]
    for name, section in sections.items():
        if time.monotonic() - begun > 60*minutes: rows.append(row(name, 'no time was left', '≥', 0)); continue
        before = len(rows)
        try: found[name] = section()
        except torch.OutOfMemoryError: found[name] = {name: dict(failed='out of memory')}
        emptied(device)
        if name == 'losses': rows += [row(f'{loss}: 32 from 64 bits', apart, '≤', NEAR.get(loss, NEAR_ELSE))
                                      for loss, apart in found[name].items()]
        else: rows += rows_of(titles[name][0], found[name], titles[name][1])
        print('\n'.join(map(told, rows[before:])), flush=True)
    return dict(rate=rate, rows=rows, minutes=round((time.monotonic() - begun)/60, 2)) | found


def told(one: dict) -> str:
    "A row of the table as a line."
    value = one['value'] if isinstance(one['value'], str) else f"{one['value']:,.5g}"
    return f"{one['name']:80} {value:>14} {one['target']:>8} {dict([(None, ''), (True, 'met'), (False, 'NOT MET')])[one['met']]}".rstrip()


def main() -> None:
    "Measure, print a table and write the file."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('file', type=Path)
    parser.add_argument('--small', action='store_true', help='tiny models')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--rows', type=int, help='conversations in the batch')
    parser.add_argument('--minutes', type=float, default=8.0, help='no section begins later')
    asked = parser.parse_args()
    device = 'cuda' if torch.cuda.is_available() and not asked.small else 'cpu'
    if device == 'cpu' and not asked.small: parser.error('there is no CUDA device; --small tries the script out on a processor')
    shapes = (SMALL if asked.small else FULL) | (dict(rows=asked.rows) if asked.rows else {})
    result = dict(date=datetime.now(UTC).isoformat(timespec='seconds'), shapes=shapes, rounds=asked.rounds,
                  hardware=torch.cuda.get_device_name() if device == 'cuda' else f'{platform.machine()} processor',
                  versions=dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__))
    result |= measured(shapes, asked.rounds, device, asked.minutes)
    if 'trl' in result.get('ways', {}): result['versions']['trl'] = __import__('trl').__version__
    else: result['rows'].append(row("stage 2, TRL's loss", 'not installed'))
    missed = sum(one['met'] is False for one in result['rows'])
    print(f"\n{result['hardware']}, {result['minutes']:.1f} minutes, {len(result['rows'])} rows, {missed} of them not met")
    asked.file.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__': main()
