"""Scaled dot-product attention, and the biases that mask it.

Dims: B batch, H heads, Q queries, S keys (L where they are the same tokens), K width of a head.
Softmax is float32, whatever the dtype of the queries.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lit_jax.distributed.mesh import device_kind, shard_batch


def attend(
    q_BxHxQxK: Float[Array, "B H Q K"],
    k_BxHxSxK: Float[Array, "B H S K"],
    v_BxHxSxK: Float[Array, "B H S K"],
    bias: Float[Array, "#B #H #Q S"] | None = None,
    dropout: Callable[[Array], Array] | None = None,
) -> Float[Array, "B H Q K"]:
    """Scaled dot-product attention; `bias` is added to the logits, `dropout` is of the probabilities.

    Under a mesh of NVIDIA's GPUs, Ampere or newer, cuDNN computes it in one kernel, as FlashAttention
    (2205.14135) does, where there is neither of the two and the dtype has 16 bits: of image towers, and of
    the texts of SigLIP.

    On CPU about three times as fast as jax.nn.dot_product_attention: both products are plain batched matrix
    products because the axes are in this order, and the division by the sum is of Q x K numbers, not Q x S.
    """
    if bias is None and dropout is None and _cudnn_has(q_BxHxQxK, k_BxHxSxK):
        return _fused(q_BxHxQxK, k_BxHxSxK, v_BxHxSxK)
    # The logits are scaled, not the queries: those would be one more array that a TPU keeps for the gradient.
    logits_BxHxQxS = q_BxHxQxK.shape[-1] ** -0.5 * jnp.einsum(
        "bhqk,bhsk->bhqs", q_BxHxQxK, k_BxHxSxK, preferred_element_type=jnp.float32
    )
    if bias is not None:
        logits_BxHxQxS += bias
    top_BxHxQx1 = jax.lax.stop_gradient(logits_BxHxQxS.max(-1, keepdims=True))
    weights_BxHxQxS = jnp.exp(logits_BxHxQxS - top_BxHxQx1)
    sum_BxHxQx1 = weights_BxHxQxS.sum(-1, keepdims=True)
    if dropout is not None:
        weights_BxHxQxS = dropout(weights_BxHxQxS)
    context_BxHxQxK = jnp.einsum(
        "bhqs,bhsk->bhqk",
        weights_BxHxQxS.astype(v_BxHxSxK.dtype),
        v_BxHxSxK,
        preferred_element_type=jnp.float32,
    )
    return (context_BxHxQxK / sum_BxHxQx1).astype(v_BxHxSxK.dtype)


# JAX would call cuDNN on any GPU. These are older than Ampere, though they are named like newer ones.
_TOO_OLD = re.compile(r"NVIDIA (GeForce (GTX|MX|RTX 20)|TITAN|T\d)")


def _cudnn_has(q_BxHxQxK: Array, k_BxHxSxK: Array) -> bool:
    """Whether cuDNN has a kernel, forward and backward, on the GPUs of the mesh."""
    kind, width = device_kind(), q_BxHxQxK.shape[-1]
    return (
        kind.startswith("NVIDIA")
        and not _TOO_OLD.match(kind)
        and q_BxHxQxK.dtype.itemsize == 2
        and q_BxHxQxK.shape == k_BxHxSxK.shape
        and width % 8 == 0
        and width <= 128
    )


@jax.custom_vjp
def _fused(*qkv_BxHxLxK: Array) -> Array:
    return _cudnn(*_all_batched(qkv_BxHxLxK))


def _fused_forward(*qkv_BxHxLxK: Array) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
    batch, _, length, _ = qkv_BxHxLxK[0].shape
    length_B = shard_batch(jnp.full(batch, length, jnp.int32))
    *qkv, length_B = _all_batched((*qkv_BxHxLxK, length_B))
    call = functools.partial(_cudnn_of_odd, length_B=length_B) if length % 2 else _cudnn
    return jax.vjp(call, *qkv)


def _fused_backward(
    pull: Callable[[Array], tuple[Array, ...]], grad_BxHxLxK: Array
) -> tuple[Array, ...]:
    pull, grad_BxHxLxK = _all_batched((pull, grad_BxHxLxK))
    return pull(grad_BxHxLxK)


_fused.defvjp(_fused_forward, _fused_backward)


@jax.custom_batching.custom_vmap
def _all_batched(arrays: Any) -> Any:
    """The arrays; under `vmap` all of them are batched: JAX's rules for cuDNN's calls want that."""
    return arrays


@_all_batched.def_vmap
def _(size: int, batched: list[Any], arrays: Any) -> tuple[Any, Any]:
    def with_axis(is_batched: bool, x: Array) -> Array:
        return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))

    return jax.tree.map(with_axis, batched[0], arrays), jax.tree.map(lambda _: True, arrays)


def _cudnn(*qkv_BxHxLxK: Array, length_B: Array | None = None) -> Array:
    context_BxLxHxK = jax.nn.dot_product_attention(
        *(x_BxHxLxK.swapaxes(1, 2) for x_BxHxLxK in qkv_BxHxLxK),
        query_seq_lengths=length_B,
        key_value_seq_lengths=length_B,
        implementation="cudnn",
    )
    return context_BxLxHxK.swapaxes(1, 2)


def _cudnn_of_odd(*qkv_BxHxLxK: Array, length_B: Array) -> Array:
    """With one more token, which counts for nothing: JAX takes no odd number of them where there is a
    gradient.
    """
    length = qkv_BxHxLxK[0].shape[2]
    even = (jnp.pad(x_BxHxLxK, ((0, 0), (0, 0), (0, 1), (0, 0))) for x_BxHxLxK in qkv_BxHxLxK)
    return _cudnn(*even, length_B=length_B)[:, :, :length]


def attention_bias(
    attended_BxL: Bool[Array, "B L"], *, causal: bool = False
) -> Float[Array, "B 1 #L L"]:
    """0 where a token may attend, else float32's lowest number.

    Not -inf: a text without any attended token then attends everywhere, where -inf gives NaN.
    """
    mask_Bx1xLxL = attended_BxL[:, None, None, :]
    if causal:
        mask_Bx1xLxL &= nn.make_causal_mask(attended_BxL, dtype=bool)
    return jnp.where(mask_Bx1xLxL, 0.0, jnp.finfo(jnp.float32).min)
