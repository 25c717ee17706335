"""Schedules and optimizers. All functions here see the trainable parameters alone."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lit_jax.config import OptimizerConfig, ScheduleConfig
from lit_jax.errors import UserError
from lit_jax.models.ops import clip_by_global_norm
from lit_jax.training.policy import Policy
from lit_jax.trees import STACK, flatten, unflatten

# Converts a duration such as "2 epochs" to steps.
Steps = Callable[[str], int]


def make_schedule(config: ScheduleConfig, *, total: int, steps: Steps) -> optax.Schedule:
    """Return the learning rate by step: linear warm-up from 0, the named curve, linear cool-down to 0.

    'cosine' and 'linear' end at 0 after `total` steps. 'rsqrt' is sqrt(timescale / (timescale + step)), an
    inverse square root (Zhai et al., Scaling Vision Transformers, 2106.04560, section 3.4). Curves count
    their steps from the end of the warm-up.

    Raises UserError if warm-up and cool-down are longer than the run.
    """
    warmup, cooldown = steps(config.warmup), steps(config.cooldown)
    if warmup + cooldown > total:
        raise UserError(
            f"config.schedule.warmup and cooldown take {warmup + cooldown} steps of the run's {total}; "
            "shorten them or lengthen config.duration."
        )
    # A run may consist of warm-up alone; a curve still needs a positive length.
    decay = max(total - warmup, 1)
    timescale = max(steps(config.timescale), 1)
    curves = {
        "cosine": optax.cosine_decay_schedule(1.0, decay),
        "linear": optax.linear_schedule(1.0, 0.0, decay),
        "constant": optax.constant_schedule(1.0),
        "rsqrt": lambda step: jnp.sqrt(timescale / (timescale + step)),
    }
    curve = curves[config.name]

    def schedule(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        # The step is traced, so each phase is a factor and not a branch.
        ramp_up = jnp.minimum(1.0, step / max(warmup, 1)) if warmup else 1.0
        ramp_down = jnp.clip((total - step) / cooldown, 0.0, 1.0) if cooldown else 1.0
        return config.learning_rate * ramp_up * ramp_down * curve(jnp.maximum(step - warmup, 0.0))

    return schedule


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, policy: Policy
) -> optax.GradientTransformation:
    """Chain clipping by the global norm, the optimizer's direction, decoupled weight decay, learning rate.

    A step subtracts rate * lr_multiplier * (direction + weight_decay * wd_multiplier * parameter), where
    `rate` comes from the schedule. LAMB (You et al., 1904.00962, algorithm 2) is Adam whose sum in the
    parentheses is scaled, for each parameter, to the length of the parameter.
    """
    # The order matters: clipping sees the raw gradient, weight decay is added after the direction (decoupled,
    # 1711.05101), and LAMB's scaling includes the decay.
    return optax.chain(
        optax.identity() if config.clip_norm is None else _clip(config.clip_norm),
        _DIRECTIONS[config.name](config),
        _add_weight_decay(config.weight_decay, policy),
        optax.stateless(_scale_to_parameter) if config.name == "lamb" else optax.identity(),
        scale_by_multipliers(policy),
        optax.scale_by_learning_rate(schedule),
    )


def _clip(max_norm: float) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: clip_by_global_norm(updates, max_norm))


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.momentum_dtype)


def _lion(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_lion(config.b1, config.b2, mu_dtype=config.momentum_dtype)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return Adafactor for vision (2106.04560, section 3.4) with big_vision's settings.

    The second moment of matrices is factored, and its decay 1 - t^-0.8 is capped at b2. There is no clipping
    of updates and no scaling by the parameter. Momentum b1 has no bias correction and is kept in
    `momentum_dtype`.
    """

    def decay_rate(step: Any, exponent: Any) -> Any:
        # Optax counts steps from 0, the formula from 1.
        t = jnp.asarray(step, jnp.float32) + 1.0
        return jnp.minimum(config.b2, 1.0 - t ** (-exponent))

    def second_moment(*, factored: bool) -> optax.GradientTransformation:
        return optax.scale_by_factored_rms(
            factored, 0.8, min_dim_size_to_factor=32, epsilon=1e-30, decay_rate_fn=decay_rate
        )

    def are_vectors(params: Any, *, wanted: bool) -> Any:
        flat = flatten(params)
        return unflatten(
            {p: (bool(STACK.fullmatch(p)) and x.ndim == 2) == wanted for p, x in flat.items()}
        )

    # Optax would factor the vectors of a stack of 32 or more layers, because the stack has two axes.
    return optax.chain(
        optax.masked(second_moment(factored=False), functools.partial(are_vectors, wanted=True)),
        optax.masked(second_moment(factored=True), functools.partial(are_vectors, wanted=False)),
        optax.ema(config.b1, debias=False, accumulator_dtype=jnp.dtype(config.momentum_dtype)),
    )


_DIRECTIONS = {"adamw": _adam, "adafactor": _adafactor, "lion": _lion, "lamb": _adam}


def _add_weight_decay(weight_decay: float, policy: Policy) -> optax.GradientTransformation:
    # optax.add_decayed_weights knows a mask only, and a policy has a multiplier for each parameter.
    rates = unflatten(policy.weight_decay)

    def update(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, p, m: u + weight_decay * m * p, updates, params, rates)

    return optax.stateless(update)


def _scale_to_parameter(updates: Any, params: Any) -> Any:
    """Scale each update to the length of its parameter (LAMB's trust ratio), layer by layer in a stack.

    An update stays as it is if its length or the length of the parameter is zero.
    """

    # LAMB's ratio belongs to the matrix of one layer, so a stack has a ratio for each entry of its depth.
    def scaled(path: str, update: jax.Array, param: jax.Array) -> jax.Array:
        if STACK.fullmatch(path):
            return jax.vmap(scale)(update, param)
        return scale(update, param)

    def scale(update: jax.Array, param: jax.Array) -> jax.Array:
        length, wanted = jnp.linalg.norm(update), jnp.linalg.norm(param)
        return update * jnp.where((length > 0) & (wanted > 0), wanted / length, 1.0)

    flat = flatten(params)
    return unflatten(
        {path: scaled(path, update, flat[path]) for path, update in flatten(updates).items()}
    )


def scale_by_multipliers(policy: Policy) -> optax.GradientTransformation:
    """Return the transformation that multiplies updates by the policy's learning-rate multipliers."""
    rates = unflatten(policy.learning_rate)
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, m: u * m, updates, rates))
