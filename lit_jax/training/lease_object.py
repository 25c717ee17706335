"""The lease of a run folder in a bucket: an object that only its holder overwrites.

The holder writes the object on the condition that no other process has written it since: by the object's
generation on Google Cloud Storage, by its ETag on S3. A process may take over a lease that has not changed
for a minute, on the same condition, so that one process at most succeeds. On the machine of the holder the
kernel tells whether the holder lives.
"""

import contextlib
import errno
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

from lit_jax.buckets import BucketPath, key_value_store
from lit_jax.training import lease_wait

_NAME = ".lease"
# The longest wait for an answer, in seconds. TensorStore repeats failed requests for almost as long.
_ANSWER_SECONDS = 15.0
_RETRIES = {"max_retries": 8, "initial_delay": "100ms", "max_delay": "2s"}
# The most failed writes of a new lease; after more, the bucket counts as missing. Other processes would not
# so often create a lease and end while this one waits for an answer.
_MISSES = 3


class ObjectLease:
    """The lease of one folder in a bucket (gs://, s3://); methods raise OSError if the bucket fails."""

    LOOK_SECONDS = 1.0
    POLL_SECONDS = 1.0

    def __init__(self, workdir: BucketPath):
        self._store, self._address = _open(workdir), str(workdir)
        self._token = secrets.token_hex(8)
        self._beat = 0
        # TensorStore's name for what this process wrote last.
        self._generation = b""
        self._mark: socket.socket
        self._misses = 0

    def acquire(self, wait: lease_wait.Wait) -> bool:
        """Write the lease if no other process may have the folder; return whether this succeeded."""
        found = self._read()
        is_there = found.state == "value"
        if is_there and not wait.is_over(self._observe(found.value)):
            return False
        with contextlib.ExitStack() as stack:
            self._mark = stack.enter_context(_mark(self._token))
            if not self._write(found.stamp.generation):
                self._misses += not is_there
                # TensorStore does not tell a missing bucket of S3 from an object that another process wrote.
                if self._misses > _MISSES:
                    raise FileNotFoundError(errno.ENOENT, "the bucket does not exist")
                return False
            # The former holder may have sent a write that the store has not finished.
            if is_there:
                time.sleep(lease_wait.GRACE_SECONDS)
                if self.why_lost():
                    return False
            stack.pop_all()
        return True

    def why_lost(self) -> str:
        """Return why this process has lost the lease, "" if it still has it."""
        found = self._read()
        content = found.value if found.state == "value" else None
        return lease_wait.why_lost(content, self._token)

    def renew(self) -> str:
        """Write the lease again unless it is lost; return why it is lost."""
        return "" if self._write(self._generation) else self.why_lost()

    def release(self) -> None:
        """Remove the lease if this process still has it."""
        with contextlib.suppress(OSError):
            # On S3 TensorStore tests the condition of a removal before it removes. Nobody takes a lease over
            # in between that was just renewed.
            if self._write(self._generation):
                _answer(self._store.write(_NAME, None, if_equal=self._generation))
        self._mark.close()

    def forget(self) -> None:
        """Close the mark in a forked process, which would otherwise keep it after the parent ends."""
        self._mark.close()

    def _locks(self) -> str | None:
        """Return a name that the processes share which see this folder's marks, None without marks."""
        kernel = _kernel()
        # The lease in a copy of the folder, made while the run goes on, has the address of the original.
        return kernel and f"{kernel}/{self._address}"

    def _observe(self, content: bytes) -> lease_wait.Observed:
        """Return the state of a lease of another process."""
        lease, locks = lease_wait.parse_lease(content), self._locks()
        sees_marks = locks is not None and lease.get("locks") == locks
        is_alive = _is_marked(f"{lease.get('token')}") if sees_marks else None
        return lease_wait.Observed(content, is_alive)

    def _read(self) -> Any:
        return _answer(self._store.read(_NAME))

    def _write(self, generation: bytes) -> bool:
        """Write the lease over a generation of it; return False if another process has written it since."""
        self._beat += 1
        locks = self._locks() if self._mark.getsockname() else None
        text = lease_wait.lease_text(self._token, self._beat, locks)
        stamp = _answer(self._store.write(_NAME, text, if_equal=generation))
        if not stamp.generation:
            # A write whose answer was lost fails when it is repeated, because the first try has succeeded.
            found = self._read()
            if self._token.encode() not in found.value:
                return False
            stamp = found.stamp
        self._generation = stamp.generation
        return True


def _kernel() -> str | None:
    """Return a name for the group of processes that see each other's marks, None if there are no marks.

    The name identifies a running kernel of Linux and a network namespace, such as that of a container.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/net')}"
    except OSError:
        return None


def _mark_name(token: str) -> str:
    # On Linux, the name of a socket that begins with a null character is in no file system.
    return f"\0lit_jax/{token}"


def _mark(token: str) -> socket.socket:
    """Return a socket that has a name until this process ends; without such names it has none."""
    mark = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with contextlib.suppress(OSError):
        mark.bind(_mark_name(token))
    return mark


def _is_marked(token: str) -> bool | None:
    """Return whether a process has the mark of a token, None if the kernel does not tell."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_mark_name(token))
        except ConnectionRefusedError:
            return False
        except OSError:
            return None
    return True


def _open(workdir: BucketPath) -> Any:
    import tensorstore as ts

    spec = key_value_store(workdir)
    context = ts.Context({f"{spec['driver']}_request_retries": _RETRIES})
    return ts.KvStore.open(spec, context=context).result()


def _answer(request: Any) -> Any:
    """Return the result of a request to TensorStore. Raise OSError if it fails or takes too long."""
    try:
        return request.result(timeout=_ANSWER_SECONDS)
    except TimeoutError as error:
        request.cancel()
        text = f"no answer within {_ANSWER_SECONDS:.0f} s"
        raise OSError(errno.ETIMEDOUT, text) from error
    # TensorStore raises ValueError and others, whose messages quote the whole answer.
    except Exception as error:
        raise OSError(errno.EIO, str(error).partition(" [")[0].partition("\n")[0]) from error
