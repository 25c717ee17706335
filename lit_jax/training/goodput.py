"""The wall time of a run over all of its starts, by what it was spent on; goodput is the share of the steps.

The term is that of TPU pods: the part of the paid time in which the model is trained.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

# "lost" is the time from the latest checkpoint of a start that did not reach the end to the next start.
Kind = Literal["startup", "compile", "data_wait", "step", "checkpoint", "evaluation", "lost"]
# The column of the last row of a run that has reached its end.
FINISHED = "finished"


class Stopwatch:
    """A stopwatch that attributes each moment to one kind, at first to "startup".

    Args:
        spent: the seconds of earlier starts by kind.
        begun: seconds of this start that have passed already.
    """

    def __init__(self, spent: Mapping[Kind, float], begun: float = 0.0):
        self._spent: dict[Kind, float] = dict.fromkeys(get_args(Kind), 0.0) | dict(spent)
        self._kind: Kind = "startup"
        self._since = time.monotonic() - begun

    def switch(self, kind: Kind) -> Kind:
        """Attribute the time from now on to `kind`; return the kind before."""
        now, before = time.monotonic(), self._kind
        self._spent[before] += now - self._since
        self._since, self._kind = now, kind
        return before

    @contextlib.contextmanager
    def timing(self, kind: Kind) -> Iterator[None]:
        """Attribute the time inside to `kind`."""
        before = self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)

    def seconds(self) -> dict[Kind, float]:
        """Return the seconds of each kind up to now, over all starts of the run."""
        self.switch(self._kind)
        return dict(self._spent)

    def metrics(self) -> dict[str, float]:
        """Return the columns of a row of metrics: the seconds of each kind, goodput, and the present time."""
        spent = self.seconds()
        columns: dict[str, float] = {f"seconds/{kind}": value for kind, value in spent.items()}
        return columns | {"goodput": spent["step"] / sum(spent.values()), "time": time.time()}


def resumed(
    rows: Sequence[Mapping[str, Any]],
    start: int,
    *,
    total: int,
    begun: float,
    first_begun: float | None = None,
) -> Stopwatch:
    """Return the stopwatch of a start that continues from step `start`.

    Time after the last row up to that step is lost: the steps that followed are taken again, and nothing ran
    between the two starts. A finished run loses nothing, and the time until it is extended does not count.

    Args:
        rows: the rows of metrics.jsonl.
        total: the last step of the run.
        begun: seconds of this start that have passed already.
        first_begun: the time at which the first start began, None if that is this start or not known.
    """
    rows = [row for row in rows if "time" in row]
    last: Mapping[str, Any] = {"time": first_begun}
    if first_begun is None:
        # Nothing has run before this start, as after the last row of a finished run.
        last = {FINISHED: 1.0}
    for row in rows:
        if row["step"] <= start:
            last = row
    later = [row for row in rows if row["step"] > start]
    since = None
    if FINISHED not in last:
        since = last["time"]
    elif later:
        # The start that took the first later step began when the seconds of its row did.
        since = later[0]["time"] - (sum(_spent(later[0]).values()) - sum(_spent(last).values()))
    spent = _spent(last)
    if since is not None and start < total:
        # Clocks of two machines may differ by more than the time between the starts.
        spent["lost"] += max(0.0, time.time() - begun - since)
    return Stopwatch(spent, begun)


def _spent(row: Mapping[str, Any]) -> dict[Kind, float]:
    return {kind: row.get(f"seconds/{kind}", 0.0) for kind in get_args(Kind)}
