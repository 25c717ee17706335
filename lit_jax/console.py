"""How the commands speak: one line for what goes wrong, no noise for what goes well."""

import argparse
import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from lit_jax.credentials import hide_keys
from lit_jax.distributed import process
from lit_jax.errors import (
    BAD_INPUT,
    DONE,
    FAILED,
    GONE,
    INTERRUPTED,
    PREEMPTED,
    GoneError,
    Preempted,
    UserError,
)
from lit_jax.files import output_path
from lit_jax.printable import printable
from lit_jax.terminal import prepared


def add_path(parser: argparse._ActionsContainer, flag: str, **options: Any) -> None:
    """Add a flag for a run folder, or for a file or folder to write; see `output_path`."""
    parser.add_argument(flag, type=functools.partial(output_path, flag), **options)


def command(main: Callable[..., None]) -> Callable[..., int]:
    """Return `main` as a function that returns an exit code.

    It is 0, 2 after a UserError (one line on stderr), 75 after Preempted, 76 where another process never
    came, 130 after Ctrl-C. An OSError about a path is the user's, too: every path comes from the flags or the
    config. LIT_JAX_TRACEBACK=1 in the environment shows the traceback of both. A process that fails ends at
    once; JAX aborts the others of its run, which the scripts in launch/ turn into 76.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        with prepared() as stdout:
            code = _exit_code(lambda: main(*args, **kwargs))
            stdout.flush()
            # Whoever closes a pipe has seen enough; but a disk that is full has lost what this says.
            lost = stdout.error
            if code == DONE and lost is not None and lost.errno not in (errno.EPIPE, errno.EIO):
                _say(
                    f"stdout cannot be written ({lost.strerror}); what the command writes is complete."
                )
                return BAD_INPUT
            return code

    return run


def _exit_code(main: Callable[[], None]) -> int:
    try:
        main()
    except Preempted as stop:
        print(stop, file=sys.stderr, flush=True)
        return PREEMPTED
    except GoneError as error:
        _say(str(error))
        return GONE
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr, flush=True)
        process.leave(INTERRUPTED)
        return INTERRUPTED
    # argparse exits after --help.
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else DONE
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            if process.number() is None:
                raise
            _fail_among_others(error)
            return FAILED
        sentence = hide_keys(sentence)
        if os.environ.get("LIT_JAX_TRACEBACK") == "1":
            print(hide_keys(traceback.format_exc()), end="", file=sys.stderr)
        _say(sentence)
        process.leave(BAD_INPUT)
        return BAD_INPUT
    return DONE


def _fail_among_others(error: Exception) -> None:
    """End one of several processes after an unexpected error, unless JAX ends it because another is gone."""
    reason = hide_keys(" ".join(f"{type(error).__name__}: {error}".split()))
    _say(f"{reason[:300]}; JAX tells within a minute whether another process of the run is gone.")
    process.await_verdict()
    print(hide_keys(traceback.format_exc()), end="", file=sys.stderr)
    process.leave(FAILED)


# What a path of the user can be, beside not being there.
_ABOUT_PATHS = {
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.ESTALE,
}


def _sentence(error: Exception) -> str | None:
    """Return what to tell the user; None for an error that is not the user's."""
    if isinstance(error, UserError):
        return str(error)
    if not isinstance(error, OSError):
        return None
    what = error.filename or "something that this command needs"
    if isinstance(error, PermissionError):
        return f"There is no permission for {what}; change its permissions, or give another path."
    if error.errno in _ABOUT_PATHS:
        return f"{what} cannot be used ({error.strerror}); give another path."
    return None


def _say(sentence: str) -> None:
    print(f"error: {printable(sentence)}", file=sys.stderr, flush=True)
