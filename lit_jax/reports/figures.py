"""The pictures of reports. Drawing only: plain data in, matplotlib figures out."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator

from lit_jax.printable import printable

# From Okabe and Ito's palette, told apart with every kind of colour blindness.
RIGHT, UNSEEN = "#0072B2", "#D55E00"
OTHER, INK, FAINT = "#AEB6BD", "#222222", "#5F6770"
# The curves of evaluations, from the same palette.
CURVES = (RIGHT, UNSEEN, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK, FAINT)
PALE_BLUES = LinearSegmentedColormap.from_list(
    "pale blues", ["white", "#8FC1E3"]
)  # under black text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """An image, the class it shows, and the most probable classes, the first one first."""

    image: UInt8[np.ndarray, "H W 3"]
    truth: str
    guesses: tuple[tuple[str, float], ...]  # class name, probability


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracies:
    """The accuracy for each of `numbers`, whole rows of ten; no caption named the `unseen` ones."""

    numbers: Sequence[int]
    unseen: Collection[int]
    accuracy: Float[np.ndarray, " C"]

    def mean(self, *, unseen: bool) -> float:
        chosen = [(number in self.unseen) == unseen for number in self.numbers]
        return float(self.accuracy[chosen].mean())


def predictions_figure(predictions: Sequence[Prediction], accuracies: Accuracies) -> Figure:
    """Up to sixteen images with their best guesses, beside the accuracy for every number."""
    figure = Figure(figsize=(16, 7.9))
    _title(
        figure,
        "Reading numbers that no caption ever named",
        f"None of the {len(accuracies.unseen)} numbers pictured here appeared in any training caption; "
        "each is shown by its first test image.\n"
        f"The model chooses among the words for all {len(accuracies.numbers)} numbers.",
    )
    grid = GridSpec(
        4, 8, figure, 0.025, 0.04, 0.62, 0.775, wspace=0.1, hspace=0.3, width_ratios=[1, 1.3] * 4
    )
    for i, prediction in enumerate(predictions[:16]):
        row, column = divmod(i, 4)
        _draw_image(figure.add_subplot(grid[row, 2 * column]), prediction)
        _draw_guesses(figure.add_subplot(grid[row, 2 * column + 1]), prediction)
    _draw_accuracies(figure.add_axes((0.655, 0.04, 0.325, 0.685)), accuracies)
    return figure


def similarity_figure(
    similarity_CxC: Float[np.ndarray, "C C"], numbers: Sequence[int], unseen: Collection[int]
) -> Figure:
    """The cosine between the images of each number (row) and the text of each (column)."""
    figure = Figure(figsize=(12, 12.4))
    _title(
        figure,
        "How well each image matches each text",
        "Mean cosine similarity of the test images of a number (row) and the text that names a number "
        "(column).\nA bright diagonal: every number finds its own words. "
        "Orange: numbers that no training caption named.",
    )
    axes = figure.add_axes((0.06, 0.05, 0.83, 0.83 * 12 / 12.4))
    picture = axes.imshow(similarity_CxC, cmap="cividis", interpolation="nearest")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(len(numbers)), [str(number) for number in numbers], size=7.5)
    axes.tick_params(length=2, top=True, labeltop=True, right=True, labelright=True)
    axes.tick_params(axis="x", rotation=90)
    for position, number in enumerate(numbers):
        if number in unseen:
            axes.add_patch(_outline(position, position, 1.0))
            for tick in (
                axes.xaxis.get_major_ticks()[position],
                axes.yaxis.get_major_ticks()[position],
            ):
                tick.label1.set(color=UNSEEN, weight="bold")
                tick.label2.set(color=UNSEEN, weight="bold")
    axes.set_xlabel("text", size=12)
    axes.set_ylabel("images", size=12)
    colors = figure.colorbar(picture, cax=figure.add_axes((0.93, 0.05, 0.018, 0.83 * 12 / 12.4)))
    colors.outline.set_visible(False)
    colors.set_label("cosine similarity", size=12)
    return figure


def loss_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and learning rate over the steps; of `rows`, those that have both."""
    rows = [row for row in rows if {"loss", "learning_rate"} <= row.keys()]
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(10, 6.5))
    last = f"{rows[-1]['loss']:.3f} after {steps[-1]:,} steps" if rows else "no step is recorded"
    _title(figure, "Training loss", last)
    top, bottom = figure.subplots(
        2,
        1,
        sharex=True,
        height_ratios=(3, 1),
        gridspec_kw={"top": 0.8, "left": 0.1, "right": 0.96},
    )
    top.plot(steps, [row["loss"] for row in rows], color=RIGHT, linewidth=2)
    top.set_yscale("log")
    top.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    top.yaxis.set_major_formatter("{x:g}")
    top.yaxis.set_minor_formatter("{x:g}")
    bottom.plot(steps, [row["learning_rate"] for row in rows], color=UNSEEN, linewidth=2)
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("step", size=12)
    for axes, name in ((top, "loss, log scale"), (bottom, "learning rate")):
        axes.set_ylabel(name, size=12)
        axes.grid(which="both", color="#E3E6E8")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    figure.align_ylabels()
    return figure


def _title(figure: Figure, title: str, subtitle: str) -> None:
    """Title and subtitle, a fixed distance in inches from the top left corner."""
    width, height = figure.get_size_inches()
    figure.text(0.4 / width, 1 - 0.3 / height, title, size=20, weight="bold", color=INK, va="top")
    figure.text(
        0.4 / width, 1 - 0.75 / height, subtitle, size=12, color=FAINT, va="top", linespacing=1.4
    )


def _draw_image(axes: Axes, prediction: Prediction) -> None:
    axes.imshow(prediction.image, interpolation="nearest")
    axes.set(xticks=[], yticks=[], anchor="N")
    axes.spines[:].set(color=UNSEEN, linewidth=2.5)
    right = prediction.guesses[0][0] == prediction.truth
    axes.set_title(
        f"{printable(prediction.truth)} {'✓' if right else '✗'}",
        size=12,
        parse_math=False,
        weight="bold",
        color=RIGHT if right else INK,
        loc="left",
        pad=8,
    )


def _draw_guesses(axes: Axes, prediction: Prediction) -> None:
    for row, (name, probability) in enumerate(prediction.guesses):
        truth = name == prediction.truth
        style = {"size": 9.5, "va": "center", "weight": "bold" if truth else "normal"}
        color = RIGHT if truth else FAINT
        axes.text(0, row - 0.22, printable(name), color=color, parse_math=False, **style)
        axes.barh(row + 0.2, probability, height=0.28, color=RIGHT if truth else OTHER)
        axes.text(probability + 0.04, row + 0.19, f"{probability:.0%}", color=color, **style)
    axes.set(xlim=(0, 1.3), ylim=(len(prediction.guesses) - 0.1, -0.55))
    axes.set_axis_off()


def _draw_accuracies(axes: Axes, accuracies: Accuracies) -> None:
    """A table of tens by units, one cell a number."""
    axes.imshow(
        accuracies.accuracy.reshape(-1, 10),
        cmap=PALE_BLUES,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
    )
    for number, accuracy in zip(accuracies.numbers, accuracies.accuracy, strict=True):
        row, column = divmod(number - accuracies.numbers[0], 10)
        axes.text(column, row - 0.08, str(number), size=14, weight="bold", color=INK, ha="center")
        axes.text(column, row + 0.28, f"{accuracy:.0%}", size=9, color=INK, ha="center")
        if number in accuracies.unseen:
            axes.add_patch(_outline(column, row, 0.88))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(
        "Accuracy for every number", size=15, weight="bold", color=INK, loc="left", pad=32
    )
    means = {unseen: f"{accuracies.mean(unseen=unseen):.1%}" for unseen in (True, False)}
    axes.legend(
        handles=[
            Patch(fill=False, ec=UNSEEN, lw=2.5, label=f"never in a caption: {means[True]}"),
            Patch(color=PALE_BLUES(1.0), label=f"in captions: {means[False]}"),
        ],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2,
        frameon=False,
        fontsize=12,
        borderaxespad=0.5,
        borderpad=0,
    )


def _outline(column: int, row: int, size: float) -> Rectangle:
    """The mark of an unseen number, around a cell of a picture."""
    corner = (column - size / 2, row - size / 2)
    return Rectangle(corner, size, size, fill=False, edgecolor=UNSEEN, linewidth=2.5)


def heat_map_figure(similarity_CxC: Float[np.ndarray, "C C"], names: Sequence[str]) -> Figure:
    """The cosines of images (rows) and texts (columns); both are called by `names`."""
    size = 3.2 + 0.17 * len(names)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(similarity_CxC, cmap="cividis", interpolation="nearest")
    shown = map(printable, names)
    short = [name if len(name) <= 24 else f"{name[:23]}…" for name in shown]
    axes.set_xticks(range(len(names)), short, size=7, rotation=90, parse_math=False)
    axes.set_yticks(range(len(names)), short, size=7, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("texts", color=FAINT)
    axes.set_ylabel("images", color=FAINT)
    colors = figure.colorbar(picture, ax=axes, shrink=0.6, pad=0.02)
    colors.outline.set_visible(False)
    colors.ax.tick_params(length=2, labelsize=7)
    return figure


def curves_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, learning rate and, if there are some at several steps, evaluations over the steps."""
    losses = [row for row in rows if {"loss", "learning_rate"} <= row.keys()]
    headlines = _headlines(rows)
    figure = Figure(figsize=(10, 7 if headlines else 5), layout="constrained")
    heights = [3, 1.2, 2.4] if headlines else [3, 1.2]
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    steps = [row["step"] for row in losses]
    panels[0].plot(steps, [row["loss"] for row in losses], color=RIGHT, linewidth=1.8)
    panels[0].set_ylabel("loss")
    panels[1].plot(steps, [row["learning_rate"] for row in losses], color=UNSEEN, linewidth=1.8)
    panels[1].set_ylabel("learning rate")
    for (name, points), color in zip(headlines.items(), CURVES, strict=False):
        panels[2].plot(
            *zip(*points, strict=True), color=color, marker="o", markersize=3, label=printable(name)
        )
    if headlines:
        panels[2].set_ylabel("evaluations, %")
        for label in panels[2].legend(frameon=False, fontsize=8, loc="best").get_texts():
            label.set_parse_math(False)
    panels[-1].set_xlabel("step")
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.grid(color="#E3E6E8")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    figure.align_ylabels()
    return figure


def _headlines(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Of each evaluation one metric, as (step, percent); of those that were made at several steps."""
    ends = ("/top1", "/image_to_text_recall_at_1", "/text_to_image_recall_at_1")
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name.endswith(ends):
                points.setdefault(name, []).append((row["step"], 100 * value))
    return {name: of_name for name, of_name in points.items() if len(of_name) > 1}
