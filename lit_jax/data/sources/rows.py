"""From a row with named fields, of whatever format, to an `Example`."""

import contextlib
import decimal
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError, Example
from lit_jax.data.files import File, encoding_problem, locate
from lit_jax.errors import UserError

WEB = ("http://", "https://")
DOWNLOAD = "download the images first, with img2dataset"


def example_of(
    row: Mapping[str, Any],
    config: SourceConfig,
    folder: File,
    *,
    key: str = "",
    text_only: bool = False,
) -> Example:
    """Return the example that a row describes.

    Its fields are named by `config`: an image (path relative to `folder`, address, content, or a mapping of
    "bytes" and "path"), a caption or a list of them, a label; and "captions", "teacher_caption",
    "key". Captions may be grouped by language. A label or key of a type that it cannot have spoils nothing:
    the example then says what is wrong with its label, and has another key.

    Args:
        key: names the example if the row does not; without it the image's path does, or the first caption.
        text_only: whether it may do without an image, or with one that is on the web.

    Raises TypeError or ValueError if a field is missing or of another type, BadSampleError if it is the image
    that is missing.
    """
    content = _content(row, config.image_key)
    if content is None and not text_only:
        raise BadSampleError(f'"{config.image_key}" is missing', "missing")
    if isinstance(content, str):
        unused = text_only and content.startswith(WEB)
        image = None if unused else _located(content, config.image_key, folder)
    else:
        image = content
    captions, languages = _captions(row, config)
    if image is None and not captions:
        raise TypeError(f'"{config.caption_key}" is missing')
    label, problem = read_label(row, config.label_key)
    example = Example(
        key=_key(row) or key or (content if isinstance(content, str) else captions[0]),
        image=image,
        captions=captions,
        languages=languages,
        teacher_caption=_field(row, "teacher_caption", str) if text_only else _teacher(row),
        label=label,
    )
    return {**example, "label_problem": problem} if problem else example


def _field(row: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """Return an optional field of a row; null counts as absent."""
    value = row.get(name)
    if value is not None and not isinstance(value, kind):
        raise TypeError(f'"{name}" is {value!r}')
    return value


def _teacher(row: Mapping[str, Any]) -> str | None:
    """Return the teacher's caption for a task that does not need it."""
    value = row.get("teacher_caption")
    return value if isinstance(value, str) else None


def _key(row: Mapping[str, Any]) -> str | None:
    value = row.get("key")
    if isinstance(value, int | float | decimal.Decimal) and not isinstance(value, bool):
        return _whole(value)
    return value if isinstance(value, str) else None


def _content(row: Mapping[str, Any], name: str) -> str | bytes | None:
    """Return an image as the row has it: its path or address, or its content."""
    value = _field(row, name, (str, bytes, dict))
    if isinstance(value, dict):
        content, path = _field(value, "bytes", bytes), _field(value, "path", str)
        value = path if content is None else content
    return None if value == "" else value


def _located(path: str, name: str, folder: File) -> File:
    if path.startswith(WEB):
        raise ValueError(f'"{name}" is on the web; {DOWNLOAD}')
    if "://" not in path:
        return folder / path
    try:
        return locate(path, folder)
    # A mistake in one row, not in the data set.
    except UserError as error:
        raise ValueError(str(error)) from error


def _captions(
    row: Mapping[str, Any], config: SourceConfig
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Return the captions of a row, and where they are grouped by language the language of each."""
    captions, languages = _texts(row, config.caption_key)
    if config.caption_key == "captions":
        return captions, languages
    more, more_languages = _texts(row, "captions")
    if captions and more_languages:
        raise TypeError(f'"{config.caption_key}" stands beside captions by language')
    return captions + more, more_languages or languages


def _texts(row: Mapping[str, Any], name: str) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    value = row.get(name)
    if isinstance(value, str):
        return (value,), None
    if isinstance(value, dict):
        # A column of a table has all languages that any row has: null where this one has none.
        groups = {k: [v] if isinstance(v, str) else v or [] for k, v in value.items()}
        if not all(isinstance(group, list) for group in groups.values()):
            raise TypeError(f'"{name}" is {value!r}')
        pairs = [(k, text) for k, group in groups.items() for text in group if text is not None]
        languages, texts = tuple(k for k, _ in pairs), tuple(text for _, text in pairs)
    else:
        given = _field(row, name, list) or []
        languages, texts = None, tuple(text for text in given if text is not None)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f'"{name}" has an item that is no text')
    return texts, languages


def read_label(row: Mapping[str, Any], name: str) -> tuple[str | None, str | None]:
    """Return the label of a row, or why the value that is there cannot be one.

    NaN is no label, and 1.0 is the label 1: pandas writes whole numbers so, if some are missing.
    """
    value = row.get(name)
    # NaN alone differs from itself.
    if value is None or value == "" or value != value:
        return None, None
    if isinstance(value, str | bool):
        return str(value), None
    if isinstance(value, int | float | decimal.Decimal) and (label := _whole(value)) is not None:
        return label, None
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return None, f'"{name}" is {shown}, and a label is a text or a whole number'


def _whole(value: int | float | decimal.Decimal) -> str | None:
    """Return a whole number as text, None for another number."""
    try:
        return str(int(value)) if int(value) == value else None
    except (ValueError, OverflowError):  # not finite
        return None


def identity(
    row: Mapping[str, Any], config: SourceConfig, folder: File, *, by_label: bool
) -> str | None:
    """Return the same text for all rows of one image, None for a row that stands alone.

    Such is a row whose image has no path, or that is no example.
    """
    content, caption = row.get(config.image_key), row.get(config.caption_key)
    try:
        if not isinstance(content, str):
            content = _content(row, config.image_key)
        # A million rows pass here: those of one text, which are the most, are not looked at again.
        if not isinstance(caption, str | None) or "captions" in row:
            _captions(row, config)
        name = resolve(content, folder) if content and isinstance(content, str) else None
    except (BadSampleError, UserError, ValueError, TypeError):
        return None
    return f"{name}\0{read_label(row, config.label_key)}" if name and by_label else name


def resolve(path: str, folder: File) -> str | None:
    """Return the same text for all ways to write the path of a file, None for what is no path."""
    is_local = isinstance(folder, Path)
    if path.startswith(WEB) or "\0" in path:
        return None
    if "://" in path or not is_local:
        # In a store '..' is a name like any other.
        return str(locate(path, folder) if "://" in path else folder / path)
    whole = path if path.startswith("/") else f"{folder!s}/{path}"
    parent, _, name = whole.rpartition("/")
    real, links = _real(parent or "/")
    return os.path.realpath(f"{real}/{name}") if name in links else f"{real}/{name}"


@functools.lru_cache(maxsize=1 << 16)
def _real(folder: str) -> tuple[str, frozenset[str]]:
    """Return where a folder really is, and the names of the links in it."""
    real = os.path.realpath(folder)
    try:
        # One listing: to ask for each image takes minutes where millions lie on a network.
        with os.scandir(real) as entries:
            return real, frozenset(entry.name for entry in entries if entry.is_symlink())
    # The rows of such a file are bad samples.
    except OSError:
        return real, frozenset()


def web_hint(names: Sequence[str]) -> str:
    """Return what to add to a message about columns, if one seems to hold addresses on the web."""
    return (
        f"; of addresses on the web, {DOWNLOAD}" if any("url" in n.lower() for n in names) else ""
    )


def check_names(found: Sequence[str], wanted: Iterable[str], file: File) -> None:
    """Raise UserError if two columns have one of the names that are wanted."""
    for name in wanted:
        if found.count(name) > 1:
            raise UserError(
                f"{file} has {found.count(name)} columns called {name!r}; give each a name of its own."
            )


@contextlib.contextmanager
def bad_sample(place: str) -> Iterator[None]:
    """Make a bad sample of what is at `place` if something goes wrong inside."""
    try:
        yield
    except BadSampleError as error:
        raise BadSampleError(f"{place} is no example ({error})", error.kind) from error
    except UnicodeDecodeError as error:
        raise BadSampleError(
            f"{place} is not UTF-8 ({encoding_problem(error)}; save the file in UTF-8)", "not_utf8"
        ) from error
    # Some of Arrow's are ValueErrors.
    except (OSError, pa.ArrowException) as error:
        raise BadSampleError(f"{place} cannot be read ({error})") from error
    except (ValueError, TypeError) as error:
        raise BadSampleError(f"{place} is no example ({error})", "no_example") from error
