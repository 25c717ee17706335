"""Schedules and optimizers. All functions here see the trainable parameters alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lit_jax.config import ScheduleConfig
from lit_jax.errors import UserError
from lit_jax.models.ops import clip_by_global_norm
from lit_jax.optimizer_config import OptimizerConfig
from lit_jax.training.policy import Policy
from lit_jax.trees import unflatten

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
) -> optax.GradientTransformationExtraArgs:
    """Chain clipping by the global norm, the optimizer's direction, decoupled weight decay, learning rate.

    A step subtracts rate * lr_multiplier * (direction + weight_decay * wd_multiplier * parameter), where
    `rate` comes from the schedule. An optimizer may change the sum in the parentheses, as LAMB does.
    """
    # The order matters: clipping sees the raw gradient, weight decay is added after the direction (decoupled,
    # 1711.05101), and LAMB's scaling includes the decay. The checkpoints' names depend on the order, too.
    return optax.chain(
        optax.identity() if config.clip_norm is None else _clip(config.clip_norm),
        config.build(),
        _add_weight_decay(config.weight_decay, policy),
        config.after_weight_decay(),
        scale_by_multipliers(policy),
        optax.scale_by_learning_rate(schedule),
    )


def _clip(max_norm: float) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: clip_by_global_norm(updates, max_norm))


def _add_weight_decay(weight_decay: float, policy: Policy) -> optax.GradientTransformation:
    # optax.add_decayed_weights knows a mask only, and a policy has a multiplier for each parameter.
    rates = unflatten(policy.weight_decay)

    def update(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, p, m: u + weight_decay * m * p, updates, params, rates)

    return optax.stateless(update)


def scale_by_multipliers(policy: Policy) -> optax.GradientTransformation:
    """Return the transformation that multiplies updates by the policy's learning-rate multipliers."""
    rates = unflatten(policy.learning_rate)
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, m: u * m, updates, rates))
