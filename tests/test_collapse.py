"""What is watched in a training: measures against naive loops, rules that see a collapse and nothing else, weights that are kept."""
import copy
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from world import exact

from scilm_adapt.alignment import AlignedTeacher, Teacher
from scilm_adapt.collapse import (
    Collapse,
    Probe,
    _answered,
    _judged,
    _keep_good,
    _probe_student,
    _suspicious,
    collapse_monitor,
    collapsed,
    rules,
)
from scilm_adapt.decoding import repetition
from scilm_adapt.divergence import head_of
from scilm_adapt.errors import InputError
from scilm_adapt.files import read_json
from scilm_adapt.generate import Answer, chat_prompt, halt_ids, respond, stop_ids
from scilm_adapt.models import LanguageModel, build, hidden_states, load, weights_hash
from scilm_adapt.recipe import lora
from scilm_adapt.teacher import LiveTeacher, ShiftedTeacher
from scilm_adapt.tokens import encode_chat, pack, train_tokenizer
from scilm_adapt.training import fit, lm_loss, target_states

torch.set_num_threads(1)
THINGS = dict(gold='a heavy metal', salt='a crystal from the sea', air='a gas')
CHATS = [dict(paper_id=thing, messages=[dict(role='user', content=question.format(thing)),
                                        dict(role='assistant', content=f'{thing} is {kind}, as all know.')])
         for thing, kind in THINGS.items() for question in ('What is {}?', 'Tell me of {}.')]
TOKENIZER = train_tokenizer([message['content'] for chat in CHATS for message in chat['messages']], 320)
ENCODED = [encode_chat(TOKENIZER, chat['messages']) for chat in CHATS]
PACKED = pack([ids for ids, _ in ENCODED], 48, [mask for _, mask in ENCODED])


def model(hidden: int = 32, seed: int = 1) -> LanguageModel:
    return build(TOKENIZER, hidden=hidden, layers=1, heads=2, context=96, seed=seed)


def batch_at(step): return PACKED.batch(list(range(len(PACKED))))


def read(model, batch): return dict(loss=lm_loss(model, batch))


@pytest.fixture(scope='module')
def able() -> LanguageModel:
    "A model that answers its questions and stops; copy it before training."
    lm = model(48, seed=2)
    fit(lm.model, batch_at, read, 70, learning_rate=1e-2, precision='no')
    assert all(answer.stopped for answer in respond(lm, [chat_prompt(lm, chat['messages'][:1]) for chat in CHATS], 24))
    return lm


# --- measures ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('ids, share', [([], 0), ([1, 1, 1], 0), ([1, 2, 3, 4], 0), ([5]*8, 4/5), ([1, 2]*4, 3/5),
                                        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1/6)])
def test_repetition_counts_all_4_grams_with_the_last(ids, share):
    assert math.isclose(repetition(ids, 4), share, abs_tol=1e-12)


def test_an_answer_is_truncated_only_if_nothing_ended_it(able):
    stop = stop_ids(able)[0]
    other = next(iter(set(halt_ids(able)) - set(stop_ids(able))), None)  # such as the opening of a user's turn
    made = [Answer([5, 6, 7, stop], '', True), Answer([5]*4, '', False), Answer([5, 6], '', False)]
    if other is not None: made.append(Answer([5, 6, 7, other], '', False))
    seen = _answered(able, made, 4)
    assert seen['truncated'] == 1/len(made) == seen['stop_rate'] and math.isclose(seen['length'], sum(len(a.ids) for a in made)/len(made))


@pytest.mark.parametrize('kind', ['forward_kl', 'reverse_kl'])
def test_measures_are_those_of_a_naive_loop_in_64_bits(able, kind):
    student, teacher = (exact(lm) for lm in (model(), able))
    seen, values = _judged(student, LiveTeacher(teacher), *map(list, zip(*ENCODED)), kind), []
    for ids, mask in ENCODED:
        with torch.no_grad(): q, p = (lm.model(torch.tensor([ids])).logits[0].log_softmax(-1) for lm in (student, teacher))
        if kind == 'reverse_kl': one, other = q, p
        else: one, other = p, q
        values += [(-q[t - 1, ids[t]].item(), -(q[t - 1].exp()*q[t - 1]).sum().item(), (one[t - 1].exp()*(one - other)[t - 1]).sum().item())
                   for t in range(1, len(ids)) if mask[t]]
    assert np.allclose([seen['nll'], seen['entropy'], seen['kl']], np.mean(values, 0), rtol=1e-10)


def test_the_own_kl_is_that_at_the_answers_it_wrote(able):
    student, able = exact(model()), exact(able)
    seen, values = _probe_student(student, LiveTeacher(able), CHATS, max_new_tokens=12), []
    prompts = [chat_prompt(student, chat['messages'][:1]) for chat in CHATS]
    for prompt, answer in zip(prompts, respond(student, prompts, 12)):
        ids = torch.tensor([prompt + answer.ids])
        with torch.no_grad(): q, p = (lm.model(ids).logits[0, len(prompt) - 1:-1].log_softmax(-1) for lm in (student, able))
        values += (q.exp()*(q - p)).sum(-1).tolist()
    assert math.isclose(seen.on_policy_kl, np.mean(values), rel_tol=1e-10)


def test_a_look_changes_nothing_and_is_the_same_again(able):
    lm, state = model(), torch.random.get_rng_state()
    lm.model.train()
    before = weights_hash(lm.model)
    one, other = (replace(_probe_student(lm, LiveTeacher(able), CHATS, 3, 12), seconds=0) for _ in range(2))
    assert one == other and weights_hash(lm.model) == before and lm.model.training
    assert torch.equal(torch.random.get_rng_state(), state) and all(p.grad is None for p in lm.model.parameters())


def test_the_step_reaches_a_teacher_that_changes_with_it(able):
    asked = []
    shifted = ShiftedTeacher(LiveTeacher(able), model(), model(seed=5), alpha=lambda step: asked.append(step) or 0.0)
    _probe_student(model(), shifted, CHATS[:2], 7, 4)
    assert set(asked) == {7}


class Deaf(Teacher):
    "A teacher that knows the training conversations only, as one on disk does."
    def loss(self, *_, **__): raise AssertionError('it was asked for what it cannot know')


@pytest.mark.parametrize('teacher', [None, Deaf()])
def test_without_a_teacher_that_can_tell_the_rest_is_seen(teacher):
    seen = _probe_student(model(), teacher, CHATS[:2], max_new_tokens=4)
    assert seen.kl is None is seen.on_policy_kl and seen.nll > 1 and seen.length == 4


def test_a_teacher_with_other_tokens_is_shown_the_conversations(able):
    other = build(train_tokenizer([chat['messages'][1]['content'] for chat in CHATS], 290), hidden=32, layers=1, heads=2, context=128)
    seen = _probe_student(able, AlignedTeacher(other, able.tokenizer), CHATS[:3], max_new_tokens=8)
    assert seen.kl > 0 and math.isfinite(seen.kl) and seen.on_policy_kl is None


def test_weights_that_are_no_numbers_are_seen(able):
    lm = model()
    start = _probe_student(lm, None, CHATS[:2], max_new_tokens=4)
    with torch.no_grad(): next(lm.model.parameters())[:] = math.nan
    assert 'no number' in collapsed([start, _probe_student(lm, None, CHATS[:2], 4, 4)])


# --- rules ------------------------------------------------------------------------------------------------------------------------

BASE = Probe(-1, length=64, stop_rate=0.0, truncated=1.0, repetition=0.95, nll=4.0, entropy=3.5, highest=8.0, kl=2.0, on_policy_kl=1.0)
FINE = replace(BASE, step=10, length=12, stop_rate=0.9, truncated=0.0, repetition=0.05, nll=2.0, entropy=1.5, kl=0.8)


def test_healthy_series_are_left_alone():
    learning = [replace(BASE, step=n, stop_rate=min(1, n/5), repetition=max(0, 0.95 - n/4), kl=2/(1 + n), nll=4/(1 + n),
                        entropy=3.5/(1 + n)) for n in range(30)]                            # by heart, and sure because it is right
    wavering = [BASE, *[replace(FINE, step=n, stop_rate=(0.9, 0.4)[n % 2], kl=(0.5, 2.4)[n % 2]) for n in range(20)]]
    nothing = [replace(BASE, step=n) for n in range(10)]
    untrained = [replace(BASE, step=n, entropy=7.99) for n in range(5)]
    same_as_teacher = [replace(BASE, step=n, kl=0.001*(n + 1)) for n in range(20)]
    teacherless = [replace(one, kl=None, on_policy_kl=None) for one in learning]
    for series in (learning, wavering, nothing, untrained, same_as_teacher, teacherless, [BASE], []):
        assert not any(collapsed(series[:end]) for end in range(len(series) + 1))


@pytest.mark.parametrize('rule, change, words', [
    ('stops', dict(stop_rate=0.44), 'end fell from 0.90 at step 10 to 0.44'),
    ('loops', dict(repetition=0.81), 'rose from 0.05 at step 10 to 0.81'),
    ('sure_of_itself', dict(entropy=0.19), '3.500 nats at the start to 0.190'),
    ('sure_of_nothing', dict(entropy=7.7), '7.70 of at most 8.00'),
    ('away_from_teacher', dict(kl=2.26), 'KL from the teacher at held-out answers rose from 2.000'),
    ('away_from_teacher', dict(kl=None, nll=4.46), 'surprise at held-out answers rose from 4.000')])
def test_each_rule_speaks_at_the_second_look_in_a_row_and_alone(rule, change, words):
    bad = replace(FINE, step=20, **change)
    assert list(_suspicious([BASE, FINE, bad])) == [rule] and not collapsed([BASE, FINE, bad])
    assert not collapsed([BASE, FINE, bad, FINE, bad])
    assert words in collapsed([BASE, FINE, bad, replace(bad, step=30)])


@pytest.mark.parametrize('change', [dict(stop_rate=0.46), dict(repetition=0.79), dict(entropy=0.21), dict(entropy=7.5), dict(kl=2.24)])
def test_just_within_its_bounds_no_rule_speaks(change):
    assert not _suspicious([BASE, FINE, replace(FINE, step=20, **change)])


@pytest.mark.parametrize('name', [name for name, value in asdict(BASE).items() if name not in ('step', 'highest', 'seconds')])
def test_what_is_no_number_is_named_at_once(name):
    for bad in (math.nan, math.inf): assert f'{name} came out' in collapsed([BASE, FINE, replace(FINE, **{name: bad})])
    assert next(iter(rules)) == 'no_number'


# --- a training that is watched ---------------------------------------------------------------------------------------------------

def follow(teacher: LanguageModel):
    def loss(model, batch):
        states = target_states(hidden_states(model, batch), batch)[0]
        return dict(loss=LiveTeacher(teacher).loss(batch, states, head_of(model), count=batch['count']))
    return loss


def test_a_healthy_training_is_not_disturbed(able, tmp_path):
    plain, watched = model(), model()
    options = dict(learning_rate=1e-2, precision='no')
    fit(plain.model, batch_at, follow(able), 45, **options)
    monitor = collapse_monitor(watched, LiveTeacher(able), CHATS, 10, tmp_path/'good', 45, max_new_tokens=16)
    history = fit(watched.model, batch_at, follow(able), 45, on_step_end=monitor, **options)
    assert weights_hash(plain.model) == weights_hash(watched.model) == weights_hash(load(tmp_path/'good', 'cpu').model)
    seen = [row['step'] for row in history if 'probe_kl' in row]
    assert seen == [9, 19, 29, 39, 44] and history[-1]['probe_kl'] < 0.5*history[9]['probe_kl'] and history[-1]['probe_stop_rate'] > 0.5
    assert [one['step'] for one in read_json(tmp_path/'good'/'probes.json')] == [-1, *seen]
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for row in history for value in row.values())


def test_a_collapse_stops_the_run_and_the_last_good_weights_are_there(able, tmp_path):
    lm = replace(able, model=copy.deepcopy(able.model))
    monitor = collapse_monitor(lm, LiveTeacher(able), CHATS, 1, tmp_path/'good', 9, max_new_tokens=16)
    hashes = {}
    def ruin(step, model):
        if step >= 3:
            with torch.no_grad():
                for p in model.parameters(): p.mul_(-2)
        hashes[step] = weights_hash(model)
        return monitor(step, model)
    with pytest.raises(Collapse, match=r'collapsed at step 4: the .* to .*; the weights of step 2 are kept in') as found:
        fit(lm.model, batch_at, follow(able), 9, learning_rate=1e-4, precision='no', on_step_end=ruin)
    assert str(tmp_path/'good') in str(found.value) and '\n' not in str(found.value)
    assert weights_hash(load(tmp_path/'good', 'cpu').model) == hashes[2] and len(hashes) == 5
    assert [one.step for one in found.value.probes] == [-1, 0, 1, 2, 3, 4] and not lm.model.training
    assert [path.name for path in tmp_path.iterdir()] == ['good']  # nothing half-written beside it


def test_what_was_seen_before_a_stop_is_judged_with_what_comes_after(able, tmp_path):
    lm = replace(able, model=copy.deepcopy(able.model))
    first, second = (collapse_monitor(lm, LiveTeacher(able), CHATS, 1, tmp_path/'good', 9, max_new_tokens=8) for _ in range(2))
    first(0, lm.model)
    with torch.no_grad():
        for p in lm.model.parameters(): p.mul_(-2)
    first(1, lm.model)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    with pytest.raises(Collapse, match='collapsed at step 2: .*; the weights of step 0 are kept') as found: second(2, lm.model)
    assert [one.step for one in found.value.probes] == [-1, 0, 1, 2] and found.value.probes[:3] == first.probes


def test_a_save_that_fails_leaves_the_good_weights_before_it(able, tmp_path):
    _keep_good(able, tmp_path/'good', [BASE])
    with pytest.raises(ValueError): _keep_good(model(), tmp_path/'good', [replace(BASE, kl=math.nan)])  # which JSON cannot say
    assert weights_hash(load(tmp_path/'good', 'cpu').model) == weights_hash(able.model)
    assert [path.name for path in tmp_path.iterdir()] == ['good']


def test_adapters_are_kept_merged_and_go_on_learning(able, tmp_path):
    adapted, merge = lora(copy.deepcopy(able.model), 2)
    lm = replace(able, model=adapted)
    monitor = collapse_monitor(lm, LiveTeacher(able), CHATS, 2, tmp_path/'good', 3, max_new_tokens=8)
    fit(adapted, batch_at, read, 3, learning_rate=1e-3, precision='no', on_step_end=monitor)
    kept, merged = load(tmp_path/'good', 'cpu').model.state_dict(), merge().state_dict()
    assert list(kept) == list(merged) == list(able.model.state_dict())
    assert all(torch.equal(kept[name], merged[name]) for name in kept)


def test_what_cannot_be_watched_is_said(able, tmp_path):
    with pytest.raises(InputError, match='every is 0'): collapse_monitor(able, None, CHATS, 0, tmp_path/'good', 5)
    with pytest.raises(InputError, match='there are 0'): collapse_monitor(able, None, [], 1, tmp_path/'good', 5)
    with pytest.raises(InputError, match='answer of 90'): collapse_monitor(able, None, CHATS, 1, tmp_path/'good', 5, max_new_tokens=90)
