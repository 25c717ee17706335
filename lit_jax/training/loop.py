"""Training, the host's side: start or go on, feed the step, save, report, stop."""

import contextlib
import dataclasses
import functools
from collections.abc import Collection
from pathlib import Path

import jax
from jax.sharding import Mesh

from lit_jax.config import Config, steps
from lit_jax.data.pipeline import TrainStream
from lit_jax.data.sources import open_source
from lit_jax.distributed.mesh import global_batch, make_mesh
from lit_jax.errors import Preempted, UserError
from lit_jax.training.checkpoints import Checkpoints, has_checkpoint
from lit_jax.training.losses import LOSSES
from lit_jax.training.metrics import Reporter
from lit_jax.training.optimizer import make_optimizer, make_schedule
from lit_jax.training.policy import merge
from lit_jax.training.preemption import StopSignal
from lit_jax.training.run import (
    Run,
    open_workdir,
    save_model_files,
    save_parameter_table,
    saved_towers,
)
from lit_jax.training.setup import find_towers, prepare
from lit_jax.training.state import first_or_latest_state, shardings_of
from lit_jax.training.step import jit_train_step, train_step


def train(config: Config, workdir: Path, *, allowed_changes: Collection[str] = ()) -> Run:
    """Trains until `config.duration`, or goes on from the latest checkpoint in `workdir`.

    Returns the trained run. Raises UserError on bad input, with nothing written if it can be known
    before, and Preempted after SIGTERM, once a checkpoint of the last step is on disk.
    """
    mesh = make_mesh(config.mesh)
    _check_batch_size(config.batch_size, mesh)
    source = open_source(config.data.train)
    to_steps = functools.partial(
        steps, batch_size=config.batch_size, examples_per_epoch=len(source)
    )
    total, save_every = to_steps(config.duration), to_steps(config.checkpoint.every)
    keep_every = to_steps(config.checkpoint.keep_every) if config.checkpoint.keep_every else None
    schedule = make_schedule(config.schedule, total=total, steps=to_steps)
    # The run folder has configs and tokenizer, but the first step needs the weights, too.
    towers = saved_towers(workdir) if has_checkpoint(workdir) else find_towers(config.model)
    setup = prepare(config, towers, mesh)
    optimizer = make_optimizer(config.optimizer, schedule, setup.policy)

    open_workdir(workdir, config, allowed_changes)
    save_model_files(workdir, config, towers, setup)
    save_parameter_table(workdir, setup)
    with (
        jax.set_mesh(mesh),
        StopSignal() as stop,
        Checkpoints(workdir, config.checkpoint.keep_last, keep_every) as checkpoints,
    ):
        state, frozen, position = first_or_latest_state(
            config, setup, towers, optimizer, workdir, checkpoints
        )
        stream = TrainStream(
            source,
            setup.image_transform,
            setup.tokenizer,
            config=config.data,
            seed=config.seed,
            batch_size=config.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        if position is not None:
            stream.set_state(position)
        step_fn = jit_train_step(
            functools.partial(
                train_step,
                embed=setup.module.apply,
                loss=LOSSES[config.loss],
                optimizer=optimizer,
                schedule=schedule,
                seed=config.seed,
            ),
            shardings_of(state),
        )
        start = checkpoints.latest or 0
        reporter = Reporter(
            workdir,
            config.log,
            every=to_steps(config.log.every),
            batch_size=config.batch_size,
            start=start,
            total=total,
            last_saved=lambda: checkpoints.latest,
        )
        # Nothing may wait for the device by accident: implicit transfers are errors in here.
        with reporter, contextlib.closing(stream), jax.transfer_guard("disallow"):
            for step in range(start + 1, total + 1):
                # The stream moves on only here, after any save: its position is then that of `step`.
                batch = global_batch(next(stream), mesh)
                state, metrics = step_fn(state, frozen, batch)
                reporter.add(step, metrics, bad_samples=stream.bad_samples)
                stopping = stop.requested(step)
                if stopping or step == total or step % save_every == 0:
                    reporter.flush()  # also refuses to save a state that is no longer finite
                    checkpoints.save(step, state, stream.get_state(), dataclasses.asdict(config))
                if stopping and step < total:
                    checkpoints.wait()
                    raise Preempted(
                        f"Stopped by SIGTERM after step {step} of {total}, which is saved; run the same "
                        "command again to go on."
                    )
    return Run(config=config, setup=setup, params=merge(state.params, frozen), step=total)


def _check_batch_size(batch_size: int, mesh: Mesh) -> None:
    if batch_size < 1 or batch_size % mesh.size:
        raise UserError(
            f"config.batch_size={batch_size} does not divide by the {mesh.size} devices of the mesh; the "
            f"next that does is {-(-max(batch_size, 1) // mesh.size) * mesh.size}."
        )
