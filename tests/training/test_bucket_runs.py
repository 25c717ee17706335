"""The train command with its run folder in a bucket: killed, with a store that fails and answers slowly."""

import json
import random
import time

import numpy as np
import pytest

from lit_jax.errors import BAD_INPUT
from lit_jax.training.metrics import read_metrics
from lit_jax.training.workdir import load_run
from lit_jax.training.workdir_errors import complete_steps
from lit_jax.trees import flatten
from tests.object_store.served import serve

pytestmark = pytest.mark.long
EVALUATED = "--config.evals.unseen16.every=20 steps"


@pytest.fixture
def store(tmp_path):
    with serve(tmp_path / "bucket") as served:
        served.folder.mkdir()
        yield served


def finish(process, code=0):
    output, errors = process.communicate(timeout=600)
    assert process.returncode == code, output + errors
    return output


def losses(folder):
    rows = [row for row in read_metrics(folder) if "loss" in row]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def writers(store):
    """Return the processes that have written each object, but for the probes, whose names are unique."""
    return {name: {*pids} for name, pids in store.writers().items() if "/.access-" not in name}


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_killed_while_the_store_fails_it_ends_as_on_a_local_disk(command, store, tmp_path, scheme):
    """Every object is a file of the served folder, so the same functions read both runs."""
    finish(command(tmp_path / "run", EVALUATED))
    chance = random.Random(seed := time.time_ns())
    address, folder = f"{scheme}://bucket/runs/one", store.folder / "runs" / "one"
    with store.faults(errors=0.01, lost=0.005, delay=0.02, seed=seed % 1000, where="runs"):
        for _ in range(2):
            process = command(address, EVALUATED, env=store.environment)
            begun = len(store.log())
            # Most requests of a start come from checkpoints, at whose middle it is killed this way.
            last = begun + chance.randrange(50, 500)
            while process.poll() is None and len(store.log()) < last:
                time.sleep(0.05)
            process.kill()
            process.communicate()
        output = finish(command(address, EVALUATED, env=store.environment))
    assert f"{address}/results.json" in output
    assert losses(folder) == losses(tmp_path / "run"), seed
    assert complete_steps(folder) == complete_steps(tmp_path / "run")
    results = [json.loads((at / "results.json").read_text()) for at in (folder, tmp_path / "run")]
    assert results[0] == results[1]
    ours, theirs = (flatten(load_run(at).params) for at in (folder, tmp_path / "run"))
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)
    evaluated = [
        [row["step"] for row in read_metrics(at) if "zero_shot/unseen16/top1" in row]
        for at in (folder, tmp_path / "run")
    ]
    assert evaluated[0] == evaluated[1]


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_credentials_that_expire_end_a_run_in_one_sentence(command, store, tmp_path, scheme):
    address, folder = f"{scheme}://bucket/runs/one", store.folder / "runs" / "one"
    process = command(address, "--config.duration=100000 steps", env=store.environment)
    while process.poll() is None and not complete_steps(folder):
        time.sleep(0.05)
    with store.faults(is_expired=True):
        _, errors = process.communicate(timeout=200)
    assert process.returncode == BAD_INPUT, errors
    assert "Traceback" not in errors
    (sentence,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert address in sentence
    # The run goes on from there.
    steps = complete_steps(folder)
    finish(
        command(
            address,
            f"--config.duration={steps[-1] + 1} steps",
            "--allow_changes=duration",
            env=store.environment,
        )
    )


def test_two_processes_share_a_bucket_and_no_disk(command, store, tmp_path):
    two, address = ("launch/local.sh", "2", "--devices=1", "--"), "gs://bucket/runs/one"
    finish(command(tmp_path / "run", prefix=two))
    folder = store.folder / "runs" / "one"
    process = command(address, prefix=two, env=store.environment)
    while process.poll() is None and not complete_steps(folder):
        time.sleep(0.05)
    # Both processes end with their launcher, and what they are writing is not finished.
    process.kill()
    process.communicate()
    first = writers(store)
    finish(command(address, prefix=two, env=store.environment))
    second = {name: pids - first.get(name, set()) for name, pids in writers(store).items()}
    # A single process of a start writes an object.
    assert [
        name for start in (first, second) for name, pids in start.items() if len(pids) > 1
    ] == []
    assert any("process_1" in name for name in first)
    ours, theirs = (flatten(load_run(at).params) for at in (folder, tmp_path / "run"))
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)
