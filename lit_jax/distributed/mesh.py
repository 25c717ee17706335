"""The device mesh, and the one sharding rule for everything that has a batch axis."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lit_jax.config import MeshConfig
from lit_jax.errors import UserError

# The batch is split over both axes and matrices over 'fsdp' alone, so every device gets rows of its own.
AXES = ("data", "fsdp")
BATCH = PartitionSpec(AXES)
REPLICATED = PartitionSpec()


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh of all (or the given) devices over the axes 'data' and 'fsdp'.

    With several slices, the axis 'data' spans the slices: split matrices are gathered inside each slice, and
    only the sums over 'data' cross the slower network between slices. If 'fsdp' is a multiple of the slice
    size, gathers cross that network, too.

    Raises UserError if the two sizes do not multiply to the number of devices, or if neither 'fsdp' nor the
    slice size divides the other.
    """
    devices = jax.devices() if devices is None else devices
    fsdp = config.fsdp
    data = len(devices) // fsdp if config.data == -1 else config.data
    if data * fsdp != len(devices):
        raise UserError(
            f"A mesh of data={config.data} x fsdp={fsdp} does not match {len(devices)} devices; set "
            f"config.mesh.data=-1 and config.mesh.fsdp to a divisor of {len(devices)}."
        )
    slices = group_by_slice(devices)
    of_slice = len(devices) // len(slices)
    inside = min(fsdp, of_slice)
    if of_slice % inside or fsdp % inside:
        raise UserError(
            f"config.mesh.fsdp={fsdp} is neither a divisor nor a multiple of {of_slice}, the number of "
            f"devices in each of the {len(slices)} slices; set it to one of these."
        )
    # jax.make_mesh rejects devices of several slices, so each slice first gets a mesh of its own, ordered by
    # its physical topology. The axis type is Auto, because the default, Explicit, rejects stock layers
    # (gather, convolution).
    types = (AxisType.Auto,) * 2
    parts = [
        jax.make_mesh((of_slice // inside, inside), AXES, axis_types=types, devices=part).devices
        for part in slices
    ]
    return Mesh(np.concatenate(parts).reshape(data, fsdp), AXES, axis_types=types)


def group_by_slice(devices: Sequence[Any]) -> list[list[Any]]:
    """Return the devices grouped by TPU slice or GPU machine; one group if devices have no slice index."""
    numbers = [getattr(device, "slice_index", 0) for device in devices]
    return [
        [device for device, number in zip(devices, numbers, strict=True) if number == wanted]
        for wanted in sorted(set(numbers))
    ]


def mesh_shape() -> Mapping[str, int]:
    """Return the axis sizes of the mesh of `jax.set_mesh`; an empty mapping if no mesh is set.

    The mapping is also empty for a mesh with other axes. A caller who sets such a mesh shards the arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape if mesh.axis_names == AXES else {}


def device_kind() -> str:
    """Return the device kind of the mesh of `jax.set_mesh`, such as 'NVIDIA H100 80GB HBM3', or ''."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "" if device is None else device.device_kind


def has_bfloat16_units() -> bool:
    """Return whether the devices of the mesh of `jax.set_mesh` are NVIDIA GPUs from Ampere on."""
    # The excluded GPUs are older, but have names like newer ones. Still older names have another beginning.
    is_old = re.match(r"NVIDIA (GeForce (GTX|MX|RTX 20)|TITAN|T\d)", device_kind())
    return device_kind().startswith("NVIDIA") and not is_old


def mesh_size() -> int:
    """Return the number of devices of the mesh of `jax.set_mesh`; 1 without a mesh."""
    return math.prod(mesh_shape().values())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits the leading (batch) axis over all devices."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, REPLICATED)


def global_batch(rows: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return the global batch, split over all devices, from the `rows` that each process contributes."""
    sharding = batch_sharding(mesh)
    # A trainer forbids implicit transfers by jax.transfer_guard. The transfer of the batch is intended.
    with jax.transfer_guard("allow"):
        return {
            name: jax.make_array_from_process_local_data(sharding, array)
            for name, array in rows.items()
        }


def shard_batch(x: jax.Array) -> jax.Array:
    """Keep the leading (batch) axis of an activation split over the mesh of `jax.set_mesh`, if one is set.

    Every scanned block needs this constraint: without it the compiler was seen to replicate the batch.
    """
    if not mesh_shape():
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def cut(x_Bx: jax.Array, parts: int) -> jax.Array:
    """Split B... into KxB/K.... Each part has rows of every device, so that no rows move."""
    # The rows of a device are consecutive in the batch, so the axis of devices comes first.
    by_device = x_Bx.reshape(mesh_size(), parts, -1, *x_Bx.shape[1:])
    return _split_second(by_device.swapaxes(0, 1).reshape(parts, -1, *x_Bx.shape[1:]))


def join(parts_KxN: jax.Array) -> jax.Array:
    """Return the array B... that `cut` has split into KxB/K..."""
    count, _, *shape = parts_KxN.shape
    rows = _split_second(parts_KxN).reshape(count, mesh_size(), -1, *shape)
    return shard_batch(rows.swapaxes(0, 1).reshape(-1, *shape))


def _split_second(x: jax.Array) -> jax.Array:
    if not mesh_shape():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(None, *BATCH))
