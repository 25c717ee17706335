"""The lease of a run folder on a file system: a file, locked by its holder.

The holder keeps a file `.lease.N` in the folder, locks it by flock and rewrites it every few seconds. If two
processes see the same locks, the kernel tells whether the holder lives, and frees the lock however the holder
ends. On other machines, and on file systems without flock, a process may take over a lease whose content has
not changed for a minute: the process creates `.lease.N+1`, which the file system allows to one process only,
and removes `.lease.N`.
"""

import contextlib
import fcntl
import os
import platform
import secrets
import time
from pathlib import Path

from lit_jax.training import lease_wait

_PREFIX = ".lease."
# The most bytes that are read of a lease.
_LONGEST = 4096


class FileLease:
    """The lease of one folder on a file system; methods raise OSError if the file system fails."""

    LOOK_SECONDS = 0.0
    POLL_SECONDS = 0.2

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._token = secrets.token_hex(8)
        self._beat = 0
        self._file = -1
        self._number = 0
        self._is_locked = False

    def acquire(self, wait: lease_wait.Wait) -> bool:
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
            time.sleep(lease_wait.GRACE_SECONDS)
        # The first listing may have missed a lease that was created meanwhile, so this process looks again.
        if not self.why_lost():
            return True
        self._drop()
        return False

    def why_lost(self) -> str:
        """Return why this process has lost the lease, "" if it still has it."""
        newest = _newest(self._workdir)
        # The newest lease may disappear before it is read.
        content = (_read(newest[1]) or b"") if newest else None
        return lease_wait.why_lost(content, self._token)

    def renew(self) -> str:
        """Write the lease again unless it is lost; return why it is lost."""
        why_lost = self.why_lost()
        if not why_lost:
            self._write()
        return why_lost

    def release(self) -> None:
        """Remove the lease if this process still has it."""
        with contextlib.suppress(OSError):
            if not self.why_lost():
                self._path.unlink()
        os.close(self._file)

    def forget(self) -> None:
        """Close the file in a forked process, which would otherwise keep the lock after the parent ends."""
        os.close(self._file)

    @property
    def _path(self) -> Path:
        return self._workdir / f"{_PREFIX}{self._number}"

    def _write(self) -> None:
        self._beat += 1
        locks = _lock_domain(self._file) if self._is_locked else None
        # Each content overwrites the previous one completely, because all have the same length.
        os.pwrite(self._file, lease_wait.lease_text(self._token, self._beat, locks), 0)
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


def _lock(file: int) -> bool:
    """Lock a new file. Return False if the file system has no locks."""
    try:
        # The call waits, because another process that tests for a lock holds one itself for a moment.
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _observe(path: Path) -> lease_wait.Observed | None:
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
        if lease_wait.parse_lease(content).get("locks") == _lock_domain(file):
            is_free = _try_lock(file)
    finally:
        os.close(file)
    return lease_wait.Observed(content, None if is_free is None else not is_free)


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
