"""Programs that the real compiler makes for GPUs that are not there: `make test-gpu`."""

import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks.gpu_program import H100, HOPPER, gpus
from lit_jax.config import MeshConfig
from lit_jax.distributed.mesh import batch_sharding, make_mesh
from lit_jax.models.attention import attend
from lit_jax.models.layers import LayerNorm
from lit_jax.planning.planner import abstract_step, traced
from lit_jax.training.losses import make_loss
from tests.planning.conftest import BASE

pytestmark = pytest.mark.gpu

AMPERE, ADA, BLACKWELL = (8, 0), (8, 9), (10, 0)
CUDNN = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")


def compiled(function, *arrays, devices):
    """`function` of arrays (shapes and dtypes) that are split by their first axis, as text."""
    mesh = make_mesh(MeshConfig(), devices)
    arrays = [jax.ShapeDtypeStruct(*array, sharding=batch_sharding(mesh)) for array in arrays]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arrays).compile().as_text()


def calls(hlo):
    return re.findall(r'custom_call_target="([^"]+)"', hlo)


def both_ways(q, k, v, grad):
    context, pull = jax.vjp(attend, q, k, v)
    return context, *pull(grad)


@pytest.mark.parametrize("capability", [AMPERE, ADA, HOPPER, BLACKWELL])
@pytest.mark.parametrize("length", [1, 50, 197])
def test_attention_is_one_kernel_each_way(length, capability):
    devices = gpus(1, capability=capability)
    for width, dtype in (
        (8, jnp.float16),
        (64, jnp.bfloat16),
        (72, jnp.bfloat16),
        (128, jnp.bfloat16),
    ):
        array = (8, 12, length, width), dtype
        assert calls(compiled(attend, *[array] * 3, devices=devices)) == list(CUDNN[:1])
        assert calls(compiled(both_ways, *[array] * 4, devices=devices)) == list(CUDNN)


@pytest.mark.parametrize("length", [196, 197])
@pytest.mark.parametrize("in_axes", [(0, 0, 0, 0), (0, None, None, 0), (None, 0, 0, None)])
def test_attention_may_be_batched_in_some_of_its_arrays(length, in_axes):
    """`jax.vmap` of a gradient, and `jax.jacrev`."""
    shape = (4, 2, 12, length, 64)
    arrays = [(shape if axis == 0 else shape[1:], jnp.bfloat16) for axis in in_axes]
    hlo = compiled(jax.vmap(both_ways, in_axes), *arrays, devices=gpus(1))
    assert calls(hlo) == list(CUDNN)
    assert "bf16[8," in next(line for line in hlo.splitlines() if CUDNN[1] in line)


def test_attention_of_float32_is_computed_by_xla():
    arrays = [((8, 12, 197, 64), jnp.float32)] * 4
    assert calls(compiled(both_ways, *arrays, devices=gpus(1))) == []


def test_layer_norm_is_one_kernel():
    def norm(x, scale):
        return LayerNorm(1e-6, x.dtype).apply({"params": {"scale": scale[0], "bias": scale[1]}}, x)

    arrays = ((8, 197, 768), jnp.bfloat16), ((2, 768), jnp.float32)
    entry = compiled(norm, *arrays, devices=gpus(1)).split("\nENTRY ")[1]
    kernels = re.findall(r" = (\S+) fusion\(", entry)
    assert kernels == ["bf16[8,197,768]{2,1,0}"]


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        (H100, AMPERE),
        (H100, ADA),
        (H100, HOPPER),
        (H100, BLACKWELL),
        ("NVIDIA T4", (7, 5)),
        ("Tesla T4", (7, 5)),
    ],
)
def test_products_of_the_loss_take_three_passes_from_ampere_on(kind, capability):
    """The compiler refuses this algorithm for older GPUs."""
    arrays = [((4096, 768), jnp.float32)] * 2
    scale, bias = jnp.float32(2.7), jnp.float32(-10)
    for name in ("softmax", "sigmoid"):
        loss = jax.grad(make_loss(name, implementation="blockwise"), argnums=(0, 1))
        devices = gpus(1, kind, capability)
        hlo = compiled(lambda *z, loss=loss: loss(*z, scale, bias), *arrays, devices=devices)
        assert ("algorithm=dot_bf16_bf16_f32_x3" in hlo) == (capability >= AMPERE)


@pytest.mark.parametrize("fsdp", [1, 4])
def test_a_train_step_for_several_gpus(config_of, fsdp):
    """Attention of the image tower is cuDNN's in both directions; no GPU has the rows of others."""
    rows = 48
    config = config_of(BASE, BASE, rows * 8, **{"policy.lock": "UU", "mesh.fsdp": fsdp})
    step = abstract_step(config, gpus(8))
    batch = step.abstract_batch(config.batch_size)
    with jax.set_mesh(step.model.mesh):
        hlo = traced(step, batch).lower().compile().as_text()
    assert set(calls(hlo)) == set(CUDNN)
    assert "197,197]" not in hlo
    tokens = re.findall(r"\[(?:11,)?(\d+),197,768\]", hlo)
    assert max(map(int, tokens)) == rows  # the position embeddings have one
    assert f"s32[{rows}]" in hlo  # how many of 198 tokens count
    assert f"s32[{rows * 8}]" not in hlo
