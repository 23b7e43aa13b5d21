"""A world of a few words for tests: sentences, conversations, and a model whose tokenizer was changed."""
import copy
from dataclasses import replace

import numpy as np

from scilm_adapt.models import LanguageModel

WORDS = 'heat light salt iron wave cold warm slow metal field flow air'.split()


def sentence(seed: int, words: int) -> str:
    chosen = np.random.default_rng(seed).choice(WORDS, words)
    return ' '.join(chosen).capitalize() + '.'


def conversation(number: int) -> dict:
    answer = sentence(number + 1000, 3 + number % 5)
    messages = [dict(role='user', content=sentence(number, 4 + number % 3)), dict(role='assistant', content=answer)]
    return dict(paper_id=str(number), kind='explanation', messages=messages, reference=answer, author='paper')


def changed(lm: LanguageModel, **changes) -> LanguageModel:
    lm = replace(lm, tokenizer=copy.deepcopy(lm.tokenizer))
    for name, value in changes.items(): setattr(lm.tokenizer, name, value)
    return lm
