"""Folders that the Hugging Face `datasets` library saves."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from lit_jax.config import SourceConfig
from lit_jax.data.copies import cached_copies
from lit_jax.data.example import Example
from lit_jax.data.files import File
from lit_jax.data.listing import is_system, walk
from lit_jax.data.sources import splits
from lit_jax.data.sources.columns import Columns, contents_of
from lit_jax.data.sources.rows import bad_sample
from lit_jax.errors import UserError
from lit_jax.files import parse_json


class HuggingFaceSource:
    """A folder that `Dataset.save_to_disk` wrote, or a split that `DatasetDict.save_to_disk` wrote.

    The Arrow files are mapped into memory, not read; those in an object store are copied to this machine. A
    damaged file would crash the process inside Arrow, so each batch (`datasets` writes a thousand rows) is
    validated before its first row is taken. The validation reads the texts of the batch, but only the offsets
    of its images.

    Raises UserError if the split does not exist, or if the folder is damaged, empty or lacks a column, and
    OSError if its state.json cannot be read.
    """

    def __init__(self, folder: File, config: SourceConfig, *, text_only: bool = False):
        self._folder = folder
        # Read outside of `_damage`, because a store that does not answer is not damaged.
        state = (folder / "state.json").read_bytes()
        with _damage(folder):
            names = [row["filename"] for row in parse_json(state)["_data_files"]]
            if not all(isinstance(name, str) for name in names):
                raise TypeError("a filename in its state.json is not text")
        # Arrow maps only files of this machine.
        local = cached_copies(folder, names)
        self.files = [local / name for name in names]
        with _damage(folder):
            self._batches = _map_batches(self.files)
        self._starts = np.cumsum([0, *map(len, self._batches)])
        if not len(self):
            raise UserError(f"{folder} has no rows; save a data set that has rows.")
        self._schema = self._batches[0].schema
        self._columns = Columns.of(self._schema, folder, config, text_only)
        self._valid: set[int] = set()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        found = int(self._starts.searchsorted(index, side="right")) - 1
        place, row = f"row {index} of {self._folder}", index - int(self._starts[found])
        with bad_sample(place):
            batch = self._batch(found)
            values = {name: batch[name][row].as_py() for name in self._columns.names}
        return self._columns.example(values, self._folder, place)

    @property
    def column_names(self) -> list[str]:
        """The names of the columns."""
        return self._schema.names

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Yield all in order, up to the first that cannot be read, without the content of images."""
        names = self._columns.without_contents(self._schema)
        # The rows are a sample for checks. `__getitem__` reports the damaged batch.
        with contextlib.suppress(pa.ArrowException, ValueError):
            for found in range(len(self._batches)):
                yield from self._batch(found).select(names).to_pylist()

    def identities(self, *, by_label: bool) -> Iterator[list[str | None]]:
        for found, batch in enumerate(self._batches):
            try:
                table = pa.Table.from_batches([self._batch(found)])
                yield self._columns.identities(table, self._folder, by_label=by_label)
            except (pa.ArrowException, ValueError):
                # None stands for no identity, so rows of a damaged batch are joined with no others.
                yield [None] * len(batch)

    def contents(self, rows: Int[np.ndarray, " R"]) -> Iterator[tuple[int, bytes]]:
        image = self._columns.config.image_key
        if not self._columns.holds_contents(self._schema):
            return
        batch_R = self._starts.searchsorted(rows, side="right") - 1
        for found in np.unique(batch_R).tolist():
            start = int(self._starts[found])
            column = self._batch(found)[image]
            for row, content in contents_of(column, rows[batch_R == found] - start):
                yield start + row, content

    def _batch(self, found: int) -> pa.RecordBatch:
        """Return a batch with validated columns. Raise ArrowInvalid if they are damaged."""
        batch = self._batches[found]
        if found not in self._valid:
            for name in self._columns.names:
                batch[name].validate(full=True)
            self._valid.add(found)
        return batch

    def __getstate__(self) -> dict[str, Any]:
        # A memory map cannot be sent to a worker process, which maps the files itself.
        return self.__dict__ | {"_batches": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_batches": _map_batches(state["files"])}


@contextlib.contextmanager
def _damage(folder: File) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"{folder} is damaged ({error}); save the data set again.") from error


def _map_batches(files: Sequence[Path]) -> list[pa.RecordBatch]:
    batches = []
    for file in files:
        with pa.ipc.open_stream(pa.memory_map(os.fsencode(file))) as stream:
            _check_utf8(stream.schema)
            batches += [batch for batch in stream if len(batch)]
    return batches


def _check_utf8(schema: pa.Schema) -> None:
    """Raise ValueError if a column's name is not UTF-8: Arrow decodes the names only on access."""
    _ = schema.names


def open_dict(folder: File, config: SourceConfig, *, text_only: bool = False) -> HuggingFaceSource:
    """Open the split of a saved DatasetDict that `config` names."""
    names = sorted(_splits(folder))
    if not names:
        raise UserError(
            f"No folder in {folder} has a state.json, so its dataset_dict.json has no splits; save the data "
            "set again."
        )
    if config.split not in names:
        raise splits.not_found(folder, config.split, names)
    return HuggingFaceSource(folder / config.split, config, text_only=text_only)


def _splits(folder: File) -> Iterator[str]:
    """Yield the names of the folders in `folder` that have a state.json; hidden folders are left out."""
    if isinstance(folder, Path):
        # A folder beside the splits may be unreadable, or a link back to `folder`, so none is entered.
        for name in os.listdir(folder):
            if not is_system(name) and os.path.isfile(folder / name / "state.json"):
                yield name
        return
    # Google's store does not list folders that exist only as prefixes, so the files at any depth are listed.
    for path in walk(folder):
        name, _, file = path.partition("/")
        if file == "state.json" and not is_system(name):
            yield name
