"""Zero-shot classification: each image gets the class with the nearest texts (CLIP section 3.1)."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from lit_jax.data.example import Source
from lit_jax.errors import UserError
from lit_jax.evals.classes import Classes
from lit_jax.evals.encode import Encoder, Params
from lit_jax.models.dual_encoder import logit_scale

# The number of classes in the top-5 accuracy and in reports.
TOP = 5
# The number of images whose logits are in memory at a time.
BLOCK = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroShotResult:
    """The outcome for the N images that could be decoded, K = min(5, C) classes each.

    Attributes:
        metrics: top1, top5 (of five classes or more), mean_per_class_recall, n.
        index: the position of each image in the source.
        label: the class of each image, as a row of `class_embeds`.
        top: the predicted classes, the most probable first. The order of equally probable classes is
            arbitrary here; the metrics use the expectation over all orders.
        hit: the probability that the image's own class is first, if ties are random; see `expected_hits`.
        is_tied: whether several classes are the most probable.
        probability: the softmax probabilities of the classes in `top`, over all classes.
        image_embeds, class_embeds: unit vectors, float32.
    """

    metrics: dict[str, float]
    index: Int[np.ndarray, " N"]
    label: Int[np.ndarray, " N"]
    top: Int[np.ndarray, "N K"]
    hit: Float[np.ndarray, " N"]
    is_tied: Bool[np.ndarray, " N"]
    probability: Float[np.ndarray, "N K"]
    image_embeds: Float[np.ndarray, "N E"]
    class_embeds: Float[np.ndarray, "C E"]

    def confusion(self, counted_N: Bool[np.ndarray, " N"] | None = None) -> Int[np.ndarray, "P 3"]:
        """Return rows (class, predicted class, number of images) for all P pairs that occur.

        The pairs are sorted by class and include the correct predictions.

        Args:
            counted_N: the images that count; None counts all.
        """
        pairs_Nx2 = np.stack([self.label, self.top[:, 0]], axis=1)
        pairs_Nx2 = pairs_Nx2 if counted_N is None else pairs_Nx2[counted_N]
        pairs_Px2, count_P = np.unique(pairs_Nx2, axis=0, return_counts=True)
        return np.concatenate([pairs_Px2, count_P[:, None]], axis=1)


def zero_shot(
    encoder: Encoder,
    params: Params,
    source: Source,
    classes: Classes,
    label_N: Int[np.ndarray, " N"],
) -> ZeroShotResult:
    """Classify the images of `source` that have a label and can be decoded.

    Args:
        params: the merged tree of the dual encoder, placed on the encoder's mesh.
        label_N: the class of each example of `source`, from `label_ids`.

    Raises UserError if there is no such image, or if the logit scale is not finite and positive.
    """
    scale = _scale(params)
    # The classes first: a mistake there should not wait for the images.
    class_embeds_CxE = embed_classes(encoder, params, classes)
    image_embeds_NxE, valid_N = encoder.images(params, source)
    valid_N = valid_N & (label_N >= 0)
    if not valid_N.any():
        raise UserError(
            "No image with a label can be decoded; fix the data, or set data.path of the "
            "evaluation (--data) to other data."
        )
    image_embeds_NxE, label_N = image_embeds_NxE[valid_N], label_N[valid_N]
    top_NxK, probability_NxK, hit_Nx2, is_tied_N = _classify(
        image_embeds_NxE, class_embeds_CxE, scale, label_N
    )
    return ZeroShotResult(
        metrics=top_metrics(hit_Nx2, label_N, len(class_embeds_CxE)),
        index=np.flatnonzero(valid_N),
        label=label_N,
        top=top_NxK,
        hit=hit_Nx2[:, 0],
        is_tied=is_tied_N,
        probability=probability_NxK,
        image_embeds=image_embeds_NxE,
        class_embeds=class_embeds_CxE,
    )


def embed_classes(encoder: Encoder, params: Params, classes: Classes) -> Float[np.ndarray, "C E"]:
    """Return a unit vector for each class: its texts' mean embedding, normalised (CLIP section 3.1.4)."""
    texts = classes.texts()
    embeds_CTxE = encoder.texts(params, [text for of_class in texts for text in of_class])
    starts_C = np.cumsum([0, *map(len, texts[:-1])])
    count_Cx1 = np.array([[len(of_class)] for of_class in texts], np.float32)
    # The texts of all classes are embedded in one list; `reduceat` sums the rows of each class.
    embeds_CxE = np.add.reduceat(embeds_CTxE, starts_C, axis=0) / count_Cx1
    length_Cx1 = np.linalg.norm(embeds_CxE, axis=1, keepdims=True)
    # The bound keeps zero embeddings zero instead of NaN.
    return embeds_CxE / np.maximum(length_Cx1, 1e-12)


def _scale(params: Params) -> np.float32:
    """Return the factor of the cosines. Raise UserError if it is 0 or infinite."""
    log_scale = float(jax.device_get(logit_scale(params)))
    with np.errstate(over="ignore"):
        scale = np.exp(np.float32(log_scale))
    if not 0 < scale < np.inf:
        raise UserError(
            f"The logit scale of the model is exp({log_scale}), which makes all classes equally probable; "
            "load other weights or another checkpoint."
        )
    return scale


def _classify(
    images_NxE: np.ndarray, classes_CxE: np.ndarray, scale: np.float32, label_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each image, its most probable classes, their probabilities, `expected_hits`, and ties."""
    # Classes with equal embeddings are computed once, because a matrix product may round two equal columns
    # differently, which would break their tie.
    classes_UxE, place_C = np.unique(classes_CxE, axis=0, return_inverse=True)
    top, probability, hits, ties = [], [], [], []
    for start in range(0, len(images_NxE), BLOCK):
        block = slice(start, start + BLOCK)
        logits_bxC = (scale * (images_NxE[block] @ classes_UxE.T))[:, place_C]
        # Softmax does not depend on the subtracted maximum, which keeps the exponential from overflowing.
        highest_bx1 = logits_bxC.max(axis=1, keepdims=True)
        ties.append((logits_bxC == highest_bx1).sum(axis=1) > 1)
        exp_bxC = np.exp(logits_bxC - highest_bx1)
        top.append(top_classes(logits_bxC))
        exp_sum_bx1 = exp_bxC.sum(axis=1, keepdims=True)
        probability.append(np.take_along_axis(exp_bxC, top[-1], axis=1) / exp_sum_bx1)
        hits.append(expected_hits(logits_bxC, label_N[block]))
    return (
        np.concatenate(top),
        np.concatenate(probability),
        np.concatenate(hits),
        np.concatenate(ties),
    )


def top_classes(logits_bxC: Float[np.ndarray, "b C"]) -> Int[np.ndarray, "b K"]:
    """Return the positions of the five largest logits of each row, or of all if there are fewer."""
    k = min(TOP, logits_bxC.shape[1])
    # A partition first, because sorting all C classes is slow.
    some_bxK = np.argpartition(-logits_bxC, k - 1, axis=1)[:, :k]
    order_bxK = np.argsort(-np.take_along_axis(logits_bxC, some_bxK, axis=1), axis=1)
    return np.take_along_axis(some_bxK, order_bxK, axis=1)


def expected_hits(
    scores_bxC: Float[np.ndarray, "b C"], label_b: Int[np.ndarray, " b"]
) -> Float[np.ndarray, "b 2"]:
    """Return the probabilities that a row's class is first, and among the first five, if ties are random.

    Without ties these are 0 or 1. A model that gives all C classes the same score is right with probability
    1/C; if the position broke ties, it would always be right about the first class.
    """
    own_bx1 = np.take_along_axis(scores_bxC, label_b[:, None], axis=1)
    ahead_bx1 = (scores_bxC > own_bx1).sum(axis=1, keepdims=True)
    tied_bx1 = (scores_bxC == own_bx1).sum(axis=1, keepdims=True)
    return np.clip((np.array([1, TOP]) - ahead_bx1) / tied_bx1, 0, 1)


def top_metrics(
    hit_Nx2: Float[np.ndarray, "N 2"], label_N: Int[np.ndarray, " N"], classes: int
) -> dict[str, float]:
    """Return top-1 and top-5 accuracy, the mean recall of the classes, and the number of images.

    Args:
        hit_Nx2: the result of `expected_hits`.
        classes: the number of classes. With fewer than five there is no top-5 accuracy.
    """
    # Classes without an image have no recall and do not count in the mean.
    of_class = np.bincount(label_N)
    recall = np.bincount(label_N, weights=hit_Nx2[:, 0])[of_class > 0] / of_class[of_class > 0]
    top1, top5 = hit_Nx2.mean(axis=0).tolist()
    return {
        "top1": top1,
        **({"top5": top5} if classes >= TOP else {}),
        "mean_per_class_recall": float(recall.mean()),
        "n": float(len(label_N)),
    }
