"""Training, the host's side: start or go on, feed the step, save, report, stop."""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lit_jax.config import Config, parse
from lit_jax.config_values import MOST, steps
from lit_jax.data.example import Source
from lit_jax.data.pipeline import TrainStream
from lit_jax.distributed.finite import not_finite
from lit_jax.distributed.mesh import global_batch, make_mesh
from lit_jax.errors import Preempted, UserError
from lit_jax.files import output_path
from lit_jax.training.checkpoints import Checkpoints
from lit_jax.training.data_identity import (
    ALLOWED,
    check_same_data,
    identify,
    open_data,
    save_identity,
)
from lit_jax.training.disk import complete_steps, writing
from lit_jax.training.evaluation import EvalSchedule, Evaluate
from lit_jax.training.from_embeddings import Embedded, open_embedded
from lit_jax.training.lease import holding
from lit_jax.training.metrics import Reporter
from lit_jax.training.negatives import check_negatives
from lit_jax.training.optimizer import make_schedule
from lit_jax.training.policy import warn_of_full_rate
from lit_jax.training.preemption import StopSignal
from lit_jax.training.program import Program, check_batch_size
from lit_jax.training.run import (
    Run,
    check_workdir,
    save_config,
    save_model_files,
    save_parameter_table,
    saved_towers,
)
from lit_jax.training.setup import Setup, Towers, find_towers, prepare, warn_of_export
from lit_jax.training.state import first_or_latest_state
from lit_jax.training.teacher import check_config
from lit_jax.training.tokenizing import check_captions
from lit_jax.trees import Tree

# Keys whose change, where it is permitted, means other data.
_NAMES_DATA = re.compile(r"data\.(train|mixture)\b|model\.teacher$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prepared:
    """All of a run that is known before it writes anything. What lasts or recurs is counted in steps."""

    config: Config
    source: Source | None
    identity: dict[str, Any] | None
    towers: Towers
    program: Program
    embedded: Embedded
    total: int
    save_every: int
    keep_every: int | None
    log_every: int
    evals: EvalSchedule

    @property
    def setup(self) -> Setup:
        return self.program.setup

    @property
    def mesh(self) -> Mesh:
        return self.setup.mesh

    def saves_at(self, step: int) -> bool:
        is_kept = self.keep_every is not None and step % self.keep_every == 0
        return step == self.total or step % self.save_every == 0 or is_kept


def train(
    config: Config,
    workdir: Path,
    *,
    evaluate: Evaluate = lambda run, names: {},
    check_evals: Callable[[Any], None] = lambda tokenizer: None,
    finish: Callable[[Run], None] = lambda run: None,
    allowed_changes: Collection[str] = (),
) -> Run:
    """Train until `config.duration`, or go on from the latest checkpoint in `workdir`.

    Args:
        evaluate: called at the steps that `config.evals` ask for; its metrics join those of the steps.
        check_evals: called before the first step with the tokenizer; it may raise UserError.
        finish: called with the trained run, while the folder still is this run's.

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
        changes = check_workdir(workdir, config, allowed_changes)
        may_differ = ALLOWED in allowed_changes or any(map(_NAMES_DATA.match, changes))
        ready = _prepare(config, workdir, may_differ=may_differ)
        if ready.source is not None:
            teacher = ready.setup.teacher
            check_captions(ready.setup.tokenizer, ready.source, teacher and teacher.tokenizer)
        check_evals(ready.setup.tokenizer)
        run = _train(ready, workdir, evaluate)
        finish(run)
    return run


def _train(ready: _Prepared, workdir: Path, evaluate: Evaluate) -> Run:
    config = ready.config
    with writing(workdir):
        save_model_files(workdir, config, ready.towers, ready.setup)
        save_parameter_table(workdir, ready.setup)
    with (
        jax.set_mesh(ready.mesh),
        StopSignal() as stop,
        Checkpoints(workdir, config.checkpoint.keep_last, ready.keep_every) as checkpoints,
    ):
        state, locked, position = first_or_latest_state(
            config, ready.setup, ready.towers, ready.program.optimizer, workdir, checkpoints
        )
        ready.embedded.check_towers(ready.setup, locked)
        frozen = ready.embedded.needed(locked)
        with writing(workdir):
            save_config(workdir, config)
            save_identity(workdir, ready.identity)
        step_fn = ready.program.compiled_step()
        start = checkpoints.latest or 0
        # Nothing may wait for the device by accident: implicit transfers are errors in here.
        with (
            _open_stream(ready, position, start) as stream,
            _open_reporter(ready, workdir, start, checkpoints, frozen) as reporter,
            jax.transfer_guard("disallow"),
        ):

            def evaluate_at(step: int, names: Collection[str]) -> None:
                if names:
                    with reporter.evaluating(step) as results, jax.transfer_guard("allow"):
                        run = Run.of(config, ready.setup, state.params, locked, step)
                        results |= evaluate(run, names)

            evaluate_at(start, ready.evals.missing(start, workdir))
            for step in range(start + 1, ready.total + 1):
                assert stream is not None
                # The stream moves on only here, after any save: its position is then that of `step`.
                batch = global_batch(next(stream), ready.mesh)
                state, metrics = step_fn(state, frozen, batch)
                reporter.add(step, metrics, bad_samples=stream.bad_samples)
                stopping = stop.requested(step)
                if stopping or ready.saves_at(step):
                    reporter.flush()  # also refuses to save a state that is no longer finite
                    checkpoints.save(step, state, stream.get_state(), dataclasses.asdict(config))
                if stopping and step < ready.total:
                    checkpoints.wait()
                    raise Preempted(
                        f"Stopped by SIGTERM after step {step} of {ready.total}, which is saved; run the "
                        "same command again to go on."
                    )
                # After the checkpoint: killed in here, the run resumes with what is missing of this.
                evaluate_at(step, ready.evals.due(step))
    return Run.of(config, ready.setup, state.params, locked, ready.total)


def _prepare(config: Config, workdir: Path, *, may_differ: bool = False) -> _Prepared:
    """Raise UserError on all bad input that can be known before the run folder is touched.

    Args:
        may_differ: whether the run may go on with other data than it was started with.
    """
    check_config(config)
    mesh = make_mesh(config.mesh)
    check_batch_size(config.batch_size, mesh, config.accumulate)
    trained = complete_steps(workdir)
    # Before the data: whoever starts without network and without data learns first where the towers may lie.
    # The run folder has configs and tokenizer, but the first step needs the weights, too.
    towers = saved_towers(workdir) if trained else find_towers(config.model)
    data = open_data(config, workdir, trained[-1] if trained else None)
    identity = None
    if data.source is not None:
        identity = identify(data.source)
        if trained and not may_differ:
            check_same_data(workdir, identity)
        check_negatives(config, data.source)
    to_steps = functools.partial(
        steps, batch_size=config.batch_size, examples_per_epoch=data.examples
    )

    def at_least_one(key: str, duration: str) -> int:
        count = to_steps(duration)
        if count < 1:
            raise UserError(f"config.{key}={duration!r} is less than one step; make it longer.")
        return count

    total = at_least_one("duration", config.duration)
    if total >= MOST:
        raise UserError(
            f"config.duration={config.duration!r} is more than {MOST - 1} steps; make it shorter."
        )
    if trained and trained[-1] > total:
        raise UserError(
            f"{workdir} has trained {trained[-1]} steps already, more than the {total} of config.duration; "
            "make it longer, or choose another --workdir."
        )
    keep_every = config.checkpoint.keep_every
    schedule = make_schedule(config.schedule, total=total, steps=to_steps)
    setup = prepare(config, towers, mesh)
    warn_of_full_rate(config.policy, setup.policy)
    warn_of_export(setup)
    return _Prepared(
        config=config,
        source=data.source,
        identity=identity,
        towers=towers,
        program=Program.of(config, setup, schedule),
        embedded=open_embedded(config, setup, data.source),
        total=total,
        save_every=at_least_one("checkpoint.every", config.checkpoint.every),
        keep_every=at_least_one("checkpoint.keep_every", keep_every) if keep_every else None,
        log_every=at_least_one("log.every", config.log.every),
        evals=EvalSchedule.of(config.evals, at_least_one, total),
    )


@contextlib.contextmanager
def _open_stream(
    ready: _Prepared, position: dict[str, int] | None, start: int
) -> Iterator[TrainStream | None]:
    """Open the stream at a position; a finished run has none, and reads no data."""
    if ready.source is None or start == ready.total:
        yield None
        return
    stream = TrainStream(
        ready.source,
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


def _usual_scale(config: Config) -> float:
    """Return the largest scale of the logits that needs no word: CLIP's limit, and more than SigLIP's 118."""
    if config.model.logit_scale_max is not None:
        return math.inf
    return 200.0 if config.loss == "sigmoid" else 100.0


def _open_reporter(
    ready: _Prepared, workdir: Path, start: int, checkpoints: Checkpoints, frozen: Tree
) -> Reporter:
    return Reporter(
        workdir,
        ready.config.log,
        every=ready.log_every,
        batch_size=ready.config.batch_size,
        start=start,
        total=ready.total,
        scale_limit=_usual_scale(ready.config),
        last_saved=lambda: checkpoints.latest,
        locked_not_finite=functools.partial(not_finite, frozen),
    )
