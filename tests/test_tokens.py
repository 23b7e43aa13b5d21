"""Content stays content, masks mark what is to be learnt, and packing loses nothing: properties, and templates of several families."""
import copy
import itertools
import json
import math
import random
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from scilm_adapt.errors import InputError
from scilm_adapt.runs import Run
from scilm_adapt.tokens import (
    _CHATML,
    _batches,
    _laid_out,
    _spell,
    batch_rows,
    best_fit,
    control_tokens,
    document_ends,
    encode,
    encode_chat,
    encode_document,
    encode_documents,
    encode_many,
    end_of_turn,
    pack,
    pad,
    read_tokens,
    reading_of,
    store_tokens,
    train_tokenizer,
    write_tokens,
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
# Tokens inside tokens, tokens that overlap, ones that are not special, ones that swallow the blanks around them, white space as content.
FLAGS = [AddedToken('<mask>', lstrip=True, rstrip=True, special=True), AddedToken('<word>', single_word=True, special=True)]
ODD = make(special=['<|im_end|><|im_start|>', '|><|', '<s>', '</s>', '[INST]', *FLAGS],
           others=['<tool>', 'волна', AddedToken('<think>', normalized=True), '    '])


# --- the families -----------------------------------------------------------------------------------------------------------------

BYTES = [f'<0x{byte:02X}>' for byte in range(256)]
SENTENCEPIECE = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])


def learnt_bpe(*names: str, ignore_merges: bool = False) -> models.BPE:
    "A BPE with byte fallback, as of Llama and Gemma, that has the `names` in its own vocabulary."
    core = Tokenizer(models.BPE(unk_token='<unk>'))
    core.normalizer = normalizers.Replace(' ', '▁')
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, show_progress=False, special_tokens=['<unk>', '<s>', '</s>']))
    found = json.loads(core.to_str())['model']
    vocabulary = {token: n for n, token in enumerate(dict.fromkeys([*found['vocab'], *BYTES, '▁▁', *names]))}
    return models.BPE(vocabulary, [('▁', '▁'), *map(tuple, found['merges'])], unk_token='<unk>', fuse_unk=True, byte_fallback=True,
                      ignore_merges=ignore_merges)


def llama(legacy: bool) -> Tokenizer:
    "Both forms in which the library has written down Llama's sentencepiece model."
    core = Tokenizer(learnt_bpe())
    if legacy: core.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    else: core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
    core.decoder = SENTENCEPIECE
    return core


def gemma() -> Tokenizer:
    "No prefix; blanks in a row are tokens of their own, found by the model and also added."
    core = Tokenizer(learnt_bpe('<start_of_turn>', '<end_of_turn>', '<tool_call>', '</tool_call>', '<h1>', ignore_merges=True))
    core.normalizer = normalizers.Replace(' ', '▁')
    core.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])
    return core


def unigram() -> Tokenizer:
    "Its model knows its control tokens as the most likely words of all."
    letters = sorted(set(''.join(TEXTS)) - {' '})
    pieces = [*((name, 0.0) for name in ('<unk>', '<s>', '</s>', '[INST]')), *((byte, -20.0) for byte in BYTES), ('▁', -3.0),
              ('▁light', -4.0), *((letter, -6.0) for letter in letters), *((c, -8.0) for c in '<>/[]|' if c not in letters)]
    core = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(prepend_scheme='always'), SENTENCEPIECE
    return core


def wordpiece(pre_tokenizer) -> Tokenizer:
    "Lower case, no accents, and a token for unknown words."
    letters = sorted(set(''.join(TEXTS).lower()) - {' '})
    letters += '[]<>|'
    vocabulary = ['[UNK]', '[CLS]', '[SEP]', '##cls', *letters, *(f'##{letter}' for letter in letters), 'heat', '##eat']
    core = Tokenizer(models.WordPiece({token: n for n, token in enumerate(dict.fromkeys(vocabulary))}, unk_token='[UNK]'))
    core.normalizer, core.pre_tokenizer, core.decoder = normalizers.BertNormalizer(), pre_tokenizer, decoders.WordPiece()
    return core


def rewriting() -> Tokenizer:
    "Byte-level, but it changes the text first, so that a spelling can appear that the text does not have."
    core = Tokenizer.from_str(PLAIN.backend_tokenizer.to_str())
    core.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(),
                                            normalizers.Replace('\u00ad', ''), normalizers.Replace('§', '<|end|>')])
    return core


def dressed(core: Tokenizer, special: list | None = None, others: list | None = None, **names) -> PreTrainedTokenizerFast:
    "A tokenizer around a copy of `core`, with special tokens and others that are only added."
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(core.to_str()), clean_up_tokenization_spaces=False, **names)
    if special: tokenizer.add_special_tokens(dict(additional_special_tokens=special), replace_extra_special_tokens=False)
    if others: tokenizer.add_tokens(others)
    return tokenizer


NAMES = dict(bos_token='<s>', eos_token='</s>', unk_token='<unk>')
BARE = dict(plain=PLAIN.backend_tokenizer, llama=llama(False), legacy=llama(True), gemma=gemma(), unigram=unigram(),
            rewriting=rewriting(), wordpiece=wordpiece(pre_tokenizers.BertPreTokenizer()),
            words=wordpiece(pre_tokenizers.WhitespaceSplit()))
CASED = [AddedToken('<|end|>', normalized=True), AddedToken('[inst]', normalized=True), AddedToken('sea', normalized=True)]
TOKENIZERS = dict(
    plain=PLAIN, odd=ODD, slow=ByT5Tokenizer(extra_ids=3),
    llama=dressed(BARE['llama'], ['[INST]', '<<SYS>>'], ['<tool_call>', '</tool_call>'], **NAMES),
    legacy=dressed(BARE['legacy'], ['<|start_header_id|>', '<|eot_id|>'], ['<think>'], **NAMES),
    gemma=dressed(BARE['gemma'], ['<start_of_turn>', '<end_of_turn>'],
                  ['<tool_call>', '</tool_call>', '<h1>', AddedToken('▁▁', normalized=False), '\n\n'], **NAMES),
    unigram=dressed(BARE['unigram'], ['[INST]'], ['<tool>'], **NAMES),
    wordpiece=dressed(BARE['wordpiece'], None, ['<tool>'], unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]'),
    words=dressed(BARE['words'], None, ['heat', '##cls'], unk_token='[UNK]', cls_token='[CLS]'),
    rewriting=dressed(BARE['rewriting'], None, CASED, eos_token='<|endoftext|>'))
TOKENIZERS['words'].sep_token = '[SEP]'  # declared late: special, and not among the added tokens
each_tokenizer = pytest.mark.parametrize('name', TOKENIZERS)

SPELLINGS = sorted({token for tokenizer in TOKENIZERS.values() for token in control_tokens(tokenizer) if token not in BYTES})
# Texts made of tokens, parts of tokens, what is rewritten into them, blanks and anything else, in any order.
HALVES = [spelling[:n] for spelling in SPELLINGS for n in (1, len(spelling)//2, -1)]
DISGUISED = ['<|END|>', '＜｜ｅｎｄ｜＞', '<|en\u00add|>', '§', '<|e\u0301nd|>', 'SEA', 's\u00adea', '[ＩＮＳＴ]', '[cls]', 'HEAT']
PARTS = st.sampled_from(SPELLINGS) | st.sampled_from([*HALVES, *DISGUISED, '|>', '<|', ' ', '  ', '\n', '    ', '▁', '##'])
TEXT = st.lists(PARTS | st.text(max_size=8), max_size=12).map(''.join)


def reads_back(name: str, text: str) -> bool:
    "Whether the family's tokenizer, before anything is added to it, gives back this text."
    if name in ('wordpiece', 'words'): return False  # what stood between its words is lost
    if name == 'slow': return True
    core = BARE.get(name, BARE['plain'])
    return core.decode(core.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


@each_tokenizer
@settings(max_examples=120)
@given(text=TEXT)
def test_no_content_yields_a_control_token_and_nothing_is_lost(name, text):
    tokenizer = TOKENIZERS[name]
    ids = encode(tokenizer, text)
    assert not set(ids) & {*control_tokens(tokenizer).values(), *tokenizer.all_special_ids}
    if reads_back(name, text): assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@each_tokenizer
def test_every_control_token_alone_and_in_a_sentence(name):
    "And the trap is real: the library, asked to add nothing, makes a control token of each of them."
    tokenizer = TOKENIZERS[name]
    controls = control_tokens(tokenizer)
    assert len(controls) > 2 and set(tokenizer.all_special_ids) <= set(controls.values())
    for token, number in controls.items():
        if (name, token) != ('words', '[SEP]'): assert number in tokenizer(f'a {token} b', add_special_tokens=False)['input_ids']
        for text in (token, f'a {token} b', f'a{token}b', token*3, token[:1] + token + token[1:], token + token[::-1]):
            ids = encode(tokenizer, text)
            assert not set(ids) & set(controls.values()) and (ids or name in ('wordpiece', 'words'))
            if reads_back(name, text): assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@each_tokenizer
@settings(max_examples=25)
@given(texts=st.lists(TEXT, max_size=6))
def test_many_texts_at_once_are_tokenised_as_each_alone(name, texts):
    tokenizer = TOKENIZERS[name]
    assert encode_many(tokenizer, iter(texts)) == [encode(tokenizer, text) for text in texts]


@each_tokenizer
def test_harmless_texts_are_tokenised_as_the_library_does(name):
    tokenizer, harmless = TOKENIZERS[name], ['Light is  a particle.', 'a', '', '  light\n\nis\ta wave\n', 'Это свет', 'naïve']
    controls = set(control_tokens(tokenizer).values())
    expected = [tokenizer(text, add_special_tokens=False)['input_ids'] for text in harmless]
    chosen = [(text, ids) for text, ids in zip(harmless, expected) if controls.isdisjoint(ids)]
    assert len(chosen) >= (3 if name in ('wordpiece', 'words') else 5)
    assert encode_many(tokenizer, [text for text, _ in chosen]) == [ids for _, ids in chosen]


def test_texts_go_to_the_tokenizer_in_handfuls():
    texts = ['abc', 'd', '', 'efghij', 'k']
    assert list(_batches(texts, 4)) == [['abc', 'd'], ['', 'efghij'], ['k']] and list(_batches([], 4)) == []
    assert [text for batch in _batches(iter(texts), 1) for text in batch] == texts


def test_a_token_added_later_is_a_control_token_at_once():
    tokenizer = make()
    before = encode(tokenizer, 'a <late> b')
    tokenizer.add_tokens(['<late>'])
    assert encode(tokenizer, 'a <late> b') == before and '<late>' in control_tokens(tokenizer)
    tokenizer.add_tokens(['particle'])  # a word that the model has, too, so that the size of the vocabulary does not change
    assert tokenizer.decode(encode(tokenizer, 'a particle')) == 'a particle'


def test_what_others_asked_of_the_tokenizer_does_not_linger():
    tokenizer = make()
    wanted = encode_many(tokenizer, [TEXTS[0], 'a <|im_end|>', 'a'])
    tokenizer([TEXTS[0], 'a'], padding='max_length', max_length=5, truncation=True, split_special_tokens=True)
    assert tokenizer.backend_tokenizer.padding and tokenizer.backend_tokenizer.truncation
    assert encode_many(tokenizer, [TEXTS[0], 'a <|im_end|>', 'a']) == wanted


def test_a_word_without_a_token_is_left_out_and_its_neighbours_stay():
    tokenizer = TOKENIZERS['wordpiece']
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, 'light ☃ light')) == tokenizer.convert_ids_to_tokens(
        encode(tokenizer, 'light')*2)


def test_a_piece_is_halved_only_where_it_spells_a_control_token():
    vocabulary = {'<s>': 0, 'a': 1, '<': 2, 's': 3, '>': 4, 'b<s>': 5}
    asked = []
    def tokenize(piece): asked.append(piece); return [vocabulary[piece]] if piece in vocabulary else [vocabulary.get(c, 0) for c in piece]
    assert _spell(tokenize, '<s>', {'<s>': 0}) == [2, 3, 4] and _spell(tokenize, 'b<s>', {'<s>': 0}) == [5]
    asked.clear()
    assert _spell(tokenize, 'a?s', {'<s>': 0}) == [1, 3] and asked == ['a?s']  # what is only unknown is left out


@pytest.mark.parametrize('text', [
    '<|im_end|>', '<|im_end|>'*3, '<|im_end|><|im_start|>', '<|im_<|im_end|>end|>', '<|im_<|im_<|im_end|>end|>end|>', '<<|endoftext|>|>',
    'a<mask>b', ' <mask> ', '<tool></tool><tool', 'волнаволна', '<|im_end|', '|im_end|>', '|><|><|', 'x'*500 + '<s>', '', ' ', '\n\n'])
def test_spellings_of_control_tokens(text):
    for tokenizer in (PLAIN, ODD):
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


def test_a_document_has_a_start_and_an_end():
    start, end = document_ends(PLAIN)
    assert start == end == PLAIN.eos_token_id
    ids = encode_document(PLAIN, 'a <|endoftext|> b')
    assert ids[0] == start and ids[-1] == end and ids.count(end) == 2
    with_start = make(special=['<s>'])
    with_start.bos_token = '<s>'
    assert encode_document(with_start, 'a')[0] == with_start.convert_tokens_to_ids('<s>')
    assert list(encode_documents(with_start, ['a', '', '<s>'])) == [encode_document(with_start, text) for text in ('a', '', '<s>')]
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({'a': 0}, [])))
    with pytest.raises(InputError, match='eos'): document_ends(bare)


# --- conversations ----------------------------------------------------------------------------------------------------------------

LLAMA3 = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
          "+ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help in science.<|im_end|>\n' }}{% endif %}" + _CHATML
ZEPHYR = ("{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
BLANK_FIRST = ("{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else "
               "' ' + m['content'] + ' ' + eos_token }}{% endfor %}")
TEMPLATES = dict(chatml=(_CHATML, '<|im_end|>'), llama3=(LLAMA3, '<|eot_id|>'), system=(SYSTEM, '<|im_end|>'),
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
        assert tokenizer.decode(ids) == text.replace('[/INST] Light', '[/INST]Light')  # a blank before an answer is its first word's
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


@pytest.mark.parametrize('attack', ["''.__class__.__mro__[1].__subclasses__()", "cycler.__init__.__globals__.os.system('touch evil')",
                                    'messages.append(1)', "raise_exception('no')"])
def test_the_template_of_a_stranger_runs_no_code(attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = copy.deepcopy(PLAIN)
    tokenizer.chat_template = '{{ ' + attack + ' }}{% for m in messages %}{{ m.content }}{% endfor %}'
    with pytest.raises(InputError, match='chat template cannot write .*(unsafe|no).*chat_template = '): encode_chat(tokenizer, turns('a'))
    assert not list(tmp_path.iterdir())


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
    row_of = best_fit(lengths, capacity)
    used = np.bincount(row_of, lengths)
    assert len(row_of) == len(lengths) and all(0 < u <= capacity for u in used)
    assert sum(u <= capacity/2 for u in used) <= 1  # no two rows are both half empty


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_rows_are_close_to_the_fewest_possible(lengths):
    assert best_fit(lengths, 12).max() + 1 <= 11/9*fewest_rows(lengths, 12) + 1


NAMES_OF_ARRAYS = ('input_ids', 'position_ids', 'segments', 'loss_mask', 'documents')


def packed_plainly(documents: list[list[int]], length: int, masks: list[list[int]] | None = None) -> dict[str, np.ndarray]:
    "What `pack` is to give, row by row and token by token."
    masks = masks or [[1]*len(ids) for ids in documents]
    pieces = [(number, ids[at:at + length], mask[at:at + length])
              for number, (ids, mask) in enumerate(zip(documents, masks)) for at in range(0, max(1, len(ids) - 1), length - 1)]
    pieces = [piece for piece in pieces if len(piece[1]) > 1 and any(piece[2][1:])]
    rows, opened = [], []  # rows of pieces, and their numbers in the order in which they were last added to
    for piece in sorted(pieces, key=lambda piece: -len(piece[1])):
        room = lambda row: length - sum(len(ids) for _, ids, _ in rows[row])
        fitting = [row for row in opened if room(row) >= len(piece[1])]
        chosen = min(reversed(fitting), key=room, default=len(rows))  # the fullest; of those, the one filled last
        if chosen == len(rows): rows.append([])
        else: opened.remove(chosen)
        opened.append(chosen)
        rows[chosen].append(piece)
    arrays = {name: np.zeros((len(rows), length), int) for name in NAMES_OF_ARRAYS}
    for row, held in enumerate(rows):
        at = 0
        for segment, (number, ids, mask) in enumerate(held, 1):
            for place, (i, m) in enumerate(zip(ids, mask)):
                for name, value in zip(NAMES_OF_ARRAYS, (i, place, segment, m*(place > 0), number)): arrays[name][row, at + place] = value
            at += len(ids)
        arrays['position_ids'][row, at:] = range(length - at)
    return arrays


DOCUMENTS = st.lists(st.integers(0, 30), min_size=1, max_size=15)
LEARNABLE = DOCUMENTS.filter(lambda lengths: max(lengths) > 1)


def numbered(lengths: list[int]) -> list[list[int]]:
    "Documents whose tokens tell where they are from: document 7's fourth token is 7003."
    return [[1000*number + at for at in range(length)] for number, length in enumerate(lengths)]


@given(LEARNABLE, st.integers(2, 12), st.randoms(use_true_random=False), st.booleans())
def test_rows_are_those_of_the_plain_algorithm(lengths, length, chance, masked):
    "Bit for bit, whole and in batches, with and without masks, from lists and from disk."
    documents = numbered(lengths)
    masks = [[chance.randint(0, 1) for _ in ids] for ids in documents] if masked else None
    wanted = packed_plainly(documents, length, masks)
    if not len(wanted['input_ids']):
        with pytest.raises(InputError, match='nothing to learn'): pack(documents, length, masks)
        return
    for given_documents in (documents, _laid_out(documents)):
        packed = pack(given_documents, length, masks)
        rows = [chance.randrange(len(packed)) for _ in range(5)]
        batch, part = packed.batch(rows), packed.arrays(rows)
        for name in NAMES_OF_ARRAYS:
            assert (getattr(packed, name) == wanted[name]).all() and (part[name] == wanted[name][rows]).all()
            if name != 'documents': assert batch[name].tolist() == getattr(packed, name)[rows].tolist()
        assert batch['count'] == wanted['loss_mask'][rows].sum()
        assert [getattr(packed, name).dtype for name in NAMES_OF_ARRAYS] == [np.int32, np.int32, np.int16, bool, np.int32]


@given(LEARNABLE, st.integers(2, 12), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_every_token_but_the_first_of_a_document_is_a_target_just_once(lengths, length, share):
    packed = pack(numbered(lengths), length, share=share)
    assert packed.lengths.min() > 1  # no place is lost to a token alone
    assert sorted(packed.input_ids[packed.loss_mask].tolist()) == sorted(i for ids in numbered(lengths) for i in ids[1:])


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


@given(LEARNABLE, st.integers(2, 12), st.sampled_from([0.0, 0.98]))
def test_the_places_of_a_row_fit_together(lengths, length, share):
    packed = pack(numbered(lengths), length, share=share)
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


@pytest.mark.parametrize('share', [0.9, 0.98])
@pytest.mark.parametrize('mean', [180, 270, 340, 400])
def test_texts_are_cut_only_as_far_as_the_share_asks(mean, share):
    "Rows of 512 cannot hold two texts of 340 tokens: whole, they leave a third empty."
    generator = random.Random(0)
    documents = numbered([min(999, max(2, int(generator.lognormvariate(math.log(mean), 0.2)))) for _ in range(1000)])
    whole, packed = pack(documents, 512), pack(documents, 512, share=share)
    useful = lambda packed: packed.lengths.sum()/(512*len(packed))
    assert useful(packed) >= share
    if useful(whole) >= share: assert (packed.input_ids == whole.input_ids).all()
    else:
        assert useful(packed) < share + 0.01 and len(packed) < len(whole)
        assert len(packed.lengths) - len(whole.lengths) < 4*(len(whole) - len(packed))*512/mean  # pieces more than rows saved


def test_nothing_is_cut_where_that_saves_no_row():
    documents = numbered([9, 9, 8, 4])  # 30 tokens need three rows of 12, however they are cut
    assert (pack(documents, 12, share=1.0).input_ids == pack(documents, 12).input_ids).all()


# --- tokens on disk ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('vocabulary', 'size'), [(2**16, 2), (2**16 + 1, 4)])
def test_tokens_come_back_from_disk_in_the_fewest_bytes(tmp_path, vocabulary, size):
    documents = [[0, vocabulary - 1, 5], [], [7], [1, 2]]
    write_tokens(tmp_path, iter(documents), vocabulary)
    tokens = read_tokens(tmp_path)
    assert [tokens.ids[a:b].tolist() for a, b in itertools.pairwise(tokens.starts)] == documents and len(tokens) == 4
    assert (tmp_path/'ids.bin').stat().st_size == 6*size and isinstance(tokens.ids, np.memmap)
    assert json.loads((tmp_path/'tokens.json').read_text()) == dict(documents=4, tokens=6, type=f'uint{8*size}')
    assert pack(tokens, 4).input_ids.tolist() == pack(documents, 4).input_ids.tolist()
    with pytest.raises(OverflowError): write_tokens(tmp_path, [[2**(8*size)]], vocabulary)  # never another token instead


def test_no_tokens_at_all_come_back_too(tmp_path):
    for documents in ([], [[], []]):
        write_tokens(tmp_path, documents, 10)
        tokens = read_tokens(tmp_path)
        assert len(tokens) == len(documents) and len(tokens.ids) == 0
        with pytest.raises(InputError, match='nothing to learn'): pack(tokens, 4)


def test_a_shortened_file_of_tokens_is_refused(tmp_path):
    write_tokens(tmp_path, numbered([5, 6]), 2000)
    (tmp_path/'ids.bin').write_bytes((tmp_path/'ids.bin').read_bytes()[:-2])
    with pytest.raises(InputError, match='do not fit together'): read_tokens(tmp_path)


def test_a_corpus_passes_through_little_memory(tmp_path):
    "What grows with the corpus is the plan of the rows, at most 40 bytes a document; as lists of numbers a text takes 2,400 and more."
    def peak(documents: int) -> int:
        folder = tmp_path/str(documents)
        folder.mkdir()
        tracemalloc.start()
        write_tokens(folder, ([n % 60_000]*(250 + n % 100) for n in range(documents)), 60_000)
        packed = pack(tokens := read_tokens(folder), 512)
        packed.batch([0, 1, len(packed) - 1])
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert sum(a.nbytes for a in (packed.starts, packed.lengths, packed.owners, packed.rows, tokens.starts)) <= 40*documents
        return most
    assert peak(6000) - peak(1000) < 5000*250


def test_tokens_are_made_once_for_a_tokenizer_and_its_source(tmp_path):
    run, source, read = Run(tmp_path/'run'), tmp_path/'source', []
    source.mkdir(); (source/'papers').write_text('1')
    def texts():
        for text in TEXTS: read.append(text); yield text
    def ask(tokenizer): return store_tokens(run, 'tokens/science', texts(), tokenizer, [source])
    tokens = ask(PLAIN)
    assert [tokens.ids[a:b].tolist() for a, b in itertools.pairwise(tokens.starts)] == [encode_document(PLAIN, text) for text in TEXTS]
    other = copy.deepcopy(PLAIN)
    other.chat_template = 'of no matter'
    other(['a', 'bc'], padding='max_length', max_length=9, truncation=True)
    assert ask(other).ids.tolist() == tokens.ids.tolist() and len(read) == len(TEXTS)
    ask(ODD); assert len(read) == 2*len(TEXTS)
    (source/'papers').write_text('2')
    ask(ODD); assert len(read) == 3*len(TEXTS)


@pytest.mark.parametrize('name', sorted(set(TOKENIZERS) - {'slow', 'words'}))
def test_a_saved_tokenizer_reads_as_before(name, tmp_path):
    "So that the second stage of training finds the tokens of the first, whose model it has loaded from disk."
    tokenizer = copy.deepcopy(TOKENIZERS[name])
    if tokenizer.eos_token_id is None: tokenizer.eos_token = '[SEP]'
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert reading_of(again) == reading_of(tokenizer)


def test_another_way_of_reading_is_another_hash():
    def changed(change):
        tokenizer = copy.deepcopy(PLAIN); change(tokenizer); return reading_of(tokenizer)
    hashes = [reading_of(PLAIN), changed(lambda t: t.add_tokens(['<x>'])), changed(lambda t: setattr(t, 'bos_token', '<|im_start|>')),
              changed(lambda t: setattr(t.backend_tokenizer, 'normalizer', normalizers.NFKC()))]
    assert len(set(hashes)) == 4 and reading_of(ByT5Tokenizer()) != reading_of(ByT5Tokenizer(extra_ids=3))


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
