"""Both losses against float64 NumPy, in value and in every gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_jax.config import MeshConfig
from lit_jax.distributed.mesh import batch_sharding, make_mesh, shard_batch
from lit_jax.errors import UserError
from lit_jax.training.losses import CONTRASTIVE, make_loss, softmax_loss


def embeddings(batch: int, dim: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(2, batch, dim))
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    return z[0].astype(np.float32), z[1].astype(np.float32)


def reference(name, zimg_BxD, ztxt_BxD, scale, bias, smoothing=0.0):
    """The definitions of the papers, pair by pair, in float64."""
    zimg_BxD, ztxt_BxD = zimg_BxD.astype(np.float64), ztxt_BxD.astype(np.float64)
    logits = np.exp(float(scale)) * zimg_BxD @ ztxt_BxD.T + float(bias)
    count = len(logits)
    if name == "sigmoid":
        sign = 2 * np.eye(count) - 1
        return np.logaddexp(0, -sign * logits).sum() / count
    target = (1 - smoothing) * np.eye(count) + smoothing / count
    rows = [np.logaddexp.reduce(logits[i]) - target[i] @ logits[i] for i in range(count)]
    columns = [np.logaddexp.reduce(logits[:, i]) - target[i] @ logits[:, i] for i in range(count)]
    return (np.mean(rows) + np.mean(columns)) / 2


def numeric_gradients(name, args, smoothing=0.0, eps=1e-5):
    """Central differences of the float64 reference for each element of each argument."""
    args = [np.asarray(a, np.float64) for a in args]
    grads = [np.zeros_like(a) for a in args]
    for arg, grad in zip(args, grads, strict=True):
        for index in np.ndindex(arg.shape):
            kept = arg[index]
            arg[index] = kept + eps
            above = reference(name, *args, smoothing)
            arg[index] = kept - eps
            below = reference(name, *args, smoothing)
            arg[index] = kept
            grad[index] = (above - below) / (2 * eps)
    return grads


@pytest.mark.parametrize(
    ("name", "smoothing"), [("softmax", 0.0), ("softmax", 0.1), ("sigmoid", 0.0)]
)
@pytest.mark.parametrize("scale", [0.0, 2.6592, float(np.log(100))])
def test_value_and_gradients_equal_float64(name, smoothing, scale):
    args = (*embeddings(6, 4), np.float32(scale), np.float32(-3.0))
    loss = make_loss(name, label_smoothing=smoothing)
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*args)
    np.testing.assert_allclose(value, reference(name, *args, smoothing), rtol=2e-6)
    expected = numeric_gradients(name, args, smoothing)
    largest = max(np.abs(g).max() for g in expected)
    for ours, theirs in zip(grads, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-6 * largest)


JITTED = {name: jax.jit(loss) for name, loss in CONTRASTIVE.items()}


@settings(deadline=None, max_examples=20)
@given(batch=st.sampled_from([1, 2, 33]), seed=st.integers(0, 99), scale=st.floats(-2, 4.6))
def test_any_batch_equals_float64(batch, seed, scale):
    zimg, ztxt = embeddings(batch, seed=seed)
    for name, loss in JITTED.items():
        value = loss(zimg, ztxt, jnp.float32(scale), jnp.float32(-2.0))
        expected = reference(name, zimg, ztxt, scale, -2.0)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


def test_identical_embeddings_cost_log_of_the_batch():
    z_BxD = jnp.ones((12, 4)) / 2
    np.testing.assert_allclose(softmax_loss(z_BxD, z_BxD, jnp.float32(1.0)), np.log(12), rtol=1e-6)


def test_permuting_the_pairs_changes_nothing():
    zimg, ztxt = embeddings(9)
    order = np.random.default_rng(1).permutation(9)
    for loss in JITTED.values():
        a = loss(zimg, ztxt, jnp.float32(2.0), jnp.float32(-1.0))
        b = loss(zimg[order], ztxt[order], jnp.float32(2.0), jnp.float32(-1.0))
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("name", CONTRASTIVE)
@pytest.mark.parametrize("mesh_config", [(8, 1), (4, 2), (2, 4)])
def test_split_over_devices_it_is_the_same_loss(name, mesh_config):
    data, fsdp = mesh_config
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp))
    zimg, ztxt = embeddings(16)
    scalars = jnp.float32(2.6592), jnp.float32(-2.0)

    def loss(*args):
        return CONTRASTIVE[name](shard_batch(args[0]), shard_batch(args[1]), *args[2:])

    grad_of = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
    alone, alone_grads = jax.jit(grad_of)(jnp.asarray(zimg), jnp.asarray(ztxt), *scalars)
    with jax.set_mesh(mesh):
        placed = (jax.device_put(z, batch_sharding(mesh)) for z in (zimg, ztxt))
        split, split_grads = jax.jit(grad_of)(*placed, *scalars)
    expected = reference(
        name, zimg, ztxt, *scalars
    )  # of all negatives, whatever device they are on
    np.testing.assert_allclose(split, expected, rtol=2e-6)
    np.testing.assert_allclose(split, alone, rtol=1e-6)
    for ours, theirs in zip(split_grads, alone_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_split_over_devices_it_sends_no_positions(name):
    """Which pairs match, every device knows: only embeddings, their gradients and sums are sent."""
    mesh = make_mesh(MeshConfig(data=8))

    def loss(zimg, ztxt):
        scale_and_bias = jnp.float32(2.6592), jnp.float32(-2.0)
        return CONTRASTIVE[name](shard_batch(zimg), shard_batch(ztxt), *scale_and_bias)

    with jax.set_mesh(mesh):
        z = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=batch_sharding(mesh))
        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(z, z).compile().as_text()
    collective = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    results = re.findall(rf"= (.*) (?:{collective})(?:-start)?\(", program)
    assert {kind for result in results for kind in re.findall(r"(\w+)\[", result)} == {"f32"}
    assert "conditional(" not in program


def test_label_smoothing_of_a_sigmoid_is_refused():
    with pytest.raises(UserError, match=r"label_smoothing"):
        make_loss("sigmoid", label_smoothing=0.1)


@pytest.mark.parametrize(
    ("name", "implementation", "message"),
    [
        ("softmx", "auto", r"config.loss .*'softmx'"),
        ("sigmoid", "dens", r"config.loss_implementation .*'dens'"),
    ],
)
def test_a_loss_that_is_not_known_is_refused(name, implementation, message):
    with pytest.raises(UserError, match=message):
        make_loss(name, implementation=implementation)
