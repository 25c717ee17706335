"""A disk cache of tables that are derived from data files by a pass over these files.

A table is one record batch in an Arrow file that is mapped into memory, so that opening takes the same time
for a thousand rows and for a billion. The table lies beside the files or, if their folder is read-only, in
the user's cache folder. The key contains the signatures of the files: a table of changed files is not loaded.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

from lit_jax.data.files import File, signature
from lit_jax.files import atomic_path, cache_folder

# The name of the key in the metadata of the table's schema.
_KEY = b"lit_jax"


class CachedTable:
    """The columns of a table on disk. Only the path is pickled for worker processes."""

    def __init__(self, path: Path):
        self._path = path
        # With a single batch each column is one array, and a row is found without a search.
        with pa.ipc.open_file(pa.memory_map(os.fsencode(path))) as reader:
            self.about = reader.schema.metadata
            self.columns: list[Any] = reader.get_batch(0).columns

    def __reduce__(self):
        return CachedTable, (self._path,)


class TableCache:
    """The cache entry of a table about `files`: the places where the table may lie, and the expected key.

    Args:
        settings: a version and plain texts on which the table depends, apart from the files.
        kind: the prefix of the table's file name.

    Raises OSError if a file is missing.
    """

    def __init__(self, files: Sequence[File], settings: Sequence[Any], *, kind: str):
        with ThreadPoolExecutor(16) as pool:
            signatures = list(pool.map(signature, files))
        self._key = json.dumps([*settings, signatures]).encode()
        # The file's name depends on neither the version nor the signatures, so that a new table replaces the
        # outdated one instead of adding a file.
        names = "\n".join(map(str, [*files, *settings[1:]]))
        digest = hashlib.sha256(names.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        name = f"lit_jax-{kind}-{digest}.arrow"
        beside = [files[0].parent] if isinstance(files[0], Path) else []
        # The best place comes first.
        self.places = [folder / name for folder in (*beside, cache_folder())]

    def load(self) -> CachedTable | None:
        """Return the table, or None if there is no complete table with this key."""
        for place in self.places:
            try:
                found = CachedTable(place)
            except (OSError, pa.ArrowException):
                continue
            if found.about.get(_KEY) == self._key:
                return found
        return None

    def store(self, table: pa.Table) -> CachedTable:
        """Write the table, with its schema's metadata, to the first writable place.

        Several processes may do so at once: each writes a complete file, and the files are equal.

        Raises OSError if no place is writable.
        """
        metadata = (table.schema.metadata or {}) | {_KEY: self._key}
        table = table.combine_chunks().replace_schema_metadata(metadata)
        problem = OSError("there is no folder for it")
        for place in self.places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                # A table without rows has no batch, and the reader expects one.
                batches = table.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
                with (
                    atomic_path(place) as new,
                    new.open("wb") as file,
                    pa.ipc.new_file(file, table.schema) as writer,
                ):
                    writer.write_batch(batches[0])
                return CachedTable(place)
            except OSError as error:
                problem = error
        raise problem
