"""One example of a data set: what a source yields, and which of its captions are used."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Literal, NotRequired, Protocol, TypedDict, get_args, runtime_checkable

import numpy as np

from lit_jax.config import SourceConfig
from lit_jax.data.files import File
from lit_jax.errors import UserError

BadKind = Literal[
    # The example names no image, or names an image file that does not exist.
    "missing",
    # The image has 0 bytes.
    "empty",
    # The file is of another type.
    "not_image",
    # The image is truncated, or broken in another way.
    "damaged",
    # The image has so many pixels that it could be a decompression bomb, or the file is too large.
    "too_large",
    "no_caption",
    "not_utf8",
    # The member of a tar file is a link, or its name leads out of the folder.
    "hostile_path",
    # A line or row does not have the expected fields.
    "no_example",
]
BAD_KINDS: tuple[BadKind, ...] = get_args(BadKind)


class Example(TypedDict):
    """An image with all that is known about it, or captions alone."""

    # Names the example in messages and reports.
    key: str
    # The path of a file (local or in an object store), the file's content, or pixels: uint8 HxWx3.
    image: File | bytes | np.ndarray | None
    captions: tuple[str, ...]
    # The language of each caption, if the data set names languages.
    languages: NotRequired[tuple[str, ...] | None]
    # The languages of the captions that were dropped, if no caption is in a wanted language.
    left_out: NotRequired[tuple[str, ...]]
    # The sampling weight of each caption; without weights the captions are sampled uniformly.
    caption_weights: NotRequired[tuple[float, ...]]
    # A translation of the caption into the language of a text teacher.
    teacher_caption: NotRequired[str | None]
    # The name of the image's class.
    label: str | None
    # True if the label is the name of the image's folder.
    label_is_folder: NotRequired[bool]
    # The reason why the label cannot be used. It is not raised at once: a task without labels ignores it.
    label_problem: NotRequired[str]


class BadSampleError(Exception):
    """An example that cannot be used; the run goes on without the example.

    The error's text is the reason in a few words, and `kind` is the category in which it is counted.
    """

    def __init__(self, reason: str, kind: BadKind = "damaged"):
        super().__init__(reason)
        self.kind: BadKind = kind


@runtime_checkable
class Source(Protocol):
    """A data set as a sequence of examples. An image file may be read only when the image is decoded.

    An example that cannot be read raises BadSampleError.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


def usable_label(example: Example) -> str | None:
    """Return the label, or None without one. Raise BadSampleError if the label cannot be used."""
    if problem := example.get("label_problem"):
        raise BadSampleError(problem, "no_example")
    return example["label"]


def usable_captions(example: Example) -> list[str]:
    """Return the captions that are not blank. Raise BadSampleError if all captions are blank."""
    return [text for text, _ in _weighted_captions(example)]


def sample_caption(example: Example, rng: np.random.Generator) -> str:
    """Sample one of `usable_captions` by its weight. Raise BadSampleError if there is no caption."""
    return usable_captions(example)[sample_caption_index(example, rng)]


def sample_caption_index(example: Example, rng: np.random.Generator) -> int:
    """Sample the position of one of `usable_captions`. Raise BadSampleError if there is no caption."""
    weights = [weight for _, weight in _weighted_captions(example)]
    # Uniform weights, by far the most common case, avoid the slow path of `choice`.
    if len(set(weights)) == 1:
        return int(rng.integers(len(weights)))
    return int(rng.choice(len(weights), p=np.divide(weights, sum(weights))))


def _weighted_captions(example: Example) -> list[tuple[str, float]]:
    """Return (caption, weight) of the captions that are not blank."""
    texts = example["captions"]
    weights = example.get("caption_weights") or (1.0,) * len(texts)
    usable = [pair for pair in zip(texts, weights, strict=True) if pair[0].strip()]
    if not usable:
        others = ", ".join(example.get("left_out", ()))
        wanted = f" in a language that the config names; there are captions in {others}"
        raise BadSampleError(f"no caption{wanted if others else ''}", "no_caption")
    return usable


def select_examples(source: Source, config: SourceConfig) -> Source:
    """Return the source with `max_examples`, `languages` and `templates` of its config applied.

    Raises UserError if a template has no {} or no language a weight above 0.
    """
    for template in config.templates:
        if "{}" not in template:
            raise UserError(
                f"The template {template!r} has no place for the label; write {{}} where the label belongs."
            )
    if config.languages and not any(config.languages.values()):
        raise UserError(
            f"All languages of a source ({', '.join(config.languages)}) have the weight 0, so no caption "
            "would be used; set languages of this source to a weight above 0 for at least one of them."
        )
    if config.max_examples is None and not config.languages and not config.templates:
        return source
    return _SelectedExamples(
        source=source,
        count=min(len(source), config.max_examples or len(source)),
        languages=config.languages,
        templates=config.templates,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SelectedExamples:
    """The first `count` examples of a source, their captions filtered or made from templates."""

    source: Source
    count: int
    languages: Mapping[str, float]
    templates: tuple[str, ...]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        example = self.source[range(self.count)[index]]
        if self.languages:
            example = _in_languages(example, self.languages)
        # A template stands in for a missing caption and never replaces a written one.
        if self.templates and not any(map(str.strip, example["captions"])):
            example = _with_captions_from_templates(example, self.templates)
        return example


def _in_languages(example: Example, wanted: Mapping[str, float]) -> Example:
    """Return the example with only the captions in the wanted languages, possibly none.

    Each language is sampled by its weight, and the captions within a language uniformly.

    Raises UserError if the data set does not name the captions' languages.
    """
    languages = example.get("languages")
    if languages is None:
        if not example["captions"]:
            return example
        raise UserError(
            f"The captions of {example['key']} do not say which language they are in; leave languages of "
            'this source empty (--eval.languages), or write captions as {"en": [...], "de": [...]}.'
        )
    kept = [
        (text, language)
        for text, language in zip(example["captions"], languages, strict=True)
        if text.strip() and wanted.get(language)
    ]
    counts = Counter(language for _, language in kept)
    # The message about this bad sample can then name the languages that the example has.
    if not kept:
        written = zip(example["captions"], languages, strict=True)
        left_out = dict.fromkeys(language for text, language in written if text.strip())
        example = {**example, "left_out": tuple(left_out)} if left_out else example
    return {
        **example,
        "captions": tuple(text for text, _ in kept),
        "languages": tuple(language for _, language in kept),
        # A language's weight is divided among its captions, so that their number does not change its share.
        "caption_weights": tuple(wanted[language] / counts[language] for _, language in kept),
    }


def _with_captions_from_templates(example: Example, templates: tuple[str, ...]) -> Example:
    """Return the example with one caption for each template, or unchanged if the example has no label.

    Raises BadSampleError if the label cannot be used.
    """
    label = usable_label(example)
    if not label:
        return example
    # `str.format` would read other braces in a template as fields.
    captions = tuple(template.replace("{}", label) for template in templates)
    return {**example, "captions": captions, "languages": None, "caption_weights": ()}
