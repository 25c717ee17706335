"""Tables of text: CSV and TSV."""

import csv
import errno
from collections.abc import Sequence

from lit_jax.config import SourceConfig
from lit_jax.data.example import Example
from lit_jax.data.files import File, Lines
from lit_jax.data.sources.rows import WEB, bad_sample, example_of
from lit_jax.errors import UserError


class DelimitedSource:
    """Pairs listed in a table: the names of its columns in the first line, paths of images in one of them.

    CSV is that of RFC 4180: what has a comma, a quote or a line break stands between double quotes. A TSV has
    no line breaks inside of fields, and quotes count only around a whole field. Without names, a TSV of
    two columns is read as caption and path (Conceptual Captions).
    """

    def __init__(self, file: File, config: SourceConfig, *, text_only: bool = False):
        self._comma = file.suffix.lower() == ".csv"
        self._lines = Lines(file, quoted=self._comma)
        self._config = config
        self._text_only = text_only
        try:
            first = self._fields(0)
        except (ValueError, csv.Error) as error:
            raise UserError(
                f"The first line of {file} is no line of a table ({error}); save it as CSV or "
                "TSV in UTF-8."
            ) from error
        header = self._is_header(first)
        self._first = 1 if header else 0
        self._names = first if header else [config.caption_key, config.image_key]
        if not len(self):
            raise UserError(f"{file} has the names of its columns, and no line after them.")

    def _is_header(self, first: Sequence[str]) -> bool:
        config, file = self._config, self._lines.file
        image = self._text_only or config.image_key in first
        if image and {config.caption_key, config.label_key} & set(first):
            return True
        pair = not self._comma and len(first) == 2
        if pair and self._is_image(first[1]):
            return False
        raise UserError(
            f"{file} needs the columns {config.image_key!r}, and {config.caption_key!r} or "
            f"{config.label_key!r}, but its first line has {', '.join(map(repr, first))}; set image_key, "
            "caption_key and label_key of this source to names of columns."
        )

    def _is_image(self, field: str) -> bool:
        if field.startswith(WEB):
            return self._text_only
        try:
            return (self._lines.file.parent / field).is_file()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return False
            raise

    def __len__(self) -> int:
        return len(self._lines) - self._first

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        line = index + self._first
        place = self._lines.place(line)
        with bad_sample(place):
            try:
                values = self._fields(line)
            except csv.Error as error:
                raise ValueError(str(error)) from error
            if len(values) != len(self._names):
                raise ValueError(f"{len(values)} fields for {len(self._names)} columns")
            row = {name: value or None for name, value in zip(self._names, values, strict=True)}
            folder = self._lines.file.parent
            return example_of(row, self._config, folder, text_only=self._text_only)

    def _fields(self, line: int) -> list[str]:
        text = self._lines[line].decode().rstrip("\r\n")
        if self._comma:
            (fields,) = csv.reader([text], strict=True)
            return fields
        return [_unquoted(field) for field in text.split("\t")]


def _unquoted(field: str) -> str:
    """A field of a TSV without its quotes, if it is one that a writer of quotes has written."""
    inside = field[1:-1].replace('""', "")
    quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inside
    return field[1:-1].replace('""', '"') if quoted else field
