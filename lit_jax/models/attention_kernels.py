"""Attention by kernels for GPUs and TPUs. `attention.attend` has the plain implementation.

LIT_JAX_PLAIN_OPS=1 selects the plain implementation everywhere.

Dims: B batch, H heads, L tokens, K width of a head, D = H * K, W width of a register of a TPU.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from lit_jax.distributed.mesh import device_kind, has_bfloat16_units, shard_batch
from lit_jax.models.layers import DropMask
from lit_jax.models.ops import on_rows, on_tpus, parallel_axes, use_plain_ops, use_tpu_ops

# ---- cuDNN: one kernel on NVIDIA GPUs, as in FlashAttention (2205.14135). Training
# ViT-B/16 on an H100 needs 18 GiB of temporaries instead of 27.


def has_cudnn_attention(q_BxHxQxK: Array, k_BxHxSxK: Array) -> bool:
    """Return whether cuDNN has a forward and a backward kernel for these arrays on the GPUs of the mesh."""
    width = q_BxHxQxK.shape[-1]
    return (
        not use_plain_ops()
        # JAX calls cuDNN on any GPU, and fails on those older than Ampere.
        and has_bfloat16_units()
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


# ---- Pallas: one kernel on TPUs, whose logits never leave the memory on chip. By the compiler's schedule the
# forward pass takes 69k cycles of a v5e for 16 images of a ViT-B/16, whatever the batch. XLA's best form
# takes 67k if there are 16 images at once and 206k if there are 64.

# Mosaic, the compiler of kernels, has no products of bfloat16 for these.
_TOO_OLD = ("TPU v2", "TPU v3")

# The width of a register, and the most tokens whose logits of a few heads fit into the memory on chip.
_LANES, _MAX_LENGTH = 128, 640


def has_tpu_attention(
    q_BxHxQxK: Array, k_BxHxSxK: Array, bias: Array | None, *, drops: bool = False
) -> bool:
    """Return whether the kernel for TPUs takes these arrays: whole registers, few tokens, bfloat16.

    A bias must be a mask of keys, Bx1x1xS. With dropout, the masks of the heads in a register must fit into
    one register: 8, 16, 32 or 64 tokens for heads of width 64.
    """
    batch, heads, length, width = q_BxHxQxK.shape
    return (
        use_tpu_ops(batch)
        and not device_kind().startswith(_TOO_OLD)
        and q_BxHxQxK.dtype == jnp.bfloat16
        and q_BxHxQxK.shape == k_BxHxSxK.shape
        and (bias is None or bias.shape == (batch, 1, 1, length))
        and _LANES % width == 0
        and heads * width % _LANES == 0
        and (length >= 32 or length in (8, 16, 24))
        and length <= _MAX_LENGTH
        and not (drops and (length % 8 or _LANES % _lanes_of_kept(width, length)))
    )


def _lanes_of_kept(width: int, length: int) -> int:
    """Return the lanes that hold one row of the dropout masks of all heads in a register."""
    return _LANES // width * length


class _Masks(NamedTuple):
    """The arrays of attention that have no gradient.

    Attributes:
        bias: is added to the logits, Bx1xL.
        kept: is 1 for the weights that dropout keeps, else 0, int8; see `mask_shape`.
    """

    bias: Array | None
    kept: Array | None


def tpu_attention(
    q_BxHxLxK: Array,
    k_BxHxLxK: Array,
    v_BxHxLxK: Array,
    bias_Bx1x1xL: Array | None = None,
    dropout: DropMask | None = None,
) -> Array:
    """Return attention. The bias is a mask of keys, and has no gradient; a dropout mask has `mask_shape`.

    The kernel is interpreted where there is no TPU.
    """
    bias_Bx1xL = None if bias_Bx1x1xL is None else bias_Bx1x1xL[:, 0]
    kept_BxLxN = None if dropout is None else dropout.kept.astype(jnp.int8)
    factor = 1.0 if dropout is None else float(dropout.factor)
    return _tpu_attention(factor, _Masks(bias_Bx1xL, kept_BxLxN), q_BxHxLxK, k_BxHxLxK, v_BxHxLxK)


def mask_shape(q_BxHxLxK: Array) -> tuple[int, int, int]:
    """Return the shape of a dropout mask for the kernel: the queries, and side by side the keys of all heads.

    An array BxHxLxL would leave most of each register empty, and XLA takes longer to move its axes than to
    draw it.
    """
    batch, heads, length, _ = q_BxHxLxK.shape
    return batch, length, heads * length


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tpu_attention(factor: float, masks: _Masks, *qkv_BxHxLxK: Array) -> Array:
    kernel = functools.partial(_forward_kernel, factor)
    (context_BxHxLxK,) = _call_on_tpu(kernel, masks, qkv_BxHxLxK, results=1, products=2)
    return context_BxHxLxK


def _tpu_forward(
    factor: float, masks: _Masks, *qkv_BxHxLxK: Array
) -> tuple[Array, tuple[_Masks, tuple[Array, ...]]]:
    return _tpu_attention(factor, masks, *qkv_BxHxLxK), (masks, qkv_BxHxLxK)


def _tpu_backward(
    factor: float, saved: tuple[_Masks, tuple[Array, ...]], grad_BxHxLxK: Array
) -> tuple[Array | None, ...]:
    masks, qkv_BxHxLxK = saved
    kernel = functools.partial(_backward_kernel, factor)
    # The plain gradient has four products as well; the kernel computes the logits once more.
    inputs = (*qkv_BxHxLxK, grad_BxHxLxK)
    return None, *_call_on_tpu(kernel, masks, inputs, results=3, products=4)


_tpu_attention.defvjp(_tpu_forward, _tpu_backward)


def _call_on_tpu(
    kernel: Callable[..., None],
    masks: _Masks,
    arrays_BxHxLxK: tuple[Array, ...],
    results: int,
    products: int,
) -> list[Array]:
    """Call a kernel and return its results, which have the shape of the arrays.

    `products` is the number of products of LxK by KxL that the definition has for each head.
    """
    heads, _, width = arrays_BxHxLxK[0].shape[1:]
    # Heads side by side in a row are the layout of the dense layers before and after. XLA cancels the
    # transposes here against those of the caller.
    inputs = [
        x_BxHxLxK.swapaxes(1, 2).reshape(len(x_BxHxLxK), -1, heads * width)
        for x_BxHxLxK in arrays_BxHxLxK
    ]
    call = functools.partial(_call_on_device, kernel, width, results, products)
    return [
        y_BxLxD.reshape(*y_BxLxD.shape[:2], heads, width).swapaxes(1, 2)
        for y_BxLxD in on_rows(call, 1 + len(inputs))(masks, *inputs)
    ]


def _call_on_device(
    kernel: Callable[..., None],
    width: int,
    results: int,
    products: int,
    masks: _Masks,
    *inputs_BxLxD: Array,
) -> list[Array]:
    """Call a kernel for the rows of one device; the heads, of this width, stand side by side."""
    batch, length, depth = inputs_BxLxD[0].shape
    # Short texts are packed into rows of up to a register, which their logits then fill.
    packed = _largest_divisor(batch, _LANES // length) if length % 8 == 0 else 1
    row = packed * length
    # Several rows at once give the scheduler independent work: on v6e, 8 images of 197 tokens at once take a
    # sixth fewer cycles than 4. With more rows of 512 or 577 tokens v5e takes longer.
    size = _largest_divisor(batch // packed, 8 if row < 256 else 1024 // row)
    tokens = pl.BlockSpec((size, row, _LANES), lambda i, j: (i, 0, j))
    keys = pl.BlockSpec((size, 1, row), lambda i, j: (i, 0, 0))
    lanes = _lanes_of_kept(width, length)
    kept = pl.BlockSpec((size, row, _LANES), lambda i, j: (i, 0, j * lanes // _LANES))

    def pack(x_BxLxN: Array) -> Array:
        # Biases have one row for all the queries of a text.
        axes = (1, row) if x_BxLxN.shape[1] == 1 else (row, x_BxLxN.shape[2])
        return x_BxLxN.reshape(batch // packed, *axes)

    packed_inputs = [pack(x_BxLxD) for x_BxLxD in inputs_BxLxD]
    like_input = jax.ShapeDtypeStruct(packed_inputs[0].shape, packed_inputs[0].dtype)
    outputs = pl.pallas_call(
        functools.partial(kernel, width, length),
        grid=(batch // packed // size, depth // _LANES),
        in_specs=[
            jax.tree.map(lambda x: keys if x.shape[1] == 1 else kept, masks),
            *[tokens] * len(packed_inputs),
        ],
        out_specs=[tokens] * results,
        out_shape=[like_input] * results,
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * batch * length**2 * depth,
            transcendentals=batch * depth // width * length**2,
            bytes_accessed=(len(packed_inputs) + results) * packed_inputs[0].nbytes,
        ),
        compiler_params=parallel_axes(count=2),
        interpret=not on_tpus(),
        name=f"attention{kernel.func.__name__}",
    )(jax.tree.map(pack, masks), *packed_inputs)
    return [y.reshape(batch, length, depth) for y in outputs]


def _largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a number that is at most `limit`, and at least 1."""
    return next(n for n in range(max(limit, 1), 0, -1) if number % n == 0)


# Contracts the last axes, the last with the first, the first axes.
_NT, _NN, _TN = ((1,), (1,)), ((1,), (0,)), ((0,), (0,))


def _dot(a: Array, b: Array, contracted: tuple[tuple[int], tuple[int]]) -> Array:
    # One pass is exact for products of bfloat16. A higher jax_default_matmul_precision would be an error.
    exact = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
        a, b, (contracted, ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def _lanes_of_heads(width: int) -> list[Array]:
    """Return for each head in a register which lanes are its own, 1xW."""
    lane_1xW = jax.lax.broadcasted_iota(jnp.int32, (1, _LANES), 1)
    return [(lane_1xW >= first) & (lane_1xW < first + width) for first in range(0, _LANES, width)]


def _weights(
    q_LxW: Array, k_LxW: Array, bias_1xL: Array | None, own_1xW: Array, width: int, length: int
) -> tuple[Array, Array]:
    """Return the weights of attention for one head of a register, and the factor that normalises them.

    The L tokens are those of one example, or of several with `length` tokens each.
    """
    # The matrix unit sums over a whole register, so zeros in the lanes of the other heads cost nothing.
    logits_LxL = _dot(jnp.where(own_1xW, q_LxW, 0), k_LxW, _NT) * width**-0.5
    if bias_1xL is not None:
        logits_LxL += bias_1xL
    if length < len(q_LxW):
        query, key = (
            jax.lax.broadcasted_iota(jnp.int32, logits_LxL.shape, axis) // length for axis in (0, 1)
        )
        # A text whose tokens are all masked attends to all its tokens, but never to those of others.
        logits_LxL = jnp.where(query == key, logits_LxL, -jnp.inf)
    weights_LxL = jnp.exp(logits_LxL - logits_LxL.max(-1, keepdims=True))
    return weights_LxL, 1 / weights_LxL.sum(-1, keepdims=True)


def _dropout(masks: _Masks, width: int, length: int) -> Callable[[Array, int, int], Array]:
    """Return the function that sets the weights to 0 that are not kept, for row i and a head of the register.

    The caller applies the factor of dropout.
    """
    kept_ref = masks.kept
    if kept_ref is None:
        return lambda weights_LxL, i, head: weights_LxL
    # A register of masks may serve several registers of heads.
    first = pl.program_id(1) * _lanes_of_kept(width, length) % _LANES
    shape = (_LANES, kept_ref.shape[1])
    lane_WxL, key_WxL = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    # A product with this matrix moves the mask of a head to the keys of every text in a row. Weights between
    # different texts are 0 anyway.
    source_WxL = lane_WxL - first - key_WxL % length
    moves = [(source_WxL == head * length).astype(jnp.bfloat16) for head in range(_LANES // width)]
    return lambda weights_LxL, i, head: (
        weights_LxL * _dot(kept_ref[i].astype(jnp.bfloat16), moves[head], _NN)
    )


def _forward_kernel(
    factor: float,
    width: int,
    length: int,
    masks: _Masks,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    context_ref: Any,
) -> None:
    drop = _dropout(masks, width, length)
    for i in range(len(q_ref)):
        context_LxW = jnp.zeros(q_ref.shape[1:], jnp.float32)
        bias_1xL = None if masks.bias is None else masks.bias[i]
        for head, own_1xW in enumerate(_lanes_of_heads(width)):
            weights_LxL, factor_Lx1 = _weights(q_ref[i], k_ref[i], bias_1xL, own_1xW, width, length)
            weights_LxL = drop(weights_LxL, i, head)
            of_head_LxW = _dot(weights_LxL.astype(v_ref.dtype), v_ref[i], _NN)
            of_head_LxW *= factor_Lx1 * factor
            context_LxW = jnp.where(own_1xW, of_head_LxW, context_LxW)
        context_ref[i] = context_LxW.astype(context_ref.dtype)


def _backward_kernel(
    factor: float,
    width: int,
    length: int,
    masks: _Masks,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    grad_ref: Any,
    grad_q_ref: Any,
    grad_k_ref: Any,
    grad_v_ref: Any,
) -> None:
    drop = _dropout(masks, width, length)
    for i in range(len(q_ref)):
        sums = [jnp.zeros(q_ref.shape[1:], jnp.float32)] * 3
        bias_1xL = None if masks.bias is None else masks.bias[i]
        for head, own_1xW in enumerate(_lanes_of_heads(width)):
            weights_LxL, factor_Lx1 = _weights(q_ref[i], k_ref[i], bias_1xL, own_1xW, width, length)
            weights_LxL *= factor_Lx1
            grad_weights_LxL = _dot(jnp.where(own_1xW, grad_ref[i], 0), v_ref[i], _NT)
            grad_weights_LxL = drop(grad_weights_LxL, i, head)
            # Softmax ignores a constant that all logits of a row share.
            shared_Lx1 = (weights_LxL * grad_weights_LxL).sum(-1, keepdims=True)
            grad_logits_LxL = weights_LxL * (grad_weights_LxL - shared_Lx1)
            grad_logits_LxL *= factor * width**-0.5
            grad_logits_LxL = grad_logits_LxL.astype(q_ref.dtype)
            of_head = (
                _dot(grad_logits_LxL, k_ref[i], _NN),
                _dot(grad_logits_LxL, q_ref[i], _TN),
                _dot(drop(weights_LxL, i, head).astype(grad_ref.dtype), grad_ref[i], _TN) * factor,
            )
            sums = [jnp.where(own_1xW, new, old) for new, old in zip(of_head, sums, strict=True)]
        for ref, sum_LxW in zip((grad_q_ref, grad_k_ref, grad_v_ref), sums, strict=True):
            ref[i] = sum_LxW.astype(ref.dtype)
