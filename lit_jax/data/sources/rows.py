"""Turn a row with named fields, from any format of table, into an `Example`."""

import contextlib
import decimal
import functools
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError, Example
from lit_jax.data.files import File, encoding_problem, find, locate
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

    `config` names the fields of the image (path relative to `folder`, address, content, or a mapping with
    "bytes" and "path"), of the caption or captions, and of the label. The fields "captions",
    "teacher_caption" and "key" have fixed names. Captions may be grouped by language. A label of a wrong type
    is kept as `label_problem`, and a key of a wrong type is ignored.

    Args:
        key: the default key. Without any key the image's path is the key, or the first caption.
        text_only: whether the row may lack an image, or name one on the web.

    Raises TypeError or ValueError if a field is missing or has a wrong type, BadSampleError if the image is
    missing.
    """
    content = _content(row, config.image_key)
    # A missing image is a bad sample of a kind of its own in the counts.
    if content is None and not text_only:
        raise BadSampleError(f'"{config.image_key}" is missing', "missing")
    if isinstance(content, str):
        # A text tower needs no image, so the image may stay on the web.
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
    """Return an optional field of a row; null and NaN count as absent."""
    value = row.get(name)
    if _is_missing(value):
        return None
    if not isinstance(value, kind):
        raise TypeError(f'"{name}" is {value!r}')
    return value


def _is_missing(value: Any) -> bool:
    """Return whether a value is null, or NaN: pandas stores a missing text of a table as NaN."""
    # Only NaN differs from itself.
    return value is None or value != value


def _teacher(row: Mapping[str, Any]) -> str | None:
    """Return the teacher's caption, or None if it is not text, for a task that does not need it."""
    value = row.get("teacher_caption")
    return value if isinstance(value, str) else None


def _key(row: Mapping[str, Any]) -> str | None:
    value = row.get("key")
    if isinstance(value, int | float | decimal.Decimal) and not isinstance(value, bool):
        return _whole(value)
    return value if isinstance(value, str) else None


def _content(row: Mapping[str, Any], name: str) -> str | bytes | None:
    """Return the row's image: its path or address, or its content. An empty path counts as None."""
    value = _field(row, name, (str, bytes, dict))
    if isinstance(value, dict):
        content, path = _field(value, "bytes", bytes), _field(value, "path", str)
        value = path if content is None else content
    return None if value == "" else value


def _located(path: str, name: str, folder: File) -> File:
    if path.startswith(WEB):
        raise ValueError(f'"{name}" is a web address; {DOWNLOAD}')
    if "://" not in path:
        return folder / path
    try:
        return locate(path, folder)
    # The mistake is in one row and must not end the run.
    except UserError as error:
        raise ValueError(str(error)) from error


def _captions(
    row: Mapping[str, Any], config: SourceConfig
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Return the captions of a row, and the language of each caption if they are grouped by language."""
    captions, languages = _texts(row, config.caption_key)
    if config.caption_key == "captions":
        return captions, languages
    more, more_languages = _texts(row, "captions")
    if captions and more_languages:
        raise TypeError(f'"{config.caption_key}" is given in addition to captions by language')
    return captions + more, more_languages or languages


def _texts(row: Mapping[str, Any], name: str) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    value = _text(row.get(name))
    if isinstance(value, str):
        return (value,), None
    if isinstance(value, dict):
        # In Arrow every row has the languages of all rows, with null for those without captions.
        given = {k: None if _is_missing(v) else v for k, v in value.items()}
        groups = {k: [v] if isinstance(v, str | bytes) else v or [] for k, v in given.items()}
        if not all(isinstance(group, list) for group in groups.values()):
            raise TypeError(f'"{name}" is {value!r}')
        pairs = [
            (k, text) for k, group in groups.items() for text in group if not _is_missing(text)
        ]
        languages, texts = tuple(k for k, _ in pairs), tuple(_text(text) for _, text in pairs)
    else:
        given = _field(row, name, list) or []
        languages, texts = None, tuple(_text(text) for text in given if not _is_missing(text))
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f'"{name}" has an item that is not text')
    return texts, languages


def _text(value: Any) -> Any:
    """Return bytes as text, and any other value as it is. Raise UnicodeDecodeError unless they are UTF-8.

    Spark and Hive write the texts of a Parquet file as bytes that are not marked as text.
    """
    return value.decode() if isinstance(value, bytes) else value


def read_label(row: Mapping[str, Any], name: str) -> tuple[str | None, str | None]:
    """Return (label, None), or (None, reason) if the value cannot be a label, or (None, None) without one.

    NaN means no label, and 1.0 is the label 1: pandas stores whole numbers as floats if some are missing.
    """
    value = row.get(name)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if _is_missing(value) or value == "":
        return None, None
    if isinstance(value, str | bool):
        return str(value), None
    if isinstance(value, int | float | decimal.Decimal) and (label := _whole(value)) is not None:
        return label, None
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return None, f'"{name}" is {shown}, but a label must be text or a whole number'


def _whole(value: int | float | decimal.Decimal) -> str | None:
    """Return a whole number as text, or None for any other number."""
    try:
        return str(int(value)) if int(value) == value else None
    # The number is NaN or infinite.
    except (ValueError, OverflowError):
        return None


def identity(
    row: Mapping[str, Any], config: SourceConfig, folder: File, *, by_label: bool
) -> str | None:
    """Return the same text for all rows of one image, or None for a row that stays alone.

    A row stays alone if its image has no path, or if the row cannot be used.
    """
    content, caption = row.get(config.image_key), row.get(config.caption_key)
    try:
        if not isinstance(content, str):
            content = _content(row, config.image_key)
        # Millions of rows pass here, so the common case of a single caption is not validated again.
        if not isinstance(caption, str | None) or "captions" in row:
            _captions(row, config)
        name = resolve(content, folder) if content and isinstance(content, str) else None
    except (BadSampleError, UserError, ValueError, TypeError):
        return None
    return f"{name}\0{read_label(row, config.label_key)}" if name and by_label else name


def resolve(path: str, folder: File) -> str | None:
    """Return the same text for all spellings of a file's path, or None if the text is not a path."""
    is_local = isinstance(folder, Path)
    if path.startswith(WEB) or "\0" in path:
        return None
    if "://" in path or not is_local:
        # An object store has no folders, so '..' is a name like any other.
        return str(locate(path, folder) if "://" in path else folder / path)
    whole = path if path.startswith("/") else f"{folder!s}/{path}"
    parent, _, name = whole.rpartition("/")
    real, links, normal_forms = _real(parent or "/")
    name = name if name.isascii() else normal_forms.get(name, name)
    return os.path.realpath(f"{real}/{name}") if name in links else f"{real}/{name}"


# Cached, because the many images of a table lie in few folders.
@functools.lru_cache(maxsize=1 << 16)
def _real(folder: str) -> tuple[str, frozenset[str], Mapping[str, str]]:
    """Return the real path of a folder, the names of the links in it, and other spellings of its names.

    The last result leads from a name in a normal form of Unicode to the name of the file that `find` takes.
    """
    real = os.path.realpath(str(find(Path(folder))))
    try:
        # One listing of the folder: asking for each of millions of images takes minutes on a network disk.
        with os.scandir(real) as entries:
            is_link = {entry.name: entry.is_symlink() for entry in entries}
    # The folder is missing or unreadable; reading its images then makes bad samples.
    except OSError:
        return real, frozenset(), {}
    normal_forms = {
        other: name
        for name in is_link
        if not name.isascii()
        for form in ("NFC", "NFD")
        if (other := unicodedata.normalize(form, name)) not in is_link
    }
    return real, frozenset(name for name, linked in is_link.items() if linked), normal_forms


def web_hint(names: Sequence[str]) -> str:
    """Return an addition to a message about columns, if a column seems to contain web addresses."""
    return (
        f"; if they hold web addresses, {DOWNLOAD}"
        if any("url" in n.lower() for n in names)
        else ""
    )


def check_names(found: Sequence[str], wanted: Iterable[str], file: File) -> None:
    """Raise UserError if two columns share one of the `wanted` names."""
    for name in wanted:
        if found.count(name) > 1:
            raise UserError(
                f"{file} has {found.count(name)} columns called {name!r}; give each a name of its own."
            )


@contextlib.contextmanager
def bad_sample(place: str) -> Iterator[None]:
    """Turn the errors of reading one example into BadSampleError, with its `place` in the message."""
    try:
        yield
    except BadSampleError as error:
        raise BadSampleError(f"{place} is not an example ({error})", error.kind) from error
    except UnicodeDecodeError as error:
        raise BadSampleError(
            f"{place} is not UTF-8 ({encoding_problem(error)}; save the file in UTF-8)", "not_utf8"
        ) from error
    # Some of Arrow's exceptions are ValueErrors, so they come first.
    except (OSError, pa.ArrowException) as error:
        raise BadSampleError(f"{place} cannot be read ({error})") from error
    except (ValueError, TypeError) as error:
        raise BadSampleError(f"{place} is not an example ({error})", "no_example") from error
