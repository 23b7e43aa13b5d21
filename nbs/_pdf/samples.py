"""Papers as PDFs whose text is known, in the layouts that papers have: what the tests, the corpus and the benchmark are measured on.

`make(name, seed)` sets one with Typst (`pip install typst`, an offline compiler); `layouts` has a function for each layout. Everything
is invented, and a function of (name, seed).
"""
import random
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

NOUNS = '''thermal conductivity|the temperature gradient|a diffusive boundary layer|the measured efficiency|an experimental configuration|
the characteristic frequency|a three-dimensional simulation|the approximation error|this computational framework|the underlying mechanism|
a statistically significant difference|the crystalline structure|our optimization procedure|the magnetization|an electromagnetic field|
the reconstruction of the surface|a self-consistent solution|the state-of-the-art instrument|the equilibrium concentration|
a well-known classification|the office of standards|an affine transformation|the fluid flow|a first-order effect|the final coefficient'''
VERBS = '''determines|is considerably larger than|can be understood through|does not influence|was systematically compared with|increases|
depends on|is proportional to|substantially reduces|coincides with|is characterized by|qualitatively reproduces|was calibrated against|
efficiently approximates|confirms|differs from|is sufficiently described by|reflects'''
ENDS = '''in the presence of impurities|at room temperature|for every configuration|within the experimental uncertainty|as expected|
under controlled laboratory conditions|over several orders of magnitude|in agreement with independent observations|
when the approximation is justified|despite the considerable fluctuations|on average|after sufficiently many repetitions|
for infinitesimally small perturbations|without additional assumptions'''
OPENERS = '''However,|Moreover,|In contrast,|Consequently,|Interestingly,|It follows that|We find that|Here|Under these circumstances,|
Furthermore,|In particular,|As a consequence,|To illustrate this,|Previous investigations suggest that|Nevertheless,'''
RU_NOUNS = '''теплопроводность образца|температурный градиент|экспериментальная установка|погрешность измерения|предложенный алгоритм|
кристаллическая структура|электромагнитное поле|численное моделирование|статистическая значимость|пограничный слой|
коэффициент диффузии|характерная частота колебаний|высокотемпературная сверхпроводимость|методика исследования'''
RU_VERBS = '''определяет|существенно превышает|не влияет на|хорошо описывает|значительно уменьшает|подтверждает|качественно воспроизводит|
заметно увеличивает|непосредственно характеризует'''
RU_ENDS = '''при комнатной температуре|в пределах экспериментальной погрешности|для всех рассмотренных конфигураций|как и ожидалось|
при наличии примесей|в лабораторных условиях|без дополнительных предположений|на несколько порядков'''
RU_OPENERS = 'Однако|Кроме того,|Следовательно,|В частности,|Показано, что|Таким образом,|Заметим, что|В отличие от этого'
TITLES = ['Efficient approximation of thermal conductivity in disordered crystalline structures',
          'On the magnetization of thin films: a systematic comparison of experimental configurations',
          'Self-consistent simulation of diffusive boundary layers at large temperature gradients',
          'Why do first-order effects survive? Statistical evidence from independent observations',
          'Affine transformations and the reconstruction of surfaces', 'Fluctuations near equilibrium in electromagnetic fields']
RU_TITLES = ['Численное моделирование теплопроводности неупорядоченных кристаллических структур',
             'Экспериментальное исследование пограничного слоя при больших градиентах температуры',
             'О высокотемпературной сверхпроводимости тонких плёнок']
HEADS = ['Introduction', 'Related work', 'Experimental setup', 'Results and discussion', 'Limitations', 'Conclusion']
RU_HEADS = ['Введение', 'Методика исследования', 'Результаты и обсуждение', 'Заключение']
MATHS = [('$alpha_1 < beta$', 'α1 < β'), ('$x_i$', 'x_i'), ('$10^5$', '10^5'), ('$lambda$', 'λ'), ('$n = 42$', 'n = 42'),
         ('$E = m c^2$', 'E = mc^2'), ('$epsilon > 0$', 'ε > 0')]
DISPLAYS = ['$ integral_0^infinity f(x) dif x = sum_(k=1)^n (a_k + b_k)/c_k $', '$ partial u / (partial t) = kappa nabla^2 u + q(x, t) $']


@dataclass
class Truth:
    "What stands in a paper: the fields that are to be found, the text in its order, and what must not be in it."
    title: str
    abstract: str
    sections: list[tuple[str, list[str]]]
    keywords: list[str] = field(default_factory=list)
    id: str = ''
    absent: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        "Title, abstract and sections, as a language model is to read them."
        return '\n\n'.join([self.title, self.abstract, *(part for head, texts in self.sections for part in [head, *texts] if part)])


class Prose:
    "Sentences out of parts, by a random generator of their own."
    def __init__(self, seed: str, russian: bool = False):
        self.random, self.russian = random.Random(seed), russian
        parts = (RU_NOUNS, RU_VERBS, RU_ENDS, RU_OPENERS) if russian else (NOUNS, VERBS, ENDS, OPENERS)
        self.nouns, self.verbs, self.ends, self.openers = ([' '.join(one.split()) for one in part.split('|')] for part in parts)

    def sentence(self) -> str:
        "One sentence."
        pick = self.random.choice
        opener = pick(self.openers) + ' ' if self.random.random() < 0.5 else ''
        text = f'{opener}{pick(self.nouns)} {pick(self.verbs)} {pick(self.nouns)} {pick(self.ends)}.'
        return text[0].upper() + text[1:]

    def paragraph(self, sentences: int = 5) -> str:
        "A paragraph."
        return ' '.join(self.sentence() for _ in range(sentences))

    def with_maths(self, sentences: int = 4) -> tuple[str, str]:
        "(Typst, plain text) of a paragraph with inline formulas."
        typst, plain = [], []
        for _ in range(sentences):
            source, shown = self.random.choice(MATHS)
            text = self.sentence().rstrip('.')
            typst.append(f'{text}, where {source} holds.'); plain.append(f'{text}, where {shown} holds.')
        return ' '.join(typst), ' '.join(plain)


def _escape(text: str) -> str: return re.sub(r'([#$*_@<>\\`])', r'\\\1', text)


def _reference(prose: Prose, number: int) -> str:
    "An entry of a list of references."
    letters = [prose.random.choice('ABCDEFGHKLMNPRST') for _ in range(3)]
    return (f'{letters[0]}. Author{number} and {letters[1]}. Coauthor. {prose.random.choice(prose.nouns).capitalize()}. '
            f'Annals of Invented Studies, {number + 3}:{100 + number}–{110 + number}, {1990 + number}.')


def _references(prose: Prose, head: str, truth: Truth, count: int = 8) -> str:
    "A list of references, which is to be left out."
    entries = [_reference(prose, n) for n in range(1, count + 1)]
    truth.absent += [f'Author{n}' for n in (1, count)]
    listed = '\n\n'.join(f'[{n}] {_escape(entry)}' for n, entry in enumerate(entries, 1))
    return f'\n#heading(numbering: none)[{head}]\n#set text(size: 0.85em)\n#set par(first-line-indent: 0pt)\n{listed}\n'


def _body(prose: Prose, truth: Truth, heads: list[str], paragraphs: int = 3, maths: bool = False, display: bool = False,
          notes: bool = False, extra: dict[int, str] | None = None) -> str:
    "Sections of prose, noted in the truth as they are set."
    parts = []
    for place, head in enumerate(heads):
        parts.append(f'= {head}')
        texts = []
        for n in range(paragraphs):
            if maths and n % 2: typst, plain = prose.with_maths()
            else: plain = prose.paragraph(); typst = _escape(plain)
            if notes and n == 0:
                marked = f'Remark {place + 1}{n}: {prose.sentence()}'
                truth.absent.append(f'Remark {place + 1}{n}')
                cut = typst.index('. ') + 1
                typst = f'{typst[:cut]}#footnote[{_escape(marked)}]{typst[cut:]}'
            parts.append(typst); texts.append(plain)
            if display and n == 1: parts.append(prose.random.choice(DISPLAYS)); parts.append('')
        if extra and place in extra: parts.append(extra[place])
        truth.sections.append((head, texts))
    return '\n\n'.join(parts)


def _truth(prose: Prose, seed: int, sentences: int = 5, keywords: bool = False) -> Truth:
    "The beginnings of a paper: a title, an abstract, and keywords if wished."
    titles = RU_TITLES if prose.russian else TITLES
    words = (['теплопроводность', 'моделирование', 'кристаллы'] if prose.russian else
             ['thermal conductivity', 'magnetization', 'simulation']) if keywords else []
    return Truth(titles[seed % len(titles)], prose.paragraph(sentences), [], words)


AUTHORS = 'Ada Invented, Boris Imagined and Carla Fictitious'
PLACE = 'Department of Invented Studies, University of Nowhere'


def conference(seed: int) -> tuple[str, Truth]:
    "Two columns below a title across both, abstract in the first column, running heads, footnotes, hyphenation."
    prose = Prose(f'conference {seed}')
    truth = _truth(prose, seed)
    truth.absent += ['Proceedings of the Invented', 'Ada Invented', 'University of Nowhere']
    body = _body(prose, truth, HEADS, notes=True)
    return f'''
#set page(paper: "a4", columns: 2, margin: (x: 2cm, y: 2.3cm), numbering: "1",
  header: align(center, text(8pt)[Proceedings of the Invented Conference, pages 1–6]))
#set columns(gutter: {(16, 18, 24)[seed % 3]}pt)
#set text(font: "{("Libertinus Serif", "New Computer Modern")[seed % 2]}", size: 10pt, lang: "en")
#set par(justify: true, first-line-indent: 1em, spacing: 0.65em)
#set heading(numbering: "1")
#place(top + center, float: true, scope: "parent", clearance: 2em)[#text(16pt, weight: "bold")[{truth.title}]

{AUTHORS} \\ _{PLACE}_ \\ `ada@nowhere.example`]
#align(center)[*Abstract*]
#pad(x: 1em)[{truth.abstract}]
{body}
#heading(numbering: none)[Acknowledgements]
We thank nobody in particular for the imaginary funding.
{_references(prose, "References", truth)}''', truth


def across(seed: int) -> tuple[str, Truth]:
    "Two columns with the abstract across both, a figure and a table, one of them across both, captions."
    prose = Prose(f'across {seed}')
    truth = _truth(prose, seed, 6, keywords=True)
    truth.absent += ['Figure 1', 'Table 1', 'axis label', 'Gamma variant', 'shows the imaginary']
    wide = '''#place(top + center, float: true, scope: "parent")[#figure(
caption: [This picture shows the imaginary outcome of all experiments.],
rect(width: 100%, height: 4cm)[#place(bottom + center)[axis label in seconds]
#place(left + horizon)[#rotate(-90deg)[axis label in watts]]
#place(center + horizon)[legend of curves]])]'''
    table = '''#figure(caption: [All values of the imaginary table.], table(columns: 4, [Method], [Error], [Time], [Size],
[Alpha variant], [0.12], [3.4], [12], [Beta variant], [0.34], [5.6], [34], [Gamma variant], [0.56], [7.8], [56]))'''
    body = _body(prose, truth, HEADS, extra={1: wide, 2: table})
    return f'''
#set page(paper: "us-letter", columns: 2, margin: (x: 1.8cm, y: 2cm), numbering: "1")
#set columns(gutter: 14pt)
#set text(font: "Libertinus Serif", size: 9.5pt, lang: "en")
#set par(justify: true, first-line-indent: 1em, spacing: 0.65em)
#set heading(numbering: "1")
#place(top + center, float: true, scope: "parent", clearance: 1.5em)[#set par(first-line-indent: 0pt)
#text(18pt, weight: "bold")[{truth.title}]

{AUTHORS} \\ {PLACE}

#align(left)[#heading(numbering: none, outlined: false, level: 3)[ABSTRACT] {truth.abstract}

*Keywords:* {", ".join(truth.keywords)}]]
{body}
{_references(prose, "REFERENCES", truth)}''', truth


def preprint(seed: int) -> tuple[str, Truth]:
    "One column with a stamp at the side."
    prose = Prose(f'preprint {seed}')
    truth = _truth(prose, seed)
    truth.id = f'2401.0{1000 + seed}'
    truth.absent += ['Jan 2024', 'Preprint. Under review', 'Ada Invented']
    body = _body(prose, truth, HEADS, maths=True, display=True)
    return f'''
#set page(paper: "us-letter", margin: (x: 1.5in, y: 1in), numbering: "1", footer: context [#if counter(page).get().first() == 1 [
  #text(9pt)[Preprint. Under review.]] else [#align(center, counter(page).display())]], background: context if
  counter(page).get().first() == 1 {{ place(left + horizon, dx: -3.4cm, rotate(-90deg, reflow: false,
    text(20pt, fill: gray)[arXiv:{truth.id}v2  [cs.CL]  3 Jan 2024])) }})
#set text(font: "New Computer Modern", size: 10pt, lang: "en")
#set par(justify: true, spacing: 1em)
#set heading(numbering: "1")
#align(center)[#line(length: 100%) #text(17pt, weight: "bold")[{truth.title}] #line(length: 100%)

*{AUTHORS}* \\ {PLACE} \\ `ada@nowhere.example`

#text(12pt, weight: "bold")[Abstract]]
#pad(x: 1.2cm)[{truth.abstract}]
{body}
{_references(prose, "References", truth)}
#pagebreak()
#counter(heading).update(0)
#set heading(numbering: "A")
= Tables of all results
#table(columns: 5, ..range(100).map(n => [value #n]))''', _note(truth, 'value 7')


def _note(truth: Truth, *absent: str) -> Truth:
    "The truth with more that must not be in the text."
    truth.absent += absent
    return truth


def _starred(authors: str) -> str: return authors.replace(' and', '#super[\\*] and')


def journal(seed: int) -> tuple[str, Truth]:
    "A journal's name in large type above the title, a DOI, an abstract without a heading, received-dates, two columns."
    prose = Prose(f'journal {seed}')
    truth = _truth(prose, seed)
    truth.id = f'10.5555/jis.2024.{seed + 100}'
    truth.absent += ['Journal of Invented', 'Received', 'Ada Invented', 'Corresponding author', '© 2024']
    heads = HEADS[:4]
    body = _body(prose, truth, heads)
    return f'''
#set page(paper: "a4", columns: 2, margin: (x: 1.9cm, top: 2.4cm, bottom: 2.2cm), header: context if counter(page).get().first() > 1 [
  #text(8pt)[#emph[A. Invented et al. / Journal of Invented Studies 12 (2024) 101–1{10 + seed % 80}] #h(1fr) #counter(page).display()]])
#set columns(gutter: 18pt)
#set text(font: "Libertinus Serif", size: 10pt, lang: "en")
#set par(justify: true, first-line-indent: 1em, spacing: 0.65em)
#set heading(numbering: "1.")
#place(top + center, float: true, scope: "parent", clearance: 2em)[#set par(first-line-indent: 0pt)
#text(19pt)[Journal of Invented Studies] \\ #text(8pt)[Volume 12 (2024) 101–110, https://doi.org/{truth.id}]
#v(1em)
#text(17pt)[{truth.title}]

{_starred(AUTHORS)}

#text(9pt, style: "italic")[{PLACE}]

#text(8pt)[Received 3 March 2024; accepted 5 May 2024; © 2024 The Invented Press. All rights reserved.]

#pad(x: 1cm, align(left, text(9pt)[{truth.abstract}]))]
#show heading: set text(10pt)
#place(bottom, float: true)[#line(length: 3cm) #text(8pt)[#super[\\*]Corresponding author: ada\\@nowhere.example]]
{body}
{_references(prose, "References", truth)}''', truth


def article_info(seed: int) -> tuple[str, Truth]:
    "A side bar with article info and keywords beside the abstract, as a large publisher sets it; two columns below."
    prose = Prose(f'info {seed}')
    truth = _truth(prose, seed, 6, keywords=True)
    truth.id = f'10.5555/info.{seed + 1000}'
    truth.absent += ['Article history', 'Available online', 'Ada Invented', 'Contents lists']
    body = _body(prose, truth, HEADS[:5])
    return f'''
#set page(paper: "a4", columns: 2, margin: (x: 1.6cm, y: 2.2cm), numbering: "1")
#set columns(gutter: 20pt)
#set text(font: "Libertinus Serif", size: 9pt, lang: "en")
#set par(justify: true, first-line-indent: 1.2em, spacing: 0.6em)
#set heading(numbering: "1.")
#show heading: set text(9pt)
#place(top + center, float: true, scope: "parent", clearance: 2em)[#set par(first-line-indent: 0pt)
#text(8pt)[Contents lists available at an invented place]

#text(16pt)[{truth.title}]

{AUTHORS} \\ #text(8pt, style: "italic")[{PLACE}]
#line(length: 100%)
#align(left, grid(columns: (4.6cm, 1fr), gutter: 1.2cm, text(8pt, hyphenate: false)[ARTICLE INFO

_Article history:_ \\ Received 3 March 2024 \\ Available online 5 May 2024

_Keywords:_ \\ {" #linebreak() ".join(word.capitalize() for word in truth.keywords)}], [ABSTRACT
#v(0.4em)
{truth.abstract}]))
#line(length: 100%)]
#place(bottom, float: true)[#text(7pt)[https://doi.org/{truth.id} \\ Received 3 March 2024; © 2024 Published by Invented Ltd.]]
{body}
{_references(prose, "References", truth)}''', truth


def russian(seed: int) -> tuple[str, Truth]:
    "A Russian paper: УДК, title, abstract, key words, list of literature."
    prose = Prose(f'russian {seed}', russian=True)
    truth = _truth(prose, seed, keywords=True)
    truth.absent += ['УДК', 'Вымышленный', 'Вестник', 'Author1']
    truth.absent.remove('Author1')
    body = _body(prose, truth, RU_HEADS, paragraphs=4)
    return f'''
#set page(paper: "a4", margin: (x: 2.5cm, y: 2.5cm), header: align(center, text(9pt)[_Вестник вымышленных наук. 2024. № 3_]),
  footer: context align(center, counter(page).display()))
#set text(font: "Libertinus Serif", size: 11pt, lang: "ru")
#set par(justify: true, first-line-indent: (amount: 1.2em, all: true), spacing: 0.65em)
#set heading(numbering: "1.")
#show heading: set text(11pt)
#par(first-line-indent: 0pt)[УДК 536.24]
#align(center)[#text(14pt, weight: "bold")[{truth.title}]

А. Б. Вымышленный, В. Г. Воображаемая \\ _Университет вымышленных наук_]
#text(10pt)[*Аннотация.* {truth.abstract}

*Ключевые слова:* {", ".join(truth.keywords)}.]
{body}
{_references(prose, "Список литературы", truth)}''', truth


def mathematics(seed: int) -> tuple[str, Truth]:
    "One column with theorems, many formulas, and an abstract that begins with its name."
    prose = Prose(f'mathematics {seed}')
    truth = _truth(prose, seed)
    parts = []
    for number, head in enumerate(HEADS[:4], 1):
        texts = []
        parts.append(f'= {head}')
        for kind in ('Theorem', 'Proof'):
            typst, plain = prose.with_maths(3)
            mark, end = (f'{kind} {number}.', '') if kind == 'Theorem' else (f'{kind}.', '')
            parts += [f'*{mark}* _{typst}_' if kind == 'Theorem' else f'_{mark}_ {typst}{end}',
                      prose.random.choice(DISPLAYS), '']
            texts.append(f'{mark} {plain}')
            typst, plain = prose.with_maths(5)
            parts.append(typst); texts.append(plain)
        truth.sections.append((head, texts))
    truth.absent += ['MSC', 'Ada Invented']
    return f'''
#set page(paper: "a4", margin: (x: 3.2cm, y: 3cm), header: context align(center, text(8pt, if
  calc.even(counter(page).get().first()) [ADA INVENTED] else [AFFINE TRANSFORMATIONS])),
  footer: context align(center, text(8pt, counter(page).display())))
#set text(font: "New Computer Modern", size: 10pt, lang: "en")
#set par(justify: true, first-line-indent: 1.2em, spacing: 0.65em)
#set heading(numbering: "1.")
#set math.equation(numbering: "(1)")
#show heading: set text(11pt)
#align(center)[#text(14pt, weight: "bold")[{truth.title}]

#smallcaps[Ada Invented]]
#pad(x: 1cm)[#text(9pt)[#smallcaps[Abstract.] {truth.abstract}]]
{chr(10).join(part + chr(10) for part in parts)}
{_references(prose, "References", truth)}''', _note(truth)


def manuscript(seed: int) -> tuple[str, Truth]:
    "A manuscript as it is submitted: wide lines with numbers at the side, 'Preprint submitted to'."
    prose = Prose(f'manuscript {seed}')
    truth = _truth(prose, seed, keywords=True)
    truth.absent += ['Preprint submitted', 'Ada Invented']
    body = _body(prose, truth, HEADS[:4])
    return f'''
#set page(paper: "a4", margin: (x: 3cm, y: 3cm), footer: context [#if counter(page).get().first() == 1 [
  #text(9pt)[_Preprint submitted to Journal of Invented Studies_ #h(1fr) _May 5, 2024_]] else [#align(center, counter(page).display())]])
#set text(font: "New Computer Modern", size: 12pt, lang: "en")
#set par(justify: {("true", "false")[seed % 2]}, leading: 1.3em, first-line-indent: 1.2em, spacing: 1.3em)
#set heading(numbering: "1.")
#show heading: set text(12pt)
#align(center)[#text(17pt)[{truth.title}]

{AUTHORS} \\ _{PLACE}_]
#line(length: 100%)
#par(first-line-indent: 0pt)[*Abstract*]
#set par.line(numbering: "1")
{truth.abstract}

_Keywords:_ {", ".join(truth.keywords)}
#line(length: 100%)
{body}
{_references(prose, "References", truth)}''', truth


def letter(seed: int) -> tuple[str, Truth]:
    "A letter in two columns with an abstract across both, without any heading, and sections without numbers."
    prose = Prose(f'letter {seed}')
    truth = _truth(prose, seed)
    truth.absent += ['Ada Invented', 'Dated']
    heads = ['Introduction', 'Methods', 'Results']
    body = _body(prose, truth, heads, paragraphs=4, maths=True)
    return f'''
#set page(paper: "us-letter", columns: 2, margin: (x: 1.9cm, y: 2cm), numbering: "1")
#set columns(gutter: 16pt)
#set text(font: "New Computer Modern", size: 10pt, lang: "en")
#set par(justify: true, first-line-indent: 1em, spacing: 0.65em)
#show heading: it => align(center, text(10pt, weight: "bold", upper(it.body)))
#place(top + center, float: true, scope: "parent", clearance: 2em)[#set par(first-line-indent: 0pt)
#text(13pt, weight: "bold")[{truth.title}]

{AUTHORS} \\ #text(9pt, style: "italic")[{PLACE}] \\ #text(9pt)[(Dated: May 5, 2024)]

#pad(x: 1.6cm, align(left, text(9pt)[#h(1em){truth.abstract}]))]
{body}
{_references(prose, "References", truth)}''', _upper(truth)


def _upper(truth: Truth) -> Truth:
    "The truth with headings in capitals, as they are set."
    truth.sections = [(head.upper(), texts) for head, texts in truth.sections]
    return truth


def spaced(seed: int) -> tuple[str, Truth]:
    "Letters parted in title and headings, tight words, ligatures, margin notes at the side."
    prose = Prose(f'spaced {seed}')
    truth = _truth(prose, seed)
    truth.absent += ['Ada Invented', 'Margin remark']
    body = _body(prose, truth, HEADS[:5],
                 extra={1: '#place(right, dx: 3.6cm, block(width: 3cm, text(7pt)[Margin remark: an aside at the edge of the paper.]))'})
    return f'''
#set page(paper: "a4", margin: (left: 2.5cm, right: 4.6cm, y: 2.5cm), footer: context align(right, counter(page).display()))
#set text(font: "Libertinus Serif", size: 11pt, lang: "en", ligatures: true, spacing: 88%)
#set par(justify: true, first-line-indent: 1em, spacing: 0.65em)
#show heading: it => block(text(11pt, tracking: 0.12em, weight: "regular", upper(it.body)))
#align(center)[#text(17pt, tracking: 0.06em)[{truth.title}]

{AUTHORS}]
#par(first-line-indent: 0pt)[#text(tracking: 0.1em)[ABSTRACT]]

{truth.abstract}
{body}
{_references(prose, "References", truth)}''', _upper(truth)


def transactions(seed: int) -> tuple[str, Truth]:
    "Two narrow columns, a large title, authors side by side, abstract and index terms in bold, Roman numbers, slanted subheadings, a list."
    prose = Prose(f'transactions {seed}')
    truth, parts = _truth(prose, seed, 6, keywords=True), []
    truth.absent += ['Ada Invented', 'Manuscript received', 'TRANSACTIONS', 'Fictitious, Fellow']
    for place, head in enumerate(HEADS[:5]):
        texts = [prose.paragraph() for _ in range(2)]
        parts += [f'= {head}', *map(_escape, texts)]
        truth.sections.append((head, texts))
        for sub in ('Data collection', 'Statistical evaluation') if place in (1, 2) else ():
            texts = [prose.paragraph(4) for _ in range(2)]
            parts += [f'== {sub}', *map(_escape, texts)]
            truth.sections.append((sub, texts))
        if place == 3:
            items = [prose.sentence() for _ in range(3)]
            parts.append('\n'.join(f'+ {_escape(item)}' for item in items))
            truth.sections[-1][1].append(' '.join(f'{n}. {item}' for n, item in enumerate(items, 1)))
    body = '\n\n'.join(parts)
    return f'''
#set page(paper: "us-letter", columns: 2, margin: (x: 0.64in, y: 0.75in), header: context text(7pt)[
  TRANSACTIONS ON INVENTED STUDIES, VOL. 12, NO. 3, MAY 2024 #h(1fr) #counter(page).display()])
#set columns(gutter: 12pt)
#set text(font: "Libertinus Serif", size: 10pt, lang: "en")
#set par(justify: true, first-line-indent: 1em, spacing: 0.55em, leading: 0.55em)
#set heading(numbering: "I.A.")
#show heading.where(level: 1): it => align(center, text(10pt, weight: "regular")[
  #counter(heading).display("I.") #h(0.3em) #smallcaps(it.body)])
#show heading.where(level: 2): it => block(text(10pt, weight: "regular", style: "italic")[
  #numbering("A.", counter(heading).get().last()) #it.body])
#place(top + center, float: true, scope: "parent", clearance: 2em)[#set par(first-line-indent: 0pt)
#text(24pt)[{truth.title}]

#grid(columns: (1fr, 1fr, 1fr), [Ada Invented, \\ _Member_], [Boris Imagined \\ _University_], [Carla Fictitious, Fellow])]
#text(9pt, weight: "bold")[_Abstract_—{truth.abstract}]

#text(9pt, weight: "bold")[_Index Terms_—{", ".join(truth.keywords)}.]

#place(bottom, float: true)[#text(8pt)[Manuscript received 3 May 2024; revised 5 May 2024. This work was supported by nobody at all.
A. Invented is with the University of Nowhere (e-mail: ada\\@nowhere.example).]]
{body}
{_references(prose, "References", truth)}''', truth


def single(seed: int) -> tuple[str, Truth]:
    "One column of a large publisher: DOI in the head, dates, key words parted by dots, footnotes, formulas, declarations."
    prose = Prose(f'single {seed}')
    truth = _truth(prose, seed, 6, keywords=True)
    truth.id = f'10.5555/s00-{seed}'
    truth.absent += ['Ada Invented', 'Received', 'exclusive licence', 'Imagined']
    body = _body(prose, truth, HEADS, notes=True, maths=True, display=True)
    return f'''
#set page(paper: "a4", margin: (x: 3.8cm, y: 3.5cm), header: context if counter(page).get().first() > 1 [#text(8pt)[
  #if calc.even(counter(page).get().first()) [#counter(page).display() #h(1fr) A. Invented et al.] else [
  Efficient approximation #h(1fr) #counter(page).display()]]] else [#text(8pt)[
  Invented Studies Letters (2024) 12:345 \\ https://doi.org/{truth.id}]])
#set text(font: "New Computer Modern", size: 10pt, lang: "en")
#set par(justify: true, first-line-indent: 1em, spacing: 0.65em)
#set heading(numbering: "1")
#text(8pt)[*ORIGINAL RESEARCH*]

#text(16pt, weight: "bold")[{truth.title}]

*Ada Invented*#super[1] · *Boris Imagined*#super[1,2]

#text(8pt)[Received: 3 March 2024 / Accepted: 5 May 2024 \\ © The Authors, under exclusive licence to nobody, 2024]

*Abstract*

{truth.abstract}

*Keywords* {" · ".join(word.capitalize() for word in truth.keywords)}
{body}
#heading(numbering: none)[Declarations]
The authors declare that they are invented.
{_references(prose, "References", truth)}''', truth


layouts: dict[str, Callable[[int], tuple[str, Truth]]] = {
    f.__name__: f for f in (conference, across, preprint, journal, article_info, russian, mathematics, manuscript, letter, spaced,
                               transactions, single)}


@cache
def make(name: str, seed: int = 0) -> tuple[bytes, Truth]:
    "(PDF, truth) of a paper in the layout `name`."
    import typst
    source, truth = layouts[name](seed)
    return typst.compile(source.encode()), truth


def tokens(text: str) -> list[str]:
    "The words of a text as they are compared: compatible Unicode, no case, no punctuation."
    return re.findall(r'[^\W_]+', unicodedata.normalize('NFKC', text).casefold())


def score(found: str, truth: str) -> float:
    "1 - edits/words of the source, in words: the share of the source's words that stand in the right order, less what is added; 0 to 1."
    from rapidfuzz.distance import Levenshtein
    wanted = tokens(truth)
    return max(0.0, 1 - Levenshtein.distance(wanted, tokens(found))/len(wanted))
