"""The contestants of benchmark.ipynb in reading, stage 1: each call is a process of its own and ends with one line of JSON.

    python reading.py prepare folder '{"small": true}'
    python reading.py contest folder '{"names": ["ours", "plain", "sft"], "rounds": 5}'

What is counted. All read the same documents of random tokens, as many in each and as unevenly as in the abstracts of papers, and begin
with the same weights; the learning rate is 0. A round is all documents once. What is learnt in it are all tokens but the first of each
document, whoever reads them and in which rows, and the tokens a second are these, divided by the seconds of a round: places that are
filled up count for nobody. Ours is `training.fit` itself with stage 1's loss and stage 1's batches, which it collates in its time;
all others have theirs collated before.
"""
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import WARM, Peak, in_turns, main, open_model, prepare, summary, trl_settings, trl_step
from parts import PARTS, papers, part_maker

from scilm_adapt.contrast import Recipe, batch_maker, contrast_loss
from scilm_adapt.decoding import contrastive_search, sample
from scilm_adapt.files import read_json
from scilm_adapt.pairs import pair_batch, pair_loss
from scilm_adapt.related import chain_starts
from scilm_adapt.tokens import USEFUL, Packed, pack
from scilm_adapt.training import fit

# Documents have (mean, deviation) tokens: so have 58,000 abstracts of arXiv in computer science, with their titles. TRL's own default is
# 8 documents a step, about as many tokens as in 4 rows of 512.
FULL = dict(context=512, rows=16, rows_a_step=4, documents_a_step=8, tokens=(234, 51), prompts=8, prompt=64, answer=64, text=190)
SMALL = dict(context=64, rows=4, rows_a_step=2, documents_a_step=4, tokens=(29, 8), prompts=4, prompt=16, answer=8, text=30)


def sizes(folder: Path) -> tuple[dict, int]:
    "The sizes that go with the models in a folder, and their vocabulary."
    vocabulary = read_json(folder/'shapes.json')['vocabulary']
    return (FULL if vocabulary > 1000 else SMALL), vocabulary


# --- reading all documents once

def documents(folder: Path) -> list[list[int]]:
    "As many documents of random tokens as go into the wished number of rows; none is longer than a row."
    size, vocabulary = sizes(folder)
    draw, found = np.random.default_rng(0), []
    while True:
        length = int(np.clip(draw.normal(*size['tokens']), 4, size['context']))
        found.append(draw.integers(3, vocabulary, length).tolist())  # 0 to 2 are control tokens
        if len(pack(found, size['context'], share=USEFUL)) > size['rows']: return found[:-1]


def reading(folder: Path, **weights: float) -> Recipe:
    "Stage 1 with no contrast but what `weights` say."
    size, _ = sizes(folder)
    return replace(Recipe(steps=1, batch_size=size['rows_a_step'], context=size['context'], learning_rate=0.0, pairs_weight=0.0,
                          token_weight=0.0), **weights)


def mean(losses: list[float], counts: list[float]) -> float:
    "The loss of a token, of losses of batches with so many targets."
    return sum(loss*count for loss, count in zip(losses, counts))/sum(counts)


def plain(folder: Path, precision: str) -> Callable[[], float]:
    "The loop that one would write with PyTorch alone, on the batches that ours makes; positions that begin anew keep documents apart."
    recipe, model = reading(folder), open_model(folder, 'student').model.train()
    packed = pack(documents(folder), recipe.context, share=USEFUL)
    batches = list(map(batch_maker(packed, recipe), range(len(packed)//recipe.batch_size)))
    labels = [batch['input_ids'].masked_fill(~batch['loss_mask'], -100) for batch in batches]
    groups = [dict(params=[p for p in model.parameters() if p.ndim >= 2], weight_decay=0.1),
              dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    def round_of_all() -> float:
        losses = []
        for batch, targets in zip(batches, labels):
            with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
                logits = model(input_ids=batch['input_ids'], position_ids=batch['position_ids'], use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return mean(losses, [batch['count'].item() for batch in batches])
    return round_of_all


def rounds_of(made: object) -> Callable[[], float]:
    "A round of all batches that a trainer's own data loader makes, as a function that returns the loss."
    batches = list(made.get_train_dataloader())
    counts = [(batch['labels'][:, 1:] != -100).sum() for batch in batches]
    step = trl_step(made)
    return lambda: mean([step(*each) for each in zip(batches, counts)], [count.item() for count in counts])


def sft(folder: Path, precision: str, packing: bool = False, gradient_checkpointing: bool = False) -> Callable[[], float]:
    "trl.SFTTrainer, the batches being those of its own data loader."
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    (size, _), student = sizes(folder), open_model(folder, 'student')
    settings = trl_settings(SFTConfig, precision, size['rows_a_step' if packing else 'documents_a_step'], max_length=size['context'],
                            packing=packing, gradient_checkpointing=gradient_checkpointing)
    return rounds_of(SFTTrainer(student.model, settings, train_dataset=Dataset.from_dict(dict(input_ids=documents(folder))),
                                processing_class=student.tokenizer))


def trainer(folder: Path, precision: str) -> Callable[[], float]:
    "transformers.Trainer with the collator that comes with it, which fills documents up to the longest; batches of its own data loader."
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
    (size, _), student = sizes(folder), open_model(folder, 'student')
    made = Trainer(student.model, trl_settings(TrainingArguments, precision, size['documents_a_step']),
                   train_dataset=Dataset.from_dict(dict(input_ids=documents(folder))),
                   data_collator=DataCollatorForLanguageModeling(student.tokenizer, mlm=False))
    return rounds_of(made)


OTHERS = {'plain': plain, 'Trainer': trainer, 'sft': sft, 'sft, packed': partial(sft, packing=True),
          'sft, as it comes': partial(sft, gradient_checkpointing=True)}


def our_rounds(folder: Path, packed: Packed, rounds: int, precision: str, before: Callable[[int], None]) -> list[float]:
    "Stage 1 without contrasts for so many rounds: the loss of each."
    recipe, model = reading(folder), open_model(folder, 'student').model
    batch_at, steps, counts = batch_maker(packed, recipe), len(packed)//recipe.batch_size, []
    def counted(step: int) -> dict[str, torch.Tensor]:
        before(step)
        batch = batch_at(step)
        counts.append(batch['count'].item())
        return batch
    history = fit(model, counted, contrast_loss(recipe), rounds*steps, learning_rate=0.0, precision=precision, description='ours')
    return [mean([row['loss'] for row in history[at:at + steps]], counts[at:at + steps]) for at in range(0, len(history), steps)]


def contest(folder: Path, names: list[str], rounds: int = 5, precision: str = 'no') -> dict:
    "Rounds of the contestants in turn: median 'seconds' and every 'loss' of each, and the 'targets' of a round; see `common.in_turns`."
    others = {name: OTHERS[name](folder, precision) for name in names if name != 'ours'}
    packed = pack(documents(folder), sizes(folder)[0]['context'], share=USEFUL)
    ours = partial(our_rounds, folder, packed, WARM + rounds, precision) if 'ours' in names else None
    found = in_turns(others, ours, rounds, len(packed)//sizes(folder)[0]['rows_a_step'])
    return found | dict(targets=int(packed.arrays(range(len(packed)))['loss_mask'].sum()))


# --- token contrast

def token(folder: Path, ways: list[str], rounds: int = 5) -> dict:
    """Steps of one training 'with' and 'without' token contrast in turn: median 'seconds', every 'loss' (its part 'lm'), the 'MiB'.

    Each row is one document, so that there are as many pairs of tokens as there can be.
    """
    size, vocabulary = sizes(folder)
    ids = np.random.default_rng(0).integers(3, vocabulary, (size['rows_a_step'], size['context'])).tolist()
    recipes = {way: reading(folder, token_weight=float(way == 'with')) for way in ways}
    makers = {way: batch_maker(pack(ids, size['context']), recipe) for way, recipe in recipes.items()}
    losses, turns, marks = {way: contrast_loss(recipe) for way, recipe in recipes.items()}, [], []
    for number in range(WARM + rounds): turns += ways[::1 if number % 2 else -1]
    def batch_at(step: int) -> dict[str, torch.Tensor]:
        marks.append(time.perf_counter())
        return makers[turns[step]](0)
    def loss(model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        return losses['with' if 'token_pairs' in batch else 'without'](model, batch)
    model = open_model(folder, 'student').model
    with Peak() as peak: history = fit(model, batch_at, loss, len(turns), learning_rate=0.0, precision='no', description='token contrast')
    marks.append(time.perf_counter())
    def each(values: list[float]) -> dict: return {way: [value for turn, value in zip(turns, values) if turn == way] for way in ways}
    return summary(each(np.diff(marks).tolist()), loss=each([row['lm'] for row in history]), MiB=peak.MiB,
                   token=[row['token'] for row in history if 'token' in row])


# --- pairs of texts

def pairs(folder: Path, number: int, chunk: int | None = None, length: int = 64) -> dict:
    "The 'loss', 'seconds' and 'MiB' of InfoNCE of `number` titles and texts, which are tokens already, with all gradients."
    student = open_model(folder, 'student')
    model, batch = student.model.train(), pair_batch(student.tokenizer, papers(number, sizes(folder)[0]['text']), length)
    start = time.perf_counter()
    with Peak() as peak:
        loss = pair_loss(model, batch, chunk=chunk)
        loss.backward()
    return dict(loss=loss.item(), seconds=time.perf_counter() - start, MiB=peak.MiB)


# --- every part of the loss

def parts(folder: Path, names: list[str] | None = None, rounds: int = 5) -> dict:
    "Steps of one training that read 'alone', with one part of stage 1's loss each, or 'chains', in turn: 'seconds' a learnt token."
    size, _ = sizes(folder)
    student, before, ids = open_model(folder, 'student'), open_model(folder, 'student').model, documents(folder)
    recipes = {way: reading(folder, **PARTS.get(way, {})) for way in names or [*PARTS, 'chains']}
    starts = chain_starts(np.ones(len(ids), bool), [*map(len, ids)], 5, size['context'])
    joined = [[token for number in range(*both) for token in ids[number]] for both in pairwise(starts)]
    rows = {way: pack(joined if way == 'chains' else ids, size['context'], share=USEFUL) for way in recipes}
    texts = papers(64, size['text'])
    makers = {way: part_maker(rows[way], recipe, student.tokenizer, texts) for way, recipe in recipes.items()}
    losses = {way: contrast_loss(recipe, before) for way, recipe in recipes.items()}
    turns = [way for number in range(WARM + rounds) for way in [*recipes][::1 if number % 2 else -1]]
    marks, counts = [], []
    def batch_at(step: int) -> dict[str, torch.Tensor]:
        marks.append(time.perf_counter())
        batch = makers[turns[step]](step//len(recipes))
        counts.append(float(batch['count']))
        return batch | dict(way=torch.tensor(float([*recipes].index(turns[step]))))
    def loss(model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]: return losses[[*recipes][int(batch['way'])]](model, batch)
    history = fit(student.model, batch_at, loss, len(turns), learning_rate=0.0, precision='no', description='parts')
    took = np.diff([*marks, time.perf_counter()])/counts
    def each(values) -> dict: return {way: [float(value) for turn, value in zip(turns, values) if turn == way] for way in recipes}
    return summary(each(took), lm=each([row['lm'] for row in history]), papers=len(ids)/(len(starts) - 1),
                   parts={way: sorted(row.keys() & {*PARTS}) for way, row in zip(turns, history)})


# --- writing

def writing(folder: Path, rounds: int = 5, name: str = 'student') -> dict:
    "Greedy and contrastive search in turn, from the same prompts and of the same length: median 'seconds', and the 'shape' of the ids."
    (size, vocabulary), model = sizes(folder), open_model(folder, name).model
    ids = torch.randint(3, vocabulary, (size['prompts'], size['prompt']), generator=torch.Generator().manual_seed(0))
    given, new = (model, ids, torch.ones_like(ids)), size['answer']
    ways = dict(greedy=lambda: sample(*given, new, temperature=0.0),
                contrastive=lambda: contrastive_search(*given, k=4, alpha=0.6, max_new_tokens=new))
    seconds, shapes = {way: [] for way in ways}, {}
    for number in range(WARM + rounds):
        for way in list(ways)[::1 if number % 2 else -1]:
            start = time.perf_counter()
            shapes[way] = list(ways[way]().shape)
            seconds[way].append(time.perf_counter() - start)
    return summary(seconds, shape=shapes)


_CALLS = dict(prepare=prepare, contest=contest, token=token, parts=parts, pairs=pairs, writing=writing)
if __name__ == '__main__': main(_CALLS, *sys.argv[1:])
