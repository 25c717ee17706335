"""The content of a lease, and the wait for the lease of another process."""

import dataclasses
import json
import logging
import os
import platform
import time
from typing import Any

from lit_jax.buckets import AnyPath
from lit_jax.errors import UserError

log = logging.getLogger(__name__)

# Several renewals may fail before a lease counts as stale.
RENEW_SECONDS = 10.0
# The time without a change, measured by the waiting process, because the clocks of machines differ.
STALE_SECONDS = 60.0
# A killed process may take this long to end. A process that takes a lease over waits as long before it
# writes, because the former holder may be in the middle of a write.
GRACE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Observed:
    """A lease of another process as this process sees it.

    Attributes:
        content: the bytes of the lease, which change with every renewal.
        is_alive: whether the holder lives; None where locks do not tell.
    """

    content: bytes
    is_alive: bool | None


class Wait:
    """A wait for the lease of another process, which ends when its holder is gone."""

    def __init__(self, workdir: AnyPath):
        self._workdir = workdir
        self._start = self._since = time.monotonic()
        self._content: bytes | None = None

    def is_over(self, found: Observed) -> bool:
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

    def _say(self, found: Observed) -> None:
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


def lease_text(token: str, beat: int, locks: str | None = None) -> bytes:
    """Return the content of this process's lease; all contents with one token have the same length.

    `token` is unique to the holder, `beat` counts the renewals, and `locks` names the processes that see the
    lock or mark of the holder.
    """
    holder = {"host": platform.node(), "pid": os.getpid(), "locks": locks}
    return json.dumps(holder | {"token": token, "beat": f"{beat:012}"}).encode()


def parse_lease(content: bytes | None) -> dict[str, Any]:
    """Return what a lease says about its holder, nothing if it is damaged or not written yet."""
    try:
        return dict(json.loads(content or b""))
    except (ValueError, TypeError):
        return {}


def why_lost(content: bytes | None, token: str) -> str:
    """Return why the holder with a token has lost its lease, "" if `content` is its own; None: no lease."""
    if content is None:
        return "has no lease any more: another run had it and has ended, or someone removed it"
    if token.encode() in content:
        return ""
    return (
        f"was taken over by {_name(content)}: this process did not run for more than "
        f"{STALE_SECONDS:.0f} s"
    )


def _name(content: bytes | None) -> str:
    holder = parse_lease(content)
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}"
