"""Stage 2 and its teacher: targets against plain forward passes, micro-batches, pre-flight, what a run keeps, and what it refuses."""
import copy
import json
import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from world import WORDS, changed, conversation, exact, sentence, small_student, small_teacher

from scilm_adapt import distill, files
from scilm_adapt.alignment import Teacher, TrainingData, pack_chats
from scilm_adapt.checkpoints import Checkpoints
from scilm_adapt.collapse import Collapse
from scilm_adapt.distill import (
    Recipe,
    _batches,
    _questions_of,
    _records_at,
    _turn_at,
    _weight_at,
    batch_maker,
    distil_loss,
    make_teacher,
    resolved,
    train,
)
from scilm_adapt.divergence import Divergence, dense_loss, divergences
from scilm_adapt.endpoint import Endpoint
from scilm_adapt.errors import InputError
from scilm_adapt.instruct import Chats
from scilm_adapt.models import LanguageModel, build, families, hidden_states, load, logits_of, tiny, weights_hash
from scilm_adapt.papers import Corpus, document
from scilm_adapt.recipe import lora
from scilm_adapt.rollouts import OnPolicy, on_policy_batches
from scilm_adapt.runs import Run
from scilm_adapt.teacher import LiveTeacher, build_cache
from scilm_adapt.tokens import asked_tokens, batch_rows, encode, encode_chat, encode_document, end_of_turn, pack, train_tokenizer
from scilm_adapt.training import lm_loss, micro_batches, part_of, target_states

PAPERS = [dict(id=str(n), title=sentence(n + 2000, 3), text=sentence(n + 3000, 12)) for n in range(40)]
TOKENIZER = train_tokenizer([document(paper) for paper in PAPERS], 400)


@pytest.fixture(scope='module')
def student() -> LanguageModel: return small_student(TOKENIZER)


@pytest.fixture(scope='module')
def teacher() -> LanguageModel: return small_teacher(TOKENIZER)


@pytest.fixture
def data(tmp_path) -> dict:
    chats = [conversation(number) for number in range(30)]
    folders = [tmp_path/'chats', tmp_path/'corpus']
    for folder in folders: folder.mkdir()
    return dict(chats=Chats(chats[:20], chats[20:25], chats[25:], folders[0]),
                corpus=Corpus(dict(train=PAPERS[:30], valid=PAPERS[30:], test=PAPERS[30:]), dict(valid=[]), folders[1]))


SETTINGS = dict(steps=3, batch_size=3, context=64, learning_rate=1e-2, divergence='forward_kl')
# with probe_every=0 where the teacher is chance and far away is good


def first_batch(chats: list[dict], context: int = 64, papers: list[dict] = PAPERS, rows: int = 4) -> dict:
    science = pack([encode_document(TOKENIZER, document(paper)) for paper in papers], context)
    return batch_maker(pack_chats(TOKENIZER, chats, context), science, rows, rows - 1, seed=0)(0)


# --- the teacher

@pytest.mark.parametrize('family', families(1, 1, 1, 1, 1))
def test_targets_equal_a_forward_pass_of_each_conversation_alone(family):
    lm, chats = exact(build(TOKENIZER, family, context=128)), [conversation(number) for number in range(6)]
    packed = pack_chats(TOKENIZER, chats, 96)
    rows = list(range(len(packed)))
    targets, owners = LiveTeacher(lm).targets(packed.batch(rows)), packed.documents[:, 1:][packed.loss_mask[:, 1:]]
    for number, chat in enumerate(chats):
        ids, mask = encode_chat(TOKENIZER, chat['messages'])
        with torch.no_grad(): alone = lm.model(torch.tensor([ids])).logits[0]
        wanted = alone[[place - 1 for place, learnt in enumerate(mask) if learnt]]
        torch.testing.assert_close(targets[owners == number], wanted, rtol=1e-10, atol=1e-10)


def test_teacher_is_in_evaluation_mode_and_never_changed(teacher):
    lm = replace(teacher, model=copy.deepcopy(teacher.model))
    lm.model.config.attention_dropout = 0.9
    batch, before = first_batch([conversation(1)]), weights_hash(lm.model)
    lm.model.train()
    first, second = (LiveTeacher(lm).targets(batch) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad and weights_hash(lm.model) == before
    assert first.shape == (int(batch['count']), len(TOKENIZER))


def test_targets_can_be_used_in_a_backward_pass_and_under_autocast(student, teacher):
    batch = first_batch([conversation(number) for number in range(8)])
    with torch.autocast('cpu', torch.bfloat16):
        loss = distil_loss(LiveTeacher(teacher), retention_weight=1.0)(copy.deepcopy(student.model), batch)['loss']
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_teacher_that_is_no_number_is_named(teacher, value):
    model = copy.deepcopy(teacher.model)
    torch.nn.init.constant_(model.get_output_embeddings().weight[:1], value)
    with pytest.raises(FloatingPointError, match="The teacher 'wreck'"):
        LiveTeacher(LanguageModel(model, TOKENIZER, 'wreck')).targets(first_batch([conversation(1)]))


# --- the loss

def test_loss_is_the_sum_of_its_parts_as_defined(student, teacher):
    student, teacher = exact(student), exact(teacher)
    batch = first_batch([conversation(number) for number in range(12)])
    with torch.no_grad():
        parts = distil_loss(LiveTeacher(teacher), 'jsd beta=0.1', 2.0, 0.3, 0.2)(student.model, batch)
        states, labels = target_states(hidden_states(student.model, batch), batch)
        logits = logits_of(student.model, states)
        mask = torch.ones(len(logits), dtype=torch.bool)
        distil = dense_loss(logits, LiveTeacher(teacher).targets(batch), mask, 'jsd beta=0.1', 2.0)
        science = part_of(batch, 'papers')
        torch.testing.assert_close(parts['distil'], distil)
        torch.testing.assert_close(parts['retention'], lm_loss(student.model, science))
        torch.testing.assert_close(parts['answers'], -logits.log_softmax(-1)[range(len(labels)), labels].mean())
        torch.testing.assert_close(parts['loss'], parts['distil'] + 0.3*parts['retention'] + 0.2*parts['answers'])


@pytest.mark.parametrize('end_weight', [0.0, 1.0, 4.0])
def test_the_end_of_an_answer_counts_as_often_as_is_said_where_a_teacher_has_a_say(student, teacher, end_weight):
    student, teacher, end = exact(student), exact(teacher), end_of_turn(TOKENIZER)
    batch = first_batch([conversation(number) for number in range(12)])
    settings = dict(answer_weight=0.2, end=end, end_weight=end_weight)
    with torch.no_grad():
        parts = distil_loss(LiveTeacher(teacher), **settings)(student.model, batch)
        states, labels = target_states(hidden_states(student.model, batch), batch)
        logprobs = logits_of(student.model, states).log_softmax(-1)
        alone, warming = (loss(student.model, batch)['answers'] for loss in (
            distil_loss(None, **settings), distil_loss(LiveTeacher(teacher), **settings, warm_up=3)))
    naive = sum(-logprobs[n, label].item()*(end_weight if label == end else 1) for n, label in enumerate(labels.tolist()))/len(labels)
    assert (labels == end).sum() > 3 and parts['answers'].item() == pytest.approx(naive, rel=1e-12)
    assert alone == warming == pytest.approx(-logprobs[range(len(labels)), labels].mean().item(), rel=1e-12)


@pytest.mark.parametrize('share', [0.2, 1/3, 0.8])
@pytest.mark.parametrize('end_weight', [1.0, 4.0])
def test_how_often_the_best_student_ends_is_as_written(share, end_weight):
    "By descent on the probability of an end alone, against a teacher that never ends; forward KL, in float64."
    logit = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logit], max_iter=100, tolerance_grad=1e-12, tolerance_change=0)
    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        goes_on, ends = -torch.nn.functional.logsigmoid(-logit), -torch.nn.functional.logsigmoid(logit)
        value = (share*(goes_on + 0.5*end_weight*ends) + (1 - share)*1.5*goes_on).sum()  # KL to a teacher that goes on is -log(1 - Q)
        value.backward()
        return value
    optimiser.step(loss)
    expected = 0.5*end_weight*share/(0.5*end_weight*share + share + 1.5*(1 - share))
    assert logit.sigmoid().item() == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(share/3 if end_weight == 1 else 4/3*share/(1 + share))


def test_a_part_of_weight_zero_is_not_computed(student, teacher):
    batch = {name: value for name, value in first_batch([conversation(1)]).items() if not name.startswith('papers_')}
    assert distil_loss(LiveTeacher(teacher))(student.model, batch).keys() == {'loss', 'distil'}


@pytest.mark.parametrize('rows', [1, 2, 4, 16])
def test_micro_batches_give_the_same_loss_and_gradient(student, teacher, rows):
    "Also where a part has conversations and no papers: there are fewer rows of papers than parts."
    student, teacher = exact(student), exact(teacher)
    loss = distil_loss(LiveTeacher(teacher), retention_weight=0.5, answer_weight=0.1)
    batch, gradients, values = first_batch([conversation(number) for number in range(20)], rows=8), [], []
    batch = {name: value[:2] if name.startswith('papers_') and value.ndim else value for name, value in batch.items()}
    for size in (None, rows):
        model = copy.deepcopy(student.model)
        parts = [loss(model, part) for part in micro_batches(batch, size)]
        sum(part['loss'] for part in parts).backward()
        values.append({name: sum(part[name].item() for part in parts) for name in parts[0]})
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert values[0] == pytest.approx(values[1], rel=1e-10)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(student):
    assert distil_loss(LiveTeacher(student))(student.model, first_batch([conversation(1)]))['loss'].abs() < 1e-6


def test_long_conversations_are_left_out_whole(capsys):
    chats = [conversation(number) for number in range(3)]
    chats[1]['messages'][0]['content'] = ' '.join(WORDS*9)
    packed = pack_chats(TOKENIZER, chats, 64)
    assert '1 of 3 conversations are longer than 64 tokens' in capsys.readouterr().out
    assert packed.loss_mask.sum() == sum(sum(encode_chat(TOKENIZER, chats[n]['messages'])[1]) for n in (0, 2))
    with pytest.raises(InputError, match='None of the 1 conversations fits into 64 tokens'): pack_chats(TOKENIZER, chats[1:2], 64)
    with pytest.raises(InputError, match='no conversations'): pack_chats(TOKENIZER, [], 64)


# --- the stage

def test_train_keeps_the_result_and_leaves_both_models_alone(student, teacher, data, tmp_path, capsys):
    run, base = Run(tmp_path/'run'), changed(student, chat_template=None)
    before = weights_hash(base.model), weights_hash(teacher.model)
    distilled = train(run, base, teacher, **data, **SETTINGS, answer_weight=0.1)
    assert (weights_hash(base.model), weights_hash(teacher.model)) == before and base.tokenizer.chat_template is None
    folder = run.folder/'models'/'distilled'
    assert distilled.name == 'distilled' and weights_hash(load(folder, 'cpu').model) == weights_hash(distilled.model) != before[0]
    assert distilled.tokenizer.chat_template == teacher.tokenizer.chat_template
    history = json.loads((folder/'history.json').read_text())
    assert len(history) == 3 and {'loss', 'distil', 'retention', 'answers'} <= history[0].keys()
    assert json.loads((folder/'advantage.json').read_text())['the papers']['chats'] == 5
    config = json.loads((folder/'manifest.json').read_text())['config']
    assert config['student'] == before[0] and config['teacher'] == before[1] and config['retention_weight'] == 0.5

    capsys.readouterr()
    again = train(run, base, teacher, **data, **SETTINGS, answer_weight=0.1)
    assert 'kept' in capsys.readouterr().out and weights_hash(again.model) == weights_hash(distilled.model)
    train(run, base, teacher, **data, **SETTINGS | dict(divergence='jsd beta=0.1'), retention_weight=0, answer_weight=0)
    assert 'kept' not in capsys.readouterr().out
    history = json.loads((folder/'history.json').read_text())
    assert not {'retention', 'answers'} & history[0].keys()


def test_training_is_a_function_of_its_arguments(student, teacher, data, tmp_path):
    def weights(name, **changes): return weights_hash(train(Run(tmp_path/name), student, teacher, **data, **SETTINGS | changes).model)
    assert weights('a') == weights('b') != weights('c', seed=1)
    assert weights('d', temperature=2.0) != weights('a') != weights('e', retention_rows=1)


def test_training_approaches_the_teacher(student, teacher, data, tmp_path):
    train(Run(tmp_path/'run'), student, teacher, **data, **SETTINGS | dict(steps=20), retention_weight=0, answer_weight=0,
          micro_batch=2)
    history = json.loads((tmp_path/'run'/'models'/'distilled'/'history.json').read_text())
    assert history[-1]['distil'] < 0.9*history[0]['distil']


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(divergence='kl'), "'kl' is no known divergence"), (dict(temperature=-1.0), 'temperature'),
    (dict(divergence='jsd beta=2'), 'beta is 2.0'),
    (dict(end_weight=-1.0), 'end_weight is -1.0'),
    (dict(context=4096), 'context is 4096 tokens.*set context to at most'), (dict(context=8), 'None of the 20 conversations fits')])
def test_what_cannot_work_is_refused_and_leaves_nothing(student, teacher, data, tmp_path, changes, message):
    with pytest.raises(InputError, match=message): train(Run(tmp_path/'run'), student, teacher, **data, **SETTINGS | changes)
    assert [path for path in (tmp_path/'run').rglob('[!.]*') if path.is_file()] == []


def test_a_teacher_without_template_and_no_conversations_are_refused(student, teacher, data, tmp_path):
    with pytest.raises(InputError, match='no aligned model'):
        train(Run(tmp_path/'run'), student, changed(teacher, chat_template=None), **data, **SETTINGS)
    with pytest.raises(InputError, match='no conversations'):
        train(Run(tmp_path/'run'), student, teacher, replace(data['chats'], train=[]), data['corpus'], **SETTINGS)
    with pytest.raises(InputError, match='nothing to learn'):
        train(Run(tmp_path/'run'), student, teacher, data['chats'], replace(data['corpus'], science=dict(train=[])), **SETTINGS)


def test_a_broken_teacher_does_not_replace_good_weights(student, teacher, data, tmp_path):
    run = Run(tmp_path/'run')
    good = weights_hash(train(run, student, teacher, **data, **SETTINGS).model)
    broken = LanguageModel(copy.deepcopy(teacher.model), TOKENIZER, 'broken')
    torch.nn.init.constant_(broken.model.get_output_embeddings().weight, math.nan)
    with pytest.raises(FloatingPointError, match="'broken'"): train(run, student, broken, **data, **SETTINGS)
    assert weights_hash(load(run.folder/'models'/'distilled', 'cpu').model) == good


def test_a_new_stage_1_makes_stage_2_run_again(student, teacher, data, tmp_path, capsys):
    run = Run(tmp_path/'run')
    for text, kept in (('one', False), ('one', True), ('two', False)):
        (run.folder/'models'/'contrast').mkdir(parents=True, exist_ok=True)
        (run.folder/'models'/'contrast'/'weights').write_text(text)
        train(run, student, teacher, **data, **SETTINGS)
        assert ('distilled: already done' in capsys.readouterr().out) == kept


# --- other teachers of the stage

def history_of(run: Run) -> list[dict]: return json.loads((run.folder/'models'/'distilled'/'history.json').read_text())


def test_a_shift_changes_what_is_learnt_and_is_part_of_the_key(student, teacher, data, tmp_path, capsys):
    run, base = Run(tmp_path/'run'), build(TOKENIZER, hidden=32, layers=1, context=128, name='base', seed=5)
    before = [weights_hash(lm.model) for lm in (student, teacher, base)]
    plain = weights_hash(train(run, student, teacher, **data, **SETTINGS).model)
    found = {weights_hash(train(run, student, teacher, **data, **SETTINGS, shift=shift, base=base).model) for shift in (0.5, 1.0)}
    assert len(found | {plain}) == 3 and [weights_hash(lm.model) for lm in (student, teacher, base)] == before
    capsys.readouterr()
    same = train(run, student, teacher, **data, **SETTINGS, shift=1.0, base=base, trackers='tensorboard')  # who watches changes nothing
    assert 'distilled: already done' in capsys.readouterr().out and weights_hash(same.model) in found
    other = build(TOKENIZER, hidden=32, layers=1, context=128, name='base', seed=6)
    assert weights_hash(train(run, student, teacher, **data, **SETTINGS, shift=1.0, base=other).model) not in found
    assert weights_hash(train(run, student, teacher, **data, **SETTINGS, base=base).model) == plain         # no shift, no base


def test_a_shift_may_change_along_the_training(student, teacher, data, tmp_path):
    base = build(TOKENIZER, hidden=32, layers=1, context=128, name='base', seed=7)
    def weights(name, shift, **changes):
        return weights_hash(train(Run(tmp_path/name), student, teacher, base=base, **data, **SETTINGS | changes, shift=shift).model)
    assert weights('a', (0.5, 0.5)) == weights('b', 0.5) != weights('c', (0.0, 1.0))
    with pytest.raises(InputError, match='alpha changes from step to step'): weights('d', (0.0, 1.0), cache=4)


def test_the_student_itself_as_base_shifts_nothing(student, teacher, data, tmp_path):
    live, shifted = (train(Run(tmp_path/name), student, teacher, **data, **SETTINGS, **more).model for name, more in (
        ('live', {}), ('shifted', dict(shift=0.7, base=student))))
    assert weights_hash(live) == weights_hash(shifted)


def test_a_cache_is_a_stage_of_its_own_and_is_asked_once(student, teacher, data, tmp_path, capsys, monkeypatch):
    run = Run(tmp_path/'run')
    settings = SETTINGS | dict(retention_weight=0, answer_weight=0)
    train(run, student, teacher, **data, **settings)
    live = history_of(run)
    train(run, student, teacher, **data, **settings, cache=300)
    assert 'targets: ' in capsys.readouterr().out and (run.folder/'targets'/'manifest.json').is_file()
    for one, other in zip(live, history_of(run)):  # the draws' noise; the nll is 5.7
        assert other['distil'] == pytest.approx(one['distil'], abs=0.02)
    assert not (run.folder/'.unfinished').exists()

    def never(*_): raise AssertionError('the teacher was asked again')
    monkeypatch.setattr(LiveTeacher, 'logits_at', never)
    train(run, student, teacher, **data, **settings | dict(steps=4), cache=300)                              # more steps, same targets
    assert 'targets: already done' in capsys.readouterr().out and len(history_of(run)) == 4
    for change in (dict(cache=301), dict(seed=1), dict(temperature=2.0)):
        with pytest.raises(AssertionError, match='asked again'):
            train(run, student, teacher, **data, **settings | dict(cache=300) | change)
    with pytest.raises(AssertionError, match='asked again'):
        train(run, teacher, build(TOKENIZER, hidden=32, layers=1, context=128, seed=8), **data, **settings, cache=300)


def test_a_shifted_teacher_is_cached_and_a_stopped_build_goes_on(student, teacher, data, tmp_path, monkeypatch):
    run, base = Run(tmp_path/'run'), build(TOKENIZER, hidden=32, layers=1, context=128, name='base', seed=5)
    settings = SETTINGS | dict(cache=8, shift=0.5, base=base)
    (run.folder/'.unfinished'/'targets-0123456789ab').mkdir(parents=True)                                    # of other settings
    monkeypatch.setattr('scilm_adapt.distill.build_cache', partial(build_cache, shard=20))
    real, calls = LiveTeacher.logits_at, []
    def stopping(self, batch, size):
        if len(calls) == 4: raise KeyboardInterrupt
        calls.append(self)
        return real(self, batch, size)
    monkeypatch.setattr(LiveTeacher, 'logits_at', stopping)
    with pytest.raises(KeyboardInterrupt): train(run, student, teacher, **data, **settings)
    begun, = (run.folder/'.unfinished').glob('targets-*')
    kept = {file.name: file.stat().st_mtime_ns for file in begun.glob('*.bin')}
    assert kept and not (run.folder/'targets').exists() and not (run.folder/'models'/'distilled').exists()
    monkeypatch.setattr(LiveTeacher, 'logits_at', real)
    train(run, student, teacher, **data, **settings)
    made = {file.name: file.stat().st_mtime_ns for file in (run.folder/'targets').glob('*.bin')}
    assert kept.items() < made.items() and not (run.folder/'.unfinished').exists()


def test_a_damaged_cache_of_a_run_is_named_and_made_anew(student, teacher, data, tmp_path, capsys):
    run = Run(tmp_path/'run')
    train(run, student, teacher, **data, **SETTINGS, cache=4)
    shard, = (run.folder/'targets').glob('*.bin')
    good = shard.read_bytes()
    shard.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    capsys.readouterr()
    train(run, student, teacher, **data, **SETTINGS | dict(steps=2), cache=4)
    assert f'targets: targets/{shard.name} has other content than was written; made anew' in capsys.readouterr().out
    assert shard.read_bytes() == good


class Killed(BaseException):
    "Raised in place of a kill -9, of which the tests of faults have real ones."


@pytest.mark.parametrize('way', [
    {}, dict(on_policy=OnPolicy(share=0.5, max_new_tokens=6, replay=8), probe_every=3),
    dict(lora_rank=4, probe_every=2, answer_weight=0.1), dict(cache=4, probe_every=0), dict(alternate=2, lora_rank=4),
    dict(read_questions=True, reference_weight=0.2),
    dict(alternate=2, on_policy=OnPolicy(share=0.5, max_new_tokens=6, replay=8), probe_every=3),
    dict(divergence='skew_kl', on_policy=OnPolicy(share=1.0, max_new_tokens=6, student_weight=1.0), probe_every=0)],
    ids=lambda way: ' '.join(way) or 'plain')
def test_a_training_that_was_stopped_comes_to_the_same_weights_and_history(student, teacher, data, tmp_path, way, monkeypatch):
    settings, found = SETTINGS | dict(steps=9, micro_batch=2, learning_rate=1e-3) | way, {}
    timeless = {'tokens_per_second', 'probe_seconds'}
    def run_to_the_end(name):
        run = Run(tmp_path/name)
        found[name] = weights_hash(train(run, student, teacher, **data, **settings).model), [
            {key: value for key, value in row.items() if key not in timeless} for row in history_of(run)]
    run_to_the_end('whole')
    monkeypatch.setattr('scilm_adapt.recipe.Checkpoints', partial(Checkpoints, steps=2))
    at, steps = [3, 4, 7], []
    def dying(step, **kwargs):
        steps.append(step)
        if at and step == at[0]: raise Killed(at.pop(0))
    real = distill._batches
    def batches(*arguments):
        batch_at = real(*arguments)
        return lambda step: dying(step) or batch_at(step)
    monkeypatch.setattr(distill, '_batches', batches)
    for _ in range(3):
        with pytest.raises(Killed): run_to_the_end('stopped')
    run_to_the_end('stopped')
    assert found['stopped'] == found['whole'] and steps == [0, 1, 2, 3, 2, 3, 4, 4, 5, 6, 7, 6, 7, 8]


def test_bad_numbers_are_refused_with_the_records_of_their_step(student, teacher, data, tmp_path, monkeypatch):
    real = distill.distil_loss
    def spoilt(*arguments, **options):
        loss = real(*arguments, **options)
        return lambda model, batch: {name: value*(math.nan if int(batch['step']) == 1 else 1) for name, value in loss(model, batch).items()}
    monkeypatch.setattr(distill, 'distil_loss', spoilt)
    with pytest.raises(FloatingPointError, match=r'distil: step 1 gave a loss of nan.*its records: explanation of \d+, ') as told:
        train(Run(tmp_path/'run'), student, teacher, **data, **SETTINGS | dict(probe_every=0))
    step = batch_maker(pack_chats(TOKENIZER, data['chats'].train, 64), None, 3, 0, 0)(1)['input_ids']
    named = [int(n) for n in re.findall(r'explanation of (\d+)', str(told.value))]
    texts = [TOKENIZER.decode(row) for row in step]
    assert named and all(any(data['chats'].train[n]['reference'] in text for text in texts) for n in named)
    assert not (tmp_path/'run'/'models'/'distilled').exists()


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(shift=0.5), 'give base, or shift=0'), (dict(shift=math.nan), 'shift is nan'), (dict(cache=-1), 'cache is -1'),
    (dict(cache=8, divergence='jsd'), "'jsd' cannot be had from a cache, because draws .* choose forward_kl, or set cache to 0"),
    (dict(cache=10**6), 'cache is 1,000,000; .* at most the'), (dict(teacher=None), 'set divergence_weight to 0'),
    (dict(cache=4, on_policy=OnPolicy(share=0.5)), 'on_policy.share is 0.5, and a cache knows given answers only'),
    (dict(lora_rank=-1), 'rank is -1'),
    (dict(authors=()), "authors of answers are ''"), (dict(authors=('reader',)), "are 'reader'; name paper"),
    (dict(on_policy=OnPolicy(share=1.0, student_weight=1.0)),
     "'forward_kl' pulls .*; choose skew_kl or adaptive_skew_kl"),
    (dict(teacher=Endpoint('http://127.0.0.1:9/v1'), divergence='jsd'), "'jsd' cannot be had from a server"),
    (dict(teacher=Endpoint('http://127.0.0.1:9/v1'), shift=0.5, base='same'), 'shift is 0.5, and a server cannot be shifted'),
    (dict(shift=0.5, base='foreign'), 'different vocabularies')])
def test_teachers_that_cannot_work_are_refused(student, teacher, data, tmp_path, changes, message):
    bases = dict(foreign=tiny(['Quite other words in there.']), same=student)
    changes = dict(teacher=teacher) | changes | (dict(base=bases[changes['base']]) if 'base' in changes else {})
    with pytest.raises(InputError, match=message): train(Run(tmp_path/'run'), student, **data, **SETTINGS | changes)
    assert [path for path in (tmp_path/'run').rglob('[!.]*') if path.is_file()] == []

# --- what is read, and when

TALKS = [conversation(number) for number in range(20)]
TALKS[3]['messages'] += [dict(role='user', content='Что такое тепло?'), dict(role='assistant', content='Heat.')]  # two turns, two languages
TALKS[5]['kind'] = 'general'


def talks(context: int = 96) -> TrainingData: return TrainingData(pack_chats(TOKENIZER, TALKS, context), TALKS, None)


def test_only_what_a_user_says_about_a_paper_counts_as_asked():
    data = talks()
    questions = _questions_of(TOKENIZER, data)
    for number, (start, stop) in enumerate(zip(questions.tokens.starts, questions.tokens.starts[1:])):
        ids, messages = questions.tokens.ids[start:stop], TALKS[number]['messages']
        said = [i for message in messages if message['role'] == 'user' for i in encode(TOKENIZER, message['content'])]
        asked = ids[questions.token_loss_mask[start:stop]].tolist()
        assert asked == ([] if TALKS[number]['kind'] == 'general' else said)
        marks, learnt = asked_tokens(TOKENIZER, messages), encode_chat(TOKENIZER, messages)[1]
        assert len(marks) == len(learnt) and not any(one and other for one, other in zip(marks, learnt))


@pytest.mark.parametrize('adapters', [0, 4])
@pytest.mark.parametrize('rows', [None, 1, 3])
def test_questions_are_read_as_a_naive_loop_reads_them(student, teacher, rows, adapters):
    "Each conversation alone, unpacked and without padding, by plain forward passes: the values, and the gradients."
    student, teacher = exact(student), exact(teacher)
    if adapters:
        lora(student.model, adapters)
        for name, parameter in student.model.named_parameters():  # the adapters begin as nothing
            if 'lora_B' in name: torch.nn.init.constant_(parameter, 0.01)
    student.model.double()
    data = talks()
    batch = batch_maker(data.conversations, None, len(data.conversations), 0, 0, _questions_of(TOKENIZER, data))(0)
    assert (batch['segments'] == 0).any() and not (batch['papers_loss_mask'] & batch['loss_mask']).any()
    loss = distil_loss(LiveTeacher(teacher), retention_weight=0.5, reference_weight=0.2, reference=LiveTeacher(teacher), answer_weight=0.1)
    parts = [loss(student.model, part) for part in micro_batches(batch, rows)]
    sums = dict.fromkeys(('answers', 'distil', 'retention', 'reference'), 0.0)
    for chat in TALKS:
        ids, learnt = encode_chat(TOKENIZER, chat['messages'])
        asked = [0]*len(ids) if chat['kind'] == 'general' else asked_tokens(TOKENIZER, chat['messages'])
        own = student.model(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
        with torch.no_grad(): other = teacher.model(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
        away = (other.exp()*(other - own)).sum(-1)
        for place, (i, answer, question) in enumerate(zip(ids[1:], learnt[1:], asked[1:])):
            if answer: sums['answers'], sums['distil'] = sums['answers'] - own[place, i], sums['distil'] + away[place]
            if question: sums['retention'], sums['reference'] = sums['retention'] - own[place, i], sums['reference'] + away[place]
    counts = [sum(sum(encode_chat(TOKENIZER, chat['messages'])[1]) for chat in TALKS),
              sum(sum(asked_tokens(TOKENIZER, chat['messages'])) for chat in TALKS if chat['kind'] != 'general')]
    assert [batch['count'], batch['papers_count']] == counts
    wanted = {name: total/counts[name in ('retention', 'reference')] for name, total in sums.items()}
    for name, value in wanted.items(): torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-9, atol=1e-12)
    whole = wanted['distil'] + 0.5*wanted['retention'] + 0.2*wanted['reference'] + 0.1*wanted['answers']
    trained = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    found, naive = (torch.autograd.grad(total, trained) for total in (sum(part['loss'] for part in parts), whole))
    for one, other in zip(found, naive): torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_the_rows_of_a_batch_are_run_once_whatever_is_learnt_from_them(student, teacher, monkeypatch):
    runs, real, data = [], distill.hidden_states, talks()
    monkeypatch.setattr(distill, 'hidden_states', lambda model, rows: runs.append(rows['input_ids'].shape) or real(model, rows))
    batch = batch_maker(data.conversations, None, 3, 0, 0, _questions_of(TOKENIZER, data))(0)
    loss = distil_loss(LiveTeacher(teacher), retention_weight=0.5, answer_weight=0.1)
    assert loss(student.model, batch).keys() == {'loss', 'distil', 'answers', 'retention'} and len(runs) == 1


@pytest.mark.parametrize(('alternate', 'wanted'), [(0, 'bbbbbb'), (1, 'crcrcr'), (2, 'ccrccr'), (5, 'cccccr')])
def test_steps_take_turns(alternate, wanted):
    turns = [_turn_at(step, alternate) for step in range(6)]
    assert ''.join({(True, True): 'b', (True, False): 'c', (False, True): 'r'}[turn[:2]] for turn in turns) == wanted
    for kind in {turn[:2] for turn in turns}:  # steps of a kind are counted without a gap
        assert [number for *turn, number in turns if tuple(turn) == kind] == list(range(wanted.count(wanted[turns.index(
            next(t for t in turns if t[:2] == kind))])))


def test_a_step_holds_rows_of_one_kind_and_learns_as_it_would_alone(student, teacher):
    "Conversations and papers in their turns are those of separate trainings, in the same order, and so are the losses."
    student, teacher, data = exact(student), exact(teacher), talks()
    papers = pack([encode_document(TOKENIZER, document(paper)) for paper in PAPERS], 96)
    recipe = Recipe(steps=9, batch_size=2, context=96, alternate=2, retention_weight=0.5, answer_weight=0.1, seed=3)
    batch_at = _batches(student, data, papers, recipe, 0, None, {})
    loss = distil_loss(LiveTeacher(teacher), retention_weight=0.5, answer_weight=0.1, steps=9, alternate=2)
    alone = distil_loss(LiveTeacher(teacher), answer_weight=0.1)
    talk_at, talked, read = batch_maker(data.conversations, None, 2, 0, 3), 0, 0
    for step in range(9):
        batch = batch_at(step)
        assert batch['input_ids'].shape == (2, 96) and batch['step'] == step
        parts = loss(student.model, batch)
        if step % 3 == 2:
            rows = papers.batch(batch_rows(len(papers), 2, read, 3))
            assert torch.equal(batch['input_ids'], rows['input_ids']) and parts.keys() == {'loss', 'retention'}
            torch.testing.assert_close(parts['loss'], 0.5*lm_loss(student.model, rows))
            torch.testing.assert_close(parts['loss'], sum(loss(student.model, part)['loss'] for part in micro_batches(batch, 1)))
            assert all(name in {paper['id'] for paper in PAPERS} for name in _records_at(data, PAPERS, papers, recipe, step))
            read += 1
        else:
            assert torch.equal(batch['input_ids'], talk_at(talked)['input_ids']) and parts.keys() == {'loss', 'distil', 'answers'}
            torch.testing.assert_close(parts['loss'], alone(student.model, talk_at(talked))['loss'])
            assert all(' of ' in name for name in _records_at(data, PAPERS, papers, recipe, step))
            talked += 1


def test_in_the_papers_turn_no_teacher_is_asked(student, data, tmp_path):
    class Counting(Teacher):
        open, asked = True, []
        refuses = {}
        def loss(self, batch, states, *rest, **options):
            self.asked.append(int(batch['step']))
            return states.sum()*0
    train(Run(tmp_path/'run'), student, Counting(), **data, **SETTINGS | dict(steps=6, alternate=1, probe_every=0))
    assert Counting.asked == [0, 2, 4]
    assert ['retention' in row for row in history_of(Run(tmp_path/'run'))] == [False, True]*3


def test_a_step_whose_weights_are_all_zero_changes_nothing(student, teacher):
    student, batch = exact(student), first_batch([conversation(1)])
    loss = distil_loss(LiveTeacher(teacher), divergence_weight=(1.0, 0.0), retention_weight=0.5, steps=4, alternate=2)
    found = loss(student.model, batch | dict(step=torch.tensor(3)))
    found['loss'].backward()
    assert found.keys() == {'loss'} and not any(weight.grad.any() for weight in student.model.parameters() if weight.grad is not None)


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(alternate=-1), 'alternate is -1, of 3 steps'), (dict(alternate=3), 'alternate is 3, of 3 steps; give fewer'),
    (dict(alternate=1, retention_weight=0.0), 'nothing is learnt of papers; set retention_weight'),
    (dict(alternate=1, read_questions=True), 'read_questions leaves no rows of papers'),
    (dict(read_questions=True, on_policy=OnPolicy(share=0.5)), 'read_questions is on, .*on_policy.share')])
def test_turns_that_cannot_be_are_refused(student, teacher, data, tmp_path, changes, message):
    with pytest.raises(InputError, match=message): train(Run(tmp_path/'run'), student, teacher, **data, **SETTINGS | changes)


# --- weights, own answers, other teachers

@pytest.mark.parametrize(('weight', 'at'), [(0.5, [0.5, 0.5, 0.5]), ((0.0, 1.0), [0.0, 0.5, 1.0]), ([1.0, 0.5], [1.0, 0.75, 0.5])])
def test_a_weight_is_a_number_or_a_straight_line(weight, at):
    assert [_weight_at(weight, step, 3) for step in range(3)] == at and _weight_at(weight, 0, 1) == at[0]


def test_a_scheduled_weight_is_that_of_the_batchs_step(student, teacher):
    student, teacher = exact(student), exact(teacher)
    batch = first_batch([conversation(number) for number in range(12)])
    loss = distil_loss(LiveTeacher(teacher), retention_weight=(0.0, 1.0), steps=5)
    with torch.no_grad(): found = [loss(student.model, batch | dict(step=torch.tensor(step))) for step in (0, 2)]
    assert 'retention' not in found[0]
    torch.testing.assert_close(found[1]['loss'], found[1]['distil'] + 0.5*found[1]['retention'])


def test_the_reference_holds_the_student_to_what_it_said_of_papers(student, teacher):
    student, teacher = exact(student), exact(teacher)
    batch = first_batch([conversation(number) for number in range(12)])
    science = part_of(batch, 'papers')
    loss = distil_loss(None, divergence_weight=0.0, reference_weight=0.7, reference=LiveTeacher(teacher))
    with torch.no_grad():
        parts = loss(student.model, batch)
        states, _ = target_states(hidden_states(student.model, science), science)
        expected = dense_loss(logits_of(student.model, states), LiveTeacher(teacher).targets(science), torch.ones(len(states)) > 0)
    torch.testing.assert_close(parts['reference'], expected)
    torch.testing.assert_close(parts['loss'], 0.7*expected)


def own_batch(student, student_weight: float = 0.0) -> tuple[dict, dict]:
    "A batch with answers of the student's own, and the given one."
    chats = [conversation(number) for number in range(12)]
    conversations = pack_chats(TOKENIZER, chats, 64)
    given = batch_maker(conversations, None, 4, 0, seed=0)
    policy = OnPolicy(share=1.0 if student_weight else 0.5, max_new_tokens=8, student_weight=student_weight)
    return on_policy_batches(student, chats, conversations, given, policy, 64, 10, 0)(3), given(3)


def test_own_words_teach_nothing_but_are_judged(student, teacher):
    student, teacher = exact(student), exact(teacher)
    batch, _ = own_batch(student)
    own = batch['on_policy'][:, 1:][batch['loss_mask'][:, 1:]]
    assert 0 < own.sum() < len(own)
    with torch.no_grad():
        parts = distil_loss(LiveTeacher(teacher), 'jsd', answer_weight=0.5)(student.model, batch)
        states, labels = target_states(hidden_states(student.model, batch), batch)
        logits = logits_of(student.model, states)
        nll = -logits.log_softmax(-1)[range(len(labels)), labels]
        judged = dense_loss(logits, LiveTeacher(teacher).targets(batch), torch.ones(len(own), dtype=torch.bool), 'jsd')
    torch.testing.assert_close(parts['answers'], nll[~own].sum()/len(own))
    torch.testing.assert_close(parts['distil'], judged)


def test_given_answers_are_pulled_up_and_own_ones_pushed_down_with_their_weights(student, teacher):
    student, teacher = exact(student), exact(teacher)
    batch, given = own_batch(student, 1.0)
    assert torch.equal(batch['input_ids'], given['input_ids']) and len(batch['on_policy_input_ids'])
    own = part_of(batch, 'on_policy')
    loss = distil_loss(LiveTeacher(teacher), 'skew_kl', student_weight=1.0, steps=10)
    with torch.no_grad():
        parts = loss(student.model, batch)
        for name, rows, kind in (('distil', given, 'skew_kl'), ('on_policy', own, 'skew_reverse_kl')):
            states, _ = target_states(hidden_states(student.model, rows), rows)
            expected = dense_loss(logits_of(student.model, states), LiveTeacher(teacher).targets(rows), torch.ones(len(states)) > 0, kind)
            torch.testing.assert_close(parts[name], expected)
    weight = 1 + 0.5*3/9  # DistiLLM-2: from 1 to 1.5
    torch.testing.assert_close(parts['loss'], (2 - weight)*parts['distil'] + weight*parts['on_policy'])
    torch.testing.assert_close(loss(student.model, batch)['loss'], sum(loss(student.model, p)['loss'] for p in micro_batches(batch, 1)))


def test_in_the_warm_up_only_given_words_are_learnt(student, teacher):
    batch = first_batch([conversation(number) for number in range(12)])
    loss = distil_loss(LiveTeacher(teacher), answer_weight=0.1, retention_weight=0.5, warm_up=3)
    parts = loss(student.model, batch | dict(step=torch.tensor(2)))
    assert parts.keys() == {'loss', 'answers', 'retention'}
    torch.testing.assert_close(parts['loss'], parts['answers'] + 0.5*parts['retention'])


@pytest.mark.parametrize('way', [
    dict(on_policy=OnPolicy(share=0.5, max_new_tokens=6)), dict(on_policy=OnPolicy(share=0.5, max_new_tokens=6, replay=8)),
    dict(divergence='skew_kl', on_policy=OnPolicy(share=1.0, max_new_tokens=6, student_weight=1.0)), dict(lora_rank=4),
    dict(gradient_checkpointing=True),
    dict(divergence_weight=(1.0, 0.0), reference_weight=0.5), dict(probe_every=2, answer_weight=0.0)],
    ids=lambda way: ' '.join(way))
def test_every_way_trains_is_deterministic_and_leaves_the_student_alone(student, teacher, data, tmp_path, way, capsys):
    before, hashes = weights_hash(student.model), []
    for name in 'ab':
        run = Run(tmp_path/name)
        hashes.append(weights_hash(train(run, student, teacher, **data, **SETTINGS | dict(steps=6, micro_batch=2) | way).model))
    assert hashes[0] == hashes[1] != before == weights_hash(student.model)
    rows = history_of(run)
    if 'on_policy' in way:
        assert 'the student ends 0% of its answers: 1 steps on given ones first' in capsys.readouterr().out
        assert 'distil' not in rows[0] and 'rollout_share' not in rows[0] and any(row['rollout_share'] > 0 for row in rows[1:])
    if way.get('probe_every'): assert [row['step'] for row in rows if 'probe_stop_rate' in row] == [1, 3, 5]


def test_without_a_teacher_the_words_of_chosen_authors_are_learnt(student, data, tmp_path):
    chats = data['chats']
    mixed = [chat | dict(author='teacher' if n % 2 else 'paper') for n, chat in enumerate(chats.train)]
    words = SETTINGS | dict(divergence_weight=0.0, answer_weight=1.0, retention_weight=0.0, probe_every=0)
    def learnt(name, given, **changes):
        return weights_hash(train(Run(tmp_path/name), student, None, replace(chats, train=given), data['corpus'], **words, **changes).model)
    assert learnt('a', mixed, authors=('teacher',)) == learnt('b', [c for c in mixed if c['author'] == 'teacher']) != learnt('c', mixed)
    assert history_of(Run(tmp_path/'a'))[0].keys() >= {'loss', 'answers'} and json.loads(
        (tmp_path/'a'/'models'/'distilled'/'advantage.json').read_text()) == {}


def test_a_teacher_with_other_tokens_goes_all_the_way(teacher, data, tmp_path, capsys):
    stranger = build(train_tokenizer([document(paper) for paper in PAPERS], 300), hidden=32, layers=1, context=192, name='stranger', seed=3)
    stranger = changed(stranger, chat_template=None)
    run = Run(tmp_path/'run')
    distilled = train(run, stranger, teacher, **data, **SETTINGS | dict(steps=20, context=128, micro_batch=2), answer_weight=0.0)
    assert stranger.tokenizer.chat_template is None and distilled.tokenizer.chat_template
    assert 'byte by byte' in capsys.readouterr().out
    rows = history_of(run)
    assert rows[-1]['distil'] < 0.9*rows[0]['distil'] and rows[-1]['probe_stop_rate'] >= 0
    for wrong in (dict(shift=0.5, base=stranger), dict(cache=4), dict(on_policy=OnPolicy(share=0.5))):
        with pytest.raises(InputError, match=f'{next(iter(wrong))}.* is .*different vocabularies, which that cannot bridge; set it to 0'):
            train(Run(tmp_path/'other'), stranger, teacher, **data, **SETTINGS, **wrong)


def test_a_collapse_stops_the_run_and_keeps_the_last_good_weights(student, teacher, data, tmp_path):
    good = train(Run(tmp_path/'good'), student, teacher, **data, **SETTINGS | dict(steps=20, probe_every=0))
    run = Run(tmp_path/'run')
    with pytest.raises(Collapse, match='step .*Lower the learning rate'):
        train(run, good, teacher, **data, **SETTINGS | dict(steps=40, probe_every=2, learning_rate=5.0, retention_weight=0.0))
    assert not (run.folder/'models'/'distilled').exists()


def test_what_a_process_left_that_was_killed_at_a_look_is_swept_up(student, teacher, data, tmp_path):
    left = tmp_path/'models'/'.distilled-good.4194305-0123abcd'  # no process has this number
    left.mkdir(parents=True)
    (left/files.WORK).touch()  # killed before it could write its mark
    train(Run(tmp_path), student, teacher, **data, **SETTINGS)
    assert [path.name for path in left.parent.iterdir()] == ['distilled']


# --- what a teacher and a divergence may be

def test_a_teacher_and_a_divergence_of_ones_own_are_used_at_once(student, data, tmp_path, monkeypatch):
    "One class with a loss, one entry in a dictionary: nothing else has to know of either."
    class Fixed(Teacher):
        "Says the same of every word: that the first token of the vocabulary comes."
        def loss(self, batch, states, head, divergence='forward_kl', temperature=1.0, count=None):
            logits = torch.zeros(len(states), len(head.weight))
            logits[:, 0] = 3.0
            everything = torch.ones(len(states), dtype=torch.bool)
            return dense_loss(head.logits(states), logits, everything, divergence, temperature, count)
    def hellinger(teacher, student, weight=1.0): return weight*((teacher/2).exp() - (student/2).exp()).square().sum(-1)/2
    monkeypatch.setitem(divergences, 'hellinger', Divergence('hellinger', 'Hellinger', hellinger))
    settings = SETTINGS | dict(steps=8, retention_weight=0.0, answer_weight=0.0, divergence='hellinger weight=2', probe_every=0)
    run = Run(tmp_path/'run')
    train(run, student, Fixed(), **data, **settings)
    rows = history_of(run)
    assert rows[-1]['distil'] < 0.9*rows[0]['distil']
    config = json.loads((run.folder/'models'/'distilled'/'manifest.json').read_text())['config']
    assert config['divergence'] == dict(name='hellinger', weight=2.0) and config['teacher'] is None
    with pytest.raises(InputError, match='on_policy.share is 0.5, and this teacher cannot be asked about any text'):
        train(run, student, Fixed(), **data, **settings | dict(on_policy=OnPolicy(share=0.5)))


def test_the_key_holds_the_resolved_divergence_and_not_how_it_is_computed(student, teacher):
    recipe = Recipe(**SETTINGS | dict(divergence='jsd'))
    assert recipe.key()['divergence'] == dict(name='jsd', beta=0.5, scaled=True)
    assert replace(recipe, divergence='jsd beta=0.5').key() == recipe.key() != replace(recipe, divergence='jsd beta=0.4').key()
    assert replace(recipe, micro_batch=1, gradient_checkpointing=True, trackers='x').key() == recipe.key()


def test_one_function_makes_every_kind_of_teacher(student, teacher):
    "And each can tell the divergence of a recipe that names none."
    def made(source=teacher, **settings):
        return make_teacher(source, student, Recipe(**SETTINGS | dict(divergence=None) | settings), base=student)
    stranger = build(train_tokenizer([document(paper) for paper in PAPERS], 300), hidden=32, layers=1, name='stranger')
    kinds = [(made(), 'LiveTeacher'), (made(shift=0.5), 'ShiftedTeacher'), (made(cache=4), 'RecordedTeacher'),
             (made(stranger), 'AlignedTeacher'), (made(Endpoint('http://127.0.0.1:9/v1')), 'ServerTeacher'),
             (made(None, divergence_weight=0.0), 'NoTeacher'), (made(mine := Teacher()), 'Teacher')]
    assert [type(found).__name__ for found, _ in kinds] == [name for _, name in kinds]
    assert made(mine) is mine and made(divergence_weight=0.0).local is teacher
    assert [found.local is not None for found, _ in kinds] == [True, True, True, True, False, False, False]
    assert all(not found.sparse or found.sparse in divergences['forward_kl'].sparse for found, _ in kinds)
    for source, settings in ((teacher, {}), (teacher, dict(cache=4)), (stranger, {})):
        assert resolved(student, source, None, SETTINGS | dict(divergence=None) | settings)[0].divergence == 'forward_kl'
