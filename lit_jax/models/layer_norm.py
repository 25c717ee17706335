"""Layer normalisation (1607.06450): the textbook formula, an implementation for CPUs and a kernel for TPUs.

LIT_JAX_PLAIN_OPS=1 selects the textbook formula everywhere. benchmarks/layers.py measures the implementation
for CPUs, whose forward and backward pass are 1.7 times as fast.

Dims: B batch, L tokens, D width, N devices.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from lit_jax.models.ops import on_rows, on_tpus, parallel_axes, use_plain_ops, use_tpu_ops


def layer_norm(
    x_BxLxD: Float[Array, "B L D"],
    scale_D: Float[Array, " D"],
    bias_D: Float[Array, " D"] | None,
    epsilon: float,
    dtype: Any = jnp.float32,
) -> Float[Array, "B L D"]:
    """Return (x - mean) / deviation * scale + bias over the last axis, computed in float32, as `dtype`."""
    if has_tpu_layer_norm(x_BxLxD):
        zero_D = jnp.zeros_like(scale_D) if bias_D is None else bias_D
        return tpu_layer_norm(epsilon, dtype, x_BxLxD, scale_D, zero_D)
    y_BxLxD: Array = (
        plain_layer_norm(x_BxLxD, scale_D, epsilon)
        if use_plain_ops()
        else _layer_norm(epsilon, x_BxLxD, scale_D)
    )
    if bias_D is not None:
        y_BxLxD += bias_D[None, None]
    return y_BxLxD.astype(dtype)


def plain_layer_norm(x_BxLxD: Array, scale_D: Array, epsilon: float) -> Array:
    """Compute `layer_norm` by the textbook formula, without bias, in float32."""
    mean_BxLx1, inverse_BxLx1 = _row_statistics(x_BxLxD, epsilon)
    return (x_BxLxD.astype(jnp.float32) - mean_BxLx1) * inverse_BxLx1 * scale_D[None, None]


def _row_statistics(x_BxLxD: Array, epsilon: float) -> tuple[Array, Array]:
    """Return the mean and the inverse standard deviation of each row, in float32."""
    x32_BxLxD = x_BxLxD.astype(jnp.float32)
    mean_BxLx1 = x32_BxLxD.mean(-1, keepdims=True)
    # The squared differences are averaged, because E[x^2] - E[x]^2 cancels in float32.
    variance_BxLx1 = jnp.square(x32_BxLxD - mean_BxLx1).mean(-1, keepdims=True)
    return mean_BxLx1, jax.lax.rsqrt(variance_BxLx1 + epsilon)


# ---- For CPUs: x stays in its dtype, and the gradient is written by hand.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer_norm(epsilon: float, x_BxLxD: Array, scale_D: Array) -> Array:
    # On GPU, XLA compiles the textbook formula into one kernel that reads x once, but the code for CPUs into
    # five kernels.
    return jax.lax.platform_dependent(
        x_BxLxD,
        scale_D,
        cpu=lambda *arrays: _layer_norm_forward(epsilon, *arrays)[0],
        default=functools.partial(plain_layer_norm, epsilon=epsilon),
    )


def _layer_norm_forward(
    epsilon: float, x_BxLxD: Array, scale_D: Array
) -> tuple[Array, tuple[Array, ...]]:
    mean_BxLx1, inverse_BxLx1 = _row_statistics(x_BxLxD, epsilon)
    # x - mean is not reused from `_row_statistics`: XLA would write a value that two results share to memory
    # on CPU.
    normed_BxLxD = x_BxLxD.astype(jnp.float32) * inverse_BxLx1 - mean_BxLx1 * inverse_BxLx1
    # The backward pass keeps x in its own dtype, and no float32 array of that size.
    return normed_BxLxD * scale_D[None, None], (x_BxLxD, mean_BxLx1, inverse_BxLx1, scale_D)


def _layer_norm_backward(
    epsilon: float, saved: tuple[Array, ...], grad_BxLxD: Array
) -> tuple[Array, Array]:
    x_BxLxD, mean_BxLx1, inverse_BxLx1, scale_D = saved
    normed_BxLxD = x_BxLxD.astype(jnp.float32) * inverse_BxLx1 - mean_BxLx1 * inverse_BxLx1
    product_BxLxD = grad_BxLxD * normed_BxLxD
    # Normalisation removes the mean and the length of a row, so the gradient has no component along a
    # constant vector or along the normalised row.
    along_mean_BxLx1 = _mean_of_product(grad_BxLxD, scale_D)
    along_normed_BxLx1 = _mean_of_product(product_BxLxD, scale_D)
    grad_x_BxLxD = inverse_BxLx1 * (
        grad_BxLxD * scale_D[None, None] - along_mean_BxLx1 - normed_BxLxD * along_normed_BxLx1
    )
    return grad_x_BxLxD.astype(x_BxLxD.dtype), product_BxLxD.sum((0, 1))


def _mean_of_product(x_BxLxD: Array, y_D: Array) -> Float[Array, "B L 1"]:
    # On CPU a product with a vector reads its input once. XLA turns the product into a sum on TPU. HIGHEST
    # keeps GPU and TPU from rounding the inputs to fewer bits.
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("bld,d->bl", x_BxLxD, y_D, precision=precision)[..., None] / len(y_D)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


# ---- The kernel for TPUs reads x once, where XLA's code reads x three times: by the compiler's schedule
# the two of a block take 15k cycles of a v5e for 16 images of a ViT-B/16, and XLA's code 150k. Both passes
# are exact: mean first, then the squared differences.

# The most rows of a block, and the most bytes of its values in the memory on chip, which has 16 MiB on a v5e.
# More rows do not make the schedule shorter.
_ROWS, _BYTES = 512, 14 << 20


def has_tpu_layer_norm(x_BxLxD: Array) -> bool:
    """Return whether the kernel for TPUs is used: whole registers of 128 numbers, and not a single token."""
    batch, length, width = x_BxLxD.shape
    fits = _example_bytes(x_BxLxD) <= _BYTES
    return use_tpu_ops(batch) and width % 128 == 0 and length >= 8 and fits


def _example_bytes(x_BxLxD: Array) -> int:
    """Return a bound on the bytes on chip for one example: x and two more such arrays, twice, and float32."""
    _, length, width = x_BxLxD.shape
    # Registers have 8 rows of 32 bits, or 16 of 16 bits.
    return -(-length // 16) * 16 * width * (6 * x_BxLxD.dtype.itemsize + 10)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def tpu_layer_norm(
    epsilon: float, dtype: Any, x_BxLxD: Array, scale_D: Array, bias_D: Array
) -> Array:
    """Compute `layer_norm` by a Pallas kernel, interpreted where there is no TPU."""
    kernel = functools.partial(_call_forward, epsilon, dtype)
    return on_rows(kernel, 1)(x_BxLxD, scale_D, bias_D)


def _tpu_forward(
    epsilon: float, dtype: Any, x_BxLxD: Array, scale_D: Array, bias_D: Array
) -> tuple[Array, tuple[Array, Array]]:
    return tpu_layer_norm(epsilon, dtype, x_BxLxD, scale_D, bias_D), (x_BxLxD, scale_D)


def _tpu_backward(
    epsilon: float, dtype: Any, saved: tuple[Array, Array], grad_BxLxD: Array
) -> tuple[Array, Array, Array]:
    x_BxLxD, scale_D = saved
    kernel = functools.partial(_call_backward, epsilon)
    grad_x_BxLxD, *grads_NxD = on_rows(kernel, 2)(x_BxLxD, grad_BxLxD, scale_D)
    grad_scale_D, grad_bias_D = (grad_NxD.sum(0) for grad_NxD in grads_NxD)
    return grad_x_BxLxD, grad_scale_D, grad_bias_D


tpu_layer_norm.defvjp(_tpu_forward, _tpu_backward)


def _call_forward(
    epsilon: float, dtype: Any, x_BxLxD: Array, scale_D: Array, bias_D: Array
) -> Array:
    block, whole, grid = _blocks(x_BxLxD)
    return pl.pallas_call(
        functools.partial(_forward_kernel, epsilon),
        grid=grid,
        in_specs=[block, whole, whole],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x_BxLxD.shape, dtype),
        cost_estimate=_cost(x_BxLxD, arrays=2),
        compiler_params=parallel_axes(count=1),
        interpret=not on_tpus(),
        name="layer_norm",
    )(x_BxLxD, scale_D[None], bias_D[None])


def _call_backward(
    epsilon: float, x_BxLxD: Array, grad_BxLxD: Array, scale_D: Array
) -> tuple[Array, ...]:
    block, whole, grid = _blocks(x_BxLxD)
    sums_1xD = jax.ShapeDtypeStruct((1, *scale_D.shape), jnp.float32)
    return pl.pallas_call(
        functools.partial(_backward_kernel, epsilon),
        grid=grid,
        in_specs=[block, block, whole],
        out_specs=[block, whole, whole],
        out_shape=[jax.ShapeDtypeStruct(x_BxLxD.shape, x_BxLxD.dtype), sums_1xD, sums_1xD],
        cost_estimate=_cost(x_BxLxD, arrays=3),
        interpret=not on_tpus(),
        name="layer_norm_gradient",
    )(x_BxLxD, grad_BxLxD, scale_D[None])


def _blocks(x_BxLxD: Array) -> tuple[pl.BlockSpec, pl.BlockSpec, tuple[int]]:
    """Return the blocks of x, those of a vector, and the grid: a block has whole examples, as many as fit."""
    batch, length, width = x_BxLxD.shape
    most = max(min(_ROWS // length, _BYTES // _example_bytes(x_BxLxD)), 1)
    size = next(n for n in range(most, 0, -1) if batch % n == 0)
    return (
        pl.BlockSpec((size, length, width), lambda i: (i, 0, 0)),
        pl.BlockSpec((1, width), lambda i: (0, 0)),
        (batch // size,),
    )


def _cost(x_BxLxD: Array, arrays: int) -> pl.CostEstimate:
    # There are no matrix products; the scheduler of XLA needs only the bytes.
    size = arrays * x_BxLxD.size * x_BxLxD.dtype.itemsize
    return pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=size)


def _normed(x_ref: Any, epsilon: float) -> tuple[Array, Array]:
    """Return the normalised rows of a block and their inverse deviations, float32."""
    mean_BxLx1, inverse_BxLx1 = _row_statistics(x_ref[...], epsilon)
    return (x_ref[...].astype(jnp.float32) - mean_BxLx1) * inverse_BxLx1, inverse_BxLx1


def _forward_kernel(epsilon: float, x_ref: Any, scale_ref: Any, bias_ref: Any, y_ref: Any) -> None:
    normed_BxLxD, _ = _normed(x_ref, epsilon)
    y_BxLxD = normed_BxLxD * scale_ref[...][None] + bias_ref[...][None]
    y_ref[...] = y_BxLxD.astype(y_ref.dtype)


def _backward_kernel(
    epsilon: float,
    x_ref: Any,
    grad_ref: Any,
    scale_ref: Any,
    grad_x_ref: Any,
    grad_scale_ref: Any,
    grad_bias_ref: Any,
) -> None:
    normed_BxLxD, inverse_BxLx1 = _normed(x_ref, epsilon)
    grad_BxLxD = grad_ref[...].astype(jnp.float32)
    # The same formula as in `_layer_norm_backward`.
    scaled_BxLxD = grad_BxLxD * scale_ref[...][None]
    along_mean_BxLx1 = scaled_BxLxD.mean(-1, keepdims=True)
    along_normed_BxLx1 = (scaled_BxLxD * normed_BxLxD).mean(-1, keepdims=True)
    grad_x_BxLxD = inverse_BxLx1 * (
        scaled_BxLxD - along_mean_BxLx1 - normed_BxLxD * along_normed_BxLx1
    )
    grad_x_ref[...] = grad_x_BxLxD.astype(grad_x_ref.dtype)

    # The steps of the grid run one after the other and add up in the same block.
    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        grad_scale_ref[...] = jnp.zeros_like(grad_scale_ref)
        grad_bias_ref[...] = jnp.zeros_like(grad_bias_ref)

    grad_scale_ref[...] += (grad_BxLxD * normed_BxLxD).sum((0, 1))[None]
    grad_bias_ref[...] += grad_BxLxD.sum((0, 1))[None]
