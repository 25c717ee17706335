"""Checksums of what a run folder holds: stored when it is written, compared when it is read.

They are computed on the devices that have the arrays, and are the same on any mesh.
"""

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
    """Something read from a run folder that is not as it was saved."""


def sums_of(tree: Any, *, with_rounded: bool = False) -> Sums:
    """Return dtype and checksum of each array of a tree under its path; all processes must call it.

    Args:
        with_rounded: whether those of float32 also get the checksum of their bfloat16, as which they may be
            read back.
    """
    leaves = _by_path(tree)
    exact = _checksums(leaves)
    found: Sums = {
        path: {"dtype": leaf.dtype.name, "sum": exact[path]} for path, leaf in leaves.items()
    }
    if with_rounded:
        floats = {path: leaf for path, leaf in leaves.items() if leaf.dtype == np.float32}
        for path, value in _checksums(rounded(floats)).items():
            found[path]["rounded"] = value
    return found


def check_sums(tree: Any, stored: Mapping[str, Mapping[str, Any]] | None) -> None:
    """Raise DamagedError at the first array of `tree` whose checksum is not the stored one.

    An array that --allow_changes lets be read in a dtype for which none was stored is not compared.
    All processes must call it; those with `stored` compare.
    """
    leaves = _by_path(tree)
    exact = _checksums(leaves)
    halves = {path: leaf for path, leaf in leaves.items() if leaf.dtype.name == "bfloat16"}
    found = {"sum": exact, "rounded": _checksums(rounded(halves))}
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
    """Return a checksum of what JSON can say."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _by_path(tree: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _checksums(leaves: Mapping[str, jax.Array]) -> dict[str, list[int]]:
    if not leaves:
        return {}
    mesh: Any = getattr(next(iter(leaves.values())).sharding, "mesh", None)
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        return {path: sums.tolist() for path, sums in jax.device_get(checksums(leaves)).items()}
