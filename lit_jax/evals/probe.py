"""Linear classifiers on the features of an image tower, trained on all images or on k for each class."""

import dataclasses
import logging
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lit_jax.data.example import Source
from lit_jax.errors import UserError
from lit_jax.evals.classes import integer
from lit_jax.evals.encode import Encoder, Params
from lit_jax.evals.labels import Labels, one_spelling, without_minus_one
from lit_jax.evals.zero_shot import expected_hits, top_metrics

log = logging.getLogger(__name__)

# The penalties of the first sweep, as in the CLIP paper (A.3).
COARSE_L2 = (1e-6, 1e-4, 1e-2, 1e0, 1e2, 1e4, 1e6)
# The smallest step of the search, in decades.
FINEST = 1 / 8
# Every fifth training image of a class is held out for validation.
VALIDATION = 5
# Few images leave none to choose the penalty with, so it is fixed.
FEW_SHOT_L2 = 1.0
# The most steps of the solver, as in CLIP's example of a linear probe.
MAX_ITERATIONS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """The features of N images, and their classes, numbered from 0."""

    rows: Float[np.ndarray, "N P"]
    label: Int[np.ndarray, " N"]

    def __getitem__(self, chosen: Any) -> "Features":
        return Features(rows=self.rows[chosen], label=self.label[chosen])


def class_ids(train: Labels, test: Labels) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " M"]]:
    """Return the classes of the N training and M test examples, as positions among the labels of `train`.

    An example without a label has the class -1.

    Raises UserError if `test` has a class that `train` lacks.
    """
    # "7" in one data set and "07" in the other are the same class.
    same = one_spelling(train.found | test.found)
    known = sorted({same[label] for label in _classes(train.found)})

    def refusal(key: str, label: str) -> str:
        return (
            f"The class {label!r} of the evaluation's data ({key}) is not in its training data; "
            "both must have the same classes."
        )

    return train.positions(known, refusal), test.positions(known, refusal)


def _classes(found: Collection[str]) -> Collection[str]:
    """Return the labels that are classes.

    The label -1 is a class only if the other class is 1, as in binary data; otherwise it means no label.
    """
    others = without_minus_one(found)
    return found if {integer(label) for label in others} == {1} else others


def check_counts(label_N: Int[np.ndarray, " N"], shots: Sequence[int] = ()) -> None:
    """Raise UserError if there are too few training images for `few_shot` (with shots) or `linear_probe`."""
    of_class = np.bincount(label_N[label_N >= 0])
    if (of_class > 0).sum() < 2:
        raise UserError(
            "The training data of a probe has only one class; set train of the evaluation (--train_data) "
            "to data with two or more."
        )
    if shots and max(shots) > of_class.min():
        raise UserError(
            f"A class has {of_class.min()} training images, but shots asks for {max(shots)}; lower shots, or "
            "give more images."
        )
    if not shots and of_class.max() < VALIDATION:
        raise UserError(
            f"No class of a linear probe has {VALIDATION} training images, one of which is needed to choose "
            "the penalty; give more images, or set kind to few_shot."
        )


def features(
    encoder: Encoder, params: Params, source: Source, label_N: Int[np.ndarray, " N"]
) -> Features:
    """Return the features of the images of `source` that can be decoded and have a label.

    Raises UserError if there is no such image.
    """
    rows, valid_N = encoder.features(params, source)
    valid_N = valid_N & (label_N >= 0)
    if not valid_N.any():
        raise UserError(
            "No image with a label can be decoded; fix the data, or give the evaluation other data "
            "(--data, --train_data)."
        )
    return Features(rows=rows, label=label_N)[valid_N]


def linear_probe(train: Features, test: Features) -> dict[str, float]:
    """Fit a logistic regression whose penalty a fifth of the training images chooses (CLIP section 3.2).

    The L2 penalty is swept from 1e-6 to 1e6, then between the neighbours of the best value, down to an eighth
    of a decade. The final classifier is trained on all training images with the best penalty.

    Returns top1, top5 (for five classes or more), mean_per_class_recall, n, and l2.
    """
    check_counts(train.label)
    # The test images must not choose the penalty.
    held_out_N = _each_of(VALIDATION, train.label)
    learn, validate = train[~held_out_N], train[held_out_N]
    accuracy: dict[float, float] = {}

    def measure(l2: float) -> float:
        if l2 not in accuracy:
            accuracy[l2] = _test(_fit(learn, l2)[0], validate)["top1"]
        return accuracy[l2]

    # `max` returns the first of equal values, so the order is reversed: the strongest penalty overfits least.
    best, step = max(reversed(COARSE_L2), key=measure), 2.0
    while (step := step / 2) >= FINEST:
        best = max((best, best * 10**-step, best * 10**step), key=measure)
    classifier, is_converged = _fit(train, best)
    _tell_not_converged(int(not is_converged), 1, len(train.label))
    return {**_test(classifier, test), "l2": best}


def few_shot(
    train: Features, test: Features, *, shots: Sequence[int], draws: int
) -> dict[str, float]:
    """Fit a logistic regression on k training images of each class, for each k of `shots`.

    Returns the mean ('top1_4_shot') and the standard deviation ('top1_4_shot_std') of the accuracy over
    `draws` random choices of images, which are the same in every call.

    Raises UserError if a class has fewer images than one of `shots`.
    """
    check_counts(train.label, shots)
    of_class = np.bincount(train.label)
    metrics, not_converged = {}, 0
    for k in shots:
        top1 = []
        for draw in range(draws):
            # Seeded by the draw, so that models are compared on the same images.
            rng = np.random.default_rng((k, draw))
            chosen = [
                rng.choice(np.flatnonzero(train.label == label), k, replace=False)
                for label in range(len(of_class))
            ]
            classifier, is_converged = _fit(train[np.concatenate(chosen)], FEW_SHOT_L2)
            not_converged += not is_converged
            top1.append(_test(classifier, test)["top1"])
        metrics[f"top1_{k}_shot"] = float(np.mean(top1))
        metrics[f"top1_{k}_shot_std"] = float(np.std(top1))
    _tell_not_converged(not_converged, len(shots) * draws, max(shots) * len(of_class))
    return {**metrics, "n": float(len(test.label))}


def _each_of(n: int, label_N: np.ndarray) -> np.ndarray:
    """Return whether each example is the n-th, 2n-th ... of its class."""
    # Counted within a class: data sets are often sorted by class, and each class needs its share.
    order_N = np.argsort(label_N, kind="stable")
    starts = np.cumsum(np.bincount(label_N)) - np.bincount(label_N)
    place_N = np.empty(len(label_N), int)
    place_N[order_N] = np.arange(len(label_N)) - starts[label_N[order_N]]
    return place_N % n == n - 1


def _tell_not_converged(count: int, fits: int, images: int) -> None:
    """Warn if final classifiers have not converged, so that their accuracy may be too low."""
    if count:
        log.warning(
            "%d of the %d final classifiers of a probe, on up to %d images, had not converged after %d "
            "iterations; the accuracy may be lower than that of the features.",
            count,
            fits,
            images,
            MAX_ITERATIONS,
        )


def _fit(train: Features, l2: float) -> tuple[Any, bool]:
    """Fit scikit-learn's classifier; return it, and whether the fit has converged.

    The classifier minimises the sum of cross entropies + l2 / 2 * |weights|^2.
    """
    # Imported here, because the import takes a second and only probes need it.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    # scikit-learn's C is the inverse of the penalty.
    classifier = LogisticRegression(C=1 / l2, max_iter=MAX_ITERATIONS)
    # A fit with a weak penalty can be compared without having converged, so scikit-learn's warning about each
    # fit is only noted.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        classifier.fit(train.rows, train.label)
    return classifier, not any(issubclass(one.category, ConvergenceWarning) for one in caught)


def _test(classifier: Any, test: Features) -> dict[str, float]:
    scores_NxC = classifier.decision_function(test.rows)
    # For two classes scikit-learn returns a single score, that of the second class.
    if scores_NxC.ndim == 1:
        scores_NxC = np.stack([-scores_NxC, scores_NxC], axis=1)
    # A class without training images gets the lowest score.
    classes = 1 + int(max(classifier.classes_.max(), test.label.max()))
    all_NxC = np.full((len(test.label), classes), -np.inf)
    all_NxC[:, classifier.classes_] = scores_NxC
    return top_metrics(expected_hits(all_NxC, test.label), test.label, classes)
