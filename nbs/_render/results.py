"""Put a run's numbers where the README and the site show them: `results.py outputs/quickstart quickstart`.

Copies metrics.json and the before-and-after figure to nbs/results/NAME.*, and writes the README's block of results anew. Without
arguments only the README is written, from the numbers that are there.
"""
import re
import shutil
import sys
from pathlib import Path

import pandas as pd

from scilm_adapt import report
from scilm_adapt.evaluate import VERDICTS, finding
from scilm_adapt.files import read_json, write_json, write_text
from scilm_adapt.intervals import signed_interval, told_differences

ROOT = Path(__file__).parents[2]
RESULTS = ROOT/'nbs'/'results'
BLOCK = re.compile(r'(<!-- (\w+): written by nbs/_render/results\.py -->\n).*?(<!-- /\2 -->)', re.DOTALL)

# Contrasts that a protocol asked about: what is contrasted, with which model and papers, the page, its claim's place in nbs/results, and
# what its number counts (fewer is better).
REAL, TOY, BITS, TOLD, AGAIN = 'the student', 'a toy', 'bits per byte', 'AUC of a classifier', '4-grams that stood there before'
CONTRASTS = (
    ('a paper in view of others, as it is read', f'{REAL}, documentation', 'view', ('view-docs', 'claims', 'in view'), BITS),
    ('the same', f'{REAL}, abstracts', 'view', ('view-arxiv', 'claims', 'in view'), BITS),
    ('the same, of papers that are related', f'{REAL} as it was first, abstracts', 'chains', ('chains', 'claim'), BITS),
    ('which paper helps to write this one: a finder', f'{REAL}, documentation', 'finding', ('finding', 'claims', 'finder'), BITS),
    ('the same, and whether learning from gains is it', f'{REAL}, documentation', 'finding', ('finding', 'claims', 'learnt'), BITS),
    ('which draft goes on like a paper: a judge', f'{REAL}, abstracts', 'writing', ('writing', 'claims', 'best by judge'), TOLD),
    ('words likelier after stage 1 than before it: contrastive decoding', f'{REAL}, abstracts', 'writing',
     ('writing', 'claims', 'contrastive decoding'), TOLD),
    ('places with the same next word', f'{TOY}, abstracts', 'contrasts', ('contrasts', 'claims', 'next token 0.1'), BITS),
    ('the right word and words said before', f'{TOY}, abstracts', 'contrasts', ('contrasts', 'claims', 'contrastive token'), AGAIN),
    ('every word said before: unlikelihood', f'{TOY}, abstracts', 'contrasts', ('contrasts', 'claims', 'unlikelihood'), AGAIN),
    ('rounds of a repeated sentence: DITTO', f'{TOY}, abstracts', 'contrasts', ('contrasts', 'claims', 'DITTO'), AGAIN),
    ('general text that a scout forgot most, replayed', f'{TOY}, abstracts', 'contrasts',
     ('contrasts', 'second', 'claims', 'chosen replay'), BITS))


def adopt(run_folder: str, name: str) -> None:
    "Copy what is shown of a run to nbs/results."
    RESULTS.mkdir(exist_ok=True)
    metrics = read_json(Path(run_folder)/'metrics.json')
    config = {key: Path(value).name if key in ('papers', 'general') else value for key, value in metrics['config'].items()}
    write_json(RESULTS/f'{name}.json', metrics | dict(config=config))
    shutil.copy(Path(run_folder)/'figures'/'before-after.png', RESULTS/f'{name}.png')


def beside_the_teacher(metrics: dict) -> list[str]:
    "What a run's result reads and answers better or worse than its teacher, a sentence each; the teacher's distance from itself is none."
    return [finding(metrics, one) for one in metrics['differences']
            if (one['model'], one['against']) == ('distilled', 'teacher') and one['metric'] not in ('teacher_kl', 'agreement')]


def itself() -> list[str]:
    "What the plainest form of the claim came to, a model that is student and teacher, and what its control says of it."
    metrics = read_json(RESULTS/'itself.json')
    science = next(found for found in metrics['differences'] if found['against'] == 'control' and found['metric'] == 'science_bpb')
    return [
        f"The plainest form of the claim is [a model that is its own teacher](nbs/itself.ipynb): SmolLM2-135M-Instruct reads the papers "
        f"(seed {metrics['config']['seed']}, {metrics['config']['steps']} steps) and is then taught by itself as it was before.",
        report.promises(metrics).to_markdown(index=False),
        'Part of that science is the repair of a file that is rounded to four bits, and papers that are written like the general text. '
        f"Against a control that read as much general text instead, the result is at {signed_interval(science)} bits per byte of science: "
        f"{VERDICTS[science['verdict']]}."]


def real() -> list[str]:
    "What real papers came to with the preset for them."
    metrics = read_json(RESULTS/'real.json')
    config = metrics['config']
    read = config['contrast.steps']*config['batch_size']*config['context']*(1 - config['contrast.replay_share'])
    said = beside_the_teacher(metrics)
    if metrics['models']['distilled']['teacher_kl'] is None:
        said.append('How near the others are to the teacher is not measured: it keeps tokens of its own here, in which these papers are a '
                    'tenth shorter.')
    return [
        f"On real papers and with more time, `make real PAPERS={config['papers']}`: abstracts of arXiv in computer science, of which "
        f"stage 1 reads {read/1e6:.1f} million tokens, and {config['distil.steps']} steps of stage 2 (seed {config['seed']}; "
        f"{config['documents']} held-out texts of each kind and {config['questions']} questions; the student is the one that the package "
        f"had then, of the same size, whose tokens had been chosen for documentation alone; papers were read one by one, and stage 2 "
        f"measured the distance by jsd).",
        report.table(metrics).to_markdown(), report.promises(metrics).to_markdown(index=False), ' '.join(said)]


def results_block() -> str:
    "The results as the README shows them: the table and the figure of the quickstart, and what was promised."
    metrics = read_json(RESULTS/'quickstart.json')
    return '\n\n'.join([
        f"What `make run` gives (seed {metrics['config']['seed']}, {metrics['machine']['cores']} processor cores, "
        f"torch {metrics['versions']['torch']}):",
        report.table(metrics).to_markdown(), report.table_note(metrics),
        '![Before and after, for each kind of text, with intervals](nbs/results/quickstart.png)',
        report.promises(metrics).to_markdown(index=False), ' '.join(beside_the_teacher(metrics)), *real(), *itself(),
        'The first three test questions and the first three general ones, which nobody has picked, and what each model says:',
        report.side_by_side(metrics)])


def contrasts_block() -> str:
    "What came out of the contrasts that a protocol asked about, a row each."
    rows = []
    for what, of, page, (name, *keys), number in CONTRASTS:
        about = read_json(RESULTS/f'{name}.json')
        for key in keys: about = about[key]
        rows.append({'contrast': f'[{what}](nbs/{page}.ipynb)', 'of': of, 'number': number,
                     'difference from what could take its credit (fewer is better)': told_differences(about),
                     'verdict': about['verdict']})
    return pd.DataFrame(rows).to_markdown(index=False)


BLOCKS = dict(results=results_block, contrasts=contrasts_block)


def readme(text: str) -> str:
    "The README's text with its blocks as they should be."
    return BLOCK.sub(lambda match: f'{match[1]}\n{BLOCKS[match[2]]()}\n\n{match[3]}', text)


if __name__ == '__main__':
    if len(sys.argv) > 1: adopt(*sys.argv[1:])
    write_text(ROOT/'README.md', readme((ROOT/'README.md').read_text(encoding='utf-8')))
