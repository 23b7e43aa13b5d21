"""Mined conversations say what their papers say, in the language of the paper, and do not give their answers away."""
import json
import re
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scilm_adapt.mining import (
    _BLANK,
    _around,
    _before,
    _bend,
    _fields_of,
    _key_terms,
    _other_number,
    _spelt,
    _stem,
    _unlinked,
    kinds,
    language_of,
    mine,
    phrasings,
    sentences,
    whole_sentences,
)
from scilm_adapt.runs import rng

each_kind = pytest.mark.parametrize('kind', kinds)
SENTENCE_KINDS = ('explanation', 'continuation', 'summary', 'aim', 'problem', 'claim', 'method', 'result', 'conclusion', 'evidence',
                  'definition', 'truth')
SECRET = ('explanation', 'continuation', 'summary', 'heading', 'tldr', 'method', 'result', 'conclusion', 'definition')


def paper(name: str, title: str, text: str, **more: object) -> dict:
    return dict(id=name, title=title, text=text, topics=[], keywords=[], tldr='', sections=[]) | more


ENGLISH = [
    paper('pump', 'Forecasting the demand of heat pumps with gradient boosting',
          'A heat pump is a machine that moves heat from a cold place to a warm one. Its demand for power follows the weather. '
          'However, the forecasts that grids use today are poor on cold days and cannot be adapted to single homes. '
          'We propose a forecast that learns the demand of each house with Gradient Boosting Machines (GBM). '
          'Experiments with 240 houses over two winters show that it lowers the mean error by 31 percent. '
          'On cold days the gain is higher than on warm days. '
          'We conclude that grids can plan the load of each house without new meters.',
          topics=['cs.LG', 'eess.SY', '68T05', 'I.2.6; I.2.7'], keywords=['heat pump', 'gradient boosting', 'cold days', 'nowhere'],
          tldr='Gradient boosting forecasts the demand of heat pumps better than linear models do.',
          sections=[dict(title='1 Data', text='We measured the power of each heat pump every ten minutes. '
                                              'The outdoor temperature was taken from the nearest weather station.'),
                    dict(title='2 Forecast of the load', text='Trees are added one by one, and each corrects the errors of those before '
                                                              'it. The depth of the trees was chosen on the first winter.')]),
    paper('asthma', 'Cold air and asthma in school children.',
          'Cold air narrows the airways of patients with asthma. The aim of this study was to measure how fast the airways of children '
          'recover. We studied 48 children with asthma and 52 healthy children in a climate chamber. Peak flow was measured after 5, 10 '
          'and 20 min (Fig. 2). In children with asthma, peak flow was lower after 20 min than before. Healthy children recovered within '
          '5 min, i.e. faster. These results suggest that school children with asthma should warm up indoors.', topics=['asthma']),
    paper('braces', 'Sets {} and {0} in {curly} braces %s',
          'A set {a, b} has elements and a set {} has none. However, sets of {sets} are not easy to draw on {0} paper. '
          'We propose Curly Brace Drawings (CBD) in which a set {x: x > 0} is a circle with 12 elements. '
          'Results on 30 sets {show} that drawings of sets are better than lists of sets. We conclude that {} should be drawn as a dot.'),
    paper('sentence', 'One', 'One sentence.'), paper('nothing', '', 'no end'), paper('bare', '', 'Heat flows. It flows down. It ends.')]
RUSSIAN = [
    paper('heat', 'Охлаждение медных пластин в потоке воздуха',
          'Теплоотдача — это перенос тепла между поверхностью тела и средой, которая его омывает. Охлаждение пластин потоком воздуха '
          'описывают уравнениями, т. е. законом Ньютона и законом Фурье (см. рис. 1). Однако при больших скоростях потока решение этих '
          'уравнений плохо сходится. Мы предлагаем численную модель, в которой охлаждение пластин считается методом конечных элементов '
          '(МКЭ). Опыты с 25 пластинами показали, что модель предсказывает температуру с ошибкой 3,5 %. При турбулентном течении '
          'ошибка выше. Таким образом, модель пригодна для расчёта охлаждения пластин без опытов в аэродинамической трубе.',
          topics=['physics.flu-dyn']),
    paper('light', 'Рассеяние света в тумане и дальность видимости',
          'Рассеяние света на каплях тумана ограничивает дальность видимости на дорогах и аэродромах. Целью настоящей работы является '
          'измерение зависимости дальности видимости от размера капель. Измерения проводились в камере объёмом 30 м3 при длинах волн '
          '0,4–0,7 мкм. Показано, что при росте размера капель от 2 до 10 мкм дальность видимости увеличивается в 3 раза. Расчёты по '
          'теории Ми подтвердили этот результат с точностью до 8 %. Полученные результаты позволяют выбирать длину волны '
          'противотуманных огней.',
          topics=['physics.optics', '78A45']),
    paper('stat', 'Устойчивые оценки среднего при тяжёлых хвостах',
          'Выборочное среднее является наилучшей оценкой для нормального распределения. К сожалению, при распределениях с тяжёлыми '
          'хвостами одно наблюдение может сделать эту оценку сколь угодно плохой. В статье предложена оценка, в которой выборка '
          'делится на блоки, а затем берётся медиана средних по блокам. Доказано, что отклонение этой оценки от среднего убывает с '
          'ростом выборки так же быстро, как при нормальном распределении. Моделирование на 10 000 выборок подтвердило, что медиана '
          'средних лучше выборочного среднего. Следовательно, оценка может применяться в задачах страхования и физики.',
          topics=['math.ST']),
    paper('gene', 'Наследование окраски семян гороха при скрещивании',
          'Скрещивание растений гороха с жёлтыми и зелёными семенами даёт в первом поколении только жёлтые семена. Во втором поколении '
          'признаки расщепляются. Изучено 1200 растений, полученных при самоопылении гибридов. Установлено, что отношение жёлтых семян '
          'к зелёным близко к 3:1. Отклонение от этого отношения не превышает 2 %. Таким образом, окраска семян гороха определяется '
          'одним геном с двумя аллелями.',
          topics=['генетика', 'genetics']),
    paper('ml', 'Извлечение терминов из научных текстов с помощью языковых моделей',
          'Извлечение терминов — задача поиска слов и словосочетаний, которые называют понятия науки. Существующие методы требуют '
          'больших размеченных корпусов. Однако для русского языка таких корпусов мало, а разметка стоит дорого. В данной работе мы '
          'предлагаем обучать большие языковые модели (БЯМ) на аннотациях статей без разметки. Эксперименты на 5000 аннотациях '
          'показывают, что точность извлечения терминов возрастает с 61 до 74 %. Результаты свидетельствуют о том, что разметка не '
          'является необходимой.',
          keywords=['извлечение терминов', 'языковые модели', 'разметка'], topics=['cs.CL'],
          tldr='Большие языковые модели извлекают термины без разметки.'),
    paper('chem', 'Влияние температуры на скорость гидролиза сахарозы',
          'Гидролиз сахарозы в кислой среде является классическим примером реакции псевдопервого порядка. Цель работы — определить '
          'энергию активации реакции в интервале температур от 20 до 60 °C. За ходом реакции следили по углу вращения плоскости '
          'поляризации света. Обнаружено, что скорость реакции возрастает в 2,7 раза при нагревании на 10 °C. Найденная энергия '
          'активации равна 107 кДж/моль, что согласуется с литературными данными. Полученные данные показывают, что поляриметр даёт '
          'достаточную точность для учебных измерений.'),
    paper('eco', 'Подсчёт птиц по звукозаписям в смешанном лесу',
          'Учёт птиц по голосам требует присутствия опытного наблюдателя. Автоматические записи позволяют вести учёт круглые сутки. '
          'Тем не менее распознавание голосов на фоне ветра остаётся трудной задачей. Авторами разработан алгоритм, который отделяет '
          'голоса птиц от шума по форме спектра. Алгоритм проверен на записях с 12 станций, на которых отмечено 40 видов птиц. '
          'Результаты показали, что число пропущенных видов снижается с 15 до 6. Мы заключаем, что звукозаписи можно использовать '
          'вместо наблюдателя.',
          sections=[dict(title='1. Записи', text='Микрофоны висели на высоте двух метров. '
                                                 'Записи велись с мая по июль, от рассвета до полудня каждый день.'),
                    dict(title='2. Распознавание голосов', text='Спектр каждой записи делился на полосы. '
                                                                'Шум ветра оставался в нижних полосах, и его отсекали.')])]
PAPERS = ENGLISH + RUSSIAN


def conversations(kind: str, words: int = 50, seeds: int = 6) -> list[tuple[dict, int, dict]]:
    "All conversations of a kind out of the papers, with their paper and seed."
    return [(one, seed, chat) for one in PAPERS for seed in range(seeds) if (chat := mine(one, kind, words, seed))]


def squeezed(text: str) -> str:
    return ' '.join(text.split())


def content(text: str) -> set[str]:
    return set(re.findall(r'[^\W_]{4,}', text.lower()))


def everything(one: dict) -> str:
    parts = [f"{section['title']} {section['text']}" for section in one['sections']]
    return ' '.join([one['title'], one['text'], one['tldr'], *one['keywords'], *parts])


# --- pieces of a paper ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('text', 'wanted'), [
    ('One. Two! Three? Four', ['One.', 'Two!', 'Three?', 'Four']),
    ('Первое. Второе! Ёлка?', ['Первое.', 'Второе!', 'Ёлка?']),
    ('See e.g. this. It holds.', ['See e.g. this.', 'It holds.']),
    ('It is 3.14 long. 2 more.', ['It is 3.14 long.', '2 more.']),
    ('a line\nanother\n\nthe last', ['a line', 'another', 'the last']),
    ('It said. "So."', ['It said.', '"So."']),
    ('It said "so." Then it went.', ['It said "so."', 'Then it went.']),
    ('Some, e.g. Paris, i.e. France, agree vs. Rome. All do.', ['Some, e.g. Paris, i.e. France, agree vs. Rome.', 'All do.']),
    ('By Mercer et al. (1909) and Hooke et al. 1678 it is. It does.', ['By Mercer et al. (1909) and Hooke et al. 1678 it is.', 'It does.']),
    ('It is due to Mercer et al. The proof is new.', ['It is due to Mercer et al.', 'The proof is new.']),
    ('See Fig. 3, Eq. (2), Sec. 4 and Ref. [5]. We do.', ['See Fig. 3, Eq. (2), Sec. 4 and Ref. [5].', 'We do.']),
    ('Due to J. Maxwell and R. A. Fisher. It is.', ['Due to J. Maxwell and R. A. Fisher.', 'It is.']),
    ('It is vitamin C. The dose was low.', ['It is vitamin C.', 'The dose was low.']),
    ('Heat (of bodies. Of all) flows. It does.', ['Heat (of bodies. Of all) flows.', 'It does.']),
    ('Let $x = 1. Y$ hold. It does.', ['Let $x = 1. Y$ hold.', 'It does.']),
    ('It costs $5. It costs $6 more.', ['It costs $5.', 'It costs $6 more.']),
    ('It is so: 1. One thing. Another.', ['It is so: 1. One thing.', 'Another.']),
    ('The ratio is 3:1. It is.', ['The ratio is 3:1.', 'It is.']),
    ('Тепло, т.е. Энергия, и т. е. Работа, см. Рис. 2. Оно есть.', ['Тепло, т.е. Энергия, и т. е. Работа, см. Рис. 2.', 'Оно есть.']),
    ('Опыты в г. Туле, табл. 3. Они верны.', ['Опыты в г. Туле, табл. 3.', 'Они верны.']),
    ('Закон Ж. Б. Фурье вышел в 1822 г. Он верен.', ['Закон Ж. Б. Фурье вышел в 1822 г.', 'Он верен.']),
    ('Медь, железо и др. Металлы теплы.', ['Медь, железо и др.', 'Металлы теплы.']),
    ('', []), (' \n ', []),
], ids=repr)
def test_sentences(text, wanted):
    assert sentences(text) == wanted


@given(st.text(alphabet='Ab. !?\nЯя"(1)$:', max_size=60))
def test_sentences_lose_nothing_but_white_space(text):
    assert squeezed(' '.join(sentences(text))) == squeezed(text)


PIECES = st.lists(st.text(alphabet='ab ', min_size=1, max_size=12), max_size=6)


@given(PIECES, st.integers(0, 12))
def test_whole_sentences_are_the_longest_beginning_that_fits(parts, words):
    kept = whole_sentences(parts, words)
    fitting = [n for n in range(len(parts) + 1) if len(' '.join(parts[:n]).split()) <= words]
    assert kept == ' '.join(parts[:max(fitting)])


@given(PIECES, st.integers(0, 6), st.integers(0, 12))
def test_before_is_the_longest_run_that_leads_up_to_a_sentence(parts, at, words):
    at = min(at, len(parts))
    fitting = [n for n in range(at + 1) if len(' '.join(parts[n:at]).split()) <= words]
    assert _before(parts, at, words) == ' '.join(parts[min(fitting):at])


@given(PIECES.filter(bool), st.integers(0, 5), st.integers(0, 12))
def test_around_is_a_run_that_holds_the_sentence_and_cannot_grow(parts, at, words):
    at = min(at, len(parts) - 1)
    found, size = _around(parts, at, words), lambda run: len(' '.join(run).split())
    if not found: assert size([parts[at]]) > words; return
    spans = [(first, first + len(found)) for first in range(at + 1) if parts[first:first + len(found)] == found and first + len(found) > at]
    assert spans and size(found) <= words
    assert any((first == 0 or size(parts[first - 1:end]) > words) and (end == len(parts) or size(parts[first:end + 1]) > words)
               for first, end in spans)


def test_key_terms_are_words_used_twice():
    assert _key_terms('Heat moves. Heat meets free electrons, and electrons carry heat.') == ['heat', 'electrons']
    assert _key_terms('Once only, these words stand.') == [] and _key_terms('which which would would') == []
    assert _key_terms('model_1 x1 x1 ab ab 1234 1234') == []


def test_russian_terms_are_counted_in_all_their_forms_and_are_no_adjectives():
    terms = _key_terms('Теплота греет тело. Медь проводит теплоту, теплоты меди довольно. Тёплые тела. Тёплые дни. Однако, однако.')
    assert {_stem(term) for term in terms} == {'теплот', 'мед', 'тел'}
    assert _stem('heat') == 'heat' and _stem('теплотой') == _stem('теплоте') == 'теплот'


@pytest.mark.parametrize(('words', 'acronym', 'wanted'), [
    ('we use large language models', 'LLM', 'large language models'), ('a state-of-the-art', 'SOTA', 'state-of-the-art'),
    ('the method of moments', 'MOM', 'method of moments'), ('the method of moments', 'MM', 'method of moments'),
    ('метод опорных векторов', 'МОВ', 'метод опорных векторов'), ('we use models', 'LLM', ''), ('of moments', 'M', 'moments'),
    ('', 'AB', '')])
def test_an_acronym_is_spelt_by_the_shortest_end_that_fits(words, acronym, wanted):
    assert _spelt(words.split(), acronym) == wanted


@pytest.mark.parametrize(('one', 'lang'), [
    (paper('a', 'Heat', 'Heat flows.'), 'en'), (paper('a', 'Тепло', 'Тепло идёт.'), 'ru'), (paper('a', '', '1 2 3'), 'en'),
    (paper('a', 'Модель BERT', 'Модель BERT (Bidirectional) учится.'), 'ru'), (paper('a', 'Heat', 'Heat flows.', lang='ru'), 'ru'),
    (paper('a', 'Die Wärme', 'Die Wärme fließt.', lang='other'), 'other'), (paper('a', 'Heat', 'Heat flows.', lang=''), 'en')],
    ids=range(7))
def test_a_mark_or_else_the_letters_tell_the_language(one, lang):
    assert language_of(one) == lang


def test_a_paper_in_another_language_gives_no_conversation():
    foreign = ENGLISH[0] | dict(lang='other')
    assert [mine(foreign, kind) for kind in kinds] == [None]*len(kinds)


def test_topics_become_names_in_the_language_of_the_paper():
    topics = ['cs.LG', 'stat.ML', '68T05, 62H30', 'I.2.6', 'graph theory', 'теория графов', 'x'*50]
    assert _fields_of(paper('a', 'Heat', 'Heat flows.', topics=topics)) == ['machine learning', 'graph theory']
    assert _fields_of(paper('a', 'Тепло', 'Тепло идёт.', topics=topics)) == ['машинное обучение', 'теория графов']


# --- what a conversation is -------------------------------------------------------------------------------------------------------

def test_there_are_many_kinds_each_with_several_phrasings_in_both_languages():
    assert len(kinds) >= 14 and kinds.keys() == phrasings.keys()
    for kind, languages in phrasings.items():
        assert languages.keys() == {'en', 'ru'}
        for lang, texts in languages.items():
            first = lang == 'en' and kind in ('title', 'explanation', 'terms', 'continuation')
            assert len(set(texts)) == len(texts) >= (2 if first else 4)
            for text in texts:
                words = re.sub(r'\{\w*\}', '', text)
                assert bool(re.search('[а-яё]', words)) == (lang == 'ru') and not re.search('[a-z]' if lang == 'ru' else '[а-яё]', words)


def test_the_english_phrasings_that_models_were_trained_with_stay():
    assert {kind: phrasings[kind]['en'] for kind in ('title', 'explanation', 'terms', 'continuation')} == dict(
        title=('Summarise this text in one line.\n\n{}', 'Give this text a title.\n\n{}', 'What is the following about?\n\n{}'),
        explanation=('Explain in a few sentences: {}', 'What should one know about this? {}', 'Write a short text on the topic: {}'),
        terms=('List the key terms of this text.\n\n{}', 'Which terms matter most here?\n\n{}'),
        continuation=('Continue this text.\n\n{}', 'What comes next?\n\n{}'))
    old = {name: ENGLISH[1][name] for name in ('id', 'title', 'text')}  # a record from before there were topics and sections
    chosen = rng('phrasing', 3, 'asthma', 'title').integers(3)
    assert mine(old, 'title', seed=3)['messages'][0]['content'].startswith(phrasings['title']['en'][chosen][:20])
    assert mine(old, 'terms')['reference'] == 'children, asthma, airways, healthy, peak'


@each_kind
@pytest.mark.parametrize('lang', ['en', 'ru'])
def test_every_kind_is_found_in_every_language(kind, lang):
    assert any(chat['lang'] == lang for _, _, chat in conversations(kind))


@each_kind
@pytest.mark.parametrize('words', [15, 50, 120])
def test_every_conversation_is_whole_grounded_and_within_its_limits(kind, words):
    for one, seed, chat in conversations(kind, words):
        passage, answer, *slots = kinds[kind](one, words, seed)
        question = chat['messages'][0]['content']
        assert chat['messages'] == [dict(role='user', content=question), dict(role='assistant', content=answer)]
        assert (chat['paper_id'], chat['kind'], chat['author'], chat['reference']) == (one['id'], kind, 'paper', answer)
        assert chat['lang'] == language_of(one) == ('ru' if one in RUSSIAN else 'en')
        assert question in [text.format(passage, **(slots[0] if slots else {})) for text in phrasings[kind][chat['lang']]]
        assert question == question.strip() and answer == answer.strip() != ''
        assert len(answer.split()) <= words and len(passage.split()) <= 2*words
        if kind != 'field': assert content(answer) <= content(everything(one))
        assert content(passage.replace(_BLANK, '')) <= content(everything(one))
        if kind in SENTENCE_KINDS: assert answer[-1] in '.!?'
        assert json.loads(json.dumps(chat)) == chat


@each_kind
def test_answers_that_must_be_found_out_are_not_in_the_question(kind):
    if kind not in SECRET: return
    for _, _, chat in conversations(kind):
        assert chat['reference'].lower() not in squeezed(chat['messages'][0]['content']).lower()


@each_kind
def test_mining_is_a_function_of_paper_kind_and_seed(kind):
    one, seed, chat = conversations(kind)[0]
    state = np.random.get_state()[1].tolist()
    mine(RUSSIAN[0], kind, seed=9)
    assert mine(dict(one), kind, seed=seed) == chat and np.random.get_state()[1].tolist() == state
    starts = {next(i for i, text in enumerate(phrasings[kind][chat['lang']]) if chat['messages'][0]['content']
                   == text.format(found[0], **(found[2] if len(found) > 2 else {})))
              for seed in range(40) if (chat := mine(one, kind, seed=seed)) and (found := kinds[kind](one, 50, seed))}
    assert len(starts) == len(phrasings[kind][chat['lang']])  # all phrasings are used
    others = [mine(one | dict(id=f'other-{n}'), kind, seed=seed)['messages'] for n in range(20)]
    assert chat['messages'][0] not in others and len({message[0]['content'] for message in others}) > 1


@each_kind
def test_braces_in_a_paper_stay_braces(kind):
    for one, _, chat in conversations(kind):
        if one['id'] != 'braces': continue
        braced = lambda text: {word.strip('.,') for word in re.findall(r'\S*[{}]\S*', text)}
        assert braced(chat['messages'][0]['content'] + ' ' + chat['reference']) <= braced(one['title'] + ' ' + one['text'])


# --- single kinds -----------------------------------------------------------------------------------------------------------------

def test_keywords_of_the_author_are_the_terms_where_the_text_uses_them():
    assert mine(ENGLISH[0], 'terms')['reference'] == 'heat pump, gradient boosting, cold days'
    without = mine(ENGLISH[0] | dict(keywords=['heat pump', 'nowhere', 'never']), 'terms')['reference']
    assert 'nowhere' not in without and 'heat' in without.split(', ')


def test_a_blank_hides_every_form_of_its_term():
    for one, _, chat in conversations('cloze'):
        question, term = chat['messages'][0]['content'], chat['reference']
        assert question.count(_BLANK) == 1
        root = _stem(term.lower().split()[-1])
        assert root[:max(4, len(root) - 2)] not in question.lower()
        assert f"{one['title']} {one['text']} {' '.join(one['keywords'])}".lower().count(_stem(term.lower())) > 1


def test_a_statement_that_is_denied_is_not_in_the_paper_and_the_truth_is():
    said = Counter()
    for one in PAPERS:
        for seed in range(30):
            if not (found := kinds['truth'](one, 50, seed)): continue
            word, true = found[1].split('. ', 1)
            statement, text = found[2]['statement'], one['text']
            said[word] += 1
            assert true[1:] in text and true[1:] in found[0]
            assert (statement[1:] in text) == (word in ('Yes', 'Да')), statement
            if word in ('No', 'Нет'):
                differing = [(a, b) for a, b in zip(true.split(), statement.split()) if a != b]
                assert len(differing) == 1 and len(true.split()) == len(statement.split())
    assert all(0.3 < said[yes]/(said[yes] + said[no]) < 0.7 for yes, no in (('Yes', 'No'), ('Да', 'Нет')))


@pytest.mark.parametrize(('part', 'wanted'), [
    ('The error is higher on cold days.', 'The error is lower on cold days.'),
    ('Ошибка выше в холодные дни.', 'Ошибка ниже в холодные дни.'),
    ('It improves speed.', 'It worsens speed.'), ('Models can learn it.', 'Models cannot learn it.'),
    ('We saw 40 birds in June.', 'We saw 26 birds in June.'), ('It rose by 3,5 % then.', 'It rose by 5,2 % then.'),
    ('It was not higher then.', ''), ('It is higher here and lower there.', ''), ('No number is here.', ''), ('It has 1 part.', ''),
    ('We use ResNet-50 and Gemini 2.5 here.', ''), ('It holds with p < 0.05 at least.', ''), ('See also (2) and [14] here.', ''),
    ('It is 40 here and 40 there.', ''), ('We saw 100 birds then.', ''), ('Whether it is better we ask.', '')])
def test_a_sentence_is_bent_in_one_place_or_not_at_all(part, wanted):
    assert _bend(part, 0.1 if '3,5' in part else 0.9) == wanted


@given(st.one_of(st.integers(2, 10**6).map(str), st.floats(1.1, 999).map(lambda x: f'{x:.1f}'),
                 st.floats(1.1, 99).map(lambda x: f'{x:.2f}'.replace('.', ','))), st.floats(0, 1, exclude_max=True))
def test_another_number_has_the_same_form(number, chance):
    other = _other_number(number, chance)
    assert re.sub(r'\d+', '0', other) == re.sub(r'\d+', '0', number)
    assert [len(part) for part in re.split('[.,]', other)][1:] == [len(part) for part in re.split('[.,]', number)][1:]


def test_the_order_puts_the_shuffled_sentences_right():
    seen = set()
    for one, seed, chat in conversations('order'):
        shown = dict(re.findall(r'^(\d)\. (.*)$', kinds['order'](one, 50, seed)[0], re.M))
        order = chat['reference'].split(', ')
        assert sorted(order) == sorted(shown) and order != sorted(order) and len(order) in (3, 4)
        assert squeezed(one['text']).startswith(' '.join(shown[number] for number in order))
        seen.add(chat['reference'])
    assert len(seen) > 5


def test_the_letters_of_an_acronym_match():
    for one, seed, chat in conversations('acronym'):
        term = kinds['acronym'](one, 50, seed)[2]['term'].removesuffix('s')
        assert ''.join(word[0] for word in chat['reference'].split()).lower() == term.lower()
        assert f"{chat['reference']} ({term}" in one['text']
    assert {chat['reference'] for _, _, chat in conversations('acronym')} >= {'Gradient Boosting Machines', 'большие языковые модели'}
    assert mine(paper('a', 'T', 'We use very slow models (GBM) of heat. It is heat. It is slow.'), 'acronym') is None


def test_a_number_counts_one_thing_that_is_counted_once():
    answers = {one['id']: chat['reference'] for one, _, chat in conversations('number')}
    assert answers['pump'] == '240 houses' and answers['eco'] == '12 станций'
    for text in ('In 1998 patients came to us for help. It was so. It is.', 'We saw 12 patients and later 13 patients of ours here. It is.',
                 'We gave 5 mg patients of ours a drug here. It is so.', 'Only 1 patients of ours came to see us then.'):
        assert mine(paper('a', 'T', text), 'number') is None


@pytest.mark.parametrize('text', [
    'This is a machine that moves heat.', 'The model is a machine that moves heat.', 'Heat is an important problem that matters to us.',
    'Learning to see is a task which we do not solve here.', 'Our pump is a machine that moves heat.', 'Heat was a machine that moved us.',
    'Цель работы — определить теплоту меди.', 'Это — машина для переноса тепла.', 'Он не машина — это насос для тепла.'])
def test_what_is_no_definition_is_not_asked(text):
    assert mine(paper('a', 'T', text), 'definition') is None


def test_a_definition_is_asked_for_by_its_term():
    assert kinds['definition'](ENGLISH[0], 50)[2] == dict(term='heat pump', a_term='a heat pump')
    assert kinds['definition'](RUSSIAN[0], 50)[2] == dict(term='теплоотдача', a_term='теплоотдача')


def test_a_heading_has_no_number_and_a_summary_names_the_sections():
    assert {chat['reference'] for one, _, chat in conversations('heading') if one['id'] == 'pump'} <= {'Data', 'Forecast of the load'}
    assert 'Forecast of the load\nTrees are added' in mine(ENGLISH[0], 'summary')['messages'][0]['content']
    assert mine(ENGLISH[1], 'summary') is None and mine(ENGLISH[1], 'heading') is None


def test_a_summary_that_is_about_something_else_is_not_taken():
    assert mine(ENGLISH[0], 'tldr') and mine(ENGLISH[0] | dict(tldr='Prepared for a conference long ago.'), 'tldr') is None


@pytest.mark.parametrize(('part', 'wanted'), [
    ('However, heat flows.', 'Heat flows.'), ('Однако тепло идёт.', 'Тепло идёт.'), ('Still waters.', 'Still waters.'),
    ('Таким образом, медь тепла.', 'Медь тепла.'), ('Heat flows.', 'Heat flows.')])
def test_a_sentence_that_stands_alone_has_no_link_to_the_one_before(part, wanted):
    assert _unlinked(part) == wanted


PLAIN = 'Heat flows through copper in our bodies. Bodies of copper are warm in June. '


@pytest.mark.parametrize(('kind', 'text', 'more'), [
    ('truth', 'Copper bars are higher in June. Copper bars are lower in June.', {}),           # bent, it says the other sentence
    ('truth', 'This copper bar is higher in June. These bars are lower in May.', {}),           # of what, nobody could tell
    ('claim', PLAIN + 'We show that copper is warm. We propose a bar of copper.', {}),          # two could be meant
    ('conclusion', 'Copper is warm in June here. We conclude that copper is warm. ' + PLAIN, {}),   # the middle is no end
    ('tldr', PLAIN, dict(tldr='Bodies of copper are warm in June.')),                           # the answer is in the question
    ('explanation', 'Heat flows '*2500 + 'on.', {})], ids=range(6))
def test_what_is_unclear_is_not_asked(kind, text, more):
    assert [mine(paper('a', 'Copper', text, **more), kind, 50, seed) for seed in range(5)] == [None]*5


def test_of_a_very_long_text_no_sentence_is_cut():
    text = 'Heat flows on. '*1332 + 'This sentence is longer than the others and goes on beyond the part that is read.'
    assert mine(paper('a', 'Heat', text), 'explanation', 10**5)['reference'] == ' '.join(['Heat flows on.']*1332)


# --- whatever a paper says --------------------------------------------------------------------------------------------------------

FRAGMENTS = [part for one in PAPERS for part in sentences(one['text'])]
FRAGMENTS += ['{', '}', '{0}', 'However,', '(LLM)', '$x', '(', '1.', '\n', '—', 'is a', '5 %']


@each_kind
@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60), st.one_of(st.text(max_size=200), st.lists(st.sampled_from(FRAGMENTS), max_size=8).map(' '.join)),
       st.sampled_from([5, 30, 50]), st.lists(st.text(max_size=12), max_size=4))
def test_no_text_raises_and_none_is_half_a_conversation(kind, title, text, words, strings):
    sections = [dict(title=string, text=text) for string in strings]
    full = paper('x', title, text, keywords=strings, topics=strings, tldr=text, sections=sections)
    for one in (dict(id='x', title=title, text=text), full):
        chat = mine(one, kind, words)
        if chat is None: continue
        assert chat['messages'][1]['content'] == chat['reference'] != '' and len(chat['reference'].split()) <= words
        assert chat['lang'] in ('en', 'ru') and mine(one, kind, words) == chat


@pytest.mark.parametrize('text', ['word '*100_000, 'One. '*50_000, 'Heat (is '*30_000, '$ A. '*30_000,
                                  'We show that very ' + 'very '*50_000, '.'*100_000, 'To '*100_000 + '.'], ids=range(7))
def test_very_long_texts_take_no_long_time(text):
    start = time.process_time()
    for kind in kinds: mine(paper('long', 'Heat', text), kind)
    assert time.process_time() - start < 60  # a pattern that backtracks without end takes hours
