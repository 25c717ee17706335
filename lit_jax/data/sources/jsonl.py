"""Tables with one JSON object on each line."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError, Example
from lit_jax.data.files import File, Lines
from lit_jax.data.sources.json_list import JsonItems
from lit_jax.data.sources.lists import folder_of_images
from lit_jax.data.sources.rows import bad_sample, example_of, identity
from lit_jax.errors import UserError
from lit_jax.files import parse_json

# The number of first lines of which at least one has to be good.
TRIED = 20


class JsonlSource:
    """The pairs listed in a JSONL file, for example captions.jsonl.

    A line is an object:

        {"image": "a.jpg", "caption": "a dog"}  or  {"image": ..., "captions": [...], "label": "dog"}
        or, by language,  {"image": ..., "captions": {"en": ["a dog"], "de": ["ein Hund"]}}

    "image" is a path, relative to the file's folder or absolute; "key", "label" and captions are optional.
    For a text tower that learns from a teacher, a line needs no image, and "teacher_caption" is a translation
    of its captions into the teacher's language (without it, the captions are in that language).
    Only the lines' offsets are kept in memory; a line is parsed on access.

    Raises UserError if all of the first lines are bad.
    """

    def __init__(
        self,
        file: File,
        config: SourceConfig,
        *,
        text_only: bool = False,
        folder: File | None = None,
        lines: Lines | JsonItems | None = None,
    ):
        """Open a file. `folder` is the base of relative image paths, by default the file's own folder."""
        self._lines = lines or Lines(file)
        self._folder = folder or file.parent
        self._config = config
        self._text_only = text_only
        self._check_format()

    def _check_format(self) -> None:
        """Raise UserError if all of the first lines are bad."""
        # Checked here: later it would be one bad sample after another, in a worker process.
        first = None
        for index in range(min(len(self), TRIED)):
            try:
                self[index]
                return
            except BadSampleError as error:
                first = first or error
        image, caption = self._config.image_key, self._config.caption_key
        message = f'{first}; a line looks like {{"{image}": "a.jpg", "{caption}": "a dog"}}.'
        raise UserError(message[:1].upper() + message[1:]) from first

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Example:
        with bad_sample(self._lines.place(index)):
            row = _row(self._lines[index])
            return example_of(row, self._config, self._folder, text_only=self._text_only)

    @property
    def files(self) -> list[File]:
        """The file, in a list, as `grouping.Table` needs it."""
        return [self._lines.file]

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Yield the readable rows in order."""
        for line in itertools.chain.from_iterable(self._lines.blocks()):
            with contextlib.suppress(ValueError):
                yield _row(line)

    def identities(self, *, by_label: bool) -> Iterator[list[str | None]]:
        """Yield `rows.identity` of each row, in order and in batches."""

        # A line that cannot be read stays alone here, and becomes a bad sample on access.
        def name(line: bytes) -> str | None:
            try:
                return identity(_row(line), self._config, self._folder, by_label=by_label)
            except ValueError:
                return None

        for lines in self._lines.blocks():
            yield [name(line) for line in lines]

    def contents(self, rows: np.ndarray) -> tuple[()]:
        # A text file contains no images.
        return ()


def _row(line: bytes) -> Mapping[str, Any]:
    row = parse_json(line.decode())
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def open_json_list(file: File, config: SourceConfig, *, text_only: bool = False) -> JsonlSource:
    """Open a list of rows in a JSON file, whose images may lie in a folder beside the file."""
    items, folder = JsonItems(file), file.parent
    # Annotation files of BLIP and LLaVA usually lie apart from the images, so the usual folders are tried.
    if not text_only:
        rows = [parse_json(items[index].decode()) for index in range(min(len(items), 5))]
        images = [row.get(config.image_key) for row in rows if isinstance(row, dict)]
        paths = [path for path in images if isinstance(path, str) and "://" not in path]
        folder = folder_of_images(file, paths) if paths else folder
    return JsonlSource(file, config, text_only=text_only, folder=folder, lines=items)
