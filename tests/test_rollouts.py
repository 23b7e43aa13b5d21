"""Own answers: drawn by address, marked where the student wrote, packed in place of the given ones or beside them, and kept."""
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from scilm_adapt import rollouts
from scilm_adapt.errors import InputError
from scilm_adapt.generate import chat_prompt, halt_ids
from scilm_adapt.models import tiny
from scilm_adapt.rollouts import (
    OnPolicy,
    ReplayBuffer,
    Rollout,
    _answer_kinds,
    _roll_out,
    on_policy_batches,
    student_weight_at,
)
from scilm_adapt.tokens import TURN_END, TURN_START, batch_rows, documents_in, encode_chat, pack
from scilm_adapt.training import fit, lm_loss, micro_batches

CONTEXT, STEPS = 64, 10
POLICY = OnPolicy(share=0.5, max_new_tokens=12)


def chat(question: str, answer: str) -> dict:
    return dict(paper_id=question, messages=[dict(role='user', content=question), dict(role='assistant', content=answer)])


CHATS = [chat(f'What is {n}?', 'It is ' + 'very '*(n % 4) + f'much {n}.') for n in range(24)]


@pytest.fixture(scope='module')
def lm():
    lm = tiny([m['content'] for c in CHATS for m in c['messages']], hidden=32, size=320, context=128)
    for parameter in lm.model.parameters(): parameter.data *= 3
    return lm


@pytest.fixture(scope='module')
def given(lm): return packed(lm, CHATS)


def packed(lm, chats, context=CONTEXT):
    ids, masks = zip(*(encode_chat(lm.tokenizer, c['messages']) for c in chats))
    return pack(list(ids), context, list(masks))


def batches(given, size=4, **more):
    return lambda step: given.batch(batch_rows(len(given), size, step, 0)) | dict(step=torch.tensor(step), **more)


def documents(batch, prefix=''):
    "The documents in a batch: for each its ids, and which of them are learnt and own."
    found = []
    names = ('input_ids', 'segments', 'loss_mask', 'on_policy' if prefix + 'on_policy' in batch else 'loss_mask')
    for ids, segments, mask, own in zip(*(batch[prefix + name] for name in names)):
        for number in range(1, int(segments.max()) + 1):
            at = segments == number
            found.append((ids[at].tolist(), mask[at].tolist(), own[at].tolist()))
    return found


# --- a roll-out

def test_a_roll_out_is_the_prompt_and_what_the_student_wrote(lm):
    for chat, rollout in zip(CHATS, _roll_out(lm, CHATS, POLICY)):
        prompt = chat_prompt(lm, chat['messages'][:-1])
        assert rollout.ids[:len(prompt)] == prompt
        assert rollout.mask == [0]*len(prompt) + [1]*rollout.length and 1 <= rollout.length <= 12
        assert rollout.truncated == (not set(rollout.ids[len(prompt):]) & set(halt_ids(lm)))


def test_its_end_is_marked_only_if_it_was_written(lm):
    end, turn = lm.tokenizer.convert_tokens_to_ids([TURN_END, TURN_START])
    word = 9
    assert rollouts._to_rollout([1, 2], [word, end, end], [end], [end, turn]) == Rollout([1, 2, word, end], [0, 0, 1, 1], True, False)
    assert rollouts._to_rollout([1, 2], [word, turn, end], [end], [end, turn]) == Rollout([1, 2, word, turn], [0, 0, 1, 1], False, False)
    assert rollouts._to_rollout([1, 2], [word, word], [end], [end, turn]) == Rollout([1, 2, word, word], [0, 0, 1, 1], False, True)


def test_roll_outs_are_a_function_of_seed_step_and_weights(lm):
    first, state = _roll_out(lm, CHATS, POLICY, 1, 2), torch.get_rng_state()
    torch.rand(5)
    lm.model.train()
    assert _roll_out(lm, CHATS, POLICY, 1, 2) == first and lm.model.training
    lm.model.eval()
    assert _roll_out(lm, CHATS, POLICY, 2, 2) != first != _roll_out(lm, CHATS, POLICY, 1, 3)
    torch.set_rng_state(state)
    _roll_out(lm, CHATS, POLICY)
    assert torch.equal(torch.get_rng_state(), state)


def test_only_the_last_answer_is_the_students(lm):
    talk = dict(paper_id='1', messages=CHATS[0]['messages'] + CHATS[1]['messages'])
    rollout, = _roll_out(lm, [talk], POLICY)
    prompt = chat_prompt(lm, talk['messages'][:3])
    assert rollout.ids[:len(prompt)] == prompt and not any(rollout.mask[:len(prompt)])


def test_a_question_without_room_for_an_answer_keeps_the_given_one(lm):
    long = chat('Why? '*20, 'So.')
    size = len(chat_prompt(lm, long['messages'][:1]))
    assert [bool(r) for r in _roll_out(lm, [CHATS[0], long], POLICY, context=size + 11)] == [True, False]
    assert all(_roll_out(lm, [CHATS[0], long], POLICY, context=size + 12))
    assert _roll_out(lm, [long], replace(POLICY, max_new_tokens=lm.context - size + 1)) == [None]


# --- shares

def test_kinds_of_answers_are_drawn_by_address_and_a_larger_share_only_adds():
    numbers = list(range(3000))
    counts = Counter(_answer_kinds(numbers, 0.6, 0.2, 0, 0))
    assert abs(counts['fresh']/3000 - 0.2) < 0.03 and abs(counts['kept']/3000 - 0.4) < 0.03
    less, more = _answer_kinds(numbers, 0.3, 0.3, 0, 5), _answer_kinds(numbers, 0.6, 0.6, 0, 5)
    assert all(b == 'fresh' for a, b in zip(less, more) if a == 'fresh') and less != _answer_kinds(numbers, 0.3, 0.3, 0, 6)
    assert _answer_kinds(numbers[::-1], 0.3, 0.3, 0, 5) == less[::-1]
    assert set(_answer_kinds(numbers, 0, 0, 0, 0)) == {'given'} and set(_answer_kinds(numbers, 1, 1, 0, 0)) == {'fresh'}


@pytest.mark.parametrize('share', [0.0, 0.4, 1.0])
def test_own_answers_stand_in_the_place_of_a_share_of_the_given_ones(lm, given, share):
    batch_at = on_policy_batches(lm, CHATS, given, batches(given), replace(POLICY, share=share), CONTEXT, STEPS, 0)
    for step in range(3):
        batch = batch_at(step)
        numbers = documents_in(given, batch_rows(len(given), 4, step, 0))
        assert len(numbers) == len(set(numbers)) > 4
        chosen = {n for n, source in zip(numbers, _answer_kinds(numbers, share, share, 0, step)) if source == 'fresh'}
        ordered = [n for n in numbers if n in chosen]
        own = {tuple(r.ids): r for r in _roll_out(lm, [CHATS[n] for n in ordered], POLICY, 0, step, CONTEXT)}
        found = documents(batch)
        assert sorted(tuple(ids) for ids, _, mine in found if any(mine)) == sorted(own)
        others = [rollouts._packed_document(given, n)[0] for n in numbers if n not in chosen]
        assert sorted(ids for ids, _, mine in found if not any(mine)) == sorted(others)
        assert all(mine == learnt == list(map(bool, own[tuple(ids)].mask)) for ids, learnt, mine in found if any(mine))
        assert batch['count'] == batch['loss_mask'].sum() and int(batch['step']) == step
        assert float(batch['rollout_share']) == pytest.approx(len(chosen)/len(numbers))


def test_without_own_answers_nothing_is_lost(lm, given):
    old = batches(given)(0)
    new = on_policy_batches(lm, CHATS, given, batches(given), OnPolicy(share=0, max_new_tokens=9), CONTEXT, STEPS, 0)(0)
    assert sorted(ids for ids, _, _ in documents(new)) == sorted(ids for ids, _, _ in documents(old | dict(on_policy=old['loss_mask'])))
    assert new['count'] == old['count'] and not new['on_policy'].any() and torch.isnan(new['rollout_length'])


def test_batches_follow_the_weights_and_keep_the_papers(lm, given):
    paper = torch.arange(6).reshape(2, 3)
    batch_at = on_policy_batches(lm, CHATS, given, batches(given, papers_input_ids=paper, address=torch.zeros(4, CONTEXT)),
                                 POLICY, CONTEXT, STEPS, 0)
    one = batch_at(0)
    assert torch.equal(one['papers_input_ids'], paper) and 'address' not in one
    again = batch_at(0)
    assert all(torch.equal(one[name], again[name]) for name in one)
    weights = {name: value.clone() for name, value in lm.model.state_dict().items()}
    try:
        for parameter in lm.model.parameters(): parameter.data *= -1
        assert not torch.equal(batch_at(0)['input_ids'], one['input_ids'])
    finally: lm.model.load_state_dict(weights)


def test_the_numbers_are_those_of_the_roll_outs(lm, given):
    batch = on_policy_batches(lm, CHATS, given, batches(given), replace(POLICY, share=1.0), CONTEXT, STEPS, 0)(0)
    own = _roll_out(lm, [CHATS[n] for n in documents_in(given, batch_rows(len(given), 4, 0, 0))], POLICY, 0, 0, CONTEXT)
    mean = lambda values: sum(values)/len(own)
    assert float(batch['rollout_length']) == pytest.approx(mean([r.length for r in own]))
    assert float(batch['rollout_stopped']) == pytest.approx(mean([r.stopped for r in own]))
    assert float(batch['rollout_truncated']) == pytest.approx(mean([r.truncated for r in own])) and batch['rollout_share'] == 1


def test_conversations_longer_than_a_row_were_left_out(lm):
    long = chat('Why? '*40, 'So.')
    some = [CHATS[0], long, *CHATS[1:]]
    given = packed(lm, CHATS)
    batch = on_policy_batches(lm, some, given, batches(given), replace(POLICY, share=1.0), CONTEXT, STEPS, 0)(0)
    asked = {tuple(chat_prompt(lm, CHATS[n]['messages'][:1])) for n in documents_in(given, batch_rows(len(given), 4, 0, 0))}
    assert {tuple(i for i, own in zip(ids, mine) if not own) for ids, _, mine in documents(batch)} == asked


def test_it_trains(lm, given):
    own = tiny([m['content'] for c in CHATS for m in c['messages']], hidden=32, size=320, context=128)
    batch_at = on_policy_batches(own, CHATS, given, batches(given), replace(POLICY, replay=8), CONTEXT, 4, 0)
    history = fit(own.model, batch_at, lambda model, batch: dict(loss=lm_loss(model, batch)), 4, learning_rate=1e-3, micro_batch=1)
    assert len(history) == 4 and not own.model.training


# --- side by side

def test_with_a_weight_own_answers_are_rows_of_their_own(lm, given):
    batch = on_policy_batches(lm, CHATS, given, batches(given), replace(POLICY, share=1.0, student_weight=1.0), CONTEXT, STEPS, 0)(2)
    old = batches(given)(2)
    assert all(torch.equal(batch[name], value) for name, value in old.items()) and not batch['on_policy'].any()
    own = _roll_out(lm, [CHATS[n] for n in documents_in(given, batch_rows(len(given), 4, 2, 0))], POLICY, 0, 2, CONTEXT)
    assert sorted(ids for ids, _, _ in documents(batch, 'on_policy_')) == sorted(r.ids for r in own)
    assert batch['on_policy_count'] == batch['on_policy_loss_mask'].sum() == sum(r.length for r in own)


def test_a_weight_without_own_answers_has_no_own_rows_and_can_be_split(lm, given):
    batch = on_policy_batches(lm, CHATS, given, batches(given), replace(POLICY, share=1e-9, student_weight=1.0), CONTEXT, STEPS, 0)(0)
    assert batch['on_policy_input_ids'].shape == (0, CONTEXT) and batch['on_policy_count'] == 1
    assert all(len(part['on_policy_input_ids']) == 0 for part in micro_batches(batch, 1))


def test_the_weight_of_own_answers_grows_by_half():
    assert [student_weight_at(step, 3) for step in range(3)] == [1.0, 1.25, 1.5] and student_weight_at(0, 1) == 1
    assert student_weight_at(2, 3, 0.4) == pytest.approx(0.6) and student_weight_at(2, 3, 2.0) == 2


# --- the buffer

def made(n): return Rollout([n, n], [0, 1], True, False)


def test_the_buffer_keeps_the_last_and_draws_by_address():
    replay = ReplayBuffer(4, 0.5)
    replay.keep([made(n) for n in range(3)])
    replay.keep([made(n) for n in range(3, 6)])
    assert replay.rollouts == [made(n) for n in (2, 3, 4, 5)]
    assert sorted(r.ids[0] for r in replay.draw(4, 0, 0)) == [2, 3, 4, 5] and len(replay.draw(9, 0, 0)) == 9
    assert replay.draw(3, 0, 1) == replay.draw(3, 0, 1) and len({tuple(r.ids[0] for r in replay.draw(3, 0, s)) for s in range(9)}) > 3


def test_the_share_grows_only_when_the_validation_loss_has_risen():
    replay = ReplayBuffer(4, 0.75)
    assert [round(replay.raise_share(loss), 2) for loss in (3, 2, 2, 2.1, 2.05, 2.2, 2.3)] == [0.75, 0.75, 0.75, 0.85, 0.85, 0.95, 1.0]
    with pytest.raises(InputError, match='validation_loss is nan'): replay.raise_share(float('nan'))
    assert replay.share == 1 and replay.loss == 2.3


def test_its_state_survives_as_json_and_goes_on_alike(lm, given):
    policy = replace(POLICY, replay=6, share=0.8)
    replay = ReplayBuffer(6, 0.8)
    batch_at = on_policy_batches(lm, CHATS, given, batches(given), policy, CONTEXT, STEPS, 0, replay)
    for step in range(6): batch_at(step)
    other = ReplayBuffer(1, 0.0)
    other.load_state_dict(json.loads(json.dumps(replay.state_dict())))
    assert other == replay and len(other.rollouts) == 6
    resumed = on_policy_batches(lm, CHATS, given, batches(given), policy, CONTEXT, STEPS, 0, other)
    for step in range(6, 9):
        one, two = batch_at(step), resumed(step)
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert other == replay


def test_fresh_answers_grow_rarer_and_the_buffer_gives_the_rest(lm, given):
    replay = ReplayBuffer(5, 1.0)
    batch_at = on_policy_batches(lm, CHATS, given, batches(given), replace(POLICY, replay=5, share=1.0), CONTEXT, STEPS, 0, replay)
    assert batch_at(0)['rollout_share'] == 1 and len(replay.rollouts) == 5  # not full yet: all are fresh
    before = list(replay.rollouts)
    numbers = documents_in(given, batch_rows(len(given), 4, 9, 0))
    wanted = _answer_kinds(numbers, 1.0, 0.1, 0, 9)
    found = {tuple(ids) for ids, _, mine in documents(batch_at(9)) if any(mine)}
    kept = [r for r in replay.rollouts if r in before]
    assert Counter(wanted)['kept'] > 4 and len(kept) == 5 - min(5, Counter(wanted)['fresh'])
    assert len(found & {tuple(r.ids) for r in before}) >= 4


# --- what cannot work

@pytest.mark.parametrize('wrong', [dict(share=-0.1), dict(share=1.1), dict(share=float('nan')), dict(temperature=0), dict(temperature=-1.0),
                                   dict(temperature=float('inf')), dict(max_new_tokens=0), dict(replay=-1), dict(student_weight=2.5),
                                   dict(student_weight=-1)])
def test_settings_out_of_range_are_named(wrong):
    (name, _), = wrong.items()
    with pytest.raises(InputError, match=f'{name} is'): OnPolicy(**wrong)


def test_chats_that_do_not_belong_are_refused(lm, given):
    make = lambda chats, batch_at: on_policy_batches(lm, chats, given, batch_at, POLICY, CONTEXT, STEPS, 0)
    with pytest.raises(InputError, match='no conversations'): make([], batches(given))
    for others in (CHATS[:-1], CHATS[::-1]):
        with pytest.raises(InputError, match='are not the 24 packed'): make(others, batches(given))
    with pytest.raises(InputError, match='batch_at takes other rows'): make(CHATS, lambda step: batches(given)(step + 1))(0)


def test_a_conversation_without_an_answer_is_named(lm):
    for messages in (CHATS[0]['messages'][:1], [*CHATS[0]['messages'], CHATS[1]['messages'][0]], CHATS[0]['messages'][1:]):
        with pytest.raises(InputError, match="'Heat 1' does not end"): _roll_out(lm, [dict(paper_id='Heat 1', messages=messages)], POLICY)
