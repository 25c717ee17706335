"""The losses: contrastive losses over the global batch, and the loss of a student text tower.

Every text is a negative for every other image. B is the global batch, P the width of a tower's output. Under
`jit` with embeddings split over the mesh, the compiler gathers the other modality; no implementation uses
only the negatives of one device. The losses here are the definitions. The losses of `blockwise_losses.py`
equal them and need less memory.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lit_jax.config import Config, LossImplementation
from lit_jax.distributed.mesh import mesh_size
from lit_jax.errors import UserError
from lit_jax.training.blockwise_losses import (
    TILE,
    Embeddings,
    Scalar,
    blockwise_sigmoid_loss,
    blockwise_softmax_loss,
    exact_dot,
)

# A function of the fields of `Model.forward`'s output.
Loss = Callable[..., Scalar]
# A function of the output of `Model.forward` and of its batch. It returns the value to minimise and metrics
# to report.
Objective = Callable[[Any, Mapping[str, Array]], tuple[Scalar, dict[str, Array]]]


def similarity_logits(
    zimg_BxD: Embeddings, ztxt_BxD: Embeddings, logit_scale: Scalar, logit_bias: Scalar | None
) -> Float[Array, "B B"]:
    """Return exp(logit_scale) * image . text + logit_bias, float32. Rows are images, columns are texts.

    The embeddings must be L2-normalised.
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
    """Compute symmetric InfoNCE: the mean cross entropy of images over texts and of texts over images.

    See CLIP (2103.00020) figure 3 and LiT (2111.07991) section 3. A bias has no effect. The share
    `label_smoothing` of each target is spread over all B classes (ALIGN, 2102.05918, section 4.1).
    """
    logits_BxB = similarity_logits(zimg_BxD, ztxt_BxD, logit_scale, logit_bias)
    # jnp.diagonal is a gather on CPU and GPU. With a split matrix, devices would exchange positions and
    # values for it.
    own_B = jnp.sum(logits_BxB, axis=1, where=jnp.eye(logits_BxB.shape[0], dtype=bool))

    def cross_entropy(axis: int) -> Scalar:
        target_B = own_B
        if label_smoothing:
            # The uniform part of the target adds the mean of the logits.
            target_B = (1 - label_smoothing) * own_B + label_smoothing * logits_BxB.mean(axis)
        return (jax.nn.logsumexp(logits_BxB, axis=axis) - target_B).mean()

    return (cross_entropy(1) + cross_entropy(0)) / 2


def sigmoid_loss(
    zimg_BxD: Embeddings,
    ztxt_BxD: Embeddings,
    logit_scale: Scalar,
    logit_bias: Scalar | None = None,
) -> Scalar:
    """Compute the logistic loss of all B x B pairs as binary decisions, summed over pairs and divided by B.

    See SigLIP (2303.15343) section 3.2, algorithm 1.
    """
    logits_BxB = similarity_logits(zimg_BxD, ztxt_BxD, logit_scale, logit_bias)
    sign_BxB = 2 * jnp.eye(logits_BxB.shape[0], dtype=logits_BxB.dtype) - 1
    # log_sigmoid is finite for large logits, where the logarithm of the sigmoid would be -inf.
    return -jax.nn.log_sigmoid(sign_BxB * logits_BxB).sum() / logits_BxB.shape[0]


def mse_loss(student_BxP: Embeddings, teacher_BxP: Embeddings) -> Scalar:
    """Compute the mean squared difference over texts and their P features, in float32.

    See AltCLIP (2211.06679) section 3.2.
    """
    difference_BxP = student_BxP.astype(jnp.float32) - teacher_BxP.astype(jnp.float32)
    return jnp.square(difference_BxP).mean()


CONTRASTIVE: dict[str, Loss] = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}
BLOCKWISE: dict[str, Loss] = {
    "softmax": blockwise_softmax_loss,
    "sigmoid": blockwise_sigmoid_loss,
}


def make_loss(
    name: str,
    *,
    implementation: str = "auto",
    label_smoothing: float = 0.0,
    slices: int = 1,
) -> Loss:
    """Return the loss of this name; 'auto' chooses the implementation by the shapes.

    Args:
        slices: the number of slices of the mesh, equally large and one after the other. The number does not
            change the value, but with more than one the blockwise implementation sends less between slices.

    Raises UserError for an unknown loss or implementation, and for label smoothing or an implementation that
    the loss does not have.
    """
    implementations = get_args(LossImplementation)
    for key, value, known in (
        ("loss", name, (*CONTRASTIVE, "mse")),
        ("loss_implementation", implementation, implementations),
    ):
        if value not in known:
            raise UserError(f"config.{key} is {value!r}; it must be one of {', '.join(known)}.")
    if label_smoothing and name != "softmax":
        raise UserError("config.label_smoothing is for the softmax loss; set it to 0.0.")
    if name == "mse":
        if implementation != "auto":
            raise UserError(
                f"config.loss_implementation is for contrastive losses; with {name!r} leave it 'auto'."
            )
        return mse_loss
    # Only the softmax losses accept this argument.
    options = {"label_smoothing": label_smoothing} if label_smoothing else {}

    # The batch size is known only when the loss is traced.
    def loss(zimg_BxD: Embeddings, *others: Any) -> Scalar:
        is_blockwise = implementation == "blockwise" or (
            implementation == "auto" and prefers_blockwise(len(zimg_BxD))
        )
        if is_blockwise:
            return BLOCKWISE[name](zimg_BxD, *others, **options, slices=slices)
        return CONTRASTIVE[name](zimg_BxD, *others, **options)

    return loss


def prefers_blockwise(batch: int) -> bool:
    """Return whether the blockwise implementation is better on the mesh of `jax.set_mesh`, if one is set.

    If a device's part of the similarity matrix is smaller than a tile, there is no memory to save. Above that
    size the blockwise implementation takes about the same time and less memory; docs/scale.md has the
    measurement.
    """
    devices = mesh_size()
    # shard_map needs parts of equal size.
    return batch % devices == 0 and batch * (batch // devices) >= TILE**2


def make_objective(config: Config, slices: int = 1) -> Objective:
    """Return the objective of a run: the loss of `config.loss`, or the weighted sum of `config.losses`.

    The metrics of a sum have the value of each loss as "loss/NAME".

    Raises UserError as `make_loss` does, and if both keys are set.
    """
    make = functools.partial(make_loss, implementation=config.loss_implementation, slices=slices)
    # A value equal to the default cannot be told from no value, and does no harm.
    if config.losses and (config.loss != Config.loss or config.label_smoothing):
        raise UserError(
            "config.losses takes the place of config.loss and config.label_smoothing; leave these two at "
            "their defaults, and set the kind and the label_smoothing of each loss."
        )
    if not config.losses:
        return objective(make(config.loss, label_smoothing=config.label_smoothing))
    terms = {
        name: (term.weight, make(term.kind, label_smoothing=term.label_smoothing))
        for name, term in config.losses.items()
    }

    def weighted_sum(output: Any, batch: Any) -> tuple[Scalar, dict[str, Scalar]]:
        # A user's objective may need the batch; contrastive losses do not.
        del batch
        values = {name: loss(*output) for name, (_, loss) in terms.items()}
        total = sum(weight * values[name] for name, (weight, _) in terms.items())
        return jnp.asarray(total), {f"loss/{name}": value for name, value in values.items()}

    return weighted_sum


def objective(loss: Loss) -> Objective:
    """Return a loss as an objective of the train step, without metrics."""
    return lambda output, batch: (loss(*output), {})
