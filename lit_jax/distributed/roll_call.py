"""The meeting of a run's processes before JAX starts: missing processes are named within seconds.

JAX waits in silence and then aborts with a page of C++. Process 0 listens at the coordinator's address, which
JAX takes over afterwards; the others connect and give their number. When all are there, process 0 lets them
go on.
"""

import contextlib
import errno
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

from lit_jax.distributed.launchers import Place, split_address
from lit_jax.errors import GoneError, UserError

log = logging.getLogger(__name__)

# Pods and machines of a run may come up minutes apart.
START_SECONDS = 300
# The seconds until missing processes are named for the first time, and between the next times.
SAY_SECONDS = 5
_AGAIN_SECONDS = 60
# A process of an earlier run that was told to stop may hold the port a little longer.
_PORT_SECONDS = 5
# The name of a new pod may appear late.
_NAME_SECONDS = 60
_HELLO, _GO, _NO = b"lit_jax\n", b"go\n", b"no "


def meet(place: Place) -> None:
    """Return when all processes of the run are there.

    Raise UserError if they cannot meet, and GoneError if some have not come in `START_SECONDS`.
    """
    host, port = split_address(place.address_from, place.address)
    clock = _Clock(place)
    if place.index == 0:
        _check_name(host, place, clock)
        _gather(port, place, clock)
    else:
        _follow(host, port, place, clock)


class _Clock:
    """The time since the start, which decides when to warn and when to give up."""

    def __init__(self, place: Place):
        self._place = place
        self._start = time.monotonic()
        self._next = self._start + SAY_SECONDS

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def tick(self, missing: Callable[[], str]) -> None:
        """Name the missing processes if it is time to. Raise GoneError after `START_SECONDS`."""
        place = self._place
        says = f"{place.count_from} says {place.count} processes"
        if self.seconds >= START_SECONDS:
            raise GoneError(
                f"The processes of this run have not come together in {START_SECONDS} s: "
                f"{missing()} ({says}). See what the others say, and run the same command again."
            )
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _AGAIN_SECONDS
            log.warning(
                "Process %d waits: %s (%s). It waits for %d s in all; for a single process unset %s.",
                place.index,
                missing(),
                says,
                START_SECONDS,
                place.count_from,
            )


def _check_name(host: str, place: Place, clock: _Clock) -> None:
    """Raise UserError if process 0 does not know the name under which the others look for it."""
    while (problem := _unknown(host)) is not None:
        if clock.seconds >= _NAME_SECONDS:
            raise UserError(
                f"{place.address_from} puts process 0 on {host}, which is not known here ({problem}); "
                f"correct it, or unset {place.address_from} and {place.count_from} if they are left over."
            )
        clock.tick(lambda: f"{host}, named by {place.address_from}, is not known ({problem})")
        time.sleep(0.5)


def _unknown(host: str) -> str | None:
    try:
        socket.getaddrinfo(host, None)
    # UnicodeError: a name with an empty or long part.
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def _gather(port: int, place: Place, clock: _Clock) -> None:
    """Listen, as process 0, until each number has come once, and let all go on."""
    there: dict[int, socket.socket] = {}
    try:
        with _listen(port, place) as server, selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            while len(there) < place.count - 1:
                clock.tick(lambda: _missing(there, place))
                for key, _ in selector.select(timeout=0.2):
                    if key.fileobj is server:
                        _welcome(server, there, selector, place)
                    else:
                        # No process speaks now, so this one has ended.
                        left = next(index for index, peer in there.items() if peer is key.fileobj)
                        selector.unregister(there[left])
                        there.pop(left).close()
        for peer in there.values():
            # JAX will wait for a process that has ended meanwhile.
            with contextlib.suppress(OSError):
                peer.sendall(_GO)
        for peer in there.values():
            # The others close first: the side that does so keeps the port for a minute.
            with contextlib.suppress(OSError):
                peer.recv(1)
    finally:
        for peer in there.values():
            peer.close()


def _welcome(
    server: socket.socket,
    there: dict[int, socket.socket],
    selector: selectors.BaseSelector,
    place: Place,
) -> None:
    """Take in a process of this run, and turn away anything else that finds the port."""
    peer, (address, *_) = server.accept()
    peer.settimeout(5)
    try:
        name, index, count = peer.recv(100).split()
        index, count = int(index), int(count)
        peer.sendall(_HELLO)
    except (OSError, ValueError):
        peer.close()
        return
    if name != _HELLO.strip() or not index > 0:
        peer.close()
        return
    reason = ""
    if count != place.count:
        reason = f"process {index} on {address} is one of {count} processes, process 0 one of {place.count}"
    elif index in there:
        reason = f"two processes have the number {index}, one of them on {address}"
    if reason:
        log.warning("A process was turned away: %s.", reason)
        with contextlib.suppress(OSError):
            peer.sendall(_NO + f"{reason}\n".encode())
        peer.close()
        return
    there[index] = peer
    selector.register(peer, selectors.EVENT_READ)


def _missing(there: Iterable[int], place: Place) -> str:
    numbers = sorted({*range(1, place.count)} - {*there})
    shown = ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")
    host = split_address(place.address_from, place.address)[0]
    elsewhere = "" if _is_here(host) else f"; {host} is not an address of this machine"
    which = f"process {shown} has" if len(numbers) == 1 else f"processes {shown} have"
    return f"{which} not come to {place.address}, named by {place.address_from}{elsewhere}"


def _is_here(host: str) -> bool:
    """Return whether the name is one of this machine's; False for one that a router translates, too."""
    with contextlib.suppress(OSError, UnicodeError):
        for family, kind, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(address)
                return True
    return False


def _listen(port: int, place: Place) -> socket.socket:
    """Return a socket that listens at the coordinator's port. Raise UserError if that is not possible."""
    latest = time.monotonic() + _PORT_SECONDS
    while True:
        try:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            return socket.create_server(
                ("", port), family=family, dualstack_ipv6=dual, backlog=1024
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < latest:
                time.sleep(0.2)
                continue
            reason = os.strerror(error.errno) if error.errno else str(error)
            chosen = f"{place.address_from}={place.address}"
            raise UserError(
                f"Process 0 cannot listen at port {port} ({reason}; {chosen}); choose another port there, or "
                "by JAX_COORDINATOR_PORT where the launcher chooses it."
            ) from error


def _follow(host: str, port: int, place: Place, clock: _Clock) -> None:
    """Connect to process 0, as often as needed, and wait for its word to go on."""
    problem = ""

    def missing() -> str:
        where = f"{place.address}, named by {place.address_from}"
        return (
            f"process 0 is not reached at {where} ({problem})" if problem else "others are missing"
        )

    while True:
        clock.tick(missing)
        try:
            with socket.create_connection((host, port), timeout=5) as peer:
                peer.sendall(_HELLO.strip() + f" {place.index} {place.count}\n".encode())
                if peer.recv(len(_HELLO)) != _HELLO:
                    problem = "something else answers there"
                else:
                    problem = ""
                    if _wait_for_word(peer, clock, missing):
                        break
                    problem = "it has ended"
        except (OSError, UnicodeError) as error:
            problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        time.sleep(0.5)
    # JAX's service starts now; a process that comes too early waits longer.
    time.sleep(0.1)


def _wait_for_word(peer: socket.socket, clock: _Clock, missing: Callable[[], str]) -> bool:
    """Return True if process 0 lets this one go on, False if it has ended. Raise UserError if it refuses."""
    said = b""
    peer.settimeout(0.5)
    while True:
        try:
            more = peer.recv(1000)
        except TimeoutError:
            clock.tick(missing)
            continue
        said += more
        if said.startswith(_GO):
            return True
        if said.startswith(_NO) and said.endswith(b"\n"):
            _refuse(said)
        if not more:
            return False


def _refuse(said: bytes) -> NoReturn:
    reason = said.removeprefix(_NO).decode(errors="replace").strip()
    raise UserError(
        f"Process 0 turns this one away: {reason}; give each process its own number and all the same count."
    )
