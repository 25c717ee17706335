"""Operations that are written by hand, because the compiler's code for the plain form is slow on CPU or GPU.

Next to each operation stands its plain form: the textbook formula with the gradient that JAX derives. Both
give the same values and gradients up to rounding. LIT_JAX_PLAIN_OPS=1 in the environment selects the plain
forms; benchmarks/layers.py measures the difference.

Dims: B batch, L tokens, D width, H heads, K width of a head (in convolutions, size of a kernel), YxX and VxU
positions of a feature map, C channels.
"""

import functools
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt32

from lit_jax.distributed.mesh import device_kind, shard_batch

Elementwise = Callable[[Array], Array]
Map = Float[Array, "B Y X C"]
Kernel = Float[Array, "K K 1 C"]
# The result of an operation on a `Map`, which may change size and width.
NewMap = Float[Array, "B V U D"]


def use_plain_ops() -> bool:
    """Return whether LIT_JAX_PLAIN_OPS=1 is set. The variable is read when a function is traced."""
    return os.environ.get("LIT_JAX_PLAIN_OPS") == "1"


# ---- Layer normalisation: forward and backward pass are 1.7 times as fast on CPU, and x stays in its dtype.


def layer_norm(
    x_BxLxD: Float[Array, "B L D"], scale_D: Float[Array, " D"], epsilon: float
) -> Float[Array, "B L D"]:
    """Return (x - mean) / deviation * scale over the last axis, computed and returned in float32."""
    if use_plain_ops():
        return plain_layer_norm(x_BxLxD, scale_D, epsilon)
    return _layer_norm(epsilon, x_BxLxD, scale_D)


def plain_layer_norm(x_BxLxD: Array, scale_D: Array, epsilon: float) -> Array:
    """Compute `layer_norm` by the textbook formula (1607.06450)."""
    mean_BxLx1, inverse_BxLx1 = _row_statistics(x_BxLxD, epsilon)
    return (x_BxLxD.astype(jnp.float32) - mean_BxLx1) * inverse_BxLx1 * scale_D[None, None]


def _row_statistics(x_BxLxD: Array, epsilon: float) -> tuple[Array, Array]:
    """Return the mean and the inverse standard deviation of each row, in float32."""
    x32_BxLxD = x_BxLxD.astype(jnp.float32)
    mean_BxLx1 = x32_BxLxD.mean(-1, keepdims=True)
    # The squared differences are averaged, because E[x^2] - E[x]^2 cancels in float32.
    variance_BxLx1 = jnp.square(x32_BxLxD - mean_BxLx1).mean(-1, keepdims=True)
    return mean_BxLx1, jax.lax.rsqrt(variance_BxLx1 + epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer_norm(epsilon: float, x_BxLxD: Array, scale_D: Array) -> Array:
    def on_cpu(x_BxLxD: Array, scale_D: Array) -> Array:
        return _layer_norm_forward(epsilon, x_BxLxD, scale_D)[0]

    # On GPU, XLA compiles the plain form into one kernel that reads x once, and the CPU form into five.
    elsewhere = functools.partial(plain_layer_norm, epsilon=epsilon)
    return jax.lax.platform_dependent(x_BxLxD, scale_D, cpu=on_cpu, default=elsewhere)


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
    return _gelu(x)


# erf is torch's choice as well. jax.nn.gelu uses erfc, which is three times slower on CPU.
_gelu = save_slope(lambda x: 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5)))


# ---- Random bits of dropout: half as many random numbers on CPU make dropout 2.3 times as fast.


def random_16_bits(key: jax.Array, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Return uniform uint32 integers below 2^16.

    The two forms draw different numbers. On TPU the plain form is faster, by 3% of a step of BERT-base with
    32 tokens as libtpu estimates it. GPUs use the plain form, too; neither form was measured there.
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
    """Pad with zeros, given as (before, after, between values), in float32; negative numbers cut off."""
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


# ---- Attention by cuDNN: one kernel on NVIDIA GPUs, as in FlashAttention (2205.14135). The plain form is the
# rest of `attention.attend`. Training ViT-B/16 on an H100 needs 18 GiB of temporaries instead of 27.

# JAX calls cuDNN on any GPU and fails on these, which are older than Ampere but have names like newer GPUs.
_TOO_OLD = re.compile(r"NVIDIA (GeForce (GTX|MX|RTX 20)|TITAN|T\d)")


def has_cudnn_attention(q_BxHxQxK: Array, k_BxHxSxK: Array) -> bool:
    """Return whether cuDNN has a forward and a backward kernel for these arrays on the GPUs of the mesh."""
    kind, width = device_kind(), q_BxHxQxK.shape[-1]
    return (
        not use_plain_ops()
        and kind.startswith("NVIDIA")
        and not _TOO_OLD.match(kind)
        and q_BxHxQxK.dtype.itemsize == 2
        and q_BxHxQxK.shape == k_BxHxSxK.shape
        and width % 8 == 0
        and width <= 128
    )


@jax.custom_vjp
def cudnn_attention(*qkv_BxHxLxK: Array) -> Array:
    """Return attention of (queries, keys, values), each BxHxLxK, without bias or dropout."""
    return _cudnn(*_all_batched(qkv_BxHxLxK))


def _cudnn_forward(*qkv_BxHxLxK: Array) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
    batch, _, length, _ = qkv_BxHxLxK[0].shape
    # The lengths get the sharding that all other inputs of the kernel have.
    length_B = shard_batch(jnp.full(batch, length, jnp.int32))
    *qkv, length_B = _all_batched((*qkv_BxHxLxK, length_B))
    call = functools.partial(_cudnn_of_odd, length_B=length_B) if length % 2 else _cudnn
    return jax.vjp(call, *qkv)


def _cudnn_backward(
    pull: Callable[[Array], tuple[Array, ...]], grad_BxHxLxK: Array
) -> tuple[Array, ...]:
    pull, grad_BxHxLxK = _all_batched((pull, grad_BxHxLxK))
    return pull(grad_BxHxLxK)


cudnn_attention.defvjp(_cudnn_forward, _cudnn_backward)


@jax.custom_batching.custom_vmap
def _all_batched(arrays: Any) -> Any:
    """Return the arrays. Under `vmap` all of them become batched, as JAX's rules for cuDNN calls require."""
    return arrays


@_all_batched.def_vmap
def _(size: int, batched: list[Any], arrays: Any) -> tuple[Any, Any]:
    def with_axis(is_batched: bool, x: Array) -> Array:
        return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))

    return jax.tree.map(with_axis, batched[0], arrays), jax.tree.map(lambda _: True, arrays)


def _cudnn(*qkv_BxHxLxK: Array, length_B: Array | None = None) -> Array:
    # JAX's function expects BxLxHxK.
    context_BxLxHxK = jax.nn.dot_product_attention(
        *(x_BxHxLxK.swapaxes(1, 2) for x_BxHxLxK in qkv_BxHxLxK),
        query_seq_lengths=length_B,
        key_value_seq_lengths=length_B,
        implementation="cudnn",
    )
    return context_BxLxHxK.swapaxes(1, 2)


def _cudnn_of_odd(*qkv_BxHxLxK: Array, length_B: Array) -> Array:
    # JAX's cuDNN gradient does not accept an odd number of tokens. One token is added, and `length_B` masks
    # the added token.
    length = qkv_BxHxLxK[0].shape[2]
    even = (jnp.pad(x_BxHxLxK, ((0, 0), (0, 0), (0, 1), (0, 0))) for x_BxHxLxK in qkv_BxHxLxK)
    return _cudnn(*even, length_B=length_B)[:, :, :length]
