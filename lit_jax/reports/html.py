"""The report that opens from disk: numbers, samples in both directions, confusions, similarities, curves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Float, Int

from lit_jax.evals.classes import Classes
from lit_jax.evals.retrieval import RetrievalResult
from lit_jax.evals.runner import Evaluation
from lit_jax.evals.zero_shot import ZeroShotResult
from lit_jax.reports.figures import curves_figure, heat_map_figure
from lit_jax.reports.page import drawing, page, picture, plain_table, table, text
from lit_jax.reports.results import Subject, percent, tables

PICTURES = 16  # images shown with their most probable classes
SAMPLES = 8  # other queries shown, evenly spaced in the data: they are not chosen for their looks
ANSWERS = 8  # images shown for a text
CAPTIONS = 5  # texts shown for an image
GUESSES = 3
CONFUSIONS = 12
CLASSES = 100  # classes whose accuracy is shown
MAP = 40  # rows and columns of a similarity map
BLOCK = 1 << 18  # embeddings whose scores are in memory at one time

Show = Callable[
    [int, str, str], str
]  # the picture of an image by its row, its alternative text, its class


def html_report(
    evaluations: Sequence[Evaluation],
    subject: Subject,
    metrics: Sequence[Mapping[str, Any]] = (),
) -> str:
    """One self-contained page about `evaluations`, of each the first language in full.

    Args:
        metrics: the rows of a run's metrics.jsonl, for the curves.
    """
    parts = ["<h2>Results</h2>", *map(table, tables(evaluations))]
    seen = set()
    for evaluation in evaluations:
        if evaluation.prepared.key not in seen and evaluation.details is not None:
            parts += _details(evaluation)
        seen.add(evaluation.prepared.key)
    parts += _curves(metrics)
    return page("Evaluation", str(subject), parts)


def _details(evaluation: Evaluation) -> list[str]:
    prepared, details = evaluation.prepared, evaluation.details
    assert details is not None

    def show(row: SupportsIndex, alt: str, kind: str = "") -> str:
        return picture(prepared.source[int(details.index[row])]["image"], alt, kind)

    if isinstance(details, RetrievalResult):
        return [f"<h2>Retrieval: {text(prepared.key)}</h2>", *_retrieval(details, show)]
    assert prepared.classes is not None
    head = f"<h2>Zero-shot classification: {text(prepared.key)}</h2>"
    return [head, *_zero_shot(details, prepared.classes, show)]


def _zero_shot(result: ZeroShotResult, classes: Classes, show: Show) -> Iterator[str]:
    names = classes.names
    yield f"<p>Of {len(result.label):,} images, each among {len(names):,} classes: "
    yield f"{percent(result.metrics['top1'])} % get their own class.</p>"
    present, accuracy_P = _accuracy(result)
    yield from _pictures(result, names, show)
    yield "<h3>Which pictures fit the words?</h3>"
    yield '<p class="note">The nearest images to the texts of a class; those of the class are framed.</p>'
    for label in present[_spread(len(present))]:
        nearest = _nearest(result.class_embeds[label], result.image_embeds, ANSWERS)
        yield f'<div class="row"><p dir="auto">{text(names[label])}</p><div class="strip">'
        for row in nearest:
            kind = "right" if result.label[row] == label else ""
            truth = names[result.label[row]]
            yield f'<figure>{show(row, truth, kind)}<figcaption dir="auto">{text(truth)}'
            yield "</figcaption></figure>"
        yield "</div></div>"
    yield from _class_accuracies([names[c] for c in present], accuracy_P)
    yield from _confusions(result, names, show)
    yield "<h3>Similarity</h3>"
    shown = present[_lowest(accuracy_P, MAP)]
    what = (
        "All classes" if len(shown) == len(present) else f"The {len(shown)} most confused classes"
    )
    yield f'<p class="note">{what}: mean cosine of the images of a class (row) and the texts of one '
    yield "(column). A bright diagonal: every class finds its own words.</p>"
    means = np.stack([result.image_embeds[result.label == c].mean(axis=0) for c in shown])
    labels = [names[c] for c in shown]
    yield _heat_map(means @ result.class_embeds[shown].T, labels)


def _accuracy(
    result: ZeroShotResult,
) -> tuple[Int[np.ndarray, " P"], Float[np.ndarray, " P"]]:
    """Return the classes that have images, and the part of the images of each that its own name won."""
    hit_N = result.top[:, 0] == result.label
    present, row_N = np.unique(result.label, return_inverse=True)
    return present, np.bincount(row_N, weights=hit_N) / np.bincount(row_N)


def _lowest(accuracy_P: Float[np.ndarray, " P"], most: int) -> Int[np.ndarray, " S"]:
    """Return the positions of the lowest accuracies, at most so many, in the order of the classes."""
    return np.sort(np.argsort(accuracy_P, kind="stable")[:most])


def _pictures(result: ZeroShotResult, names: Sequence[str], show: Show) -> Iterator[str]:
    _, first_P = np.unique(result.label, return_index=True)
    yield "<h3>What is in the picture?</h3>"
    yield '<p class="note">The first image of a class, and the most probable classes.</p>'
    yield '<div class="cards">'
    for row in first_P[_spread(len(first_P), PICTURES)]:
        truth = names[result.label[row]]
        right = result.top[row, 0] == result.label[row]
        yield f'<div class="card">{show(row, truth, "")}'
        yield f'<strong dir="auto">{text(truth)} {"✓" if right else "✗"}</strong>'
        for guess, probability in zip(
            result.top[row, :GUESSES], result.probability[row], strict=False
        ):
            kind = "guess right" if guess == result.label[row] else "guess"
            yield f'<div class="{kind}"><span dir="auto">{text(names[guess])}</span>'
            yield f"<span>{probability:.0%}</span>"
            yield f'<i style="width:{max(probability, 0):.1%}"></i></div>'
        yield "</div>"
    yield "</div>"


def _class_accuracies(names: Sequence[str], accuracy_P: np.ndarray) -> Iterator[str]:
    shown = _lowest(accuracy_P, CLASSES)
    yield "<h3>Accuracy of every class</h3>"
    if len(shown) < len(names):
        yield f'<p class="note">The {len(shown)} lowest of {len(names):,}.</p>'
    yield '<div class="cells">'
    for c in shown:
        yield f'<div style="--part:{accuracy_P[c]:.3f}"><b dir="auto">{text(names[c])}</b>'
        yield f"{accuracy_P[c]:.0%}</div>"
    yield "</div>"


def _confusions(result: ZeroShotResult, names: tuple[str, ...], show: Show) -> Iterator[str]:
    wrong = [row for row in result.confusion().tolist() if row[0] != row[1]]
    yield "<h3>Worst confusions</h3>"
    if not wrong:
        yield "<p>None: every image gets its own class.</p>"
        return
    of_class = np.bincount(result.label)
    rows = []
    for truth, guess, count in sorted(wrong, key=lambda row: -row[2])[:CONFUSIONS]:
        example = int(np.flatnonzero((result.label == truth) & (result.top[:, 0] == guess))[0])
        alt = f"{names[truth]}, taken for {names[guess]}"
        rows.append(
            f'<tr><td class="text">{show(example, alt, "small")}</td>'
            f'<td class="text" dir="auto">{text(names[truth])}</td>'
            f'<td class="text" dir="auto">{text(names[guess])}</td>'
            f"<td>{count:,}</td><td>{percent(count / of_class[truth])}</td></tr>"
        )
    columns = ("", "class", "taken for", "images", "% of the class")
    yield plain_table(columns, "\n".join(rows), texts=3)


def _retrieval(result: RetrievalResult, show: Show) -> Iterator[str]:
    yield f"<p>{len(result.index):,} images and {len(result.texts):,} texts.</p>"
    yield "<h3>Which texts fit the picture?</h3>"
    yield '<p class="note">Images evenly spaced in the data, and the nearest texts; its own in blue.</p>'
    for row in _spread(len(result.index)):
        yield f'<div class="answer">{show(row, "an image that asks for texts", "")}<ol>'
        for m in _nearest(result.image_embeds[row], result.text_embeds, CAPTIONS):
            kind = ' class="right"' if result.image_of_text[m] == row else ""
            yield f'<li{kind} dir="auto">{text(result.texts[m])}</li>'
        yield "</ol></div>"
    yield "<h3>Which pictures fit the text?</h3>"
    yield '<p class="note">The nearest images to a text, the best one first; its own is framed.</p>'
    for m in _spread(len(result.texts)):
        yield f'<div class="row"><p dir="auto">{text(result.texts[m])}</p><div class="strip">'
        for row in _nearest(result.text_embeds[m], result.image_embeds, ANSWERS):
            kind = "right" if result.image_of_text[m] == row else ""
            yield f"<figure>{show(row, result.texts[m], kind)}</figure>"
        yield "</div></div>"
    yield "<h3>Similarity</h3>"
    yield '<p class="note">Cosine of images (rows) and one text of each (columns), evenly spaced in the '
    yield "data. A bright diagonal: each finds its own.</p>"
    own = np.unique(result.image_of_text, return_index=True)[1]
    chosen = own[_spread(len(own), MAP)]
    images = result.image_embeds[result.image_of_text[chosen]]
    yield _heat_map(images @ result.text_embeds[chosen].T, [result.texts[m] for m in chosen])


def _heat_map(similarity: Float[np.ndarray, "C C"], names: Sequence[str]) -> str:
    return drawing(heat_map_figure(similarity, names), "Map of cosine similarities")


def _curves(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    losses = [row for row in metrics if {"loss", "learning_rate"} <= row.keys()]
    if not losses:
        return []
    last = f"The loss is {losses[-1]['loss']:.3f} after {losses[-1]['step']:,} steps."
    figure = drawing(curves_figure(metrics), "Curves of loss, learning rate and evaluations")
    return ["<h2>Training</h2>", f"<p>{last}</p>", figure]


def _spread(count: int, most: int = SAMPLES) -> Int[np.ndarray, " S"]:
    """Up to `most` positions, evenly spaced."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def _nearest(
    query_E: Float[np.ndarray, " E"], items_ME: Float[np.ndarray, "M E"], count: int
) -> Int[np.ndarray, " K"]:
    """The rows with the largest inner products, the largest first; of equal ones the first."""
    scores_M = np.concatenate(
        [items_ME[start : start + BLOCK] @ query_E for start in range(0, len(items_ME), BLOCK)]
    )
    return np.argsort(-scores_M, kind="stable")[:count]
