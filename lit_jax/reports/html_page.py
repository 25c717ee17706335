"""The HTML page about evaluations: numbers, samples in both directions, confusions, similarities, curves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Float, Int

from lit_jax.evals.classes import Classes
from lit_jax.evals.retrieval import RetrievalResult
from lit_jax.evals.runner import Evaluation
from lit_jax.evals.zero_shot import ZeroShotResult
from lit_jax.reports.html_parts import drawing, page, picture, plain_table, table, text
from lit_jax.reports.matplotlib_figures import (
    curves_figure,
    heat_map_figure,
)
from lit_jax.reports.predictions import predictions, spread
from lit_jax.reports.result_files import EvaluatedModel, percent, tables

# The number of images shown for a text, and of texts shown for an image.
ANSWERS, CAPTIONS = 8, 5
# The number of confused pairs in the table.
CONFUSIONS = 12
# The number of classes whose accuracy is shown, and of rows and columns of a similarity map.
CLASSES, MAP = 100, 40
# The number of embeddings whose scores are in memory at a time.
BLOCK = 1 << 18

# (row of an image in the result, alternative text, CSS class) -> the picture in HTML.
ShowImage = Callable[[int, str, str], str]


def html_report(
    evaluations: Sequence[Evaluation],
    model: EvaluatedModel,
    metrics: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return a self-contained HTML page about `evaluations`, with samples of the first language of each.

    Args:
        metrics: the rows of a run's metrics.jsonl, for the curves.
    """
    parts = ["<h2>Results</h2>", *map(table, tables(evaluations))]
    # The languages of an evaluation usually share their images, so that samples in each would repeat them.
    seen = set()
    for evaluation in evaluations:
        if evaluation.prepared.key not in seen and evaluation.result is not None:
            parts += _samples(evaluation)
        seen.add(evaluation.prepared.key)
    parts += _curves(metrics)
    return page("Evaluation", str(model), parts)


def _samples(evaluation: Evaluation) -> list[str]:
    prepared, result = evaluation.prepared, evaluation.result
    assert result is not None

    def show(row: SupportsIndex, alt: str, kind: str = "") -> str:
        return picture(prepared.source[int(result.index[row])]["image"], alt, kind)

    if isinstance(result, RetrievalResult):
        return [f"<h2>Retrieval: {text(prepared.key)}</h2>", *_retrieval(result, show)]
    assert prepared.classes is not None
    head = f"<h2>Zero-shot classification: {text(prepared.key)}</h2>"
    return [head, *_zero_shot(result, prepared.classes, show)]


def _zero_shot(result: ZeroShotResult, classes: Classes, show: ShowImage) -> Iterator[str]:
    names = classes.names
    yield f"<p>Of {len(result.label):,} images, each among {len(names):,} classes: "
    yield f"{percent(result.metrics['top1'])} % get their own class.</p>"
    present, accuracy_P = _accuracy(result)
    yield from _pictures(result, names, show)
    yield "<h3>Which pictures fit the words?</h3>"
    yield '<p class="note">The nearest images to the texts of a class; those of the class are framed.</p>'
    # Classes without an image in the data could show only wrong answers.
    for label in present[spread(len(present))]:
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
    # A map of a thousand classes could not be read.
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
    """Return the P classes that have images, and the accuracy of each: the expectation if ties are random."""
    present, row_N = np.unique(result.label, return_inverse=True)
    return present, np.bincount(row_N, weights=result.hit) / np.bincount(row_N)


def _lowest(accuracy_P: Float[np.ndarray, " P"], most: int) -> Int[np.ndarray, " S"]:
    """Return the positions of the `most` lowest accuracies, in the order of the classes."""
    return np.sort(np.argsort(accuracy_P, kind="stable")[:most])


def _pictures(result: ZeroShotResult, names: tuple[str, ...], show: ShowImage) -> Iterator[str]:
    yield "<h3>What is in the picture?</h3>"
    yield '<p class="note">The first image of a class, and the most probable classes.</p>'
    yield '<div class="cards">'
    for shown in predictions(result, names):
        yield f'<div class="card">{show(shown.row, shown.truth, "")}'
        yield f'<strong dir="auto">{text(shown.truth)} {shown.mark}</strong>'
        for guess in shown.guesses:
            kind = "guess right" if guess.is_right else "guess"
            yield f'<div class="{kind}"><span dir="auto">{text(guess.name)}</span>'
            yield f"<span>{guess.probability:.0%}</span>"
            yield f'<i style="width:{max(guess.probability, 0):.1%}"></i></div>'
        yield "</div>"
    yield "</div>"


def _class_accuracies(names: list[str], accuracy_P: np.ndarray) -> Iterator[str]:
    shown = _lowest(accuracy_P, CLASSES)
    yield "<h3>Accuracy of every class</h3>"
    if len(shown) < len(names):
        yield f'<p class="note">The {len(shown)} lowest of {len(names):,}.</p>'
    yield '<div class="cells">'
    for c in shown.tolist():
        yield f'<div style="--part:{accuracy_P[c]:.3f}"><b dir="auto">{text(names[c])}</b>'
        yield f"{accuracy_P[c]:.0%}</div>"
    yield "</div>"


def _confusions(result: ZeroShotResult, names: tuple[str, ...], show: ShowImage) -> Iterator[str]:
    # The first of several equally probable classes is not a guess of the model.
    decided = ~result.is_tied
    wrong = [row for row in result.confusion(decided).tolist() if row[0] != row[1]]
    yield "<h3>Worst confusions</h3>"
    if tied := int(result.is_tied.sum()):
        yield f'<p class="note">Images left out, because their most probable classes are tied: {tied:,}.</p>'
    if not wrong:
        yield f"<p>None: every {'other ' if tied else ''}image gets its own class.</p>"
        return
    of_class = np.bincount(result.label)
    rows = []
    for truth, guess, count in sorted(wrong, key=lambda row: -row[2])[:CONFUSIONS]:
        # The first image of the pair in the data stands for all of them.
        pair = (result.label == truth) & (result.top[:, 0] == guess)
        example = int(np.flatnonzero(pair & decided)[0])
        alt = f"{names[truth]}, taken for {names[guess]}"
        rows.append(
            f'<tr><td class="text">{show(example, alt, "small")}</td>'
            f'<td class="text" dir="auto">{text(names[truth])}</td>'
            f'<td class="text" dir="auto">{text(names[guess])}</td>'
            f"<td>{count:,}</td><td>{percent(count / of_class[truth])}</td></tr>"
        )
    columns = ("", "class", "taken for", "images", "% of the class")
    yield plain_table(columns, "\n".join(rows), texts=3)


def _retrieval(result: RetrievalResult, show: ShowImage) -> Iterator[str]:
    yield f"<p>{len(result.index):,} images and {len(result.texts):,} texts.</p>"
    yield "<h3>Which texts fit the picture?</h3>"
    yield '<p class="note">Images evenly spaced in the data, and the nearest texts; its own in blue.</p>'
    for row in spread(len(result.index)):
        yield f'<div class="answer">{show(row, "an image that asks for texts", "")}<ol>'
        for m in _nearest(result.image_embeds[row], result.text_embeds, CAPTIONS):
            kind = ' class="right"' if result.image_of_text[m] == row else ""
            yield f'<li{kind} dir="auto">{text(result.texts[m])}</li>'
        yield "</ol></div>"
    yield "<h3>Which pictures fit the text?</h3>"
    yield '<p class="note">The nearest images to a text, the best one first; its own is framed.</p>'
    for m in spread(len(result.texts)):
        yield f'<div class="row"><p dir="auto">{text(result.texts[m])}</p><div class="strip">'
        for row in _nearest(result.text_embeds[m], result.image_embeds, ANSWERS):
            kind = "right" if result.image_of_text[m] == row else ""
            yield f"<figure>{show(row, result.texts[m], kind)}</figure>"
        yield "</div></div>"
    yield "<h3>Similarity</h3>"
    yield '<p class="note">Cosine of images (rows) and one text of each (columns), evenly spaced in the '
    yield "data. A bright diagonal: each finds its own.</p>"
    # The first text of each image, so that the diagonal pairs an image with its own text.
    own = np.unique(result.image_of_text, return_index=True)[1]
    chosen = own[spread(len(own), MAP)]
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
    words = f"{last} {_wall_time(metrics[-1])} {_speed(losses)}"
    return ["<h2>Training</h2>", f"<p>{words}</p>", figure]


def _wall_time(row: Mapping[str, Any]) -> str:
    """Return a sentence about the seconds of a run by kind, which older runs do not have."""
    prefix = "seconds/"
    spent = {key.removeprefix(prefix): row[key] for key in row if key.startswith(prefix)}
    if not spent:
        return ""
    whole = sum(spent.values())
    kinds = sorted(spent, key=lambda kind: -spent[kind])
    shares = (f"{kind.replace('_', ' ')} {percent(spent[kind] / whole)} %" for kind in kinds)
    return f"The run took {whole:,.0f} s: {', '.join(shares)}."


def _speed(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return sentences about the usual step and the memory, which older runs do not have."""
    rows = [row for row in rows if "step_seconds" in row]
    if not rows:
        return ""
    # The median, because the first row is unlike the others.
    step, wait = (
        np.median([row[f"{name}_seconds"] for row in rows]) for name in ("step", "data_wait")
    )
    words = f"A step took {step * 1000:,.0f} ms, {wait * 1000:,.0f} ms of them to wait for data."
    if shares := [row["mfu"] for row in rows if "mfu" in row]:
        words += (
            f" The model's products ran at {percent(float(np.median(shares)))} % of the peak (MFU)."
        )
    if "peak_memory_gib" in rows[-1]:
        words += f" A device had at most {rows[-1]['peak_memory_gib']:.1f} GiB in use."
    return words


def _nearest(
    query_E: Float[np.ndarray, " E"], items_ME: Float[np.ndarray, "M E"], count: int
) -> Int[np.ndarray, " K"]:
    """Return the rows with the largest inner products, the largest first; equal ones in the rows' order."""
    scores_M = np.concatenate(
        [items_ME[start : start + BLOCK] @ query_E for start in range(0, len(items_ME), BLOCK)]
    )
    return np.argsort(-scores_M, kind="stable")[:count]
