"""Put a run's numbers where the README and the site show them: `results.py outputs/quickstart quickstart`.

Copies metrics.json and the before-and-after figure to nbs/results/NAME.*, and writes the README's block of results anew. Without
arguments only the README is written, from the numbers that are there.
"""
import re
import shutil
import sys
from pathlib import Path

from scilm_adapt import report
from scilm_adapt.evaluate import VERDICTS, finding
from scilm_adapt.files import read_json, write_json, write_text
from scilm_adapt.intervals import signed_interval

ROOT = Path(__file__).parents[2]
RESULTS = ROOT/'nbs'/'results'
BLOCK = re.compile(r'(<!-- results: [^>]*-->\n).*(<!-- /results -->)', re.DOTALL)


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


def readme_block() -> str:
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


def readme(text: str) -> str:
    "The README's text with the block of results as it should be."
    return BLOCK.sub(lambda match: f'{match[1]}\n{readme_block()}\n\n{match[2]}', text)


if __name__ == '__main__':
    if len(sys.argv) > 1: adopt(*sys.argv[1:])
    write_text(ROOT/'README.md', readme((ROOT/'README.md').read_text(encoding='utf-8')))
