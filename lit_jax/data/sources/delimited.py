"""Tables of text: CSV and TSV."""

import contextlib
import csv
import errno
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lit_jax.config import SourceConfig
from lit_jax.data.example import Example
from lit_jax.data.files import File, Lines, encoding_problem, find
from lit_jax.data.sources.checks import first_rows
from lit_jax.data.sources.rows import (
    DOWNLOAD,
    WEB,
    bad_sample,
    check_names,
    example_of,
    identity,
    web_hint,
)
from lit_jax.errors import UserError

# A whole number as pandas writes it, see `DelimitedSource`.
_WHOLE = re.compile(r"(-?[0-9]+)(\.0+)?")
# A missing value as pandas, R, SQL and spreadsheets write it.
_NAN = re.compile(r"nan|<na>|n/?a|null|none|\\N", re.IGNORECASE)
_SEPARATORS = {",": "a comma", "\t": "a tab", ";": "';'", "|": "'|'"}


class DelimitedSource:
    """The pairs listed in a CSV or TSV file, with the names of the columns in the first line.

    CSV follows RFC 4180: a field with a comma, a quote or a line break stands between double quotes. A TSV
    has no line breaks inside fields, and quotes count only around a whole field. A TSV with two columns and
    without names is read as caption and path (Conceptual Captions). Blanks around the columns' names are
    stripped; if there are any, the blanks around all fields are stripped, too.

    pandas writes a column of whole numbers as 1.0, 2.0 ... if some values are missing; programs write NaN, NA
    or NULL for a missing value. If all labels of the first rows have this form, the label 1.0 is read as 1
    and NaN as no label.

    Raises UserError if the columns cannot be recognised, or if there are no rows.
    """

    def __init__(self, file: File, config: SourceConfig, *, text_only: bool = False):
        self._separator = "," if file.suffix.lower() == ".csv" else "\t"
        self._comma = self._separator == ","
        self._lines = Lines(file, quoted=self._comma)
        self._config = config
        self._text_only = text_only
        self._blanks = self._whole_labels = False
        first = self._first_line()
        header = self._is_header(first)
        self._first = 1 if header else 0
        self._names = first if header else [config.caption_key, config.image_key]
        if not len(self):
            raise UserError(f"{file} has a header and no rows; add rows, or give another file.")
        check_names(self._names, [config.image_key, config.caption_key, config.label_key], file)
        # Decided once for the whole table, since a single row does not show how pandas wrote the column.
        labels = {label for row in first_rows(self) if (label := row.get(config.label_key))}
        labels = {label for label in labels if not _NAN.fullmatch(label)}
        self._whole_labels = bool(labels) and all(map(_WHOLE.fullmatch, labels))

    def _first_line(self) -> list[str]:
        """Return the fields of the first line, and set whether blanks around fields are stripped."""
        # Classic Mac OS, and Excel's formats "(Macintosh)", end lines with a carriage return alone.
        if len(self._lines) == 1 and b"\r" in self._lines[0].strip():
            raise UserError(
                f"The lines of {self._lines.file} end with carriage returns only; save it with line feeds, "
                "as CSV or TSV in UTF-8."
            )
        try:
            first = self._fields(self._lines[0])
            # `_blanks` changes the way `_fields` splits a line, so the line is split again.
            self._blanks = first != [*map(str.strip, first)]
            return self._fields(self._lines[0])
        except UnicodeDecodeError as error:
            reason = encoding_problem(error)
        except ValueError as error:
            self._refuse_separator([])
            reason = str(error)
        raise UserError(
            f"The first line of {self._lines.file} is not a row of a table ({reason}); save it as CSV or TSV "
            "in UTF-8."
        )

    def _is_header(self, first: Sequence[str]) -> bool:
        """Return whether the first line names the columns. Raise UserError if it is no usable row either."""
        config, file = self._config, self._lines.file
        image = self._text_only or config.image_key in first
        if image and {config.caption_key, config.label_key, "captions"} & set(first):
            return True
        # Conceptual Captions has no names of columns: its first line is a caption and an image.
        pair = not self._comma and len(first) == 2
        if pair and self._is_image(first[1]):
            return False
        if any(field.startswith(WEB) for field in first):
            raise UserError(
                f"{file} lists web addresses and has no header with the names of columns; {DOWNLOAD}, and "
                "give its output."
            )
        self._refuse_separator(first)
        raise UserError(
            f"{file} needs the columns {config.image_key!r}, and {config.caption_key!r} or "
            f"{config.label_key!r}, but its first line has {', '.join(map(repr, first))}; set image_key, "
            f"caption_key and label_key of this source to the names of its columns{web_hint(first)}."
        )

    def _refuse_separator(self, first: Sequence[str]) -> None:
        """Raise UserError if another separator divides the first line better than into the names `first`."""
        config, line, file = self._config, self._lines[0].decode(), self._lines.file
        wanted, expected = {config.image_key, config.caption_key, config.label_key}, self._separator
        for mark, name in _SEPARATORS.items():
            others = {field.strip(' "\r\n') for field in line.split(mark)} & wanted - {*first}
            if mark != expected and (others or (len(first) == 1 and mark in line)):
                raise UserError(
                    f"The fields of {file} are separated by {name}, but a *{file.suffix} file needs "
                    f"{_SEPARATORS[expected]}; save it with {_SEPARATORS[expected]} between the fields."
                )

    def _is_image(self, field: str) -> bool:
        if field.startswith(WEB):
            return self._text_only
        try:
            return find(self._lines.file.parent / field).is_file()
        except OSError as error:
            # The field is a long caption instead of a path.
            if error.errno == errno.ENAMETOOLONG:
                return False
            raise

    def __len__(self) -> int:
        return len(self._lines) - self._first

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        line = index + self._first
        with bad_sample(self._lines.place(line)):
            row = self._row(self._lines[line])
            folder = self._lines.file.parent
            return example_of(row, self._config, folder, text_only=self._text_only)

    @property
    def files(self) -> list[File]:
        """The file, in a list, as `grouping.Table` needs it."""
        return [self._lines.file]

    @property
    def column_names(self) -> Sequence[str]:
        """The names in the header, or those of the config's keys without a header."""
        return self._names

    def rows(self) -> Iterator[Mapping[str, str | None]]:
        """Yield the readable rows in order."""
        for line in itertools.chain.from_iterable(self._lines.blocks(self._first)):
            with contextlib.suppress(ValueError):
                yield self._row(line)

    def identities(self, *, by_label: bool) -> Iterator[list[str | None]]:
        """Yield `rows.identity` of each row, in order and in batches."""
        folder = self._lines.file.parent

        # As in `JsonlSource`, a line that cannot be read stays alone and becomes a bad sample on access.
        def name(line: bytes) -> str | None:
            try:
                return identity(self._row(line), self._config, folder, by_label=by_label)
            except ValueError:
                return None

        for lines in self._lines.blocks(self._first):
            yield [name(line) for line in lines]

    def contents(self, rows: np.ndarray) -> tuple[()]:
        # A text file contains no images.
        return ()

    def _row(self, line: bytes) -> dict[str, str | None]:
        """Return the fields of a line by name. Raise ValueError if their number is wrong."""
        values = self._fields(line)
        # A wrong number of fields would shift captions and paths against each other.
        if len(values) != len(self._names):
            quote = "; put a field that contains a comma in double quotes" if self._comma else ""
            raise ValueError(f"{len(values)} fields for {len(self._names)} columns{quote}")
        row = {name: value or None for name, value in zip(self._names, values, strict=True)}
        label = row.get(self._config.label_key)
        if self._whole_labels and label:
            match = _WHOLE.fullmatch(label)
            row[self._config.label_key] = (
                match[1] if match else None if _NAN.fullmatch(label) else label
            )
        return row

    def _fields(self, line: bytes) -> list[str]:
        text = line.decode().rstrip("\r\n")
        if not self._comma:
            fields = [_unquoted(field) for field in text.split("\t")]
        elif '"' in text or "\r" in text:
            # `csv` only where it is needed: splitting plain lines takes a third of its time.
            try:
                (fields,) = csv.reader([text], strict=True, skipinitialspace=self._blanks)
            except csv.Error as error:
                raise ValueError(f"{error}; write a quote in a quoted field twice") from error
        else:
            fields = text.split(",")
        return [field.strip() for field in fields] if self._blanks else fields


def _unquoted(field: str) -> str:
    """Return a field of a TSV without its quotes, if they follow the rules of CSV."""
    # Inner quotes must be doubled; otherwise the outer quotes are part of the caption.
    inside = field[1:-1].replace('""', "")
    quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inside
    return field[1:-1].replace('""', '"') if quoted else field
