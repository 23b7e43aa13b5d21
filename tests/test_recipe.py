"""What a stage is told stands in one place; what it depends on is in its key; a student is trained in one way; adapters merge."""
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from test_training import furthest, model_of, ragged, train, without_dropout

from scilm_adapt import contrast, distill, recipe
from scilm_adapt.checkpoints import Checkpoints
from scilm_adapt.errors import InputError, Stopped
from scilm_adapt.files import read_json
from scilm_adapt.models import hidden_states, load, logits_of, save, weights_hash
from scilm_adapt.pairs import Pairs
from scilm_adapt.recipe import _HOW, Recipe, Task, has_adapters, lora, parameters_of, recipe_of, stage_settings, train_stage
from scilm_adapt.runs import Run
from scilm_adapt.tokens import batch_rows
from scilm_adapt.training import lm_loss

RECIPE = Recipe(steps=6, batch_size=6, context=64, learning_rate=3e-3)
KINDS = [Recipe, contrast.Recipe, distill.Recipe]


# --- recipes ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__module__)
def test_what_only_says_how_is_in_no_key_and_all_else_is(kind):
    plain = kind(**vars(RECIPE))
    assert set(plain.key()) == {one.name for one in fields(kind)} - set(_HOW)
    assert plain.key() == replace(plain, micro_batch=1, gradient_checkpointing=True, trackers='tensorboard').key()
    for name, value in dict(steps=7, batch_size=2, context=32, learning_rate=1.0, lora_rank=2, seed=1).items():
        assert replace(plain, **{name: value}).key() != plain.key(), name


def test_a_part_of_a_recipe_may_be_given_by_what_differs():
    made = recipe_of(contrast.Recipe, vars(RECIPE) | dict(pairs=dict(batch=32)))
    assert made.pairs == Pairs(batch=32) and made == recipe_of(contrast.Recipe, vars(RECIPE) | dict(pairs=Pairs(batch=32)))
    for views in (['title', 'first'], 'title first', 'title, first', ('title', 'first')):
        assert recipe_of(contrast.Recipe, dict(pairs=dict(views=views))).pairs.views == ('title', 'first')
    assert recipe_of(distill.Recipe, dict(shift=[0.0, 0.5])).shift == (0.0, 0.5)
    with pytest.raises(InputError, match="no setting 'weigth'"): recipe_of(contrast.Recipe, vars(RECIPE) | dict(weigth=1))
    with pytest.raises(InputError, match="no setting 'pairs_wait'. Did you mean 'pairs_weight'"):
        recipe_of(contrast.Recipe, vars(RECIPE) | dict(pairs_wait=1))
    with pytest.raises(InputError, match="no setting 'temprature'. Did you mean 'temperature'"):
        recipe_of(contrast.Recipe, vars(RECIPE) | dict(pairs=dict(temprature=1)))


def cells_of(*sources: str) -> dict:
    "The names that a notebook of these cells has at its end."
    names = dict(__name__='notebook')
    for source in sources: exec(source, names)
    return names


def test_a_notebook_is_told_in_lines_of_python_and_each_stage_hears_its_own():
    names = cells_of('from scilm_adapt.recipe import settings_of',
                     "papers: str = 'x'\nbatch_size: int = 8\nseed: int = 0\ncontrast = settings_of('contrast.Recipe')",
                     'contrast.steps = 7\nseed = 3\ncontrast.pairs.views = ("first",)\ncontrast.batch_size = 4')  # as papermill does it
    config = parameters_of(names)
    assert config['papers'] == 'x' and config['seed'] == 3 and config['contrast.steps'] == 7 and config['contrast.margin'] == 0.5
    made = recipe_of(contrast.Recipe, stage_settings(config, 'contrast'))
    assert made == contrast.Recipe(steps=7, batch_size=4, seed=3, pairs=Pairs(views=('first',)))
    assert stage_settings(config, 'distil') == dict(batch_size=8, seed=3), 'what both share, and nothing of the other stage'


@pytest.mark.parametrize('line, said', [
    ('contrast.step = 7', "no setting 'step'. Did you mean 'steps'"), ('contrast.pairs.tau = 7', "no setting 'tau'"),
    ('contrast.pairs = 7', "'pairs' has settings of its own; set one of views, batch")])
def test_a_line_that_tells_nothing_is_refused_where_it_stands(line, said):
    with pytest.raises(InputError, match=said):
        cells_of('from scilm_adapt.recipe import settings_of', "contrast = settings_of('contrast.Recipe')", line)


@pytest.mark.parametrize('change', [dict(steps=0), dict(batch_size=0), dict(context=1), dict(lora_rank=-1), dict(micro_batch=-1),
                                    dict(context=500), dict(trackers='tensorbord')], ids=str)
def test_what_no_stage_can_do_is_refused_by_the_name_of_the_field(change):
    with pytest.raises(InputError, match=next(iter(change))): replace(RECIPE, **change).check(model_of(context=64))


# --- a stage ----------------------------------------------------------------------------------------------------------------------

def reading(told: Recipe = RECIPE, loss=None, **more):
    "A task that reads the texts of the tests of training."
    def task_for(learner, folder: Path, scratch: Path) -> Task:
        packed = ragged(learner)
        def plain(model, batch): return dict(loss=lm_loss(model, batch))
        return Task(lambda step: packed.batch(batch_rows(len(packed), told.batch_size, step, told.seed)), loss or plain, **more)
    return task_for


def stage_of(folder: Path, task_for, recipe: Recipe = RECIPE):
    return train_stage(Run(folder), 'reader', recipe, without_dropout(model_of(context=64)), task_for, {}, [], 'reading')


def test_a_stage_is_kept_and_made_again_when_what_it_depends_on_changes(tmp_path):
    student = without_dropout(model_of(context=64))
    before, made = weights_hash(student.model), stage_of(tmp_path, reading())
    assert weights_hash(student.model) == before != weights_hash(made.model) and made.name == 'reader'
    assert [row['step'] for row in read_json(tmp_path/'models'/'reader'/'history.json')] == [*range(RECIPE.steps)]
    for how in (dict(micro_batch=2), dict(gradient_checkpointing=True), dict(trackers='tensorboard')):
        kept = stage_of(tmp_path, lambda *_: pytest.fail('trained again'), replace(RECIPE, **how))
        assert weights_hash(kept.model) == weights_hash(made.model)
    assert weights_hash(stage_of(tmp_path, reading(), replace(RECIPE, learning_rate=1e-3)).model) != weights_hash(made.model)


def test_adapters_are_merged_and_what_is_to_be_told_at_the_end_sees_the_plain_model(tmp_path):
    ended = []
    made = stage_of(tmp_path, reading(finish=ended.append), replace(RECIPE, lora_rank=2))
    assert not has_adapters(made.model) and weights_hash(ended[0].model) == weights_hash(made.model)


def test_a_stage_short_of_memory_goes_on_from_its_checkpoint_with_a_smaller_micro_batch(tmp_path, monkeypatch):
    "On several processes a stage cannot lower it by itself: it says what to set, and who does so loses no step."
    monkeypatch.setattr(recipe, 'Checkpoints', lambda folder: Checkpoints(folder, steps=1))
    whole, most = stage_of(tmp_path/'whole', reading()), dict(rows=6)
    computed = []
    def loss(model, batch):
        if len(computed) >= 3 and len(batch['input_ids']) > most['rows']:
            raise InputError('the memory does not suffice for 6 rows at once in process 0 of 2; set micro_batch to 2.')
        computed.append(len(batch['input_ids']))
        return dict(loss=lm_loss(model, batch))
    most['rows'] = 2
    with pytest.raises(InputError, match='set micro_batch to 2'): stage_of(tmp_path/'short', reading(loss=loss))
    assert computed == [6]*3
    made = stage_of(tmp_path/'short', reading(loss=loss), replace(RECIPE, micro_batch=2))
    assert computed == [6]*3 + [2]*9, 'three steps were kept, and three computed in three parts each'
    assert furthest(made.model, whole.model) < 1e-3


def test_a_stage_that_is_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, 'Checkpoints', lambda folder: Checkpoints(folder, steps=1))
    whole, stops = stage_of(tmp_path/'whole', reading()), [2]
    def stop(step, model):
        if stops and step == stops[0]: raise Stopped(stops.pop())
    with pytest.raises(Stopped): stage_of(tmp_path/'stopped', reading(on_step_end=stop))
    made = stage_of(tmp_path/'stopped', reading(on_step_end=stop))
    assert weights_hash(made.model) == weights_hash(whole.model)


# --- adapters ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', ['llama', 'gpt2', 'gpt_neox', 'qwen2'])
def test_adapters_alone_learn_and_merge_into_a_plain_model(family, tmp_path):
    lm, twin = without_dropout(model_of(family, bits=64)), model_of(family, bits=64)
    packed = ragged(lm)
    batch, before = packed.batch([0, 1, 2]), {name: p.clone() for name, p in lm.model.state_dict().items()}
    with torch.no_grad(): start = hidden_states(lm.model, batch)
    adapted, merge = lora(lm.model, rank=3)
    wanted = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert adapted is lm.model and wanted and all('lora_' in name for name in wanted)
    with torch.no_grad(): assert torch.equal(hidden_states(adapted, batch), start)  # B is 0
    history = train(lm, packed, steps=12, learning_rate=2e-2)
    assert history[-1]['loss'] < history[0]['loss'] - 0.05 and all((p.grad is None) or p.requires_grad for p in adapted.parameters())
    base = {name.replace('.base_layer', ''): p for name, p in adapted.state_dict().items() if 'lora_' not in name}
    assert all(torch.equal(base[name], before[name]) for name in before)
    with torch.no_grad(): learnt = logits_of(adapted, hidden_states(adapted, batch))
    plain = merge()
    assert plain is lm.model and not has_adapters(plain) and all(p.requires_grad for p in plain.parameters())
    with torch.no_grad(): assert torch.allclose(logits_of(plain, hidden_states(plain, batch)), learnt, atol=1e-12)
    assert list(plain.state_dict()) == list(twin.model.state_dict())
    assert weights_hash(load(save(lm, tmp_path/'merged'), 'cpu', torch.float64).model) == weights_hash(plain)
    assert not torch.allclose(learnt, logits_of(twin.model, start), atol=1e-3)


def test_adapters_begin_where_the_seed_says_and_alpha_is_their_strength():
    def first(seed, drawn=0):
        torch.manual_seed(drawn)
        state = torch.random.get_rng_state()
        adapted = lora(model_of().model, 2, seed=seed)[0]
        assert torch.equal(state, torch.random.get_rng_state())
        return weights_hash(adapted)
    assert first(0) == first(0, drawn=5) != first(1)
    strengths = [next(m.scaling['default'] for m in lora(model_of().model, 4, alpha)[0].modules() if hasattr(m, 'lora_A'))
                 for alpha in (None, 2.0)]
    assert strengths == [2.0, 0.5]


def test_adapters_of_a_model_in_16_bits_learn_in_32():
    adapted = lora(model_of().model.bfloat16(), 2)[0]
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_adapters_that_cannot_be_are_refused(monkeypatch):
    with pytest.raises(InputError, match='rank of LoRA is 0'): lora(model_of().model, 0)
    model = lora(model_of().model, 2)[0]
    with pytest.raises(InputError, match='has adapters already'): lora(model, 2)
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(InputError, match=r"scilm_adapt\[lora\]"): lora(model_of().model, 2)
