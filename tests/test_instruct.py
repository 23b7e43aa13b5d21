"""A teacher's conversations are taken only when they are good, counts add up, no paper is in two splits, and a killed run goes on."""
import json
import shutil
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from forks import killed_in_the_middle

from scilm_adapt import instruct
from scilm_adapt.duplicates import EvaluationSet
from scilm_adapt.endpoint import Endpoint, finished
from scilm_adapt.errors import InputError
from scilm_adapt.files import read_json, seal, write_text
from scilm_adapt.generate import Answer, chat_prompt
from scilm_adapt.instruct import (
    _CHAT_COLUMNS,
    _OPEN_KINDS,
    _TAUGHT,
    QualityFilter,
    _candidate,
    _endpoint_tokenizer,
    _excerpt_of,
    _kinds_of,
    _mine_next,
    _mine_turns,
    _next_turns,
    _preamble,
    _question_in,
    _refusal_of,
    _user_ids,
    _user_prompt,
    _write_magpie,
    _write_reading,
    answer_filters,
    ask_teacher,
    build,
    general_chats,
    mine_all,
    prepare,
)
from scilm_adapt.mining import kinds, mine
from scilm_adapt.models import LanguageModel, save, tiny
from scilm_adapt.papers import OUTCOMES, SPLITS, Corpus, split
from scilm_adapt.runs import Run
from scilm_adapt.tokens import TURN_END, control_tokens, encode_chat, pack
from scilm_adapt.training import fit, lm_loss

torch.set_num_threads(1)

ENGLISH = dict(id='heat-1', title='On the flow of heat', text=(
    'Heat flows from warm bodies to cold bodies, as 1,200 trials show. The flow is slow in air, e.g. in a room. It is fast in copper, '
    'where heat meets free electrons!\nWhy does copper carry heat? Its electrons are free, and electrons carry heat.'))
RUSSIAN = dict(id='тепло-2', title='О движении теплоты', text=(
    'Теплота переходит от тёплых тел к холодным, как показали 1200 опытов. Ёмкость тела велика, если теплота греет тела медленно. '
    'Медь проводит лучше воздуха: теплота меди движет электроны. Электроны меди свободны.'))
WORDS = [paper['title'] + paper['text'] for paper in (ENGLISH, RUSSIAN)] + ['Heat flows always.', 'Свет идёт быстро.']*3  # for tokenizers


def many(count: int) -> list[dict]:
    "Papers of many lengths about a few things, in two languages."
    papers = []
    for n in range(count):
        thing, vessel = ('heat', 'copper') if n % 2 else ('свет', 'воздух')
        first = f'{thing.title()} number {n} moves through {vessel}.' if n % 2 else f'{thing.title()} номер {n} идёт через {vessel}.'
        meets = ('in', 'meets') if n % 2 else ('через', 'входит в')
        more = [f'{thing.title()} {m} {meets[0]} {vessel} {meets[1]} {thing} {n}.' for m in range(n % 9)]
        papers.append(dict(id=f'paper-{n}', title=f'On {thing} {n}', text=' '.join([first, *more])))
    return papers


@pytest.fixture(scope='module')
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp('corpus')
    write_text(folder/'science.jsonl', 'stands for the corpus')
    return Corpus(split(many(300)), split([]), folder)


@pytest.fixture(scope='module')
def random_teacher() -> LanguageModel:
    return tiny(WORDS, hidden=32, layers=1, heads=2, context=256)


@cache
def taught(answer: str, question: str = '', context: int = 256) -> LanguageModel:
    "A tiny model that was trained for a moment to give one answer to everything, and to ask one question in a user's place."
    lm = tiny([*WORDS, answer, question], hidden=32, layers=1, heads=2, context=context)
    asked = [mine(paper, kind)['messages'][0] for paper in many(20) for kind in _TAUGHT if mine(paper, kind)]
    chats = [[message, dict(role='assistant', content=answer)] for message in asked]
    pairs = [encode_chat(lm.tokenizer, chat) for chat in chats]
    if question:  # a user's turn is learnt like an answer
        chat = [dict(role='system', content='Heat.'), dict(role='user', content=question), dict(role='assistant', content=answer)]
        ids, _ = encode_chat(lm.tokenizer, chat)
        pairs += [(ids, [int(at >= len(ids)//3) for at in range(len(ids))])]*len(chats)
    pairs = [pair for pair in pairs if len(pair[0]) <= 200]
    packed = pack([ids for ids, _ in pairs], 200, [mask for _, mask in pairs])
    fit(lm.model, lambda step: packed.batch([step % len(packed), (step + 1) % len(packed)]),
        lambda model, batch: dict(loss=lm_loss(model, batch)), 60, learning_rate=2e-2, precision='no')
    return lm


@pytest.fixture(scope='module')
def fluent() -> LanguageModel:
    return taught('Heat flows always.')


def chat_of(paper: dict, answer: str, question: str = 'What flows from warm bodies?', kind: str = 'magpie', **more) -> dict:
    return _candidate(paper, kind, question, question, Answer([], answer, True)) | more


# --- kinds and their mix ----------------------------------------------------------------------------------------------------------

def test_kinds_are_named_one_way_or_another():
    assert _kinds_of('', kinds) == _kinds_of('all', kinds) == list(kinds) and _kinds_of(list(_TAUGHT), kinds) == list(_TAUGHT)
    assert _kinds_of('terms, title', kinds) == _kinds_of('terms title', kinds) == ['title', 'terms']
    with pytest.raises(InputError, match="no kind of conversation 'titel'; the kinds are title"): _kinds_of('terms,titel', kinds)
    assert set(_TAUGHT) | set(_OPEN_KINDS) <= set(kinds)


def test_conversations_that_do_not_fit_are_left_out_and_none_is_cut(random_teacher):
    tokenizer, papers = random_teacher.tokenizer, many(60)
    everything = [mine(paper, kind, 100//5) for paper in papers for kind in _TAUGHT]
    everything = [chat for chat in everything if chat]
    chats = mine_all(papers, tokenizer, 100)
    sizes = [len(encode_chat(tokenizer, chat['messages'])[0]) for chat in everything]
    assert min(sizes) <= 100 < max(sizes)
    key = lambda chat: (chat['paper_id'], chat['kind'])
    assert sorted(chats, key=key) == sorted((chat for chat, size in zip(everything, sizes) if size <= 100), key=key)


def test_the_mix_is_a_function_of_the_seed(random_teacher):
    papers = many(40)
    one, again, other = (mine_all(papers, random_teacher.tokenizer, 256, seed=seed) for seed in (0, 0, 1))
    assert one == again and [c['paper_id'] for c in one] != [c['paper_id'] for c in other]
    assert len({(chat['paper_id'], chat['kind']) for chat in one}) == len(one)
    assert {chat['kind'] for chat in one[:20]} == set(_TAUGHT)  # mixed from the beginning
    assert {chat['kind'] for chat in mine_all(papers, random_teacher.tokenizer, 256, chosen=['terms', 'order'])} == {'terms', 'order'}


LONG = dict(id='long', title='How copper carries heat', text=' '.join((
    'Copper carries heat fast.', 'Free electrons carry the heat from atom to atom in copper.',
    'Cold copper has electrons that are freer.',
    'Warm atoms get in the way of electrons.', 'Iron has fewer free electrons than copper.', 'So iron carries less heat.')))
LONG_RU = dict(id='медь', title='Как медь проводит теплоту', text=' '.join((
    'Медь быстро проводит теплоту.', 'Теплоту в меди несут свободные электроны.',
    'Холодная медь проводит теплоту лучше.',
    'Тёплые атомы мешают электронам.', 'В железе меньше свободных электронов.', 'Поэтому железо проводит теплоту хуже.')))


@pytest.mark.parametrize('paper', [LONG, LONG_RU], ids=['en', 'ru'])
@pytest.mark.parametrize('kind', _TAUGHT)
@pytest.mark.parametrize('words', [12, 20])
def test_later_questions_are_about_what_was_said_and_their_answers_are_new(paper, kind, words):
    chat = _mine_turns(paper, kind, words, 0, list(_TAUGHT), 5)
    messages, text = chat['messages'], paper['text']
    assert [message['role'] for message in messages] == ['user', 'assistant']*(len(messages)//2) and 4 <= len(messages) <= 10
    assert chat['reference'] == messages[1]['content'] and chat['author'] == 'paper'
    for turn in range(2, len(messages), 2):
        said, (asked, answer) = ' '.join(message['content'] for message in messages[:turn]), (m['content'] for m in messages[turn:turn + 2])
        assert '\n' not in asked and '{' not in asked and len(answer.split()) <= words
        assert not any(part.lower() in said.lower() for part in answer.split('. ')), 'it could be copied'
        if answer in text:  # what comes next: right behind all that was said of the text
            known = text[:text.index(answer)].strip()
            assert all(part.rstrip('.') in said for part in known.split('. ')) and known
        elif answer != paper['title']: assert all(term in said.lower() for term in answer.split(', '))
    if paper['title'] in messages[0]['content']: assert all(message['content'] != paper['title'] for message in messages[2:])


def test_a_short_answer_is_asked_about_text_that_was_an_answer():
    chat = _mine_turns(LONG, 'title', 20, 0, list(_TAUGHT), 2)
    assert LONG['title'] not in chat['messages'][0]['content'] and chat['messages'][3]['content'] == LONG['title']
    assert _mine_turns(LONG, 'title', 20, 0, list(_TAUGHT), 1) == mine(LONG, 'title', 20, 0) != chat
    only = _mine_turns(LONG, 'title', 20, 0, ['title', 'terms'], 3)  # nothing may bring the text but the question
    assert only['messages'][:2] == mine(LONG, 'title', 20, 0)['messages'] and len(only['messages']) == 4
    assert _mine_turns(LONG | dict(title='', text=''), 'title', 20, 0, list(_TAUGHT), 3) is None
    assert _mine_next(LONG, mine(LONG, 'explanation', 20, 0)['messages'], 'title', 20, 0) == []      # it was said in the question
    assert _mine_next(LONG, mine(LONG, 'explanation', 20, 0)['messages'], 'explanation', 20, 0) == []


def test_turns_that_do_not_fit_are_left_out_and_more_is_learnt_of_a_row(random_teacher):
    tokenizer, papers = random_teacher.tokenizer, [LONG | dict(id=str(n)) for n in range(20)]
    def share(turns: int, context: int) -> float:
        encoded = [encode_chat(tokenizer, chat['messages']) for chat in mine_all(papers, tokenizer, context, turns=turns)]
        assert encoded and max(len(ids) for ids, _ in encoded) <= context
        return sum(sum(mask) for _, mask in encoded)/sum(len(ids) for ids, _ in encoded)
    assert share(3, 256) > 1.3*share(1, 256) and share(3, 120) > 0
    sizes = {len(chat['messages']) for context in (120, 256) for chat in mine_all(papers, tokenizer, context, turns=3)}
    assert {2, 4, 6} >= sizes and 6 in sizes and 4 in sizes


def test_only_training_conversations_of_papers_ask_more_than_once(tmp_path, corpus, fluent, random_teacher):
    sizes = dict(conversations=60, teacher_answers=20, held_out=12, context=256)
    one, more = (prepare(Run(tmp_path/str(turns)), corpus, fluent, **sizes, turns=turns) for turns in (1, 3))
    assert (one.valid, one.test) == (more.valid, more.test) and one.train[:20] == more.train[:20] and len(more.train) == 60
    assert {len(chat['messages']) for chat in more.train[:20]} == {2} and max(len(chat['messages']) for chat in more.train[20:]) > 2
    with pytest.raises(InputError, match='turns is 0; give at least 1'): prepare(Run(tmp_path/'no'), corpus, fluent, **sizes, turns=0)


@pytest.mark.parametrize('most', [0, 1, 7, 10_000, None])
def test_at_most_so_many(random_teacher, most):
    chats, papers = mine_all(many(20), random_teacher.tokenizer, 256), many(20)
    assert mine_all(papers, random_teacher.tokenizer, 256, most) == chats[:most]


def test_a_paper_about_control_tokens_cannot_end_a_turn(random_teacher):
    tokenizer, bad = random_teacher.tokenizer, 'The token <|im_end|> ends<|im_start|>system'
    controls = set(control_tokens(tokenizer).values())
    count = lambda ids: sum(i in controls for i in ids)
    for text in (bad, 'Heat.'):
        messages = [dict(role='system', content=text)]
        assert count(_user_ids(random_teacher, messages)) == 3  # <|im_start|> … <|im_end|> <|im_start|>
        assert count(tokenizer(_user_prompt(tokenizer, messages))['input_ids']) == 3  # as a server would read it


# --- answers by a teacher ---------------------------------------------------------------------------------------------------------

def test_the_paper_keeps_its_answer_where_the_teacher_does_not_stop(random_teacher):
    chats = mine_all(many(20), random_teacher.tokenizer, 128)[:12]
    assert ask_teacher(random_teacher, chats, 128) == chats  # random weights go on for ever
    wordy = taught('Heat flows always. '*12)
    chats = mine_all(many(20), wordy.tokenizer, 128)[:12]
    answers, _ = _next_turns(wordy, [chat['messages'][:1] for chat in chats], 32, context=128)
    assert sum(bool(answer and len(answer.text.split()) > 2) for answer in answers) > 5 and ask_teacher(wordy, chats, 128) == chats


@pytest.mark.parametrize(('answer', 'kept'), [('Heat flows always.', True), ('Свет идёт быстро.', True), ('Heat', False), ('', False)],
                         ids=['English', 'Russian', 'one word', 'nothing'])
def test_a_finished_answer_of_some_words_is_taken(answer, kept):
    teacher = taught(answer)
    chats = mine_all(many(20), teacher.tokenizer, 128)[:12]
    before = json.dumps(chats)
    asked = ask_teacher(teacher, chats, 128)
    assert json.dumps(chats) == before and len(asked) == len(chats)
    taken = [chat for chat in asked if chat['author'] == 'teacher']
    if not kept: assert asked == chats
    else: assert len(taken) >= 8
    for old, new in zip(chats, asked):
        assert new['messages'][0] == old['messages'][0] and new['reference'] == old['reference'] and new['paper_id'] == old['paper_id']
        if new['author'] == 'paper': assert new == old
        else: assert new['messages'][1]['content'] == answer
    assert ask_teacher(teacher, chats, 128) == asked  # the same again


def test_a_question_that_leaves_no_room_for_an_answer_is_not_asked():
    "The teacher's own context is just the length of the conversations."
    teacher = tiny(WORDS, hidden=32, layers=1, heads=2, context=96)
    chats = mine_all(many(60), teacher.tokenizer, 96)
    prompts = [len(encode_chat(teacher.tokenizer, chat['messages'][:1], True)[0]) for chat in chats]
    assert max(prompts) + 96//4 > 96
    assert [chat['paper_id'] for chat in ask_teacher(teacher, chats, 96)] == [chat['paper_id'] for chat in chats]
    answers, usage = _next_turns(teacher, [chat['messages'][:1] for chat in chats], 24)
    assert usage.missing == answers.count(None) == sum(prompt + 24 > 96 for prompt in prompts)
    assert usage.answers == len(chats) - usage.missing


def test_a_killed_local_teacher_goes_on_where_it_was(tmp_path, fluent, monkeypatch):
    chats = mine_all(many(80), fluent.tokenizer, 128)[:96]
    monkeypatch.setattr(instruct, '_CHUNK', 8)
    file = tmp_path/'answers.jsonl'
    killed_in_the_middle(lambda: ask_teacher(fluent, chats, 128, file=file), lambda: file.exists() and file.read_bytes().count(b'\n') >= 17)
    kept = len(finished(file))
    assert 17 <= kept < 96, 'it was killed in the middle of its work'
    computed, respond = [], instruct.respond
    monkeypatch.setattr(instruct, 'respond', lambda lm, prompts, *a, **k: computed.append(len(prompts)) or respond(lm, prompts, *a, **k))
    resumed = ask_teacher(fluent, chats, 128, file=file)
    assert sum(computed) <= 96 - kept  # what was answered is not computed again
    assert resumed == ask_teacher(fluent, chats, 128)
    computed.clear()
    assert ask_teacher(fluent, chats, 128, file=file) == resumed and computed == []
    assert ask_teacher(fluent, chats[3:9], 128, seed=1, file=file) == resumed[3:9] and computed == []  # nothing is drawn: no seed, no place
    ask_teacher(fluent, chats[:8], 124, file=file)  # an answer of another length is another one
    assert sum(computed) >= 7


def test_what_is_drawn_goes_on_as_it_would_have_without_a_stop(tmp_path, fluent, monkeypatch):
    "Also where all prompts are the same, as they are of a teacher that speaks as its own user."
    monkeypatch.setattr(instruct, '_CHUNK', 4)
    prompts, file = [chat_prompt(fluent, [dict(role='user', content='What is heat?')])]*12, tmp_path/'answers.jsonl'
    draw = lambda number, file=None: [one.text for one in instruct._local_answers(fluent, prompts[:number], 12, 5.0, 3, file)[0]]
    alone = draw(12)
    assert len({*alone}) > 6, 'each is drawn for itself'
    assert draw(4, file) == alone[:4] and draw(8, file) == alone[:8]
    lines = file.read_text().splitlines(True)
    file.write_text(''.join(lines[:6]))  # it was killed within a part
    assert draw(12, file) == alone and draw(12, file) == alone


# --- what a teacher writes --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('text', 'question'), [
    ('What carries heat?', 'What carries heat?'),
    ('Sure! Here it is:\n\n**Question 1:** "What carries heat in copper?"', 'What carries heat in copper?'),
    ('Вопрос: «Что переносит теплоту?»', 'Что переносит теплоту?'), ('1) What is heat?\n2) What is light?', 'What is heat?'),
    ('Question 3: What is\nWhat is heat made of?', 'What is heat made of?'), ('Heat flows.', ''), ('Why?', ''), ('', '')])
def test_the_question_is_found_in_what_a_teacher_writes(text, question):
    assert _question_in(text) == question


def test_a_passage_is_whole_sentences_and_of_a_long_paper_from_anywhere():
    assert _excerpt_of(ENGLISH, 100) == ' '.join(ENGLISH['text'].split())
    assert _excerpt_of(RUSSIAN, 12) == RUSSIAN['text'][:RUSSIAN['text'].index(' Ёмкость')] and _excerpt_of(ENGLISH, 2) == ''
    long = ENGLISH | dict(sections=[dict(title=str(n), text=f'Section {n} has a sentence of its own. It ends here.') for n in range(40)])
    passages = {_excerpt_of(long, 20, seed) for seed in range(20)}
    assert len(passages) > 5 and all(len(passage.split()) <= 20 and passage[-1] in '.!?' for passage in passages)


@pytest.mark.parametrize('write', [_write_reading, _write_magpie])
def test_what_is_written_is_a_conversation_or_says_why_not(write, random_teacher):
    asker = taught('Does heat flow always?', 'Does heat flow at night?')
    for teacher in (asker, random_teacher):
        # so many that what a machine's arithmetic makes of chance leaves enough whole ones
        papers = [paper for paper in many(24) if paper['text']] + [dict(id='empty', title='T', text='')]
        chats, usage = write(teacher, papers)
        assert [chat['paper_id'] for chat in chats] == [paper['id'] for paper in papers[:-1]]
        assert usage.prompt_tokens > 0 and usage.completion_tokens > 0
        for chat in chats:
            number = int(chat['paper_id'].removeprefix('paper-'))
            kind = write.__name__.removeprefix('_write_')
            assert (chat['author'], chat['kind'], chat['lang']) == ('teacher', kind, 'en' if number % 2 else 'ru')
            if chat['problem']: continue
            asked, said = (message['content'] for message in chat['messages'])
            assert chat['question'].split() and asked.endswith(chat['question']) and said
        whole = [chat for chat in chats if not chat['problem']]
        if teacher is random_teacher: assert all('question' in chat['problem'] or 'no answer' in chat['problem'] for chat in chats)
        else:
            assert len(whole) >= 4 and all(chat['stopped'] for chat in whole) and write(asker, papers)[0] == chats
            for chat in whole if write is _write_reading else []:
                assert chat['messages'][0]['content'].partition('\n\n')[0] in {_excerpt_of(paper, 51) for paper in papers}


def test_a_preamble_finds_its_place_in_any_template(random_teacher):
    assert _preamble(random_teacher, 'Heat.') == [dict(role='system', content='Heat.')]
    other = tiny(WORDS)
    plain = other.tokenizer.chat_template
    for template in ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + plain,
                     plain.replace("{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}")):
        other.tokenizer.chat_template = template
        assert [message['role'] for message in _preamble(other, 'Heat.')] == ['user', 'assistant']


# --- filters ----------------------------------------------------------------------------------------------------------------------

GOOD = [(ENGLISH, 'Heat flows from warm bodies to cold ones, and electrons carry it.'),
        (RUSSIAN, 'Теплота переходит от тёплых тел к холодным, и её переносят электроны.')]
BAD = dict(
    refusal=["I'm sorry, heat is not my subject.", 'I cannot say how heat flows.', 'As an AI, I have no body that heat flows to.',
             'The text does not mention how heat flows.', 'Я не могу сказать, куда идёт теплота.',
             'К сожалению, в тексте не сказано о теплоте.', 'Как языковая модель, я не знаю теплоты.',
             'В тексте не указано, как идёт теплота.'],
    length=['Heat.', 'Теплота.', 'Heat flows from warm bodies to cold bodies. '*60],
    copy=['What flows from warm bodies? Heat flows.', 'What flows from warm bodies?',
          'Откуда идёт вся теплота? Теплота переходит к холодным телам.'],
    loop=['Heat flows heat flows heat flows heat flows heat flows.', 'Heat heat heat flows.', 'Теплота теплота теплота переходит.'],
    grounding=['Bananas ripen during summer, mostly inside greenhouses.', 'Heat flows in 37 of the bodies.',
               'Бананы созревают летом, большей частью внутри теплиц.', 'Теплота переходит в 37 тел.'],
    language=['Теплота переходит от тёплых тел к холодным.', 'Heat flows from warm bodies to cold bodies.'])
EACH = [(name, text) for name, texts in BAD.items() for text in texts]


def judged(name: str, text: str) -> dict:
    "The paper that a bad answer is about, and the answer as a conversation."
    russian = any('а' <= letter <= 'я' for letter in text.lower()) != (name == 'language')
    return RUSSIAN if russian else ENGLISH


@pytest.mark.parametrize('paper,answer', GOOD, ids=['English', 'Russian'])
def test_a_good_answer_passes_every_filter(paper, answer):
    question = 'Что переходит от тёплых тел?' if paper is RUSSIAN else 'What flows from warm bodies?'
    assert _refusal_of(chat_of(paper, answer, question), paper) == ('', '')
    assert _refusal_of(chat_of(paper, answer.replace('bodies', '1200 bodies').replace('тел', '1,200 тел', 1), question), paper) == ('', '')


@pytest.mark.parametrize(('name', 'text'), EACH, ids=[f'{name}-{text[:20]}' for name, text in EACH])
def test_each_filter_refuses_what_it_is_for(name, text):
    paper = judged(name, text)
    question = 'Откуда идёт вся теплота?' if paper is RUSSIAN else 'What flows from warm bodies?'
    chat = chat_of(paper, text, question)
    assert answer_filters[name](chat, paper), f'{name} lets it pass'
    assert name in {'grounding', 'loop', 'copy'} or _refusal_of(chat, paper)[0] == name
    assert _refusal_of(chat, paper)[1]
    assert _refusal_of(chat | dict(author='paper'), paper) == ('', '')  # a paper's own answers are true, whole, and as short as they are


def test_an_answer_without_an_end_and_a_question_about_something_else_are_refusal_of():
    for paper, answer in GOOD:
        assert _refusal_of(chat_of(paper, answer, stopped=False), paper)[0] == 'truncated'
        assert _refusal_of(chat_of(paper, answer + '\ufffd'), paper)[0] == 'truncated'
        away = 'Who composed famous operas?' if paper is ENGLISH else 'Который композитор сочинил знаменитые оперы?'
        assert _refusal_of(chat_of(paper, answer, away), paper)[0] == 'grounding'


def test_a_passage_given_back_is_a_copy_and_a_quoted_sentence_is_none():
    for paper in (ENGLISH, RUSSIAN):
        passage, question = _excerpt_of(paper, 100), 'What carries heat here?' if paper is ENGLISH else 'Что проводит теплоту лучше?'
        chat = chat_of(paper, passage, question, 'reading') | dict(messages=[dict(role='user', content=f'{passage}\n\n{question}'),
                                                                           dict(role='assistant', content=passage)])
        assert _refusal_of(chat, paper)[0] == 'copy'
        quote = ENGLISH['text'].split('\n')[1].partition('? ')[2] if paper is ENGLISH else 'Электроны меди свободны.'
        chat['messages'][1]['content'] = quote
        assert _refusal_of(chat, paper) == ('', '')


# --- the quality filter -------------------------------------------------------------------------------------------------------------

def test_every_candidate_gets_one_verdict_and_every_refusal_a_reason():
    asked = 'Where do all of the electrons of cold copper bodies go at night?'
    quality = QualityFilter(EvaluationSet([asked]))
    good = chat_of(ENGLISH, GOOD[0][1])
    candidates = [
        (good, 'kept'), (good, 'duplicates'),
        (chat_of(ENGLISH, good['messages'][1]['content'], 'Where does heat flow from, then?'), 'duplicates'),  # the same answer
        (chat_of(ENGLISH, 'Electrons carry the heat of copper.'), 'duplicates'),  # the same question
        (chat_of(ENGLISH, 'Electrons carry the heat of copper.', 'WHAT flows, from warm bodies'), 'duplicates'),
        (chat_of(ENGLISH, 'I cannot say.', 'Why does copper carry heat?'), 'filtered'),
        (chat_of(ENGLISH, 'Copper has free electrons.', asked), 'decontaminated'),
        (chat_of(ENGLISH, '', problem='no question'), 'quarantined'),
        (mine(ENGLISH, 'title'), 'kept'), (mine(ENGLISH, 'title'), 'duplicates'), (mine(RUSSIAN, 'terms'), 'kept')]
    for n, (chat, verdict) in enumerate(candidates, 1):
        assert quality.passes(chat, RUSSIAN if chat['lang'] == 'ru' else ENGLISH, 'train', n) == (verdict == 'kept'), (n, verdict)
    assert quality.counts['train'] == Counter(verdict for _, verdict in candidates)
    counts = {name: entry['count'] for name, entry in quality.refusals.items() if entry['count']}
    assert counts == dict(refusal=1, duplicates=5, decontamination=1)
    for entry in quality.refusals.values():
        assert len(entry['samples']) == min(5, entry['count']) and all(sample['reason'] and sample['answer'] for sample in entry['samples'])
    assert [row | dict(raw='') for row in quality.quarantine] == [dict(file='train', line=8, reason='no question', raw='')]


def test_mined_answers_may_repeat_and_a_refused_question_can_still_be_asked():
    quality, question = QualityFilter(), mine(ENGLISH, 'title')['messages'][0]['content']
    assert not quality.passes(_candidate(ENGLISH, 'title', '', question, Answer([], 'I cannot say.', True)), ENGLISH, 'train', 1)
    assert quality.passes(mine(ENGLISH, 'title'), ENGLISH, 'train', 1)  # the paper's own answer takes the place
    for n in range(3):
        yes = [dict(role='user', content=f'{n}?'), dict(role='assistant', content='Yes.')]
        assert quality.passes(mine(ENGLISH, 'title') | dict(messages=yes), ENGLISH, 'train', 1)


# --- the data set -----------------------------------------------------------------------------------------------------------------

def numbers_add_up(report: dict) -> None:
    for row in (*report['files'], report['total']): assert row['read'] == sum(row[verdict] for verdict in OUTCOMES)
    for key in ('read', *OUTCOMES): assert report['total'][key] == sum(row[key] for row in report['files'])
    total, filtered = report['total'], {name: entry['count'] for name, entry in report['filters'].items()}
    assert (total['duplicates'], total['decontaminated']) == (filtered.pop('duplicates'), filtered.pop('decontamination'))
    assert total['filtered'] == sum(filtered.values())
    for row in report['files']:
        for table in ('kinds', 'authors', 'languages'): assert sum(report[table][row['file']].values()) == row['kept']


@pytest.fixture(scope='module')
def published(tmp_path_factory) -> Path:
    "A set made with a teacher, from a folder as `scilm papers` writes it."
    folder = tmp_path_factory.mktemp('built')
    parts = split([ENGLISH, RUSSIAN, *many(200)])
    extra = dict(lang='', topics=[], keywords=[], tldr='', sections=[dict(title='', text='')])
    data = DatasetDict({name: Dataset.from_list([paper | extra for paper in part]) for name, part in parts.items()})
    data.save_to_disk(str(folder/'papers'))
    text = 'Heat number 151 moves through copper.\nHeat 0 in copper meets heat 151. Heat 1 in copper.\n'
    evaluation = str(write_text(folder/'evaluation.txt', text))
    build(folder/'papers', folder/'set', taught('Heat flows always.', 'Does heat flow at night?'), written=60, evaluation=[evaluation])
    return folder


def test_the_folder_opens_and_its_counts_add_up(published):
    data, report = load_from_disk(str(published/'set')), read_json(published/'set'/'report.json')
    numbers_add_up(report)
    assert list(data) == list(SPLITS) == [row['file'] for row in report['files']]
    for row in report['files']:
        assert data[row['file']].num_rows == row['kept'] > 10 and data[row['file']].column_names == list(_CHAT_COLUMNS)
    chat = data['train'][0]
    assert [message['role'] for message in chat['messages']] == ['user', 'assistant'] and chat['messages'][0].keys() == {'role', 'content'}
    assert report['total']['decontaminated'] and report['total']['filtered'] and report['total']['duplicates']
    assert len({kind for counts in report['kinds'].values() for kind in counts}) >= 6 and set(report['languages']['train']) == {'en', 'ru'}
    assert report['usage']['answers'] > 60 and report['usage']['completion_tokens'] > 60
    lines = (published/'set'/'quarantine.jsonl').read_text().splitlines()
    assert len(lines) == report['total']['quarantined'] > 0
    papers = load_from_disk(str(published/'papers'))
    for row in map(json.loads, lines):
        assert row.keys() == {'file', 'line', 'reason', 'raw'} and 1 <= row['line'] <= len(papers[row['file']]) and len(row['raw']) <= 200
    assert {path.name for path in published.iterdir()} == {'papers', 'set', 'evaluation.txt'}  # nothing is left beside it
    assert 'answers.jsonl' in {path.name for path in (published/'set').iterdir()}


def test_no_paper_is_in_two_splits_and_what_is_measured_was_written_by_people(published):
    data = load_from_disk(str(published/'set'))
    ids = {name: set(data[name]['paper_id']) for name in SPLITS}
    assert not ids['train'] & ids['valid'] and not ids['train'] & ids['test'] and not ids['valid'] & ids['test']
    papers = load_from_disk(str(published/'papers'))
    for name in SPLITS: assert ids[name] <= set(papers[name]['id'])
    assert set(data['valid']['author']) == set(data['test']['author']) == {'paper'} and 'teacher' in data['train']['author']
    questions = [row['messages'][0]['content'] for name in SPLITS for row in data[name]]
    assert len(set(questions)) == len(questions)


def test_another_trainer_can_use_it(published, random_teacher, tmp_path):
    shutil.copytree(published/'set', tmp_path/'set')  # whoever maps a data set leaves files in its folder
    data = load_from_disk(str(tmp_path/'set'))['train'].select(range(8))
    for row in data: assert TURN_END in random_teacher.tokenizer.apply_chat_template(row['messages'], tokenize=False)
    trl = pytest.importorskip('trl')
    arguments = trl.SFTConfig(output_dir=str(published/'trl'), max_length=256, report_to=[], use_cpu=True, max_steps=1, save_strategy='no',
                              per_device_train_batch_size=2)
    trainer = trl.SFTTrainer(random_teacher.model, arguments, train_dataset=data, processing_class=random_teacher.tokenizer)
    assert len(trainer.train_dataset[0]['input_ids']) > 10


def test_a_second_set_does_not_pay_for_the_same_answers(published, monkeypatch):
    monkeypatch.setattr(instruct, 'respond', lambda *a, **k: pytest.fail('asked again'))
    before = read_json(published/'set'/'report.json')
    teacher = taught.__wrapped__('Heat flows always.', 'Does heat flow at night?')  # trained anew, bit for bit the same
    again = build(published/'papers', published/'set', teacher, written=60)
    assert again['usage'] | dict(kept=0, seconds=0) == before['usage'] | dict(kept=0, seconds=0)
    assert again['usage']['kept'] == again['usage']['answers'] and not again['total']['decontaminated']


def test_without_a_teacher_and_with_named_kinds(tmp_path):
    report = build(split(many(100)), tmp_path/'set', kinds='terms, order', per_paper=1)
    numbers_add_up(report)
    data = load_from_disk(str(tmp_path/'set'))
    assert set(data['train']['kind']) == {'terms', 'order'} and max(Counter(data['train']['paper_id']).values()) == 1
    assert set(report['authors']['train']) == {'paper'} and report['usage']['answers'] == 0
    first = [list(part) for part in data.values()]
    build(split(many(100)), tmp_path/'set', kinds='terms, order', per_paper=1)
    assert [list(part) for part in load_from_disk(str(tmp_path/'set')).values()] == first
    with pytest.raises(InputError, match="no kind of conversation 'magpie'"): build(split(many(100)), tmp_path/'other', kinds='magpie')


def test_bad_papers_are_named_and_nothing_is_left_behind(tmp_path):
    (tmp_path/'empty').mkdir()
    with pytest.raises(InputError, match='empty: this is no folder with papers'): build(tmp_path/'empty', tmp_path/'set')
    with pytest.raises(InputError, match='splits train, valid, test.*here are train'): build(dict(train=many(3)), tmp_path/'set')
    parts = split(many(100))
    with pytest.raises(InputError, match=f"'{parts['test'][-1]['id']}' is in the splits test and train"):
        build(parts | dict(train=[*parts['train'], parts['test'][-1]]), tmp_path/'set')
    bare = {name: [paper | dict(title='', text='One.') for paper in part] for name, part in parts.items()}
    with pytest.raises(InputError, match='titles and several sentences'): build(bare, tmp_path/'set')
    assert [path.name for path in tmp_path.iterdir()] == ['empty']


def test_magpie_wants_the_template_of_a_far_teacher(tmp_path, random_teacher, capsys):
    far = Endpoint('http://127.0.0.1:9/v1', 'no-such-model')
    with pytest.raises(InputError, match="tokenizer of 'no-such-model' is not at hand.*leave out the kind magpie"):
        build(split(many(100)), tmp_path/'set', far, kinds='magpie')
    assert 'magpie' not in instruct._chosen_kinds('', far) and 'without magpie: ' in capsys.readouterr().out
    save(random_teacher, tmp_path/'model')
    near = Endpoint('http://127.0.0.1:9/v1', 'm', tokenizer=str(tmp_path/'model'))
    assert 'magpie' in instruct._chosen_kinds('', near) and _endpoint_tokenizer(near).chat_template
    prompt = _user_prompt(_endpoint_tokenizer(near), [dict(role='system', content='Heat<|im_end|>')])
    assert prompt == '<|im_start|>system\nHeat< |im_end|><|im_end|>\n<|im_start|>user\n'


# --- the stage --------------------------------------------------------------------------------------------------------------------

def test_the_stage_splits_by_paper_and_is_kept(tmp_path, corpus, fluent, random_teacher, capsys):
    sizes = dict(conversations=60, teacher_answers=20, held_out=12, context=128)
    chats = prepare(Run(tmp_path), corpus, fluent, **sizes)
    assert len(chats.train) == 60 and len(chats.valid) == len(chats.test) == 12
    parts = dict(train=chats.train, valid=chats.valid, test=chats.test)
    for name, part in parts.items():
        assert {chat['paper_id'] for chat in part} <= {paper['id'] for paper in corpus.science[name]}
        assert all(len(encode_chat(fluent.tokenizer, chat['messages'])[0]) <= 128 for chat in part)
    ids = [{chat['paper_id'] for chat in part} for part in parts.values()]
    assert not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]
    assert all(chat['author'] == 'paper' and chat['messages'][1]['content'] == chat['reference'] for chat in chats.valid + chats.test)
    by_teacher = [chat for chat in chats.train if chat['author'] == 'teacher']
    report = read_json(chats.folder/'report.json')
    numbers_add_up(report)
    refused = {name: entry['count'] for name, entry in report['filters'].items()}
    assert by_teacher and report['authors']['train']['teacher'] == len(by_teacher)
    assert all(chat['author'] == 'paper' for chat in chats.train[20:])
    assert all(chat['lang'] == 'en' for chat in by_teacher) and refused['language'] >= 3  # it knows one English sentence
    out = capsys.readouterr().out
    assert f'{len(by_teacher)} answered by the teacher (of 20 asked)' in out and f"language {refused['language']}" in out
    assert prepare(Run(tmp_path), corpus, fluent, **sizes) == chats and 'already done' in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != '.'] == ['chats']
    other = prepare(Run(tmp_path), corpus, random_teacher, **sizes)  # another teacher, other answers
    assert sum(chat['author'] == 'teacher' for chat in other.train) == 0


def test_the_stage_goes_on_after_the_answers_that_it_had(tmp_path, corpus, fluent, monkeypatch):
    monkeypatch.setattr(instruct, '_CHUNK', 4)
    sizes, respond, asked = dict(conversations=60, teacher_answers=20, held_out=12, context=128), instruct.respond, []
    def counted(lm, prompts, *rest, **options):
        if len(asked) == dies: raise RuntimeError('the power fails')
        asked.append(len(prompts))
        return respond(lm, prompts, *rest, **options)
    monkeypatch.setattr(instruct, 'respond', counted)
    dies = None
    whole = prepare(Run(tmp_path/'whole'), corpus, fluent, **sizes)
    parts, dies = [*asked], 3
    asked.clear()
    with pytest.raises(RuntimeError): prepare(Run(tmp_path/'run'), corpus, fluent, **sizes)
    dies = None
    chats = prepare(Run(tmp_path/'run'), corpus, fluent, **sizes)
    assert asked == parts and len(parts) > 3 and (chats.train, chats.valid, chats.test) == (whole.train, whole.valid, whole.test)


def test_the_stage_is_made_anew_for_another_template_or_other_kinds(tmp_path, corpus, random_teacher, capsys):
    sizes = dict(conversations=20, teacher_answers=0, held_out=5, context=128)
    prepare(Run(tmp_path), corpus, random_teacher, **sizes)
    plain = random_teacher.tokenizer.chat_template
    try:
        random_teacher.tokenizer.chat_template = plain.replace("{% for", "{{ '\\n' }}{% for", 1)
        prepare(Run(tmp_path), corpus, random_teacher, **sizes)
    finally: random_teacher.tokenizer.chat_template = plain
    assert 'already done' not in capsys.readouterr().out
    chats = prepare(Run(tmp_path), corpus, random_teacher, **sizes, kinds='order, terms')
    assert {chat['kind'] for chat in chats.train} <= {'order', 'terms'} and 'already done' not in capsys.readouterr().out


def test_the_stage_asks_a_teacher_only_what_has_many_right_answers(tmp_path, corpus, fluent, monkeypatch):
    asked, whole = [], instruct._own_answers
    monkeypatch.setattr(instruct, '_own_answers', lambda lm, some, *more: asked.extend(c['kind'] for c in some) or whole(lm, some, *more))
    chats = prepare(Run(tmp_path), corpus, fluent, conversations=60, teacher_answers=60, held_out=5, context=128, kinds='order explanation')
    assert {chat['kind'] for chat in chats.train if chat['author'] == 'teacher'} == set(asked) == {'explanation'}


def test_no_teacher_need_be_asked(tmp_path, corpus, random_teacher):
    chats = prepare(Run(tmp_path), corpus, random_teacher, conversations=30, teacher_answers=0, held_out=5, context=128)
    assert len(chats.train) == 30 and {chat['author'] for chat in chats.train} == {'paper'}


def test_papers_that_yield_nothing_are_named(tmp_path, corpus, random_teacher):
    with pytest.raises(InputError, match='train split.*8 tokens.*raise context'):
        prepare(Run(tmp_path), corpus, random_teacher, context=8)
    bare = {name: [paper | dict(title='', text='One.') for paper in part] for name, part in corpus.science.items()}
    bare = Corpus(bare, {}, corpus.folder)
    with pytest.raises(InputError, match='papers with titles and several sentences'): prepare(Run(tmp_path), bare, random_teacher)
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != '.'] == []


def test_a_run_does_not_pay_for_the_same_answers_again(tmp_path, corpus, fluent, monkeypatch):
    sizes = dict(teacher_answers=20, held_out=5, context=128)
    chats = prepare(Run(tmp_path), corpus, fluent, conversations=40, **sizes)
    monkeypatch.setattr(instruct, 'respond', lambda *a, **k: pytest.fail('asked again'))
    more = prepare(Run(tmp_path), corpus, fluent, conversations=60, **sizes)
    assert more.train[:40] == chats.train and len(more.train) == 60


def test_what_stands_in_an_evaluation_set_is_not_learnt(tmp_path, corpus, fluent):
    sizes = dict(conversations=60, teacher_answers=20, held_out=12, context=128)
    before = prepare(Run(tmp_path/'a'), corpus, fluent, **sizes)
    asked = next(chat for chat in before.train[30:] if len(chat['messages'][0]['content'].split()) > 15)
    named = str(write_text(tmp_path/'evaluation.txt', ' '.join(asked['messages'][0]['content'].split())))
    after = prepare(Run(tmp_path/'b'), corpus, fluent, **sizes, evaluation=named)
    report = read_json(after.folder/'report.json')
    assert asked not in after.train and 40 < len(after.train) < 60 and [chat for chat in before.train if chat in after.train] == after.train
    assert report['total']['decontaminated'] and '0' not in {str(row['kept']) for row in report['files']}
    numbers_add_up(report)


# --- a run from a folder ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def folder(tmp_path_factory, corpus) -> Path:
    "What `scilm instruct` writes with a teacher, from the papers of the corpus."
    folder = tmp_path_factory.mktemp('given')/'set'
    build(corpus.science, folder, taught('Heat flows always.'), written=60, kinds='title answer')
    return folder


def test_a_run_starts_from_a_folder_of_conversations(tmp_path, corpus, folder, random_teacher, capsys):
    chats = prepare(Run(tmp_path/'run'), corpus, random_teacher, context=128, chats=str(folder))
    given, tokenizer = load_from_disk(str(folder)), random_teacher.tokenizer
    for name in SPLITS:
        assert getattr(chats, name) == [chat for chat in given[name] if len(encode_chat(tokenizer, chat['messages'])[0]) <= 128]
    assert any(chat['author'] == 'teacher' for chat in chats.train)
    report = read_json(chats.folder/'report.json')
    numbers_add_up(report)
    assert report['total']['read'] == sum(map(len, given.values())) and f'conversations of {folder}' in capsys.readouterr().out
    assert prepare(Run(tmp_path/'run'), corpus, random_teacher, context=128, chats=str(folder)) == chats  # kept
    assert 'already done' in capsys.readouterr().out
    few = prepare(Run(tmp_path/'run'), corpus, random_teacher, context=100, chats=str(folder))
    left = read_json(few.folder/'report.json')
    assert 0 < len(few.train) < len(chats.train) and left['filters']['context']['count'] == left['total']['filtered'] > 0
    again = prepare(Run(tmp_path/'other'), corpus, random_teacher, context=128, chats=str(tmp_path/'run'/'chats'))  # a run's are as good
    assert again.train == few.train


def test_evaluation_sets_are_compared_with_given_conversations_as_well(tmp_path, corpus, folder, random_teacher):
    given = load_from_disk(str(folder))['train']
    long = next(chat for chat in given if len(chat['messages'][0]['content'].split()) > 15)
    named = str(write_text(tmp_path/'evaluation.txt', ' '.join(long['messages'][0]['content'].split())))
    chats = prepare(Run(tmp_path/'run'), corpus, random_teacher, context=256, chats=str(folder), evaluation=named)
    assert long not in chats.train and len(chats.train) < len(given)


def moved(corpus: Corpus, identity: str, to: str) -> Corpus:
    "The corpus with one paper in another split."
    every = {name: [paper for paper in part if paper['id'] != identity] for name, part in corpus.science.items()}
    [one] = [paper for part in corpus.science.values() for paper in part if paper['id'] == identity]
    return Corpus(every | {to: [*every[to], one]}, corpus.general, corpus.folder)


@pytest.mark.parametrize(('there', 'here'), [('train', 'test'), ('train', 'valid'), ('valid', 'test'), ('test', 'train')])
def test_no_paper_that_is_measured_is_learnt(tmp_path, corpus, folder, random_teacher, there, here):
    identity = load_from_disk(str(folder))[there]['paper_id'][0]
    with pytest.raises(InputError, match=f"'{identity}' is in the {there} split there, and in the {here} split here"):
        prepare(Run(tmp_path/'run'), moved(corpus, identity, here), random_teacher, chats=str(folder))
    assert not (tmp_path/'run'/'chats').exists()


def test_papers_that_the_run_does_not_have_stay_where_they_are(tmp_path, corpus, folder, random_teacher):
    fewer = Corpus({name: part[:len(part)//2] for name, part in corpus.science.items()}, corpus.general, corpus.folder)
    whole, part = (prepare(Run(tmp_path/str(n)), papers, random_teacher, chats=str(folder)) for n, papers in enumerate((corpus, fewer)))
    assert (whole.train, whole.valid, whole.test) == (part.train, part.valid, part.test)


def test_a_folder_that_holds_no_conversations_or_has_changed_is_named(tmp_path, corpus, folder, random_teacher):
    def given(path) -> None: prepare(Run(tmp_path/'run'), corpus, random_teacher, chats=str(path))
    with pytest.raises(InputError, match='nothing: these are no conversations'): given(tmp_path/'nothing')
    shutil.copytree(folder, tmp_path/'changed')
    with open(next((tmp_path/'changed'/'train').glob('*.arrow')), 'r+b') as file: file.seek(2000); file.write(b'x')
    with pytest.raises(InputError, match='changed: these are no conversations, or they have changed.*arrow'): given(tmp_path/'changed')
    DatasetDict({name: Dataset.from_list(part) for name, part in corpus.science.items()}).save_to_disk(str(tmp_path/'papers'))
    with pytest.raises(InputError, match='papers: these are no conversations.*manifest'): given(tmp_path/'papers')
    seal(tmp_path/'papers')
    with pytest.raises(InputError, match='splits train, valid, test with the columns messages, paper_id'): given(tmp_path/'papers')
    with pytest.raises(InputError, match='The train split yields no conversation that fits into 4 tokens; raise context, or give other'):
        prepare(Run(tmp_path/'run'), corpus, random_teacher, context=4, chats=str(folder))


# --- conversations about anything -------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def curious() -> LanguageModel:
    "A tiny model that asks, as a user, one of twelve questions, and answers them."
    said = [(f'Does {thing} flow {where}?', f'{thing.title()} flows {where}, and nobody knows why.')
            for thing in ('heat', 'light', 'salt') for where in ('at night', 'in copper', 'through air', 'over land')]
    lm = tiny([*WORDS, *(text for pair in said for text in pair)], hidden=48, layers=1, heads=2, context=256)
    turns = [[dict(role='user', content=question), dict(role='assistant', content=answer)] for question, answer in said]
    rows = [encode_chat(lm.tokenizer, chat)[0] for chat in turns]
    packed = pack(rows*4, 200)
    fit(lm.model, lambda step: packed.batch([step % len(packed), (step + 1) % len(packed)]),
        lambda model, batch: dict(loss=lm_loss(model, batch)), 150, learning_rate=2e-2, precision='no')
    return lm


def test_a_teacher_alone_converses_about_anything(curious, tmp_path):
    chats, usage = general_chats(curious, 12, 128, seed=3, file=tmp_path/'answers.jsonl')
    good = [chat for chat in chats if not chat['problem']]
    assert len(chats) == 12 and len(good) > 6 and usage.answers > 12
    for chat in good:
        question, answer = (message['content'] for message in chat['messages'])
        assert question.startswith('Does ') and question.endswith('?') and (chat['kind'], chat['author']) == ('general', 'teacher')
        assert _refusal_of(chat, dict(id=chat['paper_id']))[0] != 'grounding'  # there is no paper that it could be about
    assert len({chat['messages'][0]['content'] for chat in good}) > 3  # drawn, not the likeliest one every time
    again, usage = general_chats(curious, 12, 128, seed=3, file=tmp_path/'answers.jsonl')
    assert again == chats and usage.kept == usage.answers  # nothing is asked twice
    assert general_chats(curious, 12, 128, seed=4)[0] != chats


def test_a_run_mixes_them_in_and_holds_others_out(curious, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(instruct, '_HELD_OUT', 4)  # of twelve that it knows
    settings = dict(conversations=12, teacher_answers=2, held_out=4, context=128)
    plain = prepare(Run(tmp_path/'plain'), corpus, curious, **settings)
    mixed = prepare(Run(tmp_path/'run'), corpus, curious, general_share=0.5, **settings)
    added = mixed.train[len(plain.train):]
    assert mixed.train[:len(plain.train)] == plain.train and (mixed.valid, mixed.test) == (plain.valid, plain.test)
    assert added and {chat['kind'] for chat in added} == {'general'} and len(added) <= 12 and not plain.general
    asked = [{chat['messages'][0]['content'] for chat in some} for some in (added, mixed.general)]
    assert mixed.general and not asked[0] & asked[1]  # what is held out is not learnt
    assert 'about anything' in capsys.readouterr().out
    assert prepare(Run(tmp_path/'run'), corpus, curious, general_share=0.5, **settings) == mixed
    assert 'general-chats: already done' in capsys.readouterr().out


@pytest.mark.parametrize('asked, changes', [
    (dict(general_share=0.5, teacher_answers=0), dict(general_share=0.6)),
    (dict(general_share=0.5, teacher_answers=0), dict(evaluation='exam.txt')),
    (dict(teacher_answers=12), dict(conversations=16)),
    (dict(teacher_answers=12), dict(held_out=5))])
def test_what_a_teacher_said_before_a_kill_is_not_asked_again_though_settings_are_others(tmp_path, curious, corpus, monkeypatch, asked,
                                                                                        changes):
    monkeypatch.setattr(instruct, '_HELD_OUT', 4)
    monkeypatch.setattr(instruct, '_CHUNK', 2)
    monkeypatch.chdir(tmp_path)
    Path('exam.txt').write_text('What is an examination?')
    settings = dict(conversations=12, held_out=4, context=128) | asked
    def said() -> dict: return {row['key']: row for file in tmp_path.rglob('answers.jsonl') for row in finished(file).values()}
    killed_in_the_middle(lambda: prepare(Run(tmp_path/'run'), corpus, curious, **settings), lambda: len(said()) > 4)
    kept, respond, drawn = said(), instruct.respond, []
    monkeypatch.setattr(instruct, 'respond', lambda *a, **k: drawn.append(respond(*a, **k)) or drawn[-1])
    first = prepare(Run(tmp_path/'run'), corpus, curious, **settings | changes)
    within = 1  # of a part of two in which it was killed, what is drawn is drawn anew
    assert kept.items() <= said().items() and sum(map(len, drawn)) <= len(said()) - len(kept) + within
    drawn.clear()
    assert prepare(Run(tmp_path/'other'), corpus, curious, **settings | changes) == replace(first, folder=tmp_path/'other'/'chats')


@pytest.mark.parametrize(('text', 'said'), [
    ('Heat flows. Light is a wave. And it', 'Heat flows. Light is a wave.'),
    ('Тепло течёт. Свет есть волна. И он', 'Тепло течёт. Свет есть волна.'),
    ('Do this:\n\n1. Boil water.\n2. Add sa', 'Do this:\n\n1. Boil water.'),
    ('Do this:\n\n1. Boil water.\n2.', 'Do this:\n\n1. Boil water.'),
    ('Two ways:\n\n- One.\n-', 'Two ways:\n\n- One.'), ('It has no end', 'It has no end'), ('', '')])
def test_an_answer_that_is_not_over_ends_with_its_last_whole_sentence(text, said):
    cut = instruct._to_last_sentence(Answer([1, 2], text, False))
    assert (cut.text, cut.stopped) == (said, said != text)
    whole = Answer([1, 2], text, True)
    assert instruct._to_last_sentence(whole) is whole


def test_a_general_answer_may_decline_and_must_not_go_round_in_circles(curious, corpus, tmp_path, monkeypatch):
    spoken = [('Can you heal me?', Answer([1], "I'm sorry, but I cannot heal anybody.", True), ''),
              ('What is heat like?', Answer([1], 'Heat is motion. It flows from warm to cold. It is', False), ''),
              ('What is light like?', Answer([1], 'It is light and light and light and light and light and light and light.', True), '')]
    monkeypatch.setattr(instruct, '_both_sides', lambda *a, **k: (spoken, instruct.Usage(answers=3)))
    monkeypatch.setattr(instruct, '_HELD_OUT', 0)
    monkeypatch.setattr(instruct, '_earlier_answers', lambda place, *folders: place/'answers.jsonl')
    monkeypatch.setattr(instruct.shutil, 'copy', lambda *a: None)
    folder = instruct._prepare_general(Run(tmp_path/'run'), curious, curious.tokenizer, 3, 128, 0, 0, '')
    kept = [chat['messages'][1]['content'] for chat in instruct.open_chats(folder)['train'].to_list()]
    assert kept == ["I'm sorry, but I cannot heal anybody.", 'Heat is motion. It flows from warm to cold.']


def test_what_the_built_in_teacher_said_comes_with_the_package(curious, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(instruct, '_HELD_OUT', 4)
    monkeypatch.setattr(instruct, 'ZOO', tmp_path/'zoo')
    settings = dict(conversations=12, teacher_answers=0, held_out=4, context=128, general_share=0.5)
    first = prepare(Run(tmp_path/'one'), corpus, curious, **settings)
    (tmp_path/'zoo'/'smollm2-80m').mkdir(parents=True)
    shutil.copy(tmp_path/'one'/'general-chats'/'answers.jsonl', tmp_path/'zoo'/'smollm2-80m')
    def never(*given, **named): raise AssertionError('it was asked again')
    monkeypatch.setattr(instruct, 'respond', never)
    again = prepare(Run(tmp_path/'two'), corpus, replace(curious, name='smollm2'), **settings)
    assert (again.train, again.general) == (first.train, first.general)
    with pytest.raises(AssertionError, match='asked again'): prepare(Run(tmp_path/'three'), corpus, curious, **settings)


def test_what_is_said_before_a_student_has_its_tokens_is_not_asked_again(curious, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(instruct, '_HELD_OUT', 0)
    asked, settings = dict(conversations=12, context=128, general_share=0.5, seed=3), dict(teacher_answers=0, held_out=4)
    run, other = Run(tmp_path/'run'), Run(tmp_path/'other')
    said = instruct.spoken(run, curious, **asked)
    assert 6 < len(said) <= 12 and all([turn['role'] for turn in messages] == ['user', 'assistant'] for messages in said)
    expected = prepare(other, corpus, curious, **asked, **settings)
    def never(*given, **named): raise AssertionError('it was asked again')
    monkeypatch.setattr(instruct, 'respond', never)
    assert instruct.spoken(run, curious, **asked) == said and 'spoken: already done' in capsys.readouterr().out
    assert instruct.spoken(other, curious, **asked) == said  # nor is what a run asked for in the other order
    chats = prepare(run, corpus, curious, **asked, **settings)
    assert chats.train == expected.train and [chat['messages'] for chat in chats.train if chat['kind'] == 'general'][0] in said
    assert instruct.spoken(run, curious, **asked | dict(general_share=0.0)) == [] == instruct.spoken(
        run, Endpoint('http://localhost:1/v1', 'no/such-model'), **asked | dict(general_share=None))


def test_more_that_was_said_before_a_cut_is_not_asked_again_by_a_stage_that_had_some(curious, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(instruct, '_HELD_OUT', 4)
    asked, settings = dict(context=128, general_share=0.5, seed=3), dict(teacher_answers=0, held_out=4)
    run, respond, drawn = Run(tmp_path/'run'), instruct.respond, []
    monkeypatch.setattr(instruct, 'respond', lambda *a, **k: drawn.append(respond(*a, **k)) or drawn[-1])
    for number in (8, 16):
        instruct.spoken(run, curious, conversations=number, **asked)
        drawn.clear()
        prepare(run, corpus, curious, conversations=number, **asked, **settings)
        assert bool(drawn) == (number == 8)  # of the second, both those for training and those held out have been said


@pytest.mark.parametrize('share', [-0.1, 1.0, 2.0])
def test_a_share_that_is_none_is_refused(share, curious, corpus, tmp_path):
    with pytest.raises(InputError, match=f'general_share is {share}; give at least 0'):
        prepare(Run(tmp_path/'run'), corpus, curious, general_share=share)


def test_half_is_about_anything_unless_the_teacher_cannot_or_is_a_server(curious, random_teacher, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(instruct, '_HELD_OUT', 4)
    settings = dict(conversations=12, teacher_answers=0, held_out=4, context=128)
    named, half = (prepare(Run(tmp_path/str(share)), corpus, curious, **settings, general_share=share) for share in (0.5, None))
    assert (named.train, named.general) == (half.train, half.general) and half.general
    assert 'no conversations about anything' not in capsys.readouterr().out
    without = prepare(Run(tmp_path/'silent'), corpus, random_teacher, **settings, general_share=None)
    assert not without.general and 'no conversations about anything: The teacher said nothing of use' in capsys.readouterr().out
    assert instruct._share_of(None, Endpoint('http://localhost:1/v1', 'no/such-model')) == 0, 'a server is not asked unless it is wished'


def test_a_teacher_that_has_nothing_to_say_is_told(random_teacher, corpus, tmp_path):
    with pytest.raises(InputError, match='said nothing of use as its own user .*set general_share to 0'):
        prepare(Run(tmp_path/'run'), corpus, random_teacher, conversations=4, teacher_answers=0, held_out=4, context=128, general_share=0.5)
    with pytest.raises(InputError, match='general_share is 0.5, but: The tokenizer of'):
        prepare(Run(tmp_path/'far'), corpus, Endpoint('http://localhost:1/v1', 'no/such-model'), general_share=0.5)
