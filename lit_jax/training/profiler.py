"""The profile of some steps, for XProf: `xprof --logdir=WORKDIR/profile`."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lit_jax.bucket_copies import written_locally
from lit_jax.buckets import AnyPath
from lit_jax.distributed.process import is_primary
from lit_jax.errors import UserError
from lit_jax.training.goodput import Stopwatch
from lit_jax.training.workdir_errors import workdir_errors


class Profiler:
    """A profiler of some steps of the first process. The end of a `with` writes a profile that is not whole.

    The time to start it and to write its files counts as evaluation.

    Args:
        steps: the numbers of the steps; empty for no profile.
        finish_steps: waits until the device has computed all steps that were taken.
    """

    def __init__(
        self,
        workdir: AnyPath,
        steps: range,
        *,
        finish_steps: Callable[[], None],
        stopwatch: Stopwatch,
    ):
        self._workdir, self._steps = workdir, steps
        self._finish_steps, self._stopwatch = finish_steps, stopwatch
        self._running = contextlib.ExitStack()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._finish()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Take a step inside, which the profile shows under its number."""
        if self._steps and step == self._steps[0]:
            # The device must not compute an earlier step in the profile. All processes wait, although only
            # the first one has a profile: a loss that is not finite is looked into by all of them together.
            self._finish_steps()
            with self._stopwatch.timing("evaluation"):
                self._start()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if self._steps and step == self._steps[-1]:
            self._finish_steps()
            self._finish()

    def _finish(self) -> None:
        with self._stopwatch.timing("evaluation"):
            self._running.close()

    def _start(self) -> None:
        if not is_primary():
            return
        # Contexts close in the reverse order, and an error of writing passes through those that opened first.
        enter = self._running.enter_context
        enter(workdir_errors(self._workdir, Exception))
        folder = enter(written_locally(self._workdir / "profile"))
        options = jax.profiler.ProfileOptions()
        # A record of each call in Python would slow the steps down and be most of the file.
        options.python_tracer_level = 0
        try:
            jax.profiler.start_trace(str(folder), profiler_options=options)
        # In a notebook the user may have started one.
        except RuntimeError as error:
            raise UserError(
                f"config.log.profile: {error}; stop the other profile, or set the key to None."
            ) from error
        self._running.callback(jax.profiler.stop_trace)
