"""Whatever the fields are called and wherever the records stand: title, text, sections and id come out, or a sentence says why not."""
import gzip
import io
import json
import struct
import sys
import tracemalloc
import zipfile
from xml.sax.saxutils import escape

import pytest
import xlwt
from hypothesis import given, settings
from hypothesis import strategies as st

from scilm_adapt import tables
from scilm_adapt.errors import InputError
from scilm_adapt.papers import _find_fields, _to_record, build, count_table, read, refused
from scilm_adapt.reading import Refused, Row
from scilm_adapt.sources import _format_of, _forms_table, formats, rows
from scilm_adapt.tables import _papers_in, plain_name, text_of, unfolded, usual_fields, value_at

HEAT = 'Heat flows from warm bodies to cold ones, and never back by itself.'
ТЕПЛО = 'Теплота переходит от тёплых тел к холодным и никогда сама собой обратно.'
PAPERS = [dict(id=str(n), title=f'On heat {n}', abstract=f'{HEAT} ({n})') for n in range(1, 4)]


def write(path, data) -> str:
    if not isinstance(data, str | bytes): data = json.dumps(data, ensure_ascii=False)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def told(path) -> list[tuple[str, str, str]]:
    "(id, title, text) of each record; all of them can be read."
    return [(record['id'], record['title'], record['text']) for record in read(str(path), strict=True)]


def record(row: dict, **given: str) -> dict:
    return _to_record(row, _find_fields(row, given))


def parts(sections: list[dict]) -> list[tuple[str, str]]:
    return [(section['title'], section['text']) for section in sections]


WANTED = [(paper['id'], paper['title'], paper['abstract']) for paper in PAPERS]

# --- names ------------------------------------------------------------------------------------------------------------------------

HEADERS = {  # the header, then the names that title, text and id are read from
    'Zotero': ('Key,Item Type,Title,Publication Title,DOI,Abstract Note,Manual Tags', 'Title', 'Abstract Note', 'DOI'),
    'IEEE': ('Document Title,Authors,Publication Title,Abstract,DOI,Author Keywords,IEEE Terms', 'Document Title', 'Abstract', 'DOI'),
    'RefWorks': ('Reference Type,Authors Primary,Title Primary,Periodical Full,Abstract', 'Title Primary', 'Abstract', None),
    'Scopus': ('Authors,Title,Year,Source title,DOI,Link,Abstract,Author Keywords,Index Keywords,EID', 'Title', 'Abstract', 'DOI'),
    'Web of Science, tab form': ('PT\tAU\tTI\tSO\tLA\tDE\tID\tAB\tDI\tUT', 'TI', 'AB', 'UT'),
    'Web of Science, full names': ('Publication Type\tArticle Title\tSource Title\tBook Series Title\tAuthor Keywords\tAbstract\tDOI\t'
                                   'UT (Unique WOS ID)', 'Article Title', 'Abstract', 'DOI'),
    'Web of Science, without DOI': ('Article Title\tSource Title\tAbstract\tUT (Unique WOS ID)', 'Article Title', 'Abstract',
                                    'UT (Unique WOS ID)'),
    'Dimensions': ('Rank,Publication ID,DOI,Title,Abstract,Source title,Anthology title,MeSH terms', 'Title', 'Abstract', 'DOI'),
    'Lens': ('#,Jurisdiction,Lens ID,Title,Source Title,Abstract,Fields of Study', 'Title', 'Abstract', 'Lens ID'),
    'EBSCO': ('Article Title,Author,Journal Title,ISSN,Abstract,DOI', 'Article Title', 'Abstract', 'DOI'),
    'ProQuest': ('Title,Abstract,StoreId,ArticleType,pubtitle,language', 'Title', 'Abstract', 'StoreId'),
    'OpenAlex': ('id,doi,display_name,publication_year,host_venue.display_name,abstract', 'display_name', 'abstract', 'id'),
    'Semantic Scholar': ('paperId,corpusId,title,abstract,venue,journal.name', 'title', 'abstract', 'paperId'),
    'bioRxiv': ('doi,title,authors,category,abstract,published', 'title', 'abstract', 'doi'),
    'ERIC': ('id,title,author,source,description,subject', 'title', 'description', 'id'),
    'CNKI': ('SrcDatabase-来源库,Title-题名,Author-作者,Source-文献来源,Keyword-关键词,Summary-摘要', 'Title-题名', 'Summary-摘要', None),
    'eLibrary': ('Название публикации;Название журнала;Авторы;Аннотация;Ключевые слова;DOI', 'Название публикации', 'Аннотация', 'DOI'),
    'Russian': ('Заголовок;Журнал;Реферат', 'Заголовок', 'Реферат', None),
    'Springer': ('Item Title,Publication Title,Book Series Title,Abstract,Item DOI', 'Item Title', 'Abstract', None),
    'camel case': ('articleTitle,journalTitle,abstractText', 'articleTitle', 'abstractText', None),
    'nested': ('paper.id,paper.title,paper.journal.title,paper.abstract', 'paper.title', 'paper.abstract', 'paper.id'),
    'metadata': ('metadata.title,source.title,metadata.abstract', 'metadata.title', 'metadata.abstract', None),
    'DSpace': ('id,dc.title[en_US],dc.description.abstract[en_US],dc.source.title', 'dc.title[en_US]', 'dc.description.abstract[en_US]',
               'id'),
    'capitals': ('ID,TITLE,ABSTRACT,JOURNAL TITLE', 'TITLE', 'ABSTRACT', 'ID'),
    'punctuation': ('Id:,Title:,Abstract:', 'Title:', 'Abstract:', 'Id:'),
    'language in brackets': ('Title (English),Journal (English),Abstract (English),Abstract Language', 'Title (English)',
                             'Abstract (English)', None),
    'language behind': ('title_en;abstract_en;abstract_url', 'title_en', 'abstract_en', None),
    'language before': ('English title,English abstract', 'English title', 'English abstract', None),
    'Russian language': ('Название (на русском);Аннотация (на русском языке)', 'Название (на русском)',
                         'Аннотация (на русском языке)', None)}


@pytest.mark.parametrize('case', HEADERS)
def test_the_header_of_each_export_is_known(tmp_path, case):
    header, title, text, identity = HEADERS[case]
    delimiter = next(sign for sign in '\t;,' if sign in header)
    names = header.split(delimiter)
    row = [ТЕПЛО if name == text else f'value {n}' for n, name in enumerate(names)]
    path = write(tmp_path/'savedrecs.txt', f'{header}\n' + delimiter.join(f'"{value}"' for value in row) + '\n')
    [got] = told(path)
    assert got[1:] == (row[names.index(title)], ТЕПЛО)
    assert got[0] == row[names.index(identity)] if identity else got[0] not in row


@pytest.mark.parametrize('name', ['Publication Title', 'Source Title', 'Journal Title', 'journalTitle', 'Book Title', 'Abstract Language',
                                  'Abstract URL', 'abstract_url', 'has_abstract', 'Title Abbreviation', 'journal.title', 'source.title',
                                  'references.title', 'Название журнала', 'Название источника', 'title_length', 'textbook', 'subtitle',
                                  'Keywords', 'contents', 'authors.name', 'Conference Title', 'Series Title', '', '.', 'title id'])
def test_what_only_looks_like_a_title_or_abstract_is_none(name):
    usual = usual_fields((name,))
    assert not usual['title'] and not usual['text']


@pytest.mark.parametrize(('row', 'wanted'), [
    (dict(title_en='A', title_ru='Б', abstract_en='C', abstract_ru='Д'), ('A', 'C')),
    (dict(title_ru='Б', title_en='A', abstract_en='', abstract_ru='Д'), ('Б', 'Д')),
    (dict(title_en='A', title_ru='Б', abstract_en='C', abstract_ru='Д', lang='ru'), ('Б', 'Д')),
    (dict(title='A', abstract='', abstract_ru='Д', title_ru='Б'), ('Б', 'Д')),
    (dict(title='A', abstract_ru='Д'), ('A', 'Д')), (dict(title='A', title_ru='Б', abstract='C', abstract_ru='Д'), ('A', 'C')),
    (dict(title=dict(en='A', ru='Б'), abstract=dict(ru='Д')), ('Б', 'Д')),
    (dict(title=dict(ru='Б', en='A'), abstract=dict(ru='Д', en='C'), language='en'), ('A', 'C')),
    (dict(title=dict(en='A'), abstract={'en-US': 'C'}), ('A', 'C'))], ids=str)
def test_title_and_text_are_read_in_one_language(row, wanted):
    assert (record(row)['title'], record(row)['text']) == wanted


@given(st.sampled_from(['title', 'abstract', 'keywords', 'doi']),
       st.sampled_from(['{}', ' {} ', '{}:', '"{}"', 'paper.{}', 'dc:{}', '{}_en', '{} (RU)']),
       st.sampled_from([str.lower, str.upper, str.title]))
def test_a_name_is_known_in_any_writing(name, frame, case):
    assert plain_name(frame.format(case(name)))[0] == name


# --- tables of text ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('before', [
    '', 'sep=,\n', '"sep=,"\n', '"About the data: Exported on Feb 03, 2022. Criteria: \'heat\'."\n', 'My papers\n\nof 2020, and of 2021\n',
    '\n\n', 'Report,,\n', '\ufeff', '\ufeffsep=,\r\n', 'Export: "heat"\n', 'Поиск: теплота, холод\n',
    'Search: title, and abstract\n', 'Title,My export\nDate,2020\n'], ids=repr)
@pytest.mark.parametrize('header', ['id,title,abstract', '"Id","Title","Abstract"',
                                    'ID,Document Title,Abstract Note', 'id,Название,Аннотация'])
def test_words_before_the_header_are_no_records(tmp_path, before, header):
    lines = ''.join(f'{paper["id"]},{paper["title"]},"{paper["abstract"]}"\n' for paper in PAPERS)
    for name in ('a.csv', 'a.txt'):
        path = write(tmp_path/name, f'{before}{header}\n{lines}')
        assert told(path) == WANTED
        assert next(rows(path)).line == f'{before}{header}\n'.count('\n') + 1


@pytest.mark.parametrize('delimiter', list(',;\t|'))
def test_the_delimiter_is_found_behind_words_with_other_delimiters(tmp_path, delimiter):
    lines = [delimiter.join(['id', 'title', 'abstract', 'score']),
             *(delimiter.join([p['id'], p['title'], f'"{p["abstract"]}"', '"0,5"']) for p in PAPERS)]
    assert told(write(tmp_path/'a.csv', 'Heat, cold; and | more, of, that\n' + '\n'.join(lines))) == WANTED


def test_columns_without_a_name_and_names_that_stand_twice(tmp_path):
    path = write(tmp_path/'a.csv', ',title,abstract,title,,keywords,keywords,\n'
                                   f'0,On heat,{ТЕПЛО},,x,,ice,\n1,,{ТЕПЛО},On cold,,a,b,\n')
    first, second = read(path)
    assert (first['title'], first['text'], first['keywords']) == ('On heat', ТЕПЛО, ['ice'])
    assert (second['title'], second['keywords']) == ('On cold', ['a'])
    fields = next(rows(path)).fields
    assert fields['column 1'] == '0' and fields['column 5'] == 'x' and 'keywords (2)' in fields
    path = write(tmp_path/'b.csv', 'id,abstract,abstract\n1,heat,heat\n2,heat,cold\n3,,cold\n')
    found = list(rows(path))
    assert [entry.line for entry in found if isinstance(entry, Row)] == [2, 4] and "called 'abstract', and differ" in found[1].reason


def test_a_row_without_its_empty_end_is_one_and_a_piece_of_text_is_none(tmp_path):
    path = write(tmp_path/'a.csv', f'id,title,abstract,year,url\n1,On heat,{ТЕПЛО}\n2,On cold,{ТЕПЛО},1822\n'
                                   f'3,On ice,{ТЕПЛО},1822,,,\n4,On tea,{ТЕПЛО}')
    assert [title for _, title, _ in told(path)] == ['On heat', 'On cold', 'On ice', 'On tea']
    path = write(tmp_path/'b.csv', 'id,title,abstract,year\n1,On heat,Heat flows\nand flows,1822\n'
                                   '2,On cold,Cold does not.,1822\n3,no text\n')
    found = list(rows(path))
    assert [entry.line for entry in found if isinstance(entry, Row)] == [4]
    assert 'shorter than the header' in found[0].reason and '2 fields where the header has 4' in found[1].reason


def test_quotes_in_tab_delimited_files_of_databases_are_text(tmp_path):
    header, end = 'PT\tAU\tTI\tSO\tAB\tUT\t\n', '\t\n'
    path = write(tmp_path/'savedrecs.txt', f'{header}J\tA\t"Smart" films\tX\t"Heat" flows.\tWOS:1{end}'
                                           f'J\tA\t"Open\tX\t5" pipes.\tWOS:2{end}')
    assert told(path) == [('WOS:1', '"Smart" films', '"Heat" flows.'), ('WOS:2', '"Open', '5" pipes.')]


def test_prose_with_commas_is_no_table():
    for text in ('Title, abstract and more\nfollow here.', 'We read the title, the abstract, and the text.\n',
                 'On heat\n\nTitle, abstract\n',
                 'Abstract\n\nHeat flows, and cold, too.\n', 'Keywords: heat, text, title\n\nHeat flows.\n'):
        assert _format_of(text.encode(), 'a.txt') == 'text', text


# --- what fields hold -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('value', 'wanted'), [
    ({'We': [0, 14], 'measure': [1], 'gap': [20], 'none': None}, 'We measure We gap'),
    ({'Теплота': [0], 'переходит.': [1]}, 'Теплота переходит.'),
    (dict(IndexLength=2, InvertedIndex=dict(Heat=[0], flows=[1])), 'Heat flows'),
    (['Heat flows.', 'Cold does not.'], 'Heat flows.\n\nCold does not.'), ([' Heat '], 'Heat'), ([], ''), ({}, ''), (None, ''),
    ([None, ''], ''),
    ([dict(text='A.', section='Abstract'), dict(text='B.', section='Abstract')], 'A.\n\nB.'), (dict(section='Abstract', text='A.'), 'A.'),
    (dict(value='A.'), 'A.'), ({'#text': 'A.', '@lang': 'en'}, 'A.'), ({'$': 'A.'}, 'A.'),
    ({'h1': 'Abstract', 'p': ['A.', 'B.']}, 'A.\n\nB.'),
    ([{'@Label': 'AIM', '#text': 'A.'}, {'@Label': 'RESULTS', '#text': 'B.'}], 'AIM: A.\n\nRESULTS: B.'),
    ([dict(label='Abstract', text='A.')], 'A.'), (dict(AbstractText=[{'#text': 'A.'}]), 'A.'),
    (dict(background='A.', results='B.'), 'Background: A.\n\nResults: B.'),
    ([dict(value='A.', source='arXiv'), dict(value='A!', source='Publisher')], 'A.'),
    ([dict(descriptionType='Methods', description='M'), dict(descriptionType='Abstract', description='A.')], 'A.'),
    ([dict(descriptionType='Methods', description='M')], ''),
    ([dict(language='en', text='A.'), dict(language='ru', text='Б.')], 'A.')], ids=str)
def test_text_is_found_in_every_form_that_a_field_has(value, wanted):
    assert text_of(value) == wanted


@pytest.mark.parametrize(('value', 'reason'), [
    (3, 'a number'), (True, 'a number'), (float('nan'), 'a number'), (['a', 3], 'a number'), (b'a', 'a bytes'), (dict(value=3), 'a number'),
    (dict(url='a'), "an object of 'url'"), ([dict(url='a')], "an object of 'url'"),
    (dict(en='a', url='b'), "an object of 'en', 'url'")], ids=str)
def test_what_is_no_text_is_named(value, reason):
    with pytest.raises(ValueError, match=reason): text_of(value)
    with pytest.raises(ValueError, match=f"field 'abstract' holds {reason}.*, not text"): record(dict(title='T', abstract=value))


words = st.lists(st.text(st.characters(codec='utf-8', exclude_categories=['Z', 'C']), min_size=1), min_size=1, max_size=40)


@given(words)
def test_an_inverted_index_gives_back_the_text(taken):
    index = {}
    for place, word in enumerate(taken): index.setdefault(word, []).append(place)
    for value in (index, json.dumps(index), str(index)): assert record(dict(id=1, abstract_inverted_index=value))['text'] == ' '.join(taken)


def test_an_index_that_is_null_is_an_empty_text():
    for value in (None, {}, ''):
        with pytest.raises(ValueError, match="'abstract_inverted_index' is empty"): record(dict(title='T', abstract_inverted_index=value))
    assert record(dict(abstract_inverted_index=None, abstract='A.'))['text'] == 'A.'
    assert record(dict(abstract_inverted_index={'A.': [0]}, abstract=None))['text'] == 'A.'
    with pytest.raises(ValueError, match='inverted index'): record(dict(abstract_inverted_index='heat'))


# --- records that are not flat ----------------------------------------------------------------------------------------------------

BODY = [('', 'Lead.'), ('Method', 'We heat.\n\nWe wait.'), ('Result', 'It flows.')]
PASSAGES = [dict(section=title, text=text, cite_spans=[]) for title, text in
            [('', 'Lead.'), ('Method', 'We heat.'), ('Method', 'We wait.'), ('Result', 'It flows.')]]
WHOLE = 'On heat\nA.\nB.\nLead.\nMethod\nWe heat.\nWe wait.\nResult\nIt flows.'


def place(*texts: str) -> list[dict]:
    return [dict(start=WHOLE.index(text), end=WHOLE.index(text) + len(text), attributes=None) for text in texts]


MARKS = dict(title=place('On heat'), abstract=place('A.', 'B.'), sectionheader=place('Method', 'Result'),
             paragraph=place('A.', 'B.', 'Lead.', 'We heat.', 'We wait.', 'It flows.'), bibref=None)
NESTED = {
    'CORD-19': dict(paper_id='7', metadata=dict(title='On heat', authors=[]), abstract=[
        dict(text='A.', section='Abstract'), dict(text='B.')], body_text=PASSAGES,
                    bib_entries=dict(BIBREF0=dict(title='Another', text='x'))),
    'S2ORC': dict(paper_id='7', title='On heat', abstract='A.\n\nB.', journal=dict(title='J'),
                  pdf_parse=dict(body_text=PASSAGES, abstract=[])),
    'S2ORC, abstract in the parse': dict(paper_id=7, title='On heat', abstract=None, pdf_parse=dict(
        abstract=[dict(text='A.', section='Abstract'), dict(text='B.')], body_text=PASSAGES)),
    'S2ORC with marks': dict(corpusid=7, content=dict(text=WHOLE, annotations={n: mark and json.dumps(mark) for n, mark in MARKS.items()})),
    'marks that are no text': dict(corpusid=7, title='On heat', body=dict(text=WHOLE, annotations=MARKS | dict(title=None))),
    'unarXive': dict(paper_id='7', metadata=dict(title='On heat', abstract='other'), abstract=dict(section='Abstract', text='A.\n\nB.'),
                     body_text=PASSAGES, bib_entries={}),
    'sections in sections': dict(id=7, title='On heat', abstract=['A.', 'B.'], sections=[
        dict(heading='', paragraphs=['Lead.']), dict(heading='Method', paragraphs=['We heat.', 'We wait.'], subsections=[
            dict(heading='Result', paragraphs=['It flows.'])])]),
    'sections by heading': dict(id=7, article_title='On heat', abstractText='A.\n\nB.', sections={
        '': 'Lead.', 'Method': ['We heat.', 'We wait.'], 'Result': 'It flows.'}),
    'a body in parts': dict(id=7, title='On heat', abstract='A.\n\nB.', body=PASSAGES),
    'BioC': dict(id='7', infons={}, passages=[dict(infons=infons, text=text) for infons, text in [
        (dict(section_type='TITLE', type='front'), 'On heat'), (dict(section_type='ABSTRACT', type='abstract'), 'A.'),
        (dict(section_type='ABSTRACT', type='abstract'), 'B.'),
        (dict(section_type='INTRO', type='paragraph'), 'Lead.'), (dict(section_type='METHODS', type='title_1'), 'Method'),
        (dict(section_type='METHODS', type='paragraph'), 'We heat.'), (dict(section_type='METHODS', type='paragraph'), 'We wait.'),
        (dict(section_type='FIG', type='fig_caption'), 'A kettle'), (dict(section_type='RESULTS', type='title_1'), 'Result'),
        (dict(section_type='RESULTS', type='paragraph'), 'It flows.'), (dict(section_type='REF', type='title'), 'References'),
        (dict(section_type='REF', type='ref'), 'Somebody')]])}


@pytest.mark.parametrize('case', NESTED)
def test_a_whole_paper_keeps_title_abstract_sections_and_id(tmp_path, case):
    row = NESTED[case]
    for name, data in (('a.json', json.dumps(row, indent=1)), ('b.json', row), ('c.jsonl', json.dumps(row) + '\n' + json.dumps(row)),
                       ('d.json', [row]), ('e.json', dict(meta=dict(count=1), results=[row]))):
        for found in read(write(tmp_path/name, data), strict=True):
            assert (found['id'], found['title'], found['text']) == ('7', 'On heat', 'A.\n\nB.')
            assert parts(found['sections']) == BODY
            assert 'other' not in json.dumps(found)


def test_headings_within_an_abstract_in_passages_stay():
    passages = [dict(infons=dict(type=kind, section_type='ABSTRACT'), text=text) for kind, text in [
        ('abstract_title_1', 'Abstract'), ('abstract', 'A.'), ('abstract_title_1', 'Results'), ('abstract', 'B.')]]
    assert record(dict(id=1, passages=passages))['text'] == 'A.\n\nResults: B.'


@pytest.mark.parametrize('case', NESTED)
def test_unfolding_twice_changes_nothing(case):
    assert unfolded(unfolded(NESTED[case])) == unfolded(NESTED[case])


@pytest.mark.parametrize('row', [
    {'DOI': '1', 'title': ['On heat', 'О теплоте'], 'abstract': 'A.'}, {'id': '1', 'attributes': dict(titles=[
        dict(title='On heat'), dict(title='About', titleType='Subtitle')],
        descriptions=[dict(description='A.', descriptionType='Abstract')])},
    {'id': 1, 'bibjson': dict(title='On heat', abstract='A.', journal=dict(title='J'))},
    {'id': 1, 'metadata': dict(title='On heat', description='A.')},
    {'dc:identifier': '1', 'dc:title': 'On heat', 'dc:description': 'A.', 'prism:publicationName': 'J'},
    {'_id': '1', '_source': dict( title='On heat', abstract='A.')}, {'paper': dict(id=1, title='On heat', abstract='A.')},
    {'citingPaper': dict(paperId='1', title='On heat', abstract='A.'), 'contexts': []},
    {'node': dict(id=1, title='On heat', abstract='A.')},
    {'id': '1', 'metadata': dict(titles=[dict(title='On heat')], abstracts=[
        dict(value='A.', source='arXiv'), dict(value='A', source='S')])},
    {'MedlineCitation': {'PMID': '1', 'Article': {'ArticleTitle': 'On heat', 'Journal': {'Title': 'J'},
                                                'Abstract': {'AbstractText': 'A.'}}}},
    {'status': 'ok', 'message': dict(DOI='1', title=['On heat'], abstract='A.')},
    {'id': 1, 'title': {'#text': 'On heat'}, 'abstractText': 'A.'}], ids=str)
def test_fields_that_lie_deeper_are_found(row):
    found = record(row)
    assert (found['title'], found['text'], found['id']) == ('On heat', 'A.', '1')


def test_what_belongs_to_a_journal_or_reference_is_not_taken():
    for row in (dict(journal=dict(title='J', abstract='A.')), dict(primary_location=dict(source=dict(display_name='J')), id=1),
                dict(references=[dict(title='T', abstract='A.')]), dict(authors=[dict(name='N')], venue=dict(text='x'))):
        with pytest.raises(ValueError, match=f"no field with text among '{next(iter(row))}'"): record(row)
    assert record(dict(journal=dict(title='J'), abstract='A.'))['title'] == ''


# --- pages ------------------------------------------------------------------------------------------------------------------------

PAGES = {
    'a wrapper': lambda papers: dict(meta=dict(count=3, list=[1]), results=papers, group_by=[]), 'Crossref': lambda papers: dict(
        status='ok', message=dict(facets={}, items=papers, query=dict(terms=None))),
    'Semantic Scholar': lambda papers: dict(total=3, offset=0, data=papers),
    'Europe PMC': lambda papers: dict(hitCount=3, resultList=dict(result=papers)), 'Elsevier': lambda papers: {'search-results': {
        'opensearch:totalResults': '3', 'link': [{'@ref': 'self', '@href': 'x'}], 'entry': papers}},
    'bioRxiv': lambda papers: dict(messages=[dict(status='ok', count=3)], collection=papers), 'Zenodo': lambda papers: dict(
        aggregations=dict(type=dict(buckets=[dict(key='a', doc_count=1)])),
        hits=dict(hits=[dict(id=p['id'], metadata=p) for p in papers], total=3)),
    'any name': lambda papers: dict(about='x', kopf=[dict(a=1)], статьи=papers), 'Solr': lambda papers: dict(
        responseHeader=dict(params=dict(q='heat')), response=dict(numFound=3, docs=papers)),
    'several lists': lambda papers: dict(train=papers[:1], test=papers[1:]), 'one in one': lambda papers: dict(data=dict(papers=dict(
        edges=[dict(cursor=n, node=p) for n, p in enumerate(papers)]))), 'JSON Feed': lambda papers: dict(
        version='1', title='My feed', description='What it is about', items=papers), 'by id': lambda papers: {p['id']: p for p in papers},
    'not first': lambda papers: dict(authors=[dict(name='N', id=1)], facets=[dict(id=1, title='x')], results=papers)}


@pytest.mark.parametrize('case', PAGES)
def test_the_records_of_a_page_are_found_wherever_they_stand(tmp_path, case):
    page = PAGES[case](PAPERS)
    text = json.dumps(page, ensure_ascii=False)
    for name, data in (('a.json', text), ('b', text), ('c.json', json.dumps(page, indent=2)), ('d.jsonl', f'{text}\n'),
                       ('e.json', text.replace(', {', ',\n{').replace('[{', '[\n{')), ('f.json', f'[{text}]')):
        assert told(write(tmp_path/name, data)) == WANTED, name
    assert told(write(tmp_path/'g.jsonl', f'{text}\n{text}\n')) == WANTED*2


@pytest.mark.parametrize('case', PAGES)
@pytest.mark.parametrize('size', [200, 20_000])
def test_a_page_larger_than_a_look_is_read_as_a_stream_and_one_cut_off_gives_what_it_had(tmp_path, case, size):
    papers = [dict(id=str(n), title=f'On heat {n}', abstract=f'{n} ' + 'heat '*(size//5)) for n in range(900_000//size)]
    text = json.dumps(PAGES[case](papers))
    path = write(tmp_path/'a.json', text)
    assert [identity for identity, _, _ in told(path)] == [paper['id'] for paper in papers]
    found = list(rows(write(tmp_path/'a.json', text[:len(text)*2//3])))
    assert all(isinstance(entry, Row) for entry in found[:-1]) and isinstance(found[-1], Refused)
    assert f'cut off after record {len(found) - 1}' in found[-1].reason and len(found) > len(papers)*0.6


@pytest.mark.parametrize('case', ['a wrapper', 'Crossref', 'Elsevier', 'not first', 'by id', 'any name'])
def test_a_large_page_passes_through_a_little_memory(tmp_path, case):
    papers = [dict(id=str(n), title='О теплоте', abstract=ТЕПЛО*200) for n in range(600)]
    path = write(tmp_path/'a.json', PAGES[case](papers))
    del papers
    next(rows(path))
    tracemalloc.start()
    assert sum(isinstance(entry, Row) for entry in rows(path)) == 600 and tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()


def test_a_broken_record_in_a_page_costs_itself(tmp_path):
    good, twice = json.dumps(PAPERS[0]), '{"id": 1, "id": 2, "title": "a"}'
    found = list(rows(write(tmp_path/'a.json', f'{{"meta": 1, "results": [{good}, {twice}, null, {good}, 7]}}')))
    assert [type(entry) for entry in found] == [Row, Refused, Refused, Row, Refused]
    assert "'id' stands twice" in found[1].reason and 'a NoneType where an object' in found[2].reason
    found = list(rows(write(tmp_path/'b.json', f'{{"meta": 1, "results": [{good}, {{"id" 2}}, {good}]}}' + ' '*100)))
    assert [type(entry) for entry in found] == [Row, Refused] and 'what follows was not read' in found[1].reason


@pytest.mark.parametrize('more', [
    dict(references=[dict(title='A', abstract='B', id=1)]), dict(sections=[dict(title='A', text='B')]),
    dict(related=[dict(title='A', abstract='B')]),
    dict(results=[dict(label='Fig. 1')]), dict(figures=[dict(id=1, text='x', title='y')]),
    dict(authors=[dict(name='N')]*3, data=[dict(file='x')]),
    dict(related=dict(a=dict(title='A', abstract='B'), b=dict(title='A', abstract='B')))], ids=str)
def test_a_single_paper_stays_one_record(tmp_path, more):
    for row in (PAPERS[0] | more, more | PAPERS[0], more | PAPERS[0] | dict(body_text=PASSAGES*2000)):
        for data in (row, json.dumps(row, indent=1)): assert told(write(tmp_path/'a.json', data)) == WANTED[:1]
        assert _papers_in(row) == [row]


@pytest.mark.parametrize('row', [
    dict(question='Why?', documents=[dict(id=1, title='T', text='A.')]),
    dict(question='Why?', papers=[dict(id=1, title='T', abstract='A.')]),
    dict(prompt='Why?', responses=[dict(id=1, text='A.'), dict(id=2, text='B.')]), dict(messages=[dict(id=1, role='user', content='A.')]),
    dict(id=1, query='Why?', results=[dict(id=1, title='T', text='A.')])], ids=str)
def test_a_question_of_an_evaluation_is_no_page(tmp_path, row):
    for name, data in (('a.jsonl', (json.dumps(row) + '\n')*2), ('b.json', json.dumps([row, row], indent=1))):
        assert next(rows(write(tmp_path/name, data))).fields == row


def test_a_page_without_papers_names_what_is_there(tmp_path):
    path = write(tmp_path/'a.json', dict(status='error', message='no such query', code=3))
    with pytest.raises(InputError, match="no field with text among 'status', 'message', 'code'; name it with text_field"): read(path)
    path = write(tmp_path/'b.json', dict(results=[dict(a=1, b='x')]))
    with pytest.raises(InputError, match="no field with text among 'a', 'b'"): read(path)


leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(['title', 'abstract', 'text', 'results', 'data', 'items', 'content', 'body', 'metadata', 'passages', 'sections', 'a',
                     'en', 'x']),
    inner, max_size=4), max_leaves=12)


@given(st.dictionaries(st.sampled_from(['title', 'abstract', 'results', 'data', 'content', 'passages', 'metadata', 'b']), trees,
                       max_size=4))
@settings(max_examples=150)
def test_no_json_ends_in_another_error(tmp_path_factory, value):
    path = write(tmp_path_factory.getbasetemp()/'tree.json', value)
    for entry in rows(path):
        assert isinstance(entry, Row | Refused)
        assert isinstance(refused(entry, {}), dict | Refused)


# --- fields that the user names ---------------------------------------------------------------------------------------------------

def test_a_field_may_be_named_along_its_path(tmp_path):
    row = dict(journal=dict(title='J'), parts=[dict(t='A.'), dict(t='B.')], heads=['one', 'two'], main=dict(deep=dict(er='C.')))
    path = write(tmp_path/'a.jsonl', row)
    named = lambda title, text: [(r['title'], r['text']) for r in read(path, title_field=title, text_field=text)]
    assert named('journal.title', 'main.deep.er') == [('J', 'C.')]
    assert named('heads.1', 'parts.t') == [('two', 'A.\n\nB.')] and named('heads', 'parts.0.t') == [('one', 'A.')]
    for wrong in ('journal.name', 'journal.title.more', 'parts.7.t', 'parts.x', 'nothing', 'main..er', '.'):
        with pytest.raises(InputError, match=f"a.jsonl:1: there is no field '{wrong}' among 'journal', 'parts'") as caught:
            named('heads.0', wrong)
        assert '\n' not in str(caught.value)
    assert value_at({'a.b': 1}, 'a.b') == 1
    with pytest.raises(InputError, match="'main' holds an object of 'deep', not text"): named('heads.0', 'main')


# --- titles that are empty --------------------------------------------------------------------------------------------------------

def test_a_source_without_any_title_says_so(tmp_path, capsys):
    texts = [f'{HEAT} This was measured {n} times in the winter of the year {1800 + n}, in a house of {n + 3} rooms with a kettle.'
             for n in range(40)]
    bare = write(tmp_path/'bare.csv', 'id,name,abstract\n' + ''.join(f'{n},x,"{text}"\n' for n, text in enumerate(texts)))
    full = write(tmp_path/'full.csv', f'id,title,abstract\n1,,{ТЕПЛО}\n2,О теплоте,{ТЕПЛО}\n')
    report = build(tmp_path/'out', [bare, full])
    said = f'no record of {bare} has a title; name the field with title_field'
    assert report['untitled'] == [bare] and count_table(report).endswith(said)
    assert json.loads((tmp_path/'out'/'report.json').read_text())['untitled'] == [bare]
    read(bare)
    assert said in capsys.readouterr().out
    read(full)
    assert 'has a title' not in capsys.readouterr().out


# --- spreadsheets -----------------------------------------------------------------------------------------------------------------

def sheet(*lines: str) -> str:
    cells = lambda line: ''.join(f'<c t="inlineStr"><is><t>{cell}</t></is></c>' if not cell.isdigit() else f'<c><v>{cell}</v></c>'
                                 for cell in line.split('|'))
    return ('<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>' +
            ''.join(f'<row>{cells(line)}</row>' for line in lines) + '</sheetData></worksheet>')


def workbook(*sheets: str) -> bytes:
    "An .xlsx file: the smallest one, with other sheets."
    memory = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(formats['spreadsheet'].forms[0].example)) as old, zipfile.ZipFile(memory, 'w') as new:
        for name in old.namelist():
            data = old.read(name).decode()
            for n in range(2, len(sheets) + 1):
                data = data.replace('</sheets>', f'<sheet name="S{n}" sheetId="{n}" r:id="r{n}"/></sheets>')
                if name.endswith('workbook.xml.rels'): data = data.replace('</Rel', f'<Relationship Id="r{n}" Type="http://schemas.'
                    f'openxmlformats.org/officeDocument/2006/relationships/worksheet" Target="worksheets/sheet{n}.xml"/></Rel')
            if 'sheet1' not in name: new.writestr(name, data)
        for n, data in enumerate(sheets, 1): new.writestr(f'xl/worksheets/sheet{n}.xml', data)
    return memory.getvalue()


LINES = ['id|title|abstract', *('|'.join(paper.values()) for paper in PAPERS)]


def test_spreadsheets_are_read_by_their_header_from_every_sheet_that_has_one(tmp_path):
    for name in ('a.xlsx', 'a', 'a.csv', 'a.zip'): assert told(write(tmp_path/name, workbook(sheet(*LINES)))) == WANTED
    data = workbook(sheet('About this file', '7'), sheet('Exported on Monday', '', *LINES[:2]), sheet(LINES[0], *LINES[2:]))
    assert told(write(tmp_path/'b.xlsx', data)) == WANTED
    assert [entry.line for entry in rows(str(tmp_path/'b.xlsx'))] == [4, 2, 3]
    with zipfile.ZipFile(tmp_path/'c.zip', 'w') as archive: archive.writestr('deep/b.xlsx', data)
    assert told(tmp_path/'c.zip') == WANTED
    assert told(write(tmp_path/'d.xlsx.gz', gzip.compress(data))) == WANTED


def test_a_spreadsheet_without_usual_names_says_which_are_there(tmp_path):
    path = write(tmp_path/'a.xlsx', workbook(sheet('kopf|rumpf', 'On heat|Heat flows.', '|')))
    with pytest.raises(InputError, match="a.xlsx:2: no field with text among 'kopf', 'rumpf'"): read(path)
    assert [r['text'] for r in read(path, title_field='kopf', text_field='rumpf')] == ['Heat flows.']
    [bad] = rows(write(tmp_path/'b.xlsx', workbook(sheet('title|text', 'On heat|7'))))
    with pytest.raises(InputError, match="field 'text' holds a number"): read(str(tmp_path/'b.xlsx'))
    for data in (workbook(sheet()), workbook(sheet('title|text'))): assert list(rows(write(tmp_path/'c.xlsx', data))) == []


def test_a_broken_spreadsheet_and_a_missing_extra_are_refused_with_the_way_out(tmp_path, monkeypatch):
    data = workbook(sheet(*LINES))
    [bad] = rows(write(tmp_path/'a.xlsx', data.replace(b'<sheetData>', b'<sheetDada>')))
    [cut] = rows(write(tmp_path/'b.xlsx', data[:-100]))
    assert all(isinstance(entry, Refused) for entry in (bad, cut)) and 'get it again' in cut.reason
    monkeypatch.setitem(sys.modules, 'python_calamine', None)
    [missing] = rows(write(tmp_path/'c.xlsx', data))
    assert "pip install 'scilm_adapt[spreadsheets]'" in missing.reason and 'CSV' in missing.reason


@pytest.mark.parametrize(('kind', 'wanted'), [('word/document.xml', 'docx'), ('ppt/presentation.xml', 'docx')])
def test_other_office_documents_are_refused_by_name(tmp_path, kind, wanted):
    with zipfile.ZipFile(tmp_path/'a.docx', 'w') as archive:
        for name in ('[Content_Types].xml', kind): archive.writestr(name, '<x/>')
    [bad] = rows(str(tmp_path/'a.docx'))
    assert 'an office document; save it as plain text' in bad.reason


def test_a_table_called_a_spreadsheet_is_read_as_what_it_is(tmp_path):
    for name in ('a.xls', 'a.xlsx'): assert told(write(tmp_path/name, '\n'.join('\t'.join(line.split('|')) for line in LINES))) == WANTED


def test_an_open_document_and_an_old_spreadsheet_are_told(tmp_path):
    assert _format_of(b'PK\x03\x04' + b'\0'*26 + b'mimetypeapplication/vnd.oasis.opendocument.spreadsheetPK', 'a') == 'spreadsheet'
    assert _format_of(b'PK\x03\x04' + b'\0'*26 + b'mimetypeapplication/vnd.oasis.opendocument.textPK', 'a.odt') == 'zip'
    old = b'\xd0\xcf\x11\xe0' + b'\0'*100
    assert _format_of(old, 'a.xls') == 'spreadsheet' and _format_of(old, 'a.doc') == 'docx'
    assert _format_of(old + 'Workbook'.encode('utf-16-le') + b'\0', 'a') == 'spreadsheet'


SHEETS = {'About': [['These tables were exported on Monday'], ['by', 'nobody']],
          'English': [['All of our papers about heat'], [], ['No', 'Title', 'Abstract', 'Year'], [1, 'On heat', HEAT, 2021],
                      ['', '', '', ''], [2, 'On ice & <water>', 'Ice melts.\nIt is cold.', 2022.5]],
          'Русский': [['Статьи о тепле'], ['Название', 'Аннотация'], ['О теплоте', ТЕПЛО]]}
READ = [('On heat', HEAT), ('On ice & <water>', 'Ice melts.\nIt is cold.'), ('О теплоте', ТЕПЛО)]


def old_excel() -> bytes:
    "The sheets as Excel wrote them until 2003 (.xls)."
    book, memory = xlwt.Workbook(), io.BytesIO()
    for name, lines in SHEETS.items():
        page = book.add_sheet(name)
        for row, cells in enumerate(lines):
            for column, cell in enumerate(cells): page.write(row, column, cell)
    book.save(memory)
    return memory.getvalue()


def open_document() -> bytes:
    "The sheets as LibreOffice writes them (.ods): equal cells and rows once with a number, a paragraph for each line."
    def cell(value: str | float) -> str:
        if value == '': return '<table:table-cell/>'
        kind = f'office:value-type="float" office:value="{value}"' if not isinstance(value, str) else 'office:value-type="string"'
        lines = ''.join(f'<text:p>{escape(line)}</text:p>' for line in str(value).split('\n'))
        return f'<table:table-cell {kind}>{lines}</table:table-cell>'
    rest, pages = ' table:number-rows-repeated="1048000"', ''
    empty = '<table:table-row{}><table:table-cell table:number-columns-repeated="16384"/></table:table-row>'
    for name, lines in SHEETS.items():
        found = ''.join(f"<table:table-row>{''.join(map(cell, cells))}</table:table-row>" if any(cells) else empty.format('')
                        for cells in lines)
        pages += f'<table:table table:name="{name}">{found}{empty.format(rest)}</table:table>'
    spaces = ' '.join(f'xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"' for name in ('office', 'table', 'text'))
    content = (f'<?xml version="1.0" encoding="UTF-8"?><office:document-content {spaces} office:version="1.2"><office:body>'
               f'<office:spreadsheet>{pages}</office:spreadsheet></office:body></office:document-content>')
    manifest = ('<manifest:manifest xmlns:manifest="urn:oasis:names:tc:opendocument:xmlns:manifest:1.0">'
                '<manifest:file-entry manifest:full-path="content.xml" manifest:media-type="text/xml"/></manifest:manifest>')
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, 'w') as archive:
        archive.writestr('mimetype', 'application/vnd.oasis.opendocument.spreadsheet')
        archive.writestr('content.xml', content, zipfile.ZIP_DEFLATED)
        archive.writestr('META-INF/manifest.xml', manifest)
    return memory.getvalue()


def binary_excel() -> bytes:
    "The sheets as Excel's binary workbook (.xlsb): records of a number, a length and data."
    def number(value: int) -> bytes: return bytes([value]) if value < 128 else bytes([value & 127 | 128, value >> 7])
    def record(kind: int, data: bytes = b'') -> bytes: return number(kind) + number(len(data)) + data
    def text(value: str) -> bytes: return struct.pack('<I', len(value.encode('utf-16-le'))//2) + value.encode('utf-16-le')
    def cell(column: int, value: str | float) -> bytes:
        at = struct.pack('<II', column, 0)
        return record(6, at + text(value)) if isinstance(value, str) else record(5, at + struct.pack('<d', value))
    memory, space = io.BytesIO(), 'http://schemas.openxmlformats.org/'
    one = f'Type="{space}officeDocument/2006/relationships/worksheet" Target="worksheets/sheet'
    with zipfile.ZipFile(memory, 'w') as archive:
        archive.writestr('[Content_Types].xml', f'<Types xmlns="{space}package/2006/content-types"/>')
        links = ''.join(f'<Relationship Id="r{n}" {one}{n}.bin"/>' for n in range(len(SHEETS)))
        archive.writestr('xl/_rels/workbook.bin.rels', f'<Relationships xmlns="{space}package/2006/relationships">{links}</Relationships>')
        pages = b''.join(record(156, struct.pack('<II', 0, n + 1) + text(f'r{n}') + text(name)) for n, name in enumerate(SHEETS))
        archive.writestr('xl/workbook.bin', record(131) + record(143) + pages + record(144) + record(132))
        for n, lines in enumerate(SHEETS.values()):
            size = record(148, struct.pack('<IIII', 0, len(lines) - 1, 0, 3))
            found = b''.join(record(0, struct.pack('<I', row) + bytes(21)) + b''.join(cell(*pair) for pair in enumerate(cells))
                             for row, cells in enumerate(lines))
            archive.writestr(f'xl/worksheets/sheet{n}.bin', record(129) + size + record(145) + found + record(146) + record(130))
    return memory.getvalue()


@pytest.mark.parametrize(('suffix', 'make'), [('xls', old_excel), ('ods', open_document), ('xlsb', binary_excel)])
def test_spreadsheets_of_other_programs_are_read_as_well(tmp_path, suffix, make):
    "Two languages, three sheets, words before the header; known by what is in the file, whatever its name."
    data = make()
    for name in (f'a.{suffix}', 'a', 'a.xlsx', f'a.{suffix}.gz'):
        path = write(tmp_path/name, gzip.compress(data) if name.endswith('gz') else data)
        assert [(title, text) for _, title, text in told(path)] == READ, name
    entries = list(rows(str(tmp_path/f'a.{suffix}')))
    assert [entry.line for entry in entries] == [4, 6, 3]  # as a person who opens the file counts
    assert entries[0].fields == dict(No=1, Title='On heat', Abstract=HEAT, Year=2021) and entries[1].fields['Year'] == 2022.5
    [cut] = rows(write(tmp_path/f'b.{suffix}', data[:len(data)//2]))
    assert isinstance(cut, Refused) and 'get it again' in cut.reason


# --- the forms --------------------------------------------------------------------------------------------------------------------

FORMS = [(kind, form) for kind, found in formats.items() for form in found.forms]


@pytest.mark.parametrize(('kind', 'form'), FORMS, ids=[f'{kind}: {form.name}' for kind, form in FORMS])
def test_every_form_is_read_from_its_example(tmp_path, kind, form):
    assert form.example, 'a form without an example'
    file = write(tmp_path/'.'.join(['a', *formats[kind].suffixes.split()[:1]]), form.example)
    if not form.text:  # it is known, and has no text
        assert 'refused' in form.name + form.title and all(isinstance(entry, Refused) for entry in rows(str(file)))
        return
    found = read(file, strict=True)
    assert found and all(record['text'] or record['sections'] for record in found)
    assert bool(form.title) == all(record['title'] for record in found)
    elsewhere = form.sections.startswith(('sections, body_text', 'of its metadata'))  # an example need not have any
    assert elsewhere or bool(form.sections) <= any(record['sections'] for record in found)
    if kind in tables.formats: assert _format_of(form.example if isinstance(form.example, bytes) else form.example.encode()) == kind


def test_every_form_stands_in_the_table():
    lines = _forms_table(formats).splitlines()
    assert len(lines) == 2 + len(FORMS) and all(form.name in line for (_, form), line in zip(FORMS, lines[2:]))
    assert all(tables.formats[name].forms for name in tables.formats)
