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
    # No image, or none where it should be.
    "missing",
    # 0 bytes.
    "empty",
    # A file of another type.
    "not_image",
    # Truncated, or broken in another way.
    "damaged",
    # A decompression bomb.
    "too_large",
    "no_caption",
    "not_utf8",
    # A tar's member that is a link, or whose name leads out of the folder.
    "hostile_path",
    # A line or row that does not say what it should.
    "no_example",
]
BAD_KINDS: tuple[BadKind, ...] = get_args(BadKind)


class Example(TypedDict):
    """One image with what is known about it, or captions alone."""

    # Names the example in messages and reports.
    key: str
    # A file here or in an object store, its content, or pixels: uint8 HxWx3.
    image: File | bytes | np.ndarray | None
    captions: tuple[str, ...]
    # The language of each caption, where it is known.
    languages: NotRequired[tuple[str, ...] | None]
    # The languages of captions that were not wanted, if the example has no others.
    left_out: NotRequired[tuple[str, ...]]
    # The weight with which each caption is sampled; without weights all are sampled alike.
    caption_weights: NotRequired[tuple[float, ...]]
    # The content of the captions in the language of a text teacher.
    teacher_caption: NotRequired[str | None]
    # The name of its class.
    label: str | None
    # True if the label is the name of the folder that the image is in.
    label_is_folder: NotRequired[bool]
    # Why the label that is there cannot be used; a task without labels does not mind.
    label_problem: NotRequired[str]


class BadSampleError(Exception):
    """One example cannot be used; the run goes on without it. Its text is the reason, in a few words."""

    def __init__(self, reason: str, kind: BadKind = "damaged"):
        super().__init__(reason)
        self.kind: BadKind = kind


@runtime_checkable
class Source(Protocol):
    """A data set as a sequence; reading an image may wait until the image is decoded.

    An example that cannot be read raises BadSampleError.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


def usable_label(example: Example) -> str | None:
    """Return the label. Raise BadSampleError if there is one that cannot be used."""
    if problem := example.get("label_problem"):
        raise BadSampleError(problem, "no_example")
    return example["label"]


def usable_captions(example: Example) -> list[str]:
    """Return the captions that are not blank. Raise BadSampleError if all are."""
    return [text for text, _ in _weighted_captions(example)]


def sample_caption(example: Example, rng: np.random.Generator) -> str:
    """Return a random one of `usable_captions`, by their weights. Raise BadSampleError if there is none."""
    return usable_captions(example)[sample_caption_index(example, rng)]


def sample_caption_index(example: Example, rng: np.random.Generator) -> int:
    """Return the position of a random one of `usable_captions`. Raise BadSampleError if there is none."""
    weights = [weight for _, weight in _weighted_captions(example)]
    if len(set(weights)) == 1:
        return int(rng.integers(len(weights)))
    return int(rng.choice(len(weights), p=np.divide(weights, sum(weights))))


def _weighted_captions(example: Example) -> list[tuple[str, float]]:
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
                f"The template {template!r} has no place for the label; write {{}} where it is to stand."
            )
    if config.languages and not any(config.languages.values()):
        raise UserError(
            f"The languages {', '.join(config.languages)} all have the weight 0, so there would be no "
            "caption; give those that you want a number above 0."
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
        if self.templates and not any(map(str.strip, example["captions"])):
            example = _with_captions_from_templates(example, self.templates)
        return example


def _in_languages(example: Example, wanted: Mapping[str, float]) -> Example:
    """Return the example with its captions in the wanted languages, of which it may have none.

    A language is sampled as often as its weight says, and within it all captions alike. Raises UserError if
    the languages of the captions are not known.
    """
    languages = example.get("languages")
    if languages is None:
        if not example["captions"]:
            return example
        raise UserError(
            f"Nothing says in which language the captions of {example['key']} are; leave out the languages "
            'of this source (--eval.languages), or give captions as {"en": [...], "de": [...]}.'
        )
    kept = [
        (text, language)
        for text, language in zip(example["captions"], languages, strict=True)
        if text.strip() and wanted.get(language)
    ]
    counts = Counter(language for _, language in kept)
    if not kept:
        written = zip(example["captions"], languages, strict=True)
        left_out = dict.fromkeys(language for text, language in written if text.strip())
        example = {**example, "left_out": tuple(left_out)} if left_out else example
    return {
        **example,
        "captions": tuple(text for text, _ in kept),
        "languages": tuple(language for _, language in kept),
        # Divided by their number: a language with many captions is not sampled more often for it.
        "caption_weights": tuple(wanted[language] / counts[language] for _, language in kept),
    }


def _with_captions_from_templates(example: Example, templates: tuple[str, ...]) -> Example:
    """Return the example with a caption from each template, if it has a label to put there.

    Raises BadSampleError if its label cannot be used.
    """
    label = usable_label(example)
    if not label:
        return example
    captions = tuple(template.replace("{}", label) for template in templates)
    return {**example, "captions": captions, "languages": None, "caption_weights": ()}
