"""The two exceptions that end a command on purpose."""


class UserError(Exception):
    """Something the user can mend. Its text is one sentence that says what to do."""


class Preempted(Exception):  # noqa: N818  nothing went wrong
    """The run was asked to stop, and has saved all it did."""
