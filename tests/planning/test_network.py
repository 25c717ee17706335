"""The traffic of programs for several slices: real ones, and the TPU compiler's ways to write them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lit_jax.config import MeshConfig
from lit_jax.distributed.mesh import make_mesh
from lit_jax.planning.collectives import KINDS, traffic
from lit_jax.planning.network import network_traffic
from lit_jax.planning.topologies import open_topology

# Slices of four chips, of which two share a host.
TWO, THREE = (
    [
        SimpleNamespace(id=100_000 * s + i, process_index=2 * s + i // 2)
        for s in range(1, slices + 1)
        for i in range(4)
    ]
    for slices in (2, 3)
)
BYTES = 4 * 128 * 2  # of what is sent

STEP = """HloModule jit_step, num_partitions=4

%body (p: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %p = (s32[]{:T(128)}, bf16[4,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[4,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %token = token[] after-all(), frontend_attributes={MegascaleRendezvousKeyName="psum.7_0"}
  %send = (bf16[4,128]{1,0}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, ATTRIBUTES
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv = (bf16[4,128]{1,0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, ATTRIBUTES
  %y = bf16[4,128]{1,0} BETWEEN(%x)
  %received = (bf16[4,128]{1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  %later = bf16[4,128]{1,0} fusion(%x)
  %sum = bf16[4,128]{1,0} get-tuple-element(%received), index=0
  ROOT %out = (s32[], bf16[4,128]) tuple(%next, %sum)
}

%cond (p: (s32[], bf16[4,128])) -> pred[] {
  %p.1 = (s32[], bf16[4,128]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: bf16[4,128]) -> (s32[], bf16[4,128]) {
  %x.1 = bf16[4,128]{1,0} parameter(0)
  %first = s32[] constant(0)
  %start = (s32[], bf16[4,128]) tuple(%first, %x.1)
  ROOT %loop = (s32[], bf16[4,128]) while(%start), condition=%cond, body=%body
}
"""


def step(kind, target, between="bitcast"):
    handler = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
    rendezvous = '_xla_host_transfer_rendezvous="psum.7_0"'
    attributes = (
        f"frontend_attributes={{{handler},{rendezvous},_xla_megascale_target={target},"
        f'_xla_megascale_transfer_type="{kind}"}}'
    )
    return STEP.replace("ATTRIBUTES", attributes).replace("BETWEEN", between)


EVERYONE = "{{100000,100001,100003,100002,200000,200001,200003,200002}}"
RING = "{{100003->200000},{200003->100000}}"


@pytest.mark.parametrize(
    ("devices", "form", "target", "kind", "times"),
    [
        (TWO, "ALL_REDUCE", '"{1,2}x{0:3}"', "all-reduce", 2 * 1 / 2),
        (THREE, "ALL_REDUCE", '"{1,2,3}x{0:3}"', "all-reduce", 2 * 2 / 3),
        (THREE, "REDUCE_SCATTER", '"{1,2,3}x{0:3}"', "reduce-scatter", 2 / 3),
        (THREE, "ALL_GATHER", '"{1,2,3}x{0:3}"', "all-gather", 2),
        # One chip of the two of a host, and half of a group elsewhere.
        (TWO, "ALL_REDUCE", '"{1,2}x{0,2}"', "all-reduce", 1 / 2),
        (TWO, "ALL_TO_ALL", EVERYONE, "all-to-all", 1 / 2),
        (TWO, "ONE_TO_ONE", RING, "collective-permute", 1 / 2),
    ],
)
def test_what_leaves_a_slice_is_counted_by_kind_and_turn(devices, form, target, kind, times):
    hlo = step(form, target)
    expected = dict.fromkeys(KINDS, 0) | {kind: round(5 * times * BYTES)}
    assert network_traffic(hlo, devices).communicated == expected
    assert (
        network_traffic(hlo.replace("is_host_transfer=true, ", ""), devices).communicated[kind] == 0
    )
    assert set(traffic(hlo, 4).communicated.values()) == {0}  # none of it inside


@pytest.mark.parametrize(("between", "is_exposed"), [("fusion", False), ("bitcast", True)])
def test_it_is_exposed_unless_something_is_computed_before_it_is_received(between, is_exposed):
    sent, exposed = network_traffic(step("ALL_REDUCE", '"{1,2}x{0:3}"', between), TWO)
    assert sent["all-reduce"] == 5 * BYTES
    assert exposed["all-reduce"] == (5 * BYTES if is_exposed else 0)


@pytest.mark.parametrize(
    ("form", "target"),
    [("ALL_SHUFFLE", '"{1,2}x{0:3}"'), ("ALL_REDUCE", '"everyone"'), ("ONE_TO_ONE", "{}")],
)
def test_an_unknown_form_is_refused(form, target):
    with pytest.raises(ValueError, match=r"_xla_megascale"):
        network_traffic(step(form, target), TWO)


def gather(x, axes):
    return 2 * jax.lax.all_gather(x, axes, tiled=True)[: len(x)]


def permute(x, axes):
    return jax.lax.ppermute(x, axes, [(i, (i + 1) % 8) for i in range(8)])


def compiled(function, slices, shape, dtype):
    """Compile a function of one array, of this shape on each chip, for slices of 2x2 chips with fsdp 2."""
    devices = open_topology("v5e:2x2", slices=slices).devices
    mesh, spec = make_mesh(MeshConfig(fsdp=2), devices), P(("data", "fsdp"))
    rows, *rest = shape
    whole = (len(devices) * rows, *rest)
    array = jax.ShapeDtypeStruct(whole, dtype, sharding=NamedSharding(mesh, spec))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(mapped).lower(array).compile().as_text(), devices


@pytest.mark.oracle  # of the TPU compiler
@pytest.mark.parametrize(
    ("function", "axes", "kind", "of_array"),
    [
        (jax.lax.psum, ("data", "fsdp"), "all-reduce", 1 / 4),  # each chip sums a quarter
        (jax.lax.psum, "data", "all-reduce", 1 / 2),
        (jax.lax.psum, "fsdp", "all-reduce", 0),
        (gather, ("data", "fsdp"), "all-gather", 1),
        (permute, ("data", "fsdp"), "collective-permute", 1 / 4),  # a host has all four chips
    ],
)
def test_of_the_real_compiler(function, axes, kind, of_array):
    """Two slices of 2x2 chips, fsdp 2; each chip has 96x256 numbers."""
    hlo, devices = compiled(lambda x: function(x, axes), 2, (96, 256), jnp.float32)
    expected = dict.fromkeys(KINDS, 0) | {kind: of_array * 96 * 256 * 4}
    assert network_traffic(hlo, devices).communicated == expected
    assert sum(traffic(hlo, 4).communicated.values()) > 0


@pytest.mark.oracle  # of the TPU compiler
@pytest.mark.parametrize("is_exposed", [True, False])
@pytest.mark.parametrize("slices", [1, 2])
def test_of_the_real_compiler_a_sum_is_exposed_where_nothing_else_can_be_computed(
    slices, is_exposed
):
    """The compiler's marks of an overlap are private: this fails when they come to mean something else."""

    def step(x):
        product = jnp.sin(x @ x)
        if is_exposed:
            return jax.lax.psum(product, "data"), product
        moved = jax.lax.ppermute(x, ("data", "fsdp"), [(i, (i + 1) % n) for i in range(n)])
        return moved, jnp.sin(product @ x)

    n = 4 * slices
    hlo, devices = compiled(step, slices, (1024, 1024), jnp.bfloat16)
    counts = [network_traffic(hlo, devices)] if slices > 1 else [traffic(hlo, 4)]
    for communicated, exposed in counts:
        assert sum(communicated.values()) > 0
        assert sum(exposed.values()) == (sum(communicated.values()) if is_exposed else 0)
