"""Every file becomes rows and refused ones, which add up; what is broken is named with its line and the way out, and costs no other row."""
import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scilm_adapt import reading
from scilm_adapt.errors import InputError
from scilm_adapt.reading import Refused, Row
from scilm_adapt.sources import _format_of, _members, expand, formats, refusals, rows
from scilm_adapt.tables import hub_rows

ТЕПЛО = 'Теплота переходит от тёплых тел к холодным и никогда сама собой обратно.'


def write(path, data: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def outcome(found) -> tuple[list[int], list[tuple[int, str]]]:
    "The lines of the rows, and the (line, reason) of the refused ones."
    found = list(found)
    assert all(isinstance(entry, Row | Refused) for entry in found)
    assert all(entry.reason and '\n' not in entry.reason and len(entry.raw) <= 200 for entry in found if isinstance(entry, Refused))
    return ([entry.line for entry in found if isinstance(entry, Row)],
            [(entry.line, entry.reason) for entry in found if isinstance(entry, Refused)])


def fields(path, **options) -> list[dict]:
    found = list(rows(str(path), **options))
    assert not [entry for entry in found if isinstance(entry, Refused)]
    return [entry.fields for entry in found]


# --- what is broken ---------------------------------------------------------------------------------------------------------------

JATS = ('<article xml:lang="ru"><front><article-meta><article-id pub-id-type="pmid">7</article-id><article-id pub-id-type="doi">10.1/x'
        '</article-id><article-categories><subj-group><subject>Physics</subject></subj-group></article-categories><title-group>'
        '<article-title>О <italic>теплоте</italic></article-title></title-group><abstract abstract-type="teaser"><p>Read!</p></abstract>'
        f'<abstract><title>Abstract</title><sec><title>Aim.</title><p>H<sub>2</sub>O &#x3b1; &amp; ice.</p></sec><p>{ТЕПЛО}</p></abstract>'
        '<kwd-group><title>Keywords</title><kwd>heat</kwd></kwd-group></article-meta></front><body><p>Lead.</p><sec><title>Method</title>'
        '<p>We <xref>wait</xref>.</p><fig><caption><p>A kettle</p></caption></fig><sec><title>Kettle</title><p>It boils.</p></sec></sec>'
        '<sec><title>Empty</title></sec></body><back><ref-list><ref>A. N. Author</ref></ref-list></back></article>')
PUBMED = ('<PubmedArticle><MedlineCitation><PMID>8</PMID><Article><ArticleTitle>On <i>heat</i></ArticleTitle><Abstract><AbstractText '
          f'Label="AIM">To heat.</AbstractText><AbstractText Label="RESULT">{ТЕПЛО}</AbstractText></Abstract></Article><MeshHeadingList>'
          '<MeshHeading><DescriptorName>Heat</DescriptorName></MeshHeading></MeshHeadingList><KeywordList><Keyword>cold</Keyword>'
          '</KeywordList></MedlineCitation></PubmedArticle>')
TEI = ('<TEI xmlns="http://www.tei-c.org/ns/1.0"><teiHeader><fileDesc><titleStmt><title>On heat</title></titleStmt><sourceDesc><idno '
       'type="DOI">10.1/y</idno></sourceDesc></fileDesc><profileDesc><textClass><keywords><term>heat</term></keywords></textClass>'
       f'<abstract><div><p>{ТЕПЛО}</p></div></abstract></profileDesc></teiHeader><text><body><div><head n="1">Method</head><p>We wait.'
       '</p></div></body></text></TEI>')
RIS = f'TY  - JOUR\nDO  - 10.1/x\nTI  - О теплоте\nAB  - {ТЕПЛО}\n goes on\nKW  - heat\nKW  - тепло\nER  - \n'
BIB = f'@article{{heat, title = {{О {{Т}}еплоте}}, abstract = "{ТЕПЛО}", keywords = {{heat; тепло}}, doi={{10.1/x}}}}\n'
NBIB = (f'PMID- 7\nTI  - On heat and\n      cold\nAB  - {ТЕПЛО}\nMH  - *Heat/physiology\nOT  - *cold\nLA  - eng\n')
LOL = ('<!DOCTYPE article [<!ENTITY lol "lol">' + ''.join(f'<!ENTITY lol{n} "{f"&lol{n - 1 or str()};"*10}">' for n in range(1, 10))
       + ']><article><front>&lol9;</front></article>')
GOOD = '{"id": 1}\n'
CP1251 = f'{{"title": "О теплоте", "abstract": "{ТЕПЛО}"}}\n'.encode('cp1251')
MANY = ''.join(f'{{"id": {n}, "text": "{n*2_654_435_761 % 2**32}"}}\n' for n in range(20_000)).encode()

# name of the file, what is in it, lines of its rows, (line, a part of the reason) of the refused ones
BROKEN = {
    # JSON Lines
    'cut line': ('a.jsonl', GOOD + '{"id": 2, "abs', [1], [(2, 'not JSON (Unterminated string at character 11')]),
    'cut line between': ('a.jsonl', '{"id": "\n' + GOOD, [2], [(1, 'not JSON (Unterminated string at character 8)')]),
    'broken line between': ('a.jsonl', GOOD + '{"id": 2,}\n' + GOOD, [1, 3], [(2, 'not JSON')]),
    'no JSON at all': ('a.jsonl', 'heat\nflows\n', [], [(1, 'not JSON'), (2, 'not JSON')]),
    'a list': ('a.jsonl', GOOD + '[1, 2]\n', [1], [(2, 'a list where an object')]),
    'a text': ('a.jsonl', GOOD + '"heat"\n', [1], [(2, 'a str where an object')]),
    'null': ('a.jsonl', GOOD + 'null\n', [1], [(2, 'a NoneType where an object')]),
    'a key twice': ('a.jsonl', '{"id": 1, "id": 2}\n' + GOOD, [2], [(1, "the key 'id' stands twice")]),
    'a key twice deep inside': ('a.jsonl', GOOD + '{"a": [{"b": 1, "b": 1}]}', [1], [(2, "the key 'b' stands twice")]),
    'a lone surrogate': ('a.jsonl', GOOD + '{"a": "\\ud800"}\n{"a": "\\ud83d\\ude00"}', [1, 3], [(2, 'lone surrogate')]),
    'a lone surrogate in a key': ('a.jsonl', '{"\\uDC00": 1}', [], [(1, 'lone surrogate')]),
    'a NUL': ('a.jsonl', GOOD + '{"a": "b\0"}\n' + GOOD, [1, 3], [(2, 'NUL byte')]),
    'an escaped NUL is text': ('a.jsonl', '{"a": "b\\u0000"}', [1], []),
    'a control character': ('a.jsonl', GOOD + '{"a": "b\x01"}', [1], [(2, 'not JSON (Invalid control character at character 9)')]),
    'a BOM': ('a.jsonl', b'\xef\xbb\xbf' + GOOD.encode(), [1], []),
    'a BOM in the middle': ('a.jsonl', GOOD.encode() + b'\xef\xbb\xbf' + GOOD.encode(), [1], [(2, 'not JSON')]),
    'CRLF': ('a.jsonl', '{"id": 1}\r\n\r\n{"id": 2}\r\n', [1, 3], []),
    'blank lines': ('a.jsonl', '\n \n' + GOOD + '\t\n', [3], []),
    'odd line separators': ('a.jsonl', '{"a": "b\u2028c\x85d\u2029e"}\n' + GOOD, [1, 2], []),
    'another encoding in one line': ('a.jsonl', GOOD.encode() + CP1251 + GOOD.encode(), [1, 3],
                                     [(2, 'not UTF-8 at byte 12, looks like cp1251: convert it, or give encoding=cp1251 if all')]),
    'Latin-1 in one line': ('a.jsonl', GOOD.encode() +
                            '{"a": "Über die Größe der Wärme"}\n'.encode('cp1252'), [1], [(2, 'not UTF-8 at byte 8')]),
    'a huge line': ('a.jsonl', GOOD + '{"a": "' + 'x'*reading.LARGEST*2 + '"}\n' + GOOD, [1, 3], [(2, 'more than 10,000,000 bytes')]),
    'nested too deeply': ('a.jsonl', GOOD + '{"a":'*100_000 + '\n' + GOOD, [1, 3], [(2, 'nested too deeply')]),
    'a number of 5,000 digits': ('a.jsonl', GOOD + '{"a": ' + '1'*5000 + '}', [1], [(2, 'digits')]),
    'UTF-16 without a mark': ('a.jsonl', CP1251.decode('cp1251').encode('utf-16-le'), [], [(1, 'UTF-16 without a byte order mark')]),
    'a lone surrogate in UTF-16': ('a.jsonl', ('\ufeff' + GOOD + '{"a": "\ud800"}\n' + GOOD).encode('utf-16-le', 'surrogatepass'), [1, 3],
                                   [(2, 'lone surrogate')]),
    'half a character at the end of UTF-16': ('a.jsonl', GOOD.encode('utf-16') + b'{', [1], [(2, 'not UTF-16')]),
    # JSON
    'a cut array': ('a.json', '[\n {"id": 1},\n {"id": 2},\n {"id": 3, "a', [1, 2], [(3, 'cut off after record 2')]),
    'an array that is not closed': ('a.json', '[{"id": 1}, {"id": 2}', [1, 2], [(3, 'cut off after record 2')]),
    'a broken record in an array': ('a.json', '[{"id": 1}, {"id" 2}, {"id": 3}]' + ' '*100, [1], [(2, 'not JSON')]),
    'things that are no objects': ('a.json', '[{"id": 1}, 7, null, "a", {"id": 2}]', [1, 5],
                                   [(2, 'a int'), (3, 'a NoneType'), (4, 'a str')]),
    'a key twice in an array': ('a.json', '[{"id": 1, "id": 2}, {"id": 3}]', [2], [(1, "'id' stands twice")]),
    'text after the array': ('a.json', '[{"id": 1}] and more', [1], [(2, 'text after the end')]),
    'a huge record in an array': ('a.json', '[{"id": 1}, {"a": "' + 'x'*reading.LARGEST*3 + '"}]', [1], [(2, 'more than 10,000,000')]),
    'an array in another encoding': ('a.json', b'[' + CP1251 + b']', [], [(1, 'looks like cp1251')]),
    'an empty array': ('a.json', '[]', [], []),
    'one object over lines': ('a.json', '{\n "id": 1,\n "a": [{"b": 2}]\n}', [1], []),
    # CSV
    'too few fields': ('a.csv', 'id,a\n1,x\n2\n3,z\n', [2, 4], [(3, '1 fields where the header has 2')]),
    'too many fields': ('a.csv', 'id,a\n1,x,y\n3,z\n', [3],
                        [(2, "3 fields where the header has 2; put quotation marks around text with ','")]),
    'a stray quotation mark': ('a.csv', 'id,a\n1,"x"y"\n3,z\n', [3], [(2, 'broken CSV')]),
    'a quote never closed': ('a.csv', 'id,a\n1,x\n2,"y\n3,z\n4,u\n', [2, 4, 5], [(3, 'broken CSV (unexpected end of data)')]),
    'prose after a broken quote': ('a.csv', 'id,a\n1,"x "y"\nheat, cold\nand, "ice"\n3,z\n', [5],
                                   [(2, 'broken'), (3, 'line 2'), (4, 'line 2')]),
    'a name twice in the header': ('a.csv', 'id,a,id\n1,x,2\n', [2], []),
    'a name twice in the header, and who knows': ('a.csv', 'id,text,text\n1,x,\n2,x,y\n', [2],
                                                  [(3, "two columns are called 'text', and differ")]),
    'text over lines': ('a.csv', 'id,a\r\n1,"x\r\n\r\ny, ""z"""\r\n\r\n2,u\r\n', [2, 6], []),
    'one line of CSV in another encoding': ('a.csv', b'id,a\n1,x\n' + '2,Теплота\n'.encode('cp1251') + b'3,z\n', [2, 4],
                                            [(3, 'not UTF-8')]),
    'another encoding inside quotes': ('a.csv', b'id,a\n1,"x\n' + 'Теплота\n'.encode('cp1251') + b'3,z\n', [4],
                                       [(2, 'broken CSV'), (3, 'not UTF-8')]),
    'another encoding inside closed quotes': ('a.csv', b'id,a\n1,"x\n' + 'Теплота\n'.encode('cp1251') + b'and, z"\n3,z\n', [5],
                                              [(2, 'not UTF-8')]),
    'old Macintosh lines': ('a.csv', 'id,a\r1,x\r2,y\r', [], [(1, 'broken CSV')]),
    'only a header': ('a.csv', 'id,a\n', [], []),
    # compression and archives
    'a gzip cut off': ('a.jsonl.gz', gzip.compress(MANY)[:-1000], None, 'cut off after line {}: Compressed file ended'),
    'a zst cut off': ('a.jsonl.zst', zstandard.compress(MANY)[:-1000], None, 'cut off after line {}: the compressed file ends'),
    'an xz cut off': ('a.jsonl.xz', lzma.compress(MANY)[:-1000], None, 'cut off after line {}: Compressed file ended'),
    'a gzip of ten bytes': ('a.jsonl.gz', gzip.compress(MANY)[:10], [], [(1, 'cut off after line 0')]),
    'a wrong checksum': ('a.jsonl.gz', gzip.compress(GOOD.encode())[:-8] + b'\0'*8, [1], [(2, 'damaged after line 1: CRC check failed')]),
    'a gzip that is none': ('a.jsonl.gz', GOOD, [1], []),
    'packed twice': ('a.jsonl.gz', gzip.compress(gzip.compress(GOOD.encode())), [], [(1, 'packed twice')]),
    'bzip2': ('a.jsonl.bz2', bz2.compress(GOOD.encode()), [], [(1, 'a packer we do not read')]),
    'a damaged zip': ('a.zip', b'PK\x03\x04' + b'x'*100, [], [(1, 'a damaged archive')]),
    # tables of columns
    'Parquet cut off': ('a.parquet', b'PAR1' + b'x'*100, [], [(1, 'damaged after record 0')]),
    'Arrow cut off': ('a.arrow', b'ARROW1\0\0\xff\xff\xff\xff\x10\0', [], [(1, 'damaged after record 0')]),
    # tagged records
    'RIS without an end': ('a.ris', 'TY  - JOUR\nTI  - On heat\n\n' + RIS, [4], [(1, 'no line "ER  -"')]),
    'RIS cut off': ('a.ris', RIS + 'TY  - JOUR\nAB  - He', [1], [(9, 'no line "ER  -"')]),
    'RIS in another encoding': ('a.ris', RIS.encode() + RIS.encode('cp1251') + RIS.encode(), [1, 17], [(9, 'looks like cp1251')]),
    'a BibTeX entry not closed': ('a.bib', '@article{a, title = {On\n' + BIB, [2], [(1, 'a brace, quotation mark or comma is missing')]),
    'a BibTeX field twice': ('a.bib', BIB + '@book{b, title={x}, title={y}}', [1, 2], []),
    'BibTeX comments and strings': ('a.bib', '% note\n@comment{x}\n@string{j = "J"}\n@preamble{"y"}\n' + BIB + 'free text', [5], []),
    'MEDLINE with a foreign line': ('a.nbib', NBIB + '\nPMID- 8\nTI  - x\nwhat is this\n', [1],
                                    [(9, "neither a field nor goes on with one: 'what")]),
    # XML
    'XML cut off': ('a.xml', f'<set>{JATS}{JATS[:200]}', [1], [(2, 'broken XML after record 1')]),
    'XML tags that cross': ('a.xml', f'<set>{PUBMED}<a><b></a></b>{PUBMED}</set>', [1], [(2, 'broken XML after record 1')]),
    'XML in another encoding': ('a.xml', JATS.encode('cp1251'), [], [(1, 'broken XML after record 0')]),
    'an entity bomb': ('a.xml', LOL, [], [(1, 'entit')]),
    'an entity that names a file': ('a.xml', '<!DOCTYPE article [<!ENTITY x SYSTEM "a.xml">]><article><front>&x;</front></article>', [],
                                    [(1, 'declares entities of its own')]),
    'XML of another kind': ('a.xml', '<?xml version="1.0"?><!-- <x> --><kml:kml xmlns:kml="k"><item>heat</item></kml:kml>', [],
                            [(1, '<item> holds nothing, which is no form of record')]),
    'XML of an unknown root': ('a.xml', '<?xml version="1.0"?><!-- <x> --><kml><place>heat</place></kml>', [],
                               [(1, 'XML of <kml>, none of the forms')]),
    'XML nested too deeply': ('a.xml', '<article>' + '<p>'*1000, [], [(1, 'broken XML')]),
    'an entity of a DTD far away': ('a.xml', '<!DOCTYPE article SYSTEM "http://127.0.0.1:9/no.dtd"><article><front><article-title>&alpha;'
                                    '</article-title></front></article>', [1], []),
    # documents
    'a text in another encoding': ('a.txt', f'О теплоте\n\n{ТЕПЛО}'.encode('koi8-r'), [], [(1, 'looks like koi8-r')]),
    'a text with a NUL': ('a.txt', 'On heat\n\nHeat\0flows.', [], [(3, 'NUL byte')]),
    'Markdown in another encoding': ('a.md', f'# On heat\n\n{ТЕПЛО}'.encode('cp1251'), [], [(3, 'looks like cp1251')]),
    'front matter that is no YAML': ('a.md', '---\ntitle: [\n---\n# On heat\n', [], [(1, 'cannot be parsed')]),
    'a style of LaTeX': ('a.sty', '\\newcommand{\\x}{y}', [], [(1, 'a file that LaTeX needs or writes')]),
    'a style of LaTeX told by its beginning': ('a', '% x\n\\ProvidesPackage{x}', [], [(1, 'a file that LaTeX needs or writes')]),
    'LaTeX nested too deeply': ('a.tex', '\\documentclass{a}' + '{'*50_000, [], [(1, 'cannot be parsed')]),
    'LaTeX that is not closed': ('a.tex', '\\begin{document}\n\\section{A} Heat {flows \\textbf{a', [1], []),
    # no text at all
    'a damaged PDF': ('a.txt', b'%PDF-1.5\n%\xd0\xd4', [], [(1, 'damaged, so that PDFium cannot open it; get it again')]),
    'a web page': ('a.xml', '\n<!DOCTYPE html>\n<html><body>Heat', [], [(1, 'a web page')]),
    'a picture': ('a.txt', b'\x89PNG\r\n\x1a\n', [], [(1, 'an image')]),
    'noise': ('a.txt', bytes(range(256))*10, [], [(1, 'binary data')]),
    'a tar': ('a.tar', b'x'*257 + b'ustar\0' + b'\0'*300, [], [(1, 'a tar archive')]),
    'nothing': ('a.parquet', b'', [], []),
    'nothing packed': ('a.jsonl.gz', gzip.compress(b''), [], []),
    'only blanks': ('a.txt', ' \n\n\t\n', [], []),
}


@pytest.mark.parametrize('case', BROKEN)
def test_what_is_broken_is_refused_by_line_and_costs_no_other(tmp_path, case):
    name, data, good, bad = BROKEN[case]
    kept, refused = outcome(rows(write(tmp_path/name, data)))
    if good is None:  # cut off: nearly all of it is there, and one more is refused
        assert 15_000 < len(kept) < 20_000 and kept == [*range(1, len(kept) + 1)]
        good, bad = kept, [(len(kept) + 1, bad.format(len(kept)))]
    assert kept == good
    assert [line for line, _ in refused] == [line for line, _ in bad]
    for (_, reason), (_, part) in zip(refused, bad): assert part in reason


def test_there_are_enough_broken_things(): assert len(BROKEN) >= 45


@pytest.mark.parametrize('case', [case for case in BROKEN if BROKEN[case][3]])
def test_a_refused_record_shows_its_place(tmp_path, case):
    path = write(tmp_path/BROKEN[case][0], BROKEN[case][1])
    found = [entry for entry in rows(path) if isinstance(entry, Refused)]
    assert all(entry.file == path for entry in found)
    assert all(json.loads(json.dumps(entry.raw)) == entry.raw for entry in found)
    assert pickle.loads(pickle.dumps(found)) == found  # they go from process to process


# --- what is good: every format, packed in every way, in every encoding ---------------------------------------------------------

RECORDS = [dict(id='1', title='О теплоте', abstract=ТЕПЛО, year='1822'),
           dict(id='2', title='On "heat", and cold', abstract='One line\nand another;\t"heat" flows | by itself.', year='')]
TABLE = pyarrow.table({name: [record[name] for record in RECORDS] for name in RECORDS[0]})
PARTS = [dict(title='', text='Lead.'), dict(title='Method', text='We wait.'), dict(title='Kettle', text='It boils.')]
MARKDOWN = f'# О теплоте #\n\n{ТЕПЛО}\n\n## Method\n\nWe wait.\n\n```\n# no heading\n```\n### Empty\n## Kettle\nIt boils.\n'
LATEX = ('% a note\n\\documentclass[a4paper]{article}\n\\usepackage{x}\\newcommand{\\R}{\\mathbb{R}}\n'
         '\\title[Short]{О \\emph{теплоте}% why\n}\n'
         '\\author{A}\n\\begin{document}\n\\maketitle\n\\begin{abstract}\n' + ТЕПЛО + ' In $a<b$ 50\\% % so\n\\cite{c}.\n\\end{abstract}\n'
         '\\keywords{heat, тепло}\n\\section{Method}\\label{sec:m}\nWe \\textbf{wait}.\n\\begin{figure}[h]\\caption{K}\\end{figure}\n\n'
         '\\subsection*{Kettle}It boils: \\begin{equation}\\label{e} x=1\\end{equation}\n\\input{more}\n'
         '\\begin{thebibliography}{9}\\bibitem{c} A\\end{thebibliography}\n\\end{document}\n')
EMPTY = dict(topics=[], keywords=[])


def delimited(delimiter: str) -> str:
    import csv
    text = io.StringIO()
    writer = csv.DictWriter(text, RECORDS[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return text.getvalue()


def column_file(kind: str) -> bytes:
    memory = io.BytesIO()
    if kind == 'parquet': pyarrow.parquet.write_table(TABLE, memory)
    else:
        with getattr(pyarrow.ipc, f'new_{kind}')(memory, TABLE.schema) as writer: writer.write_table(TABLE)
    return memory.getvalue()


TAGGED = dict(title='О теплоте', text=f'{ТЕПЛО}', topics=[])
ARTICLES = {
    'jats': dict(id='7', title='О теплоте', text=f'{ТЕПЛО}\n\nAim: H2O α & ice.', lang='ru', sections=PARTS,
                 topics=['Physics'], keywords=['heat']),
    'pubmed': dict(id='8', title='On heat', text=f'AIM: To heat.\n\nRESULT: {ТЕПЛО}', topics=['Heat'], keywords=['cold']),
    'tei': dict(id='10.1/y', title='On heat', text=ТЕПЛО, topics=[], keywords=['heat'], sections=PARTS[1:2])}
GOOD_FILES = {  # the name says the format nowhere but where it must
    'json lines': ('a', ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in RECORDS), RECORDS),
    'json array': ('a', json.dumps(RECORDS, ensure_ascii=False, indent=1), RECORDS),
    'json array on one line': ('a', json.dumps(RECORDS), RECORDS),
    'an object with a list of papers': ('a', json.dumps(dict(papers=RECORDS, page=1), ensure_ascii=False), RECORDS),
    'an object': ('a', json.dumps(RECORDS[0], indent=2), RECORDS[:1]),
    'objects one after another': ('a', ''.join(json.dumps(r, indent=2) + '\n' for r in RECORDS), RECORDS),
    'comma': ('a', delimited(','), RECORDS), 'tab': ('a.txt', delimited('\t'), RECORDS), 'semicolon': ('a.csv', delimited(';'), RECORDS),
    'bar': ('a.tsv', delimited('|'), RECORDS), 'one column': ('a.csv', f'text\n{ТЕПЛО}\n', [dict(text=ТЕПЛО)]),
    'parquet': ('a.csv', column_file('parquet'), RECORDS), 'arrow file': ('a', column_file('file'), RECORDS),
    'arrow stream': ('a', column_file('stream'), RECORDS),
    'jats': ('a', JATS, [ARTICLES['jats']]), 'pubmed': ('a', PUBMED, [ARTICLES['pubmed']]), 'tei': ('a', TEI, [ARTICLES['tei']]),
    'a set of articles': ('a', f'<?xml version="1.0"?>\n<!-- x --><set>{JATS}{PUBMED}{TEI}{JATS}</set>',
                          [ARTICLES[n] for n in ('jats', 'pubmed', 'tei', 'jats')]),
    'ris': ('a', 'Provider: X\n\n' + RIS*2, 2*[dict(
        id='10.1/x', title='О теплоте', text=f'{ТЕПЛО} goes on', topics=[], keywords=['heat', 'тепло'])]),
    'bibtex': ('a', BIB, [dict(id='10.1/x', title='О Теплоте', text=ТЕПЛО, topics=[], keywords=['heat', 'тепло'])]),
    'medline': ('a', f'\n{NBIB}\n{NBIB}', 2*[dict(
        id='7', title='On heat and cold', text=ТЕПЛО, topics=['Heat/physiology'], keywords=['cold'])]),
    'markdown': ('a.md', MARKDOWN, [dict(title='О теплоте', text=ТЕПЛО, lang='', **EMPTY, sections=[
        dict(title='Method', text='We wait.\n\n```\n# no heading\n```'), PARTS[2]])]),
    'markdown with front matter': ('a.md', '---\ntitle: О теплоте\nlang: ru\ntags: [heat]\n---\nA. N.\n'
                                   f'# Аннотация\n{ТЕПЛО}\n# Method\nWe wait.', [
        dict(title='О теплоте', text=ТЕПЛО, lang='ru', topics=[], keywords=['heat'], sections=PARTS[1:2])]),
    'latex': ('a', LATEX, [dict(title='О \\emph{теплоте}', text=f'{ТЕПЛО} In $a<b$ 50\\% \\cite{{c}}.', topics=[],
                                keywords=['heat', 'тепло'], sections=[
        dict(title='Method', text='We \\textbf{wait}.'), dict(title='Kettle', text='It boils: \\begin{equation} x=1\\end{equation}')])]),
    'latex without sections': ('a.tex', f'\\title{{T}}\n{ТЕПЛО}', [dict(title='T', text=ТЕПЛО, **EMPTY, sections=[])]),
    'text': ('a', f'О теплоте\n\n{ТЕПЛО}\n\nMore.\n', [dict(title='О теплоте', text=f'{ТЕПЛО}\n\nMore.')]),
    'spreadsheet': ('a', formats['spreadsheet'].forms[0].example,
                    [{'UT (Unique WOS ID)': 'WOS:1', 'Article Title': 'On heat', 'Abstract': 'Heat flows.'}]),
    'text without title': ('a.txt', f'# {ТЕПЛО}\n\nMore.\n', [dict(title='', text=f'# {ТЕПЛО}\n\nMore.')]),
}
PACKERS = {'': lambda data: data, '.gz': gzip.compress, '.zst': zstandard.compress, '.xz': lzma.compress,
           'two gz': lambda data: gzip.compress(data[:100]) + gzip.compress(data[100:]),
           'two zst': lambda data: zstandard.compress(data[:100]) + zstandard.compress(data[100:])}


@pytest.mark.parametrize('case', GOOD_FILES)
@pytest.mark.parametrize('packer', PACKERS)
def test_every_format_is_told_by_its_content_and_read_through_every_packer(tmp_path, case, packer):
    name, data, wanted = GOOD_FILES[case]
    data = data.encode() if isinstance(data, str) else data
    assert fields(write(tmp_path/(name + packer*packer.startswith('.')), PACKERS[packer](data))) == wanted


@pytest.mark.parametrize('case', GOOD_FILES)
def test_every_format_is_read_out_of_an_archive(tmp_path, case):
    name, data, wanted = GOOD_FILES[case]
    data = data.encode() if isinstance(data, str) else data
    with zipfile.ZipFile(tmp_path/'z.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f'папка/{name}', data)
        archive.writestr('packed.gz', gzip.compress(data))
    found = expand([str(tmp_path/'z.zip')])
    assert [name[len(str(tmp_path)):] for name in found] == [f'/z.zip/папка/{name}', '/z.zip/packed.gz']
    assert fields(found[0]) == wanted
    if '.' not in name: assert fields(found[1]) == wanted
    assert {entry.file for entry in rows(str(tmp_path/'z.zip'))} == set(found)


ENCODABLE = [case for case, (_, data, _) in GOOD_FILES.items() if isinstance(data, str) and case != 'jats']


@pytest.mark.parametrize('case', ENCODABLE)
@pytest.mark.parametrize(('codec', 'encoding'), [('utf-8-sig', 'utf-8'), ('utf-16', 'utf-8'), ('utf-32', 'utf-8'),
                                                 ('utf-16-le', 'utf-16-le'), ('cp1251', 'cp1251'), ('koi8-r', 'koi8-r'),
                                                 ('utf-8-sig', 'cp1251')])
def test_every_text_is_read_in_every_encoding_that_it_names_or_is_given(tmp_path, case, codec, encoding):
    name, data, wanted = GOOD_FILES[case]
    data = data.replace('α', '&#x3b1;') if codec in ('cp1251', 'koi8-r') else data
    assert fields(write(tmp_path/name, data.encode(codec)), encoding=encoding) == wanted
    lines = data.replace('\r\n', '\n').replace('\n', '\r\n')  # as Windows writes them
    assert fields(write(tmp_path/name, lines.encode(codec)), encoding=encoding) == wanted


def test_xml_knows_its_encoding_itself(tmp_path):
    for codec, encoding in (('windows-1251', 'utf-8'), ('utf-8', 'cp1251'), ('koi8-r', 'cp1251'), ('utf-16', 'utf-8')):
        path = write(tmp_path/'a.xml', f'<?xml version="1.0" encoding="{codec}"?>\n{PUBMED}'.encode(codec))
        assert fields(path, encoding=encoding) == [ARTICLES['pubmed']]


values = st.text() | st.none() | st.integers() | st.lists(st.text(), max_size=3)


@given(st.lists(st.dictionaries(st.text(), values, max_size=4)), st.booleans())
@settings(max_examples=100)
def test_json_of_any_characters_reads_back_equal(tmp_path_factory, records, ascii_only):
    folder = tmp_path_factory.getbasetemp()
    path = write(folder/'any.jsonl', ''.join(json.dumps(record, ensure_ascii=ascii_only) + '\n' for record in records))
    assert fields(path) == records
    assert fields(write(folder/'any.json', json.dumps(records, ensure_ascii=ascii_only))) == records


cell = st.text(st.characters(codec='utf-8', exclude_categories=['Cc', 'Cs'], include_characters='\n\t'))


@given(st.lists(st.lists(cell, min_size=3, max_size=3), min_size=1))
@settings(max_examples=100)
def test_a_table_of_any_characters_reads_back_equal(tmp_path_factory, table):
    import csv
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([['id', 'title', 'abstract'], *table])
    assert [list(row.values()) for row in fields(write(tmp_path_factory.getbasetemp()/'any.csv', text.getvalue()))] == table


NAMES = [f'a.{suffix}' for suffix in 'jsonl json csv xml ris bib nbib md tex txt parquet zip'.split()]
STARTS = ['', '[{"id": 1},', '{"a": 1}\n', 'id,a\n1,', '<article>', RIS, BIB, NBIB, LATEX[:200], 'PAR1', '\ufeff']


@example(b'\x00', 'a.jsonl', b'<article>')  # of which the parser says two lines
@given(st.binary(max_size=300), st.sampled_from(NAMES), st.sampled_from(STARTS).map(str.encode))
@settings(max_examples=400)
def test_no_bytes_end_the_reading_with_an_error(tmp_path_factory, noise, name, start):
    outcome(rows(write(tmp_path_factory.getbasetemp()/name, start + noise)))


# --- streams ----------------------------------------------------------------------------------------------------------------------

BIG = dict(title='О теплоте', abstract=ТЕПЛО*200)
LARGE = {'jsonl': ('', '\n', ''), 'json': ('[', ',', ']'), 'wrapped.json': ('{"papers": [', ', ', ']}')}


@pytest.mark.parametrize('kind', LARGE)
def test_a_large_file_passes_through_a_little_memory(tmp_path, kind):
    before, between, after = LARGE[kind]
    text = json.dumps(BIG, ensure_ascii=False)
    path = write(tmp_path/f'a.{kind}', before + between.join([text]*1200) + after)
    assert os.path.getsize(path) > 30e6
    tracemalloc.start()
    found = rows(path)
    assert next(found).fields == BIG and tracemalloc.get_traced_memory()[1] < 2e6
    assert sum(1 for _ in found) == 1199 and tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


@pytest.mark.parametrize(('name', 'record', 'wanted'), [
    ('a.csv', f'7,"{ТЕПЛО*200}"\n', 499), ('a.xml', PUBMED.replace('To heat', ТЕПЛО*200), 500), ('a.txt', ТЕПЛО*200 + '\n\n', 500),
    ('a.ris', RIS.replace('\nKW', ТЕПЛО*200 + '\nKW', 1), 500), ('a.bib', BIB.replace('",', ТЕПЛО*200 + '",'), 500),
    ('a.nbib', NBIB.replace('\nMH', ТЕПЛО*200 + '\nMH'), 500)],
    ids=lambda value: value if isinstance(value, str) and len(value) < 9 else '')
def test_large_files_of_every_kind_are_read_as_a_stream(tmp_path, name, record, wanted):
    start, end = ('<set>', '</set>') if name == 'a.xml' else ('', '')
    path = write(tmp_path/name, start + record*500 + end)
    next(rows(path))  # imports what it needs
    tracemalloc.start()
    assert sum(isinstance(entry, Row) for entry in rows(path)) == wanted
    assert tracemalloc.get_traced_memory()[1] < os.path.getsize(path)/2
    tracemalloc.stop()


@pytest.mark.skipif(sys.platform != 'linux', reason='asks Linux for the memory of a process')
def test_xml_that_was_read_is_forgotten(tmp_path):
    "libxml2's memory is not Python's, so the whole process is measured."
    write(tmp_path/'a.xml', '<set>' + PUBMED.replace('To heat', ТЕПЛО*500)*800 + '</set>')
    program = ('import sys\nfrom scilm_adapt.sources import rows\nused = lambda: int(open("/proc/self/statm").read().split()[1])*4096\n'
               'found = rows(sys.argv[1]); next(found); before = used(); count = sum(1 for _ in found)\nprint(count, used() - before)')
    done = subprocess.run([sys.executable, '-c', program, str(tmp_path/'a.xml')], capture_output=True, text=True, check=True)
    count, grown = map(int, done.stdout.split())
    assert count == 799 and os.path.getsize(tmp_path/'a.xml') > 50e6 and grown < 15e6


def test_a_collection_of_texts_is_parted_at_blank_lines(tmp_path):
    documents = [f'Документ {n}.\n{ТЕПЛО}' for n in range(20_000)]
    path = write(tmp_path/'a.txt', '\n\n'.join(documents[:9000]) + '\n\n \n' + '\n\n'.join(documents[9000:]))
    found = list(rows(path))
    assert [entry.fields['text'] for entry in found] == documents and [entry.line for entry in found[:3]] == [1, 4, 7]
    with open(path, 'ab') as file: file.write(b'\n\nheat \xff\nflows\n\nIt does.')
    found = list(rows(path))
    assert len(found) == 20_002 and isinstance(found[-2], Refused) and found[-1].fields['text'] == 'It does.'


def test_a_file_is_closed_by_whoever_stops_early(tmp_path, recwarn):
    found = rows(write(tmp_path/'a.jsonl', GOOD*10))
    next(found)
    found.close()
    assert not [warning for warning in recwarn if warning.category is ResourceWarning]


# --- data sets --------------------------------------------------------------------------------------------------------------------

def test_all_splits_of_a_saved_data_set_are_read(tmp_path):
    data = datasets.Dataset.from_list(RECORDS)
    data.save_to_disk(tmp_path/'one')
    datasets.DatasetDict(train=data, test=data.select([1]).select([0])).save_to_disk(tmp_path/'two')
    assert fields(tmp_path/'one') == RECORDS and fields(tmp_path/'two') == [*RECORDS, RECORDS[1]]
    assert [entry.line for entry in rows(str(tmp_path/'two'))] == [1, 2, 3]
    assert expand([str(tmp_path)]) == [str(tmp_path/'one'), str(tmp_path/'two')]
    (tmp_path/'two'/'test'/'state.json').write_text('{')
    with pytest.raises(InputError, match='two: the data set cannot be opened'): list(rows(str(tmp_path/'two')))


def test_a_data_set_is_streamed_as_from_the_hub(tmp_path):
    "A local folder goes through the same loader as a name on the Hub."
    write(tmp_path/'train.jsonl', ''.join(json.dumps(record) + '\n' for record in RECORDS))
    assert list(hub_rows(str(tmp_path))) == [Row(str(tmp_path), number, record) for number, record in enumerate(RECORDS, 1)]


def test_columns_of_the_same_name_are_refused_and_types_are_kept(tmp_path):
    table = pyarrow.table([[1, 2], [['a'], None]], names=['id', 'id'])
    pyarrow.parquet.write_table(table.rename_columns(['id', 'words']), tmp_path/'b.parquet')
    assert fields(tmp_path/'b.parquet') == [dict(id=1, words=['a']), dict(id=2, words=None)]
    with pyarrow.ipc.new_file(tmp_path/'a.arrow', table.schema) as writer: writer.write_table(table)
    assert outcome(rows(str(tmp_path/'a.arrow'))) == ([], [(1, "two columns are called 'id'; rename one")])


def test_a_bad_text_in_an_arrow_file_costs_its_row_alone(tmp_path):
    text = pyarrow.StringArray.from_buffers(3, pyarrow.py_buffer(b'\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0'), pyarrow.py_buffer(b'a\xffc'))
    table = pyarrow.table(dict(text=text))
    with pyarrow.ipc.new_stream(tmp_path/'a.arrow', table.schema) as writer: writer.write_table(table)
    good, [(line, reason)] = outcome(rows(str(tmp_path/'a.arrow')))
    assert good == [1, 3] and line == 2 and 'damaged' in reason


# --- sources ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('b.jsonl a.csv deep/er/c.tex [1].txt статья.md .hidden.jsonl .git/d.jsonl quarantine.jsonl removed.jsonl report.json '
                 'manifest.json').split(): write(tmp_path/'papers'/name, GOOD)
    (tmp_path/'papers'/'loop').symlink_to(tmp_path/'papers')
    (tmp_path/'empty').mkdir()
    return tmp_path


ALL = ['papers/[1].txt', 'papers/a.csv', 'papers/b.jsonl', 'papers/deep/er/c.tex', 'papers/статья.md']


@pytest.mark.parametrize(('given', 'wanted'), [
    (['papers'], ALL), (['papers/'], ALL), (['./papers'], [f'./{name}' for name in ALL]),
    (['papers/*.csv', 'papers'], ['papers/a.csv', *ALL[:1], *ALL[2:]]),
    (['papers/**/*.tex'], ['papers/deep/er/c.tex']), (['papers/*'], [name for name in ALL if 'deep' not in name]),
    (['papers/[1].txt'], ALL[:1]),
    (['papers/quarantine.jsonl'], ['papers/quarantine.jsonl']), (['installed-docs', 'papers/a.csv'], ['installed-docs', 'papers/a.csv']),
    (['owner/name', 'name:part', 'owner/a.b-c_d:e.f'], ['owner/name', 'name:part', 'owner/a.b-c_d:e.f']), (['papers'], ALL)], ids=str)
def test_files_folders_and_patterns_become_single_sources(tree, given, wanted):
    assert expand(given, ['installed-docs']) == wanted


@pytest.mark.parametrize('suffix', ['bib', 'ris', 'nbib', 'enw', 'bib.gz', 'RIS'])
@pytest.mark.parametrize('given', ['{}', '{}/*', '{}/all.zip'])
def test_what_holds_abstracts_alone_comes_after_the_papers(tmp_path, suffix, given):
    names = [f'a.{suffix}', 'b.pdf', 'c.jsonl', 'd.bibliography.txt']
    if given.endswith('zip'):
        with zipfile.ZipFile(tmp_path/'all.zip', 'w') as archive:
            for name in names: archive.writestr(name, 'x')
    else:
        for name in names: (tmp_path/name).write_text('x')
    found = [os.path.basename(name) for name in expand([given.format(tmp_path)])]
    assert found == [*names[1:], names[0]]
    if not given.endswith('zip'):
        assert [os.path.basename(one) for one in expand([tmp_path/name for name in names])] == names, 'an order that was given stays'


def test_a_home_folder_is_found(tree, monkeypatch):
    monkeypatch.setenv('HOME', str(tree))
    assert expand(['~/papers/a.csv']) == [f'{tree}/papers/a.csv'] and next(rows('~/papers/b.jsonl')).fields == dict(id=1)


@pytest.mark.parametrize(('missing', 'way'), [
    ('missing.jsonl', 'there is no such file'), ('missing.jsonl.gz', 'no such file'), ('./missing', 'no such file'),
    ('/nowhere/papers', 'no such file'), ('~/no such file.csv', 'no such file'), ('no such name', 'no such file'), ('', 'no such file'),
    ('empty', 'nothing to read in it'), ('papers/*.xml', 'nothing to read in it')])
def test_what_is_not_there_is_named(tree, missing, way):
    with pytest.raises(InputError, match=way) as caught: expand([missing])
    assert missing in str(caught.value) and '\n' not in str(caught.value)
    if missing not in ('empty', 'papers/*.xml'):
        with pytest.raises(InputError): list(rows(missing))


def test_a_data_set_that_is_not_on_the_hub_is_named(tree):
    with pytest.raises(InputError, match="'nobody/no-such-data-set' is neither a file here") as caught:
        list(rows('nobody/no-such-data-set'))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('encoding', ['klingon', 'base64', 'rot13'])
def test_an_unknown_encoding_is_named(tree, encoding):
    with pytest.raises(InputError, match=f"no encoding '{encoding}'"): list(rows('papers/a.csv', encoding=encoding))


EVIL = ['../../evil.jsonl', '/etc/evil.jsonl', 'a/../../b.jsonl', 'C:\\evil.jsonl']


def test_names_that_leave_an_archive_are_only_names(tmp_path):
    folder = tmp_path/'deep'/'er'
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder/'z.zip', 'w') as archive:
        for name in [*EVIL, '.hidden.jsonl', '__MACOSX/a.jsonl', 'a/.b', 'quarantine.jsonl']: archive.writestr(name, GOOD)
        archive.writestr('folder/', '')
    found = expand([str(folder/'z.zip')])
    assert found == [f'{folder}/z.zip/{name}' for name in EVIL]
    for name in found: assert [entry.fields for entry in rows(name)] == [dict(id=1)]
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['deep', 'er', 'z.zip']
    with pytest.raises(InputError, match='no such file in the archive'): list(rows(f'{folder}/z.zip/missing.jsonl'))


def test_archives_in_archives_office_documents_and_damaged_members_are_refused(tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, 'w') as archive: archive.writestr('a.jsonl', GOOD)
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as archive:
        archive.writestr('in.zip', inner.getvalue())
        archive.writestr('b.jsonl', GOOD*10)
        archive.writestr('c.jsonl', GOOD)
    data = (tmp_path/'z.zip').read_bytes()
    (tmp_path/'z.zip').write_bytes(data.replace((GOOD*10).encode(), (GOOD*9).encode() + b'{"id": 2}\n'))
    good, bad = outcome(rows(str(tmp_path/'z.zip')))
    assert good == [1] and [line for line, _ in bad] == [1, 1] and 'inside an archive' in bad[0][1] and 'Bad CRC-32' in bad[1][1]
    with zipfile.ZipFile(tmp_path/'a.docx', 'w') as archive:
        for name in ('[Content_Types].xml', 'word/document.xml'): archive.writestr(name, '<x/>')
    assert expand([str(tmp_path/'a.docx')]) == [str(tmp_path/'a.docx')] and _members(str(tmp_path/'a.docx')) is None
    assert 'an office document' in outcome(rows(str(tmp_path/'a.docx')))[1][0][1]
    locked = bytearray(inner.getvalue())
    for magic, place in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)): locked[locked.index(magic) + place] |= 1
    assert 'password' in outcome(rows(write(tmp_path/'locked.zip', bytes(locked))))[1][0][1]


def test_a_whole_folder_is_read_and_adds_up(tmp_path):
    for number, (name, data, _, _) in enumerate(BROKEN.values()): write(tmp_path/f'{number:03}'/name, data)
    whole = list(rows(str(tmp_path)))
    counts = Counter((os.path.dirname(entry.file)[-3:], type(entry)) for entry in whole)
    for number, (_, _, good, bad) in enumerate(BROKEN.values()):
        if good is not None: assert (counts[f'{number:03}', Row], counts[f'{number:03}', Refused]) == (len(good), len(bad))


def test_every_format_has_a_reader_or_a_way_out(tmp_path):
    files = [file[:2] for file in (*GOOD_FILES.values(), *BROKEN.values())]
    files += [('a', form.example) for format in formats.values() for form in format.forms]
    kinds = {_format_of(data.encode() if isinstance(data, str) else data, name) for name, data in files}
    assert kinds <= {*formats, *refusals} and set(formats) <= kinds
    assert not set(formats) & set(refusals)


@pytest.mark.parametrize(('start', 'name', 'wanted'), [
    (b'Title, abstract and more\n', 'a.txt', 'text'), (b'[1] A. N. Author\n', 'a.txt', 'text'), (b'{\\small heat}', 'a.tex', 'latex'),
    (b'{"a": 1,\n{"a": 2}', 'a', 'jsonl'), (b'{\n}', 'a.jsonl', 'json'),
    (b'\n'*5000 + b'heat', 'a', 'text'), (b'%'*9000 + b'\nheat', 'a.tex', 'latex'), (b'<p>Heat</p>', 'a.txt', 'text'),
    (b'<p>Heat</p>', 'a.xml', 'xml'), (b'@user heat', 'a.txt', 'text'), (b'# Heat', 'a', 'markdown'), (b'# Heat', 'a.txt.gz', 'text'),
    (b'id\ttext\n', 'a.log', 'csv'),
    (b'PMID- 1', 'a.txt', 'medline'), (b'heat', 'a.md.zst', 'markdown'), (b'heat', 'a.PDF', 'pdf'),
    (b'\xff\xfe[\0{\0', 'a', 'json'), (b'heat', 'a.parquet', 'text')])
def test_the_name_decides_only_what_the_content_leaves_open(start, name, wanted):
    assert _format_of(start, name) == wanted


def test_the_module_is_light_to_import():
    program = ('import sys, scilm_adapt.sources\nheavy = {"datasets", "pyarrow", "lxml", "bibtexparser", "pylatexenc", "torch", '
               '"zstandard", "charset_normalizer", "yaml"} & set(sys.modules)\nassert not heavy, heavy')
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_rows_of_a_record_number_lines_and_records(tmp_path):
    assert outcome(rows(write(tmp_path/'a.bib', '\n\n' + BIB + '\n' + BIB)))[0] == [3, 5]
    assert outcome(rows(write(tmp_path/'a.xml', f'<set>\n{JATS}\n{JATS}</set>')))[0] == [1, 2]
    assert [row.file for row in itertools.islice(rows(str(tmp_path/'a.bib')), 1)] == [str(tmp_path/'a.bib')]
