"""The features of a locked tower on disk, computed once for a data set and read in random order by each run.

    started.json                             the header: data, tower and sizes; written first
    shard-00003-of-00012.array_record        the examples of one range of the source, in its order
    .shard-00003-of-00012.array_record.json  its counts, written before the shard
    manifest.json                            started.json and counts; written last, after all shards

The record of an example holds its rows and a byte 0. A row is the features of one view of the image or of one
caption. The record of an example that cannot be used holds the reason and a byte 1. Each shard has a hidden
file beside it with its counts, a JSON object, so that nobody reads a shard in a bucket to count.
"""

import contextlib
import dataclasses
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float

from lit_jax.buckets import AnyPath, BucketPath
from lit_jax.data.copies import cached_copies
from lit_jax.data.example import BadSampleError, Example, sample_caption_index
from lit_jax.data.files import File
from lit_jax.data.loader import Batch
from lit_jax.errors import UserError
from lit_jax.files import atomic_path, output_errors, parse_json, write_json

STARTED, MANIFEST = "started.json", "manifest.json"
DTYPES: Mapping[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
# One record in each chunk lets a reader fetch any record alone. Features do not compress.
WRITER_OPTIONS = "group_size:1,uncompressed"
GOOD, BAD = b"\0", b"\1"
# A reader keeps all shards open, and a process may have only so many open files.
MOST_SHARDS = 500
# The least number of examples in a shard, so that a small data set does not become hundreds of files.
LEAST_SHARD = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a folder of features: data, tower and sizes. Fingerprints are hexadecimal hashes.

    Attributes:
        side: "image" or "text".
        tower: the fingerprint of the tower's config and parameters, in the dtype of the computation.
        preprocessing: the fingerprint of the image transform or the tokenizer.
        data: the fingerprint of the source.
        views: the number of rows of an example; 0 for texts, which have a row for each caption.
        examples: the number of examples in the source.
        width: the number of features in a row.
        dtype: the tower's dtype, in which features are stored.
        shard_size: the number of examples in a shard; the last shard may have fewer.
    """

    side: str
    tower: str
    preprocessing: str
    data: str
    views: int
    examples: int
    width: int
    dtype: str
    shard_size: int

    def __post_init__(self):
        """Raise ValueError for a value that no command writes."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # Texts have 0 views.
            least = 0 if field.name == "views" else 1
            # isinstance would accept True as an int.
            if type(value) is not field.type or (field.type is int and value < least):
                raise ValueError(f"{field.name} is {value!r}")

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-self.examples // self.shard_size)

    def shard(self, number: int) -> range:
        """Return the positions in the source of the examples of a shard."""
        start = number * self.shard_size
        return range(start, min(start + self.shard_size, self.examples))

    def shard_name(self, number: int) -> str:
        """Return the file name of a shard."""
        return f"shard-{number:05}-of-{self.shards:05}.array_record"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """The counts of a folder or a shard: rows, bad examples (without rows), and bytes of the files."""

    rows: int = 0
    bad: int = 0
    bytes: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            rows=self.rows + other.rows, bad=self.bad + other.bad, bytes=self.bytes + other.bytes
        )


def shard_size(examples: int) -> int:
    """Return the number of examples in a shard of a source with `examples` examples."""
    return max(LEAST_SHARD, -(-examples // MOST_SHARDS))


class ShardWriter:
    """A writer of a shard, as a context: if it ends without an error, the shard appears, with its counts.

    Raises UserError if the shard cannot be written.
    """

    def __init__(self, path: AnyPath):
        self._path = path
        # The temporary file has a unique name, because another command on another machine may write into the
        # same folder.
        self._file = atomic_path(path)
        self._counts = Counts()

    def __enter__(self) -> "ShardWriter":
        with output_errors(self._path.parent):
            self._new = self._file.__enter__()
            self._writer = ArrayRecordWriter(str(self._new), WRITER_OPTIONS)
        return self

    def add(self, record: np.ndarray | BadSampleError) -> None:
        """Write the rows of the next example, KxP, or the reason why the example has none."""
        if isinstance(record, BadSampleError):
            content = json.dumps([record.kind, str(record)]).encode() + BAD
            self._counts += Counts(bad=1)
        else:
            content = record.tobytes() + GOOD
            self._counts += Counts(rows=len(record))
        with output_errors(self._path.parent):
            self._writer.write(content)

    def __exit__(self, *error: Any) -> None:
        with output_errors(self._path.parent):
            self._writer.close()
            if error == (None, None, None):
                counts = dataclasses.replace(self._counts, bytes=self._new.stat().st_size)
                write_json(_counts_file(self._path), dataclasses.asdict(counts))
            self._file.__exit__(*error)


def _counts_file(shard: AnyPath) -> AnyPath:
    return shard.with_name(f".{shard.name}.json")


def remove_unfinished(folder: AnyPath) -> None:
    """Remove the unfinished shards that killed commands left behind."""
    for file in folder.glob(".*.new"):
        file.unlink(missing_ok=True)


def total_counts(folder: AnyPath, header: Header) -> Counts:
    """Return the counts of all shards, which are complete. Raise UserError if a file of counts is damaged."""
    # A bucket takes long for one answer, but gives many at a time.
    with ThreadPoolExecutor(16) as pool:
        counts = pool.map(lambda n: _shard_counts(folder, header, n), range(header.shards))
        return sum(counts, Counts())


def _shard_counts(folder: AnyPath, header: Header, number: int) -> Counts:
    shard = folder / header.shard_name(number)
    file = _counts_file(shard)
    # A copy without hidden files, or one by an older version, has no counts.
    if isinstance(shard, Path) and not file.exists():
        return _recount(shard, header, len(header.shard(number)))
    content = file.read_bytes()
    with reading(file):
        return Counts(**parse_json(content))


def _recount(shard: Path, header: Header, examples: int) -> Counts:
    """Return the counts of a local shard by reading its records."""
    row = header.width * np.dtype(DTYPES[header.dtype]).itemsize
    rows = bad = 0
    with reading(shard):
        # An older version wrote another record after those of the examples.
        records = grain.sources.ArrayRecordDataSource([f"{shard}[0:{examples}]"])
        for index in range(examples):
            record = records[index]
            is_bad = record[-1:] == BAD
            bad += is_bad
            rows += 0 if is_bad else len(record) // row
    return Counts(rows=rows, bad=bad, bytes=shard.stat().st_size)


def manifest_counts(folder: AnyPath, header: Header) -> Counts | None:
    """Return the counts in the manifest of a finished folder, None if it has none with this header."""
    try:
        manifest = dict(parse_json((folder / MANIFEST).read_bytes()))
        given = {name: manifest.pop(name) for name in dataclasses.asdict(header)}
        return Counts(**manifest) if given == dataclasses.asdict(header) else None
    # There is none, or it is damaged and is written again.
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def complete_shards(folder: AnyPath, header: Header) -> list[bool]:
    """Return whether each shard is complete: a shard appears when all of it is written.

    Missing counts are no obstacle for a local shard, which can be counted, or in a finished folder.
    """
    there = {file.name for file in folder.iterdir()}
    shards = [folder / header.shard_name(n) for n in range(header.shards)]
    found = [shard.name in there for shard in shards]
    if isinstance(folder, Path) or (all(found) and manifest_counts(folder, header)):
        return found
    return [{shard.name, _counts_file(shard).name} <= there for shard in shards]


class Embeddings:
    """The rows of each example of a source, by the example's position. Instances can be pickled for workers.

    Shards in an object store are copied to this machine. Raises UserError if the folder is incomplete or
    damaged, and OSError if the store does not answer.
    """

    def __init__(self, folder: File):
        self.folder = folder
        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"{folder} holds no complete embeddings; run python -m lit_jax.embed with --output={folder}, "
                "which continues where it stopped."
            )
        content = (folder / MANIFEST).read_bytes()
        with reading(folder / MANIFEST):
            # The manifest is the header and the counts in one object.
            manifest = parse_json(content)
            names = {field.name for field in dataclasses.fields(Header)}
            self.header = Header(**{name: manifest.pop(name) for name in names})
            self.counts = Counts(**manifest)
            self._dtype = np.dtype(DTYPES[self.header.dtype])
        names = [self.header.shard_name(n) for n in range(self.header.shards)]
        local = cached_copies(folder, names)
        paths = [local / name for name in names]
        with reading(folder):
            # A truncated or replaced shard would fail only when a run reads it, hours later. Sizes are cheap
            # to compare.
            found = sum(path.stat().st_size for path in paths)
            if found != self.counts.bytes:
                raise ValueError(f"its shards have {found} bytes, not {self.counts.bytes}")
            # With the range in brackets Grain need not open each file to learn its length. It also leaves out
            # the last record of a shard by an older version, which has the counts.
            self._records = grain.sources.ArrayRecordDataSource(
                [f"{path}[0:{len(self.header.shard(n))}]" for n, path in enumerate(paths)]
            )

    def __len__(self) -> int:
        return self.header.examples

    def __getitem__(self, index: int) -> Float[np.ndarray, "K P"]:
        """Return the rows of an example: its views or captions. Raise BadSampleError if it has none."""
        header = self.header
        with reading(self.folder / header.shard_name(index // header.shard_size)):
            record = self._records[index]
            if record[-1:] == BAD:
                # The record is [kind, text], and the error takes (text, kind).
                bad = BadSampleError(*reversed(parse_json(record[:-1])))
            else:
                rows_KxP = np.frombuffer(record[:-1], self._dtype).reshape(-1, header.width)
                # Texts, with views 0, have as many rows as captions.
                if header.views not in (0, len(rows_KxP)):
                    raise ValueError(f"{len(rows_KxP)} views of an image, not {header.views}")
                return rows_KxP
        # Outside `reading`, which would report any error as damage.
        raise bad


@contextlib.contextmanager
def reading(path: File | BucketPath) -> Iterator[None]:
    """Turn the errors that libraries raise about a damaged file into UserError."""
    try:
        yield
    except Exception as error:
        reason = textwrap.shorten(str(error), 150)
        raise UserError(
            f"The embeddings in {path} are damaged ({reason}); remove this path and run python -m "
            "lit_jax.embed again."
        ) from error


@dataclasses.dataclass(frozen=True)
class Pooled:
    """A preprocessor whose batches have the features of a tower, (rows, width), in place of its inputs.

    Attributes:
        name: the key of the features in a batch.
    """

    name: str

    def collate(self, elements: Sequence[np.ndarray]) -> Batch:
        """Stack the rows of the examples."""
        return {self.name: np.stack(elements)}


@dataclasses.dataclass(frozen=True)
class PooledImages(Pooled):
    """A preprocessor that takes one of an image's first `views` rows, sampled as by `ImagePreprocessor`."""

    embeddings: Embeddings
    views: int

    def sample(self, index: int, example: Example, rng: np.random.Generator) -> np.ndarray:
        """Return one row (width,) of an image. Raise BadSampleError if the image has none."""
        # The draw comes before the read that may raise BadSampleError. Without precomputed features the order
        # is the same, so a run consumes the same random numbers either way.
        view = int(rng.integers(self.views))
        return self.embeddings[index][view]


@dataclasses.dataclass(frozen=True)
class PooledTexts(Pooled):
    """A preprocessor that takes the row of one caption, sampled as by `TextPreprocessor`."""

    embeddings: Embeddings

    def sample(self, index: int, example: Example, rng: np.random.Generator) -> np.ndarray:
        """Return the row (width,) of one caption. Raise BadSampleError if the example has none."""
        caption = sample_caption_index(example, rng)
        return self.embeddings[index][caption]
