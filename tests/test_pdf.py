"""PDFs of known text are read word for word in every layout; what is no paper is refused by its reason; nothing takes the run down."""
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pikepdf
import psutil
import pytest
from PIL import Image

from scilm_adapt import cli, pdf
from scilm_adapt.errors import InputError
from scilm_adapt.markup import articles
from scilm_adapt.papers import document
from scilm_adapt.pdf import Contents, Grobid, Limits, NoPaper, Readers, draw_page, drawn, fields_of, read_pdf
from scilm_adapt.reading import Refused, Row, opened
from scilm_adapt.sources import _format_of, rows

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'nbs'/'_pdf'))
import samples  # noqa: E402, which lies beside the notebooks

HEAT = 'Heat flows from warm bodies to cold ones, and never by itself the other way, as everyone knows who has waited.'


def save(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


@pytest.fixture(scope='session')
def folder(tmp_path_factory) -> Path:
    "A folder with one paper in each layout."
    folder = tmp_path_factory.mktemp('pdfs')
    for name in samples.layouts: save(folder/f'{name}.pdf', samples.make(name)[0])
    return folder


@pytest.fixture(scope='session')
def found(folder) -> dict[str, Contents]: return {name: read_pdf(folder/f'{name}.pdf') for name in samples.layouts}


# --- what is read -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', samples.layouts)
def test_a_layout_is_read_as_its_source_has_it(name, found):
    truth, fields = samples.make(name)[1], fields_of(found[name].paper)
    text = document(fields)
    assert (fields['title'], fields['text'], fields['id']) == (truth.title, truth.abstract, truth.id)
    assert samples.score(text, truth.text) >= 0.99
    assert [section['title'] for section in fields['sections']] == [head for head, _ in truth.sections]
    assert [word.lower() for word in fields['keywords']] == truth.keywords
    assert not [words for words in truth.absent if words.lower() in text.lower()] and not found[name].failed


@pytest.mark.parametrize('name', ['conference', 'journal', 'russian', 'spaced'])
def test_other_papers_in_the_same_layouts_too(name, tmp_path):
    for seed in (1, 4):
        data, truth = samples.make(name, seed)
        fields = fields_of(read_pdf(save(tmp_path/'a.pdf', data)).paper)
        assert (fields['title'], fields['text']) == (truth.title, truth.abstract) and samples.score(document(fields), truth.text) >= 0.99


def test_the_score_counts_what_is_missing_out_of_order_and_too_much():
    truth = 'one two three four five six seven eight nine ten'
    assert samples.score(truth, truth) == 1 and samples.score('', truth) == 0
    assert samples.score(truth.replace('two ', ''), truth) == pytest.approx(0.9)
    assert samples.score(truth + ' eleven', truth) == pytest.approx(0.9)
    assert samples.score('six seven eight nine ten one two three four five', truth) < 0.5


@pytest.mark.parametrize('turn', ['a viewer is told to turn it', 90, 180, 270, 'its corner is elsewhere'])
def test_a_page_is_read_upright_however_it_lies(turn, tmp_path):
    matrix = {90: [0, 1, -1, 0, 612, 0], 180: [-1, 0, 0, -1, 612, 792], 270: [0, -1, 1, 0, 0, 792]}.get(turn, [1, 0, 0, 1, 100, 100])
    def lay(document_):
        for page in document_.pages:
            if turn == 'a viewer is told to turn it': page.Rotate = 90; continue
            page.contents_add(f"q {' '.join(map(str, matrix))} cm".encode(), prepend=True)
            page.contents_add(b'Q')
            page.MediaBox = [0, 0, 792, 612] if turn in (90, 270) else [100, 100, 712, 892] if turn != 180 else page.MediaBox
    if turn in (90, 270): matrix[4:] = [792, 0] if turn == 90 else [0, 612]
    data, truth = samples.make('preprint')
    found = read_pdf(save(tmp_path/'a.pdf', changed(data, lay)))
    assert samples.score(document(fields_of(found.paper)), truth.text) > 0.99 and found.paper.id == truth.id
    assert draw_page(tmp_path/'a.pdf', 1, found).axes


# --- what is not ------------------------------------------------------------------------------------------------------------------

def image_only(pages: int = 2) -> bytes:
    "A scan: images of text, and no text."
    memory = io.BytesIO()
    images = [Image.fromarray((np.random.default_rng(n).random((200, 150))*255).astype('uint8')) for n in range(pages)]
    images[0].save(memory, 'PDF', save_all=True, append_images=images[1:])
    return memory.getvalue()


def changed(data: bytes, change=lambda document_: None, **options) -> bytes:
    "A PDF after `change`, saved with options."
    memory = io.BytesIO()
    with pikepdf.open(io.BytesIO(data)) as document_:
        change(document_)
        document_.save(memory, **options)
    return memory.getvalue()


def many(data: bytes, times: int) -> bytes:
    def repeat(document_):
        for _ in range(times - 1): document_.pages.append(document_.pages[0])
    return changed(data, repeat)


def with_form(document_) -> None:
    fields = [document_.make_indirect(pikepdf.Dictionary(Type=pikepdf.Name.Annot, Subtype=pikepdf.Name.Widget, FT=pikepdf.Name.Tx,
                                                         T=f'f{n}', Rect=[50, 50 + 20*n, 200, 65 + 20*n])) for n in range(9)]
    document_.Root.AcroForm = pikepdf.Dictionary(Fields=fields)
    document_.pages[0].Annots = document_.make_indirect(pikepdf.Array(fields))


def coded(document_) -> None:
    "Letters of a private area, as a font without a table of letters gives them."
    table = '\n'.join(f'<{code:02x}> <{0xE000 + code:04x}>' for code in range(32, 127))
    cmap = ('/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /X def /CMapType 2 def 1 begincodespacerange <00> <ff> '
            f'endcodespacerange 95 beginbfchar\n{table}\nendbfchar endcmap end end')
    for font in document_.pages[0].Resources.Font.values(): font.ToUnicode = document_.make_stream(cmap.encode())


TEXT = drawn((90, 60, 18, 'On heat'), *((90, 100 + 12*n, 10, HEAT) for n in range(9)))
NO_PAPER = {
    'encrypted': changed(TEXT, encryption=pikepdf.Encryption(user='secret', owner='more', R=6)), 'damaged': TEXT[:200],
    'scanned': image_only(), 'empty': drawn(), 'book': many(TEXT, 301), 'form': changed(TEXT, with_form), 'coded': changed(TEXT, coded),
    'slides': many(drawn((50, 80, 30, 'On heat'), (50, 200, 24, 'It flows from warm bodies to cold ones'),
                         (50, 240, 24, 'and never back again'), width=960, height=540), 8),
    'nothing': drawn(*((90 + 60*(n % 7), 100 + 12*(n//7), 10, f'{n*n*7}.{n}') for n in range(140)))}


@pytest.mark.parametrize('name', NO_PAPER)
def test_what_is_no_paper_is_refused_by_its_reason(name, tmp_path):
    with pytest.raises(NoPaper) as told: read_pdf(save(tmp_path/'a.pdf', NO_PAPER[name]))
    assert str(told.value).startswith(pdf.reasons[name].partition('{')[0]), told.value


def test_a_pdf_that_opens_without_a_password_is_read(tmp_path):
    locked = changed(samples.make('letter')[0], encryption=pikepdf.Encryption(user='', owner='more', R=4))
    assert read_pdf(save(tmp_path/'a.pdf', locked)).paper.title == samples.make('letter')[1].title


def test_the_text_behind_a_scanned_page_is_read(tmp_path):
    def hide(document_):
        stream = document_.pages[0].Contents
        stream.write(stream.read_bytes().replace(b'BT ', b'BT 3 Tr '))
    assert read_pdf(save(tmp_path/'a.pdf', changed(TEXT, hide))).paper.sections or pytest.fail()


def test_a_page_that_fails_does_not_lose_the_others(tmp_path):
    data = changed(samples.make('preprint')[0], lambda document_: document_.pages.__setitem__(1, document_.pages[2]))
    assert read_pdf(save(tmp_path/'a.pdf', data)).pages == 5
    skipped = read_pdf(tmp_path/'a.pdf', skip=[2])
    assert skipped.paper.title == samples.make('preprint')[1].title and len(skipped.sizes) == 4


def test_a_file_is_told_by_its_first_bytes_or_its_name():
    assert _format_of(b'%PDF-1.5', 'a.txt') == _format_of(b'\r\nX-Mail: 1\n%PDF-1.7\n', 'a') == _format_of(b'\0\1\2'*50, 'a.PDF') == 'pdf'
    assert _format_of(b'{"text": "%PDF-1.4"}\n', 'a.jsonl') == 'jsonl' and _format_of(b'\0\1\2'*50, 'a.bin') == 'binary'


def test_a_missing_library_names_its_extra_and_costs_no_other_file(tmp_path, monkeypatch):
    save(tmp_path/'a.pdf', TEXT)
    save(tmp_path/'b.jsonl', b'{"title": "On heat", "abstract": "Heat flows."}')
    monkeypatch.setitem(sys.modules, 'pypdfium2', None)
    with Readers() as readers: refused, = readers.read(opened('a.pdf', io.BytesIO(TEXT), 'utf-8', str(tmp_path/'a.pdf')))
    assert "pip install 'scilm_adapt[pdf]'" in refused.reason and list(rows(str(tmp_path/'b.jsonl')))[0].fields['title'] == 'On heat'
    with pytest.raises(InputError, match=r'scilm_adapt\[pdf\]'): draw_page(tmp_path/'a.pdf')


def test_within_archives_and_packed_too(tmp_path):
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as archive: archive.writestr('a/b.pdf', samples.make('letter')[0])
    entry, = rows(str(tmp_path/'z.zip'))
    assert entry.fields['title'] == samples.make('letter')[1].title and entry.file.endswith('z.zip/a/b.pdf')


# --- workers ----------------------------------------------------------------------------------------------------------------------

def ask(readers: Readers, path: str) -> list[Row | Refused]: return list(readers.read(opened(path, open(path, 'rb'), 'utf-8', path)))


def heavy(seconds: int = 60) -> bytes:
    "A page that takes long: a very long stream of letters."
    writing = zlib.compress(b'BT /F1 10 Tf 90 700 Td ' + b'(heat flows) Tj 0 -1 Td '*(50_000*seconds) + b'ET')
    def fill(document_):
        document_.pages[0].Contents = document_.make_stream(b'')
        document_.pages[0].Contents.write(writing, filter=pikepdf.Name.FlateDecode)
    return changed(TEXT, fill)


def test_a_file_over_its_time_is_given_up_and_the_others_go_on(tmp_path):
    slow, good = save(tmp_path/'a.pdf', heavy()), save(tmp_path/'b.pdf', TEXT)
    with Readers(limits=Limits(seconds=1.5)) as readers:
        readers.begin(slow), readers.begin(good)
        start = time.monotonic()
        refused, = ask(readers, slow)
        assert 'takes more than 1.5 seconds (at page 1)' in refused.reason and time.monotonic() - start < 5
        assert ask(readers, good)[0].fields['title'] == 'On heat'


def bomb(megabytes: int = 600) -> bytes:
    "A page of blanks, packed to a hundredth."
    packer = zlib.compressobj(1)
    packed = b''.join(packer.compress(b' '*1_000_000) for _ in range(megabytes)) + packer.flush()
    def fill(document_):
        document_.pages[0].Contents = document_.make_stream(b'')
        document_.pages[0].Contents.write(packed, filter=pikepdf.Name.FlateDecode)
    return changed(TEXT, fill)


def test_a_file_over_its_memory_is_given_up_and_the_others_go_on(tmp_path):
    held = bytearray(500_000_000)  # by the process that reads papers, which is none of the worker's
    held[::4096] = b'x'*len(held[::4096])
    large, good = save(tmp_path/'a.pdf', bomb()), save(tmp_path/'b.pdf', TEXT)
    with Readers(limits=Limits(bytes=300_000_000)) as readers:
        refused, = ask(readers, large)
        assert refused.reason == 'needs more than 0.3 GB of memory; leave it out'
        assert ask(readers, good)[0].fields['title'] == 'On heat'


def crash(readers: Readers, times: int) -> threading.Thread:
    "Send the worker the signal of a crash so many times, each while it reads a page."
    def strike():
        worker, last = readers.workers[0], None
        for _ in range(times):
            while worker.process is None or worker.process.pid == last or not psutil.pid_exists(worker.process.pid): time.sleep(0.01)
            last = worker.process.pid
            while psutil.Process(last).cpu_times().user < 0.5: time.sleep(0.01)
            os.kill(last, signal.SIGSEGV)
    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    return thread


def test_a_crash_costs_a_page_and_never_the_run(tmp_path):
    good = save(tmp_path/'b.pdf', TEXT)
    long = save(tmp_path/'a.pdf', changed(heavy(), lambda document_: document_.pages.extend(pikepdf.open(good).pages)))
    with Readers() as readers:
        thread = crash(readers, 1)
        found = ask(readers, long)
        thread.join(20)
        kinds = Counter(type(entry).__name__ for entry in found)
        assert kinds['Refused'] == 1 and 'page 1 cannot be read (it crashes PDFium)' in found[-1].reason and found[-1].line == 1
        assert isinstance(found[0], Row) and 'Heat flows' in document(found[0].fields)
        assert ask(readers, good)[0].fields['title'] == 'On heat'


def test_a_reader_that_is_gone_takes_its_workers_along(tmp_path):
    path = save(tmp_path/'a.pdf', TEXT)
    program = f'''
import sys, time
from scilm_adapt.pdf import Readers
readers = Readers()
readers.begin({path!r})
readers.waiting[{path!r}].result()
print(readers.workers[0].process.pid, flush=True)
time.sleep(60)'''
    process = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.wait()
    worker.wait(10)


# --- a server ---------------------------------------------------------------------------------------------------------------------

class Answer(BaseHTTPRequestHandler):
    "GROBID as far as we ask it: TEI, late, with an error, or nothing."
    def do_POST(self):
        assert self.path == '/api/processFulltextDocument' and b'%PDF-' in self.rfile.read(int(self.headers['Content-Length']))
        self.server.asked += 1
        time.sleep(self.server.late)
        code = self.server.codes.pop(0) if self.server.codes else 200
        self.send_response(code)
        self.end_headers()
        if code == 200: self.wfile.write(self.server.tei)

    def log_message(self, *_): pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Answer)
    server.codes, server.late, server.asked, server.tei = [], 0, 0, articles['tei'].form.example.encode()
    server.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_grobid_is_asked_and_its_tei_read(server, tmp_path):
    path = save(tmp_path/'a.pdf', TEXT)
    server.codes = [503]  # busy: it is asked again
    with Readers(grobid=Grobid(server.url)) as readers: entry, = ask(readers, path)
    assert [entry.fields[name] for name in ('id', 'title', 'text')] == ['10.1/heat', 'On heat', 'Heat flows.'] and server.asked == 2


@pytest.mark.parametrize(('trouble', 'said'), [
    (dict(codes=[500]), 'answers with error 500'), (dict(late=3), 'takes more than 0.5 seconds'), (dict(tei=b''), 'found no text in it'),
    (dict(tei=b'<TEI><broken'), 'answers what cannot be read'), (dict(url='http://127.0.0.1:9'), 'does not answer')])
def test_where_grobid_fails_the_user_has_chosen(server, tmp_path, trouble, said):
    path = save(tmp_path/'a.pdf', TEXT)
    for otherwise_read in (True, False):
        for name, value in trouble.items(): setattr(server, name, value if not isinstance(value, list) else [*value])
        with Readers(grobid=Grobid(server.url, 0.5, otherwise_read)) as readers: entry, = ask(readers, path)
        if otherwise_read: assert 'Heat flows' in document(entry.fields) and said in readers.without_grobid[0]
        else: assert said in entry.reason and '; start it, or read without it' in entry.reason


def test_a_server_that_never_answers_is_asked_three_times(tmp_path):
    paths = [save(tmp_path/f'{n}.pdf', TEXT) for n in range(6)]
    with Readers(grobid=Grobid('http://127.0.0.1:9')) as readers:
        assert all(isinstance(entry, Row) for path in paths for entry in ask(readers, path))
        assert len(readers.without_grobid) == 6 and 'given up' in readers.without_grobid[-1] and 'given up' not in readers.without_grobid[2]
    with pytest.raises(InputError, match='is no address of a GROBID server'): Grobid('localhost:8070')


# --- the command ------------------------------------------------------------------------------------------------------------------

def test_a_folder_of_everything_gives_each_paper_once_and_accounts_for_all(folder, found, tmp_path, capsys):
    mixed = tmp_path/'mixed'
    mixed.mkdir()
    for name in samples.layouts: os.link(folder/f'{name}.pdf', mixed/f'{name}.pdf')
    for name, data in NO_PAPER.items(): save(mixed/f'no-{name}.pdf', data)
    truths = {name: samples.make(name)[1] for name in samples.layouts}
    bib = [f'@article{{{name}, title = {{{truths[name].title}}}, doi = {{{truths[name].id.upper()}}}, abstract = {{{HEAT}}}}}'
           for name in ('journal', 'article_info')]
    (mixed/'0 refs.bib').write_text('\n'.join(bib))  # the first by its name, and not to be kept
    (mixed/'some.jsonl').write_text('\n'.join(json.dumps(dict(id=f'x{n}', title=truth.title, abstract=truth.abstract))
                                              for n, truth in enumerate(truths.values())))
    assert cli.main(['papers', str(mixed), '-o', str(tmp_path/'out')]) == 0
    report = json.loads((tmp_path/'out'/'report.json').read_text())
    papers = len(samples.layouts)
    counts = [report['total'][name] for name in ('kept', 'duplicates', 'quarantined')]
    assert counts == [papers, papers + 2, len(NO_PAPER)]
    quarantine = [json.loads(line) for line in (tmp_path/'out'/'quarantine.jsonl').read_text().splitlines()]
    assert {Path(entry['file']).stem: entry['line'] for entry in quarantine} == {f'no-{name}': 1 for name in NO_PAPER}
    removed = Counter(json.loads(line)['reason'].partition(' of')[0] for line in (tmp_path/'out'/'removed.jsonl').read_text().splitlines())
    assert removed['same id'] == 2
    dropped = [json.loads(line)['file'] for line in (tmp_path/'out'/'removed.jsonl').read_text().splitlines()]
    assert sum(name.endswith('.bib') for name in dropped) == 2, 'of an abstract and a text with one DOI the text is kept'
    assert not list(tmp_path.glob('.out*')), 'nothing is left beside it'


def test_a_call_that_was_killed_goes_on_where_it_was(folder, tmp_path):
    command = [sys.executable, '-m', 'scilm_adapt.cli', 'papers', str(folder), '-o', 'out']
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kept = tmp_path/'.out.reading'/'read.jsonl'
    while process.poll() is None and not (kept.exists() and kept.read_bytes().count(b'\n') > 2): time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path/'out').exists()
    with open(kept, 'a') as file: file.write('{"key": "cut off')
    before = kept.read_bytes().count(b'\n')
    marks = {json.loads(line)['key']: line for line in kept.read_text().splitlines()[:before]}
    kept.write_text('\n'.join(line.replace('Efficient', 'KEPT Efficient') for line in marks.values()) + '\n{"key": "cut')
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from scilm_adapt.papers import open_papers
    titles = [record['title'] for part in open_papers(tmp_path/'out').values() for record in part]
    assert sum('KEPT' in title for title in titles) >= 1, 'what was kept was not read again'
    assert not kept.parent.exists()


def test_the_picture_shows_what_was_read(folder, found, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['papers', str(folder/'conference.pdf'), '--show']) == 0
    with Image.open('conference.page1.png') as image:
        pixels = np.asarray(image.convert('RGB')).reshape(-1, 3).astype(int)
    tinted = {name: ((pixels - colour)**2).sum(1).min() for name, colour in dict(
        blue=(199, 221, 237), green=(202, 231, 202), orange=(255, 223, 195)).items()}
    assert max(tinted.values()) < 60, tinted  # title, abstract and body have their colours
    assert cli.main(['papers', str(folder/'conference.pdf'), '--show', '2']) == 0 and Path('conference.page2.png').exists()
    assert cli.main(['papers', str(folder/'conference.pdf'), '--show', '9']) == 2 and 'has 3 pages' in capsys.readouterr().err
    Path('mine.png').write_bytes(b'mine')
    assert cli.main(['papers', str(folder/'conference.pdf'), '--show', '-o', 'mine.png']) == 2 and Path('mine.png').read_bytes() == b'mine'
    assert cli.main(['papers', str(save(tmp_path/'no.pdf', NO_PAPER['scanned'])), '--show']) == 2
    assert 'scanned' in capsys.readouterr().err
