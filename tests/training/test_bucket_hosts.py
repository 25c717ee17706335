"""Runs of several machines on one address in a bucket: who gets it, and who writes what."""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lit_jax.buckets import COMMIT_FILE
from lit_jax.errors import BAD_INPUT
from lit_jax.training.metrics import read_metrics
from lit_jax.training.workdir import load_run
from lit_jax.training.workdir_errors import complete_steps
from lit_jax.trees import flatten
from tests.object_store.served import serve

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("on_another_host.py"))
SHORT = "--config.duration=30 steps"
SCHEMES = ["gs", "s3"]


@pytest.fixture
def store(tmp_path):
    with serve(tmp_path / "bucket") as served:
        served.folder.mkdir()
        yield served


@pytest.fixture
def start(command, store):
    """Starts the train command as a process of a machine of its own."""

    def start(address, *flags, stale=60.0):
        prefix = (sys.executable, SCRIPT, f"stale={stale}")
        environment = store.environment | {"PYTHONPATH": str(ROOT)}
        return command(address, SHORT, *flags, prefix=prefix, env=environment)

    return start


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """A run on a local disk that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(command(workdir, SHORT))
    return workdir


def finish(process, code=0):
    output, errors = process.communicate(timeout=600)
    assert process.returncode == code, output + errors
    return errors


def wait_until(process, happened):
    while not happened():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def completed(folder):
    """The number of complete checkpoints in the folder that is served as the bucket's."""
    return len(commits(folder))


def commits(folder):
    return list(folder.glob(f"checkpoints/*/{COMMIT_FILE}"))


def losses(folder):
    rows = [row for row in read_metrics(folder) if "loss" in row]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def assert_same_end(folder, whole):
    """Bit for bit; every object is a file of the served folder, so the same functions read both runs."""
    assert losses(folder) == losses(whole)
    assert complete_steps(folder) == complete_steps(whole)
    ours, theirs = flatten(load_run(folder).params), flatten(load_run(whole).params)
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_second_run_on_an_address_is_refused_and_changes_nothing(start, store, whole, scheme):
    address, folder = f"{scheme}://bucket/run", store.folder / "run"
    first = start(address, stale=6.0)
    wait_until(first, (folder / ".lease").exists)
    second = start(address, stale=6.0)
    errors = finish(second, BAD_INPUT)
    *_, sentence = errors.splitlines()
    assert f"{address} is in use by process {first.pid} on " in sentence
    finish(first)
    assert_same_end(folder, whole)
    written = {name for name, writers in store.writers().items() if second.pid in writers}
    assert {Path(name).name.partition("-")[0] for name in written} <= {".access"}
    assert not (folder / ".lease").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_that_ends_in_its_first_checkpoint_starts_again(start, store, whole, scheme):
    address, folder = f"{scheme}://bucket/run", store.folder / "run"
    first = start(address, stale=6.0)
    wait_until(first, (folder / "checkpoints").exists)
    first.kill()
    first.communicate()
    assert completed(folder) == 0
    finish(start(address, stale=6.0))
    assert_same_end(folder, whole)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_is_taken_over_from_a_machine_that_was_killed(start, store, whole, scheme):
    address, folder = f"{scheme}://bucket/run", store.folder / "run"
    chance = random.Random(seed := time.time_ns())
    with store.faults(errors=0.01, lost=0.005, delay=0.02, seed=seed % 1000, where="run"):
        for _ in range(2):
            process = start(address, stale=6.0)
            last = len(store.log()) + chance.randrange(50, 400)
            wait_until(process, lambda end=last: len(store.log()) >= end)
            process.kill()
            process.communicate()
        errors = finish(start(address, stale=6.0))
    assert f"{address} was in use by process {process.pid} on " in errors
    assert_same_end(folder, whole)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_machine_that_stood_still_writes_nothing_after_another_has_taken_over(
    start, store, whole, scheme
):
    address, folder = f"{scheme}://bucket/run", store.folder / "run"
    first = start(address, stale=6.0)
    wait_until(first, lambda: completed(folder) > 0)
    first.send_signal(signal.SIGSTOP)
    second = start(address, stale=6.0)
    begun = completed(folder)
    wait_until(second, lambda: completed(folder) > begun)
    woken = time.time()
    first.send_signal(signal.SIGCONT)
    errors = finish(first, BAD_INPUT)
    assert f"{address} was taken over by process {second.pid} on " in errors
    finish(second)
    assert_same_end(folder, whole)
    late = [e for e in store.log() if e["process"] == first.pid and e["seconds"] > woken]
    # Single requests may have been under way, for an object that belongs to this process's checkpoint.
    deleted = [name for entry in late for name in entry["deleted"]]
    written = [name for entry in late for name in entry["written"]]
    assert [name for name in deleted + written if "process_0" not in name] == []
    assert len(deleted) <= 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_descriptors_and_memory_stay_flat_over_many_steps(command, store, scheme):
    address, folder = f"{scheme}://bucket/run", store.folder / "run"
    flags = "--config.duration=3000 steps", "--config.checkpoint.every=50 steps"
    process = command(address, *flags, env=store.environment)
    seen: dict[int, tuple[int, int]] = {}
    while process.poll() is None:
        step = max((int(path.parent.name) for path in commits(folder)), default=0)
        if step not in seen:
            with contextlib.suppress(OSError):
                seen[step] = use(process.pid)
        time.sleep(0.05)
    finish(process)
    early, late = (
        np.max([use for step, use in seen.items() if first <= step < first + 1000], axis=0)
        for first in (500, 2000)
    )
    # Connections are opened as they are needed, up to a limit of each client.
    assert late[0] <= early[0] + 8, seen
    assert late[1] <= 1.05 * early[1], seen


def use(process):
    """The open descriptors of a process, and its memory in KiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return len(os.listdir(f"/proc/{process}/fd")), int(status.partition("VmRSS:")[2].split()[0])
