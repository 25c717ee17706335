"""Hints about files that look like a data set but cannot be read as one."""

import fnmatch
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lit_jax.data.files import File
from lit_jax.data.listing import shown
from lit_jax.data.sources.pairs import is_img2dataset_log
from lit_jax.data.sources.records import BAD_FILE
from lit_jax.errors import UserError
from lit_jax.files import refuse_lfs_pointer

log = logging.getLogger(__name__)

# Patterns of file names -> hint. The first entry with a matching file is used.
_HINTS = {
    ("*.tfrecord", "*.tfrecord-*"): (
        "TFRecord files allow no random access; write the data again with `tfds build "
        "--file_format=array_record`, or with `img2dataset --output_format=webdataset`"
    ),
    ("*_stats.json",): (
        "it is a report of img2dataset, whose images are not there; write them with "
        "--output_format=webdataset, files or parquet"
    ),
    # The cache of `load_dataset` has both, and only this hint says what to do with it.
    ("*.arrow", "*.feather"): (
        "Arrow files are read where `save_to_disk` of `datasets` wrote them; save the data set with it, or "
        "the table as Parquet"
    ),
    ("dataset_info.json", "dataset_infos.json"): (
        "it describes a data set of TFDS or of Hugging Face's `datasets` that is not there; give the folder "
        "that `tfds build` or `save_to_disk` wrote"
    ),
    (
        "*.orc",
        "*.avro",
        "*.pkl",
        "*.pickle",
        "*.h5",
        "*.hdf5",
        "*.npz",
        "*.mdb",
        "*.db",
        "*.sqlite",
    ): ("lit_jax does not read this file type; save the table as Parquet, CSV or JSONL"),
    ("*.gz", "*.tgz", "*.bz2", "*.xz", "*.zst", "*.zip", "*.rar", "*.7z"): (
        "it is compressed, which allows no random access; unpack it"
    ),
    ("*.xlsx", "*.xls", "*.ods"): "it is a spreadsheet; save it as CSV in UTF-8",
    ("*.json",): (
        'it must be a list, [{"image": "a.jpg", "caption": "a dog"}, ...], where image_key names the field '
        "of the image, or COCO's captions; if it has one such object on each line, rename it to *.jsonl, and "
        "if it has Karpathy's splits, to dataset_*.json"
    ),
}
# The first bytes of a file -> the program that compressed it.
_COMPRESSED = {
    b"\x1f\x8b\x08": "gzip",
    b"BZh91AY&SY": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
_COMPRESSED_ENDING = re.compile(r"\.(tgz|gz|bz2|xz|zst|zip)$", re.IGNORECASE)
# Files that only describe the data of other formats.
ABOUT = ("dataset_info.json", "dataset_infos.json")


def hint(files: Sequence[File]) -> str:
    """Return a sentence about the first known kind of file in a folder without a data set, or ""."""
    for patterns, what in _HINTS.items():
        found = [
            file.name
            for file in files
            if any(fnmatch.fnmatch(file.name.lower(), p) for p in patterns)
        ]
        if found:
            return f" There is {shown(found, 3)}: {what}."
    return ""


def check_places(path: str, places: Sequence[File]) -> None:
    """Raise UserError if a path is a pattern with *, or has braces that stand for folders."""
    first = places[0]
    # A file may have a * in its name.
    if isinstance(first, Path) and "*" in path and not first.exists():
        raise UserError(
            f"{path!r} has a *, which is not expanded; give the folder, or write braces such as "
            "{00000..00331}.tar."
        )
    if len(places) > 1 and first.is_dir():
        raise UserError(
            f"The braces of {path!r} stand for folders, and braces can stand for files alone; give the "
            f"folder that holds all of them, {first.parent}."
        )


def check_content(file: File) -> None:
    """Raise UserError if a local file is compressed whatever its name says, or a pointer of Git LFS.

    Such a file is legible by none of the readers, whose messages would name another cause.
    """
    if not isinstance(file, Path):
        return
    refuse_lfs_pointer(file)
    try:
        with file.open("rb") as opened:
            # The content decides, because a download often loses or changes the ending of a name.
            start = opened.read(max(map(len, _COMPRESSED)))
    # The reader's own message is more specific.
    except OSError:
        return
    if kind := next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), ""):
        raise UserError(
            f"{file} is compressed ({kind}) in spite of its name, which allows no random access; unpack it."
        )


def tell_unread(
    read: File,
    files: Iterable[File],
    matches: Callable[[str], bool],
    is_data: Callable[[str], bool],
) -> None:
    """Warn about files of a folder that look like data and are not read.

    Args:
        read: a file that is read.
        files: the files of the folder, or of the chosen split.
        matches: whether a file of this name has the format that is read.
        is_data: whether a file of this name has any format that is read.
    """
    names = {file.name for file in files}
    others = [
        name
        for name in names
        if is_data(name)
        and not matches(name)
        and name != BAD_FILE
        # img2dataset writes a Parquet log beside each tar.
        and not is_img2dataset_log(name, lambda number: f"{number}.tar" in names)
    ]
    if others:
        log.warning("%s is read, and %s beside it is not.", read, shown(others))
    unpacked = {name: _COMPRESSED_ENDING.sub(_unpacked, name) for name in names}
    compressed = [
        name for name, inside in unpacked.items() if matches(inside) and inside not in names
    ]
    if compressed:
        log.warning(
            "%d compressed files in %s are not read: %s; unpack them.",
            len(compressed),
            read.parent,
            shown(compressed),
        )


def _unpacked(ending: re.Match[str]) -> str:
    return ".tar" if ending[0].lower() == ".tgz" else ""


def check_versions(folder: File, paths: Sequence[str]) -> None:
    """Raise UserError if `paths` show prepared TFDS data deeper in the folder.

    TFDS prepares data in NAME/VERSION or NAME/CONFIG/VERSION, and users often name only the folder above.
    """
    found = [path.rpartition("/")[0] for path in paths if path.endswith("/features.json")]
    if found:
        raise UserError(
            f"{folder} holds prepared TFDS data in {shown(found)}; give one of these folders as the path."
        )
