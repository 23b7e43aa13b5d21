"""How time and memory grow, for benchmark.ipynb: each call is a process of its own and ends with one line of JSON.

    python growth.py papers folder '{"number": 1000}'
    python growth.py step folder '{"context": 512, "vocabulary": 8192, "shape": [192, 4, 4]}'

Papers are synthetic: words are drawn as words are drawn in any language (the n-th has a chance in proportion to 1/n), five in a hundred
are copies of earlier ones, five are copies with a word changed, two are too short and one has no text. Steps are those of stage 1, of a
model with random weights, on random tokens. Time is the processor's, of the process and all its workers, so that other work on the
machine changes it less than it changes the clock's; memory is the largest proportional set size (PSS) of them together, looked at twenty
times a second.
"""
import gzip
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import psutil

_COMMON = 'the of and to in is that for we with as by on are this from be which an it can at has not these or was have a'.split()


# --- what a call needs

def _memory() -> np.ndarray:
    "Bytes of this process and those that it started: all (PSS), and what is their own, without pages of files that are mapped."
    found, me = np.zeros(2), psutil.Process()
    for one in [me, *me.children(recursive=True)]:
        try: lines = Path(f'/proc/{one.pid}/smaps_rollup').read_text().splitlines()[1:]
        except OSError: continue
        sizes = {name: int(rest.split()[0])*1024 for name, _, rest in (line.partition(':') for line in lines)}
        found += sizes['Pss'], sizes['Pss_Anon']
    return found


def measured(work: Callable[[], object]) -> dict:
    """What `work` takes: the 'seconds' of the processor, the 'wall' seconds, and the 'MiB' at the peak, over what there was before.

    'own' are those MiB that are no pages of files, which the system takes back where it needs them.
    """
    done, before, most = threading.Event(), _memory(), np.zeros(2)
    def watch() -> None:
        while not done.wait(0.05): most[:] = np.maximum(most, _memory())
    watcher = threading.Thread(target=watch)
    watcher.start()
    start, used = time.perf_counter(), time.process_time()
    ended = psutil.Process().cpu_times()
    try: work()
    finally:
        done.set()
        watcher.join()
    after = psutil.Process().cpu_times()
    children = after.children_user + after.children_system - ended.children_user - ended.children_system
    MiB, own = (np.maximum(most - before, 4096)/2**20).tolist()
    return dict(seconds=time.process_time() - used + children, wall=time.perf_counter() - start, MiB=MiB, own=own)


# --- documents

def records(number: int, words: int = 100, seed: int = 0) -> Iterator[dict]:
    "So many synthetic records {'id', 'title', 'abstract'}, with about so many `words` each, and at least 40."
    draw = np.random.default_rng(seed)
    parts = [a + b for a in 'b d f g l m n p r s t v k st tr pl ch'.split() for b in 'a e i o u er in on al'.split()]
    names = np.array([*_COMMON, *(parts[n % 151] + parts[n//151 % 149]*(n % 3 > 0) + parts[n % 139] for n in range(30_000))])
    chances, earlier = np.cumsum(1/np.arange(1, len(names) + 1)), []
    for first in range(0, number, 1000):
        kinds, sizes = draw.random(1000), np.clip(draw.normal(words, 0.3*words, 1000), 40, 2*words).astype(int)
        drawn = names[np.searchsorted(chances, draw.random(sizes.sum() + 10_000)*chances[-1])].tolist()
        at = 0
        for number_here, kind, size in zip(range(first, min(first + 1000, number)), kinds.tolist(), sizes.tolist()):
            title, text = drawn[at:at + 10], drawn[at + 10:at + 10 + size]
            at += 10 + size
            if kind < 0.1 and earlier:
                title, text = earlier[int(kind*1e6) % len(earlier)]
                if kind < 0.05: text = [*text[:20], 'instead', *text[21:]]
            elif kind < 0.12: text = 'Too short.'.split()
            elif kind < 0.13: text = []
            elif len(earlier) < 5000: earlier.append((title, text))
            sentences = (' '.join(text[n:n + 18]).capitalize() + '.' for n in range(0, len(text), 18))
            yield dict(id=f's{number_here}', title=' '.join(title).capitalize(), abstract=' '.join(sentences) or None)


def papers(folder: Path, number: int, words: int = 100, workers: int = 2) -> dict:
    """What it takes to read, clean, compare and split so many records ('corpus'), and to tokenise what is kept ('tokens').

    Beside them: 'file', the MiB of the records as they are read, unpacked; 'kept', and the 'tokens' written.
    """
    from scilm_adapt.files import read_json
    from scilm_adapt.papers import build, document, open_papers
    source, place, size = folder/f'{number}.jsonl.gz', folder/f'{number}', 0
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(source, 'wt', compresslevel=1) as file:
        for record in records(number, words):
            line = json.dumps(record) + '\n'
            size += file.write(line)
    corpus = measured(lambda: build(place/'corpus', [source], workers=workers))
    from scilm_adapt.tokens import encode_documents, train_tokenizer, write_tokens  # not before: workers would copy pages of torch's
    tokenizer = train_tokenizer((document(record) for record in islice(open_papers(place/'corpus')['train'], 1000)), 4000)
    def tokenise() -> None:
        texts = (document(record) for record in open_papers(place/'corpus')['train'])
        write_tokens(place/'tokens', encode_documents(tokenizer, texts), len(tokenizer))
    tokens = measured(tokenise)
    kept, written = read_json(place/'corpus'/'report.json')['total']['kept'], read_json(place/'tokens'/'tokens.json')['tokens']
    source.unlink()
    shutil.rmtree(place)
    return dict(number=number, corpus=corpus, tokens=tokens, file=size/2**20, kept=kept, written=written)


# --- steps

def step(folder: Path, context: int = 512, vocabulary: int = 8192, shape: tuple[int, int, int] = (192, 4, 4), steps: int = 3) -> dict:
    """What a step of stage 1 takes, of one row: 'seconds' of the processor, the fewest of `steps` without the first, and 'MiB' in all.

    `shape` is (width, layers, heads) of the model, whose number of 'weights' is told; weights, gradients and optimiser are in the memory.
    """
    from common import Peak
    from transformers import LlamaConfig, LlamaForCausalLM

    from scilm_adapt.contrast import Recipe, batch_maker, contrast_loss
    from scilm_adapt.models import parameter_count
    from scilm_adapt.tokens import pack
    from scilm_adapt.training import fit
    hidden, layers, heads = shape
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=8*hidden//3, num_hidden_layers=layers,
                         num_attention_heads=heads, max_position_embeddings=context, tie_word_embeddings=True)
    recipe = Recipe(steps=steps, batch_size=1, context=context, learning_rate=0.0, pairs_weight=0.0, token_weight=0.0)
    batches = batch_maker(pack(np.random.default_rng(0).integers(3, vocabulary, (2, context)).tolist(), context), recipe)
    marks = []
    def batch_at(number: int) -> dict:
        marks.append(time.process_time())
        return batches(number)
    with Peak() as peak:
        model = LlamaForCausalLM(config)
        fit(model, batch_at, contrast_loss(recipe), steps, learning_rate=0.0, precision='no', description='step')
    took = np.diff([*marks, time.process_time()])
    seconds = float(took[min(1, steps - 1):].min())
    return dict(context=context, vocabulary=vocabulary, weights=parameter_count(model), seconds=seconds, MiB=peak.MiB)


_CALLS = dict(papers=papers, step=step)
if __name__ == '__main__': print(json.dumps(_CALLS[sys.argv[1]](Path(sys.argv[2]), **json.loads(sys.argv[3]))))
