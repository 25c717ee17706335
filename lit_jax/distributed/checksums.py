"""Telling parameters apart where they lie: nothing but checksums leaves the devices."""

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lit_jax.distributed.mesh import REPLICATED


@jax.jit
def checksums(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Two 32-bit numbers for each array under its path; every bit, its place and the path count.

    The same on any mesh, and whole on every process. To call under `jax.set_mesh`.
    """
    # Integer sums come out the same in any order: on any mesh.
    sums = {path: _checksum(leaf, zlib.crc32(path.encode())) for path, leaf in leaves.items()}
    return jax.lax.with_sharding_constraint(sums, REPLICATED)


def _checksum(leaf: jax.Array, seed: int) -> jax.Array:
    """Two 32-bit sums over an array, of each number's bits and position mixed well.

    A sum of products alone would not see, for one, that an even number of signs has changed.
    """
    bits = jax.lax.bitcast_convert_type(leaf, {4: jnp.uint32, 2: jnp.uint16}[leaf.dtype.itemsize])
    position = jnp.uint32(seed)
    for axis, size in enumerate(leaf.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        position = position * jnp.uint32(size) + index
    first = _mix(_mix(position) ^ bits.astype(jnp.uint32))
    return jnp.stack([x.sum(dtype=jnp.uint32) for x in (first, _mix(first))])


def _mix(x: jax.Array) -> jax.Array:
    """Each bit of the result depends on all bits of a 32-bit number (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))
