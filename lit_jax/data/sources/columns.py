"""The columns of tables with Arrow types, and Parquet files."""

import collections
import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from pyarrow import parquet

from lit_jax.config import SourceConfig
from lit_jax.data.example import Example
from lit_jax.data.files import File
from lit_jax.data.sources import hints
from lit_jax.data.sources.rows import bad_sample, check_names, example_of, identity, web_hint
from lit_jax.errors import UserError
from lit_jax.files import parse_json

# The bytes of decoded row groups that each process keeps.
CACHE_BYTES = 1 << 28
# The rows of a batch in a pass over the table.
PIECE = 1000
OPTIONAL = ("captions", "teacher_caption", "key")


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of a table that make up examples."""

    config: SourceConfig
    text_only: bool
    # The names of the columns to read.
    names: list[str]
    # The class names, if the labels are class indices.
    classes: list[str] | None

    @classmethod
    def of(cls, schema: pa.Schema, file: File, config: SourceConfig, text_only: bool) -> "Columns":
        """Return the columns that the schema has.

        Raises UserError if a required column is missing, has an unusable type, or occurs twice.
        """
        image, texts = config.image_key, [config.caption_key, config.label_key]
        wanted = [image, *texts, *OPTIONAL]
        check_names(schema.names, wanted, file)
        has_image = image in schema.names and _holds_images(schema.field(image).type)
        if not (has_image or text_only) or not {*texts, "captions"} & {*schema.names}:
            described = ", ".join(f"{field.name} ({field.type})" for field in schema)
            contents = [f.name for f in schema if _holds_images(f.type) and not _is_text(f.type)]
            # img2dataset's tables have the addresses beside the images.
            hint = "" if has_image or contents else web_hint(schema.names)
            raise UserError(
                f"{file} needs a column {image!r} of images, and {texts[0]!r} or {texts[1]!r}, but has "
                f"{described}; set image_key, caption_key and label_key of this source to the names of its "
                f"columns{hint}."
            )
        names = [name for name in dict.fromkeys(wanted) if name in schema.names]
        return cls(config, text_only, names, _class_names(schema, config.label_key))

    def example(self, row: Mapping[str, Any], folder: File, place: str) -> Example:
        with bad_sample(place):
            example = example_of(row, self.config, folder, key=place, text_only=self.text_only)
            return self._with_class_name(example)

    def _with_class_name(self, example: Example) -> Example:
        """Return the example with its class index replaced by the class name, if the names are known."""
        label = example["label"]
        if not self.classes or label is None or not label.removeprefix("-").isdecimal():
            return example
        number, count = int(label), len(self.classes)
        # `datasets` gives -1 to examples without a label.
        if number == -1:
            return {**example, "label": None}
        if not 0 <= number < count:
            problem = f'"{self.config.label_key}" is {number}, of {count} classes'
            return {**example, "label": None, "label_problem": problem}
        return {**example, "label": self.classes[number]}

    def identities(self, table: pa.Table, folder: File, *, by_label: bool) -> list[str | None]:
        """Return `rows.identity` of each row of a table that has the columns `keys`."""
        image, label = self.config.image_key, self.config.label_key
        if not self.keys(table.schema, by_label=False):
            return [None] * len(table)
        paths = table[image]
        if pa.types.is_struct(paths.type):
            paths = _part(paths, "path")
        labels = [None] * len(table)
        if label in table.column_names:
            labels = table[label].to_pylist()
        pairs = zip(paths.to_pylist(), labels, strict=True)
        rows = ({image: path, label: value} for path, value in pairs)
        return [identity(row, self.config, folder, by_label=by_label) for row in rows]

    def keys(self, schema: pa.Schema, *, by_label: bool) -> list[str]:
        """Return the columns, or struct fields, that `identities` needs, without the contents of images."""
        image, label = self.config.image_key, self.config.label_key
        inside = _inside(schema.field(image).type)
        has_path = "path" in inside or _is_text(schema.field(image).type)
        paths = [f"{image}.path" if inside else image] if has_path else []
        return paths + ([label] if paths and by_label and label in self.names else [])

    def without_contents(self, schema: pa.Schema) -> list[str]:
        """Return the columns to read, except the image column if the table itself contains the images."""
        image = self.config.image_key
        return [name for name in self.names if name != image or _is_text(schema.field(name).type)]

    def holds_contents(self, schema: pa.Schema) -> bool:
        """Return whether the image column has a field for the content beside the path."""
        return "bytes" in _inside(schema.field(self.config.image_key).type)


def _holds_images(kind: pa.DataType) -> bool:
    if inside := _inside(kind):
        return bool({"bytes", "path"} & inside)
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return _is_text(kind) or any(test(kind) for test in binary)


def _inside(kind: pa.DataType) -> set[str]:
    """Return the names of a struct's fields, and no names for any other type."""
    return {field.name for field in kind} if pa.types.is_struct(kind) else set()


def _is_text(kind: pa.DataType) -> bool:
    # Dictionary encoding is what pandas writes for a categorical column.
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in text)


def _part(column: pa.Array | pa.ChunkedArray, name: str) -> pa.Array | pa.ChunkedArray:
    """Return the field `name` of each struct, null if the struct is null."""
    return column.flatten()[column.type.get_field_index(name)]


def contents_of(
    column: pa.Array | pa.ChunkedArray, rows: np.ndarray
) -> Iterator[tuple[int, bytes]]:
    """Yield (row, content) of those of `rows` whose struct in an image column has bytes."""
    content = _part(column, "bytes")
    for row in rows.tolist():
        if (value := content[row].as_py()) is not None:
            yield row, value


def _class_names(schema: pa.Schema, label_key: str) -> list[str] | None:
    """Return the class names that a ClassLabel of `datasets` stores in the schema's metadata."""
    # The metadata are a convention of `datasets`. Other writers leave out any part of them.
    with contextlib.suppress(KeyError, ValueError, TypeError):
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return features[label_key]["names"]
    return None


class ParquetSource:
    """A table of concatenated Parquet files, of which only the needed columns are read.

    Parquet has no access to a single row: the whole row group is decoded, and the groups used last are kept.
    Small row groups (a hundred rows with images) make random access fast.

    Raises UserError if a file cannot be read or lacks a column, or if all files are empty.
    """

    def __init__(self, files: Sequence[File], config: SourceConfig, *, text_only: bool = False):
        self.files = list(files)
        with ThreadPoolExecutor(16) as pool:
            schemas, sizes = zip(*pool.map(_read_layout, self.files), strict=True)
        of_files = [
            Columns.of(schema, file, config, text_only)
            for schema, file in zip(schemas, files, strict=True)
        ]
        # A file may lack a column that others have: its rows have no value there.
        self._schema = pa.schema(
            [*{f.name: f for schema in schemas[::-1] for f in schema}.values()]
        )
        classes = (columns.classes for columns in of_files if config.label_key in columns.names)
        self._columns = dataclasses.replace(
            Columns.of(self._schema, files[0], config, text_only), classes=next(classes, None)
        )
        groups = [
            (n, group, rows)
            for n, sizes_of_file in enumerate(sizes)
            for group, rows in enumerate(sizes_of_file)
        ]
        # (file, row group within the file) of each group, and the number of its first row in the whole table.
        self._groups_Gx2 = np.array([group[:2] for group in groups], np.int64).reshape(-1, 2)
        self._starts = np.cumsum([0, *(rows for _, _, rows in groups)])
        if not len(self):
            raise UserError(f"{files[0]} has no rows; give Parquet files that have rows.")
        self._cache = _Cache()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        found = int(self._starts.searchsorted(index, side="right")) - 1
        n, group = self._groups_Gx2[found].tolist()
        file, row = self.files[n], index - int(self._starts[found])
        place = f"row {row} of row group {group} of {file}"
        table = self._cache.get(found)
        if table is None:
            # Arrow raises ValueError or OSError for a damaged file.
            with bad_sample(place), _open_parquet(file) as opened:
                table = opened.read_row_group(group, self._columns.names)
            self._cache.put(found, table)
        # A damaged file may contain text that is not UTF-8.
        with bad_sample(place):
            values = {name: table[name][row].as_py() for name in table.column_names}
        return self._columns.example(values, file.parent, place)

    @property
    def column_names(self) -> list[str]:
        """The names of the columns, of all files together."""
        return self._schema.names

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Yield all in order, up to the first that cannot be read, without the content of images."""
        names = self._columns.without_contents(self._schema)
        with contextlib.suppress(pa.ArrowException, OSError, ValueError):
            for n, group in self._groups_Gx2.tolist():
                for batch in self._batches(n, group, names):
                    yield from batch.to_pylist()

    def identities(self, *, by_label: bool) -> Iterator[list[str | None]]:
        columns = self._columns
        keys = columns.keys(self._schema, by_label=by_label)
        sizes = np.diff(self._starts).tolist()
        for (n, group), count in zip(self._groups_Gx2.tolist(), sizes, strict=True):
            with contextlib.suppress(pa.ArrowException, OSError, ValueError):
                for batch in self._batches(n, group, keys) if keys else ():
                    folder, table = self.files[n].parent, pa.Table.from_batches([batch])
                    yield columns.identities(table, folder, by_label=by_label)
                    count -= len(batch)
            # The rows behind damage, or all of them without keys: None stands for no identity.
            yield [None] * count

    def contents(self, rows: Int[np.ndarray, " R"]) -> Iterator[tuple[int, bytes]]:
        image = self._columns.config.image_key
        if not self._columns.holds_contents(self._schema):
            return
        group_R = self._starts.searchsorted(rows, side="right") - 1
        for found in np.unique(group_R).tolist():
            n, group = self._groups_Gx2[found].tolist()
            start = int(self._starts[found])
            inside = rows[group_R == found] - start
            # Rows of a damaged group have no content here, and become bad samples when they are read.
            with contextlib.suppress(pa.ArrowException, OSError):
                for batch in self._batches(n, group, [f"{image}.bytes"]):
                    here = inside[inside < len(batch)]
                    for row, content in contents_of(batch.column(0), here):
                        yield start + row, content
                    inside, start = inside[len(here) :] - len(batch), start + len(batch)

    def _batches(self, n: int, group: int, names: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a row group in batches, since a column of images may be larger than memory."""
        with _open_parquet(self.files[n]) as opened:
            yield from opened.iter_batches(PIECE, row_groups=[group], columns=names)


def _open_parquet(file: File) -> parquet.ParquetFile:
    try:
        if isinstance(file, Path):
            # A mapped file is read page by page, and its pages are shared between processes.
            return parquet.ParquetFile(pa.memory_map(os.fsencode(file)))
        return parquet.ParquetFile(str(file.path), filesystem=file.filesystem, pre_buffer=True)
    except (pa.ArrowException, OSError) as error:
        hints.check_content(file)
        raise UserError(
            f"{file} cannot be read as a Parquet file ({error}); download it again, or remove it."
        ) from error


def _read_layout(file: File) -> tuple[pa.Schema, list[int]]:
    """Return the schema, and the number of rows in each row group."""
    with _open_parquet(file) as opened:
        about = opened.metadata
        rows = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        return opened.schema_arrow, rows


class _Cache:
    """The tables used last, at most `CACHE_BYTES` together; empty at the start of each worker process."""

    def __init__(self):
        self._tables: collections.OrderedDict[int, pa.Table] = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __reduce__(self):
        # A process that gets the source as a pickle must not get gigabytes of tables with it.
        return _Cache, ()

    def get(self, key: int) -> pa.Table | None:
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
            return self._tables.get(key)

    def put(self, key: int, table: pa.Table) -> None:
        with self._lock:
            # Another thread has decoded the same group meanwhile.
            if key in self._tables:
                return
            self._tables[key] = table
            self._bytes += table.nbytes
            # A single table may be larger than the cache, and is needed all the same.
            while self._bytes > CACHE_BYTES and len(self._tables) > 1:
                self._bytes -= self._tables.popitem(last=False)[1].nbytes
