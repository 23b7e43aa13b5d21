"""The contestants of benchmark.ipynb in distillation: each call is a process of its own and ends with one line of JSON.

    python steps.py prepare folder '{"small": true}'
    python steps.py contest folder '{"names": ["ours", "gkd", "gold"], "rounds": 5}'

What is counted. Everybody gets the same tokens, already collated and on the processor, and the same weights, read from the same folder.
The learning rate is 0, so that the weights stay what they are and every round is the same work with the same loss. Ours is
`training.fit` itself with `distill.distil_loss`, from one batch to the next, with all its bookkeeping. TRL's is the trainer's own
`training_step` (its on-policy part included), then clipping and the optimiser's step; the loop of `Trainer.train` around it, which would
come on top, is left out. All have 32 or all have 16-bit products, fused AdamW, clipping at 1, and no gradient checkpointing.
"""
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import WARM, Peak, in_turns, main, open_model, prepare, summary, trl_settings, trl_step

from scilm_adapt.decoding import sample
from scilm_adapt.distill import distil_loss
from scilm_adapt.divergence import chunked_loss
from scilm_adapt.files import read_json
from scilm_adapt.models import LanguageModel
from scilm_adapt.teacher import LiveTeacher, addresses, build_cache
from scilm_adapt.tokens import Packed, pack
from scilm_adapt.training import fit, lm_loss

# --- tokens

def conversations(folder: Path, batches: int = 1) -> Packed:
    "Random tokens in rows of one question and one answer each, of which the answer is learnt."
    shapes, draw = read_json(folder/'shapes.json'), np.random.default_rng(0)
    length = shapes['prompt'] + shapes['answer']
    ids = draw.integers(3, shapes['vocabulary'], (batches*shapes['rows'], length)).tolist()  # 0 to 2 are control tokens
    return pack(ids, length, [[0]*shapes['prompt'] + [1]*shapes['answer']]*len(ids))


# --- TRL's trainers

def collated(folder: Path) -> dict[str, torch.Tensor]:
    "The batch of `conversations` as TRL's own collator would hand it over."
    shapes = read_json(folder/'shapes.json')
    batch, prompt = conversations(folder).batch(list(range(shapes['rows']))), shapes['prompt']
    ids = batch['input_ids']
    labels = torch.where(batch['loss_mask'], ids, -100)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, prompts=ids[:, :prompt],
                prompt_attention_mask=torch.ones_like(ids[:, :prompt]))


def gkd(folder: Path, precision: str, on_policy: bool) -> Callable[[], float]:
    "trl.experimental.gkd.GKDTrainer."
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    student, inputs, shapes = open_model(folder, 'student'), collated(folder), read_json(folder/'shapes.json')
    settings = trl_settings(GKDConfig, precision, shapes['rows'], lmbda=float(on_policy), max_new_tokens=shapes['answer'])
    if not on_policy: settings.lmbda = -1.0  # its `random() <= 0` could be true
    trainer = GKDTrainer(student.model, open_model(folder, 'teacher').model, settings, lambda rows: rows,
                         Dataset.from_dict(dict(input_ids=inputs['input_ids'].tolist())), processing_class=student.tokenizer)
    trainer.generation_config.eos_token_id = None
    return partial(trl_step(trainer), inputs, (inputs['labels'] != -100).sum())


def gold(folder: Path, precision: str, on_policy: bool) -> Callable[[], float]:
    "trl.experimental.gold.GOLDTrainer, student and teacher having the same tokenizer."
    from datasets import Dataset
    from trl.experimental.gold import GOLDConfig, GOLDTrainer
    student, inputs, shapes = open_model(folder, 'student'), collated(folder), read_json(folder/'shapes.json')
    settings = trl_settings(GOLDConfig, precision, shapes['rows'], lmbda=0.0, max_completion_length=shapes['answer'], use_vllm=False,
                            use_uld_loss=False)
    settings.lmbda = -1.0
    trainer = GOLDTrainer(student.model, open_model(folder, 'teacher').model, settings, lambda rows: rows,
                          Dataset.from_dict(dict(input_ids=inputs['input_ids'].tolist())), processing_class=student.tokenizer)
    return partial(trl_step(trainer), inputs, (inputs['labels'] != -100).sum())


def distillation(folder: Path, precision: str, on_policy: bool) -> Callable[[], float]:
    "trl.DistillationTrainer, which is always on-policy."
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer
    student, inputs, shapes = open_model(folder, 'student'), collated(folder), read_json(folder/'shapes.json')
    settings = trl_settings(DistillationConfig, precision, shapes['rows'], max_completion_length=shapes['answer'], use_vllm=False)
    prompts = [dict(prompt=str(number)) for number in range(shapes['rows'])]
    trainer = DistillationTrainer(model=student.model, teacher_model=open_model(folder, 'teacher').model, args=settings,
                                  train_dataset=Dataset.from_list(prompts), processing_class=student.tokenizer)
    trainer._tokenize_prompts = lambda texts: (inputs['prompts'].tolist(), None, {})  # the same questions, already as tokens
    trainer.generation_config.eos_token_id, trainer.eos_token_ids = None, [-1]        # nothing ends an answer
    return partial(trl_step(trainer), prompts, None)


TRL = dict(gkd=gkd, gold=gold, distillation=distillation)


# --- ours, and the contest

def our_batch(folder: Path, student: LanguageModel, on_policy: bool) -> Callable[[], dict[str, torch.Tensor]]:
    "The batch that everybody gets, or one whose answers the student has just written to the same questions."
    shapes = read_json(folder/'shapes.json')
    rows, prompt, answer = list(range(shapes['rows'])), shapes['prompt'], shapes['answer']
    given = conversations(folder).batch(rows)
    if not on_policy: return lambda: given
    questions, chance = given['input_ids'][:, :prompt], torch.Generator().manual_seed(0)
    def on_policy_batch() -> dict[str, torch.Tensor]:
        ids = sample(student.model, questions, torch.ones_like(questions), answer, generator=chance)
        return pack(ids.tolist(), prompt + answer, [[0]*prompt + [1]*answer]*len(rows)).batch(rows)
    return on_policy_batch


def contest(folder: Path, names: list[str], rounds: int = 5, precision: str = 'no', on_policy: bool = False, real: bool = False) -> dict:
    """Steps of the contestants in turn, the order of TRL's changing from round to round: median 'seconds' of each and every 'loss'.

    The 'MiB' is the peak over what there was before the first step, and says something when only one contestant is named; 'targets' are
    the learnt tokens of a step. `real`: with the models of `prepare(real=True)`.
    """
    if real: folder = folder/'real'
    shapes = read_json(folder/'shapes.json')
    targets = dict(targets=shapes['rows']*shapes['answer'])
    others = {name: TRL[name](folder, precision, on_policy) for name in names if name != 'ours'}
    if 'ours' not in names: return in_turns(others, None, rounds) | targets
    student, teacher = open_model(folder, 'student'), open_model(folder, 'teacher')
    next_batch, loss = our_batch(folder, student, on_policy), distil_loss(LiveTeacher(teacher), 'jsd scaled=false')
    def ours(before: Callable[[int], None]) -> list[float]:
        def batch_at(step: int) -> dict[str, torch.Tensor]:
            before(step)
            return next_batch()
        history = fit(student.model, batch_at, loss, WARM + rounds, learning_rate=0.0, precision=precision, description='ours')
        return [row['loss'] for row in history]
    return in_turns(others, ours, rounds) | targets


# --- the loss alone

def naive_loss(states: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor, teacher_head: torch.Tensor, kind: str) -> torch.Tensor:
    "A divergence as one would write it down: all logits of both, a softmax of each, and what autograd makes of it."
    student, said = F.linear(states, head).log_softmax(-1), F.linear(teacher, teacher_head).log_softmax(-1)
    if kind == 'forward_kl': return F.kl_div(student, said, log_target=True, reduction='sum')/len(states)
    middle = torch.logsumexp(torch.stack([student, said]), 0) - np.log(2)
    return 0.5*sum(F.kl_div(middle, one, log_target=True, reduction='sum') for one in (said, student))/len(states)


def liger_loss(states: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor, teacher_head: torch.Tensor) -> torch.Tensor:
    "JSD by Liger, whose chunked losses are PyTorch, and compiled as they come."
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)
    return loss(states, head, teacher, teacher_head, torch.zeros(len(states), dtype=torch.long, device=states.device))


def loss_alone(folder: Path, ways: list[str], kind: str, vocabulary: int, tokens: int, width: int = 256, rounds: int = 5) -> dict:
    "A loss and its gradients from states of width `width` and twice that, 'naive', our 'chunked' and 'liger' in turn; see `contest`."
    draw = torch.Generator().manual_seed(0)
    states, head = (torch.randn(n, width, generator=draw, requires_grad=True) for n in (tokens, vocabulary))
    teacher, teacher_head = (torch.randn(n, 2*width, generator=draw) for n in (tokens, vocabulary))
    with torch.no_grad(): [tensor.mul_(2*tensor.shape[-1]**-0.25) for tensor in (states, head, teacher, teacher_head)]
    everything, divergence = torch.ones(tokens, dtype=torch.bool), 'jsd scaled=false' if kind == 'jsd' else kind
    calls = dict(naive=lambda: naive_loss(states, head, teacher, teacher_head, kind),
                 chunked=lambda: chunked_loss(states, head, teacher, teacher_head, everything, divergence),
                 liger=lambda: liger_loss(states, head, teacher, teacher_head))
    seconds, losses = {way: [] for way in ways}, {way: [] for way in ways}
    if 'liger' in ways: calls['liger']().backward()  # compiles it, which takes memory, too
    with Peak() as peak:
        for number in range(WARM + rounds if len(ways) > 1 else 1):
            for way in ways[::1 if number % 2 else -1]:
                states.grad = head.grad = None
                start = time.perf_counter()
                (loss := calls[way]()).backward()
                seconds[way].append(time.perf_counter() - start)
                losses[way].append(loss.item())
                del loss
    return summary(seconds, loss=losses, MiB=peak.MiB)


# --- a cache

def cache(folder: Path, rounds: int = 5, batches: int = 4, k: int = 16) -> dict:
    "Epochs of `batches` steps with a live teacher and with its answers on disk, in turn; building these; and reading them alone."
    student, teacher, packed = open_model(folder, 'student'), LiveTeacher(open_model(folder, 'teacher')), conversations(folder, batches)
    place, rows = addresses(packed), len(packed)//batches
    def batch_at(step: int) -> dict[str, torch.Tensor]:
        chosen = list(range(step*rows, (step + 1)*rows))
        return packed.batch(chosen) | dict(address=place(chosen))
    def epoch(source: object) -> float:
        history = fit(student.model, batch_at, distil_loss(source), batches, learning_rate=0.0, precision='no', description='epoch')
        return sum(row['distil'] for row in history)/batches
    seconds, losses = dict(live=[], cached=[], build=[]), dict(live=[], cached=[])
    for _ in range(1 + rounds):
        with tempfile.TemporaryDirectory() as where:
            start = time.perf_counter()
            kept = build_cache(where, teacher, packed, k)
            seconds['build'].append(time.perf_counter() - start)
            for name, source in (('cached', kept), ('live', teacher)):
                start = time.perf_counter()
                losses[name].append(epoch(source))
                seconds[name].append(time.perf_counter() - start)
            places = np.random.default_rng(0).integers(kept.ends[-1], size=(400, 256))
            start = time.perf_counter()
            for some in places: kept.read(some)
            read = places.size/(time.perf_counter() - start)
            about = kept.report()
    done = summary(seconds, loss=losses, read=read, bytes=about['bytes_per_target'])
    return done | dict(used=about['targets']/done['seconds']['cached'])


# --- against the machine

def product_rate(size: int = 2048, dtype: torch.dtype = torch.float32, device: str = 'cpu', rounds: int = 9) -> float:
    "Operations a second of a product of two square matrices: the median over `rounds`."
    one, other, times = torch.randn(size, size, dtype=dtype, device=device), torch.randn(size, size, dtype=dtype, device=device), []
    for _ in range(rounds):
        start = time.perf_counter()
        one @ other
        times.append(time.perf_counter() - start)
    return 2*size**3/statistics.median(times)


def forward_operations(config: object, rows: int, length: int, predicted: int) -> float:
    """Operations of matrix products in a forward pass of a Llama model over `rows` rows, `predicted` of their tokens through the head.

    Attention counts as half of its square, what is masked as nothing; embeddings, norms and softmax count as nothing.
    """
    wide, inner, tokens = config.hidden_size, config.intermediate_size, rows*length
    shared = config.num_key_value_heads/config.num_attention_heads
    layer = 2*tokens*((2 + 2*shared)*wide**2 + 3*wide*inner) + 2*tokens*length*wide
    return config.num_hidden_layers*layer + 2*predicted*wide*config.vocab_size


def use(folder: Path, rounds: int = 5) -> dict:
    """Steps in float32 as a share of the rate of matrix products, which is measured before and after: of a language model, of distillation.

    'least' are the seconds that the products of the contest's off-policy step would take at that rate.
    """
    shapes = read_json(folder/'shapes.json')
    rows, length = shapes['rows'], shapes['prompt'] + shapes['answer']
    packed = conversations(folder)
    batch, whole = packed.batch(list(range(rows))), pack(packed.tokens, length).batch(list(range(rows)))
    size = 2048 if shapes['vocabulary'] > 1000 else 256
    rates, shares, seconds = [product_rate(size)], {}, {}
    teacher = open_model(folder, 'teacher')
    def losses(model, batch): return dict(loss=lm_loss(model, batch))
    cases = {'language modelling, large': ('large', losses, whole), 'language modelling, teacher': ('teacher', losses, whole),
             'distillation, large from teacher': ('large', distil_loss(LiveTeacher(teacher), 'jsd'), batch)}
    for case, (name, loss, data) in cases.items():
        lm, marks = open_model(folder, name), []
        def batch_at(step: int, data: dict = data, marks: list = marks) -> dict[str, torch.Tensor]:
            marks.append(time.perf_counter())
            return data
        fit(lm.model, batch_at, loss, WARM + rounds, learning_rate=0.0, precision='no', description=case)
        marks.append(time.perf_counter())
        done = 3*forward_operations(lm.model.config, rows, length, int(data['count']))
        if 'distil' in case: done += forward_operations(teacher.model.config, rows, length, int(data['count']))
        seconds[case] = np.diff(marks).tolist()
        shares[case] = done/statistics.median(seconds[case][WARM:])
        rates.append(product_rate(size))
    rate, student = statistics.median(rates), open_model(folder, 'student')
    least = sum(times*forward_operations(lm.model.config, rows, length, int(batch['count']))
                for times, lm in ((3, student), (1, teacher)))/rate
    return summary(seconds, rate=rate, least=least, share={case: value/rate for case, value in shares.items()})


if __name__ == '__main__': main(dict(prepare=prepare, contest=contest, loss_alone=loss_alone, cache=cache, use=use), *sys.argv[1:])
