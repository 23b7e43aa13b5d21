"""A student cut out of a larger model, and healed by it: what is cut, what is read, and what the loss is."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from world import conversation, reader, sentence

from scilm_adapt import heal
from scilm_adapt.endpoint import Endpoint
from scilm_adapt.errors import InputError
from scilm_adapt.heal import Recipe, cut, healing_rows, train
from scilm_adapt.models import LanguageModel, parameter_count, same_vocabulary, tiny, weights_hash
from scilm_adapt.papers import Corpus, document
from scilm_adapt.recipe import recipe_of
from scilm_adapt.runs import Run
from scilm_adapt.shrink import check_cut, neuron_influence
from scilm_adapt.tokens import batch_rows, encode_chat, end_of_turn

TEXTS = [dict(id=str(n), title=sentence(n, 3), text=f'{sentence(n + 50, 12)} {sentence(n + 80, 9)}') for n in range(30)]
CHATS = [conversation(n) | dict(kind='general', author='teacher') for n in range(12)]
SETTINGS = dict(layers=2, vocabulary=300, steps=2, batch_size=2, context=48, learning_rate=1e-3)


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    (tmp_path/'corpus').mkdir()
    return Corpus(dict(train=TEXTS[:15], valid=[], test=[]), dict(train=TEXTS[15:], valid=[], test=[]), tmp_path/'corpus')


@pytest.fixture
def whole() -> LanguageModel: return reader(TEXTS, layers=4, size=500)


def halves(lm: LanguageModel, corpus: Corpus, folder: Path, teacher: object = None, **more) -> tuple:
    run = Run(folder/'run')
    return run, *cut(run, lm, teacher, corpus, **SETTINGS | more)


# --- the cut ----------------------------------------------------------------------------------------------------------------------

def test_student_whole_model_and_teacher_are_read_through_one_cut(whole, corpus, tmp_path, capsys):
    teacher = replace(reader(TEXTS, layers=3, size=500, seed=7), name='teacher')
    run, small, beside, taught = halves(whole, corpus, tmp_path, teacher)
    assert small.model.config.num_hidden_layers == 2 and beside.model.config.num_hidden_layers == 4 and taught.name == 'teacher'
    assert all(same_vocabulary(small.tokenizer, other.tokenizer) for other in (beside, taught))
    about = json.loads((run.folder/'models'/'shrunk'/'shrunk.json').read_text())
    assert about['parameters'] == [parameter_count(whole.model), parameter_count(small.model)] and len(about['dropped']) == 2
    kept = torch.tensor(about['kept'])
    assert torch.equal(taught.model.get_input_embeddings().weight, teacher.model.get_input_embeddings().weight[kept])
    assert 'of 4 layers' in capsys.readouterr().out
    before = weights_hash(small.model)
    assert weights_hash(cut(run, whole, teacher, corpus, **SETTINGS)[0].model) == before and 'kept' in capsys.readouterr().out


def test_words_of_conversations_stay_though_no_text_has_them(whole, corpus, tmp_path):
    said = [[dict(role='user', content='Quick jumpy wizards?'), dict(role='assistant', content='Quick jumpy wizards.')]]
    taught = reader([*TEXTS, dict(id='wizards', title='Quick jumpy wizards', text='Quick jumpy wizards. '*40)], layers=4, size=500)
    word, few = taught.tokenizer.tokenize(' wizards')[-1], dict(vocabulary=330)
    assert word.endswith('wizards'), 'one token before the cut'
    without, with_them = (cut(Run(tmp_path/name), taught, None, corpus, some, **SETTINGS | few)[0]
                          for name, some in (('without', ()), ('with', said)))
    assert word not in without.tokenizer.get_vocab() and word in with_them.tokenizer.get_vocab()
    assert len(without.tokenizer) <= 330 >= len(with_them.tokenizer)
    again = cut(Run(tmp_path/'with'), taught, None, corpus, **SETTINGS | few)[0]  # others, or another share, make another cut
    assert word not in again.tokenizer.get_vocab()


@pytest.mark.parametrize('teacher', [tiny(['Other words, other tokens.']), Endpoint('http://localhost:1/v1', 'far'), None],
                         ids=['other tokens', 'a server', 'none'])
def test_a_teacher_with_other_tokens_stays_as_it_is(teacher, whole, corpus, tmp_path):
    assert halves(whole, corpus, tmp_path, teacher)[3] is teacher


def test_layers_alone_leave_the_tokens(whole, corpus, tmp_path):
    teacher = reader(TEXTS, layers=3, size=500, seed=7)
    _, small, beside, taught = halves(whole, corpus, tmp_path, teacher, vocabulary=None)
    assert beside is whole and taught is teacher and small.model.config.num_hidden_layers == 2


def test_neurons_go_by_what_texts_and_conversations_use_of_them(whole, corpus, tmp_path):
    said = [chat['messages'] for chat in CHATS]
    settings = SETTINGS | dict(layers=None, vocabulary=None, neurons=20)
    run = Run(tmp_path/'run')
    small, beside, _ = cut(run, whole, None, corpus, said, **settings, conversation_share=0.8)
    about = json.loads((run.folder/'models'/'shrunk'/'shrunk.json').read_text())
    texts = [document(record) for record in [*corpus.science['train'], *corpus.general['train']]]
    writes = neuron_influence(whole, texts, said, 0.8, context=48)
    assert about['neurons'] == np.sort(np.argsort(-writes, kind='stable')[:, :20]).tolist() and small.model.config.intermediate_size == 20
    assert parameter_count(small.model) == about['parameters'][1] < parameter_count(whole.model) and beside is whole
    healed = train(run, small, beside, corpus, CHATS, **settings)
    assert healed.model.config.intermediate_size == 20 and weights_hash(healed.model) != weights_hash(small.model)
    fewer = cut(run, whole, None, corpus, said, **settings | dict(neurons=10), conversation_share=0.8)[0]
    assert fewer.model.config.intermediate_size == 10, 'another number makes another cut'


def test_with_nothing_to_cut_nothing_is_done(whole, corpus, tmp_path):
    run = Run(tmp_path/'run')
    assert cut(run, whole, None, corpus) == (whole, whole, None) and train(run, whole, whole, corpus) is whole
    assert not (tmp_path/'run'/'models').exists()


# --- what is read -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('share', [0.2, 0.5, 0.8])
@pytest.mark.parametrize('number', [1, 12])  # one has to come again and again
def test_conversations_have_their_share_of_the_tokens_that_are_read(share, number, whole):
    texts, read = [record['text'] for record in TEXTS]*40, 100*2*48
    rows = healing_rows(whole.tokenizer, texts, CHATS[:number], Recipe(conversation_share=share, context=48, steps=100, batch_size=2))
    lengths = [len(encode_chat(whole.tokenizer, chat['messages'])[0]) for chat in CHATS[:number]]
    longest = max(max(map(len, (row.split() for row in texts)))*8, *lengths)
    assert abs(len(rows.tokens.ids) - read) <= 2*longest
    ends = np.asarray(rows.tokens.ids) == end_of_turn(whole.tokenizer)
    assert abs(ends.sum()/2*np.mean(lengths) - share*read) <= 2*longest
    mask = np.concatenate([rows.arrays([n])['loss_mask'][0] for n in range(len(rows))])
    assert mask.mean() > 0.8  # all tokens count but the first of each, the user's too


def test_where_there_is_little_text_there_is_little_of_both(whole):
    rows = healing_rows(whole.tokenizer, [TEXTS[0]['text']], CHATS, Recipe(conversation_share=0.5, context=48, steps=100))
    lengths = [len(encode_chat(whole.tokenizer, chat['messages'])[0]) for chat in CHATS]
    assert len(rows.tokens.ids) <= 2*len(whole.tokenizer(TEXTS[0]['text'])['input_ids']) + 2 + max(lengths)


def test_general_text_alone_and_a_share_without_conversations(whole):
    assert len(healing_rows(whole.tokenizer, ['Heat flows.'], [], Recipe(conversation_share=0.0, context=48))) == 1
    with pytest.raises(InputError, match='conversation_share is 0.5, and there are no conversations'):
        healing_rows(whole.tokenizer, ['Heat flows.'], [], Recipe(context=48))


# --- the stage --------------------------------------------------------------------------------------------------------------------

def test_the_loss_is_the_divergence_from_the_whole_model_at_every_token(whole, corpus, tmp_path, monkeypatch):
    for module in ('training', 'teacher'): monkeypatch.setattr(f'scilm_adapt.{module}.mixed_precision', lambda device=None: 'no')  # 32 bits
    for weight in whole.model.parameters(): weight.data *= 4  # so that what is cut makes a difference
    run, small, beside, _ = halves(whole, corpus, tmp_path)
    healed = train(run, small, beside, corpus, CHATS, **SETTINGS)
    history = json.loads((run.folder/'models'/'healed'/'history.json').read_text())
    rows = healing_rows(small.tokenizer, [*map(document, corpus.general['train'])], CHATS, recipe_of(Recipe, SETTINGS))
    total, count = 0.0, 0
    for row in batch_rows(len(rows), 2, 0, 0):
        batch = rows.batch([row])
        for segment in range(1, int(batch['segments'].max()) + 1):
            at = batch['segments'][0] == segment
            ids, learnt = batch['input_ids'][0][at][None], batch['loss_mask'][0][at][1:]
            with torch.no_grad():
                p, q = (lm.model.double()(ids).logits[0, :-1].log_softmax(-1) for lm in (beside, small))
            total, count = total + ((p.exp()*(p - q)).sum(-1)*learnt).sum().item(), count + int(learnt.sum())
    assert history[0]['loss'] == pytest.approx(total/count, rel=1e-5) and len(history) == 2
    assert weights_hash(healed.model) != weights_hash(small.model.float())


@pytest.mark.parametrize('settings, said', [
    (dict(conversation_share=1.0), 'conversation_share is 1.0'), (dict(temperature=0), 'temperature is 0'), (dict(steps=0), 'steps is 0'),
    (dict(divergence='nothing'), 'nothing')])
def test_bad_settings_are_named(settings, said, whole, corpus, tmp_path):
    with pytest.raises(InputError, match=said): train(Run(tmp_path/'run'), whole, whole, corpus, CHATS, **SETTINGS | settings)


@pytest.mark.parametrize('settings, said', [(dict(layers=9), 'layers is 9'), (dict(layers=0), 'layers is 0'), (dict(vocabulary=5), '5'),
                                            (dict(neurons=10**6), 'neurons is 1000000'), (dict(neurons=0), 'neurons is 0')])
def test_a_cut_that_cannot_be_is_refused(settings, said, whole, corpus, tmp_path):
    with pytest.raises(InputError, match=said): cut(Run(tmp_path/'run'), whole, None, corpus, **SETTINGS | settings)
    assert not (tmp_path/'run'/'models'/'shrunk').exists()


def test_a_run_says_what_cannot_be_cut_before_the_teacher_is_asked(whole):
    for given, said in (dict(layers=9), 'layers is 9'), (dict(tokens=5), '5 tokens are too few'), (dict(neurons=0), 'neurons is 0'):
        with pytest.raises(InputError, match=said): check_cut(whole, **given)
    whole.model.is_quantized = True
    check_cut(whole)  # nothing is to go
    with pytest.raises(InputError, match='is quantised'): check_cut(whole, layers=2)


def test_a_setting_of_another_stage_is_unknown():
    with pytest.raises(InputError, match="no setting 'layer'. Did you mean 'layers'"): recipe_of(heal.Recipe, dict(layer=3))
