"""The train command as users run it: killed, stopped, mistyped, on other devices, on a full disk."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_jax.configs.vit_bert import DIGITS
from lit_jax.errors import BAD_INPUT, GONE, PREEMPTED
from lit_jax.training.metrics import read_metrics
from lit_jax.training.workdir import load_run
from lit_jax.training.workdir_errors import complete_steps
from lit_jax.trees import flatten
from tests.gloo import after_gloo

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]


def finish(process, code=0):
    """Waits for the exit code; returns what was printed to stdout and to stderr."""
    output, errors = process.communicate(timeout=900)
    assert process.returncode == code, output + errors
    return output, errors


def wait_for_step(process, workdir, step):
    while process.poll() is None:
        rows = read_metrics(workdir)
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate())


def losses(workdir):
    rows = [row for row in read_metrics(workdir) if "loss" in row]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def results(workdir):
    return json.loads((workdir / "results.json").read_text())


def assert_same_end(workdir, whole):
    """Bit for bit: losses, results and parameters."""
    assert losses(workdir) == losses(whole)
    assert results(workdir) == results(whole)
    ours, theirs = flatten(load_run(workdir).params), flatten(load_run(whole).params)
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)


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
        done = read_metrics(workdir)[-1]["step"] if read_metrics(workdir) else 0
        wait_for_step(process, workdir, step=min(done + chance.randint(1, 12), 55))
        process.send_signal(signal_)
        finish(process, code)
    finish(command(workdir))
    assert_same_end(workdir, whole)
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


def test_killed_every_few_seconds_it_ends_bit_for_bit_and_accounts_for_its_time(command, tmp_path):
    """At random moments, in start-up, steps and saves, whose times depend on the clock."""
    flags = ("--config.duration=500 steps", "--config.checkpoint.every=1 second")
    finish(command(tmp_path / "whole", *flags))
    workdir, chance, began = tmp_path / "run", random.Random(7), time.time()
    for kill in range(8):
        process = command(workdir, *flags)
        # Every other kill may come before a step, but not the first one: a run knows of no start before its
        # first row.
        if kill % 2 == 0:
            done = max(complete_steps(workdir), default=0)
            wait_for_step(process, workdir, done + 1)
        time.sleep(chance.uniform(0, 3))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    finish(command(workdir, *flags))
    wall = time.time() - began
    assert_same_end(workdir, tmp_path / "whole")
    seconds = {k: v for k, v in read_metrics(workdir)[-1].items() if k.startswith("seconds/")}
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.05)
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
def test_a_mistyped_command_says_so_in_one_sentence(command, tmp_path, flag, message):
    _, errors = finish(command(tmp_path / "run", flag, devices=4), BAD_INPUT)
    assert message in errors
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
        *("metrics.jsonl", "tensorboard", "results.json", "evals"),
    }
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert len(losses(workdir)) == 30  # two writers would have written each row twice


def test_sigterm_to_one_process_stops_both_and_they_go_on(command, tmp_path, whole_of_two):
    workdir = tmp_path / "run"
    launcher = start_two(command, workdir)
    wait_for_step(launcher, workdir, 3)
    os.kill(process_number(1, launcher), signal.SIGTERM)
    _, errors = finish(launcher, PREEMPTED)
    for index in (0, 1):
        assert "run the same command again" in said_by(index, errors)
    assert "preemption sync point" not in errors  # what Orbax says to it
    stopped = read_metrics(workdir)[-1]["step"]
    assert complete_steps(workdir)[-1] == stopped < 30
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
        last = errors.splitlines()[-1]
        assert last.startswith("error: ")
        assert "run the same command again" in last
        assert complete_steps(workdir)[-1] > done
        done = read_metrics(workdir)[-1]["step"]
    finish(start_two(command, workdir, "--config.checkpoint.every=10 steps"))
    assert_same_end(workdir, whole_of_two[0])


def test_two_processes_save_by_one_clock_and_go_on(command, tmp_path):
    """What is saved when depends on the clock; what comes out does not."""
    flags = ("--config.checkpoint.every=1 second", "--config.duration=600 steps")
    finish(start_two(command, tmp_path / "whole", *flags))
    workdir = tmp_path / "run"
    launcher = start_two(command, workdir, *flags)
    while not complete_steps(workdir):
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.02)
    os.kill(process_number(1, launcher), signal.SIGKILL)
    launcher.communicate(timeout=200)
    assert launcher.returncode == GONE
    assert 1 < complete_steps(workdir)[-1] < 600
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
    assert "process 1: Bad sample" in said_by(1, errors)
    assert "Traceback" not in errors
    saves = [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saves  # the one under way was completed
    assert all(name.isdigit() for name in saves)


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
