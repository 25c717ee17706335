"""The evaluations in a config: opened and checked before training, and run at any time."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_jax.config import EvalConfig, SourceConfig
from lit_jax.data.example import Source
from lit_jax.data.listing import shown
from lit_jax.data.sources import open_source
from lit_jax.data.text_check import check_texts, sample_captions, some
from lit_jax.display import printable
from lit_jax.errors import UserError
from lit_jax.evals import probe
from lit_jax.evals.cache import EmbeddingCache
from lit_jax.evals.classes import Classes, load_classes
from lit_jax.evals.encode import Encoder, Params
from lit_jax.evals.labels import Labels, label_ids
from lit_jax.evals.retrieval import RetrievalResult, captions_of, evaluate_retrieval
from lit_jax.evals.zero_shot import ZeroShotResult, zero_shot

log = logging.getLogger(__name__)

# The language of class files and templates if the config names none.
DEFAULT_LANGUAGE = "en"

Metrics = dict[str, float]
Result = ZeroShotResult | RetrievalResult | None
_LabelsOf = Callable[[Source], Labels]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedEval:
    """An evaluation in one language, whose data and classes have been read and checked."""

    # The prefix of the metrics' names: "zero_shot/pets", "zero_shot/pets/de".
    name: str
    # The key in config.evals.
    key: str
    config: EvalConfig
    language: str
    source: Source
    # None unless the kind is zero_shot.
    classes: Classes | None
    measure: Callable[[Encoder, Params], tuple[Metrics, Result]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The outcome of an evaluation."""

    prepared: PreparedEval
    metrics: Metrics
    # The data for reports; None for probes.
    result: Result


def open_evals(evals: Mapping[str, EvalConfig]) -> list[PreparedEval]:
    """Open the data and class files of all `evals`, and check that they fit each other.

    Raises UserError for mistakes that would otherwise end an evaluation in the middle of a training run.
    """
    # Evaluations of the same data share a source object, so that its images are embedded only once.
    sources: dict[tuple[str, bool], Source] = {}

    def source_of(
        config: SourceConfig, language: str, *, labelled: bool = True, captions: bool = False
    ) -> Source:
        """Open a source in a language. With `captions` only the captions in that language are kept."""
        if captions and "{language}" not in config.path:
            config = dataclasses.replace(config, languages={language: 1.0})
        config = dataclasses.replace(config, path=config.path.replace("{language}", language))
        key, other = (repr(config), labelled), (repr(config), not labelled)
        if key not in sources:
            source = open_source(config, labelled=labelled)
            # Grouping by labels can only split images further, so equally many examples are the same ones.
            same = config.max_examples is None and len(sources.get(other, ())) == len(source)
            sources[key] = sources[other] if same else source
        return sources[key]

    labels_of = _read_once()
    prepared = []
    for key, config in evals.items():
        _check(key, config)
        for language in config.languages or (DEFAULT_LANGUAGE,):
            # The language is part of the name only if there are several.
            parts = [config.kind, key, *([language] if len(config.languages) > 1 else [])]
            captions = config.kind == "retrieval" and bool(config.languages)
            labelled = config.kind != "retrieval"
            source = source_of(config.data, language, labelled=labelled, captions=captions)
            classes = load_classes(config, key, language) if config.kind == "zero_shot" else None
            train = source_of(config.train, language) if config.kind in _TRAINED else None
            prepared.append(
                PreparedEval(
                    name="/".join(parts),
                    key=key,
                    config=config,
                    language=language,
                    source=source,
                    classes=classes,
                    measure=_OPEN[config.kind](config, language, source, classes, train, labels_of),
                )
            )
    return prepared


def _read_once() -> _LabelsOf:
    """Return a function that returns the labels of a source, and reads them only at the first call."""
    labels: dict[int, Labels] = {}

    def labels_of(source: Source) -> Labels:
        if id(source) not in labels:
            labels[id(source)] = Labels(source)
        return labels[id(source)]

    return labels_of


def _check(key: str, config: EvalConfig) -> None:
    """Raise UserError if keys that are valid on their own do not fit together."""
    name, languages = f"config.evals.{key}", config.languages
    if config.kind == "few_shot" and not config.shots:
        raise UserError(f"{name} has shots=(); give at least one number.")
    if not all(languages) or len(set(languages)) < len(languages):
        raise UserError(
            f"{name}.languages is {','.join(languages)!r}; name each language once, as in 'en,de'."
        )
    paths = (config.data.path, config.train.path, config.classes, config.templates)
    named = any("{language}" in (path or "") for path in paths)
    if len(languages) > 1 and config.kind != "retrieval" and not named:
        raise UserError(
            f"{name} has the languages {', '.join(languages)}, but nothing differs between them; write "
            "{language} for the language in the path of the class file, the templates or the data."
        )


def check_tokens(prepared: Sequence[PreparedEval], tokenizer: Any) -> None:
    """Log token statistics of the evaluations' texts. Raise UserError if all tokens of one are unknown."""
    for task in prepared:
        if task.classes is not None:
            prompts = [text for of_class in task.classes.texts() for text in of_class]
            check_texts(tokenizer, some(prompts), task.name)
        elif task.config.kind == "retrieval":
            check_texts(tokenizer, sample_captions(task.source)[0], task.name)


def run(
    prepared: Sequence[PreparedEval],
    encoder: Encoder,
    params: Params,
    *,
    cache: Path | None = None,
) -> list[Evaluation]:
    """Run the evaluations in order, each with its own batch size.

    Images and texts that several evaluations share are embedded once.

    Args:
        cache: a folder that keeps embeddings for later commands.
    """
    # A new cache in each call, because a cache belongs to one set of parameters.
    embedded = EmbeddingCache(cache)
    done = []
    for task in prepared:
        # The copy shares the module and with it the compiled programs.
        own = dataclasses.replace(encoder, batch_size=task.config.batch_size, cache=embedded)
        metrics, result = task.measure(own, params)
        done.append(Evaluation(prepared=task, metrics=metrics, result=result))
    return done


def flatten_metrics(evaluations: Sequence[Evaluation]) -> Metrics:
    """Return the metrics of all evaluations under flat names such as "zero_shot/unseen/top1"."""
    return {
        f"{evaluation.prepared.name}/{name}": value
        for evaluation in evaluations
        for name, value in evaluation.metrics.items()
    }


def table(metrics: Metrics) -> str:
    """Return a text with one line for each metric: its name and its value."""
    width = max(map(len, metrics), default=0)
    return "\n".join(f"{name:{width}}  {value:8.4g}" for name, value in metrics.items())


Measure = Callable[[Encoder, Params], tuple[Metrics, Result]]


def _open_zero_shot(
    config: EvalConfig, _: str, source: Source, classes: Classes, __: None, labels_of: _LabelsOf
) -> Measure:
    label_N = label_ids(labels_of(source), classes, order=config.labels)
    used = {*label_N.tolist()}
    unused = [printable(name) for i, name in enumerate(classes.names) if i not in used]

    def measure(encoder: Encoder, params: Params) -> tuple[Metrics, Result]:
        if unused:
            log.info(
                "%d of the %d classes have no image: %s.",
                len(unused),
                len(classes.names),
                shown(unused),
            )
        result = zero_shot(encoder, params, source, classes, label_N)
        return result.metrics, result

    return measure


def _open_retrieval(config: EvalConfig, language: str, source: Source, *_: Any) -> Measure:
    captions = captions_of(source, language)

    def measure(encoder: Encoder, params: Params) -> tuple[Metrics, Result]:
        result = evaluate_retrieval(encoder, params, source, captions)
        return result.metrics, result

    return measure


def _open_probe(
    config: EvalConfig, _: str, source: Source, __: None, train: Source, labels_of: _LabelsOf
) -> Measure:
    # Checked here with all images, so that a mistake shows before training, and again by the probe itself
    # without the images that cannot be decoded.
    label_N, test_label_M = probe.class_ids(labels_of(train), labels_of(source))
    probe.check_counts(label_N, config.shots if config.kind == "few_shot" else ())

    def measure(encoder: Encoder, params: Params) -> tuple[Metrics, Result]:
        learn = probe.features(encoder, params, train, label_N)
        test = probe.features(encoder, params, source, test_label_M)
        if config.kind == "few_shot":
            return probe.few_shot(learn, test, shots=config.shots, draws=config.draws), None
        return probe.linear_probe(learn, test), None

    return measure


_OPEN = {
    "zero_shot": _open_zero_shot,
    "retrieval": _open_retrieval,
    "linear_probe": _open_probe,
    "few_shot": _open_probe,
}
_TRAINED = ("linear_probe", "few_shot")
