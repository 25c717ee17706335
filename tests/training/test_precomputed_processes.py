"""Embedding by commands: killed and resumed, by two processes, and the demo trained from it."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import portpicker
import pytest

from lit_jax.cli import PREEMPTED
from lit_jax.precomputed.format import MANIFEST, Embeddings
from lit_jax.training.metrics import read_metrics
from tests.training.commands import finish, wait_until
from tests.training.embedded_pairs import ROOT, content


def start(module, *flags, devices=1, env=None):
    return subprocess.Popen(
        [sys.executable, "-m", f"lit_jax.{module}", "--config=configs/vit_bert.py", *flags],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(output):
    address = f"localhost:{portpicker.pick_unused_port()}"
    together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [
        start("embed", f"--output={output}", devices=4, env=together | {"JAX_PROCESS_ID": index})
        for index in ("0", "1")
    ]


def wait_for_shards(process, output, count):
    wait_until(process, lambda: len(list(output.glob("shard*"))) >= count)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's images, embedded by one process that nothing interrupted."""
    output = tmp_path_factory.mktemp("demo") / "cache"
    assert re.search(rf"\b10240 .*{output}", finish(start("embed", f"--output={output}"))[0])
    return output


@pytest.mark.long
def test_killed_and_resumed_gives_the_same_bytes(demo, tmp_path):
    output = tmp_path / "cache"
    for signal_, code, shards in (
        (signal.SIGKILL, -signal.SIGKILL, 1),
        (signal.SIGTERM, PREEMPTED, 4),
    ):
        process = start("embed", f"--output={output}")
        wait_for_shards(process, output, shards)
        process.send_signal(signal_)
        finish(process, code)
        assert not (output / MANIFEST).exists()
    finish(start("embed", f"--output={output}"))
    assert content(output) == content(demo)


@pytest.mark.long
def test_two_processes_of_four_devices_embed_as_one_does(demo, tmp_path):
    output = tmp_path / "cache"
    processes = start_two(output)
    wait_for_shards(processes[0], output, 1)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        finish(process, PREEMPTED)
    assert not (output / MANIFEST).exists()
    for process in start_two(output):
        finish(process)
    ours, theirs = Embeddings(output), Embeddings(demo)
    assert (ours.header, ours.counts) == (theirs.header, theirs.counts)
    for index in range(len(ours)):
        np.testing.assert_allclose(ours[index], theirs[index], atol=1e-6)


@pytest.mark.long
def test_the_demo_learns_the_same_from_embeddings(demo, tmp_path):
    """Two hundred steps; the accuracies may differ by a few of 800 images whose margin is rounding."""
    flags = ("--config.duration=200 steps", "--config.report=none")
    results = {}
    for name, more in (("images", ()), ("cache", (f"--config.data.image_embeddings={demo}",))):
        workdir = tmp_path / name
        finish(start("train", f"--workdir={workdir}", *flags, *more))
        results[name] = json.loads((workdir / "results.json").read_text())
        first = read_metrics(workdir)[0]["loss"]
        results[name]["loss"] = first
    assert results["cache"].keys() == results["images"].keys()
    for name, value in results["images"].items():
        assert abs(results["cache"][name] - value) < 0.02, name
    assert results["cache"]["zero_shot/unseen16/top1"] > 0.5
