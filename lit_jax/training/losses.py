"""Contrastive losses over the global batch: every text is a negative for every other image.
And the loss of a text tower that learns from another one.

B is the global batch. Under `jit` with the embeddings split over the mesh, the compiler gathers the
other modality; no form uses the negatives of one device alone. The forms here are the definitions; those of
`blockwise_losses.py` equal them and need less memory.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lit_jax.distributed.mesh import mesh_size
from lit_jax.errors import UserError
from lit_jax.training.blockwise_losses import (
    TILE,
    Embeddings,
    Scalar,
    exact_dot,
    lean_sigmoid_loss,
    lean_softmax_loss,
)

# A function of the fields of `Model.forward`'s output.
Loss = Callable[..., Scalar]


def similarity_logits(
    zimg_BxD: Embeddings, ztxt_BxD: Embeddings, logit_scale: Scalar, logit_bias: Scalar | None
) -> Float[Array, "B B"]:
    """Return exp(logit_scale) * image . text + logit_bias, float32: rows are images, columns texts.

    The embeddings are L2-normalised.
    """
    logits_BxB = exact_dot(zimg_BxD, ztxt_BxD.T) * jnp.exp(logit_scale)
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
    # Not jnp.diagonal: off the TPU that is a gather, which devices answer by sending positions and values.
    own_B = jnp.sum(logits_BxB, axis=1, where=jnp.eye(logits_BxB.shape[0], dtype=bool))

    def cross_entropy(axis: int) -> Scalar:
        target_B = own_B
        if label_smoothing:
            target_B = (1 - label_smoothing) * own_B + label_smoothing * logits_BxB.mean(axis)
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
LEAN: dict[str, Loss] = {"softmax": lean_softmax_loss, "sigmoid": lean_sigmoid_loss}


Form = Literal["auto", "global", "lean"]


def make_loss(
    name: str,
    *,
    form: str = "auto",
    label_smoothing: float = 0.0,
    slices: int = 1,
) -> Loss:
    """Return the loss that a config names, in the form that it names; 'auto' decides by the shapes.

    `slices`: how many the mesh has, equally large and one after the other. The value is the same for any
    number; between slices the lean form sends less.

    Raises UserError for a loss or a form that is not known, and for label smoothing, or a form, where it has
    no meaning.
    """
    for what, value, known in (("loss", name, (*LEAN, "mse")), ("loss_form", form, get_args(Form))):
        if value not in known:
            raise UserError(f"The {what} is {value!r}; it must be one of {', '.join(known)}.")
    if label_smoothing and name != "softmax":
        raise UserError("config.label_smoothing is for the softmax loss; set it to 0.0.")
    if name == "mse":
        if form != "auto":
            raise UserError(
                f"config.loss_form is for contrastive losses; with {name!r} leave it 'auto'."
            )
        return mse_loss
    options = {"label_smoothing": label_smoothing} if label_smoothing else {}

    def loss(zimg_BxD: Embeddings, *others: Any) -> Scalar:
        if form == "lean" or (form == "auto" and pays_lean(len(zimg_BxD))):
            return LEAN[name](zimg_BxD, *others, **options, slices=slices)
        return CONTRASTIVE[name](zimg_BxD, *others, **options)

    return loss


def pays_lean(batch: int) -> bool:
    """Whether the lean form is the better one on the mesh that is set, if any.

    Where a device's part of the similarity matrix is smaller than a tile, there is no memory to save; above
    that the lean form takes about as long and ever less memory (docs/scale.md has the measurement).
    """
    devices = mesh_size()
    return batch % devices == 0 and batch * (batch // devices) >= TILE**2
