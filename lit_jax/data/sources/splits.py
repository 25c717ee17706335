"""Recognise the splits of a data set by the names of its folders or files."""

import logging
import re
from collections.abc import Collection, Iterable, Sequence

from lit_jax.data.files import File
from lit_jax.data.listing import shown
from lit_jax.errors import UserError

log = logging.getLogger(__name__)

_TRAIN = "train(?:ing)?"
_OTHER = "val|valid|validation|eval|evaluation|dev|test|testing"
# Matches "train", "Test", "val2017", "seg_train" and "test_images", but not "train station".
_SPLIT = rf"(?:.*[-_.])?(?:{_TRAIN}|{_OTHER})(?:[-_.]?(?:[0-9]+|images|imgs|set|data|split))?"
# Matches the end of a shard's name: "-00000-of-00005.parquet".
_NUMBER_AND_ENDING = r"(^[0-9]+|[-_.][0-9]+)*([-_.]of[-_.][0-9]+)?\.\w+$"


def files_of(files: Sequence[File], split: str) -> list[File]:
    """Return the files whose names contain the split, by the strictest of three patterns with a match."""
    # From strict to loose, so that "train" chooses train-00000.tar and leaves out pre-train-00000.tar.
    name = re.escape(split)
    numbered = rf"{name}([-_.][0-9].*)?\.\w+"
    for pattern in (numbered, rf"(.*[-_.])?{numbered}", rf"(.*[-_.])?{name}[-_.].*"):
        if found := [file for file in files if re.fullmatch(pattern, file.name)]:
            return found
    return []


def is_named_in(path: str, split: str) -> bool:
    """Return whether whole words of a path are the split: "test" in "data/dev-test.csv".

    Words end at a slash, a hyphen, an underscore or a dot: "latest/a.csv" does not name the split "test".
    """
    return bool(re.fullmatch(rf"(.*[-_./])?{re.escape(split)}([-_./].*)?", path, re.DOTALL))


def in_names(files: Iterable[File]) -> set[str]:
    """Return the splits in the names of files; without a known split, the names without their number."""
    files = [*files]
    parts = {part for file in files for part in _parts(file)}
    return parts or {re.sub(_NUMBER_AND_ENDING, "", file.name) for file in files} - {""}


def require_chosen(folder: File, files: Iterable[File]) -> None:
    """Raise UserError if the names of a folder's files tell several splits apart.

    Together they would mix training and test data. If some files name a split and others none, a warning says
    that all of them are read.
    """
    found = [tuple(_parts(file)) for file in files]
    of_files = {parts for parts in found if parts}
    # "train0" and "train1" are parts of one split, and so are "train2014" and "train2017".
    if len({tuple(part.strip("0123456789") for part in parts) for parts in of_files}) > 1:
        raise not_found(folder, None, {part for parts in of_files for part in parts})
    if of_files and () in found:
        log.warning(
            "%d of the %d files in %s have a split in their names (%s), and all files are read together; to "
            "keep them apart, set the split of the source, or write braces such as {00000..00331}.tar.",
            sum(map(bool, found)),
            len(found),
            folder,
            shown({part for parts in of_files for part in parts}),
        )


def _parts(file: File) -> list[str]:
    """Return the parts of a file's name that are typical of a split."""
    name = re.sub(_NUMBER_AND_ENDING, "", file.name)
    return [part for part in re.split("[-_.]", name) if is_split(part)]


def is_split(name: str) -> bool:
    """Return whether the name of a folder is typical of a split."""
    return re.fullmatch(_SPLIT, name, re.IGNORECASE) is not None


def among_classes(names: Collection[str], *, nested: bool) -> list[str]:
    """Return the folders among `names` that are splits, although folders of classes are expected.

    Args:
        nested: whether the folders contain further folders. A single folder "train" without further folders
            may contain pictures of trains.
    """
    found = sorted(filter(is_split, names))
    # A folder "train" beside a folder "test" means splits, whatever other folders there are.
    exact = [
        [name for name in names if re.fullmatch(kind, name, re.IGNORECASE)]
        for kind in (_TRAIN, _OTHER)
    ]
    are_all = len(found) == len(names) and (len(found) > 1 or nested)
    return found if are_all or all(exact) else []


def require_named(folder: File, images: Iterable[str]) -> None:
    """Raise UserError if the folders of images in `folder` are splits instead of parts or classes.

    Args:
        images: paths relative to `folder`.
    """
    inside = [path.split("/") for path in images if "/" in path]
    names = {first for first, *_ in inside}
    if known := among_classes(names, nested=any(len(parts) > 2 for parts in inside)):
        raise not_found(folder, None, known)


def not_found(where: object, split: str | None, known: Iterable[str]) -> UserError:
    """Return the error for a missing split: none is named, or the data set lacks the one that is."""
    known = sorted(known)
    if not split:
        return UserError(
            f"{where} has splits, and none is chosen; set the split of this source (config.data.train.split "
            f"to train, --split to evaluate) to one of {shown(known, 20)}."
        )
    if not any(map(is_split, known)):
        there = f" (there are {shown(known, 20)})" if known else ""
        return UserError(
            f"The data set in {where} has no split {split!r}: no folder or file has this name{there}; leave "
            "the split out (None in a config), or choose another one."
        )
    return UserError(f"{where} has no split {split!r}; choose one of {shown(known, 20)}.")
