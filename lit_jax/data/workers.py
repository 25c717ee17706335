"""What every worker process of the data does first."""

import multiprocessing
import os
import signal
import threading


def start_worker() -> None:
    """Leaves it to the main process to end a worker, and ends the worker if that process is gone."""
    # SIGTERM (preemption) and Ctrl-C often reach the whole process group; training then still needs data
    # until its checkpoint is written.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
