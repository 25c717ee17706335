"""Real processes of one run, of which one dies, stops or fails: the others end, and the launcher says why."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import portpicker
import pytest

from lit_jax.distributed import process
from lit_jax.errors import BAD_INPUT, FAILED, GONE

ROOT = Path(__file__).parents[2]
SOON = 3  # seconds without a heartbeat
ABORTED = -signal.SIGABRT


def script(name):
    return [sys.executable, Path(__file__).with_name(name)]


def start(processes, name, *arguments):
    """Run a script of this folder several times, by the launcher."""
    launcher = [ROOT / "launch" / "local.sh", str(processes), "--devices=1", "--"]
    return subprocess.run(
        [*launcher, *script(name), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def run_bare(how, who, heartbeat_seconds, environments):
    """Run one process for each environment; return their exit codes, and the seconds in which the others
    ended after `who` was dead or stopped.
    """
    command = [*script("one_of_several_processes.py"), how, str(who), str(heartbeat_seconds)]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment,
            stderr=subprocess.DEVNULL,
        )
        for environment in environments
    ]
    try:
        os.waitid(os.P_PID, processes[who].pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
        began = time.monotonic()
        others = [process for index, process in enumerate(processes) if index != who]
        for other in others:
            other.wait(timeout=200)
        seconds = time.monotonic() - began
        processes[who].kill()
        return [process.wait() for process in processes], seconds
    finally:
        for started in processes:
            started.kill()


def environments(count):
    address = f"localhost:{portpicker.pick_unused_port()}"
    together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [together | {"JAX_PROCESS_ID": str(index)} for index in range(count)]


@pytest.mark.parametrize(
    ("how", "who"), [("kill", 1), pytest.param("stop", 0, marks=pytest.mark.long)]
)
def test_under_the_launcher_a_process_that_is_gone_is_one_last_sentence_and_76(how, who):
    result = start(2, "one_of_several_processes.py", how, who, SOON)
    assert result.returncode == GONE, result.stderr
    # A stopped process ends nothing itself: JAX aborts its peer.
    ended_by = signal.SIGKILL if how == "kill" else signal.SIGABRT
    assert re.match(rf"error: .*\b{128 + ended_by}\b", result.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    ("how", "who", "code", "said"),
    [
        ("error", 0, BAD_INPUT, "error: Correct the data."),
        pytest.param("bug", 1, FAILED, "KeyError: 'no such key'", marks=pytest.mark.long),
    ],
)
def test_under_the_launcher_a_failure_of_one_process_is_that_of_all(how, who, code, said):
    # Nobody has to miss a heartbeat here, and on a busy machine one may be late.
    result = start(2, "one_of_several_processes.py", how, who, process.HEARTBEAT_SECONDS)
    assert result.returncode == code, result.stderr
    own = [line for line in result.stderr.splitlines() if line.startswith(f"[{who}] ")]
    assert own[-1] == f"[{who}] {said}"


@pytest.mark.long
def test_a_bare_command_ends_within_a_minute_after_its_peer():
    """Two ways at the same time, because most of it is waiting."""
    ways = [(how, who) for how in ("kill", "stop") for who in (0, 1)]
    runs = [(*way, process.HEARTBEAT_SECONDS, environments(2)) for way in ways]
    # Not all four, because eight processes on two cores could miss the minute.
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(run_bare, *zip(*runs, strict=True)))
    for (how, who), (codes, seconds) in zip(ways, ended, strict=True):
        assert codes[who] == -signal.SIGKILL, how
        assert codes[1 - who] == ABORTED, how
        assert seconds < 60, (how, who)


@pytest.mark.long
def test_the_processes_of_several_slices_find_and_lose_each_other():
    """By what Google tells the pods of two slices with two machines each; JAX numbers them slice by slice."""
    together = {
        "JAX_FORCE_TPU_INIT": "1",  # lets JAX take this machine for one with TPUs
        "JAX_COORDINATOR_PORT": str(portpicker.pick_unused_port()),
        "TPU_WORKER_HOSTNAMES": "localhost,localhost",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
        "MEGASCALE_NUM_SLICES": "2",
    }
    pods = [
        together | {"MEGASCALE_SLICE_ID": str(number // 2), "TPU_WORKER_ID": str(number % 2)}
        for number in range(4)
    ]
    codes, _ = run_bare("kill", 2, SOON, pods)
    assert codes == [ABORTED, ABORTED, -signal.SIGKILL, ABORTED]


def test_where_another_process_never_comes_the_wait_has_an_end_and_a_sentence():
    """Process 0 and process 1 of two runs, at the same time."""
    alone = [
        subprocess.Popen(
            [*script("one_of_two_at_the_start.py"), "alone"],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environments(2)[index],
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    said = [process.communicate(timeout=200)[1] for process in alone]
    assert [process.returncode for process in alone] == [GONE, GONE], said
    for errors, missing in zip(said, ("process 1 ", "process 0 "), strict=True):
        assert missing in errors
        assert re.search(r"JAX_NUM_PROCESSES .*\b2\b", errors)
        assert errors.count("\n") == 1


def test_who_fails_before_it_joins_leaves_nobody_waiting():
    """The launcher ends the other, which would wait for five minutes."""
    result = start(2, "one_of_two_at_the_start.py", "fails")
    assert result.returncode == BAD_INPUT
    assert result.stderr == "[1] error: Correct the config.\n"
