"""An alarm clock that rings in all processes after the same step."""

import time

import jax
import numpy as np
from jax.experimental import multihost_utils


class Alarm:
    """An alarm that rings after `seconds` on the first process's clock, in all processes after the same step.

    In a broadcast the host waits for the device, so that one in every step would slow training down. The
    processes therefore agree at a few steps alone: the first process estimates the number of steps in half of
    the time that is left, and all ask again after so many. While steps take
    equally long, the alarm is late by less than a step. When they slow down to a multiple, it may be late by
    half of that multiple of the time.

    Args:
        seconds: the time from the latest `restart` to the alarm; None: it never rings.
        step: the number of steps taken so far.
    """

    def __init__(self, seconds: float | None, step: int):
        self._seconds = seconds
        self.restart(step)

    def restart(self, step: int) -> None:
        """Start the time again. All processes must call this method after the same step."""
        self._due = time.monotonic() + (self._seconds or 0.0)
        self._ask(step, steps=1)

    def rings(self, step: int) -> bool:
        """Return whether the time is over. All processes must call this method after each step."""
        if self._seconds is None or step < self._next:
            return False
        steps = self._steps_left(step)
        if jax.process_count() > 1:
            # The loop's transfer guard would forbid the transfers of the broadcast.
            with jax.transfer_guard("allow"):
                steps = int(multihost_utils.broadcast_one_to_all(np.int32(steps)))
        self._ask(step, steps)
        return steps == 0

    def _ask(self, step: int, steps: int) -> None:
        self._asked, self._asked_at, self._next = step, time.monotonic(), step + steps

    def _steps_left(self, step: int) -> int:
        """Return the number of steps until the processes should agree again, 0 if the time is over."""
        now, taken = time.monotonic(), step - self._asked
        if now >= self._due:
            return 0
        # A process that is alone can look at its clock in every step.
        if jax.process_count() == 1:
            return 1
        half = (self._due - now) / 2 * taken / max(now - self._asked_at, 1e-6)
        # The first steps are only dispatched, faster than they are computed. The estimate must not reach far
        # beyond the steps that it comes from.
        return int(min(max(half, 1), 2 * taken))
