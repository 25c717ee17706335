"""Group the rows of a table with one row for each caption: all rows of an image become one example.

Rows that name the same file belong to one image. If the table itself contains the images, rows belong to one
image if both path and content agree, because `datasets` keeps only the last part of a path. A row without a
path stays alone, and so does a row that cannot be used, which is a bad sample.
"""

import contextlib
import hashlib
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError, Example, Source
from lit_jax.data.files import File
from lit_jax.data.sources.index_cache import CachedTable, TableCache

log = logging.getLogger(__name__)

# Part of the cache's key: raised when the grouping of the same rows changes.
VERSION = 3
# A grouping that took less time than this is not cached.
CACHE_FROM_SECONDS = 1.0
# A value that marks rows without identity, because Python's hash is never -1.
_ALONE = -1


@runtime_checkable
class Table(Protocol):
    """A source whose examples are the rows of files."""

    @property
    def files(self) -> Sequence[File]:
        """The files that hold the rows, whose signatures are part of a cached grouping's key."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Yield the readable rows in order, without the content of images."""
        ...

    def identities(self, *, by_label: bool) -> Iterator[Sequence[str | None]]:
        """Yield `rows.identity` of each row, in order and in batches."""
        ...

    def contents(self, rows: Int[np.ndarray, " R"]) -> Iterable[tuple[int, bytes]]:
        """Yield (row, content) of the images that the table itself contains; `rows` are ascending."""
        ...


def group_rows(table: Table, config: SourceConfig, *, by_label: bool) -> Source:
    """Return a source with one example for each image, in the order of the images' first rows.

    Args:
        by_label: whether rows of one image with different labels are different examples.
    """
    groups = _find_groups(table, config, by_label=by_label)
    if not len(groups):
        return table
    log.info(
        "%s: %d rows name %d images; with group_captions=False each row is an example.",
        config.path,
        len(table),
        len(groups),
    )
    return _Grouped(table, groups)


class Groups:
    """The rows of each image. A cached grouping is pickled as its path, and mapped into memory again."""

    def __init__(self, found: pa.LargeListArray | CachedTable):
        self._found = found
        (array,) = found.columns if isinstance(found, CachedTable) else (found,)
        self._starts, self._rows = array.offsets.to_numpy(), array.values.to_numpy()

    def __reduce__(self):
        return Groups, (self._found,)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> list[int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = self._starts[index : index + 2].tolist()
        return self._rows[start:stop].tolist()


class _Grouped:
    """The images of a table, each with the captions of all its rows."""

    def __init__(self, table: Table, groups: Groups):
        self._table, self._groups = table, groups

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Example:
        return _merge([self._table[row] for row in self._groups[index]])


def _merge(examples: Sequence[Example]) -> Example:
    """Return one example with the captions of all rows in order, including repeated captions."""
    first, *others = examples
    if not others:
        return first
    captioned = [example for example in examples if example["captions"]]
    languages = [example.get("languages") for example in captioned]
    if None in languages and any(languages):
        raise BadSampleError(
            f"some rows of {first['key']} have captions by language, and others captions without a language",
            "no_example",
        )
    return {
        **first,
        "captions": tuple(text for example in captioned for text in example["captions"]),
        "languages": tuple(itertools.chain(*filter(None, languages))) if any(languages) else None,
        # A translation belongs to a single caption, so it cannot serve all of them.
        "teacher_caption": None,
    }


def _find_groups(table: Table, config: SourceConfig, *, by_label: bool) -> Groups:
    """Return the rows of each image, or an empty result if each image has a single row.

    A result that took long to compute is cached on disk.
    """
    keys = [config.image_key, config.caption_key, config.label_key if by_label else ""]
    cache = TableCache(table.files, [VERSION, *keys], kind="groups")
    if cached := cache.load():
        return Groups(cached)
    started = time.monotonic()
    found = _pass_over(table, by_label=by_label)
    if time.monotonic() - started > CACHE_FROM_SECONDS:
        # If no folder is writable, the next start computes the grouping again.
        with contextlib.suppress(OSError):
            return Groups(cache.store(pa.table({"rows": found})))
    return Groups(found)


def _pass_over(table: Table, *, by_label: bool) -> pa.LargeListArray:
    """Return the rows of each image by one pass over the table, which keeps 16 bytes for each row."""
    # The number of the row makes the initial value unique: a row without identity equals no other row.
    hash_Nx2 = np.stack([np.full(len(table), _ALONE), np.arange(len(table))], axis=1)
    start = 0
    for names in table.identities(by_label=by_label):
        # Two keyed hashes of 64 bits: a collision among a billion rows is practically impossible.
        block_Bx2 = hash_Nx2[start : start + len(names)]
        named_B = np.fromiter((name is not None for name in names), bool, len(names))
        for half, mark in enumerate(("", "\1")):
            hashes = [hash(name + mark) for name in names if name is not None]
            block_Bx2[named_B, half] = hashes
        start += len(names)
    order_N, is_first_N = _sorted(hash_Nx2)
    if is_first_N.all():
        return _lists(order_N[:0], np.zeros(0, bool))
    held, repeated = 0, np.sort(order_N[_repeated(is_first_N)])
    for row, content in table.contents(repeated):
        # The contents of all these rows are read, which takes minutes for a large table.
        if not held:
            log.info("%d rows share paths; their images are compared by content.", len(repeated))
        # The row's hash then identifies the pair of path and content.
        digest = hashlib.blake2b(content, digest_size=16).digest()
        hash_Nx2[row] ^= np.frombuffer(digest, np.int64)
        held += 1
    if held:
        order_N, is_first_N = _sorted(hash_Nx2)
    return _lists(order_N[:0] if is_first_N.all() else order_N, is_first_N)


def _sorted(hash_Nx2: Int[np.ndarray, "N 2"]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows sorted so that equal rows are adjacent and in order, and which start a group."""
    order_N = np.lexsort(hash_Nx2.T)
    sorted_Nx2 = hash_Nx2[order_N]
    differs = (sorted_Nx2[1:] != sorted_Nx2[:-1]).any(axis=1)
    return order_N, np.concatenate([[True], differs])


def _repeated(is_first_N: np.ndarray) -> np.ndarray:
    """Return which of the sorted rows share their group with another row."""
    return ~is_first_N | ~np.concatenate([is_first_N[1:], [True]])


def _lists(order_N: np.ndarray, is_first_N: np.ndarray) -> pa.LargeListArray:
    """Return the rows of each group, in the order of the groups' first rows."""
    if not len(order_N):
        return pa.array([], pa.large_list(pa.int64()))
    starts_G = np.flatnonzero(is_first_N)
    # Sorting by hash has shuffled the groups; the rank restores the order of the table.
    rank_G = np.empty(len(starts_G), np.int64)
    by_row_G = np.argsort(order_N[starts_G])
    rank_G[by_row_G] = np.arange(len(starts_G))
    size_G = np.diff(np.append(starts_G, len(order_N)))
    rows_N = order_N[np.argsort(np.repeat(rank_G, size_G), kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(size_G[by_row_G])])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(rows_N))
