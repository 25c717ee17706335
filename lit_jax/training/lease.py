"""The lease of a run folder: only one process at a time may write there.

The holder renews its lease every few seconds. A folder on a file system has a file as lease (lease_file.py),
a folder in a bucket an object (lease_object.py). Clocks, host names and process ids decide nothing: they
differ between machines, or are the same in two containers. Readers take no lease.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from lit_jax.buckets import AnyPath, guarded
from lit_jax.distributed.process import is_primary
from lit_jax.errors import UserError
from lit_jax.training import lease_wait
from lit_jax.training.lease_file import FileLease
from lit_jax.training.lease_object import ObjectLease

# `check_lease` is called from many places and threads, which know the folder but not the lease.
_held: dict[AnyPath, "_Lease"] = {}


@contextlib.contextmanager
def holding(workdir: AnyPath) -> Iterator[None]:
    """Create a run folder and hold it for the processes of this run; the first process holds it for all.

    A folder that is still empty at the end is removed again.

    Raises UserError if another run has the folder, and OSError if the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if is_primary():
            if isinstance(workdir, Path):
                stack.enter_context(_made(workdir))
            stack.enter_context(_Lease(workdir))
            # In a bucket Orbax writes into the folder of the checkpoint itself, so each write is checked.
            if not isinstance(workdir, Path):
                stack.enter_context(guarded(workdir, lambda: check_lease(workdir)))
        # The other processes read the folder, which the former holder may still change until now.
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the run folder is held")
        yield


def check_lease(workdir: AnyPath) -> None:
    """Raise UserError if this process has lost the run folder; call this function before each write."""
    if lease := _held.get(workdir.resolve()):
        lease.check()


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        # rmdir fails for a folder with content, which stays.
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()


def _now() -> float:
    """Return seconds of a clock that also runs while the machine sleeps, where there is such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class _Lease:
    """A context manager that holds the lease of one folder; a thread renews the lease."""

    def __init__(self, workdir: AnyPath):
        self._workdir = workdir
        self._kind = FileLease(workdir) if isinstance(workdir, Path) else ObjectLease(workdir)
        self._found = _now()
        self._lost = ""
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> None:
        wait = lease_wait.Wait(self._workdir)
        while not self._kind.acquire(wait):
            time.sleep(self._kind.POLL_SECONDS)
        self._found = _now()
        _held[self._workdir.resolve()] = self
        # A daemon thread does not keep the process alive after an error in the main thread.
        threading.Thread(target=self._keep, daemon=True, name="lease").start()

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        # The lock keeps the renewing thread from writing a lease that was removed.
        with self._lock:
            del _held[self._workdir.resolve()]
            self._kind.release()

    def check(self) -> None:
        """Raise UserError if another process has taken the lease over, or may have.

        Each call looks into the folder, because the clocks of a machine that was paused do not show it. For
        a bucket the last look counts for a second, because each look is a request.
        """
        start = _now()
        try:
            if start - self._found >= self._kind.LOOK_SECONDS:
                self._note(self._kind.why_lost(), start)
        except OSError as error:
            # A short failure of the file system does not lose the lease. The limit lies two renewals before
            # STALE_SECONDS, so that this process stops before another process may take over.
            silent = _now() - self._found
            if silent > lease_wait.STALE_SECONDS - 2 * lease_wait.RENEW_SECONDS:
                raise UserError(
                    f"The lease of the run folder {self._workdir} could not be renewed for {silent:.0f} s "
                    f"({error.strerror}), so another run may have taken it; run the same command again to "
                    "resume from the last checkpoint."
                ) from error
        if self._lost:
            raise UserError(
                f"The run folder {self._workdir} {self._lost}; this process ends and writes nothing more."
            )

    def forget(self) -> None:
        """Drop in a forked process what belongs to its parent."""
        self._kind.forget()

    def _note(self, why_lost: str, seen: float) -> None:
        if why_lost:
            self._lost = why_lost
        else:
            self._found = seen

    def _keep(self) -> None:
        while not self._ended.wait(lease_wait.RENEW_SECONDS) and not self._lost:
            # `check` reports an error that lasts.
            with contextlib.suppress(OSError), self._lock:
                if not self._ended.is_set():
                    start = _now()
                    self._note(self._kind.renew(), start)


def _forget_in_child() -> None:
    for lease in _held.values():
        lease.forget()
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
