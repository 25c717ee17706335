"""From a row with named fields, of whatever format, to an `Example`."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError, Example
from lit_jax.data.files import File, locate
from lit_jax.errors import UserError

WEB = ("http://", "https://")


def example_of(
    row: Mapping[str, Any],
    config: SourceConfig,
    folder: File,
    *,
    key: str = "",
    text_only: bool = False,
) -> Example:
    """The example that a row says.

    Its fields are named by `config`: an image (path relative to `folder`, address, content, or a mapping of
    "bytes" and "path"), a caption or a list of them, a label; and "captions", "teacher_caption",
    "key". Captions may be grouped by language.

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
    captions, languages = _texts(row, config.caption_key)
    if config.caption_key != "captions":
        more, more_languages = _texts(row, "captions")
        if captions and more_languages:
            raise TypeError(f'"{config.caption_key}" stands beside captions by language')
        captions, languages = captions + more, more_languages or languages
    if image is None and not captions:
        raise TypeError(f'"{config.caption_key}" is missing')
    return Example(
        key=_field(row, "key", str)
        or key
        or (content if isinstance(content, str) else captions[0]),
        image=image,
        captions=captions,
        languages=languages,
        teacher_caption=_field(row, "teacher_caption", str),
        label=_label(row, config.label_key),
    )


def _field(row: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """An optional field of a row; null counts as absent."""
    value = row.get(name)
    if value is not None and not isinstance(value, kind):
        raise TypeError(f'"{name}" is {value!r}')
    return value


def _content(row: Mapping[str, Any], name: str) -> str | bytes | None:
    """An image as the row has it: its path or address, or its content."""
    value = _field(row, name, (str, bytes, dict))
    if isinstance(value, dict):
        content, path = _field(value, "bytes", bytes), _field(value, "path", str)
        value = path if content is None else content
    return None if value == "" else value


def _located(path: str, name: str, folder: File) -> File:
    if path.startswith(WEB):
        raise ValueError(f'"{name}" is on the web; download images first, with img2dataset')
    if "://" not in path:
        return folder / path
    try:
        return locate(path, folder)
    except UserError as error:  # of one row, not of the data set
        raise ValueError(str(error)) from error


def _texts(row: Mapping[str, Any], name: str) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """The captions of a field, and where they are grouped by language the language of each."""
    value, languages = _field(row, name, (str, list, dict)), None
    if isinstance(value, dict):
        # A column of a table has all languages that any row has: null where this one has none.
        groups = {k: [v] if isinstance(v, str) else v or [] for k, v in value.items()}
        if not all(isinstance(group, list) for group in groups.values()):
            raise TypeError(f'"{name}" is {value!r}')
        texts = tuple(text for group in groups.values() for text in group)
        languages = tuple(language for language, group in groups.items() for _ in group)
    else:
        texts = (value,) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f'"{name}" has an item that is no text')
    return texts, languages


def _label(row: Mapping[str, Any], name: str) -> str | None:
    value = _field(row, name, (str, int))
    return None if value is None else str(value)


@contextlib.contextmanager
def bad_sample(place: str) -> Iterator[None]:
    """What goes wrong inside makes a bad sample of what is at `place`."""
    try:
        yield
    except BadSampleError as error:
        raise BadSampleError(f"{place} is no example ({error})", error.kind) from error
    except UnicodeDecodeError as error:
        raise BadSampleError(f"{place} is not UTF-8 ({error})", "not_utf8") from error
    except (OSError, pa.ArrowException) as error:  # some of Arrow's are ValueErrors
        raise BadSampleError(f"{place} cannot be read ({error})") from error
    except (ValueError, TypeError) as error:
        raise BadSampleError(f"{place} is no example ({error})", "no_example") from error
