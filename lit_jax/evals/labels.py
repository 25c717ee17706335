"""Which class each example has: from the labels of the data to positions in a list of classes."""

import collections
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from lit_jax.config_keys import nearest
from lit_jax.data.example import BadSampleError, Source, usable_label
from lit_jax.errors import UserError
from lit_jax.evals.classes import Classes

log = logging.getLogger(__name__)

# What `labels` of an evaluation says where the data's labels, sorted, are those of the classes in order.
SORTED, AS_TEXT, AS_NUMBERS = "sorted", "sorted_as_text", "sorted_as_numbers"
_INTEGER = re.compile(r"([+-]?[0-9]+)(\.0*)?")  # "7", "007", "-1", and "7.0" as pandas writes it
_SHOWN = 3  # pairs of label and class in the log


class Labels:
    """The labels of all examples of a source; an example that cannot be read has none.

    Raises UserError at an example without a label, and if no example can be read.

    Attributes:
        of_example: position in the source -> (key of the example, label).
        are_folders: whether the labels are the names of folders.
    """

    def __init__(self, source: Source):
        self.of_example: dict[int, tuple[str, str]] = {}
        self.are_folders = False
        first_bad = None
        for i in range(len(source)):
            try:
                example = source[i]
            except BadSampleError as reason:
                first_bad = first_bad or reason
                continue
            try:
                label = usable_label(example)
            except BadSampleError as reason:  # its image may be good: nothing else would name it
                key = example["key"]
                log.warning("Bad sample %s is left out of the evaluation: %s.", key, reason)
                first_bad = first_bad or reason
                continue
            if label is None:
                raise UserError(
                    f"The example {example['key']} has no label, and classification needs one; "
                    "give the data's label key."
                )
            self.of_example[i] = example["key"], label
            self.are_folders |= example.get("label_is_folder", False)
        if first_bad and not self.of_example:
            raise UserError(
                f"None of the {len(source)} examples of an evaluation can be read; the first: {first_bad}."
            )
        self.found = {label for _, label in self.of_example.values()}
        self._size = len(source)

    def positions(
        self, known: Sequence[str], refusal: Callable[[str, str], str]
    ) -> Int[np.ndarray, " N"]:
        """Return the position in `known` of each example's label; -1 of one that cannot be read.

        Args:
            refusal: from key and label of an example, what to say if `known` has not its label.
        """
        same = one_spelling([*known, *self.found])
        if len({same[label] for label in known}) < len(known):  # "1" and "01" are told apart
            same = {label: label for label in same}
        ids = {same[label]: i for i, label in enumerate(known)}
        label_N = np.full(self._size, -1, np.int32)
        for i, (key, label) in self.of_example.items():
            if same[label] not in ids:
                raise UserError(refusal(key, label))
            label_N[i] = ids[same[label]]
        return label_N


def integer(label: str) -> int | None:
    """Return the whole number that a label is, None if it is none."""
    match = _INTEGER.fullmatch(label)
    return int(match[1]) if match else None


def one_spelling(labels: Iterable[str]) -> Mapping[str, str]:
    """Return for each label the one text that stands for all its spellings.

    If all labels are whole numbers, "7", "007" and "7.0" are one label; else each stands for itself.
    """
    numbers = {label: integer(label) for label in labels}
    if any(number is None for number in numbers.values()):
        return {label: label for label in numbers}
    return {label: str(number) for label, number in numbers.items()}


def label_ids(source: Source, classes: Classes, *, order: str = "given") -> Int[np.ndarray, " N"]:
    """Return the class of each example as its position in `classes`; -1 of one that cannot be read.

    A label is what `classes.labels` lists, or else a class name or, if it is a number, a position from 0.

    Args:
        order: `labels` of an evaluation's config.

    Raises UserError at an example without a label, or with one that is not in the class list.
    """
    labels = Labels(source)
    known = (
        _given(labels.found, classes)
        if order == "given"
        else _sorted(labels.found, classes, order, are_folders=labels.are_folders)
    )
    label_N = labels.positions(
        known, lambda key, label: _refusal(key, label, labels, known, classes)
    )
    if tuple(known) != classes.names:
        pairs = list(zip(known, classes.names, strict=True))[:_SHOWN]
        log.info(
            "Labels and classes: %s ...",
            ", ".join(f"{label} is {name!r}" for label, name in pairs),
        )
    return label_N


def _given(found: Collection[str], classes: Classes) -> Sequence[str]:
    """Return what the data calls the classes, in their order, where nobody says that sorting gives it."""
    same = one_spelling([*found, *classes.names])
    are_names = {same[label] for label in found} <= {same[name] for name in classes.names}
    if classes.labels:
        same = one_spelling([*found, *classes.labels])
        are_labels = {same[label] for label in found} <= {same[label] for label in classes.labels}
        if are_labels or not are_names:
            return classes.labels
    if not are_names and all(integer(label) is not None for label in found):
        return [str(i) for i in range(len(classes.names))]
    name, times = collections.Counter(classes.names).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"{name!r} is {times} times among the classes, and the data's labels are names; "
            'say which is which by "labels" in the class file, or by --labels=sorted (labels="sorted" in a '
            "config)."
        )
    return classes.names


def _sorted(
    found: Collection[str], classes: Classes, order: str, *, are_folders: bool
) -> Sequence[str]:
    """Return the labels of the data in the order that `order` names.

    Raises UserError unless there are as many as classes, and if folders have one order as text and another
    as numbers, and nobody says which.
    """
    as_text = sorted(found)
    numbers = {label: number for label in as_text if (number := integer(label)) is not None}
    all_numbers = len(numbers) == len(as_text)
    if order == AS_NUMBERS and not all_numbers:
        (odd, *_) = (label for label in as_text if label not in numbers)
        raise UserError(
            f"The label {odd!r} is no whole number, so labels cannot be {AS_NUMBERS!r}; take {AS_TEXT!r}."
        )
    ranked = as_text
    if all_numbers and order != AS_TEXT:
        if are_folders and order == SORTED and (two := _two_orders(found)):
            raise UserError(f"{two} (labels in a config).")
        ranked = [str(number) for number in sorted(set(numbers.values()))]
    if len(ranked) != len(classes.names):
        raise UserError(
            f"The data has {len(ranked)} different labels but the class file {len(classes.names)} "
            "classes; to put them in order by sorting, there must be equally many."
        )
    return ranked


def _two_orders(folders: Collection[str]) -> str:
    """Return what to choose between if folders whose names are numbers have two orders, else ''."""
    as_text, as_numbers = sorted(folders), sorted(folders, key=lambda label: integer(label) or 0)
    if as_text == as_numbers:
        return ""
    return (
        f"The class folders are {_few(as_numbers)} in the order of their numbers, and {_few(as_text)} in "
        "that of text, which torchvision's ImageFolder takes; say which is that of the classes by "
        f"--labels={AS_NUMBERS} or --labels={AS_TEXT}"
    )


def _few(labels: Sequence[str]) -> str:
    return ", ".join(labels[:4]) + (" ..." if len(labels) > 4 else "")


def _refusal(key: str, label: str, labels: Labels, known: Sequence[str], classes: Classes) -> str:
    if integer(label) is None or classes.labels or tuple(known) == classes.names:
        return (
            f"The example {key} has the label {label!r}, which the class file does not list; "
            f"{nearest(label, known)}."
        )
    count = len(classes.names)
    numbers = {number for text in labels.found if (number := integer(text)) is not None}
    if len(numbers) != count:
        remedy = (
            "correct the data or the class file, or list in the class file the label of each class, as "
            '"labels"'
        )
    elif labels.are_folders and (two := _two_orders(labels.found)):
        remedy = two[0].lower() + two[1:]
    else:
        remedy = (
            f"give --labels={SORTED} (labels={SORTED!r} in a config) if the labels {min(numbers)} to "
            f"{max(numbers)}, in their order, are the classes"
        )
    return (
        f"The example {key} has the label {label}, out of the range of the {count} classes, 0 to "
        f"{count - 1}; {remedy}."
    )
