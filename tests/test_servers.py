"""Several servers behind one queue, real processes that are killed in the middle: nothing is lost, nothing answered is asked again."""
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from scilm_adapt import cli
from scilm_adapt.endpoint import Budget, Endpoint, chat_request, finished, limited, parse_endpoint
from scilm_adapt.errors import InputError
from scilm_adapt.remote import load_teacher
from scilm_adapt.servers import _same_model, ask, send

# A server of its own: it writes down what it is asked, and what it has answered, and answers as its mood is.
PROGRAM = '''
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
log, seconds, mood, port = sys.argv[1], float(sys.argv[2]), sys.argv[3], int(sys.argv[4])
busy = {}
class Handler(BaseHTTPRequestHandler):
    def reply(self, body, status=200, **headers):
        data = b'<html>Welcome</html>' if mood == 'html' else body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers |= {'Content-Type': 'application/json', 'Content-Length': str(len(data))}
        for name, value in headers.items(): self.send_header(name, value)
        self.end_headers()
        try: self.wfile.write(data)
        except OSError: pass
    def do_GET(self):
        if mood == 'unlisted': return self.reply({}, 404)
        self.reply(dict(object='list', data=[dict(id='m' if mood != 'renamed' else 'n', object='model')]))
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        text = asked['messages'][-1]['content']
        probe = text.startswith('Write')
        def note(what):
            if not probe:
                with open(log, 'a') as file: file.write(what + ' ' + text + '\\n')
        note('asked')
        if mood == 'locked': return self.reply(dict(error='no'), 401)
        if mood == 'long' and 'odd' in text: return self.reply(dict(error='too long'), 400)
        if mood == 'busy' and not probe and not busy.setdefault(text, 0):
            busy[text] = 1
            return self.reply(dict(error='busy'), 429, **{'Retry-After': '1'})
        if mood == 'broken' and not probe: return self.reply(dict(error='out of memory'), 500)
        if mood == 'torn' and not probe: return self.reply(b'{"choices": [{"mess')
        time.sleep(600 if mood == 'stuck' and not probe else 0 if probe else seconds)
        said = 'other' if mood == 'other' else text.upper()
        choice = dict(index=0, message=dict(role='assistant', content=said), finish_reason='stop')
        choices = [] if mood == 'empty' and not probe else [choice]
        self.reply(dict(id='1', object='chat.completion', created=0, model='m', choices=choices,
                        usage=dict(prompt_tokens=10, completion_tokens=10, total_tokens=20)))
        note('answered')
    def log_message(self, *words): pass
server = ThreadingHTTPServer(('127.0.0.1', port), Handler)
server.daemon_threads = True
print(server.server_port, flush=True)
server.serve_forever()
'''


@dataclass
class Small:
    "A server in a process of its own, and what it has written down."
    log: Path
    process: subprocess.Popen
    url: str

    def noted(self, what: str) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [text for verb, _, text in (line.partition(' ') for line in lines) if verb == what]

    def kill(self) -> None:
        self.process.kill()  # SIGKILL: it cannot say goodbye
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    "A function that starts such a server; all are ended with the test."
    servers = []
    def started(seconds: float = 0.0, mood: str = '-', port: int = 0) -> Small:
        log = tmp_path/f'server-{len(servers)}.log'
        command = [sys.executable, '-I', '-c', PROGRAM, log, str(seconds), mood, str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        servers.append(Small(log, process, f'http://127.0.0.1:{int(process.stdout.readline())}/v1'))
        return servers[-1]
    yield started
    for server in servers: server.kill()


def together(*servers: Small, **more) -> Endpoint:
    return replace(parse_endpoint(','.join(one.url for one in servers) + '#m'), **dict(retries=0, concurrency=2) | more)


def question(n: int) -> dict: return chat_request([dict(role='user', content=f'question {n}')], 8)


def questions(count: int) -> list[dict]: return [question(n) for n in range(count)]


def texts(rows: list[dict | None]) -> list[str | None]: return [row and row['text'] for row in rows]


def wanted(count: int) -> list[str]: return [f'QUESTION {n}' for n in range(count)]


def until(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.005)


def meanwhile(condition, action) -> threading.Thread:
    "Do something as soon as something is true, while the test goes on."
    thread = threading.Thread(target=lambda: (until(condition), action()), daemon=True)
    thread.start()
    return thread


# --- one is lost in the middle -----------------------------------------------------------------------------------------------------

def test_one_of_three_is_killed_in_the_middle(start, tmp_path, capsys):
    "All is answered; only what the dead server had under way is asked of another, and no answer is asked for twice."
    first, second, doomed = servers = [start(0.02), start(0.02), start(0.02)]
    killer = meanwhile(lambda: len(doomed.noted('answered')) >= 10, doomed.kill)
    rows, usage = send(together(*servers), questions(150), tmp_path/'answers.jsonl')
    killer.join()
    assert texts(rows) == wanted(150) and usage.missing == 0 and len(finished(tmp_path/'answers.jsonl')) == 150
    asked = Counter(text for one in servers for text in one.noted('asked'))
    again = {text for text, times in asked.items() if times > 1}
    assert len(asked) == 150 and asked.total() - 150 == len(again) <= 2  # concurrency 2: no more was under way at the dead one
    assert again <= set(doomed.noted('asked')) and min(len(one.noted('answered')) for one in servers) >= 10
    assert not set(first.noted('asked')) & set(second.noted('asked'))
    assert f'{doomed.url} was lost on the way: No server answers at' in capsys.readouterr().out
    rows, usage = send(together(first), questions(150), tmp_path/'answers.jsonl')  # and without the dead one nothing is asked anew
    assert texts(rows) == wanted(150) and usage.kept == 150
    assert sum(len(one.noted('asked')) for one in servers) == asked.total()


def test_one_that_comes_back_takes_part_again(start, tmp_path):
    first, doomed = start(0.03), start(0.03)
    def replaced():
        doomed.kill()
        returned.append(start(0.0, port=int(doomed.url.split(':')[-1].split('/')[0])))
    returned = []
    killer = meanwhile(lambda: len(doomed.noted('answered')) >= 5, replaced)
    rows, _ = send(together(first, doomed), questions(200))
    killer.join()
    assert texts(rows) == wanted(200) and len(returned[0].noted('answered')) > 5


def test_one_that_comes_back_with_another_model_is_not_asked(start, capsys):
    first, doomed = start(0.03), start(0.03)
    def replaced():
        doomed.kill()
        returned.append(start(0.0, 'other', port=int(doomed.url.split(':')[-1].split('/')[0])))
    returned = []
    killer = meanwhile(lambda: len(doomed.noted('answered')) >= 5, replaced)
    rows, _ = send(together(first, doomed), questions(150))
    killer.join()
    assert texts(rows) == wanted(150) and not returned[0].noted('asked')
    assert f'{doomed.url} serves another model than the other servers' in capsys.readouterr().out


CLIENT = '''
import json, sys
from dataclasses import replace
from scilm_adapt.endpoint import parse_endpoint
from scilm_adapt.servers import send
send(replace(parse_endpoint(sys.argv[1]), concurrency=2), json.loads(sys.argv[2]), sys.argv[3])
'''


def test_all_are_lost_and_the_client_too_and_the_next_call_goes_on(start, tmp_path):
    file, servers = tmp_path/'answers.jsonl', [start(0.05), start(0.05)]
    def kept(): return file.read_bytes().count(b'\n') if file.exists() else 0
    client = subprocess.Popen([sys.executable, '-c', CLIENT, ','.join(one.url for one in servers) + '#m', json.dumps(questions(80)), file],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try: until(lambda: kept() >= 8)
    finally: client.kill(); client.wait()
    time.sleep(0.2)  # what was under way is answered to nobody
    before, held = sum(len(one.noted('asked')) for one in servers), set(finished(file))
    assert 8 <= len(held) < 80 and before <= len(held) + 4
    killer = meanwhile(lambda: kept() >= len(held) + 10, lambda: [one.kill() for one in servers])
    said = r'No server answers at http.*None of the 2 servers is left. \d+ of \d+ were answered and are kept; the next'
    with pytest.raises(InputError, match=said):
        send(together(*servers), questions(80), file)
    killer.join()
    asked, held = Counter(text for one in servers for text in one.noted('asked')), finished(file)
    successor = start()  # at another port
    rows, usage = send(together(successor), questions(80), file)
    assert texts(rows) == wanted(80) and usage.kept == len(held) and len(successor.noted('asked')) == 80 - len(held)
    answered = {row['text'].lower() for row in held.values()}
    assert not answered & set(successor.noted('asked')) and max(asked.values()) <= 2


# --- what a server does wrong ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('mood', 'said'), [
    ('stuck', 'time limit of 0.3 s'), ('empty', 'none of the OpenAI protocol'), ('torn', 'none of the OpenAI protocol'),
    ('broken', 'out of memory'), ('locked', None)])
def test_a_server_that_goes_wrong_is_dismissed_and_the_others_answer(start, mood, said, capsys):
    good, bad = start(0.05), start(0.0, mood)
    endpoint = together(good, bad, timeout=0.3)
    if said is None:  # wrong for every question: said before the work begins
        with pytest.raises(InputError, match=f'{bad.url} refuses the key.*OPENAI_API_KEY'): send(endpoint, questions(40))
        return
    rows, usage = send(endpoint, questions(60))
    assert texts(rows) == wanted(60) and usage.missing == 0
    assert len(bad.noted('asked')) <= 8 + 2 and len(good.noted('asked')) == 60
    told = capsys.readouterr().out
    assert f'{bad.url} was lost on the way: {bad.url} came to nothing' in told and said in told and 'leave it out' in told


def test_alone_it_is_an_error_that_names_it_and_the_way_out(start, tmp_path):
    for mood, said in (('stuck', 'time limit of 0.2 s'), ('torn', 'none of the OpenAI protocol'), ('html', 'none of the OpenAI')):
        bad = start(0.0, mood)
        with pytest.raises(InputError, match=f'{bad.url} .*{said}'):
            send(together(bad, timeout=0.2, concurrency=4), questions(30), tmp_path/f'{mood}.jsonl')
        assert len(bad.noted('asked')) <= 12 and not finished(tmp_path/f'{mood}.jsonl')


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(start):
    busy, start_of = start(0.0, 'busy'), time.monotonic()
    rows, _ = send(together(busy, retries=1, concurrency=4), questions(4))
    assert texts(rows) == wanted(4) and time.monotonic() - start_of >= 1
    assert Counter(busy.noted('asked')) == {text.lower(): 2 for text in wanted(4)}


def test_a_question_that_no_server_can_answer_is_asked_once(start):
    "Its error is its own: it is not the server's, so the other server is not bothered."
    servers = [start(0.01, 'long'), start(0.01, 'long')]
    odd = chat_request([dict(role='user', content='odd')], 8)
    rows, usage = send(together(*servers), [*questions(20), odd])
    assert texts(rows) == [*wanted(20), None] and usage.missing == 1
    assert sum(one.noted('asked').count('odd') for one in servers) == 1


# --- the same model ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('mood', 'said'), [
    ('other', 'serves another model than the other servers.*greedy.*leave it out'), ('renamed', "serves no model 'm', only n"),
    ('html', 'none of the OpenAI protocol.*leave it out')])
def test_servers_that_do_not_serve_the_same_are_named_before_anything_is_asked(start, mood, said):
    good, also, bad = start(), start(), start(mood=mood)
    with pytest.raises(InputError, match=f'{bad.url} .*{said}'): send(together(good, bad, also), questions(5))
    assert not any(one.noted('asked') for one in (good, also, bad))


def test_one_that_is_not_there_is_named_before_anything_is_asked(start):
    good = start()
    with pytest.raises(InputError, match='No server answers at http://127.0.0.1:9/v1'):
        send(replace(parse_endpoint(f'{good.url}#m,http://127.0.0.1:9/v1'), retries=0), questions(5))
    assert not good.noted('asked')


def test_a_server_may_list_nothing_or_know_the_model_under_another_name(start, tmp_path):
    first, quiet, renamed = start(), start(mood='unlisted'), start(mood='renamed')
    endpoint = replace(parse_endpoint(f'{first.url}#m,{quiet.url},{renamed.url}#n'), retries=0)
    rows, _ = send(endpoint, questions(12), tmp_path/'answers.jsonl')
    assert texts(rows) == wanted(12)
    rows, usage = send(together(first), questions(12), tmp_path/'answers.jsonl')  # the first one's name is the model's
    assert usage.kept == 12
    assert len(set(_same_model((replace(endpoint, others=()), Endpoint(renamed.url, 'n', retries=0))))) == 1


# --- limits ------------------------------------------------------------------------------------------------------------------------

def test_the_budget_is_never_exceeded_and_what_was_bought_is_kept(start, tmp_path):
    "An answer costs 0.02; the most that one could cost is bound by what is asked."
    server, file = start(), tmp_path/'answers.jsonl'
    def paid(budget): return limited(together(server, concurrency=4), f'price=1000/1000 budget={budget}')
    with pytest.raises(InputError, match=rf'The budget of 0.3 for {server.url} is spent .*raise it.*\d+ of 60 were answered and are kept'):
        send(paid(0.3), questions(60), file)
    bought = len(finished(file))
    assert 0.1 < bought*0.02 <= 0.3 and len(server.noted('asked')) == bought
    with pytest.raises(InputError, match='The budget of 0.3 '): send(paid(0.3), questions(60), file)  # what was paid before counts
    assert len(server.noted('asked')) == bought
    teacher = paid(2)
    _, usage = send(teacher, questions(60), file)
    assert usage.answers == 60 and usage.kept == bought and usage.cost == pytest.approx(1.2) == teacher.budget.spent
    send(teacher, questions(60), file)  # the same answers are not counted twice
    assert teacher.budget.spent == pytest.approx(1.2)
    with pytest.raises(InputError, match='The budget of 2 '): send(teacher, [question(n) for n in range(100, 200)], tmp_path/'more.jsonl')
    assert teacher.budget.spent <= 2


def test_the_rate_holds_for_each_server(start):
    servers = [start(), start()]
    endpoint = together(*servers, rate=600)  # one every tenth of a second
    _same_model(tuple(replace(endpoint, url=one.url, others=()) for one in servers))
    begun = time.monotonic()
    send(endpoint, questions(20))
    seconds, most = time.monotonic() - begun, max(len(one.noted('asked')) for one in servers)
    assert most >= 10 and seconds >= 0.1*(most - 1) - 0.01


@pytest.mark.parametrize(('limits', 'sentence'), [
    ('rat=60', "no limit 'rat'.*rate"), ('rate', 'rate=60'), ('timeout=0', 'at least 0.001'), ('budget=5', 'no price'),
    ('price=1/2/3', 'price=0.1/0.4'), ('concurrency=0', 'at least 1'), ('rate=nan', 'no number')])
def test_limits_that_are_none_are_refused(limits, sentence):
    with pytest.raises(InputError, match=sentence): limited(Endpoint('http://a/v1', 'm'), limits)
    with pytest.raises(InputError, match=sentence): load_teacher('http://a/v1#m', limits=limits)


def test_limits_addresses_and_the_command(start, tmp_path, capsys):
    teacher = load_teacher('http://a/v1, http://b/v1/#m', limits='rate=60 timeout=5 concurrency=2 retries=1 price=0.1/0.4 budget=5')
    assert teacher == Endpoint('http://a/v1', 'm', 2, 5.0, 1, (0.1, 0.4), others=('http://b/v1#m',), rate=60)
    assert teacher.budget == Budget(5) and limited(Endpoint('http://a/v1'), 'price=3').prices == (3, 3)
    with pytest.raises(InputError, match='http://a/v1 is named twice'): parse_endpoint('http://a/v1#m,http://a/v1/#n')
    with pytest.raises(InputError, match="'b' is no address"): parse_endpoint('http://a/v1#m,b')
    with pytest.raises(InputError, match='is no server; leave it out'): load_teacher('zoo:teacher', limits='rate=60')
    assert cli.main(['instruct', str(tmp_path), '-o', str(tmp_path/'x'), '--teacher', 'http://a/v1#m', '--limits', 'speed=9']) == 2
    assert "There is no limit 'speed' of a server" in capsys.readouterr().err


def test_a_program_that_ends_does_not_wait_for_its_servers(start):
    "Ctrl-C, or an error elsewhere: the threads are daemons."
    stuck = start(mood='stuck')
    program = ('import signal, sys\nfrom scilm_adapt.endpoint import parse_endpoint\nfrom scilm_adapt.servers import ask\n'
               'signal.signal(2, signal.default_int_handler)\nask(parse_endpoint(sys.argv[1]), [[dict(role="user", content="?")]])')
    client = subprocess.Popen([sys.executable, '-c', program, f'{stuck.url}#m'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: stuck.noted('asked'))
    client.send_signal(2)
    assert client.wait(timeout=120) != 0


def test_answers_come_in_the_order_of_the_questions(start):
    answers, _ = ask(together(start(0.02), start()), [[dict(role='user', content=f'q{n}')] for n in range(20)], 8)
    assert [answer.text for answer in answers] == [f'Q{n}' for n in range(20)]
