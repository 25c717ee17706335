"""Where one process ends, all end with a sentence: the first, on which JAX itself depends, or another."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import portpicker
import pytest

from lit_jax.distributed import lifeline
from lit_jax.errors import BAD_INPUT, FAILED, GONE

ROOT = Path(__file__).parents[2]
ENDS = {  # exit code of the launcher, and what each of the others says last
    "kill": (
        128 + signal.SIGKILL,
        "Process {} is gone; run the same command again to go on from what is saved.",
    ),
    "error": (BAD_INPUT, "error: process {}: Mend the data."),
    "bug": (FAILED, "error: process {}: KeyError: 'no such key'"),
}


def start(processes, script, *arguments):
    """Starts a script of this folder several times, by the launcher."""
    launcher = [ROOT / "launch" / "local.sh", str(processes), "--devices=1", "--", sys.executable]
    return subprocess.run(
        [*launcher, Path(__file__).with_name(script), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.mark.parametrize(("how", "who"), [("kill", 0), ("kill", 1), ("error", 2), ("bug", 1)])
def test_the_end_of_one_process_is_that_of_all(how, who):
    result = start(3, "one_of_several_processes.py", how, str(who))
    code, sentence = ENDS[how]
    assert result.returncode == code, result.stderr
    for other in {0, 1, 2} - {who}:
        said = [line for line in result.stderr.splitlines() if line.startswith(f"[{other}] ")]
        # Perhaps not as the last: JAX's own threads may still print what they make of it.
        assert f"[{other}] {sentence.format(who)}" in said
    assert ("Traceback" in result.stderr) == (how == "bug")


class Store(dict):
    """What of JAX's key-value store a lifeline uses."""

    key_value_set = dict.__setitem__

    def blocking_key_value_get(self, key, timeout_ms):
        return self[key]


def test_a_stranger_at_the_port_is_turned_away(monkeypatch):
    monkeypatch.setattr(lifeline, "_delay_aborts", lambda: None)  # of this process
    store = Store()
    first = lifeline.Lifeline(0, store, "localhost")
    ((port, token),) = map(json.loads, store.values())
    for greeting in (b"\x16\x03\x01\xff\n", b"GET / HTTP/1.1\r\n", f"{token}".encode()[:-1], b""):
        with socket.create_connection(("localhost", port), timeout=10) as stranger:
            stranger.sendall(greeting)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b"", greeting
    with socket.create_connection(("localhost", port), timeout=10) as stranger:
        reset = struct.pack("ii", 1, 0)
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    assert not first._peers


def test_the_processes_of_several_slices_find_each_other():
    """By what Google tells the pods of two slices with two machines each; JAX numbers them slice by slice."""
    together = {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_FORCE_TPU_INIT": "1",  # lets JAX take this machine for one with TPUs
        "JAX_COORDINATOR_PORT": str(portpicker.pick_unused_port()),
        "TPU_WORKER_HOSTNAMES": "localhost,localhost",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
        "MEGASCALE_NUM_SLICES": "2",
    }
    script = Path(__file__).with_name("one_of_several_processes.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, "kill", "2"],
            env=os.environ
            | together
            | {"MEGASCALE_SLICE_ID": str(number // 2), "TPU_WORKER_ID": str(number % 2)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    try:
        said = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [GONE, GONE, -signal.SIGKILL, GONE], (
        said
    )
    for number in (0, 1, 3):
        assert ENDS["kill"][1].format(2) in said[number].splitlines()


@pytest.mark.parametrize("index", ["0", "1"])
def test_where_another_process_never_comes_the_wait_has_an_end_and_a_sentence(index):
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("one_of_two_at_the_start.py"), "alone"],
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "JAX_COORDINATOR_ADDRESS": f"localhost:{portpicker.pick_unused_port()}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": index,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == GONE, result.stderr
    missing = {"0": "process 1 has not come", "1": "process 0 is not reached"}[index]
    assert missing in result.stderr
    assert "JAX_NUM_PROCESSES says 2" in result.stderr
    assert result.stderr.count("\n") == 1


def test_who_fails_before_it_joins_leaves_nobody_waiting():
    """The launcher ends the other, which would wait for five minutes."""
    result = start(2, "one_of_two_at_the_start.py", "fails")
    assert result.returncode == BAD_INPUT
    assert result.stderr == "[1] error: Mend the config.\n"
