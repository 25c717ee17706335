"""The evaluations of a run, and at which steps they are due: each once, however often it is resumed."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lit_jax.config import EvalConfig
from lit_jax.training.metrics import read_metrics
from lit_jax.training.workdir import Run


class Evaluations:
    """The evaluations of a run, at the three times when it has something for them. Here they are none."""

    def check(self, tokenizer: Any) -> None:
        """Raise UserError before the first step where an evaluation cannot be made with the tokenizer."""

    def measure(self, run: Run, names: Collection[str]) -> Mapping[str, float]:
        """Return the metrics, under flat names, of those of `config.evals` with these names."""
        return {}

    def finish(self, run: Run) -> None:
        """Write the results of the trained run, while its folder still is this run's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSchedule:
    """`every` has the steps between evaluations of those that are repeated; `total` is the last step."""

    evals: Mapping[str, EvalConfig]
    every: Mapping[str, int]
    total: int

    def due(self, step: int) -> list[str]:
        """The evaluations to be done when `step` steps have been taken."""
        return [
            name
            for name, config in self.evals.items()
            if (config.at_start and step == 0)
            or (config.at_end and step == self.total)
            or (step > 0 and name in self.every and step % self.every[name] == 0)
        ]

    def missing(self, step: int, workdir: Path) -> list[str]:
        """Those due at `step` that metrics.jsonl does not have: a run was stopped before them.

        What the first process reads holds for all: the others may see an older file, and would wait for ever
        in an evaluation that it does not enter.
        """
        due = self.due(step)
        recorded = [key for row in read_metrics(workdir) if row["step"] == step for key in row]
        starts = [f"{self.evals[name].kind}/{name}/" for name in due]
        absent = [not any(key.startswith(start) for key in recorded) for start in starts]
        if jax.process_count() > 1:
            with jax.transfer_guard("allow"):
                absent = multihost_utils.broadcast_one_to_all(np.array(absent, bool))
        return [name for name, is_absent in zip(due, absent, strict=True) if is_absent]
