"""SIGTERM: how a cluster announces that the machine goes away."""

import signal
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Remembers a SIGTERM while in `with`, so that the loop can save before it stops."""

    def __init__(self):
        self._received = False

    def __enter__(self) -> "StopSignal":
        # With several processes JAX itself listens, and makes all of them stop after the same step.
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *exception: Any) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)

    def _receive(self, *_: Any) -> None:
        self._received = True

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; all processes ask once a step and get the same answer."""
        if jax.process_count() == 1:
            return self._received
        return multihost_utils.reached_preemption_sync_point(step)
