"""XML as plain text: raised text, mathematics and blocks come out readable, and each form of record gives its title, text and id."""
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from scilm_adapt.cleaning import _apply_rules
from scilm_adapt.markup import _plain, _prose, _read_xml, articles, formats, layouts, mathml
from scilm_adapt.papers import document, read
from scilm_adapt.reading import Refused, Row, read_here

MML = 'xmlns:mml="http://www.w3.org/1998/Math/MathML"'


def as_prose(markup: str) -> str:
    return _prose(etree.fromstring(f'<p {MML}>{markup}</p>'))


def as_formula(markup: str) -> str:
    return mathml(etree.fromstring(f'<math>{markup}</math>'))


def cite(text: str, kind: str = 'bibr') -> str:
    return f'<xref ref-type="{kind}" rid="r">{text}</xref>'


def jats(paragraph: str, rest: str = '') -> str:
    return (f'<article xml:lang="en" {MML}><front><article-meta><title-group><article-title>On heat</article-title></title-group><abstract>'
            f'<p>{paragraph}</p></abstract>{rest}</article-meta></front></article>')


def pubmed(paragraph: str) -> str:
    return (f'<PubmedArticle {MML}><MedlineCitation><PMID>1</PMID><Article><ArticleTitle>On heat</ArticleTitle><Abstract><AbstractText>'
            f'{paragraph}</AbstractText></Abstract></Article></MedlineCitation></PubmedArticle>')


def tei(paragraph: str) -> str:
    return ('<TEI xmlns="http://www.tei-c.org/ns/1.0"><teiHeader><fileDesc><titleStmt><title>On heat</title></titleStmt></fileDesc>'
            f'<profileDesc><abstract><div><p>{paragraph}</p></div></abstract></profileDesc></teiHeader></TEI>')


def fields_of(data: str) -> list[dict]:
    found = read_here(_read_xml, data)
    assert all(isinstance(entry, Row) for entry in found), found
    return [entry.fields for entry in found]


def outcome(data: str | bytes) -> list[str]:
    "The title of each row, the reason of each that is refused."
    return [entry.fields['title'] if isinstance(entry, Row) else entry.reason for entry in read_here(_read_xml, data)]


# --- raised and lowered text ------------------------------------------------------------------------------------------------------

RAISED = {
    '3 × 10<sup>5</sup> cells': '3 × 10^5 cells', '1.16 ml per 1.73 m<sup>2</sup>': '1.16 ml per 1.73 m^2', 'H<sub>2</sub>O': 'H2O',
    'T<sub>max</sub>': 'T_max', 'the 19<sup>th</sup> day': 'the 19th day', 'Ca<sup>2+</sup>': 'Ca^2+',
    '<i>P</i> &lt; 10<sup>-8</sup>': 'P < 10^-8',
    'SO<sub>4</sub><sup>2−</sup>': 'SO4^2−', '<sup>13</sup>C': '^13C', 'n<sup>1/2</sup>': 'n^(1/2)', 'x<sub>i+1</sub>': 'x_(i+1)',
    'при 10<sup>−1,5</sup> К': 'при 10^−1,5 К', 'Т<sub>макс</sub> ниже 20<sup>°</sup>C': 'Т_макс ниже 20°C', 'x<inf>0</inf>': 'x0',
    'R<sup>2</sup>': 'R^2'}


@pytest.mark.parametrize('markup', RAISED)
def test_raised_and_lowered_text_is_the_same_in_every_xml_as_in_json(tmp_path, markup):
    wanted = f'Heat: {RAISED[markup]} here'
    assert [fields_of(make(f'Heat: {markup} here'))[0]['text'] for make in (jats, pubmed, tei)] == [wanted]*3
    (tmp_path/'a.jsonl').write_text(json.dumps(dict(title='On heat', text=f'Heat: {markup} here')) + '\n')
    assert _apply_rules(read(str(tmp_path/'a.jsonl'))[0]['text'])[0] == wanted


@pytest.mark.parametrize(('markup', 'wanted'), [
    ('10<hi rend="superscript">5</hi> T<hi rend="subscript">max</hi> <hi rend="italic">E</hi>. coli', '10^5 T_max E. coli'),
    ('m<hi rend="sup">2</hi> H<hi rendition="#sub">2</hi>O <hi rend="bold superscript">a</hi>', 'm^2 H2O ^a'),
    ('10<style face="superscript" size="100%">5</style> <style face="normal">K</style>', '10^5 K'),
    ('x<sup><italic>n</italic> + 1</sup> of <bold>H<sub>2</sub></bold>', 'x^(n + 1) of H2'),
    ('<sc>d</sc>-glucose', 'd-glucose')])
def test_raised_text_is_told_by_attributes_and_may_hold_other_tags(markup, wanted):
    assert as_prose(markup) == wanted


@pytest.mark.parametrize(('markup', 'wanted'), [
    (f'as before<sup>{cite("1")},{cite("2")}</sup> in these', 'as before in these'),
    (f'as before<sup>{cite("1")}–{cite("4")}</sup>.', 'as before.'),
    ('as before<sup><xref ref-type="bibr">1</xref>,<xref>2</xref></sup> and', 'as before and'),
    (f'as before<sup>[{cite("1")}]</sup>.', 'as before.'),
    (f'as before<sup>1,{cite("2")}</sup>.', 'as before.'),
    (f'as before{cite("<sup>1</sup>")}<sup>,</sup>{cite("<sup>2</sup>")}.', 'as before.'),
    (f'as before{cite("1")},{cite("2")} in', 'as before in'), (f'как раньше.{cite("1")} Затем', 'как раньше. Затем'),
    (f'5 cm<sup>2{cite("1")}</sup> wide', '5 cm^2 wide'), (f'Smith<sup>{cite("a", "aff")}</sup> said{cite("*", "fn")}', 'Smith said'),
    (f'in ref. {cite("12")} and [{cite("1")}, {cite("2")}] or ({cite("3")},{cite("4")})', 'in ref. 12 and [1, 2] or (3,4)'),
    (f'by {cite("Smith 2010")} in Table {cite("1", "table")}, Fig. {cite("2a", "fig")}', 'by Smith 2010 in Table 1, Fig. 2a'),
    ('as before<cross-ref><sup>1</sup></cross-ref> in', 'as before in'),
    ('as<hi rend="superscript"><ref type="bibr">1</ref></hi> in', 'as in'),
    ('as before<ref type="bibr">1</ref> by <ref type="bibr">(Smith, 2010)</ref> <ref type="bibr">[1]</ref>',
     'as before by (Smith, 2010) [1]')])
def test_references_to_a_list_are_never_an_exponent_nor_glued_to_a_word(markup, wanted):
    assert as_prose(markup) == wanted


# --- what stands on lines of its own ----------------------------------------------------------------------------------------------

def items(*texts: str) -> str:
    return '<list>' + ''.join(f'<list-item><p>{text}</p></list-item>' for text in texts) + '</list>'


@pytest.mark.parametrize(('markup', 'wanted'), [
    (f'In these steps:{items("Clean the glass.", "Heat the glass", "Wait")}then stop',
     'In these steps:\nClean the glass.\nHeat the glass\nWait\nthen stop'),
    ('<list><list-item><label>1.</label><p>Clean</p></list-item></list>', '1. Clean'),
    ('Так:<list><item>греем</item><item>ждём</item></list>', 'Так:\nгреем\nждём'),
    ('a<break/>b<br/>c<lb/>d wo<lb break="no"/>rd', 'a\nb\nc\nd word'),
    ('<def-list><def-item><term>K</term><def><p>kelvin</p></def></def-item></def-list>', 'K\nkelvin'),
    ('is<disp-formula id="e"><label>(1)</label><tex-math>$x$</tex-math></disp-formula>, where', 'is\n(1) $x$, where'),
    ('<table><tr><td>10</td><td>20</td></tr><tr><td>a</td><td/></tr></table>fin', '10 20\na\nfin'),
    ('says<disp-quote><p>Heat</p></disp-quote>he', 'says\nHeat\nhe'),
    ('a<statement><label>Theorem 1</label><p>Heat flows.</p></statement>b', 'a\nTheorem 1 Heat flows.\nb'),
    ('a<boxed-text><p>Box</p></boxed-text>b', 'a\nBox\nb'),
    ('as in<fig><p>A kettle</p></fig>We<table-wrap><td>1</td></table-wrap>see', 'as in\nWe\nsee'),
    ('heat<fn><p>a note</p></fn> flows<note><p>b</p></note>.', 'heat flows.'),
    ('is<formula>E</formula>where <formula notation="TeX">a_1</formula>, (<formula>b</formula>)', 'is E where $a_1$, (b)'),
    ('<verse-group><verse-line>Heat</verse-line><verse-line>flows</verse-line></verse-group>', 'Heat\nflows'),
    ('<italic>E</italic>. coli, hel<b>lo</b>, <named-content>glu</named-content>cose', 'E. coli, hello, glucose'),
    ('one\n  two', 'one two')])
def test_blocks_break_the_line_and_inline_elements_do_not(markup, wanted):
    assert as_prose(markup) == wanted
    assert _plain(etree.fromstring(f'<p>{markup}</p>')) == ' '.join(wanted.split())


inline = st.sampled_from(['italic', 'bold', 'i', 'named-content', 'sc', 'monospace', 'ext-link'])
block = st.sampled_from(['p', 'list-item', 'item', 'disp-quote', 'disp-formula', 'td', 'tr', 'statement', 'def', 'title', 'verse-line',
                         'head', 'li'])
words = st.text('abcжщ', min_size=1, max_size=5)
trees = st.recursive(words.map(lambda word: (word, [word])), lambda inner: st.one_of(
    st.tuples(inline, inner).map(lambda made: (f'<{made[0]}>{made[1][0]}</{made[0]}>', made[1][1])),
    st.tuples(inner, block, inner, inner).map(lambda made: (f'{made[0][0]}<{made[1]}>{made[2][0]}</{made[1]}>{made[3][0]}',
                                                            made[0][1] + made[2][1] + made[3][1]))), max_leaves=8)


@given(trees)
@settings(max_examples=150, deadline=None)
def test_no_two_words_of_different_blocks_grow_together(tree):
    markup, wanted = tree
    assert as_prose(markup).split() == wanted


# --- mathematics ------------------------------------------------------------------------------------------------------------------

def tokens(text: str) -> str:
    "MathML tokens out of a text with blanks: numbers, signs, else letters."
    tag = lambda one: 'mn' if one[0].isdigit() else 'mi' if one[0].isalpha() or one == '∞' else 'mo'
    return ''.join(f'<{tag(one)}>{one.replace("<", "&lt;")}</{tag(one)}>' for one in text.split())


def box(tag: str, *parts: str, **attributes: str) -> str:
    said = ''.join(f' {name}="{value}"' for name, value in attributes.items())
    written = (part if part.startswith('<mt') else f'<mrow>{part if "<m" in part else tokens(part)}</mrow>' for part in parts)
    return f'<{tag}{said}>{"".join(written)}</{tag}>'


FORMULAS = {
    box('mfrac', '1', '2'): '1/2', box('mfrac', 'a + b', '2'): '(a + b)/2', box('mfrac', '1', '2 π'): '1/(2π)',
    box('mfrac', '− 1', '2'): '−1/2',
    box('mfrac', box('mfrac', '1', '2'), '3'): '(1/2)/3', box('mfrac', 'd', 'd x') + tokens('f'): 'd/dx f',
    box('mfrac', '∂ f', '∂ x'): '∂f/∂x',
    tokens('x') + box('mfrac', '1', '2'): 'x 1/2', tokens('3') + box('mfrac', '1', '2'): '3 1/2',
    box('mfrac', 'n', 'k', linethickness='0'): '(n choose k)',
    tokens('(') + box('mfrac', 'n', 'k', linethickness='0pt') + tokens(')'): '(n choose k)',
    tokens('E = m') + box('msup', 'c', '2'): 'E = mc^2', tokens('3 ×') + box('msup', '10', '− 5'): '3 × 10^−5',
    box('msup', 'x', '2 n'): 'x^(2n)',
    box('msup', '( a + b )', '2'): '(a + b)^2', box('msup', 'a b', '2'): '(ab)^2', box('msup', box('msup', 'x', '2'), '3'): '(x^2)^3',
    box('msup', 'Ca', '2 +'): 'Ca^2+', box('msup', 'f', '′') + tokens('( x )'): 'f′(x)',
    tokens('20') + box('msup', '', '∘') + tokens('C'): '20°C',
    box('msub', 'x', 'i'): 'x_i', box('msub', 'x', 'i , j'): 'x_(i, j)', box('msub', 'H', '2') + tokens('O'): 'H2O',
    box('msub', '10', '2'): '10_2',
    box('msub', 'T', 'max'): 'T_max', box('msub', 'log', '2') + tokens('n'): 'log2 n',
    box('msubsup', 'x', 'i', '2') + tokens('y'): 'x_i^2 y',
    box('munderover', '∑', 'i = 1', 'n') + box('msub', 'x', 'i'): '∑_(i = 1)^n x_i',
    box('munder', 'lim', 'x → 0') + tokens('f'): 'lim_(x → 0) f',
    box('munderover', '∫', '0', '∞') + tokens('f ( x ) d x'): '∫_0^∞ f(x)dx', box('mover', 'x', '¯') + tokens('y'): 'x̄y',
    box('mover', 'A B', '→'): 'vec(AB)', box('munder', box('munder', 'x', '⏟'), 'heat'): 'x_heat',
    tokens('a') + box('mover', '→', 'k') + tokens('b'): 'a →^k b',
    box('msqrt', 'x'): '√x', box('msqrt', 'x + 1'): '√(x + 1)', box('mroot', 'x', '3'): 'x^(1/3)',
    box('mroot', 'x + 1', '3'): '(x + 1)^(1/3)',
    box('mfrac', box('msqrt', 'D'), '2'): '√D/2', box('menclose', 'x', notation='radical'): '√x',
    box('mfenced', 'a', 'b'): '(a, b)', box('mfenced', '1', '2', separators=''): '(1 2)',
    box('mfenced', 'a', 'b', open='[', close=')', separators=';'): '[a; b)',
    tokens('[') + box('mtable',
                      *(box('mtr', *(box('mtd', one) for one in row.split())) for row in ('1 0', '0 2'))) + tokens(']'): '[1, 0; 0, 2]',
    box('mtable', box('mtr', box('mtd', 'a'), box('mtd', '='), box('mtd', 'b')),
        box('mtr', box('mtd', ''), box('mtd', '= c'))): 'a = b; = c',
    '<mmultiscripts>' + tokens('C') + '<mprescripts/>' + tokens('6 14') + '</mmultiscripts>': '_6^14C',
    '<mmultiscripts>' + tokens('x 1') + '<none/></mmultiscripts>': 'x1',
    tokens('5') + '<mtext>km</mtext>': '5 km', tokens('f = 1') + '<mtext> if </mtext>' + tokens('x > 0'): 'f = 1 if x > 0',
    tokens('sin x'): 'sin x',
    tokens('2 \u2062 x'): '2 x', tokens('sin \u2061 ( x )'): 'sin(x)', tokens('l o g'): 'log', tokens('1 2'): '1 2',
    tokens('p < 0.05'): 'p < 0.05',
    tokens('x ='): 'x =', tokens('x = − 1'): 'x = −1', tokens('a − b'): 'a − b', tokens('f ( x , y )'): 'f(x, y)', tokens('| x |'): '|x|',
    '<mtext>скорость</mtext>' + tokens('=') + '<mfrac><mtext>путь</mtext><mtext>время</mtext></mfrac>': 'скорость = путь/время',
    tokens('x') + '<mphantom><mi>y</mi></mphantom><mspace/>': 'x', '<ms>a</ms>': '"a"', 'x': 'x', '<mrow>x<mo>=</mo>2</mrow>': 'x=2',
    '<maction>' + tokens('x y') + '</maction>': 'x', '<apply><eq/><ci>x</ci><cn>1</cn></apply>': 'eq(x, 1)',
    f'<semantics>{tokens("x")}<annotation encoding="application/x-tex">x^{{2}}</annotation></semantics>': '$x^{2}$',
    f'<semantics>{tokens("x")}<annotation-xml encoding="MathML-Content"><ci>y</ci></annotation-xml></semantics>': 'x',
    '<semantics><apply><eq/><ci>x</ci></apply><annotation-xml encoding="MathML-Presentation"><mi>x</mi></annotation-xml></semantics>': 'x',
    f'<semantics>{tokens("x")}<annotation encoding="StarMath 5.0">y</annotation></semantics>': 'x'}


@pytest.mark.parametrize('markup', FORMULAS)
def test_formula_on_one_line(markup):
    assert as_formula(markup) == FORMULAS[markup]


@pytest.mark.parametrize('markup', FORMULAS)
def test_cleaning_leaves_formulas_alone(markup):
    text = f'We see that {FORMULAS[markup]} is what it is, and {FORMULAS[markup]} again.'
    assert _apply_rules(text)[0] == text


PRESENTATION = ('mfrac msup msub munder mover').split()
formulas = st.recursive(st.sampled_from(['<mn>1</mn>', '<mn>23</mn>', '<mi>sin</mi>', '<mtext>rate</mtext>']), lambda inner: st.one_of(
    st.tuples(st.sampled_from(PRESENTATION), inner, inner).map(lambda made: f'<{made[0]}>{made[1]}{made[2]}</{made[0]}>'),
    st.tuples(inner, inner).map(lambda made: f'<mrow>{made[0]}{made[1]}</mrow>'), inner.map(lambda made: f'<msqrt>{made}</msqrt>')),
    max_leaves=8)


@given(formulas)
@settings(max_examples=150, deadline=None)
def test_no_number_or_word_of_a_formula_is_glued_to_another(markup):
    found = re.findall(r'\d+|[a-z]+', as_formula(markup))
    assert sorted(found) == sorted(etree.fromstring(f'<math>{markup}</math>').itertext())


anything = st.recursive(st.sampled_from(['', 'x', '<mi>x</mi>', '<mo>=</mo>', '<mo/>', '<none/>', '<mprescripts/>']),
                        lambda inner: st.tuples(
    st.sampled_from(sorted(layouts) + ['mrow', 'mtr', 'mtd', 'mlabeledtr', 'mstyle']), st.lists(inner, max_size=4)).map(
        lambda made: f'<{made[0]}>{"".join(made[1])}</{made[0]}>'), max_leaves=10)


@given(anything)
@settings(max_examples=200, deadline=None)
def test_formula_that_is_none_is_read_all_the_same(markup):
    found = as_formula(markup)
    assert found == ' '.join(found.split()) and '<' not in found


def test_formula_that_is_nested_deeply_takes_no_longer_than_it_is_long():
    assert as_formula('<mfrac><mn>1</mn>'*60 + '<mn>2</mn>' + '</mfrac>'*60).count('1/') == 60


@pytest.mark.parametrize(('markup', 'wanted'), [
    ('<mml:math><mml:mfrac><mml:mn>1</mml:mn><mml:mn>2</mml:mn></mml:mfrac></mml:math> of it', '1/2 of it'),
    ('<inline-formula><mml:math><mml:mi>x</mml:mi></mml:math></inline-formula>-axis', 'x-axis'),
    ('<inline-formula><alternatives><mml:math><mml:mi>x</mml:mi></mml:math><tex-math>$y$</tex-math><graphic/></alternatives>'
     '</inline-formula>', '$y$'),
    ('<inline-formula><tex-math>x^{2}</tex-math><mml:math><mml:mi>x</mml:mi></mml:math></inline-formula>', '$x^{2}$'),
    ('<tex-math>\\documentclass{minimal}\\begin{document}$$\\alpha$$\\end{document}</tex-math>', '$$\\alpha$$'),
    ('CO<mml:math><mml:msub><mml:mrow/><mml:mn>2</mml:mn></mml:msub></mml:math>', 'CO2'),
    ('5<mml:msup><mml:mi>x</mml:mi><mml:mn>2</mml:mn></mml:msup>', '5x^2')])
def test_formula_within_text_stands_there_once(markup, wanted):
    assert as_prose(markup) == wanted
    assert fields_of(pubmed(markup))[0]['text'] == wanted == fields_of(jats(markup))[0]['text']


# --- forms of records -------------------------------------------------------------------------------------------------------------

EXAMPLES = {
    'JATS': ('О теплоте', 'При 10^5 К теплота течёт.', [dict(title='Метод', text='Ждём.')], '10.1/heat'),
    'PubMed': ('On heat.', 'AIM: To heat H2O.\n\nRESULTS: It boils.', [], '7'),
    'TEI (GROBID)': ('On heat', 'Heat flows.', [dict(title='Method', text='We wait.')], '10.1/heat'),
    'eLibrary (РИНЦ)': ('О теплоте', 'Теплота течёт.', [dict(title='', text='Мы ждём.')], '10.1/heat'),
    'EndNote XML': ('Heat at 10^5 K', 'Heat flows.', [], '10.1/heat'), 'Zotero RDF': ('On heat', 'Heat flows.', [], 'DOI 10.1/heat'),
    'DOAJ XML': ('О теплоте', 'Теплота течёт.', [], '10.1/heat'), 'Crossref XML': ('On heat', 'Heat flows.', [], '10.1/heat'),
    'DataCite XML': ('On heat', 'Heat flows.', [], '10.1/heat'), 'Europe PMC': ('On heat.', 'Heat flows.', [], '10.1/heat'),
    'Dublin Core': ('On heat', 'Heat flows.', [], '10.1/heat'), 'MODS': ('On heat', 'Heat flows.', [], '10.1/heat'),
    'OAI-PMH': ('On heat', 'Heat flows.', [], 'oai:1'), 'arXiv metadata': ('On heat', 'Heat flows.', [], '2401.00001'),
    'Atom, RSS': ('On heat', 'Heat flows.', [], 'http://arxiv.org/abs/2401.00001v1')}


@pytest.mark.parametrize('form', formats['xml'].forms, ids=lambda form: form.name)
def test_example_of_every_form_is_read(form):
    entry, = read_here(_read_xml, form.example)
    if form.name not in EXAMPLES: assert isinstance(entry, Refused) and 'no abstracts' in entry.reason and 'refused' in form.name; return
    assert (entry.fields['title'], entry.fields['text'], entry.fields.get('sections', []), entry.fields['id']) == EXAMPLES[form.name]
    assert form.title and form.text and bool(form.sections) >= bool(EXAMPLES[form.name][2]) and form.id
    assert formats['xml'].looks(form.example)


def test_examples_of_all_forms_in_one_file_are_counted_each():
    found = read_here(_read_xml, f"<all>{''.join(form.example for form in formats['xml'].forms)}</all>")
    assert [entry.line for entry in found] == [*range(1, len(articles) + 1)]
    assert sum(isinstance(entry, Row) for entry in found) == len(EXAMPLES) == len(articles) - 1


def medline(title: str, language: str, rest: str, abstract: str = '<Abstract><AbstractText>Heat flows.</AbstractText></Abstract>') -> str:
    return (f'<PubmedArticleSet><PubmedArticle><MedlineCitation><PMID>1</PMID><Article><ArticleTitle>{title}</ArticleTitle>{abstract}'
            f'<Language>{language}</Language>{rest}</Article></MedlineCitation></PubmedArticle></PubmedArticleSet>')


def other(text: str, language: str, kind: str = 'Publisher') -> str:
    return f'<OtherAbstract Type="{kind}" Language="{language}"><AbstractText>{text}</AbstractText></OtherAbstract>'


VERNACULAR = '<VernacularTitle>О теплоте.</VernacularTitle>'


@pytest.mark.parametrize(('data', 'title', 'text'), [
    (medline('On heat.', 'eng', other('Теплота течёт.', 'rus')), 'On heat.', 'Heat flows.'),
    (medline('[On heat].', 'rus', VERNACULAR + other('Теплота течёт.', 'rus')), 'О теплоте.', 'Теплота течёт.'),
    (medline('On heat.', 'eng', other('Simple words.', 'eng', 'plain-language-summary')), 'On heat.', 'Heat flows.'),
    (medline('[Not Available].', 'rus', VERNACULAR + other('Просто.', 'rus', 'plain-language-summary')), 'О теплоте.', 'Heat flows.'),
    (medline('On heat.', 'eng', other('El calor.', 'spa'), ''), 'On heat.', 'El calor.'),
    (medline('', 'rus', VERNACULAR), 'О теплоте.', 'Heat flows.'),
    (medline('[18F]FDG uptake.', 'eng', VERNACULAR), '[18F]FDG uptake.', 'Heat flows.'),
    (medline('[Not Available].', 'rus', ''), '', 'Heat flows.'),
    (medline('On heat.', 'eng', '', '<Abstract><AbstractText Label="UNLABELLED">Heat.</AbstractText></Abstract>'), 'On heat.', 'Heat.'),
    ('<PubmedArticleSet><PubmedBookArticle><BookDocument><PMID>1</PMID><Book><BookTitle>On heat</BookTitle></Book><Language>eng</Language>'
     '<Abstract><AbstractText>Heat flows.</AbstractText><CopyrightInformation>(c)</CopyrightInformation></Abstract></BookDocument>'
     '</PubmedBookArticle></PubmedArticleSet>', 'On heat', 'Heat flows.'),
    ('<ArticleSet><Article><ArticleTitle>On heat</ArticleTitle><Abstract>Heat flows.</Abstract></Article></ArticleSet>', 'On heat',
     'Heat flows.')])
def test_pubmed_takes_the_abstract_and_title_of_the_record(data, title, text):
    found, = fields_of(data)
    assert (found['title'], found['text']) == (title, text)


def abstracts(language: str, *found: tuple[str, str, str], body: str = '') -> str:
    texts = ''.join(f'<{tag} {said}><p>{text}</p></{tag.split()[0]}>' for tag, said, text in found)
    return (f'<article xml:lang="{language}"><front><article-meta><title-group><article-title>О теплоте</article-title>'
            '<trans-title-group xml:lang="en"><trans-title>On heat</trans-title></trans-title-group></title-group>'
            f'{texts}<kwd-group xml:lang="ru"><kwd>теплота</kwd></kwd-group><kwd-group xml:lang="en"><kwd>heat</kwd>'
            f'</kwd-group></article-meta></front>{body}</article>')


RU, EN, AS_RU, AS_EN = 'Теплота течёт.', 'Heat flows.', 'xml:lang="ru"', 'xml:lang="en"'


@pytest.mark.parametrize(('data', 'title', 'text', 'lang', 'keyword'), [
    (abstracts('ru', ('abstract', AS_EN, EN), ('trans-abstract', AS_RU, RU)), 'О теплоте', RU, 'ru', 'теплота'),
    (abstracts('ru', ('abstract', '', RU), ('trans-abstract', AS_EN, EN)), 'О теплоте', RU, 'ru', 'теплота'),
    (abstracts('ru', ('abstract', AS_EN, EN)), 'On heat', EN, 'en', 'heat'),
    (abstracts('ru', ('trans-abstract', AS_EN, EN)), 'On heat', EN, 'en', 'heat'),
    (abstracts('ru', ('abstract', AS_EN, EN), body='<body><p>Тело.</p></body>'), 'О теплоте', EN, 'ru', 'теплота'),
    (abstracts('ru', ('abstract', 'abstract-type="teaser"', 'Читайте!'), ('abstract', '', RU)), 'О теплоте', RU, 'ru', 'теплота'),
    (abstracts('ru', ('abstract', AS_EN, EN), ('abstract', AS_RU, RU)), 'О теплоте', RU, 'ru', 'теплота'),
    (abstracts('ru', ('abstract', 'abstract-type="graphical"', 'Рис.'), ('trans-abstract', AS_EN, EN)), 'On heat', EN, 'en', 'heat')])
def test_jats_is_read_in_one_language(data, title, text, lang, keyword):
    found, = fields_of(data)
    assert (found['title'], found['text'], found['lang'], found['keywords']) == (title, text, lang, [keyword])


def test_articles_within_an_article_are_records_of_their_own_and_letters_about_it_are_none():
    stub = '<front-stub><title-group><article-title>{}</article-title></title-group><abstract><p>{}</p></abstract></front-stub>'
    data = jats('Heat flows.').replace('</article>', f'<body><p>Body.</p></body><sub-article article-type="translation" xml:lang="ru">'
                                       f'{stub.format("О теплоте", RU)}<body><p>Тело.</p></body></sub-article><sub-article '
                                       f'article-type="reviewer-report">{stub.format("Review", "Good.")}</sub-article></article>')
    first, second, third = read_here(_read_xml, f'<set>{data}</set>')
    assert first.fields['title'] == 'On heat' and document(first.fields) == 'On heat\n\nHeat flows.\n\nBody.'
    assert second.fields['lang'] == 'ru' and document(second.fields) == f'О теплоте\n\n{RU}\n\nТело.'
    assert isinstance(third, Refused) and 'reviewer-report' in third.reason and third.line == 3


def harvest(*metadata: str, status: str = '') -> str:
    records = ''.join(f'<record><header{status}><identifier>oai:{n}</identifier></header>'
                      f'{inner and f"<metadata>{inner}</metadata>"}</record>' for n, inner in enumerate(metadata, 1))
    return f'<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/"><ListRecords>{records}<resumptionToken>x</resumptionToken></ListRecords></OAI-PMH>'


DC = ('<oai_dc:dc xmlns:oai_dc="http://www.openarchives.org/OAI/2.0/oai_dc/" xmlns:dc="http://purl.org/dc/elements/1.1/">'
      '<dc:title xml:lang="en-US">On heat</dc:title><dc:title xml:lang="ru-RU">О теплоте</dc:title>'
      '<dc:description xml:lang="en-US">Heat flows.</dc:description><dc:description '
      'xml:lang="ru-RU">Теплота течёт.</dc:description><dc:language>{}</dc:language></oai_dc:dc>')


@pytest.mark.parametrize(('data', 'wanted'), [
    (harvest(jats('Heat flows.').replace('<article ', '<article xmlns="https://jats.nlm.nih.gov" ')), ['On heat']),
    (harvest(DC.format('rus'), DC.format('eng'), DC.format('en-US')), ['О теплоте', 'On heat', 'On heat']),
    (harvest(articles['arxiv'].form.example), ['On heat']),
    (harvest('', status=' status="deleted"'), ['deleted by its repository; leave it out']),
    (harvest('<marc><leader/></marc>'), ['a harvested record that cannot be read: its metadata is <marc>; harvest it as oai_dc']),
    ('<searchRetrieveResponse><record><recordData>' + articles['mods'].form.example + '</recordData></record></searchRetrieveResponse>',
     ['On heat']),
    ('<dblp><article key="a"><title>A.</title><year>1</year></article>'
     '<inproceedings key="b"><title>B.</title><year>1</year></inproceedings></dblp>',
     ['DBLP has titles but no abstracts, so there is no text to learn; get the abstracts elsewhere, such as OpenAlex']*2),
    ('<feed><entry><id>http://arxiv.org/api/errors#x</id><title>Error</title><summary>incorrect id</summary></entry></feed>',
     ['arXiv answers with an error: incorrect id; mend the query']),
    ('<article xmlns="http://docbook.org/ns/docbook"><title>On heat</title><para>Heat</para></article>',
     ['<article> holds <title>, <para>, which is no form of record that is read; convert it to JATS']),
    ('<kml><place/></kml>', ['XML of <kml>, none of the forms that are read (JATS, PubMed, TEI, OAI-PMH, Atom …); convert it to JATS']),
    ('<set>' + articles['pubmed'].form.example + '<record><x/></record>' + articles['jats'].form.example + '</set>',
     ['On heat.', '<record> holds <x>, which is no form of record that is read; convert it to JATS', 'О теплоте'])])
def test_every_record_is_a_row_or_refused_with_the_true_reason(data, wanted):
    assert outcome(data) == wanted


@pytest.mark.parametrize(('data', 'wanted'), [
    ('<rss><channel><title>News</title><item><title>On heat</title>'
     '<description>arXiv:2401.00001v1 Announce Type: new \nAbstract: Heat flows.</description>'
     '<guid>oai:1</guid><category>math.AP</category></item></channel></rss>',
     dict(id='oai:1', title='On heat', text='Heat flows.', topics=['math.AP'])),
    ('<rdf:RDF xmlns:rdf="r" xmlns="http://purl.org/rss/1.0/" xmlns:dc="d"><item><title>On heat</title>'
     '<link>x</link><description>Heat flows.</description>'
     '<dc:subject>heat</dc:subject></item></rdf:RDF>', dict(id='x', title='On heat', text='Heat flows.', topics=['heat'])),
    ('<feed><entry><id>x</id><title>On heat</title><summary>Heat.</summary><content>Heat flows.</content></entry></feed>',
     dict(id='x', title='On heat', text='Heat flows.', topics=[])),
    ('<resultList><result><id>7</id><title>On heat.</title></result></resultList>', dict(id='7', title='On heat.', text='', topics=[]))])
def test_feeds_and_lists_of_results(data, wanted):
    found, = fields_of(data)
    assert {name: found[name] for name in wanted} == wanted


def test_identifier_of_a_reference_is_not_that_of_the_paper():
    reference = '<text><back><listBibl><biblStruct><idno type="DOI">10.9/other</idno></biblStruct></listBibl></back></text>'
    assert fields_of(tei('Heat flows.').replace('</TEI>', f'{reference}</TEI>'))[0]['id'] == ''


@pytest.mark.parametrize(('data', 'rows', 'reason'), [
    ('<set>' + jats('a <x:sup>b</x:sup> <x:math><x:mfrac><x:mn>1</x:mn><x:mn>2</x:mn></x:mfrac></x:math>') + '</set>', ['a ^b 1/2'], ''),
    ('<set>' + jats('a <x:b>b</x:b>') + '<article>', ['a b'], 'broken XML after record 1')])
def test_prefix_that_was_never_declared_costs_nothing_but_hides_no_damage(data, rows, reason):
    found = read_here(_read_xml, data)
    assert [entry.fields['text'] for entry in found if isinstance(entry, Row)] == rows
    assert [entry.reason.startswith(reason) for entry in found if isinstance(entry, Refused)] == [True]*bool(reason)


def elibrary(*found: tuple[str, str], body: str = '', said: str = '') -> str:
    titles = '<artTitle lang="RUS">О теплоте</artTitle><artTitle lang="ENG">On heat</artTitle>'
    texts = ''.join(f'<abstract lang="{lang}">{text}</abstract>' for lang, text in found)
    return (f'<journal><issue><articles><article>{said}<artTitles>{titles}</artTitles><abstracts>{texts}</abstracts>{body}<codes>'
            '<edn>ABC</edn></codes></article></articles></issue></journal>')


@pytest.mark.parametrize(('data', 'title', 'text', 'sections'), [
    (elibrary(('RUS', RU), ('ENG', EN)), 'О теплоте', RU, []), (elibrary(('ENG', EN), ('RUS', RU)), 'On heat', EN, []),
    (elibrary(('ENG', EN), ('RUS', RU), said='<langPubl>RUS</langPubl>'), 'О теплоте', RU, []),
    (elibrary(('ENG', EN)), 'On heat', EN, []),
    (elibrary(('ENG', 'CO<sub>2</sub> flows.')), 'On heat', 'CO2 flows.', []), (elibrary(), 'О теплоте', '', []),
    (elibrary(('ENG', EN), body='<text lang="RUS">Мы<br/>ждём.</text>'), 'О теплоте', EN, [dict(title='', text='Мы\n\nждём.')])])
def test_the_russian_index_is_read_in_the_language_of_the_article(data, title, text, sections):
    found, = fields_of(data)
    assert (found['title'], found['text'], found['sections'], found['id']) == (title, text, sections, 'ABC')
