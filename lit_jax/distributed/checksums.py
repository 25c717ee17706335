"""Checksums of parameters, computed on the devices that hold them; only the checksums leave the devices."""

import functools
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lit_jax.distributed.mesh import REPLICATED, mesh_shape


def checksums(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return a checksum, two uint32 numbers, for each array; every bit, its position and the path count.

    The checksums are the same on any mesh. Under `jax.set_mesh` every process holds all of them.
    """
    seeds = _seeds(tuple(leaves))
    return {path: _checksum(leaf, seeds[path]) for path, leaf in leaves.items()}


@functools.partial(jax.jit, static_argnums=0)
def _seeds(paths: tuple[str, ...]) -> dict[str, jax.Array]:
    """Return a uint32 seed for each path."""
    # The seeds are constants of a compiled program, because a trainer forbids transfers from the host.
    seeds = {path: jnp.uint32(zlib.crc32(path.encode())) for path in paths}
    return jax.lax.with_sharding_constraint(seeds, REPLICATED) if mesh_shape() else seeds


def rounded(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return float32 or bfloat16 arrays as bfloat16, with the same bits for every NaN.

    Libraries that convert float32 to bfloat16 agree in rounding (to nearest, ties to even), but they produce
    different NaNs.
    """
    # `_rounded` works on the bits, because a conversion by XLA may flush subnormal numbers to zero.
    return {path: _rounded(leaf) for path, leaf in leaves.items()}


@jax.jit
def _rounded(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.float32:
        wide = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        # Without its sign bit, a NaN is an integer above the bits of infinity.
        is_nan = (wide & jnp.uint32(0x7FFFFFFF)) > jnp.uint32(0x7F800000)
        # Adding 0x7FFF and the lowest kept bit before the cut rounds to nearest, ties to even.
        half = jnp.uint32(0x7FFF) + ((wide >> jnp.uint32(16)) & jnp.uint32(1))
        bits = ((wide + half) >> jnp.uint32(16)).astype(jnp.uint16)
    else:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint16)
        is_nan = (bits & jnp.uint16(0x7FFF)) > jnp.uint16(0x7F80)
    return jax.lax.bitcast_convert_type(jnp.where(is_nan, jnp.uint16(0x7FC0), bits), jnp.bfloat16)


# The keys are item sizes in bytes. A number of eight bytes becomes two uint32 numbers.
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


# Each shape gets a program of its own. Most leaves share their shape with other leaves, and one program for
# all leaves took longer to compile than the train step.
@jax.jit
def _checksum(leaf: jax.Array, seed: jax.Array) -> jax.Array:
    """Return two uint32 sums over the hashes of each number's bits and position."""
    # A plain sum of products would miss some changes, such as an even number of flipped signs.
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    bits = jax.lax.bitcast_convert_type(leaf, _BITS[leaf.dtype.itemsize])
    position = seed
    for axis, size in enumerate(bits.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position * jnp.uint32(size) + index
    first = _mix(_mix(position) ^ bits.astype(jnp.uint32))
    # Integer sums do not depend on their order, so every mesh gives the same checksum. One reduction of both
    # compiles twice as fast as two.
    zero = jnp.uint32(0)
    both = (first, _mix(first))
    axes = tuple(range(bits.ndim))
    sums = jnp.stack(jax.lax.reduce(both, (zero, zero), _add_pairs, axes))
    return jax.lax.with_sharding_constraint(sums, REPLICATED) if mesh_shape() else sums


def _add_pairs(x: tuple[jax.Array, ...], y: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return x[0] + y[0], x[1] + y[1]


def _mix(x: jax.Array) -> jax.Array:
    """Return 32 bits that each depend on all bits of `x` (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))
