"""The train command as users run it: killed, stopped, mistyped, on other devices."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lit_jax.console import BAD_INPUT, PREEMPTED
from lit_jax.training.metrics import read_metrics
from lit_jax.training.run import load_run
from lit_jax.trees import flatten

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(towers):
    """Starts the train command on the tiny towers; keywords are flags, `devices` that many CPU devices."""

    def start(workdir, *flags, devices=1, env=None):
        tiny = {
            "model.image.model": towers["image"],
            "model.image.pooling": "pooler",
            "model.text.model": towers["text"],
            "model.projection_dim": 8,
            "batch_size": 16,
            "duration": "60 steps",
            "schedule.warmup": "5 steps",
            "checkpoint.every": "10 steps",
            "log.every": "1 step",
            "report": "none",
        }
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "lit_jax.train", "--config=configs/vit_bert.py"),
                f"--workdir={workdir}",
                *(f"--config.{key}={value}" for key, value in tiny.items()),
                *flags,
            ],
            cwd=ROOT,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def finish(process, code=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def wait_for_step(process, workdir, step):
    while process.poll() is None:
        rows = read_metrics(workdir)
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate()[0])


def losses(workdir):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(workdir)]


def results(workdir):
    return json.loads((workdir / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tmp_path_factory.mktemp("whole") / "run"


def test_killed_and_stopped_at_random_it_ends_as_if_never_interrupted(command, tmp_path, whole):
    output = finish(command(whole))
    assert "zero_shot/unseen16/top1" in output
    assert str(whole / "results.json") in output
    workdir = tmp_path / "run"
    chance = random.Random(time.time_ns())
    for signal_, code in (
        (signal.SIGKILL, -signal.SIGKILL),
        (signal.SIGTERM, PREEMPTED),
        (signal.SIGKILL, -signal.SIGKILL),
    ):
        process = command(workdir)
        done = read_metrics(workdir)[-1]["step"] if read_metrics(workdir) else 0
        wait_for_step(process, workdir, step=min(done + chance.randint(1, 12), 55))
        process.send_signal(signal_)
        output = finish(process, code)
    finish(command(workdir))
    assert losses(workdir) == losses(whole)
    assert results(workdir) == results(whole)
    ours, theirs = flatten(load_run(workdir).params), flatten(load_run(whole).params)
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)
    # Running the command of a finished run again shows its results again and trains no more.
    finish(command(workdir))
    assert losses(workdir) == losses(whole)


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_a_checkpoint_goes_on_with_other_devices(command, tmp_path, first, second):
    process = command(tmp_path / "run", "--config.duration=2000 steps", devices=first)
    wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    finish(process, PREEMPTED)
    stopped = read_metrics(tmp_path / "run")[-1]["step"]
    assert stopped < 1000
    process = command(tmp_path / "run", "--config.duration=2000 steps", devices=second)
    wait_for_step(process, tmp_path / "run", stopped + 3)
    process.send_signal(signal.SIGTERM)
    finish(process, PREEMPTED)
    one = command(tmp_path / "one", "--config.duration=2000 steps", devices=first)
    wait_for_step(one, tmp_path / "one", stopped + 3)
    one.send_signal(signal.SIGTERM)
    finish(one, PREEMPTED)
    for ours, theirs in zip(losses(tmp_path / "run"), losses(tmp_path / "one"), strict=False):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config=configs/vit_bert.py:bas", "known are demo, base, large"),
        ("--config.schedule.learning_rat=1", "learning_rat"),
        ("--config.schedule.learning_rate=fast", "learning_rate"),
        ("--config=no/such/file.py", "no/such/file.py"),
        ("--config.batch_size=6", "does not divide by the 4 devices"),
    ],
)
def test_a_mistyped_command_says_so_in_one_sentence(command, tmp_path, flag, message):
    process = command(tmp_path / "run", flag, devices=4)
    output, _ = process.communicate(timeout=120)
    assert process.returncode not in (0, PREEMPTED)
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_without_network_a_hub_model_is_named_with_the_key_for_a_folder(tmp_path):
    process = subprocess.run(
        [
            *(sys.executable, "-m", "lit_jax.train", "--config=configs/vit_bert.py:base"),
            *("--config.data.train.path=demo", "--config.data.train.split=train"),
            f"--workdir={tmp_path / 'run'}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == BAD_INPUT
    last = process.stderr.splitlines()[-1]
    assert "google/vit-base-patch16-224-in21k" in last
    assert "config.model.image.model" in last
    assert not (tmp_path / "run").exists()
