"""Checksums of parameters, computed where the parameters are; only checksums leave a device.

CPU devices share the memory of their process, so NumPy reads small arrays there. The thirty programs that
the shapes of the demo need would take ten times as long to compile as everything else that its start reads.
"""

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.distributed.mesh import REPLICATED, mesh_shape

Arrays = Mapping[str, jax.Array | np.ndarray]


def checksums(leaves: Arrays) -> dict[str, jax.Array | np.ndarray]:
    """Return a checksum, two uint32 numbers, for each array; every bit, its position and the path count.

    The checksums are the same on any mesh. Under `jax.set_mesh` every process holds all of them.
    """
    # NumPy needs no compilation, which each new shape and dtype of array costs on a device.
    near = jax.device_get({path: leaf for path, leaf in leaves.items() if _is_for_host(leaf)})
    far = tuple(path for path in leaves if path not in near)
    seeds = _seeds(far) if far else {}
    return {
        path: _host_checksum(near[path], zlib.crc32(path.encode()))
        if path in near
        else _checksum(leaf, seeds[path])
        for path, leaf in leaves.items()
    }


def _is_for_host(leaf: jax.Array | np.ndarray) -> bool:
    """Return whether NumPy reads an array without a copy from a device, and hashes it within milliseconds."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return False
    is_near = isinstance(leaf, np.ndarray) or all(d.platform == "cpu" for d in leaf.devices())
    return is_near and leaf.size <= _HOST_SIZE


@functools.partial(jax.jit, static_argnums=0)
def _seeds(paths: tuple[str, ...]) -> dict[str, jax.Array]:
    """Return a uint32 seed for each path."""
    # The seeds are constants of a compiled program, because a trainer forbids transfers from the host.
    seeds = {path: jnp.uint32(zlib.crc32(path.encode())) for path in paths}
    return jax.lax.with_sharding_constraint(seeds, REPLICATED) if mesh_shape() else seeds


def rounded(leaves: Arrays) -> dict[str, jax.Array | np.ndarray]:
    """Return float32 or bfloat16 arrays as bfloat16, with the same bits for every NaN.

    Libraries that convert float32 to bfloat16 agree in rounding (to nearest, ties to even), but they produce
    different NaNs.
    """
    return {
        path: _host_rounded(jax.device_get(leaf)) if _is_for_host(leaf) else _rounded(leaf)
        for path, leaf in leaves.items()
    }


def _host_rounded(leaf: np.ndarray) -> np.ndarray:
    # NumPy warns of signalling NaNs and of numbers that become infinite.
    with np.errstate(invalid="ignore", over="ignore"):
        halves = leaf.astype(jnp.bfloat16)
        halves.view(np.uint16)[np.isnan(leaf)] = _NAN
    return halves


@jax.jit
def _rounded(leaf: jax.Array) -> jax.Array:
    # On the bits, because a conversion by XLA may flush subnormal numbers to zero.
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
    return jax.lax.bitcast_convert_type(jnp.where(is_nan, _NAN, bits), jnp.bfloat16)


# A program takes 30 ms to compile; NumPy hashes four million numbers in that time.
_HOST_SIZE = 1 << 20
# The keys are item sizes in bytes. A number of eight bytes becomes two uint32 numbers.
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}
# The bits of the only NaN in bfloat16 that `rounded` leaves.
_NAN = np.uint16(0x7FC0)
# The numbers that NumPy hashes at once: few enough for the processor's cache.
_CHUNK = 1 << 15


def _host_checksum(leaf: np.ndarray, seed: int) -> np.ndarray:
    """Return what `_checksum` returns."""
    leaf = leaf.reshape(-1)
    bits = leaf.view(_BITS[leaf.dtype.itemsize])
    # `_checksum` counts along the axes, the last one fastest, as the memory of a NumPy array does.
    first = seed * bits.size
    sums = np.zeros(2, np.uint32)
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        position = np.uint32((first + start) % 2**32) + np.arange(len(chunk), dtype=np.uint32)
        once, twice = _hash(position, chunk.astype(np.uint32))
        sums += np.stack([once.sum(dtype=np.uint32), twice.sum(dtype=np.uint32)])
    return sums


# Each shape gets a program of its own. Most leaves share their shape with other leaves, and one program for
# all leaves took longer to compile than the train step.
@jax.jit
def _checksum(leaf: jax.Array, seed: jax.Array) -> jax.Array:
    """Return two uint32 sums over the hashes of each number's bits and position."""
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    bits = jax.lax.bitcast_convert_type(leaf, _BITS[leaf.dtype.itemsize])
    position = seed
    for axis, size in enumerate(bits.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position * jnp.uint32(size) + index
    both = _hash(position, bits.astype(jnp.uint32))
    # Integer sums do not depend on their order, so every mesh gives the same checksum. One reduction of both
    # compiles twice as fast as two.
    zero = jnp.uint32(0)
    axes = tuple(range(bits.ndim))
    sums = jnp.stack(jax.lax.reduce(both, (zero, zero), _add_pairs, axes))
    return jax.lax.with_sharding_constraint(sums, REPLICATED) if mesh_shape() else sums


def _add_pairs(x: tuple[jax.Array, ...], y: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return x[0] + y[0], x[1] + y[1]


def _hash(position: Any, bits: Any) -> tuple[Any, Any]:
    """Return two hashes of each number's bits and position, uint32 arrays of JAX or of NumPy as these are."""
    # A plain sum of products would miss some changes, such as an even number of flipped signs.
    first = _mix(_mix(position) ^ bits)
    return first, _mix(first)


def _mix(x: Any) -> Any:
    """Return 32 bits that each depend on all bits of `x` (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
