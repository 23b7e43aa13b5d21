"""Evaluation against naive loops, closed forms and simulation, and the honesty of its statements."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from scilm_adapt.evaluate import (
    METRICS,
    PAIRS,
    answer_bits,
    bits_per_byte,
    compare,
    difference_interval,
    document_bits,
    finding,
    findings,
    material,
    measure,
    one_per_paper,
    rate_difference_interval,
    rate_interval,
    ratio_interval,
    resampled_ratios,
    signed,
    summarise,
    verdict,
)
from scilm_adapt.instruct import Chats
from scilm_adapt.models import LanguageModel, mixed_precision, tiny
from scilm_adapt.papers import Corpus
from scilm_adapt.runs import InputError, Run, read_json
from scilm_adapt.tokens import document_ends, encode, pack

TEXTS = ['Heat flows from warm bodies to cold ones.', 'Light is a wave, and light is a particle: both of them at once.',
         'Тепло переходит к холодному.', 'A token <|im_end|> in a text is content.', 'x',
         ' '.join(f'The {n}th power of a matrix commutes with it.' for n in range(12))]
# Where matrix products run in bfloat16, packed rows are rounded otherwise than single documents.
TOLERANCE = 2e-2 if mixed_precision(torch.device('cpu')) == 'bf16' else 1e-5


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
    nats, sizes = document_bits(lm, TEXTS, context)
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
    nats, _ = document_bits(lm, TEXTS)
    assert np.allclose(nats, [len(encode(lm.tokenizer, text))*math.log(len(lm.tokenizer)) for text in TEXTS])


def test_bits_per_byte_is_a_ratio_of_sums():
    assert bits_per_byte([8*math.log(2)], [1]) == pytest.approx(8)
    assert bits_per_byte([math.log(2), 9*math.log(2)], [1, 1]) == pytest.approx(5)
    assert bits_per_byte([math.log(2), 9*math.log(2)], [1, 99]) == pytest.approx(0.1)   # not the mean of 1 and 1/11


# --- how sure

def documents(seed: int, size: int = 300) -> tuple[np.ndarray, np.ndarray]:
    "Sizes with a long tail and nats that scatter by document; the true ratio is 1.2."
    draw = np.random.default_rng(seed)
    sizes = draw.lognormal(6, 0.5, size)
    return sizes*draw.gamma(40, 1.2/40, size), sizes


def test_bootstrap_intervals_cover_the_truth_in_95_of_100_cases():
    found = [ratio_interval(*documents(seed), resamples=400) for seed in range(1000)]
    covered = np.mean([interval['low'] <= 1.2 <= interval['high'] for interval in found])
    assert 0.93 <= covered <= 0.97
    assert all(interval['low'] <= interval['value'] <= interval['high'] for interval in found)


def test_bootstrap_agrees_with_scipy():
    nats, sizes = documents(3)
    theirs = stats.bootstrap((nats, sizes), lambda a, b, axis: a.sum(axis)/b.sum(axis), paired=True, method='percentile', vectorized=True,
                             n_resamples=8000, rng=np.random.default_rng(0)).confidence_interval
    ours = ratio_interval(nats, sizes, resamples=8000)
    width = theirs.high - theirs.low
    assert abs(ours['low'] - theirs.low) < 0.08*width and abs(ours['high'] - theirs.high) < 0.08*width


def test_bootstrap_is_a_function_of_its_seed_and_draws_in_blocks():
    nats, sizes = documents(0, 5000)
    assert ratio_interval(nats, sizes, seed=1) == ratio_interval(nats, sizes, seed=1) != ratio_interval(nats, sizes, seed=2)
    assert len(resampled_ratios(nats, sizes, resamples=2001)) == 2001
    assert ratio_interval([3.0], [2.0]) == dict(value=1.5, low=1.5, high=1.5)


def test_paired_difference_sees_what_two_intervals_do_not():
    nats, sizes = documents(0)
    other = nats - 0.02*sizes*np.random.default_rng(1).gamma(4, 1/4, len(sizes))
    assert ratio_interval(nats, sizes)['low'] < ratio_interval(other, sizes)['high']
    difference = difference_interval(other, nats, sizes)
    assert difference['high'] < 0
    assert difference['value'] == pytest.approx((other.sum() - nats.sum())/sizes.sum())


def test_a_difference_is_rarely_found_where_there_is_none():
    "Two models that scatter around the same truth: about one verdict in twenty may be wrong."
    wrong = 0
    for seed in range(400):
        (one, sizes), draw = documents(seed), np.random.default_rng(seed + 9999)
        other = one + sizes*draw.normal(0, 0.1, len(sizes))
        wrong += verdict(difference_interval(other, one, sizes, resamples=300)) != 'open'
    assert 0.02 <= wrong/400 <= 0.09


def test_wilson_interval_is_the_textbook_formula():
    z = stats.norm.ppf(0.975)
    for happened, total in ((0, 50), (50, 50), (81, 263), (1, 3)):
        p = happened/total
        centre, spread = p + z*z/(2*total), z*math.sqrt(p*(1 - p)/total + z*z/(4*total*total))
        found = rate_interval(np.arange(total) < happened)
        assert found['value'] == pytest.approx(p)
        assert found['low'] == pytest.approx((centre - spread)/(1 + z*z/total), abs=1e-12)
        assert found['high'] == pytest.approx((centre + spread)/(1 + z*z/total), abs=1e-12)


def test_paired_share_intervals_cover_the_truth():
    draw, hits = np.random.default_rng(0), []
    for _ in range(1000):
        hard = draw.random(150) < 0.3
        one, other = draw.random(150) < np.where(hard, 0.2, 0.95), draw.random(150) < np.where(hard, 0.1, 0.8)
        found = rate_difference_interval(one, other)
        hits.append(found['low'] <= 0.3*0.1 + 0.7*0.15 <= found['high'])
    assert 0.93 <= np.mean(hits) <= 0.98


def test_paired_share_interval_by_hand():
    "36 both, 12 only the first, 2 only the second, 0 neither: method 10 computed step by step."
    one, other = np.array([1]*48 + [0]*2), np.array([1]*36 + [0]*12 + [1]*2)
    a, b = rate_interval(one), rate_interval(other)
    phi = (36*0 - 12*2)/math.sqrt(48*2*38*12)
    d, e = a['value'] - a['low'], b['high'] - b['value']
    found = rate_difference_interval(one, other)
    assert found['value'] == pytest.approx(0.2)
    assert found['low'] == pytest.approx(0.2 - math.sqrt(d*d - 2*phi*d*e + e*e))
    assert found['low'] < 0.2 < found['high']


# --- what is said

def invented(gain: float, size: int = 120) -> dict:
    "Raw numbers of base, contrast, distilled and teacher; `gain` is what every stage takes off the nats of every text."
    draw, names = np.random.default_rng(0), ('base', 'contrast', 'distilled', 'teacher')
    sizes = draw.lognormal(6, 0.5, size)
    found = dict(params=dict.fromkeys(names, 1000), answered={name: [dict(stopped=bool(n % 2)) for n in range(size)] for name in names})
    for part in METRICS.values():
        rate = draw.gamma(40, 1.4/40, size)
        nats = {name: (sizes*(rate - gain*stage + draw.normal(0, 0.05, size))).tolist() for stage, name in enumerate(names)}
        found[part] = dict(ids=[str(n) for n in range(size)], bytes=sizes.tolist(), nats=nats)
    return found


@pytest.mark.parametrize('gain, expected', [(0.1, 'better'), (0.0, 'open'), (-0.1, 'worse')])
def test_verdicts_follow_the_numbers(gain, expected):
    result = summarise(invented(gain))
    bits = [d for d in result['differences'] if d['metric'] != 'stop_rate' and d['against'] != 'teacher']
    # without a gain, nine intervals of 95 % are asked
    assert sum(d['verdict'] == expected for d in bits) >= (len(bits) if gain else len(bits) - 2)
    words = dict(better='better, shown', worse='worse, shown', open='a difference is not shown')
    sentences = findings(result)
    assert len(sentences) == len(result['differences']) == 4*len(PAIRS)
    for difference in result['differences']: assert words[difference['verdict']] in finding(result, difference)


def test_a_sentence_in_full():
    result = dict(models=dict(base=dict(science_bpb=dict(value=2.02)), distilled=dict(science_bpb=dict(value=1.72))))
    difference = dict(metric='science_bpb', model='distilled', against='base', value=-0.30, low=-0.31, high=-0.28, verdict='better')
    assert finding(result, difference) == ('Science: distilled reads science at 1.72 bits per byte against 2.02 of base: better, shown '
                                           '(difference −0.300 [−0.310, −0.280]).')
    assert signed(0.0) == '0.000' and signed(-0.00049) == '0.000' and signed(0.1) == '+0.100'


def test_higher_is_better_for_stopping_only():
    assert verdict(dict(low=0.1, high=0.2)) == 'worse' and verdict(dict(low=0.1, high=0.2), lower_is_better=False) == 'better'
    assert verdict(dict(low=-1, high=0)) == 'open'


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
    assert summarise(measured) == {k: v for k, v in result.items() if k != 'generations'}
    assert 'manifest.json' in {p.name for p in (run.folder/'evaluation').iterdir()}
    json.dumps(result, allow_nan=False)


def test_compare_measures_a_changed_model_again(world, capsys):
    run, corpus, chats = world
    models = dict(base=tiny(TEXTS))
    first = compare(run, models, corpus, chats, max_new_tokens=2)
    assert compare(run, models, corpus, chats, max_new_tokens=2) == first and 'kept' in capsys.readouterr().out
    with torch.no_grad(): models['base'].model.get_output_embeddings().weight.mul_(3)
    assert compare(run, models, corpus, chats, max_new_tokens=2)['models'] != first['models']


def test_a_broken_model_is_named(world):
    run, corpus, chats = world
    lm = tiny(TEXTS)
    with torch.no_grad(): lm.model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match='distilled: the likelihood of science text 0'):
        measure(dict(distilled=lm), corpus, chats, max_new_tokens=2)
    assert not Path(run.folder/'evaluation').exists()


def test_nothing_to_measure_with_is_said(world):
    _, corpus, chats = world
    with pytest.raises(InputError, match='measure general with'):
        material({}, Corpus(corpus.science, dict(test=[]), corpus.folder), chats, 3, 3, 9)
    with pytest.raises(InputError, match='measure questions with'): material({}, corpus, Chats([], [], [], chats.folder), 3, 3, 9)
    with pytest.raises(InputError, match='ask for shorter answers'): material(dict(base=tiny(TEXTS)), corpus, chats, 3, 3, 512)


def test_only_questions_that_leave_every_model_room_are_asked(world):
    _, corpus, chats = world
    long = chat(99, 'Why? '*60, 'Because.')
    models = dict(base=tiny(TEXTS), short=tiny(TEXTS, context=100))
    _, asked = material(models, corpus, Chats([], [], [long, *CHATS], chats.folder), 3, 4, 20)
    assert [c['paper_id'] for c in asked] == ['p0', 'p1', 'p2', 'p3']
    assert material(dict(base=models['base']), corpus, Chats([], [], [long], chats.folder), 3, 4, 20)[1] == [long]


def test_one_question_of_each_paper_in_order():
    asked = one_per_paper([CHATS[1], CHATS[0], CHATS[1] | dict(reference='late'), CHATS[2]])
    assert [c['paper_id'] for c in asked] == ['p1', 'p0', 'p2'] and asked[0]['reference'] == TEXTS[1]
