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
from lit_jax.training.dashboards import Picture
from lit_jax.training.goodput import Stopwatch
from lit_jax.training.metrics import ROW_COLUMNS, MetricsWriter
from lit_jax.training.train_step import Metrics

log = logging.getLogger(__name__)

# The remedies for a loss that diverges, with the loss and the optimizer of the config.
ADVICE = "lower config.schedule.learning_rate, lengthen config.schedule.warmup"


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
        least_seconds: the seconds of a step at the peak of the devices; None if their peak is not known.
        last_saved: returns the step of the latest checkpoint.
        locked_not_finite: returns the names of locked parameters that are not finite.
        advice: what to do about a metric that is not finite.
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
        least_seconds: float | None = None,
        last_saved: Callable[[], int | None],
        locked_not_finite: Callable[[], str] = lambda: "",
        advice: str = ADVICE,
    ):
        self._every, self._batch_size, self._total = every, batch_size, total
        self._scale_limit, self._least_seconds, self._advice = scale_limit, least_seconds, advice
        self._last_saved, self._locked_not_finite = last_saved, locked_not_finite
        self._writer = MetricsWriter(workdir, config, start=start) if is_primary() else None
        # The step before the current one, whose metrics may still be on their way from the device.
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
        self._last_row = start, stopwatch.seconds()
        self._told_of_names = False
        self._step_columns: frozenset[str] = frozenset()

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
        self._step_columns = frozenset(metrics)
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

    @property
    def shows_pictures(self) -> bool:
        """True in the process that writes to dashboards, if there are any."""
        return self._writer is not None and self._writer.has_dashboards

    def show(self, step: int, pictures: Mapping[str, Picture]) -> None:
        """Write pictures to the dashboards."""
        assert self._writer is not None
        self._writer.show(step, pictures)

    def callback_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of a callback; a name that is one of our own columns becomes callback/NAME."""
        taken = [
            name for name in metrics if ROW_COLUMNS.fullmatch(name) or name in self._step_columns
        ]
        if taken and not self._told_of_names:
            log.warning(
                "A callback returns a metric %r, a name that lit_jax has for a column of its own; it is "
                "reported as %r.",
                taken[0],
                f"callback/{taken[0]}",
            )
            self._told_of_names = True
        return {f"callback/{name}" if name in taken else name: metrics[name] for name in metrics}

    def _speed(self, step: int) -> dict[str, float]:
        """Return the columns of the time and memory that the steps since the last row have taken."""
        (last_step, before), now = self._last_row, self._stopwatch.seconds()
        self._last_row = step, now
        steps = step - last_step
        passed = {kind: now[kind] - before[kind] for kind in now}
        # Evaluations are not part of training, whatever else is.
        training = sum(passed.values()) - passed["evaluation"]
        step_seconds = (passed["step"] + passed["data_wait"]) / steps
        columns = {
            "pairs_per_second": steps * self._batch_size / training,
            "step_seconds": step_seconds,
            "data_wait_seconds": passed["data_wait"] / steps,
        }
        if self._least_seconds is not None:
            columns["mfu"] = self._least_seconds / step_seconds
        if (peak := peak_memory()) is not None:
            columns["peak_memory_gib"] = peak / 2**30
        return columns

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
        check_finite(values, step, self._last_saved(), self._locked_not_finite, advice=self._advice)
        self._check_scale(values.get("logit_scale", 0.0), step)
        self._bar.update(self._batch_size)
        # tqdm refreshes the bar at its own interval.
        self._bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        # The first step is always logged, so that a user sees early that the run works.
        if self._writer and (as_row or step % self._every == 0 or step in (1, self._total)):
            row = {"examples": step * self._batch_size, **self._speed(step), **bad_samples}
            self._writer.write(step, values | row | self._stopwatch.metrics())
            # A run that resumes from a checkpoint finds the rows up to there.
            if as_row:
                self._writer.copy()


def peak_memory() -> int | None:
    """Return the most bytes that a device of this process has had in use so far; None on CPUs."""
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((stats["peak_bytes_in_use"] for stats in found if stats), default=None)


def check_finite(
    values: Mapping[str, float],
    step: int,
    last_saved: int | None,
    locked_not_finite: Callable[[], str] = lambda: "",
    advice: str = ADVICE,
) -> None:
    """Raise UserError if a value is NaN or infinite.

    Args:
        last_saved: the step of the latest checkpoint, None without one.
        locked_not_finite: returns the names of locked parameters that are NaN or infinite, '' if there are
            none; called only on an error.
        advice: what to do, beside a check of the data.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if not bad:
        return
    what = f"{' and '.join(bad)} became non-finite at step {step}"
    # A lower rate cannot help against broken weights, so they are looked for first.
    if locked := locked_not_finite():
        raise UserError(
            f"{what}, because locked parameters have NaN or infinite values: {locked}; start from another "
            "copy of the weights, in another --workdir."
        )
    saved = "no checkpoint" if last_saved is None else f"the checkpoint of step {last_saved}"
    raise UserError(
        f"{what} ({saved} is there to resume from); {advice}, or check the data around that step."
    )
