"""The names of classes and the sentences about them, from files; the class of each example."""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from lit_jax.config import EvalConfig
from lit_jax.config_keys import nearest
from lit_jax.data.example import BadSampleError, Source
from lit_jax.errors import UserError
from lit_jax.files import parse_json

PLACEHOLDER = re.compile(r"\{c?\}")
SORTED = "sorted"  # what `labels` says where the data's labels, sorted, are the classes in order

# Where neither file has templates: short sentences from near and far, of photographs and of what is none.
DEFAULT_TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "en": (
        "{}",
        "a photo of {}",
        "this picture shows {}",
        "{}, seen from close by",
        "{}, far away and small",
        "a dark and blurred photo of {}",
        "a drawing of {}",
        "one of many kinds of {}",
    ),
}
BARE_NAME = ("{}",)  # in any other language


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classes:
    """The names of C classes, and T templates: sentences with '{}' or '{c}' in the name's place.

    Attributes:
        prompts: of each class, sentences of its own in the place of the templates.
        labels: what the data set calls the classes, in the same order; if empty, by these names or by
            their positions in them.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...] = ()
    prompts: tuple[tuple[str, ...], ...] = ()
    labels: tuple[str, ...] = ()

    def texts(self) -> list[tuple[str, ...]]:
        """The sentences about each class."""
        return list(self.prompts) or [
            tuple(fill(template, name) for template in self.templates) for name in self.names
        ]


def fill(template: str, name: str) -> str:
    return PLACEHOLDER.sub(lambda _: name, template)  # a name may contain \1


def load_classes(config: EvalConfig, name: str, language: str = "en") -> Classes:
    """Reads the class file of an evaluation, and its template file if there is one.

    Each is `{"classnames": [...], "templates": [...], "labels": [...]}`, of which a class file needs the
    first, or in CLIP_benchmark's layout, a list for each data set: of names, `{"pets": ["Bengal", ...]}`, in
    one file, of templates, or for each class of sentences, in the other.

    Args:
        name: of the evaluation; finds the data set in files of many if `config.dataset` does not.

    Raises UserError if a file is missing or not of this form, if a template has no place for a name, if a
    class is empty, or if classes cannot be told apart.
    """
    path = (config.classes or "").replace("{language}", language)
    if not path:
        raise UserError(f"config.evals.{name}.classes is missing; give the path of a class file.")
    dataset = config.dataset or name
    content = _read(path)
    own_form = "classnames" in content
    if own_form or "templates" in content:
        names = _strings(content, "classnames", path)
        labels = _strings(content, "labels", path) if "labels" in content else ()
        _check_labels(names, labels, path)
    else:
        names, labels = _strings(content, _dataset(content, dataset, path), path), ()
    template_path = (config.templates or "").replace("{language}", language)
    if template_path:
        given = _of_template_file(_read(template_path), dataset, template_path)
    elif own_form and "templates" in content:
        given = _strings(content, "templates", path)
    else:
        given = DEFAULT_TEMPLATES.get(language, BARE_NAME)
    if isinstance(given, Mapping):
        missing = [name for name in names if name not in given]
        if missing:
            raise UserError(
                f"{template_path} has no sentences for the class {missing[0]!r} of {path}; give it some."
            )
        return Classes(
            names=names,
            labels=labels,
            prompts=tuple(_strings(given, name, template_path) for name in names),
        )
    _check_templates(given, template_path or path)
    return Classes(names=names, templates=given, labels=labels)


def label_ids(
    source: Source, classes: Classes, *, order: str | None = None
) -> Int[np.ndarray, " N"]:
    """The class of each example, as its position in `classes`; -1 of one that cannot be read.

    A label is what `classes.labels` lists, or else a class name or, if it is a number, a position from 0.

    Args:
        order: 'sorted' if the data's labels, sorted, are those of the classes in order.

    Raises UserError at an example without a label, or with one that is not in the class list.
    """
    labels = {i: found for i in range(len(source)) if (found := label_of(source, i))}
    known = _known_labels(classes, {label for _, label in labels.values()}, order)
    ids = {label: i for i, label in enumerate(known)}
    label_N = np.full(len(source), -1, np.int32)
    for i, (key, label) in labels.items():
        if label not in ids:
            raise UserError(_unknown_label(key, label, classes, ids))
        label_N[i] = ids[label]
    return label_N


def label_of(source: Source, index: int) -> tuple[str, str] | None:
    """Key and label of an example; None of one that cannot be read, whose image is left out, too."""
    try:
        example = source[index]
    except BadSampleError:
        return None
    if example["label"] is None:
        raise UserError(
            f"The example {example['key']} has no label, and classification needs one; "
            "give the data's label key."
        )
    return example["key"], example["label"]


def _known_labels(classes: Classes, found: set[str], order: str | None) -> Sequence[str]:
    """What the data calls the classes, in their order."""
    if order == SORTED:
        if len(found) != len(classes.names):
            raise UserError(
                f"The data has {len(found)} different labels but the class file {len(classes.names)} "
                "classes; to put them in order by sorting, there must be equally many."
            )
        return sorted(found)
    if classes.labels:
        return classes.labels
    if found - set(classes.names) and all(label.isdecimal() for label in found):
        return [str(i) for i in range(len(classes.names))]
    name, times = collections.Counter(classes.names).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"{name!r} is {times} times among the classes, and the data's labels are names; "
            'say which is which by "labels", or by labels="sorted".'
        )
    return classes.names


def _unknown_label(key: str, label: str, classes: Classes, ids: Mapping[str, int]) -> str:
    if label.isdecimal() and "0" in ids and not classes.labels:
        return (
            f"The example {key} has the label {label}, out of the range of the {len(ids)} classes, "
            f"0 to {len(ids) - 1}; correct the data or the class file."
        )
    return (
        f"The example {key} has the label {label!r}, which the class file does not list; "
        f"{nearest(label, ids)}."
    )


def _read(path: str) -> dict[str, Any]:
    try:
        content = parse_json(pathlib.Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"The class file {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"The class file {path} is not JSON in UTF-8: {error}.") from error
    if not isinstance(content, dict) or not content:
        raise UserError(_form(path, "classnames"))
    return content


def _form(path: str, key: str) -> str:
    return (
        f'The class file {path} must be {{"classnames": [...], "templates": [...]}}, '
        f"or a list for each data set, and {key!r} a list of one text or more."
    )


def _strings(content: Mapping[str, Any], key: str, path: str) -> tuple[str, ...]:
    value = content.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise UserError(_form(path, key))
    if any(not text.strip() for text in value):
        raise UserError(f"{key!r} of {path} has an empty text; remove it, or name the class.")
    return tuple(value)


def _dataset(content: Mapping[str, Any], name: str, path: str, default: str = "") -> str:
    """The key of a data set: its name, what stands behind the last '/' of it, or the only one."""
    for key in (name, name.rpartition("/")[2], *([*content] if len(content) == 1 else []), default):
        if key in content:
            return key
    raise UserError(
        f"{path} has no data set {name!r}; set dataset to one of it ({nearest(name, content)})."
    )


def _of_template_file(
    content: dict[str, Any], dataset: str, path: str
) -> tuple[str, ...] | Mapping[str, Any]:
    if "templates" in content:
        return _strings(content, "templates", path)
    # CLIP_benchmark, too, takes ImageNet's for data sets that have none of their own.
    key = _dataset(content, dataset, path, default="imagenet1k")
    return content[key] if isinstance(content[key], dict) else _strings(content, key, path)


def _check_templates(templates: Sequence[str], path: str) -> None:
    for template in templates:
        if not PLACEHOLDER.search(template):
            raise UserError(
                f"The template {template!r} in {path} needs '{{}}' or '{{c}}' where the name goes."
            )


def _check_labels(names: Sequence[str], labels: Sequence[str], path: str) -> None:
    """Raises UserError unless the labels, or without labels the names, tell the classes apart."""
    if labels and len(labels) != len(names):
        raise UserError(
            f"{path} has {len(names)} classnames but {len(labels)} labels; give one each."
        )
    key = "labels" if labels else "classnames"
    value, times = collections.Counter(labels or names).most_common(1)[0]
    if times > 1:
        raise UserError(f"{value!r} is {times} times among the {key} of {path}; each must differ.")
