"""The rows of metrics, written to metrics.jsonl and to dashboards, and read back."""

import contextlib
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from lit_jax.bucket_copies import GrowingFiles
from lit_jax.buckets import AnyPath
from lit_jax.config import LogConfig
from lit_jax.config_schema import LARGEST_FLOAT, MOST
from lit_jax.display import printable
from lit_jax.distributed.process import command_seconds, is_primary
from lit_jax.errors import Preempted, UserError
from lit_jax.files import atomic_write, parse_json, write_json
from lit_jax.training.dashboards import Picture, TensorBoard, WeightsAndBiases
from lit_jax.training.goodput import FINISHED, Stopwatch
from lit_jax.training.workdir_errors import workdir_errors

log = logging.getLogger(__name__)

# The names of columns that a row may have beside the metrics of its step.
ROW_COLUMNS = re.compile(
    r"step|time|examples|pairs_per_second|step_seconds|data_wait_seconds|mfu|peak_memory_gib"
    rf"|{FINISHED}|goodput|seconds/.*|bad_samples(/.*)?"
)

# The time at which the first start of a run began.
_BEGUN_FILE = "begun.json"


class MetricsWriter:
    """A writer of rows {"step": n, name: number, ...} to metrics.jsonl, TensorBoard and Weights & Biases.

    Rows after `start`, which a killed run has left behind, are removed first, because the resumed run writes
    them again.

    Raises UserError if the folder cannot be written.
    """

    def __init__(self, workdir: AnyPath, config: LogConfig, *, start: int):
        self._workdir = workdir
        self._open = contextlib.ExitStack()
        self._dashboards: list[TensorBoard | WeightsAndBiases] = []
        # W&B may fail for lack of a login, so it starts before metrics.jsonl is rewritten.
        if config.wandb_project:
            self._add(WeightsAndBiases(workdir, config.wandb_project))
        kept = [line for line, row in _read_rows(workdir) if row["step"] <= start]
        with workdir_errors(workdir):
            self._files = GrowingFiles(workdir)
            self._open.callback(self._files.close)
            path = self._files.folder / "metrics.jsonl"
            atomic_write(path, b"".join(kept))
            # Line buffering keeps every row but the last safe from a kill.
            self._file = self._open.enter_context(path.open("a", buffering=1))
            if config.tensorboard:
                self._add(TensorBoard(workdir, self._files.folder / "tensorboard", start))
            self._files.copy()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step to all readers."""
        with workdir_errors(self._workdir):
            self._file.write(_line({"step": step, **values}))
        # Dashboards have a clock of their own.
        values = {printable(name): value for name, value in values.items() if name != "time"}
        for dashboard in self._dashboards:
            dashboard.write(step, values)
        with workdir_errors(self._workdir, Exception):
            self._files.copy_if_due()

    @property
    def has_dashboards(self) -> bool:
        """True if there is a dashboard, which shows pictures."""
        return bool(self._dashboards)

    def show(self, step: int, pictures: Mapping[str, Picture]) -> None:
        """Write pictures after a step, by name, to the dashboards."""
        for dashboard in self._dashboards:
            dashboard.show(step, {printable(name): one for name, one in pictures.items()})

    def _add(self, dashboard: TensorBoard | WeightsAndBiases) -> None:
        self._dashboards.append(dashboard)
        self._open.callback(dashboard.close)

    def copy(self) -> None:
        """Bring the rows into a run folder in a bucket now, instead of within a minute."""
        with workdir_errors(self._workdir):
            self._files.copy()

    def close(self) -> None:
        """Close all files."""
        with workdir_errors(self._workdir):
            # The stack closes all writers, even after an error of one.
            self._open.close()


@contextlib.contextmanager
def noted_start(workdir: AnyPath) -> Iterator[float | None]:
    """Yield the time at which the run's first start began, None if the present one is the first.

    The present time is written if it is the first. A start that is killed before its first row would leave no
    trace of its time otherwise. A start that ends by an error before its first row does not count.
    """
    begun = _read_begun(workdir)
    is_first = begun is None and is_primary() and not read_metrics(workdir)
    if is_first:
        with workdir_errors(workdir):
            write_json(workdir / _BEGUN_FILE, {"time": time.time() - command_seconds()})
    try:
        yield begun
    except BaseException:
        # The error tells more than another one about this file would.
        with contextlib.suppress(UserError), workdir_errors(workdir):
            if is_first and not read_metrics(workdir):
                (workdir / _BEGUN_FILE).unlink(missing_ok=True)
        raise


def _read_begun(workdir: AnyPath) -> float | None:
    with workdir_errors(workdir):
        try:
            return float(parse_json((workdir / _BEGUN_FILE).read_bytes())["time"])
        # A file that is damaged costs no more than the time of the starts before the first row.
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None


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

    A last line that a kill has cut is left out. Any other line that is not a row is left out with a warning.
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
        raise UserError(
            f"{path} cannot be read ({error.strerror}); correct its permissions, or remove it."
        ) from error
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
    """Return the finite numbers of a line. Raise ValueError if the line is not a row of a step."""
    if not isinstance(value, dict):
        raise ValueError(f"it is of type {type(value).__name__}")
    # Types are compared, because isinstance would accept True as a number.
    if type(value.get("step")) is not int or not 0 <= value["step"] <= MOST:
        raise ValueError('"step" is not the number of a step')
    numbers = {name: n for name, n in value.items() if type(n) in (int, float)}
    # The comparison is False for NaN.
    return {name: n for name, n in numbers.items() if abs(n) <= LARGEST_FLOAT}
