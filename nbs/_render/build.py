"""Render the notebooks to a static site without Quarto: `python nbs/_render/build.py [folder]` (default: `_docs`).

nbdev turns nbs/*.ipynb into _proc/*.ipynb, the same files Quarto would get; pandoc, which Quarto is made of, turns each
into HTML. Pages, order and sections come from `_quarto.yml`, addresses from settings.ini. The result needs no network:
mathematics is MathML, pictures are files, and the search index is a script that also loads from a folder on disk.
"""
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pypandoc
import yaml
from bs4 import BeautifulSoup
from cells import Page, cell_markdown, read_page
from jinja2 import Environment, FileSystemLoader, Template
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

HERE = Path(__file__).parent


def read_sidebar(config: dict, folder: Path) -> list[tuple[str, list[Page]]]:
    """The sections of `_quarto.yml` with their pages, in order; a page that is not there yet is named and left out."""
    sections = []
    for item in config['website']['sidebar']['contents']:
        name, files = (item['section'], item['contents']) if isinstance(item, dict) else ('', [item])
        for missing in [f for f in files if not (folder/f).exists()]:
            print(f'_quarto.yml lists {missing}, which is not in nbs/', file=sys.stderr)
        sections.append((name, [read_page(folder/f) for f in files if (folder/f).exists()]))
    return sections


def pandoc(markdown: str) -> str:
    """Markdown to an HTML fragment; a formula that pandoc cannot read stops the build."""
    command = [pypandoc.get_pandoc_path(), '--from=markdown+autolink_bare_uris', '--to=html5', '--mathml', '--wrap=none',
               '--fail-if-warnings']
    done = subprocess.run(command, input=markdown, capture_output=True, text=True, encoding='utf-8')
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout


# ---- from pandoc's HTML to a page ----

def plain_code(html: str, page: Page) -> str:
    """The HTML with its code blocks as plain text, each with a number; `page.code` keeps how they look in colours.

    Four of five tags of the site are colours of code, and no step from here on looks at them."""
    def kept(found: re.Match) -> str:
        page.code.append(re.sub(r'<a href="#cb[^>]*></a>', '', found[2]))
        return f'{found[1]} data-code="{len(page.code) - 1}">{re.sub("<[^>]*>", "", found[2])}</code></pre>'
    return re.sub(r'(<pre class="sourceCode[^>]*><code[^>]*)>(.*?)</code></pre>', kept, html, flags=re.DOTALL)


def coloured_code(html: str, page: Page) -> str:
    """What `plain_code` made plain, in colours again."""
    return re.sub(r'(<code[^>]*) data-code="(\d+)">[^<]*', lambda found: f'{found[1]}>{page.code[int(found[2])]}', html)


def title_callouts(soup: BeautifulSoup) -> None:
    """Give every callout its title: the attribute, else its first heading, else its kind."""
    for box in soup.select('[class*=callout-]'):     # pandoc writes a section where a heading comes first
        kind = next(name for name in box['class'] if name.startswith('callout-'))
        heading = box.find(['h2', 'h3', 'h4'])
        words = box.get('title') or (heading.extract().get_text() if heading else kind.split('-')[1].capitalize())
        box.name, box.attrs = 'div', {'class': ['callout', kind], 'role': 'note'}
        title = soup.new_tag('p', attrs={'class': 'callout-title'})
        title.string = words
        box.insert(0, title)


def box_wide_things(soup: BeautifulSoup) -> None:
    """Let tables and formulas scroll in a box of their own, and drop what would style or script a page from inside."""
    for tag in soup.select('style, script, annotation, colgroup, a[href^="#cb"]'):
        tag.decompose()
    for table in soup.select('table'):
        table.attrs = {}
        table.wrap(soup.new_tag('div', attrs={'class': 'wide'}))
    for formula in soup.select('math[display=block]'):
        formula.wrap(soup.new_tag('span', attrs={'class': 'wide'}))


def anchors_of(soup: BeautifulSoup) -> set[str]:
    """What a link into the page can name."""
    return {tag['id'] for tag in soup.find_all(id=True)}


def name_symbols(soup: BeautifulSoup) -> None:
    """Anchors for the exported definitions, spelt as nbdev spells them in its links (runs.html#stage)."""
    anchors = anchors_of(soup)
    for mark in soup.select('span.symbol'):
        name = mark['data-name'].lower()
        if name not in anchors:
            mark.attrs = {'class': 'symbol', 'id': name}
            anchors.add(name)


def turn_links(page: Page, soup: BeautifulSoup, anchors: dict[str, set[str]], urls: dict[str, str], cfg) -> None:
    """Point links to notebooks at their pages, nbdev's absolute links back inside, other files at the repository.

    `anchors`: what each page has, by its address."""
    site = f'{cfg.doc_host}{cfg.doc_baseurl}/'
    for link in soup.select('a[href]'):
        target, hash_, anchor = link['href'].removeprefix(site).partition('#')
        if link['href'].startswith(site):        # from a name in backticks: `train` means this page's own train, if it has one
            if anchor in anchors[page.url]:
                target = page.url
            elif target in anchors and anchor not in anchors[target]:
                hash_ = anchor = ''              # its code is not shown, so the page is as near as one gets
            link['href'] = target + hash_ + anchor
        elif target in urls:
            link['href'] = urls[target] + hash_ + anchor
        elif target and (file := (cfg.nbs_path/target).resolve()).is_file() and cfg.config_path in file.parents:
            link['href'] = f'{cfg.git_url}/blob/{cfg.branch}/{file.relative_to(cfg.config_path).as_posix()}'


def place_images(soup: BeautifulSoup, page: Page, cfg) -> None:
    """Take the notebook's own pictures along. Nothing is loaded from another host: a paragraph of badges goes, for the frame
    of the page has their links, and any other picture from elsewhere becomes its alternative text."""
    for image in soup.select('img'):
        source, paragraph = image['src'], image.find_parent('p')
        if re.match('https?:', source) and paragraph and not paragraph.get_text(strip=True):
            paragraph.decompose()
        elif re.match('https?:', source):
            image.replace_with(image.get('alt', ''))
        elif source not in page.files and (cfg.nbs_path/source).is_file():
            page.files[source] = (cfg.nbs_path/source).read_bytes()


def search_entries(soup: BeautifulSoup, page: Page) -> list[list[str]]:
    """Rows of the search index, one for each section and exported definition: address, page, heading, text."""
    rows = [[page.url, page.title, '', page.description]]
    for node in soup.find_all(['h2', 'h3', 'h4', 'p', 'li', 'figcaption']):
        text = ' '.join(node.get_text(' ', strip=True).split())
        if node.name[0] == 'h':
            rows.append([f'{page.url}#{node.get("id", "")}', page.title, text, ''])
        elif not node.find_parent(['p', 'li']):
            rows[-1][3] += f' {text}'
    return rows + [[f'{page.url}#{name.lower()}', page.title, name, about] for name, about in page.symbols]


def render(page: Page, cfg) -> BeautifulSoup:
    """The text of a page as a tree that wants only its links."""
    try:
        html = pandoc('\n\n'.join(cell_markdown(page, cell) for cell in page.cells))
    except Exception as error:
        raise SystemExit(f'nbs/{page.name}: {error}') from error
    soup = BeautifulSoup(plain_code(html, page), 'html.parser')
    title_callouts(soup)
    box_wide_things(soup)
    name_symbols(soup)
    place_images(soup, page, cfg)
    return soup


def write_page(out: Path, page: Page, soup: BeautifulSoup, template: Template, **frame) -> None:
    """Put the text of a page into its frame and write it with its pictures."""
    for path, data in page.files.items():
        (out/path).parent.mkdir(parents=True, exist_ok=True)
        (out/path).write_bytes(data)
    headings = [(h.name, h['id'], h.get_text()) for h in soup.select('h2[id], h3[id]')]
    (out/page.url).write_text(template.render(page=page, body=coloured_code(str(soup), page), headings=headings, **frame), encoding='utf-8')


def write_site(out: Path, sections: list[tuple[str, list[Page]]], cfg) -> None:
    """Render every page of the sections into `out`, with the search index beside them."""
    pages = [page for _, group in sections for page in group]
    urls = {page.name: page.url for page in pages}
    with ThreadPoolExecutor() as pool:
        soups = dict(zip(urls.values(), pool.map(lambda page: render(page, cfg), pages)))
    if out.exists() and any(out.iterdir()) and not (out/'search-index.js').exists():
        raise SystemExit(f'{out} holds something else than this site: delete it, or name another folder')
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    template = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True).get_template('template.html')
    anchors = {url: anchors_of(soup) for url, soup in soups.items()}
    for page, before, after in zip(pages, [None, *pages], [*pages[1:], None]):
        turn_links(page, soups[page.url], anchors, urls, cfg)
        module = cfg.lib_path/f'{page.stem}.py'
        source = module.relative_to(cfg.config_path).as_posix() if module.exists() else ''
        write_page(out, page, soups[page.url], template, sections=sections, previous=before, next=after, source=source, cfg=cfg)
    rows = [row for page in pages for row in search_entries(soups[page.url], page)]
    (out/'search-index.js').write_text(f'searchIndex = {json.dumps(rows, ensure_ascii=False)}\n', encoding='utf-8')
    for name in ('style.css', 'site.js'):
        shutil.copy(HERE/name, out)


def main(out: str = '') -> None:
    """Process the notebooks with nbdev and write the site."""
    cfg = get_config()
    refresh_quarto_yml()
    processed = proc_nbs(n_workers=0, force=True)
    sections = read_sidebar(yaml.safe_load((processed/'_quarto.yml').read_text(encoding='utf-8')), processed)
    write_site(Path(out or cfg.doc_path), sections, cfg)
    print(f'{sum(len(group) for _, group in sections)} pages in {out or cfg.doc_path}')


if __name__ == '__main__':
    main(*sys.argv[1:])
