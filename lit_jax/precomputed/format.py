"""The features of a locked tower on disk: computed once for a data set, read at random by every training.

    started.json                         the header: data, tower and sizes; written first
    shard-00003-of-00012.array_record    the examples of one range of the source, in its order
    manifest.json                        started.json and counts; written last: without it, shards are missing

The record of an example holds its rows, the features of each view of its image or of each of its captions,
and a byte 0. The record of an example that cannot be used holds the reason, and a byte 1. The last record of
a shard is a JSON object of its counts.
"""

import contextlib
import dataclasses
import json
import textwrap
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Float

from lit_jax.data.example import BadSampleError, Example, sample_caption_index
from lit_jax.data.loader import Batch
from lit_jax.errors import UserError
from lit_jax.files import parse_json

STARTED, MANIFEST = "started.json", "manifest.json"
DTYPES: Mapping[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
# One record a chunk, so that each can be read alone; features do not compress.
WRITER_OPTIONS = "group_size:1,uncompressed"
GOOD, BAD = b"\0", b"\1"
# A reader keeps all of them open.
MOST_SHARDS = 500
# Examples.
LEAST_SHARD = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """The data, the tower and the sizes of embeddings. Fingerprints are hashes, written in hexadecimal.

    Attributes:
        side: "image" or "text".
        tower: fingerprint of the tower's config and parameters, in the dtype of the computation.
        preprocessing: fingerprint of the image transform or the tokenizer.
        data: fingerprint of the source.
        views: rows of an example; 0 for texts, which have a row for each caption.
        width: numbers of a row.
        dtype: that of the numbers, the tower's own.
        shard_size: in examples.
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
        """Raise ValueError for values that no command has written."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "views" else 1
            if type(value) is not field.type or (field.type is int and value < least):
                raise ValueError(f"{field.name} is {value!r}")

    @property
    def shards(self) -> int:
        return -(-self.examples // self.shard_size)

    def shard(self, number: int) -> range:
        """Return the positions of the examples of a shard."""
        start = number * self.shard_size
        return range(start, min(start + self.shard_size, self.examples))

    def shard_name(self, number: int) -> str:
        return f"shard-{number:05}-of-{self.shards:05}.array_record"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts of embeddings: rows, examples without rows (bad), and bytes of the shards' files."""

    rows: int = 0
    bad: int = 0
    bytes: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            rows=self.rows + other.rows, bad=self.bad + other.bad, bytes=self.bytes + other.bytes
        )


def shard_size(examples: int) -> int:
    return max(LEAST_SHARD, -(-examples // MOST_SHARDS))


class ShardWriter:
    """A writer of the records of a shard, in order, under another name until the shard is whole."""

    def __init__(self, path: Path):
        self._path = path
        # A name of this writer alone: another command may embed into the same folder, from another machine.
        self._new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        self._writer = ArrayRecordWriter(str(self._new), WRITER_OPTIONS)
        self._counts = Counts()

    def add(self, record: np.ndarray | BadSampleError) -> None:
        """Write the rows of the next example, KxP, or the reason why it has none."""
        if isinstance(record, BadSampleError):
            self._writer.write(json.dumps([record.kind, str(record)]).encode() + BAD)
            self._counts += Counts(bad=1)
        else:
            self._writer.write(record.tobytes() + GOOD)
            self._counts += Counts(rows=len(record))

    def close(self, *, complete: bool) -> None:
        """Give a complete shard its name, and remove another one."""
        if complete:
            counts = {"rows": self._counts.rows, "bad": self._counts.bad}
            self._writer.write(json.dumps(counts).encode())
        self._writer.close()
        if complete and not self._path.exists():
            self._new.replace(self._path)
        else:
            self._new.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the unfinished shards that killed commands have left behind."""
    for file in folder.glob(".*.tmp"):
        file.unlink(missing_ok=True)


def shard_counts(folder: Path, header: Header, number: int) -> Counts:
    """Return the counts in the last record of a shard. Raise UserError if the shard is damaged."""
    path = folder / header.shard_name(number)
    with reading(path):
        reader = ArrayRecordReader(str(path))
        if reader.num_records() != len(header.shard(number)) + 1:
            raise ValueError(f"{reader.num_records()} records")
        counts = parse_json(reader.read([reader.num_records() - 1])[0])
        reader.close()
        return Counts(**counts, bytes=path.stat().st_size)


def complete_shards(folder: Path, header: Header) -> list[bool]:
    return [(folder / header.shard_name(n)).exists() for n in range(header.shards)]


class Embeddings:
    """The rows of each example of a source, by its position there. They can be sent to worker processes.

    Raises UserError if the folder is not complete, or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"{folder} holds no complete embeddings; run python -m lit_jax.embed with --output={folder}, "
                "which goes on where it stopped."
            )
        with reading(folder / MANIFEST):
            manifest = parse_json((folder / MANIFEST).read_bytes())
            names = {field.name for field in dataclasses.fields(Header)}
            self.header = Header(**{name: manifest.pop(name) for name in names})
            self.counts = Counts(**manifest)
            self._dtype = np.dtype(DTYPES[self.header.dtype])
        paths = [folder / self.header.shard_name(n) for n in range(self.header.shards)]
        with reading(folder):
            found = sum(path.stat().st_size for path in paths)
            if found != self.counts.bytes:
                raise ValueError(f"its shards have {found} bytes, not {self.counts.bytes}")
            # The part in brackets leaves the counts out, and saves opening each file to ask for its length.
            self._records = grain.sources.ArrayRecordDataSource(
                [f"{path}[0:{len(self.header.shard(n))}]" for n, path in enumerate(paths)]
            )

    def __len__(self) -> int:
        return self.header.examples

    def __getitem__(self, index: int) -> Float[np.ndarray, "K P"]:
        """Return the rows of an example, of its views or captions. Raise BadSampleError if it has none."""
        header = self.header
        with reading(self.folder / header.shard_name(index // header.shard_size)):
            record = self._records[index]
            if record[-1:] == BAD:
                bad = BadSampleError(*reversed(parse_json(record[:-1])))
            else:
                rows_KxP = np.frombuffer(record[:-1], self._dtype).reshape(-1, header.width)
                if header.views not in (0, len(rows_KxP)):
                    raise ValueError(f"{len(rows_KxP)} views of an image, not {header.views}")
                return rows_KxP
        raise bad


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise UserError for the errors that libraries raise about a damaged file."""
    try:
        yield
    except Exception as error:
        reason = textwrap.shorten(str(error), 150)
        raise UserError(
            f"The embeddings in {path} are damaged ({reason}); remove that and run python -m lit_jax.embed "
            "again."
        ) from error


@dataclasses.dataclass(frozen=True)
class Pooled:
    """`name` (rows, width): what a tower has pooled takes the place of its inputs."""

    name: str

    def collate(self, elements: Sequence[np.ndarray]) -> Batch:
        return {self.name: np.stack(elements)}


@dataclasses.dataclass(frozen=True)
class PooledImages(Pooled):
    """One row for each image: one of the first `views` views, sampled as by `ImagePreprocessor`."""

    embeddings: Embeddings
    views: int

    def sample(self, index: int, example: Example, rng: np.random.Generator) -> np.ndarray:
        # Before it is known whether the image is bad, as without a folder.
        view = int(rng.integers(self.views))
        return self.embeddings[index][view]


@dataclasses.dataclass(frozen=True)
class PooledTexts(Pooled):
    """One row for each example: a caption, sampled as by `TextPreprocessor`."""

    embeddings: Embeddings

    def sample(self, index: int, example: Example, rng: np.random.Generator) -> np.ndarray:
        caption = sample_caption_index(example, rng)
        return self.embeddings[index][caption]
