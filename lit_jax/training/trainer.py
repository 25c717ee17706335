"""Training, the host's side: start or go on, feed the step, save, report, stop."""

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lit_jax.config import Config, parse
from lit_jax.data.pipeline import TrainStream
from lit_jax.distributed.finite import not_finite
from lit_jax.distributed.mesh import global_batch, make_mesh
from lit_jax.errors import Preempted, UserError
from lit_jax.files import output_path
from lit_jax.training.checkpoints import Checkpoints
from lit_jax.training.data_identity import TrainingData, may_differ, open_data, save_identity
from lit_jax.training.disk import complete_steps, writing
from lit_jax.training.durations import Durations, steps_of
from lit_jax.training.evaluation import EvalSchedule, Evaluations
from lit_jax.training.from_embeddings import Embedded, open_embedded
from lit_jax.training.lease import holding
from lit_jax.training.metrics import Reporter, usual_scale
from lit_jax.training.model_factory import Setup, Towers, find_towers, prepare, warn_of_export
from lit_jax.training.negatives import check_negatives
from lit_jax.training.optimizers import make_schedule
from lit_jax.training.policy import warn_of_full_rate
from lit_jax.training.preemption import StopSignal
from lit_jax.training.program import Program, check_batch_size
from lit_jax.training.state import first_or_latest_state
from lit_jax.training.step import State
from lit_jax.training.teacher import check_config
from lit_jax.training.tokenizing import check_captions
from lit_jax.training.workdir import (
    Run,
    check_workdir,
    save_config,
    save_model_files,
    save_parameter_table,
    saved_towers,
)
from lit_jax.trees import Tree

_NO_EVALUATIONS = Evaluations()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prepared:
    """All of a run that is known before it writes anything."""

    config: Config
    data: TrainingData
    towers: Towers
    program: Program
    embedded: Embedded
    durations: Durations

    @property
    def setup(self) -> Setup:
        return self.program.setup

    @property
    def mesh(self) -> Mesh:
        return self.setup.mesh

    @property
    def evals(self) -> EvalSchedule:
        every, total = self.durations.eval_every, self.durations.total
        return EvalSchedule(evals=self.config.evals, every=every, total=total)


def train(
    config: Config,
    workdir: Path,
    evaluations: Evaluations = _NO_EVALUATIONS,
    *,
    allowed_changes: Collection[str] = (),
) -> Run:
    """Train until `config.duration`, or go on from the latest checkpoint in `workdir`.

    Args:
        evaluations: are made at the steps that `config.evals` ask for; their metrics join those of the steps.
        allowed_changes: keys of the config that may differ from those the run was started with.

    Returns the trained run. Raises UserError on bad input, with nothing written if it can be known
    before, and where another run has the folder; raises Preempted after SIGTERM, once a checkpoint of the
    last step is on disk.
    """
    workdir = output_path("--workdir", str(workdir))
    # As config.json will have it, without keys of stores.
    config = parse(dataclasses.asdict(config))
    with contextlib.ExitStack() as stack:
        with writing(workdir):
            stack.enter_context(holding(workdir))
        ready = _prepare(config, workdir, allowed_changes)
        if ready.data.source:
            teacher = ready.setup.teacher
            check_captions(ready.setup.tokenizer, ready.data.source, teacher and teacher.tokenizer)
        evaluations.check(ready.setup.tokenizer)
        run = _train(ready, workdir, evaluations)
        evaluations.finish(run)
    return run


def _train(ready: _Prepared, workdir: Path, evaluations: Evaluations) -> Run:
    config, total = ready.config, ready.durations.total
    with writing(workdir):
        save_model_files(workdir, config, ready.towers, ready.setup)
        save_parameter_table(workdir, ready.setup)
    with (
        jax.set_mesh(ready.mesh),
        StopSignal() as stop,
        Checkpoints(
            workdir, config.checkpoint.keep_last, ready.durations.keep_every
        ) as checkpoints,
    ):
        state, locked, position = first_or_latest_state(
            config, ready.setup, ready.towers, ready.program.optimizer, workdir, checkpoints
        )
        ready.embedded.check_towers(ready.setup, locked)
        with writing(workdir):
            save_config(workdir, config)
            save_identity(workdir, ready.data.identity)
        start = checkpoints.latest or 0
        with (
            _open_reporter(ready, workdir, start, checkpoints, locked) as reporter,
            # Nothing may wait for the device by accident: implicit transfers are errors in here.
            jax.transfer_guard("disallow"),
        ):
            loop = _Loop(
                ready=ready,
                locked=locked,
                checkpoints=checkpoints,
                reporter=reporter,
                stop=stop,
                evaluations=evaluations,
            )
            loop.evaluate(start, state, ready.evals.missing(start, workdir))
            if start < total:
                with _open_stream(ready, position) as stream:
                    state = loop.take_steps(start, state, stream)
    return loop.run(total, state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loop:
    """The steps of a run, with all that is open while they are taken."""

    ready: _Prepared
    locked: Tree
    checkpoints: Checkpoints
    reporter: Reporter
    stop: StopSignal
    evaluations: Evaluations

    def take_steps(self, start: int, state: State, stream: TrainStream) -> State:
        """Return the state after the last step.

        Raises Preempted after SIGTERM, once the state is saved.
        """
        ready, durations = self.ready, self.ready.durations
        frozen = ready.embedded.needed(self.locked)
        step_fn = ready.program.compiled_step()
        for step in range(start + 1, durations.total + 1):
            # The stream moves on only here, after any save: its position is then that of `step`.
            batch = global_batch(next(stream), ready.mesh)
            state, metrics = step_fn(state, frozen, batch)
            self.reporter.add(step, metrics, bad_samples=stream.bad_samples)
            stopping = self.stop.requested(step)
            if stopping or durations.saves_at(step):
                # Also refuses to save a state that is no longer finite.
                self.reporter.flush()
                self.checkpoints.save(
                    step, state, stream.get_state(), dataclasses.asdict(ready.config)
                )
            if stopping and step < durations.total:
                self.checkpoints.wait()
                raise Preempted(
                    f"Stopped by SIGTERM after step {step} of {durations.total}, which is saved; run the "
                    "same command again to go on."
                )
            # After the checkpoint: killed in here, the run resumes with what is missing of this.
            self.evaluate(step, state, ready.evals.due(step))
        return state

    def evaluate(self, step: int, state: State, names: Collection[str]) -> None:
        """Report the metrics of the evaluations with these names."""
        if names:
            with self.reporter.evaluating(step) as results, jax.transfer_guard("allow"):
                results |= self.evaluations.measure(self.run(step, state), names)

    def run(self, step: int, state: State) -> Run:
        return Run.of(self.ready.config, self.ready.setup, state.params, self.locked, step)


def _prepare(config: Config, workdir: Path, allowed_changes: Collection[str] = ()) -> _Prepared:
    """Raise UserError on all bad input that can be known before anything is written."""
    changes = check_workdir(workdir, config, allowed_changes)
    check_config(config)
    mesh = make_mesh(config.mesh)
    check_batch_size(config.batch_size, mesh, config.accumulate)
    trained = complete_steps(workdir)
    # Before the data: whoever starts without network and without data learns first where the towers may lie.
    # The run folder has configs and tokenizer, but the first step needs the weights, too.
    towers = saved_towers(workdir) if trained else find_towers(config.model)
    data = open_data(
        config,
        workdir,
        trained[-1] if trained else None,
        may_differ=may_differ(changes, allowed_changes),
    )
    if data.source:
        check_negatives(config, data.source)
    durations = Durations.of(config, data.examples)
    if trained and trained[-1] > durations.total:
        raise UserError(
            f"{workdir} has trained {trained[-1]} steps already, more than the {durations.total} of "
            "config.duration; make it longer, or choose another --workdir."
        )
    to_steps = functools.partial(steps_of, config, data.examples)
    schedule = make_schedule(config.schedule, total=durations.total, steps=to_steps)
    setup = prepare(config, towers, mesh)
    warn_of_full_rate(config.policy, setup.policy, setup.abstract)
    warn_of_export(setup)
    return _Prepared(
        config=config,
        data=data,
        towers=towers,
        program=Program.of(config, setup, schedule),
        embedded=open_embedded(config, setup, data.source),
        durations=durations,
    )


@contextlib.contextmanager
def _open_stream(ready: _Prepared, position: dict[str, Any] | None) -> Iterator[TrainStream]:
    """Open the stream of batches at a position, or at its start."""
    stream = TrainStream(
        ready.data.source,
        ready.setup.reader(ready.config.data, ready.embedded.inputs),
        config=ready.config.data,
        seed=ready.config.seed,
        batch_size=ready.config.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with contextlib.closing(stream):
        if position is not None:
            stream.set_state(position)
        yield stream


def _open_reporter(
    ready: _Prepared, workdir: Path, start: int, checkpoints: Checkpoints, locked: Tree
) -> Reporter:
    return Reporter(
        workdir,
        ready.config.log,
        every=ready.durations.log_every,
        batch_size=ready.config.batch_size,
        start=start,
        total=ready.durations.total,
        scale_limit=usual_scale(ready.config),
        last_saved=lambda: checkpoints.latest,
        locked_not_finite=functools.partial(not_finite, ready.embedded.needed(locked)),
    )
