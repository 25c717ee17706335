"""The exit codes of the commands, and the exceptions that end a command on purpose."""

DONE = 0
# Python's own code after a traceback.
FAILED = 1
BAD_INPUT = 2
# EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again.
PREEMPTED = 75
# Another process of the run is gone, or never came: run the same command again.
GONE = 76
# The shells' code after Ctrl-C.
INTERRUPTED = 130


class UserError(Exception):
    """A mistake that the user can fix. Its text is one sentence that says what to do."""


class Preempted(Exception):  # noqa: N818  nothing went wrong
    """The stop of a run that was asked to stop, and has saved all its work."""


class GoneError(Exception):
    """The absence of another process of the run. Its text is one sentence that names it."""
