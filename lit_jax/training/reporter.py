"""The reporter of a run: the metrics of each step, checked, as rows and in the progress bar."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from tqdm import tqdm

from lit_jax.buckets import AnyPath
from lit_jax.config import Config, LogConfig, loss_kinds
from lit_jax.distributed.process import is_primary
from lit_jax.errors import UserError
from lit_jax.training.goodput import Stopwatch
from lit_jax.training.metrics import MetricsWriter
from lit_jax.training.train_step import Metrics

log = logging.getLogger(__name__)


def usual_scale(config: Config) -> float:
    """Return the largest scale of the logits that is usual; a larger one causes a warning."""
    if config.model.logit_scale_max is not None:
        return math.inf
    # CLIP limits the scale to 100. SigLIP's released models reach 118.
    return 200.0 if "sigmoid" in loss_kinds(config) else 100.0


class Reporter:
    """The reporter of a run, which reads the metrics of a step one step late.

    By then the next step is dispatched, so the device does not idle while the host waits for the metrics.

    Args:
        every: the steps between two rows of the log.
        start: the step that the run continues from.
        total: the last step of the run.
        scale_limit: the largest scale of the logits without a warning.
        last_saved: returns the step of the latest checkpoint.
        locked_not_finite: returns the names of locked parameters that are not finite.
    """

    def __init__(
        self,
        workdir: AnyPath,
        config: LogConfig,
        stopwatch: Stopwatch,
        *,
        every: int,
        batch_size: int,
        start: int,
        total: int,
        scale_limit: float = math.inf,
        last_saved: Callable[[], int | None],
        locked_not_finite: Callable[[], str] = lambda: "",
    ):
        self._every, self._batch_size, self._total = every, batch_size, total
        self._scale_limit = scale_limit
        self._last_saved, self._locked_not_finite = last_saved, locked_not_finite
        self._writer = MetricsWriter(workdir, config, start=start) if is_primary() else None
        self._pending: tuple[int, Metrics, dict[str, int]] | None = None
        self._bar = tqdm(
            total=total * batch_size,
            initial=start * batch_size,
            unit=" pairs",
            unit_scale=True,
            desc="train",
            disable=not is_primary(),
            mininterval=0.5,
        )
        self._stopwatch = stopwatch
        self._last_row = (start, self._training_seconds())

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()
        if self._writer:
            self._writer.close()

    def add(self, step: int, metrics: Metrics, *, bad_samples: Mapping[str, int]) -> None:
        """Report the previous step, and keep the metrics of this step, which the device still computes.

        Args:
            bad_samples: the number of bad samples by kind, since the start of the run.
        """
        self.flush()
        kinds = {f"bad_samples/{kind}": count for kind, count in bad_samples.items() if count}
        self._pending = step, metrics, {"bad_samples": sum(bad_samples.values()), **kinds}

    def _check_scale(self, scale: float, step: int) -> None:
        """Warn once when the logits' scale gets unusually large."""
        if scale > self._scale_limit:
            log.warning(
                "The scale of the logits is %.4g at step %d, above %g, where few pairs decide the loss and "
                "training may become unstable; to limit it, set config.model.logit_scale_max=%g.",
                scale,
                step,
                self._scale_limit,
                self._scale_limit,
            )
            # One warning is enough.
            self._scale_limit = math.inf

    @contextlib.contextmanager
    def evaluating(self, step: int) -> Iterator[dict[str, float]]:
        """Yield a dict for the metrics of evaluations after `step`."""
        self.flush()
        metrics = {}
        with self._stopwatch.timing("evaluation"):
            yield metrics
        if self._writer and metrics:
            self._writer.write(step, metrics | self._stopwatch.metrics())
            self._writer.copy()

    def _training_seconds(self) -> float:
        return sum(self._stopwatch.seconds().values()) - self._stopwatch.seconds()["evaluation"]

    def flush(self, *, as_row: bool = False) -> None:
        """Report the step that `add` has kept. Raise UserError if one of its metrics is not finite.

        Args:
            as_row: whether to write a row of the log even if none is due.
        """
        if self._pending is None:
            return
        step, metrics, bad_samples = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        # A row with a value that is not finite is never written.
        check_finite(values, step, self._last_saved(), self._locked_not_finite)
        self._check_scale(values.get("logit_scale", 0.0), step)
        self._bar.update(self._batch_size)
        # tqdm refreshes the bar at its own interval.
        self._bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        # The first step is always logged, so that a user sees early that the run works.
        if self._writer and (as_row or step % self._every == 0 or step in (1, self._total)):
            last_step, last_time = self._last_row
            self._last_row = step, self._training_seconds()
            rate = (step - last_step) * self._batch_size / (self._last_row[1] - last_time)
            row = {"examples": step * self._batch_size, "pairs_per_second": rate}
            self._writer.write(step, values | row | bad_samples | self._stopwatch.metrics())
            # A run that resumes from a checkpoint finds the rows up to there.
            if as_row:
                self._writer.copy()


def check_finite(
    values: Mapping[str, float],
    step: int,
    last_saved: int | None,
    locked_not_finite: Callable[[], str] = lambda: "",
) -> None:
    """Raise UserError if a value is NaN or infinite.

    Args:
        last_saved: the step of the latest checkpoint, None without one.
        locked_not_finite: returns the names of locked parameters that are NaN or infinite; '' if there are
            none. It is called only on an error.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if not bad:
        return
    what = f"{' and '.join(bad)} became non-finite at step {step}"
    if locked := locked_not_finite():
        raise UserError(
            f"{what}, because locked parameters have NaN or infinite values: {locked}; start from another "
            "copy of the weights, in another --workdir."
        )
    saved = "no checkpoint" if last_saved is None else f"the checkpoint of step {last_saved}"
    raise UserError(
        f"{what} ({saved} is there to resume from); lower config.schedule.learning_rate, lengthen "
        "config.schedule.warmup, or check the data around that step."
    )
