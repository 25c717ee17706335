"""Processes of commands: waited for, ended, and their runs compared bit for bit."""

import json
import time

import numpy as np

from lit_jax.buckets import COMMIT_FILE
from lit_jax.training.metrics import read_metrics
from lit_jax.training.workdir import load_run
from lit_jax.trees import flatten


def finish(process, code=0):
    """Wait for the exit code; return what was printed to stdout and to stderr."""
    output, errors = process.communicate(timeout=900)
    assert process.returncode == code, output + errors
    return output, errors


def kill(process):
    process.kill()
    process.communicate()


def wait_until(process, happened):
    """Wait for something that happens while the process runs."""
    while not happened():
        assert process.poll() is None, process.communicate()
        time.sleep(0.03)


def wait_for_step(process, workdir, step):
    wait_until(process, lambda: last_step(workdir) >= step)


def last_step(workdir):
    """Return the step of the last row of metrics, 0 if there is none."""
    rows = read_metrics(workdir)
    return rows[-1]["step"] if rows else 0


def saved_steps(folder):
    """Return the steps of the complete checkpoints in a folder that is served as a run folder in a bucket."""
    return sorted(int(file.parent.name) for file in folder.glob(f"checkpoints/*/{COMMIT_FILE}"))


def losses(workdir):
    rows = [row for row in read_metrics(workdir) if "loss" in row]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def results(workdir):
    return json.loads((workdir / "results.json").read_text())


def assert_same_parameters(workdir, whole):
    """Bit for bit."""
    ours, theirs = flatten(load_run(workdir).params), flatten(load_run(whole).params)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)


def assert_same_end(workdir, whole):
    """Bit for bit: losses, results and parameters.

    A run in a bucket is read in the folder that is served: its objects are files there.
    """
    assert losses(workdir) == losses(whole)
    assert results(workdir) == results(whole)
    assert_same_parameters(workdir, whole)
