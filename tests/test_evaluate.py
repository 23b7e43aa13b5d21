"""Evaluation against naive loops, closed forms and simulation, and the honesty of its statements."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from scilm_adapt import evaluate, generate
from scilm_adapt.decoding import DECODERS, repetition
from scilm_adapt.duplicates import fingerprint
from scilm_adapt.errors import InputError
from scilm_adapt.evaluate import (
    Compared,
    _document_bits,
    _pairs_of,
    _reference_names,
    answers_of,
    bits_per_byte,
    compare,
    compare_seeds,
    finding,
    findings,
    lineup,
    measure,
    metrics,
    metrics_for,
    one_per_paper,
    references,
    related_items,
    seeds_table,
    summarise,
    title_terms,
    writing_metrics,
    written,
)
from scilm_adapt.files import read_json
from scilm_adapt.generate import answer_bits
from scilm_adapt.instruct import Chats
from scilm_adapt.intervals import Metric, Subject, _verdict, seeds_interval, signed
from scilm_adapt.models import LanguageModel, build, save, tiny
from scilm_adapt.papers import Corpus
from scilm_adapt.related import brief, prepare
from scilm_adapt.runs import Run
from scilm_adapt.tokens import document_ends, encode, encode_chat, pack

TEXTS = ['Heat flows from warm bodies to cold ones.', 'Light is a wave, and light is a particle: both of them at once.',
         'Тепло переходит к холодному.', 'A token <|im_end|> in a text is content.', 'x',
         ' '.join(f'The {n}th power of a matrix commutes with it.' for n in range(12))]
TOLERANCE = 1e-10  # of sums of a few hundred numbers in 64 bits, taken in another order: that of packed rows


def chat(number: int, question: str, reference: str) -> dict:
    "A conversation as instruct makes it; the answer in it is another than the paper's."
    return dict(paper_id=f'p{number}', kind='title', reference=reference, author='teacher',
                messages=[dict(role='user', content=question), dict(role='assistant', content='Never read by evaluation.')])


CHATS = [chat(n, f'What does {text.split()[0]} do?', text) for n, text in enumerate(TEXTS)]


@pytest.fixture(scope='module', params=['llama', 'gpt2'])
def lm(request) -> LanguageModel:
    "A tiny model in float64 with a context of 48 tokens, shorter than the longest text."
    lm = tiny(TEXTS, request.param, context=48)
    lm.model.double()
    return lm


def plain_nats(lm: LanguageModel, ids: list[int], counted: range) -> float:
    "Nats of the tokens at the places `counted`, window by window and token by token, without packing."
    total = 0.0
    for at in range(0, len(ids) - 1, lm.context - 1):
        window = ids[at:at + lm.context]
        with torch.no_grad(): log_probabilities = lm.model(torch.tensor([window]), use_cache=False).logits[0].log_softmax(-1)
        total -= sum(log_probabilities[t, window[t + 1]].item() for t in range(len(window) - 1) if at + t + 1 in counted)
    return total


# --- what is measured

@pytest.mark.parametrize('context', [48, 17, 512])
def test_document_bits_equal_a_plain_loop(lm, context):
    start, _ = document_ends(lm.tokenizer)
    nats, sizes = _document_bits(lm, TEXTS, context)
    short = LanguageModel(lm.model, lm.tokenizer, 'short')
    for text, value, size in zip(TEXTS, nats, sizes, strict=True):
        ids = [start, *encode(lm.tokenizer, text)]
        if context >= lm.context: assert value == pytest.approx(plain_nats(short, ids, range(1, len(ids))), rel=TOLERANCE)
        assert size == len(text.encode())


def test_windows_predict_every_token_once():
    for size in range(2, 40):
        for length in (2, 3, 7, 50):
            packed = pack([list(range(size))], length)
            assert sorted(packed.input_ids[packed.loss_mask]) == list(range(1, size))


@pytest.mark.parametrize('chosen', CHATS, ids=lambda c: c['paper_id'])
def test_answer_bits_count_the_reference_and_nothing_else(lm, chosen):
    tokenizer = lm.tokenizer
    before = tokenizer(f"<|im_start|>user\n{chosen['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n",
                       add_special_tokens=False)['input_ids']
    answer, after = encode(tokenizer, chosen['reference']), tokenizer('<|im_end|>\n', add_special_tokens=False)['input_ids']
    nats, sizes = answer_bits(lm, [chosen])
    expected = plain_nats(lm, before + answer + after, range(len(before), len(before) + len(answer)))
    assert nats[0] == pytest.approx(expected, rel=TOLERANCE)
    assert sizes[0] == len(chosen['reference'].encode())


def test_uniform_model_costs_the_logarithm_of_the_vocabulary():
    lm = tiny(TEXTS)
    with torch.no_grad(): lm.model.get_output_embeddings().weight.zero_()
    nats, _ = _document_bits(lm, TEXTS)
    assert np.allclose(nats, [len(encode(lm.tokenizer, text))*math.log(len(lm.tokenizer)) for text in TEXTS])


def test_bits_per_byte_is_a_ratio_of_sums():
    assert bits_per_byte([8*math.log(2)], [1]) == pytest.approx(8)
    assert bits_per_byte([math.log(2), 9*math.log(2)], [1, 1]) == pytest.approx(5)
    assert bits_per_byte([math.log(2), 9*math.log(2)], [1, 99]) == pytest.approx(0.1)   # not the mean of 1 and 1/11


# --- what is said

def invented(gain: float, size: int = 120, names: tuple = ('base', 'contrast', 'distilled', 'teacher')) -> dict:
    "Raw numbers of base, contrast, distilled and teacher; `gain` is what every stage takes off the nats of every text."
    draw = np.random.default_rng(0)
    sizes = math.log(2)*draw.lognormal(6, 0.5, size)
    rows = dict(stop_rate={name: [[float(n % 2) for n in range(size)], [1.0]*size] for name in names})
    for metric in ('science_bpb', 'general_bpb', 'answer_bpb'):
        rate = draw.gamma(40, 1.4/40, size)
        rows[metric] = {name: [(sizes*(rate - gain*stage + draw.normal(0, 0.05, size))).tolist(), sizes.tolist()]
                        for stage, name in enumerate(names)}
    return dict(ids=dict.fromkeys(('science', 'general', 'answers'), list(range(size))), params=dict.fromkeys(names, 1000), rows=rows,
                answered={name: [] for name in names})


@pytest.mark.parametrize('gain, expected', [(0.1, 'better'), (0.0, 'open'), (-0.1, 'worse')])
def test_verdicts_follow_the_numbers(gain, expected):
    result = summarise(invented(gain))
    bits = [d for d in result['differences'] if d['metric'] != 'stop_rate' and d['against'] != 'teacher']
    # without a gain, nine intervals of 95 % are asked
    assert sum(d['verdict'] == expected for d in bits) >= (len(bits) if gain else len(bits) - 2)
    words = dict(better='better, shown', worse='worse, shown', open='a difference is not shown')
    sentences = findings(result)
    assert len(sentences) == len(result['differences']) == 16
    for difference in result['differences']: assert words[difference['verdict']] in finding(result, difference)


def test_a_sentence_in_full():
    result = dict(models=dict(base=dict(science_bpb=dict(value=2.02)), distilled=dict(science_bpb=dict(value=1.72))))
    difference = dict(metric='science_bpb', model='distilled', against='base', value=-0.30, low=-0.31, high=-0.28, verdict='better')
    assert finding(result, difference) == ('Science: distilled reads science at 1.72 bits per byte against 2.02 of base: better, shown '
                                           '(difference −0.300 [−0.310, −0.280]).')


def test_higher_is_better_for_stopping_only():
    assert _verdict(dict(low=0.1, high=0.2)) == 'worse' and _verdict(dict(low=0.1, high=0.2), lower_is_better=False) == 'better'
    assert _verdict(dict(low=-1, high=0)) == 'open'


# --- the stage

@pytest.fixture
def world(tmp_path) -> tuple[Run, Corpus, Chats]:
    "A run folder, a corpus and conversations of the texts above."
    for name in ('corpus', 'chats'): (tmp_path/name).mkdir()
    records = [dict(id=str(n), title='', text=text) for n, text in enumerate(TEXTS)]
    return (Run(tmp_path/'run'), Corpus(dict(test=records), dict(test=records[:3]), tmp_path/'corpus'),
            Chats([], [], [*CHATS, chat(0, 'Again?', 'The same paper again.')], tmp_path/'chats'))


def test_compare_keeps_numbers_from_which_all_can_be_rebuilt(world):
    run, corpus, chats = world
    models = dict(base=tiny(TEXTS), distilled=tiny(TEXTS, seed=1))
    result = compare(run, models, corpus, chats, documents=4, max_new_tokens=4)
    assert result['measured'] == dict(science=4, general=3, answers=len(CHATS))    # one question of each paper
    assert {d['model'] for d in result['differences']} == {'distilled'} and len(result['differences']) == 4
    for values in result['models'].values():
        assert values.keys() == {'params', 'science_bpb', 'general_bpb', 'answer_bpb', 'stop_rate'}
        assert all(v['low'] <= v['value'] <= v['high'] for name, v in values.items() if name != 'params')
    assert [len(answers) for answers in result['generations'].values()] == [len(CHATS)]*2
    assert result['generations']['base'][0].keys() == {'question', 'reference', 'answer', 'stopped'}
    measured = read_json(run.folder/'evaluation'/'measured.json')
    assert summarise(measured) == {k: v for k, v in result.items() if k not in ('generations', 'conversed')}
    assert 'manifest.json' in {p.name for p in (run.folder/'evaluation').iterdir()}
    json.dumps(result, allow_nan=False)


def test_compare_measures_a_changed_model_again(world, capsys):
    run, corpus, chats = world
    models = dict(base=tiny(TEXTS))
    first = compare(run, models, corpus, chats, max_new_tokens=2)
    assert compare(run, models, corpus, chats, max_new_tokens=2) == first and 'kept' in capsys.readouterr().out
    with torch.no_grad(): models['base'].model.get_output_embeddings().weight.mul_(3)
    assert compare(run, models, corpus, chats, max_new_tokens=2)['models'] != first['models']


@pytest.mark.parametrize('damage', [False, True])
def test_a_comparison_that_was_stopped_measures_only_what_is_missing(world, monkeypatch, capsys, damage):
    run, corpus, chats = world
    models = dict(base=tiny(TEXTS), distilled=tiny(TEXTS, seed=1))
    def texts(name): return (Run(run.folder.parent/name).folder/'evaluation'/'measured.json').read_text()
    compare(Run(run.folder.parent/'whole'), models, corpus, chats, max_new_tokens=4)
    real, asked, at = evaluate.document_nats, [], [4]
    def dying(lm, *arguments, **options):
        if len(asked) == at[0]: raise KeyboardInterrupt
        asked.append(options['description'])
        return real(lm, *arguments, **options)
    for module in (evaluate, generate): monkeypatch.setattr(module, 'document_nats', dying)
    with pytest.raises(KeyboardInterrupt): compare(run, models, corpus, chats, max_new_tokens=4)
    assert asked == ['base: science', 'base: general', 'base: reference answers', 'distilled: science']
    parts = sorted((run.folder/'.unfinished').rglob('*science*.json'))
    assert len(parts) == 2 and len([*(run.folder/'.unfinished').rglob('*.json')]) == 6  # four metrics and the answers, and one metric
    if damage:
        whole = parts[0].read_bytes()
        parts[0].write_bytes(whole.replace(b'1', b'2', 1))
    asked.clear(); at[0] = None
    compare(run, models, corpus, chats, max_new_tokens=4)
    assert len(asked) == 2 + damage and texts(run.folder.name) == texts('whole')
    assert (f'{parts[0].name} is not what was written; measured again' in capsys.readouterr().out) == damage
    assert not (run.folder/'.unfinished').exists()


def test_a_broken_model_is_named(world):
    run, corpus, chats = world
    lm = tiny(TEXTS)
    with torch.no_grad(): lm.model.get_output_embeddings().weight.fill_(math.nan)
    models = dict(distilled=lm)
    with pytest.raises(FloatingPointError, match="'distilled': the number of 'science' for item 0 is nan"):
        measure(models, evaluate.test_items(models, corpus, chats), max_new_tokens=2)
    assert not Path(run.folder/'evaluation').exists()


def test_nothing_to_measure_with_is_said(world):
    _, corpus, chats = world
    with pytest.raises(InputError, match='measure general with'):
        evaluate.test_items({}, Corpus(corpus.science, dict(test=[]), corpus.folder), chats, 3, 3, 9)
    with pytest.raises(InputError, match='measure answers with'): evaluate.test_items({}, corpus, Chats([], [], [], chats.folder), 3, 3, 9)
    with pytest.raises(InputError, match='ask for shorter answers'): evaluate.test_items(dict(base=tiny(TEXTS)), corpus, chats, 3, 3, 512)


def test_only_questions_that_leave_every_model_room_are_asked(world):
    _, corpus, chats = world
    long = chat(99, 'Why? '*60, 'Because.')
    models = dict(base=tiny(TEXTS), short=tiny(TEXTS, context=100))
    asked = evaluate.test_items(models, corpus, Chats([], [], [long, *CHATS], chats.folder), 3, 4, 20)['answers']
    assert [c['paper_id'] for c in asked] == ['p0', 'p1', 'p2', 'p3']
    asked = evaluate.test_items(dict(base=models['base']), corpus, Chats([], [], [long], chats.folder), 3, 4, 20)['answers']
    assert asked == [long | dict(id='p99')]


def test_one_question_of_each_paper_in_order():
    asked = one_per_paper([CHATS[1], CHATS[0], CHATS[1] | dict(reference='late'), CHATS[2]])
    assert [c['paper_id'] for c in asked] == ['p1', 'p0', 'p2'] and asked[0]['reference'] == TEXTS[1]


# --- another metric

def letters(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    "How long each answer is."
    lengths = [len(answer['answer']) for answer in answers_of(subject)]
    return lengths, np.ones(len(lengths))


LETTERS = Metric('letters', 'Length: {model} writes {value} letters', 'answers', letters, 'letters', lower_is_better=False)


def test_a_metric_is_added_in_one_place(world, monkeypatch):
    run, corpus, chats = world
    models = dict(base=tiny(TEXTS), distilled=tiny(TEXTS, seed=1))
    before = compare(run, models, corpus, chats, documents=4, max_new_tokens=6)
    monkeypatch.setitem(metrics, 'letters', LETTERS)
    result = compare(run, models, corpus, chats, documents=4, max_new_tokens=6)  # and what was kept without it is measured anew
    for name, values in result['models'].items():
        lengths = [len(answer['answer']) for answer in result['generations'][name]]
        assert values['letters']['value'] == pytest.approx(np.mean(lengths))
        assert {metric: value for metric, value in values.items() if metric != 'letters'} == before['models'][name]
    found = next(d for d in result['differences'] if d['metric'] == 'letters')
    values = [result['models'][name]['letters']['value'] for name in ('distilled', 'base')]
    assert found['value'] == pytest.approx(values[0] - values[1]) and found['against'] == 'base'
    assert findings(result)[-1].startswith(f'Length: distilled writes {values[0]:.2f} letters against {values[1]:.2f} of base: ')


@pytest.mark.parametrize('lower', [True, False])
def test_the_direction_of_a_metric_decides_on_better(lower):
    metric = Metric('x', '', '', letters, lower_is_better=lower)
    few, many = (np.array([np.full(20, value) + np.arange(20)/100, np.ones(20)]) for value in (1.0, 2.0))
    assert metric.difference(few, many)['verdict'] == ('better' if lower else 'worse')
    assert metric.over_seeds([few, few], [many, many])['verdict'] == ('better' if lower else 'worse')
    assert metric.direction == ('fewer is better' if lower else 'more is better')


def test_only_items_that_both_models_have_are_paired():
    metric, sizes = Metric('x', '', '', letters), np.array([1.0, 0, 2, 4])
    one, other = np.array([[3.0, 0, 4, 8], sizes]), np.array([[1.0, 5, 0, 4], [1.0, 1, 0, 4]])
    assert metric.difference(one, other)['value'] == pytest.approx((2 + 4)/5) and metric.interval(one)['value'] == pytest.approx(15/7)
    assert metric.interval(one*0) is None and metric.difference(one, other*0) is None
    with pytest.raises(ValueError, match="denominators of 'x' depend on the model"): metric.difference(one, other*2)


# --- several seeds

def test_a_comparison_over_seeds_is_that_of_its_intervals():
    draw, sizes = np.random.default_rng(0), np.random.default_rng(1).lognormal(6, 0.5, 50)
    def seeds(rate, count=3): return [dict(bits=np.array([sizes*(rate + draw.normal(0, 0.01) + draw.normal(0, 0.05, 50)), sizes]))
                                      for _ in range(count)]
    raw = dict(untrained=seeds(2.0, 1), control=seeds(1.5), lower=seeds(1.3), alike=seeds(1.5))
    bits = dict(bits=Metric('bits', '', 'texts', letters))
    found = compare_seeds(raw, 'control', bits)
    values = [rows['bits'][0].sum()/sizes.sum() for rows in raw['lower']]
    about = found['lower']['bits']
    assert (about['mean'], about['least'], about['largest']) == pytest.approx((np.mean(values), min(values), max(values)))
    expected = seeds_interval(np.stack([one['bits'][0] - other['bits'][0] for one, other in zip(raw['lower'], raw['control'])]), sizes)
    assert about['difference'] == expected | dict(verdict='better')
    assert found['alike']['bits']['difference']['verdict'] == 'open'
    assert found['untrained']['bits']['difference'] is found['control']['bits']['difference'] is None  # one seed, and no other
    told = seeds_table(found, bits)
    low, value, high = (signed(expected[key]) for key in ('low', 'value', 'high'))
    assert told['lower'] == dict(bits=f'{np.mean(values):.3f} ({value} [{low}, {high}] ▲)')
    assert told['control'] == dict(bits=f"{found['control']['bits']['mean']:.3f}") and told['alike']['bits'][-1] == ')'
    upward = seeds_table(compare_seeds(raw, 'control', dict(bits=Metric('bits', '', 'texts', letters, lower_is_better=False))), bits)
    assert upward['lower']['bits'].endswith(' ▼)')


def test_what_a_seed_lacks_is_left_out_for_all_and_what_nobody_has_is_a_dash():
    has = np.array([[1.0, 1, 0], [1, 1, 1]])
    raw = dict(control=[dict(x=np.array([row*2, row])) for row in has], arm=[dict(x=np.array([np.arange(3.0), np.ones(3)]))]*2,
               none=[dict(x=np.zeros((2, 3)))]*2)
    chosen = dict(x=Metric('x', '', '', letters))
    found = compare_seeds(raw, 'control', chosen)
    assert found['arm']['x']['difference']['value'] == pytest.approx((0 + 1)/2 - 2) and found['arm']['x']['mean'] == 1
    assert found['none']['x'] == dict.fromkeys(('mean', 'least', 'largest', 'difference'))
    assert seeds_table(found, chosen)['none'] == dict(x='—')


# --- the models

def test_roles_decide_who_is_compared_with_whom():
    line = lineup(['base', 'contrast', 'distilled', 'teacher', 'one', 'two'])
    assert [one.role for one in line] == ['base', 'contrast', 'distilled', 'teacher', 'reference', 'reference']
    assert len({one.colour for one in line}) == len({one.marker for one in line}) == 6
    assert [(one.name, other.name) for one, other in _pairs_of(line)] == [
        ('contrast', 'base'), ('distilled', 'base'), ('distilled', 'contrast'), ('distilled', 'teacher'), ('distilled', 'one'),
        ('distilled', 'two')]
    given = [Compared('old', 'base', '#000000', 'o'), Compared('new', 'distilled', '#ff0000', 's')]  # as a run may name them
    result = summarise(invented(0.2, names=('old', 'new')), compared=given)
    bits = [d for d in result['differences'] if d['metric'] != 'stop_rate']
    assert {(d['model'], d['against'], d['verdict']) for d in bits} == {('new', 'old', 'better')}


@pytest.mark.parametrize('sources, names', [
    ('org/model other/model zoo:teacher', ['model', 'model 2', 'zoo:teacher']), ('/a/b/model/ a\\b\\large', ['model', 'large']),
    ('org/model org/model', ['model']), ('модель', ['модель']), ('', [])])
def test_references_have_names_of_their_own(sources, names): assert [*_reference_names(sources.split())] == names


def test_a_reference_cannot_have_the_name_of_a_model_of_the_run():
    with pytest.raises(InputError, match="'runs/3/distilled' would be called 'distilled'"): _reference_names(['runs/3/distilled'])
    with pytest.raises(InputError, match='there is no such model folder'): references('./nowhere')


def test_references_stand_beside_the_models_of_a_run(world, tmp_path, capsys):
    run, corpus, chats = world
    plain = tiny(TEXTS, seed=3)
    plain.tokenizer.chat_template = None
    for name, lm in (('larger', tiny(TEXTS, hidden=48, seed=2)), ('plain', plain)): save(lm, tmp_path/name)
    further = references(f"{tmp_path/'larger'} {tmp_path/'plain'}")
    assert [*further] == ['larger', 'plain']
    models = dict(base=tiny(TEXTS), distilled=tiny(TEXTS, seed=1))
    result = compare(run, models | further, corpus, chats, documents=4, max_new_tokens=4)
    assert [(one['name'], one['role']) for one in result['compared']][2:] == [('larger', 'reference'), ('plain', 'reference')]
    assert result['models']['larger'].keys() == result['models']['base'].keys() and result['models']['larger']['stop_rate']
    differences = [(d['metric'], d['against']) for d in result['differences']]
    assert differences[4:] == [(metric, 'larger') for metric in metrics_for(chats)] + [('science_bpb', 'plain'), ('general_bpb', 'plain')]
    # what a model without a chat template would answer is not made up
    assert result['models']['plain']['answer_bpb'] is result['models']['plain']['stop_rate'] is None
    assert [*result['generations']] == ['base', 'distilled', 'larger']
    assert "plain: 'answers that end' cannot be measured" in capsys.readouterr().out
    alone = compare(Run(tmp_path/'alone'), models, corpus, chats, documents=4, max_new_tokens=4)
    assert {name: result['models'][name] for name in models} == alone['models']  # the others' numbers stay what they are


# --- nearness to the teacher ------------------------------------------------------------------------------------------------------

ABOUT_ANYTHING = [one | dict(paper_id=f'general-{n}', kind='general', messages=[
    one['messages'][0], dict(role='assistant', content=TEXTS[n - 1])]) for n, one in enumerate(CHATS[:5])]


def of_one_vocabulary(seed: int, tokenizer: object = None, **sizes) -> LanguageModel:
    lm = tiny(TEXTS, context=256) if tokenizer is None else build(tokenizer, hidden=32, context=256, seed=seed, **sizes)
    lm.model.double()
    for parameter in lm.model.parameters(): parameter.data *= 3
    return lm


def test_nearness_is_the_divergence_at_each_word_of_the_answers(tmp_path):
    teacher = of_one_vocabulary(0)
    student = of_one_vocabulary(5, teacher.tokenizer)
    items = dict(general_chats=[chat | dict(id=chat['paper_id']) for chat in ABOUT_ANYTHING])
    found = {name: metrics[name].rows(Subject('student', student, items, 256, teacher=teacher)) for name in ('teacher_kl', 'agreement')}
    for n, one in enumerate(ABOUT_ANYTHING):
        ids, mask = encode_chat(teacher.tokenizer, one['messages'])
        with torch.no_grad(): p, q = (lm.model(torch.tensor([ids])).logits[0].log_softmax(-1) for lm in (teacher, student))
        at = [place - 1 for place, learnt in enumerate(mask) if learnt]
        divergence = sum(float((p[place].exp()*(p[place] - q[place])).sum()) for place in at)
        assert found['teacher_kl'][:, n] == pytest.approx([divergence, len(at)], rel=1e-4)  # logits are compared in 32 bits
        assert found['agreement'][:, n].tolist() == [sum(int(p[place].argmax() == q[place].argmax()) for place in at), len(at)]
    itself = Subject('teacher', teacher, items, 256, teacher=teacher)
    assert metrics['teacher_kl'].rows(itself)[0].max() < 1e-6 and metrics['agreement'].value(metrics['agreement'].rows(itself)) == 1


def test_general_answers_are_the_teachers(tmp_path):
    lm = of_one_vocabulary(0)
    rows = metrics['general_answers'].rows(Subject('teacher', lm, dict(general_chats=ABOUT_ANYTHING), 256))
    for n, one in enumerate(ABOUT_ANYTHING):
        ids, mask = encode_chat(lm.tokenizer, one['messages'])
        words = len(encode(lm.tokenizer, TEXTS[n - 1]))
        first = mask.index(1)
        assert rows[0, n] == pytest.approx(plain_nats(lm, ids, range(first, first + words)), rel=1e-4)
        assert rows[1, n] == pytest.approx(math.log(2)*len(TEXTS[n - 1].encode()))


def test_a_run_without_general_conversations_or_teacher_says_nothing_about_them(world, capsys):
    run, corpus, chats = world
    names = ('base', 'teacher')
    models = dict(zip(names, (of_one_vocabulary(0), tiny(['Other words make other tokens, all of them.'], context=96))))
    few = dict(documents=3, answers=2, max_new_tokens=4)
    plain = compare(run, models, corpus, chats, **few)
    assert not {'teacher_kl', 'agreement', 'general_answers'} & plain['models']['base'].keys()
    chats.general = ABOUT_ANYTHING
    other = compare(Run(run.folder/'other'), models, corpus, chats, **few)
    assert other['models']['base']['teacher_kl'] is None and other['models']['base']['general_answers']
    assert plain['conversed'] == {} and {name: len(said) for name, said in other['conversed'].items()} == dict.fromkeys(names, 2)
    assert other['conversed']['base'][0]['question'] == ABOUT_ANYTHING[0]['messages'][0]['content']
    assert other['models']['teacher']['agreement']['value'] == 1 and 'have different vocabularies' in capsys.readouterr().out
    alone = compare(Run(run.folder/'alone'), dict(base=models['base']), corpus, chats, **few)
    assert alone['models']['base']['agreement'] is None and 'the teacher is not here' in capsys.readouterr().out


# --- how a model writes

TITLED = [dict(id=str(n), title=title, text=text) for n, (title, text) in enumerate((
    ('Warm bodies', 'Heat flows from warm bodies to cold ones.'), ('', 'Light is a wave, and light is a particle: both of them at once.'),
    ('О тепле и холоде', 'Тепло переходит к холодному.')))]


@pytest.mark.parametrize('decoder', ['greedy', 'repetition penalty'])
def test_what_is_written_follows_title_and_first_words_and_is_asked_for_once(lm, decoder, monkeypatch):
    subject = Subject('model', lm, dict(science=TITLED), max_new_tokens=12)
    found = written(subject, decoder, first=3)
    for record, answer in zip(TITLED, found):
        whole = f"{record['title']}\n\n{record['text']}".strip()
        ids = [document_ends(lm.tokenizer)[0], *encode(lm.tokenizer, whole)]
        prompt = ids[:1 + len(encode(lm.tokenizer, record['title'])) + 3]
        alone = DECODERS[decoder](lm.model, torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=12,
                                  eos_token_id=document_ends(lm.tokenizer)[1])
        assert answer['ids'] == alone[0, len(prompt):].tolist()
    monkeypatch.setattr(evaluate, 'continuations', lambda *a: pytest.fail('written again'))
    about = {name: metric.rows(subject) for name, metric in writing_metrics(decoder).items()}
    assert about['rep_4'].tolist() == [[repetition(answer['ids'], 4) for answer in found], [1, 1, 1]]
    assert about['terms'][1].tolist() == [1, 0, 2]


def test_a_prompt_leaves_room_to_write(lm):
    long = [dict(id='0', title='On the power of a matrix', text=TEXTS[-1])]
    answer, = written(Subject('model', lm, dict(science=long), max_new_tokens=40), first=90)
    assert 1 <= len(answer['ids']) <= 40


@pytest.mark.parametrize('title, terms', [('On Heat and HEATING, heating', {'heating'}), ('Тепло и свет', {'тепло'}), ('', set()),
                                          ('x2-rays in state_space models', {'state', 'space', 'models'})])
def test_terms_of_a_title_are_its_longer_words_whatever_their_capitals(title, terms):
    assert title_terms(title) == terms


def test_terms_taken_up_again_are_whole_words(monkeypatch):
    said = ['The HEATING of water', 'heatings and waters', '']
    subject = Subject('model', None, dict(science=[dict(id=str(n), title='Heating of water') for n in range(3)]))
    subject.found['written, greedy'] = [dict(ids=[1], text=text) for text in said]
    assert writing_metrics()['terms'].rows(subject).tolist() == [[2, 0, 0], [2, 2, 2]]
# --- with related papers

NOUNS = ('heat', 'light', 'sound', 'salt')
ABOUT = [dict(id=f'{noun} {n}', title=f'On {noun} number {n}', text=f'We saw {noun} {n} times, {"and again " * n}and more {noun}.')
         for n in range(12) for noun in NOUNS]


@pytest.fixture
def titled(world) -> tuple[Run, Corpus, Chats]:
    "The same with papers about four things, of which some stand on both sides."
    run, corpus, chats = world
    science = dict(train=ABOUT[:40], valid=ABOUT[38:42], test=[*ABOUT[40:], ABOUT[5] | dict(id='again'), dict(id='x', title='', text='x')])
    return run, Corpus(science, corpus.general, corpus.folder), chats


@pytest.mark.parametrize('reach', [512, 90, 40])
def test_related_papers_stand_before_the_title_as_far_as_they_fit(titled, reach):
    run, corpus, _ = titled
    lm = tiny([one['text'] for one in ABOUT], context=512)
    lm.model.double()
    items = related_items(corpus.science['test'], prepare(run, corpus), 3, 5)
    subject = Subject('base', lm, dict(related=items), reach=reach)
    found = {name: metrics[name].rows(subject) for name in ('titled_bpb', 'related_bpb')}
    start, cut = document_ends(lm.tokenizer)[0], LanguageModel(lm.model, lm.tokenizer, 'plain')
    for n, item in enumerate(items):
        title, text = encode(lm.tokenizer, item['title'] + '\n\n'), encode(lm.tokenizer, item['text'])
        own, before, blank = [*title, *text], [], encode(lm.tokenizer, '\n\n')
        for paper in item['papers']:  # the nearest is laid first, and whatever comes further stands before it
            ids, left = encode(lm.tokenizer, brief(paper)), reach - 1 - len(own) - len(before) - len(blank)
            if left < min(16, len(ids)): break
            before = ids[:left] + blank + before
        assert len(before + own) < max(reach, len(own) + 1) and (before or reach == 40)
        for name, ids in dict(titled_bpb=[start, *own], related_bpb=[start, *before, *own]).items():
            if len(ids) > reach: continue  # read in windows, as others are
            expected = plain_nats(cut, ids, range(len(ids) - len(text), len(ids)))
            assert found[name][:, n] == pytest.approx([expected, math.log(2)*len(item['text'].encode())], rel=TOLERANCE)
    if reach == 512: assert not np.allclose(found['titled_bpb'][0], found['related_bpb'][0], rtol=1e-3)


def test_no_evaluated_paper_leans_on_one_that_is_held_out_or_repeats_it(titled, monkeypatch):
    run, corpus, chats = titled
    shown, after_title = [], evaluate.after_title
    monkeypatch.setattr(evaluate, 'after_title', lambda *given: shown.extend(given[3]) or after_title(*given))
    models = dict(base=tiny(TEXTS, context=256), contrast=tiny(TEXTS, context=200))
    result = compare(run, models, corpus, chats, max_new_tokens=4, related=4)
    held_out = {fingerprint(brief(one)) for part in ('valid', 'test') for one in corpus.science[part]}
    assert len(shown) > 20 and not held_out & {fingerprint(brief(one)) for one in shown}
    assert result['measured']['related'] == len(corpus.science['test']) - 1  # the one without a title has nothing to be found by
    assert {'titled_bpb', 'related_bpb'} <= result['models']['base'].keys()
    assert any(sentence.startswith('Related papers: with them before a title contrast reads') for sentence in findings(result))
    both = [np.array(read_json(run.folder/'evaluation'/'measured.json')['rows']['related_bpb'][name]) for name in ('base', 'contrast')]
    assert np.array_equal(both[0][1], both[1][1])


def test_without_related_papers_nothing_is_indexed_or_measured(titled):
    run, corpus, chats = titled
    result = compare(run, dict(base=tiny(TEXTS)), corpus, chats, documents=3, answers=2, max_new_tokens=4)
    assert not {'titled_bpb', 'related_bpb'} & result['models']['base'].keys() and not (run.folder/'related').exists()


@pytest.mark.parametrize('related, named', [(-1, 'related is -1'), (2, 'No test paper has a title')])
def test_related_papers_that_cannot_be_found_are_named(titled, related, named):
    run, corpus, chats = titled
    corpus.science['test'] = [one | dict(title='') for one in corpus.science['test']]
    with pytest.raises(InputError, match=named): compare(run, dict(base=tiny(TEXTS)), corpus, chats, max_new_tokens=4, related=related)
