"""Byte offsets of every kind of tokenizer, and the loss across two of them against a naive loop over both models' own logits."""
import copy
import json
import math
import unicodedata
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from world import chat_batch

from scilm_adapt.alignment import (
    PLAIN,
    AlignedTeacher,
    _grouped,
    _sorted_distance,
    answer_places,
    byte_ends,
    common_tokens,
    token_bytes,
)
from scilm_adapt.divergence import chunked_loss, divergences, head_of
from scilm_adapt.errors import InputError
from scilm_adapt.generate import chat_prompt, respond
from scilm_adapt.models import build, hidden_states
from scilm_adapt.tokens import encode, end_of_turn, train_tokenizer
from scilm_adapt.training import fit, lm_loss, micro_batches, target_states

TEXTS = ['Heat is motion, and motion is heat. A wave carries energy.', 'Тепло – это движение, а волна переносит энергию.',
         'What is light? Light is a wave.', 'Что такое свет? Свет – это волна.', '  a = b\n\treturn a']
BYTES = [f'<0x{byte:02X}>' for byte in range(256)]


def wrapped(core: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token='<unk>', bos_token='<s>', eos_token='</s>', chat_template=PLAIN)


def sentence_piece(prefix: bool = True, size: int = 380) -> PreTrainedTokenizerFast:
    "As Llama 2's: ▁ for a space, one before the text, single bytes for what is unknown."
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>'))
    core.normalizer = normalizers.Sequence([*([normalizers.Prepend('▁')] if prefix else []), normalizers.Replace(' ', '▁')])
    strip = [decoders.Strip(' ', 1, 0)] if prefix else []
    core.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = ['<unk>', '<s>', '</s>', *BYTES]
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=size, show_progress=False, special_tokens=special))
    spec = json.loads(core.to_str())
    spec['added_tokens'] = spec['added_tokens'][:3]  # the single bytes are content
    return wrapped(Tokenizer.from_str(json.dumps(spec)))


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    "A Unigram model behind Metaspace, as T5's and Mistral's."
    core = Tokenizer(models.Unigram([('<unk>', -20.0), ('<s>', 0.0), ('</s>', 0.0), *((byte, -9.0) for byte in BYTES), ('▁', -3.0),
                                     ('▁wave', -5.0), ('wa', -5.0), ('ve', -5.0), ('Во', -6.0), ('лна', -6.0), ('в', -7.0)], 0, True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    return wrapped(core)


def word_piece() -> PreTrainedTokenizerFast:
    "WordPiece that loses nothing: over the byte alphabet, each next piece written with ##."
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ['<unk>', '<s>', '</s>', *letters, *(f'##{letter}' for letter in letters), 'wave', '##ve']
    core = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token='<unk>', max_input_chars_per_word=10**6))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return wrapped(core)


def spaced() -> PreTrainedTokenizerFast:
    "A template that closes a turn with more than one token."
    tokenizer = sentence_piece()
    tokenizer.chat_template = PLAIN.replace("+ eos_token", "+ ' .' + eos_token")
    return tokenizer


def composing() -> PreTrainedTokenizerFast:
    "Byte-level, letters composed first, as Qwen's."
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


KINDS = dict(bytes=train_tokenizer(TEXTS, 330), fewer=train_tokenizer(TEXTS, 280), letters=sentence_piece(), bare=sentence_piece(False),
             first=metaspace('first'), always=metaspace('always'), never=metaspace('never'), pieces=word_piece(),
             spaced=spaced())
each_kind = pytest.mark.parametrize('kind', KINDS)
PLAYFUL = st.text(st.sampled_from(list(' \n\t\u00a0abewvWave.,–№éйи\u0306\u0301\u200d👩🔬🌊🇷🇺中한국어अ𝔘<0xE2>/s\ufeff\u2028')), max_size=30)
ANY = st.one_of(PLAYFUL, st.text(st.characters(exclude_categories=['Cs'], exclude_characters='▁'), max_size=20), st.sampled_from(TEXTS))


def ends_of(tokenizer, text: str) -> np.ndarray | None:
    table = token_bytes(tokenizer)
    return byte_ends([table[i] for i in encode(tokenizer, text)], text)


TABLES = {kind: token_bytes(tokenizer) for kind, tokenizer in KINDS.items()}


@each_kind
@given(text=ANY)
@settings(max_examples=60)
def test_the_tokens_bytes_join_to_the_content(kind, text):
    pieces, content = [TABLES[kind][i] for i in encode(KINDS[kind], text)], text.encode()
    assert b''.join(pieces) in (content, b' ' + content)
    ends = byte_ends(pieces, text)
    assert (np.diff(ends) >= 0).all() and ends[-1:].sum() == len(content)
    starts = [0, *ends[:-1].tolist()]
    ahead = len(b''.join(pieces)) - len(content)
    assert [content[a:b] for a, b in zip(starts, ends)] == [p[ahead:] if not n else p for n, p in enumerate(pieces)]


@given(text=ANY, one=st.sampled_from(list(KINDS)), other=st.sampled_from(list(KINDS)))
@settings(max_examples=150)
def test_groups_cover_the_same_bytes_and_are_the_smallest(text, one, other):
    ends, others = (byte_ends([TABLES[kind][i] for i in encode(KINDS[kind], text)], text) for kind in (one, other))
    groups = _grouped(ends, others)
    if not len(ends) or not len(others): return
    assert groups[0, [0, 2]].tolist() == [0, 0] and groups[-1, [1, 3]].tolist() == [len(ends), len(others)]
    assert (groups[1:, [0, 2]] == groups[:-1, [1, 3]]).all() and (groups[:, 0] < groups[:, 1]).all() and (groups[:, 2] < groups[:, 3]).all()
    for start, stop, other_start, other_stop in groups:
        assert ends[stop - 1] == others[other_stop - 1]
        inner = set(ends[start:stop - 1]) & set(others[other_start:other_stop - 1]) - {ends[stop - 1], 0 if not start else ends[start - 1]}
        assert not inner


@pytest.mark.parametrize(('ends', 'others', 'wanted'), [
    ([1, 2, 3], [1, 2, 3], [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 3)]),
    ([4], [1, 2, 4], [(0, 1, 0, 3)]),                                # an emoji in one token, and in three
    ([2, 4, 6], [2, 6], [(0, 1, 0, 1), (1, 3, 1, 2)]),               # split on one side
    ([2, 6], [2, 4, 6], [(0, 1, 0, 1), (1, 2, 1, 3)]),               # on the other
    ([3, 5], [2, 5], [(0, 2, 0, 2)]),                                # on both, across each other
    ([0, 2, 3], [2, 3], [(0, 2, 0, 1), (2, 3, 1, 2)]),               # a space before the text is a token of its own
    ([2, 2, 3], [2, 3], [(0, 2, 0, 1), (2, 3, 1, 2)]),               # a token without bytes stays with those before it
    ([0, 2], [0, 2], [(0, 1, 0, 1), (1, 2, 1, 2)]), ([], [], [])], ids=str)
def test_groups_by_hand(ends, others, wanted):
    assert [tuple(row) for row in _grouped(np.array(ends, int), np.array(others, int)).tolist()] == wanted


def test_letters_split_over_tokens_by_hand():
    bare = Tokenizer(models.BPE({'<s>': 0, **{c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}}, []))
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    single = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token='<s>')
    assert ends_of(single, 'Да🌊').tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    letters = KINDS['letters']
    assert letters.convert_ids_to_tokens(encode(letters, 'и🌊')) == ['▁', 'и', '<0xF0>', '<0x9F>', '<0x8C>', '<0x8A>']
    assert ends_of(letters, 'и🌊').tolist() == [0, 2, 3, 4, 5, 6]
    assert _grouped(ends_of(letters, 'и🌊'), ends_of(single, 'и🌊')).tolist() == [
        [0, 2, 0, 2], [2, 3, 2, 3], [3, 4, 3, 4], [4, 5, 4, 5], [5, 6, 5, 6]]
    assert byte_ends([b' ', b'a'], 'a').tolist() == [0, 1] and byte_ends([b' a'], ' a').tolist() == [2]
    assert ends_of(letters, '▁a') is None  # the sign that stands for a space would be read back as one
    assert byte_ends([b'a', None], 'a') is None and byte_ends([b'b'], 'a') is None and byte_ends([b'  a'], 'a') is None


def test_added_white_space_is_content_and_control_tokens_are_none():
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.add_tokens(['    '])
    table = token_bytes(tokenizer)
    assert table[tokenizer.convert_tokens_to_ids('    ')] == b'    ' and table[tokenizer.eos_token_id] is None
    assert ends_of(tokenizer, 'a    b').tolist() == [1, 5, 6]


def test_a_letter_is_matched_with_the_letter_before_its_single_byte():
    one, other = KINDS['bytes'], KINDS['letters']
    common = common_tokens(one, other)
    partner = dict(zip(common.student.tolist(), common.teacher.tolist()))
    assert '<0x61>' in other.get_vocab() and partner[one.get_vocab()['a']] == other.get_vocab()['a']
    assert partner[end_of_turn(one)] == end_of_turn(other) and len(set(partner.values())) == len(partner)


@given(text=ANY)
@settings(max_examples=60)
def test_groups_are_those_of_trl(text):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        gold = pytest.importorskip('trl.experimental.gold.gold_trainer')
        utils = pytest.importorskip('trl.experimental.utils')
    one, other = KINDS['bytes'], KINDS['fewer']
    found = [utils.encode_with_byte_offsets(tokenizer.backend_tokenizer, [text])[0] for tokenizer in (one, other)]
    ends = [ends_of(tokenizer, text) for tokenizer in (one, other)]
    for (_, offsets), own in zip(found, ends): assert [end for _, end in offsets] == own.tolist()
    theirs = gold.ULDLoss._align_by_byte_offsets(*(offsets for _, offsets in found))
    ours = [[list(range(a, b)) for a, b in _grouped(*ends)[:, at].tolist()] for at in ([0, 1], [2, 3])]
    assert list(theirs) == ours


def test_sorted_distance_is_that_of_trl():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        gold = pytest.importorskip('trl.experimental.gold.gold_trainer')
    student, teacher = (torch.randn(5, size, generator=torch.Generator().manual_seed(size)).softmax(-1) for size in (40, 70))
    loss = gold.ULDLoss.__new__(gold.ULDLoss)
    torch.nn.Module.__init__(loss)
    loss.beta, loss.hybrid_matched_weight, loss.hybrid_unmatched_weight = 0.5, 1.0, 1.0
    loss._teacher_matched_ids, loss._student_matched_ids, loss.mapping_tensor = {0, 1}, {2, 3}, torch.tensor([2, 3])
    loss._compute_hybrid_uld_loss(student, teacher)
    own = torch.tensor([i for i in range(40) if i not in (2, 3)])
    assert torch.isclose(loss.last_unmatched_loss, _sorted_distance(teacher[:, 2:], student[:, own]).mean(), rtol=1e-5)


# --- the loss

def messages(question: str, answer: str, *more: str) -> dict:
    turns = [question, answer, *more]
    return dict(messages=[dict(role=('user', 'assistant')[n % 2], content=text) for n, text in enumerate(turns)])


CHATS = [messages('What is heat?', 'Heat is motion.'), messages('Что такое свет?', 'Свет – это волна 🌊.'),
         messages('What carries energy?', 'A wave carries energy.', 'And light?', 'Light is a wave.'), messages('Heat?', ''),
         messages('A wave?', '  two\n'), messages('Йод', 'и\u0306 한국')]


def exact(tokenizer, seed: int, hidden: int = 32):
    lm = build(tokenizer, hidden=hidden, layers=1, seed=seed)
    lm.model.double()
    with torch.no_grad(): lm.model.get_output_embeddings().weight.mul_(30)
    return lm


def loss_of(teacher: AlignedTeacher, lm, batch, **options) -> torch.Tensor:
    return teacher.loss(batch, target_states(hidden_states(lm.model, batch), batch)[0], head_of(lm.model), **options)


def naive(student, teacher, chats: list[dict], divergence: str, temperature: float, rest_weight: float = 1.0) -> torch.Tensor:
    "The sum over all groups from both models' own logits of one conversation at a time: no packing, no chunks, no shared code."
    total, share, common = torch.zeros((), dtype=torch.float64), 1.0, common_tokens(student.tokenizer, teacher.tokenizer)
    pairs = dict(zip(common.student.tolist(), common.teacher.tolist()))
    here, there = {*pairs}, {*pairs.values()}
    ends = end_of_turn(student.tokenizer), end_of_turn(teacher.tokenizer)
    for chat in chats:
        (own, places), (other, other_places) = (answer_places(lm.tokenizer, chat['messages']) for lm in (student, teacher))
        q, p = ((lm.model(torch.tensor([ids])).logits[0]/temperature).log_softmax(-1) for lm, ids in ((student, own), (teacher, other)))
        texts = [message['content'] for message in chat['messages'] if message['role'] == 'assistant']
        for text, (start, stop, over), (other_start, other_stop, other_over) in zip(texts, places, other_places):
            groups = _grouped(*(byte_ends([token_bytes(tokenizer)[i] for i in ids[a:b]], text) for tokenizer, ids, a, b in
                               ((student.tokenizer, own, start, stop), (teacher.tokenizer, other, other_start, other_stop)))).tolist()
            groups = [(start + a, start + b, other_start + c, other_start + d) for a, b, c, d in groups]
            for a, b, c, d in [*groups, (stop, over, other_stop, other_over)]:
                if b - a == d - c == 1 and pairs.get(own[a]) == other[c]:
                    before, after = p[c - 1].exp(), q[a - 1].exp()
                    p_rest, q_rest = (known[[i for i in range(len(known)) if i not in shared]].sort(descending=True).values
                                      for known, shared in ((before, there), (after, here)))
                    one, two = before[[*pairs.values()]], after[[*pairs]]
                    if len(p_rest) and len(q_rest): one, two = torch.cat([one, p_rest.sum()[None]]), torch.cat([two, q_rest.sum()[None]])
                    elif len(p_rest) or len(q_rest): share, one, two = one.sum(), one/one.sum(), two/two.sum()
                    if len(p_rest) and len(q_rest):
                        longest = max(len(p_rest), len(q_rest))
                        x, y = (torch.cat([rest, rest.new_zeros(longest - len(rest))]) for rest in (p_rest, q_rest))
                        total = total + rest_weight*(x - y).abs().sum()
                else:
                    sides = (p, other, c, d, ends[1], other_stop), (q, own, a, b, ends[0], stop)
                    one, two = ([math.prod(rows[i - 1, ids[i]].exp() for i in range(first, last)),
                                 *([] if first == closing else [rows[first - 1, end].exp()])]
                                for rows, ids, first, last, end, closing in sides)
                    one, two = (torch.stack([*known, 1 - sum(known)]) for known in (one, two))
                total, share = total + share*divergences[divergence](one.log()[None], two.log()[None])[0], 1.0
    return total


PAIRS = [('bytes', 'letters'), ('letters', 'bytes'), ('bytes', 'first'), ('pieces', 'letters'), ('never', 'bytes'),
         ('bytes', 'spaced'), ('spaced', 'letters'), ('bytes', 'fewer'), ('fewer', 'bytes')]  # the last: one vocabulary within the other


@pytest.mark.parametrize(('one', 'other'), PAIRS)
@pytest.mark.parametrize(('divergence', 'temperature'), [('forward_kl', 1.0), ('jsd', 2.0)])
def test_equals_a_naive_loop_in_value_and_gradient(one, other, divergence, temperature):
    student, teacher = exact(KINDS[one], 0), exact(KINDS[other], 1, 48)
    batch = chat_batch(student.tokenizer, CHATS)
    count = int(batch['count'])
    wanted = naive(student, teacher, CHATS, divergence, temperature)*temperature**2/count
    weights = [student.model.get_output_embeddings().weight, next(student.model.base_model.layers.parameters())]
    slopes = torch.autograd.grad(wanted, weights)
    got = loss_of(AlignedTeacher(teacher, student.tokenizer, CHATS), student, batch, divergence=divergence, temperature=temperature)
    assert math.isclose(got.item(), wanted.item(), rel_tol=1e-9)
    for mine, theirs in zip(torch.autograd.grad(got, weights), slopes): assert torch.allclose(mine, theirs, atol=1e-11, rtol=1e-7)


@pytest.mark.parametrize('divergence', divergences.values(), ids=str)
def test_one_tokenizer_gives_the_plain_divergence(divergence):
    tokenizer = KINDS['bytes']
    student, teacher = exact(tokenizer, 0), exact(tokenizer, 1, 48)
    batch = chat_batch(tokenizer, CHATS)
    states, theirs = (target_states(hidden_states(lm.model, batch), batch)[0] for lm in (student, teacher))
    everything = torch.ones(len(states), dtype=torch.bool)
    plain = chunked_loss(states, head_of(student.model), theirs, head_of(teacher.model), everything, divergence)
    got = AlignedTeacher(teacher, tokenizer, CHATS).loss(batch, states, head_of(student.model), divergence)
    assert math.isclose(got.item(), plain.item(), rel_tol=1e-9)
    assert torch.allclose(*(torch.autograd.grad(loss, states, retain_graph=True)[0] for loss in (got, plain)), atol=1e-12)


def test_each_reads_its_own_template():
    "The same tokens and another template: the answers are still compared token by token, and the turn's end with its end."
    one, other = KINDS['bytes'], copy.deepcopy(KINDS['bytes'])
    other.chat_template = PLAIN
    assert end_of_turn(one) != end_of_turn(other)
    teacher = AlignedTeacher(exact(other, 1), one, CHATS)
    assert all(not len(known.several) for known in teacher.known.values())
    assert sum(len(known.single) for known in teacher.known.values()) == int(chat_batch(one, CHATS)['count'])


@pytest.mark.parametrize('divergence', ['forward_kl', 'skew_kl', 'total_variation', 'adaptive_skew_kl'])
def test_parts_of_a_batch_add_up(divergence):
    student, teacher = exact(KINDS['bytes'], 0), AlignedTeacher(exact(KINDS['letters'], 1), KINDS['bytes'], CHATS)
    batch = chat_batch(KINDS['bytes'], CHATS, 100)
    assert len(batch['input_ids']) == 3
    whole = loss_of(teacher, student, batch, divergence=divergence, count=batch['count'])
    for rows in (1, 2):
        parts = [loss_of(teacher, student, part, divergence=divergence, count=part['count']) for part in micro_batches(batch, rows)]
        assert math.isclose(sum(parts).item(), whole.item(), rel_tol=1e-9)
    order = torch.arange(len(batch['input_ids'])).flip(0)
    turned = {name: value[order] if value.ndim else value for name, value in batch.items()}
    assert math.isclose(loss_of(teacher, student, turned, divergence=divergence).item(), whole.item(), rel_tol=1e-9)


def test_an_option_may_be_one_for_each_loss_token():
    student, teacher = exact(KINDS['bytes'], 0), AlignedTeacher(exact(KINDS['letters'], 1), KINDS['bytes'], CHATS)
    batch = chat_batch(KINDS['bytes'], CHATS, 100)
    shares = torch.linspace(0.1, 0.9, int(batch['count']), dtype=torch.float64)
    whole = loss_of(teacher, student, batch, divergence=divergences['skew_kl'].bind(alpha=shares), count=batch['count'])
    parts = micro_batches(batch, 1)
    cut = shares.split([int(part['loss_mask'].sum()) for part in parts])
    losses = [loss_of(teacher, student, part, divergence=divergences['skew_kl'].bind(alpha=alpha), count=batch['count'])
              for part, alpha in zip(parts, cut)]
    assert len(parts) > 1 and math.isclose(sum(losses).item(), whole.item(), rel_tol=1e-9)


def test_a_batch_without_loss_tokens_gives_zero_and_no_gradient():
    student, teacher = exact(KINDS['bytes'], 0), AlignedTeacher(exact(KINDS['letters'], 1), KINDS['bytes'], CHATS)
    batch = chat_batch(KINDS['bytes'], CHATS)
    empty = {name: value[:0] if value.ndim else value for name, value in batch.items()}
    loss = teacher.loss(empty, torch.zeros(0, 32, dtype=torch.float64, requires_grad=True), head_of(student.model), count=batch['count'])
    loss.backward()
    assert loss.item() == 0


def learn_by_heart(lm, chats, steps: int = 80):
    batch = chat_batch(lm.tokenizer, chats)
    fit(lm.model, lambda step: batch, lambda model, batch: dict(loss=lm_loss(model, batch)), steps=steps, learning_rate=1e-2)
    return lm


@pytest.fixture(scope='module')
def taught():
    return learn_by_heart(build(KINDS['letters'], hidden=64, layers=2, seed=2), CHATS[:3])


def test_two_that_are_certain_agree_and_one_place_off_they_do_not(taught):
    student = learn_by_heart(build(KINDS['bytes'], hidden=64, layers=2), CHATS[:3])
    teacher, batch = AlignedTeacher(taught, KINDS['bytes'], CHATS[:3]), chat_batch(KINDS['bytes'], CHATS[:3])
    states = target_states(hidden_states(student.model, batch), batch)[0]
    assert teacher.loss(batch, states, head_of(student.model)).item() < 0.05
    for shift in (-1, 1): assert teacher.loss(batch, states.roll(shift, 0), head_of(student.model)).item() > 1


def test_a_student_learns_to_answer_from_the_teacher_alone(taught):
    student = build(KINDS['bytes'], hidden=64, layers=2)
    teacher, batch = AlignedTeacher(taught, KINDS['bytes'], CHATS[:3]), chat_batch(KINDS['bytes'], CHATS[:3])
    history = fit(student.model, lambda step: batch, lambda model, batch: dict(loss=loss_of(teacher, student, batch, count=batch['count'])),
                  steps=60, learning_rate=1e-2)
    assert history[-1]['loss'] < 0.1*history[0]['loss']
    prompts = [[chat_prompt(lm, chat['messages'][:1]) for chat in CHATS[:3]] for lm in (student, taught)]
    mine, theirs = (respond(lm, asked, 40) for lm, asked in zip((student, taught), prompts))
    assert [answer.text for answer in mine] == [answer.text for answer in theirs] and all(answer.stopped for answer in mine)
    assert all(parameter.grad is None for parameter in taught.model.parameters())


def test_the_rest_has_its_weight():
    student, teacher = exact(KINDS['bytes'], 0), exact(KINDS['letters'], 1)
    batch = chat_batch(KINDS['bytes'], CHATS)
    losses = [loss_of(AlignedTeacher(teacher, KINDS['bytes'], CHATS, weight), student, batch).item() for weight in (0.0, 1.0, 3.0)]
    assert math.isclose(losses[2] - losses[0], 3*(losses[1] - losses[0]), rel_tol=1e-9) and losses[1] > losses[0]


# --- what cannot be aligned

def lossy(normalizer) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


@pytest.mark.parametrize('normalizer', [normalizers.Lowercase(), normalizers.NFKC(), normalizers.Replace('\n', ' ')],
                         ids=['capitals', 'compatibility', 'line breaks'])
def test_a_tokenizer_that_loses_something_is_refused(normalizer):
    good, bad = KINDS['bytes'], lossy(normalizer)
    with pytest.raises(InputError, match="teacher's tokenizer loses"): AlignedTeacher(build(bad, hidden=32, layers=1), good)
    with pytest.raises(InputError, match="student's tokenizer loses"): AlignedTeacher(build(good, hidden=32, layers=1), bad)


def test_composed_letters_are_tried_and_what_cannot_be_aligned_is_left_out_and_said(capsys):
    composed, plain = composing(), KINDS['letters']
    odd, fine = messages('Йод', 'и\u0306 есть'), messages('Heat?', 'Heat.')
    assert unicodedata.normalize('NFC', odd['messages'][1]['content']) != odd['messages'][1]['content']
    both = AlignedTeacher(build(plain, hidden=32, layers=1), composed, [odd, fine])
    assert all(both.known.values()) and capsys.readouterr().out == ''
    teacher = AlignedTeacher(build(composed, hidden=32, layers=1), plain, [odd, fine])
    assert sum(known is None for known in teacher.known.values()) == 1 and '1 of 2 conversations' in capsys.readouterr().out
    student = build(plain, hidden=32, layers=1)
    alone, together = (loss_of(teacher, student, chat_batch(plain, chats), count=1.0).item() for chats in ([fine], [odd, fine]))
    assert math.isclose(alone, together, rel_tol=1e-5)
    with pytest.raises(InputError, match='None of the 1 conversations'): AlignedTeacher(build(composed, hidden=32, layers=1), plain, [odd])


def test_too_long_for_the_teacher_is_left_out():
    with pytest.raises(InputError, match='longer than its 16 tokens'):
        AlignedTeacher(build(KINDS['letters'], hidden=32, layers=1, context=16), KINDS['bytes'], CHATS[:2])


def test_an_unknown_conversation_is_an_error_until_it_is_added():
    teacher, student = AlignedTeacher(exact(KINDS['letters'], 1), KINDS['bytes'], CHATS[:1]), exact(KINDS['bytes'], 0)
    batch = chat_batch(KINDS['bytes'], CHATS[:2])
    with pytest.raises(InputError, match='was not given'): loss_of(teacher, student, batch)
    assert teacher.add(CHATS[1:2]) == 0
    assert loss_of(teacher, student, batch).item() > 0


def test_a_broken_teacher_is_named():
    broken = build(KINDS['letters'], hidden=32, layers=1, name='broken-teacher')
    torch.nn.init.constant_(broken.model.get_output_embeddings().weight, math.nan)
    teacher = AlignedTeacher(broken, KINDS['bytes'], CHATS)
    student = build(KINDS['bytes'], hidden=32, layers=1)
    with pytest.raises(FloatingPointError, match='broken-teacher'): loss_of(teacher, student, chat_batch(KINDS['bytes'], CHATS))


@pytest.mark.parametrize('name', ['zzz', 'forwardkl'])
def test_a_wrong_divergence_is_refused(name):
    teacher, student = AlignedTeacher(exact(KINDS['letters'], 1), KINDS['bytes'], CHATS), exact(KINDS['bytes'], 0)
    with pytest.raises(InputError, match='no known divergence'):
        loss_of(teacher, student, chat_batch(KINDS['bytes'], CHATS), divergence=name)
