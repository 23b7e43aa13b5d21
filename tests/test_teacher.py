"""Teachers: open ones against logits of all tokens, the shift, and caches: what they hold, that they go on, and what they refuse."""
import copy
import json
import math
import shutil
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from forks import killed_in_the_middle
from world import addressed_batch

from scilm_adapt.alignment import Teacher
from scilm_adapt.distill import Recipe
from scilm_adapt.divergence import Head, common_rows, dense_loss, divergences, head_of
from scilm_adapt.errors import InputError
from scilm_adapt.files import read_json, write_json
from scilm_adapt.models import LanguageModel, build, families, hidden_states, logits_of, tiny
from scilm_adapt.rollouts import OnPolicy
from scilm_adapt.teacher import (
    CachedTeacher,
    LiveTeacher,
    ShiftedTeacher,
    _shards_of,
    addresses,
    build_cache,
    data_hash,
    open_cache,
    record,
    systematic_sample,
)
from scilm_adapt.tokens import pack, train_tokenizer
from scilm_adapt.training import micro_batches, target_states

TOKENIZER = train_tokenizer(['heat and light and salt make a wave of iron'], 300)


def lm_of(seed: int, family: str = 'llama', hidden: int = 32, dtype: torch.dtype = torch.float64, name: str = 'lm',
          sharp: float = 7.0) -> LanguageModel:
    "A random model whose opinions are not all alike."
    lm = build(TOKENIZER, family, hidden=hidden, layers=1, context=64, seed=seed, name=name)
    with torch.no_grad(): lm.model.get_input_embeddings().weight.mul_(sharp if family != 'gpt2' else 3.0)
    return replace(lm, model=lm.model.to(dtype))


def documents(number: int = 9, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    "Token ids and masks; one document has nothing to learn, one a learnt first token."
    draw = np.random.default_rng(seed)
    ids = [draw.integers(3, len(TOKENIZER), draw.integers(5, 17)).tolist() for _ in range(number)]
    masks = [[int(place > 2 and place % 4 > 0) for place in range(len(i))] for i in ids]
    masks[2], masks[3] = [0]*len(ids[2]), [1]*len(ids[3])
    return ids, masks


IDS, MASKS = documents()
PACKED = pack(IDS, 20, MASKS)
EVERY_ROW = list(range(len(PACKED)))


@pytest.fixture(scope='module')
def teacher() -> LiveTeacher: return LiveTeacher(lm_of(1, hidden=48, name='teacher'))


@pytest.fixture(scope='module')
def student() -> LanguageModel: return lm_of(2, name='student')


def batch_of(packed=PACKED, rows=None) -> dict:
    return addressed_batch(packed, rows, step=torch.tensor(3))


def loss_and_slope(teacher, student: LanguageModel, batch: dict, **options) -> tuple[torch.Tensor, torch.Tensor]:
    "The loss, and its gradient for every weight of the student."
    model = copy.deepcopy(student.model)
    states, _ = target_states(hidden_states(model, batch), batch)
    loss = teacher.loss(batch, states, head_of(model), count=batch['count'], **options)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def dense(targets: torch.Tensor, student: LanguageModel, batch: dict, divergence='forward_kl', temperature=1.0):
    "The same from the logits of all tokens."
    model = copy.deepcopy(student.model)
    logits = logits_of(model, target_states(hidden_states(model, batch), batch)[0])
    loss = dense_loss(logits, targets, torch.ones(len(logits), dtype=torch.bool), divergence, temperature, batch['count'])
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def same(found, wanted, tolerance: float = 1e-12) -> None:
    for a, b in zip(found, wanted): torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- open teachers

@pytest.mark.parametrize('divergence', divergences)
@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_a_live_teacher_gives_the_loss_of_all_logits(teacher, student, divergence, temperature):
    batch = batch_of()
    wanted = dense(teacher.targets(batch), student, batch, divergence, temperature)
    same(loss_and_slope(teacher, student, batch, divergence=divergence, temperature=temperature), wanted)


@pytest.mark.parametrize('family', families(1, 1, 1, 1, 1))
@pytest.mark.parametrize(('of_teacher', 'of_student'), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32),
                                                        (torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_numbers_of_other_precision_and_models_of_other_families_fit(family, of_teacher, of_student):
    teacher, student, batch = LiveTeacher(lm_of(1, family, 48, of_teacher)), lm_of(2, dtype=of_student), batch_of()
    found, wanted = (one(student, batch, divergence='jsd beta=0.3') for one in (
        lambda *a, **o: loss_and_slope(teacher, *a, **o), lambda *a, **o: dense(teacher.targets(batch), *a, **o)))
    same(found, wanted, 1e-5)


def test_logits_of_all_tokens_are_never_held(teacher, student):
    "The chunks that the teacher is asked for are small where the vocabulary is large."
    asked = []
    def spy(batch, size):
        logits_at = teacher.logits_at(batch, size)
        return lambda rows: (asked.append(len(rows)), logits_at(rows))[1]
    teacher, student = (replace(lm, model=copy.deepcopy(lm.model)) for lm in (teacher.lm, student))
    for lm in (teacher, student): lm.model.resize_token_embeddings(40_000, mean_resizing=False)
    teacher = watched = LiveTeacher(teacher)
    teacher, watched.logits_at = copy.copy(teacher), spy
    batch = batch_of(pack([np.random.default_rng(n).integers(3, len(TOKENIZER), 60).tolist() for n in range(10)], 64))
    states, _ = target_states(hidden_states(student.model, batch), batch)
    with torch.no_grad(): watched.loss(batch, states, head_of(student.model), 'jsd')
    assert sum(asked) == 10*59 == int(batch['count']) and max(asked) <= 128


def test_a_padded_head_and_no_loss_tokens_are_taken(teacher, student):
    wide = copy.deepcopy(teacher.lm.model)
    wide.resize_token_embeddings(len(TOKENIZER) + 64)
    batch = batch_of()
    same(loss_and_slope(LiveTeacher(replace(teacher.lm, model=wide)), student, batch), dense(teacher.targets(batch), student, batch))
    batch['loss_mask'], batch['count'] = torch.zeros_like(batch['loss_mask']), torch.tensor(0.0)
    loss, slope = loss_and_slope(teacher, student, batch)
    assert loss == 0 and not slope.any()


def test_the_loss_leaves_the_teacher_as_it_was_and_a_broken_one_is_named(teacher, student):
    batch, weights = batch_of(), teacher.fingerprint()
    teacher.lm.model.train()
    loss_and_slope(teacher, student, batch)
    assert teacher.fingerprint() == weights and all(p.grad is None for p in teacher.lm.model.parameters())
    assert not teacher.lm.model.training
    model = copy.deepcopy(teacher.lm.model)
    torch.nn.init.constant_(model.get_output_embeddings().weight[-1:], math.inf)
    with pytest.raises(FloatingPointError, match="The teacher 'wreck'"):
        loss_and_slope(LiveTeacher(LanguageModel(model, TOKENIZER, 'wreck')), student, batch)


# --- the shift

@pytest.fixture(scope='module')
def pair() -> tuple[LanguageModel, LanguageModel]: return lm_of(3, name='contrast'), lm_of(4, name='base')


@pytest.mark.parametrize('divergence', ['forward_kl', 'jsd'])
@pytest.mark.parametrize('alpha', [0.5, 1.0, -0.25])
def test_a_shifted_teacher_is_the_sum_of_logits(teacher, student, pair, divergence, alpha):
    batch = batch_of()
    z, adapted, base = (LiveTeacher(lm).targets(batch) for lm in (teacher.lm, *pair))
    wanted = dense(z + alpha*(adapted - base), student, batch, divergence, 2.0)
    same(loss_and_slope(ShiftedTeacher(teacher, *pair, alpha), student, batch, divergence=divergence, temperature=2.0), wanted)


def test_without_a_shift_the_teacher_is_the_live_one_exactly(teacher, student, pair):
    batch = batch_of()
    live = loss_and_slope(teacher, student, batch)
    for shifted in (ShiftedTeacher(teacher, *pair, 0), ShiftedTeacher(teacher, pair[0], copy.deepcopy(pair[0]), 0.7)):
        assert all(torch.equal(a, b) for a, b in zip(loss_and_slope(shifted, student, batch), live))
    assert loss_and_slope(ShiftedTeacher(teacher, *pair, 0.5), student, batch)[0] != live[0]


def test_alpha_may_follow_the_step_also_in_micro_batches(teacher, student, pair):
    batch = batch_of()
    moving = ShiftedTeacher(teacher, *pair, lambda step: 0.1*step)
    fixed = loss_and_slope(ShiftedTeacher(teacher, *pair, 0.1*3), student, batch)
    parts = [loss_and_slope(moving, student, part) for part in micro_batches(batch, 2)]
    assert len(parts) > 1
    same([sum(part[n] for part in parts) for n in (0, 1)], fixed)
    with pytest.raises(InputError, match=r"batch\['step'\]"): loss_and_slope(moving, student, PACKED.batch(EVERY_ROW))
    with pytest.raises(InputError, match='alpha is nan'): loss_and_slope(ShiftedTeacher(teacher, *pair, math.nan), student, batch)


def test_a_shift_leaves_all_three_models_alone_and_names_the_broken_one(teacher, student, pair):
    shifted = ShiftedTeacher(teacher, *pair, 0.5)
    before = shifted.fingerprint()
    loss_and_slope(shifted, student, batch_of())
    assert shifted.fingerprint() == before and all(p.grad is None for lm in (teacher.lm, *pair) for p in lm.model.parameters())
    wreck = copy.deepcopy(pair[1].model)
    torch.nn.init.constant_(wreck.get_output_embeddings().weight, math.nan)
    with pytest.raises(FloatingPointError, match="'wreck'"):
        loss_and_slope(ShiftedTeacher(teacher, pair[0], LanguageModel(wreck, TOKENIZER, 'wreck')), student, batch_of())


@pytest.mark.parametrize('place', [0, 1])
def test_a_shift_between_other_vocabularies_is_refused(teacher, pair, place):
    small = list(pair)
    small[place] = tiny(['Quite other words in there.'], size=300)
    with pytest.raises(InputError, match='different vocabularies'): ShiftedTeacher(teacher, *small)


# --- the cache: what it holds

@dataclass
class Once:
    "A teacher that answers about each token once, and raises when it is asked again."
    teacher: LiveTeacher
    asked: set
    loss = LiveTeacher.loss
    lm, rows = property(lambda self: self.teacher.lm), property(lambda self: self.teacher.rows)

    def fingerprint(self): return self.teacher.fingerprint()

    def logits_at(self, batch, size):
        rows = [tuple(row) for row in torch.cat([batch['input_ids'], batch['segments']], 1).tolist()]
        assert self.asked.isdisjoint(rows), 'asked a second time'
        self.asked |= set(rows)
        return self.teacher.logits_at(batch, size)


def everything_kept(folder, teacher, **settings) -> CachedTeacher:
    return build_cache(folder, teacher, PACKED, k=len(TOKENIZER), how='top_k', **settings)


@pytest.mark.parametrize('divergence', ['forward_kl', 'skew_kl'])
@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_a_cache_of_all_words_gives_the_live_loss_in_any_order_and_epoch(teacher, student, tmp_path, divergence, temperature):
    cache = everything_kept(tmp_path/'cache', Once(teacher, set()), temperature=temperature, shard=10)
    assert len(cache.shards) > 3
    for epoch in range(3):
        for rows in np.array_split(np.random.default_rng(epoch).permutation(len(PACKED)), 2):
            batch = batch_of(rows=rows.tolist())
            live = loss_and_slope(teacher, student, batch, divergence=divergence, temperature=temperature)
            for part in (None, 1):
                found = [loss_and_slope(cache, student, b, divergence=divergence, temperature=temperature)
                         for b in micro_batches(batch, part)]
                same([sum(f[n] for f in found) for n in (0, 1)], live, 2e-3)


def test_targets_are_found_however_the_conversations_are_packed(teacher, student, tmp_path):
    cache = everything_kept(tmp_path/'cache', teacher, shard=10)
    wider = pack(IDS, 48, MASKS)
    assert len(wider) < len(PACKED) and data_hash(wider) == data_hash(PACKED)
    other = open_cache(tmp_path/'cache', wider, teacher, k=len(TOKENIZER))
    same(loss_and_slope(other, student, batch_of(wider)), loss_and_slope(cache, student, batch_of()), 1e-8)


@pytest.mark.parametrize(('length', 'share', 'masks'), [(20, 0.0, MASKS), (7, 0.0, MASKS), (7, 0.0, None), (20, 0.99, None),
                                                        (64, 0.0, None)])
def test_every_learnt_token_has_one_address_also_where_documents_are_cut(length, share, masks):
    packed = pack([*IDS, [], [5]], length, None if masks is None else [*masks, [], [1]], share)
    rows = list(range(len(packed)))
    batch = packed.batch(rows)
    mask = batch['loss_mask'][:, 1:]
    found = addresses(packed)(rows)[:, 1:][mask]
    assert sorted(found.tolist()) == list(range(int(batch['count'])))
    targets = [i for ids, m in zip(IDS, masks or [[1]*len(ids) for ids in IDS]) for i, learnt in zip(ids[1:], m[1:]) if learnt]
    assert torch.equal(batch['input_ids'][:, 1:][mask], torch.tensor(targets)[found])
    parts = _shards_of(packed, 5)
    assert sum(int(part.batch(list(range(len(part))))['count']) for part in parts) == len(targets) and len(parts) > 4


def test_the_shifted_teacher_can_be_written_down(teacher, student, pair, tmp_path):
    shifted = ShiftedTeacher(teacher, *pair, 0.5)
    cache = everything_kept(tmp_path/'cache', shifted)
    same(loss_and_slope(cache, student, batch_of()), loss_and_slope(shifted, student, batch_of()), 2e-3)
    with pytest.raises(InputError, match='changes from step to step'): everything_kept(tmp_path/'b', replace(shifted, alpha=lambda s: s))
    for other in (replace(shifted, alpha=0.6), teacher, ShiftedTeacher(teacher, pair[0], teacher.lm, 0.5)):
        with pytest.raises(InputError, match='made for something else, different in: .*(alpha|base model)'):
            open_cache(tmp_path/'cache', PACKED, other)
    open_cache(tmp_path/'cache', PACKED, shifted)


@pytest.mark.parametrize('temperature', [1.0, 1.3])
def test_the_loss_of_sampled_caches_is_right_on_average_in_value_and_gradient(teacher, student, tmp_path, temperature):
    batch, caches = batch_of(), 150
    live = dense(teacher.targets(batch), student, batch, temperature=temperature)
    found = []
    for seed in range(caches):
        cache = build_cache(tmp_path/str(seed), teacher, PACKED, k=12, seed=seed, temperature=temperature)
        found.append(loss_and_slope(cache, student, batch, temperature=temperature))
    values, slopes = (torch.stack([f[n] for f in found]) for n in (0, 1))
    assert abs(values.mean() - live[0]) < 4*values.std()/caches**0.5 + 1e-3        # the entropy is kept in 16 bits
    noise = slopes.var(0).sum()/caches                                              # the expected squared distance of the mean
    assert (slopes.mean(0) - live[1]).square().sum() < 2*noise
    assert noise < (0.1*live[1].norm())**2                                           # so a bias of a fifth would be seen


def test_draws_come_as_often_as_they_are_likely():
    logprobs = (3*torch.randn(40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    logprobs[0] = torch.tensor([0.0] + [-math.inf]*49)
    for k in (1, 7):
        marks = (torch.arange(2000, dtype=torch.float64) + 0.5)/2000
        draws = [systematic_sample(logprobs, mark.expand(40), k) for mark in marks]
        counts = torch.stack([torch.nn.functional.one_hot(drawn, 50).sum(1) for drawn in draws]).double()
        assert (counts - k*logprobs.exp()).abs().max() < 1                          # systematic: never a whole draw off
        torch.testing.assert_close(counts.mean(0), k*logprobs.exp(), rtol=0, atol=2e-3*k)


def test_draws_depend_on_seed_document_and_place_alone(teacher, tmp_path):
    one, two = (build_cache(tmp_path/str(shard), teacher, PACKED, k=5, seed=7, shard=shard) for shard in (8, 1000))
    places = np.arange(one.ends[-1])
    assert (one.read(places)['token_ids'] == two.read(places)['token_ids']).mean() > 0.999  # rounding may differ with the rows
    other = build_cache(tmp_path/'other', teacher, PACKED, k=5, seed=8)
    assert (one.read(places)['token_ids'] != other.read(places)['token_ids']).any()
    fewer = pack(IDS[:5], 20, MASKS[:5])
    again = build_cache(tmp_path/'fewer', teacher, fewer, k=5, seed=7)
    assert np.array_equal(again.read(places[:10])['token_ids'], one.read(places[:10])['token_ids'])


@pytest.mark.parametrize(('how', 'k', 'vocabulary', 'most'), [
    (how, k, v, (4.2 if v <= 2**16 else 6.2)*k) for how in ('sampled', 'top_k') for k in (1, 16, 64) for v in (400, 2**16, 2**16 + 1)])
def test_a_token_costs_what_it_may(how, k, vocabulary, most):
    kind = record(how, k, vocabulary)
    assert kind.itemsize <= most and np.iinfo(kind['token_ids'].base).max >= vocabulary - 1


def test_the_report_says_what_is_on_disk_and_how_the_teacher_does(teacher, student, tmp_path):
    cache = build_cache(tmp_path/'cache', teacher, PACKED, k=3, how='top_k', shard=10)
    report, batch = cache.report(), batch_of()
    probabilities, written = teacher.targets(batch).softmax(-1), target_states(batch['input_ids'][..., None], batch)[1]
    size = sum(file.stat().st_size for file in (tmp_path/'cache').glob('*.bin'))
    assert report['targets'] == len(written) and report['bytes'] == size and report['bytes_per_target'] == size/len(written) == 12
    assert math.isclose(report['mass'], probabilities.topk(3).values.sum(-1).mean(), abs_tol=1e-4) and report['distinct'] == 3
    said, best = probabilities.max(-1)
    assert math.isclose(report['calibration']['said'], said.mean(), abs_tol=1e-4)
    assert math.isclose(report['calibration']['right'], (best == written).double().mean(), abs_tol=1e-4)
    json.dumps(report)
    sampled = build_cache(tmp_path/'sampled', teacher, PACKED, k=3).report()
    assert 1 <= sampled['distinct'] <= 3 and sampled['mass'] < 1 and sampled['bytes_per_target'] == 8


# --- the cache: interrupted, damaged, stale

class Slow(LiveTeacher):
    "A teacher that takes its time, so that a build of its answers can be killed in the middle."
    def logits_at(self, batch, size):
        time.sleep(0.2)
        return super().logits_at(batch, size)


def test_a_killed_build_goes_on_where_it_stopped(teacher, tmp_path):
    folder = tmp_path/'cache'
    killed_in_the_middle(lambda: build_cache(folder, Slow(lm_of(1, hidden=48, name='teacher')), PACKED, k=4, shard=6),
                         lambda: len([*folder.glob('shard-*.bin')]) >= 3)
    made = read_json(folder/'targets.json')
    assert not made['complete'] and 2 <= len(made['shards']) < 6
    with pytest.raises(InputError, match='not finished'): open_cache(folder, PACKED)
    kept, torn = sorted(made['shards'])[:2]
    (folder/torn).write_bytes((folder/torn).read_bytes()[:7])                          # as a crash of the machine may leave it
    for aside in ('.shard-00004.bin', '.targets.json.123-0123abcd'): (folder/aside).write_bytes(b'half')
    before = (folder/kept).stat().st_mtime_ns
    resumed, whole = build_cache(folder, teacher, PACKED, k=4, shard=6), build_cache(tmp_path/'whole', teacher, PACKED, k=4, shard=6)
    assert (folder/kept).stat().st_mtime_ns == before
    assert all((folder/name).read_bytes() == (tmp_path/'whole'/name).read_bytes() for name in whole.about['shards'])
    hashes = [{name: entry['sha256'] for name, entry in cache.about['shards'].items()} for cache in (resumed, whole)]
    assert hashes[0] == hashes[1]
    assert resumed.report() == whole.report() and {file.name for file in folder.iterdir()} == {'targets.json', *whole.about['shards']}


def flip(file, place=5) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope='module')
def made(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp('made')/'cache'
    build_cache(folder, teacher, PACKED, k=4, shard=10)
    return folder


@pytest.mark.parametrize(('name', 'damage', 'message'), [
    ('shard-00001.bin', lambda file: file.write_bytes(file.read_bytes()[:-3]), 'has .* bytes instead of'),
    ('shard-00000.bin', flip, 'was changed'), ('shard-00002.bin', lambda file: file.unlink(), 'is missing')])
def test_a_damaged_shard_is_named_and_made_anew(made, teacher, tmp_path, name, damage, message):
    folder = shutil.copytree(made, tmp_path/'cache')
    damage(folder/name)
    with pytest.raises(InputError, match=f'{name}: this part of the cache {message}.*made anew'): open_cache(folder, PACKED, teacher)
    build_cache(folder, teacher, PACKED, k=4, shard=10)
    assert all((folder/file.name).read_bytes() == file.read_bytes() for file in made.iterdir())


@pytest.mark.parametrize('damage', [flip, lambda file: file.write_text('{"half'),
                                    lambda file: write_json(file, read_json(file) | dict(complete=3)),
                                    lambda file: file.write_text(file.read_text().replace('"k": 4', '"k": 2'))])
def test_a_damaged_list_of_shards_is_refused(made, teacher, tmp_path, damage):
    folder = shutil.copytree(made, tmp_path/'cache')
    damage(folder/'targets.json')
    for use in (lambda: open_cache(folder, PACKED), lambda: build_cache(folder, teacher, PACKED, k=4, shard=10)):
        with pytest.raises(InputError, match=r'targets\.json: this file is damaged; remove the folder'): use()


def with_tokenizer(lm: LanguageModel, change) -> LiveTeacher:
    lm = replace(lm, tokenizer=copy.deepcopy(lm.tokenizer))
    change(lm.tokenizer)
    return LiveTeacher(lm)


def other_weights(lm: LanguageModel) -> LiveTeacher:
    model = copy.deepcopy(lm.model)
    with torch.no_grad(): next(model.parameters())[0, 0] += 1e-9
    return LiveTeacher(replace(lm, model=model))


@pytest.mark.parametrize(('change', 'differs'), [
    (lambda t: (with_tokenizer(t.lm, lambda tok: tok.add_tokens(['<new>'])), PACKED, {}), 'tokenizer'),
    (lambda t: (with_tokenizer(t.lm, lambda tok: setattr(tok, 'chat_template', tok.chat_template + ' ')), PACKED, {}), 'chat template'),
    (lambda t: (other_weights(t.lm), PACKED, {}), "teacher's weights"),
    (lambda t: (t, pack([*IDS[:-1], IDS[-1][:-1] + [3]], 20, MASKS), {}), 'conversations'),
    (lambda t: (t, pack(IDS, 20, [[*MASKS[0][:-1], 1 - MASKS[0][-1]], *MASKS[1:]]), {}), 'conversations'),
    (lambda t: (t, pack(IDS, 7, MASKS), {}), 'conversations'),                       # cut, so that less is read before a token
    (lambda t: (t, PACKED, dict(k=5)), r'k \(4 there, 5 wanted\)'), (lambda t: (t, PACKED, dict(seed=1)), 'seed'),
    (lambda t: (t, PACKED, dict(how='top_k')), 'how'), (lambda t: (t, PACKED, dict(temperature=2.0)), 'temperature')])
def test_a_stale_cache_is_refused_and_left_alone(made, teacher, change, differs):
    other, packed, settings = change(teacher)
    before = {file: file.read_bytes() for file in made.iterdir()}
    message = f'targets.json: the cache was made for something else, different in: {differs}( .*there.*)?; remove the folder'
    with pytest.raises(InputError, match=message): open_cache(made, packed, other, **settings)
    with pytest.raises(InputError, match=message): build_cache(made, other, packed, **dict(k=4, shard=10) | settings)
    assert {file: file.read_bytes() for file in made.iterdir()} == before


def test_what_a_cache_cannot_do_is_refused(made, teacher, student, tmp_path):
    cache, batch = open_cache(made, PACKED, teacher, k=4), batch_of()
    for options, message in ((dict(divergence='jsd'), 'cannot be had from sampled targets'),
                             (dict(temperature=2.0), 'made at temperature 1.0')):
        with pytest.raises(InputError, match=message): loss_and_slope(cache, student, batch, **options)
    with pytest.raises(InputError, match=r"batch\['address'\]"): loss_and_slope(cache, student, PACKED.batch(EVERY_ROW))
    with pytest.raises(InputError, match='asks for target'): cache.read(np.array([10**6]))
    with pytest.raises(InputError, match='no such cache.*build_cache'): open_cache(tmp_path/'none', PACKED)
    for settings, message in ((dict(k=0), 'k is 0'), (dict(k=10**6), 'k is 1000000'), (dict(how='all'), "how is 'all'"),
                              (dict(temperature=0.0), 'temperature is 0')):
        with pytest.raises(InputError, match=message): build_cache(tmp_path/'x', teacher, PACKED, **settings)
    assert not (tmp_path/'x').exists()
    with pytest.raises(InputError, match=f'vocabulary is {len(TOKENIZER)}'):
        cache.loss(batch, torch.zeros(int(batch['count']), 8), Head(torch.zeros(100, 8)))


def test_what_only_pads_a_head_is_never_drawn(teacher, student, tmp_path):
    wide = copy.deepcopy(teacher.lm.model)
    wide.resize_token_embeddings(len(TOKENIZER) + 64)
    with torch.no_grad(): wide.get_output_embeddings().weight[-64:] = wide.get_output_embeddings().weight[:64]*3
    cache = build_cache(tmp_path/'cache', LiveTeacher(replace(teacher.lm, model=wide)), PACKED, k=4)
    assert cache.read(np.arange(cache.ends[-1]))['token_ids'].max() < len(TOKENIZER) == common_rows(None, cache.about['made']['rows'])
    loss_and_slope(cache, student, batch_of())


def test_a_broken_teacher_is_not_written_down(teacher, tmp_path):
    model = copy.deepcopy(teacher.lm.model)
    torch.nn.init.constant_(model.get_output_embeddings().weight, math.nan)
    with pytest.raises(FloatingPointError, match="'wreck'"):
        build_cache(tmp_path/'cache', LiveTeacher(LanguageModel(model, TOKENIZER, 'wreck')), PACKED)
    assert not (tmp_path/'cache').exists()


def test_a_teacher_says_itself_what_it_can(made, teacher, pair):
    cache, shifted = open_cache(made, PACKED, teacher, k=4), ShiftedTeacher(teacher, *pair, 0.5)
    assert teacher.open and shifted.open and not cache.open
    assert (teacher.sparse, shifted.sparse, cache.sparse) == ('', '', 'sampled') and teacher.local is shifted.local is teacher.lm
    assert teacher.can_judge([]) and not cache.can_judge([]) and cache.local is None
    assert [weight for _, weight in shifted.summands()] == [1.0, 0.5, -0.5] and teacher.summands() == [(teacher.lm, 1.0)]


def recipe(**settings): return Recipe(steps=1, batch_size=1, context=8, learning_rate=0.1, **dict(divergence='forward_kl') | settings)


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(divergence='jsd'), "'jsd' cannot be had from this teacher, because draws tell"),
    (dict(shift=0.5), 'shift is 0.5, and a cache knows'),
    (dict(on_policy=OnPolicy(share=0.5)), 'on_policy.share is 0.5, and .*; set it to 0, or choose another teacher'),
    (dict(on_policy=OnPolicy(replay=8)), 'on_policy.replay is 8')])
def test_what_it_cannot_serve_it_refuses(made, teacher, changes, message):
    teacher.check(recipe(**changes))
    cache = open_cache(made, PACKED, teacher, k=4)
    cache.check(recipe())
    with pytest.raises(InputError, match=message): cache.check(recipe(**changes))


def test_a_teacher_of_ones_own_needs_a_loss_and_nothing_else(student):
    class Pull(Teacher):
        def loss(self, batch, states, head, divergence='forward_kl', temperature=1.0, count=None): return states.square().mean()
    mine = Pull()
    mine.check(recipe())
    assert not mine.open and mine.sparse == '' and mine.local is None and mine.fingerprint() == {} and not mine.can_judge([])
    for setting in (dict(shift=0.5), dict(cache=4), dict(on_policy=OnPolicy(share=0.5))):
        with pytest.raises(InputError, match='cannot be asked about any text; set it to 0'): mine.check(recipe(**setting))
