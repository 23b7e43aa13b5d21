"""More than forty model families: what the pipeline computes of packed rows, of logits and of answers is what each model computes alone."""
import copy
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, LlamaForCausalLM
from world import BABBLE, FAMILIES, LEAKING, PACKING, PLAIN, conversation, of_family

from scilm_adapt import contrast, distill, recipe
from scilm_adapt.alignment import PLAIN as TEMPLATE
from scilm_adapt.decoding import DECODERS, reads_on
from scilm_adapt.divergence import head_of
from scilm_adapt.errors import InputError
from scilm_adapt.generate import respond, stream
from scilm_adapt.instruct import Chats
from scilm_adapt.models import _ENDLESS, LanguageModel, _raw_states, distance, habits, hidden_states, load, logits_of, save
from scilm_adapt.papers import Corpus, document
from scilm_adapt.preflight import preflight
from scilm_adapt.runs import Run
from scilm_adapt.teacher import LiveTeacher
from scilm_adapt.tokens import documents_in, encode_document, pack, pad, train_tokenizer
from scilm_adapt.training import document_nats, lm_loss

TEXTS = [*BABBLE, 'Тепло течёт от тёплых тел к холодным.', 'Light bends.']
PAPERS = [dict(id=str(n), title=f'On {name}', text=f'We study {name} in {n} experiments. The {name} was measured.')
          for n, name in enumerate('heat light sound gravity friction pressure salt iron water glass'.split())]
TOKENIZER = train_tokenizer([*TEXTS, *map(document, PAPERS)], 300)
TOKENIZER.chat_template = TEMPLATE
DOCUMENTS = [encode_document(TOKENIZER, text)[:size] for text, size in zip(TEXTS, (9, 30, 5, 17, 2, 23, 12))]
each_family = pytest.mark.parametrize('name', FAMILIES)


@lru_cache
def model_of(name: str) -> LanguageModel: return of_family(name, TOKENIZER)


def close(name: str) -> float: return 1e-6 if model_of(name).model.dtype == torch.float64 else 1e-4


def alone(model, ids: list[int]) -> torch.Tensor:
    "The states of one document in a row without anything else."
    return hidden_states(model, dict(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)))[0]


def by_document(packed, states: torch.Tensor) -> dict[int, torch.Tensor]:
    "The states of each document of a batch of all rows."
    found = {}
    for row in range(len(packed)):
        for segment, number in enumerate(documents_in(packed, [row]), 1):
            found[number] = states[row][torch.from_numpy(packed.segments[row] == segment)]
    return found


# --- rows -------------------------------------------------------------------------------------------------------------------------

@each_family
def test_a_model_that_is_asked_says_whether_it_keeps_packed_documents_apart(name):
    "And it says so in the numbers of a teacher, too, before anything is trained."
    model = model_of(name).model
    a, b = DOCUMENTS[1][:12], DOCUMENTS[3][:9]
    with torch.no_grad():
        row = _raw_states(model, input_ids=torch.tensor([a + b]), position_ids=torch.tensor([[*range(12), *range(9)]]))[0, 12:]
        leaks = distance(row, _raw_states(model, input_ids=torch.tensor([b]), attention_mask=torch.ones(1, 9, dtype=torch.long))[0]) > 1e-3
    assert habits(model).packs == (not leaks) == (name in PACKING)
    assert habits(of_family(name, TOKENIZER, larger=1.0).model.to(torch.bfloat16)).packs == (name in PACKING)  # where it leaks least


@each_family
def test_documents_in_rows_are_read_as_if_alone(name):
    model, packed = model_of(name).model, pack(DOCUMENTS, 40)
    batch = packed.batch(range(len(packed)))
    with torch.no_grad():
        bare = {part: batch[part] for part in ('input_ids', 'position_ids')}  # as somebody may call it who knows no segments
        for given in (batch, bare):
            for number, states in by_document(packed, hidden_states(model, given)).items():
                assert distance(states, alone(model, DOCUMENTS[number])) < close(name)
        padded = hidden_states(model, pad(DOCUMENTS, 0))
        for states, ids in zip(padded, DOCUMENTS): assert distance(states[:len(ids)], alone(model, ids)) < close(name)


@each_family
def test_states_and_head_give_the_models_own_logits(name):
    model, ids = model_of(name).model, torch.tensor([DOCUMENTS[1]])
    with torch.no_grad():
        own, states = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits, alone(model, DOCUMENTS[1])
        assert distance(logits_of(model, states), own[0]) < close(name)/10
        assert distance(head_of(model).logits(states), own[0]) < close(name)/10


def pieces_of(packed) -> list[list[int]]: return [packed.tokens.ids[at:at + n].tolist() for at, n in zip(packed.starts, packed.lengths)]


def mean_loss(model, pieces: list[list[int]]) -> torch.Tensor:
    "Nats a token by the model's own logits of one piece after the other."
    total = 0
    for ids in pieces:
        given = torch.tensor([ids])
        logits = model(input_ids=given, attention_mask=torch.ones_like(given), use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, given[0, 1:], reduction='sum')
    return total/sum(len(ids) - 1 for ids in pieces)


@each_family
def test_the_loss_of_a_batch_is_that_of_its_documents(name):
    "Windows of long documents, several in a row, and rows that are not full; in training and in evaluation."
    lm, packed = model_of(name), pack(DOCUMENTS, 20)
    with torch.no_grad():
        ours, own = lm_loss(lm.model, packed.batch(range(len(packed)))).item(), mean_loss(lm.model, pieces_of(packed)).item()
    assert abs(ours/own - 1) < 1e-5  # the loss itself is in 32 bits
    assert abs(document_nats(lm, DOCUMENTS, context=20).sum()/sum(len(ids) - 1 for ids in pieces_of(packed))/own - 1) < 1e-5


@pytest.mark.parametrize('name', ['qwen2', 'gemma2', 'opt', 'bloom', 'mamba', 'falcon_h1', 'lfm2', 'bert'])
def test_the_gradient_of_a_batch_is_that_of_its_documents(name):
    model, packed = model_of(name).model, pack(DOCUMENTS[:4], 20)
    losses, weights = (lm_loss(model, packed.batch(range(len(packed)))), mean_loss(model, pieces_of(packed))), list(model.parameters())
    found = [[g for g in torch.autograd.grad(loss, weights, allow_unused=True) if g is not None] for loss in losses]
    assert len(found[0]) == len(found[1])
    assert distance(*(torch.cat([g.flatten() for g in gradients]) for gradients in found)) < 1e-5


@pytest.mark.parametrize('name', LEAKING)
def test_a_leaking_model_is_given_one_document_a_row_and_little_filling(name):
    model = model_of(name).model
    packed, seen, size = pack(DOCUMENTS, 40), [], habits(model)
    hook = model.base_model.register_forward_pre_hook(lambda m, a, given: seen.append(given), with_kwargs=True)
    with torch.no_grad(): hidden_states(model, packed.batch(range(len(packed))))
    hook.remove()
    rows = [ids[mask.bool()].tolist() for given in seen for ids, mask in zip(given['input_ids'], given['attention_mask'])]
    assert sorted(rows) == sorted(DOCUMENTS) and not any('position_ids' in given for given in seen)
    assert sum(given['input_ids'].numel() for given in seen) < 2*sum(map(len, DOCUMENTS)) and not size.packs


def test_other_attention_is_asked_anew():
    model = copy.deepcopy(model_of('llama').model)
    first = habits(model)
    assert habits(model) is first
    model.set_attn_implementation('eager')
    assert habits(model) is not first and habits(model).packs


# --- what cannot be right is refused -----------------------------------------------------------------------------------------------

class Twisted(LlamaForCausalLM):
    "A model whose logits come out of its head in a way of their own."
    def forward(self, *given, **named):
        out = super().forward(*given, **named)
        out.logits = out.logits + torch.arange(out.logits.shape[-1])
        return out


def test_an_unknown_head_is_refused_in_one_sentence():
    model = Twisted(AutoConfig.for_model('llama', **PLAIN, vocab_size=300))
    ids = torch.tensor([DOCUMENTS[0]])
    with pytest.raises(InputError, match=r"^'Twisted' makes its logits of more than .*another family\.$"):
        hidden_states(model, dict(input_ids=ids, attention_mask=None))


def test_a_model_that_reads_what_follows_is_refused_when_it_is_loaded(tmp_path):
    lm = of_family('bert', TOKENIZER, is_decoder=False)
    save(lm, tmp_path/'bert')
    with pytest.raises(InputError, match='reads the words that follow'): load(tmp_path/'bert', 'cpu')


@pytest.mark.parametrize('changes, context', [
    (('gpt2', {}), 96), (('gptj', {}), 96), (('opt', {}), 96), (('mpt', {}), 96), (('falcon', {}), 96), (('bloom', {}), _ENDLESS),
    (('bloom', dict(seq_length=50)), 50), (('mamba', {}), _ENDLESS), (('recurrent_gemma', {}), _ENDLESS), (('xlstm', {}), _ENDLESS)])
def test_the_context_is_what_the_model_was_built_for(changes, context):
    lm = of_family(changes[0], TOKENIZER, **changes[1])
    assert lm.context == context
    if context == _ENDLESS:
        tokenizer = copy.deepcopy(TOKENIZER)
        tokenizer.model_max_length = 77
        assert replace(lm, tokenizer=tokenizer).context == 77


@pytest.mark.parametrize('name', ['gpt2', 'gptj', 'gpt_neo', 'opt', 'biogpt', 'mpt', 'bloom', 'mamba'])
def test_a_document_may_be_as_long_as_the_context(name):
    lm = model_of(name)
    ids = [5 + n % 200 for n in range(min(lm.context, 96))]
    own = lm.model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), labels=torch.tensor([ids]))
    assert abs(document_nats(lm, [ids])[0]/(own.loss.item()*(len(ids) - 1)) - 1) < 1e-5


# --- answers ----------------------------------------------------------------------------------------------------------------------

PROMPTS = [[9, 8, 7], [5, 17, 33, 40, 41, 90, 91, 92, 17, 33, 29], [4], [9, 18, 7]]


@torch.no_grad()
def written(model, prompt: list[int], new: int) -> list[int]:
    "Greedy decoding by its definition: the model's own logits, all read anew for each token."
    ids = list(prompt)
    for _ in range(new):
        given = torch.tensor([ids])
        ids.append(int(model(input_ids=given, attention_mask=torch.ones_like(given), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt):]


@each_family
def test_answers_are_the_same_together_and_alone(name):
    model = of_family(name, TOKENIZER).model.float()
    expected = [written(model, prompt, 5) for prompt in PROMPTS]
    together, longest = DECODERS['greedy'](model, **pad(PROMPTS, 0, left=True), max_new_tokens=5), max(map(len, PROMPTS))
    assert together[:, longest:].tolist() == expected
    alike = DECODERS['greedy'](model, **pad([PROMPTS[0], PROMPTS[3]], 0, left=True), max_new_tokens=5)
    assert alike[:, 3:].tolist() == [expected[0], expected[3]] and len({i for ids in expected for i in ids}) > 2


@pytest.mark.parametrize('name', ['opt', 'mamba', 'falcon_h1', 'xlstm'])
def test_other_ways_of_answering_take_what_the_model_can(name):
    "Contrastive search against its formula, rows that end early, and an answer that is read as it comes."
    lm = replace(model_of(name), model=of_family(name, TOKENIZER).model.float())
    search = DECODERS['contrastive search']
    together = search(lm.model, **pad(PROMPTS, 0, left=True), max_new_tokens=4)[:, 11:].tolist()
    for prompt, found in zip(PROMPTS, together):
        ids = list(prompt)
        for _ in range(4):
            with torch.no_grad():
                past = alone(lm.model, ids)
                likely, words = logits_of(lm.model, past[-1]).softmax(-1).topk(4)
                states = torch.stack([alone(lm.model, [*ids, int(word)])[-1] for word in words])
            likeness = torch.cosine_similarity(states[:, None], past[None], dim=-1).amax(1)
            ids.append(int(words[(0.4*likely - 0.6*likeness).argmax()]))
        assert ids[len(prompt):] == found
    ends = sorted({together[0][1], together[1][2]})
    ended = search(lm.model, **pad(PROMPTS, 0, left=True), max_new_tokens=4, eos_token_id=ends)[:, 11:].tolist()
    for whole, row in zip(together, ended):
        stop = next((n + 1 for n, i in enumerate(whole) if i in ends), len(whole))
        assert row[:stop] == whole[:stop]
    assert ''.join(stream(lm, PROMPTS[1], 6)).strip() == respond(lm, [PROMPTS[1]], 6)[0].text


# --- the two stages, and what is said before them ----------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['opt', 'mamba'])
def test_both_stages_train_a_leaking_model_on_one_document_a_row(tmp_path, name, capsys):
    lm, rows = replace(model_of(name), model=of_family(name, TOKENIZER, larger=1.0).model.float()), []
    for folder in ('corpus', 'chats'): (tmp_path/folder).mkdir()
    corpus = Corpus(dict(train=PAPERS, valid=PAPERS[:2], test=PAPERS[:2]), dict(train=[], valid=[], test=[]), tmp_path/'corpus')
    chats = Chats([conversation(n) for n in range(8)], [conversation(n) for n in range(8, 10)], [], tmp_path/'chats')
    def note(module, given, named):
        if module.training: rows.extend(ids[mask.bool()].tolist() for ids, mask in zip(named['input_ids'], named['attention_mask']))
    fitted = recipe.fit
    def watched(model, *given, **named):
        handle = model.base_model.register_forward_pre_hook(note, with_kwargs=True)
        try: return fitted(model, *given, **named)
        finally: handle.remove()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, 'fit', watched)
        first = contrast.train(Run(tmp_path/'run'), lm, corpus, steps=2, batch_size=2, context=40, learning_rate=1e-3)
        texts = {tuple(encode_document(TOKENIZER, document(paper))) for paper in PAPERS}
        assert rows and all(any(row == list(text)[at:at + len(row)] for text in texts for at in range(len(text))) for row in rows)
        settings = dict(steps=2, batch_size=2, context=64, learning_rate=1e-3, probe_every=0)
        second = distill.train(Run(tmp_path/'run'), first, lm, chats, corpus, **settings)
    assert 'ignores restarted positions: one document a row' in capsys.readouterr().out
    documents = [encode_document(TOKENIZER, document(paper)) for paper in PAPERS]
    for trained in (first, second):
        single = [document_nats(trained, [ids], context=40)[0] for ids in documents]
        assert torch.allclose(torch.tensor(document_nats(trained, documents, context=40)), torch.tensor(single), rtol=1e-5)


def test_a_leaking_teacher_reads_the_rows_of_a_student_that_packs():
    teacher, packed = model_of('opt'), pack(DOCUMENTS, 40)
    batch = packed.batch(range(len(packed)))
    found = LiveTeacher(teacher).targets(batch)
    numbers = torch.from_numpy(packed.documents)[:, 1:][batch['loss_mask'][:, 1:]]
    for number, ids in enumerate(DOCUMENTS):
        with torch.no_grad(): own = teacher.model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
        assert distance(found[numbers == number], own) < 1e-6


@pytest.mark.parametrize('name, said', [
    ('qwen2', ['packed rows yes ok', 'output head a matrix ok', 'answers read on ok']),
    ('opt', ['packed rows no ok, opt ignores restarted positions: one document a row']),
    ('falcon_h1', ['output head a matrix, × 0.05 ok', 'packed rows no ok, falcon_h1 ignores']),
    ('recurrent_gemma', ['output head a matrix, capped at 1 ok', 'packed rows no ok', 'answers read anew ok, what recurrent_gemma keeps'])])
def test_the_pre_flight_says_how_a_family_is_read(name, said, capsys):
    preflight(model_of(name), None)
    table = [' '.join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in said: assert any(found.startswith(line) for found in table), table


def test_what_a_model_keeps_is_used_where_it_is_enough():
    assert all(reads_on(model_of('mamba').model).values()) and not any(reads_on(model_of('xlstm').model).values())
