"""SIGTERM, by which a cluster announces that it will take the machine away."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """A context manager that remembers a SIGTERM, so that the loop can save before it stops.

    Args:
        alone: whether each process of several decides for itself when to stop.

    Attributes:
        received: whether this process got a SIGTERM. With several processes it is set only if `alone`.
    """

    def __init__(self, *, alone: bool = False):
        # With several processes JAX's own handler listens and makes all of them stop after the same step.
        # Python allows signal handlers only in the main thread. In another thread SIGTERM keeps its effect.
        is_main = threading.current_thread() is threading.main_thread()
        self._listens = is_main and (alone or jax.process_count() == 1)
        self.received = False

    def __enter__(self) -> "StopSignal":
        if self._listens:
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._previous)

    def _receive(self, *_: Any) -> None:
        self.received = True

    def requested(self, step: int) -> bool:
        """Return whether to stop after this step; all processes ask once a step and get the same answer."""
        if jax.process_count() == 1:
            return self.received
        return multihost_utils.reached_preemption_sync_point(step)
