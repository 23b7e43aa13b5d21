"""Stage 1: the sum of its losses, and a stage that leaves its student alone."""
import copy
import math
import weakref
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import descent, of_family, reader

from scilm_adapt import contrast, recipe
from scilm_adapt.checkpoints import Checkpoints
from scilm_adapt.contrast import (
    Recipe,
    _records_at,
    _weighted_sum,
    anchor_loss,
    batch_maker,
    chained,
    chosen,
    contrast_loss,
    mixed_rows,
    train,
)
from scilm_adapt.divergence import dense_loss
from scilm_adapt.errors import InputError
from scilm_adapt.files import read_json, write_text
from scilm_adapt.mistakes import Ditto, Mistakes, ditto_batch
from scilm_adapt.models import hidden_states, logits_of, weights_hash
from scilm_adapt.next_token import NextToken
from scilm_adapt.pairs import Pairs, embed, pair_maker, retrieval, views
from scilm_adapt.papers import Corpus, document
from scilm_adapt.preference import Pair, Preference
from scilm_adapt.runs import Run
from scilm_adapt.tokens import batch_rows, document_ends, documents_in, encode, encode_document, pack, read_tokens
from scilm_adapt.training import document_nats, fit, lm_loss, target_states

SUBJECTS = ('heat', 'light', 'sound', 'gravity', 'friction', 'pressure', 'salt', 'iron', 'water', 'glass', 'copper', 'helium')
PAPERS = [dict(id=name, title=f'On {name}', text=f'We study {name} in {number} experiments. The {name} was measured.')
          for number, name in enumerate(SUBJECTS)]
SETTINGS = dict(steps=3, batch_size=2, context=48, learning_rate=1e-3, pairs_weight=0.1, pairs=Pairs(batch=4), chain=1)
CONTRASTS = dict(next_token=dict(next_token_weight=0.3), shuffled=dict(next_token_weight=0.3, next_token=NextToken(shuffled=True)),
                 mistakes=dict(mistakes_weight=0.5), unlikelihood=dict(mistakes_weight=0.5, mistakes=Mistakes('unlikelihood', 48, 0)),
                 ditto=dict(ditto_weight=0.5, ditto=Ditto(2, 32)))
TOGETHER = [dict(id=one, title=f'On {one} and {other}', text=f'We study {one} with {other} in {number} experiments.')
            for number, (one, other) in enumerate(zip(SUBJECTS, SUBJECTS[1:] + SUBJECTS[:1]))]  # a ring of neighbours
GENERAL = [dict(id=f'{name} by the sea', title=f'The {name}', text=f'A {name} лежал у моря, and nobody asked what the {name} was.')
           for name in ('lamp', 'дом', 'boat', 'letter', 'garden')]
PREFERRED = [Pair(str(n), 'paper', [1, 5, 6 + n], [7, 8, 9 + n, 10], [8, 7, 20 + n, 4]) for n in range(6)]


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    write_text(tmp_path/'corpus'/'science.jsonl', 'its content stands for the stage that made it')
    return Corpus(dict(train=PAPERS, valid=PAPERS[:1], test=PAPERS[1:2]), dict(train=[], valid=[], test=[]), tmp_path/'corpus')


@pytest.fixture
def mixed(corpus) -> Corpus:
    return replace(corpus, general=dict(train=GENERAL, valid=[], test=[]))


@pytest.fixture(scope='module')
def student():
    return reader(PAPERS)


@pytest.fixture
def linked(mixed) -> Corpus:
    return replace(mixed, science=mixed.science | dict(train=TOGETHER))


def packed_papers(student, length: int = 32, papers: list[dict] = PAPERS):
    return pack([encode_document(student.tokenizer, document(paper)) for paper in papers], length)


def history_of(folder) -> list[dict]: return read_json(folder/'models'/'contrast'/'history.json')


def flat(batch: dict) -> dict[str, torch.Tensor]:
    "All tensors of a batch."
    return {name: value for name, value in batch.items() if name != 'pairs'} | (batch['pairs'].rows if 'pairs' in batch else {})


def test_a_batch_is_a_function_of_seed_and_step(student):
    def make(seed):
        recipe = Recipe(**SETTINGS | dict(token_weight=1.0, seed=seed, preference=Preference(batch=3)))
        pairs_at = pair_maker(student.tokenizer, PAPERS, Pairs(batch=5), seed)
        return batch_maker(packed_papers(student), recipe, pairs_at, PREFERRED)
    def same(x, y): return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    first = make(1)
    for step in (4, 0, 2): first(step)
    assert same(flat(first(3)), flat(make(1)(3)))
    assert not same(flat(first(3)), flat(first(4))) and not same(flat(first(3)), flat(make(2)(3)))
    bare = batch_maker(packed_papers(student), Recipe(**SETTINGS | dict(token_weight=0.0)))(0)
    assert bare.keys() == packed_papers(student).batch([0]).keys()


def test_weighted_sum_reports_parts_and_skips_weight_zero(student):
    seen = []
    def of_logits(predicted, batch): return seen.append(predicted) or torch.tensor(3.0)
    def of_states(model, batch, hidden): return seen.append(hidden) or torch.tensor(5.0)
    def never(*_): pytest.fail('computed')
    def weights_at(step): return dict(a=2.0, again=0.5**(step + 1), b=0.0, c=1.0, d=0.0)
    loss = _weighted_sum(dict(a=of_logits, again=of_logits, b=never), dict(c=of_states, d=never), weights_at)
    batch = packed_papers(student).batch([0])
    assert loss(student.model, batch) == dict(loss=12.5, a=3.0, again=3.0, c=5.0)
    assert seen[0] is seen[1] and torch.equal(seen[0][0], logits_of(student.model, target_states(seen[2], batch)[0]))  # computed once
    assert loss(student.model, batch | dict(step=torch.tensor(1))) == dict(loss=11.75, a=3.0, again=3.0, c=5.0)


def test_logits_are_gone_when_parts_of_the_states_are_computed(student):
    logits = []
    def keep(predicted, batch): return logits.append(weakref.ref(predicted[0])) or predicted[0].sum()*0
    def look(model, batch, hidden): return hidden.sum()*0 + (logits[0]() is not None)
    loss = _weighted_sum(dict(a=keep), dict(b=look), lambda step: dict(a=1.0, b=1.0))
    assert loss(student.model, packed_papers(student).batch([0]))['b'] == 0


@pytest.mark.parametrize('micro_batch', [16, 4, 1])
def test_all_parts_together_do_not_depend_on_the_micro_batch(student, micro_batch):
    recipe = Recipe(**SETTINGS | dict(steps=1, batch_size=16, token_weight=0.7, pairs_weight=0.3, preference_weight=0.2, margin=0.9,
                                      pairs=Pairs(batch=6, chunk=4), preference=Preference(batch=3), replay_share=0.3, anchor_weight=0.4,
                                      mistakes_weight=0.6, ditto_weight=0.5, ditto=Ditto(3, 30)))
    batch_at = batch_maker(packed_papers(student), recipe, pair_maker(student.tokenizer, PAPERS, recipe.pairs, 0), PREFERRED,
                           packed_papers(student, papers=GENERAL), partial(ditto_batch, student.tokenizer, PAPERS, recipe.ditto, seed=0))
    before = reader(PAPERS, seed=1).model.double()
    found = []
    for rows in (16, micro_batch):
        model, gradients = copy.deepcopy(student.model).double(), {}
        def keep(step, model, gradients=gradients): gradients.update({n: p.detach().clone() for n, p in model.named_parameters()})
        history = fit(model, batch_at, contrast_loss(recipe, before), 1, learning_rate=1.0, micro_batch=rows, optimizers=descent, clip=1e9,
                      precision='no', on_step_end=keep)
        found.append((history[0], gradients))
    (one, weights), (other, others) = found
    for name in one.keys() & {'loss', 'lm', 'token', 'pairs', 'preference', 'mistakes', 'ditto', 'anchor'}:
        assert other[name] == pytest.approx(one[name], rel=1e-10)
    assert max((weights[name] - others[name]).abs().max().item() for name in weights) < 1e-10


# --- keeping what was there

@pytest.mark.parametrize('share', [0.0, 0.05, 0.1, 1/3, 0.29, 0.5, 0.97])
@pytest.mark.parametrize('batch_size', [1, 8, 100])
def test_a_share_of_replay_is_met_over_the_steps_and_no_row_is_left_out(share, batch_size):
    sizes, recipe = (7, 5), Recipe(replay_share=share, batch_size=batch_size, seed=3)
    read = [mixed_rows(sizes, recipe, step) for step in range(60)]
    assert all(len(papers) + len(general) == batch_size for papers, general in read)
    for step in range(61):
        replayed = sum(len(general) for _, general in read[:step])
        assert abs(replayed - share*batch_size*step) <= 0.5 + 1e-9
    for size, rows in zip(sizes, zip(*read)):  # each kind goes through whole epochs, in orders that differ
        seen = [number for step in rows for number in step]
        epochs = [seen[at:at + size] for at in range(0, len(seen) - size + 1, size)]
        assert all(sorted(epoch) == [*range(size)] for epoch in epochs)
        assert len(epochs) < 10 or len({*map(tuple, epochs)}) > 5
    assert read[17] == mixed_rows(sizes, recipe, 17) != mixed_rows(sizes, replace(recipe, seed=4), 17) or batch_size == 1


def test_without_replay_the_rows_are_what_they_were(student):
    packed, recipe = packed_papers(student), Recipe(**SETTINGS | dict(token_weight=0.0, seed=2))
    for step in range(9):
        rows = batch_rows(len(packed), 2, step, 2)
        assert mixed_rows([len(packed)], recipe, step) == [rows]
        batch, wanted = batch_maker(packed, recipe)(step), packed.batch(rows)
        assert batch.keys() == wanted.keys() and all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_the_reading_loss_is_the_mean_over_all_tokens_of_both_kinds(student):
    sources = [packed_papers(student), packed_papers(student, papers=GENERAL)]
    recipe, general = Recipe(batch_size=4, replay_share=0.3, token_weight=0.0), 0
    batch_at = batch_maker(sources[0], recipe, general=sources[1])
    for step in range(3):
        nats, tokens, named, rows = 0.0, 0, [], mixed_rows([*map(len, sources)], recipe, step)
        for packed, records, numbers in zip(sources, (PAPERS, GENERAL), rows):
            for number in numbers:
                one = packed.batch([number])
                nats, tokens = nats + lm_loss(student.model, one).item()*int(one['count']), tokens + int(one['count'])
            named += [records[number]['id'] for number in sorted({*documents_in(packed, numbers)})]
        batch, general = batch_at(step), general + len(rows[1])
        assert int(batch['count']) == tokens and lm_loss(student.model, batch).item() == pytest.approx(nats/tokens, rel=1e-5)
        assert _records_at(sources, [PAPERS, GENERAL], recipe, step) == named
    assert general == 4  # 0.3 of 12 rows


def test_replay_reads_general_text_and_keeps_its_tokens_apart(tmp_path, mixed, student):
    settings = SETTINGS | dict(steps=40, pairs_weight=0.0, learning_rate=5e-3)
    ids = [encode_document(student.tokenizer, document(one)) for one in GENERAL]
    plain, replayed = (train(Run(tmp_path/str(share)), student, mixed, **settings, replay_share=share) for share in (0.0, 0.5))
    assert document_nats(replayed, ids).sum() < 0.8*document_nats(plain, ids).sum()
    assert (tmp_path/'0.5'/'general-tokens').is_dir() and not (tmp_path/'0.0'/'general-tokens').exists()


@given(some.lists(some.tuples(some.integers(-3, 3), some.integers(1, 9)), min_size=1, max_size=9), some.integers(1, 60))
def test_chosen_are_the_highest_differences_whose_sizes_reach_the_room(texts, room):
    difference, sizes = map(np.array, zip(*texts))
    kept, total = [], 0
    for number in sorted(range(len(texts)), key=lambda n: (-difference[n], n)):
        if total >= room: break
        kept, total = [*kept, number], total + sizes[number]
    assert chosen(difference, sizes, room).tolist() == sorted(kept)


@pytest.mark.parametrize('dial, kind, name', [('replay_choice', 'forgotten', 'general-tokens'), ('paper_choice', 'learnt', 'tokens')])
def test_texts_are_chosen_by_the_difference_of_student_and_scout(tmp_path, mixed, student, monkeypatch, dial, kind, name):
    monkeypatch.setattr(contrast, '_TRIED', 99)  # all of these few
    settings = SETTINGS | dict(steps=2, batch_size=2, context=24, pairs_weight=0.0, learning_rate=5e-3, replay_share=0.4)
    weights = weights_hash(student.model)
    picked = train(Run(tmp_path/'run'), student, mixed, **settings, **{dial: kind})
    scout, at_random = (train(Run(tmp_path/str(share)), student, mixed, **settings | dict(replay_share=share)) for share in (0.0, 0.4))
    again = AutoModelForCausalLM.from_pretrained(tmp_path/'run'/'models'/'scout')
    assert weights_hash(again) == weights_hash(scout.model), 'the scout is a stage 1 that reads alone'
    assert weights_hash(picked.model) != weights_hash(at_random.model) and weights_hash(student.model) == weights
    numbers, records = np.load(tmp_path/'run'/f'chosen-{name}'/'numbers.npy'), GENERAL if kind == 'forgotten' else PAPERS
    ids = [encode_document(student.tokenizer, document(record)) for record in records]
    before, after = (document_nats(lm, ids, context=24)/[len(one) - 1 for one in ids] for lm in (student, scout))
    gone = (after - before)*(1 if kind == 'forgotten' else -1)
    assert 0 < len(numbers) < len(records) and np.array_equal(np.sort(np.argsort(-gone)[:len(numbers)]), numbers)


def test_replay_names_the_general_texts_of_a_bad_step(tmp_path, mixed, student, monkeypatch):
    real = contrast.contrast_loss
    def spoilt(*arguments):
        loss = real(*arguments)
        return lambda model, batch: {name: value*math.nan for name, value in loss(model, batch).items()}
    monkeypatch.setattr(contrast, 'contrast_loss', spoilt)
    with pytest.raises(FloatingPointError, match='its records: .*by the sea'):
        train(Run(tmp_path/'run'), student, mixed, **SETTINGS | dict(pairs_weight=0.0, batch_size=4), replay_share=0.5)


@pytest.mark.parametrize('family', ['llama', 'gemma2', 'opt', 'cohere'])  # plain, with a soft cap, with leaking rows, with scaled logits
@pytest.mark.parametrize('at_once', [2**23, 1000])
def test_the_anchor_is_the_forward_kl_of_stage_2(student, monkeypatch, family, at_once):
    "Against the divergence from all logits at once: value, and gradient with respect to every weight."
    monkeypatch.setattr(contrast, '_AT_ONCE', at_once)
    before = of_family(family, student.tokenizer).model.requires_grad_(True)
    batch = packed_papers(student).batch([0, 2, 3])
    models = [copy.deepcopy(before) for _ in range(2)]
    for model in models:
        chance = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters(): weight += 0.02*torch.randn(weight.shape, generator=chance, dtype=weight.dtype)
    found = anchor_loss(models[0], before, batch, hidden_states(models[0], batch))
    logits = [logits_of(model, target_states(hidden_states(model, batch), batch)[0]) for model in (models[1], before)]
    wanted = dense_loss(*logits, torch.ones(len(logits[0]), dtype=torch.bool), 'forward_kl', count=batch['count'])
    assert found.item() == pytest.approx(wanted.item(), rel=1e-9) and wanted > 1e-3
    found.backward()
    wanted.backward()
    for one, other in zip(*(model.parameters() for model in models)):
        if other.grad is None: assert one.grad is None
        else: torch.testing.assert_close(one.grad, other.grad, rtol=1e-7, atol=1e-10)
    assert not any(weight.grad is not None for weight in before.parameters())  # it is only asked


def test_the_anchor_holds_no_table_of_tokens_and_words(student, monkeypatch):
    batch, before, kept = packed_papers(student).batch([0, 1, 2]), reader(PAPERS, seed=1).model, []
    monkeypatch.setattr(contrast, '_AT_ONCE', 5*len(student.tokenizer))
    hidden, head = hidden_states(student.model, batch), student.model.get_output_embeddings().weight
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        anchor_loss(student.model, before, batch, hidden)
    assert 0 < max(kept) <= max(hidden.numel(), head.numel()) < batch['count']*len(student.tokenizer)


@pytest.mark.parametrize('way', [
    {}, dict(lora_rank=2), dict(gradient_checkpointing=True), dict(replay_share=0.5, micro_batch=1), dict(token_weight=0.5)],
    ids=lambda way: ' '.join(way) or 'plain')
def test_the_anchor_weakens_step_by_step_and_leaves_the_student_alone(tmp_path, mixed, student, way):
    before = weights_hash(student.model)
    settings = SETTINGS | dict(steps=4, pairs_weight=0.0, learning_rate=5e-3, anchor_weight=2.0, anchor_decay=0.5) | way
    train(Run(tmp_path/'run'), student, mixed, **settings)
    history = history_of(tmp_path/'run')
    assert history[0]['anchor'] == pytest.approx(0, abs=1e-6) and all(row['anchor'] > 1e-7 for row in history[1:])
    for row in history:
        rest = row['lm'] + settings.get('token_weight', 0.0)*row.get('token', 0.0)
        assert row['loss'] == pytest.approx(rest + 2.0*0.5**row['step']*row['anchor'], rel=1e-5)
    assert weights_hash(student.model) == before and not student.model.training
    assert all(weight.grad is None for weight in student.model.parameters())


def test_an_anchor_keeps_the_model_near_also_when_that_is_in_16_bits(tmp_path, corpus, student):
    short = replace(student, model=copy.deepcopy(student.model).bfloat16())
    for name, lm in dict(exact=student, short=short).items():
        last = {}
        for weight in (0.0, 20.0):
            settings = SETTINGS | dict(steps=12, pairs_weight=0.0, learning_rate=5e-3, anchor_weight=weight)
            found = train(Run(tmp_path/f'{name}-{weight}'), lm, corpus, **settings)
            batch = packed_papers(student).batch([0, 1])
            last[weight] = anchor_loss(found.model, student.model, batch, hidden_states(found.model, batch)).item()
        assert 0 < last[20.0] < 0.3*last[0.0]
        assert history_of(tmp_path/f'{name}-20.0')[0]['anchor'] < 1e-3  # what 16 bits round


class Killed(BaseException):
    "Raised in place of a kill -9."


def test_with_all_of_it_a_stopped_training_comes_to_the_same_weights(tmp_path, mixed, student, monkeypatch):
    settings = SETTINGS | dict(steps=7, replay_share=0.3, anchor_weight=1.0, anchor_decay=0.9, **CONTRASTS['shuffled'],
                               **CONTRASTS['mistakes'], **CONTRASTS['ditto'])
    whole = weights_hash(train(Run(tmp_path/'whole'), student, mixed, **settings).model)
    monkeypatch.setattr(recipe, 'Checkpoints', partial(Checkpoints, steps=2))
    real, at, steps = contrast.batch_maker, [3, 6], []
    def dying(*arguments, **named):
        batch_at = real(*arguments, **named)
        def of(step):
            steps.append(step)
            if at and step == at[0]: raise Killed(at.pop(0))
            return batch_at(step)
        return of
    monkeypatch.setattr(contrast, 'batch_maker', dying)
    for _ in range(2):
        with pytest.raises(Killed): train(Run(tmp_path/'stopped'), student, mixed, **settings)
    stopped = train(Run(tmp_path/'stopped'), student, mixed, **settings)
    assert weights_hash(stopped.model) == whole and steps == [0, 1, 2, 3, 2, 3, 4, 5, 6, 6]
    assert [row['step'] for row in history_of(tmp_path/'stopped')] == [*range(7)]


# --- the stage

def test_train_keeps_a_model_that_others_can_open(tmp_path, corpus, student):
    before, copied = weights_hash(student.model), copy.deepcopy(student.model.state_dict())
    lm = train(Run(tmp_path/'run'), student, corpus, **SETTINGS)
    assert lm.name == 'contrast' and student.name == 'tiny' and not student.model.training
    assert weights_hash(student.model) == before != weights_hash(lm.model)
    assert all(torch.equal(value, copied[name]) for name, value in student.model.state_dict().items())
    folder = tmp_path/'run'/'models'/'contrast'
    history = read_json(folder/'history.json')
    assert [row['step'] for row in history] == [0, 1, 2]
    for row in history: assert row['loss'] == pytest.approx(row['lm'] + 0.1*row['pairs'], rel=1e-5)
    opened = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert weights_hash(opened) == weights_hash(lm.model)
    assert AutoTokenizer.from_pretrained(folder).chat_template == student.tokenizer.chat_template


def test_a_stage_that_holds_is_opened_and_not_trained_again(tmp_path, corpus, student, monkeypatch):
    run = Run(tmp_path/'run')
    first, calls, fit = train(run, student, corpus, **SETTINGS), [], recipe.fit
    monkeypatch.setattr(recipe, 'fit', lambda *a, **k: calls.append(k) or fit(*a, **k))
    assert weights_hash(train(run, student, corpus, **SETTINGS).model) == weights_hash(first.model) and not calls
    other = reader(PAPERS, seed=1)
    hotter = Pairs(batch=4, temperature=0.1)
    for change in (dict(pairs_weight=0.2), dict(pairs=hotter), dict(seed=1), dict(token_weight=0.3), dict(anchor_weight=0.1),
                   dict(anchor_weight=0.1, anchor_decay=0.9), dict(student=other)):
        train(run, **(dict(student=student, corpus=corpus) | SETTINGS | change))
    assert len(calls) == 7
    train(run, other, corpus, **SETTINGS, trackers='tensorboard')  # who watches changes nothing
    assert len(calls) == 7
    write_text(corpus.folder/'science.jsonl', 'another corpus')
    train(run, other, corpus, **SETTINGS)
    assert len(calls) == 8


def test_the_same_stage_gives_the_same_weights(tmp_path, corpus, student):
    one, other = (train(Run(tmp_path/name), student, corpus, **SETTINGS) for name in ('one', 'other'))
    assert weights_hash(one.model) == weights_hash(other.model)


def test_without_weight_it_is_language_modelling_and_needs_no_titles(tmp_path, corpus, student, monkeypatch):
    for part in ('pair_maker', 'token_contrast', 'preference_part', 'anchor_loss', 'next_token_batch', 'next_token_part', 'mistakes_loss',
                 'ditto_batch', 'ditto_loss'):
        monkeypatch.setattr(contrast, part, lambda *a, **k: pytest.fail('made'))
    monkeypatch.setattr(contrast.preferences, 'prepare', lambda *a: pytest.fail('preferences were made'))
    untitled = replace(corpus, science=corpus.science | dict(train=[paper | dict(title='', text=document(paper)) for paper in PAPERS]))
    train(Run(tmp_path/'run'), student, untitled, **SETTINGS | dict(pairs_weight=0.0))
    row = read_json(tmp_path/'run'/'models'/'contrast'/'history.json')[0]
    batch = batch_maker(packed_papers(student, 48), Recipe(**SETTINGS | dict(token_weight=0)))(0)
    with torch.no_grad(): first = lm_loss(student.model, batch)
    assert not {'pairs', 'token', 'preference', 'next_token', 'mistakes', 'ditto', 'anchor'} & row.keys()
    assert row['loss'] == row['lm'] == pytest.approx(first.item(), rel=1e-2)


def two_chains(tokenizer: object) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    "A row with a chain of three papers and one of two, and the places of each paper in it."
    papers = [encode(tokenizer, document(paper))[:size] for paper, size in zip(PAPERS, (9, 7, 8, 10, 6))]
    one, other = chained(papers, np.array([0, 3, 5]), tokenizer)
    (start, end), between = document_ends(tokenizer), encode(tokenizer, '\n\n')
    assert one == [start, *papers[0], *between, *papers[1], *between, *papers[2], end]
    assert other == [start, *papers[3], *between, *papers[4], end]
    packed, places, at = pack([one, other], length=64), [], 1
    for number, paper in enumerate(papers):
        places.append([*range(at, at + len(paper))])
        at += len(paper) + (2 if number == 2 else len(between))
    batch = packed.batch([0])
    assert len(packed) == 1 and [batch['input_ids'][0, some].tolist() for some in places] == papers
    return batch, places


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'qwen3', 'mistral', 'mamba', 'bloom'])
def test_a_paper_sees_those_before_it_in_its_chain_and_nothing_of_another_chain(student, family):
    lm = of_family(family, student.tokenizer, **(dict(sliding_window=64) if family == 'mistral' else {}))
    batch, places = two_chains(lm.tokenizer)
    def logits(ids):
        with torch.no_grad(): return logits_of(lm.model, hidden_states(lm.model, batch | dict(input_ids=ids)))[0]
    before, chain = logits(batch['input_ids']), [0, 0, 0, 1, 1]
    for changed in range(5):
        ids = batch['input_ids'].clone()
        ids[0, places[changed][3]] = (ids[0, places[changed][3]] + 1) % len(lm.tokenizer)
        apart = (logits(ids) - before).abs().amax(-1)
        for other in range(5):
            seen = chain[other] == chain[changed] and other >= changed
            assert (apart[places[other]].max() > 1e-6) == seen, (changed, other)
            if not seen: assert apart[places[other]].max() < 1e-12


def test_a_chain_is_one_document_of_which_all_but_the_start_is_learnt(student):
    batch, places = two_chains(student.tokenizer)
    starts, real = (batch['position_ids'][0] == 0).nonzero()[:, 0].tolist(), int((batch['segments'] > 0).sum())
    assert starts[:2] == [0, places[2][-1] + 2] and int(batch['count']) == real - 2
    assert not batch['loss_mask'][0, starts[:2]].any()


@pytest.mark.parametrize(('most', 'context', 'share'), [(5, 200, 1), (2, 200, 1), (5, 80, 1), (3, 12, 1), (5, 200, 0.5)])
def test_chains_read_every_paper_once_and_fit_where_a_paper_does(tmp_path, linked, student, most, context, share):
    recipe, tokenizer = Recipe(chain=most, chain_order='related', context=context, chain_share=share), student.tokenizer
    packed, named = contrast._chained_rows(Run(tmp_path/'run'), recipe, tokenizer, linked, TOGETHER)
    read = [packed.tokens.ids[a:b].tolist() for a, b in pairwise(packed.tokens.starts)]
    sizes = np.diff(named.starts)
    assert sizes.max() <= most and (sizes.max() > 1) == (context > 30)
    assert (share == 1 or sizes.min() == 1) and sorted(named.order.tolist()) == [*range(12)]
    for number, (ids, (begin, end)) in enumerate(zip(read, pairwise(named.starts), strict=True)):
        papers = [TOGETHER[n] for n in named.order[begin:end]]
        assert tokenizer.decode(ids[1:-1]) == '\n\n'.join(map(document, papers)) and (len(ids) <= context or len(papers) == 1)
        assert named[number]['id'] == ', '.join(paper['id'] for paper in papers)
    learnt = packed.input_ids[packed.loss_mask]
    assert sorted(learnt.tolist()) == sorted(token for ids in read for token in ids[1:])


def test_without_chains_stage_1_reads_what_it_read(tmp_path, corpus, student, monkeypatch):
    "chain=1 asks for no index, and its rows are those of papers that stand alone."
    seen = []
    monkeypatch.setattr(contrast, 'reading_order', None)  # would fail
    monkeypatch.setattr(contrast, 'batch_maker', lambda packed, *more, **named: seen.append(packed) or batch_maker(packed, *more, **named))
    train(Run(tmp_path/'run'), student, corpus, **SETTINGS)
    plain = pack(read_tokens(tmp_path/'run'/'tokens'), SETTINGS['context'], share=contrast.USEFUL)
    for name, values in plain.whole.items(): assert np.array_equal(values, seen[0].whole[name])
    assert not (tmp_path/'run'/'related').exists() and not (tmp_path/'run'/'chained-tokens').exists()


@pytest.mark.parametrize('order', ['related', 'random'])
def test_stage_1_reads_chains_and_goes_on_where_it_stopped(tmp_path, linked, monkeypatch, order):
    settings = SETTINGS | dict(chain=3, chain_order=order, chain_share=1.0, replay_share=0.25, context=160, steps=4)
    student = reader(PAPERS, context=160)
    whole = train(Run(tmp_path/'whole'), student, linked, **settings)
    assert len(read_tokens(tmp_path/'whole'/'chained-tokens')) < len(PAPERS)/2
    made = {name for name in ('tokens', 'chained-tokens') if (tmp_path/'whole'/name/'manifest.json').is_file()}
    assert made == {'tokens', 'chained-tokens'}  # chains are laid out of the tokens that stage 2 reads, too
    assert (tmp_path/'whole'/'related').is_dir() == (order == 'related')
    stops = []
    def stopping(self, *arguments):
        save(self, *arguments)
        if not stops: stops.append(1); raise KeyboardInterrupt
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, 'due', lambda self, step: True)
    monkeypatch.setattr(Checkpoints, 'save', stopping)
    with pytest.raises(KeyboardInterrupt): train(Run(tmp_path/'parted'), student, linked, **settings)
    again = train(Run(tmp_path/'parted'), student, linked, **settings)
    assert stops and weights_hash(again.model) == weights_hash(whole.model) != weights_hash(student.model)


def test_the_papers_of_a_chain_are_named_in_an_error(tmp_path, linked, student, monkeypatch):
    monkeypatch.setattr(contrast, 'contrast_loss', lambda *_: lambda model, batch: dict(loss=hidden_states(model, batch).sum()*math.nan))
    settings = SETTINGS | dict(chain=3, chain_share=1.0, pairs_weight=0.0, context=160)
    with pytest.raises(FloatingPointError) as error: train(Run(tmp_path/'run'), reader(PAPERS, context=160), linked, **settings)
    assert sum(name in str(error.value) for name in SUBJECTS) > 4


@pytest.mark.parametrize('common, weight', [(0.0, 0.0), (3.0, 1.0)])
def test_the_weight_of_token_contrast_follows_the_probe(tmp_path, corpus, student, capsys, common, weight):
    student = replace(student, model=copy.deepcopy(student.model))
    student.model.model.norm.register_forward_hook(lambda module, inputs, out: out + common)  # a direction that all tokens share
    train(Run(tmp_path/'run'), student, corpus, **SETTINGS, token_weight=None)
    assert f'Token contrast has weight {weight:.0f}' in capsys.readouterr().out
    folder = tmp_path/'run'/'models'/'contrast'
    assert ('token' in read_json(folder/'history.json')[0]) == bool(weight)
    found = read_json(folder/'geometry.json')
    assert (found['before']['isotropy'] > 0.5) == bool(weight) and found.keys() == {'before', 'after'}


def test_a_weight_that_is_given_is_taken_and_the_probe_only_kept(tmp_path, corpus, student, capsys):
    train(Run(tmp_path/'run'), student, corpus, **SETTINGS, token_weight=0.5, margin=1.5)
    assert 'Token contrast has weight' not in capsys.readouterr().out
    row = read_json(tmp_path/'run'/'models'/'contrast'/'history.json')[0]
    assert row['loss'] == pytest.approx(row['lm'] + 0.1*row['pairs'] + 0.5*row['token'], rel=1e-5) and row['token'] > 0


def test_preferences_are_learnt_by_adapters_too(tmp_path, corpus, student):
    def text(name): return ' '.join(f'We study {name} in {n} experiments. The {name} was measured {n} times.' for n in range(9))
    long = [paper | dict(text=text(paper['id'])) for paper in PAPERS]
    told = replace(corpus, science=corpus.science | dict(train=long))
    settings = SETTINGS | dict(pairs_weight=0.0, preference_weight=0.5, preference=Preference(batch=2, length=40), lora_rank=2, steps=4)
    lm = train(Run(tmp_path/'run'), student, told, **settings)
    assert [row['preference'] > 0 for row in read_json(tmp_path/'run'/'models'/'contrast'/'history.json')] == [True]*4
    assert lm.model.state_dict().keys() == student.model.state_dict().keys()
    assert torch.equal(lm.model.get_input_embeddings().weight, student.model.get_input_embeddings().weight)  # adapters leave it alone


def test_each_contrast_is_a_part_of_the_loss_and_another_stage(tmp_path, corpus, student):
    settings, found = SETTINGS | dict(pairs_weight=0.0), {}
    for name, arm in dict(off={}, **CONTRASTS).items():
        found[name] = weights_hash(train(Run(tmp_path/name), student, corpus, **settings, **arm).model)
        weights = {key.removesuffix('_weight'): value for key, value in arm.items() if key.endswith('_weight')}
        for row in history_of(tmp_path/name):
            assert row['loss'] == pytest.approx(row['lm'] + sum(weight*row[part] for part, weight in weights.items()), rel=1e-5)
            assert all(row[part] > 0 for part in weights)
    assert len({*found.values()}) == len(found)  # the control is another training, too


def test_a_batch_that_does_not_fit_into_memory_is_not_cut_in_silence(student):
    recipe = Recipe(**SETTINGS | dict(batch_size=4, token_weight=0.0, pairs_weight=0.0, next_token_weight=0.1))
    batch_at = batch_maker(packed_papers(student), recipe)
    with pytest.raises(InputError, match='compares the 4 rows of a batch'):
        fit(copy.deepcopy(student.model), batch_at, contrast_loss(recipe), 1, learning_rate=1e-3, micro_batch=2)


def test_several_processes_are_refused_where_they_would_see_fewer_places(tmp_path, corpus, student, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    settings = SETTINGS | dict(pairs_weight=0.0, next_token_weight=0.1)
    with pytest.raises(InputError, match='2 processes share each batch'): train(Run(tmp_path/'run'), student, corpus, **settings)


def test_it_learns_which_title_belongs_to_which_text(tmp_path, corpus, student):
    settings = SETTINGS | dict(steps=60, pairs=Pairs(batch=12), learning_rate=5e-3, pairs_weight=1.0)
    lm = train(Run(tmp_path/'run'), student, corpus, **settings)
    titles, texts = zip(*map(views, PAPERS))
    found = [retrieval(embed(model, list(titles)), embed(model, list(texts)))['mrr'] for model in (student, lm)]
    history = read_json(tmp_path/'run'/'models'/'contrast'/'history.json')
    assert found[1] > found[0] and history[-1]['pairs'] < 0.5*math.log(12) and history[-1]['lm'] < history[0]['lm']


@pytest.mark.parametrize('change, named', [
    (dict(context=65), r'context is 65 tokens.*64'),
    (dict(pairs_weight=-1.0), r'pairs_weight is -1.0'),
    (dict(token_weight=math.nan), r'token_weight is nan'),
    (dict(lora_rank=-1), r'lora_rank is -1'),
    (dict(replay_share=1.0), r'replay_share is 1.0.*less than 1'),
    (dict(replay_share=-0.1), r'replay_share is -0.1.*from 0'),
    (dict(replay_share=math.nan), r'replay_share is nan'),
    (dict(replay_share=0.1), r'replay_share is 0.1 and there is no general text.*set replay_share to 0'),
    (dict(replay_share=0.1, replay_choice='forgoten'), r"replay_choice is 'forgoten'.*'forgotten'"),
    (dict(replay_choice='forgotten'), r'nothing is replayed; set replay_share above 0'),
    (dict(paper_choice='learnt', chain=3), r'chain is 3, which goes through all papers; set chain to 1, or paper_choice to random'),
    (dict(anchor_weight=-1.0), r'anchor_weight is -1.0'),
    (dict(anchor_weight=math.inf), r'anchor_weight is inf'),
    (dict(anchor_decay=0.0), r'anchor_decay is 0.0.*above 0 and up to 1'),
    (dict(anchor_decay=1.01), r'anchor_decay is 1.01'),
    (dict(margin=0.0), r'margin is 0.0'),
    (dict(chain=0), r'chain is 0.*1 for each alone'),
    (dict(chain_share=1.5), r'chain_share is 1.5.*from 0 \(none\) to 1 \(all\)'),
    (dict(chain_share=-0.1), r'chain_share is -0.1'),
    (dict(chain_order='relatd'), r"chain_order is 'relatd'.*mean 'related'.*random"),
    (dict(preference_weight=1.0, preference=Preference(length=500)), r'length is 500'),
    (dict(next_token_weight=-0.1), r'next_token_weight is -0.1'),
    (dict(next_token_weight=0.1, next_token=NextToken(temperature=0)), r'temperature is 0; it must be above 0'),
    (dict(next_token_weight=0.1, micro_batch=1), r'micro_batch is 1.*all 2 rows.*set micro_batch to 0'),
    (dict(mistakes_weight=math.inf), r'mistakes_weight is inf'),
    (dict(mistakes_weight=1.0, mistakes=Mistakes(kind='likelihood')), r"kind is 'likelihood'"),
    (dict(ditto_weight=1.0, ditto=Ditto(length=49)), r'length is 49.*at most the 48'),
    (dict(pairs=Pairs(batch=1)), r'batch=1.*at least 2'),
    (dict(trackers='tensorbord'), r"trackers names 'tensorbord'"),
    (dict(filler=False), r'tokenizer.pad_token'),
    (dict(states=False), r'model: .*gives no hidden states.*last_hidden_state'),
    (dict(titles=False), r'title_field.*pairs_weight to 0')])
def test_what_cannot_work_is_named_before_the_first_step(tmp_path, corpus, student, monkeypatch, change, named):
    monkeypatch.setattr(recipe, 'fit', lambda *a, **k: pytest.fail('training began'))
    settings = SETTINGS | change
    if not settings.pop('titles', True):
        corpus = replace(corpus, science=corpus.science | dict(train=[paper | dict(title='') for paper in PAPERS]))
    if not settings.pop('filler', True):
        student = replace(student, tokenizer=copy.deepcopy(student.tokenizer))
        student.tokenizer.pad_token = None
    if not settings.pop('states', True):
        student = replace(student, model=copy.deepcopy(student.model))
        student.model.base_model_prefix = 'none'  # so that its base model is itself, which gives logits only
    with pytest.raises(InputError, match=named): train(Run(tmp_path/'run'), student, corpus, **settings)
    assert not (tmp_path/'run'/'models'/'contrast').exists()


def test_several_processes_share_the_pairs(tmp_path, corpus, student, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '8')
    with pytest.raises(InputError, match='batch=4.*at least 8'): train(Run(tmp_path/'run'), student, corpus, **SETTINGS)
