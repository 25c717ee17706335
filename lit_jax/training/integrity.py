"""Checksums of the arrays in a run folder: stored when arrays are written, compared when they are read.

The checksums are computed on the devices that hold the arrays, and are the same on any mesh.
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
    """An error that says that content of a run folder is not as it was saved."""


@dataclasses.dataclass(frozen=True)
class PendingSums:
    """The checksums of arrays by path, which the devices may still be computing.

    Attributes:
        dtypes: the name of each array's dtype.
        exact: the checksum of each array.
        rounded: the checksum of each float32 array after rounding to bfloat16, if asked for.
    """

    dtypes: Mapping[str, str]
    exact: Mapping[str, jax.Array | np.ndarray]
    rounded: Mapping[str, jax.Array | np.ndarray]

    def fetch(self) -> Sums:
        """Wait for the devices, in any thread; return dtype and checksum of each array."""
        exact, halves = _fetched(self.exact), _fetched(self.rounded)
        return {
            path: {"dtype": dtype, "sum": exact[path]}
            | ({"rounded": halves[path]} if path in halves else {})
            for path, dtype in self.dtypes.items()
        }


def start_sums(tree: Any, *, with_rounded: bool = False) -> PendingSums:
    """Start to compute the checksum of each array of a tree; all processes must call this function.

    The next step may reuse the arrays at once, because devices run programs in the order of their dispatch.

    Args:
        with_rounded: whether float32 arrays also get the checksum of their values in bfloat16, as which they
            may be read back.
    """
    leaves = by_path(tree)
    floats = {path: leaf for path, leaf in leaves.items() if leaf.dtype == np.float32}
    return PendingSums(
        dtypes={path: leaf.dtype.name for path, leaf in leaves.items()},
        exact=_checksums(leaves),
        rounded=_checksums(rounded(floats)) if with_rounded else {},
    )


def check_sums(tree: Any, stored: Mapping[str, Mapping[str, Any]] | None) -> None:
    """Raise DamagedError at the first array of `tree` whose checksum differs from the stored one.

    --allow_changes may permit another dtype, for which no checksum was stored. Such an array is not compared.
    All processes must call this function; the processes that pass `stored` compare.
    """
    leaves = by_path(tree)
    # Arrays that were saved as float32 may be read back as bfloat16.
    halves = {path: leaf for path, leaf in leaves.items() if leaf.dtype.name == "bfloat16"}
    found = {
        "sum": _fetched(_checksums(leaves)),
        "rounded": _fetched(_checksums(rounded(halves))),
    }
    # All processes must compute the sums, because the computation is collective. Only then may some return.
    if stored is None:
        return
    for path, leaf in leaves.items():
        try:
            saved = stored[path]
            # An array that is read in another dtype can only match the rounded checksum.
            kind = "sum" if saved["dtype"] == leaf.dtype.name else "rounded"
            if kind in saved and path in found[kind] and saved[kind] != found[kind][path]:
                raise DamagedError(f"{path} is not as it was saved")
        except (LookupError, TypeError) as error:
            raise DamagedError(f"the checksum of {path} is missing or unreadable") from error


def text_sum(value: Any) -> int:
    """Return a checksum (CRC-32) of a JSON value."""
    # Sorted keys make the checksum independent of their order.
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of any tree by path, such as 'opt_state/1/mu/text_model/pooler/kernel'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _checksums(
    leaves: Mapping[str, jax.Array | np.ndarray],
) -> dict[str, jax.Array | np.ndarray]:
    # Under the mesh of the arrays every process gets all sums. Arrays on the host have none.
    meshes = [getattr(getattr(leaf, "sharding", None), "mesh", None) for leaf in leaves.values()]
    mesh = next((mesh for mesh in meshes if mesh is not None), None)
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        return checksums(leaves)


def _fetched(sums: Mapping[str, jax.Array | np.ndarray]) -> dict[str, list[int]]:
    return {path: both.tolist() for path, both in jax.device_get(sums).items()}
