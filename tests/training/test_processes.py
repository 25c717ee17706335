"""The train command as users run it: killed, stopped, mistyped, on other devices, on a full disk."""

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lit_jax import train
from lit_jax.configs.vit_bert import DIGITS
from lit_jax.errors import BAD_INPUT, PREEMPTED
from lit_jax.training.metrics import read_metrics
from lit_jax.training.workdir_errors import complete_steps
from tests.training.commands import (
    assert_same_end,
    finish,
    last_step,
    losses,
    wait_for_step,
    wait_until,
)

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """A run that nothing interrupted, and what it printed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    output, _ = finish(command(workdir))
    return workdir, output


def test_killed_and_stopped_at_random_it_ends_as_if_never_interrupted(command, tmp_path, whole):
    whole, output = whole
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
        wait_for_step(process, workdir, min(last_step(workdir) + chance.randint(1, 12), 55))
        process.send_signal(signal_)
        finish(process, code)
    finish(command(workdir))
    assert_same_end(workdir, whole)
    # Running the command of a finished run again shows its results again and trains no more.
    finish(command(workdir))
    assert losses(workdir) == losses(whole)


def test_a_checkpoint_goes_on_with_other_devices(command, tmp_path, whole):
    workdir = tmp_path / "run"
    for devices in (2, 1):
        process = command(workdir, devices=devices)
        wait_for_step(process, workdir, last_step(workdir) + 3)
        process.send_signal(signal.SIGTERM)
        finish(process, PREEMPTED)
        assert complete_steps(workdir)[-1] == last_step(workdir) < 60
    finish(command(workdir, devices=2))
    expected, ours = losses(whole[0]), losses(workdir)
    assert len(ours) == len(expected)
    np.testing.assert_allclose(ours, expected, rtol=1e-3)


def test_killed_every_few_seconds_it_ends_bit_for_bit_and_accounts_for_its_time(command, tmp_path):
    """At random moments, in start-up, steps and saves, whose times depend on the clock."""
    flags = ("--config.duration=500 steps", "--config.checkpoint.every=1 second")
    finish(command(tmp_path / "whole", *flags))
    workdir, chance, began = tmp_path / "run", random.Random(7), time.time()
    for number in range(5):
        process = command(workdir, *flags)
        # The first kill comes before the first row, and every other one may come before a step.
        if number == 0:
            wait_until(process, (workdir / "begun.json").exists)
        elif number % 2 == 0:
            done = max(complete_steps(workdir), default=0)
            wait_for_step(process, workdir, done + 1)
        time.sleep(chance.uniform(0, 3))
        process.kill()
        finish(process, -signal.SIGKILL)
    finish(command(workdir, *flags))
    wall = time.time() - began
    assert_same_end(workdir, tmp_path / "whole")
    seconds = {k: v for k, v in read_metrics(workdir)[-1].items() if k.startswith("seconds/")}
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.02)
    assert seconds["seconds/lost"] > 0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config=configs/vit_bert.py:bas", "demo, base, large"),
        ("--config.schedule.learning_rat=1", "learning_rat"),
        ("--config.schedule.learning_rate=fast", "learning_rate"),
        ("--config=no/such/file.py", "no/such/file.py"),
        ("--config.batch_size=6", "config.batch_size=6"),
    ],
)
def test_a_mistyped_command_says_so_in_one_sentence(tmp_path, monkeypatch, capsys, flag, message):
    monkeypatch.chdir(ROOT)
    workdir = f"--workdir={tmp_path / 'run'}"
    assert train.main(["--config=configs/vit_bert.py", workdir, flag]) == BAD_INPUT
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_on_a_full_disk_it_says_so_in_one_sentence_and_goes_on_when_there_is_room(
    command, tmp_path, whole
):
    workdir = tmp_path / "run"
    process = command(workdir)
    wait_for_step(process, workdir, 3)
    process.send_signal(signal.SIGTERM)
    finish(process, PREEMPTED)
    saved = complete_steps(workdir)[-1]
    # No file over 16 KiB: enough for the texts and the metrics, not for a checkpoint.
    limited = ("bash", "-c", 'ulimit -f 16; exec "$@"', "-")
    no_cache = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # it would meet the limit, too
    _, errors = finish(command(workdir, prefix=limited, env=no_cache), BAD_INPUT)
    sentence = errors.splitlines()[-1]
    assert re.match(rf"error: .* {workdir} .*\(File too large\).* {saved}\.$", sentence)
    assert errors.lower().count("error") == 1
    assert "Traceback" not in errors
    finish(command(workdir))
    assert_same_end(workdir, whole[0])


def test_no_shared_memory_of_workers_is_left_when_a_run_stops_or_ends(command, tmp_path, whole):
    """Python names, in the last line of all, what a process has left."""
    workdir, workers = tmp_path / "run", "--config.data.workers=2"
    process = command(workdir, workers)
    wait_for_step(process, workdir, 20)
    process.send_signal(signal.SIGTERM)
    stopped = finish(process, PREEMPTED)[1]
    ended = finish(command(workdir, workers))[1]
    assert "leaked" not in stopped + ended
    assert_same_end(workdir, whole[0])


def test_without_network_a_hub_model_is_named_with_the_key_for_a_folder(tmp_path):
    process = subprocess.run(
        [
            *(sys.executable, "-m", "lit_jax.train", "--config=configs/vit_bert.py:base"),
            *(f"--config.data.train.path={DIGITS}", "--config.data.train.split=train"),
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
