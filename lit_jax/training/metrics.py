"""The metrics of a run and their readers: progress bar, metrics.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from lit_jax.buckets import AnyPath, GrowingFiles
from lit_jax.config import Config, LogConfig, loss_kinds
from lit_jax.config_schema import LARGEST_FLOAT, MOST
from lit_jax.display import printable
from lit_jax.distributed.process import is_primary
from lit_jax.errors import Preempted, UserError
from lit_jax.files import atomic_write, parse_json
from lit_jax.training.goodput import FINISHED, Stopwatch
from lit_jax.training.train_step import Metrics
from lit_jax.training.workdir_errors import workdir_errors

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


class MetricsWriter:
    """A writer of rows {"step": n, name: number, ...} to metrics.jsonl, TensorBoard and Weights & Biases.

    Rows after `start`, which a killed run has left behind, are removed first, because the resumed run writes
    them again.

    Raises UserError if the folder cannot be written.
    """

    def __init__(self, workdir: AnyPath, config: LogConfig, *, start: int):
        self._workdir = workdir
        self._tensorboard = self._wandb = None
        self._open = contextlib.ExitStack()
        # W&B may fail for lack of a login, so it starts before metrics.jsonl is rewritten.
        if config.wandb_project:
            self._wandb = _wandb(workdir, config.wandb_project)
            self._open.callback(self._wandb.finish)
        kept = [line for line, row in _read_rows(workdir) if row["step"] <= start]
        with workdir_errors(workdir, Exception):
            self._files = GrowingFiles(workdir)
            self._open.callback(self._files.close)
            path = self._files.folder / "metrics.jsonl"
            atomic_write(path, b"".join(kept))
            # Line buffering keeps every row but the last safe from a kill.
            self._file = self._open.enter_context(path.open("a", buffering=1))
            if config.tensorboard:
                self._tensorboard = _TensorBoard(self._files.folder / "tensorboard", start)
                self._open.callback(self._tensorboard.close)
            self._files.copy()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step to all readers."""
        with workdir_errors(self._workdir, Exception):
            self._file.write(_line({"step": step, **values}))
            # TensorBoard and W&B have a clock of their own.
            values = {printable(name): value for name, value in values.items() if name != "time"}
            if self._tensorboard:
                self._tensorboard.write(step, values)
            self._files.copy_if_due()
        if self._wandb:
            self._wandb.log(values, step=step)

    def copy(self) -> None:
        """Bring the rows into a run folder in a bucket now, instead of within a minute."""
        with workdir_errors(self._workdir, Exception):
            self._files.copy()

    def close(self) -> None:
        """Close all files."""
        with workdir_errors(self._workdir, Exception):
            # The stack closes all writers, even after an error of one.
            self._open.close()


class _TensorBoard:
    """A TensorBoard events file, to which each step is written at once.

    tensorboardX's own SummaryWriter writes in a thread. When a full disk ends that thread, training waits for
    ever.
    """

    def __init__(self, folder: Path, start: int):
        # The import takes more than a second, so runs without TensorBoard skip it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        self._event: Any = event_pb2
        # A START event hides what an earlier file of the run has after `start`.
        self._write(step=start + 1, session_log={"status": self._event.SessionLog.START})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        points = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self._write(step=step, summary={"value": points})

    def _write(self, **fields: Any) -> None:
        self._events.write_event(self._event.Event(wall_time=time.time(), **fields))
        self._events.flush()

    def close(self) -> None:
        self._events.close()


@contextlib.contextmanager
def final_seconds(workdir: AnyPath, stopwatch: Stopwatch) -> Iterator[None]:
    """Bring the time in the last row up to date when a run ends or is preempted; that row came earlier.

    The row of a run that has ended gets the column "finished".
    """
    preempted = None
    try:
        yield
    except Preempted as error:
        preempted = error
    try:
        if is_primary():
            end = {} if preempted else {FINISHED: 1.0}
            _update_last_row(workdir, stopwatch.metrics() | end)
    # The work is saved, and the exit code must not say otherwise.
    except UserError as error:
        log.warning("The last row of metrics.jsonl lacks the end of the run's time. %s", error)
    if preempted:
        raise preempted


def _update_last_row(workdir: AnyPath, values: Mapping[str, float]) -> None:
    rows = _read_rows(workdir)
    if rows:
        *before, (_, last) = rows
        content = b"".join(line for line, _ in before) + _line({**last, **values}).encode()
        with workdir_errors(workdir):
            atomic_write(workdir / "metrics.jsonl", content)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"


def read_metrics(workdir: AnyPath) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl: the finite numbers of each row, including 'step'.

    A last line that a kill has cut is left out. Any other line that is no row is left out with a warning.
    """
    return [row for _, row in _read_rows(workdir)]


def _read_rows(workdir: AnyPath) -> list[tuple[bytes, dict[str, Any]]]:
    """Return each row of metrics.jsonl as (bytes of the line, row as in `read_metrics`)."""
    path = workdir / "metrics.jsonl"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); move it away.") from error
    rows: list[tuple[bytes, dict[str, Any]]] = []
    damaged: list[str] = []
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        # Only the last line can lack its end: a kill has cut it.
        if not line.endswith(b"\n"):
            break
        try:
            rows.append((line, _row(parse_json(line))))
        except ValueError as error:
            damaged.append(f"line {number}: {error}")
    if damaged:
        log.warning(
            "%d lines of %s are not rows of metrics and are left out; the first is %s.",
            len(damaged),
            path,
            damaged[0],
        )
    return rows


def _row(value: Any) -> dict[str, Any]:
    """Return the finite numbers of a line. Raise ValueError if the line is no row of a step."""
    if not isinstance(value, dict):
        raise ValueError(f"it is of type {type(value).__name__}")
    # Types are compared, because isinstance would accept True as a number.
    if type(value.get("step")) is not int or not 0 <= value["step"] <= MOST:
        raise ValueError('"step" is not the number of a step')
    numbers = {name: n for name, n in value.items() if type(n) in (int, float)}
    # The comparison is False for NaN.
    return {name: n for name, n in numbers.items() if abs(n) <= LARGEST_FLOAT}


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


def _wandb(workdir: AnyPath, project: str) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "config.log.wandb_project is set but wandb is not installed; run pip install wandb, or set the "
            "key to None."
        ) from None
    # The id includes the whole path, so that a resumed run continues the W&B run of this folder and not that
    # of another folder with the same name.
    folder = zlib.crc32(os.fsencode(workdir.resolve()))
    name = f"{printable(workdir.resolve().name)}-{folder:08x}"
    try:
        return wandb.init(
            project=project,
            dir=str(workdir),
            id=name,
            name=name,
            resume="allow",
            config=parse_json((workdir / "config.json").read_bytes()),
            # A resumed run may change some keys of the config.
            allow_val_change=True,
        )
    # The usual causes are a missing login and a missing network.
    except wandb.Error as error:
        raise UserError(
            f"W&B cannot start ({error}); log in, set WANDB_MODE=offline, or set config.log.wandb_project to "
            "None."
        ) from error
