"""Pre-flight: what does not fit is named with a remedy, what is safe is mended, and whether the teacher is worth it."""
import copy
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from world import changed, conversation, exact, sentence, small_student, small_teacher

from scilm_adapt.alignment import PLAIN, AlignedTeacher, common_tokens
from scilm_adapt.errors import InputError
from scilm_adapt.generate import answer_bits, chat_prompt, respond, stop_ids
from scilm_adapt.models import LanguageModel, build, tiny
from scilm_adapt.preflight import (
    EXAMPLE,
    WARM_UP,
    _complaint,
    _preflight_lines,
    _rendered,
    ends_turns,
    preflight,
    teacher_advantage,
)
from scilm_adapt.tokens import encode_chat, train_tokenizer

torch.set_num_threads(1)
TOKENIZER = train_tokenizer([sentence(n, 12) for n in range(40)], 400)


@pytest.fixture(scope='module')
def student() -> LanguageModel: return small_student(TOKENIZER)


@pytest.fixture(scope='module')
def teacher() -> LanguageModel: return small_teacher(TOKENIZER)


@pytest.fixture(scope='module')
def stranger() -> LanguageModel:
    "A teacher with another tokenizer."
    return replace(tiny(['Quite other words in there.'], context=64, hidden=32), name='stranger')


def reserving(lm: LanguageModel, word: str) -> LanguageModel:
    "The model with a word of its vocabulary as a control token."
    lm = changed(lm)
    lm.tokenizer.add_special_tokens(dict(additional_special_tokens=[word]), replace_extra_special_tokens=False)
    return lm


def checks(lines: list[dict], ok: bool) -> list[str]: return [line['check'] for line in lines if line['ok'] == ok]


# --- the table

def test_preflight_shows_a_table_and_passes(student, teacher, capsys):
    lines = preflight(student, teacher, context=128)
    table = capsys.readouterr().out
    assert all(line['ok'] and not line['remedy'] and line['check'] in table for line in lines) and table.count(' ok\n') == len(lines) == 11
    assert '<|im_end|> (2)' in table and '128 tokens' in table
    for role in ('student', 'teacher'):
        assert f'the {role} reads: <|im_start|>user⏎What is heat?<|im_end|>⏎<|im_start|>assistant⏎⟦Heat is motion.<|im_end|>⟧⏎' in table


OTHER_TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + ': ' + message['content'] + '<|endoftext|>' }}"
                  "{% endfor %}")
ENDLESS = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
STRICT = "{% if messages[0]['role'] == 'user' %}{{ raise_exception('no questions here') }}{% endif %}"
MUTE = "{% for message in messages if message['role'] == 'user' %}{{ message['content'] + '<|im_end|>' }}{% endfor %}"
FAMILY = ['packed rows', 'output head', 'answers']
CHAT = ['an example', 'end of turn']


@pytest.mark.parametrize(('spoil', 'failing', 'remedy'), [
    (lambda s: changed(s, chat_template=None), CHAT, "'student' has no chat template; .*adopt_chat.*fix=True"),
    (lambda s: changed(s, chat_template=OTHER_TEMPLATE), CHAT, r'models\.adopt_chat.*needs the teacher.s template'),
    (lambda s: changed(s, chat_template=ENDLESS), CHAT, "'student': The chat template does not end an assistant turn"),
    (lambda s: changed(s, chat_template=STRICT), CHAT, "'student': The chat template cannot write this conversation .no questions here"),
    (lambda s: changed(s, chat_template=MUTE), CHAT, "'student': The chat template leaves out what the assistant says"),
    (lambda s: changed(s, pad_token=None), ['end of text, padding'], r'set tokenizer\.pad_token = tokenizer\.eos_token, or .*fix=True'),
    (lambda s: reserving(s, 'heat'), ['control tokens'], 'reserve different control tokens'),
    (lambda s: build(TOKENIZER, context=32, name='short'), ['context'], 'set context to at most 32')])
def test_preflight_names_what_does_not_fit(student, teacher, capsys, spoil, failing, remedy):
    spoilt = spoil(student)
    with pytest.raises(InputError, match=remedy): preflight(spoilt, teacher, context=64)
    table = capsys.readouterr().out
    assert checks(_preflight_lines(spoilt, teacher, conversation(1)['messages'], 64), ok=False) == failing
    assert all(re.search(f'{check} .*does not fit', table) for check in failing) and table.count('does not fit') == len(failing)


def test_a_teacher_that_is_not_aligned_or_too_short_is_named(student, teacher):
    with pytest.raises(InputError, match="^The teacher 'teacher' has no chat template, so it is no aligned model; choose an instruct"):
        preflight(student, changed(teacher, chat_template=None), fix=True)
    short = build(TOKENIZER, hidden=32, context=32, name='short')
    for one, other, word in ((student, short, 'shorter'), (short, student, 'longer')):
        line, = (line for line in preflight(one, other, context=32) if line['check'] == 'context')
        assert line['teacher'] == f'{other.context} tokens ({word})' and line['student'] == f'{one.context} tokens'
        with pytest.raises(InputError, match='longer than these models can read; set context to at most 32'):
            preflight(one, other, context=33)


def test_a_head_without_a_row_for_every_token_is_refused(student, teacher):
    longer = changed(student)
    longer.tokenizer.add_tokens(['<|more|>'])
    rows = len(TOKENIZER)
    with pytest.raises(InputError, match=f"'student': the tokenizer has ids up to {rows}, and the model only {rows} rows"):
        preflight(longer, teacher)


def test_an_example_without_an_answer_is_refused(student, teacher):
    with pytest.raises(InputError, match='no answer of an assistant'): preflight(student, teacher, EXAMPLE[:1])


def test_preflight_counts_memory(student, teacher, monkeypatch):
    line = next(line for line in _preflight_lines(student, replace(teacher, model=copy.deepcopy(teacher.model).bfloat16()), EXAMPLE, 0)
                if line['check'] == 'memory')
    count, others = (sum(p.numel() for p in lm.model.parameters()) for lm in (student, teacher))
    assert (line['student'], line['teacher']) == (f'{16*count/2**20:.1f} MiB', f'{2*others/2**20:.1f} MiB')
    monkeypatch.setattr('scilm_adapt.models._free_memory', lambda device: 1000)
    with pytest.raises(InputError, match='smaller student or a larger machine'): preflight(student, teacher)


def test_a_rounded_student_cannot_be_trained(student, teacher):
    rounded = replace(student, model=copy.deepcopy(student.model))
    rounded.model.is_quantized = True
    with pytest.raises(InputError, match='cannot be trained; load the student without bits'): preflight(rounded, teacher)
    preflight(student, replace(rounded, name='teacher'))


def test_padded_output_layers_fit(student):
    wide = copy.deepcopy(student.model)
    wide.resize_token_embeddings(len(TOKENIZER) + 64)
    lines = preflight(student, LanguageModel(wide, TOKENIZER, 'padded'))
    assert lines[0]['ok'] and lines[0]['student'] != lines[0]['teacher']


def test_complaint_is_the_sentence_or_nothing():
    def refuse(): raise InputError('no')
    assert _complaint(refuse) == 'no' and _complaint(len, []) == ''


def test_what_is_learnt_is_marked_and_long_texts_are_shortened(student):
    messages = [dict(role='user', content='q'*500), dict(role='assistant', content='one\ntwo'), dict(role='user', content='and?'),
                dict(role='assistant', content='Теплота — это движение.')]
    text = _rendered(student, messages)
    assert '\n' not in text and 'q … q' in text and len(text) < 300
    assert re.findall('⟦(.*?)⟧', text) == ['one⏎two<|im_end|>', 'Теплота — это движение.<|im_end|>']
    assert 'and?' in text and text.startswith('<|im_start|>user')


# --- without a teacher, and with one that cuts text into other tokens

def test_without_a_teacher_only_the_student_is_looked_at(student, capsys):
    lines = preflight(student, None, context=64)
    assert {line['teacher'] for line in lines} == {''} and 'teacher' not in capsys.readouterr().out
    assert checks(lines, True) == ['vocabulary', 'control tokens', 'end of text, padding', 'an example', 'prompt', 'end of turn', 'context',
                                   *FAMILY, 'memory']
    with pytest.raises(InputError, match='at most 128'): preflight(student, None, context=256)
    with pytest.raises(InputError, match=r"'student' has no chat template; set tokenizer.chat_template = alignment.PLAIN, or .*fix=True"):
        preflight(changed(student, chat_template=None), None)


def test_another_tokenizer_is_looked_at_in_another_way(student, stranger, capsys):
    lines = preflight(student, stranger, context=64)
    found = {line['check']: line for line in lines}
    assert list(found) == ['vocabulary', 'control tokens', 'end of text, padding', 'an example', 'prompt', 'end of turn',
                           'keeps all bytes', 'tokens in common', 'context', *FAMILY, 'memory']
    common = len(common_tokens(student.tokenizer, stranger.tokenizer).student)
    assert found['tokens in common']['student'] == f'{common/len(student.tokenizer.get_vocab()):.0%}'
    assert found['tokens in common']['teacher'] == f'{common/len(stranger.tokenizer.get_vocab()):.0%}'
    assert 'byte by byte (alignment.AlignedTeacher)' in capsys.readouterr().out
    AlignedTeacher(stranger, student.tokenizer, [dict(messages=EXAMPLE)])  # and that works


def test_a_context_that_the_other_tokens_overrun_is_noted(student, stranger):
    own, others = (len(encode_chat(lm.tokenizer, EXAMPLE)[0]) for lm in (student, stranger))
    fits = 64*own//others
    for context, noted in ((fits, False), (fits + 2, True)):
        line, = (line for line in preflight(student, stranger, context=context) if line['check'] == 'context')
        assert line['ok'] and line['teacher'] == '64 tokens (shorter)' and ('the longest are left out' in line['note']) == noted


def test_a_tokenizer_that_loses_text_or_cannot_stop_is_refused(student, stranger):
    lossy = changed(stranger)
    lossy.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match="The teacher's tokenizer loses something of a text"): preflight(student, lossy)
    with pytest.raises(InputError, match="The student's tokenizer loses something of a text"): preflight(lossy, student)
    for one, other in ((student, changed(stranger, chat_template=ENDLESS)), (changed(student, chat_template=ENDLESS), stranger)):
        with pytest.raises(InputError, match='does not end an assistant turn'): preflight(one, other)
    with pytest.raises(InputError, match='no aligned model'): preflight(student, changed(stranger, chat_template=None), fix=True)


# --- repairs

def test_what_is_safe_is_mended_and_said(student, teacher, capsys):
    bare = changed(student, chat_template=None, pad_token=None, eos_token=None)
    with pytest.raises(InputError): preflight(bare, teacher)
    assert bare.tokenizer.chat_template is None and bare.tokenizer.pad_token is None    # nothing is mended unasked
    capsys.readouterr()
    before = copy.deepcopy(teacher.tokenizer.init_kwargs)
    lines = preflight(bare, teacher, fix=True)
    said = capsys.readouterr().out
    assert said.count('repaired: ') == 3 and "the teacher's chat template" in said and said.count('<|endoftext|>') >= 2
    assert (bare.tokenizer.eos_token, bare.tokenizer.pad_token) == ('<|endoftext|>', '<|endoftext|>')
    assert bare.tokenizer.chat_template == teacher.tokenizer.chat_template and all(line['ok'] for line in lines)
    assert teacher.tokenizer.init_kwargs == before and TOKENIZER.eos_token
    preflight(bare, teacher, fix=True)
    assert 'repaired' not in capsys.readouterr().out


def test_another_template_is_replaced_by_the_teachers(student, teacher):
    other = changed(student, chat_template=OTHER_TEMPLATE)
    preflight(other, teacher, fix=True)
    assert other.tokenizer.chat_template == teacher.tokenizer.chat_template


@pytest.mark.parametrize('alone', [True, False], ids=['no teacher', 'another tokenizer'])
def test_a_student_with_nothing_to_adopt_gets_the_plain_template(student, stranger, alone, capsys):
    other = None if alone else stranger
    bare, own = changed(student, chat_template=None), changed(student, chat_template=OTHER_TEMPLATE)
    preflight(bare, other, fix=True)
    assert bare.tokenizer.chat_template == PLAIN and 'alignment.PLAIN' in capsys.readouterr().out
    preflight(own, other, fix=True)
    added = own.tokenizer.chat_template.removeprefix(OTHER_TEMPLATE)  # one that works is kept, and opens the answer as it is learnt
    assert added == '{{ "<|im_start|>assistant: " if add_generation_prompt else "" }}{# opening #}'


def test_what_cannot_be_mended_stays_an_error(student, teacher):
    with pytest.raises(InputError, match='set context to at most 128'): preflight(student, teacher, context=200, fix=True)


def test_a_missing_end_is_taken_from_what_the_model_names(student):
    "Never invented: only a control token of the tokenizer that the configuration names."
    lm = LanguageModel(copy.deepcopy(student.model), copy.deepcopy(TOKENIZER), 'student')
    lm.tokenizer.eos_token = lm.tokenizer.pad_token = None
    lm.model.config.eos_token_id = [2, 0]
    preflight(lm, None, fix=True)
    assert lm.tokenizer.eos_token == lm.tokenizer.pad_token == '<|im_end|>'
    lm.tokenizer.eos_token = lm.tokenizer.pad_token = None
    lm.model.config.eos_token_id = lm.model.generation_config.eos_token_id = 50    # an ordinary word
    with pytest.raises(InputError, match='no token that fills rows up'): preflight(lm, None, fix=True)
    assert lm.tokenizer.eos_token is None


# --- ending a turn

def saying(lm: LanguageModel, token: int) -> LanguageModel:
    "A model that always says one token."
    model = copy.deepcopy(lm.model)
    with torch.no_grad():
        weight = torch.zeros_like(model.get_output_embeddings().weight)
        head = torch.nn.Linear(weight.shape[1], len(weight))
        head.weight.copy_(weight)
        head.bias.copy_(torch.nn.functional.one_hot(torch.tensor(token), len(weight)).float())
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(head)
    return replace(lm, model=model)


def test_the_share_of_ended_turns_decides_on_a_warm_up(student, teacher):
    chats = [conversation(number) for number in range(40)]
    for token, share, note in ((2, 1.0, ''), (50, 0.0, 'warm-up needed')):
        lm = saying(student, token)
        assert ends_turns(lm, chats) == share
        line = preflight(lm, teacher, chats=chats)[-1]
        assert line['check'] == 'ends its turns' and line['ok'] and line['note'] == note and line['student'].startswith(f'{share:.0%}')
    assert 0 < WARM_UP < 1


def test_ended_turns_are_those_of_the_questions_asked(student, monkeypatch):
    chats, asked = [conversation(number) for number in range(10)], []
    def spied(lm, prompts, *arguments, **options):
        asked.extend(prompts)
        return respond(lm, prompts, *arguments, **options)
    monkeypatch.setattr('scilm_adapt.preflight.respond', spied)
    ends_turns(student, chats, number=5, max_new_tokens=4)
    assert asked == [chat_prompt(student, chat['messages'][:1]) for chat in chats[::2]]
    assert stop_ids(student) == [0, 2]
    asked.clear()
    chats[0]['messages'][0]['content'] = sentence(1, 200)    # too long to be answered
    ends_turns(student, chats, max_new_tokens=4)
    assert len(asked) == 9
    for few in ([], chats[:1]):
        with pytest.raises(InputError, match="no held-out question that 'student' could answer"): ends_turns(student, few)


def test_a_student_that_fails_is_not_asked(student, teacher, monkeypatch):
    def never(*_, **__): raise AssertionError('asked')
    monkeypatch.setattr('scilm_adapt.preflight.respond', never)
    bare = changed(student, chat_template=None)
    with pytest.raises(InputError, match='no chat template'): preflight(bare, teacher, chats=[conversation(1)])


# --- is the teacher worth it?

def test_answers_and_their_ends_equal_the_definition(student):
    student = exact(student)
    chats = [conversation(number) for number in range(5)]
    for chat in chats: chat['messages'][1]['content'] = 'What the teacher wrote.'       # the reference counts, not this
    for chat, nats in zip(chats, answer_bits(student, chats, 64, ends=True)[0], strict=True):
        ids, mask = encode_chat(TOKENIZER, [chat['messages'][0], dict(role='assistant', content=chat['reference'])])
        with torch.no_grad(): logprobs = student.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert math.isclose(nats, -sum(logprobs[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t]), rel_tol=1e-10)


def test_advantage_is_a_paired_interval(student, teacher, monkeypatch, capsys):
    chats = [conversation(number) for number in range(40)]
    sizes = np.array([len(chat['reference']) for chat in chats])
    draw = np.random.default_rng(0)
    common, gain = draw.uniform(2, 9, 40)*sizes, draw.normal(0.2, 0.1, 40)*sizes        # conversations differ far more than models do
    monkeypatch.setattr('scilm_adapt.preflight.answer_bits', lambda lm, asked, *_, **__:
                        ((common + (gain if lm is student else 0))[:len(asked)], sizes[:len(asked)]))
    result = teacher_advantage(student, teacher, chats)
    assert result['better'] and result['chats'] == 40 and 'the teacher is better by' in capsys.readouterr().out
    assert math.isclose(result['difference'], gain.sum()/sizes.sum()/math.log(2), rel_tol=1e-9)
    assert math.isclose(result['difference'], result['student'] - result['teacher'], rel_tol=1e-9)
    assert 0.05 < result['high'] - result['low'] < 0.15 and result['low'] < result['difference'] < result['high']
    assert teacher_advantage(student, teacher, chats) == result                         # chance by address
    assert not teacher_advantage(teacher, student, chats)['better'] and 'expect little' in capsys.readouterr().out
    assert not teacher_advantage(student, teacher, chats[:1])['better']                 # one conversation shows nothing
    json.dumps(result)
    with pytest.raises(InputError, match='no held-out conversations'): teacher_advantage(student, teacher, [])


def test_a_teacher_with_other_tokens_is_measured_in_bits_per_byte(student, stranger):
    student, stranger = exact(student), exact(stranger)
    chats = [conversation(number) for number in range(8)]
    result = teacher_advantage(student, stranger, chats)
    sizes = sum(len(chat['reference'].encode()) for chat in chats)
    for role, lm in (('student', student), ('teacher', stranger)):
        alone = sum(answer_bits(lm, [chat], ends=True)[0][0] for chat in chats)/math.log(2)/sizes
        assert math.isclose(result[role], alone, rel_tol=1e-10)
        # an untrained model finds every token about equally likely, and learns the end of turn as one more of them
        tokens = sum(sum(encode_chat(lm.tokenizer, chat['messages'])[1]) for chat in chats)
        assert math.isclose(result[role], tokens*math.log2(len(lm.tokenizer))/sizes, rel_tol=0.05)
    assert result['difference'] == pytest.approx(result['student'] - result['teacher'])


def test_a_broken_teacher_is_named(student, teacher):
    broken = replace(teacher, model=copy.deepcopy(teacher.model), name='broken')
    torch.nn.init.constant_(broken.model.get_output_embeddings().weight, math.nan)
    with pytest.raises(FloatingPointError, match="'broken'"): teacher_advantage(student, broken, [conversation(1)])
