"""The formats of data sets. `FORMATS` lists the files by which each format is recognised, and its reader.

A source has random access and can be pickled for worker processes. An image file may be read only when the
image is decoded.
"""

import dataclasses
import fnmatch
import functools
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lit_jax.config import SourceConfig
from lit_jax.data.example import Source, select_examples
from lit_jax.data.files import AddressError, File, locate, require_regular
from lit_jax.data.listing import expand, is_system, shown, top_folders, walk
from lit_jax.data.makers import is_maker, made_by
from lit_jax.data.sources import columns, flickr, hints, lists, metadata, saved_datasets, splits
from lit_jax.data.sources.checks import (
    FIELD_KEYS,
    HasRows,
    check_field_keys,
    check_first_rows,
    refuse_field_keys,
)
from lit_jax.data.sources.delimited import DelimitedSource
from lit_jax.data.sources.grouping import Table, group_rows
from lit_jax.data.sources.json_list import is_list_of_rows
from lit_jax.data.sources.jsonl import JsonlSource, open_json_list
from lit_jax.data.sources.pairs import is_img2dataset_log, open_pairs
from lit_jax.data.sources.records import MANIFEST, RecordSource
from lit_jax.data.sources.tars import TarSource
from lit_jax.data.sources.tfds import TfdsSource
from lit_jax.display import without_details
from lit_jax.errors import UserError

log = logging.getLogger(__name__)

CAPTIONS_FILE = "captions.jsonl"
# The most files that are opened to recognise a format.
MOST_READ = 50
# A sample's image is found by its ending; captions and label may be fields of its json.
_OF_SAMPLES = ("caption_key", "label_key")

# (files, config, text_only) -> source. The files are never empty and all in one folder.
Opener = Callable[[Sequence[File], SourceConfig, bool], Source]


def _any_file(file: File, image_key: str) -> bool:
    return True


class Format(NamedTuple):
    """A row of `FORMATS`: files whose names match one of `patterns` are read by `open`."""

    patterns: tuple[str, ...]
    open: Opener
    # True if many files form one data set; otherwise the user has to name one file.
    several: bool = False
    # True if the files list the splits. False: a split is a folder, or a part of the files' names.
    knows_splits: bool = False
    # For patterns that other files match, too: whether a file, given the config's image_key, has this format.
    fits: Callable[[File, str], bool] = _any_file
    # True if the columns may have the names that other tools give them, see `metadata`.
    has_other_names: bool = False
    # The keys of `SourceConfig` that name fields of this format. Other keys of this kind are refused.
    field_keys: tuple[str, ...] = FIELD_KEYS

    def matches(self, name: str) -> bool:
        """Return whether a file name matches one of the patterns."""
        is_known = _pattern(self.patterns).match(name) is not None
        return is_known and name.lower() not in hints.ABOUT


@functools.cache
def _pattern(patterns: Sequence[str]) -> re.Pattern[str]:
    # Ignoring case, because cameras and programs on Windows write names such as PAIRS.CSV.
    return re.compile("|".join(map(fnmatch.translate, patterns)), re.IGNORECASE)


def _single(open_file: Callable[..., Source]) -> Opener:
    """Return the opener of a format whose data set is one file."""
    return lambda files, config, text_only: open_file(files[0], config, text_only=text_only)


def _several(open_files: Callable[..., Source]) -> Opener:
    """Return the opener of a format whose data set may be many files."""
    return lambda files, config, text_only: open_files(files, config, text_only=text_only)


# The first format that matches is used, so a file that describes a folder comes before the files that it
# describes, and a special name before a general ending.
FORMATS = (
    Format((MANIFEST,), lambda files, config, _: RecordSource(files[0].parent), field_keys=()),
    Format(
        ("features.json",),
        lambda files, config, _: TfdsSource(files[0].parent, config),
        knows_splits=True,
    ),
    Format(
        ("dataset_dict.json",),
        lambda files, config, text_only: saved_datasets.open_dict(
            files[0].parent, config, text_only=text_only
        ),
        knows_splits=True,
    ),
    Format(
        ("state.json",),
        lambda files, config, text_only: saved_datasets.HuggingFaceSource(
            files[0].parent, config, text_only=text_only
        ),
    ),
    Format((CAPTIONS_FILE,), _single(JsonlSource)),
    Format(("metadata.jsonl",), _single(JsonlSource), has_other_names=True),
    Format(("metadata.csv",), _single(DelimitedSource), has_other_names=True),
    Format(("metadata.parquet",), _several(columns.ParquetSource), has_other_names=True),
    Format(("*.tar",), _several(TarSource), several=True, field_keys=_OF_SAMPLES),
    Format(("*.parquet",), _several(columns.ParquetSource), several=True),
    Format(
        ("dataset_*.json",),
        lambda files, config, _: lists.open_karpathy(files[0], config.split),
        knows_splits=True,
        fits=lambda file, image_key: not is_list_of_rows(file, image_key),
        field_keys=(),
    ),
    Format(
        ("captions_*.json",),
        lambda files, config, _: lists.open_coco(files[0], config.split),
        fits=lambda file, image_key: not is_list_of_rows(file, image_key),
        field_keys=(),
    ),
    Format(
        ("*.token", "*.token.txt", "captions.txt"),
        lambda files, config, _: flickr.open_flickr(files[0]),
        field_keys=(),
    ),
    Format(
        ("results.csv",),
        lambda files, config, _: flickr.open_flickr(files[0]),
        fits=lambda file, _: flickr.has_bars(file),
        field_keys=(),
    ),
    Format(("*.jsonl", "*.ndjson"), _single(JsonlSource)),
    Format(("*.csv", "*.tsv"), _single(DelimitedSource)),
    Format(
        ("*.json",),
        _single(open_json_list),
        fits=is_list_of_rows,
        has_other_names=True,
    ),
    # nocaps, VizWiz, STAIR and others have COCO's form under names of their own.
    Format(
        ("*.json",),
        lambda files, config, _: lists.open_coco(files[0], config.split),
        fits=lists.is_coco,
        field_keys=(),
    ),
)


def open_source(config: SourceConfig, *, text_only: bool = False, labelled: bool = True) -> Source:
    """Open the data set that `config` names, with the examples and captions that the config selects.

    The source is never empty.

    Args:
        text_only: whether examples need no image; rows are then never grouped by image.
        labelled: whether the task uses labels; rows of one image with different labels are then different
            examples.

    Raises UserError if the data set is missing, empty or broken, or has no such split.
    """
    if is_maker(config.path):
        config = dataclasses.replace(config, path=str(made_by(config.path)))
    return select_examples(_find(config, text_only, labelled), config)


def _find(config: SourceConfig, text_only: bool, labelled: bool) -> Source:
    """Return the source that the config names, or raise UserError with a hint about what is there instead."""
    try:
        places = [locate(path) for path in expand(config.path)] if config.path else []
        if places:
            hints.check_places(config.path, places)
        if source := _open(places, config, text_only, labelled):
            return source
    except AddressError as error:
        raise UserError(str(error)) from error
    # There is no permission, no network, or no credentials.
    except OSError as error:
        reason = without_details(error)
        remedy = (
            "its address, credentials and network" if "://" in config.path else "its permissions"
        )
        raise UserError(f"{config.path!r} cannot be read ({reason}); check {remedy}.") from error
    if places and all(isinstance(place, Path) and not place.exists() for place in places):
        raise UserError(f"There is no file or folder {config.path!r}; give the path of a data set.")
    found = _listed(places[0], config) if len(places) == 1 and places[0].is_dir() else places
    patterns = ", ".join(dict.fromkeys(p for known in FORMATS for p in known.patterns))
    raise UserError(
        f"There is no data set in {config.path!r}.{hints.hint(found)} Set the path of the source "
        f"(config.data.train.path for training) to a file, to a folder that has one of {patterns}, or "
        "to a folder of images that have texts beside them (a.jpg, a.txt) or one folder for each class."
    )


def _look_through(source: Source, config: SourceConfig, text_only: bool, labelled: bool) -> Source:
    """Return a table with the rows of each image grouped into one example; return other sources unchanged."""
    if not isinstance(source, Table):
        return source
    check_first_rows(source, config, text_only=text_only)
    if text_only or not config.group_captions:
        return source
    return group_rows(source, config, by_label=labelled)


def _open(
    places: Sequence[File], config: SourceConfig, text_only: bool, labelled: bool
) -> Source | None:
    """Return the source in a folder or in files, or None if no format is recognised."""
    files = list(places)
    folder = files[0] if len(files) == 1 and files[0].is_dir() else None
    if folder:
        files = _listed(folder, config)
    listed, kind = _recognise(files, config)
    # img2dataset writes a Parquet log beside each folder of images; the data are the images.
    if folder and listed and _is_log(folder, listed[0].name):
        listed, kind = [], None
    found = listed
    # A format that lists its splits chooses the files itself.
    if kind and not kind.knows_splits and config.split:
        found = splits.files_of(found, config.split)
    elif kind and kind.several and folder:
        splits.require_chosen(folder, found)
    if kind and found:
        require_regular(found)
        hints.check_content(found[0])
        # Several tables in one folder may be splits or unrelated data, so nothing is guessed.
        if len(found) > 1 and not kind.several:
            raise UserError(
                f"{found[0].parent} has {', '.join(file.name for file in found)}; choose one of them with "
                "the path or the split of the source."
            )
        if folder:
            chosen = config.split and not kind.knows_splits
            beside = splits.files_of(files, config.split or "") if chosen else files
            hints.tell_unread(found[0], beside, kind.matches, _is_data)
        refuse_field_keys(found[0], config, kind.field_keys)
        named = config
        if kind.has_other_names:
            named = metadata.with_names_of(found[0], config)
        source = kind.open(found, named, text_only)
        check_field_keys(source, config)
        return _look_through(source, named, text_only, labelled)
    if folder and kind and len(listed) == 1 and not (kind.several or kind.knows_splits):
        _check_above_split(folder, listed[0], kind, config, text_only)
    return _open_folder(folder, listed, config, text_only, labelled) if folder else None


def _check_above_split(
    folder: File, file: File, kind: Format, config: SourceConfig, text_only: bool
) -> None:
    """Raise UserError if a table above a split's folder lists the images of several splits."""
    inside = folder / (config.split or "")
    if not inside.is_dir() or _recognise(_listed(inside, config), config)[1]:
        return
    config = metadata.with_names_of(file, config) if kind.has_other_names else config
    try:
        table = kind.open([file], config, text_only)
    # The file lists something else, such as classes.
    except UserError:
        return
    if isinstance(table, HasRows):
        metadata.require_in_split(table, file, config)


def _open_folder(
    folder: File,
    listed: Sequence[File],
    config: SourceConfig,
    text_only: bool,
    labelled: bool,
) -> Source | None:
    """Open a split that is a folder, or images with captions beside them, or images in folders of classes.

    Args:
        listed: files in `folder` of a known format that belong to another split, or to none.
    """
    if not config.split:
        paths = [*walk(folder)]
        folders = top_folders(paths)
        tops = [*filter(splits.is_split, folders)]
        # A folder named like a split that holds a table of its own is a split and not a class.
        inside = [PurePosixPath(path) for path in paths if path.count("/") == 1]
        if any(str(path.parent) in tops and _is_data(path.name) for path in inside):
            raise splits.not_found(folder, None, tops)
        # Pairs come first: folders with captions beside the images look like folders of classes, too.
        source = open_pairs(folder, paths, config, text_only=text_only)
        if source:
            refuse_field_keys(folder, config, _OF_SAMPLES)
            check_field_keys(source, config)
        elif source := lists.image_folder(folder, paths):
            refuse_field_keys(folder, config, ())
        if source is None:
            hints.check_versions(folder, paths)
        if source is None and tops:
            raise splits.not_found(folder, None, tops)
        if source is None:
            _refuse_data_deeper(folder, paths)
        if source is None and folders:
            log.warning("%d folders in %s have no image: %s.", len(folders), folder, shown(folders))
        return source
    inside = folder / config.split
    if inside.is_dir():
        return _open([inside], dataclasses.replace(config, split=None), text_only, labelled)
    paths = [*walk(folder)]
    hints.check_versions(folder, paths)
    if not listed:
        # Folders of other names than the split's may be the other splits.
        _refuse_data_deeper(
            folder, [path for path in paths if splits.is_named_in(path, config.split)]
        )
    folders = {*top_folders(paths)} - {"annotations", *lists.IMAGE_FOLDERS}
    raise splits.not_found(folder, config.split, splits.in_names(listed) | folders)


def _refuse_data_deeper(folder: File, paths: Sequence[str]) -> None:
    """Raise UserError if folders in `folder` hold data sets, as in a clone from the Hub (data/*.parquet)."""
    found = [PurePosixPath(path) for path in paths if "/" in path and path[-1] != "/"]
    parents = {_above_splits(path.parent) for path in found if _is_data(path.name)}
    parents = {name for name in parents if name != "." and not is_system(name)}
    # pandas and Spark write so; a single folder would be the rows of one value.
    if parents and all("=" in name for name in parents):
        raise UserError(
            f"{folder} is a table in partitions ({shown(parents)}), which is not read, because a column is "
            "in the names of its folders; write the table without partitions, as files in one folder."
        )
    if parents:
        raise UserError(
            f"{folder} itself has no data set, but {shown(parents)} in it has; give its path, such as "
            f"{folder / min(parents)}."
        )


def _above_splits(folder: PurePosixPath) -> str:
    """Return the folder of a data set whose splits are folders: "de" for "de/test"."""
    while splits.is_split(folder.name):
        folder = folder.parent
    return str(folder)


def _listed(folder: File, config: SourceConfig) -> list[File]:
    """Return the visible files of a folder, and those of COCO's "annotations" folder inside."""
    files = sorted(folder.iterdir(), key=str)
    # Asked for by name, because Google's store does not list folders that exist only as prefixes.
    inside = folder / "annotations"
    if inside.is_dir():
        files += sorted(inside.iterdir(), key=str)
    seen = [file for file in files if not is_system(file.name)]
    # Hidden files are reported only if they have a known format: nobody misses a .DS_Store.
    hidden, kind = _recognise([file for file in files if is_system(file.name)], config)
    if kind:
        log.info(
            "%d hidden or system files in %s are left out: %s.",
            len(hidden),
            folder,
            shown(file.name for file in hidden),
        )
    return seen


def _is_log(folder: File, name: str) -> bool:
    """Return whether a file is img2dataset's log about a folder of images or a TFRecord file beside it."""

    def holds_samples(number: str) -> bool:
        return (folder / number).is_dir() or (folder / f"{number}.tfrecord").is_file()

    return is_img2dataset_log(name, holds_samples)


def _recognise(files: Sequence[File], config: SourceConfig) -> tuple[list[File], Format | None]:
    """Return the files of the first of `FORMATS` that matches any, and this format."""
    for kind in FORMATS:
        found = [file for file in files if kind.matches(file.name)]
        if kind.fits is not _any_file:
            # `fits` opens each file, which would be slow for the thousands of JSON files of img2dataset, and
            # none of thousands of files is the data set.
            few = found if len(found) <= MOST_READ else []
            found = [file for file in few if kind.fits(file, config.image_key)]
        if found:
            return found, kind
    return [], None


def _is_data(name: str) -> bool:
    """Return whether a file's name alone shows that the file has one of `FORMATS`."""
    return any(kind.matches(name) for kind in FORMATS if kind.fits is _any_file)
