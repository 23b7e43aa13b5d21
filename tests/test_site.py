"""The offline site: every page whole, every link alive, nothing loaded from elsewhere, usable on a phone and by keyboard."""
import json
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import which
from urllib.parse import unquote, urljoin

import pytest
import yaml
from bs4 import BeautifulSoup, Tag

ROOT = Path(__file__).parents[1]
CHROMIUM, DRIVER = next(filter(None, map(which, ('chromium', 'chromium-browser', 'google-chrome'))), None), which('chromedriver')
FLAGS = ('--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync')
WIDTHS = (390, 1440)
SCHEMES = ('light', 'dark')


@pytest.fixture(scope='session')
def site(tmp_path_factory) -> Path:
    """The site, built once."""
    out = tmp_path_factory.mktemp('site')/'docs'
    done = subprocess.run([sys.executable, 'nbs/_render/build.py', str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope='session')
def pages(site) -> dict[str, BeautifulSoup]:
    """Every page by its file name, its code without the colours: four of five tags, which no test looks at."""
    def plain(path: Path) -> str:
        return re.sub('<pre class="sourceCode.*?</pre>', lambda block: re.sub('</?span[^>]*>', '', block[0]),
                      path.read_text(encoding='utf-8'), flags=re.DOTALL)
    return {path.name: BeautifulSoup(plain(path), 'lxml') for path in sorted(site.glob('*.html'))}


@pytest.fixture(scope='session')
def anchors(pages) -> dict[str, set[str]]:
    """What a link into each page can name."""
    return {name: {tag['id'] for tag in soup.find_all(id=True)} for name, soup in pages.items()}


def sidebar_files() -> list[str]:
    contents = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    return [f for item in contents for f in (item['contents'] if isinstance(item, dict) else [item])]


def prose(tag: Tag) -> str:
    """What a reader reads: the text of a page without its code."""
    return ''.join(prose(part) if isinstance(part, Tag) else str(part) for part in tag.contents if part.name not in ('pre', 'code'))


# ---- the files ----

def test_sidebar_lists_exactly_the_notebooks(pages):
    listed, present = sidebar_files(), {p.name for p in (ROOT/'nbs').glob('*.ipynb') if p.name[0] not in '_.'}
    assert len(listed) == len(set(listed))
    assert set(listed) == present                # Quarto stops at a missing page and hides an unlisted one
    assert len(pages) == len(present)


def test_every_page_has_title_language_description_and_one_heading(pages):
    for name, soup in pages.items():
        assert soup.title.get_text(strip=True), name
        assert soup.html['lang'] == ('ru' if name.endswith('_ru.html') else 'en'), name
        assert len(soup.find('meta', attrs={'name': 'description'})['content']) > 10, name
        assert [h.get_text(strip=True) != '' for h in soup.find_all('h1')] == [True], name
        assert soup.select('header, nav, main, footer') and soup.select_one('a.skip')['href'] == '#text', name
    assert len({soup.title.get_text() for soup in pages.values()}) == len(pages)


def test_links_and_anchors_resolve(pages, anchors, site):
    broken = []
    for name, soup in pages.items():
        for link in soup.select('a[href]'):
            target, _, anchor = unquote(urljoin(name, link['href'])).partition('#')
            if not re.match(r'(https?|mailto):', target):
                there = (site/target).is_file() and (not anchor or anchor in anchors.get(target, [anchor]))
                broken += [] if there else [f'{name}: {link["href"]}']
    assert not broken


def test_search_index_points_at_real_places(pages, anchors, site):
    rows = json.loads((site/'search-index.js').read_text(encoding='utf-8').removeprefix('searchIndex = '))
    assert {row[0].partition('#')[0] for row in rows} == set(pages)
    places = [row[0].split('#') for row in rows if '#' in row[0]]
    assert not [place for place in places if place[1] not in anchors[place[0]]]


def test_pictures_exist_and_say_what_they_show(pages, site):
    for name, soup in pages.items():
        for image in soup.select('img'):
            assert (site/image['src']).is_file(), f'{name}: {image["src"]}'
            assert image.get('alt'), f'{name}: {image["src"]} needs `#| fig-cap: "…"` in its cell'


def test_nothing_is_loaded_from_elsewhere(pages, site):
    for name, soup in pages.items():
        loaded = [tag.get('src') or tag.get('href') for tag in soup.select('[src], link[href]')]
        assert not [url for url in loaded if re.match(r'(https?:)?//', url)], name
        assert soup.select('style, iframe, object, embed, form') == [] and len(soup.select('script')) == 1, name
    assert not re.search(r'https?://|@import|url\(', (site/'style.css').read_text() + (site/'site.js').read_text())


def test_nothing_of_the_source_format_is_left(pages):
    for name, soup in pages.items():
        left = re.findall(r'\$\$|:::|\{#\w|\{\.\w|\\begin\{|\\frac|^#+ ', prose(soup.main), re.MULTILINE)
        assert not left, name
        blocks = [block.get_text().lstrip() for block in soup.select('pre')]
        assert not [block for block in blocks if block.startswith('#|')], name
        code = ' '.join(blocks)
        assert 'nbdev.nbdev_export()' not in code and 'google.colab' not in code, f'{name} shows a hidden cell'


def test_mathematics_became_mathml(pages):
    for file in sidebar_files():
        cells = json.loads((ROOT/'nbs'/file).read_text(encoding='utf-8'))['cells']
        texts = [re.sub(r'`[^`]*`', '', ''.join(c['source'])) for c in cells if c['cell_type'] == 'markdown']    # `$$` in code is none
        formulas = sum(text.count('$$') // 2 for text in texts)
        page = pages[re.sub(r'^\d+_', '', file).replace('.ipynb', '.html')]
        assert len(page.select('math[display=block]')) >= formulas, file
    assert any(soup.select('math') for soup in pages.values())


# ---- the browser ----

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


@pytest.fixture(scope='module')
def address(site):
    """The site served on this machine."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    """A Chromium of its own, without a network, that keeps the console's messages."""
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1',
                 f'--user-data-dir={tmp_path_factory.mktemp("chromium")}']:
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def resize(browser, width: int) -> None:
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)


def chromium(test):
    """Mark a test that needs a browser; it is skipped, with the reason shown, where there is none."""
    absent = not (CHROMIUM and DRIVER)
    return pytest.mark.browser(pytest.mark.skipif(absent, reason='needs chromium and chromedriver on the PATH')(test))


def dress(browser, scheme: str) -> None:
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': [{'name': 'prefers-color-scheme', 'value': scheme}]})


@pytest.fixture(scope='module')
def visits(browser, address, pages) -> dict[tuple[str, int], dict]:
    """What a browser finds on each page, opened once and seen at each width and in light and in dark colours."""
    found = {}
    for name in pages:
        for width in WIDTHS:
            resize(browser, width)
            if width == WIDTHS[0]: browser.get(f'{address}/{name}')
            visit = found[name, width] = browser.execute_script(LOOK)
            visit['severe'] = [entry for entry in browser.get_log('browser') if entry['level'] == 'SEVERE']
        for scheme in SCHEMES:
            dress(browser, scheme)
            visit[scheme] = browser.execute_script(CONTRAST)
    dress(browser, '')
    return found


@chromium
@pytest.mark.parametrize('width', WIDTHS)
def test_pages_open_quietly_and_fit_the_window(visits, pages, width):
    for name, soup in pages.items():
        visit = visits[name, width]
        assert visit['width'] <= width, f'{name} scrolls sideways'
        assert visit['severe'] == [], name
        assert len(visit['formulas']) == len(soup.select('math')) and all(size > 4 for size in visit['formulas']), name
        assert visit['pictures'], name


@chromium
def test_menu_on_a_phone_opens_and_navigates(browser, address, pages):
    resize(browser, 390)
    browser.get(f'{address}/index.html')
    menu, opener = (browser.find_element('css selector', s) for s in ('.pages', '#menu summary'))
    assert not menu.is_displayed()
    opener.click()
    assert menu.is_displayed() and len(menu.find_elements('css selector', 'a')) == len(pages)
    link = menu.find_elements('css selector', 'a')[-1]
    target = link.get_attribute('href')
    link.click()
    assert browser.current_url == target
    assert not browser.find_element('css selector', '.pages').is_displayed()


@chromium
@pytest.mark.parametrize('scheme', ['http', 'file'])
def test_search_finds_a_page_by_keyboard(browser, address, site, pages, scheme):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait
    resize(browser, 1440)
    browser.get(f'{address}/index.html' if scheme == 'http' else (site/'index.html').as_uri())
    wanted = pages['runs.html'].h1.get_text(strip=True)
    browser.find_element('tag name', 'body').send_keys('/')
    browser.switch_to.active_element.send_keys(wanted)
    WebDriverWait(browser, 5).until(lambda b: b.find_elements('css selector', '#results a'))
    hits = [hit.get_attribute('href').rpartition('/')[2] for hit in browser.find_elements('css selector', '#results a')]
    assert hits[0] == 'runs.html'
    browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN, Keys.ARROW_UP, Keys.ENTER)
    WebDriverWait(browser, 5).until(lambda b: b.current_url.endswith('/runs.html'))


@chromium
@pytest.mark.parametrize('scheme', SCHEMES)
def test_text_stands_out_from_its_ground(visits, scheme):
    """WCAG 2.2, criterion 1.4.3: a contrast of 4.5 for text."""
    looked = [visit[scheme] for visit in visits.values() if scheme in visit]
    assert looked and not {name: ratio for faint in looked for name, ratio in faint.items()}


LOOK = """
return {width: document.documentElement.scrollWidth,
        formulas: [...document.querySelectorAll('math')].map(m => m.getBoundingClientRect().height),
        pictures: [...document.images].every(i => i.complete && i.naturalWidth > 0)};
"""
CONTRAST = """
const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = colour => numbers(colour).slice(0, 3).reduce((sum, v, i) => sum + linear(v / 255) * [.2126, .7152, .0722][i], 0);
const ground = e => {
  while (e && numbers(getComputedStyle(e).backgroundColor)[3] === 0) e = e.parentElement;
  return getComputedStyle(e || document.documentElement).backgroundColor;
};
const faint = {}, words = new Set();
for (const e of document.querySelectorAll('body *')) {
  const block = e.closest('pre.sourceCode'), word = block && `${e.tagName} ${e.className} ${block.className}`;
  if (word && words.size === words.add(word).size) continue;  // words of one kind look the same in all blocks of code
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
  const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x), ratio = (a + .05) / (b + .05);
  if (ratio < 4.5) faint[e.tagName + '.' + e.className] = ratio.toFixed(2);
}
return faint;
"""
