"""The device mesh, and the one sharding rule for everything that has a batch axis."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lit_jax.config import MeshConfig
from lit_jax.errors import UserError

AXES = ("data", "fsdp")
BATCH = PartitionSpec(AXES)
REPLICATED = PartitionSpec()


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh of all (or the given) devices over the axes 'data' and 'fsdp'.

    With several slices, 'data' counts the slices, too: split matrices are gathered inside each slice, and
    only the sums over 'data' go through the network between slices, unless 'fsdp' is a multiple of a slice.

    Raise UserError if the two sizes do not multiply to the number of devices, or if neither of fsdp and the
    number of devices of a slice divides the other.
    """
    devices = jax.devices() if devices is None else devices
    fsdp = config.fsdp
    data = len(devices) // fsdp if config.data == -1 else config.data
    if data * fsdp != len(devices):
        raise UserError(
            f"A mesh of data={config.data} x fsdp={fsdp} does not match {len(devices)} devices; "
            "set config.mesh.data=-1 and let config.mesh.fsdp divide the number of devices."
        )
    slices = group_by_slice(devices)
    of_slice = len(devices) // len(slices)
    inside = min(fsdp, of_slice)
    if of_slice % inside or fsdp % inside:
        raise UserError(
            f"config.mesh.fsdp={fsdp} and the {of_slice} devices of each of the {len(slices)} slices do not "
            "divide; set it to a divisor of them or to a multiple."
        )
    # jax.make_mesh refuses the devices of several slices, so each slice has a mesh of its own first. Auto is
    # written out: the default, Explicit, rejects stock layers (gather, convolution).
    types = (AxisType.Auto,) * 2
    parts = [
        jax.make_mesh((of_slice // inside, inside), AXES, axis_types=types, devices=part).devices
        for part in slices
    ]
    return Mesh(np.concatenate(parts).reshape(data, fsdp), AXES, axis_types=types)


def group_by_slice(devices: Sequence[Any]) -> list[list[Any]]:
    """Return the devices of each TPU slice, or of each machine with GPUs; all in one if they name none."""
    numbers = [getattr(device, "slice_index", 0) for device in devices]
    return [
        [device for device, number in zip(devices, numbers, strict=True) if number == wanted]
        for wanted in sorted(set(numbers))
    ]


def mesh_shape() -> Mapping[str, int]:
    """Return the sizes of the axes of the mesh of `jax.set_mesh`; empty if none is set.

    They are empty for a mesh of other axes, too: whoever calls a model from Python shards its arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape if mesh.axis_names == AXES else {}


def device_kind() -> str:
    """Return the kind of device of the mesh of `jax.set_mesh`, as 'NVIDIA H100 80GB HBM3'; '' without it."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "" if device is None else device.device_kind


def mesh_size() -> int:
    """Return the number of devices of the mesh of `jax.set_mesh`; 1 without it."""
    return math.prod(mesh_shape().values())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits the leading (batch) axis over all devices."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, REPLICATED)


def global_batch(rows: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return the batch over all devices, to which this process contributes its `rows`."""
    sharding = batch_sharding(mesh)
    # This transfer is intended.
    with jax.transfer_guard("allow"):
        return {
            name: jax.make_array_from_process_local_data(sharding, array)
            for name, array in rows.items()
        }


def shard_batch(x: jax.Array) -> jax.Array:
    """Keep the leading (batch) axis of an activation split over the mesh of `jax.set_mesh`, if one is set.

    Every scanned block needs it: without it the compiler was seen to replicate the batch.
    """
    if not mesh_shape():
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)
