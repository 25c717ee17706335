"""The byte ranges of the samples in tar files, found by one pass over the files and cached on disk.

`index_cache` describes the place of the cached index, and when an index is outdated.
"""

import json
import logging
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa

from lit_jax.data.files import File, readable
from lit_jax.data.sources import hints, samples
from lit_jax.data.sources.index_cache import CachedTable, TableCache
from lit_jax.data.sources.samples import FIELDS, Readings
from lit_jax.data.sources.tar_members import tar_members
from lit_jax.errors import UserError

log = logging.getLogger(__name__)

# Part of the cache's key: raised when the same tar files would give another index.
VERSION = 6
_FIELDS = (*FIELDS,)
_REMARKS = b"remarks"
_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.large_string()),
        ("flaw", pa.string()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        # The flattened (number of the field, start, stop) of all members.
        ("members", pa.large_list(pa.int64())),
    ]
)


class Entry(NamedTuple):
    """The place of a sample.

    Attributes:
        shard: the number of the tar file.
        key: the common name of the members.
        flaw: a key of `samples.FLAWS`, or "".
        start, stop: the byte range in the file that spans all members.
        members: (field, start, stop) of each member.
    """

    shard: int
    key: str
    flaw: str
    start: int
    stop: int
    members: Sequence[tuple[str, int, int]]


class TarIndex:
    """The samples of all files in order."""

    def __init__(self, table: CachedTable):
        self._table = table
        shard, self._key, self._flaw, start, stop, self._members = table.columns
        # NumPy views of the mapped columns, without copies: their elements are faster to access.
        self._numbers = [column.to_numpy() for column in (shard, start, stop)]

    def __reduce__(self):
        return TarIndex, (self._table,)

    def __len__(self) -> int:
        return len(self._key)

    def __getitem__(self, index: int) -> Entry:
        shard, start, stop = (column.item(index) for column in self._numbers)
        key, flaw, values = (c[index].as_py() for c in (self._key, self._flaw, self._members))
        members = zip(values[::3], values[1::3], values[2::3], strict=True)
        members = [(_FIELDS[field], first, last) for field, first, last in members]
        return Entry(shard, key, flaw, start, stop, members)

    @property
    def remarks(self) -> dict[str, str]:
        """The warnings about the samples, see `samples.remarks`; "broken" lists truncated tars."""
        return json.loads(self._table.about[_REMARKS])


def open_index(files: Sequence[File]) -> TarIndex:
    """Return the index of these files, made anew if there is no cached index of their present state.

    Raises UserError if a file cannot be read, or if no place for the index is writable.
    """
    try:
        cache = TableCache(files, [VERSION], kind="index")
    except OSError as error:
        raise UserError(f"{error}; a shard of the data set cannot be read.") from error
    if found := cache.load():
        return TarIndex(found)
    log.info("Indexing the samples of %d tar files.", len(files))
    # Threads overlap the waiting for a network disk or an object store.
    with ThreadPoolExecutor(16) as pool:
        scanned = list(pool.map(_scan, range(len(files)), files))
    # One decision for all files, because a single shard may not show at which dot the names end.
    readings = samples.decide([readings for readings, _ in scanned])
    broken = [f"{file.name} {end}" for file, (_, end) in zip(files, scanned, strict=True) if end]
    said = samples.remarks(readings) | ({"broken": "; ".join(broken)} if broken else {})
    remarks = json.dumps(said).encode()
    table = pa.Table.from_batches([reading.samples for reading in readings], _SCHEMA)
    try:
        return TarIndex(cache.store(table.replace_schema_metadata({_REMARKS: remarks})))
    except OSError as error:
        places = ", ".join(map(str, cache.places)) or "the folders"
        raise UserError(
            f"The index of the tar files cannot be written to any of {places} ({error}); set XDG_CACHE_HOME "
            "to a folder with space."
        ) from error


def _scan(shard: int, file: File) -> tuple[Readings, str]:
    """Return the samples of a tar file, and a text about the place where it breaks off, or ""."""

    def pack(found: Sequence[samples.Sample]) -> pa.RecordBatch:
        return pa.RecordBatch.from_pylist([_row(shard, sample) for sample in found], _SCHEMA)

    try:
        members, end = tar_members(file)
    except (OSError, tarfile.TarError) as error:
        hints.check_content(file)
        raise UserError(
            f"{file} cannot be read as a tar file ({error}); download it again, or remove it."
        ) from error
    return samples.read_members(members, pack, f"{file.name}/"), end


def _row(shard: int, sample: samples.Sample) -> dict[str, object]:
    members = [
        (_FIELDS.index(field), member.start, member.stop)
        for field, found in sample.members.items()
        for member in found
    ]
    # A sample that cannot be used is never read, so its byte range is empty.
    bounds = [edge for _, *edges in members for edge in edges] if not sample.flaw else [0]
    return {
        "shard": shard,
        "key": readable(sample.key),
        "flaw": sample.flaw,
        "start": min(bounds),
        "stop": max(bounds),
        "members": [] if sample.flaw else [value for member in members for value in member],
    }
