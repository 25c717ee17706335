"""How the processes of a run learn, at once, that one of them has ended.

Process 0 listens, each other one connects, and the connections stay open. The kernel closes those of a
process that dies, whatever it dies of. JAX alone leaves the others in a collective until its heartbeats
time out, and aborts them then, with nothing about what to do.
"""

import contextlib
import ctypes
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

from lit_jax.errors import DONE, GONE, PREEMPTED, UserError

# Where a process is gone, collectives fail, too. So long an error waits for its cause to be known.
GRACE_SECONDS = 2.0
# A machine that vanishes closes nothing: after so many seconds of silence TCP asks, three times.
SILENCE_SECONDS = 8
CONNECT_SECONDS = 60
# Pods and machines of a run may come up minutes apart.
START_SECONDS = 300
_KEY = "lit_jax/lifeline"


class End(NamedTuple):
    """How a process ends: its number, its exit code, and one sentence."""

    process: int
    code: int
    sentence: str = ""

    def __str__(self) -> str:
        if self.code == GONE:
            return f"Process {self.process} is gone; run the same command again to go on from what is saved."
        return f"error: process {self.process}: {self.sentence}"

    @property
    def is_orderly(self) -> bool:
        """Others may go on after it: it was done, or was told to stop as they were."""
        return self.code in (DONE, PREEMPTED)


class Lifeline:
    """The connections of process `index`. `client` is JAX's, to the key-value store that all see.

    Raises UserError if process 0 cannot be reached.
    """

    def __init__(self, index: int, client: Any, host: str):
        self._index = index
        self._peers: dict[int, socket.socket] = {}
        self._ending = threading.Lock()
        _delay_aborts()
        if index == 0:
            token = secrets.token_hex(16)
            server = _listen()
            client.key_value_set(_KEY, json.dumps([server.getsockname()[1], token]))
            self._start(self._accept, server, token)
        else:
            port, token = json.loads(client.blocking_key_value_get(_KEY, CONNECT_SECONDS * 1000))
            connection = _connect(host, port)
            connection.sendall(f"{token} {index}\n".encode())
            self._peers[0] = connection
            self._start(self._follow, 0, connection, connection.makefile("rb"))

    def end(self, code: int, sentence: str = "", details: str = "") -> None:
        """Tells the others. Returns if the end is an orderly one; else ends the process, all of them with
        its code."""
        end = End(self._index, code, sentence)
        if end.is_orderly:
            self._tell(end, self._peers)
            return
        time.sleep(GRACE_SECONDS)
        self._exit(end, self._peers, details)

    def begin(self) -> None:
        """Tell the others that this process, which had told them of an orderly end, runs another command."""
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(b"null\n")

    def _accept(self, server: socket.socket, token: str) -> None:
        while True:
            connection, _ = server.accept()
            self._start(self._welcome, connection, token)

    def _welcome(self, connection: socket.socket, token: str) -> None:
        """Lets in who knows the token; anything else that finds the port is none of ours."""
        _keep_alive(connection)
        lines = connection.makefile("rb")
        given = b""
        with contextlib.suppress(OSError):  # reset before a line came
            given, _, index = lines.readline(100).partition(b" ")
        if not secrets.compare_digest(given, token.encode()):
            lines.close()
            connection.close()
            return
        self._peers[int(index)] = connection
        self._follow(int(index), connection, lines)

    def _follow(self, peer: int, connection: socket.socket, lines: Iterable[bytes]) -> None:
        """Ends this process when that one, or one it tells of, has ended otherwise than orderly."""
        end = End(peer, GONE)
        try:
            for line in lines:
                said = json.loads(line)
                end = End(*said) if said else End(peer, GONE)
                if said and not end.is_orderly:
                    break
        except OSError:  # no answer, or reset
            pass
        if not end.is_orderly:
            self._exit(end, [other for other in self._peers if other not in (peer, end.process)])

    def _exit(self, end: End, others: Iterable[int], details: str = "") -> NoReturn:
        self._ending.acquire()  # for ever: the first who knows of an end speaks
        self._tell(end, others)
        # Not by sys.stderr, whose lock another thread may hold for ever. A progress bar may be on the line.
        with contextlib.suppress(OSError):  # whoever read it may be gone, too
            os.write(2, f"\n{details}{end}\n".encode(errors="backslashreplace"))
        os._exit(
            end.code
        )  # nothing that waits for the others may run now, JAX's own shutdown least of all

    def _tell(self, end: End, others: Iterable[int]) -> None:
        for other in list(others):
            with contextlib.suppress(OSError):  # it is gone itself
                self._peers[other].sendall(json.dumps(end).encode() + b"\n")

    @staticmethod
    def _start(target: Any, *args: Any) -> None:
        threading.Thread(target=target, args=args, daemon=True, name="lifeline").start()


@contextlib.contextmanager
def assembling() -> Iterator[None]:
    """End this process with 76 and a sentence if JAX has not started in `START_SECONDS`.

    JAX's own time-out cannot be caught: it aborts with a page of C++.
    """
    timer = threading.Timer(START_SECONDS, _give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up() -> NoReturn:
    sentence = (
        f"The processes of this run have met, but JAX has not started in {START_SECONDS} s; see what "
        "the others say, and run the same command again."
    )
    with contextlib.suppress(OSError):
        os.write(2, f"error: {sentence}\n".encode())
    os._exit(GONE)


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _connect(host: str, port: int) -> socket.socket:
    try:
        connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
    except OSError as error:
        raise UserError(
            f"Process 0 cannot be reached at {host}, port {port} ({error.strerror or error}); let the "
            "machines of a run reach each other on all ports."
        ) from error
    connection.settimeout(None)
    _keep_alive(connection)
    return connection


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
        if hasattr(socket, option):  # macOS has one of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), SILENCE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _delay_aborts() -> None:
    """Lets an abort wait for six seconds, in which a thread can say what is the matter.

    JAX's client aborts within milliseconds when process 0 is gone, and takes no callback from Python
    (std::bad_cast, jaxlib 0.10). The C library's sleep() is called as the signal's handler, so its argument
    is SIGABRT, 6; like few functions, it may be. Then abort() goes on.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
