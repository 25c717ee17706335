"""Tables in Arrow's types: Parquet files, and folders that the Hugging Face `datasets` library saves."""

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from lit_jax.config import SourceConfig
from lit_jax.data.example import Example
from lit_jax.data.files import File
from lit_jax.data.sources import splits
from lit_jax.data.sources.rows import bad_sample, example_of
from lit_jax.errors import UserError
from lit_jax.files import parse_json

CACHE_BYTES = 1 << 28  # of decoded row groups, in each process
OPTIONAL = ("captions", "teacher_caption", "key")


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns that make examples, of a table with a known schema."""

    config: SourceConfig
    text_only: bool
    names: list[str]  # of those to read
    classes: list[str] | None  # names of the labels, if these are numbers of classes

    @classmethod
    def of(cls, schema: pa.Schema, file: File, config: SourceConfig, text_only: bool) -> "Columns":
        """Raises UserError if a column is missing or of a type that it cannot have."""
        image, texts = config.image_key, [config.caption_key, config.label_key]
        has_image = image in schema.names and _holds_images(schema.field(image).type)
        if not (has_image or text_only) or not {*texts, "captions"} & {*schema.names}:
            described = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise UserError(
                f"{file} needs a column {image!r} of images, and {texts[0]!r} or {texts[1]!r}, but has "
                f"{described}; set image_key, caption_key and label_key of this source to names of columns."
            )
        wanted = [image, *texts, *OPTIONAL]
        names = [name for name in dict.fromkeys(wanted) if name in schema.names]
        return cls(config, text_only, names, _class_names(schema, config.label_key))

    def example(self, row: Mapping[str, Any], folder: File, place: str) -> Example:
        with bad_sample(place):
            key = self.config.label_key
            if self.classes and isinstance(label := row.get(key), int):
                # -1 is what `datasets` gives to examples without a label.
                if not -1 <= label < len(self.classes):
                    raise ValueError(f'"{key}" is {label}, of {len(self.classes)} classes')
                row = {**row, key: None if label < 0 else self.classes[label]}
            return example_of(row, self.config, folder, key=place, text_only=self.text_only)


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {"bytes", "path"} & {field.name for field in kind} != set()
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in (*binary, *text))


def _class_names(schema: pa.Schema, label_key: str) -> list[str] | None:
    """The names that a ClassLabel of `datasets` has written into the schema's metadata."""
    with contextlib.suppress(KeyError, ValueError, TypeError):
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return features[label_key]["names"]
    return None


class ParquetSource:
    """Parquet files, one behind the other; of each only the columns that are needed.

    Parquet cannot give one row: its whole row group is decoded, and the latest ones are kept. Small row
    groups (a hundred rows with images) make random access fast.

    Raises UserError if a file cannot be read or lacks a column, or if all are empty.
    """

    def __init__(self, files: Sequence[File], config: SourceConfig, *, text_only: bool = False):
        self._files = list(files)
        with ThreadPoolExecutor(16) as pool:
            schemas, sizes = zip(*pool.map(_read_layout, self._files), strict=True)
        found = zip(schemas, files, strict=True)
        self._columns, *_ = [Columns.of(s, f, config, text_only) for s, f in found]
        groups = [
            (n, group, rows)
            for n, sizes_of_file in enumerate(sizes)
            for group, rows in enumerate(sizes_of_file)
        ]
        # Which file and which of its row groups, and the number of the first row in it and in the next.
        self._groups_Gx2 = np.array([group[:2] for group in groups], np.int64).reshape(-1, 2)
        self._starts = np.cumsum([0, *(rows for _, _, rows in groups)])
        if not len(self):
            raise UserError(f"{files[0]} has no rows; use Parquet files that have some.")
        self._cache = _Cache()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        found = int(self._starts.searchsorted(index, side="right")) - 1
        n, group = self._groups_Gx2[found].tolist()
        file, row = self._files[n], index - int(self._starts[found])
        place = f"row {row} of row group {group} of {file}"
        table = self._cache.get(found)
        if table is None:
            # Arrow's errors are ValueErrors or OSErrors.
            with bad_sample(place), _open_parquet(file) as opened:
                table = opened.read_row_group(group, self._columns.names)
            self._cache.put(found, table)
        values = {name: table[name][row].as_py() for name in table.column_names}
        return self._columns.example(values, file.parent, place)


def _open_parquet(file: File) -> parquet.ParquetFile:
    try:
        if isinstance(file, Path):
            return parquet.ParquetFile(file, memory_map=True)
        return parquet.ParquetFile(str(file.path), filesystem=file.filesystem, pre_buffer=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file} is no Parquet file that can be read ({error}); get it again or leave it out."
        ) from error


def _read_layout(file: File) -> tuple[pa.Schema, list[int]]:
    """The schema, and the number of rows of each row group."""
    with _open_parquet(file) as opened:
        about = opened.metadata
        rows = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        return opened.schema_arrow, rows


class _Cache:
    """The tables used last, of together at most `CACHE_BYTES`; starts empty in every worker process."""

    def __init__(self):
        self._tables: collections.OrderedDict[int, pa.Table] = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __reduce__(self):
        return _Cache, ()

    def get(self, key: int) -> pa.Table | None:
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
            return self._tables.get(key)

    def put(self, key: int, table: pa.Table) -> None:
        with self._lock:
            if key in self._tables:  # another thread was faster
                return
            self._tables[key] = table
            self._bytes += table.nbytes
            while self._bytes > CACHE_BYTES and len(self._tables) > 1:
                self._bytes -= self._tables.popitem(last=False)[1].nbytes


class HuggingFaceSource:
    """A folder that `Dataset.save_to_disk` wrote, or a split of one by `DatasetDict.save_to_disk`.

    Its Arrow files are mapped into memory, not read.

    Raises UserError if there is no such split, or if the folder is damaged, empty or lacks a column.
    """

    def __init__(self, folder: Path, config: SourceConfig, *, text_only: bool = False):
        self._folder = folder
        try:
            state = parse_json((folder / "state.json").read_text(encoding="utf-8"))
            self._files = [folder / row["filename"] for row in state["_data_files"]]
            self._tables = [_map_table(file) for file in self._files]
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise UserError(f"{folder} is damaged ({error}); save the data set again.") from error
        self._starts = np.cumsum([0, *(len(table) for table in self._tables)])
        if not len(self):
            raise UserError(f"{folder} has no rows; save a data set that has some.")
        self._columns = Columns.of(self._tables[0].schema, folder, config, text_only)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        found = int(self._starts.searchsorted(index, side="right")) - 1
        table, row = self._tables[found], index - int(self._starts[found])
        values = {name: table[name][row].as_py() for name in self._columns.names}
        return self._columns.example(values, self._folder, f"row {index} of {self._folder}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_tables": [_map_table(file) for file in state["_files"]]}


def _map_table(file: Path) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


def open_dict(folder: Path, config: SourceConfig, *, text_only: bool = False) -> HuggingFaceSource:
    """The split of a saved DatasetDict that `config` names."""
    names = sorted(file.parent.name for file in folder.glob("*/state.json"))
    if config.split not in names:
        raise splits.not_found(folder, config.split, names)
    return HuggingFaceSource(folder / config.split, config, text_only=text_only)
