"""What each cleaning rule does and what it leaves alone, what the filters object to, and that cleaning is idempotent."""
import copy
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scilm_adapt import cleaning
from scilm_adapt.cleaning import _apply_rules, _language_code, clean, filters, language, rules, without_rules
from scilm_adapt.errors import InputError

HEAT = 'Heat flows from warm bodies to cold ones.'
WARM = 'Тепло переходит от тёплых тел к холодным.'
ABSTRACT = 'We show that heat flows from warm bodies to cold ones, and we measure how fast the difference of temperature vanishes.'

CHANGED = dict(
    entities=[
        ('a &lt; b &amp; c', 'a < b & c'),
        ('&amp;amp;lt; and &#233; and &#x43f;', '< and é and п'),
        ('$a &lt; b$', '$a < b$'),
        ('5&nbsp;км', '5 км')],
    tags=[
        ('Glass:<ul><li>Wait</li><li>Look</li></ul>Done', 'Glass:\n\nWait\nLook\n\nDone'),
        ('<table><tr><th>a</th><td>b</td></tr><tr><td>c</td></tr></table>', 'a b\nc'),
        ('<dl><dt>Heat</dt><dd>flows</dd></dl>', 'Heat\nflows'),
        ('<jats:p>One:</jats:p><jats:list><jats:list-item><jats:p>Two</jats:p></jats:list-item></jats:list>', 'One:\n\nTwo'),
        ('<section><h5>Цель</h5>Мы ждём.</section>', 'Цель\n\nМы ждём.'),
        ('10<sup><i>n</i></sup>, e<sup>x<sub>i</sub></sup>, m<sup class="u">2</sup>', '10^n, e^x_i, m^2'),
        ('is <mml:math><mml:mfrac><mml:mn>1</mml:mn><mml:mn>2</mml:mn></mml:mfrac></mml:math>.', 'is 1/2.'),
        ('<math xmlns="http://www.w3.org/1998/Math/MathML"><msup><mi>x</mi><mn>2</mn></msup><mo><</mo><mn>5</mn></math>', 'x^2 < 5'),
        ('<jats:p>Heat <jats:italic>flows</jats:italic>.</jats:p>', 'Heat flows.'),
        ('CO<sub>2</sub>, 10<sup>5</sup>, T<sub>max</sub>, 19<sup>th</sup>', 'CO2, 10^5, T_max, 19th'),
        ('One.<br>Two.<br/>Three.', 'One.\nTwo.\nThree.'),
        ('<p>Первый.</p><p>Второй <b>абзац</b>.</p>', 'Первый.\n\nВторой абзац.'),
        ('see <a href="https://x.org">this page</a>', 'see this page'),
        ('<jats:title>Methods</jats:title><jats:p>We heat.</jats:p>', 'Methods\n\nWe heat.'),
        ('heat <!-- page 3 --> flows', 'heat flows'),
        ('<i>p</i> < 0.05 and n > 3', 'p < 0.05 and n > 3'),
        ('<tex-math>$x$</tex-math><mml:math><mml:mi>x</mml:mi></mml:math>', '$x$')],
    unicode=[
        ('The ﬁrst ﬂow of eﬀicient oﬃces, eﬄuent and coﬀee; ﬅ and ﬆ',
         'The first flow of efficient offices, effluent and coffee; st and st'),
        ('the de ﬁ nition of di ﬀ erent ﬁ elds', 'the definition of different fields'),
        ('di ﬀerent, turned o ﬀ the', 'different, turned off the'),
        ('in ﬁ nite, in ﬁnite, in ﬂuence, in ﬂ uence', 'in fi nite, in finite, in fluence, influence'),
        ('zo ﬁ x is a zofix', 'zofix is a zofix'),
        ('\uf0b7 one\n\uf0b7 \u0434\u0432\u0430', '• one\n• два'),
        ('SchrÃ¶dingerâ€™s', 'Schrödinger’s'),
        ('РџСЂРёРІРµС‚, РјРёСЂ', 'Привет, мир'),
        ('cafe\u0301', 'café'), ('и\u0306од', 'йод'),
        ('a\u00a0b\u2009c\u3000d', 'a b c d'),
        ('zero\u200bwidth\ufeff, soft\u00adhyphen, nul\x00', 'zerowidth, softhyphen, nul'),
        ('soft\u00ad\nhyphen', 'softhyphen'),
        ('one\u2028two\u2029three\r\nfour\rfive', 'one\ntwo\nthree\nfour\nfive'),
        ('state-of-the\x02art', 'state-of-the-art'),
        ('  a  b\t c \n\n\n\n d ', 'a b c\n\nd')],
    latex=[
        (r'at \SI{10}{\kelvin}, \qty{10}{\kilo\metre\per\second\squared}', 'at 10 K, 10 km/s^2'),
        (r'\SIrange{1}{2}{\metre}', '1 to 2 m'),
        (r'\num{1e5}, \num{1.5e-3}, \numrange{1}{2}, \numlist{1;2}', '10^5, 1.5 × 10^-3, 1 to 2, 1 and 2'),
        (r'\SI{3e8}{\m\per\s}, \SIlist{1;2;3}{\m}', '3 × 10^8 m/s, 1, 2 and 3 m'),
        (r'\ang{30}, \ang{1;2;3}, \SI{25}{\degreeCelsius}, \SI{90}{\degree}, \SI{5}{\percent}', '30°, 1°2′3″, 25 °C, 90°, 5%'),
        (r'\SI[per-mode=symbol]{5}{\joule\per\mole\per\kelvin}, \SI{1.2(3)}{\GeV}', '5 J/mol/K, 1.2(3) GeV'),
        (r'\si{\micro\metre}, \unit{kg.m/s^2}, \SI{1}{\cubic\centi\metre}, \SI{10}{\kg\m\tothe{2}}', 'µm, kg m/s^2, 1 cm^3, 10 kg m^2'),
        (r'Тепло: \SI{5+-1}{\metre} на \SI{20 x 30}{\mm}', 'Тепло: 5 ± 1 m на 20 × 30 mm'),
        (r'So:\begin{itemize}\item First.\item Second.\end{itemize}Next', 'So:\n- First.\n- Second.\nNext'),
        (r'\begin{description}\item[Heat] flows\item[(i)] waits\end{description}', '- Heat: flows\n- (i) waits'),
        (r'We \begin{small}wait\end{small} here.\\Then', 'We wait here.\nThen'),
        (r'\emph{very} {\it old} {\bf map} \texttt{code}', 'very old map code'),
        (r'\textbf{\emph{nested} text}', 'nested text'),
        (r"Poincar\'e, G{\"o}del, \v{S}ev\v{c}\'{\i}k, M\"uller, Erd\H{o}s, fa\c{c}ade, S\o ren",
         'Poincaré, Gödel, Ševčík, Müller, Erdős, façade, Søren'),
        (r'as shown~\cite{a,b} and \citep[p.~3]{c}.', 'as shown and.'),
        (r'as is known (see \cite{a}; \cite{b}).', 'as is known.'),
        (r'in Section~\ref{sec:heat}, heat', 'in Section, heat'),
        (r'5\% of R\&D, a\_b, \$7, \#3', '5% of R&D, a_b, $7, #3'),
        (r'at \url{https://x.org/a\_b} or \href{https://y.org}{here}', 'at https://x.org/a_b or here (https://y.org)'),
        ("``heat'' and ''cold''", '“heat” and “cold”'),
        ('pages 1--2, heat---not cold---flows -- slowly', 'pages 1–2, heat—not cold—flows – slowly'),
        (r'Fig.~5, Opus~4, 12~GHz, H\,II', 'Fig. 5, Opus 4, 12 GHz, H II'),
        (r'H{\alpha} at 1567 \AA, $\sim$24\%', r'Hα at 1567 Å, $\sim$24%'),
        (r'\ours{} and \method win', 'ours and method win'),
        (r'\unknown{heat}{flows} \textcolor{red}{\textbf{fast}}', 'heat flows fast'),
        (r'N \times M, x \in R', 'N × M, x ∈ R'),
        (r'\begin{itemize} \item heat \item cold \end{itemize}', '- heat\n- cold'),
        (r'Метод \emph{точен} на~5\% и ``прост\'\'', 'Метод точен на 5% и “прост”'.replace('“прост”', r'``прост\'\'')),
        (r'heat.\footnote{Code at x.org}', 'heat. (Code at x.org)')],
    references=[
        (f'{HEAT}\n\nReferences\n[1] Fourier, 1822.\n[2] Carnot, 1824.', HEAT),
        (f'{HEAT}\n\n## 5. Bibliography:\nFourier J. (1822)\nCarnot S. (1824)', HEAT),
        (f'{WARM}\n\nСПИСОК ЛИТЕРАТУРЫ\n1. Фурье Ж. Теория тепла.\n2. Карно С. О движущей силе.', WARM),
        (f'{HEAT}\n\nAcknowledgments\nWe thank the sun.', HEAT),
        (f'{HEAT}\n\nREFERENCES\n[1] Fourier, 1822.\n\nAppendix A\nMore heat.', f'{HEAT}\n\nAppendix A\nMore heat.')],
    line_breaks=[
        ('the pro-\ncess of heat', 'the process of heat'), ('переме-\nщение тепла', 'перемещение тепла'),
        ('by self-\nattention', 'by self-attention'), ('кто-\nнибудь', 'кто-нибудь'),
        ('a non-linear and non-\nlinear map', 'a non-linear and non-linear map'),
        ('the heat-flux law and the heat-\nflux', 'the heat-flux law and the heat-flux'),
        ('Heat flows from warm bodies to cold ones, and the difference of\n'
         'temperature vanishes with time, as everybody knows who once held a\ncup of tea.',
         'Heat flows from warm bodies to cold ones, and the difference of temperature vanishes with time, as everybody knows '
         'who once held a cup of tea.'),
        (f'{HEAT}\n17\n{HEAT}', f'{HEAT}\n\n{HEAT}'), (f'{WARM}\n\nСтр. 5\n\n{WARM}', f'{WARM}\n\n{WARM}'),
        ('heat flows\n\n- 3 -\n\nto cold bodies', 'heat flows\nto cold bodies')],
    boilerplate=[
        (f'Abstract: {HEAT}', HEAT), (f'ABSTRACT. {HEAT}', HEAT), (f'Abstract\n{HEAT}', HEAT), (f'Abstract—{HEAT}', HEAT),
        (f'Abstract We study. {HEAT}', f'We study. {HEAT}'), (f'Summary: {HEAT}', HEAT), (f'Аннотация. {WARM}', WARM),
        (f'РЕЗЮМЕ\n{WARM}', WARM),
        (f'{HEAT} © 2019 Elsevier B.V. All rights reserved.', HEAT), (f'{HEAT} Copyright (c) 2001 John Wiley & Sons, Ltd.', HEAT),
        (f'{HEAT} (c)2001 Le Jacq Communications, Inc.', HEAT),
        (f'{HEAT} © The Author(s) 2020. Published by Oxford University Press.', HEAT),
        (f'{HEAT} Published by Elsevier Ltd.', HEAT), (f'{HEAT} This article is protected by copyright. All rights reserved.', HEAT),
        (f'{HEAT}(ABSTRACT TRUNCATED AT 250 WORDS)', HEAT), (f'{HEAT} Springer Nature © 2021.', HEAT),
        (f'{HEAT} Keywords: heat, flow, cold', HEAT), (f'{HEAT}\nIndex Terms—Heat, cold.', HEAT), (f'{HEAT} Keywords. Heat, cold.', HEAT),
        (f'{WARM} Ключевые слова: тепло, тело', WARM), (f'{WARM} © Наука, 2019', WARM), (f'{WARM} Все права защищены.', WARM),
        (f'{HEAT} MSC (2010): 80A20, 35K05', HEAT), (f'{HEAT}\nPACS numbers: 44.10.+i', HEAT),
        (f'{HEAT} Comments: 12 pages, 3 figures', HEAT),
        (f'УДК 536.2\n{WARM}', WARM), (f'{HEAT}\nKeywords: heat\n{HEAT}', f'{HEAT}\n{HEAT}')])

# What data bases and publishers write behind an abstract, alone or one behind the other.
NOTICES = """[ABSTRACT FROM AUTHOR]
(ABSTRACT FROM PUBLISHER)
[Abstract from author]
(PsycInfo Database Record (c) 2021 APA, all rights reserved)
(c) 2009 APA, all rights reserved. (PsycINFO Database Record (c) 2012 APA, all rights reserved).
Copyright of Journal of Films, Vol. 3 is the property of Some Press and its content may not be copied or emailed to multiple sites or \
posted to a listserv without the copyright holder's express written permission. However, users may print, download, or email articles \
for individual use. This abstract may be abridged. No warranty is given about the accuracy of the copy. Users should refer to the \
original published version of the material for the full abstract. (Copyright applies to all Abstracts.)
[ABSTRACT FROM AUTHOR] Copyright of Heat &amp; Mass is the property of A & B Ltd and its content may not be copied.
(As Provided)
(Contains 3 tables and 2 figures.)
(Contains 2 figures, 1 table, and 5 notes.)
(Author)
(Author abstract)
Copyright © 2018 Elsevier Ltd. All rights reserved.
© The Author(s) 2021. Published by Oxford University Press on behalf of the Society. For permissions, please e-mail: x@oup.com.
Copyright (C) 2009 John Wiley & Sons, Ltd.
© 2020 Wiley Periodicals LLC
© 2019 by the authors. Licensee MDPI, Basel, Switzerland. This article is an open access article distributed under the terms and \
conditions of the Creative Commons Attribution (CC BY) license (http://creativecommons.org/licenses/by/4.0/).
Copyright: © 2017 Fourier et al. This is an open access article distributed under the terms of a Creative Commons License.
This article is protected by copyright. All rights reserved.
Published by Elsevier B.V.
Published under license by AIP Publishing.
2018 Elsevier Ltd. All rights reserved.
(C) 2015 IEEE.
DOI: http://dx.doi.org/10.1103/PhysRevB.12.345
Supplementary information is available at Journal of Films online.
Supplementary information: Supplementary data are available at Bioinformatics online.
Crown Copyright © 2010 Published by Elsevier Ltd. All rights reserved.
Crown Copyright 2009. All rights reserved.
© 2022. The Author(s), under exclusive licence to Springer Nature Limited.
© Georg Thieme Verlag KG Stuttgart · New York.
Все права защищены.
© Авторы, 2020
© Коллектив авторов, 2019.
© Иванов И.И., Петров П.П., 2020
© ООО «Издательство „Тепло“», 2019""".split('\n')

KEPT = dict(
    entities=['AT&T; R&D', 'https://x.org/?a=1&copy=2', 'S&P 500', '&unheardof;', 'a && b'],
    tags=['a < b and c > d', 'the mean <x, y> of <z>', 'the tokens <think> and </s>', 'if p<q then <b> is large', '$<i>$', 'x <- y; y -> x',
          'List<int> and <image>', 'при a<b и c>d'],
    unicode=['“curled” ‘quotes’ — and naïve Ångström', 'ℋ of 𝟚, x² and H₂O, ½ and ™', 'ĳsberg', 'ﬓ', '´e',
             'Привет, «мир» — ёлка № 5', '数学', 'α → β ≤ γ',
             'Poincaré’s “café”'],
    latex=[r'C:\Users\name', r'the pattern \d+\.txt', 'scilm --strict and --flags', 'https://x.org/~me', 'about ~5% and 3%~10%',
           "f''(x) = 0",
           '50 % of all, 100% of it', 'y ~ x and z~x', '{a, b} is a set', r'a lone \ here', '$5 and $7', 'M_{BH} and x^{2}',
           r'\textbf{never closed',
           '-----', 'i-- and --i', r'$\emph{x}~y$ and \(\cite{a}\) and \[a--b\]', r'\begin{equation}x \% y\end{equation}', '50 % скидка'],
    references=[f'{HEAT}\n\nReferences\nare the subject of this paper, and how to read them.', 'References\n[1] Fourier, 1822.',
                'We thank\nall references.', f'{HEAT}\n\nMethods\nWe heat.'],
    line_breaks=['Two kinds:\n- warm bodies, which give heat to all the others\n- cold bodies, which take it from them', 'one\ntwo\nthree',
                 '12\n15\n19\n28', f'{HEAT}\n\n{WARM}', 'x-\nY', '1-\n2', 'def f(x):\nreturn x', '$a-\nb$'],
    boilerplate=['Abstract algebra is fun.', 'Abstract Wiener spaces are studied.', 'Abstract Interpretation is a theory.',
                 'Abstract Syntax Trees are used.', 'Abstract Heat spaces are new. Every abstract space is one.',
                 'Summary Statistics are kept.',
                 f'{HEAT} The trial was registered at ClinicalTrials.gov (NCT01234567).', f'{HEAT} Trial registration: NCT01234567.',
                 f'{HEAT} PROSPERO registration: CRD42018012345.', f'{HEAT} The copyright of songs is the property of their authors.',
                 f'{HEAT} We asked the author (author).', f'{HEAT} Supplementary oxygen is given to warm patients.',
                 f'{HEAT} In 2018 Elsevier published it.', f'{HEAT} DOI: names of objects are studied.',
                 f'{HEAT} The box (contains 3 tables) is warm.',
                 'It was (a) warm; (b) cold; (c) Temperatures in 2001 rose.', 'Резюме соискателя анализируется моделью.',
                 'Abstract Meaning Representation (AMR) is a graph.', 'Summary statistics are kept.',
                 'We study copyright, keywords and published work.', f'{HEAT} Code is available at https://heat.org.', '© 1822',
                 'Keywords: heat',
                 'It has (a) warmth, (b) flow and (c) 2001 bodies were heated.', f'{HEAT} Data are available at zenodo.org.',
                 'It extracts (1) sentences and (2) keywords. Experiments show that heat flows.', 'Аннотация корпуса текстов описана.',
                 'Both bodies were warm. The copyright of 2019 laws is studied.', 'The abstract is short. Its summary is shorter.'])


@pytest.mark.parametrize('name,before,after', [(name, *pair) for name, pairs in CHANGED.items() for pair in pairs])
def test_rule_changes(name, before, after):
    assert rules[name](before) == after
    assert _apply_rules(before)[1].count(name) == 1, 'and it is reported once'


@pytest.mark.parametrize('name,text', [(name, text) for name, texts in KEPT.items() for text in texts])
def test_rule_leaves_alone(name, text):
    assert rules[name](text) == text
    if '\n' not in text: assert _apply_rules(text) == (text, []), 'nor does another rule touch it'


@pytest.mark.parametrize('notice', NOTICES)
@pytest.mark.parametrize('text', [HEAT, WARM])
def test_notices_of_data_bases_and_publishers_are_cut_off(text, notice):
    assert _apply_rules(f'{text} {notice}') == (text, ['entities', 'boilerplate'] if '&amp;' in notice else ['boilerplate'])
    assert _apply_rules(f'{text}\n{notice}')[0] == text


@pytest.mark.parametrize('before', ['Abstract ', 'ABSTRACT ', 'Summary ', '<jats:title>Abstract</jats:title><jats:p>', '© 2018 IEEE. ',
                                    '© 2016 Elsevier B.V. All rights reserved.',
                                    'Copyright © 2015 The Authors. Published by Elsevier Ltd.'])
@pytest.mark.parametrize('text', ['Orthoconic walls carry sound in each direction.', 'DNA repair is fast in the cold of winter.', ABSTRACT])
def test_headings_and_rights_before_an_abstract_are_cut_off_even_without_punctuation(before, text):
    assert _apply_rules(before + text)[0] == text


@pytest.mark.parametrize('name', rules)
def test_a_rule_that_is_switched_off_does_nothing(name):
    record = dict(id='1', title='', text='\n'.join(f'{ABSTRACT}\n{before}' for before, _ in CHANGED[name]))
    assert name in clean(record).touched and name not in clean(record, [name]).touched


@pytest.mark.parametrize('name,text', [
    ('placeholder', 'No abstract available.'), ('placeholder', 'N/A'), ('placeholder', '[No abstract provided]'),
    ('placeholder', 'Аннотация отсутствует.'),
    ('placeholder', 'This paper has been withdrawn by the author due to a crucial error in equation 3, which makes Theorem 2 wrong.'),
    ('placeholder', 'Withdrawn.'), ('placeholder', 'Статья отозвана авторами.'), ('placeholder', '[No abstract]'),
    ('placeholder', 'There is no abstract available for this article.'), ('placeholder', 'Аннотация не предоставлена.'),
    ('placeholder', 'This Article-in-Press has been withdrawn. The Publisher apologizes for any inconvenience this may cause.'),
    ('placeholder', 'WITHDRAWN: this paper had errors in it which we could not mend in any way at all, and we are sorry for them.'),
    ('placeholder', 'The Publisher regrets that this article has been temporarily removed. A replacement will appear as soon as possible.'),
    ('placeholder', 'The above article, published online on 1 May 2001 in a journal, has been retracted by agreement between the editors.'),
    ('placeholder', 'The authors have retracted this article because its figures were used in another paper before by the same authors.'),
    ('placeholder', '[This retracts the article DOI: 10.1155/2021/1234567.].'),
    ('language', 'Wir untersuchen die Ausbreitung der Wärme in festen Körpern und zeigen, dass die Gleichung genau eine Lösung hat.'),
    ('language', '本文研究了固体中的热传导方程，并证明了该方程有唯一解。我们给出了数值方法，并与实验结果进行了比较。'),
    ('short', 'On the flow of heat in solid bodies'), ('short', '1 2 3 4 5 6 7 8 9 10 11 12 heat'), ('short', 'Тепло течёт.'),
    ('symbols', 'table 1.2 | 3.4 | 5.6 | 7.8 | ' * 12), ('symbols', 'heat => {[(&%)]} ;; ' * 12),
    ('repetition', 'Heat flows from warm to cold. ' * 20), ('repetition', f'{ABSTRACT}\n' * 6), ('repetition', f'{WARM} ' * 12)])
def test_filter_objects_with_its_reason(name, text):
    done = clean(dict(id='1', title='Heat', text=text))
    assert done.reason.startswith(f'{name}: ') and len(done.reason) > len(name) + 3
    assert not clean(dict(id='1', title='Heat', text=text), list(filters)).reason
    assert not clean(dict(id='1', title='Heat', text=text), [name]).reason.startswith(name)


@pytest.mark.parametrize('title', ['RETRACTED: Heat', 'Retracted: Heat', '[RETRACTED] Heat', 'RETRACTED ARTICLE: Heat', 'WITHDRAWN: Heat',
                                   'TEMPORARY REMOVAL: Heat', 'Retraction notice to "Heat"', 'Retraction Note: Heat', 'Отозвана: тепло'])
def test_a_paper_whose_title_says_that_it_was_withdrawn_is_left_out(title):
    assert clean(dict(id='1', title=title, text=ABSTRACT)).reason.startswith('placeholder: the title says')


@pytest.mark.parametrize('title', ['Retracted papers: who cites them?', 'Withdrawal of alcohol: a review', 'Retraction of the needle',
                                   'Heat removed: how'])
def test_a_paper_about_withdrawing_is_kept(title): assert clean(dict(id='1', title=title, text=ABSTRACT)).reason == ''


@pytest.mark.parametrize('text', [
    ABSTRACT, f'{WARM} Показано, что скорость этого перехода зависит от разности температур и свойств тела.',
    'No abstract machine is available that computes heat, so we withdraw our claim and build one of brass and steam.',
    'We want to accept 1, 2, and 4 and reject 3 and 5.',
    'The number of rows is n and the number of columns is m, where n is the number of samples.',
    r'Let $X\sim P$ and $Y\sim Q$; then $W_2(P,Q)\le\sqrt{n}$, $\|X\|_\infty<1$ and $f\in L^2(\Omega)$ for every one of them.',
    'Withdrawn drugs were studied in 30 patients over two years, and heat was found to flow from warm patients to cold ones.'])
def test_good_text_is_kept(text):
    assert clean(dict(id='1', title='Heat', text=text)).reason == ''


@pytest.mark.parametrize('code,text', [
    ('en', ABSTRACT), ('en', 'heat'), ('ru', 'тепло'), ('', '$x^2$ = 5'), ('', ''),
    ('ru', f'{WARM} Модель BERT обучена на корпусе Wikipedia с помощью GPU и Python.'),
    ('en', 'gradient descent convergence rates, stochastic convex optimisation, nonsmooth variance reduction: neural networks'),
    ('en', r'$$' + r'\int_0^1 \frac{\partial u}{\partial t} dx = ' * 9 + '0$$ is the heat equation, and we solve it.'),
    ('en', 'The words “тепло” and “холод” are Russian for heat and cold, and this is an English sentence.'),
    ('de', 'Wir untersuchen die Ausbreitung der Wärme in festen Körpern und zeigen, dass die Gleichung genau eine Lösung hat.'),
    ('fr', 'Nous étudions la propagation de la chaleur dans les corps solides et nous montrons que l’équation a une seule solution.'),
    ('es', 'Estudiamos la propagación del calor en los cuerpos sólidos y mostramos que la ecuación tiene una única solución para todos.'),
    ('nl', 'Wij bestuderen de verspreiding van warmte in vaste lichamen en wij tonen aan dat de vergelijking precies een oplossing heeft.'),
    ('uk', 'У роботі показано, що тепло переходить від теплих тіл до холодних, і що рівняння має єдиний розв’язок.'),
    ('bg', 'В работата е показано, че топлината преминава от топлите тела към студените и че уравнението има точно едно решение.'),
    ('sr', 'У раду је показано да топлота прелази са топлих тела на хладна, и да једначина има тачно једно решење за свако тело.'),
    ('zh', '本文研究了固体中的热传导方程，并证明了该方程有唯一解。')])
def test_language(code, text):
    assert _language_code(text) == code
    assert language(text) == (code if code in ('en', 'ru', '') else 'other')


def test_every_part_of_a_record_is_cleaned_and_the_given_one_is_not_changed():
    given_record = dict(id='1', title='On \\emph{heat}\nand cold', text=f'Abstract. {ABSTRACT}', lang='', topics=['cs.CL'],
                        keywords=['R\\&D'],
                        tldr='Heat &amp; cold',
                        sections=[dict(title='1 \\emph{Method}', text='CO<sub>2</sub>'), dict(title='7. References', text='[1]'),
                                                          dict(title='Благодарности', text='Спасибо.')])
    before = copy.deepcopy(given_record)
    done = clean(given_record)
    assert given_record == before
    assert done.record == dict(id='1', title='On heat and cold', text=ABSTRACT, lang='en', topics=['cs.CL'], keywords=['R&D'],
                               tldr='Heat & cold',
                               sections=[dict(title='1 Method', text='CO2')])
    assert done.touched == ['entities', 'tags', 'latex', 'references', 'line_breaks', 'boilerplate'] and done.reason == ''
    assert len(clean(given_record, ['references']).record['sections']) == 3


def test_a_record_with_only_the_old_fields_is_enough():
    assert clean(dict(id='1', title='', text=ABSTRACT)).record == dict(id='1', title='', text=ABSTRACT, lang='en')


def test_a_record_whose_text_is_in_its_sections_is_kept():
    assert clean(dict(id='1', title='Heat', text='', sections=[dict(title='', text=ABSTRACT)])).reason == ''


@pytest.mark.parametrize('name,near', [('boilerplates', 'boilerplate'), ('linebreaks', 'line_breaks'), ('lang', 'language')])
def test_an_unknown_name_is_refused_and_the_nearest_named(name, near):
    for refuse in (lambda: clean(dict(id='1', title='', text=ABSTRACT), [name]), lambda: without_rules([name])):
        with pytest.raises(InputError, match=f"'{name}'.*'{near}'"): refuse()
    assert without_rules(['latex', 'short']) == {'latex', 'short'} and without_rules('latex') == {'latex'}


def test_rules_and_filters_have_different_names(): assert not rules.keys() & filters.keys()


def test_counts_of_rules_on_a_small_corpus():
    records = [dict(id=f'{name}{n}', title='', text=f'{before}') for name, pairs in CHANGED.items() for n, (before, _) in enumerate(pairs)]
    for name, pairs in CHANGED.items(): assert sum(name in clean(r).touched for r in records) >= len(pairs)


PIECES = st.sampled_from(sorted({text for pairs in CHANGED.values() for pair in pairs for text in pair}
                                | {text for texts in KEPT.values() for text in texts})
                         + list('${}\\~-&<>%\n .') + ['\\(', '\\)', '$$', '\\emph{', '\\cite{a}', '``', "''", '\U000f0000', '\x00',
                                                      '\ud800', 'References\n'])
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=7).map(''.join), st.lists(PIECES, max_size=6).map(' '.join))


@settings(max_examples=400)
@given(TEXTS)
def test_cleaning_what_is_clean_changes_nothing_and_nothing_raises(text):
    done = clean(dict(id='1', title=text, text=text, sections=[dict(title='', text=text)]))
    again = clean(done.record)
    assert again.record == done.record and again.touched == [] and again.reason == done.reason


@settings(max_examples=200)
@given(st.text(alphabet='abxyzMN0123456789+-=<>()[]|\'!,.:;/~% ^_{}', min_size=1,
               max_size=30).filter(lambda s: '  ' not in s and s.strip()),
       st.sampled_from([r'$\alpha {}$', r'\({}\)', '$$x {}$$', r'\begin{{align}}{}\end{{align}}', r'\[{}\]',
                        r'$\emph{{x}} ``{}'r' -- \cite{{a}}$']),
       st.sampled_from(['{} holds', 'We show \\emph{{that}} {} and <i>so</i> on', 'Показано, что\u00a0{} \\% верно',
                        'a &amp; b: {}. © 2019 Elsevier.']))
def test_mathematics_survives_to_the_letter(inner, form, around):
    formula = form.format(inner.strip())
    assert formula in _apply_rules(around.format(formula))[0]


@pytest.mark.parametrize('text',
                         ['\\' * 5000, '$' * 5001, '{' * 5000, '<' * 5000, '&amp;' * 3000, '-' * 5000, 'a-\n' * 3000, "''" * 3000,
                          '``a' * 3000, '\\emph{' * 2000, ' © 2019' * 1000, '\n12' * 3000, '~' * 5000, '[1] ' * 2000, '$a' * 3000,
                          '\\(' * 2000, '<!--' * 1000, '<math>' * 2000, '<sup>' * 2000, 'ﬁ ' * 3000, 'Copyright of ' * 500,
                          '(c) 2001 A ' * 500,
                          '\\SI{' * 2000, '(Contains 1 table, ' * 500])
def test_no_text_takes_forever(text):
    "No pattern may backtrack without end: such a text takes hours or an instant, so a minute of the processor tells them apart."
    import time
    start = time.process_time()
    clean(dict(id='1', title='', text=text))
    assert time.process_time() - start < 60


def test_importing_the_module_loads_no_heavy_library(root):
    import subprocess
    import sys
    program = 'import sys, scilm_adapt.cleaning as c; print(sorted({"ftfy", "pylatexenc", "py3langid", "torch"} & sys.modules.keys()))'
    assert subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_own_rules_can_be_added(monkeypatch):
    monkeypatch.setitem(cleaning.rules, 'shout', lambda text: re.sub('heat', 'HEAT', text))
    assert clean(dict(id='1', title='', text=ABSTRACT)).touched == ['shout']
