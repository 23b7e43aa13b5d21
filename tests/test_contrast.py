"""Stage 1: the sum of its losses, and a stage that leaves its student alone."""
import copy
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import descent, reader

from scilm_adapt import contrast, recipe
from scilm_adapt.contrast import Recipe, _weighted_sum, batch_maker, contrast_loss, train
from scilm_adapt.errors import InputError
from scilm_adapt.files import read_json, write_text
from scilm_adapt.models import weights_hash
from scilm_adapt.pairs import Pairs, embed, pair_maker, retrieval, views
from scilm_adapt.papers import Corpus, document
from scilm_adapt.preference import Pair, Preference
from scilm_adapt.runs import Run
from scilm_adapt.tokens import encode_document, pack
from scilm_adapt.training import fit, lm_loss

SUBJECTS = ('heat', 'light', 'sound', 'gravity', 'friction', 'pressure', 'salt', 'iron', 'water', 'glass', 'copper', 'helium')
PAPERS = [dict(id=name, title=f'On {name}', text=f'We study {name} in {number} experiments. The {name} was measured.')
          for number, name in enumerate(SUBJECTS)]
SETTINGS = dict(steps=3, batch_size=2, context=48, learning_rate=1e-3, pairs_weight=0.1, pairs=Pairs(batch=4))
PREFERRED = [Pair(str(n), 'paper', [1, 5, 6 + n], [7, 8, 9 + n, 10], [8, 7, 20 + n, 4]) for n in range(6)]


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    write_text(tmp_path/'corpus'/'science.jsonl', 'its content stands for the stage that made it')
    return Corpus(dict(train=PAPERS, valid=PAPERS[:1], test=PAPERS[1:2]), dict(train=[], valid=[], test=[]), tmp_path/'corpus')


@pytest.fixture(scope='module')
def student():
    return reader(PAPERS)


def packed_papers(student, length: int = 32):
    return pack([encode_document(student.tokenizer, document(paper)) for paper in PAPERS], length)


def flat(batch: dict) -> dict[str, torch.Tensor]:
    "All tensors of a batch."
    return {name: value for name, value in batch.items() if name != 'pairs'} | (batch['pairs'].rows if 'pairs' in batch else {})


def test_a_batch_is_a_function_of_seed_and_step(student):
    def make(seed):
        recipe = Recipe(**SETTINGS | dict(token_weight=1.0, seed=seed, preference=Preference(batch=3)))
        pairs_at = pair_maker(student.tokenizer, PAPERS, Pairs(batch=5), seed)
        return batch_maker(packed_papers(student), recipe, pairs_at, PREFERRED)
    def same(x, y): return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    first = make(1)
    for step in (4, 0, 2): first(step)
    assert same(flat(first(3)), flat(make(1)(3)))
    assert not same(flat(first(3)), flat(first(4))) and not same(flat(first(3)), flat(make(2)(3)))
    bare = batch_maker(packed_papers(student), Recipe(**SETTINGS | dict(token_weight=0.0)))(0)
    assert bare.keys() == packed_papers(student).batch([0]).keys()


def test_weighted_sum_reports_parts_and_skips_weight_zero(student):
    seen = []
    def part(model, batch, hidden): return seen.append(hidden) or torch.tensor(3.0)
    loss = _weighted_sum(dict(a=(2.0, part), again=(0.5, part), b=(0.0, lambda *a: pytest.fail('computed'))))
    assert loss(student.model, packed_papers(student).batch([0])) == dict(loss=7.5, a=3.0, again=3.0)
    assert seen[0] is seen[1]  # states are computed once


@pytest.mark.parametrize('micro_batch', [16, 4, 1])
def test_all_parts_together_do_not_depend_on_the_micro_batch(student, micro_batch):
    recipe = Recipe(**SETTINGS | dict(steps=1, batch_size=16, token_weight=0.7, pairs_weight=0.3, preference_weight=0.2, margin=0.9,
                                      pairs=Pairs(batch=6, chunk=4), preference=Preference(batch=3)))
    batch_at = batch_maker(packed_papers(student), recipe, pair_maker(student.tokenizer, PAPERS, recipe.pairs, 0), PREFERRED)
    found = []
    for rows in (16, micro_batch):
        model, gradients = copy.deepcopy(student.model).double(), {}
        def keep(step, model, gradients=gradients): gradients.update({n: p.detach().clone() for n, p in model.named_parameters()})
        history = fit(model, batch_at, contrast_loss(recipe), 1, learning_rate=1.0, micro_batch=rows, optimizers=descent, clip=1e9,
                      precision='no', on_step_end=keep)
        found.append((history[0], gradients))
    (one, weights), (other, others) = found
    for name in ('loss', 'lm', 'token', 'pairs', 'preference'): assert other[name] == pytest.approx(one[name], rel=1e-10)
    assert max((weights[name] - others[name]).abs().max().item() for name in weights) < 1e-10


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
    for row in history: assert row['loss'] == pytest.approx(row['lm'] + 0.1*row['pairs'], rel=1e-5)
    opened = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert weights_hash(opened) == weights_hash(lm.model)
    assert AutoTokenizer.from_pretrained(folder).chat_template == student.tokenizer.chat_template


def test_a_stage_that_holds_is_opened_and_not_trained_again(tmp_path, corpus, student, monkeypatch):
    run = Run(tmp_path/'run')
    first, calls, fit = train(run, student, corpus, **SETTINGS), [], recipe.fit
    monkeypatch.setattr(recipe, 'fit', lambda *a, **k: calls.append(k) or fit(*a, **k))
    assert weights_hash(train(run, student, corpus, **SETTINGS).model) == weights_hash(first.model) and not calls
    other = reader(PAPERS, seed=1)
    hotter = Pairs(batch=4, temperature=0.1)
    for change in (dict(pairs_weight=0.2), dict(pairs=hotter), dict(seed=1), dict(token_weight=0.3), dict(student=other)):
        train(run, **(dict(student=student, corpus=corpus) | SETTINGS | change))
    assert len(calls) == 5
    train(run, other, corpus, **SETTINGS, trackers='tensorboard')  # who watches changes nothing
    assert len(calls) == 5
    write_text(corpus.folder/'science.jsonl', 'another corpus')
    train(run, other, corpus, **SETTINGS)
    assert len(calls) == 6


def test_the_same_stage_gives_the_same_weights(tmp_path, corpus, student):
    one, other = (train(Run(tmp_path/name), student, corpus, **SETTINGS) for name in ('one', 'other'))
    assert weights_hash(one.model) == weights_hash(other.model)


def test_without_weight_it_is_language_modelling_and_needs_no_titles(tmp_path, corpus, student, monkeypatch):
    for part in ('pair_maker', 'token_contrast', 'preference_part'):
        monkeypatch.setattr(contrast, part, lambda *a, **k: pytest.fail('made'))
    monkeypatch.setattr(contrast.preferences, 'prepare', lambda *a: pytest.fail('preferences were made'))
    untitled = replace(corpus, science=corpus.science | dict(train=[paper | dict(title='', text=document(paper)) for paper in PAPERS]))
    train(Run(tmp_path/'run'), student, untitled, **SETTINGS | dict(pairs_weight=0.0))
    row = read_json(tmp_path/'run'/'models'/'contrast'/'history.json')[0]
    batch = batch_maker(packed_papers(student, 48), Recipe(**SETTINGS | dict(token_weight=0)))(0)
    with torch.no_grad(): first = lm_loss(student.model, batch)
    assert not {'pairs', 'token', 'preference'} & row.keys() and row['loss'] == row['lm'] == pytest.approx(first.item(), rel=1e-2)


@pytest.mark.parametrize('common, weight', [(0.0, 0.0), (3.0, 1.0)])
def test_the_weight_of_token_contrast_follows_the_probe(tmp_path, corpus, student, capsys, common, weight):
    student = replace(student, model=copy.deepcopy(student.model))
    student.model.model.norm.register_forward_hook(lambda module, inputs, out: out + common)  # a direction that all tokens share
    train(Run(tmp_path/'run'), student, corpus, **SETTINGS)
    assert f'Token contrast has weight {weight:.0f}' in capsys.readouterr().out
    folder = tmp_path/'run'/'models'/'contrast'
    assert ('token' in read_json(folder/'history.json')[0]) == bool(weight)
    found = read_json(folder/'geometry.json')
    assert (found['before']['isotropy'] > 0.5) == bool(weight) and found.keys() == {'before', 'after'}


def test_a_weight_that_is_given_is_taken_and_the_probe_only_kept(tmp_path, corpus, student, capsys):
    train(Run(tmp_path/'run'), student, corpus, **SETTINGS, token_weight=0.5, margin=1.5)
    assert 'Token contrast has weight' not in capsys.readouterr().out
    row = read_json(tmp_path/'run'/'models'/'contrast'/'history.json')[0]
    assert row['loss'] == pytest.approx(row['lm'] + 0.1*row['pairs'] + 0.5*row['token'], rel=1e-5) and row['token'] > 0


def test_preferences_are_learnt_by_adapters_too(tmp_path, corpus, student):
    def text(name): return ' '.join(f'We study {name} in {n} experiments. The {name} was measured {n} times.' for n in range(9))
    long = [paper | dict(text=text(paper['id'])) for paper in PAPERS]
    told = replace(corpus, science=corpus.science | dict(train=long))
    settings = SETTINGS | dict(pairs_weight=0.0, preference_weight=0.5, preference=Preference(batch=2, length=40), lora_rank=2, steps=4)
    lm = train(Run(tmp_path/'run'), student, told, **settings)
    assert [row['preference'] > 0 for row in read_json(tmp_path/'run'/'models'/'contrast'/'history.json')] == [True]*4
    assert lm.model.state_dict().keys() == student.model.state_dict().keys()
    assert torch.equal(lm.model.get_input_embeddings().weight, student.model.get_input_embeddings().weight)  # adapters leave it alone


def test_it_learns_which_title_belongs_to_which_text(tmp_path, corpus, student):
    settings = SETTINGS | dict(steps=60, pairs=Pairs(batch=12), learning_rate=5e-3, pairs_weight=1.0)
    lm = train(Run(tmp_path/'run'), student, corpus, **settings)
    titles, texts = zip(*map(views, PAPERS))
    found = [retrieval(embed(model, list(titles)), embed(model, list(texts)))['mrr'] for model in (student, lm)]
    history = read_json(tmp_path/'run'/'models'/'contrast'/'history.json')
    assert found[1] > found[0] and history[-1]['pairs'] < 0.5*math.log(12) and history[-1]['lm'] < history[0]['lm']


@pytest.mark.parametrize('change, named', [
    (dict(context=65), r'context is 65 tokens.*64'),
    (dict(pairs_weight=-1.0), r'pairs_weight is -1.0'),
    (dict(token_weight=math.nan), r'token_weight is nan'),
    (dict(lora_rank=-1), r'lora_rank is -1'),
    (dict(margin=0.0), r'margin is 0.0'),
    (dict(preference_weight=1.0, preference=Preference(length=500)), r'length is 500'),
    (dict(pairs=Pairs(batch=1)), r'batch=1.*at least 2'),
    (dict(trackers='tensorbord'), r"trackers names 'tensorbord'"),
    (dict(filler=False), r'tokenizer.pad_token'),
    (dict(states=False), r'model: .*gives no hidden states.*last_hidden_state'),
    (dict(titles=False), r'title_field.*pairs_weight to 0')])
def test_what_cannot_work_is_named_before_the_first_step(tmp_path, corpus, student, monkeypatch, change, named):
    monkeypatch.setattr(recipe, 'fit', lambda *a, **k: pytest.fail('training began'))
    settings = SETTINGS | change
    if not settings.pop('titles', True):
        corpus = replace(corpus, science=corpus.science | dict(train=[paper | dict(title='') for paper in PAPERS]))
    if not settings.pop('filler', True):
        student = replace(student, tokenizer=copy.deepcopy(student.tokenizer))
        student.tokenizer.pad_token = None
    if not settings.pop('states', True):
        student = replace(student, model=copy.deepcopy(student.model))
        student.model.base_model_prefix = 'none'  # so that its base model is itself, which gives logits only
    with pytest.raises(InputError, match=named): train(Run(tmp_path/'run'), student, corpus, **settings)
    assert not (tmp_path/'run'/'models'/'contrast').exists()


def test_several_processes_share_the_pairs(tmp_path, corpus, student, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '8')
    with pytest.raises(InputError, match='batch=4.*at least 8'): train(Run(tmp_path/'run'), student, corpus, **SETTINGS)
