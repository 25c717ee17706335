"""The train command in two processes: as one process, stopped, killed, with bad data for one of them."""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_jax.errors import BAD_INPUT, GONE, PREEMPTED
from lit_jax.training.workdir_errors import complete_steps
from tests.gloo import after_gloo
from tests.training.commands import (
    assert_same_end,
    finish,
    last_step,
    losses,
    results,
    wait_for_step,
    wait_until,
)

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]

# Every process deals out dropout to rows of its own; without it, the number of processes changes nothing.
NO_DROPOUT = "--config.model.text.overrides=" + json.dumps(
    {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
)
SHORT = "--config.duration=30 steps"
# So that a run takes seconds: JAX looks for a signal to one of several processes once a second.
SAVE_ALWAYS = "--config.checkpoint.every=1 step"


def start_two(command, workdir, *flags, prefix=()):
    """Two processes of one run, by the launcher; each line of what they print starts with [0] or [1]."""
    launcher = (ROOT / "launch" / "local.sh", "2", "--devices=1", "--", *prefix)
    return command(workdir, NO_DROPOUT, SHORT, SAVE_ALWAYS, *flags, prefix=launcher)


def process_number(index, launcher):
    """The process id of one of the two."""
    for children in Path(f"/proc/{launcher.pid}/task").glob("*/children"):
        for pid in map(int, children.read_text().split()):
            if f"JAX_PROCESS_ID={index}".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                return pid
    raise AssertionError(f"there is no process {index}")


def said_by(index, text):
    """The lines of one of the two. One line may hold several states of the progress bar."""
    lines = [line for line in text.splitlines() if line.startswith(f"[{index}] ")]
    return "\n".join(line.removeprefix(f"[{index}] ") for line in lines)


@pytest.fixture(scope="module")
def whole_of_two(command, tmp_path_factory):
    """A run of two processes that nothing interrupted, and what was printed to stdout."""
    workdir = tmp_path_factory.mktemp("whole_of_two") / "run"
    return workdir, finish(start_two(command, workdir))[0]


def test_two_processes_train_as_one_does(command, tmp_path, whole_of_two):
    finish(command(tmp_path / "one", NO_DROPOUT, SHORT))
    (steps, loss, gradient), expected = (
        np.transpose(losses(workdir)) for workdir in (whole_of_two[0], tmp_path / "one")
    )
    assert steps.tolist() == list(range(1, 31))
    np.testing.assert_allclose(loss, expected[1], rtol=1e-4)
    # The loss soon comes near log(16), whatever the batch; the gradient still tells batches apart.
    np.testing.assert_allclose(gradient, expected[2], rtol=1e-3)


def test_two_processes_train_in_micro_batches_with_the_blockwise_loss(
    command, tmp_path, whole_of_two
):
    flags = "--config.accumulate=2", "--config.loss_implementation=blockwise"
    finish(start_two(command, tmp_path / "run", *flags))
    (_, loss, gradient), expected = (
        np.transpose(losses(workdir)) for workdir in (tmp_path / "run", whole_of_two[0])
    )
    np.testing.assert_allclose(loss, expected[1], rtol=1e-4)
    np.testing.assert_allclose(gradient, expected[2], rtol=1e-3)


def test_of_two_processes_one_writes_and_reports(whole_of_two):
    workdir, output = whole_of_two
    assert "zero_shot/unseen16/top1" in said_by(0, output)
    assert after_gloo(said_by(1, output)) == ""
    assert results(workdir)["zero_shot/unseen16/n"] == 800
    assert {path.name for path in workdir.iterdir()} == {
        *("config.json", "data.json", "parameters.txt", "model", "frozen", "checkpoints"),
        *("begun.json", "metrics.jsonl", "tensorboard", "results.json", "evals"),
    }
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert len(losses(workdir)) == 30  # two writers would have written each row twice


def test_sigterm_to_one_process_stops_both_and_they_go_on(command, tmp_path, whole_of_two):
    workdir = tmp_path / "run"
    launcher = start_two(command, workdir)
    wait_for_step(launcher, workdir, 3)
    os.kill(process_number(1, launcher), signal.SIGTERM)
    _, errors = finish(launcher, PREEMPTED)
    stopped = last_step(workdir)
    assert complete_steps(workdir)[-1] == stopped < 30
    for index in (0, 1):
        assert re.search(rf"SIGTERM .*\b{stopped} .*\b30\b", said_by(index, errors))
    assert "preemption sync point" not in errors  # what Orbax says to it
    _, errors = finish(start_two(command, workdir))
    resumed = rf" step {stopped} \w+ {workdir}"
    assert re.search(resumed, said_by(0, errors))
    assert not re.search(resumed, said_by(1, errors))
    assert_same_end(workdir, whole_of_two[0])


def test_the_death_of_one_process_ends_the_other_and_they_go_on(command, tmp_path, whole_of_two):
    """Now the second, now the first, which is also the one that JAX's own coordination needs."""
    workdir, done = tmp_path / "run", 0
    for killed in (1, 0):
        launcher = start_two(command, workdir)
        wait_for_step(launcher, workdir, done + 3)
        survivor = process_number(1 - killed, launcher)
        os.kill(process_number(killed, launcher), signal.SIGKILL)
        _, errors = launcher.communicate(timeout=200)
        assert launcher.returncode == GONE, errors
        assert not Path(f"/proc/{survivor}").exists()
        assert re.match(rf"error: .*\b{128 + signal.SIGKILL}\b", errors.splitlines()[-1])
        assert complete_steps(workdir)[-1] > done
        done = last_step(workdir)
    finish(start_two(command, workdir, "--config.checkpoint.every=10 steps"))
    assert_same_end(workdir, whole_of_two[0])


def test_two_processes_save_by_one_clock_and_go_on(command, tmp_path):
    """What is saved when depends on the clock; what comes out does not."""
    # At least five seconds here, so that a machine three times as fast saves before the end, too.
    flags = ("--config.checkpoint.every=1 second", "--config.duration=300 steps")
    finish(start_two(command, tmp_path / "whole", *flags))
    workdir = tmp_path / "run"
    launcher = start_two(command, workdir, *flags)
    wait_until(launcher, lambda: complete_steps(workdir))
    os.kill(process_number(1, launcher), signal.SIGKILL)
    launcher.communicate(timeout=200)
    assert launcher.returncode == GONE
    assert 1 < complete_steps(workdir)[-1] < 300
    finish(start_two(command, workdir, *flags))
    assert_same_end(workdir, tmp_path / "whole")


def test_bad_data_of_one_process_ends_both_with_its_exit_code(command, tmp_path):
    """The second finds, in a folder of its own, images that cannot be decoded."""
    rows = [
        json.dumps({"image": f"{i}.png", "caption": f"the number {i}"}) + "\n" for i in range(32)
    ]
    for index in (0, 1):
        data = tmp_path / str(index) / "data"
        data.mkdir(parents=True)
        (data / "captions.jsonl").write_text("".join(rows))
        for i in range(32):
            Image.new("RGB", (32, 32), (8 * i, 0, 0)).save(data / f"{i}.png")
            if index == 1 and i % 2:
                (data / f"{i}.png").write_bytes(b"no image")
    elsewhere = (
        "bash",
        "-c",
        f'cd {tmp_path}/$JAX_PROCESS_ID; exec env PYTHONPATH={ROOT} "$@"',
        "-",
    )
    flags = (
        *(f"--config={ROOT}/configs/vit_bert.py", "--config.data.train.path=data"),
        *("--config.data.train.split=None", "--config.duration=2000 steps"),
    )
    _, errors = finish(start_two(command, tmp_path / "run", *flags, prefix=elsewhere), BAD_INPUT)
    sentence = said_by(1, errors).splitlines()[-1]
    assert sentence.startswith("error: ")
    assert "config.data.max_bad_fraction" in sentence
    assert re.search(r"process 1: .*\b\d+\.png\b", said_by(1, errors))
    assert "Traceback" not in errors
    saves = [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saves  # the one under way was completed
    assert all(name.isdigit() for name in saves)
