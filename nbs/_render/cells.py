"""Notebooks that nbdev has processed, as pandoc's markdown: prose as it is, code in fences, outputs with their captions."""
import ast
import base64
import json
import re
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import yaml


@dataclass
class Page:
    """One notebook on its way to one HTML file."""
    name: str                   # file name of the notebook, e.g. 02_runs.ipynb
    cells: list                 # what nbdev left of its cells
    url: str                    # file name of the page; nbdev drops the number: runs.html
    title: str
    description: str
    lang: str                   # ru for *_ru.ipynb, else en
    files: dict = field(default_factory=dict)    # pictures: path below the site -> bytes
    code: list = field(default_factory=list)     # its code blocks in colours, as HTML
    symbols: list = field(default_factory=list)  # exported definitions: (name, first line of the docstring)

    @property
    def stem(self) -> str:
        """Name of the page without its suffix; for a stage, the name of its module."""
        return Path(self.url).stem


def read_page(path: Path) -> Page:
    """Read a processed notebook; its first cell is the YAML that nbdev made of the title cell."""
    front, *cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    about = yaml.safe_load(''.join(front['source']).strip().strip('-')) if front['cell_type'] == 'raw' else {}
    if not about.get('title'):
        raise SystemExit(f'nbs/{path.name}: the first cell must be markdown, "# Title" and "> one line about it"')
    lang = 'ru' if path.stem.endswith('_ru') else 'en'
    return Page(path.name, cells, about['output-file'], str(about['title']), str(about.get('description', '')), lang)


def fence(text: str, attributes: str) -> str:
    """A fenced block that nothing inside `text` can close."""
    ticks = '`' * max([2, *map(len, re.findall('`+', text))]) + '`'
    return f'{ticks}{{{attributes}}}\n{text}\n{ticks}\n'


def split_directives(source: str) -> tuple[dict, str]:
    """Separate the `#| key: value` lines at the head of a code cell from its code."""
    lines = source.splitlines()
    count = next((i for i, line in enumerate(lines) if not line.startswith('#|')), len(lines))
    options = yaml.safe_load('\n'.join(line[2:].strip() for line in lines[:count]))
    return options or {}, '\n'.join(lines[count:]).strip('\n')


def definitions(code: str) -> list[tuple[str, str]]:
    """Functions, classes and public methods of a cell, with the first line of what they say about themselves."""
    functions, found = (ast.FunctionDef, ast.AsyncFunctionDef), []
    for node in ast.parse(code).body:
        if isinstance(node, (*functions, ast.ClassDef)):
            methods = [n for n in node.body if isinstance(n, functions) and n.name[0] != '_'] if hasattr(node, 'bases') else []
            named = [(node.name, node), *((f'{node.name}.{n.name}', n) for n in methods)]
            found += [(name, (ast.get_docstring(n) or '').split('\n')[0]) for name, n in named]
    return found


def figure(page: Page, data: str, suffix: str, output: dict, options: dict) -> str:
    """Put a picture beside the page and show it with the cell's caption, which is its alternative text too."""
    raw = base64.b64decode(data) if suffix == 'png' else data.encode()
    path = f'{page.stem}_files/figure-{len(page.files) + 1}.{suffix}'
    page.files[path] = raw
    width = output.get('metadata', {}).get('image/png', {}).get('width')     # set for pictures of double density
    if not width and suffix == 'png':
        width = int.from_bytes(raw[16:20], 'big')
    return f'![{options.get("fig-cap", "")}]({path})' + (f'{{width={width}}}' if width else '') + '\n'


def output_markdown(page: Page, output: dict, options: dict) -> str:
    """What one output of a cell looks like; what went to stderr is dropped."""
    data = {mime: ''.join(value) for mime, value in output.get('data', {}).items() if isinstance(value, (str, list))}
    if output['output_type'] == 'stream' and output['name'] == 'stdout':
        data = {'text/plain': ''.join(output['text'])}
    if output['output_type'] == 'error':
        data = {'text/plain': f"{output['ename']}: {output['evalue']}"}
    for mime, suffix in [('image/svg+xml', 'svg'), ('image/png', 'png')]:
        if mime in data:
            return figure(page, data[mime], suffix, output, options)
    if 'text/html' in data:
        return fence(f'<div class="output">{data["text/html"]}</div>', '=html')
    if 'text/markdown' in data:
        return f'::: {{.output}}\n{data["text/markdown"]}\n:::\n'
    text = data.get('text/plain', '').strip('\n')
    return fence(f'<pre class="output">{escape(text)}</pre>', '=html') if text else ''


def cell_markdown(page: Page, cell: dict) -> str:
    """One cell as markdown. `#| echo`, `#| output` and `#| include` mean what they mean to Quarto."""
    source = ''.join(cell['source'])
    if cell['cell_type'] != 'code':
        return source
    options, code = split_directives(source)
    if options.get('include') is False:
        return ''
    parts, exported = [], 'code-summary' in options          # nbdev's mark on `#| exports` cells
    if exported:
        found = definitions(code)
        page.symbols += found
        parts.append(fence(''.join(f'<span class="symbol" data-name="{escape(name)}"></span>' for name, _ in found), '=html'))
    if code and options.get('echo') is not False:
        parts.append(fence(code, '.python .exported' if exported else '.python'))
    if options.get('output') is not False:
        parts += [output_markdown(page, output, options) for output in cell.get('outputs', [])]
    return '\n'.join(parts)
