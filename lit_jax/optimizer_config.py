"""The optimizers that a config chooses by name: the fields of each with their ranges, and its update rule.

To add an optimizer, write its class here and add the class to `OptimizerConfig`. training/optimizers.py puts
clipping, weight decay and learning rate around the update rule.

Data workers read the config, and must not load JAX. So the functions import it, and not the module.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Literal

from lit_jax.config_schema import Decay, NotNegative, Positive

if TYPE_CHECKING:
    import jax
    import optax

MomentumDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The fields of every optimizer. A subclass adds its own fields, and sets a `name`."""

    # The name of the update rule.
    name: str = ""
    # Decoupled weight decay: each step subtracts learning_rate * weight_decay * parameter.
    weight_decay: NotNegative = 0.0
    # The norm to which the gradient of all trainable parameters is clipped. None: no clipping.
    clip_norm: Positive | None = 1.0

    def build(self) -> optax.GradientTransformation:
        """Return the update rule, which makes the direction of a step from the clipped gradient."""
        raise NotImplementedError(self.name)

    def after_weight_decay(self) -> optax.GradientTransformation:
        """Return what changes the sum of direction and weight decay; by default nothing does."""
        import optax

        return optax.identity()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Adam(Optimizer):
    """The fields of AdamW and LAMB, which share the direction."""

    # The decay per step of the first moment (momentum).
    b1: Decay = 0.9
    # The decay per step of the second moment.
    b2: Decay = 0.999
    # The number that is added to the root of the second moment.
    eps: NotNegative = 1e-8
    # The dtype of the stored first moment.
    momentum_dtype: MomentumDtype = "float32"

    def build(self) -> optax.GradientTransformation:
        """Return the direction of Adam."""
        import optax

        return optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.momentum_dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(_Adam):
    """AdamW (1711.05101), with the defaults of Adam (1412.6980, algorithm 1)."""

    # The name of the update rule.
    name: Literal["adamw"] = "adamw"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lamb(_Adam):
    """LAMB (1904.00962, algorithm 2): Adam whose step, for each parameter, is scaled to its length.

    The default of eps is that of the authors' code, as in optax.
    """

    # The name of the update rule.
    name: Literal["lamb"] = "lamb"
    # The number that is added to the root of the second moment.
    eps: NotNegative = 1e-6

    def after_weight_decay(self) -> optax.GradientTransformation:
        """Return the scaling to the length of the parameter, which includes the weight decay."""
        import optax

        return optax.stateless(_scale_to_parameter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """Lion (2302.06675, program 1), with the defaults of its authors. Its direction is a sign."""

    # The name of the update rule.
    name: Literal["lion"] = "lion"
    # The weight of the momentum in the direction; the rest is the gradient's.
    b1: Decay = 0.9
    # The decay per step of the momentum.
    b2: Decay = 0.99
    # The dtype of the stored momentum.
    momentum_dtype: MomentumDtype = "float32"

    def build(self) -> optax.GradientTransformation:
        """Return the direction of Lion."""
        import optax

        return optax.scale_by_lion(self.b1, self.b2, mu_dtype=self.momentum_dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adafactor for vision (2106.04560, section 3.4), with the settings and defaults of big_vision.

    The second moment of matrices is factored, and its decay 1 - t^-0.8 is capped at b2. There is no clipping
    of updates and no scaling by the parameter. The momentum has no bias correction.
    """

    # The name of the update rule.
    name: Literal["adafactor"] = "adafactor"
    # The decay per step of the first moment (momentum).
    b1: Decay = 0.9
    # The largest decay per step of the second moment.
    b2: Decay = 0.999
    # The dtype of the stored first moment.
    momentum_dtype: MomentumDtype = "bfloat16"

    def build(self) -> optax.GradientTransformation:
        """Return the direction of Adafactor."""
        import jax.numpy as jnp
        import optax

        def second_moment(*, factored: bool) -> optax.GradientTransformation:
            return optax.scale_by_factored_rms(
                factored,
                0.8,
                min_dim_size_to_factor=32,
                epsilon=1e-30,
                decay_rate_fn=self._decay_rate,
            )

        # Optax would factor the vectors of a stack of 32 or more layers, because the stack has two axes.
        return optax.chain(
            optax.masked(
                second_moment(factored=False), functools.partial(_are_vectors, wanted=True)
            ),
            optax.masked(
                second_moment(factored=True), functools.partial(_are_vectors, wanted=False)
            ),
            optax.ema(self.b1, debias=False, accumulator_dtype=jnp.dtype(self.momentum_dtype)),
        )

    def _decay_rate(self, step: Any, exponent: Any) -> Any:
        import jax.numpy as jnp

        # Optax counts steps from 0, the formula from 1.
        t = jnp.asarray(step, jnp.float32) + 1.0
        return jnp.minimum(self.b2, 1.0 - t ** (-exponent))


# The optimizers that config.optimizer.name can choose. The first one is the default.
OptimizerConfig = AdamW | Adafactor | Lion | Lamb


def _are_vectors(params: Any, *, wanted: bool) -> Any:
    """Return, for each parameter, whether it is `wanted`: a stack of vectors (True), or not (False)."""
    from lit_jax.trees import STACK, flatten, unflatten

    flat = flatten(params)
    return unflatten(
        {path: (bool(STACK.fullmatch(path)) and x.ndim == 2) == wanted for path, x in flat.items()}
    )


def _scale_to_parameter(updates: Any, params: Any) -> Any:
    """Scale each update to the length of its parameter (LAMB's trust ratio), layer by layer in a stack.

    An update stays as it is if its length or the length of the parameter is zero.
    """
    import jax
    import jax.numpy as jnp

    from lit_jax.trees import STACK, flatten, unflatten

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
