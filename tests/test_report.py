"""The report: what it writes, that its words follow the numbers, that it can be read by others, and that nothing leaks."""
import base64
import html.parser
import json
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard

from scilm_adapt import files, report, runs
from scilm_adapt.evaluate import metrics, summarise
from scilm_adapt.files import read_json, write_json
from scilm_adapt.intervals import Metric
from scilm_adapt.models import load, tiny, weights_hash
from scilm_adapt.papers import Corpus
from scilm_adapt.runs import Run

NAMES = ('base', 'contrast', 'distilled', 'teacher')
HOSTILE = '</dd><script>alert(1)</script>\n```\n# heading\n| a | b |\n<img src=x onerror=alert(1)>'
SECRET = '/' + 'home/somebody/secret'     # in two parts, because the project's own files name no home folder
CONFIG = dict(student=f'{SECRET}/student', teacher='org/teacher-1b', papers='~/texts/papers.jsonl', general='../general.csv',
              seed=3, title_field='')


def invented(gain: float = 0.1, names: tuple = NAMES, size: int = 60, answer: str = 'An answer.', unasked: str = '') -> dict:
    "A result of `compare` in which each model takes `gain` nats per byte off the one before; `unasked` is one that cannot be asked."
    draw = np.random.default_rng(0)
    sizes = draw.lognormal(6, 0.5, size).round()
    answered = {name: [dict(question='What?', reference='The reference.', answer=answer, stopped=bool((n + stage) % 3))
                       for n in range(size)] for stage, name in enumerate(names)}
    rows = dict(stop_rate={name: [[float(one['stopped']) for one in said], [1.0]*size] for name, said in answered.items()})
    for metric in ('science_bpb', 'general_bpb', 'answer_bpb'):
        rate = draw.gamma(60, 1.4/60, size)
        rows[metric] = {name: [(sizes*(rate - gain*stage + draw.normal(0, 0.02, size))).tolist(), (math.log(2)*sizes).tolist()]
                        for stage, name in enumerate(names)}
    if 'letters' in metrics: rows['letters'] = {name: [[9.0 + stage]*size, [1.0]*size] for stage, name in enumerate(names)}
    if unasked:
        for metric in ('answer_bpb', 'stop_rate'): rows[metric][unasked] = None
        answered[unasked] = []
    measured = dict(params={name: 1_865_120 if name != 'teacher' else 5_721_344 for name in names}, rows=rows,
                    ids=dict.fromkeys(('science', 'general', 'answers'), list(range(size))))
    return summarise(measured) | dict(generations={name: said[:10] for name, said in answered.items() if said})


@pytest.fixture
def run(tmp_path) -> Run:
    "A run with two trained models' histories, one of them with a value that was not finite."
    run = Run(tmp_path/'somebody'/'run')
    run.seconds.update({'corpus': 1.5, 'models/contrast': 60.0})
    for name, parts in dict(contrast=('lm', 'pairs'), distilled=('distil', 'retention')).items():
        rows = [dict(step=n, loss=5 - n/10, **{part: 2 - n/10 for part in parts}, learning_rate=1e-3, grad_norm=1.0, tokens_per_second=9.0)
                for n in range(20)]
        rows[7][parts[0]] = None
        write_json(run.folder/'models'/name/'history.json', rows)
    return run


@pytest.fixture
def corpus(run) -> Corpus:
    "A corpus of which only the report exists."
    counts = dict(read=10, kept=9, duplicates=1, train=7, valid=1, test=1)
    write_json(run.folder/'corpus'/'report.json', dict(science=dict(source=f'{SECRET}/papers.jsonl', **counts),
                                                       general=dict(source='../general.csv', **counts)))
    return Corpus({}, {}, run.folder/'corpus')


# --- words follow numbers

def test_table_shows_values_with_their_intervals():
    result = invented()
    shown = report.table(result)
    assert list(shown.index) == list(NAMES)
    assert list(shown.columns) == ['parameters', 'science', 'general text', 'answers', 'answers that end']
    interval = result['models']['distilled']['answer_bpb']
    assert shown.answers['distilled'] == f"{interval['value']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"
    assert shown.parameters['teacher'] == '5.72 M'


@pytest.mark.parametrize('gain, said', [(0.1, {'shown', 'shown: even better'}), (-0.1, {'the opposite is shown', 'a loss is shown'})])
def test_promises_follow_the_differences(gain, said):
    result = invented(gain)
    result['differences'] = [d for d in result['differences'] if d['metric'] != 'stop_rate' and d['against'] != 'teacher']
    assert set(report.promises(result)['this run']) == said


def test_what_is_not_shown_is_said_so():
    result = invented()
    for difference in result['differences']: difference.update(value=0.001, low=-0.01, high=0.012, verdict='open')
    assert set(report.promises(result)['this run']) == {'not shown', 'no loss is shown'}
    assert '0 show an improvement, 0 show a loss, and 16 show neither' in report._tally(result)
    assert report._before_after_caption(result).count('(not shown)') == 4
    assert 'a difference is not shown' in report._size_caption(result)


def test_limits_name_every_loss_and_small_models():
    result = invented(-0.1)
    found = ' '.join(report._limits('distilled', result, CONFIG))
    assert 'Science: distilled reads science at' in found and 'worse, shown' in found and '1.87 M parameters' in found and 'seed 3' in found
    large = invented(0.1)
    large['models']['distilled'].update(params=2_000_000_000, stop_rate=dict(value=1.0, low=0.97, high=1.0))
    assert 'nonsense' not in ' '.join(report._limits('distilled', large, CONFIG)) and len(report._limits('base', large, CONFIG)) >= 2


def test_loss_caption_states_the_fall_and_survives_a_missing_value(run):
    caption = report._loss_caption(run, 'contrast')
    assert '20 steps' in caption and 'loss from 4.95 to 3.15' in caption
    assert 'titles told apart (nats per pair) from 1.95 to 0.15' in caption
    assert math.isnan(report._read_history(run, 'contrast')['lm'][7])


# --- figures

@pytest.mark.parametrize('names', [NAMES, ('base', 'teacher'), ('distilled',), ('mine', 'other')])
def test_figures_are_drawn_for_any_models(names):
    result = invented(names=names)
    assert set(report._long_form(result).columns) == {'model', 'params', 'metric', 'value', 'low', 'high'}
    for draw in (report.before_after, report.quality_against_size):
        figure = draw(result)
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert labels == list(names)
        plt.close(figure)
    assert report._size_caption(result) and report._before_after_caption(result) and len(report.promises(result)) in (0, 8)


def test_loss_curves_have_a_panel_for_each_part(run):
    figure = report.loss_curves(run, 'distilled')
    assert [ax.get_title(loc='left') for ax in figure.axes] == [report._PARTS[part] for part in ('loss', 'distil', 'retention')]
    plt.close(figure)


def test_an_only_part_is_shown_once(run):
    write_json(run.folder/'models'/'alone'/'history.json', [dict(step=n, loss=4.0 - n, lm=4.0 - n, learning_rate=0.1) for n in range(3)])
    figure = report.loss_curves(run, 'alone')
    assert [ax.get_title(loc='left') for ax in figure.axes] == [report._PARTS['lm']]
    plt.close(figure)


# --- what leaves the machine

@pytest.mark.parametrize('value, told', [
    (f'{SECRET}/papers.jsonl', 'papers.jsonl'), ('~/papers.jsonl', 'papers.jsonl'), ('C:\\Users\\somebody\\a.csv', 'a.csv'),
    ('/data/x/', 'x'), (f'../..{SECRET}/a.csv', 'a.csv'),
    ('../texts/a.csv', '../texts/a.csv'), ('org/model', 'org/model'), ('zoo:student', 'zoo:student'),
    ('', ''), (3, 3), (None, None),
    (f'{SECRET}/one {SECRET}/two', 'one two'), (f'org/model {SECRET}/two', 'org/model two'),
    ('C:\\x\\my texts.csv', 'my texts.csv'),
    (f'{SECRET}/my texts/a b.csv', 'a b.csv'), ('heat / light', 'heat / light'),
    ([1, '/a/b'], [1, 'b']), (dict(a=dict(b='/c/d')), dict(a=dict(b='d')))])
def test_public_cuts_paths_and_nothing_else(value, told): assert report._public(value) == told


def test_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'outputs'/'model').mkdir(parents=True)
    assert report._hub_name('org/model-1.7B') == 'org/model-1.7B'
    assert [report._hub_name(name) for name in ('zoo:student', 'outputs/model', '/a/b', '../x', 'gpt2')] == [None]*5


# --- publishing

class Page(html.parser.HTMLParser):
    "The tags and the text of a page."
    def __init__(self, source: str):
        super().__init__()
        self.tags, self.words, self.sources = [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ('src', 'href')]
        assert not any(name.startswith('on') for name, _ in attrs)

    def handle_data(self, data): self.words.append(data)


def test_publish_writes_the_public_form(run, corpus, capsys):
    result = invented()
    path = report.publish(run, result, CONFIG, corpus)
    assert path == run.folder/'metrics.json'
    metrics = read_json(path)
    assert {'models', 'config', 'versions', 'seconds'} <= metrics.keys()
    assert metrics['models'] == result['models'] and metrics['seconds'] == {'corpus': 1.5, 'models/contrast': 60.0}
    for values in metrics['models'].values():
        assert isinstance(values['params'], int)
        for name in ('science_bpb', 'general_bpb', 'answer_bpb', 'stop_rate'): assert values[name].keys() == {'value', 'low', 'high'}
    assert metrics['config'] == dict(CONFIG, student='student', papers='papers.jsonl')
    assert metrics['versions'].keys() >= {'python', 'torch', 'scilm_adapt'}
    out = capsys.readouterr().out
    for expected in (report.table(result).to_markdown(), 'report.html', 'metrics.json', 'run.ipynb', 'models'): assert expected in out
    assert not plt.get_fignums()


def test_nothing_of_the_machine_is_told(run, corpus):
    report.publish(run, invented(), CONFIG, corpus)
    for path in run.folder.rglob('*'):
        if path.is_file() and 'corpus' not in path.relative_to(run.folder).parts:
            assert b'somebody' not in path.read_bytes() and b'secret' not in path.read_bytes(), path.name


def test_page_is_self_contained_and_cannot_be_broken_by_answers(run, corpus):
    report.publish(run, invented(answer=HOSTILE), CONFIG, corpus)
    page = Page((run.folder/'report.html').read_text())
    assert 'script' not in page.tags and page.tags.count('img') == 4 and page.tags.count('details') == 10
    assert all(source.startswith('data:image/png;base64,') for source in page.sources)
    assert all(base64.b64decode(source.split(',')[1]).startswith(b'\x89PNG') for source in page.sources)
    assert HOSTILE in page.words
    markdown = (run.folder/'report.md').read_text()
    assert not re.search(r'^(# heading|```|<img|</dd>)', markdown, re.MULTILINE)
    for name in re.findall(r'\]\((figures/[^)]+)\)', markdown): assert (run.folder/name).is_file()


def test_general_questions_follow_those_about_papers(run, corpus):
    said = {name: [dict(question=f'General {n}?', reference='R', answer=f'{name} {n}', stopped=bool(n)) for n in range(2)]
            for name in NAMES}
    report.publish(run, invented() | dict(conversed=said), CONFIG, corpus)
    page = Page((run.folder/'report.html').read_text())
    words = ' '.join(page.words)
    assert page.tags.count('details') == 12 and 'To the first 2 general questions' in words and 'distilled 1' in words
    kept = read_json(run.folder/'metrics.json')
    assert [len(kept[part]['teacher']) for part in ('generations', 'conversed')] == [3, 2]


def test_models_are_quoted_side_by_side():
    said = {name: [dict(question='What *is* $x$?\n\n# Heat', reference='R', answer=text, stopped=bool(text))] for name, text in
            dict(base='', teacher='<b>It flows</b>\n- | a_b').items()}
    assert report.side_by_side(dict(generations=said, conversed=said)).splitlines() == [
        r'> What \*is\* \$x\$? \# Heat', '', '- **base**: (nothing) *(cut off)*', r'- **teacher**: \<b\>It flows\</b\> - \| a\_b', '',
        r'> What \*is\* \$x\$? \# Heat', '', '- **base**: (nothing) *(cut off)*', r'- **teacher**: \<b\>It flows\</b\> - \| a\_b']
    assert report.side_by_side({}) == ''
    long = dict(base=[dict(question='word '*500, reference='', answer='word '*500, stopped=True)]*5)
    assert len(report.side_by_side(dict(generations=long), 2).splitlines()) == 7
    assert len(report.side_by_side(dict(generations=long), 1)) < 900


def test_cards_are_valid_and_say_what_is_known(run, corpus):
    run_config = dict(CONFIG, student='org/student-100m', papers='installed-docs')
    report.publish(run, invented(), run_config, corpus)
    assert not (run.folder/'models'/'base').exists()      # a model that is not there gets no card
    card = ModelCard.load(run.folder/'models'/'distilled'/'README.md')
    assert card.data.base_model == 'org/student-100m' and card.data.language == 'en' and card.data.library_name == 'transformers'
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert len(results) == 4 and results['installed-docs: science', 'bits_per_byte'] > 0
    for heading in ('Numbers', 'Limits', 'Data', 'How to load it', 'Licence'): assert f'\n## {heading}\n' in card.text
    assert "from_pretrained('models/distilled')" in card.text
    header = yaml.safe_load((run.folder/'models'/'contrast'/'README.md').read_text().split('---')[1])
    assert header['model-index'][0]['results'] and header['tags'] == ['science', 'scilm_adapt', 'contrast']


def test_publishing_again_replaces_everything(run, corpus):
    report.publish(run, invented(), CONFIG, corpus)
    first = (run.folder/'report.md').read_text()
    report.publish(run, invented(-0.1), CONFIG, corpus)
    assert (run.folder/'report.md').read_text() != first
    assert {p.name for p in run.folder.rglob('.*')} <= {runs._LOCK, runs._HOLDER, files._LEDGER, '.verified.json'}


def test_metrics_come_last(run, corpus, monkeypatch):
    def fail(*arguments): raise RuntimeError('no card')
    monkeypatch.setattr(report, 'model_card', fail)
    with pytest.raises(RuntimeError, match='no card'): report.publish(run, invented(), CONFIG, corpus)
    assert not (run.folder/'metrics.json').exists() and not plt.get_fignums()


def test_a_number_that_is_none_is_not_published(run, corpus):
    result = invented()
    result['models']['base']['science_bpb']['value'] = math.nan
    with pytest.raises(ValueError): report.publish(run, result, CONFIG, corpus)
    assert not (run.folder/'metrics.json').exists()


def test_keep_copies_a_model_once_and_survives_its_card(run, corpus, capsys):
    lm = tiny()
    folder = report.keep(run, lm, 'base')
    again = load(folder, device='cpu')
    assert folder == run.folder/'models'/'base' and weights_hash(again.model) == weights_hash(lm.model)
    assert again.tokenizer.chat_template == lm.tokenizer.chat_template
    report.publish(run, invented(), CONFIG, corpus)
    assert (folder/'README.md').is_file()
    report.keep(run, lm, 'base')
    assert 'kept' in capsys.readouterr().out and (folder/'README.md').is_file()
    report.keep(run, tiny(seed=1), 'base')
    assert weights_hash(load(folder, device='cpu').model) != weights_hash(lm.model)


def test_blocks_have_both_forms(tmp_path):
    (tmp_path/'figures').mkdir()
    (tmp_path/'figures'/'f.png').write_bytes(b'png')
    said = dict(question='q', reference='r', answer='', stopped=False)
    blocks = [('heading', 'A < B', 1), ('text', 'x & y'), ('items', ['one', 'two']), ('table', pd.DataFrame(dict(a=[1]))),
              ('figure', 'f', 'a "caption"'), ('answers', 1, said, dict(base=said))]
    page, text = report.to_html(blocks, tmp_path, 'T'), report.to_markdown(blocks)
    assert {kind for kind, *_ in blocks} == report.markdown.keys() == report._html_blocks(tmp_path).keys()
    assert '<h1>A &lt; B</h1>' in page and 'alt="a &quot;caption&quot;"' in page and 'base (cut off)' in page and '(nothing)' in page
    assert text.startswith('# A < B\n\nx & y\n\n- one\n- two\n\n|') and '![a "caption"](figures/f.png)' in text and '    (nothing)' in text
    json.dumps(report.machine())


# --- other metrics, other models

LETTERS = Metric('letters', 'Length: {model} writes {value} letters', 'answers', lambda subject: None, 'letters', 'letters of an answer',
                 'Letters: counted.',
                 caution=lambda interval: f"It writes {interval['value']:.0f} letters." if interval['value'] > 10 else '')


def test_a_metric_that_is_added_stands_everywhere(run, corpus, monkeypatch):
    monkeypatch.setitem(metrics, 'letters', LETTERS)
    result = invented()
    assert report.table(result).letters['distilled'] == '11.00 [11.00, 11.00]'
    assert report.table_note(result).endswith('(more is better), and letters of an answer (fewer is better); in brackets 95 % intervals.')
    figure = report.before_after(result)
    assert [ax.get_xlabel() for ax in figure.axes] == ['bits per byte (fewer is better)', 'share (more is better)',
                                                       'letters (fewer is better)']
    plt.close(figure)
    assert 'letters +2.000' in report._before_after_caption(result)
    report.publish(run, result, CONFIG, corpus)
    text = (run.folder/'report.md').read_text()
    for expected in ('Length: distilled writes 11.00 letters against 9.00 of base: worse, shown', 'Letters: counted.', '| letters '):
        assert expected in text, expected
    card = ModelCard.load(run.folder/'models'/'distilled'/'README.md')
    assert ('letters', 11.0) in {(one.metric_type, one.metric_value) for one in card.data.eval_results}
    assert '- It writes 11 letters.' in card.text and 'Length: distilled writes 11.00 letters' in card.text
    assert read_json(run.folder/'metrics.json')['models']['base']['letters']['value'] == 9
    monkeypatch.delitem(metrics, 'letters')  # and a result of before has its own columns only
    assert 'letters' not in report.table(invented()).columns


def test_references_stand_in_tables_figures_and_captions(run, corpus):
    result = invented(names=(*NAMES, 'larger', 'plain'), unasked='plain')
    shown = report.table(result)
    assert list(shown.index) == [*NAMES, 'larger', 'plain'] and shown.answers['plain'] == shown['answers that end']['plain'] == '—'
    assert report.table_note(result).endswith('A dash is what could not be measured.')
    for draw in (report.before_after, report.quality_against_size):
        figure = draw(result)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == list(shown.index)
        plt.close(figure)
    assert 'distilled has 100% of the parameters of larger: science ' in report._size_caption(result)
    assert 'of plain: science ' in report._size_caption(result) and len(report.promises(result)) == 8
    (run.folder/'models'/'larger').mkdir(parents=True)
    report.publish(run, result, CONFIG, corpus)
    assert not (run.folder/'models'/'larger'/'README.md').exists()  # a model that is not of this run gets no card of it
    text = (run.folder/'report.md').read_text()
    assert 'Science: distilled reads science at' in text and 'of larger: ' in text and '\nplain (cut off):' not in text
    assert text.count('\nlarger:') + text.count('\nlarger (cut off):') == 10
    assert any(line.startswith('| larger ') for line in (run.folder/'models'/'distilled'/'README.md').read_text().splitlines())


def test_a_line_leads_through_the_states_of_the_student_only():
    result = invented(names=('teacher', 'base', 'larger', 'distilled'))
    figure, ax = plt.subplots()
    report._dumbbell(ax, result, {'science_bpb': metrics['science_bpb']})
    way = ax.get_lines()[0].get_xdata()
    assert list(way) == [result['models'][name]['science_bpb']['value'] for name in ('base', 'distilled')]
    plt.close(figure)


@pytest.mark.parametrize(('parts', 'said'), [
    (('lm',), 'by language modelling alone.'), (('lm', 'token'), 'by language modelling, and by pushing the tokens of a text apart.'),
    (('lm', 'pairs', 'preference'), 'and by telling which texts belong together and by telling how papers go on from how they do not.')])
def test_a_card_says_what_stage_1_was_trained_by(run, corpus, parts, said):
    rows = [dict(step=n, loss=3.0, **dict.fromkeys(parts, 1.0), learning_rate=0.1) for n in range(3)]
    write_json(run.folder/'models'/'contrast'/'history.json', rows)
    assert said in report.model_card(run, 'contrast', invented(), CONFIG, corpus)


def test_a_card_says_whether_there_was_a_teacher(run, corpus):
    assert 'then distilled from an aligned teacher on questions' in report.model_card(run, 'distilled', invented(), CONFIG, corpus)
    write_json(run.folder/'models'/'distilled'/'history.json', [dict(step=n, loss=2.0, answers=1.0, retention=2.0) for n in range(3)])
    assert 'then taught the answers to questions made' in report.model_card(run, 'distilled', invented(), CONFIG, corpus)


def test_what_only_the_teacher_has_a_number_of_is_not_shown():
    result = invented()
    for name, values in result['models'].items(): values['teacher_kl'] = dict(value=0.0, low=0.0, high=0.0) if name == 'teacher' else None
    title = metrics['teacher_kl'].title
    assert title not in report.table(result) and title not in str(report.before_after(result).axes[-1].get_yticklabels())
    result['models']['distilled']['teacher_kl'] = dict(value=0.5, low=0.4, high=0.6)
    assert title in report.table(result)
    result['models']['teacher']['teacher_kl'] = None
    assert title in report.table(result)                              # what one other model alone has is shown


def test_the_numbers_of_an_earlier_run_are_still_read(root):
    shown = read_json(root/'nbs'/'results'/'quickstart.json')
    later = {'general_answers', 'teacher_kl', 'agreement'}  # what is measured of general conversations came later, as did who is compared
    for about in shown['models'].values(): [about.pop(name) for name in later]
    shown['differences'] = [found for found in shown['differences'] if found['metric'] not in later]
    shown.pop('compared')
    assert list(report.table(shown).index) == list(NAMES) and len(report.promises(shown)) == 8
    assert report.table_note(shown) == ('Bits per byte of held-out texts (fewer is better), and the share of answers that end by '
                                        'themselves (more is better); in brackets 95 % intervals.')
