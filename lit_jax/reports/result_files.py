"""Files with the results of evaluations: CLIP_benchmark's JSON, confusions as CSV, and Markdown tables."""

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lit_jax.buckets import AnyPath
from lit_jax.display import printable
from lit_jax.evals.runner import Evaluation, Metrics
from lit_jax.evals.zero_shot import ZeroShotResult
from lit_jax.files import atomic_write, write_json

# The kind of an evaluation -> CLIP_benchmark's name of the task, which has none for few-shot learning.
TASKS = {
    "zero_shot": "zeroshot_classification",
    "retrieval": "zeroshot_retrieval",
    "linear_probe": "linear_probe",
    "few_shot": "linear_probe",
}
# Our prefix of a metric -> CLIP_benchmark's, which names retrieval by the modality that is found.
_STARTS = {"text_to_image_": "image_retrieval_", "image_to_text_": "text_retrieval_", "top": "acc"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """The evaluated model, by CLIP_benchmark's two names."""

    # The name of the model, or its folder.
    model: str
    # The name of the weights, such as "step 400".
    pretrained: str = ""

    def __str__(self) -> str:
        return f"{self.model}, {self.pretrained}" if self.pretrained else self.model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts. The first column names the rows, the other columns are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Return the table in Markdown, under its title."""
        aligned = [":--", *("--:" for _ in self.columns[1:])]
        rows = [self.columns, aligned, *self.rows]
        # A bar in a name would end its cell.
        shown = ([printable(text).replace("|", "\\|") for text in row] for row in rows)
        lines = ["| " + " | ".join(cells) + " |" for cells in shown]
        return "\n".join([f"### {printable(self.title)}", "", *lines, ""])


def write_results(
    folder: AnyPath, evaluations: Sequence[Evaluation], model: EvaluatedModel
) -> None:
    """Write the files of all evaluations into `folder`, which is created if it is missing.

    Each evaluation gets a JSON file in CLIP_benchmark's layout, and a zero-shot classification also a CSV
    file of its confusions. table.md covers all evaluations.

    Each file is complete or does not exist. Raises OSError if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for evaluation in evaluations:
        stem = evaluation.prepared.name.replace("/", "_")
        for suffix, content in clip_benchmark(evaluation, model):
            write_json(folder / f"{stem}{suffix}.json", content)
        if isinstance(evaluation.result, ZeroShotResult):
            atomic_write(folder / f"{stem}_confusion.csv", confusion_csv(evaluation))
    text = "\n".join(table.markdown() for table in tables(evaluations))
    atomic_write(folder / "table.md", f"## {printable(str(model))}\n\n{text}")


def clip_benchmark(
    evaluation: Evaluation, model: EvaluatedModel
) -> list[tuple[str, dict[str, Any]]]:
    """Return (end of the file's name, content) of each result file of an evaluation, as in CLIP_benchmark.

    An evaluation has one file, but few_shot has one file for each number of shots.
    """
    config = evaluation.prepared.config
    parts: list[tuple[str, Metrics]] = [("", evaluation.metrics)]
    if config.kind == "few_shot":
        parts = [(f"_{k}_shot", _metrics_of_shots(evaluation.metrics, k)) for k in config.shots]
    elif config.kind == "linear_probe":
        # -1 is CLIP_benchmark's number of shots for a probe on all images.
        parts = [("", evaluation.metrics | {"fewshot_k": -1})]
    head = {
        "dataset": printable(config.dataset or evaluation.prepared.key),
        "model": printable(model.model),
        "pretrained": model.pretrained,
        "task": TASKS[config.kind],
    }
    return [
        (
            suffix,
            {
                **head,
                "metrics": {_clip_benchmark_name(name): value for name, value in metrics.items()},
                "language": evaluation.prepared.language,
            },
        )
        for suffix, metrics in parts
    ]


def _metrics_of_shots(metrics: Metrics, k: int) -> Metrics:
    start = f"top1_{k}_shot"
    return {"top1": metrics[start], "top1_std": metrics[f"{start}_std"], "fewshot_k": k}


def _clip_benchmark_name(name: str) -> str:
    for ours, theirs in _STARTS.items():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    return name.replace("recall_at_", "recall@")


def confusion_csv(evaluation: Evaluation) -> str:
    """Return CSV with a line for each pair that occurs: class, predicted class, number of images."""
    assert isinstance(evaluation.result, ZeroShotResult)
    assert evaluation.prepared.classes is not None
    names = [printable(name) for name in evaluation.prepared.classes.names]
    text = io.StringIO()
    # The default ends lines with two characters, as on Windows.
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("class", "predicted", "images"))
    for truth, guess, count in evaluation.result.confusion().tolist():
        writer.writerow((names[truth], names[guess], count))
    return text.getvalue()


def percent(value: float) -> str:
    """Return a fraction as a percentage with one decimal, without the sign."""
    return f"{100 * value:.1f}"


def _plain(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


# (title, name of the metric, format of a value).
_Column = tuple[str, str, Callable[[float], str]]
_CLASSIFIED: tuple[_Column, ...] = (
    ("top-1 %", "top1", percent),
    ("top-5 %", "top5", percent),
    ("mean per class %", "mean_per_class_recall", percent),
)
_DIRECTIONS = (("image → text", "image_to_text"), ("text → image", "text_to_image"))
_COLUMNS: dict[str, tuple[_Column, ...]] = {
    "zero_shot": (*_CLASSIFIED, ("images", "n", _plain)),
    "linear_probe": (*_CLASSIFIED, ("L2", "l2", "{:.2g}".format), ("images", "n", _plain)),
    "retrieval": (
        *(
            (f"{arrow} {title}", f"{direction}_{name}", show)
            for arrow, direction in _DIRECTIONS
            for title, name, show in (
                *((f"R@{k} %", f"recall_at_{k}", percent) for k in (1, 5, 10)),
                ("mean rank", "mean_rank", _plain),
                ("median rank", "median_rank", _plain),
            )
        ),
        ("images", "images", _plain),
        ("texts", "texts", _plain),
    ),
}
_TITLES = {
    "zero_shot": "Zero-shot classification",
    "retrieval": "Retrieval",
    "linear_probe": "Linear probe",
    "few_shot": "Few-shot classification, mean ± standard deviation",
}


def tables(evaluations: Sequence[Evaluation]) -> list[Table]:
    """Return a table for each kind of evaluation, with a row for each evaluation.

    An evaluation in several languages has a table of its own, with a row for each language and a row for
    their mean.
    """
    found = []
    for kind, title in _TITLES.items():
        of_kind = [e for e in evaluations if e.prepared.config.kind == kind]
        alone = [e for e in of_kind if len(e.prepared.config.languages) <= 1]
        if alone:
            names = [e.prepared.key for e in alone]
            found.append(_table(title, "data", names, alone))
        for key in dict.fromkeys(e.prepared.key for e in of_kind if e not in alone):
            several = [e for e in of_kind if e.prepared.key == key]
            languages = [e.prepared.language for e in several]
            found.append(_table(f"{title} by language: {key}", "language", languages, several))
    return found


def _table(title: str, what: str, names: Sequence[str], evaluations: Sequence[Evaluation]) -> Table:
    if evaluations[0].prepared.config.kind == "few_shot":
        shots = sorted({k for e in evaluations for k in e.prepared.config.shots})
        columns = tuple(f"k = {k} %" for k in shots)
        cells = [[_shot_cell(e.metrics, k) for k in shots] for e in evaluations]
    else:
        known = _COLUMNS[evaluations[0].prepared.config.kind]
        # A column that no evaluation has is left out, such as top-5 for data with few classes.
        known = [column for column in known if any(column[1] in e.metrics for e in evaluations)]
        columns = tuple(title for title, _, _ in known)
        metrics = [e.metrics for e in evaluations]
        if what == "language":
            names, metrics = [*names, "mean"], [*metrics, _mean(metrics)]
        cells = [
            [show(row[name]) if name in row else "-" for _, name, show in known] for row in metrics
        ]
    rows = tuple((name, *row) for name, row in zip(names, cells, strict=True))
    return Table(title=title, columns=(what, *columns), rows=rows)


def _mean(metrics: Sequence[Metrics]) -> Metrics:
    # Languages may differ in their number of classes, and so in whether they have a top-5.
    common = set.intersection(*(set(row) for row in metrics))
    return {name: float(np.mean([row[name] for row in metrics])) for name in common}


def _shot_cell(metrics: Metrics, k: int) -> str:
    start = f"top1_{k}_shot"
    if start not in metrics:
        return "-"
    return f"{percent(metrics[start])} ± {percent(metrics[f'{start}_std'])}"
