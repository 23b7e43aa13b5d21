"""LaTeX of authors: macros written out, front matter of each class, files put in; and what the forms of documents are read from."""
import os
import time
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scilm_adapt.cleaning import _apply_rules
from scilm_adapt.documents import _latex_fields, _markdown_fields, _written_out, formats
from scilm_adapt.reading import Refused, Row, read_here
from scilm_adapt.sources import rows

# --- macros: source, and what is written out

MACROS = {
    r'\newcommand{\sys}{HeatNet}\sys is \sys{}, and \sys\ is \sys.': r'HeatNet is HeatNet, and HeatNet\ is HeatNet.',
    r'\newcommand\sys{HeatNet}\newcommand*{\Sys}{The \sys}\Sys flies': 'The HeatNet flies',
    r'\newcommand{\foo}[2][d]{#1-#2}\foo{x} \foo[y]{z} \foo ab': 'd-x y-z d-ab',
    r'\renewcommand{\vec}[1]{\mathbf{#1}}$\vec{x}$, $\vec x$': r'$\mathbf{x}$, $\mathbf{x}$',
    r'\providecommand{\x}{1}\providecommand{\x}{2}\x': '1',
    r'\newcommand{\a}{\b}\newcommand{\b}{c}\a \renewcommand{\b}{d}\a': 'c d',
    r'\DeclareRobustCommand{\heat}{тепло}\heat{} и \heat': 'тепло и тепло',
    r'\DeclareMathOperator{\Tr}{Tr}\DeclareMathOperator*{\am}{arg\,max}$\Tr\am_x$': r'$\operatorname{Tr}\operatorname*{arg\,max}_x$',
    r'\def\a#1#2{#2#1}\a{x}{y} \a12': 'yx 21',
    r'\long\def\x{1}\global\let\y=\x\def\x{2}\x\y': '21',
    r'{\def\x{1}\x}\x {\gdef\x{2}}\x': r'{1}\x {}2',
    r'\def\x{y}\edef\z{\x}\z': 'y',
    r'\let\bs\boldsymbol $\bs{x}$': r' $\boldsymbol{x}$',
    r'\NewDocumentCommand{\n}{s O{d} m}{\IfBooleanTF{#1}{*}{-}#2#3}\n{x} \n*[q]{y}': '-dx *qy',
    r'\NewDocumentCommand\n{o m}{\IfNoValueTF{#1}{none}{#1} #2}\n{x}; \n[q]{y}': 'none x; q y',
    r'\newcommand{\x}[1][]{\ifthenelse{\equal{#1}{}}{no}{#1}}\x; \x[yes]': 'no; yes',
    r'\DeclarePairedDelimiter{\abs}{\lvert}{\rvert}$\abs{x}+\abs*{y}$': r'$\lvert x\rvert+\lvert y\rvert$',
    r'\newcommand{\eg}{e.g.,\xspace}\eg glass, \eg{} ice (\eg)': 'e.g., glass, e.g., ice (e.g.,)',
    r'\newcommand{\sys}{\textsc{Heat}\xspace}\sys, \sys-based, \sys{}s, \sys$x$':
        r'\textsc{Heat}, \textsc{Heat}-based, \textsc{Heat} s, \textsc{Heat} $x$',
    r'\def\ie{\emph{i.e}\onedot}\ie, heat, \ie. \ie heat': r'\emph{i.e}., heat, \emph{i.e}. \emph{i.e}. heat',
    r'\newcommand{\R}{\ensuremath{\mathbb{R}}}In \R, $x\in\R$, \(\R\)': r'In $\mathbb{R}$, $x\in\mathbb{R}$, \($\mathbb{R}$\)',
    r'\newcommand{\be}{\begin{equation}}\newcommand{\ee}{\end{equation}}\be x \ee': r'\begin{equation} x \end{equation}',
    r'\newenvironment{eq}{\begin{equation}}{\end{equation}}\begin{eq}x\end{eq}': r'\begin{equation}x\end{equation}',
    r'\newcommand{\p}[1]{\left(#1\right)}\newcommand{\q}[1]{\p{#1^2}}$\q{\q{x}}$': r'$\left(\left(x^2\right)^2\right)$',
    r'\newcommand{\todo}[1]{}Heat\todo{why?} flows': 'Heat flows',
    r'\newcommand{\rev}[1]{{\color{blue}#1}}\rev{new \emph{text}}': r'{\color{blue}new \emph{text}}',
    r'\let\old\emph\renewcommand{\emph}[1]{\old{#1}}\emph{x}': r'\emph{x}',
    r'\newif\iflong\longtrue\iflong L\else S\fi\longfalse\iflong L\else S\fi': ' L S',
    'Heat\\iffalse never\n\\fi flows\\iftrue{} on\\else off\\fi': 'Heat flows{} on',
    'Heat % why\n  flows\\begin{comment}not this $\\end{comment}.': 'Heat flows\n.',
    r'\verb|a_b%| and \lstinline{x$y}': r'a\_b\% and x\$y',
    # what cannot be understood keeps its name, and no text is lost
    r'\def\a#1.{(#1)}Heat \a b. flows': r'Heat \a b. flows',
    r'\newcommand{\bad}{\ifx\a\b x\fi}Heat \bad flows': r'Heat \bad flows',
    r'\def\a{\a b}Heat \a flows': r'Heat \a b flows',
    r'\def\a{\b}\def\b{\a}Heat \a flows': r'Heat \a flows',
    r'\newcommand{\x}[2]{#1#2}Heat \x{flows': r'Heat \x{flows',
    r'\newcommand{\x}{never closed. Heat flows': r'\newcommand{\x}{never closed. Heat flows',
    r'\renewcommand{\section}{oops}\section{Heat}': r'\section{Heat}',
    r'\newcommand{\x': r'\newcommand{\x',
    r'Heat \iflater flows': r'Heat \iflater flows',
    r'\NewDocumentCommand{\n}{r() m}{x}Heat \n(a){b}': r'Heat \n(a){b}',
}


@pytest.mark.parametrize('source', MACROS)
def test_macros_are_written_out_wherever_they_are_used(source): assert _written_out(source) == MACROS[source]


def test_macros_are_written_out_in_title_abstract_headings_key_words_and_text():
    found = _latex_fields(r'\newcommand{\sys}{HeatNet}\title{On \sys}\begin{document}\begin{abstract}\sys{} is $\sys$.\end{abstract}'
                         r'\keywords{\sys, heat}\section{Why \sys}\sys\begin{quote}of \sys\end{quote}\end{document} \sys')
    assert found == dict(title='On HeatNet', text='HeatNet is $HeatNet$.', keywords=['HeatNet', 'heat'], topics=[], sections=[
        dict(title='Why HeatNet', text=r'HeatNet\begin{quote}of HeatNet\end{quote}')])


@pytest.mark.parametrize('source', [
    r'\def\a{\d\d}' + ''.join(rf'\def\{"d"*n}{{\{"d"*(n + 1)}\{"d"*(n + 1)}}}' for n in range(1, 40)) + r'\a',
    r'\def\a#1{#1}' + r'\a{'*10_000, r'\newcommand{\y}[1]{#1#1}' + r'\y{'*30 + '}'*30, r'\iffalse '*10_000, r'\begin{comment}'*10_000,
    '{'*25_000, r'\x{'*10_000, r'\def\a{\a\a}\a', r'\begin{'*10_000, r'\let\a\a'*2_500, '[' * 10_000, r'\newcommand'*10_000])
def test_no_source_takes_forever_or_fills_the_memory(source):
    start = time.process_time()
    try: assert len(_written_out(source)) <= max(1_000_000, 2*len(source))
    except ValueError as error: assert 'never come to an end' in str(error)
    assert time.process_time() - start < 15  # twice as much of what grows with the square would take a minute


@settings(max_examples=300)
@given(st.lists(st.sampled_from([*r'{}[]$%#~ ', *r'\x \y \newcommand \def \let \begin{a} \end{a} \iffalse \fi \else'.split(), '\n\n',
                                 'heat', 'тепло', '{\\x}', '[1]', '#1', r'\section', r'\abstract', r'\item', r'\xspace', r'\verb|',
                                 r'\input']), max_size=25).map(''.join))
def test_any_source_is_read_or_refused_in_a_sentence(source):
    for found in read_here(formats['latex'].read, source):
        assert isinstance(found, Row) or 'cannot be parsed' in found.reason


@given(st.text('abcdeабвгд .,', max_size=60), st.text('abcde', min_size=1, max_size=9))
def test_text_without_commands_stays_and_a_macro_is_its_text(text, name):
    assert _written_out(text) == text
    assert _written_out(rf'\newcommand{{\z{name}}}{{тепло}}{text}\z{name}{{}}{text}') == f'{text}тепло{text}'


# --- the front matter of classes

CLASSES = {
    'A&A': (r'''\documentclass{aa}\begin{document}\title{Stars \& dust\thanks{Based on X}} \subtitle{I. Heat}
\author{A. Name\inst{1} \and B. Other\inst{2}} \institute{Here \email{a@b.c} \and There}\date{Received 1; accepted 2}
\abstract{Stars are hot.}{We measure.}
{We use $T\sim 5$.}
{It was warm.}{They are hot.}
\keywords{stars: heat -- dust}\maketitle\section{Introduction} Stars shine.
\begin{acknowledgements} We thank.\end{acknowledgements}\end{document} more''',
            'Stars & dust', 'Stars are hot.\n\nWe measure.\n\nWe use $T\\sim 5$.\n\nIt was warm.\n\nThey are hot.', ['stars: heat', 'dust'],
            {'Introduction': 'Stars shine.'}),
    'elsarticle': (r'''\documentclass{elsarticle}\begin{document}\begin{frontmatter}\title{Heat\tnoteref{t1}}\tnotetext[t1]{Note}
\author[1]{A. Name\corref{cor1}}\ead{a@b.c}\ead[url]{x.org}\cortext[cor1]{Corresponding}\address[1]{Street}
\affiliation[2]{organization={U}, city={C}}\begin{abstract} We heat films.\end{abstract}
\begin{highlights}\item A\end{highlights}\begin{keyword} heat \sep films \PACS 44.10 \end{keyword}\end{frontmatter}\linenumbers
\section{Intro} Text~\cite{a}.\appendix\section{Tables}\begin{table}\begin{tabular}{c}a\end{tabular}\end{table}\end{document}''',
                   'Heat', 'We heat films.', ['heat', 'films'], {'Intro': 'Text.'}),
    'revtex': (r'''\documentclass[prl]{revtex4-2}\begin{document}\preprint{APS/1}\title{Heat}\author{A}\altaffiliation{B}\affiliation{C\\ D}
\email{e@f}\homepage{g}\collaboration{CLEO}\noaffiliation\date{\today}\begin{abstract} We heat.\end{abstract}\pacs{44.10}\keywords{heat}
\maketitle
Heat flows from warm bodies. \emph{Introduction.---}We wait.

Next paragraph.\begin{acknowledgments}Thanks\end{acknowledgments}\bibliography{x}\end{document}''',
               'Heat', 'We heat.', ['heat'], {'': 'Heat flows from warm bodies. Introduction.—We wait.\n\nNext paragraph.'}),
    'ICML': (r'''\documentclass{article}\usepackage{icml2023}\icmltitlerunning{Short}\begin{document}\twocolumn[
\icmltitle{Deep Heat}\icmlsetsymbol{equal}{*}\begin{icmlauthorlist}\icmlauthor{A}{equal,yyy}\end{icmlauthorlist}
\icmlaffiliation{yyy}{Dept}\icmlcorrespondingauthor{A}{a@b}\icmlkeywords{ML, heat}
\vskip 0.3in
]
\printAffiliationsAndNotice{\icmlEqualContribution}\begin{abstract}We heat.\end{abstract}\section{Introduction}Heat.\end{document}''',
             'Deep Heat', 'We heat.', ['ML', 'heat'], {'Introduction': 'Heat.'}),
    'IEEEtran': (r'''\documentclass{IEEEtran}\begin{document}\title{Heat}\author{\IEEEauthorblockN{A}\IEEEauthorblockA{B\\C}}\markboth{J}{K}
\IEEEtitleabstractindextext{\begin{abstract}We heat films.\end{abstract}\begin{IEEEkeywords}heat, films.\end{IEEEkeywords}}
\maketitle\IEEEdisplaynontitleabstractindextext\IEEEpeerreviewmaketitle\IEEEraisesectionheading{\section{Introduction}\label{sec:i}}
\IEEEPARstart{H}{eat} flows.\begin{IEEEbiography}[{x}]{A}Bio\end{IEEEbiography}\end{document}''',
                 'Heat', 'We heat films.', ['heat', 'films'], {'Introduction': 'Heat flows.'}),
    'acmart': (r'''\documentclass{acmart}\begin{document}\title{Heat}\author{A}\orcid{1}\affiliation{\institution{U}\country{D}}\email{a@b}
\renewcommand{\shortauthors}{A et al.}\setcopyright{none}\acmConference[X '20]{Conf}{June}{Place}\acmDOI{1}
\begin{abstract}We heat.\end{abstract}\begin{CCSXML}<ccs2012>%</ccs2012>\end{CCSXML}\ccsdesc[500]{Heat}\keywords{heat, films}
\begin{teaserfigure}x\end{teaserfigure}\received{1}\maketitle\section{Introduction}Heat.\begin{acks}T\end{acks}\end{document}''',
               'Heat', 'We heat.', ['heat', 'films'], {'Introduction': 'Heat.'}),
    'sn-article': (r'''\documentclass{sn-jnl}\begin{document}\title[Short]{Heat}\author*[1]{\fnm{A} \sur{B}}\email{a@b}\equalcont{X}
\affil*[1]{\orgdiv{D}}\abstract{\textbf{Purpose:} We heat.

\textbf{Results:} Warm.}
\keywords{heat, films}\pacs[MSC Classification]{35A01}\maketitle\section{Introduction}\label{s}Heat.
\backmatter\bmhead{Acknowledgements}Thanks\end{document}''',
                   'Heat', 'Purpose: We heat.\n\nResults: Warm.', ['heat', 'films'],
                   {'Introduction': 'Heat.', 'Acknowledgements': 'Thanks'}),
    'amsart': (r'''\documentclass{amsart}\newtheorem{thm}{Theorem}[section]\newtheorem*{lem}{Lemma}\theoremstyle{definition}
\title[H]{Heat}\author{A}\address{S}\curraddr{T}\email{a@b}\thanks{G}\subjclass[2010]{Primary 35}\keywords{heat}\date{\today}\dedicatory{D}
\begin{document}\begin{abstract}We prove.\end{abstract}\maketitle\section{Intro}We have:
\begin{thm}[Fourier] Heat flows.\end{thm}
\begin{lem}It waits.\end{lem}\end{document}''',
               'Heat', 'We prove.', ['heat'], {'Intro': 'We have:\n\nTheorem (Fourier). Heat flows.\n\nLemma. It waits.'}),
    'aastex': (r'''\documentclass{aastex631}\shorttitle{H}\shortauthors{A}\received{1}\begin{document}\title{Heat}\correspondingauthor{A}
\email{a}\author[0000-1]{A}\affiliation{U}\begin{abstract}We observe.\end{abstract}\keywords{Stars (1) --- Dust (2)}
\section{Intro}Heat.\acknowledgments
We thank X.\facilities{HST}\software{astropy}\appendix\section{More}Data.
\begin{deluxetable}{c}\tablehead{a}\end{deluxetable}\end{document}''',
               'Heat', 'We observe.', ['Stars (1)', 'Dust (2)'], {'Intro': 'Heat.', 'Acknowledgments': 'We thank X.', 'More': 'Data.'}),
    'MNRAS': (r'''\documentclass{mnras}\title[S]{Heat}\author[A et al.]{A,$^{1}$\thanks{E-mail} B \\ $^1$U}\date{X}\pubyear{2015}
\begin{document}\label{firstpage}\pagerange{\pageref{firstpage}--\pageref{lastpage}}\maketitle
\begin{abstract}We observe stars.\end{abstract}\begin{keywords}stars -- dust\end{keywords}\section{Intro}Heat.
\bsp\label{lastpage}\end{document}''',
              'Heat', 'We observe stars.', ['stars', 'dust'], {'Intro': 'Heat.'}),
    'MDPI': (r'''\documentclass{mdpi}\Title{Heat}\Author{A}\AuthorNames{A}\address{U}\corres{C}\firstnote{N}\abstract{We heat.}
\keyword{heat; films}\begin{document}\section{Intro}Heat.\authorcontributions{X}\funding{Y}\acknowledgments{Thanks}
\conflictsofinterest{None}\abbreviations{Z}{W}\end{document}''', 'Heat', 'We heat.', ['heat', 'films'], {'Intro': 'Heat.'}),
    'a class that nobody knows': (r'''\documentclass{new}\begin{document}\title{Heat}\writer{A. Name}{U}\homeplace{Street}
\begin{abstract}We heat.\end{abstract}

\editornote[x]{Sent in May}
\badge{Open}

Heat flows. \section{Method}We wait.\end{document}''', 'Heat', 'We heat.', [], {'': 'Heat flows.', 'Method': 'We wait.'}),
    'Russian': (r'''\documentclass{article}\usepackage[T2A]{fontenc}\usepackage[russian]{babel}\newcommand{\sys}{\textsc{Тепло}}
\udk{536.2}\title{О <<теплоте>>}\begin{document}\maketitle\begin{abstract}Мы показываем, что \sys\ "--- это тепло~\cite{a}.\end{abstract}
\selectlanguage{english}\begin{abstract}We show heat.\end{abstract}\section{Введение}"<Тепло"> течёт\footnote{Всегда.}.\end{document}''',
                'О «теплоте»', 'Мы показываем, что Тепло — это тепло.', [],
                {'Abstract': 'We show heat.', 'Введение': '«Тепло» течёт (Всегда.).'}),
    'no document': (r'\title{Heat}\maketitle Heat flows. \section{Why}Nobody \emph{knows}.', 'Heat', 'Heat flows.', [],
                    {'Why': 'Nobody knows.'}),
    'keywords in the abstract, fonts, a box': (r'''\documentclass{llncs}\begin{document}
\twocolumn[\title{\LARGE \bf Heat\\ of {\huge glass}}
\author{A\inst{1}\and B}\institute{U\\\email{a@b}}\maketitle\begin{abstract}\small\noindent We {\em heat}. \keywords{heat \and cold.}
\end{abstract}]\section{\centering Intro}{\it See} it.\begin{credits}\subsubsection{\ackname} T\end{credits}''',
        'Heat of glass', 'We heat.', ['heat', 'cold'], {'Intro': 'See it.', 'Acknowledgments': 'T'}),
    'key words as a paragraph': (r'''\documentclass{x}\begin{document}\title{Heat}\begin{abstract}We heat.\end{abstract}
\noindent{\it Keywords\/}: heat, cold\submitto{J}\maketitle\section{Intro}Text.\end{document}''',
                                 'Heat', 'We heat.', ['heat', 'cold'], {'Intro': 'Text.'}),
    'lists, listings, algorithms': (r'''\begin{document}
\section{Method}First:\begin{itemize}[label=(\roman*)]\item Heat.\item Wait.\end{itemize}Then
\begin{lstlisting}
x = {'%' # $
\end{lstlisting}
\begin{algorithm}\State wait\end{algorithm}\begin{verbatim}\section{no}\end{verbatim}it flows.\end{document}''',
                                    '', 'First:\n- Heat.\n- Wait.\nThen\n\nit flows.', [], {}),
}


@pytest.mark.parametrize('case', CLASSES)
def test_the_front_matter_of_each_class_is_read_and_is_no_text(case):
    source, title, text, words, sections = CLASSES[case]
    found = _latex_fields(source)
    tidy = lambda part: _apply_rules(part)[0]
    if case == 'lists, listings, algorithms': found['text'] = found['sections'].pop()['text']
    assert (tidy(found['title']), tidy(found['text']), found['keywords']) == (title, text, words)
    assert {part['title']: tidy(part['text']) for part in found['sections']} == sections


# --- several files

def paper_in(folder):
    "A paper in several files, with names that lead out of its folder."
    (folder/'paper'/'sections'/'deep').mkdir(parents=True)
    files = {
        'secret.tex': 'SECRET', 'paper/macros.tex': r'\newcommand{\sys}{HeatNet}', 'paper/alone.tex': r'\section{Alone} A text of its own.',
        'paper/own.sty': r'\ProvidesPackage{own}\def\my@x{y}\newcommand{\R}{$\mathbb{R}$, \my@x}\renewcommand{\section}{oops}',
        'paper/sections/intro.tex': r'\section{Intro} \sys{} one.',
        'paper/sections/two.tex': r'\section{Two} two. \input{sections/two}\input{sections/intro.tex}',
        'paper/sections/deep/three.tex': r'\documentclass[../../main]{subfiles}\begin{document}\section{Three} three.\end{document} after',
        'paper/main.tex': r'''\documentclass{article}\usepackage{own}\input{macros}\title{\sys}\begin{document}
\begin{abstract}\sys{} heats \R.\end{abstract}\include{sections/two}\input{missing} \input{../secret}\input{/etc/passwd}\input{main}
\subimport{sections/}{deep/three.tex}\input sections/../../secret
\input{link}\end{document}'''}
    for name, text in files.items(): (folder/name).write_text(text)
    os.symlink(folder/'secret.tex', folder/'paper'/'link.tex')
    return folder/'paper'


WHOLE = dict(title='HeatNet', text=r'HeatNet heats $\mathbb{R}$, y.', topics=[], keywords=[], sections=[
    dict(title='Two', text='two.'), dict(title='Intro', text='HeatNet one.'), dict(title='Three', text='three.')])
PARTS = ['macros.tex', 'sections/deep/three.tex', 'sections/intro.tex', 'sections/two.tex']


def outcome(found, root: str) -> tuple[dict, dict]:
    "The fields of the rows, and the reasons of the refused ones, by the name of their file."
    found = list(found)
    of = lambda kind, what: {entry.file.removeprefix(root): getattr(entry, what) for entry in found if isinstance(entry, kind)}
    return of(Row, 'fields'), of(Refused, 'reason')


def test_files_that_a_source_names_are_read_with_it_and_only_there(tmp_path):
    folder = paper_in(tmp_path)
    good, bad = outcome(rows(str(folder)), f'{folder}/')
    assert good.pop('main.tex') == WHOLE
    assert good.pop('alone.tex')['sections'] == [dict(title='Alone', text='A text of its own.')]
    assert good.pop('link.tex')['text'] == 'SECRET' and not good  # what the user gave himself is his
    assert bad.pop('own.sty').startswith('a file that LaTeX needs')
    assert bad == dict.fromkeys(PARTS, 'a part of main.tex, read there; give that file')


def test_files_in_an_archive_are_read_with_the_source_beside_them(tmp_path):
    folder = paper_in(tmp_path)
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as archive:
        for name in ['secret.tex', *(f'paper/{name}' for name in ['main.tex', 'own.sty', *PARTS])]: archive.write(tmp_path/name, name)
    good, bad = outcome(rows(str(tmp_path/'a.zip')), f'{tmp_path}/a.zip/')
    assert good.pop('paper/main.tex') == WHOLE and good.pop('secret.tex')['text'] == 'SECRET' and not good
    assert sorted(bad) == sorted(f'paper/{name}' for name in [*PARTS, 'own.sty']) and folder.exists()


def test_a_part_is_told_anew_when_its_document_changes(tmp_path):
    (tmp_path/'main.tex').write_text(r'\begin{document}% \input{part}' + '\nHeat.\\end{document}')
    (tmp_path/'part.tex').write_text('A text of its own.')
    assert [type(entry) for entry in rows(str(tmp_path/'part.tex'))] == [Row]
    (tmp_path/'main.tex').write_text(r'\begin{document}\input{part} Heat.\end{document}')
    assert [type(entry) for entry in rows(str(tmp_path/'part.tex'))] == [Refused]


def test_a_part_in_another_encoding_is_refused_with_its_name(tmp_path):
    (tmp_path/'main.tex').write_text(r'\begin{document}\input{part}\end{document}')
    (tmp_path/'part.tex').write_bytes('Теплота переходит от тёплых тел к холодным.'.encode('cp1251'))
    [found] = rows(str(tmp_path/'main.tex'))
    assert found.reason == ('part, which it names, is not UTF-8 at byte 1, looks like cp1251: convert it, or give encoding=cp1251 '
                            'if all of the file is')
    [found] = rows(str(tmp_path/'main.tex'), 'cp1251')
    assert found.fields['text'] == 'Теплота переходит от тёплых тел к холодным.'


@pytest.mark.parametrize(('declared', 'codec'), [('cp1251', 'cp1251'), ('koi8-r', 'koi8-r'), ('cp866', 'cp866'), ('latin1', 'cp1252')])
def test_an_encoding_that_the_source_declares_is_the_one_that_is_advised(declared, codec):
    text = 'Теплота.' if codec != 'cp1252' else 'Wärme.'
    [found] = read_here(formats['latex'].read, f'\\usepackage[{declared}]{{inputenc}}\\begin{{document}}\n{text}'.encode(codec))
    assert f'looks like {codec}: convert it, or give encoding={codec}' in found.reason and found.line == 2


@pytest.mark.parametrize('name', ['a.sty', 'a.cls', 'a.bbl', 'a.bst', 'a.aux', 'a.toc'])
def test_what_latex_needs_or_writes_is_no_paper(tmp_path, name):
    (tmp_path/name).write_text('\\newcommand{\\x}{Heat flows from warm bodies to cold ones.}\n')
    [found] = rows(str(tmp_path/name))
    assert found.reason.startswith('a file that LaTeX needs or writes')


# --- Markdown, and the forms

@pytest.mark.parametrize(('source', 'title', 'text', 'headings'), [
    ('On heat\n=======\n\nIt flows.\n\nMethod\n------\nWe wait.\n', 'On heat', 'It flows.', ['Method']),
    ('# О теплоте {#sec:t}\n\nОна течёт.\n\n## Метод ##\nЖдём.\n', 'О теплоте', 'Она течёт.', ['Метод']),
    ('# Heat\n\n- one\n---\n\nIt flows.\n\n***\n\n| a | b |\n|---|---|\n', 'Heat',
     '- one\n---\n\nIt flows.\n\n***\n\n| a | b |\n|---|---|', []),
    ('# C#\n\n```\n# no\nno\n---\n```\n', 'C#', '```\n# no\nno\n---\n```', []),
    ('---\ntitle: "Heat"\nabstract: It flows.\n---\n# Method\nWe wait.\n', 'Heat', 'It flows.', ['Method'])])
def test_headings_of_markdown(source, title, text, headings):
    found = _markdown_fields(source)
    assert (found['title'], found['text'], [part['title'] for part in found['sections']]) == (title, text, headings)


EXPECTED = {
    'LaTeX': dict(title='On HeatNet', text='HeatNet is warm.', keywords=['heat', 'films'], topics=[],
                  sections=[dict(title='Method', text='We wait for HeatNet.')]),
    'LaTeX with an abstract in five parts (A&A)': dict(
        title='On heat', text='Heat flows.\n\nWe ask why.\n\nWe wait.\n\nIt flowed.\n\nIt flows.', keywords=[], topics=[],
        sections=[dict(title='Method', text='We wait.')]),
    'Markdown': dict(title='On heat', text='Heat flows.', lang='', keywords=['heat', 'тепло'], topics=[],
                     sections=[dict(title='Method', text='We wait.')]),
    'Plain text': dict(title='О теплоте', text='Теплота переходит.')}


@pytest.mark.parametrize(('kind', 'form'), [(kind, form) for kind in formats.values() for form in kind.forms],
                         ids=lambda value: getattr(value, 'name', ''))
def test_the_example_of_each_form_is_read_to_the_letter(kind, form):
    assert [entry.fields for entry in read_here(kind.read, form.example)] == [EXPECTED[form.name]]


def test_no_form_is_forgotten(): assert {form.name for kind in formats.values() for form in kind.forms} == set(EXPECTED)
