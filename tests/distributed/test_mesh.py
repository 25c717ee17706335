import dataclasses

import jax
import numpy as np
import pytest

from lit_jax.config import MeshConfig
from lit_jax.distributed.mesh import global_batch, make_mesh, shard_batch
from lit_jax.errors import UserError


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"), [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (4, 2, (4, 2))]
)
def test_a_mesh_takes_all_devices(data, fsdp, shape):
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp))
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == shape


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (4, 4), (16, 1)])
def test_sizes_that_do_not_fit_are_refused(data, fsdp):
    with pytest.raises(UserError, match=r"8 .*config.mesh.data=-1"):
        make_mesh(MeshConfig(data=data, fsdp=fsdp))


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    slice_index: int
    platform: str = "tpu of some kind"
    device_kind: str = "that JAX does not know"


# In no order: what counts is the slice that each of them names.
TWO_SLICES = [Device(id=n, slice_index=n % 2) for n in range(8)]


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_fsdp_stays_inside_a_slice(fsdp):
    mesh = make_mesh(MeshConfig(fsdp=fsdp), TWO_SLICES)
    assert mesh.devices.shape == (8 // fsdp, fsdp)
    slices = [{device.slice_index for device in row} for row in mesh.devices]
    assert slices == [{0}] * (4 // fsdp) + [{1}] * (4 // fsdp)
    assert {device.id for device in mesh.devices.flat} == set(range(8))


def test_fsdp_may_be_a_multiple_of_a_slice():
    mesh = make_mesh(MeshConfig(fsdp=8), TWO_SLICES)
    assert [device.slice_index for device in mesh.devices[0]] == [0] * 4 + [1] * 4


def test_fsdp_that_is_neither_part_nor_multiple_of_a_slice_is_refused():
    three = [Device(id=n, slice_index=n // 4) for n in range(12)]
    with pytest.raises(UserError, match=r"fsdp=6 .*\b4\b.*\b3\b"):
        make_mesh(MeshConfig(fsdp=6), three)


def test_rows_are_split_over_both_axes():
    mesh = make_mesh(MeshConfig(fsdp=2))
    rows = np.arange(16).reshape(16, 1)
    placed = global_batch({"x": rows}, mesh)["x"]
    np.testing.assert_array_equal(placed, rows)
    assert [shard.data.shape for shard in placed.addressable_shards] == [(2, 1)] * 8


def test_shard_batch_needs_no_mesh_and_keeps_to_one():
    x = np.ones((8, 2), np.float32)
    np.testing.assert_array_equal(jax.jit(shard_batch)(x), x)
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert jax.jit(shard_batch)(x).sharding.shard_shape(x.shape) == (1, 2)
