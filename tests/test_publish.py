"""Models written for other programs: what is read back is what was written, for every family and kind; and one commit to a Hub."""
import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from gguf import GGUFReader
from test_gguf import TEXTS, logits, small
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from scilm_adapt import cli
from scilm_adapt.errors import InputError
from scilm_adapt.gguf import _ARCHITECTURES, _splitting_of, read_header
from scilm_adapt.models import LanguageModel, build, families, load, save, tiny
from scilm_adapt.publish import _card_for, _modelfile, _read_back, export_gguf, push
from scilm_adapt.tokens import end_of_turn, train_tokenizer

torch.set_num_threads(1)
CARD = "---\nlicense: other\n---\n# small\n\nmodel = AutoModelForCausalLM.from_pretrained('models/small')\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    "A model folder 'small' as a run leaves it, with a card and what belongs to the run."
    save(small('llama'), tmp_path/'small')
    (tmp_path/'small'/'README.md').write_text(CARD)
    for name in ('manifest.json', 'history.json', '.verified.json'): (tmp_path/'small'/name).write_text('{"path": "/srv/me"}')
    return tmp_path/'small'


# --- GGUF --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', _ARCHITECTURES)
def test_each_family_is_read_back_with_the_same_answers(family, tmp_path):
    lm = small(family)
    save(lm, tmp_path/'small')
    found = export_gguf(tmp_path/'small', tmp_path/'small.gguf', 'f32')
    assert (found.same, found.asked) == (4, 4) and found.size == (tmp_path/'small.gguf').stat().st_size
    assert found.split_as == _splitting_of(load(tmp_path/'small', 'cpu').tokenizer)
    about, _ = read_header(tmp_path/'small.gguf')
    ends = [about[f'tokenizer.ggml.{name}_token_id'] for name in ('eos', 'eot')]
    assert ends == [lm.tokenizer.eos_token_id, end_of_turn(lm.tokenizer)]
    assert about['tokenizer.chat_template'] == lm.tokenizer.chat_template and about['general.name'] == 'small'
    assert not [path for path in tmp_path.iterdir() if path.name.startswith('.')]


@pytest.mark.parametrize('kind', ['f16', 'q8_0', 'q4_1'])
def test_each_kind_of_number_is_what_its_name_says(kind, folder):
    found = export_gguf(folder, folder.with_name('small.gguf'), kind)
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(found.path).tensors if len(tensor.shape) > 1}
    assert kinds == {kind.upper()} and kind in str(found) and (kind != 'f32' or found.same == found.asked)


def test_matrices_without_whole_blocks_keep_16_bits(tmp_path):
    save(small('llama', hidden_size=48, head_dim=12), tmp_path/'small')
    export_gguf(tmp_path/'small', tmp_path/'small.gguf', 'q8_0')
    assert {t.tensor_type.name for t in GGUFReader(tmp_path/'small.gguf').tensors if t.shape[0] == 48 and len(t.shape) > 1} == {'F16'}


def test_rows_without_a_token_heads_of_their_own_and_more_than_one_end(tmp_path):
    "A vocabulary that is padded as Qwen's, an output matrix of its own, added words that are no control tokens."
    lm = small('qwen2', tie_word_embeddings=False)
    lm.tokenizer.add_tokens(['µm', 'kelvin'])
    lm.model.resize_token_embeddings(len(lm.tokenizer) + 6)
    save(lm, tmp_path/'small')
    found = export_gguf(tmp_path/'small', tmp_path/'small.gguf', 'f32')
    about, _ = read_header(found.path)
    types = about['tokenizer.ggml.token_type']
    assert types.count(5) == 6 and types.count(4) == 2 and 'output.weight' in {t.name for t in GGUFReader(found.path).tensors}


def test_llama_3s_positions_go_with_it(tmp_path):
    rope = dict(rope_type='llama3', rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192)
    lm = small('llama', rope_parameters=rope)
    save(lm, tmp_path/'small')
    export_gguf(tmp_path/'small', tmp_path/'small.gguf', 'f32')
    ids = list(range(5, 100))
    assert (logits(load(tmp_path/'small.gguf', 'cpu').model, ids) - logits(lm.model, ids)).abs().max() <= 1e-4


SPLITS = [(pre_tokenizers.ByteLevel(add_prefix_space=False), False, 'gpt-2')] + [
    (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), 'isolated'),
                              pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]), ignores, name)
    for name, ignores in (('qwen2', False), ('llama-bpe', True), ('smaug-bpe', False))]


@pytest.mark.parametrize(('steps', 'ignores', 'name'), SPLITS)
def test_the_way_in_which_texts_are_split_has_the_name_that_llama_cpp_has_for_it(steps, ignores, name, tmp_path):
    lm = tiny(TEXTS, hidden=32)
    lm.tokenizer.backend_tokenizer.pre_tokenizer, lm.tokenizer.backend_tokenizer.model.ignore_merges = steps, ignores
    assert _splitting_of(lm.tokenizer) == name
    save(lm, tmp_path/'small')
    assert export_gguf(tmp_path/'small', tmp_path/'small.gguf', 'f32').split_as == name


@pytest.mark.parametrize(('change', 'said'), [
    (lambda t: setattr(t, 'pre_tokenizer', pre_tokenizers.Whitespace()), 'no name for .Whitespace'),
    (lambda t: setattr(t, 'pre_tokenizer', pre_tokenizers.ByteLevel(add_prefix_space=True)), 'no name for .ByteLevel'),
    (lambda t: setattr(t, 'normalizer', normalizers.Lowercase()), 'the tokens of')])
def test_a_tokenizer_that_would_read_otherwise_is_refused(change, said, tmp_path):
    "By its way to split; or, for what is not known, by the comparison."
    lm = tiny(TEXTS, hidden=32)
    change(lm.tokenizer.backend_tokenizer)
    save(lm, tmp_path/'small')
    with pytest.raises(InputError, match=said): export_gguf(tmp_path/'small', tmp_path/'small.gguf')
    assert not list(tmp_path.glob('*.gguf')) and not list(tmp_path.glob('.*'))


@pytest.mark.parametrize('family', ['gpt_neox', 'mistral'])
def test_other_families_are_refused_in_one_sentence(family, tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300)
    sizes = families(len(tokenizer), 32, 1, 4, 64)
    if family in sizes: lm = build(tokenizer, family, hidden=32, layers=1)
    else:
        more = dict(num_key_value_heads=2, head_dim=8) if family == 'mistral' else {}
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                      num_attention_heads=4, eos_token_id=0, **more)
        lm = LanguageModel(AutoModelForCausalLM.from_config(config).eval(), tokenizer, family)
    save(lm, tmp_path/'small')
    with pytest.raises(InputError, match=f"family '{family}' is not written as GGUF here, only one of llama, qwen2, qwen3, gpt2"):
        export_gguf(tmp_path/'small', tmp_path/'small.gguf')


def test_what_cannot_come_out_right_or_is_in_the_way_is_refused(folder, tmp_path):
    path = tmp_path/'small.gguf'
    with pytest.raises(InputError, match="'q4_k_m' is no kind"): export_gguf(folder, path, 'q4_k_m')
    with pytest.raises(InputError, match='does not end in .gguf'): export_gguf(folder, tmp_path/'small.bin')
    export_gguf(folder, path)
    with pytest.raises(InputError, match='is in the way'): export_gguf(folder, path)
    keys = 'model.layers.1.self_attn.k_proj.weight'
    for change, said in ((lambda lm: lm.model.get_parameter(keys).data.add_(0.5), 'blk.1.attn_k.weight'),
                         (lambda lm: setattr(lm.tokenizer, 'chat_template', f'{lm.tokenizer.chat_template} '), 'the chat template'),
                         (lambda lm: setattr(lm.tokenizer, 'eos_token', '<|im_end|>'), 'the tokens that end')):
        lm = load(folder, 'cpu')
        change(lm)
        with pytest.raises(InputError, match=f'does not come out .*{said}'): _read_back(lm, path, 'f16')
    rope = dict(rope_type='yarn', rope_theta=10000.0, factor=2.0, original_max_position_embeddings=64)
    save(small('qwen2', rope_parameters=rope), tmp_path/'yarn')
    with pytest.raises(InputError, match=r'stretches positions \(yarn\)'): export_gguf(tmp_path/'yarn', tmp_path/'yarn.gguf')


def test_ollama_is_told_a_chatml_template_and_no_other(folder, tmp_path):
    lm = load(folder, 'cpu')
    assert _modelfile(lm, 'a.gguf').splitlines() == [
        'FROM ./a.gguf', 'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}', '{{ .Content }}<|im_end|>',
        '{{ end }}<|im_start|>assistant', '"""', 'PARAMETER stop "<|im_end|>"', 'PARAMETER num_ctx 128', 'PARAMETER repeat_penalty 1.1']
    lm.tokenizer.chat_template = ("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"
                                  "{% if add_generation_prompt %}[assistant] {% endif %}")
    assert 'TEMPLATE' not in _modelfile(lm, 'a.gguf') and 'stop "<|im_end|>"' in _modelfile(lm, 'a.gguf')


def test_the_command_writes_a_file_that_chats(folder, tmp_path, capsys):
    assert cli.main(['export-gguf', str(folder), '-o', str(tmp_path/'small-q8_0.gguf'), '--outtype', 'q8_0']) == 0
    assert 'small-q8_0.gguf' in capsys.readouterr().out and (tmp_path/'small-q8_0.Modelfile').is_file()
    assert cli.main(['export-gguf', str(tmp_path/'none'), '-o', str(tmp_path/'x.gguf')]) == 2
    assert 'holds no model' in capsys.readouterr().err


# --- the Hub -----------------------------------------------------------------------------------------------------------------------

class Hub(BaseHTTPRequestHandler):
    "The part of the Hub's interface that a push needs: repositories, a commit of small files, and large files beside it."
    repositories: dict[str, dict] = {}
    uploads: dict[str, bytes] = {}
    asked: list[str] = []
    token = 'hf_right'

    def reply(self, body: object = None, status: int = 200) -> None:
        data = json.dumps(body or {}).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self):
        self.uploads[self.path.rpartition('/')[2]] = self.rfile.read(int(self.headers['Content-Length']))
        self.reply()

    def do_POST(self):
        length = self.headers['Content-Length']
        content = self.rfile.read(int(length)) if length else b''.join(iter(self.chunk, b''))
        self.asked.append(self.path)
        if self.headers['Authorization'] != f'Bearer {self.token}': return self.reply(dict(error='Invalid credentials'), 401)
        url = f'http://127.0.0.1:{self.server.server_port}'
        if self.path == '/api/validate-yaml': self.reply(dict(errors=[], warnings=[]))
        elif self.path == '/api/repos/create':
            asked = json.loads(content)
            name = '/'.join(filter(None, (asked.get('organization'), asked['name'])))
            if name in self.repositories: return self.reply(dict(error='exists', url=f'{url}/{name}'), 409)
            self.repositories[name] = dict(asked=asked, commits=[])
            self.reply(dict(url=f'{url}/{name}', name=name, id='1'))
        elif '/preupload/' in self.path:
            modes = {one['path']: 'lfs' if one['path'].endswith('.safetensors') else 'regular' for one in json.loads(content)['files']}
            files = [dict(path=path, uploadMode=mode, shouldIgnore=False, oid=None) for path, mode in modes.items()]
            self.reply(dict(files=files, commitOid='0'*40))
        elif self.path.endswith('/objects/batch'):
            objects = json.loads(content)['objects']
            found = [one | dict(actions=dict(upload=dict(href=f"{url}/put/{one['oid']}"))) for one in objects]
            self.reply(dict(transfer='basic', objects=found))
        elif '/commit/' in self.path:
            lines = [json.loads(line) for line in content.splitlines()]
            files = {}
            for line in lines:
                if line['key'] == 'file': files[line['value']['path']] = base64.b64decode(line['value']['content'])
                if line['key'] == 'lfsFile': files[line['value']['path']] = self.uploads[line['value']['oid']]
            self.repositories['/'.join(self.path.split('/')[3:5])]['commits'].append(files)
            self.reply(dict(commitUrl=f'{url}/me/small/commit/1', commitOid='1'*40, hookOutput=''))
        else: self.reply(dict(error='no such route'), 404)

    def chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def do_GET(self): self.reply(dict(error='Repository not found'), 401)  # to those who may not see it, nothing is there

    def log_message(self, *words): pass


@contextmanager
def hub_at(monkeypatch) -> Iterator[type[Hub]]:
    "A Hub of one's own, as HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE=0 would name it to a new process."
    kind = type('Own', (Hub,), dict(repositories={}, uploads={}, asked=[]))
    server = ThreadingHTTPServer(('127.0.0.1', 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in dict(ENDPOINT=f'http://127.0.0.1:{server.server_port}', HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True).items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv('HF_TOKEN', 'hf_right')
    huggingface_hub.close_session()
    try: yield kind
    finally: server.shutdown(); server.server_close(); huggingface_hub.close_session()


def test_a_model_is_pushed_with_its_card_in_one_commit_and_opens_as_it_was(folder, tmp_path, monkeypatch, capsys):
    with hub_at(monkeypatch) as hub:
        assert cli.main(['push', 'me/small', str(folder)]) == 0
        assert f'{huggingface_hub.constants.ENDPOINT}/me/small' in capsys.readouterr().out
        [files], asked = hub.repositories['me/small']['commits'], hub.repositories['me/small']['asked']
        assert asked.get('private', asked.get('visibility')) in (True, 'private')
        assert set(files) == {path.name for path in folder.iterdir()} - {'manifest.json', 'history.json', '.verified.json'}
        assert b"from_pretrained('me/small')" in files['README.md'] and b'/srv/me' not in b''.join(files.values())
        assert hashlib.sha256(files['model.safetensors']).digest() == hashlib.sha256((folder/'model.safetensors').read_bytes()).digest()
        (tmp_path/'there').mkdir()
        for name, data in files.items(): (tmp_path/'there'/name).write_bytes(data)
        again, before = load(tmp_path/'there', 'cpu'), load(folder, 'cpu')
        assert torch.equal(logits(again.model, [1, 2, 3]), logits(before.model, [1, 2, 3]))
        assert AutoTokenizer.from_pretrained(tmp_path/'there').chat_template == before.tokenizer.chat_template
        push(folder, 'me/small', public=True)  # into the same repository: one commit more
        assert len(hub.repositories['me/small']['commits']) == 2


def test_what_cannot_be_pushed_is_said_before_anything_is_sent(folder, tmp_path, monkeypatch):
    with hub_at(monkeypatch) as hub:
        with pytest.raises(InputError, match="'small' is no name of a repository; write it as OWNER/NAME"): push(folder, 'small')
        with pytest.raises(InputError, match='is no name of a repository'): push(folder, 'me/sm all')
        (folder/'README.md').unlink()
        with pytest.raises(InputError, match='has no model card.*finish the run'): push(folder, 'me/small')
        (folder/'README.md').write_text(CARD)
        monkeypatch.delenv('HF_TOKEN')
        monkeypatch.setattr(huggingface_hub.constants, 'HF_TOKEN_PATH', str(tmp_path/'none'))
        with pytest.raises(InputError, match='There is no token for http.*settings/tokens.*hf auth login'): push(folder, 'me/small')
        assert not hub.asked
        monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
        with pytest.raises(InputError, match='refuses the push to me/small: .*401'): push(folder, 'me/small')
        assert not hub.repositories
        monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
        with pytest.raises(InputError, match='HF_HUB_OFFLINE is set'): push(folder, 'me/small')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    with pytest.raises(InputError, match='failed .*check the network, or HF_ENDPOINT'): push(folder, 'me/small')
    (folder/'deltas.json').write_text('{}')
    with pytest.raises(InputError, match='takes beyond another one'): push(folder, 'me/small')
    assert _card_for(folder, 'a/b').endswith("from_pretrained('a/b')\n")
