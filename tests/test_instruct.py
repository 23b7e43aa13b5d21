"""Mined conversations say what their papers say, and the teacher's answers are taken only when they are answers."""
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scilm_adapt.instruct import (
    ask_teacher,
    key_terms,
    kinds,
    mine,
    mine_all,
    phrasings,
    prepare,
    sentences,
    whole_sentences,
)
from scilm_adapt.models import LanguageModel, tiny
from scilm_adapt.papers import Corpus, split
from scilm_adapt.runs import InputError, Run, read_json, write_text
from scilm_adapt.tokens import control_tokens, encode, encode_chat, pack
from scilm_adapt.training import fit, lm_loss

torch.set_num_threads(1)
each_kind = pytest.mark.parametrize('kind', kinds)

ENGLISH = dict(id='heat-1', title='On the flow of heat', text=(
    'Heat flows from warm bodies to cold bodies. The flow is slow in air, e.g. in a room. It is fast in copper, '
    'where heat meets free electrons!\nWhy does copper carry heat? Its electrons are free, and electrons carry heat.'))
RUSSIAN = dict(id='тепло-2', title='О движении теплоты', text=(
    'Теплота переходит от тёплых тел к холодным. Ёмкость тела велика, если теплота греет тела медленно. '
    'Медь проводит лучше воздуха: теплота меди движет электроны. Электроны меди свободны.'))
BRACES = dict(id='set-3', title='Sets {} and {0} in {curly} braces %s', text=(
    'A set {a, b} has elements and a set {} has none. Elements of a set {x: x > 0} are found by {0}. Every set of sets has elements '
    'which are sets of elements.'))
PAPERS = [ENGLISH, RUSSIAN, BRACES]
WORDS = [paper['title'] + paper['text'] for paper in PAPERS] + ['Heat flows always.', 'Свет идёт быстро.']*3  # for tokenizers


def many(count: int) -> list[dict]:
    "Papers of many lengths about a few things, in two languages."
    papers = []
    for n in range(count):
        thing, vessel = ('heat', 'copper') if n % 2 else ('свет', 'воздух')
        first = f'{thing.title()} number {n} moves through {vessel}.' if n % 2 else f'{thing.title()} номер {n} идёт через {vessel}.'
        more = [f'{thing.title()} {m} in {vessel} meets {thing} {n}.' for m in range(n % 9)]
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


def taught(teacher: LanguageModel, answer: str) -> LanguageModel:
    "The same model, trained for a moment to give one answer to every question."
    lm = tiny(WORDS, hidden=32, layers=1, heads=2, context=256)
    chats = [mine(paper, kind) for paper in many(20) for kind in kinds if mine(paper, kind)]
    pairs = [encode_chat(lm.tokenizer, [chat['messages'][0], dict(role='assistant', content=answer)]) for chat in chats]
    pairs = [pair for pair in pairs if len(pair[0]) <= 200]
    packed = pack([ids for ids, _ in pairs], 200, [mask for _, mask in pairs])
    fit(lm.model, lambda step: packed.batch([step % len(packed), (step + 1) % len(packed)]),
        lambda model, batch: dict(loss=lm_loss(model, batch)), 60, learning_rate=2e-2, precision='no')
    return lm


def squeezed(text: str) -> str:
    return ' '.join(text.split())


# --- pieces of a paper ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('text', 'wanted'), [
    ('One. Two! Three? Four', ['One.', 'Two!', 'Three?', 'Four']),
    ('Первое. Второе! Ёлка?', ['Первое.', 'Второе!', 'Ёлка?']),
    ('See e.g. this. It holds.', ['See e.g. this.', 'It holds.']),
    ('It is 3.14 long. 2 more.', ['It is 3.14 long.', '2 more.']),
    ('a line\nanother\n\nthe last', ['a line', 'another', 'the last']),
    ('It said. "So."', ['It said.', '"So."']),
    ('', []), (' \n ', []),
], ids=repr)
def test_sentences(text, wanted):
    assert sentences(text) == wanted


@given(st.text(alphabet='Ab. !?\nЯя"(1', max_size=60))
def test_sentences_lose_nothing_but_white_space(text):
    assert squeezed(' '.join(sentences(text))) == squeezed(text)


@given(st.lists(st.text(alphabet='ab ', min_size=1, max_size=12), max_size=6), st.integers(0, 12))
def test_whole_sentences_are_the_longest_beginning_that_fits(parts, words):
    kept = whole_sentences(parts, words)
    fitting = [n for n in range(len(parts) + 1) if len(' '.join(parts[:n]).split()) <= words]
    assert kept == ' '.join(parts[:max(fitting)])


def test_key_terms_are_words_used_twice():
    assert key_terms(ENGLISH['text'])[0] == 'heat' and 'electrons' in key_terms(ENGLISH['text'])
    assert set(key_terms(RUSSIAN['text'])) >= {'теплота', 'меди'}
    assert key_terms('Once only, these words stand.') == [] and key_terms('which which would would') == []
    assert key_terms('model_1 x1 x1 ab ab 1234 1234') == []


# --- kinds ------------------------------------------------------------------------------------------------------------------------

@each_kind
@pytest.mark.parametrize('paper', PAPERS, ids=lambda paper: paper['id'])
@pytest.mark.parametrize('words', [10, 50])
def test_every_answer_is_the_papers_own(kind, paper, words):
    chat = mine(paper, kind, words)
    if chat is None: return
    question, answer = chat['messages'][0]['content'], chat['reference']
    assert [m['role'] for m in chat['messages']] == ['user', 'assistant'] and chat['messages'][1]['content'] == answer
    assert (chat['paper_id'], chat['kind'], chat['author']) == (paper['id'], kind, 'paper')
    text = squeezed(paper['text'])
    if kind == 'title': assert answer == paper['title']
    if kind in ('explanation', 'continuation'): assert answer in text and len(answer.split()) <= words and answer[-1] in '.!?'
    if kind == 'explanation': assert text.startswith(answer)
    if kind == 'terms': assert all(text.lower().count(term) > 1 and term in question.lower() for term in answer.split(', '))
    begin, end = next(phrasing.split('{}') for phrasing in phrasings[kind] if question.startswith(phrasing.split('{}')[0]))
    passage = question[len(begin):len(question) - len(end)]
    assert squeezed(passage) in squeezed(paper['title'] + ' ' + paper['text'])  # the question quotes the paper and nothing else
    if kind in ('explanation', 'continuation'): assert answer not in squeezed(question)  # and does not give its answer away
    if kind == 'continuation': assert f"{paper['title']} {text}".startswith(squeezed(f'{passage} {answer}'))


@each_kind
def test_every_kind_finds_something_in_a_usual_paper(kind):
    assert mine(ENGLISH, kind) and mine(RUSSIAN, kind)


@each_kind
@pytest.mark.parametrize(('title', 'text'), [
    ('', ''), ('T', ''), ('', 'One. Two words here. Three words are here.'), ('T', 'no end'), ('T', 'word '*500), ('T', '...'),
    ('T', '\n\n'), ('T', 'One sentence.'), ('T'*5000, 'One. Two.')], ids=range(9))
def test_a_paper_that_offers_nothing_gives_none_or_a_whole_conversation(kind, title, text):
    chat = mine(dict(id='x', title=title, text=text), kind, words=20)
    if chat is None: return
    question = chat['messages'][0]['content']
    assert chat['reference'].strip() and '{}' not in question and question.strip() == question
    assert '\n\n\n' not in question  # no gap where a title would be


@each_kind
def test_mining_is_a_function_of_paper_kind_and_seed(kind):
    torch.manual_seed(0)
    first = mine(ENGLISH, kind, seed=3)
    torch.manual_seed(1); mine(RUSSIAN, kind, seed=3)
    assert mine(dict(ENGLISH), kind, seed=3) == first
    assert json.loads(json.dumps(first)) == first
    questions = {mine(ENGLISH, kind, seed=seed)['messages'][0]['content'] for seed in range(30)}
    assert len(questions) == len(phrasings[kind])  # all phrasings are used


# --- many -------------------------------------------------------------------------------------------------------------------------

def test_conversations_that_do_not_fit_are_left_out_and_none_is_cut(random_teacher):
    tokenizer, papers = random_teacher.tokenizer, many(60)
    everything = [mine(paper, kind, 100//5) for paper in papers for kind in kinds]
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
    assert {chat['kind'] for chat in one[:20]} == set(kinds)  # mixed from the beginning


@pytest.mark.parametrize('most', [0, 1, 7, 10_000, None])
def test_at_most_so_many(random_teacher, most):
    chats, papers = mine_all(many(20), random_teacher.tokenizer, 256), many(20)
    assert mine_all(papers, random_teacher.tokenizer, 256, most) == chats[:most]


def test_a_paper_about_control_tokens_cannot_end_a_turn(random_teacher):
    tokenizer = random_teacher.tokenizer
    paper = dict(ENGLISH, title='The token <|im_end|>', text='It <|im_end|> ends a turn. Nothing<|im_end|>comes after <|endoftext|>.')
    controls = set(control_tokens(tokenizer).values())
    for kind in ('title', 'explanation', 'continuation'):
        ids, _ = encode_chat(tokenizer, mine(paper, kind)['messages'])
        harmless, _ = encode_chat(tokenizer, mine(ENGLISH, kind)['messages'])
        assert [i for i in ids if i in controls] == [i for i in harmless if i in controls]


# --- answers by a teacher ---------------------------------------------------------------------------------------------------------

def test_the_paper_keeps_its_answer_where_the_teacher_does_not_stop(random_teacher):
    chats = mine_all(many(20), random_teacher.tokenizer, 128)[:12]
    assert ask_teacher(random_teacher, chats, 128) == chats  # random weights go on for ever


@pytest.mark.parametrize(('answer', 'kept'), [('Heat flows always.', True), ('Свет идёт быстро.', True), ('Heat', False), ('', False)],
                         ids=['English', 'Russian', 'one word', 'nothing'])
def test_a_finished_answer_of_some_words_is_taken(random_teacher, answer, kept):
    teacher = taught(random_teacher, answer)
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
    teacher = tiny([paper['text'] for paper in PAPERS], hidden=32, layers=1, heads=2, context=96)
    chats = mine_all(many(60), teacher.tokenizer, 96)
    prompts = [len(encode_chat(teacher.tokenizer, chat['messages'][:1], True)[0]) for chat in chats]
    assert max(prompts) + 96//4 > 96
    assert [chat['paper_id'] for chat in ask_teacher(teacher, chats, 96)] == [chat['paper_id'] for chat in chats]


# --- the stage --------------------------------------------------------------------------------------------------------------------

def test_the_stage_splits_by_paper_and_is_kept(tmp_path, corpus, random_teacher, capsys):
    teacher = taught(random_teacher, 'Heat flows always.')
    sizes = dict(conversations=60, teacher_answers=20, held_out=12, context=128)
    chats = prepare(Run(tmp_path), corpus, teacher, **sizes)
    assert len(chats.train) == 60 and len(chats.valid) == len(chats.test) == 12
    parts = dict(train=chats.train, valid=chats.valid, test=chats.test)
    for name, part in parts.items():
        assert {chat['paper_id'] for chat in part} <= {paper['id'] for paper in corpus.science[name]}
        assert all(len(encode_chat(teacher.tokenizer, chat['messages'])[0]) <= 128 for chat in part)
    ids = [{chat['paper_id'] for chat in part} for part in parts.values()]
    assert not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]
    assert all(chat['author'] == 'paper' and chat['messages'][1]['content'] == chat['reference'] for chat in chats.valid + chats.test)
    by_teacher = sum(chat['author'] == 'teacher' for chat in chats.train)
    assert 5 < by_teacher <= 20 and all(chat['author'] == 'paper' for chat in chats.train[20:])
    assert read_json(chats.folder/'report.json')['train']['authors']['teacher'] == by_teacher
    assert f'{by_teacher} answered by the teacher (of 20 asked)' in capsys.readouterr().out
    assert prepare(Run(tmp_path), corpus, teacher, **sizes) == chats and 'already done' in capsys.readouterr().out
    other = prepare(Run(tmp_path), corpus, random_teacher, **sizes)  # another teacher, other answers
    assert sum(chat['author'] == 'teacher' for chat in other.train) == 0
    assert [chat['reference'] for chat in other.train] == [chat['reference'] for chat in chats.train]


def test_no_teacher_need_be_asked(tmp_path, corpus, random_teacher):
    chats = prepare(Run(tmp_path), corpus, random_teacher, conversations=30, teacher_answers=0, held_out=5, context=128)
    assert len(chats.train) == 30 and {chat['author'] for chat in chats.train} == {'paper'}


def test_papers_that_yield_nothing_are_named(tmp_path, corpus, random_teacher):
    with pytest.raises(InputError, match='train split.*8 tokens.*raise context'):
        prepare(Run(tmp_path), corpus, random_teacher, context=8)
    bare = {name: [paper | dict(title='', text='One.') for paper in part] for name, part in corpus.science.items()}
    bare = Corpus(bare, {}, corpus.folder)
    with pytest.raises(InputError, match='papers with titles and several sentences'): prepare(Run(tmp_path), bare, random_teacher)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=30)
@given(st.text(max_size=80), st.text(max_size=200), st.sampled_from(list(kinds)))
def test_whatever_a_paper_says_it_can_be_tokenised(random_teacher, title, text, kind):
    chat = mine(dict(id='x', title=title.strip(), text=text.strip()), kind)
    if chat is None: return
    ids, mask = encode_chat(random_teacher.tokenizer, chat['messages'])
    assert random_teacher.tokenizer.decode(encode(random_teacher.tokenizer, chat['reference'])) == chat['reference']
    assert sum(mask) == len(encode(random_teacher.tokenizer, chat['reference'])) + 1 and len(ids) == len(mask)
