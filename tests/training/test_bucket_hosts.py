"""Runs of several machines on one address in a bucket: who gets it, and who writes what."""

import platform
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from lit_jax.errors import BAD_INPUT
from lit_jax.training.workdir_errors import complete_steps
from tests.training import commands
from tests.training.commands import finish, kill, saved_steps, wait_until

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("on_another_host.py"))
SHORT = "--config.duration=30 steps"
SCHEMES = ["gs", "s3"]


@pytest.fixture
def start(command, store):
    """Starts the train command as a process of a machine of its own."""

    def start(address):
        environment = store.environment | {"PYTHONPATH": str(ROOT)}
        return command(address, SHORT, prefix=(sys.executable, SCRIPT), env=environment)

    return start


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """A run on a local disk that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(command(workdir, SHORT))
    return workdir


def names(address, process, said):
    return re.search(rf"{address} .* {process.pid} .*\b{re.escape(platform.node())}\b", said)


def assert_same_end(folder, whole):
    commands.assert_same_end(folder, whole)
    assert saved_steps(folder) == complete_steps(whole)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_second_run_on_an_address_is_refused_and_changes_nothing(start, store, whole, scheme):
    address, folder = f"{scheme}://bucket/run", store.folder / "run"
    first = start(address)
    wait_until(first, (folder / ".lease").exists)
    second = start(address)
    _, errors = finish(second, BAD_INPUT)
    *_, sentence = errors.splitlines()
    assert names(address, first, sentence)
    finish(first)
    assert_same_end(folder, whole)
    written = {name for name, writers in store.writers().items() if second.pid in writers}
    assert {Path(name).name.partition("-")[0] for name in written} <= {".access"}
    assert not (folder / ".lease").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_that_ends_in_its_first_checkpoint_starts_again(start, store, whole, scheme):
    address, folder = f"{scheme}://bucket/run", store.folder / "run"
    first = start(address)
    wait_until(first, (folder / "checkpoints").exists)
    kill(first)
    assert saved_steps(folder) == []
    finish(start(address))
    assert_same_end(folder, whole)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_is_taken_over_from_a_machine_that_was_killed(start, store, whole, scheme):
    address, folder = f"{scheme}://bucket/run", store.folder / "run"
    chance = random.Random(seed := time.time_ns())
    with store.faults(errors=0.01, lost=0.005, delay=0.02, seed=seed % 1000, where="run"):
        for _ in range(2):
            process = start(address)
            last = len(store.log()) + chance.randrange(50, 400)
            wait_until(process, lambda end=last: len(store.log()) >= end)
            kill(process)
        _, errors = finish(start(address))
    assert names(address, process, errors)
    assert_same_end(folder, whole)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_machine_that_stood_still_writes_nothing_after_another_has_taken_over(
    start, store, whole, scheme
):
    address, folder = f"{scheme}://bucket/run", store.folder / "run"
    first = start(address)
    wait_until(first, lambda: saved_steps(folder))
    first.send_signal(signal.SIGSTOP)
    second = start(address)
    begun = saved_steps(folder)
    wait_until(second, lambda: saved_steps(folder)[-1:] > begun[-1:])
    woken = time.time()
    first.send_signal(signal.SIGCONT)
    _, errors = finish(first, BAD_INPUT)
    assert names(address, second, errors)
    finish(second)
    assert_same_end(folder, whole)
    late = [e for e in store.log() if e["process"] == first.pid and e["seconds"] > woken]
    # Single requests may have been under way, for an object that belongs to this process's checkpoint.
    deleted = [name for entry in late for name in entry["deleted"]]
    written = [name for entry in late for name in entry["written"]]
    assert [name for name in deleted + written if "process_0" not in name] == []
    assert len(deleted) <= 1
