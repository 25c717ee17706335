"""The training loop: its steps, and what is due between two of them."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from lit_jax.data.loader import TrainStream
from lit_jax.distributed.alarm import Alarm
from lit_jax.distributed.mesh import global_batch
from lit_jax.distributed.preemption import StopSignal
from lit_jax.errors import Preempted
from lit_jax.training.checkpoints import Checkpoints
from lit_jax.training.dashboards import Picture
from lit_jax.training.durations import Durations
from lit_jax.training.goodput import Stopwatch
from lit_jax.training.model_factory import Model, TrainedModel
from lit_jax.training.passed import Passed
from lit_jax.training.passed_checks import callback_result
from lit_jax.training.profiler import Profiler
from lit_jax.training.reporter import Reporter
from lit_jax.training.train_step import Batch, State
from lit_jax.trees import Tree


class Evaluations:
    """The hooks of a run for evaluations, at three points of its life. The hooks of this class do nothing.

    The evaluations derive from this class, because training must not import them.
    """

    def check(self, tokenizer: Any) -> None:
        """Raise UserError, before the first step, if an evaluation is impossible with this tokenizer."""

    def measure(self, trained: TrainedModel, names: Collection[str]) -> Mapping[str, float]:
        """Return the metrics, under flat names, of the evaluations of `config.evals` with these names."""
        return {}

    def pictures(self, names: Collection[str]) -> Mapping[str, Picture]:
        """Return pictures of what `measure` has found last, by flat names. Only one process asks."""
        return {}

    def finish(self, trained: TrainedModel) -> None:
        """Write the results of the trained run, while its folder still belongs to this run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """The training loop, with everything that is open while it runs.

    Attributes:
        locked: the locked parameters.
        frozen: the locked parameters that are inputs of the step.
    """

    model: Model
    durations: Durations
    evaluations: Evaluations
    passed: Passed
    stopwatch: Stopwatch
    locked: Tree
    frozen: Tree
    checkpoints: Checkpoints
    reporter: Reporter
    stop: StopSignal

    def take_steps(
        self,
        start: int,
        state: State,
        stream: TrainStream,
        step_fn: Callable[..., Any],
        profiler: Profiler,
    ) -> State:
        """Return the state after the last step. Raise Preempted after SIGTERM, once the state is saved."""
        durations, stopwatch = self.durations, self.stopwatch
        alarm = Alarm(durations.save_seconds, start)
        for step in range(start + 1, durations.total + 1):
            with profiler.step(step):
                state, metrics = step_fn(state, self.frozen, self._next_batch(stream))
                self.reporter.add(step, metrics, bad_samples=stream.bad_samples)
            # Every process must ask in every step, because the answer comes from a collective.
            stopping = self.stop.requested(step)
            if stopping or durations.saves_at(step) or alarm.rings(step):
                self._save(step, state, stream)
                alarm.restart(step)
            if stopping and step < durations.total:
                # The save is asynchronous, and the process ends after this error.
                with stopwatch.timing("checkpoint"):
                    self.checkpoints.wait()
                raise Preempted(
                    f"Stopped by SIGTERM after step {step} of {durations.total}, which is saved. To resume, "
                    "run the same command again."
                )
            # Evaluations follow the checkpoint: a run that is killed here resumes at this step and makes the
            # missing evaluations.
            self.evaluate(step, state, durations.evals_due(self.model.config.evals, step))
            self.call_back(step, state)
        return state

    def _next_batch(self, stream: TrainStream) -> Batch:
        # The stream advances only here, so that a save after a step records the position behind its batch.
        # The loop keeps no name for the batch, which would hold the shared memory of workers to the end.
        with self.stopwatch.timing("data_wait"):
            return global_batch(next(stream), self.model.mesh)

    def _save(self, step: int, state: State, stream: TrainStream) -> None:
        # flush raises if a metric is not finite, so a broken state never replaces a good checkpoint. The row
        # tells a resumed run how much time was spent up to here.
        self.reporter.flush(as_row=True)
        config = dataclasses.asdict(self.model.config)
        with self.stopwatch.timing("checkpoint"):
            self.checkpoints.save(step, state, stream.get_state(), config)

    def evaluate(self, step: int, state: State, names: Collection[str]) -> None:
        """Make the evaluations with these names and report their metrics."""
        if names:
            with self.reporter.evaluating(step) as results, jax.transfer_guard("allow"):
                model = TrainedModel.merged(self.model, state.params, self.locked, step)
                results |= self.evaluations.measure(model, names)
                if self.reporter.shows_pictures:
                    self.reporter.show(step, self.evaluations.pictures(names))

    def call_back(self, step: int, state: State) -> None:
        """Call the user's functions that are due, and report the metrics that they return."""
        every = self.durations.callback_every
        for number, (_, function) in enumerate(self.passed.callbacks):
            if step % every[number] == 0:
                with self.reporter.evaluating(step) as results, jax.transfer_guard("allow"):
                    model = TrainedModel.merged(self.model, state.params, self.locked, step)
                    results |= self.reporter.callback_metrics(
                        callback_result(function(model), number)
                    )
