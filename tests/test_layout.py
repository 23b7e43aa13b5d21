"""Letters on a page become a paper: words, lines and columns, the order of reading, kinds, prose, whatever order they were written in."""
import random
from collections import Counter

import numpy as np
import pytest

from scilm_adapt.layout import (
    Block,
    Letters,
    Line,
    _blocks_of,
    _gutters,
    _identity,
    _is_heading,
    _paragraphs,
    _reading_order,
    _split_keywords,
    _united_word,
    lines_of,
    read_paper,
)

PROSE = 'the warm body gives its heat to a cold one and'


def typed(*rows: tuple, width: float = 600, height: float = 800) -> Letters:
    "Letters of rows (left, base, size, text, name of the font): each is half as wide as high."
    codes, boxes, bases, sizes, styles, fonts = [], [], [], [], [], ['']
    for x, base, size, text, *font in rows:
        fonts += font
        for k, letter in enumerate(text):
            codes.append(ord(letter))
            boxes.append((x + k*size/2, base - 0.7*size, x + (k + 1)*size/2, base + 0.2*size))
            bases.append(base), sizes.append(size), styles.append(len(fonts) - 1 if font else 0)
    return Letters(np.array(codes), np.array(boxes, float).reshape(-1, 4), np.array(bases, float), np.array(sizes, float),
                   np.array(styles, int), np.zeros(len(codes)), fonts, width, height)


def texts(*rows: tuple) -> list[str]: return [line.text for line in lines_of(typed(*rows))]


def paper(*pages: list[tuple]): return read_paper([lines_of(typed(*rows), n) for n, rows in enumerate(pages)], [800.0]*len(pages))


def column(x: float, base: float, count: int, text: str = PROSE, size: float = 10) -> list[tuple]:
    return [(x, base + 1.2*size*k, size, text) for k in range(count)]


HEAD = [(120, 80, 16, 'How heat flows in thin plates'), (230, 105, 10, 'A. Invented'), (50, 140, 10, 'Abstract', 'bold'),
        *column(50, 154, 4, f'In short {PROSE} then we look at it once more and go on')]


@pytest.mark.parametrize(('rows', 'words'), [
    ([(50, 100, 10, '10'), (60, 96, 7, '5')], ['10^5']), ([(50, 100, 10, 'x'), (55, 102, 7, 'i')], ['x_i']),
    ([(50, 100, 10, 'H'), (55, 102, 7, '2'), (58.5, 100, 10, 'O')], ['H2O']),
    ([(50, 100, 10, 'plates'), (80, 96, 7, '12,13')], ['plates']), ([(50, 100, 10, 'plates.'), (85, 96, 7, '*')], ['plates.']),
    ([(50, 100, 10, 'cm'), (60, 96, 7, '2')], ['cm^2']), ([(50, 100, 10, 'K'), (55, 96, 7, '−1')], ['K^(−1)', 'K^−1']),
    ([(50, 100, 10, 'e\ufb03cient \U0001d465')], ['efficient x']), ([(50, 100, 10, 'A'), (54.7, 100, 10, 'V')], ['AV']),
    ([(50, 100, 10, 'na'), (60, 100, 10, '\xa8'), (60, 100, 10, '\u0131'), (65, 100, 10, 've')], ['naïve']),
    ([(50, 100, 10, 'e\x0ecient')], ['efficient']),
    ([(50, 100, 10, 'heat'), (72.5, 100, 10, 'flows')], ['heat flows'])])
def test_letters_become_words(rows, words):
    assert ' '.join(texts(*rows)) in words


def test_an_exponent_that_was_written_apart_is_still_one():
    assert texts((50, 100, 10, 'by 10'), (85, 100, 10, 'we mean'), (75, 96, 7, '5')) == ['by 10^5', 'we mean']


def test_letters_parted_on_purpose_come_together_word_by_word():
    spaced = [(50 + 9*k + 4*(k > 3), 100, 10, letter) for k, letter in enumerate('HEATFLOWS')]
    assert texts(*spaced) == ['HEAT FLOWS']
    assert texts(*((50 + 20*k, 100, 10, letter) for k, letter in enumerate('abc'))) != ['abc']  # three letters are three words


@pytest.mark.parametrize('seed', range(3))
def test_the_order_in_which_a_page_was_written_does_not_matter(seed):
    rows = [*HEAD, (50, 225, 12, '1 Introduction', 'bold'), *column(50, 240, 9), (310, 225, 12, '2 Method', 'bold'), *column(310, 240, 9)]
    shuffled = random.Random(seed).sample(rows, len(rows)) if seed else sorted(rows, key=lambda row: (row[1], row[0]))
    found, again = paper(rows), paper(shuffled)
    assert found.title == again.title == 'How heat flows in thin plates' and found.abstract == again.abstract
    assert found.sections == again.sections and [section['title'] for section in found.sections] == ['Introduction', 'Method']


def test_a_wide_blank_within_a_line_is_none_between_columns():
    assert texts(*column(50, 100, 2, 'a line that goes on and on'), (50, 124, 10, 'a loose'), (105, 124, 10, 'line of text'),
                 *column(50, 136, 2, 'and a line as the first one'))[2] == 'a loose line of text'
    two = [row for k in range(6) for row in ((50, 100 + 12*k, 10, 'words to the left.'), (155, 100 + 12*k, 10, 'and to the right'))]
    assert Counter(texts(*two)) == {'words to the left.': 6, 'and to the right': 6}


@pytest.mark.parametrize(('page', 'gutters'), [
    ([*column(50, 100, 9, 'five small words to read'), *column(310, 100, 9, 'five small words to read')], 1),
    ([*column(30, 100, 9, 'six small words to read'), *column(220, 100, 9, 'six small words to read'),
      *column(410, 100, 9, 'six small words to read')], 2),
    (column(50, 100, 20, f'{PROSE} another one too'), 0), ([], 0)])
def test_gutters_are_found(page, gutters):
    assert len(_gutters(lines_of(typed(*page)))) == gutters


def test_everything_that_is_no_text_has_its_kind():
    body = lambda: [*column(50, 100, 12, f'{PROSE} an other one so on'), *column(50, 400, 12, f'{PROSE} an other one so on')]
    table = [(x, 280 + 12*k, 10, word) for k in range(4) for x, word in ((60, 'alpha'), (160, f'0.{k}'), (220, f'{k}.5'))]
    first = [(250, 30, 8, 'Journal of Heat 12 (2024)'), *body(), *table, (60, 262, 10, 'Table 1: What was found.'),
             (150, 355, 10, 'f(x) = 2y + 3'), (350, 355, 10, '(1)'), (50, 570, 7, '1 A note at the foot.'), (300, 780, 8, '7')]
    second = [(250, 30, 8, 'Journal of Heat 13 (2024)'), *body(), (300, 780, 8, '8')]
    found = Counter(line.kind for line in paper([HEAD[0], *first], second).lines)
    assert found['margin'] == 4 and found['table'] == 12 and found['formula'] == 2 and found['caption'] == found['footnote'] == 1
    assert found['body'] == 48


def test_front_matter_by_its_names_is_no_section():
    rows = [*HEAD, (50, 215, 12, 'CCS CONCEPTS', 'bold'), (50, 230, 10, 'Heat, cold and all that is between the two.'),
            (50, 250, 12, 'KEYWORDS', 'bold'), (50, 265, 10, 'heat, cold'), (50, 290, 12, '1 Introduction', 'bold'), *column(50, 305, 9)]
    found = paper(rows)
    assert [section['title'] for section in found.sections] == ['Introduction'] and found.keywords == ['heat', 'cold']


def test_references_without_a_heading_are_left_out():
    rows = [*HEAD, (50, 215, 12, '1 Introduction', 'bold'), *column(50, 230, 9), (50, 360, 10, '[1] A. Author, On heat, 1822.'),
            (50, 372, 10, '[2] B. Author, On cold, 1824.')]
    assert 'Author' not in str(paper(rows).sections)


@pytest.mark.parametrize('title', ['A study of heat in plates', 'X rays and I', '3D plates and heat', 'How heat flows'])
@pytest.mark.parametrize('section', ['1. Introduction', 'I. Introduction', 'Introduction'])
def test_a_title_that_is_the_running_head_too_is_found_and_names_in_large_type_are_no_headings(title, section):
    names = [(230, 105, 13, 'A. Invented', 'bold'), (230, 125, 13, 'X. Imagined, Institute of Heat', 'bold')]
    first = [(120, 80, 18, title, 'bold'), *names, (50, 170, 14, section, 'bold'), *column(50, 190, 12)]
    others = [[(120, 50, 8, title), *column(50, 80, 20)] for _ in range(3)]
    found = paper(first, *others)
    assert found.title == title and [part['title'] for part in found.sections] == ['Introduction']
    assert {line.kind for line in found.lines if line.page and line.size == 8} == {'margin'}
    assert 'Invented' not in str(found.sections) and 'Institute' not in found.abstract + str(found.sections)


def test_a_body_line_at_the_edge_of_a_page_is_no_running_head():
    pages = [[*column(50, 60, 55, f'{word} {PROSE} an other one')] for word in ('first', 'second', 'third')]
    assert {line.kind for line in paper([*HEAD, *column(50, 240, 40, f'{PROSE} an other one')], *pages).lines if line.page} == {'body'}


def box(name: str, *edges: float, size: float = 10.0, bold: bool = False) -> Block:
    return Block([Line(name.split(), edges, edges[3] - 2, size, bold)])


def test_what_spans_all_columns_parts_the_order():
    made = [box('title', 50, 40, 550, 90), box('a', 50, 110, 290, 380), box('b', 310, 110, 550, 300), box('c', 310, 310, 550, 380),
            box('wide', 50, 400, 550, 470), box('d', 50, 490, 290, 760), box('e', 310, 490, 550, 760)]
    for seed in range(5):
        order = _reading_order(random.Random(seed).sample(made, len(made)), [300.0])
        assert [block.text for block in order] == ['title', 'a', 'b', 'c', 'wide', 'd', 'e']


def test_boxes_in_a_circle_still_come_out_once_each():
    draw = np.random.default_rng(0)
    for _ in range(50):
        corners = draw.uniform(0, 500, (12, 2))
        made = [box(f'b{n}', x, y, x + draw.uniform(10, 300), y + draw.uniform(5, 200)) for n, (x, y) in enumerate(corners)]
        assert sorted(block.text for block in _reading_order(made, [250.0])) == sorted(block.text for block in made)


@pytest.mark.parametrize(('text', 'bold', 'size', 'is_one'), [
    ('2.1 Warm bodies', True, 10, True), ('Warm bodies', False, 12, True), ('RESULTS', False, 10, True), ('Introduction', False, 10, True),
    ('IV. Results', False, 10, True), ('2 bodies were warm.', False, 10, False), ('Warm bodies,', True, 10, False),
    ('x = 3', True, 12, False), ('the end of a sentence', False, 10, False), ('A Proofs of the theorems', True, 10, True),
    ('Список литературы', False, 10, True), ('1. Введение', True, 10, True)])
def test_headings_are_told(text, bold, size, is_one):
    assert _is_heading(box(text, 50, 100, 200, 110, size=size, bold=bold), 10) == is_one


@pytest.mark.parametrize(('head', 'tail', 'known', 'whole'), [
    ('infor-', 'mation,', {'information': 1}, 'information,'), ('well-', 'known', {'well-known': 1}, 'well-known'),
    ('first-', 'order', {}, 'first-order'), ('tempera-', 'ture', {}, 'temperature'), ('Bose-', 'Einstein', {}, 'Bose-Einstein'),
    ('state-of-the-', 'art', {}, 'state-of-the-art'), ('2-', 'norm', {}, '2-norm'),
    ('three-di-', 'mensional', {}, 'three-dimensional'), ('пере-', 'ходит', {}, 'переходит'),
    ('state-of-the-', 'art', {'state-of-the-art': 2}, 'state-of-the-art'), ('(co-', 'efficient)', {'coefficient': 3}, '(coefficient)')])
def test_cut_words_are_joined_as_the_paper_itself_has_them(head, tail, known, whole):
    assert _united_word(head, tail, Counter(known)) == whole


def test_paragraphs_begin_where_lines_are_set_in_and_go_on_over_columns():
    rows = [(60, 100, 10, f'One {PROSE}'), *column(50, 112, 2), (50, 136, 10, 'is cold.'),
            (60, 148, 10, f'Two {PROSE}'), *column(50, 160, 2)]
    left = _blocks_of(lines_of(typed(*rows)), 10)
    right = _blocks_of(lines_of(typed(*column(310, 100, 1), (310, 112, 10, 'ends here.'))), 10)
    found = _paragraphs([*left, *right], Counter())
    assert [text[:3] for text in found] == ['One', 'Two'] and found[0].endswith('is cold.') and found[1].endswith('ends here.')


def test_the_titles_type_is_the_largest_but_not_a_journals_name():
    journal = [(150, 40, 20, 'Journal of Heat'), *HEAD, (50, 225, 12, '1 Introduction', 'bold'), *column(50, 240, 9)]
    assert paper(journal).title == 'How heat flows in thin plates'
    assert paper([(150, 40, 20, 'Journal of Heat'), *column(50, 100, 30)]).title == 'Journal of Heat'  # where there is no other


@pytest.mark.parametrize(('text', 'identity'), [
    ('https://doi.org/10.1000/heat.7,', '10.1000/heat.7'), ('doi:10.1000/a(1)b.', '10.1000/a(1)b'),
    ('arXiv:2401.01234v2 [cs.CL]', '2401.01234'), ('arXiv:hep-th/9901001', 'hep-th/9901001'), ('see 10.1 and 10.2', '')])
def test_ids_are_found(text, identity):
    assert _identity([Line(text.split(), (0, 0, 1, 1), 1, 8)]) == identity


def test_ids_in_the_text_and_in_references_are_those_of_others():
    cited = [*HEAD, (50, 225, 12, '1 Introduction', 'bold'), *column(50, 240, 9, f'{PROSE} doi:10.1000/other.1'),
             (50, 400, 12, 'References', 'bold'), (50, 420, 9, '[1] Others, arXiv:2401.01234, 2024')]
    assert paper(cited).id == ''


def test_key_words_are_parted():
    assert _split_keywords('heat; cold, ice', []) == ['heat', 'cold, ice'] and _split_keywords('heat, cold.', []) == ['heat', 'cold']
    assert _split_keywords('heat cold', ['heat', 'cold']) == ['heat', 'cold']


def test_no_letters_are_no_paper():
    assert lines_of(typed()) == [] and read_paper([[]], [800.0]).sections == [] and read_paper([], []).title == ''
