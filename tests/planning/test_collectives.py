"""The traffic of real compiled programs, and of the forms in which the TPU compiler writes them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from lit_jax.config import MeshConfig
from lit_jax.distributed.mesh import make_mesh
from lit_jax.planning.collectives import KINDS, parse, traffic, trip_count

BYTES = 4 * 8 * 16  # of a device's part, float32


def communicated(function, *, turns=1, axes=("data", "fsdp")):
    """Return the bytes of `turns` runs on 8 devices, each with an array of 8x16."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))

    def loop(x):
        return jax.lax.scan(lambda x, _: (function(x, axes), None), x, length=turns)[0]

    spec = P(("data", "fsdp"))
    mapped = jax.shard_map(loop, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    compiled = jax.jit(mapped).lower(jnp.ones((64, 16))).compile()
    return traffic(compiled.as_text(), 8).communicated


def permute(x, axes):
    return jax.lax.ppermute(x, axes, [(i, (i + 1) % 8) for i in range(8)])


def gather_and_scatter(x, axes):
    whole = jax.lax.all_gather(x, axes, tiled=True)
    return jax.lax.psum_scatter(whole * 2, axes, tiled=True)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (jax.lax.psum, {"all-reduce": 2 * 7 / 8 * BYTES}),
        (permute, {"collective-permute": BYTES}),
        (gather_and_scatter, {"all-gather": 7 * BYTES, "reduce-scatter": 7 * BYTES}),
    ],
)
def test_what_a_chip_sends_is_counted_by_kind_and_turn(function, expected):
    nothing = dict.fromkeys(KINDS, 0)
    assert communicated(function) == nothing | expected
    turns = 5
    assert communicated(function, turns=turns) == nothing | {
        k: turns * v for k, v in expected.items()
    }


def test_a_group_may_be_a_part_of_the_mesh():
    assert communicated(jax.lax.psum, axes="fsdp")["all-reduce"] == 2 * 1 / 2 * BYTES


LOOP = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %p = (s32[]{:T(128)}, bf16[4,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[4,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %sum = bf16[4,128]{1,0} all-reduce(%x), channel_id=1, replica_groups=GROUPS, to_apply=%add
  ROOT %out = (s32[], bf16[4,128]) tuple(%next, %sum)
}

%cond (p: (s32[], bf16[4,128])) -> pred[] {
  %p.1 = (s32[], bf16[4,128]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[]{:T(128)} constant(12)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: bf16[4,128]) -> (s32[], bf16[4,128]) {
  %x.1 = bf16[4,128]{1,0} parameter(0)
  %first = s32[] constant(2)
  %start = (s32[], bf16[4,128]) tuple(%first, %x.1)
  ROOT %loop = (s32[], bf16[4,128]) while(%start), condition=%cond, body=%body
}
"""


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", 4),
        ("{}", 8),
    ],
)
def test_loops_and_groups_as_the_tpu_compiler_writes_them(groups, size):
    computations, entry = parse(LOOP)
    assert entry == "main"
    assert trip_count(computations["main"]["loop"], computations, "main") == 5
    expected = round(5 * 2 * (size - 1) / size * 4 * 128 * 2)
    assert traffic(LOOP.replace("GROUPS", groups), 8).communicated["all-reduce"] == expected


def test_the_parts_of_a_split_collective_count_once():
    part = 'frontend_attributes={chain_id="0"}, to_apply=%add'
    line = next(line for line in LOOP.splitlines() if "all-reduce" in line)
    chained = line.replace("to_apply=%add", part)
    again = chained.replace("%sum =", "%sum.1 =")
    text = LOOP.replace(line, f"{chained}\n{again}").replace("GROUPS", "{}")
    once = traffic(LOOP.replace("GROUPS", "{}"), 8)
    assert once.exposed == once.communicated
    assert traffic(text, 8).communicated == once.communicated
    assert set(traffic(text, 8).exposed.values()) == {0}  # the parts are computed beside
    counted_twice = text.replace('chain_id="0"', "")
    assert traffic(counted_twice, 8).communicated != once.communicated


def test_a_loop_that_does_not_say_its_number_of_iterations_is_refused():
    text = LOOP.replace("direction=LT", "direction=NE").replace("GROUPS", "{}")
    with pytest.raises(ValueError, match=r"loop \S+ .*iterations"):
        traffic(text, 8)


def test_a_sum_of_which_a_part_is_kept_is_a_reduce_scatter():
    text = LOOP.replace("GROUPS", "{}").replace("%body", "%all-reduce-scatter.1")
    sent = traffic(text, 8).communicated
    assert sent["all-reduce"] == 0
    assert sent["reduce-scatter"] == round(5 * 7 / 8 * 4 * 128 * 2)


@pytest.mark.parametrize(("between", "is_exposed"), [("fusion", False), ("bitcast", True)])
def test_a_collective_is_exposed_unless_something_is_computed_before_its_end(between, is_exposed):
    line = next(line for line in LOOP.splitlines() if "all-reduce" in line)
    start = line.replace("%sum =", "%start.1 =").replace("all-reduce(", "all-reduce-start(")
    lines = (
        start,
        f"  %other = bf16[4,128]{{1,0}} {between}(%x)",
        "  %sum = bf16[4,128]{1,0} all-reduce-done(%start.1)",
        "  %later = bf16[4,128]{1,0} fusion(%sum)",
    )
    text = LOOP.replace(line, "\n".join(lines)).replace("GROUPS", "{}")
    sent, exposed = traffic(text, 8)
    assert sent["all-reduce"] == round(5 * 2 * 7 / 8 * 4 * 128 * 2)
    assert exposed["all-reduce"] == (sent["all-reduce"] if is_exposed else 0)
