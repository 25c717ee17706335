"""The state a run starts from: its latest checkpoint, or step 0."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lit_jax.config import Config
from lit_jax.distributed.mesh import replicated
from lit_jax.distributed.sharding import optimizer_shardings
from lit_jax.training.checkpoints import Checkpoints, restore_frozen, save_frozen
from lit_jax.training.model_factory import Setup, Towers, first_parameters
from lit_jax.training.step import State
from lit_jax.trees import Tree

log = logging.getLogger(__name__)


def abstract_state(setup: Setup, optimizer: optax.GradientTransformation) -> State:
    """Shapes, dtypes and shardings of the state."""
    params = setup.abstract_trainable
    opt_state = jax.eval_shape(optimizer.init, params)
    shardings = optimizer_shardings(opt_state, params, setup.mesh)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(setup.mesh))
    return State(
        step=step,
        params=params,
        opt_state=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            opt_state,
            shardings,
        ),
    )


def first_or_latest_state(
    config: Config,
    setup: Setup,
    towers: Towers,
    optimizer: optax.GradientTransformation,
    workdir: Path,
    checkpoints: Checkpoints,
) -> tuple[State, Tree, dict[str, Any] | None]:
    """The state to go on from, the locked parameters, and the stream's position (None: its start).

    The locked parameters are always read from the run folder, so that a resumed run has the same ones.
    """
    abstract = abstract_state(setup, optimizer)
    if checkpoints.latest is None:
        trainable, frozen = first_parameters(config, setup, towers)
        save_frozen(workdir, frozen)
        init = jax.jit(optimizer.init, out_shardings=shardings_of(abstract.opt_state))
        step = jax.make_array_from_callback(
            (), abstract.step.sharding, lambda index: np.zeros((), np.int32)[index]
        )
        state, position = State(step, trainable, init(trainable)), None
    else:
        state, position = checkpoints.restore(abstract)
        log.info("Going on from step %d of %s.", checkpoints.latest, workdir)
    return state, restore_frozen(workdir, setup.abstract_frozen), position


def shardings_of(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
