"""Checksums of the arrays in a run folder: stored when it is written, compared when it is read.

They are computed on the devices that have the arrays, and are the same on any mesh.
"""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np

from lit_jax.distributed.checksums import checksums, rounded

Sums = dict[str, dict[str, Any]]


class DamagedError(ValueError):
    """An error about content of a run folder that is not as it was saved."""


@dataclasses.dataclass(frozen=True)
class PendingSums:
    """Checksums by the path of each array, which the devices may still be computing."""

    dtypes: Mapping[str, str]
    exact: Mapping[str, jax.Array]
    rounded: Mapping[str, jax.Array]

    def fetch(self) -> Sums:
        """Return dtype and checksum of each array; any thread may wait here for the devices."""
        exact, halves = _fetched(self.exact), _fetched(self.rounded)
        return {
            path: {"dtype": dtype, "sum": exact[path]}
            | ({"rounded": halves[path]} if path in halves else {})
            for path, dtype in self.dtypes.items()
        }


def start_sums(tree: Any, *, with_rounded: bool = False) -> PendingSums:
    """Start to compute the checksum of each array of a tree; all processes must call it.

    The next step may reuse the arrays at once.

    Args:
        with_rounded: whether those of float32 also get the checksum of their bfloat16, as which they may be
            read back.
    """
    leaves = _by_path(tree)
    floats = {path: leaf for path, leaf in leaves.items() if leaf.dtype == np.float32}
    return PendingSums(
        dtypes={path: leaf.dtype.name for path, leaf in leaves.items()},
        exact=_checksums(leaves),
        rounded=_checksums(rounded(floats)) if with_rounded else {},
    )


def check_sums(tree: Any, stored: Mapping[str, Mapping[str, Any]] | None) -> None:
    """Raise DamagedError at the first array of `tree` whose checksum is not the stored one.

    An array that --allow_changes lets be read in a dtype for which none was stored is not compared.
    All processes must call it; those with `stored` compare.
    """
    leaves = _by_path(tree)
    halves = {path: leaf for path, leaf in leaves.items() if leaf.dtype.name == "bfloat16"}
    found = {
        "sum": _fetched(_checksums(leaves)),
        "rounded": _fetched(_checksums(rounded(halves))),
    }
    if stored is None:
        return
    for path, leaf in leaves.items():
        try:
            saved = stored[path]
            kind = "sum" if saved["dtype"] == leaf.dtype.name else "rounded"
            if kind in saved and path in found[kind] and saved[kind] != found[kind][path]:
                raise DamagedError(f"{path} is not as it was saved")
        except (LookupError, TypeError) as error:
            raise DamagedError(f"the checksums have no such entry for {path}") from error


def text_sum(value: Any) -> int:
    """Return a checksum of a value that JSON can write."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _by_path(tree: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _checksums(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    if not leaves:
        return {}
    mesh: Any = getattr(next(iter(leaves.values())).sharding, "mesh", None)
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        return checksums(leaves)


def _fetched(sums: Mapping[str, jax.Array]) -> dict[str, list[int]]:
    return {path: both.tolist() for path, both in jax.device_get(sums).items()}
