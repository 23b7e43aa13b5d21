"""Evaluation against naive loops, closed forms and simulation, and the honesty of its statements."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from scilm_adapt import evaluate
from scilm_adapt.errors import InputError
from scilm_adapt.evaluate import (
    METRICS,
    PAIRS,
    answer_bits,
    bits_per_byte,
    compare,
    document_bits,
    finding,
    findings,
    material,
    measure,
    one_per_paper,
    signed,
    summarise,
)
from scilm_adapt.files import read_json
from scilm_adapt.instruct import Chats
from scilm_adapt.intervals import verdict
from scilm_adapt.models import LanguageModel, tiny
from scilm_adapt.papers import Corpus
from scilm_adapt.runs import Run
from scilm_adapt.tokens import document_ends, encode, pack

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
    monkeypatch.setattr(evaluate, 'document_nats', dying)
    with pytest.raises(KeyboardInterrupt): compare(run, models, corpus, chats, max_new_tokens=4)
    assert asked == ['base: science', 'base: general', 'base: reference answers', 'distilled: science']
    parts = sorted((run.folder/'.unfinished').rglob('*.json'))
    assert len(parts) == 5
    if damage:
        whole = parts[0].read_bytes()
        parts[0].write_bytes(whole.replace(b'1', b'2', 1))
    asked.clear(); at[0] = None
    compare(run, models, corpus, chats, max_new_tokens=4)
    assert len(asked) + ('answered' in parts[0].name and damage) == 2 + damage and texts(run.folder.name) == texts('whole')
    assert (f'{parts[0].name} is not what was written; measured again' in capsys.readouterr().out) == damage
    assert not (run.folder/'.unfinished').exists()


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
