"""Tagged exports and BibTeX: every form is read, what is broken costs no other record, and no unknown form is taken for prose."""
import os
import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_sources import outcome, write

from scilm_adapt.exports import _PAPERS, _delatexed, formats, unknown_form
from scilm_adapt.reading import Refused, read_here
from scilm_adapt.sources import _format_of, rows

HEAT = 'We measure the flow of heat in films and compare it with a model.'
ТЕПЛО = 'Теплота переходит от тёплых тел к холодным.'


def read(tmp_path, text: str | bytes, name: str = 'savedrecs.txt') -> list[dict | str]:
    "The fields of the rows of a file, and the reasons of what is refused."
    return [entry.reason if isinstance(entry, Refused) else entry.fields for entry in rows(write(tmp_path/name, text))]


def briefly(found: list) -> list: return [(entry['id'], entry['title'], entry['text']) if isinstance(entry, dict) else entry
    for entry in found]


# --- every form -------------------------------------------------------------------------------------------------------------------

IDS = dict.fromkeys(formats, ['10.1/a', '10.1/b']) | dict(pubmed=['7', '7'], medline=['7', '7'])


@pytest.mark.parametrize('name', [name for name in formats if name != 'summaries'])
@pytest.mark.parametrize('change', ['as it is', 'Windows', 'a mark', 'blank lines', 'UTF-16'])
def test_every_form_is_told_by_its_content_and_read(tmp_path, name, change):
    form, = formats[name].forms
    text = dict([('Windows', form.example.replace('\n', '\r\n')), ('blank lines', '\n\n' + form.example)]).get(change, form.example)
    codec = {'a mark': 'utf-8-sig', 'UTF-16': 'utf-16'}.get(change, 'utf-8')
    stop = '.'*(name == 'pubmed')  # PubMed's titles end in one
    words = {'medline': [['heat', 'cold']]*2, 'pubmed': [[], []]}.get(name, [['heat', 'thin films'], ['тепло', 'холод']])
    assert read(tmp_path, text.encode(codec)) == [
        dict(id=known, title=title + stop, text=abstract, topics=['Heat']*(name == 'medline'), keywords=word)
        for known, (title, abstract, *_), word in zip(IDS[name], _PAPERS, words)]


def test_every_form_says_where_it_takes_what_from():
    for name, form in ((name, form) for name, kind in formats.items() for form in kind.forms):
        assert form.name and form.title and form.example and (form.text and form.id or name == 'summaries')


@pytest.mark.parametrize('name', [name for name in formats if name not in ('summaries', 'pubmed')])
def test_a_form_of_any_size_passes_through_a_little_memory(tmp_path, name):
    record = formats[name].forms[0].example.replace(HEAT, ' '.join([HEAT]*200)).replace(ТЕПЛО, ' '.join([ТЕПЛО]*200))
    path = write(tmp_path/'a.txt', record*70)
    next(rows(path))
    tracemalloc.start()
    kept = sum(not isinstance(entry, Refused) for entry in rows(path))
    assert kept == 140 and tracemalloc.get_traced_memory()[1] < os.path.getsize(path)/2
    tracemalloc.stop()


@pytest.mark.parametrize('name', formats)
def test_a_line_in_another_encoding_costs_its_record_alone(tmp_path, name):
    example = formats[name].forms[0].example
    found = read(tmp_path, example.encode().replace(HEAT.encode(), HEAT.encode()[:-1] + 'Тепло.'.encode('cp1251')) + example.encode())
    if name == 'summaries': assert len(found) == 4 and all('no abstracts' in entry for entry in found)
    else: assert [isinstance(entry, str) and 'not UTF-8' in entry for entry in found] == [True, False, False, False]


# --- tagged texts -----------------------------------------------------------------------------------------------------------------

def test_web_of_science_in_all_its_parts(tmp_path):
    record = ('PT J\nAU Doe, J\n   Roe, R\nTI Heat flow in thin films\n   that grow\nSO J FILMS\nID PLUS\nDE heat flow in thin\n   '
        'films; cold\n'
              f'AB We wait. US firms\n   AB boil.\n   \n   {HEAT}\nC1 [Doe, J] X.\n   [Roe, R] Y.\nUT WOS:{{}}\nER\n\n')
    wanted = ('Heat flow in thin films that grow', f'We wait. US firms AB boil.\n\n{HEAT}')
    for head in ('FN Clarivate Analytics Web of Science\nVR 1.0\n', 'FN ISI Export Format\nVR 1.0\n', '', '\n'):
        found = read(tmp_path, head + record.format(1) + record.format(2) + 'EF\n' + head + record.format(3) + 'EF')
        assert briefly(found) == [(f'WOS:{n}', *wanted) for n in (1, 2, 3)]
        assert found[0]['keywords'] == ['heat flow in thin films', 'cold']
    found = read(tmp_path, 'PT J\nTI Heat\nno tag\nER\n\n' + record.format(2))
    assert 'neither a field' in found[0] and found[1]['id'] == 'WOS:2'
    assert read(tmp_path, record.format(1) + f'PT J\nTI Heat\nAB {HEAT[:-9]}')[1] == 'no line "ER" ends the record; mend the record'


def test_endnote_and_refer(tmp_path):
    record = ('%0 Journal Article\n%A Doe, J.\n%T О теплоте\n%K heat\nthin films\ncold\n'
              f'%X {HEAT}\n\nAnd more\nof it.\n%R doi:10.1/x\n%U http://a\n')
    found = read(tmp_path, record + '\n\n' + record)
    assert briefly(found) == [('10.1/x', 'О теплоте', f'{HEAT}\n\nAnd more of it.')]*2 and found[0]['keywords'] == ['heat', 'thin films',
        'cold']
    refer = f'%A Doe\n%T Heat\n%X {HEAT}\n\n%T Cold\n%A Poe\n%X {ТЕПЛО}\n'
    assert briefly(read(tmp_path, refer)) == [('', 'Heat', HEAT), ('', 'Cold', ТЕПЛО)]


PUBMED = f'''1. J Films. 2020 Jan;1(1):1-10. doi: 10.1/a. Epub 2019 Dec
1.

Heat flow in thin films that grow
in vacuum.

Doe J(1), Roe-Poe RA(2), van der Berg K(1)(2); Film Study Group.

Author information:
(1)Department of Films, Town.
(2)Other.

Comment in
    J Films. 2020;2:1.

BACKGROUND: We wait for the
heat.
METHODS: 1. We measure.
RESULTS: {HEAT}

Copyright © 2020 The Authors.

DOI: 10.1/a
PMCID: PMC1
PMID: 111 [Indexed for MEDLINE]

Conflict of interest statement: 2. None.


2. Film Lett. 2021 May.

[On heat].

[Article in Russian; Abstract available in Russian from the publisher]

[No authors listed]

{HEAT}

Second paragraph: it boils.

PMID: 222


3. J Cold. 2022.

No abstract.

Poe E.

PMID: 333
'''


def test_pubmed_as_text(tmp_path):
    wanted = [('111', 'Heat flow in thin films that grow in vacuum.',
        f'BACKGROUND: We wait for the heat.\n\nMETHODS: 1. We measure.\n\nRESULTS: {HEAT}'),
              ('222', 'On heat.', f'{HEAT}\n\nSecond paragraph: it boils.'), ('333', 'No abstract.', '')]
    assert briefly(read(tmp_path, PUBMED)) == wanted
    summary = '1: Doe J, Roe R. Heat flow. J Films. 2020;1:1-10. doi: 10.1/a. PMID: 111; PMCID: PMC1.\n\n2: Poe E. Cold. PMID: 2.\n'
    found = read(tmp_path, summary)
    assert len(found) == 2 and all("summaries have no abstracts; export the format PubMed or Abstract (text)" in entry for entry in found)


@pytest.mark.parametrize(('changed', 'title', 'text'), [
    ('TI  - On heat.\nAB  - {}\nOAB - other', 'On heat.', HEAT), ('TI  - [On heat].\nTT  - О теплоте.\nAB  - {}', 'On heat.', HEAT),
    ('TI  - [On\n      heat.]\nAB  - {}', 'On heat.', HEAT), ('TI  - [Not Available].\nTT  - О теплоте.\nAB  - {}', 'О теплоте.', HEAT),
    ('TI  - [On heat].\nTT  - О теплоте.\nOABL- rus\nOAB - {}', 'О теплоте.', HEAT), ('BTI - On heat\nAB  - {}', 'On heat', HEAT),
    ('TI  - On heat.\nFIR - Doe\nAB  - We wait.\n      {}\nAD  - US - x', 'On heat.', f'We wait. {HEAT}'), ('TI  - On heat.', 'On heat.',
        '')])
def test_medline(tmp_path, changed, title, text):
    found = read(tmp_path, f'PMID- 7\nOWN - NLM\n{changed.format(HEAT)}\nAID - 10.1/a [doi]\n\nPMID- 8\nTI  - x\nAB  - y\n')
    assert briefly(found) == [('7', title, text), ('8', 'x', 'y')]


@pytest.mark.parametrize(('text', 'wanted'), [
    (f'\n<1>\nUnique Identifier\n  1\nTitle\n  On\n  heat\nAbstract\n  AIM: We wait.\n  {HEAT}\nKeyword Heading\n  a\n\n<2>\nTitle\n  '
        f'x\nAbstract\n  y\n',
     [('1', 'On heat', f'AIM: We wait. {HEAT}'), ('', 'x', 'y')]),
    (f'<1. >\nVN  - Ovid MEDLINE(R)\nUI  - 1\nTI  - On heat\nAB  - {HEAT}\n\n<2. >\nVN  - Ovid\nUI  - 2\nTI  - x\nAB  - y\n',
     [('1', 'On heat', HEAT), ('2', 'x', 'y')]),
    (f'VN  - Ovid Technologies\nDB  - Embase\nUI  - 1\nTI  - On heat\nAB  - {HEAT}\n\nVN  - Ovid\nUI  - 2\nTI  - x\nAB  - y\n',
     [('1', 'On heat', HEAT), ('2', 'x', 'y')]),
    (f'RT Journal Article\nSR Print(0)\nID 5\nA1 Doe,J.\nT1 On heat\nJF J Films\nYR 2020\nAB US films. {HEAT}\nUS firms wait.\n\n'
     'RT Book\nID 6\nT1 x\nAB y\nER\n', [('5', 'On heat', f'US films. {HEAT} US firms wait.'), ('6', 'x', 'y')]),
    (f'Template-Type: ReDIF-Paper 1.0\nAuthor-Name: J. Doe\nAuthor-Email: a@b.c\nTitle: On\n  heat\nAbstract: {HEAT}\nResults: it boils.\n'
     'Handle: RePEc:x:1\n\nTemplate-Type: ReDIF-Article 1.0\nTitle: x\nAbstract: y\nHandle: RePEc:x:2\n',
     [('RePEc:x:1', 'On heat', f'{HEAT} Results: it boils.'), ('RePEc:x:2', 'x', 'y')]),
    (f'{{Reference Type}}: Journal Article\n{{Title}}: О теплоте\n{{Author}}: Doe\n{{Abstract}}: {HEAT}\n\n{{Reference Type}}: Thesis\n'
     '{Title}: x\n{Abstract}: y\n', [('', 'О теплоте', HEAT), ('', 'x', 'y')]),
    (f'Report Information from ProQuest\n01 May 2020\n____________________________________\n\nDocument 1 of 2\n\nOn heat\nAuthor: Doe, '
        f'J.\n\n'
     f'Abstract: {HEAT}\n\nLinks: http://a\n\nSubject: heat; cold\n\nTitle: On heat\n\nPublication title: J Films\n\n'
     'ProQuest document ID: 123\n\nDatabase: X\n____________________________________\n\nDocument 2 of 2\n\nx\n\nAbstract: y\n\nTitle: x\n\n'
     '____________________________________\n\nContact us at: http://p\n', [('123', 'On heat', HEAT), ('', 'x', 'y')]),
    (f'Record: 1\nTitle:\n On heat\nAuthors:\n Doe\nAbstract:\n {HEAT}\nAccession Number:\n 12\nDatabase:\n X\n\nRecord: 2\nTitle:\n x\n'
        f'Abstract:\n y\n',
     [('12', 'On heat', HEAT), ('', 'x', 'y')]),
    (f'<RECORD 1>\nAccession number:2020\nTitle:On heat\nAuthors:Doe\nAbstract:{HEAT} &copy; 2020\nControlled terms:heat\n\n<RECORD 2>\n'
        f'Title:x\nAbstract:y\n',
     [('2020', 'On heat', f'{HEAT} &copy; 2020'), ('', 'x', 'y')]),
    (f'Название: О теплоте\nАвторы: Доу\nЖурнал: Плёнки\nАннотация: {ТЕПЛО}\nЦель: ждать.\n\nНазвание: x\nАннотация: y\n',
     [('', 'О теплоте', f'{ТЕПЛО} Цель: ждать.'), ('', 'x', 'y')]),
    (f'Title: On heat\nAuthor: Doe\n\nAbstract: {HEAT}\n\nMore: of it.\n', [('', 'On heat', f'{HEAT}\n\nMore: of it.')]),
    (f'Author: Doe\nTitle: On heat\nAbstract: {HEAT}\n\nTitle: x\nAbstract: y\n\nAuthor: Poe\nTitle: z\nAbstract: u\n',
     [('', 'On heat', HEAT), ('', 'x', 'y'), ('', 'z', 'u')]),
    (f'Record 1 of 2 - PsycINFO\nTI: On heat\nAU: Doe\nAB: {HEAT}\n\nRecord 2 of 2 - PsycINFO\nTI: x\nAB: y\n',
     [('', 'On heat', HEAT), ('', 'x', 'y')])], ids=lambda value: value.strip()[:20] if isinstance(value, str) else '')
def test_what_databases_write(tmp_path, text, wanted): assert briefly(read(tmp_path, text)) == wanted


def test_two_titles_in_one_record_are_refused(tmp_path):
    found = read(tmp_path, f'______\nTitle: a\nAbstract: {HEAT}\nTitle: b\nAbstract: c\n______\nTitle: x\nAbstract: y\n')
    assert found[0].startswith('two titles in one record') and briefly(found[1:]) == [('', 'x', 'y')]


# --- RIS --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('text', 'wanted'), [
    (f'TY  - JOUR\nTI  - a\nAB  - {HEAT}\nAB  - Second.\nER  - \n', ('', 'a', f'{HEAT}\n\nSecond.')),
    (f'TY  - JOUR\nTI  - a\nN2  - {HEAT}\nAB  - {HEAT}\nER  - \n', ('', 'a', HEAT)),
    (f'TY  - JOUR\nTI  - a\nN2  - {HEAT[:40]}\nAB  - {HEAT}\nER  - \n', ('', 'a', HEAT)),
    (f'TY - JOUR\nT1 - a\nT2 - J\nN2 - {HEAT}\nER -\n', ('', 'a', HEAT)), (f'TY  -JOUR\nTI  -a\nAB  -{HEAT}\nER  -\n', ('', 'a', HEAT)),
    (f'ty  - jour\nti  - a\nab  - {HEAT}\ner  - \n', ('', 'a', HEAT)), (f'TY-JOUR\nTI-a\nAB-{HEAT}\nER-\n', ('', 'a', HEAT)),
    (f' TY  - JOUR\n TI  - a\n AB  - {HEAT}\n ER  - \n', ('', 'a', HEAT)), (f'TY\t- JOUR\nTI\t- a\nAB\t- {HEAT}\nER\t- \n', ('', 'a',
        HEAT)),
    (f'ID  - 3\nTI  - a\nTY  - JOUR\nAB  - {HEAT}\nER  - \n', ('3', 'a', HEAT)), (f'TY  - CHAP\nCT  - a\nBT  - b\nAB  - {HEAT}\nER  - \n',
        ('', 'a', HEAT)),
    (f'TY  - BOOK\nBT  - b\nAB  - {HEAT}\nER  - \n', ('', 'b', HEAT)), (f'TY  - JOUR\nTI  - a\nT2  - J\nJO  - K\nAB  - {HEAT}\nER  - \n',
        ('', 'a', HEAT)),
    (f'TY  - JOUR\n\nTI  - a\n\nAB  - {HEAT}\n\nZZ  - what\nER  - \n', ('', 'a', HEAT)),
    (f'TY  - JOUR\nTI  - a\n  b\nAB  - We do\n1. wait,\n2. boil.\nUS - based firms.\n\n{ТЕПЛО}\nER  - \n',
     ('', 'a b', f'We do\n1. wait,\n2. boil. US - based firms.\n\n{ТЕПЛО}')),
    (f'TY  - JOUR\nTI  - a\nAB  - {HEAT}\nDO  - https://doi.org/10.1/X\nAN  - 4\nID  - 3\nER  - \n', ('10.1/X', 'a', HEAT)),
    (f'TY  - JOUR\nTI  - a\nAB  - {HEAT}\nAN  - 4\nER  - \n', ('4', 'a', HEAT)),
    (f'TY  - JOUR\nT1  - О теплоте\nA1  - 张\nJO  - 物理\nAB  - {ТЕПЛО}\nKW  - 热；膜\nER  - \n', ('', 'О теплоте', ТЕПЛО))],
    ids=lambda value: value[:30] if isinstance(value, str) else '')
def test_ris_as_it_is_really_written(tmp_path, text, wanted):
    for between in ('', '\n\n'): assert briefly(read(tmp_path, between.join([text]*3))) == [wanted]*3
    assert briefly(read(tmp_path, text.encode('utf-8-sig'), 'a.ris')) == [wanted]


@pytest.mark.parametrize('end', ['\n', '', '\n\n'])
def test_only_a_record_that_was_cut_off_needs_its_end(tmp_path, end):
    whole = f'TY  - JOUR\nTI  - a\nAB  - {HEAT}'
    assert briefly(read(tmp_path, f'{whole}\n{whole}{end}')) == [('', 'a', HEAT)]*2
    cut = read(tmp_path, f'{whole}\nER  - \nTY  - JOUR\nTI  - b\nAB  - {HEAT[:30]}')
    assert len(cut) == 2 and cut[1] == 'no line "ER  -" ends the record; mend the record'


@pytest.mark.parametrize(('lines', 'wanted'), [
    ('KW  - heat\nKW  - Films, thin\n', ['heat', 'Films, thin']), ('KW  - heat; cold;films\n', ['heat', 'cold', 'films']),
    ('KW  - heat\ncold\nthin films\n', ['heat', 'cold', 'thin films']), ('KW  - heat, cold\n', ['heat', 'cold']), ('KW  - тепло；холод\n',
        ['тепло', 'холод']),
    ('KW  - heat\nKW  - heat\nKW  -\n', ['heat'])])
def test_key_words_however_they_are_parted(tmp_path, lines, wanted):
    assert read(tmp_path, f'TY  - JOUR\nTI  - a\n{lines}AB  - {HEAT}\nER  - \n')[0]['keywords'] == wanted


# --- BibTeX -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('latex', 'plain'), [
    ('{BERT}: Pre-training of {D}eep', 'BERT: Pre-training of Deep'), (r'p{\textless}0.05 {\textgreater} 1', 'p<0.05 > 1'),
    (r"Erd{\H o}s, {\'E}cole, {\v{S}}koda, \v S, na{\"\i}ve, na\"{\i}ve, {\ss}, {\O}rsted, \L{}\'od\'z, {\c c}, {\AA}",
     'Erdős, École, Škoda, Š, naïve, naïve, ß, Ørsted, Łódź, ç, Å'),
    (r'{\textit{in vivo}} {\it E. coli} \emph{a {\textbf{b}}} \mbox{c d}', 'in vivo E. coli a b c d'),
    (r'37{\textdegree}C {\$}5 50{\%} {\~{}}20 \~{}20 10\,K S\&P a\_b {\#}1 \{x\}', '37°C $5 50% ~20 ~20 10 K S&P a_b #1 {x}'),
    (r"a{\textemdash}b {\textendash} {\textquoteright}s ``q'' ", 'a—b – ’s “q” '), (r'{\$}{\textbackslash}alpha{\$}', r'$\alpha$'),
    (r'The {$\Lambda$CDM} of H$_{2}$O, $\frac{a}{b}$ and \(x^{2}\)', r'The $\Lambda$CDM of H$_{2}$O, $\frac{a}{b}$ and \(x^{2}\)'),
    (r'{\ensuremath{\sim}}10 \ensuremath{\alpha} {\textmu}m', '∼10 α µm'), (r'H_{2}O x^{n+1} {Q}', 'H_2O x^{n+1} Q'),
    (r'10\textsuperscript{5} CO\textsubscript{2} {}', '10<sup>5</sup> CO<sub>2</sub> '),
    ('50% of $5 & more at {R}&D, ~20 or Fig.~3 #1', '50% of $5 & more at R&D, ~20 or Fig.~3 #1'), (r'{\foo}bar \pkg{ggplot} \micro m',
        r'\foobar ggplot µm'),
    (r'\url{http://a.b/c_d} \href{http://x}{here} \cite{k}!', 'http://a.b/c_d here !'), ('Теплота {И} {\\textit{холод}}',
        'Теплота И холод'),
    ('no LaTeX: $5, 50%', 'no LaTeX: $5, 50%')])
def test_latex_becomes_characters(latex, plain):
    assert _delatexed(latex) == plain
    for value in (f'{{{latex}}}', f'{{{{{latex}}}}}', f'"{{{latex}}}"'):
        entry, = read_here(formats['bibtex'].read, f'@article{{k, title = {value}, year = 2020}}')
        assert entry.fields['title'] == ' '.join(plain.split())


ENTRIES = {
    'quotes in quotes': ('@article{k, title = "a {"}b{"} {"c"}", abstract={x}}', [('k', 'a "b" "c"', 'x')]),
    'macros': ('@string{h = "Heat"}\n@STRING(j = h # { flow})\n@article{k, title = J # " in " # {films {#}1}, abstract = {x}}',
               [('k', 'Heat flow in films #1', 'x')]),
    'round brackets': ('@article(k, title = {a) (b)}, abstract = "c)"\n)\n@book{l, title={x}}', [('k', 'a) (b)', 'c)'), ('l', 'x', '')]),
    'capitals': ('@ARTICLE {k,\n TITLE={a},\n Abstract={b}\n}', [('k', 'a', 'b')]),
    'a field twice': ('@article{k, title={a}, title={b}, abstract={c}, Abstract={longer}, note={x}, note={y}}\n@article{l, title={x}}',
                      [('k', 'a', 'longer'), ('l', 'x', '')]),
    'an at sign at the beginning of a line': ('@article{k, title={a},\nabstract={b\n@home c\n  @article{ and d } e\n@string{x = {y}} '
        'f},\n}\n@article{l, title={x}}',
                                              [('k', 'a', 'b @home c @article and d e @stringx = y f'), ('l', 'x', '')]),
    'an entry inside an abstract': ('@article{k, title={a}, abstract={b\n@book{z,\n  title={c}\n}\nd}}\n@article{l, title={x}}',
                                    [('k', 'a', 'b @bookz, title=c d'), ('l', 'x', '')]),
    'a brace missing': ('@article{k, title={a, abstract={b}}\n\n@article{l,\n title={x}}\n@article{m, title={y}}', ['a brace, q', ('l',
        'x', ''), ('m', 'y', '')]),
    'the last brace missing': ('@article{k, title={a}, abstract={b}\n@article{l, title={x}}', ['a brace, q', ('l', 'x', '')]),
    'a quotation mark missing': ('@article{k, title="a, abstract={b}}\n@article{l, title={x}}', ['a brace, q', ('l', 'x', '')]),
    'a comma missing': ('@article{k, title={a} abstract={b}}\n@article{l, title={x}}', ['a brace, q', ('l', 'x', '')]),
    'a brace too many': ('@article{k, title={a}}, abstract={b}}\n@article{l, title={x}}},\n  abstract = {c}}\n@article{m, title={y}},\n'
        '@article{n, title={z}}',
                         ['a brace too many', 'a brace too many', ('m', 'y', ''), ('n', 'z', '')]),
    'a brace too many at the end of a line': ('@article{o,\n title={u}}\n abstract={v}\n}\n@article{k, title={a}}', ['a brace too many',
                                                                                          ('k', 'a', '')]),
    'several missing': ('@article{k, title={a\n@article{l, title={b\n@article{m, title={y}}\n', ['a brace, q', 'a brace, q', ('m', 'y',
        '')]),
    'comments': ('% Encoding: UTF-8\n@Comment{jabref-meta: databaseType:bibtex;}\n@comment{@article{z, title={q}}\n@article{y, '
        'title={q}}\n}\n% @article{q,\n'
                 'free text @ home\n@preamble{"\\newcommand{\\x}{y}"}\n@article{k, title={a}}', [('k', 'a', '')]),
    'odd keys': ('@article{DBLP:conf/x/M\\"u+20, title={a}}\n@article{Smith 2020, title={b}}\n@article{, title={c}}\n'
        '@article{title={d}, year=2020}\n@misc{e}\n'
                 "@article{o'neil_2020-a.b, title={f}}", [('DBLP:conf/x/M\\"u+20', 'a', ''), ('Smith 2020', 'b', ''), ('', 'c', ''), ('',
                     'd', ''),
                                                         ('e', '', ''), ("o'neil_2020-a.b", 'f', '')]),
    'several on a line': ('@article{k, title={a}}@article{l, title={b}} @article{m, title={c}}', [('k', 'a', ''), ('l', 'b', ''), ('m',
        'c', '')]),
    'biblatex': ('@online{k, title={a}, subtitle={b}, shorttitle={z}, eprint={2101.00001v2}, eprinttype={arxiv}}\n@book{l, title={a?}, '
        'subtitle={b}}',
                 [('2101.00001', 'a: b', ''), ('l', 'a? b', '')]),
    'identifiers': ('@article{k, title={a}, doi={https://doi.org/10.1/a\\_b}, eprint={2101.00001}}\n@article{l, doi={none}, eprint={12}}',
                    [('10.1/a_b', 'a', ''), ('l', '', '')]),
    'JabRef before 3': ('This file was created with JabRef 2.10.\nEncoding: UTF8\n\n@ARTICLE{k,\n  title = {О {Т}еплоте},\n  owner = '
        '{a}\n}\n', [('k', 'О Теплоте', '')]),
    'an unknown kind of entry': ('@customa{k,\n title={a}}', [('k', 'a', '')]),
}


@pytest.mark.parametrize('case', ENTRIES)
def test_bibtex_entries(tmp_path, case):
    text, wanted = ENTRIES[case]
    assert _format_of(text.encode(), 'a.txt') == 'bibtex'
    for data in (text, text.replace('\n', '\r\n')):
        found = briefly(read(tmp_path, data, 'a.bib'))
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted): assert one == other if isinstance(other, tuple) else one.startswith(other)


@pytest.mark.parametrize(('field', 'wanted'), [('{heat; Films, thin}', ['heat', 'Films, thin']), ('{heat, {C}old}', ['heat', 'Cold']),
                                              ('"{тепло}"', ['тепло'])])
def test_bibtex_key_words(field, wanted):
    assert read_here(formats['bibtex'].read, f'@article{{k, title={{a}}, keywords = {field}}}')[0].fields['keywords'] == wanted


@given(st.lists(st.text('{}"@,=#\\% \nab(', max_size=30), max_size=6))
def test_whatever_stands_in_entries_the_whole_one_after_them_is_read(parts):
    text = ''.join(f'@article{{k{n}, title = {{{part}}}}}\n' for n, part in enumerate(parts)) + '@article{last, title = {x}}\n'
    found = read_here(formats['bibtex'].read, text)
    assert not isinstance(found[-1], Refused) and briefly([found[-1].fields]) == [('last', 'x', '')]
    assert len(found) <= text.count('@')


def test_many_broken_entries_take_no_longer_than_whole_ones():
    found = read_here(formats['bibtex'].read, '@article{k, title={a, abstract={b}}\n'*3000)
    assert len(found) == 3000 and all(isinstance(entry, Refused) for entry in found)


# --- what no reader knows ---------------------------------------------------------------------------------------------------------

UNKNOWN = {
    'SMART': f'.I 1\n.T\nHeat\n.A\nDoe\n.W\n{HEAT}\n.I 2\n.T\nCold\n.A\nPoe\n.W\n{ТЕПЛО}\n',
    'tags with dashes': f'NR - 1\nTI - Heat\nAU - Doe\nAB - {HEAT}\n\nNR - 2\nTI - Cold\nAU - Poe\nAB - {ТЕПЛО}\n',
    'one record': f'AN  12\nTI  Heat\nAU  Doe\nAB  {HEAT}\nPY  2020\n', 'capitals': f'AN 1\nTI Heat\nAU Doe\nAB {HEAT}\n  and more\n\n'*2,
    'German': f'Nummer: 1\nTitel: Wärme\nAutor: Doe\nInhalt: {HEAT}\nJahr: 1822\n\n'*3,
        'Dutch': f'NAAM: Warmte\nMAKER: D\nINHOUD: {HEAT}\nJAAR: 1\n\n'*3,
    'Russian': f'Номер: 1\nИмя: О теплоте\nКто: Доу\nО чём: {ТЕПЛО}\n\n'*3,
        'braces': f'{{Title}} Heat\n{{Author}} Doe\n{{Abstract}} {HEAT}\n\n'*2,
    'angles': f'<title> Heat\n<author> Doe\n<abstract> {HEAT}\n\n'*2, 'square': f'[Title] Heat\n[Author] Doe\n[Abstract] {HEAT}\n\n'*2,
    'bold': f'**Title:** Heat\n**Authors:** Doe\n**Abstract:** {HEAT}\n\n'*2,
        'equals': f'title = Heat\nauthor = Doe\nabstract = {HEAT}\n\n'*2,
    'hashes': f'#Title: Heat\n#Author: Doe\n#Abstract: {HEAT}\n\n'*2, 'YAML': f'- title: Heat\n  author: Doe\n  abstract: {HEAT}\n'*2,
    'AMiner': f'#* Heat\n#@ Doe\n#t 2020\n#c J\n#index 1\n#! {HEAT}\n\n'*3,
        'starred': f'*Title: Heat\n*Author: Doe\n*Abstract: {HEAT}\n\n'*2,
    'tab after the name': f'Titel\tHeat\nAutor\tDoe\nZusammenfassung\t{HEAT}\n\n'*2,
        'tabs': 'Heat\tDoe\t1822\tIt flows.\nCold\tPoe\t1823\tIt does not.\n'*3,
    'two columns': f'Heat\t{HEAT}\nCold\t{HEAT} {HEAT}\nIce\t{HEAT}\n',
        'semicolons': f'1;Heat;Doe;1822;{HEAT}\n2;Cold;Poe;1823;{HEAT}\n3;Ice;Roe;1824;{HEAT}\n',
    'Russian table': f'номер;имя;кто;что\n1;О теплоте;Доу;{ТЕПЛО}\n2;О холоде;По;{ТЕПЛО}\n',
        'bars': f'a|b|c\n1|Heat|{HEAT}\n2|Cold|{HEAT}\n',
    'quoted': f'"1","Heat","{HEAT}"\n"2","Cold","{HEAT}"\n"3","Ice","{HEAT}"\n',
    'names alone': f'TITLE\nHeat\nAUTHOR\nDoe\nABSTRACT\n{HEAT}\n\n'*2,
    'arXiv by mail': f'\\\\\narXiv:1\nFrom: Doe\nDate: 1\n\nTitle: Heat\nAuthors: Doe\n\\\\\n {HEAT}\n'*3,
    'padded': f'TITLE   Heat\nAUTHOR  Doe\nABSTRACT  {HEAT}\n\n'*2,
}


@pytest.mark.parametrize('case', UNKNOWN)
@pytest.mark.parametrize('copies', [1, 6000])
def test_an_export_that_no_reader_knows_is_refused_by_name(tmp_path, case, copies):
    entry, = rows(write(tmp_path/'a.txt', UNKNOWN[case]*copies))
    assert isinstance(entry, Refused) and entry.line == 1
    assert ('RIS, BibTeX or CSV' in entry.reason or 'name them there' in entry.reason) and '\n' not in entry.reason


PROSE = {
    'a dialogue': 'Socrates: What is heat, Crito?\nCrito: A flow, Socrates.\nSocrates: Of what?\nCrito: I do not know.\n'*5,
    'a play': ''.join(f'{random.Random(n).choice(["КНЯЗЬ", "ЧАЦКИЙ", "СОФЬЯ", "ЛИЗА", "ФАМУСОВ"])}: {ТЕПЛО}\n' for n in range(60)),
    'an interview': 'Q: What is heat?\nA: A flow.\n\n'*9,
    'minutes': f'Minutes of 3 May\n\nPresent: Doe, Roe\nChair: Doe\nTime: 10:00\n\n1. Heat. {HEAT}\n\nDecision: wait.\n\n2. Cold. '
        f'{HEAT}\n\nDecision: none.\n'
               f'Action: Doe boils.\n\n{HEAT}\n{HEAT}\nNext meeting: June',
    'протокол': f'Протокол\n\nПрисутствовали: Доу, Роу\nПовестка: теплота\n\nСлушали: {ТЕПЛО}\nПостановили: ждать.\n\nСлушали: о '
        f'холоде.\nПостановили: ждать.\n',
    'a book': 'Title: On Heat\n\nAuthor: J. Doe\n\nRelease Date: May 1822\n\nLanguage: English\n\n*** START ***\n\n' + f'{HEAT}\n'*40,
    'a letter': f'From: Doe\nTo: Roe\nSubject: Heat\nDate: May 3\n\nDear Roe,\n\n{HEAT}\n{HEAT}\nYours, Doe',
    'a structured abstract': f'On heat\n\nBACKGROUND: {HEAT}\nMETHODS: {HEAT}\nRESULTS: {HEAT}\nCONCLUSIONS: {HEAT}\n',
    'a poem': 'TO HEAT\n\nIN winter cold\nWE wait for thee,\nO heat of old,\nAS warm as tea;\nIT will not stay,\nIT goes away.\n',
    'a poem with semicolons': 'Heat flows; cold stays; we wait;\nIce melts; tea cools; too late;\nDay ends.\nNight falls;\n',
    'contents': 'Contents\n\nI Heat\t1\nII Cold\t12\nIII Ice\t40\nIV Steam\t61\n',
        'contents with dots': 'Heat ........ 1\nCold ....... 12\nIce ........ 40\n',
    'a glossary': f'Heat: {HEAT}\nCold: what is not heat.\nIce: water that is cold.\nSteam: water that is hot.\nTea: see water.\n',
    'code': '# heat: flows\n# cold: does not\ndef heat(x):\n    """Flow: of heat.\n\n    Args:\n        x: where\n    Returns:\n        '
        'flow: how much\n    """\n    y = x\n    return y\n',
    'markdown': f'**Note:** {HEAT}\n\n- Heat: flows\n- Cold: does not\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n{HEAT}\n\n{HEAT}\n',
    'a recipe': f'Tea\n\nTime: 5 min\nServes: 2\nWater: 1 l\n\n{HEAT} Then wait.\n{HEAT}\n', 'a list': '1. Heat\n2. Cold\n3. Ice\n',
        'one line': HEAT, 'tabs before': f'\t{HEAT}\n\t{HEAT}\n',
    'a paper': f'On Heat\n\nJ. Doe\n\nAbstract: {HEAT}\n\nKeywords: heat, cold\n\n1 Introduction\n\n' + f'{HEAT}\n'*30,
    'a guide': f'Title\nAbstract\nAuthors\nMethods\n\n{HEAT}\n{HEAT}\n',
    'scripture': ''.join(f'{n}:{m} {ТЕПЛО}\n' for n in range(1, 5) for m in range(1, 9)),
        'a time table': 'Heat at noon, cold at night; ice in May; steam in June.\n'*2,
}


@pytest.mark.parametrize('case', PROSE)
def test_prose_with_a_few_lines_that_look_like_fields_stays_prose(tmp_path, case):
    entry, = rows(write(tmp_path/'a.txt', PROSE[case]))
    assert not unknown_form(PROSE[case]) and not isinstance(entry, Refused)
    whole = f'{entry.fields["title"]}\n{entry.fields["text"]}'
    assert ''.join(whole.split()) == ''.join(PROSE[case].split())


def test_the_documentation_of_packages_is_prose():
    from scilm_adapt.installed import installed_docs
    texts = [f'{record["title"]}\n\n{record["text"]}' for _, record in zip(range(1500), installed_docs('science'))]
    looks = {name: kind.looks for name, kind in formats.items()}
    assert len(texts) == 1500
    assert not [(text[:80], reason) for text in texts if (reason := unknown_form(text) or ' '.join(n for n, look in looks.items()
        if look(text)))]


@pytest.mark.parametrize('name', formats)
def test_no_example_is_prose_or_refused_as_unknown_when_it_is_named_so(tmp_path, name):
    example = formats[name].forms[0].example
    kept, refused = outcome(rows(write(tmp_path/'a.txt', example)))
    assert len(kept) + len(refused) == 2 and len(refused) == 2*(name == 'summaries')
