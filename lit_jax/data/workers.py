"""Worker processes of the data: their initialisation, and the error message if a worker is killed."""

import contextlib
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from lit_jax.errors import UserError


def start_worker(shared: Path | None = None) -> None:
    """Make a worker ignore signals meant for the main process, and exit when the main process is gone.

    Args:
        shared: a folder that the main process would have removed at its end.
    """
    # SIGTERM (preemption) and Ctrl-C often reach the whole process group, but training needs data until its
    # checkpoint is written.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Pillow's warning about an image that is a bad sample anyway; each worker would print the warning.
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
    threading.Thread(target=_exit_with_parent, args=(shared,), daemon=True).start()


def _exit_with_parent(shared: Path | None) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    if shared:
        shutil.rmtree(shared, ignore_errors=True)
    # `sys.exit` would end only this thread.
    os._exit(1)


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Raise UserError if a worker was killed by a signal, or if a source cannot be sent to the workers.

    Other errors stay unchanged.
    """
    try:
        yield
    # Python has no one type of error for what cannot be pickled.
    except (TypeError, pickle.PicklingError) as error:
        if "pickle" not in str(error):
            raise
        raise UserError(
            f"The source cannot be sent to the processes of config.data.workers ({error}); open files, locks "
            "and connections in its __getitem__, or set config.data.workers=0."
        ) from error
    # Grain reports the exit code only in the text of a RuntimeError.
    except RuntimeError as error:
        ended = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
        if ended is None:
            raise
        # A negative code is the number of a signal.
        code = int(ended[1])
        how = (
            f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        )
        advice = (
            "lower config.data.workers if memory ran out"
            if code == -signal.SIGKILL
            else "see its output above"
        )
        raise UserError(
            f"A worker process of config.data.workers {how}; {advice}, and run the same command again."
        ) from error
