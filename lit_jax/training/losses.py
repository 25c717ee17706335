"""Contrastive losses over the global batch: every text is a negative for every other image.
And the loss of a text tower that learns from another one.

B is the global batch. Under `jit` with the embeddings split over the mesh, the compiler gathers the
other modality; no form here uses the negatives of one device alone.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lit_jax.errors import UserError

Embeddings = Float[Array, "B D"]
Scalar = Float[Array, ""]
Loss = Callable[..., Scalar]  # of what the model returns


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
    *,
    label_smoothing: float = 0.0,
) -> Scalar:
    """Symmetric InfoNCE: the mean cross entropy of images over texts and of texts over images.

    CLIP (2103.00020) figure 3, LiT (2111.07991) section 3. A bias has no effect on it. Of each target,
    `label_smoothing` is spread over all B classes (ALIGN, 2102.05918, section 4.1).
    """
    logits_BxB = similarity_logits(zimg_BxD, ztxt_BxD, logit_scale, logit_bias)

    def cross_entropy(axis: int) -> Scalar:
        target_B = jnp.diagonal(logits_BxB)
        if label_smoothing:
            target_B = (1 - label_smoothing) * target_B + label_smoothing * logits_BxB.mean(axis)
        return (jax.nn.logsumexp(logits_BxB, axis=axis) - target_B).mean()

    return (cross_entropy(1) + cross_entropy(0)) / 2


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


def mse_loss(student_BxP: Embeddings, teacher_BxP: Embeddings) -> Scalar:
    """Mean squared difference, over texts and over the P numbers of each, computed in float32.

    AltCLIP (2211.06679) section 3.2.
    """
    difference_BxP = student_BxP.astype(jnp.float32) - teacher_BxP.astype(jnp.float32)
    return jnp.square(difference_BxP).mean()


CONTRASTIVE: dict[str, Loss] = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}
LOSSES: dict[str, Loss] = {**CONTRASTIVE, "mse": mse_loss}


def make_loss(name: Literal["softmax", "sigmoid", "mse"], *, label_smoothing: float = 0.0) -> Loss:
    """The loss that a config names. Raises UserError for label smoothing where it has no meaning."""
    if not label_smoothing:
        return LOSSES[name]
    if name != "softmax":
        raise UserError("config.label_smoothing is for the softmax loss; set it to 0.0.")
    return functools.partial(softmax_loss, label_smoothing=label_smoothing)
