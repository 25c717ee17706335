"""Zero-shot classification: each image gets the class whose texts are nearest (CLIP section 3.1)."""

import collections
import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from lit_jax.config import nearest
from lit_jax.data.example import Source
from lit_jax.errors import UserError
from lit_jax.evals.encode import Encoder, Params
from lit_jax.models.dual_encoder import logit_scale

PLACEHOLDER = re.compile(r"\{c?\}")
TOP = 5
BLOCK = 4096  # images whose logits are in memory at one time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classes:
    """The names of C classes, and T templates: sentences with '{}' or '{c}' in the name's place.

    `labels` is what the data set calls the classes, in the same order; if empty, by these names.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    labels: tuple[str, ...] = ()

    def texts(self) -> list[str]:
        """All C * T texts, class by class."""
        return [
            PLACEHOLDER.sub(lambda _, name=name: name, template)  # a name may contain \1
            for name in self.names
            for template in self.templates
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroShotResult:
    """What came out for the N images that could be decoded, K = min(5, C) classes each.

    Attributes:
        metrics: top1, top5 (of five classes or more), mean_per_class_recall, n.
        index: where in the source each image is.
        label: its class; a row of `class_embeds`, as everything below.
        top: the predicted classes, the most probable first.
        probability: of these, by softmax over all classes.
    """

    metrics: dict[str, float]
    index: Int[np.ndarray, " N"]
    label: Int[np.ndarray, " N"]
    top: Int[np.ndarray, "N K"]
    probability: Float[np.ndarray, "N K"]
    image_embeds: Float[np.ndarray, "N E"]
    class_embeds: Float[np.ndarray, "C E"]


def load_classes(path: str) -> Classes:
    """Reads {"classnames": [...], "templates": [...]}, the form that CLIP_benchmark uses too; also "labels",
    in the order of the names, if the data set has other ones: ids, or names in another language.

    Raises UserError if the file is missing, is not of that form, has a class twice or none, or
    has a template without a place for the name.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"The class file {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"The class file {path} is not JSON in UTF-8: {error}.") from error
    names, templates = (_strings(content, key, path) for key in ("classnames", "templates"))
    labels = _strings(content, "labels", path) if "labels" in content else ()
    classes = Classes(names=names, templates=templates, labels=labels)
    for template in classes.templates:
        if not PLACEHOLDER.search(template):
            raise UserError(
                f"The template {template!r} in {path} needs '{{}}' where the name goes."
            )
    for key, values in (("classnames", names), ("labels", labels)):
        for value, times in collections.Counter(values).most_common(1):
            if times > 1:
                raise UserError(
                    f"{value!r} is {times} times among the {key} of {path}; each must differ."
                )
    if labels and len(labels) != len(names):
        raise UserError(
            f"{path} has {len(names)} classnames but {len(labels)} labels; give one each."
        )
    return classes


def label_ids(source: Source, classes: Classes) -> Int[np.ndarray, " N"]:
    """The class of each example, as its position in `classes`.

    Raises UserError at an example without a label, or with one that is not in the class list.
    """
    ids = {label: i for i, label in enumerate(classes.labels or classes.names)}
    labels = np.empty(len(source), np.int32)
    for i in range(len(source)):
        example = source[i]
        label = example["label"]
        if label is None:
            raise UserError(
                f"The example {example['key']} has no label, and zero-shot classification needs one; "
                "give the data's label key."
            )
        if label not in ids:
            raise UserError(
                f"The example {example['key']} has the label {label!r}, "
                f"which the class file does not list; {nearest(label, ids)}."
            )
        labels[i] = ids[label]
    return labels


def zero_shot(
    encoder: Encoder,
    params: Params,
    source: Source,
    classes: Classes,
    label_N: Int[np.ndarray, " N"],
) -> ZeroShotResult:
    """Classifies every image of `source`; one that cannot be decoded is not counted.

    Args:
        params: the merged tree of the dual encoder, placed on the encoder's mesh.
        label_N: of each example of `source`, from `label_ids`.
    """
    class_embeds_CxE = embed_classes(encoder, params, classes)
    image_embeds_NxE, valid_N = encoder.images(params, source)
    image_embeds_NxE, label_N = image_embeds_NxE[valid_N], label_N[valid_N]
    scale = np.exp(np.float32(jax.device_get(logit_scale(params))))
    top_NxK, probability_NxK = _classify(image_embeds_NxE, class_embeds_CxE, scale)
    return ZeroShotResult(
        metrics=_metrics(top_NxK, label_N),
        index=np.flatnonzero(valid_N),
        label=label_N,
        top=top_NxK,
        probability=probability_NxK,
        image_embeds=image_embeds_NxE,
        class_embeds=class_embeds_CxE,
    )


def embed_classes(encoder: Encoder, params: Params, classes: Classes) -> Float[np.ndarray, "C E"]:
    """One unit vector a class: the mean of its texts' embeddings, normalised (CLIP section 3.1.4)."""
    embeds_CTxE = encoder.texts(params, classes.texts())
    embeds_CxE = embeds_CTxE.reshape(len(classes.names), len(classes.templates), -1).mean(axis=1)
    return embeds_CxE / np.linalg.norm(embeds_CxE, axis=1, keepdims=True)


def _classify(images_NxE, classes_CxE, scale) -> tuple[np.ndarray, np.ndarray]:
    """The most probable classes of each image, and their probabilities."""
    k = min(TOP, len(classes_CxE))
    top, probability = [], []
    for start in range(0, len(images_NxE), BLOCK):
        logits_bxC = scale * (images_NxE[start : start + BLOCK] @ classes_CxE.T)
        exp_bxC = np.exp(logits_bxC - logits_bxC.max(axis=1, keepdims=True))
        some_bxK = np.argpartition(-logits_bxC, k - 1, axis=1)[:, :k]  # sorting all C is slow
        order_bxK = np.argsort(-np.take_along_axis(logits_bxC, some_bxK, axis=1), axis=1)
        top.append(np.take_along_axis(some_bxK, order_bxK, axis=1))
        exp_sum_bx1 = exp_bxC.sum(axis=1, keepdims=True)
        probability.append(np.take_along_axis(exp_bxC, top[-1], axis=1) / exp_sum_bx1)
    return np.concatenate(top), np.concatenate(probability)


def _metrics(top_NxK: np.ndarray, label_N: np.ndarray) -> dict[str, float]:
    hit_NxK = top_NxK == label_N[:, None]
    of_class = np.bincount(label_N)
    recall = np.bincount(label_N, weights=hit_NxK[:, 0])[of_class > 0] / of_class[of_class > 0]
    top5 = {"top5": float(hit_NxK.any(axis=1).mean())} if top_NxK.shape[1] == TOP else {}
    return {
        "top1": float(hit_NxK[:, 0].mean()),
        **top5,
        "mean_per_class_recall": float(recall.mean()),
        "n": float(len(label_N)),
    }


def _strings(content: Any, key: str, path: str) -> tuple[str, ...]:
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise UserError(
            f'The class file {path} must be {{"classnames": [...], "templates": [...]}}, '
            f"and {key!r} a list of one text or more."
        )
    return tuple(value)
