"""Images of an evaluation with the most probable classes: as data, and as one picture for dashboards."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lit_jax.data.image import decode
from lit_jax.display import printable
from lit_jax.evals.runner import Evaluation
from lit_jax.evals.zero_shot import ZeroShotResult
from lit_jax.reports.matplotlib_figures import predictions_figure, save
from lit_jax.training.dashboards import Picture

# The number of images that are shown with their most probable classes, one image for each class.
PICTURES = 16
# The number of classes shown for an image.
GUESSES = 3
# The number of other queries, evenly spaced in the data, so that nobody can pick the good ones.
SAMPLES = 8


class Guess(NamedTuple):
    """A class that the model takes an image for."""

    name: str
    probability: float
    is_right: bool


class Prediction(NamedTuple):
    """An image with its most probable classes, the first one first.

    Attributes:
        row: the row of the image in the result.
        mark: whether the first class is right.
    """

    row: int
    truth: str
    mark: str
    guesses: tuple[Guess, ...]


def predictions(result: ZeroShotResult, names: tuple[str, ...]) -> list[Prediction]:
    """Return the predictions for the first image of each class, or of some classes evenly spaced."""
    first_P = np.unique(result.label, return_index=True)[1]
    return [_prediction(result, names, int(row)) for row in first_P[spread(len(first_P), PICTURES)]]


def _prediction(result: ZeroShotResult, names: tuple[str, ...], row: int) -> Prediction:
    label, hit = result.label[row], float(result.hit[row])
    top = zip(result.top[row, :GUESSES], result.probability[row], strict=False)
    return Prediction(
        row=row,
        truth=names[label],
        # A tie for the first place is neither right nor wrong.
        mark={1.0: "✓", 0.0: "✗"}.get(hit, f"tied, right in {hit:.0%}"),
        guesses=tuple(Guess(names[guess], float(p), bool(guess == label)) for guess, p in top),
    )


def predictions_picture(evaluation: Evaluation) -> Picture | None:
    """Return one picture with the images of `predictions`, None for an evaluation without classes."""
    prepared, result = evaluation.prepared, evaluation.result
    if not isinstance(result, ZeroShotResult):
        return None
    assert prepared.classes is not None
    shown = predictions(result, prepared.classes.names)
    images = [decode(prepared.source[int(result.index[one.row])]["image"]) for one in shown]
    titles = [f"{one.truth} {one.mark}" for one in shown]
    lines = [[f"{guess.name} {guess.probability:.0%}" for guess in one.guesses] for one in shown]
    png = save(predictions_figure(images, titles, lines), format="png")
    caption = "\n".join(
        f"{title}: {', '.join(texts)}" for title, texts in zip(titles, lines, strict=True)
    )
    return Picture(png=png, caption=printable(caption))


def spread(count: int, most: int = SAMPLES) -> Int[np.ndarray, " S"]:
    """Return up to `most` positions, evenly spaced."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)
