"""Evaluations during training: made when they are due, and without effect on the run."""

import jax
import numpy as np
import pytest

from lit_jax.errors import Preempted, UserError
from lit_jax.training.loop import Evaluations
from tests.training.conftest import stop_after
from tests.training.test_trainer import assert_same, numbers

EVALS = {
    "often": {"every": "2 steps", "at_start": True},
    "last": {"kind": "retrieval"},
    "never": {"at_end": False},
}


def recorded(workdir):
    """Which evaluations are in metrics.jsonl at which step, in order."""
    rows = [row for row in numbers(workdir) if "loss" not in row]
    return [(row["step"], sorted(key.split("/")[1] for key in row if "/" in key)) for row in rows]


def test_evaluations_are_made_when_due_and_change_nothing(
    train, tiny, finished_run, tmp_path, monkeypatch
):
    """Interrupted in an evaluation and between two, each is in the log once, and training is the same."""
    due = [(0, ["often"]), (2, ["often"]), (4, ["often"]), (6, ["last", "often"])]

    class Measured(Evaluations):
        def measure(self, run, names):
            # Reads what may be read only where waiting is allowed.
            leaves = [float(np.asarray(x).sum()) for x in jax.tree.leaves(run.params)]
            scale = float(run.params["logit_scale"] + 1)
            assert run.step in dict(due)
            kinds = {"often": "zero_shot", "last": "retrieval"}
            return {f"{kinds[name]}/{name}/top1": sum(leaves) + scale for name in names}

    class Killed(Measured):
        def measure(self, run, names):
            if run.step == 4:
                raise KeyboardInterrupt
            return super().measure(run, names)

    class Unwanted(Evaluations):
        def measure(self, run, names):
            pytest.fail("done already")

    config = tiny(evals=EVALS)
    plain, _ = finished_run
    whole = train(config, tmp_path / "whole", Measured())
    assert recorded(tmp_path / "whole") == due
    assert_same(whole.params, plain.params)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Preempted):
            train(config, tmp_path / "parts", Measured())
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", Killed())
    assert recorded(tmp_path / "parts") == due[:2]
    parts = train(config, tmp_path / "parts", Measured())
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    assert_same(parts.params, whole.params)
    train(config, tmp_path / "parts", Unwanted())


def test_an_evaluation_that_recurs_too_often_is_refused(train, tiny, tmp_path):
    config = tiny(evals={"often": {"every": "8 examples"}})
    with pytest.raises(UserError, match=r"config.evals.often.every='8 examples'"):
        train(config, tmp_path / "run")
