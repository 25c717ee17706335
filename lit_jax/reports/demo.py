"""The demo's report: pictures of what a trained model makes of numbers that no caption named."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lit_jax.data.demo import NUMBERS, TEMPLATES, UNSEEN, DemoSource, number_words
from lit_jax.distributed.process import is_primary
from lit_jax.evals.classes import Classes
from lit_jax.evals.encode import Encoder, Params
from lit_jax.evals.labels import Labels, label_ids
from lit_jax.evals.zero_shot import ZeroShotResult, zero_shot
from lit_jax.reports.figures import (
    Accuracies,
    Prediction,
    loss_figure,
    predictions_figure,
    similarity_figure,
)

GUESSES = 3


def write_demo_report(
    folder: Path, encoder: Encoder, params: Params, metrics: Sequence[Mapping[str, Any]]
) -> None:
    """Draws predictions.png, similarity.png and loss.png into `folder`, which is created if need be.

    Classifies the demo's test images among all 80 numbers. All processes must call this; the
    primary one draws and writes.

    Args:
        metrics: the rows of the run's metrics.jsonl; those with 'loss' and 'learning_rate' are drawn.
    """
    classes = Classes(names=tuple(map(number_words, NUMBERS)), templates=TEMPLATES["en"])
    sources = {split: DemoSource(split) for split in ("seen", "unseen")}
    results = {
        split: zero_shot(encoder, params, source, classes, label_ids(Labels(source), classes))
        for split, source in sources.items()
    }
    if not is_primary():
        return
    accuracies = Accuracies(
        numbers=NUMBERS, unseen=UNSEEN, accuracy=_accuracies(list(results.values()))
    )
    predictions = _first_predictions(sources["unseen"], results["unseen"], classes)
    similarity_CxC = _similarity(list(results.values()))
    folder.mkdir(parents=True, exist_ok=True)
    _save(predictions_figure(predictions, accuracies), folder / "predictions.png")
    _save(similarity_figure(similarity_CxC, NUMBERS, UNSEEN), folder / "similarity.png")
    _save(loss_figure(metrics), folder / "loss.png")


def _accuracies(results: Sequence[ZeroShotResult]) -> np.ndarray:
    """The part of each class's images that its own name won."""
    label_N = np.concatenate([result.label for result in results])
    hit_N = np.concatenate([result.top[:, 0] == result.label for result in results])
    return np.bincount(label_N, weights=hit_N) / np.bincount(label_N)


def _similarity(results: Sequence[ZeroShotResult]) -> np.ndarray:
    """The mean cosine of each class's images (row) with each class's texts (column)."""
    label_N = np.concatenate([result.label for result in results])
    images_NxE = np.concatenate([result.image_embeds for result in results])
    texts_CxE = results[0].class_embeds
    means_CxE = np.stack([images_NxE[label_N == c].mean(axis=0) for c in range(len(texts_CxE))])
    return means_CxE @ texts_CxE.T


def _first_predictions(
    source: DemoSource, result: ZeroShotResult, classes: Classes
) -> list[Prediction]:
    """The first image of every class that occurs in `source`, not the best one."""
    _, first_rows = np.unique(result.label, return_index=True)
    return [
        Prediction(
            image=np.asarray(source[int(result.index[row])]["image"]),
            truth=classes.names[result.label[row]],
            guesses=tuple(
                (classes.names[c], float(probability))
                for c, probability in zip(
                    result.top[row, :GUESSES], result.probability[row], strict=False
                )
            ),
        )
        for row in first_rows
    ]


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150, pil_kwargs={"optimize": True})
