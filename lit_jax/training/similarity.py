"""How similar images and texts are: what every contrastive loss is a function of."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Embeddings = Float[Array, "B D"]
Scalar = Float[Array, ""]
Loss = Callable[..., Scalar]  # of what the model returns


def similarity_logits(
    zimg_BxD: Embeddings, ztxt_BxD: Embeddings, logit_scale: Scalar, logit_bias: Scalar | None
) -> Float[Array, "B B"]:
    """exp(logit_scale) * image . text + logit_bias in float32: rows are images, columns texts.

    The embeddings are L2-normalised.
    """
    logits_BxB = exact_dot(zimg_BxD, ztxt_BxD.T) * jnp.exp(logit_scale)
    return logits_BxB if logit_bias is None else logits_BxB + logit_bias


def exact_dot(a_MxK: Float[Array, "M K"], b_KxN: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """The product, at full float32 precision whatever the inputs are.

    With a scale of up to 100, the TPU's default (bfloat16 inputs) is off in the second digit of a loss.
    """
    return jnp.dot(
        a_MxK.astype(jnp.float32),
        b_KxN.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
