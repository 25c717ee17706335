"""The exit codes of the commands, and the exceptions that end a command on purpose."""

import importlib
import re
import sys

DONE = 0
# Python's own code after a traceback.
FAILED = 1
# argparse's own code after a wrong flag.
BAD_INPUT = 2
# EX_TEMPFAIL of sysexits.h: nothing is wrong; the same command resumes the run.
PREEMPTED = 75
# Another process of the run is gone, or never connected; the same command resumes the run.
GONE = 76
# The code of shells after Ctrl-C: 128 plus the number of SIGINT.
INTERRUPTED = 130


class UserError(Exception):
    """A mistake that the user can fix. The text is one sentence that says what is wrong and what to do."""


class Preempted(Exception):  # noqa: N818  nothing went wrong
    """The end of a run that was asked to stop and has saved all its work."""


class GoneError(Exception):
    """The loss of another process of the run. The text is one sentence that names the process."""


def import_jax_or_exit() -> None:
    """Import JAX. End the process with one sentence if JAX refuses a variable of the environment."""
    try:
        importlib.import_module("jax")
    except ValueError as error:
        named = re.search("jax_[a-z0-9_]+", str(error), re.IGNORECASE)
        variable = named[0].upper() if named else "a JAX variable"
        print(
            f"error: JAX refuses {variable} in the environment ({error}); correct or unset it.",
            file=sys.stderr,
        )
        sys.exit(BAD_INPUT)
