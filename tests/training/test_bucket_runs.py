"""The train command with its run folder in a bucket: killed, with a store that fails and answers slowly."""

import random
import re
import time

import pytest

from lit_jax.errors import BAD_INPUT
from lit_jax.training.metrics import read_metrics
from lit_jax.training.workdir_errors import complete_steps
from tests.training.commands import (
    assert_same_end,
    assert_same_parameters,
    finish,
    kill,
    saved_steps,
    wait_until,
)

pytestmark = pytest.mark.long
# The reason that each store gives for credentials that have expired.
# S3 answers a request for the properties of an object without a text, so a client knows the status alone.
REASONS = {"gs": "Invalid Credentials", "s3": "ExpiredToken|Forbidden"}
EVALUATED = "--config.evals.unseen16.every=20 steps"


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """A run on a local disk that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(command(workdir, EVALUATED))
    return workdir


def evaluated(folder):
    return [row["step"] for row in read_metrics(folder) if "zero_shot/unseen16/top1" in row]


def writers(store):
    """Return the processes that have written each object, but for the probes, whose names are unique."""
    return {name: {*pids} for name, pids in store.writers().items() if "/.access-" not in name}


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_killed_while_the_store_fails_it_ends_as_on_a_local_disk(command, store, whole, scheme):
    chance = random.Random(seed := time.time_ns())
    address, folder = f"{scheme}://bucket/runs/one", store.folder / "runs" / "one"
    faults = {"errors": 0.01, "lost": 0.005, "cut": 0.05, "delay": 0.02}
    with store.faults(**faults, seed=seed % 1000, where="runs"):
        for _ in range(2):
            process = command(address, EVALUATED, env=store.environment)
            begun = len(store.log())
            # Most requests of a start come from checkpoints, at whose middle it is killed this way.
            last = begun + chance.randrange(50, 500)
            while process.poll() is None and len(store.log()) < last:
                time.sleep(0.05)
            kill(process)
        output, _ = finish(command(address, EVALUATED, env=store.environment))
    assert f"{address}/results.json" in output
    # Connections that ended in the middle of an upload.
    assert any(entry["status"] == 0 for entry in store.log())
    assert_same_end(folder, whole)
    assert saved_steps(folder) == complete_steps(whole)
    assert evaluated(folder) == evaluated(whole)


@pytest.mark.parametrize("status", [429, 500])
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_store_that_asks_for_patience_ends_no_run(command, store, whole, scheme, status):
    address, folder = f"{scheme}://bucket/runs/one", store.folder / "runs" / "one"
    with store.faults(errors=0.02, status=status, where="runs"):
        finish(command(address, EVALUATED, env=store.environment))
    assert any(entry["status"] == status for entry in store.log())
    assert_same_end(folder, whole)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_requests_that_are_refused_in_the_middle_leave_a_run_that_goes_on_bit_for_bit(
    command, store, whole, scheme
):
    address, folder = f"{scheme}://bucket/runs/one", store.folder / "runs" / "one"
    process = command(address, EVALUATED, env=store.environment)
    wait_until(process, lambda: saved_steps(folder))
    # As after a clock that is off, or of credentials that may no longer write.
    with store.faults(errors=1.0, status=403, reason="RequestTimeTooSkewed"):
        _, errors = finish(process, BAD_INPUT)
    assert "Traceback" not in errors
    assert len([line for line in errors.splitlines() if line.startswith("error: ")]) == 1
    finish(command(address, EVALUATED, env=store.environment))
    assert_same_end(folder, whole)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_credentials_that_expire_end_a_run_in_one_sentence(command, store, scheme):
    address, folder = f"{scheme}://bucket/runs/one", store.folder / "runs" / "one"
    process = command(address, "--config.duration=100000 steps", env=store.environment)
    wait_until(process, lambda: saved_steps(folder))
    with store.faults(is_expired=True):
        _, errors = finish(process, BAD_INPUT)
    assert "Traceback" not in errors
    (sentence,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert address in sentence
    assert re.search(REASONS[scheme], sentence)
    # The run goes on from there.
    flags = f"--config.duration={saved_steps(folder)[-1] + 1} steps", "--allow_changes=duration"
    finish(command(address, *flags, env=store.environment))


def test_two_processes_share_a_bucket_and_no_disk(command, store, tmp_path):
    two, address = ("launch/local.sh", "2", "--devices=1", "--"), "gs://bucket/runs/one"
    finish(command(tmp_path / "run", prefix=two))
    folder = store.folder / "runs" / "one"
    process = command(address, prefix=two, env=store.environment)
    wait_until(process, lambda: saved_steps(folder))
    # Both processes end with their launcher, and what they are writing is not finished.
    kill(process)
    first = writers(store)
    finish(command(address, prefix=two, env=store.environment))
    # Only the first process has a lease to lose, and only its objects make a checkpoint complete.
    others = {pid for name, pids in first.items() if "process_1" in name for pid in pids}
    assert all("process_1" in name for name, pids in first.items() if pids & others)
    second = {name: pids - first.get(name, set()) for name, pids in writers(store).items()}
    # A single process of a start writes an object.
    assert [
        name for start in (first, second) for name, pids in start.items() if len(pids) > 1
    ] == []
    assert any("process_1" in name for name in first)
    assert_same_parameters(folder, tmp_path / "run")
