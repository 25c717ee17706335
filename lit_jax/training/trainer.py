"""The host's side of training: start or resume, feed the train step, save, report, stop."""

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from lit_jax.buckets import AnyPath, check_access
from lit_jax.config import Config, parse
from lit_jax.data.loader import TrainStream, make_preprocessor
from lit_jax.distributed.chips import chip_of
from lit_jax.distributed.compilation_cache import compilation_cache
from lit_jax.distributed.finite import not_finite
from lit_jax.distributed.mesh import make_mesh
from lit_jax.distributed.preemption import StopSignal
from lit_jax.distributed.process import command_seconds
from lit_jax.files import output_path
from lit_jax.precomputed.match import Precomputed, open_precomputed
from lit_jax.training.checkpoints import Checkpoints
from lit_jax.training.checks import (
    check_batch_size,
    check_captions,
    check_negatives,
    check_own_towers,
    check_teacher,
    warn_of_export,
)
from lit_jax.training.data_identity import TrainingData, may_differ, open_data, save_identity
from lit_jax.training.durations import Durations, steps_of
from lit_jax.training.goodput import Stopwatch, resumed
from lit_jax.training.lease import holding
from lit_jax.training.loop import Evaluations, Loop
from lit_jax.training.metrics import final_seconds, noted_start, read_metrics
from lit_jax.training.model_factory import Model, TrainedModel, build_model
from lit_jax.training.optimizers import make_schedule
from lit_jax.training.passed import Passed
from lit_jax.training.policy import warn_of_full_rate
from lit_jax.training.profiler import Profiler
from lit_jax.training.reporter import ADVICE, Reporter, usual_scale
from lit_jax.training.restore import first_or_latest_state
from lit_jax.training.tower_paths import find_towers
from lit_jax.training.train_step import TrainStep
from lit_jax.training.workdir import (
    check_passed,
    check_workdir,
    save_config,
    save_model_files,
    save_parameter_table,
    saved_towers,
)
from lit_jax.training.workdir_errors import complete_steps, workdir_errors
from lit_jax.trees import Tree

log = logging.getLogger(__name__)


_NO_EVALUATIONS = Evaluations()
_NOTHING_PASSED = Passed()


def train(
    config: Config,
    workdir: AnyPath,
    evaluations: Evaluations = _NO_EVALUATIONS,
    *,
    passed: Passed = _NOTHING_PASSED,
    allowed_changes: Collection[str] = (),
) -> TrainedModel:
    """Train until `config.duration`, from the start or from the latest checkpoint in `workdir`.

    Args:
        evaluations: run at the steps that `config.evals` names; their metrics join those of the steps.
        passed: objects that replace what the config would make.
        allowed_changes: keys of the config that may differ from the values at the start of the run.

    Returns the trained model. Raises UserError if another run has the folder and on bad input, before
    anything is written wherever that is possible. Raises Preempted after SIGTERM, once a checkpoint of the
    last step is on disk.
    """
    workdir = output_path("--workdir", str(workdir))
    # The round trip gives the config that config.json will hold, without access keys of object stores.
    config = parse(dataclasses.asdict(config))
    with contextlib.ExitStack() as stack:
        check_access(workdir)
        # The lease comes first: two commands that prepare at once would both see an empty folder.
        with workdir_errors(workdir):
            stack.enter_context(holding(workdir))
        first_begun = stack.enter_context(noted_start(workdir))
        trainer = Trainer.prepare(
            config,
            workdir,
            evaluations,
            passed=passed,
            allowed_changes=allowed_changes,
            first_begun=first_begun,
        )
        # These checks tokenise captions, and still come before the first compilation.
        processors = trainer.model.processors
        if trainer.data.source:
            check_captions(processors.tokenizer, trainer.data.source, processors.teacher_tokenizer)
        evaluations.check(processors.tokenizer)
        # Only now, so that bad input leaves nothing in the run folder.
        stack.enter_context(compilation_cache(workdir / "compilation_cache"))
        with final_seconds(workdir, trainer.stopwatch):
            trained = trainer.train()
            with trainer.stopwatch.timing("evaluation"):
                evaluations.finish(trained)
    return trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """A run that is checked and ready to start; nothing is written yet.

    Attributes:
        workdir: the run folder.
        step: the train step with its model.
        precomputed: the towers whose features are read from disk.
        durations: the steps at which the run saves, logs, evaluates and ends.
        passed: the user's own objects.
        stopwatch: the time of all starts of the run; it has been running since the start of this one.
    """

    workdir: AnyPath
    data: TrainingData
    step: TrainStep
    precomputed: Precomputed
    durations: Durations
    evaluations: Evaluations
    passed: Passed
    stopwatch: Stopwatch

    @classmethod
    def prepare(
        cls,
        config: Config,
        workdir: AnyPath,
        evaluations: Evaluations = _NO_EVALUATIONS,
        *,
        passed: Passed = _NOTHING_PASSED,
        allowed_changes: Collection[str] = (),
        first_begun: float | None = None,
    ) -> "Trainer":
        """Build the parts of a run. Raise UserError on all bad input that can be known before a write.

        `first_begun` is as in `goodput.resumed`.
        """
        entered = time.monotonic()
        changes = check_workdir(workdir, config, allowed_changes)
        check_passed(workdir, passed.described(), allowed_changes)
        data_may_differ = may_differ(changes, allowed_changes)
        check_teacher(config)
        check_own_towers(config, passed.towers)
        mesh = make_mesh(config.mesh)
        check_batch_size(config.batch_size, mesh, config.accumulate)
        steps_done = complete_steps(workdir)
        last = steps_done[-1] if steps_done else None
        # Towers come before data: without network and data, a user first learns where the towers may lie. The
        # run folder has config and tokenizer, but only a checkpoint has the weights.
        paths = saved_towers(workdir) if steps_done else find_towers(config.model)
        data = open_data(config, workdir, last, may_differ=data_may_differ, passed=passed.source)
        # A loss that is passed may have no negatives; only its author knows.
        if data.source and passed.loss is None:
            check_negatives(config, data.source)
        # Durations in epochs need the number of examples, so the data are open by now.
        durations = Durations.of(config, data.examples, [every for every, _ in passed.callbacks])
        durations.check_steps_done(workdir, steps_done)
        # An optimizer that is passed has a schedule of its own.
        own_schedule = passed.optimizer is not None
        schedule = None if own_schedule else _schedule(config, data.examples, durations.total)
        model = build_model(config, mesh, paths, passed.towers)
        warn_of_full_rate(config.policy, model.policy, model.abstract)
        warn_of_export(model)
        return cls(
            workdir=workdir,
            data=data,
            step=TrainStep.build(model, schedule, passed),
            precomputed=open_precomputed(config.data, model.module, model.processors, data.source),
            durations=durations,
            evaluations=evaluations,
            passed=passed,
            stopwatch=_stopwatch(workdir, last, durations, entered, first_begun),
        )

    @property
    def model(self) -> Model:
        """The model of the run, without values of parameters."""
        return self.step.model

    @property
    def config(self) -> Config:
        """The config of the run."""
        return self.model.config

    def train(self) -> TrainedModel:
        """Take the remaining steps and return the trained model; raise as `train` does.

        The caller holds the lease of the run folder.
        """
        with workdir_errors(self.workdir):
            save_model_files(self.workdir, self.model)
            save_parameter_table(self.workdir, self.model)
        config, total = self.config, self.durations.total
        keep_last, keep_every = config.checkpoint.keep_last, self.durations.keep_every
        with (
            jax.set_mesh(self.model.mesh),
            StopSignal() as stop,
            Checkpoints(self.workdir, keep_last, keep_every, self.model.uncut) as checkpoints,
            self._compiling(checkpoints.latest or 0) as compilation,
        ):
            state, locked, position = first_or_latest_state(self.step, self.workdir, checkpoints)
            self.precomputed.check_towers(self.model.module, locked)
            # All checks have passed. Before config.json exists, a retry with another config is free.
            with workdir_errors(self.workdir):
                save_config(self.workdir, config, self.passed.described())
                save_identity(self.workdir, self.data.identity)
            start = checkpoints.latest or 0
            with (
                self._open_loop(start, checkpoints, locked, stop) as loop,
                # An implicit transfer would make the host wait for the device in every step. Here it raises
                # an error.
                jax.transfer_guard("disallow"),
            ):
                # A run that was killed after a checkpoint makes up its evaluations here.
                loop.evaluate(start, state, self._missing_evals(start))
                # A finished run opens no stream, because its data may be gone.
                if start < total:
                    with self._open_stream(position) as stream:
                        with self.stopwatch.timing("compile"):
                            step_fn = compilation.result()
                        with (
                            self.stopwatch.timing("step"),
                            self._profiler(start, loop.reporter) as profiler,
                        ):
                            state = loop.take_steps(start, state, stream, step_fn, profiler)
            with self.stopwatch.timing("checkpoint"):
                checkpoints.wait()
        return TrainedModel.merged(self.model, state.params, locked, total)

    def _least_seconds(self) -> float | None:
        """Return the seconds of a step at the peak of the devices, None if their peak is not known."""
        devices = self.model.mesh.devices.flat
        if (chip := chip_of(devices[0])) is None:
            return None
        try:
            flops = self.step.flops(self.step.abstract_batch(self.config.batch_size))
        # A user's own loss or optimizer may have a loop whose length is not known.
        except ValueError as error:
            log.warning("The rows of metrics have no mfu: %s", error)
            return None
        return flops / (chip.flops * len(devices))

    @contextlib.contextmanager
    def _compiling(self, start: int) -> Iterator[Future[Callable[..., Any]]]:
        """Yield the compiled step, which is compiled while weights are read and written."""
        # A finished run takes no step.
        if start >= self.durations.total:
            yield Future()
            return
        # Only the compilation has a thread of its own: tracing depends on settings of the caller's thread.
        with self.stopwatch.timing("compile"):
            traced = self.step.trace(self.step.abstract_batch(self.config.batch_size))
            lowered = traced.lower()
        with ThreadPoolExecutor(1) as pool:
            yield pool.submit(lowered.compile)

    def _missing_evals(self, step: int) -> list[str]:
        """Return the evaluations due at `step` that metrics.jsonl lacks, because the run was stopped before.

        The first process's view of the file decides for all processes. With an older view, a process would
        wait for ever in an evaluation that the first process does not enter.
        """
        evals = self.config.evals
        due = self.durations.evals_due(evals, step)
        recorded = [key for row in read_metrics(self.workdir) if row["step"] == step for key in row]
        starts = [f"{evals[name].kind}/{name}/" for name in due]
        absent = [not any(key.startswith(start) for key in recorded) for start in starts]
        # The loop's transfer guard would forbid the transfers of the broadcast.
        if jax.process_count() > 1:
            with jax.transfer_guard("allow"):
                absent = multihost_utils.broadcast_one_to_all(np.array(absent, bool))
        return [name for name, is_absent in zip(due, absent, strict=True) if is_absent]

    @contextlib.contextmanager
    def _open_stream(self, position: dict[str, Any] | None) -> Iterator[TrainStream]:
        """Yield the stream of batches from a position; None is the start."""
        config = self.config
        stream = TrainStream(
            self.data.source,
            make_preprocessor(self.model.processors, config.data.views, self.precomputed.inputs),
            config=config.data,
            seed=config.seed,
            batch_size=config.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        with contextlib.closing(stream):
            if position is not None:
                stream.set_state(position)
            yield stream

    def _profiler(self, start: int, reporter: Reporter) -> Profiler:
        steps = self.durations.profile
        # A run that resumes within the range profiles the rest, and one that resumes after it nothing.
        left = range(max(steps.start, start + 1), steps.stop)
        return Profiler(self.workdir, left, finish_steps=reporter.flush, stopwatch=self.stopwatch)

    @contextlib.contextmanager
    def _open_loop(
        self, start: int, checkpoints: Checkpoints, locked: Tree, stop: StopSignal
    ) -> Iterator[Loop]:
        """Yield the loop, whose reporter is open."""
        # A tower whose features come from disk is not an input of the step.
        frozen = self.precomputed.needed(locked)
        with Reporter(
            self.workdir,
            self.config.log,
            self.stopwatch,
            every=self.durations.log_every,
            batch_size=self.config.batch_size,
            start=start,
            total=self.durations.total,
            least_seconds=None if start >= self.durations.total else self._least_seconds(),
            # No scale is usual for a loss that is passed.
            scale_limit=usual_scale(self.config) if self.passed.loss is None else math.inf,
            last_saved=lambda: checkpoints.latest,
            locked_not_finite=functools.partial(not_finite, frozen),
            advice=_advice(self.passed),
        ) as reporter:
            yield Loop(
                model=self.model,
                durations=self.durations,
                evaluations=self.evaluations,
                passed=self.passed,
                stopwatch=self.stopwatch,
                locked=locked,
                frozen=frozen,
                checkpoints=checkpoints,
                reporter=reporter,
                stop=stop,
            )


def _stopwatch(
    workdir: AnyPath,
    last: int | None,
    durations: Durations,
    entered: float,
    first_begun: float | None,
) -> Stopwatch:
    """Return the stopwatch of a start from step `last`, None for the first, which was `entered` at a time."""
    return resumed(
        read_metrics(workdir),
        last or 0,
        total=durations.total,
        # The start-up of a command includes its imports; that of a call from Python begins here.
        begun=command_seconds() or time.monotonic() - entered,
        first_begun=first_begun,
    )


def _advice(passed: Passed) -> str:
    """Return what to do about a metric that is not finite: the config cannot change what was passed."""
    names = [name for name in ("loss", "optimizer") if getattr(passed, name) is not None]
    checks = [f"check the {name} that was passed to fit" for name in names]
    return ", ".join(checks if passed.optimizer is not None else [*checks, ADVICE])


def _schedule(config: Config, examples: int, total: int) -> optax.Schedule:
    """Return the schedule of the config for `total` steps, where an epoch has `examples` examples."""
    to_steps = functools.partial(steps_of, config, examples)
    return make_schedule(config.schedule, total=total, steps=to_steps)
