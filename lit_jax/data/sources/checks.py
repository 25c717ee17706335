"""Warnings and errors about a table's first rows, raised once when the table is opened."""

import ast
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from lit_jax.config import SourceConfig
from lit_jax.data.sources.rows import DOWNLOAD, WEB
from lit_jax.errors import UserError
from lit_jax.files import parse_json

log = logging.getLogger(__name__)

# The number of rows that are checked.
LOOKED_AT = 1000
# The length in characters above which a text is not parsed as a list.
MAX_LENGTH = 10_000
_BRACKETS = {"[": "]", "(": ")", "{": "}"}


@runtime_checkable
class HasRows(Protocol):
    """A table whose rows can be read in order."""

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Yield the readable rows from the first one on."""
        ...


def first_rows(table: HasRows) -> list[Mapping[str, Any]]:
    """Return up to `LOOKED_AT` readable rows."""
    return list(itertools.islice(table.rows(), LOOKED_AT))


def check_first_rows(table: HasRows, config: SourceConfig, *, text_only: bool) -> None:
    """Warn about captions that are lists written as text. Raise UserError if all images are on the web."""
    rows = first_rows(table)
    images = [row.get(config.image_key) for row in rows]
    on_web = [isinstance(image, str) and image.startswith(WEB) for image in images]
    # Some addresses among files are bad samples; if all are addresses, nothing would be left.
    if all(on_web) and on_web and not text_only:
        raise UserError(
            f"The images of {config.path} are web addresses ({images[0]}); {DOWNLOAD}, and give its output."
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
                # Python warns about unknown escape sequences in texts that are no lists.
                warnings.simplefilter("ignore", SyntaxWarning)
                value = read(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        items = value.values() if isinstance(value, dict) else value
        if isinstance(value, list | tuple | dict) and items:
            return all(isinstance(item, str | list) for item in items)
    return False
