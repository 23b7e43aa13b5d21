"""A real model behind a real server: its targets are those of the model at hand, whichever way the server tells its words."""
import threading
import time
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from forks import killed_in_the_middle
from world import addressed_batch, completion, listening

from scilm_adapt.alignment import token_bytes
from scilm_adapt.distill import train
from scilm_adapt.divergence import head_of
from scilm_adapt.endpoint import Endpoint, Word, chat_request, heard
from scilm_adapt.errors import InputError
from scilm_adapt.files import read_json
from scilm_adapt.generate import chat_prompt, respond
from scilm_adapt.instruct import Chats
from scilm_adapt.models import LanguageModel, hidden_states, load, tiny, weights_hash
from scilm_adapt.papers import Corpus
from scilm_adapt.remote import _align_answer, _kept_words, _lexicon, _remote_targets, match_ids
from scilm_adapt.runs import Run
from scilm_adapt.teacher import LiveTeacher, build_cache, open_cache
from scilm_adapt.tokens import encode_chat, pack, train_tokenizer
from scilm_adapt.training import fit, target_states

torch.set_num_threads(1)
PASSAGES = ['A set is a collection of different elements. The elements of a set have no order, and a set may be empty.',
            'The module reads files line by line. A line that is too long is cut, and a warning is written to the log.',
            'Return the sum of the elements along an axis. The default sums all of the elements of the array.']
CHATS = [dict(paper_id=str(n), kind='title', lang='en', reference='', author='paper',
              messages=[dict(role='user', content=f'{ask}\n\n{text}'), dict(role='assistant', content='Of the paper.')])
         for n, text in enumerate(PASSAGES) for ask in ('Give this text a title.', 'List the key terms of this text.')]
@dataclass
class Server:
    "An OpenAI-compatible server of a model, in a thread; `style` is whose way of telling words it has."
    lm: LanguageModel
    style: str = 'llama.cpp'
    room: int | None = None     # a limit of its own
    delay: float = 0.0
    asked: list = field(default_factory=list)

    def __enter__(self) -> 'Server':
        self.table, self.lock, self.context = token_bytes(self.lm.tokenizer), threading.Lock(), listening(self.answer)
        self.endpoint = self.context.__enter__()
        return self

    def __exit__(self, *error): return self.context.__exit__(*error)

    def word(self, i: int, logprob: float, by_number: bool) -> dict:
        text, known = self.lm.tokenizer.decode([i]), self.table[i]
        if by_number: return dict(token=f'token_id:{i}', logprob=logprob, bytes=list(f'token_id:{i}'.encode()))
        if self.style == 'vllm': return dict(token=text, logprob=logprob, bytes=list(text.encode()))
        if self.style == 'llama.cpp': return dict(id=i, token=text if known else '', logprob=logprob, bytes=list(known or b''))
        return dict(token=text, logprob=logprob, bytes=None if known is None else list(known))  # OpenAI

    def answer(self, request: dict) -> dict:
        with self.lock, torch.no_grad():
            time.sleep(self.delay)
            self.asked.append(request)
            prompt = chat_prompt(self.lm, request['messages'])
            [answer] = respond(self.lm, [prompt], min(request['max_tokens'], self.room or 10**9))
            lines = self.lm.model(torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1:].log_softmax(-1)
        k, by_number = request.get('top_logprobs', 0), request.get('return_tokens_as_token_ids', False)
        ids = answer.ids[:-1] if self.style == 'openai' and answer.stopped else answer.ids
        content = [self.word(i, line[i].item(), by_number) | dict(top_logprobs=[self.word(j, line[j].item(), by_number)
                   for j in line.topk(k).indices.tolist()]) for i, line in zip(ids, lines)]
        told = dict(content=content) if request.get('logprobs') and self.style != 'silent' else None
        return completion(dict(content=answer.text), 'stop' if answer.stopped else 'length', (len(prompt), len(answer.ids)), logprobs=told)


@pytest.fixture(scope='module')
def teacher() -> LanguageModel: return load('zoo:teacher', 'cpu')


@pytest.fixture(scope='module')
def student() -> LanguageModel: return load('zoo:student', 'cpu')


def loss_of(cache, student, batch, divergence='forward_kl') -> torch.Tensor:
    states, _ = target_states(hidden_states(student.model, batch), batch)
    return cache.loss(batch, states, head_of(student.model), divergence)


# --- equal to the model at hand ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('style', 'by_number'), [('llama.cpp', False), ('vllm', False), ('vllm', True), ('openai', False)])
def test_targets_are_those_of_the_model_itself(style, by_number, teacher, student, tmp_path, monkeypatch):
    monkeypatch.setattr('scilm_adapt.teacher.mixed_precision', lambda device: 'no')  # in 32 bits, as the server computes
    with Server(teacher, style) as server:
        remote = _remote_targets(tmp_path/'far', server.endpoint, student.tokenizer, CHATS, k=8, context=128, token_ids=by_number)
    assert len(remote.chats) == len(CHATS) == remote.usage.answers and {chat['author'] for chat in remote.chats} == {'teacher'}
    local = respond(teacher, [chat_prompt(teacher, chat['messages'][:1]) for chat in CHATS], 32)
    assert [(chat['messages'][-1]['content'], chat['stopped']) for chat in remote.chats] == [(a.text, a.stopped) for a in local]
    batch = addressed_batch(remote.packed)
    where = batch['address'][:, 1:][batch['loss_mask'][:, 1:]].numpy()
    records, near = remote.cache.read(where), LiveTeacher(teacher).targets(batch).softmax(-1)
    written = batch['input_ids'][:, 1:][batch['loss_mask'][:, 1:]]
    assert len(records) == remote.packed.token_loss_mask.sum() >= 0.9*sum(len(a.ids) for a in local)
    certain = (written == _lexicon(student.tokenizer).end).numpy() & (style == 'openai')  # where it does not tell the end
    assert (records['weights'][certain][:, 0] == 1).all()
    found = near.gather(-1, torch.from_numpy(records['token_ids'].astype(np.int64))).numpy()
    used = (records['weights'] > 0) & ~certain[:, None]
    np.testing.assert_allclose(records['weights'][used], found[used], rtol=2e-3, atol=1e-6)
    best = near.topk(8).indices.numpy()
    if style == 'llama.cpp' or by_number:
        assert (np.sort(records['token_ids'], 1) == np.sort(best, 1)).mean() > 0.99 and used.all(), 'and nothing is lost'
        live = build_cache(tmp_path/'near', LiveTeacher(teacher), remote.packed, 8, 'top_k')
        for kind in ('forward_kl', 'skew_kl'):
            far, nearby = (loss_of(cache, student, batch, kind) for cache in (remote.cache, live))
            torch.testing.assert_close(far, nearby, rtol=1e-4, atol=1e-5)


def test_the_cache_opens_like_any_other_and_a_student_learns_from_it(teacher, student, tmp_path):
    with Server(teacher) as server: remote = _remote_targets(tmp_path, server.endpoint, student.tokenizer, CHATS[:3], k=8, context=128)
    cache, batch = open_cache(tmp_path/'targets', remote.packed, k=8, how='top_k', model='m'), addressed_batch(remote.packed)
    before = loss_of(cache, student, batch).item()
    copy = load('zoo:student', 'cpu')
    def loss(model, batch):
        states, _ = target_states(hidden_states(model, batch), batch)
        return dict(loss=cache.loss(batch, states, head_of(model), count=batch['count']))
    fit(copy.model, lambda step: batch, loss, 8, learning_rate=1e-3, precision='no')
    assert loss_of(cache, copy, batch).item() < 0.7*before
    report = cache.report()
    assert report['targets'] == remote.packed.token_loss_mask.sum() and 0.5 < report['mass'] <= 1 and report['calibration']['right'] == 1
    with pytest.raises(InputError, match="'reverse_kl' cannot be had"): loss_of(cache, student, batch, 'reverse_kl')
    with pytest.raises(InputError, match='conversations'): open_cache(tmp_path/'targets', pack([[1, 2, 3]], 8))


def test_a_truncated_answer_has_no_end(teacher, student, tmp_path):
    with Server(teacher, room=5) as server: remote = _remote_targets(tmp_path, server.endpoint, student.tokenizer, CHATS, k=4)
    end, cut = _lexicon(student.tokenizer).end, [n for n, chat in enumerate(remote.chats) if not chat['stopped']]
    assert cut
    for n in cut:
        start, stop = remote.packed.tokens.starts[n:n + 2]
        ids, whole = remote.packed.tokens.ids[start:stop].tolist(), encode_chat(student.tokenizer, remote.chats[n]['messages'])[0]
        assert ids == whole[:len(ids)] and ids[-1] != end and end in whole[len(ids):]


# --- killed, kept, stale ----------------------------------------------------------------------------------------------------------

def test_a_killed_client_goes_on_behind_its_last_answer(teacher, student, tmp_path):
    many = [dict(chat, messages=[dict(role='user', content=f"{chat['messages'][0]['content']} {n}")]) for n in range(2) for chat in CHATS]
    with Server(teacher, delay=0.1) as server:
        file, client = tmp_path/'a'/'answers'/'0000000.jsonl', replace(server.endpoint, concurrency=1)
        killed_in_the_middle(lambda: _remote_targets(tmp_path/'a', client, student.tokenizer, many, k=8, context=128),
                             lambda: file.exists() and file.read_bytes().count(b'\n') >= 4)
        kept = file.read_bytes().count(b'\n')
        assert kept < len(many) and not (tmp_path/'a'/'targets').exists()
        time.sleep(0.5)
        server.delay, before = 0.0, len(server.asked)
        remote = _remote_targets(tmp_path/'a', server.endpoint, student.tokenizer, many, k=8, context=128)
        assert len(server.asked) - before == len(many) - kept and remote.usage.kept == kept
        whole = _remote_targets(tmp_path/'b', server.endpoint, student.tokenizer, many, k=8, context=128)
    assert whole.chats == remote.chats
    for name in ('shard-00000.bin', 'targets.json'):
        assert (tmp_path/'a'/'targets'/name).read_bytes() == (tmp_path/'b'/'targets'/name).read_bytes()
    again = _remote_targets(tmp_path/'a', Endpoint('http://127.0.0.1:9/v1', 'm'), student.tokenizer, many, k=8, context=128)
    assert again.usage.kept == len(many) and again.chats == remote.chats
    with open(tmp_path/'a'/'targets'/'shard-00000.bin', 'ab') as shard: shard.write(b'x')  # damaged: made anew from the answers
    again = _remote_targets(tmp_path/'a', Endpoint('http://127.0.0.1:9/v1', 'm'), student.tokenizer, many, k=8, context=128)
    assert (again.cache.read(np.arange(50)) == remote.cache.read(np.arange(50))).all()


def test_a_cache_of_something_else_is_refused(teacher, student, tmp_path, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-secret-1')
    with Server(teacher) as server:
        _remote_targets(tmp_path, server.endpoint, student.tokenizer, CHATS[:2], k=4, context=128)
        with pytest.raises(InputError, match=r'targets.json: the cache was made for something else.*k \(4 there, 5 wanted\)'):
            _remote_targets(tmp_path, server.endpoint, student.tokenizer, CHATS[:2], k=5, context=128)
        with pytest.raises(InputError, match=r'model \(m there, other wanted\)'):
            _remote_targets(tmp_path, Endpoint(server.endpoint.url, 'other'), student.tokenizer, CHATS[:2], k=4, context=128)
        with pytest.raises(InputError, match='questions'):
            _remote_targets(tmp_path, server.endpoint, student.tokenizer, CHATS[:3], k=4, context=128)
    assert not [p for p in tmp_path.rglob('*') if p.is_file() and b'secret' in p.read_bytes()]


# --- servers and students that do not fit -----------------------------------------------------------------------------------------

def test_a_server_without_probabilities_is_named_with_the_way_out(teacher, student, tmp_path):
    with Server(teacher, 'silent') as server:
        with pytest.raises(InputError, match='gives no probabilities.*vLLM and llama.cpp do.*instruct.ask_teacher'):
            _remote_targets(tmp_path, server.endpoint, student.tokenizer, CHATS[:2], k=4, context=128)


def test_another_tokenizer_is_refused_with_both_ways_out(teacher, tmp_path):
    other = train_tokenizer(['öäü '*20], 270)
    with Server(teacher) as server:
        with pytest.raises(InputError, match='another tokenizer.*instruct.ask_teacher.*cross-tokenizer: alignment.AlignedTeacher'):
            _remote_targets(tmp_path, server.endpoint, other, CHATS, k=4, context=1024)


def test_no_room_no_words_and_no_sense_are_said(teacher, student, tmp_path):
    with Server(teacher) as server:
        with pytest.raises(InputError, match='leaves room'):
            _remote_targets(tmp_path, server.endpoint, student.tokenizer, CHATS, context=16)
        with pytest.raises(InputError, match='k is 0'): _remote_targets(tmp_path, server.endpoint, student.tokenizer, CHATS, k=0)
        assert not server.asked


# --- the parts --------------------------------------------------------------------------------------------------------------------

TOKENIZER = train_tokenizer(['heat moves heat waves wave moving'], 290)
WORDS = _lexicon(TOKENIZER)


def word(text: str, logprob: float = -0.1, **more) -> Word: return Word(text, logprob, text.encode(), **more)


def test_other_cuts_are_left_out_and_the_tail_takes_unknown_words():
    ids = TOKENIZER('heat moves')['input_ids']
    cuts = [WORDS.pieces[i].decode() for i in ids]
    whole = _align_answer('heat moves', [(word(cut), []) for cut in cuts], False, WORDS)
    assert match_ids(ids, whole, 'heat moves', WORDS) == list(range(len(ids)))
    split = _align_answer('heat moves', [(word(part), []) for part in (cuts[0][:1], cuts[0][1:], *cuts[1:])], False, WORDS)
    assert match_ids(ids, split, 'heat moves', WORDS) == [None, *range(2, len(ids) + 1)]
    place = word(cuts[0], -1.0), [word(cuts[0], -1.0), word(' quark', -0.9), word('<|im_end|>', -2.0)]
    kept, weights = _kept_words(place, 4, WORDS, False, set())
    assert kept == [ids[0], WORDS.end, ids[0], ids[0]] and np.allclose(weights, [np.exp(-1), np.exp(-2), 0, 0])
    assert _kept_words((word(' quark'), []), 2, WORDS, False, set()) is None


def test_white_space_around_is_no_part_of_the_answer_and_any_last_word_ends_it():
    said = [(word(text), []) for text in ('\n ', ' heat', '\n')]
    assert _align_answer('heat', said, True, WORDS).edges.tolist() == [[0, 0], [0, 4], [4, 5]]
    for ending in (word('<|eot_id|>'), Word('', -0.1, b''), Word('</s>', -0.1, None)):
        aligned = _align_answer('heat', [*said, (ending, [])], True, WORDS)
        assert aligned.closing[0] == ending and len(aligned.said) == 3
        assert _kept_words(aligned.closing, 1, WORDS, False, set(), closing=True)[0] == [WORDS.end]
    assert _align_answer('heat', said, True, WORDS).closing is None
    assert _align_answer('heat', [*said, (word('<|eot_id|>'), [])], False, WORDS) is None  # a truncated answer has no such word
    assert _align_answer('heats', said, True, WORDS) is None and _align_answer('heat', [], True, WORDS) is None


def test_numbers_are_taken_only_if_they_spell_the_answer():
    ids = TOKENIZER('wave')['input_ids']
    right = [(Word(f'token_id:{i}', -0.1, None, i), []) for i in ids]
    assert _align_answer('wave', right, False, WORDS).numbered
    shifted = [(Word(WORDS.pieces[i].decode(), -0.1, WORDS.pieces[i], i + 1), []) for i in ids]
    aligned = _align_answer('wave', shifted, False, WORDS)
    assert not aligned.numbered and match_ids(ids, aligned, 'wave', WORDS) == list(range(len(ids)))
    assert _align_answer('wave', [(Word(f'token_id:{i + 1}', -0.1, None, i + 1), []) for i in ids], False, WORDS) is None


@pytest.mark.parametrize('text', ['Тепло — движение, 🌊!', 'x² ≠ naïve'])
def test_half_letters_are_met_by_their_bytes(text):
    ids = TOKENIZER(text)['input_ids']
    aligned = _align_answer(text, [(Word('\ufffd', -0.1, WORDS.pieces[i]), []) for i in ids], False, WORDS)
    assert match_ids(ids, aligned, text, WORDS) == list(range(len(ids)))


def test_what_a_server_tells_is_read_in_three_forms():
    told = dict(token='token_id:7', logprob=-1, bytes=[1]), dict(token='a', logprob=-1, bytes=[97], id=4), dict(token='é', logprob=-2.0)
    [(first, top)] = heard(dict(logprobs=dict(content=[told[0] | dict(top_logprobs=list(told))])))
    assert first == top[0] == Word('token_id:7', -1.0, None, 7) and top[1] == Word('a', -1.0, b'a', 4) and top[2].data == 'é'.encode()
    for wrong in (dict(), dict(logprobs=None), dict(logprobs=dict(content=None)), dict(logprobs=dict(tokens=['a']))):
        with pytest.raises(InputError, match='gives no probabilities'): heard(wrong)
    for logprob in (float('nan'), 0.5):
        with pytest.raises(InputError, match='NaN, or above 1'):
            heard(dict(logprobs=dict(content=[dict(token='a', logprob=logprob, top_logprobs=[])])))
    assert 'logprobs' not in chat_request([dict(role='user', content='?')], 8)
    assert chat_request([dict(role='user', content='?')], 8, top_logprobs=3).items() >= dict(logprobs=True, top_logprobs=3).items()


def test_a_server_with_other_names_of_the_end_is_understood(tmp_path):
    "A teacher that ends turns with another control token, which the student does not have."
    answers = {'What is heat?': 'Heat is motion.', 'What is light?': 'Light is a wave.'}
    lm = tiny([*answers, *answers.values()], hidden=64, size=320)
    talks = [encode_chat(lm.tokenizer, [dict(role='user', content=q), dict(role='assistant', content=a)]) for q, a in answers.items()]
    rows = pack([ids for ids, _ in talks], 48, [mask for _, mask in talks])
    from scilm_adapt.training import lm_loss
    fit(lm.model, lambda step: rows.batch(range(len(rows))), lambda model, b: dict(loss=lm_loss(model, b)), 60, learning_rate=1e-2)
    chats = [dict(paper_id=q, messages=[dict(role='user', content=q)]) for q in answers]
    class Renamed(Server):
        def word(self, i, logprob, by_number):
            end = _lexicon(self.lm.tokenizer).end
            return dict(token='<|eot_id|>', logprob=logprob, bytes=list(b'<|eot_id|>')) if i == end else super().word(i, logprob, by_number)
    with Renamed(lm, 'vllm') as server: remote = _remote_targets(tmp_path, server.endpoint, lm.tokenizer, chats, k=4)
    batch, end = addressed_batch(remote.packed), _lexicon(lm.tokenizer).end
    mask = batch['loss_mask'][:, 1:]
    records, written = remote.cache.read(batch['address'][:, 1:][mask].numpy()), batch['input_ids'][:, 1:][mask]
    near = LiveTeacher(lm).targets(batch).softmax(-1)[:, end]
    assert (written == end).sum() == 2
    for line, i, share in zip(records, written.tolist(), near.tolist()):
        here = line['weights'][line['token_ids'] == end].sum()
        if i == end: assert abs(here - share) < 2e-3


# --- as the teacher of a run ------------------------------------------------------------------------------------------------------------

def test_a_server_that_tells_probabilities_teaches_a_run_by_them(teacher, student, tmp_path, capsys):
    "From its address on, with the divergence that it can tell; the second time nothing is asked."
    records = [dict(id=str(n), title='On sets', text=text) for n, text in enumerate(PASSAGES)]
    for name in ('corpus', 'chats'): (tmp_path/name).mkdir()
    corpus = Corpus(dict(train=records, valid=records, test=records), dict(valid=[]), tmp_path/'corpus')
    chats, run = Chats(CHATS, CHATS[:2], CHATS[:2], tmp_path/'chats'), Run(tmp_path/'run')
    steps = dict(steps=2, batch_size=2, context=128, learning_rate=1e-3, probe_every=0)
    with Server(teacher) as server:
        address = f'{server.endpoint.url}#m'
        distilled = train(run, student, address, chats, corpus, **steps)
        asked, said = len(server.asked), capsys.readouterr().out
        assert 'targets from m' in said
        again = train(run, student, address, chats, corpus, **steps)
        assert len(server.asked) == asked and weights_hash(again.model) == weights_hash(distilled.model) != weights_hash(student.model)
    with Server(teacher, 'silent') as server, pytest.raises(InputError, match='gives no probabilities'):
        train(Run(tmp_path/'other'), student, f'{server.endpoint.url}#m', chats, corpus, **steps, divergence='forward_kl')
    history = read_json(run.folder/'models'/'distilled'/'history.json')
    assert history[0]['distil'] > 0 and read_json(run.folder/'models'/'distilled'/'manifest.json')['config']['server'] == 'm'
