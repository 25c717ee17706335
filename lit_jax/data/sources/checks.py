"""Warnings and errors about a source's keys and a table's first rows, once when the source is opened."""

import ast
import contextlib
import itertools
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError, Source
from lit_jax.data.files import File
from lit_jax.data.sources.rows import DOWNLOAD, WEB
from lit_jax.errors import UserError
from lit_jax.files import parse_json

log = logging.getLogger(__name__)

# The keys of `SourceConfig` that name a field, column or feature.
FIELD_KEYS = ("image_key", "caption_key", "label_key")
# The number of rows that are checked.
LOOKED_AT = 1000
# The number of samples that are read to check a key.
SAMPLES = 50
# The length in characters above which a text is not parsed as a list.
MAX_LENGTH = 10_000
# The text form of the first bytes of a JPEG, PNG, GIF or WebP file, or of a data URI. Paths are shorter.
_BASE64 = re.compile(r"data:image/|(/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/\s]{200}")
_BRACKETS = {"[": "]", "(": ")", "{": "}"}


@runtime_checkable
class HasRows(Protocol):
    """A table whose rows can be read in order."""

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Yield the readable rows from the first one on."""
        ...


@runtime_checkable
class HasColumns(Protocol):
    """A table whose columns have the same names in all rows."""

    @property
    def column_names(self) -> Collection[str]:
        """The names of the columns, of all files together."""
        ...


@runtime_checkable
class HasJson(Protocol):
    """Samples that may have a json with fields."""

    def __len__(self) -> int: ...

    def json_fields(self, index: int, /) -> Collection[str]:
        """Return the names of the fields in a sample's json. Raise BadSampleError if it cannot be read."""
        ...


def first_rows(table: HasRows) -> list[Mapping[str, Any]]:
    """Return up to `LOOKED_AT` readable rows."""
    return list(itertools.islice(table.rows(), LOOKED_AT))


def refuse_field_keys(file: File, config: SourceConfig, known: Collection[str]) -> None:
    """Raise UserError if the config sets one of `FIELD_KEYS` that the format of `file` does not read.

    Args:
        known: the keys that the format reads.
    """
    for key, name in _set_keys(config).items():
        if key not in known:
            what = key.removesuffix("_key")
            raise UserError(
                f"{file} has no fields to choose its {what} from, so {key}={name!r} has no meaning; leave it "
                f"at {getattr(SourceConfig, key)!r}."
            )


def check_field_keys(source: Source, config: SourceConfig) -> None:
    """Raise UserError or warn if `caption_key` or `label_key` is set to a name that the data do not have.

    Without this check a mistyped name would only mean that the captions come from "captions", or that there
    are labels alone. A table with a header has the name or not. JSON may have a field in a few rows alone,
    which need not be among those that are looked at, so that there the check only warns. Every table needs
    its images, so its reader refuses a wrong `image_key`.
    """
    # An empty name stands for none.
    chosen = {key: name for key, name in _set_keys(config).items() if name and key != "image_key"}
    if not chosen:
        return
    has_header = isinstance(source, HasColumns)
    if has_header:
        known, looked_at = {*source.column_names}, "the columns"
    elif isinstance(source, HasRows):
        rows = first_rows(source)
        known, looked_at = {name for row in rows for name in row}, f"the first {len(rows)} rows"
    elif isinstance(source, HasJson):
        known, looked_at = _fields_of_samples(source)
    else:
        return
    for key, name in chosen.items():
        if name in known:
            continue
        default = getattr(SourceConfig, key)
        if has_header:
            raise UserError(
                f"{key} of this source is {name!r}, but {config.path} has no such column; correct the name, "
                f"or leave {key} at {default!r}."
            )
        log.warning(
            "%s of this source is %r, but none of %s of %s has this field; if the name is mistyped, correct "
            "it, or leave %s at %r.",
            *(key, name, looked_at, config.path, key, default),
        )


def _fields_of_samples(source: HasJson) -> tuple[set[str], str]:
    """Return the fields in the json of up to `SAMPLES` evenly spaced samples, and words for the samples."""
    count = min(len(source), SAMPLES)
    known = set()
    for position in np.linspace(0, len(source) - 1, count).astype(int).tolist():
        with contextlib.suppress(BadSampleError):
            known |= {*source.json_fields(position)}
    return known, f"{count} samples"


def _set_keys(config: SourceConfig) -> dict[str, str]:
    """Return those of `FIELD_KEYS` that differ from their defaults, with their values."""
    values = {key: getattr(config, key) for key in FIELD_KEYS}
    return {key: value for key, value in values.items() if value != getattr(SourceConfig, key)}


def check_first_rows(table: HasRows, config: SourceConfig, *, text_only: bool) -> None:
    """Warn about captions that are lists written as text.

    Raises UserError if all images are on the web, or written as base64 text.
    """
    rows = first_rows(table)
    images = [row.get(config.image_key) for row in rows]
    on_web = [isinstance(image, str) and image.startswith(WEB) for image in images]
    # Some addresses among files are bad samples; if all are addresses, nothing would be left.
    if all(on_web) and on_web and not text_only:
        raise UserError(
            f"The images of {config.path} are web addresses ({images[0]}); {DOWNLOAD}, and give its output."
        )
    encoded = [isinstance(image, str) and _BASE64.match(image) is not None for image in images]
    if all(encoded) and encoded and not text_only:
        raise UserError(
            f"The images of {config.path} are written as base64 text; write them to files and name the files "
            "in the table, or write them to a Parquet column as bytes."
        )
    for name in dict.fromkeys((config.caption_key, "captions")):
        texts = [text for row in rows if isinstance(text := row.get(name), str)]
        lists = list(filter(is_list, texts))
        if lists:
            shown = lists[0] if len(lists[0]) <= 80 else f"{lists[0][:80]}..."
            log.warning(
                "The field %r in %d of the first %d rows of %s is a list written as text: %s. Its brackets "
                "and quotes become part of a single caption; write a row for each caption, or use JSONL "
                "with real lists.",
                name,
                len(lists),
                len(rows),
                config.path,
                shown,
            )


def is_list(text: str) -> bool:
    """Return whether a text is a list or mapping of texts in the syntax of Python or JSON."""
    text = text.strip()
    # A cheap test first: parsing each of a thousand captions twice would take long.
    if len(text) > MAX_LENGTH or _BRACKETS.get(text[:1], "none") != text[-1:]:
        return False
    readers: tuple[Callable[[str], Any], ...] = (parse_json, ast.literal_eval)
    for read in readers:
        try:
            with warnings.catch_warnings():
                # Python warns about unknown escape sequences in texts that are not lists.
                warnings.simplefilter("ignore", SyntaxWarning)
                value = read(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        items = value.values() if isinstance(value, dict) else value
        if isinstance(value, list | tuple | dict) and items:
            return all(isinstance(item, str | list) for item in items)
    return False
