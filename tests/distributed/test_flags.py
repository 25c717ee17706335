"""A flag that does not exist ends a process at its start: each is given to the library that reads it."""

import os
import subprocess
import sys

import pytest

from lit_jax.distributed.flags import FLAGS, set_flags, step_options


def test_the_users_own_settings_win_flag_by_flag():
    own = {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/d"}
    set_flags(own)
    theirs, ours = (own["XLA_FLAGS"].split()[part] for part in (slice(2), slice(2, None)))
    assert theirs == ["--xla_gpu_enable_latency_hiding_scheduler=false", "--xla_dump_to=/d"]
    names = {flag.lstrip("-").partition("=")[0] for flag in ours}
    assert names == FLAGS["XLA_FLAGS"].keys() - {"xla_gpu_enable_latency_hiding_scheduler"}
    names = [flag.partition("=")[0] for flag in own["LIBTPU_INIT_ARGS"].split()]
    assert names == [f"--{name}" for name in FLAGS["LIBTPU_INIT_ARGS"]]


def test_they_are_set_once_and_a_file_of_flags_is_left_alone():
    environment = {"XLA_FLAGS": "/a/file"}
    set_flags(environment)
    once = dict(environment)
    set_flags(environment)
    assert environment == once
    assert environment["XLA_FLAGS"] == "/a/file"


def start(program, **environment):
    flags = {"XLA_FLAGS": "", "LIBTPU_INIT_ARGS": ""} | environment
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | flags,
        capture_output=True,
        text=True,
        check=False,
    )


def test_options_of_the_step_leave_a_flag_of_the_user_alone():
    name = "xla_tpu_scoped_vmem_limit_kib"
    assert step_options("TPU v5 lite", {}) == step_options("cpu", {}) == {}
    assert step_options("TPU v6 lite", {"LIBTPU_INIT_ARGS": "--other=1"}).keys() == {name}
    assert step_options("TPU v6 lite", {"LIBTPU_INIT_ARGS": f"--{name}=49152"}) == {}


CPU = "import jax; jax.jit(lambda x: x)(1)"


def test_xla_knows_its_flags():
    environment = {}
    set_flags(environment)
    result = start(CPU, XLA_FLAGS=environment["XLA_FLAGS"])
    assert result.returncode == 0, result.stderr
    assert "no_such" in start(CPU, XLA_FLAGS="--xla_gpu_no_such=1").stderr


TPU = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
topology = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2")
from lit_jax.distributed.flags import step_options
options = step_options(topology.devices[0].device_kind, {})
assert options
sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=sharding)
jax.jit(jnp.sin, compiler_options=options).lower(x).compile()
"""


@pytest.mark.long
def test_libtpu_knows_its_flags():
    environment = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    set_flags(environment)
    result = start(TPU, **environment)
    assert result.returncode == 0, result.stderr
    unknown = start(TPU, **environment | {"LIBTPU_INIT_ARGS": "--no_such=1"})
    assert "no_such" in unknown.stderr
