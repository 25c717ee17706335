"""The figures of reports. This module only draws: plain data in, matplotlib figures out."""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL.Image import Image

from lit_jax.display import printable

# Two colours of Okabe and Ito's palette, which are distinct with every kind of colour blindness.
RIGHT, WRONG = "#0072B2", "#D55E00"
INK, FAINT = "#222222", "#5F6770"
# A background for black text.
PALE_BLUE = "#8FC1E3"
# The colours and, beyond these, the dashes of the evaluations' curves. The colours are from the same palette.
DASHES = ("-", "--", ":", "-.")
CURVES = (RIGHT, WRONG, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK, FAINT)


def heat_map_figure(similarity_CxC: Float[np.ndarray, "C C"], names: Sequence[str]) -> Figure:
    """Draw the cosines of images (rows) and texts (columns), with `names` on both axes."""
    # In inches: the margin for labels, and a square for each class.
    size = 3.2 + 0.17 * len(names)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(similarity_CxC, cmap="cividis", interpolation="nearest")
    short = list(map(_short, names))
    # Class names may contain dollar signs, which matplotlib would parse as math.
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


def predictions_figure(
    images: Sequence[Image], titles: Sequence[str], guesses: Sequence[Sequence[str]]
) -> Figure:
    """Draw images in rows of four, each with a title above and lines of text below."""
    rows = math.ceil(len(images) / 4)
    figure = Figure(figsize=(8, 2.6 * rows), dpi=80)
    figure.subplots_adjust(
        left=0.02, right=0.98, top=1 - 0.25 / rows, bottom=0.45 / rows, hspace=0.6
    )
    for i, (image, title, lines) in enumerate(zip(images, titles, guesses, strict=True), start=1):
        axes = figure.add_subplot(rows, 4, i)
        axes.imshow(np.asarray(image))
        axes.set_axis_off()
        axes.set_title(_short(title), size=9, parse_math=False)
        axes.text(
            *(0.5, -0.04, "\n".join(map(_short, lines))),
            size=8,
            color=FAINT,
            ha="center",
            va="top",
            transform=axes.transAxes,
            parse_math=False,
        )
    return figure


def _short(name: str) -> str:
    """Return a name for a place that has room for 24 characters."""
    shown = printable(name)
    return shown if len(shown) <= 24 else f"{shown[:23]}…"


def curves_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw loss, learning rate and, if there are any at several steps, evaluations over the steps.

    Args:
        rows: the rows of metrics.jsonl, of which some have losses and others evaluations.
    """
    losses = [row for row in rows if {"loss", "learning_rate"} <= row.keys()]
    headlines = _headlines(rows)
    figure = Figure(figsize=(10, 7 if headlines else 5), layout="constrained")
    heights = [3, 1.2, 2.4] if headlines else [3, 1.2]
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    steps = [row["step"] for row in losses]
    panels[0].plot(steps, [row["loss"] for row in losses], color=RIGHT, linewidth=1.8)
    panels[0].set_ylabel("loss")
    panels[1].plot(steps, [row["learning_rate"] for row in losses], color=WRONG, linewidth=1.8)
    panels[1].set_ylabel("learning rate")
    for i, (name, points) in enumerate(headlines.items()):
        # More curves than colours differ in their dashes.
        color, dashes = CURVES[i % len(CURVES)], DASHES[i // len(CURVES) % len(DASHES)]
        style: Any = {"color": color, "linestyle": dashes, "marker": "o", "markersize": 3}
        panels[2].plot(*zip(*points, strict=True), **style, label=printable(name))
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


def save(figure: Figure, **options: Any) -> bytes:
    """Return the file that `Figure.savefig` writes with these options."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        # Matplotlib's own fonts lack many scripts. In SVG they only measure the texts.
        warnings.filterwarnings("ignore", "Glyph .* missing|Matplotlib currently does not support")
        figure.savefig(content, **options)
    return content.getvalue()


def _headlines(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return the main metrics of the evaluations at several steps: name -> list of (step, percent)."""
    ends = ("/top1", "/image_to_text_recall_at_1", "/text_to_image_recall_at_1")
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name.endswith(ends):
                points.setdefault(name, []).append((row["step"], 100 * value))
    return {name: of_name for name, of_name in points.items() if len(of_name) > 1}
