"""Content stays content, masks mark what is to be learnt, and packing loses nothing: properties, and templates of several families."""
import copy
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from scilm_adapt.runs import InputError
from scilm_adapt.tokens import (
    CHATML,
    batch_rows,
    best_fit,
    control_tokens,
    document_ends,
    encode,
    encode_chat,
    encode_document,
    end_of_turn,
    pack,
    pad,
    split_inside,
    train_tokenizer,
)

TEXTS = ['Heat flows from warm bodies to cold ones, and never back by itself.', 'Light is a wave and light is a particle.',
         'Теплота переходит от тёплых тел к холодным. Свет — это волна и частица.'] * 3


def make(**added) -> PreTrainedTokenizerFast:
    "A trained tokenizer with more added tokens: names of special ones, then of others."
    tokenizer = train_tokenizer(TEXTS, 400)
    if special := added.get('special'):
        tokenizer.add_special_tokens(dict(additional_special_tokens=special), replace_extra_special_tokens=False)
    if others := added.get('others'): tokenizer.add_tokens(others)
    return tokenizer


PLAIN = make()
# Tokens inside tokens, tokens that overlap, one that is not special, one that swallows the blanks around it, white space as content.
ODD = make(special=['<|im_end|><|im_start|>', '|><|', '<s>', '</s>', '[INST]', AddedToken('<mask>', lstrip=True, rstrip=True)],
           others=['<tool>', 'волна', AddedToken('<think>', normalized=True), '    '])
TOKENIZERS = dict(plain=PLAIN, odd=ODD)
SPELLINGS = [token for token in control_tokens(ODD)]
# Texts made of tokens, parts of tokens, blanks and anything else, in any order.
HALVES = [spelling[:n] for spelling in SPELLINGS for n in (1, len(spelling)//2, -1)]
PARTS = st.sampled_from(SPELLINGS) | st.sampled_from([*HALVES, '|>', '<|', ' ', '\n', '    '])
TEXT = st.lists(PARTS | st.text(max_size=8), max_size=12).map(''.join)


@pytest.mark.parametrize('name', TOKENIZERS)
@settings(max_examples=150)
@given(text=TEXT)
def test_no_content_yields_a_control_token_and_nothing_is_lost(name, text):
    tokenizer = TOKENIZERS[name]
    ids = encode(tokenizer, text)
    assert not set(ids) & set(control_tokens(tokenizer).values())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize('text', [
    '<|im_end|>', '<|im_end|>'*3, '<|im_end|><|im_start|>', '<|im_<|im_end|>end|>', '<|im_<|im_<|im_end|>end|>end|>', '<<|endoftext|>|>',
    'a<mask>b', ' <mask> ', '<tool></tool><tool', 'волнаволна', '<|im_end|', '|im_end|>', '|><|><|', 'x'*500 + '<s>', '', ' ', '\n\n'])
def test_spellings_of_control_tokens(text):
    for tokenizer in TOKENIZERS.values():
        ids = encode(tokenizer, text)
        assert not set(ids) & set(control_tokens(tokenizer).values()) and tokenizer.decode(ids) == text


def test_the_trap_is_real():
    "What the library does by default, also when it is asked to add nothing: if this fails, `encode` may be too careful."
    assert PLAIN.convert_tokens_to_ids('<|im_end|>') in PLAIN('a <|im_end|> b', add_special_tokens=False)['input_ids']
    ids = ODD('a <tool> b', add_special_tokens=False, split_special_tokens=True)['input_ids']
    assert ODD.convert_tokens_to_ids('<tool>') in ids  # the library's own remedy does not reach tokens that are not special


def test_plain_content_is_tokenised_as_usual():
    for text in TEXTS: assert encode(PLAIN, text) == PLAIN(text, add_special_tokens=False)['input_ids']


def test_white_space_tokens_are_content():
    assert encode(ODD, 'a    b') == ODD('a    b', add_special_tokens=False)['input_ids']
    assert ODD.convert_tokens_to_ids('    ') in encode(ODD, 'a    b')


@pytest.mark.parametrize('text', ['<|END|>', 'a <|END|> b', '＜｜ｅｎｄ｜＞', '<|en\u00add|>', 'a<|End|>b'])
def test_a_tokenizer_that_rewrites_its_input_cannot_make_one_either(text):
    "Normalised added tokens are searched in the normalised text, where a spelling can appear that the text does not have."
    core = Tokenizer(models.BPE({character: n for n, character in enumerate('<|>abend ')}, []))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace('\u00ad', '')])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_tokens([AddedToken('<|end|>', normalized=True)])
    control = tokenizer.convert_tokens_to_ids('<|end|>')
    assert control in tokenizer(text, add_special_tokens=False)['input_ids']
    assert control not in encode(tokenizer, text) and encode(tokenizer, text)


@given(TEXT)
def test_pieces_join_to_the_text_and_hold_no_whole_token(text):
    pieces = split_inside(text, SPELLINGS)
    assert ''.join(pieces) == text and not any(token in piece for piece in pieces for token in SPELLINGS)


def test_a_document_has_a_start_and_an_end():
    start, end = document_ends(PLAIN)
    assert start == end == PLAIN.eos_token_id
    ids = encode_document(PLAIN, 'a <|endoftext|> b')
    assert ids[0] == start and ids[-1] == end and ids.count(end) == 2
    with_start = make(special=['<s>'])
    with_start.bos_token = '<s>'
    assert encode_document(with_start, 'a')[0] == with_start.convert_tokens_to_ids('<s>')
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({'a': 0}, [])))
    with pytest.raises(InputError, match='eos'): document_ends(bare)


# --- conversations ----------------------------------------------------------------------------------------------------------------

LLAMA3 = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
          "+ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help in science.<|im_end|>\n' }}{% endif %}" + CHATML
ZEPHYR = ("{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
BLANK_FIRST = ("{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else "
               "' ' + m['content'] + ' ' + eos_token }}{% endfor %}")
TEMPLATES = dict(chatml=(CHATML, '<|im_end|>'), llama3=(LLAMA3, '<|eot_id|>'), system=(SYSTEM, '<|im_end|>'),
                 zephyr=(ZEPHYR, '<|endoftext|>'), mistral=(BLANK_FIRST, '<|endoftext|>'))


def with_template(name: str) -> PreTrainedTokenizerFast:
    tokenizer = make(special=['<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>', '[INST]', '[/INST]'])
    if name == 'llama3': tokenizer.bos_token = '<|begin_of_text|>'
    tokenizer.chat_template = TEMPLATES[name][0]
    return tokenizer


CHATTERS = {name: with_template(name) for name in TEMPLATES}
each_template = pytest.mark.parametrize('name', TEMPLATES)


def turns(*contents: str) -> list[dict]:
    "Messages of user and assistant in turn."
    return [dict(role=('user', 'assistant')[n % 2], content=content) for n, content in enumerate(contents)]


def learnt(tokenizer, ids: list[int], mask: list[int]) -> list[str]:
    "Each run of learnt tokens as text."
    runs, previous = [], 0
    for i, m in zip(ids, mask):
        if m and not previous: runs.append([])
        if m: runs[-1].append(i)
        previous = m
    return [tokenizer.decode(run) for run in runs]


@each_template
def test_answers_and_the_ends_of_their_turns_are_learnt_and_nothing_else(name):
    tokenizer, end = CHATTERS[name], TEMPLATES[name][1]
    messages = turns('What is heat?', 'Motion of small parts.', 'Что такое свет?', 'Волна.', 'Why?', 'Nobody knows.')
    ids, mask = encode_chat(tokenizer, messages)
    gap = ' ' if name == 'mistral' else ''  # the template's own blank before the end is part of what is to be written
    assert learnt(tokenizer, ids, mask) == [m['content'] + gap + end for m in messages if m['role'] == 'assistant']
    assert len(ids) == len(mask) and set(mask) == {0, 1}


@each_template
def test_harmless_conversations_are_tokenised_as_the_library_does(name):
    tokenizer = CHATTERS[name]
    for messages, prompt in ((turns('Heat flows', 'Light is a wave'), False), (turns('a', 'b', 'свет'), True)):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        ids, _ = encode_chat(tokenizer, messages, add_generation_prompt=prompt)
        assert tokenizer.decode(ids) == text
        if name != 'mistral':  # (there a blank of the template would join the content's first word)
            assert ids == tokenizer(text, add_special_tokens=False)['input_ids']


@each_template
@settings(max_examples=40)
@given(contents=st.lists(TEXT, min_size=1, max_size=5))
def test_no_message_can_write_the_template(name, contents):
    tokenizer = CHATTERS[name]
    controls = set(control_tokens(tokenizer).values())
    harmless, _ = encode_chat(tokenizer, turns(*['a']*len(contents)))
    ids, mask = encode_chat(tokenizer, turns(*contents))
    assert [i for i in ids if i in controls] == [i for i in harmless if i in controls]
    assert sum(mask) == sum(len(encode(tokenizer, content)) for content in contents[1::2]) + (
        len(contents)//2 * (2 if name == 'mistral' else 1))


@pytest.mark.parametrize('content', ['\ue0000\ue001', '\ue0001\ue001 \ue000', '{{ 7*7 }}', '{% raw %}', "'", '\\n', '\\1'])
def test_content_that_looks_like_our_own_marks_is_content(content):
    ids, mask = encode_chat(PLAIN, turns('q', content))
    assert PLAIN.decode([i for i, m in zip(ids, mask) if m]) == content + '<|im_end|>'


def test_a_template_that_strips_content_meets_no_surprise():
    tokenizer = CHATTERS['llama3']
    ids, mask = encode_chat(tokenizer, turns('  q ', ' a \n'))
    assert learnt(tokenizer, ids, mask)[0].strip() == 'a \n<|eot_id|>' and ids.count(tokenizer.bos_token_id) == 1


def test_many_turns_keep_their_places():
    messages = turns(*[f'message {n}' for n in range(24)])
    ids, mask = encode_chat(PLAIN, messages)
    assert learnt(PLAIN, ids, mask) == [f'message {n}<|im_end|>' for n in range(1, 24, 2)]


def test_an_empty_answer_still_teaches_to_stop():
    ids, mask = encode_chat(PLAIN, turns('q', ''))
    assert learnt(PLAIN, ids, mask) == ['<|im_end|>']


def test_the_opened_turn_is_not_learnt():
    ids, mask = encode_chat(PLAIN, turns('q', 'a', 'q'), add_generation_prompt=True)
    assert PLAIN.decode(ids).endswith('<|im_start|>assistant\n') and learnt(PLAIN, ids, mask) == ['a<|im_end|>']


@each_template
def test_the_end_of_a_turn_is_the_templates(name):
    assert CHATTERS[name].convert_ids_to_tokens(end_of_turn(CHATTERS[name])) == TEMPLATES[name][1]


@pytest.mark.parametrize('template', [
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}",
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"], ids=['text only', 'starts only', 'nothing'])
def test_a_template_without_an_end_is_refused(template):
    tokenizer = copy.deepcopy(PLAIN)
    tokenizer.chat_template = template
    with pytest.raises(InputError, match='never stop'): end_of_turn(tokenizer)


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = copy.deepcopy(PLAIN)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match='chat_template'): encode_chat(tokenizer, turns('a'))


# --- packing ----------------------------------------------------------------------------------------------------------------------

LENGTHS = st.integers(1, 60).flatmap(lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=60)))


def fewest_rows(lengths: list[int], capacity: int) -> int:
    "The optimum, by trying everything: each item into each row that has room, or into a new one."
    def place(left, rooms):
        if len(rooms) >= best[0]: return
        if not left: best[0] = len(rooms); return
        for n in range(len(rooms)):
            if rooms[n] >= left[0]: place(left[1:], [r - left[0]*(k == n) for k, r in enumerate(rooms)])
        place(left[1:], [*rooms, capacity - left[0]])
    best = [len(lengths) + 1]
    place(sorted(lengths, reverse=True), [])
    return best[0]


@given(LENGTHS)
def test_every_item_is_in_one_row_and_no_row_overflows(case):
    capacity, lengths = case
    rows = best_fit(lengths, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    used = [sum(lengths[item] for item in row) for row in rows]
    assert all(0 < u <= capacity for u in used)
    assert len(rows) <= max(1, 2*math.ceil(sum(lengths)/capacity)) or not lengths  # no two rows are both half empty
    assert sum(u <= capacity/2 for u in used) <= 1


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_rows_are_close_to_the_fewest_possible(lengths):
    assert len(best_fit(lengths, 12)) <= 11/9*fewest_rows(lengths, 12) + 1


DOCUMENTS = st.lists(st.integers(0, 30), min_size=1, max_size=15)


def numbered(lengths: list[int]) -> list[list[int]]:
    "Documents whose tokens tell where they are from: document 7's fourth token is 7003."
    return [[1000*number + at for at in range(length)] for number, length in enumerate(lengths)]


@given(DOCUMENTS, st.integers(2, 12))
def test_packing_keeps_every_token_of_every_document(lengths, length):
    documents = numbered(lengths)
    if max(lengths) < 2:
        with pytest.raises(InputError, match='nothing to learn'): pack(documents, length)
        return
    packed = pack(documents, length)
    real = packed.segments > 0
    assert set(packed.input_ids[real].tolist()) == {i for ids in documents if len(ids) > 1 for i in ids}
    assert (packed.documents[real] == packed.input_ids[real]//1000).all()  # `documents` numbers right


@given(DOCUMENTS.filter(lambda lengths: max(lengths) > 1), st.integers(2, 12))
def test_the_places_of_a_row_fit_together(lengths, length):
    packed = pack(numbered(lengths), length)
    for ids, positions, segments, targets, owners in zip(packed.input_ids, packed.position_ids, packed.segments, packed.loss_mask,
                                                         packed.documents):
        starts = np.flatnonzero(np.diff(segments, prepend=-1))
        assert (positions[starts] == 0).all() and not targets[starts].any() and not targets[segments == 0].any()
        assert ((np.diff(positions) == 1) | (np.diff(segments) != 0)).all()  # positions restart just where a document starts
        assert (np.diff(segments)[segments[1:] > 0] >= 0).all() and segments.max() == len(set(segments[segments > 0]))
        inside = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
        assert (np.diff(ids)[inside] == 1).all() and (np.diff(owners)[inside] == 0).all()  # tokens follow each other as in the text
        assert (targets[1:] == inside).all()  # and every token with one before it is to be learnt


@given(st.lists(st.tuples(st.integers(2, 10), st.integers(0, 2**10)), min_size=1, max_size=10))
def test_masks_say_what_is_learnt(cases):
    documents = numbered([length for length, _ in cases])
    masks = [[bits >> at & 1 for at in range(length)] for length, bits in cases]
    wanted = {i for ids, mask in zip(documents, masks) for i, m in list(zip(ids, mask))[1:] if m}
    if not wanted:
        with pytest.raises(InputError): pack(documents, 10, masks)
        return
    packed = pack(documents, 10, masks)
    assert set(packed.input_ids[packed.loss_mask].tolist()) == wanted


def test_documents_of_one_token_are_left_out():
    packed = pack([[7], [1, 2, 3], [], [8]], 4)
    assert packed.input_ids.tolist() == [[1, 2, 3, 0]] and packed.documents[0, :3].tolist() == [1, 1, 1]
    for nothing in ([], [[]], [[5], [6]]):
        with pytest.raises(InputError, match='nothing to learn'): pack(nothing, 4)


@pytest.mark.parametrize(('mean', 'length'), [(150, 512), (220, 1024), (90, 256)])
def test_hardly_a_place_is_padding_with_lengths_of_abstracts(mean, length):
    generator = random.Random(0)
    lengths = [min(length, max(2, int(generator.lognormvariate(math.log(mean), 0.6)))) for _ in range(2000)]
    assert (pack([[1]*n for n in lengths], length).segments > 0).mean() >= 0.98


def test_a_batch_counts_its_targets():
    packed = pack(numbered([5, 3, 4, 2]), 5)
    batch = packed.batch([1, 0])
    assert batch['input_ids'].tolist() == packed.input_ids[[1, 0]].tolist() and batch['loss_mask'].dtype == torch.bool
    assert batch['count'].item() == packed.loss_mask[:2].sum() and batch['count'].ndim == 0


# --- batches and padding ----------------------------------------------------------------------------------------------------------

@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5), st.integers(0, 3))
def test_every_epoch_has_every_row_once(rows, batch_size, epoch, seed):
    "Also when an epoch ends in the middle of a batch, and when a batch is larger than an epoch."
    steps = -(-(epoch + 1)*rows//batch_size)
    stream = [row for step in range(steps) for row in batch_rows(rows, batch_size, step, seed)]
    assert sorted(stream[epoch*rows:(epoch + 1)*rows]) == list(range(rows))
    assert all(type(row) is int for row in stream)


def test_batches_do_not_depend_on_what_was_drawn_before():
    np.random.seed(0); random.seed(0); torch.manual_seed(0)
    wanted = batch_rows(100, 8, 731, seed=3)
    np.random.seed(1); [batch_rows(100, 8, step, seed=3) for step in range(5)]
    assert batch_rows(100, 8, 731, seed=3) == wanted != batch_rows(100, 8, 731, seed=4)
    assert batch_rows(100, 100, 0, seed=3) != batch_rows(100, 100, 1, seed=3)  # every epoch has its own order


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=5), st.booleans())
def test_padding_is_on_its_side_and_masked(rows, left):
    padded = pad(rows, pad_id=0, left=left)
    assert padded['input_ids'].shape == (len(rows), max(map(len, rows)))
    for row, ids, mask in zip(rows, padded['input_ids'], padded['attention_mask']):
        assert ids[mask.bool()].tolist() == row and mask.sum() == len(row)
        if row: assert mask[-1 if left else 0] == 1


def test_the_byte_level_tokenizer_knows_every_byte():
    assert PLAIN.decode(encode(PLAIN, everything := ''.join(map(chr, [*range(1, 0xd800), 0x1f9ea])))) == everything
    assert set(pre_tokenizers.ByteLevel.alphabet()) < set(PLAIN.get_vocab())
