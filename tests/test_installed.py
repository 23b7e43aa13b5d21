"""The documentation on this machine as records: prose only, nothing twice, nothing imported."""
import itertools
import subprocess
import sys

import pytest

from scilm_adapt.duplicates import fingerprint
from scilm_adapt.files import cache_folder
from scilm_adapt.installed import _docs_record, _docstrings, _paragraphs, installed_docs
from scilm_adapt.papers import split


def test_the_installed_documentation_holds_nothing_twice():
    science, general = installed_docs('science'), installed_docs('general')
    assert len(science) > 3000 and len(general) > 3000
    ids = [record['id'] for record in science + general]
    assert len(ids) == len(set(ids))
    lines = [line for record in science + general for line in record['text'].split('\n')]
    assert len(lines) == len(set(lines))
    assert all(record['title'] and len(record['text'].split()) >= 12 for record in science + general)


def test_what_is_held_out_of_the_installed_documentation_is_read_nowhere_else():
    parts = {(side, name): part for side in ('science', 'general')
             for name, part in split(installed_docs(side)).items()}
    assert all(len(part) > 100 for part in parts.values())
    lines = {where: {fingerprint(line) for record in part for line in record['text'].split('\n')} for where, part in parts.items()}
    for held_out in itertools.product(('science', 'general'), ('valid', 'test')):
        for other in parts:
            if other == held_out: continue
            shared = lines[held_out] & lines[other]
            assert len(shared) <= 0.01*len(lines[held_out]), (held_out, other, len(shared))  # only by another layout of the same words


def test_the_harvest_does_not_import_what_it_reads():
    script = ('import sys; from scilm_adapt.installed import source_files, docs_records\n'
              'files = source_files("networkx"); found = [r for f in files[:40] for r in docs_records(*f)]\n'
              'assert found and not {"networkx", "torch", "scipy"} & set(sys.modules), set(sys.modules)')
    subprocess.run([sys.executable, '-c', script], check=True)


def test_docstrings_of_everything_that_can_have_one(tmp_path):
    path = tmp_path/'m.py'
    path.write_text('"""Module."""\nclass A:\n    """Class."""\n    async def f(self):\n        """Method."""\n'
                    'if True:\n    def g():\n        """Function."""\n        def h():\n            """Inner."""\n', encoding='utf-8')
    assert dict(_docstrings('m', str(path))) == {'m': 'Module.', 'm.A': 'Class.', 'm.A.f': 'Method.', 'm.g': 'Function.',
                                                'm.g.h': 'Inner.'}
    path.write_text('def broken(:\n')
    assert _docstrings('m', str(path)) == []
    path.write_bytes('"""Wärme"""'.encode('latin-1'))
    assert _docstrings('m', str(path)) == []


PROSE = 'The transform turns a differential equation into one that is easier to solve by hand.'


@pytest.mark.parametrize(('docstring', 'wanted'), [
    (f'Transform a function.\n\n{PROSE}\n', [PROSE]),
    (f'Transform a function.\n\n{PROSE}\n\nExamples\n--------\n{PROSE.replace("hand", "heart")}\n', [PROSE]),
    (f'Transform a function.\n\n{PROSE}\n\nReferences\n----------\n.. [1] {PROSE}\n', [PROSE]),
    ('Transform a function.\n\n    x = f(x) + 3 ** (2 * x)[0]\n', None),
    (f'Transform.\n\n{PROSE}\n', None),  # no title of three words
    ('Transform a function.\n', None),
], ids=range(6))
def test_prose_is_kept_and_code_is_not(docstring, wanted):
    record = _docs_record('name', docstring)
    assert (record and record['text'].split('\n')) == wanted


def test_markup_is_read_as_plain_words():
    found = _paragraphs('See :func:`numpy.fft.fft <fft>` and ``x``, `the guide <http://a.b>`_ and **more** [1]_.')
    assert found == ['See numpy.fft.fft and x, the guide and more.']


def test_a_home_that_cannot_be_written_gives_way_to_a_temporary_folder(tmp_path, monkeypatch):
    (tmp_path/'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'file'))
    assert cache_folder().name == 'scilm_adapt' and tmp_path/'file' not in cache_folder().parents
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'there'))
    assert cache_folder() == tmp_path/'there'/'scilm_adapt' and cache_folder().is_dir()
