"""Training, the host's side: start or go on, feed the step, save, report, stop."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh

from lit_jax.config import Config, steps
from lit_jax.data.example import Source
from lit_jax.data.mixture import open_training_data
from lit_jax.data.pipeline import TrainStream
from lit_jax.distributed.mesh import global_batch, make_mesh
from lit_jax.errors import Preempted, UserError
from lit_jax.training.checkpoints import Checkpoints
from lit_jax.training.disk import complete_steps, writing
from lit_jax.training.losses import Loss, make_loss
from lit_jax.training.metrics import Reporter
from lit_jax.training.optimizer import make_optimizer, make_schedule
from lit_jax.training.preemption import StopSignal
from lit_jax.training.run import (
    Run,
    open_workdir,
    save_config,
    save_model_files,
    save_parameter_table,
    saved_towers,
)
from lit_jax.training.setup import Setup, Towers, find_towers, prepare
from lit_jax.training.state import first_or_latest_state, shardings_of
from lit_jax.training.step import Metrics, State, jit_train_step, train_step
from lit_jax.training.teacher import check_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """All of a run that is known before it writes anything. What lasts or recurs is counted in steps."""

    config: Config
    source: Source
    towers: Towers
    setup: Setup
    loss: Loss
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    total: int
    save_every: int
    keep_every: int | None
    log_every: int

    @property
    def mesh(self) -> Mesh:
        return self.setup.mesh


def train(config: Config, workdir: Path, *, allowed_changes: Collection[str] = ()) -> Run:
    """Trains until `config.duration`, or goes on from the latest checkpoint in `workdir`.

    Returns the trained run. Raises UserError on bad input, with nothing written if it can be known
    before, and Preempted after SIGTERM, once a checkpoint of the last step is on disk.
    """
    plan = _make_plan(config, workdir)
    with writing(workdir):
        open_workdir(workdir, config, allowed_changes)
        save_model_files(workdir, config, plan.towers, plan.setup)
        save_parameter_table(workdir, plan.setup)
    with (
        jax.set_mesh(plan.mesh),
        StopSignal() as stop,
        Checkpoints(workdir, config.checkpoint.keep_last, plan.keep_every) as checkpoints,
    ):
        state, frozen, position = first_or_latest_state(
            config, plan.setup, plan.towers, plan.optimizer, workdir, checkpoints
        )
        with writing(workdir):
            save_config(workdir, config)
        step_fn = _compiled_step(plan, state)
        start = checkpoints.latest or 0
        # Nothing may wait for the device by accident: implicit transfers are errors in here.
        with (
            contextlib.closing(_open_stream(plan, position)) as stream,
            _open_reporter(plan, workdir, start, checkpoints) as reporter,
            jax.transfer_guard("disallow"),
        ):
            for step in range(start + 1, plan.total + 1):
                # The stream moves on only here, after any save: its position is then that of `step`.
                batch = global_batch(next(stream), plan.mesh)
                state, metrics = step_fn(state, frozen, batch)
                reporter.add(step, metrics, bad_samples=stream.bad_samples)
                stopping = stop.requested(step)
                if stopping or step == plan.total or step % plan.save_every == 0:
                    reporter.flush()  # also refuses to save a state that is no longer finite
                    checkpoints.save(step, state, stream.get_state(), dataclasses.asdict(config))
                if stopping and step < plan.total:
                    checkpoints.wait()
                    raise Preempted(
                        f"Stopped by SIGTERM after step {step} of {plan.total}, which is saved; run the "
                        "same command again to go on."
                    )
    return Run.of(config, plan.setup, state.params, frozen, plan.total)


def _make_plan(config: Config, workdir: Path) -> _Plan:
    """Raises UserError on all bad input that can be known before the run folder is touched."""
    check_config(config)
    mesh = make_mesh(config.mesh)
    _check_batch_size(config.batch_size, mesh)
    source = open_training_data(config.data, text_only=bool(config.model.teacher))
    to_steps = functools.partial(
        steps, batch_size=config.batch_size, examples_per_epoch=len(source)
    )

    def at_least_one(key: str, duration: str) -> int:
        count = to_steps(duration)
        if count < 1:
            raise UserError(f"config.{key}={duration!r} is less than one step; make it longer.")
        return count

    total = at_least_one("duration", config.duration)
    trained = complete_steps(workdir)
    if trained and trained[-1] > total:
        raise UserError(
            f"{workdir} has trained {trained[-1]} steps already, more than the {total} of config.duration; "
            "make it longer, or choose another --workdir."
        )
    keep_every = config.checkpoint.keep_every
    schedule = make_schedule(config.schedule, total=total, steps=to_steps)
    # The run folder has configs and tokenizer, but the first step needs the weights, too.
    towers = saved_towers(workdir) if trained else find_towers(config.model)
    setup = prepare(config, towers, mesh)
    return _Plan(
        config=config,
        source=source,
        towers=towers,
        setup=setup,
        loss=make_loss(config.loss, label_smoothing=config.label_smoothing),
        schedule=schedule,
        optimizer=make_optimizer(config.optimizer, schedule, setup.policy),
        total=total,
        save_every=at_least_one("checkpoint.every", config.checkpoint.every),
        keep_every=at_least_one("checkpoint.keep_every", keep_every) if keep_every else None,
        log_every=at_least_one("log.every", config.log.every),
    )


def _check_batch_size(batch_size: int, mesh: Mesh) -> None:
    if batch_size < 1 or batch_size % mesh.size:
        raise UserError(
            f"config.batch_size={batch_size} does not divide by the {mesh.size} devices of the mesh; the "
            f"next that does is {-(-max(batch_size, 1) // mesh.size) * mesh.size}."
        )


def _open_stream(plan: _Plan, position: dict[str, int] | None) -> TrainStream:
    stream = TrainStream(
        plan.source,
        plan.setup.reader(plan.config.data),
        config=plan.config.data,
        seed=plan.config.seed,
        batch_size=plan.config.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if position is not None:
        stream.set_state(position)
    return stream


def _compiled_step(plan: _Plan, state: State) -> Callable[..., tuple[State, Metrics]]:
    return jit_train_step(
        functools.partial(
            train_step,
            embed=plan.setup.embed,
            loss=plan.loss,
            optimizer=plan.optimizer,
            schedule=plan.schedule,
            seed=plan.config.seed,
        ),
        shardings_of(state),
    )


def _open_reporter(plan: _Plan, workdir: Path, start: int, checkpoints: Checkpoints) -> Reporter:
    return Reporter(
        workdir,
        plan.config.log,
        every=plan.log_every,
        batch_size=plan.config.batch_size,
        start=start,
        total=plan.total,
        last_saved=lambda: checkpoints.latest,
    )
