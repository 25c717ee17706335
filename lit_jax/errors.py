"""The one exception a user sees, and the way the commands show it."""

import functools
import os
import sys
import traceback
from collections.abc import Callable

BAD_INPUT = 2
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again.


class UserError(Exception):
    """Something the user can mend. Its text is one sentence that says what to do."""


class Preempted(Exception):  # noqa: N818  nothing went wrong
    """The run was asked to stop, and has saved all it did."""


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Turns a UserError of `main` into one line on stderr and exit code 2, Preempted into 75.

    LIT_JAX_TRACEBACK=1 in the environment shows the full traceback instead.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            if os.environ.get("LIT_JAX_TRACEBACK") == "1":
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr, flush=True)
            return BAD_INPUT
        except Preempted as stop:
            print(stop, file=sys.stderr, flush=True)
            return PREEMPTED

    return run
