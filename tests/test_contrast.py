"""Stage 1: the loss against its definition, the pairs in a batch, and a stage that leaves its student alone."""
import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from scilm_adapt import contrast
from scilm_adapt.contrast import batch_maker, embed, info_nce, pair_batch, pair_loss, pool, retrieval, train, view_ids, views, weighted_sum
from scilm_adapt.models import families, tiny, weights_hash
from scilm_adapt.papers import Corpus, document
from scilm_adapt.runs import InputError, Run, read_json, write_text
from scilm_adapt.tokens import encode_document, pack
from scilm_adapt.training import lm_loss, micro_batches

SUBJECTS = ('heat', 'light', 'sound', 'gravity', 'friction', 'pressure', 'salt', 'iron', 'water', 'glass', 'copper', 'helium')
PAPERS = [dict(id=name, title=f'On {name}', text=f'We study {name} in {number} experiments. The {name} was measured.')
          for number, name in enumerate(SUBJECTS)]
SETTINGS = dict(steps=3, batch_size=2, context=48, learning_rate=1e-3, contrast_batch=4)


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    write_text(tmp_path/'corpus'/'science.jsonl', 'its content stands for the stage that made it')
    return Corpus(dict(train=PAPERS, valid=PAPERS[:1], test=PAPERS[1:2]), dict(train=[], valid=[], test=[]), tmp_path/'corpus')


@pytest.fixture(scope='module')
def student():
    return tiny([document(paper) for paper in PAPERS], hidden=32, context=64)


# --- the loss

def naive(a, b, temperature, same, count):
    "Symmetric InfoNCE, one pair and one wrong answer after the other."
    def log_share(own, others): return own - torch.stack([own, *others]).logsumexp(0)
    def score(x, y): return (x @ y)/(x.norm()*y.norm())/temperature
    total = 0.0
    for i in range(len(a)):
        others = [j for j in range(len(a)) if j != i and not same[i, j]]
        total -= log_share(score(a[i], b[i]), [score(a[i], b[j]) for j in others])
        others = [j for j in range(len(a)) if j != i and not same[j, i]]
        total -= log_share(score(a[i], b[i]), [score(a[j], b[i]) for j in others])
    return total/(2*count)


def vectors(seed, number, size=5):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, number, size, dtype=torch.float64, generator=generator)
    return a.requires_grad_(), b.requires_grad_(), torch.rand(number, number, generator=generator) < 0.3


@given(st.integers(0, 999), st.integers(1, 7), st.sampled_from([0.05, 0.5, 1.0]))
def test_info_nce_is_its_definition(seed, number, temperature):
    a, b, same = vectors(seed, number)  # `same` is not even symmetric here
    assert torch.isclose(info_nce(a, b, temperature, same, 9), naive(a, b, temperature, same, 9), rtol=1e-10, atol=1e-12)
    nothing = torch.zeros_like(same)
    assert torch.isclose(info_nce(a, b, temperature), naive(a, b, temperature, nothing, number), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('masked', [False, True])
def test_info_nce_has_the_right_gradient(masked):
    a, b, same = vectors(1, 5)
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a, b, 0.3, same if masked else None, 7.0), (a, b))


def test_info_nce_sees_directions_only_and_both_sides_alike():
    a, b, _ = vectors(2, 6)
    assert torch.isclose(info_nce(a, b), info_nce(3*a, b/7)) and torch.isclose(info_nce(a, b), info_nce(b, a))


@pytest.mark.parametrize('same', [None, torch.ones(3, 3, dtype=torch.bool)])
def test_a_pair_without_wrong_answers_costs_nothing_and_stays_finite(same):
    a, b, _ = vectors(3, 3 if same is not None else 1)
    loss = info_nce(a, b, same=same)
    loss.backward()
    assert loss == 0 and not a.grad.any() and not b.grad.any()


def test_info_nce_is_exact_under_autocast():
    a, b = (x.detach().float() for x in vectors(4, 8, 32)[:2])
    with torch.autocast('cpu', torch.bfloat16): low = info_nce(a.bfloat16(), b.bfloat16())
    assert low.dtype == torch.float32 and torch.isclose(low, info_nce(a.bfloat16().float(), b.bfloat16().float()))


def test_pool_ignores_what_is_not_marked():
    hidden, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    noisy = hidden.clone()
    noisy[0, 2:] = 1e6
    assert torch.allclose(pool(noisy, mask), torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0)]), atol=1e-6)
    assert pool(hidden.bfloat16(), mask).dtype == torch.float32 and pool(hidden.double(), mask).dtype == torch.float64


def test_retrieval_counts_ties_against_the_model():
    a = torch.eye(4)
    assert retrieval(a, a) == {'mrr': 1.0, 'recall@1': 1.0}
    assert retrieval(a, a.roll(1, 0))['recall@1'] == 0
    assert retrieval(torch.ones(4, 3), torch.ones(4, 3)) == {'mrr': 0.25, 'recall@1': 0.0}
    b = torch.tensor([[1.0, 0, 0, 0], [0.9, 1, 0, 0], [0, 0, 1, 0], [2, 0, 0, 0.1]])  # the fourth points at the first
    assert retrieval(a, b)['recall@1'] == 1.0 and retrieval(b, a) == pytest.approx({'mrr': 0.875, 'recall@1': 0.75})


# --- pairs

def test_the_title_is_no_part_of_the_other_view():
    assert views(PAPERS[0]) == (PAPERS[0]['title'], PAPERS[0]['text'])
    assert views(dict(title='On heat', text='On heat. It flows.')) == ('On heat', '. It flows.')
    assert views(dict(title='', text=' kept as it is')) == ('', ' kept as it is')


@pytest.mark.parametrize('family', families(1, 1, 1, 1, 1))
def test_a_text_has_one_vector_alone_and_in_a_batch(family):
    lm, texts = tiny(SUBJECTS, family, hidden=32), ['iron', PAPERS[3]['text'], 'salt and water']
    together = embed(lm, texts)
    assert torch.allclose(together, torch.cat([embed(lm, [text]) for text in texts]), atol=1e-5)
    assert torch.allclose(together, embed(lm, texts, batch_size=2), atol=1e-5)


def test_a_view_is_cut_to_its_beginning(student):
    long = ' '.join(paper['text'] for paper in PAPERS)*50
    assert view_ids(student.tokenizer, long, 8) == encode_document(student.tokenizer, long)[:8]


def test_pairs_with_the_same_title_or_text_are_one_group(student):
    records = [dict(title='Editorial', text='On salt.'), dict(title='editorial.', text='On iron.'), dict(title='A note', text='On Iron'),
               dict(title='Glass', text='It flows.')]
    groups = pair_batch(student.tokenizer, records, 32)['pair_group']
    same = (groups[:, None] == groups).any(-1)
    assert same.tolist() == [[True, True, False, False], [True, True, True, False], [False, True, True, False], [False]*3 + [True]]


@pytest.mark.parametrize('rows', [1, 2, 3])
def test_parts_of_a_batch_add_up_to_a_mean_over_all_pairs(student, rows):
    packed = pack([encode_document(student.tokenizer, document(paper)) for paper in PAPERS], 32)
    batch = batch_maker(student.tokenizer, packed, PAPERS, range(len(PAPERS)), 4, 8, 32, seed=0)(0)
    parts = micro_batches(batch, rows)
    assert sum(len(part['pair_group']) for part in parts) == 8 and all(part['pairs'] == 8 for part in parts)
    with torch.no_grad():
        expected = 0.0
        for part in parts:
            tensors = {name: value for name, value in part.items() if name != 'pairs'}
            number = len(part['pair_group'])
            expected += number/8*pair_loss(student.model, tensors | dict(pairs=float(number)))
        assert torch.isclose(sum(pair_loss(student.model, part) for part in parts), expected)
        if rows == 1: assert len(parts) == 4 and not torch.isclose(expected, pair_loss(student.model, batch))  # easier questions


def test_a_batch_is_a_function_of_seed_and_step(student):
    packed = pack([encode_document(student.tokenizer, document(paper)) for paper in PAPERS], 32)
    make = lambda seed: batch_maker(student.tokenizer, packed, PAPERS, range(len(PAPERS)), 2, 5, 32, seed)
    same = lambda x, y: x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    first = make(1)
    for step in (4, 0, 2): first(step)
    assert same(first(3), make(1)(3)) and not same(first(3), first(4)) and not same(first(3), make(2)(3))
    assert not [name for name in batch_maker(student.tokenizer, packed, [], [], 2, 5, 32, 1)(0) if 'pair' in name or 'title' in name]


def test_weighted_sum_reports_parts_and_skips_weight_zero():
    loss = weighted_sum(dict(a=(2.0, lambda model, batch: torch.tensor(3.0)), b=(0.0, lambda model, batch: pytest.fail('computed'))))
    assert loss(None, None) == dict(loss=6.0, a=3.0)


# --- the stage

def test_train_keeps_a_model_that_others_can_open(tmp_path, corpus, student):
    before, copied = weights_hash(student.model), copy.deepcopy(student.model.state_dict())
    lm = train(Run(tmp_path/'run'), student, corpus, **SETTINGS)
    assert lm.name == 'contrast' and student.name == 'tiny' and not student.model.training
    assert weights_hash(student.model) == before != weights_hash(lm.model)
    assert all(torch.equal(value, copied[name]) for name, value in student.model.state_dict().items())
    folder = tmp_path/'run'/'models'/'contrast'
    history = read_json(folder/'history.json')
    assert [row['step'] for row in history] == [0, 1, 2]
    for row in history: assert row['loss'] == pytest.approx(row['lm'] + 0.1*row['contrast'], rel=1e-5)
    opened = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert weights_hash(opened) == weights_hash(lm.model)
    assert AutoTokenizer.from_pretrained(folder).chat_template == student.tokenizer.chat_template


def test_a_stage_that_holds_is_opened_and_not_trained_again(tmp_path, corpus, student, monkeypatch):
    run = Run(tmp_path/'run')
    first, calls, fit = train(run, student, corpus, **SETTINGS), [], contrast.fit
    monkeypatch.setattr(contrast, 'fit', lambda *a, **k: calls.append(k) or fit(*a, **k))
    assert weights_hash(train(run, student, corpus, **SETTINGS).model) == weights_hash(first.model) and not calls
    other = tiny([document(paper) for paper in PAPERS], hidden=32, context=64, seed=1)
    for change in (dict(contrast_weight=0.2), dict(temperature=0.1), dict(seed=1), dict(pair_length=9), dict(student=other)):
        train(run, **(dict(student=student, corpus=corpus) | SETTINGS | change))
    assert len(calls) == 5
    write_text(corpus.folder/'science.jsonl', 'another corpus')
    train(run, other, corpus, **SETTINGS)
    assert len(calls) == 6


def test_the_same_stage_gives_the_same_weights(tmp_path, corpus, student):
    one, other = (train(Run(tmp_path/name), student, corpus, **SETTINGS) for name in ('one', 'other'))
    assert weights_hash(one.model) == weights_hash(other.model)


def test_without_weight_it_is_language_modelling_and_needs_no_titles(tmp_path, corpus, student, monkeypatch):
    monkeypatch.setattr(contrast, 'pair_batch', lambda *a: pytest.fail('pairs were made'))
    untitled = replace(corpus, science=dict(train=[paper | dict(title='', text=document(paper)) for paper in PAPERS]))
    train(Run(tmp_path/'run'), student, untitled, contrast_weight=0.0, **SETTINGS)
    row = read_json(tmp_path/'run'/'models'/'contrast'/'history.json')[0]
    packed = pack([encode_document(student.tokenizer, document(paper)) for paper in PAPERS], SETTINGS['context'])
    with torch.no_grad(): first = lm_loss(student.model, batch_maker(student.tokenizer, packed, [], [], 2, 0, 0, 0)(0))
    assert 'contrast' not in row and row['loss'] == row['lm'] == pytest.approx(first.item(), rel=1e-2)


def test_it_learns_which_title_belongs_to_which_text(tmp_path, corpus, student):
    settings = SETTINGS | dict(steps=60, contrast_batch=12, learning_rate=5e-3, contrast_weight=1.0)
    lm = train(Run(tmp_path/'run'), student, corpus, **settings)
    titles, texts = zip(*map(views, PAPERS))
    found = [retrieval(embed(model, list(titles)), embed(model, list(texts)))['mrr'] for model in (student, lm)]
    history = read_json(tmp_path/'run'/'models'/'contrast'/'history.json')
    assert found[1] > found[0] and history[-1]['contrast'] < 0.5*math.log(12) and history[-1]['lm'] < history[0]['lm']


@pytest.mark.parametrize('change, named', [
    (dict(context=65), r'context is 65 tokens.*64'),
    (dict(micro_batch=1, contrast_batch=3), r'contrast_batch is 3.*at least 4.*micro_batch'),
    (dict(contrast_batch=1), r'contrast_batch is 1.*at least 2'),
    (dict(titles=False), r'title_field.*contrast_weight to 0')])
def test_what_cannot_work_is_named_before_the_first_step(tmp_path, corpus, student, monkeypatch, change, named):
    monkeypatch.setattr(contrast, 'fit', lambda *a, **k: pytest.fail('training began'))
    settings = SETTINGS | change
    if not settings.pop('titles', True): corpus = replace(corpus, science=dict(train=[paper | dict(title='') for paper in PAPERS]))
    with pytest.raises(InputError, match=named): train(Run(tmp_path/'run'), student, corpus, **settings)
    assert not list((tmp_path/'run').iterdir())


def test_several_processes_share_the_pairs(tmp_path, corpus, student, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    with pytest.raises(InputError, match='contrast_batch is 4.*at least 8'):
        train(Run(tmp_path/'run'), student, corpus, **(SETTINGS | dict(batch_size=4)))
