"Importing this gives forked processes locks of their own, see `locks_of_its_own`."
import os
import threading

from tqdm import tqdm


def locks_of_its_own() -> None:
    """Forked processes share the locks of tqdm, and of its subclasses in other libraries, such as datasets: one that a test kills while
    it draws a bar would keep its lock, and every later bar would wait."""
    classes = [tqdm]
    for one in classes: classes += one.__subclasses__()
    for one in classes: one.set_lock(threading.RLock())


os.register_at_fork(after_in_child=locks_of_its_own)
