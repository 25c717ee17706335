"""Ctrl-C: it ends a command that is still being imported at once, and is never lost afterwards."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

# The time until an exception that was dropped is raised again. By then Python has left the callback.
_AGAIN_SECONDS = 0.05


def end_at_once() -> None:
    """Let Ctrl-C end this process by the signal itself, without an exception, until `raised` begins.

    An exception in the middle of an import shows as another error of that module, as an abort, or not at all.
    """
    # A process that ignores the signal, as one in the background of a shell, goes on to do so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Let each Ctrl-C raise KeyboardInterrupt in the main thread, also where Python would drop the exception.

    Python only reports exceptions of callbacks, such as the one that JAX has in the garbage collector. The
    collector runs so often while modules are imported and functions are traced that every third Ctrl-C was
    lost there.
    """
    hook = sys.unraisablehook
    is_main = threading.current_thread() is threading.main_thread()
    ends_at_once = is_main and signal.getsignal(signal.SIGINT) is signal.SIG_DFL

    def raise_again(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            hook(dropped)
            return
        # An exception that is raised here would be dropped, too. A true signal also ends a sleep.
        main = threading.main_thread().ident
        timer = threading.Timer(_AGAIN_SECONDS, signal.pthread_kill, (main, signal.SIGINT))
        timer.daemon = True
        timer.start()

    if ends_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if ends_at_once:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def caused(error: BaseException | None) -> bool:
    """Return whether an error follows from a KeyboardInterrupt, as that of a module may."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
