"""The state that a run starts with, or resumes from, also with another choice of what trains.

Blocks that no longer train move from the state to the locked parameters, which are written once more, to
`frozen_from_STEP/`. Blocks that begin to train are refused, because the optimizer has no state for them.
"""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp

from lit_jax.buckets import AnyPath, remove_folder
from lit_jax.config import Config, PolicyConfig, parse_as
from lit_jax.distributed.process import is_primary
from lit_jax.errors import UserError
from lit_jax.training.checkpoints import (
    Checkpoints,
    frozen_folder,
    later_frozen_folders,
    reading_step,
    restore_frozen,
    save_frozen,
    saved_config,
)
from lit_jax.training.integrity import by_path
from lit_jax.training.model_factory import build_model, first_parameters
from lit_jax.training.train_step import State, TrainStep, shardings_of
from lit_jax.training.workdir_errors import workdir_errors
from lit_jax.trees import STACK, Tree, restack, unflatten

log = logging.getLogger(__name__)


def with_saved_policy(config: Config, workdir: AnyPath, step: int) -> Config:
    """Return the config with the policy with which the checkpoint of a step was saved.

    The names in a checkpoint do not say which blocks of a stack they have; its policy does.
    """
    with reading_step(workdir, step):
        saved = parse_as(PolicyConfig, saved_config(workdir, step)["policy"])
    return dataclasses.replace(config, policy=saved)


def first_or_latest_state(
    step: TrainStep, workdir: AnyPath, checkpoints: Checkpoints
) -> tuple[State, Tree, dict[str, Any] | None]:
    """Return the state to continue from, the locked parameters, and the stream's position (None: its start).

    The locked parameters always come from the run folder, so that a resumed run has the same ones, bit by
    bit.
    """
    if checkpoints.latest is not None:
        state, locked, position = _restore_latest(step, workdir, checkpoints)
        log.info("Resuming from step %d of %s.", checkpoints.latest, workdir)
        return state, locked, position
    # A start that was killed before its first checkpoint may have left locked parameters of other weights.
    _remove_frozen(workdir, 0)
    trainable, frozen = first_parameters(step.model)
    folder = frozen_folder(workdir)
    save_frozen(folder, frozen, step.model.uncut)
    locked = restore_frozen(folder, step.model.abstract_frozen, step.model.uncut)
    return step.first_state(trainable), locked, None


def _restore_latest(
    step: TrainStep, workdir: AnyPath, checkpoints: Checkpoints
) -> tuple[State, Tree, dict[str, Any]]:
    """Return state, locked parameters and the stream's position of the latest checkpoint.

    Raises UserError if the checkpoint is damaged, or lacks what the policy trains.
    """
    latest, model = checkpoints.latest, step.model
    assert latest is not None
    config = with_saved_policy(model.config, workdir, latest)
    _remove_frozen(workdir, latest)
    folder = frozen_folder(workdir, latest)
    # The usual case: the checkpoint has the stacks of this model.
    if _what_trains(config.policy) == _what_trains(model.config.policy):
        state, position = checkpoints.restore(step.abstract_state())
        return state, restore_frozen(folder, model.abstract_frozen, model.uncut), position
    # The checkpoint has stacks that its own policy has cut, so a model with that policy reads it.
    before = build_model(config, model.mesh, model.paths, model.own_towers)
    # The state of the optimizer depends on its parameters alone, so the same optimizer describes both states.
    abstract = dataclasses.replace(step, model=before).abstract_state()
    saved, position = checkpoints.restore(abstract)
    # Locked parameters may be bfloat16 in the model. The new folder has float32, as the old one has.
    locked = restore_frozen(folder, _float32(before.abstract_frozen), model.uncut)
    try:
        state = rearrange_state(saved, step.abstract_state())
        known = by_path(locked) | by_path(saved.params)
        locked = _restacked(known, _float32(model.abstract_frozen))
    except ValueError as error:
        raise UserError(
            f"{workdir / 'checkpoints' / str(latest)} does not have what config.policy asks for ({error}), "
            "such as the optimizer's state of blocks that were locked; undo the change that --allow_changes "
            "permits, or export the run and start again from it in another --workdir."
        ) from error
    # Written before the first step: all checkpoints to come belong to these locked parameters.
    folder = workdir / f"frozen_from_{latest}"
    save_frozen(folder, locked, model.uncut)
    log.info("From step %d on, other parameters train than before.", latest)
    return state, restore_frozen(folder, model.abstract_frozen, model.uncut), position


def _remove_frozen(workdir: AnyPath, step: int) -> None:
    """Remove the locked parameters of later steps, left by a run that was killed or lost its checkpoints."""
    if is_primary():
        with workdir_errors(workdir):
            for folder in later_frozen_folders(workdir, step):
                remove_folder(folder)


def _what_trains(policy: PolicyConfig) -> tuple[Any, ...]:
    return policy.lock, policy.unlock_last, policy.trainable


def _float32(abstract: Tree) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), abstract
    )


def rearrange_state(saved: State, wanted: State) -> State:
    """Return the part of a state that `wanted`, a state of shapes with shardings, has, cut as it is there.

    Raises ValueError for a parameter that begins to train, and if the optimizer's state of a block cannot be
    told from that of the others.
    """
    there, here = by_path(saved), by_path(wanted)
    _check_moments(there, here)
    _check_moments(here, there)
    return _restacked(there, wanted)


def _check_moments(state: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise ValueError for a leaf without an axis of blocks, of a parameter that is in another stack now."""
    params = {name: leaf for name, leaf in state.items() if name.startswith("params/")}
    for name, leaf in state.items():
        # The path of a moment ends like that of its parameter.
        of = [param for param in params if name.endswith(param.removeprefix("params"))]
        if not (of and STACK.fullmatch(name)):
            continue
        (param,) = of
        is_same = param in other and other[param].shape == params[param].shape
        if not is_same and leaf.shape[:1] != params[param].shape[:1]:
            raise ValueError(f"{name} is not of single blocks")


def _restacked(arrays: dict[str, Any], wanted: Any) -> Any:
    shapes = by_path(wanted)

    def move(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        try:
            return by_path(restack(unflatten(arrays), unflatten(shapes), jnp.stack))
        except KeyError as error:
            raise ValueError(f"{error.args[0]} is absent there") from None

    found = jax.eval_shape(move, arrays)
    for name, leaf in shapes.items():
        if name not in found or found[name].shape != leaf.shape:
            raise ValueError(f"{name} is {leaf.shape} here and absent there")
    # The result has the shardings of `wanted`, so that no device holds a whole array that is sharded.
    moved = jax.jit(move, out_shardings=shardings_of(shapes))(arrays)
    return jax.tree.unflatten(jax.tree.structure(wanted), [moved[name] for name in shapes])
