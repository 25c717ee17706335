"""The meeting of a run's processes before JAX starts: missing processes are named within seconds.

JAX itself waits in silence and then aborts with a page of C++. Here process 0 listens at the coordinator's
address, which JAX takes over afterwards. The other processes connect and send their index. When all have
come, process 0 tells them to go on.
"""

import contextlib
import errno
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterable

from lit_jax.distributed.launchers import Place, split_address
from lit_jax.errors import GoneError, UserError

log = logging.getLogger(__name__)

# Pods and machines of a run may come up minutes apart.
START_SECONDS = 300
# Missing processes are named after SAY_SECONDS, and then every _AGAIN_SECONDS.
SAY_SECONDS = 5
_AGAIN_SECONDS = 60
# A process of an earlier run that was told to stop may still hold the port for a moment.
_PORT_SECONDS = 5
# DNS may learn the name of a new pod late.
_NAME_SECONDS = 60
# The greeting tells this protocol from any other service that happens to use the port.
_HELLO, _GO, _NO = b"lit_jax\n", b"go\n", b"no "


def meet(place: Place) -> None:
    """Wait until all processes of the run have come.

    Raises UserError if the processes cannot meet, and GoneError if some have not come in `START_SECONDS`.
    """
    host, port = split_address(place.address_from, place.address)
    clock = _Clock(place)
    if place.index == 0:
        _check_name(host, place, clock)
        _gather(port, place, clock)
    else:
        _follow(host, port, place, clock)


class _Clock:
    """The time since the start, which decides when to warn about missing processes and when to give up."""

    def __init__(self, place: Place):
        self._place = place
        self._start = time.monotonic()
        self._next = self._start + SAY_SECONDS

    @property
    def seconds(self) -> float:
        """The seconds since the start."""
        return time.monotonic() - self._start

    def tick(self, missing: Callable[[], str]) -> None:
        """Log the missing processes when a warning is due. Raise GoneError after `START_SECONDS`."""
        place = self._place
        says = f"{place.count_from} asks for {place.count} processes"
        if self.seconds >= START_SECONDS:
            raise GoneError(
                f"The processes of this run have not all connected within {START_SECONDS} s: {missing()} "
                f"({says}); see the messages of the others, and run the same command again."
            )
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _AGAIN_SECONDS
            log.warning(
                "Process %d is waiting: %s (%s). It gives up after %d s in total; to run a single process, "
                "unset %s.",
                place.index,
                missing(),
                says,
                START_SECONDS,
                place.count_from,
            )


def _check_name(host: str, place: Place, clock: _Clock) -> None:
    """Raise UserError if process 0 cannot resolve the name by which the other processes look for it."""
    while (problem := _unknown(host)) is not None:
        if clock.seconds >= _NAME_SECONDS:
            raise UserError(
                f"{place.address_from} names the host {host} for process 0, which this machine cannot find "
                f"({problem}); correct it, or unset {place.address_from} and {place.count_from} if they are "
                "left over."
            )
        clock.tick(
            lambda: f"this machine cannot find {host}, named by {place.address_from} ({problem})"
        )
        time.sleep(0.5)


def _unknown(host: str) -> str | None:
    try:
        socket.getaddrinfo(host, None)
    # The IDNA codec raises UnicodeError for a name with an empty or too long part.
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def _gather(port: int, place: Place, clock: _Clock) -> None:
    """Listen, as process 0, until each index has come once, and then tell all processes to go on."""
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
                        # A process sends nothing after its greeting, so a readable socket is a closed one.
                        left = next(index for index, peer in there.items() if peer is key.fileobj)
                        selector.unregister(there[left])
                        there.pop(left).close()
        for peer in there.values():
            # A process may have ended meanwhile. JAX's own start then waits for it and times out.
            with contextlib.suppress(OSError):
                peer.sendall(_GO)
        for peer in there.values():
            # The peers must close first. The side that closes first keeps the port in TIME_WAIT for a
            # minute, and JAX needs this port at once.
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
    """Accept a process of this run, and reject anything else that finds the port."""
    peer, (address, *_) = server.accept()
    # A port scanner that sends nothing must not block the meeting.
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
    # A wrong count or a double index means a wrong launch, so that process gets the reason and ends.
    reason = ""
    if count != place.count:
        reason = (
            f"process {index} on {address} is one of {count} processes, process 0 of {place.count}"
        )
    elif index in there:
        reason = f"two processes have the number {index}, one of them on {address}"
    if reason:
        log.warning("A process was refused: %s.", reason)
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
    return f"{which} not connected to {place.address}, named by {place.address_from}{elsewhere}"


def _is_here(host: str) -> bool:
    """Return whether a host name is one of this machine; False also for an address behind NAT."""
    with contextlib.suppress(OSError, UnicodeError):
        for family, kind, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                # Only addresses of this machine can be bound.
                probe.bind(address)
                return True
    return False


def _listen(port: int, place: Place) -> socket.socket:
    """Return a socket that listens at the coordinator's port. Raise UserError if the port is taken."""
    latest = time.monotonic() + _PORT_SECONDS
    while True:
        try:
            # The peers may reach this machine by IPv4 or IPv6, so the socket accepts both where the system
            # can.
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
                f"Process 0 cannot listen on port {port} ({reason}; {chosen}); choose another port there, or "
                "set JAX_COORDINATOR_PORT if the launcher chose it."
            ) from error


def _follow(host: str, port: int, place: Place, clock: _Clock) -> None:
    """Connect to process 0, as often as needed, and wait until it says to go on."""
    problem = ""

    def missing() -> str:
        where = f"{place.address}, named by {place.address_from}"
        if not problem:
            return "other processes are missing"
        return f"process 0 cannot be reached at {where} ({problem})"

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
    # JAX's service starts now. A client that connects before the service is up waits for a longer retry.
    time.sleep(0.1)


def _wait_for_word(peer: socket.socket, clock: _Clock, missing: Callable[[], str]) -> bool:
    """Return True when process 0 says to go on, False if it has ended. Raise UserError if it refuses."""
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
            reason = said.removeprefix(_NO).decode(errors="replace").strip()
            raise UserError(
                f"Process 0 refuses this process: {reason}; give each process its own number, and all of "
                "them the same count."
            )
        # An empty read means that process 0 has closed the connection.
        if not more:
            return False
