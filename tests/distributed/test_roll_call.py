"""The processes of a run come together: threads stand for them, on a real port."""

import concurrent.futures
import contextlib
import logging
import re
import socket
import time

import portpicker
import pytest

from lit_jax.distributed import roll_call
from lit_jax.distributed.launchers import Place
from lit_jax.errors import GoneError, UserError

# Seconds after which a test has failed; none is expected to wait so long.
LONG = 100


@pytest.fixture
def place():
    address = f"localhost:{portpicker.pick_unused_port()}"
    return lambda index, count=3: Place(index, count, address, "HOW_MANY", "WHERE")


@pytest.fixture
def soon(monkeypatch, caplog):
    """Say at once who is missing, and give up on ports and names after a second."""
    monkeypatch.setattr(roll_call, "SAY_SECONDS", 0)
    monkeypatch.setattr(roll_call, "_PORT_SECONDS", 0.5)
    monkeypatch.setattr(roll_call, "_NAME_SECONDS", 1)
    monkeypatch.setattr(logging.getLogger("lit_jax"), "propagate", True)
    return caplog


def connected(place):
    """A connection to process 0, as soon as it listens."""
    latest = time.monotonic() + LONG
    while True:
        try:
            return socket.create_connection(("localhost", int(place.address.split(":")[1])), LONG)
        except ConnectionRefusedError:
            assert time.monotonic() < latest
            time.sleep(0.02)


@contextlib.contextmanager
def greeted(place):
    """A process that has come, and can end."""
    with connected(place) as peer:
        peer.sendall(f"lit_jax {place.index} {place.count}\n".encode())
        assert peer.recv(100) == b"lit_jax\n"
        yield peer


def test_all_go_on_when_the_last_has_come_in_any_order(place):
    started = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for index in (2, 0):
            started.append(pool.submit(roll_call.meet, place(index)))
        time.sleep(0.5)
        assert not any(one.done() for one in started)
        with connected(place(0)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            started.append(pool.submit(roll_call.meet, place(1)))
            for one in started:
                one.result(timeout=LONG)
    # JAX's own service takes the port over.
    socket.create_server(("", int(place(0).address.split(":")[1]))).close()


def give_up(monkeypatch):
    """Let who waits in `meet` give up when it looks at its clock next."""
    monkeypatch.setattr(roll_call, "START_SECONDS", 0)


def test_it_is_said_who_is_missing_and_who_says_how_many(place, soon, monkeypatch):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(roll_call.meet, place(0, 4))
        with greeted(place(2, 4)):
            give_up(monkeypatch)
            with pytest.raises(GoneError, match=r"1, 3 .*HOW_MANY .*4"):
                first.result(timeout=LONG)
    said = "\n".join(record.getMessage() for record in soon.records)
    assert re.search(r"HOW_MANY .*\b4\b", said)
    assert "WHERE" in said


def test_who_does_not_reach_process_0_says_so(place, soon, monkeypatch):
    monkeypatch.setattr(roll_call, "START_SECONDS", 2)
    with pytest.raises(GoneError, match=r"localhost:.* refused"):
        roll_call.meet(place(1))
    assert "unset HOW_MANY" in soon.records[0].getMessage()


def test_two_of_one_number_and_another_count_are_turned_away(place):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(roll_call.meet, place(0))
        # A second process of a number is one that comes after the first has been greeted.
        with greeted(place(1)) as second:
            for stranger, reason in ((place(1), r"\b1\b"), (place(2, 5), r"5 processes")):
                with pytest.raises(UserError, match=reason):
                    roll_call.meet(stranger)
            third = pool.submit(roll_call.meet, place(2))
            second.settimeout(LONG)
            assert second.recv(100) == b"go\n"
        for one in (first, third):
            one.result(timeout=LONG)


def test_a_process_that_has_ended_is_missing_again(place, monkeypatch):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(roll_call.meet, place(0))
        with greeted(place(1)) as peer:
            peer.shutdown(socket.SHUT_WR)
            # Process 0 closes its end when it has noticed.
            assert peer.recv(1) == b""
        give_up(monkeypatch)
        with pytest.raises(GoneError, match=r"\b1, 2\b"):
            first.result(timeout=LONG)


@pytest.mark.parametrize(
    ("index", "address", "reason"),
    [(0, "no-such-node:80", r"WHERE .*no-such-node"), (0, "a..b:80", "a..b")],
)
def test_a_name_that_is_left_over_is_refused(soon, index, address, reason):
    with pytest.raises(UserError, match=reason):
        roll_call.meet(Place(index, 2, address, "HOW_MANY", "WHERE"))


def test_a_port_in_use_is_refused(place, soon):
    with (
        socket.create_server(("", int(place(0).address.split(":")[1]))),
        pytest.raises(UserError, match=r"WHERE=localhost"),
    ):
        roll_call.meet(place(0))
