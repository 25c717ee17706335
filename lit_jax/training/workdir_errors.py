"""The errors of a run folder that cannot be written, reported in one sentence whatever libraries print."""

import contextlib
import gc
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from lit_jax.buckets import COMMIT_FILE, AnyPath, BucketPath, subfolders
from lit_jax.distributed import process
from lit_jax.errors import UserError
from lit_jax.training.lease import check_lease

# The name of a complete checkpoint's folder. str.isdigit would also accept '²', which int() rejects.
STEP = re.compile(r"0|[1-9][0-9]{0,9}")


@contextlib.contextmanager
def workdir_errors(workdir: AnyPath, failure: type[Exception] = OSError) -> Iterator[None]:
    """Turn `failure`, raised by a write into the run folder, into UserError.

    Raises UserError before any write if this process has lost the folder to another run.
    """
    check_lease(workdir)
    try:
        yield
    except UserError:
        raise
    except failure as error:
        # A save fails for another reason than the disk where a process of the run is gone. JAX then ends this
        # process with the code that launchers take for it, and not with that of bad input.
        if not isinstance(error, OSError) and not _OS_ERROR.search(str(error)):
            process.await_verdict()
        what_then = "fix that or choose another --workdir"
        # A bucket that cannot be written may not be read, either.
        with contextlib.suppress(OSError):
            if steps := complete_steps(workdir):
                what_then = (
                    f"fix that and run the same command again: it resumes from step {steps[-1]}"
                )
        raise UserError(
            f"The run folder {workdir} cannot be written ({reason(error)}); {what_then}."
        ) from error


def complete_steps(workdir: AnyPath) -> list[int]:
    """Return the steps of the complete checkpoints in a run folder, in ascending order.

    Orbax gives a folder its step as name only when the checkpoint is complete. In a bucket, where nothing can
    be renamed, it writes a file last.
    """
    folder = workdir / "checkpoints"
    if isinstance(folder, BucketPath):
        names = [file.parent.name for file in folder.glob(f"*/{COMMIT_FILE}")]
    else:
        names = [found.name for found in subfolders(folder)]
    return sorted(int(name) for name in names if STEP.fullmatch(name))


# TensorStore hides the error of the operating system, such as a full disk, in the text of its own error.
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")
# TensorStore appends to a message its details, such as " [tensorstore_spec='...']", which fills a page.
_DETAILS = re.compile(r" \[[a-z_ ]+='")


def reason(error: Exception) -> str:
    """Return the reason of an error, short enough for a sentence."""
    code = _OS_ERROR.search(str(error))
    if code:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first_line = str(error).strip().partition("\n")[0]
    return _DETAILS.split(first_line)[0][:500]


# Log messages that repeat an error that is raised anyway: Orbax logs in each thread that the error of a write
# passes through, asyncio logs for each write under way, gcsfs logs what it raises. Orbax also logs a SIGTERM
# in every process. A future that gathers writes does not have Orbax's name, but its error names OCDBT.
_NO_NEWS = re.compile(
    r"_SignalingThread\.run\(\) raised|in background save thread|Save Finalize thread"
    r"|(never retrieved|destroyed but it is pending).*(orbax|OCDBT)"
    r"|Reached preemption sync point"
    r"|Failed to (write|update) metadata="
    r"|out of retries on exception|non-retriable exception"
)


# Orbax closes its event loop at the first array that it cannot write or read, and abandons the other arrays.
# Their errors, which nobody awaits, reach sys.unraisablehook.
_GIVEN_UP = ("Event loop is closed", "Encountered error while reading array index")


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keep Orbax from printing pages about a failed write or read whose error it raises as well."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio", "gcsfs")]
    hook = sys.unraisablehook

    # A function of its own in each call, so that the end of an inner block leaves the outer one as it is.
    def is_news(record: logging.LogRecord) -> bool:
        return not _NO_NEWS.search(record.getMessage().replace("\n", " "))

    def print_unraisable(unraisable: Any) -> None:
        if not str(unraisable.exc_value).startswith(_GIVEN_UP):
            hook(unraisable)

    for logger in loggers:
        logger.addFilter(is_news)
    sys.unraisablehook = print_unraisable
    try:
        with warnings.catch_warnings():
            # Writes and reads that had not started when the first one failed cause these warnings.
            pattern = r"coroutine '.*(write|read).*' was never awaited"
            warnings.filterwarnings("ignore", pattern, RuntimeWarning)
            yield
            # A coroutine warns when it is freed, so it must be freed inside this block.
            gc.collect()
    finally:
        sys.unraisablehook = hook
        for logger in loggers:
            logger.removeFilter(is_news)
