"""Packed documents stay apart, saved models come back, and what is no model is refused: for all four families."""
import copy
import json
import os
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as library_logging

from scilm_adapt.divergence import head_of
from scilm_adapt.errors import InputError
from scilm_adapt.models import (
    LanguageModel,
    _free_memory,
    adopt_chat,
    best_device,
    build,
    check_memory,
    families,
    hidden_states,
    load,
    logits_of,
    mixed_precision,
    parameter_count,
    same_vocabulary,
    save,
    shared_vocabulary,
    teacher_dtype,
    tiny,
    weights_hash,
)
from scilm_adapt.teacher import LiveTeacher
from scilm_adapt.tokens import _laid_out, encode_document, end_of_turn, pack, pad
from scilm_adapt.training import target_states

torch.set_num_threads(1)
TEXTS = ['Heat flows from warm bodies to cold ones.', 'Light is a wave.', 'Теплота переходит от тёплых тел к холодным.',
         'A wave and a particle.']
FAMILIES = list(families(1, 1, 1, 1, 1))
each_family = pytest.mark.parametrize('family', FAMILIES)


@pytest.fixture(scope='module')
def lms() -> dict[str, LanguageModel]:
    "A tiny model of each family; do not change them."
    return {family: tiny(TEXTS, family) for family in FAMILIES}


# --- packed documents -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module', params=FAMILIES)
def packed_case(request, lms):
    "A model, its documents packed into two rows, and states and logits of each document read alone, in the places of the rows."
    lm = lms[request.param]
    documents = [encode_document(lm.tokenizer, text) for text in TEXTS]
    packed = pack(documents, length=max(map(len, documents)) + min(map(len, documents)) + 3)
    batch = packed.batch(list(range(len(packed))))
    assert len(packed) > 1 and (packed.segments == 2).any() and (packed.segments == 0).any()
    real = batch['segments'] > 0
    alone, logits_alone = torch.zeros(*real.shape, lm.model.config.hidden_size), torch.zeros(*real.shape, len(lm.tokenizer))
    with torch.no_grad():
        for number, ids in enumerate(documents):
            where = real & (torch.from_numpy(packed.documents) == number)
            alone[where] = lm.model.base_model(torch.tensor([ids])).last_hidden_state[0]
            logits_alone[where] = lm.model(torch.tensor([ids])).logits[0]
    return lm, batch, real, (alone, logits_alone)


@torch.no_grad()
def differences(lm, states, alone, real) -> list[float]:
    "The largest differences in real places, of the states and of the logits."
    return [(got - wanted)[real].abs().max().item() for got, wanted in zip((states, logits_of(lm.model, states)), alone)]


def test_packed_documents_are_read_as_if_alone(packed_case):
    lm, batch, real, alone = packed_case
    with torch.no_grad(): states = hidden_states(lm.model, batch)
    assert max(differences(lm, states, alone, real)) <= 1e-5


def test_windows_of_a_long_document_and_its_neighbours_stay_apart(lms):
    "Also where documents are cut to fill the rows, and where the tokens come from disk."
    lm = lms['llama']
    documents = [encode_document(lm.tokenizer, text) for text in (*TEXTS, ' '.join(TEXTS))]
    packed = pack(_laid_out(documents), length=24, share=0.95)
    assert len(packed.lengths) > len(documents) and (np.diff(packed.rows) > 1).any()
    batch = packed.batch(range(len(packed)))
    with torch.no_grad():
        logits = logits_of(lm.model, hidden_states(lm.model, batch))
        for row in range(len(packed)):
            for segment in range(1, int(batch['segments'][row].max()) + 1):
                where = batch['segments'][row] == segment
                alone = lm.model(batch['input_ids'][row][where][None]).logits[0]
                assert (logits[row][where] - alone).abs().max() <= 1e-5


def test_gradients_are_those_of_documents_alone(packed_case):
    "In training mode too, where a cache would be off by itself and a mask would not."
    lm, batch, real, _ = packed_case
    model = copy.deepcopy(lm.model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout): module.p = 0.0
    weight = model.get_input_embeddings().weight
    hidden_states(model, batch)[real].square().sum().backward()
    together, weight.grad = weight.grad, None
    documents = [batch['input_ids'][row][batch['segments'][row] == segment] for row in range(len(real))
                 for segment in range(1, int(batch['segments'][row].max()) + 1)]
    for ids in documents: model.base_model(ids[None]).last_hidden_state.square().sum().backward()
    assert (together - weight.grad).abs().max() <= 1e-4*weight.grad.abs().max()


@pytest.mark.parametrize('trap', ['a mask of ones', 'a mask of what is real', 'the default cache', 'positions that run on'])
def test_each_of_the_three_conditions_is_needed(packed_case, trap):
    "If one of these stops leaking, the library has changed, and `hidden_states` may be simpler."
    lm, batch, real, alone = packed_case
    given = dict(input_ids=batch['input_ids'], position_ids=batch['position_ids'], use_cache=False)
    if trap == 'a mask of ones': given['attention_mask'] = torch.ones_like(batch['input_ids'])
    if trap == 'a mask of what is real': given['attention_mask'] = real.long()
    if trap == 'the default cache': del given['use_cache']
    if trap == 'positions that run on': del given['position_ids']
    with torch.no_grad(): states = lm.model.base_model(**given).last_hidden_state
    assert min(differences(lm, states, alone, real)) > 1e-3


@each_family
def test_padded_rows_use_their_mask(lms, family):
    lm = lms[family]
    rows = [encode_document(lm.tokenizer, text) for text in TEXTS]
    with torch.no_grad():
        states = hidden_states(lm.model, pad(rows, lm.tokenizer.pad_token_id))
        for ids, got in zip(rows, states):
            alone = lm.model.base_model(torch.tensor([ids])).last_hidden_state[0]
            assert (got[:len(ids)] - alone).abs().max() <= 1e-5


@pytest.mark.parametrize('family', [*FAMILIES, 'gemma2', 'cohere', 'granite'])
def test_the_two_halves_are_the_whole(family):
    "States and head give the model's own logits, also in families that scale or cap them."
    if family in FAMILIES: model = tiny(TEXTS, family).model
    else:
        sizes = dict(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=2, head_dim=16, pad_token_id=0)
        scaling = dict(gemma2=dict(final_logit_softcapping=0.05), cohere=dict(logit_scale=0.3), granite=dict(logits_scaling=4.0))[family]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **scaling)).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        hidden = hidden_states(model, dict(input_ids=ids, attention_mask=None))
        assert torch.allclose(logits_of(model, hidden), model(ids).logits, atol=1e-6, rtol=1e-5)


# --- tiny models ------------------------------------------------------------------------------------------------------------------

@each_family
def test_a_tiny_model_is_a_function_of_its_seed(family):
    torch.manual_seed(1); before = torch.random.get_rng_state()
    one = tiny(TEXTS, family, hidden=32, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())  # and global chance stays as it was
    torch.manual_seed(2)
    assert weights_hash(tiny(TEXTS, family, hidden=32, seed=3).model) == weights_hash(one.model)
    assert weights_hash(tiny(TEXTS, family, hidden=32, seed=4).model) != weights_hash(one.model)
    assert one.model.config.model_type == family and one.context == 512 and not one.model.training


def test_shared_weights_count_once(lms):
    for lm in lms.values():
        tensors = {tensor.data_ptr(): tensor.numel() for tensor in lm.model.parameters()}
        assert parameter_count(lm.model) == sum(tensors.values())


# --- save and load ----------------------------------------------------------------------------------------------------------------

def logits(lm: LanguageModel) -> torch.Tensor:
    with torch.no_grad(): return lm.model(torch.tensor([encode_document(lm.tokenizer, TEXTS[0])])).logits


@each_family
def test_a_saved_model_comes_back_bit_for_bit(lms, family, tmp_path):
    lm = lms[family]
    again = load(save(lm, tmp_path/'model'), device='cpu')
    assert weights_hash(again.model) == weights_hash(lm.model) and torch.equal(logits(again), logits(lm))
    assert same_vocabulary(again.tokenizer, lm.tokenizer) and again.tokenizer.chat_template == lm.tokenizer.chat_template
    assert encode_document(again.tokenizer, TEXTS[2]) == encode_document(lm.tokenizer, TEXTS[2])
    assert not again.model.training and again.name == str(tmp_path/'model')


@each_family
def test_a_model_saved_in_half_the_bytes_comes_back(lms, family, tmp_path):
    lm = lms[family]
    before = weights_hash(lm.model)
    save(lm, tmp_path/'model', dtype=torch.bfloat16)
    assert weights_hash(lm.model) == before and lm.model.dtype == torch.float32  # saving changes nothing
    half, whole = load(tmp_path/'model', 'cpu', torch.bfloat16), load(tmp_path/'model', 'cpu')
    wanted = {name: tensor.bfloat16() for name, tensor in lm.model.state_dict().items()}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in half.model.state_dict().items())
    assert all(torch.equal(tensor, wanted[name].float()) for name, tensor in whole.model.state_dict().items())
    assert json.loads((tmp_path/'model'/'config.json').read_text()).get('dtype') == 'bfloat16'
    assert AutoModelForCausalLM.from_pretrained(tmp_path/'model').dtype == torch.bfloat16  # as other programs open it


@each_family
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('tied', [True, False], ids=['tied', 'untied'])
def test_every_weight_is_written_once(family, dtype, tied, tmp_path):
    lm = tiny(TEXTS, family, hidden=32)
    if not tied:
        config = copy.deepcopy(lm.model.config)
        config.tie_word_embeddings = False
        torch.manual_seed(0)
        lm = LanguageModel(AutoModelForCausalLM.from_config(config).eval(), lm.tokenizer, 'untied')
    own = lm.model.get_output_embeddings().weight is not lm.model.get_input_embeddings().weight
    assert own != tied
    save(lm, tmp_path, dtype=dtype)
    stored = load_file(tmp_path/'model.safetensors')
    assert sum(tensor.numel() for tensor in stored.values()) == parameter_count(lm.model)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert (tmp_path/'model.safetensors').stat().st_size < parameter_count(lm.model)*dtype.itemsize + 20_000
    again = load(tmp_path, device='cpu').model
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    assert all(torch.equal(tensor, lm.model.state_dict()[name].to(dtype).float()) for name, tensor in again.state_dict().items())


@each_family
def test_other_programs_find_what_they_need(lms, family, tmp_path):
    lm = lms[family]
    save(lm, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json'} <= names
    assert not [name for name in names if name.endswith(('.bin', '.pt', '.py'))]
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    stops = json.loads((tmp_path/'generation_config.json').read_text())['eos_token_id']
    assert set(stops) == {end_of_turn(lm.tokenizer), lm.tokenizer.eos_token_id} == set(model.generation_config.eos_token_id)
    assert '<|im_start|>user\nq<|im_end|>' in tokenizer.apply_chat_template([dict(role='user', content='q')], tokenize=False)


def test_a_base_model_without_a_template_stops_at_the_end_of_a_document(lms, tmp_path):
    lm = tiny(TEXTS, hidden=32)
    lm.tokenizer.chat_template = None
    save(lm, tmp_path)
    assert load(tmp_path, 'cpu').model.generation_config.eos_token_id in (lm.tokenizer.eos_token_id, [lm.tokenizer.eos_token_id])
    assert load(tmp_path, 'cpu').tokenizer.chat_template is None


# --- what is refused --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(lms, tmp_path) -> Path:
    return save(lms['llama'], tmp_path/'model')


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught: load(folder, device='cpu')
    assert str(folder) in str(caught.value) and '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize('name', ['./nowhere', '/nowhere/model', '~/no such model', '../nowhere', 'nobody/no-such-model', 'no-such-model'])
def test_a_model_that_is_not_there_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught: load(name)
    assert name in str(caught.value) and '\n' not in str(caught.value)


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    assert 'config.json' in refused(tmp_path)
    (tmp_path/'notes.txt').write_text('no model')
    assert 'config.json' in refused(tmp_path)


def test_a_file_is_no_model_folder(saved):
    refused(saved/'model.safetensors')


def test_pickled_weights_are_not_read(saved, tmp_path):
    "A pickle can run anything; this one would leave a mark."
    class Marker:
        def __reduce__(self): return open, (str(tmp_path/'executed'), 'w')
    (saved/'model.safetensors').unlink()
    torch.save(dict(weights=Marker()), saved/'pytorch_model.bin')
    refused(saved)
    assert not (tmp_path/'executed').exists()


@pytest.mark.parametrize('known', [True, False], ids=['of a known type', 'of an unknown type'])
def test_code_that_comes_with_a_model_is_not_run(saved, tmp_path, known):
    code = (f'open({str(tmp_path/"executed")!r}, "w").close()\nimport transformers as t\n'
            'class C(t.LlamaConfig): model_type = "custom"\nclass M(t.LlamaForCausalLM): config_class = C\n'
            'class T(t.PreTrainedTokenizerFast): pass\n')
    (saved/'custom.py').write_text(code)
    edit(saved/'config.json', auto_map=dict(AutoConfig='custom.C', AutoModelForCausalLM='custom.M'),
         **({} if known else dict(model_type='custom', architectures=['M'])))
    edit(saved/'tokenizer_config.json', auto_map=dict(AutoTokenizer=['custom.T', 'custom.T']))
    if known: assert type(load(saved, device='cpu').model).__module__.startswith('transformers.')
    else: refused(saved)
    assert not (tmp_path/'executed').exists()


@pytest.mark.parametrize('damage', ['no weights', 'cut weights', 'empty weights', 'not weights', 'a missing weight', 'other shapes',
                                    'cut config', 'an unknown type', 'no tokenizer', 'an encoder', 'cut tokenizer'])
def test_a_damaged_model_is_refused(saved, damage):
    weights = saved/'model.safetensors'
    if damage == 'no weights': weights.unlink()
    if damage == 'cut weights': os.truncate(weights, weights.stat().st_size//2)
    if damage == 'empty weights': os.truncate(weights, 0)
    if damage == 'not weights': weights.write_text('version https://git-lfs.github.com/spec/v1\n'*5)
    if damage == 'a missing weight':
        tensors = load_file(weights)
        del tensors['model.layers.1.mlp.up_proj.weight']
        save_file(tensors, weights, metadata=dict(format='pt'))
    if damage == 'other shapes': edit(saved/'config.json', hidden_size=128)
    if damage == 'cut config': os.truncate(saved/'config.json', 40)
    if damage == 'an unknown type': edit(saved/'config.json', model_type='no_such_family')
    if damage == 'no tokenizer':
        for path in saved.glob('*token*'): path.unlink()
    if damage == 'an encoder': edit(saved/'config.json', model_type='vit')
    if damage == 'cut tokenizer': os.truncate(saved/'tokenizer.json', 100)
    refused(saved)


def test_a_home_folder_may_be_written_with_a_tilde(saved, monkeypatch):
    monkeypatch.setenv('HOME', str(saved.parent))
    assert weights_hash(load('~/model', device='cpu').model) == weights_hash(load(saved, device='cpu').model)


def test_a_tokenizer_without_padding_pads_with_its_end(lms, tmp_path):
    lm = tiny(TEXTS, hidden=32)
    save(lm, tmp_path)
    edit(tmp_path/'tokenizer_config.json', pad_token=None)
    assert load(tmp_path, device='cpu').tokenizer.pad_token_id == lm.tokenizer.eos_token_id


# --- vocabularies -----------------------------------------------------------------------------------------------------------------

def test_heads_that_differ_only_in_padding_fit():
    student, teacher = tiny(TEXTS, hidden=32), tiny(TEXTS, 'qwen2', seed=1)
    size = len(student.tokenizer)
    assert shared_vocabulary(student, teacher) == size
    teacher.model.resize_token_embeddings(512)
    assert shared_vocabulary(student, teacher) == shared_vocabulary(teacher, student) == size
    student.model.resize_token_embeddings(448)
    assert shared_vocabulary(student, teacher) == 448
    assert teacher.model.get_output_embeddings().weight.shape[0] == 512  # nothing was cut


def test_different_vocabularies_are_refused_also_at_equal_size():
    one, other = tiny(TEXTS, size=300), tiny([text[::-1] for text in TEXTS], size=300)
    assert len(one.tokenizer) == len(other.tokenizer) == 300
    with pytest.raises(InputError, match='different vocabularies'): shared_vocabulary(one, other)
    with pytest.raises(InputError, match='300 and 310 tokens|310 and 300 tokens'): shared_vocabulary(one, tiny(TEXTS, size=310))


def test_the_same_tokens_under_other_ids_are_refused(tmp_path):
    one = tiny(TEXTS, hidden=32)
    save(one, tmp_path)
    content = json.loads((tmp_path/'tokenizer.json').read_text())
    vocabulary = content['model']['vocab']
    vocabulary['!'], vocabulary['"'] = vocabulary['"'], vocabulary['!']
    (tmp_path/'tokenizer.json').write_text(json.dumps(content))
    other = load(tmp_path, device='cpu')
    assert set(other.tokenizer.get_vocab()) == set(one.tokenizer.get_vocab()) and not same_vocabulary(one.tokenizer, other.tokenizer)
    with pytest.raises(InputError, match=re.escape("'!'")): shared_vocabulary(one, other)


def test_a_base_student_takes_the_teachers_template():
    student, teacher = tiny(TEXTS, hidden=32), tiny(TEXTS)
    student.tokenizer.chat_template = None
    adopt_chat(student, teacher)
    assert student.tokenizer.chat_template == teacher.tokenizer.chat_template
    teacher.tokenizer.chat_template = None
    with pytest.raises(InputError, match='instruct or chat'): adopt_chat(student, teacher)


# --- memory and precision ---------------------------------------------------------------------------------------------------------

def test_too_little_memory_is_said_beforehand(lms):
    assert check_memory(lms['llama']) == 12*parameter_count(lms['llama'].model)/2**30
    with torch.device('meta'):  # has a size and no content
        giant = build(lms['llama'].tokenizer, hidden=2**15, layers=64, heads=256, name='giant')
    with pytest.raises(InputError, match=r"'giant' needs at least [\d.]+ GiB more memory and [\d.]+ GiB are free; choose a smaller"):
        check_memory(giant)


@pytest.mark.skipif(not Path('/proc/meminfo').exists(), reason='only Linux tells')
def test_memory_that_the_system_lends_to_files_counts_as_free():
    "Most of an old machine's memory holds copies of files, which it gives back at once."
    for _ in range(5):  # other programs take and give meanwhile
        available = int(re.search(r'MemAvailable:\s+(\d+) kB', Path('/proc/meminfo').read_text())[1])*1024
        if abs(_free_memory(torch.device('cpu')) - available) < 2**28: return
    raise AssertionError(f"{_free_memory(torch.device('cpu')):,} against {available:,}")


def test_precision_is_what_the_device_multiplies():
    assert best_device().type in ('cpu', 'cuda', 'mps') and mixed_precision() in ('no', 'bf16', 'fp16')
    assert teacher_dtype(torch.device('cpu')) == teacher_dtype(torch.device('mps')) == torch.float32
    assert mixed_precision(torch.device('cpu')) in ('no', 'bf16') and mixed_precision(torch.device('mps')) == 'no'


def test_hashes_of_weights_see_every_change(lms, tmp_path):
    lm = load(save(lms['gpt2'], tmp_path), device='cpu')
    before = weights_hash(lm.model)
    with torch.no_grad():
        bias = next(tensor for name, tensor in lm.model.named_parameters() if name.endswith('bias'))
        bias[0] += 1e-7
    assert weights_hash(lm.model) != before and weights_hash(lm.model.bfloat16()) != before
    shutil.rmtree(tmp_path)


# --- rounded to 8 or 4 bits -------------------------------------------------------------------------------------------------------

needs_bitsandbytes = pytest.mark.skipif(find_spec('bitsandbytes') is None, reason='the extra `quantised` is not installed')


@pytest.fixture(scope='module')
def whole() -> LanguageModel: return load('zoo:teacher', 'cpu')


@needs_bitsandbytes
@pytest.mark.parametrize(('bits', 'memory', 'nats'), [(8, 0.45, 0.002), (4, 0.5, 0.1)])
def test_a_rounded_teacher_answers_nearly_as_the_whole_one(whole, bits, memory, nats):
    rounded = load('zoo:teacher', 'cpu', bits=bits)
    assert not rounded.model.training and rounded.name == 'zoo:teacher' and same_vocabulary(rounded.tokenizer, whole.tokenizer)
    assert rounded.model.get_memory_footprint() < memory*whole.model.get_memory_footprint()
    ids = torch.tensor([encode_document(whole.tokenizer, 'The mean of an array is the sum of its values divided by their number.')])
    with torch.no_grad(): p, q = (lm.model(ids).logits.double().log_softmax(-1) for lm in (whole, rounded))
    assert 0 < (p.exp()*(p - q)).sum(-1).mean() < nats


NF4 = torch.tensor([-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
                    0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0])  # arXiv:2305.14314, appendix E


def to_4_bits(matrix: torch.Tensor) -> torch.Tensor:
    "Each weight as the nearest of 16 numbers, in units of the largest of its block of 64."
    blocks = matrix.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    return (NF4[((blocks/largest)[..., None] - NF4).abs().argmin(-1)]*largest).reshape(matrix.shape)


@needs_bitsandbytes
@each_family
def test_four_bits_are_what_they_should_be(lms, family, tmp_path):
    "Also where rows are no multiple of 64 long, as 160 here."
    wanted = copy.deepcopy(lms[family].model)
    for layer in wanted.modules():
        if layer is wanted.get_output_embeddings(): continue
        if isinstance(layer, torch.nn.Linear): layer.weight.data = to_4_bits(layer.weight.data)
        if isinstance(layer, Conv1D): layer.weight.data = to_4_bits(layer.weight.data.T.contiguous()).T  # GPT-2's, the other way round
    save(lms[family], tmp_path)
    rounded, ids = load(tmp_path, 'cpu', bits=4).model, torch.arange(3, 40)[None]
    with torch.no_grad(): found, exact, before = (model(ids).logits for model in (rounded, wanted, lms[family].model))
    assert torch.allclose(found, exact, atol=1e-5) and not torch.allclose(before, exact, atol=1e-3)


@needs_bitsandbytes
@pytest.mark.parametrize('bits', [8, 4])
def test_a_rounded_model_is_hashed_and_stays_as_it_was_loaded(whole, bits, capfd):
    one, other = (load('zoo:teacher', 'cpu', bits=bits) for _ in range(2))
    before = weights_hash(one.model)
    capfd.readouterr()
    logits(one)
    assert capfd.readouterr().err == ''  # a warning in every layer would bury all else
    assert weights_hash(one.model) == before == weights_hash(other.model) != weights_hash(whole.model)


@needs_bitsandbytes
@each_family
def test_heads_and_embeddings_are_not_rounded(lms, family, tmp_path):
    "What the losses read is the head's weights, so these must be numbers."
    lm = lms[family]
    save(lm, tmp_path)
    rounded = load(tmp_path, 'cpu', bits=8).model
    for of in ('get_input_embeddings', 'get_output_embeddings'):
        assert torch.equal(getattr(rounded, of)().weight, getattr(lm.model, of)().weight)
    assert torch.int8 in {weight.dtype for weight in rounded.parameters()}


@needs_bitsandbytes
@pytest.mark.parametrize('bits', [8, 4])
def test_a_rounded_teacher_teaches(whole, bits):
    rounded, student = load('zoo:teacher', 'cpu', bits=bits), build(whole.tokenizer, hidden=32, layers=1)
    batch = pack([encode_document(whole.tokenizer, text) for text in ('The mean of an array.', 'Sort a list of numbers.')], 64).batch([0])
    hidden = hidden_states(student.model, batch)
    states, head = target_states(hidden, batch)[0], head_of(student.model)
    assert torch.equal(head_of(rounded.model).weight, head_of(whole.model).weight)
    near, exact = (LiveTeacher(lm).loss(batch, states, head) for lm in (rounded, whole))
    assert torch.isclose(near, exact, rtol=0.1) and near != exact
    gradient, = torch.autograd.grad(near, hidden)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    targets, wanted = LiveTeacher(rounded).targets(batch), rounded.model(batch['input_ids'], position_ids=batch['position_ids'],
                                                                         use_cache=False).logits[:, :-1][batch['loss_mask'][:, 1:]]
    assert torch.allclose(targets, wanted, atol=1e-4)


@pytest.mark.parametrize('bits', [0, 1, 16, 32])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(InputError, match=f'bits is {bits}; choose 8 or 4, or None'): load('zoo:teacher', 'cpu', bits=bits)


def test_the_extra_that_rounding_takes_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'bitsandbytes', None)
    with pytest.raises(InputError, match=r"bitsandbytes package; pip install 'scilm_adapt\[quantised\]'"):
        load('zoo:teacher', 'cpu', bits=8)


def test_the_address_of_a_server_is_no_model():
    with pytest.raises(InputError, match='is the address of a server.*scilm instruct'): load('http://127.0.0.1:8000/v1#name')


@pytest.mark.parametrize('shown', [True, False])
def test_the_library_draws_no_bars_for_folders_on_this_machine_and_is_left_as_it_was(shown, tmp_path, capfd):
    lm = build(load('zoo:student', 'cpu').tokenizer, layers=1)
    before = library_logging.is_progress_bar_enabled()
    (library_logging.enable_progress_bar if shown else library_logging.disable_progress_bar)()
    try:
        capfd.readouterr()
        load(save(lm, tmp_path/'model'), 'cpu')
        assert capfd.readouterr().err == ''
        assert library_logging.is_progress_bar_enabled() == shown == (not are_progress_bars_disabled())
    finally: (library_logging.enable_progress_bar if before else library_logging.disable_progress_bar)()
