"""Contrastive losses over the global batch: every text is a negative for every other image.

B is the global batch. Under `jit` with the embeddings split over the mesh, the compiler gathers the
other modality; no form here uses the negatives of one device alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Embeddings = Float[Array, "B D"]
Scalar = Float[Array, ""]
Loss = Callable[[Embeddings, Embeddings, Scalar, Scalar | None], Scalar]


def similarity_logits(
    zimg_BxD: Embeddings, ztxt_BxD: Embeddings, logit_scale: Scalar, logit_bias: Scalar | None
) -> Float[Array, "B B"]:
    """exp(logit_scale) * image . text + logit_bias: rows are images, columns texts.

    The embeddings are L2-normalised float32. The product is computed at full float32 precision:
    with a scale of up to 100, the TPU's default (bfloat16 inputs) is off in the second digit.
    """
    logits_BxB = jnp.dot(zimg_BxD, ztxt_BxD.T, precision=jax.lax.Precision.HIGHEST)
    logits_BxB = logits_BxB * jnp.exp(logit_scale)
    return logits_BxB if logit_bias is None else logits_BxB + logit_bias


def softmax_loss(
    zimg_BxD: Embeddings,
    ztxt_BxD: Embeddings,
    logit_scale: Scalar,
    logit_bias: Scalar | None = None,
) -> Scalar:
    """Symmetric InfoNCE: the mean cross entropy of images over texts and of texts over images.

    CLIP (2103.00020) figure 3, LiT (2111.07991) section 3. A bias has no effect on it.
    """
    logits_BxB = similarity_logits(zimg_BxD, ztxt_BxD, logit_scale, logit_bias)
    positive_B = jnp.diagonal(logits_BxB)
    image_to_text_B = jax.nn.logsumexp(logits_BxB, axis=1) - positive_B
    text_to_image_B = jax.nn.logsumexp(logits_BxB, axis=0) - positive_B
    return (image_to_text_B.mean() + text_to_image_B.mean()) / 2


def sigmoid_loss(
    zimg_BxD: Embeddings,
    ztxt_BxD: Embeddings,
    logit_scale: Scalar,
    logit_bias: Scalar | None = None,
) -> Scalar:
    """Every image-text pair is a binary decision; summed over pairs, divided by B.

    SigLIP (2303.15343) section 3.2, algorithm 1.
    """
    logits_BxB = similarity_logits(zimg_BxD, ztxt_BxD, logit_scale, logit_bias)
    sign_BxB = 2 * jnp.eye(logits_BxB.shape[0], dtype=logits_BxB.dtype) - 1
    return -jax.nn.log_sigmoid(sign_BxB * logits_BxB).sum() / logits_BxB.shape[0]


LOSSES: dict[str, Loss] = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}
