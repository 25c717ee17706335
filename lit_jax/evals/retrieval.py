"""Image-text retrieval: the rank that each image gives to its own texts, and each text to its own image."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, Integer

from lit_jax.data.example import BadSampleError, Source
from lit_jax.display import printable
from lit_jax.errors import UserError
from lit_jax.evals.encode import Encoder, Params
from lit_jax.evals.ranks import ranks

log = logging.getLogger(__name__)

RECALL_AT = (1, 5, 10)


def captions_of(source: Source, language: str = "") -> list[tuple[str, ...]]:
    """Return the captions of each example that are not blank; an example that cannot be read has none.

    Args:
        language: the language to which `source` is restricted, for messages.

    Raises UserError if there is no caption at all.
    """
    captions: list[tuple[str, ...]] = []
    languages: set[str] = set()
    problems: list[BadSampleError] = []
    without: list[str] = []
    for i in range(len(source)):
        texts: tuple[str, ...] = ()
        try:
            example = source[i]
            texts = tuple(text for text in example["captions"] if text.strip())
            languages.update(example.get("left_out", ()))
            if not texts:
                without.append(example["key"])
        # Not logged here: the image loader leaves the example out and logs the reason.
        except BadSampleError as reason:
            problems.append(reason)
        captions.append(texts)
    if any(captions):
        if len(source) == 1:
            log.warning(
                "The data have one image, %s, so that every recall is 1, whatever the model does; use data "
                "with more images.",
                printable(source[0]["key"]),
            )
        if without:
            log.warning(
                "%d of %d images have no caption%s; texts are compared with them, but they are not queries, "
                "for example %s.",
                len(without),
                len(source),
                # Captions in other languages were left out, so an image may have some after all.
                f" in the language {language!r}" if languages else "",
                printable(without[0]),
            )
        return captions
    if languages:
        asked = f"the language {language!r}" if language else "any of the languages"
        raise UserError(
            f"No caption is in {asked}; set languages (--eval.languages) to some of those in the data: "
            f"{', '.join(sorted(languages))}."
        )
    raise _no_captions(problems, without)


def _no_captions(problems: Sequence[BadSampleError], without: Sequence[str]) -> UserError:
    """Return the error for data of which no example has a caption.

    Args:
        problems: the reasons why examples cannot be read.
        without: the keys of the examples that can be read.
    """
    # The remedy depends on the cause: unreadable examples, or a wrong key.
    if not problems:
        return UserError(
            "Retrieval needs captions, and no example has one; set caption_key (--eval.data.caption_key) to "
            "the field that holds them, or give a class file for zero-shot classification (--classes)."
        )
    rest = f", and the other {len(without)} have no caption" if without else ""
    count = len(problems) + len(without)
    return UserError(
        f"Retrieval needs captions, but {len(problems)} of the {count} examples cannot be read{rest}; the "
        f"first: {problems[0]}."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """The outcome for the N images that could be decoded, and their M captions.

    Attributes:
        metrics: the result of `retrieval`.
        index: the position of each image in the source.
        texts: the captions.
        image_of_text: the row of each caption's image.
        image_embeds, text_embeds: unit vectors, float32.
    """

    metrics: dict[str, float]
    index: Int[np.ndarray, " N"]
    texts: list[str]
    image_of_text: Int[np.ndarray, " M"]
    image_embeds: Float[np.ndarray, "N E"]
    text_embeds: Float[np.ndarray, "M E"]


def evaluate_retrieval(
    encoder: Encoder, params: Params, source: Source, captions: Sequence[tuple[str, ...]]
) -> RetrievalResult:
    """Compute `retrieval` over all images and captions of `source`.

    An image that cannot be decoded is left out together with its captions.

    Args:
        params: the merged tree of the dual encoder, placed on the encoder's mesh.
        captions: the captions of each example of `source`, from `captions_of`.

    Raises UserError if no image with a caption can be decoded.
    """
    image_embeds_NxE, valid_N = encoder.images(params, source)
    # From here on images are counted without those that cannot be decoded.
    kept = np.flatnonzero(valid_N)
    texts = [text for i in kept.tolist() for text in captions[i]]
    if not texts:
        raise UserError(
            "No image with a caption can be decoded; fix the data, or set data.path of the "
            "evaluation (--data) to other data."
        )
    # The texts of all images are in one flat list, and this index maps each text to its image.
    image_of_text_M = np.repeat(np.arange(len(kept)), [len(captions[i]) for i in kept.tolist()])
    embeds = image_embeds_NxE[kept], encoder.texts(params, texts)
    return RetrievalResult(
        metrics=retrieval(*embeds, image_of_text_M, encoder.mesh),
        index=kept,
        texts=texts,
        image_of_text=image_of_text_M,
        image_embeds=embeds[0],
        text_embeds=embeds[1],
    )


def retrieval(
    image_embeds_NxE: Float[np.ndarray, "N E"],
    text_embeds_MxE: Float[np.ndarray, "M E"],
    image_of_text_M: Integer[np.ndarray, " M"],
    mesh: Mesh,
) -> dict[str, float]:
    """Compute recall at 1, 5 and 10, the mean and the median rank, in both directions.

    The rank of an image is the rank of its best own text among the texts of other images; the rank of a text
    is the rank of its image among all images. The best rank is 1. Scores are inner products. A tie counts as
    lost, and so does NaN: a model that gives all pairs the same score finds nothing. An image without a text
    is a candidate for the texts, but not a query.

    Args:
        image_of_text_M: the row of each text's image; several texts may share an image.
        mesh: the devices that share the work; the result does not depend on the mesh.
    """
    found = ranks(image_embeds_NxE, text_embeds_MxE, image_of_text_M, mesh)
    return {
        **_metrics("image_to_text", found.of_images),
        **_metrics("text_to_image", found.of_texts),
        "images": float(len(found.of_images)),
        "texts": float(len(found.of_texts)),
    }


def _metrics(direction: str, ranks: np.ndarray) -> dict[str, float]:
    return {
        **{f"{direction}_recall_at_{k}": float(np.mean(ranks <= k)) for k in RECALL_AT},
        f"{direction}_mean_rank": float(np.mean(ranks)),
        f"{direction}_median_rank": float(np.median(ranks)),
    }
