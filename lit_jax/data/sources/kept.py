"""Tables about files that take a pass over them to make: kept on disk, and made again when a file changes.

A table is one record batch in an Arrow file that is mapped into memory: opening it costs the same for a
thousand rows and for a billion. The table lies beside the files or, where nothing can be written, in the
user's cache folder. When the size or the time of a file changes, the table is no longer found.
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
from lit_jax.files import whole

_KEY = b"lit_jax"


class KeptTable:
    """The columns of a table on disk. Only its path is sent to worker processes."""

    def __init__(self, path: Path):
        self._path = path
        # One batch: so that a column is one piece and a row is found at once.
        with pa.ipc.open_file(pa.memory_map(os.fsencode(path))) as reader:
            self.about = reader.schema.metadata
            self.columns: list[Any] = reader.get_batch(0).columns

    def __reduce__(self):
        return KeptTable, (self._path,)


class Shelf:
    """The places where a table about `files` may lie, and what tells a table of today from an older one.

    Args:
        decided_by: plain values; the table depends on them as it does on the files.
        kind: begins the name of the table's file.

    Raises OSError if one of the files is missing.
    """

    def __init__(self, files: Sequence[File], decided_by: Sequence[Any], *, kind: str):
        with ThreadPoolExecutor(16) as pool:
            signatures = list(pool.map(signature, files))
        self._about = json.dumps([*decided_by, signatures]).encode()
        names = "\n".join(map(str, [*files, *(decided_by[1:])]))
        digest = hashlib.sha256(names.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        name = f"lit_jax-{kind}-{digest}.arrow"
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_jax"
        beside = [files[0].parent] if isinstance(files[0], Path) else []
        self.places = [folder / name for folder in (*beside, cache)]  # best first

    def find(self) -> KeptTable | None:
        """Return the table of today, if it is there and whole."""
        for place in self.places:
            try:
                found = KeptTable(place)
            except (OSError, pa.ArrowException):
                continue
            if found.about.get(_KEY) == self._about:
                return found
        return None

    def keep(self, table: pa.Table) -> KeptTable:
        """Write the table, with its schema's metadata, to the first place that takes it.

        Raise OSError if none does.

        Several processes may do it at once: each writes a whole file, and they are the same.
        """
        metadata = (table.schema.metadata or {}) | {_KEY: self._about}
        table = table.combine_chunks().replace_schema_metadata(metadata)
        problem = OSError("there is no place")
        for place in self.places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                batches = table.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
                with (
                    whole(place) as new,
                    new.open("wb") as file,
                    pa.ipc.new_file(file, table.schema) as writer,
                ):
                    writer.write_batch(batches[0])
                return KeptTable(place)
            except OSError as error:
                problem = error
        raise problem
