"""What a source's config makes of its examples: which of them, and which captions they have."""

import dataclasses
from collections import Counter
from collections.abc import Mapping

from lit_jax.config import SourceConfig
from lit_jax.data.example import Example, Source, usable_label
from lit_jax.errors import UserError


def choose(source: Source, config: SourceConfig) -> Source:
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
    return _Chosen(
        source=source,
        count=min(len(source), config.max_examples or len(source)),
        languages=config.languages,
        templates=config.templates,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chosen:
    source: Source
    count: int
    languages: Mapping[str, float]
    templates: tuple[str, ...]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        example = self.source[range(self.count)[index]]
        if self.languages:
            example = in_languages(example, self.languages)
        if self.templates and not any(map(str.strip, example["captions"])):
            example = from_templates(example, self.templates)
        return example


def in_languages(example: Example, wanted: Mapping[str, float]) -> Example:
    """Return the example with its captions in the wanted languages.

    A language is drawn as often as its weight says, and then each of its captions alike.

    Without any it has no captions. Raises UserError if the languages of its captions are not known.
    """
    languages = example.get("languages")
    if languages is None:
        if not example["captions"]:
            return example
        raise UserError(
            f"Nothing says in which language the captions of {example['key']} are; leave out the languages "
            'of this source (--languages), or give captions as {"en": [...], "de": [...]}.'
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
        "caption_weights": tuple(wanted[language] / counts[language] for _, language in kept),
    }


def from_templates(example: Example, templates: tuple[str, ...]) -> Example:
    """Return the example with a caption of each template, which its label stands in, if it has a label.

    Raises BadSampleError if its label cannot be used.
    """
    label = usable_label(example)
    if not label:
        return example
    captions = tuple(template.replace("{}", label) for template in templates)
    return {**example, "captions": captions, "languages": None, "caption_weights": ()}
