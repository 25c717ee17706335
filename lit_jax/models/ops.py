"""Operations that are written by hand, because the compiler's code for the usual formula is slow somewhere.

Each operation also has a plain implementation: the textbook formula with the gradient that JAX derives. Both
give the same values and gradients up to rounding. LIT_JAX_PLAIN_OPS=1 in the environment selects the plain
ones; benchmarks/layers.py measures the difference. Operations with kernels for accelerators are in
layer_norm.py and attention_kernels.py.

Dims: K size of a kernel, YxX and VxU positions of a feature map, C channels.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt32

from lit_jax.distributed.mesh import BATCH, REPLICATED, device_kind, mesh_shape, mesh_size

Elementwise = Callable[[Array], Array]
Map = Float[Array, "B Y X C"]
Kernel = Float[Array, "K K 1 C"]
# The result of an operation on a `Map`, which may change size and width.
NewMap = Float[Array, "B V U D"]


def use_plain_ops() -> bool:
    """Return whether LIT_JAX_PLAIN_OPS=1 is set. The variable is read when a function is traced."""
    return os.environ.get("LIT_JAX_PLAIN_OPS") == "1"


def on_tpus() -> bool:
    """Return whether the mesh of `jax.set_mesh` has TPUs, and LIT_JAX_PLAIN_OPS=1 is not set."""
    # Kernels need the axes of the mesh: XLA would gather the operands of a kernel on every device.
    return bool(mesh_shape()) and device_kind().startswith("TPU") and not use_plain_ops()


def use_tpu_ops(rows: int) -> bool:
    """Return whether to use the operations for TPUs: the devices must share out the `rows` of a batch evenly.

    Parameters are initialised with a batch of a single row, on any number of devices.
    """
    return on_tpus() and rows % mesh_size() == 0


def parallel_axes(*, count: int) -> Any:
    """Return the option of a kernel whose grid has `count` axes, in any order and on both cores of a chip."""
    # Imported here, because no other platform needs it.
    from jax.experimental.pallas import tpu

    return tpu.CompilerParams(dimension_semantics=("parallel",) * count)


def on_rows(kernel: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """Return a function that calls a kernel on each device of the mesh, for the device's own rows.

    The first `rows` arguments and all results are arrays, or trees of arrays, with a leading axis that the
    devices share out. The other arguments are the same on all devices.
    """
    if not mesh_shape():
        return kernel

    def call(*trees: Any) -> Any:
        specs = tuple(BATCH if i < rows else REPLICATED for i in range(len(trees)))
        return jax.shard_map(kernel, in_specs=specs, out_specs=BATCH, check_vma=False)(*trees)

    return call


# ---- Activations: the gradient keeps one array instead of several; exact GELU is 3 times as fast on CPU.


def save_slope(function: Elementwise) -> Elementwise:
    """Return `function` with a gradient that keeps only the slope at x, and no intermediate value."""
    with_slope = jax.custom_jvp(function)

    @with_slope.defjvp
    def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        # The function works element by element, so a tangent of ones gives the slope of every element.
        value, slope = jax.jvp(function, primals, (jnp.ones_like(primals[0]),))
        return value, slope * tangents[0]

    return lambda x: function(x) if use_plain_ops() else with_slope(x)


def gelu(x: Array) -> Array:
    """Return the exact GELU (1606.08415)."""
    if use_plain_ops():
        return jax.nn.gelu(x, approximate=False)
    return _bfloat16_gelu(x) if x.dtype == jnp.bfloat16 else _gelu(x)


# erf is torch's choice as well. jax.nn.gelu uses erfc, which is three times slower on CPU.
_gelu = save_slope(lambda x: 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5)))

# The normal distribution function of x is 1 / (1 + exp(x * q(x * x))) with this polynomial q, its constant
# last. The coefficients minimise the largest relative error of GELU up to |x| = 6, where it matters in
# bfloat16. An erf takes about twice as many operations, and the TPU compiler does not fuse it with the
# products before and after it.
_LOG_ODDS = (
    *(-1.68747838e-09, 1.52091957e-07, -5.36342259e-06, 8.32907244e-05),
    *(0.000203685151, -0.0729627907, -1.59558964),
)


@jax.custom_jvp
def _bfloat16_gelu(x: Array) -> Array:
    """Compute `gelu` of bfloat16: the nearest bfloat16 number, but for a few, and for values below 1e-5."""
    return _gelu_and_slope(x)[0]


@_bfloat16_gelu.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    value, slope = _gelu_and_slope(primals[0])
    return value, slope * tangents[0]


def _gelu_and_slope(x: Array) -> tuple[Array, Array]:
    wide = x.astype(jnp.float32)
    square = jnp.minimum(wide * wide, 36)
    log_odds = functools.reduce(lambda total, c: total * square + c, _LOG_ODDS) * wide
    divisor = 1 + jnp.exp(log_odds)
    density = jnp.exp(-0.5 * wide * wide) * (2 * math.pi) ** -0.5
    return (wide / divisor).astype(x.dtype), (1 / divisor + wide * density).astype(x.dtype)


# ---- Random bits of dropout: half as many random numbers on CPU make dropout 2.3 times as fast.


def random_16_bits(key: jax.Array, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Return uniform uint32 integers below 2^16.

    The two implementations return different numbers. On TPU the plain one is faster, by 3% of a step of
    BERT-base with 32 tokens as libtpu estimates it. GPUs use the plain one, too; neither was measured there.
    """
    plain = functools.partial(plain_random_16_bits, shape=shape)
    if use_plain_ops():
        return plain(key)
    halves = functools.partial(_halves_of_32_bits, shape=shape)
    return jax.lax.platform_dependent(key, cpu=halves, default=plain)


def plain_random_16_bits(key: jax.Array, shape: tuple[int, ...]) -> Array:
    """Draw `random_16_bits` with one random number for each integer."""
    return jax.random.bits(key, shape, jnp.uint16).astype(jnp.uint32)


def _halves_of_32_bits(key: jax.Array, shape: tuple[int, ...]) -> Array:
    # threefry makes 32 bits at a time, and 16 of them are enough for a dropout rate.
    *rows, last = shape
    bits = jax.random.bits(key, (*rows, -(-last // 2)), jnp.uint32)
    return jnp.concatenate([bits & 0xFFFF, bits >> 16], axis=-1)[..., :last]


# ---- Depthwise convolutions: XLA has no CPU kernel for them; 30 times as fast on CPU, the gradient 10 times.


def depthwise_conv(x: Map, kernel: Kernel, stride: int, padding: tuple[int, int]) -> NewMap:
    """Return the convolution of each channel with a kernel of its own, in the dtype of `x`.

    `padding` is the number of zeros before and after the rows, and also the columns. A negative number cuts
    rows and columns off.
    """
    plain = functools.partial(plain_depthwise_conv, stride=stride, padding=padding)
    if use_plain_ops():
        return plain(x, kernel)
    shifts = functools.partial(depthwise_conv_by_shifts, stride=stride, padding=padding)
    return jax.lax.platform_dependent(x, kernel, cpu=shifts, default=plain)


def plain_depthwise_conv(x: Map, kernel: Kernel, stride: int, padding: tuple[int, int]) -> NewMap:
    """Compute `depthwise_conv` by XLA's convolution."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        (padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def depthwise_conv_by_shifts(
    x: Map, kernel: Kernel, stride: int, padding: tuple[int, int]
) -> NewMap:
    """Compute `depthwise_conv` as a sum of shifted maps, added up in float32."""
    return _depthwise_conv(x, kernel, stride, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise_conv(
    x_BxYxXxC: Map, kernel_KxKx1xC: Kernel, stride: int, padding: tuple[int, int]
) -> NewMap:
    border = (*padding, 0)
    total = _sum_of_shifts(_pad(x_BxYxXxC, border, border), kernel_KxKx1xC, stride)
    return total.astype(x_BxYxXxC.dtype)


def _depthwise_forward(
    x: Map, kernel: Kernel, stride: int, padding: tuple[int, int]
) -> tuple[Any, tuple[Map, Kernel]]:
    return _depthwise_conv(x, kernel, stride, padding), (x, kernel)


def _depthwise_backward(
    stride: int, padding: tuple[int, int], saved: tuple[Map, Kernel], dy_BxVxUxC: NewMap
) -> tuple[Map, Kernel]:
    # The gradient is written by hand, because the derived gradient of 49 shifts takes twice as long to
    # compile and to run.
    x_BxYxXxC, kernel_KxKx1xC = saved
    size, dy_BxVxUxC = len(kernel_KxKx1xC), dy_BxVxUxC.astype(jnp.float32)
    # The rows (and columns) from the corner of the first window to the corner of the last, both included.
    spans = [(length - 1) * stride + 1 for length in dy_BxVxUxC.shape[1:3]]
    # The gradient of a value sums over all windows that contain it: a convolution of dy, spread out by the
    # stride, with the kernel rotated by 180 degrees.
    before = size - 1 - padding[0]
    borders = [
        (before, length + size - 1 - before - span, stride - 1)
        for length, span in zip(x_BxYxXxC.shape[1:3], spans, strict=True)
    ]
    dx_BxYxXxC = _sum_of_shifts(_pad(dy_BxVxUxC, *borders), kernel_KxKx1xC[::-1, ::-1], 1)

    border = (*padding, 0)
    padded = _pad(x_BxYxXxC, border, border)

    # The loop over the rows of the kernel keeps the program small: 7 sums of a 7x7 kernel instead of 49.
    def row_of_kernel(y: Array) -> Float[Array, "K C"]:
        rows = jax.lax.dynamic_slice_in_dim(padded, y, spans[0], axis=1)[:, ::stride]
        products = (rows[:, :, x : x + spans[1] : stride] * dy_BxVxUxC for x in range(size))
        return jnp.stack([product.sum((0, 1, 2)) for product in products])

    dkernel_KxKx1xC = jax.lax.map(row_of_kernel, jnp.arange(size))[:, :, None]
    return dx_BxYxXxC.astype(x_BxYxXxC.dtype), dkernel_KxKx1xC.astype(kernel_KxKx1xC.dtype)


_depthwise_conv.defvjp(_depthwise_forward, _depthwise_backward)


def _pad(
    x_BxYxXxC: Map, rows: tuple[int, int, int], columns: tuple[int, int, int]
) -> Float[Array, "B V U C"]:
    """Return the map in float32 with zeros (before, after, between values); negative counts crop instead."""
    border = ((0, 0, 0), rows, columns, (0, 0, 0))
    return jax.lax.pad(x_BxYxXxC.astype(jnp.float32), jnp.float32(0), border)


def _sum_of_shifts(x_BxYxXxC: Map, kernel_KxKx1xC: Kernel, stride: int) -> Float[Array, "B V U C"]:
    kernel_KxKxC = jnp.squeeze(kernel_KxKx1xC, 2).astype(jnp.float32)
    size = len(kernel_KxKxC)
    # The number of window corners along each axis before the stride.
    rows, columns = (length - size + 1 for length in x_BxYxXxC.shape[1:3])
    shifted = (
        x_BxYxXxC[:, y : y + rows : stride, x : x + columns : stride]
        * kernel_KxKxC[y, x][None, None, None]
        for y in range(size)
        for x in range(size)
    )
    return functools.reduce(jnp.add, shifted)


# ---- Clipping of gradients: a train step on CPU needs two arrays of the gradient's size less.


def clip_by_global_norm(updates: Any, max_norm: float) -> Any:
    """Return the tree `updates`, scaled to the length `max_norm` if it is longer (1211.5063, section 3.2)."""
    if use_plain_ops():
        return optax.clip_by_global_norm(max_norm).update(updates, optax.EmptyState())[0]
    # optax divides by the norm and then selects between the quotient and the gradient, element by element,
    # which keeps both in memory.
    scale = max_norm / jnp.maximum(optax.tree.norm(updates), max_norm)
    return jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates)
