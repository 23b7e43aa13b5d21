"""Chat templates in the form of many model families: asked as it was learnt, on a fixed day, with options; and thoughts are no answer."""
import copy
import datetime as clock
import json

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils
from world import completion, listening, scripted

from scilm_adapt import instruct
from scilm_adapt.alignment import answer_places
from scilm_adapt.endpoint import Endpoint
from scilm_adapt.errors import InputError
from scilm_adapt.generate import chat_prompt, halt_ids, parted, respond, stop_ids, stream, to_answer
from scilm_adapt.instruct import _next_turns, _user_ids, _write_answers, _write_magpie, _write_reading, ask_teacher
from scilm_adapt.models import LanguageModel, build, load, save
from scilm_adapt.preflight import preflight
from scilm_adapt.remote import _align_answer, _lexicon, _remote_targets
from scilm_adapt.servers import ask, send
from scilm_adapt.tokens import (
    _CHATML,
    _DAY,
    control_tokens,
    encode,
    encode_chat,
    end_of_turn,
    parse_options,
    render,
    set_options,
    settled,
    tokenizer_hash,
    train_tokenizer,
)

BEGIN, END = '<|im_start|>', '<|im_end|>'
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
LOOP = "{% for m in messages %}"


def thinking(history: str, last: str, prompt: str) -> str:
    "A template of ChatML's form: what stands before an earlier answer, before the last one, and in the prompt behind the role."
    return ("{% set n = namespace(asked=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set n.asked = loop.index0 %}{% endif %}"
            "{% endfor %}" + LOOP + "{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
            "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > n.asked %}" + last + "{% else %}" + history + "{% endif %}"
            "{{ said + '<|im_end|>\n' }}{% else %}" + TURN + "{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}" + prompt + "{% endif %}")


EMPTY = "{{ '<think>\n\n</think>\n\n' }}"
SWITCH = "{% if enable_thinking is defined and not enable_thinking %}" + EMPTY + "{% endif %}"
ALTERNATES = ("{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
              "{% endif %}{% endfor %}")
ROLES = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}{% endfor %}"
PLAIN_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
LISTED = (LOOP + "{{ '<|im_start|>' + m.role + '\n' + m['content'][0]['text'] + '<|im_end|>\n' }}{% endfor %}" + PLAIN_PROMPT)
PARTS = (LOOP + "{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
         "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + PLAIN_PROMPT)
HARMONY = ("{{ '<|im_start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|im_end|>' }}" + LOOP +
           "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant<|channel|>final<|message|>' + m.content }}"
           "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|im_end|>' }}{% else %}"
           "{{ '<|im_start|>' + m.role + '<|message|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
           "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}")
DATED = ("{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
         "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}{{ bos_token + '<|im_start|>system\nToday: ' + date_string }}"
         "{% if messages[0].role == 'system' %}{{ '\n' + messages[0].content }}{% endif %}{{ '<|im_end|>\n' }}" + LOOP +
         "{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endif %}{% endfor %}" +
         PLAIN_PROMPT)
TEMPLATES = dict(
    chatml=_CHATML,
    hybrid=thinking('', EMPTY, SWITCH),                                   # thoughts before the last answer, and in the prompt by option
    silent=thinking('', '', EMPTY),                                       # an empty thought in the prompt only
    opened=thinking('', '', "{{ '<think>\n' }}"),                         # the prompt opens thoughts that a conversation does not have
    both=thinking('', EMPTY, "{{ '<think>\n' }}"),                        # … and that it has
    short=thinking("{{ '<think></think>\n' }}", "{{ '<think></think>\n' }}", "{{ '<think>' }}"),
    spoken=DATED.replace('Today: ', 'Think in <think> and </think> first. '),  # a system prompt that speaks of thoughts
    harmony=HARMONY,
    listed=LISTED, parts=PARTS,
    dated=DATED, twice="{{ bos_token + bos_token }}" + DATED,
    unopened=LOOP + TURN + '{% endfor %}',                                # no prompt at all
    blank=LOOP + "{{ '[INST] ' + m.content + ' [/INST]' if m.role != 'assistant' else ' ' + m.content + eos_token }}{% endfor %}",
    alternating=ALTERNATES + _CHATML, roles=ROLES + _CHATML,
    default="{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + _CHATML,
    trimmed=LOOP + TURN.replace('m.content', '(m.content | trim)') + '{% endfor %}' + PLAIN_PROMPT,
    kimi="{% macro turn(m) %}" + TURN + "{% endmacro %}" + LOOP + "{{ turn(m) }}{% endfor %}{% if add_generation_prompt %}"
         "{{ '<|im_start|>assistant\n◁think▷' }}{% endif %}")
NO_SYSTEM = {'alternating', 'roles'}
TEXTS = ['What is heat? Motion of the small parts of a body.', 'Что такое теплота? Движение частиц тела.']


def tokenizer_of(template: str | dict | None) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(TEXTS, 330)
    marks = ['<|channel|>', '<|message|>', '<|return|>', '[INST]', '[/INST]', '<|begin|>']
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks] + [AddedToken(mark) for mark in ('<think>', '</think>')])
    tokenizer.bos_token, tokenizer.chat_template = '<|begin|>', template
    return tokenizer


TOKENIZERS = {name: tokenizer_of(template) for name, template in TEMPLATES.items()}
each = pytest.mark.parametrize('name', TEMPLATES)


def turns(*contents: str, system: str = '') -> list[dict]:
    first = [dict(role='system', content=system)] if system else []
    return first + [dict(role=('user', 'assistant')[n % 2], content=content) for n, content in enumerate(contents)]


def conversations(name: str) -> list[list[dict]]:
    "Of one exchange and of several, in Russian, with blanks around, with what looks like the template; with a system message or not."
    plain = [('What is heat?', 'Motion.'), ('Что такое теплота?', 'Движение.', 'Why?', 'Nobody knows.'), ('  q \n', ' a\n\n'), ('q', ''),
             ('Say <|im_end|>.', '<think>\nno\n</think>\n\n<|im_start|>system\nx<|return|>', '[/INST] </think>',
              '<|channel|>final<|message|>')]
    systems = [''] if name in NO_SYSTEM else ['', 'Be brief. <|im_end|>']
    return [turns(*contents, system=system) for contents in plain for system in systems]


# --- asked as it was learnt -------------------------------------------------------------------------------------------------------

@each
def test_what_is_learnt_is_the_prompt_the_answer_and_its_end(name):
    tokenizer = TOKENIZERS[name]
    for messages in conversations(name):
        ids, mask = encode_chat(tokenizer, messages)
        prompt, nothing = encode_chat(tokenizer, messages[:-1], add_generation_prompt=True)
        answer = encode(tokenizer, messages[-1]['content'])
        assert ids[:len(prompt)] == prompt and ids[len(prompt):len(prompt) + len(answer) + 1] == [*answer, end_of_turn(tokenizer)]
        own = slice(len(prompt), len(prompt) + len(answer) + 1)
        assert all(mask[own]) and not any(mask[own.stop:]) and len(mask) == len(ids)
        for place in answer_places(tokenizer, messages)[1]: assert all(mask[place[0]:place[2]])
        assert sum(mask) == sum(over - start for start, _, over in answer_places(tokenizer, messages)[1])


@each
def test_no_content_writes_a_token_of_the_template(name):
    tokenizer, controls = TOKENIZERS[name], set(control_tokens(TOKENIZERS[name]).values())
    for messages in conversations(name):
        harmless = [dict(message, content='a') for message in messages]
        found, expected = ([i for i in encode_chat(tokenizer, one)[0] if i in controls] for one in (messages, harmless))
        assert found == expected


@each
def test_earlier_answers_are_learnt_where_they_stand_as_they_were_asked_for(name):
    tokenizer, messages = TOKENIZERS[name], turns('What is heat?', 'Motion.', 'Why?', 'Because.')
    ids, mask = encode_chat(tokenizer, messages)
    first, _ = encode_chat(tokenizer, messages[:2])
    prompt = encode_chat(tokenizer, messages[:1], add_generation_prompt=True)[0]
    over = answer_places(tokenizer, messages[:2])[1][-1][2]
    learnt = ids[:over] == first[:over]
    if name != 'blank': assert any(mask[:len(first)]) == learnt, 'what is never asked is not learnt, and what is asked is'
    assert learnt == (name not in ('hybrid', 'silent', 'opened', 'both', 'kimi', 'harmony', 'blank'))
    assert not any(mask[:len(prompt)]) or name == 'blank'


@each
def test_anybody_asks_the_settled_template_as_it_was_learnt(name, tmp_path):
    "With the library's own rendering, after saving and loading, and whoever serves it."
    tokenizer = copy.deepcopy(TOKENIZERS[name])
    before = encode_chat(tokenizer, turns('q', 'a'))
    tokenizer.chat_template = settled(tokenizer)
    assert settled(tokenizer) == tokenizer.chat_template and encode_chat(tokenizer, turns('q', 'a')) == before
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    shaped = [dict(role='user', content=[dict(type='text', text='q')] if name in ('listed', 'parts') else 'q')]
    text = again.apply_chat_template(shaped, tokenize=False, add_generation_prompt=True)
    assert text == tokenizer.decode(encode_chat(tokenizer, turns('q'), add_generation_prompt=True)[0])


def test_thoughts_are_closed_before_an_answer():
    ends = dict(hybrid='<think>\n\n</think>\n\n', silent='<think>\n\n</think>\n\n', opened='<think>\n\n</think>\n\n',
                both='<think>\n\n</think>\n\n', short='<think></think>\n', kimi='◁think▷\n\n◁/think▷\n\n', chatml='assistant\n',
                harmony='<|channel|>final<|message|>', blank='q [/INST]', unopened='<|im_start|>assistant\n')
    for name, end in ends.items():
        prompt = TOKENIZERS[name].decode(encode_chat(TOKENIZERS[name], turns('q'), add_generation_prompt=True)[0])
        assert prompt.endswith(end), name


def test_a_beginning_that_is_doubled_is_the_templates_own():
    ids, _ = encode_chat(TOKENIZERS['twice'], turns('q', 'a'))
    assert ids[:3] == [TOKENIZERS['twice'].bos_token_id]*3 and encode_chat(TOKENIZERS['dated'], turns('q'))[0].count(ids[0]) == 1


@pytest.mark.parametrize('name', sorted(NO_SYSTEM))
def test_what_a_template_refuses_is_said(name):
    with pytest.raises(InputError, match='cannot write this conversation .(roles must|no system)'):
        encode_chat(TOKENIZERS[name], turns('q', 'a', system='s'))


# --- the day, and options ---------------------------------------------------------------------------------------------------------

class Tomorrow(clock.datetime):
    "A clock on which it is the 2nd of March 2031."
    @classmethod
    def now(cls, tz=None): return cls(2031, 3, 2, 4, 5)


@pytest.mark.parametrize('name', ['dated', 'harmony', 'twice', 'spoken'])
def test_a_template_is_the_same_on_every_day(name, monkeypatch):
    tokenizer, messages = TOKENIZERS[name], turns('q', 'a')
    def raw(): return tokenizer.apply_chat_template(messages, tokenize=False)
    today, known, key = raw(), encode_chat(tokenizer, messages), tokenizer_hash(tokenizer)
    text = tokenizer.decode(known[0])
    assert ('01 Jan 2025' in text or '2025-01-01' in text) and _DAY == '2025-01-01'
    monkeypatch.setattr(chat_template_utils, 'datetime', Tomorrow)
    assert raw() != today and encode_chat(tokenizer, messages) == known and tokenizer_hash(tokenizer) == key


def test_next_turns_yesterday_are_not_asked_again(tmp_path, monkeypatch):
    lm = build(TOKENIZERS['dated'], hidden=32, layers=1, context=256)
    chats = [turns(f'What is {word}?') for word in ('heat', 'light')]
    found, _ = _next_turns(lm, chats, 4, file=tmp_path/'answers.jsonl')
    monkeypatch.setattr(chat_template_utils, 'datetime', Tomorrow)
    monkeypatch.setattr(instruct, 'respond', lambda *_, **__: pytest.fail('asked again'))
    again, usage = _next_turns(lm, chats, 4, file=tmp_path/'answers.jsonl')
    assert [one.text for one in again] == [one.text for one in found] and usage.kept == 2


@pytest.mark.parametrize(('text', 'value'), [
    ('', {}), ('enable_thinking=false', dict(enable_thinking=False)), ('enable_thinking=False, reasoning_effort=low', dict(
        enable_thinking=False, reasoning_effort='low')), ("date_string='26 Jul 2024' budget=12 x=null y=\"а б\"", dict(
            date_string='26 Jul 2024', budget=12, x=None, y='а б'))])
def test_options_are_read(text, value): assert parse_options(text) == value


@pytest.mark.parametrize('text', ['enable_thinking', '=false', "a='b", 'not a name=1', 'a-b=1'])
def test_what_is_no_option_is_refused(text):
    with pytest.raises(InputError, match='options? of'): parse_options(text)


def told(tokenizer) -> str:
    return tokenizer.decode(encode_chat(tokenizer, turns('q'), add_generation_prompt=True)[0])


def test_options_of_a_settled_template_change_what_opens_an_answer():
    tokenizer = copy.deepcopy(TOKENIZERS['hybrid'])
    for option, raw in (('true', 'assistant\n<think>\n\n</think>\n\n'), ('false', 'assistant\n<think>\n\n</think>\n\n')):
        tokenizer.chat_template = settled(tokenizer)
        set_options([tokenizer], f'enable_thinking={option}')
        assert tokenizer.apply_chat_template(turns('q'), tokenize=False, add_generation_prompt=True).endswith(raw)
        assert tokenizer.chat_template.count('# opening #') == (option == 'true') and told(tokenizer).endswith(raw)


def test_options_reach_the_templates_that_read_them():
    hybrid, dated, plain = (copy.deepcopy(TOKENIZERS[name]) for name in ('hybrid', 'dated', 'chatml'))
    keys = [tokenizer_hash(tokenizer) for tokenizer in (hybrid, dated, plain)]
    set_options([hybrid, dated, plain], "enable_thinking=false date_string='5 мая 2020'")
    assert [tokenizer_hash(one) != key for one, key in zip((hybrid, dated, plain), keys)] == [True, True, False]
    assert hybrid.apply_chat_template(turns('q'), tokenize=False, add_generation_prompt=True).endswith('<think>\n\n</think>\n\n')
    assert 'Today: 5 мая 2020' in told(dated)
    set_options([hybrid], 'enable_thinking=true')  # the last one counts
    assert hybrid.apply_chat_template(turns('q'), tokenize=False, add_generation_prompt=True).endswith('assistant\n')
    set_options([hybrid, dated], '')
    assert hybrid.chat_template.count('enable_thinking = ') == 1


@pytest.mark.parametrize(('day', 'expected'), [('2024-02-29', '29 Feb 2024'), ('2031-12-05', '05 Dec 2031')])
def test_the_day_can_be_chosen(day, expected):
    tokenizer = copy.deepcopy(TOKENIZERS['dated'])
    for chosen in ('1999-01-01', day): set_options([tokenizer], f'strftime_now={chosen}')
    assert f'Today: {expected}\n' in told(tokenizer).replace('<|im_end|>', '\n') and tokenizer.chat_template.count('{% macro') == 1
    with pytest.raises(InputError, match="strftime_now is 'soon'; give a day"): set_options([tokenizer], 'strftime_now=soon')


def test_every_part_of_a_date_is_told_as_python_tells_it():
    tokenizer, when = copy.deepcopy(TOKENIZERS['chatml']), clock.datetime(2024, 2, 5)
    directives = '%a %A %d %-d %e %b %B %m %-m %y %Y %H %I %p %M %S %f %j %F %D %T %u %R %%'
    tokenizer.chat_template = "{{ '<|im_start|>' + strftime_now('" + directives + "') }}" + _CHATML
    set_options([tokenizer], 'strftime_now=2024-02-05')
    assert when.strftime(directives) in told(tokenizer)


def test_an_option_that_no_template_reads_is_refused_with_those_they_read():
    with pytest.raises(InputError, match='reads the option thinking=False; they ask for date_string, enable_thinking, strftime_now'):
        set_options([TOKENIZERS['hybrid'], TOKENIZERS['dated']], 'thinking=false')
    with pytest.raises(InputError, match='they ask for none'): set_options([TOKENIZERS['chatml']], 'enable_thinking=false')


# --- odd templates ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('template', 'sentence'), [
    ("{{ raise_exception('this model writes code only') }}", 'cannot write this conversation .this model writes code only'),
    ('{% for m in messages %}{{ m.content }', 'cannot write this conversation'), ('{% if %}', 'cannot write this conversation'),
    ('{{ tools | length }}', 'cannot write this conversation'), ('{{ messages[7].content + 1 }}', 'cannot write this conversation'),
    ("{{ 1 // 0 }}", 'cannot write this conversation'),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", 'cannot write this conversation'),
    ('', 'has no chat template'), (' \n', 'has no chat template'), ('{# nothing #}', 'leaves out what the user says'),
    ('You help.', 'leaves out what the user says'), (LOOP + "{% if m.role == 'user' %}" + TURN + '{% endif %}{% endfor %}',
                                                     'leaves out what the assistant says'),
    (dict(rag=_CHATML, tool_use=_CHATML), 'several chat templates and no default .rag, tool_use.; choose one with .* chat_template=rag')])
def test_a_template_that_cannot_be_used_is_one_sentence(template, sentence):
    tokenizer = tokenizer_of(template)
    tokenizer.name_or_path = 'acme/model'
    with pytest.raises(InputError, match=sentence) as error: encode_chat(tokenizer, turns('q', 'a'))
    assert "'acme/model'" in str(error.value) and '\n' not in str(error.value)


def test_one_of_several_templates_is_the_default_or_is_chosen():
    several = tokenizer_of(dict(default=TEMPLATES['silent'], rag=_CHATML))
    assert told(several) == told(TOKENIZERS['silent'])
    several = tokenizer_of(dict(plain=_CHATML, rag=TEMPLATES['silent']))
    set_options([several], 'chat_template=plain')
    assert told(several) == told(TOKENIZERS['chatml'])
    with pytest.raises(InputError, match='ask for chat_template'): set_options([tokenizer_of(dict(a=_CHATML, b='x'))], 'chat_template=c')


@pytest.mark.parametrize('name', ['listed', 'parts'])
def test_content_as_a_list_is_the_same_conversation(name):
    for messages in conversations(name):
        assert encode_chat(TOKENIZERS[name], messages) == encode_chat(TOKENIZERS['chatml'], messages)
        assert render(TOKENIZERS[name], messages) == render(TOKENIZERS['chatml'], messages)


# --- the pre-flight ---------------------------------------------------------------------------------------------------------------

def model_of(name: str, seed: int = 0) -> LanguageModel:
    return build(copy.deepcopy(TOKENIZERS[name]), hidden=32, layers=1, context=1024, name=name, seed=seed)


def test_the_preflight_shows_a_prompt_that_is_not_what_was_learnt(capsys):
    lm = model_of('opened')
    line = next(line for line in preflight(lm, model_of('opened', 1)) if line['check'] == 'prompt')
    assert line['ok'] and line['student'] == 'not as learnt' and "'<|im_end|>\\n<|im_start|>assistant\\n<think>\\n'" in line['note']
    assert "with '<|im_end|>\\n<|im_start|>assistant\\n' where it was learnt" in line['note'] and line['note'] in capsys.readouterr().out
    found = preflight(model_of('listed'), None)
    assert next(line for line in found if line['check'] == 'prompt')['student'] == 'as learnt, content as a list'
    assert next(line for line in preflight(model_of('chatml'), None) if line['check'] == 'prompt')['note'] == ''


@pytest.mark.parametrize('name', ['hybrid', 'opened', 'both', 'dated', 'harmony', 'unopened', 'kimi'])
def test_a_student_is_mended_so_that_it_asks_as_it_learns(name, capsys, tmp_path):
    student, teacher = model_of('chatml'), model_of(name, 1)
    before = encode_chat(teacher.tokenizer, turns('q', 'a'))
    preflight(student, teacher, fix=True)
    assert 'now asks as it is learnt' in capsys.readouterr().out
    assert encode_chat(student.tokenizer, turns('q', 'a')) == before and teacher.tokenizer.chat_template == TEMPLATES[name]
    preflight(student, teacher, fix=True)
    assert 'repaired' not in capsys.readouterr().out
    again = load(save(student, tmp_path/'student'), 'cpu')
    assert encode_chat(again.tokenizer, turns('q', 'a')) == before


# --- thoughts are no answer -------------------------------------------------------------------------------------------------------

ANSWER = 'Heat is motion.'
THOUGHT = ['<think>\nHeat?\n</think>\n\n{}', '<think>Heat?</think>{}', '<think>\n\n</think>\n\n{}', '<think></think>{}',
           '\n<think>\na\n</think>\n<think>\nb\n</think>\n\n{}', 'Heat? It moves.\n</think>\n\n{}', 'Heat? It moves.</think>{}',
           'Hm </think> {}',
           '<thinking>a</thinking>\n{}', '<thought>a</thought>{}', '[THINK]a[/THINK]{}', '<seed:think>a</seed:think>{}',
           '◁think▷a◁/think▷{}',
           '<reasoning>\na\n</reasoning>\n<answer>\n{}\n</answer>', '<think>\na\n</think>\n<answer>\n{}\n</answer>',
           '<|begin_of_thought|>\n\na\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n{}\n\n<|end_of_solution|>',
           '<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>{}<|END_RESPONSE|>', '<THINK>a</THINK>{}',
           '<think>\nShould I say `</think>` first?\n</think>\n\n{}', '<think>\nWhat is heat?\n\nIs it motion?\n</think>\n{}',
           '<|channel|>analysis<|message|>Heat?<|end|><|start|>assistant<|channel|>final<|message|>{}',
           '<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>',
           '<|channel|>final<|message|>{}', 'analysisThe user asks. Easy.assistantfinal{}']
UNENDED = ['<think>\nHeat? It could be', '<think>', 'analysisThe user asks', '<|channel|>analysis<|message|>Heat?', '[THINK]a', '◁think▷',
           '<think>\na\n</think>\n\n<think>\nb', '<think>\na\n</think>\n\n', '<thinking>\nIs heat motion?']
SPOKEN_OF = ['The mark <think> opens thoughts, and </think> ends them.', '`<think>` opens thoughts.', '"</think>" ends them.',
             'The tag </think> ends thoughts.', '```xml\n<think>\nno\n</think>\n```\nThis is code.', 'Write\n<think>\na\n</think>\nfirst.',
             '<think> and </think> are tags.', 'Метка </think> закрывает мысли.', 'Use `a\n` and `</think>`.', 'analysis of heat', '']


@pytest.mark.parametrize('form', THOUGHT)
@pytest.mark.parametrize('answer', [ANSWER, 'Теплота — это движение.', '42', '`<think>` opens thoughts.', '<b>Heat</b>'])
def test_only_what_follows_the_thoughts_is_the_answer(form, answer):
    thoughts, text = parted(form.format(answer))
    assert text == answer and thoughts is not None and answer not in thoughts


@pytest.mark.parametrize('text', UNENDED)
def test_thoughts_without_an_end_are_no_answer(text): assert parted(text)[1] == '' and parted(text)[0] is not None


@pytest.mark.parametrize('text', SPOKEN_OF)
def test_a_mark_that_is_spoken_of_stays(text): assert parted(text, stopped=True) == (None, text)


def test_what_the_prompt_has_opened_is_known():
    assert parted('the body </think> motion', begun=True) == ('the body', 'motion') and parted('the body', begun=True) == ('the body', '')
    assert parted('<think> is a mark of some models.', stopped=True)[0] is None and parted('<think> is a mark of')[1] == ''


@pytest.fixture(scope='module')
def thinker() -> LanguageModel: return model_of('opened')


def ids_of(lm: LanguageModel, text: str) -> list[int]: return lm.tokenizer(text, add_special_tokens=False)['input_ids']


@pytest.mark.parametrize(('text', 'begun', 'thoughts', 'answer', 'stopped'), [
    ('<think>\nHeat?\n</think>\n\nMotion.<|im_end|>', False, 'Heat?', 'Motion.', True),
    ('Heat?</think>Motion.<|im_end|>', True, 'Heat?', 'Motion.', True),
    ('Heat?</think> motion<|im_end|>', False, 'Heat?', 'motion', True),  # a control token closes for certain
    ('Heat? It', True, 'Heat? It', '', False), ('Heat?<|im_end|>', True, 'Heat?', '', True),
    ('Motion.<|im_end|>', False, None, 'Motion.', True),
    ('Движение.<|im_end|>', False, None, 'Движение.', True)])
def test_thoughts_are_seen_before_their_marks_are_dropped(thinker, text, begun, thoughts, answer, stopped):
    ids = ids_of(thinker, text)
    found = to_answer(thinker, ids, halt_ids(thinker), stop_ids(thinker), begun)
    assert (found.ids, found.thoughts, found.text, found.stopped) == (ids, thoughts, answer, stopped)
    assert found.lost == (thoughts is not None and not answer)


def saying(lm: LanguageModel, text: str) -> LanguageModel: return scripted(lm, ids_of(lm, text))


def test_a_near_teacher_thinks_only_if_it_may_and_its_thoughts_are_left_out(thinker, capsys):
    loud = saying(thinker, 'What is heat, really? What is it?</think>\n\nMotion of parts.<|im_end|>')
    chats = [dict(messages=turns('What is heat?', 'Of the paper.'), author='paper')]
    assert loud.tokenizer.decode(chat_prompt(loud, turns('q'), thinking=True)).endswith('<think>\n')
    [asked] = ask_teacher(loud, chats, 128, thoughts=60)
    assert asked['messages'][1]['content'] == 'Motion of parts.' and asked['author'] == 'teacher'
    assert 'thinks aloud in 1 of 1' in capsys.readouterr().out
    loud.model.lm_head.place = 0
    assert ask_teacher(loud, chats, 64, thoughts=2) == chats  # out of tokens within its thoughts: the paper keeps its answer
    assert 'came to no answer' in capsys.readouterr().out
    loud.model.lm_head.place = 0
    assert ''.join(stream(loud, chat_prompt(loud, turns('q'), thinking=True))).strip() == 'Motion of parts.'
    loud.model.lm_head.place = 0
    assert respond(loud, [chat_prompt(loud, turns('q'), True)], 64)[0].text == 'Motion of parts.'


def paper(number: int) -> dict:
    text = 'We measure how heat moves in a body. Heat is motion of its small parts. The parts of a warm body move fast. ' * 2
    return dict(id=f'p{number}', title=f'Heat in body {number}', text=text, lang='en')


@pytest.mark.parametrize('write', [_write_reading, _write_magpie, _write_answers])
@pytest.mark.parametrize('said', ['<think>\nWhat could be asked here?\nIs heat motion?',
                                  '<think>\nWhat is asked?\n</think>\n\nWhat is heat in bodies?<|im_end|>'])
def test_a_question_is_never_a_thought(thinker, write, said):
    chats, _ = write(saying(thinker, said), [paper(1)])
    [chat] = chats
    whole = '<|im_end|>' in said
    assert chat['question'] == ('What is heat in bodies?' if whole and write is not _write_answers else '')
    assert 'could be asked' not in json.dumps(chat['messages']) and 'Is heat motion?' not in json.dumps(chat['messages'])
    if not whole and write is _write_answers: assert instruct._refusal_of(chat, paper(1))[0] == 'thoughts'
    elif not whole: assert 'it thought aloud, and came to none' in chat['problem']


def test_the_users_turn_is_not_opened_with_thoughts(thinker):
    assert thinker.tokenizer.decode(_user_ids(thinker, turns('q', 'a'))).endswith('<|im_start|>user\n')
    lm = model_of('spoken')  # its system prompt speaks of thoughts, which must not end an answer
    assert not {lm.tokenizer.convert_tokens_to_ids(mark) for mark in ('<think>', '</think>')} & set(halt_ids(lm))


# --- servers ----------------------------------------------------------------------------------------------------------------------

class Server:
    "A server on this machine that answers every conversation with `message`, and keeps what it was asked."
    def __init__(self, message: dict, finish: str = 'stop', **choice: object):
        self.asked = []
        self.context = listening(lambda request: self.asked.append(request) or completion(message, finish, **choice))

    def __enter__(self):
        self.endpoint = self.context.__enter__()
        return self

    def __exit__(self, *error): return self.context.__exit__(*error)


@pytest.mark.parametrize(('message', 'thoughts', 'text'), [
    (dict(content=ANSWER), None, ANSWER), (dict(content='<think>\nHm.\n</think>\n\n' + ANSWER), 'Hm.', ANSWER),
    (dict(content=ANSWER, reasoning_content='Hm.'), 'Hm.', ANSWER), (dict(content=ANSWER, reasoning='Hm.'), 'Hm.', ANSWER),
    (dict(content=None, reasoning_content='Hm'), 'Hm', ''), (dict(content='', reasoning='Hm'), 'Hm', ''),
    (dict(content='Hm.\n</think>\n\n' + ANSWER), 'Hm.', ANSWER), (dict(content='<think>\nHm'), 'Hm', ''),
    (dict(content='<think> is a mark, as I said.', reasoning_content='Hm.'), 'Hm.', '<think> is a mark, as I said.'),
    (dict(content=ANSWER, reasoning_content=''), None, ANSWER), (dict(content=ANSWER, reasoning=None), None, ANSWER),
    (dict(content=[dict(type='thinking', thinking=[dict(type='text', text='Hm.')]), dict(type='text', text=ANSWER)]), 'Hm.', ANSWER)])
def test_a_server_tells_thoughts_in_many_ways(message, thoughts, text, tmp_path):
    with Server(message) as server:
        for _ in range(2):  # from the server, and from the file
            [found], _ = ask(server.endpoint, [turns('What is heat?')], 16, file=tmp_path/'answers.jsonl')
            assert (found.thoughts, found.text, found.lost) == (thoughts, text, text == '')
    assert len(server.asked) == 1


def test_options_and_room_for_thoughts_are_sent():
    with Server(dict(content=ANSWER)) as server:
        endpoint = Endpoint(server.endpoint.url, 'm', retries=0, options='enable_thinking=false effort=low', thoughts=100)
        _next_turns(endpoint, [turns('q')], 16)
        _next_turns(server.endpoint, [turns('q')], 16, thoughts=50)
        _next_turns(server.endpoint, [turns('q')], 16)
    assert [request['max_tokens'] for request in server.asked] == [116, 66, 16]
    kwargs = [request.get('chat_template_kwargs') for request in server.asked]
    assert kwargs == [dict(enable_thinking=False, effort='low'), None, None]


@pytest.mark.parametrize(('message', 'finish', 'verdict'), [
    (dict(content='<think>\nIs heat motion?'), 'length', 'no question'),
    (dict(content=None, reasoning_content='Is heat motion?'), 'length', 'no question'),
    (dict(content='<think>\nIs it?\n</think>\nWhat is heat in a body?'), 'stop', '')])
def test_a_far_teacher_writes_no_thought_as_a_question(message, finish, verdict, tmp_path, capsys):
    with Server(message, finish) as server: [chat], _ = _write_reading(server.endpoint, [paper(1)])
    assert verdict in chat['problem'] and bool(chat['problem']) == bool(verdict) and 'thinks aloud in 1 of 1' in capsys.readouterr().out
    assert chat['question'] == ('' if verdict else 'What is heat in a body?')


def test_a_set_counts_the_thoughts_that_came_to_no_answer(tmp_path, capsys):
    splits = {name: [paper(n) | dict(id=f'{name}{n}', title=f'{name} heat {n}') for n in range(3)] for name in ('train', 'valid', 'test')}
    with Server(dict(content='<think>\nWhat is wanted here?'), 'length') as server:
        report = instruct.build(splits, tmp_path/'set', server.endpoint, kinds='answer title', written=3)
    assert report['filters']['thoughts']['count'] == 3 and report['filters']['truncated']['count'] == 0
    assert {sample['reason'] for sample in report['filters']['thoughts']['samples']} == {instruct._is_thought(dict(lost=True), {})}
    assert 'thoughts 3' in capsys.readouterr().out


def test_targets_are_those_of_the_answer_behind_the_thoughts(tmp_path):
    tokenizer = TOKENIZERS['chatml']
    words = [tokenizer.decode([i]) for text in ('Hm.\n</think>\n\n', ANSWER) for i in encode(tokenizer, text)]
    told = [dict(token=word, logprob=-0.1, bytes=list(word.encode())) for word in words]
    told = [word | dict(top_logprobs=[word]) for word in told]
    chats = [dict(messages=turns('What is heat?', 'x'), paper_id='p', kind='title', author='paper')]
    with Server(dict(content=''.join(words)), logprobs=dict(content=told)) as server:
        found = _remote_targets(tmp_path, server.endpoint, tokenizer, chats, k=1, context=128)
        rows, _ = send(server.endpoint, [dict(messages=turns('q'), max_tokens=4, temperature=0, logprobs=True, top_logprobs=1)])
    assert found.chats[0]['messages'][-1]['content'] == ANSWER
    learnt = found.packed.input_ids[found.packed.loss_mask].tolist()
    assert learnt[:-1] == encode(tokenizer, ANSWER) and rows[0]['text'].startswith('Hm.')
    assert _align_answer(ANSWER, [], True, _lexicon(tokenizer), True) is None
