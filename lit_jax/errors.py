"""How a command ends: its exit codes, and the two exceptions that end it on purpose."""

DONE = 0
FAILED = 1  # what Python says after a traceback
BAD_INPUT = 2
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again.
GONE = 76  # another process of the run is gone, or never came: run the same command again.
INTERRUPTED = 130  # what shells say after Ctrl-C


class UserError(Exception):
    """Something the user can mend. Its text is one sentence that says what to do."""


class Preempted(Exception):  # noqa: N818  nothing went wrong
    """The run was asked to stop, and has saved all it did."""


class GoneError(Exception):
    """Another process of the run never came. Its text is one sentence that says which."""
