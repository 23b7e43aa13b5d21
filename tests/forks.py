"""Processes forked from this one, which have everything loaded already; importing this gives them locks of their own."""
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable

from tqdm import tqdm


def locks_of_its_own() -> None:
    """Forked processes share the locks of tqdm, and of its subclasses in other libraries, such as datasets: one that a test kills while
    it draws a bar would keep its lock, and every later bar would wait."""
    classes = [tqdm]
    for one in classes: classes += one.__subclasses__()
    for one in classes: one.set_lock(threading.RLock())


os.register_at_fork(after_in_child=locks_of_its_own)


def forked(action: Callable[[], None]) -> int:
    "The number of a copy of this process that does something and ends; it has all modules loaded already."
    if child := os.fork(): return child
    code = 1
    try:
        action()
        code = 0
    except BaseException: traceback.print_exc()
    finally: os._exit(code)


def ended(child: int) -> int:
    "Wait for a forked process; its exit code, or minus the signal that ended it."
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_in_the_middle(action: Callable[[], None], reached: Callable[[], bool], seconds: float = 120) -> None:
    "Do something in a forked process and `kill -9` it as soon as it has `reached` a point; it has to get there, and not to its end."
    child, deadline = forked(action), time.monotonic() + seconds
    while not reached() and time.monotonic() < deadline:
        assert not os.waitpid(child, os.WNOHANG)[0], 'it ended by itself'
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL and reached()
