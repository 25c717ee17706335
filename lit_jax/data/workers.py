"""Worker processes of the data: their initialisation, and the error message if a worker is killed."""

import contextlib
import multiprocessing
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator

from lit_jax.errors import UserError


def start_worker() -> None:
    """Make a worker ignore signals meant for the main process, and exit when the main process is gone."""
    # SIGTERM (preemption) and Ctrl-C often reach the whole process group, but training needs data until its
    # checkpoint is written.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Pillow's warning about an image that is a bad sample anyway; each worker would print the warning.
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    # `sys.exit` would end only this thread.
    os._exit(1)


def wait_for_freed_memory() -> None:
    """Wait until Grain has freed the shared memory of dropped batches, which it does in a thread.

    Python reports as leaked all that the thread has not freed when the process ends.
    """
    # Grain has no public function that waits for its thread. If the private one is gone, Python warns.
    with contextlib.suppress(ImportError, AttributeError):
        from grain._src.python.ipc.shared_memory_array import SharedMemoryArray

        if pool := SharedMemoryArray._del_thread_pool:
            # The pool has one thread, which takes its tasks in turn.
            pool.apply(int)


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Raise UserError if a worker was killed by a signal; leave other errors unchanged."""
    try:
        yield
    # Grain reports the exit code only in the text of a RuntimeError.
    except RuntimeError as error:
        killed = re.search(r"terminated unexpectedly with exit code -(\d+)", str(error))
        if killed is None:
            raise
        name = signal.Signals(int(killed[1])).name
        # Linux sends SIGBUS when /dev/shm, which holds the shared memory, is full.
        advice = {
            "SIGBUS": "enlarge /dev/shm, through which batches come (docker run --shm-size=8g)",
            "SIGKILL": "lower config.data.workers if memory ran out",
        }.get(name, "see its output above")
        raise UserError(
            f"A worker process of config.data.workers was killed ({name}); {advice}, and run the same "
            "command again."
        ) from error
