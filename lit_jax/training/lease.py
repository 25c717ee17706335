"""The lease of a run folder: only one process at a time may write there.

The holder keeps a file `.lease.N` in the folder, locks it by flock and rewrites it every few seconds. If two
processes see the same locks, the kernel tells whether the holder lives, and frees the lock however the holder
ends. On other machines, and on file systems without flock, a process may take over a lease whose content has
not changed for a minute. It creates `.lease.N+1`, which the file system allows to one process only, and
removes `.lease.N`. Clocks, host names and process ids decide nothing: they differ between machines, or are
the same in two containers. Readers take no lease.
"""

import contextlib
import dataclasses
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

from lit_jax.buckets import AnyPath
from lit_jax.distributed.process import is_primary
from lit_jax.errors import UserError

log = logging.getLogger(__name__)

RENEW_SECONDS = 10.0
# The time without a change, measured by the waiting process, because the clocks of machines differ.
STALE_SECONDS = 60.0
# A killed process may take this long to end. A process that takes a lease over waits as long before it
# writes, because the former holder may be in the middle of a write.
GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.2
_PREFIX = ".lease."
# The most bytes that are read of a lease.
_LONGEST = 4096

# `check_lease` is called from many places and threads, which know the folder but not the lease.
_held: dict[AnyPath, "_Lease"] = {}


@contextlib.contextmanager
def holding(workdir: AnyPath) -> Iterator[None]:
    """Create a run folder and hold it for the processes of this run; the first process holds it for all.

    A folder that is still empty at the end is removed again.

    Raises UserError if another run has the folder, and OSError if the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if is_primary() and isinstance(workdir, Path):
            stack.enter_context(_made(workdir))
            stack.enter_context(_Lease(workdir))
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


def _lock_domain(file: int) -> str:
    """Return a name for the group of processes that see the same locks on a file.

    The name identifies a running kernel and a mounted file system. Containers on one machine may mount one
    folder twice, and each mount has locks of its own.
    """
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        # Only Linux has a boot id.
        kernel = platform.node()
    return f"{kernel}/{os.fstat(file).st_dev}"


def _now() -> float:
    """Return seconds of a clock that also runs while the machine sleeps, where there is such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class _Lease:
    """A context manager that holds the lease of one folder; a thread renews the lease."""

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._token = secrets.token_hex(8)
        self._beat = 0
        self._file = -1
        self._number = 0
        self._is_locked = False
        self._found = _now()
        self._lost = ""
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> None:
        wait = _Wait(self._workdir)
        while not self._acquire(wait):
            time.sleep(_POLL_SECONDS)
        _held[self._workdir.resolve()] = self
        # A daemon thread does not keep the process alive after an error in the main thread.
        threading.Thread(target=self._keep, daemon=True, name="lease").start()

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        # The lock keeps the renewing thread from writing into a closed file.
        with self._lock:
            del _held[self._workdir.resolve()]
            with contextlib.suppress(OSError):
                if self._is_mine():
                    self._path.unlink()
            os.close(self._file)

    @property
    def _path(self) -> Path:
        return self._workdir / f"{_PREFIX}{self._number}"

    def check(self) -> None:
        """Raise UserError if another process has taken the lease over, or may have.

        Each call looks into the folder, because the clocks of a machine that was paused do not show it.
        """
        try:
            self._look()
        except OSError as error:
            # A short failure of the file system is no loss. The limit lies two renewals before STALE_SECONDS,
            # so that this process stops before another process may take over.
            silent = _now() - self._found
            if silent > STALE_SECONDS - 2 * RENEW_SECONDS:
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
        """Close the file in a forked process, which would otherwise keep the lock after the parent ends."""
        os.close(self._file)

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS) and not self._lost:
            # `check` reports an error that lasts.
            with contextlib.suppress(OSError), self._lock:
                if not self._ended.is_set() and self._look():
                    self._write()

    def _look(self) -> bool:
        """Return whether this process still has the lease, and store the reason if it has not."""
        if self._is_mine():
            self._found = _now()
        elif newest := _newest(self._workdir):
            self._lost = (
                f"was taken over by {_name(_read(newest[1]))}: this process did not run for more than "
                f"{STALE_SECONDS:.0f} s"
            )
        else:
            self._lost = (
                "has no lease any more: another run had it and has ended, or someone removed it"
            )
        return not self._lost

    def _is_mine(self) -> bool:
        newest = _newest(self._workdir)
        content = _read(newest[1]) if newest else None
        return content is not None and self._token.encode() in content

    def _write(self) -> None:
        self._beat += 1
        holder = {
            "host": platform.node(),
            "pid": os.getpid(),
            "locks": _lock_domain(self._file) if self._is_locked else None,
        }
        # The beat has a fixed width, so that each content overwrites the previous content completely.
        text = json.dumps(holder | {"token": self._token, "beat": f"{self._beat:012}"})
        os.pwrite(self._file, text.encode(), 0)
        # Other machines see only content that has left this machine. Some file systems do not support fsync.
        with contextlib.suppress(OSError):
            os.fsync(self._file)

    def _create(self, number: int) -> bool:
        """Create the lease with this number; return False if another process has created it."""
        self._number = number
        # O_EXCL lets exactly one process create the file, on network file systems, too.
        try:
            self._file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            return False
        try:
            self._is_locked = _lock(self._file)
            self._write()
        except OSError:
            self._drop()
            raise
        return True

    def _drop(self) -> None:
        # The path may belong to another process's file by now, which must stay.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file), self._path.stat()):
                self._path.unlink()
        os.close(self._file)

    def _acquire(self, wait: "_Wait") -> bool:
        """Create the next lease if no other process may have the folder; return whether this succeeded."""
        newest, found = _newest(self._workdir), None
        if newest is not None:
            found = _observe(newest[1])
            if found is None or not wait.is_over(found):
                return False
        if not self._create(newest[0] + 1 if newest else 1):
            return False
        # Old leases go at once, so that a holder that wakes up misses its file even if its machine still has
        # an old listing of the folder.
        for number, path in _leases(self._workdir):
            if number < self._number:
                path.unlink(missing_ok=True)
        if found is not None and found.is_alive is None:
            time.sleep(GRACE_SECONDS)
        # The first listing may have missed a lease that was created meanwhile, so this process looks again.
        if self._is_mine():
            return True
        self._drop()
        return False


@dataclasses.dataclass(frozen=True)
class _Observed:
    """A lease of another process as this process sees it.

    Attributes:
        content: the bytes of the file, which change with every renewal.
        is_alive: whether the holder lives; None where locks do not tell.
    """

    content: bytes
    is_alive: bool | None


class _Wait:
    """A wait for the lease of another process, which ends when its holder is gone."""

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._start = self._since = time.monotonic()
        self._content: bytes | None = None

    def is_over(self, found: _Observed) -> bool:
        """Return whether the holder is gone. Raise UserError if it lives."""
        now = time.monotonic()
        if found.content != self._content:
            is_renewed, self._since = self._content is not None, now
            self._content = found.content
            # A renewal proves that a holder on another machine lives. A holder on this machine may be about
            # to end, so it gets GRACE_SECONDS below.
            if is_renewed and found.is_alive is None:
                raise self._refusal()
            if not is_renewed and found.is_alive is not False:
                self._say(found)
        if found.is_alive and now - self._start > GRACE_SECONDS:
            raise self._refusal()
        is_stale = found.is_alive is None and now - self._since > STALE_SECONDS
        return found.is_alive is False or is_stale

    def _say(self, found: _Observed) -> None:
        holder = _name(found.content)
        if found.is_alive:
            text = "%s is in use by %s; waiting %.0f s for it to end."
            log.info(text, self._workdir, holder, GRACE_SECONDS)
        else:
            text = (
                "%s was in use by %s; if that run stays silent, this one takes over after %.0f s."
            )
            log.warning(text, self._workdir, holder, STALE_SECONDS)

    def _refusal(self) -> UserError:
        return UserError(
            f"The run folder {self._workdir} is in use by {_name(self._content)}; wait for it or stop it, or "
            "choose another --workdir."
        )


def _leases(workdir: Path) -> list[tuple[int, Path]]:
    """Return the leases in a folder as (number, path)."""
    numbers = [
        name.removeprefix(_PREFIX) for name in os.listdir(workdir) if name.startswith(_PREFIX)
    ]
    return [
        (int(number), workdir / f"{_PREFIX}{number}")
        for number in numbers
        if number.isdecimal() and number.isascii()
    ]


def _newest(workdir: Path) -> tuple[int, Path] | None:
    """Return the lease with the highest number in a folder, None without a lease."""
    return max(_leases(workdir), default=None)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _name(content: bytes | None) -> str:
    holder = _parsed(content)
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}"


def _parsed(content: bytes | None) -> dict[str, Any]:
    try:
        return dict(json.loads(content or b""))
    except (ValueError, TypeError):
        # The file is damaged, or its creator has not written it yet.
        return {}


def _lock(file: int) -> bool:
    """Lock a new file. Return False if the file system has no locks."""
    try:
        # The call waits, because another process that tests for a lock holds one itself for a moment.
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _observe(path: Path) -> _Observed | None:
    """Return the state of a lease of another process, None if the lease is gone."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        # The content is read before the lock is tested. A holder takes the lock before it writes, so content
        # in the file means that the lock tells the truth.
        content = os.read(file, _LONGEST)
        is_free = None
        if _parsed(content).get("locks") == _lock_domain(file):
            is_free = _try_lock(file)
    finally:
        os.close(file)
    return _Observed(content, None if is_free is None else not is_free)


def _try_lock(file: int) -> bool | None:
    """Return whether a file can be locked, None if the file system does not tell."""
    try:
        # The lock is shared, so that several processes that test at once do not block each other.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _forget_in_child() -> None:
    for lease in _held.values():
        lease.forget()
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
