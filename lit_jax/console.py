"""How the commands speak: one line for what goes wrong, no noise for what goes well."""

import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import absl.logging

from lit_jax.errors import Preempted, UserError

BAD_INPUT = 2
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again.
INTERRUPTED = 130  # what shells say after Ctrl-C


def named_folder(text: str) -> Path:
    """The type of a flag: an empty text, as of an unset variable, is not taken for the current folder."""
    if not text:
        raise UserError("--workdir and --output must not be empty; name a folder.")
    return Path(text)


def command(main: Callable[..., None]) -> Callable[..., int]:
    """The exit code of `main`: 0, 2 after a UserError (one line on stderr), 75 after Preempted, 130 after
    Ctrl-C.

    A PermissionError is the user's, too: every path that is looked at comes from the flags or the config.
    LIT_JAX_TRACEBACK=1 in the environment shows the traceback of both.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        _set_up_logging()
        try:
            main(*args, **kwargs)
        except (UserError, PermissionError) as error:
            if os.environ.get("LIT_JAX_TRACEBACK") == "1":
                traceback.print_exc()
            if isinstance(error, PermissionError):
                error = (
                    f"There is no permission for {error.filename}; get it, or give another path."
                )
            print(f"error: {error}", file=sys.stderr, flush=True)
            return BAD_INPUT
        except Preempted as stop:
            print(stop, file=sys.stderr, flush=True)
            return PREEMPTED
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr, flush=True)
            return INTERRUPTED
        return 0

    return run


def _set_up_logging() -> None:
    """What lit_jax says goes to stderr as it is; of the libraries, warnings and worse."""
    absl.logging.set_verbosity(absl.logging.WARNING)
    own = logging.getLogger("lit_jax")
    own.setLevel(logging.INFO)
    own.propagate = False
    own.handlers = [logging.StreamHandler()]
