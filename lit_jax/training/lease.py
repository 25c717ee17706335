"""Whose a run folder is: one process at a time writes there.

The holder keeps a file `.lease.N` in the folder, locked by flock and written anew every few seconds. On the
holder's own machine the kernel frees the lock when the process ends, however it ends. Elsewhere, and on file
systems without flock, a lease that has not changed for a minute may be taken over: by making `.lease.N+1`,
which the file system lets one process do. Readers take no lease.
"""

import contextlib
import fcntl
import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from lit_jax.distributed.process import is_primary
from lit_jax.errors import UserError

log = logging.getLogger(__name__)

RENEW_SECONDS = 10.0
STALE_SECONDS = 60.0  # without a change, seen by the one that waits: clocks of machines differ
# So long a killed process may take to end, and a lease that was taken over is left alone: its former holder
# may be in the middle of a write.
GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.2
_PREFIX = ".lease."

_held: dict[Path, "_Lease"] = {}


@contextlib.contextmanager
def holding(workdir: Path) -> Iterator[None]:
    """Keep a run folder, which is made, for the processes of this run; the first one holds it for all.

    A folder that is still empty in the end is removed again.

    Raises UserError if another run has it, and OSError if it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if is_primary():
            stack.enter_context(_made(workdir))
            stack.enter_context(_Lease(workdir))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the run folder is held")
        yield


def check_lease(workdir: Path) -> None:
    """Raise UserError if this process held the run folder and has lost it; to call before each write."""
    if lease := _held.get(workdir.resolve()):
        lease.check()


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # something is in it
            for path in missing:
                path.rmdir()


def _kernel() -> str:
    """Return what tells running kernels apart: all processes on one of them see the same flocks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return platform.node()


def _now() -> float:
    """Return seconds that also pass while the machine sleeps, if it can count them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class _Lease:
    """The lease of one folder while in `with`; a thread renews it."""

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._token = secrets.token_hex(8)
        self._beat = 0
        self._file = -1
        self._path = workdir
        self._renewed = _now()
        self._taken_by: str | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> None:
        self._acquire()
        _held[self._workdir.resolve()] = self
        threading.Thread(target=self._keep, daemon=True, name="lease").start()

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        with self._lock:
            del _held[self._workdir.resolve()]
            with contextlib.suppress(OSError):
                if self._is_mine():
                    self._path.unlink()
            os.close(self._file)

    def check(self) -> None:
        """Raise UserError if another process has taken the lease over, or may have."""
        silent = _now() - self._renewed
        if self._taken_by is None and silent < 1.5 * RENEW_SECONDS:
            return
        try:
            self._renew()
        except OSError as error:
            if silent > STALE_SECONDS - 2 * RENEW_SECONDS:
                raise UserError(
                    f"The lease of the run folder {self._workdir} could not be renewed for {silent:.0f} s "
                    f"({error.strerror}), so that another run may have it; run the same command again to go "
                    "on from what is saved."
                ) from error
        if self._taken_by is not None:
            raise UserError(
                f"The run folder {self._workdir} was taken over by {self._taken_by}: this process did "
                f"not run for more than {STALE_SECONDS:.0f} s; it ends and writes nothing more."
            )

    def forget(self) -> None:
        """Close the file in a forked process, which would else keep the lock when this one is gone."""
        os.close(self._file)

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS) and self._taken_by is None:
            with contextlib.suppress(OSError):  # `check` says so when it lasts
                self._renew()

    def _renew(self) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            if self._is_mine():
                self._write()
            else:
                newest = _newest(self._workdir)
                self._taken_by = _name(_read(newest[1])) if newest else "another run"

    def _is_mine(self) -> bool:
        newest = _newest(self._workdir)
        content = _read(newest[1]) if newest else None
        return content is not None and self._token.encode() in content

    def _write(self) -> None:
        self._beat += 1
        holder = {"host": platform.node(), "pid": os.getpid(), "kernel": _kernel()}
        # The number has a fixed width, so that each content takes the place of the one before.
        text = json.dumps(holder | {"token": self._token, "beat": f"{self._beat:012}"})
        os.pwrite(self._file, text.encode(), 0)
        self._renewed = _now()

    def _create(self, number: int) -> bool:
        """Make the lease of that number, unless another process has; True if it is now this process's."""
        path = self._workdir / f"{_PREFIX}{number}"
        try:
            self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            return False
        self._path = path
        try:
            with contextlib.suppress(
                OSError
            ):  # a file system without locks: the lease alone counts
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._write()
        except OSError:
            os.close(self._file)
            path.unlink()
            raise
        return True

    def _acquire(self) -> None:
        start, since, seen, said = time.monotonic(), time.monotonic(), None, False
        while True:
            newest = _newest(self._workdir)
            if newest is None:
                if self._create(1):
                    return
                continue
            number, path = newest
            if (content := _read(path)) is None:
                continue  # just given back
            now, locked = time.monotonic(), _is_locked(path)
            if content != seen:
                since, renewed, seen = now, seen is not None, content
                # A lock lets its holder end first; without one, who writes here lives elsewhere.
                if renewed and not locked:
                    raise self._refusal(content)
            if locked and now - start > GRACE_SECONDS:
                raise self._refusal(content)
            is_dead = locked is False and _parsed(content).get("kernel") == _kernel()
            if is_dead or (not locked and now - since > STALE_SECONDS):
                if self._create(number + 1):
                    self._settle(path, 0.0 if is_dead else GRACE_SECONDS)
                    return
                continue
            if not locked and not said:
                log.warning(
                    "%s was in use by %s; if that does not change, this run goes on after %.0f s.",
                    self._workdir,
                    _name(content),
                    STALE_SECONDS,
                )
                said = True
            time.sleep(_POLL_SECONDS)

    def _settle(self, former: Path, seconds: float) -> None:
        time.sleep(seconds)
        former.unlink(missing_ok=True)

    def _refusal(self, content: bytes) -> UserError:
        return UserError(
            f"The run folder {self._workdir} is in use by {_name(content)}; wait for it or stop it, or "
            "choose another --workdir."
        )


def _newest(workdir: Path) -> tuple[int, Path] | None:
    """Return the lease of the highest number in a folder."""
    leases = [
        (int(number), path)
        for path in workdir.glob(f"{_PREFIX}*")
        if (number := path.name.removeprefix(_PREFIX)).isdecimal() and number.isascii()
    ]
    return max(leases, default=None)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parsed(content: bytes | None) -> dict[str, Any]:
    try:
        return dict(json.loads(content or b""))
    except (ValueError, TypeError):  # just being made, or damaged
        return {}


def _name(content: bytes | None) -> str:
    holder = _parsed(content)
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}"


def _is_locked(path: Path) -> bool | None:
    """Return whether a process has locked the file, None where that cannot be known."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # Shared: several that look at once do not take each other for the holder.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(file)
    return False


def _forget_in_child() -> None:
    for lease in _held.values():
        lease.forget()
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
