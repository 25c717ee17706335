"""Forecasts of programs as the TPU compiler writes them, and of programs that it compiles."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lit_jax.distributed.chips import CHIPS
from lit_jax.planning.cycles import forecast, layer_name, operations, part_name
from lit_jax.planning.topologies import open_topology
from tests.planning.conftest import BASE

CHIP = CHIPS["v5e"]
STEP = "jit(train_step)"
TEXT = "M.text_features/text_model/text_model.encode/encoder/while/body/closed_call/checkpoint"
FC1 = f"{STEP}/transpose(jvp(M))/{TEXT}/layer._call_block/layer/mlp/fc1/dot_general"
KERNEL = 'custom-call(%x), custom_call_target="tpu_custom_call"'
TURNS = 'backend_config={"known_trip_count":{"n":"7"}}'

PROGRAM = f"""
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p = (s32[], f32[8]{{0}}) parameter(0)
  %x = f32[8]{{0}} get-tuple-element(%p), index=1
  %y = f32[8]{{0}} fusion(%x), metadata={{op_name="{FC1}"}}, "estimated_cycles":"100"
  ROOT %out = (s32[], f32[8]{{0}}) tuple(%p, %y)
}}

%cond (p: (s32[], f32[8])) -> pred[] {{
  ROOT %less = pred[] parameter(0)
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %loop = (s32[], f32[8]{{0}}) while(%x), condition=%cond, body=%body, {TURNS}
  %k = f32[8]{{0}} {KERNEL}, metadata={{op_name="{STEP}/jvp()/attend"}}, "cost_estimate":COST
  %l = f32[8]{{0}} {KERNEL}, metadata={{op_name="{STEP}/silent"}}, backend_config={{}}
  ROOT %sum = f32[8]{{0}} add(%x, %x), metadata={{op_name="{STEP}/add"}}, "estimated_cycles":"40"
}}
"""


@pytest.mark.parametrize(
    "branches",
    [
        "branch_computations={%cheap, %dear}",
        "true_computation=%dear, false_computation=%cheap",
        "true_computation=%cheap, false_computation=%dear",
    ],
)
def test_a_conditional_counts_its_dearest_branch(branches):
    program = f"""
%cheap (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %y = f32[8]{{0}} add(%x, %x), "estimated_cycles":"9"
  ROOT %z = f32[8]{{0}} add(%y, %y), "estimated_cycles":"9"
}}

%dear (x: f32[8]) -> f32[8] {{
  ROOT %x = f32[8]{{0}} fusion(%p), "estimated_cycles":"70"
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %c = f32[8]{{0}} conditional(%x, %x, %x), {branches}, "estimated_cycles":"1"
}}
"""
    assert sum(operations(program, CHIP).parts.values()) == pytest.approx(71 / 1.5e9)


def test_a_loop_counts_as_often_as_it_turns_and_a_kernel_by_its_stated_cost():
    slow = '{"flops":"197000000","bytes_accessed":"819"}'
    found = operations(PROGRAM.replace("COST", slow), CHIP)
    fc1 = "text_model/encoder/layer/mlp/fc1/dot_general, gradient"
    assert found.layers == pytest.approx(
        {
            fc1: 700 / 1.5e9,
            "loss: attend": 1e-6,
            "optimizer: silent": 0,
            "optimizer: add": 40 / 1.5e9,
        }
    )
    assert found.parts == pytest.approx(
        {"text tower": 700 / 1.5e9, "loss": 1e-6, "optimizer": 40 / 1.5e9}
    )
    assert found.kernels == ("loss: attend",)
    assert found.without_cost == ("optimizer: silent",)
    # The slower of computation and memory counts.
    read = '{"flops":"197000000","bytes_accessed":"8190000"}'
    assert operations(PROGRAM.replace("COST", read), CHIP).parts["loss"] == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("name", "part", "layer"),
    [
        (
            "M.f/vision_model.<lambda>/vision_model/while/body/norm/mul",
            "image tower",
            "vision_model/norm/mul",
        ),
        ("M.project_text/M._project/projection/dot", "text tower", "projection/dot"),
        ("jit(train_step)/jvp()/shard_map/while/body/dot", "loss", "loss: shard_map/dot"),
        ("jit(train_step)/reduce_sum", "optimizer", "optimizer: reduce_sum"),
        ("", "unnamed", "unnamed"),
        ("broadcast.125", "unnamed", "unnamed"),
    ],
)
def test_an_instruction_belongs_to_a_part_of_the_step_and_to_a_layer(name, part, layer):
    assert (part_name(name), layer_name(name)) == (part, layer)


def test_hours_follow_from_a_duration_that_needs_no_data(config_of):
    found = operations(PROGRAM.replace("COST", "{}"), CHIP)
    config = config_of(BASE, BASE, 64, duration="1000 steps")
    seconds = 740 / 1.5e9 + 1e-6
    run = forecast(found, config, CHIP, devices=16, flops=197_000, exposed=1e-6)
    assert run.seconds == pytest.approx(seconds)
    assert run.pairs_a_second == pytest.approx(4 / seconds)
    assert run.mfu == pytest.approx(1e-9 / seconds)
    assert run.hours == pytest.approx(1000 * seconds / 3600)
    assert run.chip_hours == pytest.approx(16 * run.hours)
    assert sum(run.shares.values()) == pytest.approx(1)
    # A chip of two cores costs as one.
    of_cores = forecast(found, config, CHIPS["v3"], devices=16, flops=0, exposed=0.0)
    assert of_cores.chip_hours == pytest.approx(8 * of_cores.hours)
    epochs = dataclasses.replace(config, duration="2 epochs")
    run = forecast(found, epochs, CHIP, devices=16, flops=0, exposed=0.0)
    assert run.hours is run.chip_hours is None


@pytest.mark.oracle  # of the TPU compiler
@pytest.mark.parametrize("topology", ["v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_cycles_of_a_large_product_are_those_of_the_published_peak(topology):
    """Otherwise the estimates have changed their meaning, or the clock in chips.py is wrong."""
    opened, turns, size = open_topology(topology), 5, 4096
    sharding = jax.sharding.SingleDeviceSharding(opened.devices[0])
    x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=sharding)

    def products(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=turns)[0]

    found = operations(jax.jit(products).lower(x, x).compile().as_text(), opened.chip)
    peak = turns * 2 * size**3 / opened.chip.flops
    assert peak < found.layers["dot_general"] < 1.2 * peak
