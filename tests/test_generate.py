"""Answers: the same alone and together, the same as a plain loop, over where they end, and drawn by address."""
import pytest
import torch
from transformers import GenerationConfig
from world import BABBLE, loud, prompts_of, scripted

from scilm_adapt import decoding
from scilm_adapt.decoding import DECODERS
from scilm_adapt.errors import InputError
from scilm_adapt.generate import (
    Answer,
    chat_prompt,
    continuations,
    halt_ids,
    preceding,
    prompt_with,
    respond,
    respond_with,
    stop_ids,
    stream,
    to_answer,
)
from scilm_adapt.models import LanguageModel, families, tiny
from scilm_adapt.related import brief, open_library, write_index
from scilm_adapt.tokens import DOCUMENT_END, TURN_END, TURN_START, control_tokens, document_ends, encode, pad


@pytest.fixture(scope='module', params=families(1, 1, 1, 1, 1))
def babbler(request):
    return loud(request.param)


@pytest.fixture(scope='module')
def lm():
    return loud()


@torch.no_grad()
def naive(lm, prompt: list[int], new: int) -> list[int]:
    "Greedy decoding that reads everything anew for each token."
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in halt_ids(lm): break
    return ids[len(prompt):]


def saying(tokens: list[str], **sizes) -> tuple[LanguageModel, list[int]]:
    "A model that says these tokens, one a step, and their ids."
    lm = loud(**sizes)
    names = lm.tokenizer.convert_tokens_to_ids
    ids = [i for token in tokens for i in ([names(token)] if token in control_tokens(lm.tokenizer) else lm.tokenizer.encode(token))]
    return scripted(lm, ids), ids


# --- the same answer in every way

def test_greedy_answers_are_those_of_a_plain_loop_alone_and_together(babbler):
    prompts = prompts_of(babbler)
    expected = [naive(babbler, prompt, 10) for prompt in prompts]
    assert len({i for ids in expected for i in ids}) > 5
    for batch_size in (1, 2, 16):
        assert [answer.ids for answer in respond(babbler, prompts, 10, batch_size=batch_size)] == expected
    order = [3, 0, 4, 2, 1]
    assert [answer.ids for answer in respond(babbler, [prompts[n] for n in order], 10)] == [expected[n] for n in order]


def test_streamed_and_batched_answers_agree(babbler):
    for prompt, answer in zip(prompts_of(babbler), respond(babbler, prompts_of(babbler), 10)):
        assert ''.join(stream(babbler, prompt, 10)).strip() == answer.text


def test_a_repetition_penalty_counts_what_was_written_alone_and_together(babbler):
    "Of the answer alone: neither the prompt, nor what fills up a row, nor the answers beside it."
    def penalised(prompt: list[int], new: int) -> list[int]:
        said = []
        while len(said) < new:
            with torch.no_grad(): logits = babbler.model(torch.tensor([prompt + said])).logits[0, -1].double()
            for i in set(said): logits[i] = logits[i]/1.7 if logits[i] > 0 else logits[i]*1.7
            said.append(int(logits.argmax()))
            if said[-1] in halt_ids(babbler): break
        return said
    prompts = prompts_of(babbler)
    expected = [penalised(prompt, 16) for prompt in prompts]
    assert expected != [answer.ids for answer in respond(babbler, prompts, 16)]
    for batch_size in (1, 2, 16):
        assert [answer.ids for answer in respond(babbler, prompts, 16, batch_size=batch_size, repetition_penalty=1.7)] == expected
    for prompt, answer in zip(prompts, respond(babbler, prompts, 16, repetition_penalty=1.7)):
        assert ''.join(stream(babbler, prompt, 16, repetition_penalty=1.7)).strip() == answer.text
    for wrong in (0.5, 0.0, -1.0, float('inf'), float('nan')):
        with pytest.raises(InputError, match='repetition_penalty'): respond(babbler, prompts, 4, repetition_penalty=wrong)


def test_the_last_places_of_the_context_can_be_used():
    for family in families(1, 1, 1, 1, 1):
        lm = loud(family, context=48)
        prompts = [encode(lm.tokenizer, BABBLE[1])[:38], encode(lm.tokenizer, BABBLE[0])[:4]]
        assert [answer.ids for answer in respond(lm, prompts, 10)] == [naive(lm, prompt, 10) for prompt in prompts]


def test_settings_of_the_model_folder_do_not_act_and_are_kept(lm):
    expected = respond(lm, prompts_of(lm), 8)
    foreign = GenerationConfig(repetition_penalty=3.0, no_repeat_ngram_size=1, suppress_tokens=expected[0].ids, max_length=7, num_beams=2)
    kept, lm.model.generation_config = lm.model.generation_config, foreign
    lm.model.train()
    try:
        assert respond(lm, prompts_of(lm), 8) == expected
        assert lm.model.generation_config is foreign and lm.model.training
    finally:
        lm.model.generation_config = kept
        lm.model.eval()


# --- where an answer ends

def test_stops_and_halts_come_from_the_template():
    lm = tiny(BABBLE)
    names = lm.tokenizer.convert_ids_to_tokens
    assert names(stop_ids(lm)) == [DOCUMENT_END, TURN_END] and names(halt_ids(lm)) == [DOCUMENT_END, TURN_START, TURN_END]
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"  # ends with mere text
    assert names(stop_ids(lm)) == names(halt_ids(lm)) == [DOCUMENT_END]
    lm.tokenizer.chat_template = None
    assert names(stop_ids(lm)) == names(halt_ids(lm)) == [DOCUMENT_END]


@pytest.mark.parametrize('end, stopped', [(TURN_END, True), (DOCUMENT_END, True), (TURN_START, False)])
def test_an_answer_ends_with_its_first_halt(end, stopped):
    lm, ids = saying(['Heat', end, 'never said'])
    halt = lm.tokenizer.convert_tokens_to_ids(end)
    answer, = respond(lm, [encode(lm.tokenizer, 'Well?')], 12)
    assert answer == Answer(ids[:ids.index(halt) + 1], 'Heat', stopped)
    lm.model.lm_head.place = 0
    assert ''.join(stream(lm, encode(lm.tokenizer, 'Well?'), 12)) == 'Heat'


def test_an_answer_that_runs_out_of_room_has_not_stopped():
    lm, ids = saying(['Heat flows', TURN_END])
    answer, = respond(lm, [[5]], max_new_tokens=len(ids) - 1)
    assert answer == Answer(ids[:-1], 'Heat flows', False)
    lm.model.lm_head.place = 0
    assert respond(lm, [[5]], max_new_tokens=len(ids))[0].stopped


def test_a_filling_token_after_the_end_is_no_part_of_the_answer(lm):
    end = lm.tokenizer.convert_tokens_to_ids(TURN_END)
    rows = [9, end, lm.tokenizer.pad_token_id, lm.tokenizer.pad_token_id]
    assert to_answer(lm, rows, halt_ids(lm), stop_ids(lm)).ids == [9, end]


def test_other_control_tokens_are_left_out_of_the_text_only():
    lm, _ = saying(['Heat', TURN_END])
    lm.tokenizer.add_tokens(['<|note|>'])
    think = lm.tokenizer.convert_tokens_to_ids('<|note|>')
    assert think not in halt_ids(lm)
    words = encode(lm.tokenizer, 'Heat')
    assert to_answer(lm, [think, *words, think], halt_ids(lm), stop_ids(lm)) == Answer([think, *words, think], 'Heat', False)


# --- chance

def test_samples_are_a_function_of_the_seed_and_touch_no_global_state(lm):
    prompts, state = prompts_of(lm), torch.get_rng_state()
    draw = lambda seed: [answer.ids for answer in respond(lm, prompts, 8, temperature=1.0, top_p=0.9, seed=seed, batch_size=2)]
    first = draw(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert draw(0) == first != draw(1)
    pieces = lambda seed: list(stream(lm, prompts[0], 20, temperature=1.0, seed=seed))
    state, first = torch.get_rng_state(), pieces(0)
    assert torch.equal(torch.get_rng_state(), state) and pieces(0) == first != pieces(1)


def test_batches_draw_differently(lm):
    one, other = respond(lm, prompts_of(lm)[:1]*2, 12, temperature=1.0, batch_size=1)
    assert one.ids != other.ids


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_sampling_leaves_the_cuda_generator_alone():
    lm = loud()
    lm.model.to('cuda')
    state = torch.cuda.get_rng_state()
    assert respond(lm, prompts_of(lm), 8, temperature=1.0) == respond(lm, prompts_of(lm), 8, temperature=1.0)
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert ''.join(stream(lm, prompts_of(lm)[0], 8)).strip() == respond(lm, prompts_of(lm)[:1], 8)[0].text


# --- documents

@pytest.mark.parametrize('decoder', DECODERS)
def test_continuations_are_what_the_decoder_writes_until_the_document_ends(lm, decoder):
    prompts, end = prompts_of(lm), document_ends(lm.tokenizer)[1]
    found = continuations(lm, prompts, decoder, 8, seed=3, batch_size=2)
    assert [answer.ids for answer in continuations(lm, prompts, decoder, 8, seed=3, batch_size=2)] == [answer.ids for answer in found]
    for prompt, answer in zip(prompts, found):
        assert 1 <= len(answer.ids) <= 8 and end not in answer.ids[:-1] and answer.stopped == (answer.ids[-1] == end)
        if decoder != 'sampling':
            alone = DECODERS[decoder](lm.model, **pad([prompt], 0, left=True), max_new_tokens=8, eos_token_id=end)
            assert answer.ids == alone[0, len(prompt):].tolist()
    if decoder == 'sampling': assert [answer.ids for answer in continuations(lm, prompts, decoder, 8, seed=4)] != [a.ids for a in found]


def test_a_document_ends_with_its_own_end_and_not_with_a_turn():
    lm, ids = saying(['Heat', TURN_END, 'flows', DOCUMENT_END, 'never said'])
    answer, = continuations(lm, [encode(lm.tokenizer, 'Well?')], max_new_tokens=20)
    assert answer.ids == ids[:ids.index(document_ends(lm.tokenizer)[1]) + 1] and answer.stopped


@pytest.mark.parametrize('arguments, named', [
    (dict(decoder='beam'), "'beam'; choose one of: greedy, sampling, contrastive search, repetition penalty"),
    (dict(max_new_tokens=0), 'max_new_tokens is 0'), (dict(prompts=[[]]), 'A prompt is empty')])
def test_what_cannot_be_continued_is_named(lm, arguments, named):
    with pytest.raises(InputError, match=named): continuations(lm, **dict(prompts=[[5]]) | arguments)


# --- streaming and prompts

@pytest.mark.parametrize('text', ['жар ≤ 1', '熱は流れる', 'a 🧪 and a 🔬', 'e\u0301 and ﬁ', 'plain'])
def test_a_stream_never_yields_half_a_letter(text):
    lm, ids = saying([text, TURN_END], size=300)
    pieces = list(stream(lm, [5], 60))
    assert ''.join(pieces) == text and not any('\ufffd' in piece or piece == '' for piece in pieces)


def test_a_stream_that_ends_within_a_letter_shows_that():
    lm, ids = saying(['ж', TURN_END], size=300)
    assert len(ids) > 2
    assert ''.join(stream(lm, [5], 1)) == '\ufffd'


def test_a_prompt_opens_the_assistants_turn(lm):
    ids = chat_prompt(lm, [dict(role='user', content='What ends a turn? <|im_end|>')])
    assert lm.tokenizer.decode(ids).endswith('<|im_start|>assistant\n')
    assert ids.count(lm.tokenizer.convert_tokens_to_ids(TURN_END)) == 1  # the quoted one is content


def test_no_prompts_no_answers(lm): assert respond(lm, []) == []


@pytest.mark.parametrize('arguments, named', [
    (dict(prompts=[[5]*500], max_new_tokens=13), r'max_new_tokens = 13.*512.*at most 12'),
    (dict(prompts=[[5]], max_new_tokens=0), 'max_new_tokens is 0'),
    (dict(prompts=[[5], []]), 'A prompt is empty'),
    (dict(prompts=[[5]], temperature=-1.0), 'temperature is -1'),
    (dict(prompts=[[5]], temperature=float('nan')), 'temperature is nan'),
    (dict(prompts=[[5]], top_p=0.0), 'top_p is 0'),
    (dict(prompts=[[5]], top_p=1.5), 'top_p is 1.5')])
def test_what_cannot_work_is_named(lm, monkeypatch, arguments, named):
    monkeypatch.setattr(decoding, 'write', lambda *a: pytest.fail('generation began'))
    with pytest.raises(InputError, match=named): respond(lm, **arguments)
    if len(arguments['prompts']) == 1:
        rest = {name: value for name, value in arguments.items() if name != 'prompts'}
        with pytest.raises(InputError, match=named): next(stream(lm, arguments['prompts'][0], **rest))


# --- with papers in view

SHELF = [dict(id=str(n), title=title, text=text) for n, (title, text) in enumerate([
    ('On heat', 'Heat flows <|im_end|> from warm to cold.'), ('Heat and light', 'Light warms; both at once.'), ('Salt', BABBLE[3])])]


@pytest.fixture(scope='module')
def shelf(tmp_path_factory):
    write_index(folder := tmp_path_factory.mktemp('shelf'), map(brief, SHELF))
    return open_library(folder, SHELF)


@pytest.mark.parametrize('room', [0, 15, 16, 40, 60, 75, 100, 1000])
def test_papers_fill_the_room_there_is_nearest_last(lm, room):
    ids, blank = preceding(lm.tokenizer, SHELF, room), encode(lm.tokenizer, '\n\n')
    whole = [encode(lm.tokenizer, brief(one)) + blank for one in SHELF]
    everything = sum(whole[::-1], [])
    assert ids == everything if room >= len(everything) else len(ids) <= room
    if len(whole[0]) <= room: assert ids[-len(whole[0]):] == whole[0]  # the nearest is whole before any other has a token
    assert not set(ids) & set(control_tokens(lm.tokenizer).values())  # one text, whatever a paper spells


def test_a_prompt_with_papers_fits_and_keeps_the_question(lm):
    messages = [dict(role='user', content='Hi'), dict(role='assistant', content='Yes?'), dict(role='user', content='Why does heat flow?')]
    plain, before, counts = chat_prompt(lm, messages), 0, set()
    for room in range(len(plain) - 3, len(plain) + 320, 9):
        ids, papers = prompt_with(lm, messages, SHELF, room)
        text = lm.tokenizer.decode(ids)
        assert messages[-1]['content'] in text and (len(ids) <= room or ids == plain) and papers == SHELF[:len(papers)]
        assert ids.count(lm.tokenizer.convert_tokens_to_ids(TURN_END)) == 3  # what a paper spells is content
        assert len(papers) >= before
        before = len(papers)
        counts.add(before)
    assert counts == {0, 1, 2, 3} and text.index('Salt') < text.index('Heat and light') < text.index('On heat') < text.index('Why does')


def test_an_answer_is_that_to_its_prompt_and_names_its_papers(lm, shelf):
    questions = ['What is heat?', 'Wherefrom?', 'Does salt dissolve?']
    answers = respond_with(lm, questions, shelf, 2, max_new_tokens=6)
    for question, answer in zip(questions, answers):
        messages = [dict(role='user', content=question)]
        ids, papers = prompt_with(lm, messages, shelf.related([question], 2)[0], lm.context - 6)
        assert answer.papers == papers and answer.ids == respond(lm, [ids], 6)[0].ids
    assert [len(answer.papers) for answer in answers] == [2, 0, 1] and answers[2].papers == [SHELF[2]]
    assert respond_with(lm, [], shelf) == [] and respond(lm, [[5]], 3)[0].papers == ()


def test_an_answer_leans_on_at_least_one_paper(lm, shelf):
    with pytest.raises(InputError, match='related is 0'): respond_with(lm, ['What?'], shelf, 0)
