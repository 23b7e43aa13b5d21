"""Every part of stage 1's loss, on random text: what reading.py times on a processor, and gpu.py on a GPU."""
import random
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from scilm_adapt.contrast import Recipe, batch_maker
from scilm_adapt.mistakes import ditto_batch
from scilm_adapt.pairs import Together, pair_maker
from scilm_adapt.preference import Pair
from scilm_adapt.tokens import Packed, encode_document, pad

# What is added to reading, each with its defaults but the weight, on whose size no time depends.
PARTS = dict(alone={}, token=dict(token_weight=1.0), pairs=dict(pairs_weight=0.1), preference=dict(preference_weight=0.1),
             next_token=dict(next_token_weight=0.1), mistakes=dict(mistakes_weight=0.5), ditto=dict(ditto_weight=0.5),
             anchor=dict(anchor_weight=0.1))


def papers(number: int, words: int) -> list[dict]:
    "So many papers of random words, with a title of ten and a text of one sentence of `words`."
    draw = random.Random(0)
    def text(size: int) -> str: return ' '.join(''.join(draw.choices('etaoinshrdlu', k=draw.randint(2, 9))) for _ in range(size))
    return [dict(id=str(n), title=text(10), text=text(words)) for n in range(number)]


def preferred(number: int, length: int, vocabulary: int) -> list[Pair]:
    "So many random continuations of random prompts, each beside another one, all of `length` tokens."
    draw = np.random.default_rng(1)
    def ids() -> list[int]: return draw.integers(3, vocabulary, length).tolist()  # 0 to 2 are control tokens
    return [Pair(str(n), 'random', ids(), ids(), ids()) for n in range(number)]


def unlike(tokenizer: object, texts: list[dict], length: int) -> dict[str, Together]:
    "`pairs.pair_batch` of papers of which no two are alike; to see whether they are would take a library that few GPU machines have."
    def ids(field: str) -> list[list[int]]: return [encode_document(tokenizer, paper[field])[:length] for paper in texts]
    sides = dict(a=pad(ids('title'), tokenizer.pad_token_id), b=pad(ids('text'), tokenizer.pad_token_id))
    rows = {f'{side}_{name}': value for side, padded in sides.items() for name, value in padded.items()}
    return dict(pairs=Together(rows, dict(same=torch.eye(len(texts), dtype=torch.bool))))


def part_maker(rows: Packed, recipe: Recipe, tokenizer: object, texts: list[dict],
               compared: bool = True) -> Callable[[int], dict[str, torch.Tensor]]:
    "`batch_at(step)` with all that the recipe's parts ask for; `compared`: pairs of papers are looked at for likeness, as in a run."
    pairs_at = None
    if recipe.pairs_weight:
        alone = unlike(tokenizer, texts[:recipe.pairs.batch], recipe.pairs.length)
        pairs_at = pair_maker(tokenizer, texts, recipe.pairs, 0) if compared else lambda step: alone
    lessons_at = partial(ditto_batch, tokenizer, texts, recipe.ditto, seed=0) if recipe.ditto_weight else None
    asked = preferred(32, max(4, recipe.context//8), len(tokenizer)) if recipe.preference_weight else ()
    return batch_maker(rows, recipe, pairs_at, asked, lessons_at=lessons_at)
