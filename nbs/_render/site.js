// Search, copy buttons and the mark in the contents. The pages read well without any of it.
const words = document.body.dataset;
const box = document.getElementById('search'), list = document.getElementById('results');
let chosen = -1;

// ---- search: the index is a script, so that it also loads from a folder on disk ----

function loadIndex() {
  if (loadIndex.asked) return;
  loadIndex.asked = true;
  const script = document.createElement('script');
  script.src = 'search-index.js';                      // sets searchIndex: rows of [address, page, heading, text]
  script.onload = search;
  document.head.append(script);
}

// Every word of the query must occur; a hit in a page's title or a heading counts more than one in the text.
function score(row, query) {
  const [, page, heading, text] = row.map(part => part.toLowerCase());
  let total = 0;
  for (const word of query) {
    const points = (heading ? heading.includes(word) && (heading.startsWith(word) ? 6 : 4) : page.includes(word) && 8)
      || (page.includes(word) && 2) || (text.includes(word) && 1);
    if (!points) return 0;
    total += points;
  }
  return (heading || page) === query.join(' ') ? total + 5 : total;
}

function snippet(text, word) {
  const at = Math.max(0, text.toLowerCase().indexOf(word)), start = at > 50 ? text.indexOf(' ', at - 50) + 1 : 0;
  const small = document.createElement('small'), mark = document.createElement('mark');
  const hit = text.toLowerCase().includes(word) ? word.length : 0;
  mark.textContent = text.slice(at, at + hit);
  small.append((start ? '…' : '') + text.slice(start, at), mark, text.slice(at + hit, at + 110).replace(/ \S*$/, ' …'));
  return small;
}

function search() {
  const query = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  const open = query.length > 0 && typeof searchIndex !== 'undefined';
  list.replaceChildren();
  list.hidden = !open;
  box.setAttribute('aria-expanded', open);
  if (!open) return choose(-1);
  const hits = searchIndex.map(row => [score(row, query), row]).filter(hit => hit[0]).sort((a, b) => b[0] - a[0]).slice(0, 12);
  hits.forEach(([, [address, page, heading, text]], i) => {
    const link = document.createElement('a');
    Object.assign(link, { href: address, id: `hit-${i}`, role: 'option', tabIndex: -1 });
    link.append(heading ? `${page} › ${heading}` : page, snippet(text.trim(), query[0]));
    list.append(link);
  });
  if (!hits.length) list.append(Object.assign(document.createElement('p'), { textContent: words.none }));
  choose(hits.length ? 0 : -1);
}

function choose(i) {
  const hits = list.querySelectorAll('a');
  chosen = hits.length ? (i + hits.length) % hits.length : -1;
  hits.forEach((hit, j) => hit.setAttribute('aria-selected', j === chosen));
  if (chosen < 0) return box.removeAttribute('aria-activedescendant');
  box.setAttribute('aria-activedescendant', hits[chosen].id);
  hits[chosen].scrollIntoView({ block: 'nearest' });
}

const close = () => { list.hidden = true; box.setAttribute('aria-expanded', false); };
box.addEventListener('focus', loadIndex);
box.addEventListener('input', search);
box.addEventListener('keydown', event => {
  if (event.key === 'ArrowDown' || event.key === 'ArrowUp') { event.preventDefault(); choose(chosen + (event.key === 'ArrowDown' ? 1 : -1)); }
  if (event.key === 'Enter' && chosen >= 0 && !list.hidden) { list.querySelectorAll('a')[chosen].click(); close(); }
  if (event.key === 'Escape') close();
});
document.addEventListener('keydown', event => {
  if (event.key === '/' && !event.target.matches('input')) { event.preventDefault(); box.focus(); }
});
document.addEventListener('click', event => { if (!event.target.closest('.search') || event.target.closest('#results a')) close(); });

// ---- a copy button on every block of code ----

for (const block of document.querySelectorAll('div.sourceCode')) {
  const button = Object.assign(document.createElement('button'), { type: 'button', className: 'copy', textContent: words.copy });
  button.addEventListener('click', async () => {
    await navigator.clipboard.writeText(block.querySelector('code').innerText);
    button.textContent = words.copied;
    setTimeout(() => { button.textContent = words.copy; }, 1500);
  });
  block.append(button);
}

// ---- the section one is reading, marked in the contents ----

const entries = new Map([...document.querySelectorAll('.contents a')].map(a => [a.hash.slice(1), a]));
const reading = () => {
  const passed = [...entries.keys()].filter(id => document.getElementById(decodeURIComponent(id)).getBoundingClientRect().top < 120);
  entries.forEach((a, id) => id === passed.at(-1) ? a.setAttribute('aria-current', 'true') : a.removeAttribute('aria-current'));
};
if (entries.size) { addEventListener('scroll', reading, { passive: true }); reading(); }
