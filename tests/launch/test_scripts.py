"""The launch scripts: what they say they will run, exit codes and signals; no traps of the shell."""

import os
import shlex
import shutil
import subprocess

import pytest

from lit_jax import train
from lit_jax.errors import BAD_INPUT, FAILED, GONE, INTERRUPTED, PREEMPTED
from tests.launch.scripts import LAUNCH, SCRIPTS, dry, examples, launch, of_script, with_tools


def test_shellcheck_finds_nothing():
    result = launch("shellcheck", "-x", *map(str, SCRIPTS), env=with_tools())
    assert result.returncode == 0, result.stdout


def test_the_readme_walks_through_every_script_that_is_run():
    for script in SCRIPTS:
        assert (script.name in ("shared.sh", "process.sh")) == (not of_script(script.name)), script


def test_the_commands_of_the_readme_are_ones_that_train_takes():
    commands = [
        words[words.index("lit_jax.train") + 1 :]
        for words in map(shlex.split, examples())
        if "lit_jax.train" in words
    ]
    assert len(commands) > 5
    for flags in commands:
        names = {flag.partition("=")[0] for flag in flags}
        assert names == {"--config", "--workdir"}
        config = next(flag for flag in flags if flag.startswith("--config="))
        raw = train.load_config(config.removeprefix("--config="), {})
        assert raw.data.train.path


def test_local_says_what_each_process_gets():
    (words,) = of_script("local.sh")
    lines = [shlex.split(line) for line in dry(words).splitlines()]
    assert len(lines) == int(words[1])
    command = words[words.index("--") + 1 :]
    for index, line in enumerate(lines):
        assert line[0] == "env"
        assert line[-len(command) :] == command
        assert f"JAX_PROCESS_ID={index}" in line


def test_slurm_submits_itself_with_time_to_save():
    (words,) = of_script("slurm.sh")
    submit, start = (shlex.split(line) for line in dry(words).splitlines())
    assert submit[0] == "sbatch"
    assert {"--requeue", "--signal=TERM@300"} < set(submit)
    command = words[words.index("--") + 1 :]
    assert start[0] == "srun"
    assert submit[-len(command) :] == start[-len(command) :] == command


def test_slurm_says_the_same_inside_an_allocation(tmp_path):
    (words,) = of_script("slurm.sh")
    at = words.index("--")
    inside = os.environ | {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    result = launch(*words[:at], "--dry-run", *words[at:], env=inside)
    assert (result.returncode, result.stdout) == (0, dry(words))


@pytest.mark.parametrize(
    "words",
    [
        ("local.sh", "two", "--", "true"),
        ("local.sh", "2"),
        ("local.sh", "2", "--devices=x", "--", "true"),
        ("local.sh", "2", "3", "--", "true"),
        ("restart.sh", "true"),
        ("tpu_vm.sh", "make", "--name=a"),
        ("tpu_vm.sh", "run", "--name=a", "--zone=b"),
        ("tpu_vm.sh", "logs", "--name=a", "--zone=b", "--slices=two"),
        ("slurm.sh", "--gpus=", "--", "true"),
        ("slurm.sh", "--gpus=8", "--nodes=two", "--", "true"),
        ("gke.sh", "--name=a", "--", "true"),
    ],
)
def test_a_mistyped_command_says_so(words):
    result = launch(LAUNCH / words[0], *words[1:])
    assert result.returncode == BAD_INPUT
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("codes", "runs"),
    [
        ((PREEMPTED, GONE, 137, 143, 0), 5),
        ((0,), 1),
        ((BAD_INPUT, 0), 1),
        ((FAILED, 0), 1),
        ((INTERRUPTED, 0), 1),
    ],
)
def test_restart_runs_again_what_asks_for_it(tmp_path, codes, runs):
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    take = "code=$(head -n 1 codes); sed -i 1d codes; echo run >> runs; exit $code"
    result = subprocess.run(
        [LAUNCH / "restart.sh", "--", "bash", "-c", take],
        cwd=tmp_path,
        env=os.environ | {"PAUSE": "0"},
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == codes[runs - 1]
    assert (tmp_path / "runs").read_text().count("run") == runs


def test_a_slurm_job_goes_back_into_the_queue(tmp_path):
    """Slurm's own commands are stand-ins: what is tested is what the job does with an exit code."""
    for code, requeued in (
        (PREEMPTED, True),
        (GONE, True),
        (137, True),
        (BAD_INPUT, False),
        (0, False),
    ):
        asked = tmp_path / f"asked{code}"
        for name, body in (("srun", f"exit {code}"), ("scontrol", f'echo "$@" > {asked}')):
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        job = with_tools(tmp_path) | {"SLURM_JOB_ID": "7"}
        # Slurm runs a copy of it, in the folder that it was submitted from.
        copy = shutil.copy(LAUNCH / "slurm.sh", tmp_path / "slurm_script")
        result = launch(copy, "--submitted", "--gpus=8", "--", "true", env=job)
        assert result.returncode == (GONE if code == 137 else code)
        assert asked.exists() == requeued
        assert not requeued or asked.read_text() == "requeue 7\n"
