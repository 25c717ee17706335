"""Map the labels of a data set to positions in a list of classes."""

import collections
import logging
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from lit_jax.config_schema import nearest
from lit_jax.data.example import BadSampleError, Source, usable_label
from lit_jax.display import printable
from lit_jax.errors import UserError
from lit_jax.evals.classes import Classes, integer

log = logging.getLogger(__name__)

# The values of an evaluation's key `labels` for which the data's sorted labels are in the classes' order.
SORTED, AS_TEXT, AS_NUMBERS = "sorted", "sorted_as_text", "sorted_as_numbers"
# The number of pairs of label and class in the log.
_SHOWN = 3
# The label that `datasets`, TFDS and others give to examples without a label.
UNLABELLED = -1
_KEY = "the data's label key (--eval.data.label_key, or label_key in a config)"


class Labels:
    """The labels of all examples of a source; an example that cannot be read has no label.

    Raises UserError if no example has a label.

    Attributes:
        of_example: position in the source -> (key of the example, label).
        found: the set of all labels.
        are_folders: whether the labels are the names of folders.
    """

    def __init__(self, source: Source):
        self.of_example: dict[int, tuple[str, str]] = {}
        self.are_folders = False
        self._size = len(source)
        # Position -> key of the examples without a label, and whether their number is logged already, since
        # several evaluations may ask for the positions.
        self._without: dict[int, str] = {}
        self._told = False
        problems: list[BadSampleError] = []
        for i in range(len(source)):
            try:
                example = source[i]
            except BadSampleError as reason:
                problems.append(reason)
                continue
            try:
                label = usable_label(example)
            # Its image may be good, so that no later message would name the example.
            except BadSampleError as reason:
                key = example["key"]
                log.warning("Bad sample %s is left out of the evaluation: %s.", key, reason)
                problems.append(reason)
                continue
            if label is None:
                self._without[i] = example["key"]
                continue
            self.of_example[i] = example["key"], label
            self.are_folders |= example.get("label_is_folder", False)
        # Without a usable label the first problem is the best hint.
        if problems and not self.of_example:
            rest = f", and the others have no label ({_KEY})" if self._without else ""
            raise UserError(
                f"None of the {self._size} examples of an evaluation can be used: {len(problems)} cannot be "
                f"read{rest}; the first: {problems[0]}."
            )
        if not self.of_example:
            raise self._unlabelled()
        self.found = {label for _, label in self.of_example.values()}

    def positions(
        self, known: Sequence[str], refusal: Callable[[str, str], str]
    ) -> Int[np.ndarray, " N"]:
        """Return the position in `known` of each example's label, int32, or -1 for an example without one.

        Examples without a label are counted in the log. The label -1 counts as missing unless `known`
        contains it.

        Args:
            refusal: (key, label) of an example -> the message if `known` does not contain the label.

        Raises UserError with that message, or if no example has a label.
        """
        same = one_spelling([*known, *self.found])
        # If `known` contains both "1" and "01", they are different classes.
        if len({same[label] for label in known}) < len(known):
            same = {label: label for label in same}
        ids = {same[label]: i for i, label in enumerate(known)}
        label_N = np.full(self._size, -1, np.int32)
        minus_one = {}
        for i, (key, label) in self.of_example.items():
            if same[label] in ids:
                label_N[i] = ids[same[label]]
            elif integer(label) == UNLABELLED:
                minus_one[i] = key
            else:
                raise UserError(refusal(key, label))
        if (label_N < 0).all():
            raise self._unlabelled()
        self._tell(self._without | minus_one, " (-1 stands for none)" if minus_one else "")
        return label_N

    def _tell(self, without: Mapping[int, str], why: str) -> None:
        if without and not self._told:
            log.warning(
                "%d of %d examples have no label%s and are left out, for example %s.",
                len(without),
                self._size,
                why,
                printable(without[min(without)]),
            )
            self._told = True

    def _unlabelled(self) -> UserError:
        return UserError(
            f"None of the {self._size} examples of an evaluation has a label, and classification needs one; "
            f"set {_KEY}."
        )


def without_minus_one(labels: Iterable[str]) -> list[str]:
    """Return the labels without -1, which often stands for a missing label."""
    return [label for label in labels if integer(label) != UNLABELLED]


def one_spelling(labels: Iterable[str]) -> Mapping[str, str]:
    """Return a map from each label to a common spelling.

    If all labels are whole numbers, "7", "007" and "7.0" are the same label; otherwise blanks around a label
    do not count, nor does the Unicode normal form: macOS writes the é in the name of a folder as two
    characters.
    """
    numbers = {label: integer(label) for label in labels}
    if any(number is None for number in numbers.values()):
        return {label: unicodedata.normalize("NFC", label).strip() for label in numbers}
    return {label: str(number) for label, number in numbers.items()}


def label_ids(labels: Labels, classes: Classes, *, order: str = "given") -> Int[np.ndarray, " N"]:
    """Return the class of each example as a position in `classes`, or -1 for an example without a label.

    The data's labels are those in `classes.labels` or, without that list, class names or positions from 0.

    Args:
        order: the value of `labels` in the evaluation's config.

    Raises UserError for a label that is not in the class list.
    """
    known = (
        _given(labels.found, classes)
        if order == "given"
        else _sorted(labels.found, classes, order, are_folders=labels.are_folders)
    )
    label_N = labels.positions(
        known, lambda key, label: _refusal(key, label, labels, known, classes)
    )
    # A wrong assignment of numbers to names gives a plausible but wrong accuracy, so the log shows a few.
    if tuple(known) != classes.names:
        pairs = list(zip(known, classes.names, strict=True))[:_SHOWN]
        log.info(
            "Labels and classes: %s ...",
            ", ".join(f"{label} is {name!r}" for label, name in pairs),
        )
    return label_N


def _given(found: Collection[str], classes: Classes) -> Sequence[str]:
    """Return the data's labels of the classes, in their order, if the order is not given by sorting."""
    found = without_minus_one(found)
    same = one_spelling([*found, *classes.names])
    are_names = {same[label] for label in found} <= {same[name] for name in classes.names}
    if classes.labels:
        same = one_spelling([*found, *classes.labels])
        are_labels = {same[label] for label in found} <= {same[label] for label in classes.labels}
        # If neither fits, the labels are used, and the error names one that is missing there.
        if are_labels or not are_names:
            return classes.labels
    # Labels that are numbers, but no names of classes, are positions in the class file.
    if not are_names and all(integer(label) is not None for label in found):
        return [str(i) for i in range(len(classes.names))]
    name, times = collections.Counter(classes.names).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"{name!r} is the name of {times} classes, and the labels of the data are names; tell these "
            'classes apart with "labels" in the class file, or set --eval.labels=sorted (labels="sorted" in '
            "a config)."
        )
    return classes.names


def _sorted(
    found: Collection[str], classes: Classes, order: str, *, are_folders: bool
) -> Sequence[str]:
    """Return the labels of the data, sorted as `order` says.

    Raises UserError if their number is not that of the classes, or if folders have a different order as text
    than as numbers and `order` does not choose one.
    """
    count = len(classes.names)
    # The label -1 is a class if the number of labels equals that of the classes only with it.
    for labels in (found, without_minus_one(found)):
        ranked = _ranked(labels, order, are_folders=are_folders)
        if len(ranked) == count:
            return ranked
    raise UserError(
        f"The data has {len(ranked)} different labels, but the class file has {count} classes; give a "
        "class file with one class for each label, or set --eval.labels=given (labels in a config)."
    )


def _ranked(found: Collection[str], order: str, *, are_folders: bool) -> Sequence[str]:
    """Return the labels sorted as `order` says, one for each spelling; numbers in their common spelling."""
    spelling, first = one_spelling(found), {}
    # Labels of tables may have blanks around them. torchvision sorts the names of folders as they are.
    for label in sorted(found, key=lambda label: (label if are_folders else label.strip(), label)):
        first.setdefault(spelling[label], label)
    as_text = [*first.values()]
    numbers = {label: number for label in as_text if (number := integer(label)) is not None}
    all_numbers = len(numbers) == len(as_text)
    if order == AS_NUMBERS and not all_numbers:
        (odd, *_) = (label for label in as_text if label not in numbers)
        raise UserError(
            f"The label {odd!r} is not a whole number, so labels cannot be {AS_NUMBERS!r}; set it to "
            f"{AS_TEXT!r}."
        )
    if not all_numbers or order == AS_TEXT:
        return as_text
    # torchvision numbers folders by the order of text; other tools number them by value.
    if are_folders and order == SORTED and (two := _two_orders(found)):
        raise UserError(f"{two} (labels in a config).")
    return [str(number) for number in sorted(set(numbers.values()))]


def _two_orders(folders: Collection[str]) -> str:
    """Return a sentence about the two possible orders of folders named by numbers, or "" if they agree."""
    as_text, as_numbers = sorted(folders), sorted(folders, key=lambda label: integer(label) or 0)
    if as_text == as_numbers:
        return ""
    return (
        f"The class folders are {_few(as_numbers)} in the order of their numbers, but {_few(as_text)} in the "
        "order of text, which torchvision's ImageFolder uses; choose the order of the classes with "
        f"--eval.labels={AS_NUMBERS} or --eval.labels={AS_TEXT}"
    )


def _few(labels: Sequence[str]) -> str:
    return ", ".join(labels[:4]) + (" ..." if len(labels) > 4 else "")


def _refusal(key: str, label: str, labels: Labels, known: Sequence[str], classes: Classes) -> str:
    """Return the message about a label that is not in the class list, with the likely remedy."""
    if integer(label) is None or classes.labels or tuple(known) == classes.names:
        return (
            f"The example {key} has the label {label!r}, which the class file does not list; "
            f"{nearest(label, known)}."
        )
    count = len(classes.names)
    counted = without_minus_one(labels.found)
    numbers = {number for text in counted if (number := integer(text)) is not None}
    # Sorting can map labels to classes only if there are equally many.
    if len(numbers) != count:
        remedy = (
            'correct the data or the class file, or list the label of each class as "labels" in the class '
            "file"
        )
    elif labels.are_folders and (two := _two_orders(labels.found)):
        remedy = two[0].lower() + two[1:]
    else:
        remedy = (
            f"give --eval.labels={SORTED} (labels={SORTED!r} in a config) if the labels {min(numbers)} to "
            f"{max(numbers)} stand for the classes in this order"
        )
    return (
        f"The example {key} has the label {label}, out of the range of the {count} classes, 0 to "
        f"{count - 1}; {remedy}."
    )
