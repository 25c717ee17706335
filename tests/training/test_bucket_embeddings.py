"""The embed command with its output in a bucket that fails: killed, resumed, and by several processes."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import portpicker
import pytest

from lit_jax.errors import BAD_INPUT
from lit_jax.precomputed.format import MANIFEST
from tests.object_store.served import BUCKET, READONLY, serve
from tests.training.commands import finish

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("served") / "bucket") as served:
        served.folder.mkdir()
        yield served


@pytest.fixture(scope="module")
def start(store):
    """Starts the embed command on the demo's images, on one device."""

    def start(output, **environment):
        command = ["lit_jax.embed", "--config=configs/vit_bert.py", f"--output={output}"]
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | store.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards(folder):
    return [*folder.glob("shard*")]


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The content of a local folder that nothing interrupted."""
    folder = tmp_path_factory.mktemp("local") / "cache"
    finish(start(folder))
    return content(folder)


def test_killed_three_times_while_the_store_fails_it_writes_the_bytes_of_a_local_folder(
    start, store, whole
):
    folder, chance = store.folder / "killed", random.Random(seed := time.time_ns())
    faults = {"errors": 0.05, "lost": 0.02, "cut": 0.1, "delay": 0.05, "where": "killed"}
    with store.faults(**faults, seed=seed % 1000):
        for _ in range(3):
            process = start(f"gs://{BUCKET}/killed")
            # A kill soon after a shard hits the next one, or its upload.
            wanted = len(shards(folder)) + chance.randrange(1, 3)
            while len(shards(folder)) < wanted:
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
            process.kill()
            process.communicate()
            assert not (folder / MANIFEST).exists()
        finish(start(f"gs://{BUCKET}/killed"))
    assert content(folder) == whole, seed
    # A shard that was whole has been written once, unless the store took it and lost the answer.
    written = [
        len(pids) for name, pids in store.writers().items() if name.endswith(".array_record")
    ]
    assert sum(written) <= len(shards(folder)) + 6, written


def test_two_processes_without_a_shared_disk_embed_together(start, store, whole):
    address = f"localhost:{portpicker.pick_unused_port()}"
    together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [
        start(f"s3://{BUCKET}/two", **together, JAX_PROCESS_ID=number) for number in ("0", "1")
    ]
    for process in processes:
        finish(process)
    assert content(store.folder / "two") == whole
    writers = {name: pids for name, pids in store.writers().items() if name.startswith("two/")}
    writers = {name: pids for name, pids in writers.items() if "/.access-" not in name}
    assert all(len(pids) == 1 for pids in writers.values())
    by_process = [pids[0] for name, pids in writers.items() if name.endswith(".array_record")]
    assert {by_process.count(process.pid) for process in processes} == {5}


def test_a_bucket_that_cannot_be_written_is_told_before_the_tower_is_read(start):
    _, errors = finish(start(f"gs://{READONLY}/cache"), BAD_INPUT)
    (sentence,) = errors.splitlines()
    assert sentence.startswith(f"error: gs://{READONLY}/cache")
