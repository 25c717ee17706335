"""Checksums of parameters, computed on their devices: nothing else leaves the devices."""

import functools
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lit_jax.distributed.mesh import REPLICATED, mesh_shape


def checksums(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return two 32-bit numbers for each array, which depend on every bit, its place and the path.

    The numbers are the same on any mesh, and under `jax.set_mesh` whole on every process.
    """
    seeds = _seeds(tuple(leaves))
    return {path: _checksum(leaf, seeds[path]) for path, leaf in leaves.items()}


@functools.partial(jax.jit, static_argnums=0)
def _seeds(paths: tuple[str, ...]) -> dict[str, jax.Array]:
    """Return a number for each path: a program makes them, as the host may send nothing while it trains."""
    seeds = {path: jnp.uint32(zlib.crc32(path.encode())) for path in paths}
    return jax.lax.with_sharding_constraint(seeds, REPLICATED) if mesh_shape() else seeds


def rounded(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the arrays, float32 or bfloat16, in bfloat16 with one kind of NaN.

    Libraries that convert float32 to bfloat16 round alike, to the nearest and then to even, but make
    different NaNs.
    """
    # The bits are rounded, because a conversion may flush the smallest numbers to zero.
    return {path: _rounded(leaf) for path, leaf in leaves.items()}


@jax.jit
def _rounded(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.float32:
        wide = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        is_nan = (wide & jnp.uint32(0x7FFFFFFF)) > jnp.uint32(0x7F800000)
        half = jnp.uint32(0x7FFF) + ((wide >> jnp.uint32(16)) & jnp.uint32(1))
        bits = ((wide + half) >> jnp.uint32(16)).astype(jnp.uint16)
    else:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint16)
        is_nan = (bits & jnp.uint16(0x7FFF)) > jnp.uint16(0x7F80)
    return jax.lax.bitcast_convert_type(jnp.where(is_nan, jnp.uint16(0x7FC0), bits), jnp.bfloat16)


# By the bytes of a number; a number of eight bytes is compared by halves.
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


# One program for each shape: most leaves of a tree share theirs with others, and one program of all leaves
# takes longer to compile than the train step.
@jax.jit
def _checksum(leaf: jax.Array, seed: jax.Array) -> jax.Array:
    """Return two 32-bit sums over an array, of each number's bits and position mixed well."""
    # A sum of products alone would not notice, for one, that an even number of signs has changed.
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    bits = jax.lax.bitcast_convert_type(leaf, _BITS[leaf.dtype.itemsize])
    position = seed
    for axis, size in enumerate(bits.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position * jnp.uint32(size) + index
    first = _mix(_mix(position) ^ bits.astype(jnp.uint32))
    # Integer sums come out the same in any order: on any mesh.
    sums = jnp.stack([x.sum(dtype=jnp.uint32) for x in (first, _mix(first))])
    return jax.lax.with_sharding_constraint(sums, REPLICATED) if mesh_shape() else sums


def _mix(x: jax.Array) -> jax.Array:
    """Return 32 bits that each depend on all bits of `x` (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))
