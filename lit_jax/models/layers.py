"""The layers that the towers share: activations, normalisation, dense layers, dropout, pooling.

Dims: B batch, L tokens (Q as queries), D width, P width of the output. Parameters are float32 when they are
initialised, and may be given in another dtype. `dtype` is the dtype of the computation; normalisation is
always float32.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lit_jax.config import Remat
from lit_jax.config_schema import nearest
from lit_jax.distributed.sharding import all_gather_kernel, fsdp_size
from lit_jax.errors import UserError
from lit_jax.models import ops
from lit_jax.models.layer_norm import layer_norm


def stacks(first: int, depth: int, cuts: tuple[int, ...]) -> list[tuple[str, slice]]:
    """Return the name and the range of blocks of each stack, for `depth` blocks counted from `first`.

    A new stack begins at each of `cuts`. Ranges count from 0.
    """
    starts = sorted({first, *(cut for cut in cuts if first < cut < first + depth)})
    ends = [*starts[1:], first + depth]
    return [
        # A stack that begins at block 0 keeps the name `layer`, so that uncut towers have one and the same
        # tree.
        (f"layer_from_{start}" if start else "layer", slice(start - first, end - first))
        for start, end in zip(starts, ends, strict=True)
        if start < end
    ]


def rematerialized(
    call: Callable[..., Any], remat: Remat, *, prevent_cse: bool
) -> Callable[..., Any]:
    """Return `call`, a function of a block and arrays, with a gradient that saves only what `remat` says.

    The gradient is the same, because recomputed values have the same dropout.

    Args:
        prevent_cse: whether to keep the compiler from merging the recomputation with the original, which
            would save the values after all. In a scan it cannot merge them, because the forward pass and the
            gradient are two loops.
    """
    if remat == "none":
        return call
    # Outputs of matrix products with parameters are kept. Attention, whose products have batch axes, is
    # recomputed.
    keep_matmuls = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    policy = keep_matmuls if remat == "matmuls" else None
    return nn.remat(call, policy=policy, prevent_cse=prevent_cse)


_gelu_tanh = ops.save_slope(functools.partial(jax.nn.gelu, approximate=True))
_silu = ops.save_slope(jax.nn.silu)

# The keys are the names that config.json uses (transformers' ACT2FN). `save_slope` is for functions whose
# derived gradient would keep several arrays.
ACTIVATIONS: Mapping[str, ops.Elementwise] = {
    "gelu": ops.gelu,
    "gelu_python": ops.gelu,
    "gelu_10": lambda x: jnp.clip(ops.gelu(x), -10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": ops.save_slope(lambda x: x * jax.nn.sigmoid(1.702 * x)),
    "hardswish": jax.nn.hard_swish,
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": ops.save_slope(jax.nn.mish),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": _silu,
    "swish": _silu,
    "tanh": jnp.tanh,
}


def activation(name: str) -> ops.Elementwise:
    """Return the activation that config.json calls `name`. Raise UserError for an unknown name."""
    if name not in ACTIVATIONS:
        raise UserError(
            f"The model's config.json asks for the activation {name!r}, which lit_jax does not "
            f"have; {nearest(name, ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


class LayerNorm(nn.Module):
    """A layer normalisation (1607.06450) over the last axis, computed in float32 and returned as `dtype`.

    The input has one vector for each example, a sequence of them, or a map.
    """

    epsilon: float
    dtype: Any = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B *L D"]) -> Float[Array, "B *L D"]:
        width = x.shape[-1]
        # A locked tower's parameters may be bfloat16, but normalisation is float32.
        scale_D = jnp.asarray(self.param("scale", nn.initializers.ones, (width,)), jnp.float32)
        bias_D = None
        if self.use_bias:
            bias_D = jnp.asarray(self.param("bias", nn.initializers.zeros, (width,)), jnp.float32)
        x_BxLxD = x.reshape(len(x), -1, width)
        return layer_norm(x_BxLxD, scale_D, bias_D, self.epsilon, self.dtype).reshape(x.shape)


def mean_of_attended(
    x_BxLxD: Float[Array, "B L D"], attended_BxL: Bool[Array, "B L"]
) -> Float[Array, "B D"]:
    """Return the mean over the attended tokens, computed in float32; 0 for a text without attended tokens."""
    weight_BxLx1 = attended_BxL[..., None].astype(jnp.float32)
    # The maximum avoids 0 / 0.
    count_Bx1 = jnp.maximum(weight_BxLx1.sum(1), 1)
    return ((x_BxLxD.astype(jnp.float32) * weight_BxLx1).sum(1) / count_Bx1).astype(x_BxLxD.dtype)


class DropMask(NamedTuple):
    """The numbers that a dropout keeps, and the factor by which it scales them."""

    kept: Bool[Array, "..."]
    factor: Any


class Dropout(nn.Module):
    """A dropout of single numbers (Srivastava et al., 2014), drawn from the rng 'dropout'."""

    rate: float

    def draw_mask(self, shape: tuple[int, ...]) -> DropMask:
        """Return the mask for an array of this shape; its factor is a number of numpy."""
        return draw_mask(np.float32(self.rate), self.make_rng("dropout"), shape)

    @nn.compact
    def __call__(self, x: Float[Array, "*X"], *, deterministic: bool) -> Float[Array, "*X"]:
        # A rate of 0 must not ask for an rng, which the caller then need not pass.
        if deterministic or not self.rate:
            return x
        return drop(x, jnp.float32(self.rate), self.make_rng("dropout"), x.shape)


def drop(
    x: Float[Array, "*X"], rate: Float[Array, ""], key: jax.Array, shape: tuple[int, ...]
) -> Float[Array, "*X"]:
    """Set parts of `x` to 0 with probability `rate`, and scale the other parts so that the mean stays.

    Args:
        rate: the probability, which is rounded to a multiple of 2^-16.
        shape: the shape of the mask, which broadcasts to the shape of `x`. Along an axis of length 1 all of
            `x` is dropped or kept together.
    """
    kept, factor = draw_mask(rate.astype(jnp.float32), key, shape)
    return (jnp.where(kept, x.astype(jnp.float32), 0.0) * factor).astype(x.dtype)


def draw_mask(rate: Any, key: jax.Array, shape: tuple[int, ...]) -> DropMask:
    """Draw the mask of `drop`. The rate is a float32 number of JAX or numpy, and so is the factor."""
    # Integers are compared, so the rate and the scale agree exactly: 16 bits have only 2^16 values.
    steps = ((1 - rate) * 2**16).round()
    kept = ops.random_16_bits(key, shape) < steps.astype(np.uint32)
    return DropMask(kept, 2**16 / steps.clip(1))


def normal(std: float, cutoff: float | None = None) -> Callable[..., Array]:
    """Return an initializer that draws from a normal distribution, truncated at `cutoff` deviations.

    As in torch, `std` is the deviation before the truncation.
    """
    if cutoff is None:
        return nn.initializers.normal(std)
    return nn.initializers.truncated_normal(std, lower=-cutoff, upper=cutoff)


class Dense(nn.Module):
    """A dense layer over the last `axes` axes."""

    features: int
    kernel_init: Callable[..., Array]
    dtype: Any
    use_bias: bool = True
    axes: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*X"]) -> Float[Array, "*Y"]:
        shape = (*x.shape[-self.axes :], self.features)
        # The cast comes before the gather, which then moves half as many bytes in bfloat16.
        kernel = jnp.asarray(self.param("kernel", self.kernel_init, shape), self.dtype)
        y = _dot_gathered(jnp.asarray(x, self.dtype), kernel, self.axes)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y += broadcast_float32(bias, y.shape, self.dtype)
        return y


def _dot_gathered(x: Array, kernel: Array, axes: int) -> Array:
    """Return the product of `x` with a kernel that may be split over the mesh."""
    if fsdp_size() == 1:
        return _dot(axes, x, kernel)
    # The kernel is gathered for the product and once more for the gradient. Otherwise the gathered kernels
    # of all layers would stay in memory until their gradients are computed.
    return jax.checkpoint(functools.partial(_dot, axes), prevent_cse=False)(x, kernel)


def _dot(axes: int, x: Array, kernel: Array) -> Array:
    contracted = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))
    return jax.lax.dot_general(x, all_gather_kernel(kernel), (contracted, ((), ())))


def dense(
    features: int,
    *,
    name: str,
    init_std: float,
    init_cutoff: float | None = None,
    dtype: Any,
    use_bias: bool = True,
) -> Dense:
    """Return a dense layer as Hugging Face initialises it: a normal kernel and a bias of zeros."""
    return Dense(features, normal(init_std, init_cutoff), dtype, use_bias, name=name)


class DenseAct(nn.Module):
    """A dense layer followed by an activation: the pooler of ViT and BERT."""

    features: int
    activation: str
    init_std: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B P"]:
        y = dense(self.features, name="dense", init_std=self.init_std, dtype=self.dtype)(x)
        return activation(self.activation)(y)


def broadcast_float32(parameter: Array | np.ndarray, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return a parameter, broadcast to `shape` and cast to `dtype`.

    The cast comes after the broadcast, so that the gradient, a sum over all rows, adds up in float32. A sum
    in bfloat16 stops growing when it is 256 times as large as each addend.
    """
    return jnp.broadcast_to(parameter, shape).astype(dtype)


# Decorated here, once, because JAX keeps what it has traced by the function's identity.
@functools.partial(jax.checkpoint, prevent_cse=False)
def scale_float32(x: Array, factor: Array) -> Array:
    """Return x * factor in x's dtype, where `factor` broadcasts over many rows.

    The gradient of the factor adds up in float32, as in `broadcast_float32`. The product is recomputed in the
    backward pass, so that no broadcast factor stays in memory.
    """
    return x * broadcast_float32(factor.astype(jnp.float32), x.shape, x.dtype)
