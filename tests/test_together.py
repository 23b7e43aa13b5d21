"""A whole run by several processes: the same to the bit as by one, killed and continued with another number of them, and bad input."""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_checkpoints import ended, forked
from test_pipeline import save_pair, scilm, write_texts
from world import BABBLE, free_port, listening, two_processes

from scilm_adapt import cli
from scilm_adapt.checkpoints import Checkpoints
from scilm_adapt.endpoint import Endpoint, text_request
from scilm_adapt.errors import InputError, Stopped
from scilm_adapt.files import write_text
from scilm_adapt.models import tiny
from scilm_adapt.processes import check_launch, check_share, launch, run_script
from scilm_adapt.running import read_parameters, shipped_notebook
from scilm_adapt.runs import Run, divided, from_first, meet, part, ranks, stage
from scilm_adapt.servers import send
from scilm_adapt.teacher import LiveTeacher, build_cache
from scilm_adapt.tokens import encode_chat, pack

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def world(tmp_path_factory) -> Path:
    "A folder with a preset of a tiny run, and in `alone` that run by one process. Two rows at once: so two processes have the same parts."
    folder = tmp_path_factory.mktemp('together')
    texts = {name: write_texts(folder/f'{name}.jsonl', name) for name in ('papers', 'tales')}
    student, teacher = save_pair(folder, 'llama', texts)
    preset = dict(student=str(student), teacher=str(teacher), papers=str(texts['papers']), general=str(texts['tales']), context=128,
                  batch_size=4, micro_batch=2, conversations=70, teacher_answers=70, documents=6, questions=2, general_share=0.0)
    preset |= {'contrast.steps': 3, 'distil.steps': 6, 'distil.probe_every': 0, 'distil.on_policy.share': 0.5,
               'distil.on_policy.max_new_tokens': 8, 'distil.warm_up': 1}
    (folder/'small.yaml').write_text(yaml.safe_dump(preset))
    run_alone(folder, 'alone')
    return folder


def run_alone(world: Path, name: str) -> None:
    "The stages of the run, in this process."
    run_script(shipped_notebook(), yaml.safe_load((world/'small.yaml').read_text()) | dict(out_dir=str(world/name)))


def until(found: Callable[[], object]) -> None:
    "Wait until `found()` gives something."
    end = time.monotonic() + 200
    while not found() and time.monotonic() < end: time.sleep(0.02)


def two_of(world: Path, *words: str) -> list[int]:
    "The numbers of two processes that do `scilm ARGUMENTS` together, as torchrun would start them; what they say is in said.0 and said.1."
    port = str(free_port())
    def each(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=port)
        os.environ.pop('MPLBACKEND', None)  # the kernel that publishes keeps figures, as a user's does
        AcceleratorState._reset_state(reset_partial_state=True)
        os.chdir(world)
        sys.stdout = sys.stderr = open(world/f'said.{rank}', 'w', buffering=1, encoding='utf-8')
        os._exit(cli.main([*words]))
    return [forked(partial(each, rank)) for rank in (0, 1)]


def test_a_run_that_is_killed_stopped_and_shared_anew_is_the_run_of_one_process(world, monkeypatch):
    run, words = world/'shared', ('run', '-f', 'small.yaml', '-o', 'shared')
    # Two processes; the second is killed when stage 1 begins. The first ends by itself, and says why.
    first, second = two_of(world, *words)
    until(lambda: [*run.glob('.unfinished/models/contrast-*')])
    os.kill(second, signal.SIGKILL)
    killed = time.monotonic()
    assert (ended(second), ended(first)) == (-signal.SIGKILL, 1)
    assert time.monotonic() - killed < 30 and 'another process of this run ended' in (world/'said.0').read_text()
    assert (run/'chats'/'manifest.json').exists() and not (run/'models'/'contrast').exists()
    # One process goes on, and is told to stop in the third step of stage 2: it finishes the fourth and writes a checkpoint.
    def due(kept: Checkpoints, done: int) -> bool:
        if done == 3 and 'distilled' in str(kept.folder): os.kill(os.getpid(), signal.SIGTERM)
        return False
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Checkpoints, 'due', due)
        run_alone(world, 'shared')
    Run(run).close()
    assert [path.name for path in run.glob('.unfinished/models/distilled-*/step-*')] == ['step-00000004']
    # Two processes go on from there, to the published notebook.
    assert [ended(child) for child in two_of(world, *words)] == [0, 0], (world/'said.0').read_text()
    said, quiet = ((world/f'said.{rank}').read_text() for rank in (0, 1))
    assert said.count('already done') >= 4 and said.count('| distilled ') == 1 and 'done in' in said and '|' not in quiet
    assert (run/'run.ipynb').exists() and not (run/'run.failed.ipynb').exists()
    notebook = json.loads((run/'run.ipynb').read_text())
    assert sum('image/png' in output.get('data', {}) for cell in notebook['cells'] for output in cell.get('outputs', [])) >= 3
    for name in ('contrast', 'distilled'):
        one, other = (load_file(world/folder/'models'/name/'model.safetensors') for folder in ('alone', 'shared'))
        assert all((one[key] == other[key]).all() for key in one), name
    for name in ('chats/answers.jsonl', 'evaluation/measured.json', 'models/base/model.safetensors'):
        assert (world/'alone'/name).read_bytes() == (run/name).read_bytes(), name
    assert len((run/'chats'/'answers.jsonl').read_text().splitlines()) > 20
    made = [{path.parent.relative_to(world/folder).as_posix(): json.loads(path.read_text()).get('key')
             for path in (world/folder).rglob('manifest.json') if not path.parent.name.startswith('.')} for folder in ('alone', 'shared')]
    assert made[0] == made[1], 'how many processes there were is in no key'


# --- what is divided, and what fails ----------------------------------------------------------------------------------------------

def cache_of(folder: Path) -> None:
    "A cache of what a teacher says about twenty conversations, in many small files."
    lm = tiny(BABBLE, 'llama', hidden=32, seed=3)
    chats = [[dict(role='user', content=BABBLE[n % 5]), dict(role='assistant', content=BABBLE[(n + 1) % 5])] for n in range(20)]
    ids, masks = zip(*(encode_chat(lm.tokenizer, chat) for chat in chats))
    packed = pack([*ids], 96, [*masks])
    build_cache(folder, LiveTeacher(lm), packed, k=4, shard=64)


def caught(action: Callable[[], object]) -> list[str]:
    "The kind of error that an action raises, and its words."
    try: action()
    except Exception as error: return [type(error).__name__, str(error)]
    return ['none', '']


def work(folder: Path, url: str) -> None:
    "What each of two processes does; it writes down what it saw."
    number, count = ranks()
    run, seen = Run(folder/'run'), dict(ranks=[number, count])
    seen['divided'] = [*divided(range(5), lambda n: [n, number, *ranks()])]
    seen['first'] = from_first(lambda: number)
    def odd(n: int) -> int:
        if n == 3: raise InputError('three is odd; give another number.')
        return n
    seen['one fails'] = caught(lambda: [*divided(range(6), odd)])
    seen['other input'] = caught(lambda: stage(run, 'corpus', dict(number=number), lambda folder: None))
    made = []
    stage(run, 'corpus', {}, lambda folder: made.append(write_text(folder/'a', str(number))))
    seen['made'] = len(made)
    cache_of(folder/'cache')
    rows, _ = send(Endpoint(url, 'm', retries=0), [text_request(f'{n}', 5) for n in range(4)], folder/'answers.jsonl')
    seen['answers'] = [row['text'] for row in rows]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if number: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # as if its disk were full
    def fill(aside: Path) -> None: [*divided(range(2), lambda n: (folder/f'part-{number}').write_bytes(bytes(2000)))]
    seen['full'] = caught(lambda: stage(run, 'tokens', {}, fill, together=True))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    meet()
    part()
    seen['threads'] = [file.read_text().strip() for file in Path('/proc/self/task').glob('*/comm')]
    (folder/f'seen.{number}').write_text(json.dumps(seen))


def test_work_is_divided_done_once_and_fails_in_all(tmp_path):
    asked = []
    def reply(body: dict) -> dict:
        asked.append(body['prompt'])
        return dict(id='1', object='text_completion', created=0, model='m', choices=[dict(index=0, text='so', finish_reason='stop',
                    logprobs=None)], usage=dict(prompt_tokens=1, completion_tokens=1, total_tokens=2))
    with listening(reply) as endpoint: two_processes(__file__, tmp_path, endpoint.url)
    first, second = (json.loads((tmp_path/f'seen.{rank}').read_text()) for rank in (0, 1))
    assert first['ranks'] == [0, 2] and second['ranks'] == [1, 2]
    assert first['divided'] == second['divided'] == [[n, n % 2, 0, 1] for n in range(5)]  # by itself, each thinks it is alone
    assert first['first'] == second['first'] == 0
    assert first['one fails'] == ['InputError', 'three is odd; give another number. (in process 1)']
    assert second['one fails'] == ['InputError', 'three is odd; give another number.']
    for seen in (first, second):
        assert seen['threads'] and not any('gloo' in name for name in seen['threads']), 'they would abort a program that ends'
        assert seen['other input'][0] == 'InputError' and 'same parameters, files and version' in seen['other input'][1]
        assert seen['answers'] == ['so']*4 and seen['full'][0] == 'InputError', seen['full']
        assert 'tokens does not fit on the disk' in seen['full'][1] and 'Free some space' in seen['full'][1]
    assert (first['made'], second['made']) == (1, 0) and sorted(asked) == ['0', '1', '2', '3'], 'nothing is asked twice'
    assert not (tmp_path/'run'/'tokens').exists() and (tmp_path/'run'/'corpus'/'a').read_text() == '0'
    cache_of(tmp_path/'alone')
    files = sorted(path.name for path in (tmp_path/'alone').iterdir())
    assert len(files) > 4 and files == sorted(path.name for path in (tmp_path/'cache').iterdir())
    assert all((tmp_path/'alone'/name).read_bytes() == (tmp_path/'cache'/name).read_bytes() for name in files)


# --- bad input --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('told', 'cards', 'line'), [
    (dict(ACCELERATE_USE_DEEPSPEED='true'), 8, "stage is 2.*set it to 3.*zero3.yaml"),
    (dict(ACCELERATE_USE_DEEPSPEED='true', ACCELERATE_DEEPSPEED_CONFIG_FILE='{folder}/two.json'), 8, "stage is 2.*set it to 3"),
    (dict(ACCELERATE_USE_DEEPSPEED='true', ACCELERATE_DEEPSPEED_CONFIG_FILE='{folder}/lost.json'), 8, 'lost.json'),
    (dict(ACCELERATE_USE_DEEPSPEED='true', ACCELERATE_DEEPSPEED_CONFIG_FILE='{folder}/away.json'), 8, 'offload is on.*none'),
    (dict(ACCELERATE_USE_DEEPSPEED='true', ACCELERATE_DEEPSPEED_ZERO_STAGE='3', ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE='cpu'), 8,
     'offload is on.*none'),
    (dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='1'), 8, 'fsdp_version is 1.*set it to 2'),
    (dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2'), 0, 'distributed_type is FSDP.*no'),
    (dict(ACCELERATE_GRADIENT_ACCUMULATION_STEPS='4'), 8, 'gradient_accumulation_steps is 4.*micro_batch'),
    (dict(ACCELERATE_USE_MEGATRON_LM='true'), 8, 'MEGATRON_LM'),
    (dict(PARALLELISM_CONFIG_TP_SIZE='2'), 8, 'use_parallelism_config.*leave it out')])
def test_a_configuration_that_a_run_cannot_follow_is_refused_by_its_line(told, cards, line, tmp_path):
    (tmp_path/'two.json').write_text('{"zero_optimization": {"stage": 2}}')
    (tmp_path/'away.json').write_text('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}')
    told = {name: value.format(folder=tmp_path) for name, value in told.items()}
    with pytest.raises(InputError, match=line): check_launch(told, cards)


def test_deepspeed_that_is_not_installed_is_said_with_the_way_to_it(monkeypatch):
    told = dict(ACCELERATE_USE_DEEPSPEED='true', ACCELERATE_DEEPSPEED_ZERO_STAGE='3')
    check_launch(dict(ACCELERATE_DEEPSPEED_CONFIG_FILE='lost.json'), 8)  # of which nothing is asked where DeepSpeed is not
    monkeypatch.setattr('scilm_adapt.processes.find_spec', lambda name: name)
    check_launch(told, 8)
    monkeypatch.setattr('scilm_adapt.processes.find_spec', lambda name: None)
    with pytest.raises(InputError, match=r'not installed; run pip install .scilm_adapt\[deepspeed\]'): check_launch(told, 8)


@pytest.mark.parametrize(('parameters', 'processes', 'shared', 'said'), [
    (dict(batch_size=2), 4, False, 'batch_size is 2, and 4 processes.*at least 4, or start at most 2'),
    ({'batch_size': 8, 'distil.batch_size': 3}, 4, False, r'distil\.batch_size is 3'),
    (dict(batch_size=8), 0, False, '--processes is 0'),
    ({'batch_size': 8, 'distil.on_policy.share': 0.5}, 2, True, r'distil\.on_policy\.share is 0\.5.*FSDP'),
    ({'batch_size': 8, 'lora_rank': 4}, 2, True, 'lora_rank is 4')])
def test_what_processes_cannot_share_is_refused_before_anything_begins(parameters, processes, shared, said):
    check_share(dict(batch_size=8, general_share=0.5) | {'contrast.replay_share': 0.1}, 8, True)
    with pytest.raises(InputError, match=said): check_share(parameters, processes, shared)


def test_more_processes_than_rows_end_with_a_sentence_and_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['run', '-p', 'batch_size', '2', '--processes', '3', '-o', 'mine']) == 2
    assert 'batch_size is 2, and 3 processes' in capsys.readouterr().err and not (tmp_path/'mine').exists()
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert cli.main(['papers', 'nothing.jsonl', '-o', 'papers']) == 2
    assert 'the work of one process, and 2 were launched' in capsys.readouterr().err


def test_what_all_processes_refuse_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_DEEPSPEED', 'true')
    done = scilm(tmp_path, 'run', '-p', 'batch_size', '2', '-o', 'mine', '--processes', '2')
    assert done.returncode == 2 and done.stderr.count("DeepSpeed's stage is 2") == 1, done.stderr
    assert 'Traceback' not in done.stderr and not (tmp_path/'mine').exists()


@pytest.mark.parametrize(('codes', 'expected'), [((0, 0), 0), ((0, 2), 2), ((1, 0), 1), ((-9, 0), 1), ((143, 0), 143)])
def test_the_exit_code_is_that_of_the_process_that_failed(codes, expected):
    program = (f'import os, sys, signal\ncode = {codes}[int(os.environ["RANK"])]\n'
               'os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)')
    assert launch([sys.executable, '-c', program], 2) == expected


def test_when_one_process_fails_the_others_do_not_outlive_it(tmp_path, monkeypatch):
    for name in ('_GRACE', '_LAST'): monkeypatch.setattr(f'scilm_adapt.processes.{name}', 1.0)
    program = ('import os, signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n'
               f'open(r"{tmp_path}/" + os.environ["RANK"], "w").write(str(os.getpid()))\n'
               'sys.exit(2) if os.environ["RANK"] == "1" else time.sleep(600)')
    assert launch([sys.executable, '-c', program], 2) == 2
    assert not psutil.pid_exists(int((tmp_path/'0').read_text()))


@pytest.mark.parametrize('name', ['ddp', 'fsdp2', 'zero3'])
def test_accelerate_reads_the_configurations(name):
    config = load_config_from_file(str(ROOT/'nbs'/'presets'/'accelerate'/f'{name}.yaml'))
    assert config.num_processes == 8 and config.distributed_type.value == dict(ddp='MULTI_GPU', fsdp2='FSDP', zero3='DEEPSPEED')[name]
    if name == 'zero3': assert config.deepspeed_config['zero_stage'] == 3 and not config.deepspeed_config['zero3_init_flag']
    if name == 'fsdp2': assert config.fsdp_config['fsdp_version'] == 2 and not config.fsdp_config['fsdp_cpu_ram_efficient_loading']


def test_the_examples_for_clusters_are_whole():
    folder = ROOT/'nbs'/'presets'/'accelerate'
    assert subprocess.run(['bash', '-n', folder/'slurm.sh'], capture_output=True).returncode == 0
    job = [*yaml.safe_load_all((folder/'kubernetes.yaml').read_text())]
    assert [part['kind'] for part in job] == ['Service', 'Job']
    asked = job[1]['spec']['template']['spec']['containers'][0]['args']
    known = read_parameters(shipped_notebook())
    for words in (asked, (folder/'slurm.sh').read_text().split()):
        assert words[words.index('-m') + 1].strip("'") == 'scilm_adapt' and words[words.index('-p') + 1] in known
        assert any(str(word).endswith('accelerate/ddp.yaml') for word in words)


if __name__ == '__main__': work(Path(sys.argv[1]), sys.argv[2])
