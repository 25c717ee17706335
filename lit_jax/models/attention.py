"""Scaled dot-product attention, and the biases that mask it.

Dims: B batch, H heads, Q queries, S keys (L where they are the same tokens), K width of a head.
Softmax is float32, whatever the dtype of the queries.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lit_jax.models import attention_kernels as kernels
from lit_jax.models.layers import DropMask


def attend(
    q_BxHxQxK: Float[Array, "B H Q K"],
    k_BxHxSxK: Float[Array, "B H S K"],
    v_BxHxSxK: Float[Array, "B H S K"],
    bias: Float[Array, "#B #H #Q S"] | None = None,
    draw_mask: Callable[[tuple[int, ...]], DropMask] | None = None,
    record: Callable[[Array], object] | None = None,
) -> Float[Array, "B H Q K"]:
    """Return scaled dot-product attention (1706.03762, section 3.2.1) in the dtype of the values.

    Without bias and dropout (image towers, SigLIP's texts), on a mesh of NVIDIA GPUs since Ampere, and in 16
    bits, cuDNN computes attention in one kernel. On a mesh of TPUs and in bfloat16 a kernel of our own does,
    also with a mask of keys and, for short texts, with dropout (BERT's texts); see attention_kernels.py.

    Args:
        bias: added to the logits.
        draw_mask: draws a mask of a given shape for the dropout of the weights.
        record: is called with the weights before dropout, which no kernel returns.
    """
    drops = draw_mask is not None
    if record is None and kernels.has_tpu_attention(q_BxHxQxK, k_BxHxSxK, bias, drops=drops):
        dropout = draw_mask(kernels.mask_shape(q_BxHxQxK)) if drops else None
        return kernels.tpu_attention(q_BxHxQxK, k_BxHxSxK, v_BxHxSxK, bias, dropout)
    is_plain = record is None and bias is None and not drops
    if is_plain and kernels.has_cudnn_attention(q_BxHxQxK, k_BxHxSxK):
        return kernels.cudnn_attention(q_BxHxQxK, k_BxHxSxK, v_BxHxSxK)
    return _plain(q_BxHxQxK, k_BxHxSxK, v_BxHxSxK, bias, draw_mask, record)


def _plain(
    q_BxHxQxK: Array,
    k_BxHxSxK: Array,
    v_BxHxSxK: Array,
    bias: Array | None,
    draw_mask: Callable[[tuple[int, ...]], DropMask] | None,
    record: Callable[[Array], object] | None,
) -> Array:
    """Return attention without a kernel.

    On CPU this is about three times as fast as jax.nn.dot_product_attention. With this order of axes both
    products are plain batched matrix products, and the division by the sum touches Q x K numbers instead of
    Q x S.
    """
    # The logits are scaled, not the queries. Scaled queries are one more array that a TPU keeps for the
    # gradient.
    logits_BxHxQxS = q_BxHxQxK.shape[-1] ** -0.5 * jnp.einsum(
        "bhqk,bhsk->bhqs", q_BxHxQxK, k_BxHxSxK, preferred_element_type=jnp.float32
    )
    if bias is not None:
        logits_BxHxQxS += bias
    # Softmax does not depend on the subtracted maximum, so the maximum needs no gradient.
    top_BxHxQx1 = jax.lax.stop_gradient(logits_BxHxQxS.max(-1, keepdims=True))
    weights_BxHxQxS = jnp.exp(logits_BxHxQxS - top_BxHxQx1)
    # The sum comes before dropout: dropout acts on probabilities, whose normaliser includes all keys.
    sum_BxHxQx1 = weights_BxHxQxS.sum(-1, keepdims=True)
    if record is not None:
        record(weights_BxHxQxS / sum_BxHxQx1)
    if draw_mask is not None:
        dropout = draw_mask(weights_BxHxQxS.shape)
        weights_BxHxQxS = jnp.where(dropout.kept, weights_BxHxQxS, 0.0) * dropout.factor
    # Both products add up in float32, even for 16-bit inputs.
    context_BxHxQxK = jnp.einsum(
        "bhqs,bhsk->bhqk",
        weights_BxHxQxS.astype(v_BxHxSxK.dtype),
        v_BxHxSxK,
        preferred_element_type=jnp.float32,
    )
    return (context_BxHxQxK / sum_BxHxQx1).astype(v_BxHxSxK.dtype)


def attention_bias(
    attended_BxL: Bool[Array, "B L"], *, causal: bool = False
) -> Float[Array, "B 1 #L L"]:
    """Return the bias that masks keys: 0 where a token may attend, else the lowest finite float32.

    With -inf the softmax of a text without any attended token would be NaN. With the lowest finite number
    such a text attends to all tokens.
    """
    # One row of the bias serves all queries, unless the mask is causal.
    mask_Bx1xLxL = attended_BxL[:, None, None, :]
    if causal:
        mask_Bx1xLxL &= nn.make_causal_mask(attended_BxL, dtype=bool)
    return jnp.where(mask_Bx1xLxL, 0.0, jnp.finfo(jnp.float32).min)
