"""local.sh: exit codes and signals of several processes on one machine."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest

from lit_jax.errors import BAD_INPUT, DONE, FAILED, GONE, INTERRUPTED, PREEMPTED
from tests.launch.scripts import LAUNCH, is_running, launch, until, with_tools


@pytest.mark.parametrize(
    ("codes", "worst"),
    [
        ((0, 0), 0),
        ((0, PREEMPTED), PREEMPTED),
        ((GONE, PREEMPTED), GONE),
        ((GONE, BAD_INPUT), BAD_INPUT),
        ((137, GONE), GONE),
        ((134, 137), GONE),
        ((GONE, 143), GONE),
    ],
)
def test_local_returns_the_worst_exit_code(codes, worst):
    of_process = f"exit $(echo {' '.join(map(str, codes))} | cut -d' ' -f$((JAX_PROCESS_ID + 1)))"
    result = launch(LAUNCH / "local.sh", "2", "--", "bash", "-c", of_process)
    assert result.returncode == worst


@pytest.mark.parametrize("script", [("local.sh", "1"), ("process.sh",), ("restart.sh",)])
def test_what_jax_aborts_ends_with_one_sentence_and_76(script):
    name, *arguments = script
    # The second time, which only restart.sh comes to, an error ends it.
    aborts = 'echo C++ >&2; [ -e "$1" ] && exit 2; touch "$1"; kill -ABRT $$'
    with tempfile.TemporaryDirectory() as folder:
        words = (*arguments, "--", "bash", "-c", aborts, "-", f"{folder}/second")
        result = launch(LAUNCH / name, *words, env=os.environ | {"PAUSE": "0"})
    sentence = next(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "exit code 134" in sentence
    if name == "restart.sh":
        assert result.returncode == BAD_INPUT
    else:
        assert result.returncode == GONE
        assert result.stderr.splitlines()[-1] == sentence


def test_a_process_gets_the_signals_of_its_script():
    """Kubernetes tells the first process of a pod alone to stop."""
    program = "trap 'echo saved; exit 75' TERM; echo ready; while :; do sleep 0.1; done"
    script = subprocess.Popen(
        [LAUNCH / "process.sh", "--", "bash", "-c", program], stdout=subprocess.PIPE, text=True
    )
    assert script.stdout.readline() == "ready\n"
    script.terminate()
    assert script.communicate(timeout=200)[0] == "saved\n"
    assert script.returncode == PREEMPTED


@pytest.mark.parametrize("failing", [0, 1])
def test_local_ends_the_others_where_one_fails(failing):
    of_process = f"[ $JAX_PROCESS_ID = {failing} ] && exit {FAILED}; exec sleep 600"
    result = launch(LAUNCH / "local.sh", "2", "--", "bash", "-c", of_process)
    assert result.returncode == FAILED
    assert result.stderr == ""


@pytest.mark.parametrize("code", [DONE, PREEMPTED])
def test_local_waits_for_the_others_where_one_ends_in_order(code):
    of_process = f"[ $JAX_PROCESS_ID = 1 ] && exit {code}; sleep 1; echo saved; exit {code}"
    result = launch(LAUNCH / "local.sh", "2", "--", "bash", "-c", of_process)
    assert result.returncode == code
    assert result.stdout == "[0] saved\n"


@pytest.fixture
def interruptible():
    """Where a shell runs the tests in the background, they and what they start ignore SIGINT."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_local_says_who_speaks_and_passes_signals_on():
    program = (
        "import signal, sys, time\n"
        "for name in ('SIGTERM', 'SIGINT'):\n"
        "    signal.signal(getattr(signal, name), lambda number, _: (print(number), sys.exit(75)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        launcher = subprocess.Popen(
            [LAUNCH / "local.sh", "2", "--", sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
        )
        ready = {launcher.stdout.readline() for _ in range(2)}
        assert ready == {"[0] ready\n", "[1] ready\n"}
        launcher.send_signal(number)
        said, _ = launcher.communicate(timeout=200)
        assert sorted(said.splitlines()) == [f"[0] {number:d}", f"[1] {number:d}"]
        assert launcher.returncode == PREEMPTED


@pytest.mark.usefixtures("interruptible")
def test_local_passes_on_a_signal_that_came_before_there_were_processes(tmp_path):
    """Its search for a free port takes two seconds here."""
    python = f'touch {tmp_path}/searching; /bin/sleep 2; exec {sys.executable} "$@"'
    (tmp_path / "python3").write_text(f"#!/usr/bin/env bash\n{python}\n")
    (tmp_path / "python3").chmod(0o755)
    launcher = subprocess.Popen(
        [LAUNCH / "local.sh", "2", "--", "/bin/sleep", "600"],
        env=with_tools(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until((tmp_path / "searching").exists)
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.communicate(timeout=60)[1] == ""
    assert launcher.returncode == INTERRUPTED


@pytest.mark.usefixtures("interruptible")
def test_local_interrupted_is_interrupted_however_its_processes_end():
    program = "trap 'exit $((JAX_PROCESS_ID + 1))' INT; echo ready; while true; do sleep 0.1; done"
    launcher = subprocess.Popen(
        [LAUNCH / "local.sh", "2", "--", "bash", "-c", program], stdout=subprocess.PIPE, text=True
    )
    for _ in range(2):
        launcher.stdout.readline()
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=60)
    assert launcher.returncode == INTERRUPTED


@pytest.mark.parametrize("whole_group", [False, True])
def test_local_killed_leaves_nothing_behind(tmp_path, whole_group):
    """Neither its processes nor what they have started."""
    of_process = f"sleep 600 & echo $$ $! >> {tmp_path}/started; wait"
    launcher = subprocess.Popen(
        [LAUNCH / "local.sh", "2", "--", "bash", "-c", of_process],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    started = tmp_path / "started"
    until(lambda: started.exists() and len(started.read_text().split()) == 4)
    if whole_group:
        os.killpg(launcher.pid, signal.SIGKILL)
    else:
        launcher.kill()
    launcher.wait()
    until(lambda: not any(map(is_running, started.read_text().split())))
