"""Tables whose columns have the names that other tools give them.

Image folders of Hugging Face's `datasets` contain metadata.jsonl, metadata.csv or metadata.parquet with a
column "file_name". The captions may be in any other column, usually "text".
"""

import contextlib
import csv
import dataclasses
import json
import logging
import re
from collections.abc import Collection, Iterator
from typing import Any

from pyarrow import parquet

from lit_jax.config import SourceConfig
from lit_jax.data.files import File, read
from lit_jax.data.listing import shown
from lit_jax.data.sources import splits
from lit_jax.data.sources.checks import HasRows, first_rows
from lit_jax.errors import UserError
from lit_jax.files import parse_json

log = logging.getLogger(__name__)

# Config key -> the column names of other tools, which are tried if no column has the key's default name.
_OTHER_NAMES = {"image_key": ("file_name", "image_file_name"), "caption_key": ("captions", "text")}
# The bytes at the start of a file whose rows are searched for the names of the fields.
_HEAD_BYTES = 1 << 20
_BETWEEN_ITEMS = re.compile(r"[\s\[,]*")


def with_names_of(file: File, config: SourceConfig) -> SourceConfig:
    """Return the config with the names of the file's columns, for the keys that the user has not set."""
    names = _names(file)
    changed = {}
    for key, others in _OTHER_NAMES.items():
        default = getattr(SourceConfig, key)
        found = next((name for name in others if name in names), None)
        # A key that the user has set, or a column of the default name, takes precedence.
        if getattr(config, key) == default and default not in names and found:
            changed[key] = found
    return dataclasses.replace(config, **changed)


def _names(file: File) -> Collection[str]:
    """Return the names of a table's columns, or none for a damaged file, which its reader reports."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        with file.open("rb") as opened:
            return parquet.read_schema(opened).names
    try:
        # The head may end within a character; its replacement makes only that line unreadable.
        head = read(file, 0, _HEAD_BYTES).decode("utf-8-sig", "replace").strip()
        if kind == ".csv":
            return next(csv.reader([head.split("\n")[0]]), [])
    except csv.Error:
        return ()
    rows = _rows_of_list(head) if kind == ".json" else _rows_of_lines(head)
    # Not only the first row: it may be damaged, or be the one image without a caption.
    return {name for row in rows if isinstance(row, dict) for name in row}


def _rows_of_lines(head: str) -> Iterator[Any]:
    """Yield the readable values of a JSONL file's head, which may end within a line."""
    for line in head.split("\n"):
        with contextlib.suppress(ValueError):
            yield parse_json(line)


def _rows_of_list(head: str) -> Iterator[Any]:
    """Yield the items of a JSON list's head up to the first that is damaged, or cut off."""
    decoder, end = json.JSONDecoder(), 0
    with contextlib.suppress(ValueError, RecursionError):
        while start := _BETWEEN_ITEMS.match(head, end):
            row, end = decoder.raw_decode(head, start.end())
            yield row


def require_in_split(table: HasRows, file: File, config: SourceConfig) -> None:
    """Raise UserError if a table above the folder of a split lists images of several splits.

    `datasets` would give all rows to each split, which mixes training and test data.
    """
    paths = [row.get(config.image_key) for row in first_rows(table)]
    folders = {path.split("/")[0] for path in paths if isinstance(path, str) and "/" in path}
    if config.split in folders or any(map(splits.is_split, folders)):
        own = file.parent / (config.split or "") / file.name
        raise UserError(
            f"{file} lists the images of several splits ({shown(folders)}); move the rows of "
            f"{config.split!r} to {own}, with paths relative to its folder, or leave out the split to read "
            "all rows."
        )
