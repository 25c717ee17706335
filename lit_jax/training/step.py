"""The train step: one pure function of the state, the locked parameters and a batch."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from lit_jax.models.dual_encoder import limit_logit_scale
from lit_jax.training.losses import Loss
from lit_jax.training.policy import merge
from lit_jax.trees import Tree, flatten, unflatten

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


class State(NamedTuple):
    """All that training changes. `step` counts the steps taken, int32."""

    step: jax.Array
    params: Any  # the trainable ones, a nested dict
    opt_state: optax.OptState


def named_key(seed: int, name: str, step: int | jax.Array) -> jax.Array:
    """The random key of one use at one step. None is ever stored: a resumed run draws the same ones."""
    return jax.random.fold_in(
        jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())), step
    )


def train_step(
    state: State,
    frozen: Tree,
    batch: Batch,
    *,
    embed: Callable[..., Any],
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    logit_scale_max: float | None = None,
) -> tuple[State, Metrics]:
    """One step on the global batch: gradient of the trainable parameters, update, metrics.

    `embed` is `DualEncoderModule.apply` or `TextDistillation.apply`, or one of them in micro-batches. A tower
    without trainable parameters is a constant to the gradient and computes as in evaluation: no dropout,
    BatchNorm by its running statistics.
    """
    dropout_key = named_key(seed, "dropout", state.step)

    def loss_fn(params: Tree) -> tuple[jax.Array, tuple[Metrics, Tree]]:
        output, updated = embed(
            {"params": merge(params, frozen)},
            batch,
            deterministic_image="vision_model" not in params,
            deterministic_text="text_model" not in params,
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        value = loss(*output)
        return value, ({"loss": value} | output.metrics, updated.get("batch_stats", {}))

    grads, (metrics, statistics) = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = _replace(optax.apply_updates(state.params, updates), statistics)
    params = limit_logit_scale(params, logit_scale_max)
    metrics |= {
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": schedule(state.step),
    }
    return State(state.step + 1, params, opt_state), metrics


def _replace(params: Any, statistics: Tree) -> Tree:
    """The parameters with the new running statistics of BatchNorm, which have no gradient."""
    flat = flatten(params)
    new = {path: value for path, value in flatten(statistics).items() if path in flat}
    return unflatten(flat | new)


def jit_train_step(
    step: Callable[[State, Tree, Batch], tuple[State, Metrics]], state_shardings: State
) -> Callable[[State, Tree, Batch], tuple[State, Metrics]]:
    """The one place where the step is compiled.

    The old state's buffers are given to the new one, which keeps its shardings. Inputs carry theirs.
    """
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))
