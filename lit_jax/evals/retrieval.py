"""Image-text retrieval: how high each image ranks its own texts, and each text its own image."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer

from lit_jax.data.example import Source
from lit_jax.errors import UserError
from lit_jax.evals.encode import Encoder, Params

RECALL_AT = (1, 5, 10)


def captions_of(source: Source) -> list[tuple[str, ...]]:
    """The captions of every example, blank ones left out. Raises UserError if there is none at all."""
    captions = [
        tuple(text for text in source[i]["captions"] if text.strip()) for i in range(len(source))
    ]
    if not any(captions):
        raise UserError(
            "Retrieval needs captions, and no example has one; "
            "give the data's caption key, or a class file for zero-shot classification."
        )
    return captions


def evaluate_retrieval(
    encoder: Encoder, params: Params, source: Source, captions: Sequence[tuple[str, ...]]
) -> dict[str, float]:
    """The metrics of `retrieval` over all images and all captions of `source`.

    An image that cannot be decoded is left out, and its captions with it.

    Args:
        params: the merged tree of the dual encoder, placed on the encoder's mesh.
        captions: of each example of `source`, from `captions_of`.
    """
    image_embeds_NxE, valid_N = encoder.images(params, source)
    kept = np.flatnonzero(valid_N).tolist()
    texts = [text for i in kept for text in captions[i]]
    if not texts:
        raise UserError(
            "No image with a caption can be decoded; retrieval has nothing to look for."
        )
    image_of_text_M = np.repeat(np.arange(len(kept)), [len(captions[i]) for i in kept])
    return retrieval(image_embeds_NxE[kept], encoder.texts(params, texts), image_of_text_M)


def retrieval(
    image_embeds_NxE: Float[np.ndarray, "N E"],
    text_embeds_MxE: Float[np.ndarray, "M E"],
    image_of_text_M: Integer[np.ndarray, " M"],
    *,
    block: int = 512,
) -> dict[str, float]:
    """Recall at 1, 5 and 10, and the median rank, in both directions.

    The rank of an image is that of the best of its own texts among the texts of other images, the
    rank of a text is that of its image among all images; the best rank is 1. Scores are inner
    products. A tie counts as lost: a model that gives every pair the same score finds nothing. So
    does NaN. An image without a text is ranked by the texts, and asks for nothing itself.

    Args:
        image_of_text_M: the row of each text's image; several texts may share an image.
        block: rows of the score matrix in memory at one time.
    """
    image_ranks = _image_to_text_ranks(image_embeds_NxE, text_embeds_MxE, image_of_text_M, block)
    text_ranks = _text_to_image_ranks(image_embeds_NxE, text_embeds_MxE, image_of_text_M, block)
    return {
        **_metrics("image_to_text", image_ranks),
        **_metrics("text_to_image", text_ranks),
        "images": float(len(image_ranks)),
        "texts": float(len(text_ranks)),
    }


def _image_to_text_ranks(images_NxE, texts_MxE, image_of_text_M, block: int) -> np.ndarray:
    ranks = []
    for start in range(0, len(images_NxE), block):
        scores_bxM = images_NxE[start : start + block] @ texts_MxE.T
        rows_b = np.arange(start, start + len(scores_bxM))
        own_bxM = image_of_text_M == rows_b[:, None]
        best_own_b = np.max(scores_bxM, axis=1, where=own_bxM, initial=-np.inf)
        ahead_bxM = ~own_bxM & ~(scores_bxM < best_own_b[:, None])  # "not less": ties and NaN
        ranks.append(1 + ahead_bxM.sum(axis=1)[own_bxM.any(axis=1)])
    return np.concatenate(ranks)


def _text_to_image_ranks(images_NxE, texts_MxE, image_of_text_M, block: int) -> np.ndarray:
    ranks = []
    for start in range(0, len(texts_MxE), block):
        scores_bxN = texts_MxE[start : start + block] @ images_NxE.T
        own_bx1 = image_of_text_M[start : start + block, None]
        own_score_bx1 = np.take_along_axis(scores_bxN, own_bx1, axis=1)
        ranks.append((~(scores_bxN < own_score_bx1)).sum(axis=1))  # counts its own image: best is 1
    return np.concatenate(ranks)


def _metrics(direction: str, ranks: np.ndarray) -> dict[str, float]:
    recalls = {f"{direction}_recall_at_{k}": float(np.mean(ranks <= k)) for k in RECALL_AT}
    return {**recalls, f"{direction}_median_rank": float(np.median(ranks))}
