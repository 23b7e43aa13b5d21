"""A world of a few words for tests: sentences, conversations, models that babble, servers, and processes that work together."""
import copy
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from scilm_adapt.decoding import reads_on
from scilm_adapt.endpoint import Endpoint
from scilm_adapt.models import LanguageModel, build, tiny
from scilm_adapt.papers import document
from scilm_adapt.teacher import addresses
from scilm_adapt.tokens import Packed, encode, encode_chat, pack

WORDS = 'heat light salt iron wave cold warm slow metal field flow air'.split()


def sentence(seed: int, words: int) -> str:
    chosen = np.random.default_rng(seed).choice(WORDS, words)
    return ' '.join(chosen).capitalize() + '.'


def conversation(number: int) -> dict:
    answer = sentence(number + 1000, 3 + number % 5)
    messages = [dict(role='user', content=sentence(number, 4 + number % 3)), dict(role='assistant', content=answer)]
    return dict(paper_id=str(number), kind='explanation', messages=messages, reference=answer, author='paper')


def changed(lm: LanguageModel, **changes) -> LanguageModel:
    lm = replace(lm, tokenizer=copy.deepcopy(lm.tokenizer))
    for name, value in changes.items(): setattr(lm.tokenizer, name, value)
    return lm


def exact(lm: LanguageModel) -> LanguageModel:
    "A copy in 64 bits. There a sum of n numbers is the same in any order up to n*2.2e-16 of their size, on every processor."
    return replace(lm, model=copy.deepcopy(lm.model).double())


BABBLE = ('Heat flows.', 'Light is a wave and a particle, and both of them at once; which of them depends on the question that one asks.',
          'Sound.', 'Salt dissolves in water, and iron does not.', 'Glass breaks.')


def loud(family: str = 'llama', **sizes) -> LanguageModel:
    """An untrained model that does not repeat a single token: its weights are larger than usual.

    In 64 bits, or two words that are nearly equally likely change places where a batch of another shape is added up in another order.
    """
    lm = exact(tiny(BABBLE, family, hidden=32, **sizes))
    for parameter in lm.model.parameters(): parameter.data *= 4
    return lm


def prompts_of(lm: LanguageModel) -> list[list[int]]: return [encode(lm.tokenizer, text) for text in BABBLE]


class Script(torch.nn.Module):
    "An output head that says these ids one a step, whatever it reads, and begins anew behind the last."
    def __init__(self, head: torch.nn.Module, ids: list[int]):
        super().__init__()
        self.weight, self.ids, self.place = head.weight, ids, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        said = self.ids[self.place % len(self.ids)]
        self.place += 1
        return 100*torch.nn.functional.one_hot(torch.tensor(said), len(self.weight)).to(self.weight.dtype).expand(*hidden.shape[:-1], -1)


def scripted(lm: LanguageModel, ids: list[int]) -> LanguageModel:
    "A copy of the model that says these ids, whatever it is asked."
    lm = replace(lm, model=copy.deepcopy(lm.model))
    reads_on(lm.model)  # which asks the model a few things, for once before it says what it is told to say
    lm.model.lm_head = Script(lm.model.lm_head, ids)
    return lm


def free_port() -> int:
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return free.getsockname()[1]


def reader(papers: list[dict], context: int = 64, **sizes) -> LanguageModel:
    "An untrained model, 32 wide, whose tokenizer was made of these papers."
    return tiny([document(paper) for paper in papers], hidden=32, context=context, **sizes)


def small_student(tokenizer: object) -> LanguageModel: return build(tokenizer, hidden=32, layers=1, context=128, name='student', seed=1)


def small_teacher(tokenizer: object) -> LanguageModel: return build(tokenizer, hidden=48, layers=2, context=128, name='teacher', seed=2)


def chat_batch(tokenizer: object, chats: list[dict], length: int = 160) -> dict[str, torch.Tensor]:
    "All these conversations as one batch of packed rows."
    ids, masks = zip(*(encode_chat(tokenizer, chat['messages']) for chat in chats))
    packed = pack(list(ids), length, list(masks))
    return packed.batch(list(range(len(packed))))


def addressed_batch(packed: Packed, rows: list[int] | None = None, **more) -> dict[str, torch.Tensor]:
    "These rows (all, if None) with the addresses of their targets in a cache."
    rows = list(range(len(packed))) if rows is None else rows
    return packed.batch(rows) | dict(address=addresses(packed)(rows)) | more


def descent(model, learning_rate):
    "Plain gradient descent, for `fit`: it does not divide by what is nearly zero."
    return [torch.optim.SGD(model.parameters(), lr=learning_rate)]


def two_processes(script: str, *arguments: str | Path) -> None:
    "Run a script with these arguments in two processes that torchrun starts; both have to end well."
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', str(free_port())]
    settings = os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', ACCELERATE_USE_CPU='true')
    launched = subprocess.Popen([*command, script, *arguments], env=settings, stderr=subprocess.PIPE, text=True)
    try: told = launched.communicate(timeout=240)[1]
    except subprocess.TimeoutExpired:  # they wait for each other: torchrun ends them when it is asked to
        launched.terminate()
        told = launched.communicate()[1]
    assert launched.returncode == 0, told[-3000:]


# --- servers ----------------------------------------------------------------------------------------------------------------------

class Serve:
    "`transformers serve` of the model in `folder`/model on a free port; whatever becomes of the tests, it does not outlive them."
    def __init__(self, folder: Path):
        port = free_port()
        self.url, self.log = f'http://127.0.0.1:{port}', folder/f'{port}.log'
        program = shutil.which('transformers', path=Path(sys.executable).parent)
        command = [program, 'serve', 'model', '--host', '127.0.0.1', '--port', str(port)]
        with open(self.log, 'wb') as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True,
                                            env=os.environ | dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1'),
                                            preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL))  # it dies with its parent
        self.endpoint = Endpoint(f'{self.url}/v1', 'model', retries=1)

    def __enter__(self) -> 'Serve':
        for _ in range(240):
            try: return urllib.request.urlopen(f'{self.url}/health', timeout=5) and self
            except OSError: time.sleep(0.25)
            if self.process.poll() is not None: break
        self.kill()
        pytest.fail(f'transformers serve did not start:\n{self.log.read_text()[-2000:]}')

    def __exit__(self, *_): self.kill()

    @property
    def requests(self) -> int:
        "How many questions it has answered by now."
        return self.log.read_text().count('completions HTTP/1.1" 200')

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def listening(reply: Callable[[dict], dict]) -> Iterator[Endpoint]:
    "The endpoint of a server on this machine that answers each request with what `reply` makes of it."
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.dumps(reply(json.loads(self.rfile.read(int(self.headers['Content-Length']))))).encode()
            self.send_response(200)
            self.send_header('Content-Type', 'application/json')
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            try: self.wfile.write(body)
            except OSError: pass  # the client was killed

        def log_message(self, *words): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield Endpoint(f'http://127.0.0.1:{server.server_port}/v1', 'm', retries=0)
    finally: server.shutdown(); server.server_close()


def completion(message: dict, finish: str = 'stop', tokens: tuple[int, int] = (5, 7), **choice: object) -> dict:
    "A reply of the OpenAI protocol: an assistant's message without its role."
    choice = dict(index=0, message=dict(role='assistant', **message), finish_reason=finish, **choice)
    return dict(id='1', object='chat.completion', created=0, model='m', choices=[choice],
                usage=dict(prompt_tokens=tokens[0], completion_tokens=tokens[1], total_tokens=sum(tokens)))


# --- model families ---------------------------------------------------------------------------------------------------------------

WIDTH = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
PLAIN = WIDTH | dict(num_key_value_heads=2, max_position_embeddings=96)
HEADS = PLAIN | dict(head_dim=8)
GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=96)
SCAN = dict(mamba_chunk_size=16, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1)
MIXED = ['linear_attention', 'full_attention']
FAMILIES = {  # name: (model type, its configuration); those of `PACKING` keep packed documents apart, the others do not
    'llama': ('llama', PLAIN), 'qwen2': ('qwen2', PLAIN), 'qwen3': ('qwen3', HEADS), 'gpt_neox': ('gpt_neox', PLAIN), 'gpt2': ('gpt2', GPT),
    'gemma': ('gemma', HEADS), 'gemma2': ('gemma2', HEADS | dict(query_pre_attn_scalar=8, final_logit_softcapping=2.0)),
    'gemma3': ('gemma3_text', HEADS | dict(query_pre_attn_scalar=8)), 'phi': ('phi', PLAIN), 'phi3': ('phi3', PLAIN),
    'olmo': ('olmo', PLAIN), 'olmo2': ('olmo2', PLAIN), 'smollm3': ('smollm3', PLAIN), 'stablelm': ('stablelm', PLAIN),
    'granite': ('granite', PLAIN | dict(logits_scaling=6.0, embedding_multiplier=12.0)),
    'cohere': ('cohere', PLAIN | dict(logit_scale=0.3)),
    'mistral': ('mistral', PLAIN | dict(sliding_window=6)), 'mixtral': ('mixtral', PLAIN | dict(num_local_experts=4)),
    'starcoder2': ('starcoder2', PLAIN), 'gptj': ('gptj', GPT | dict(rotary_dim=8)), 'nemotron': ('nemotron', PLAIN),
    'gpt_neo': ('gpt_neo', dict(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[['global', 'local'], 1]], window_size=6,
                                max_position_embeddings=96)),
    'ernie4_5': ('ernie4_5', PLAIN), 'exaone4': ('exaone4', PLAIN | dict(layer_types=['full_attention']*2, sliding_window=None)),
    'helium': ('helium', HEADS), 'glm': ('glm', HEADS), 'arcee': ('arcee', PLAIN),
    'opt': ('opt', WIDTH | dict(ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=96)),
    'opt, projected': ('opt', WIDTH | dict(ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=96, do_layer_norm_before=False)),
    'bloom': ('bloom', dict(hidden_size=32, n_layer=2, n_head=4)), 'biogpt': ('biogpt', WIDTH | dict(max_position_embeddings=96)),
    'falcon': ('falcon', WIDTH | dict(alibi=False, max_position_embeddings=96)), 'falcon, alibi': ('falcon', WIDTH | dict(alibi=True)),
    'mpt': ('mpt', dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=96)),
    'mamba': ('mamba', dict(hidden_size=32, num_hidden_layers=2, state_size=8)),
    'mamba2': ('mamba2', dict(hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=16)),
    'falcon_h1': ('falcon_h1', HEADS | SCAN | dict(mamba_d_ssm=64, lm_head_multiplier=0.05, embedding_multiplier=2.0)),
    'lfm2': ('lfm2', PLAIN | dict(layer_types=['conv', 'full_attention'])),
    'recurrent_gemma': ('recurrent_gemma', dict(hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                                                lru_width=32, attention_window_size=32, num_key_value_heads=1, logits_soft_cap=1.0)),
    'bamba': ('bamba', PLAIN | SCAN | dict(attn_layer_indices=[1])),
    'granitemoehybrid': ('granitemoehybrid', PLAIN | SCAN | dict(num_local_experts=2, num_experts_per_tok=1, logits_scaling=6.0,
                                                                 layer_types=['mamba', 'attention'], shared_intermediate_size=48)),
    'qwen3_next': ('qwen3_next', HEADS | dict(layer_types=MIXED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                                              shared_expert_intermediate_size=16, linear_num_value_heads=4, linear_num_key_heads=2,
                                              linear_key_head_dim=8, linear_value_head_dim=8)),
    'xlstm': ('xlstm', dict(hidden_size=32, num_blocks=2, num_heads=2, chunk_size=16, output_logit_soft_cap=3.0)),
    'bert': ('bert', WIDTH | dict(max_position_embeddings=96, is_decoder=True))}
PACKING = [*FAMILIES][:[*FAMILIES].index('opt')]
LEAKING = [*FAMILIES][[*FAMILIES].index('opt'):]


def of_family(name: str, tokenizer: object, larger: float = 4.0, **changes) -> LanguageModel:
    "An untrained model of one of `FAMILIES`, in 64 bits where it can be; larger matrices than usual keep it from repeating a token."
    kind, sizes = FAMILIES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **dict(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=0) | sizes | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    if not {'num_experts', 'num_local_experts'} & sizes.keys(): model.double()  # the library adds experts up in 32 bits at most
    for parameter in model.parameters():
        if parameter.ndim > 1: parameter.data *= larger
    return LanguageModel(model, tokenizer, name)
