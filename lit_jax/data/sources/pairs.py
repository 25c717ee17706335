"""Images with their captions in files beside them, the default output of img2dataset.

    00000/000000000.jpg, 00000/000000000.txt, 00000/000000000.json

A sample consists of the files of one folder whose names differ only in the ending, see `samples`.
"""

import contextlib
import itertools
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import pyarrow as pa

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError, Example
from lit_jax.data.files import File, read_whole, readable
from lit_jax.data.image import IMAGE_SUFFIXES
from lit_jax.data.listing import is_system
from lit_jax.data.sources import samples, splits
from lit_jax.data.sources.rows import bad_sample
from lit_jax.data.sources.samples import FIELDS, FLAWS, Member, Parts, Reading, example_of_parts

log = logging.getLogger(__name__)

_TEXT = tuple(suffix for rank in (*FIELDS["text"], *FIELDS["json"]) for suffix in rank)
# An image in a numbered folder of img2dataset: 00012/000120034.jpg.
_IN_PART = re.compile(r"(?:.*/)?([0-9]{5,})/\1[0-9]+\.[^/]+")
# The number of samples that are checked for labels.
_LOOKED_AT = 50
# Columns with few different values in millions of rows: dictionary encoding stores each value once.
_FEW = pa.dictionary(pa.int32(), pa.binary())
_SCHEMA = pa.schema(
    [("key", pa.large_binary()), ("flaw", _FEW), *((field, _FEW) for field in FIELDS)]
)


class PairSource:
    """The images of a folder with files beside them.

    The samples are an Arrow table with the common name, and the endings of the files by field.
    """

    def __init__(
        self,
        folder: File,
        table: pa.Table,
        config: SourceConfig,
        *,
        text_only: bool = False,
        has_classes: bool = False,
    ):
        """Open the samples of `table`; with `has_classes` the first folder of a sample is its class."""
        self._folder = folder
        self._table = table
        self._config = config
        self._text_only = text_only
        self._has_classes = has_classes

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Example:
        key, parts = self._read(index)
        # The label is the folder's name. With a label from elsewhere, broken JSON is not an error.
        if self._has_classes:
            parts = parts._replace(cls=b"")
        with bad_sample(key):
            example = example_of_parts(
                parts, self._config, self._folder, key=key, text_only=self._text_only
            )
        if not self._has_classes:
            return example
        label = key.split("/", 1)[0] if "/" in key else None
        return {**example, "label": label, "label_is_folder": True}

    def json_fields(self, index: int) -> Collection[str]:
        """Return the names of the fields in a sample's json. Raise BadSampleError if it cannot be read."""
        key, parts = self._read(index)
        with bad_sample(key):
            return samples.json_fields(parts)

    def _read(self, index: int) -> tuple[str, Parts]:
        """Return a sample's key, the path of its image and the contents of the files beside the image."""
        # A slash separates the endings of one field, since no file name contains a slash.
        key, flaw, *endings = (self._table[name][index].as_py() for name in _SCHEMA.names)
        names = {
            field: [os.fsdecode(key + ending) for ending in value.split(b"/")] if value else []
            for field, value in zip(FIELDS, endings, strict=True)
        }
        key = readable(os.fsdecode(key))
        if flaw:
            kind, reason = FLAWS[flaw.decode()]
            raise BadSampleError(f"{key} {reason}", kind)
        with bad_sample(key):
            contents = {
                field: [read_whole(self._folder / name) for name in found]
                for field, found in names.items()
                if field != "image"
            }
        one = {field: found[0] if found else None for field, found in contents.items()}
        image = next(iter(names["image"]), None)
        return key, Parts(image, contents["text"], one["json"], one["cls"])


def open_pairs(
    folder: File, found: Sequence[str], config: SourceConfig, *, text_only: bool = False
) -> PairSource | None:
    """Return the samples of a folder whose images have texts or json beside them, else None.

    The folders are taken for classes if fewer than half of the images have such files, and also if no sample
    has a label, unless `config.label_key` is set to a field of the json. With `config.templates` nothing
    beside the images is read in the latter case, since a text beside an image of a class is often an
    annotation (labelme, YOLO).

    Args:
        found: the paths of all files and folders in `folder`.

    Raises UserError if the folders are splits.
    """
    names = [name for name in found if not is_system(name) and not name.endswith("/")]
    # Most folders of images have no texts; this cheap test avoids splitting millions of names.
    if not any(name.lower().endswith(_TEXT) for name in names):
        return None
    readings = samples.decide([*_readings(names)])
    images = sum(reading.images for reading in readings)
    described = sum(reading.described for reading in readings)
    paths = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    if not described:
        return None
    # A few texts among many images, such as a readme, do not make a data set of captions.
    if 2 * described < images and any("/" in path for path in paths):
        log.warning(
            "%s: only %d of %d images have a caption file or JSON file beside them, so these files are not "
            "read, and the folders are the classes.",
            folder,
            described,
            images,
        )
        return None
    splits.require_named(folder, paths)
    for problem, remark in samples.remarks(readings).items():
        if not (text_only and problem == "no image"):
            log.warning("%s: %s.", folder, remark)
    log.info("%s has %d images with caption files or JSON files beside them.", folder, images)
    table = pa.Table.from_batches([reading.samples for reading in readings], _SCHEMA)
    # Each folder's batch has dictionaries of its own, and chunks can be combined only with the same ones.
    table = table.unify_dictionaries().combine_chunks()
    source = PairSource(folder, table, config, text_only=text_only)
    # The table shows labels in cls files; labels in json need a look into some samples.
    labels_missing = table["cls"].null_count == len(table) and not _has_label(source)
    has_field = config.label_key != SourceConfig.label_key
    if text_only or has_field or not labels_missing or not _may_be_classes(paths):
        return source
    return _with_classes(folder, table, config)


def _with_classes(folder: File, table: pa.Table, config: SourceConfig) -> PairSource | None:
    """Return samples whose folders are their classes, or None if only images and folders are read."""
    if config.templates:
        log.warning(
            "%s: no image has a label beside it, so the folders are the classes; the files beside the "
            "images are not read, because this source has templates.",
            folder,
        )
        return None
    log.info("%s: no image has a label beside it, so the folders are the classes.", folder)
    return PairSource(folder, table, config, has_classes=True)


def _may_be_classes(paths: Sequence[str]) -> bool:
    """Return whether images lie in several folders other than the numbered folders of img2dataset."""
    inside = [path for path in paths if "/" in path]
    folders = {path.split("/", 1)[0] for path in inside}
    return len(folders) > 1 and not all(map(_IN_PART.fullmatch, inside))


def _has_label(source: PairSource) -> bool:
    """Return whether a sample has a label in its json, by a look at evenly spaced samples."""
    count = min(len(source), _LOOKED_AT)
    for position in np.linspace(0, len(source) - 1, count).astype(int).tolist():
        with contextlib.suppress(BadSampleError):
            example = source[position]
            if example["label"] is not None or "label_problem" in example:
                return True
    return False


def _readings(names: Sequence[str]) -> Iterator[tuple[Reading, Reading]]:
    """Yield the two readings of each folder's files, see `samples.read_members`."""
    split = sorted(name.rpartition("/")[::2] for name in names)
    folders = {folder for folder, _ in split}

    def is_log(inside: str, name: str) -> bool:
        return is_img2dataset_log(name, lambda number: inside + number in folders)

    for folder, files in itertools.groupby(split, key=lambda parts: parts[0]):
        inside = f"{folder}/" if folder else ""
        members = [Member(inside, name) for _, name in files if not is_log(inside, name)]
        # Sorted by the parts between dots, so that files of one sample are neighbours whether names end at
        # the first dot or at the last.
        members.sort(key=lambda member: ((parts := member.name.split("."))[:-1], parts[-1]))
        has_images = any(member.name.lower().endswith(IMAGE_SUFFIXES) for member in members)
        # A text file without images in its folder is a readme and no caption.
        yield samples.read_members(members, _pack, at_least=("image", "text")[: 1 + has_images])


def is_img2dataset_log(name: str, holds_samples: Callable[[str], bool]) -> bool:
    """Return whether a file is img2dataset's log about the samples of the same number.

    Args:
        holds_samples: whether the samples of a number, such as "00012", are beside the file.
    """
    match = re.fullmatch(r"([0-9]+)(\.parquet|_stats\.json)", name)
    return match is not None and holds_samples(match[1])


def _pack(found: Sequence[samples.Sample]) -> pa.RecordBatch:
    """Return samples as a batch of `_SCHEMA`. Names are bytes, since a file name need not be UTF-8."""

    def endings(field: str) -> list[bytes | None]:
        return [
            b"/".join(
                os.fsencode(member.folder + member.name)[len(os.fsencode(sample.key)) :]
                for member in sample.members.get(field, ())
            )
            or None
            for sample in found
        ]

    keys = pa.array([os.fsencode(sample.key) for sample in found], pa.large_binary())
    flaws = [sample.flaw.encode() or None for sample in found]
    columns = [pa.array(values, _FEW) for values in (flaws, *map(endings, FIELDS))]
    return pa.RecordBatch.from_arrays([keys, *columns], schema=_SCHEMA)
