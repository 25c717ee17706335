"""The layers that the towers share: activations, normalisation, dense layers, dropout, pooling.

Dims: B batch, L tokens (Q as queries), D width, P width of the output. Parameters are float32 when
initialised, and may be given in another dtype. `dtype` is that of the computation, but normalisation is
always float32.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

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


def stacks(first: int, depth: int, cuts: tuple[int, ...]) -> list[tuple[str, slice]]:
    """Return the name of each stack of `depth` blocks that count from `first`, and which of them it has."""
    starts = sorted({first, *(cut for cut in cuts if first < cut < first + depth)})
    ends = [*starts[1:], first + depth]
    return [
        (f"layer_from_{start}" if start else "layer", slice(start - first, end - first))
        for start, end in zip(starts, ends, strict=True)
        if start < end
    ]


def rematerialized(
    call: Callable[..., Any], remat: Remat, *, prevent_cse: bool
) -> Callable[..., Any]:
    """Return `call`, a function of a block and arrays, with a gradient that keeps only what `remat` says.

    The gradient is the same: values that are computed again have the same dropout.

    Args:
        prevent_cse: whether the compiler could take the values computed again for those computed before, and
            so keep them. It cannot across the two loops that a scan and its gradient are.
    """
    if remat == "none":
        return call
    keep_matmuls = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    policy = keep_matmuls if remat == "matmuls" else None
    return nn.remat(call, policy=policy, prevent_cse=prevent_cse)


_gelu_tanh = ops.save_slope(functools.partial(jax.nn.gelu, approximate=True))
_silu = ops.save_slope(jax.nn.silu)

# By the names that config.json uses (transformers' ACT2FN); several names are one function.
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
    """Return the activation that config.json calls `name`. Raises UserError if there is none."""
    if name not in ACTIVATIONS:
        raise UserError(
            f"The model's config.json asks for the activation {name!r}, which lit_jax does not "
            f"have; {nearest(name, ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in float32 and returned as `dtype`."""

    epsilon: float
    dtype: Any = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x_BxLxD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        width = x_BxLxD.shape[-1]
        scale_D = jnp.asarray(self.param("scale", nn.initializers.ones, (width,)), jnp.float32)
        y_BxLxD = ops.layer_norm(x_BxLxD, scale_D, self.epsilon)
        if self.use_bias:
            bias_D = jnp.asarray(self.param("bias", nn.initializers.zeros, (width,)), jnp.float32)
            y_BxLxD += bias_D[None, None]
        return y_BxLxD.astype(self.dtype)


def mean_of_attended(
    x_BxLxD: Float[Array, "B L D"], attended_BxL: Bool[Array, "B L"]
) -> Float[Array, "B D"]:
    """Return the mean over the attended tokens, computed in float32; 0 for a text without any."""
    weight_BxLx1 = attended_BxL[..., None].astype(jnp.float32)
    count_Bx1 = jnp.maximum(weight_BxLx1.sum(1), 1)
    return ((x_BxLxD.astype(jnp.float32) * weight_BxLx1).sum(1) / count_Bx1).astype(x_BxLxD.dtype)


class Dropout(nn.Module):
    """Dropout of single numbers (Srivastava et al., 2014), drawn from the stream 'dropout'."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "*X"], *, deterministic: bool) -> Float[Array, "*X"]:
        if deterministic or not self.rate:
            return x
        return drop(x, jnp.float32(self.rate), self.make_rng("dropout"), x.shape)


def drop(
    x: Float[Array, "*X"], rate: Float[Array, ""], key: jax.Array, shape: tuple[int, ...]
) -> Float[Array, "*X"]:
    """Set parts of `x` to 0 with probability `rate`, and scale the others so that the mean stays.

    Args:
        rate: rounded to a multiple of 2^-16.
        shape: that of the parts, which broadcasts to that of `x`: along an axis of length 1 all of `x` is
            dropped or kept together.
    """
    steps = jnp.round((1 - rate.astype(jnp.float32)) * 2**16)
    kept = ops.random_16_bits(key, shape) < steps.astype(jnp.uint32)
    return (jnp.where(kept, x.astype(jnp.float32), 0.0) * (2**16 / jnp.maximum(steps, 1))).astype(
        x.dtype
    )


def normal(std: float, cutoff: float | None = None) -> Callable[..., Array]:
    """Return an initializer; `cutoff` is in standard deviations, and does not change `std`, as in torch."""
    if cutoff is None:
        return nn.initializers.normal(std)
    return nn.initializers.truncated_normal(std, lower=-cutoff, upper=cutoff)


class Dense(nn.Module):
    """A dense layer over the last axis, or the last `axes`."""

    features: int
    kernel_init: Callable[..., Array]
    dtype: Any
    use_bias: bool = True
    axes: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*X"]) -> Float[Array, "*Y"]:
        shape = (*x.shape[-self.axes :], self.features)
        kernel = jnp.asarray(self.param("kernel", self.kernel_init, shape), self.dtype)
        y = _dot_gathered(jnp.asarray(x, self.dtype), kernel, self.axes)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y += broadcast_float32(bias, y.shape, self.dtype)
        return y


def _dot_gathered(x: Array, kernel: Array, axes: int) -> Array:
    """Return the product with a kernel that may be split over the mesh."""
    # The kernel is gathered for the product, and once more for the gradient: a gathered kernel of each layer
    # would wait in memory for its gradient.
    contracted = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))

    def dot(x: Array, kernel: Array) -> Array:
        return jax.lax.dot_general(x, all_gather_kernel(kernel), (contracted, ((), ())))

    whole = fsdp_size() == 1
    return dot(x, kernel) if whole else jax.checkpoint(dot, prevent_cse=False)(x, kernel)


def dense(
    features: int,
    *,
    name: str,
    init_std: float,
    init_cutoff: float | None = None,
    dtype: Any,
    use_bias: bool = True,
) -> Dense:
    """Return a dense layer as Hugging Face initialises it: normal kernel, bias zero."""
    return Dense(features, normal(init_std, init_cutoff), dtype, use_bias, name=name)


class DenseAct(nn.Module):
    """A dense layer and an activation: the pooler of ViT and BERT."""

    features: int
    activation: str
    init_std: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B P"]:
        y = dense(self.features, name="dense", init_std=self.init_std, dtype=self.dtype)(x)
        return activation(self.activation)(y)


def broadcast_float32(parameter: Array | np.ndarray, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return a parameter, broadcast to many rows of `shape`, in `dtype`.

    The parameter is broadcast before it is cast, so its gradient, a sum over all rows, adds up in float32. A
    sum in bfloat16 stops growing where it is 256 times as large as each addend.
    """
    return jnp.broadcast_to(parameter, shape).astype(dtype)


def scale_float32(x: Array, factor: Array) -> Array:
    """Return x * factor in x's dtype, for one factor of many rows.

    The gradient of the factor adds up as in `broadcast_float32`. The product is computed again for the
    gradient, which so keeps no factor for each row.
    """

    def product(x: Array, factor: Array) -> Array:
        return x * broadcast_float32(factor.astype(jnp.float32), x.shape, x.dtype)

    return jax.checkpoint(product, prevent_cse=False)(x, factor)
