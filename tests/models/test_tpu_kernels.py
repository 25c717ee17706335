"""The Pallas kernels for TPUs: interpreted against the plain forms, and as the TPU compiler writes them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.config import MeshConfig
from lit_jax.config_file import load_config
from lit_jax.distributed.mesh import batch_sharding, make_mesh, replicated
from lit_jax.models import ops
from lit_jax.models.attention import attend, attention_bias
from lit_jax.models.attention_kernels import has_tpu_attention, mask_shape, tpu_attention
from lit_jax.models.layer_norm import (
    has_tpu_layer_norm,
    layer_norm,
    plain_layer_norm,
    tpu_layer_norm,
)
from lit_jax.models.layers import DropMask, draw_mask
from lit_jax.planning.topologies import open_topology
from lit_jax.training.model_factory import build_model, example_batch

TPU = "TPU v5 lite"
# A topology of each generation.
TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def draw(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def value_and_gradients(function, arrays, grad):
    value, pull = jax.vjp(function, *arrays)
    return value, *pull(grad)


def assert_close(ours, theirs, tolerance):
    """Compare each array with the largest number of its expected values."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.fixture
def on_mesh():
    """Calls a function with arrays whose rows eight devices share out."""

    def call(function, arrays, rows):
        mesh = make_mesh(MeshConfig(data=4, fsdp=2))
        with jax.set_mesh(mesh):
            placed = [
                jax.device_put(x, batch_sharding(mesh) if i < rows else replicated(mesh))
                for i, x in enumerate(arrays)
            ]
            return jax.device_get(jax.jit(function)(*placed))

    return call


# Several heads in a register, one, and a number of tokens that is no multiple of 8.
@pytest.mark.parametrize(("heads", "length", "width"), [(4, 37, 64), (8, 32, 32), (1, 40, 128)])
def test_attention_is_the_plain_one(heads, length, width):
    q, k, v, grad = (draw(6, heads, length, width, seed=i) for i in range(4))
    actual = jax.jit(lambda *qkv: value_and_gradients(tpu_attention, qkv, grad))(q, k, v)
    expected = jax.jit(lambda *qkv: value_and_gradients(attend, qkv, grad))(q, k, v)
    assert_close(actual, expected, 1e-5)


# Packed into rows of 128, of 96 and of 64 tokens, and one text a row.
@pytest.mark.parametrize(("batch", "length"), [(16, 16), (8, 24), (8, 8), (3, 40), (2, 33)])
def test_masked_texts_do_not_see_each_other(batch, length):
    *qkv, grad = (draw(batch, 2, length, 64, seed=i) for i in range(4))
    attended = np.random.default_rng(0).random((batch, length)) < 0.7
    # The text without any attended token attends to all of its own.
    attended[1] = False
    bias = attention_bias(jnp.asarray(attended))

    def function(form):
        return jax.jit(lambda *qkv: value_and_gradients(lambda *x: form(*x, bias), qkv, grad))(*qkv)

    assert_close(function(tpu_attention), function(attend), 1e-5)


def heads_first(mask):
    """Return a mask of the kernel as one for the plain form, BxHxLxL."""
    batch, length, keys = mask.kept.shape
    kept = mask.kept.reshape(batch, length, keys // length, length).swapaxes(1, 2)
    return DropMask(kept, mask.factor)


# Heads that share a register of masks, a last register that is not full, and one head in a register.
@pytest.mark.parametrize(
    ("batch", "heads", "length", "width"),
    [(16, 6, 16, 64), (8, 2, 32, 64), (3, 4, 64, 64), (8, 4, 8, 32), (4, 3, 16, 128)],
)
@pytest.mark.parametrize("has_padding", [False, True])
def test_dropout_of_attention_is_the_plain_one(batch, heads, length, width, has_padding):
    *qkv, grad = (draw(batch, heads, length, width, seed=i) for i in range(4))
    attended = np.random.default_rng(0).random((batch, length)) < 0.7
    bias = attention_bias(jnp.asarray(attended)) if has_padding else None
    mask = draw_mask(np.float32(0.3), jax.random.key(0), mask_shape(qkv[0]))

    def function(form, mask):
        return jax.jit(lambda *x: value_and_gradients(lambda *x: form(*x, bias, mask), x, grad))(
            *qkv
        )

    actual, expected = function(tpu_attention, mask), function(attend, lambda _: heads_first(mask))
    assert_close(actual, expected, 1e-5)
    without = value_and_gradients(lambda *qkv: attend(*qkv, bias), qkv, grad)
    # The mask reaches the value and each gradient.
    for dropped, whole in zip(actual, without, strict=True):
        assert np.abs(dropped - whole).max() > 0.01 * np.abs(whole).max()


def test_attention_in_bfloat16_is_as_exact_as_the_plain_one():
    *qkv, grad = (draw(2, 2, 50, 64, dtype=jnp.bfloat16, seed=i) for i in range(4))
    wide = [x.astype(jnp.float32) for x in (*qkv, grad)]
    exact = value_and_gradients(attend, wide[:3], wide[3])
    for form in (tpu_attention, attend):
        actual = value_and_gradients(form, qkv, grad)
        assert [x.dtype for x in actual] == [jnp.bfloat16] * 4
        assert_close([x.astype(jnp.float32) for x in actual], exact, 0.01)


def test_attention_works_on_the_rows_of_each_device(on_mesh):
    arrays = [draw(16, 2, 32, 64, seed=i) for i in range(4)]
    attended, kept = draw(16, 32, seed=4) > 0, draw(16, 32, 64, seed=5) > -1

    def kernel(*x):
        return tpu_attention(*x[:3], attention_bias(x[3]), DropMask(x[4], 1.2))

    def plain(*x):
        return attend(*x[:3], attention_bias(x[3]), lambda _: heads_first(DropMask(x[4], 1.2)))

    def function(form):
        def call(q, k, v, grad, *masks):
            return value_and_gradients(lambda *qkv: form(*qkv, *masks), (q, k, v), grad)

        return call

    arrays += [attended, kept]
    assert_close(on_mesh(function(kernel), arrays, 6), function(plain)(*arrays), 1e-5)


def norm_arguments(x):
    return x, 1 + draw(x.shape[-1], seed=1), draw(x.shape[-1], seed=2)


def by_kernel(x, scale, bias):
    return tpu_layer_norm(1e-6, x.dtype, x, scale, bias)


def by_formula(x, scale, bias):
    return (plain_layer_norm(x, scale, 1e-6) + bias[None, None]).astype(x.dtype)


@pytest.mark.parametrize("shape", [(6, 37, 256), (1, 9, 128)])
def test_layer_norm_is_the_plain_one(shape):
    arrays, grad = norm_arguments(3 + draw(*shape)), draw(*shape, seed=3)
    assert_close(
        value_and_gradients(by_kernel, arrays, grad),
        value_and_gradients(by_formula, arrays, grad),
        1e-5,
    )


def test_layer_norm_adds_up_the_gradients_of_all_devices(on_mesh):
    *arrays, grad = *norm_arguments(draw(16, 8, 128)), draw(16, 8, 128, seed=3)

    def function(x, grad, scale, bias):
        return value_and_gradients(by_kernel, (x, scale, bias), grad)

    expected = value_and_gradients(by_formula, arrays, grad)
    assert_close(on_mesh(function, (arrays[0], grad, *arrays[1:]), 2), expected, 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("ratio", [0, 10, 100, "nearly constant"])
def test_layer_norm_is_exact_for_any_mean(dtype, ratio):
    """Against float64, also for rows whose mean is much larger than their deviation."""
    x = np.random.default_rng(0).normal(size=(2, 8, 768)) + (
        0 if ratio == "nearly constant" else ratio
    )
    if ratio == "nearly constant":
        x = np.full_like(x, 100)
        x[..., 5] = 100.5
    x = jnp.asarray(x, dtype)
    wide = np.asarray(x, np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    actual = tpu_layer_norm(1e-6, jnp.float32, x, jnp.ones(768), jnp.zeros(768))
    error, error_of_formula = (
        np.abs(y - expected).max() for y in (actual, plain_layer_norm(x, jnp.ones(768), 1e-6))
    )
    # In float32 the mean of 100s has an error, which is large next to the deviation of a nearly constant row.
    assert error <= 3e-5 if ratio != "nearly constant" else error <= 1.01 * error_of_formula


def test_the_kernels_are_used_on_a_mesh_of_tpus_alone(monkeypatch):
    q, x = jnp.ones((8, 2, 40, 64), jnp.bfloat16), jnp.ones((8, 40, 128))

    def used():
        return has_tpu_attention(q, q, None), has_tpu_layer_norm(x)

    with jax.set_mesh(make_mesh(MeshConfig())):
        assert used() == (False, False)
        monkeypatch.setattr(ops, "device_kind", lambda: TPU)
        assert used() == (True, True)
        # A batch that the devices cannot share out.
        assert not has_tpu_attention(q[:1], q[:1], None)
        assert not has_tpu_layer_norm(x[:1])
        # More than the memory on chip holds.
        assert not has_tpu_layer_norm(jnp.zeros((8, 729, 1152)))
        monkeypatch.setenv("LIT_JAX_PLAIN_OPS", "1")
        assert used() == (False, False)
    monkeypatch.delenv("LIT_JAX_PLAIN_OPS")
    assert used() == (False, False)


@pytest.mark.parametrize(
    ("dtype", "heads", "queries", "keys", "width", "bias"),
    [
        (jnp.float32, 2, 40, 40, 64, None),
        (jnp.bfloat16, 1, 40, 40, 64, None),
        (jnp.bfloat16, 2, 1, 40, 64, None),
        (jnp.bfloat16, 2, 40, 40, 72, None),
        (jnp.bfloat16, 2, 13, 13, 64, None),
        (jnp.bfloat16, 2, 1025, 1025, 64, None),
        # A causal mask, and a learned bias.
        (jnp.bfloat16, 2, 40, 40, 64, jnp.zeros((1, 1, 40, 40))),
        (jnp.bfloat16, 2, 40, 40, 64, jnp.zeros((1, 2, 40, 40))),
    ],
)
def test_attention_that_the_kernel_lacks_is_left_to_xla(
    monkeypatch, dtype, heads, queries, keys, width, bias
):
    monkeypatch.setattr(ops, "device_kind", lambda: TPU)
    q, k = (jnp.ones((8, heads, length, width), dtype) for length in (queries, keys))
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert not has_tpu_attention(q, k, bias)


@pytest.mark.oracle
def test_attention_on_older_tpus_is_left_to_xla():
    """Their devices are those of the compiler; the kernel for normalisation is used there."""
    q, rows = jnp.ones((8, 2, 40, 64), jnp.bfloat16), jnp.ones((8, 40, 128), jnp.bfloat16)
    for name, expected in (("v3:2x2", False), ("v5e:2x2", True)):
        with jax.set_mesh(make_mesh(MeshConfig(), open_topology(name).devices[:1])):
            assert has_tpu_attention(q, q, None) == expected
            assert has_tpu_layer_norm(rows)


# 64 tokens are the most whose masks of two heads fill one register.
@pytest.mark.parametrize(
    ("length", "width", "expected"),
    [
        (16, 64, True),
        (64, 64, True),
        (64, 128, True),
        (77, 64, False),
        (128, 64, False),
        (24, 64, False),
        (64, 32, False),
    ],
)
def test_dropout_of_long_texts_is_left_to_xla(monkeypatch, length, width, expected):
    monkeypatch.setattr(ops, "device_kind", lambda: TPU)
    q = jnp.ones((8, 4, length, width), jnp.bfloat16)
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert has_tpu_attention(q, q, None)
        assert has_tpu_attention(q, q, None, drops=True) == expected


def test_a_model_is_initialised_by_one_row_on_many_tpus(monkeypatch):
    monkeypatch.setattr(ops, "device_kind", lambda: TPU)
    wide = {"hidden_size": 128, "num_attention_heads": 2}
    overrides = [(f"model.{side}.overrides", str(wide)) for side in ("image", "text")]
    config = load_config("configs/vit_bert.py", [*overrides, ("model.dtype", "bfloat16")])
    with jax.set_mesh(make_mesh(MeshConfig())):
        model = build_model(config, make_mesh(MeshConfig()))
        batch = example_batch(model.processors)
        assert jax.eval_shape(model.module.init, jax.random.key(0), batch)["params"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("length", "width", "dtype"),
    [
        (16, 1024, "float32"),
        (577, 1024, "bfloat16"),
        (197, 1408, "bfloat16"),
        (257, 1664, "bfloat16"),
    ],
)
def test_wide_layer_norms_fit_on_chip(length, width, dtype):
    mesh = make_mesh(MeshConfig(), open_topology("v5e:2x2").devices)

    def function(x, scale, grad):
        y, pull = jax.vjp(lambda x, s: layer_norm(x, s, s, 1e-6, x.dtype), x, scale)
        return y, pull(grad)

    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((128, length, width), dtype, sharding=batch_sharding(mesh))
        scale = jax.ShapeDtypeStruct((width,), jnp.float32, sharding=replicated(mesh))
        program = str(jax.jit(function).lower(x, scale, x).compile().as_text())
    assert "layer_norm_gradient" in program


@pytest.mark.long
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_each_tpu_compiles_the_kernels_and_gathers_nothing(name):
    """With gradients, for short texts with masks, and for the most tokens that the kernel takes."""
    mesh = make_mesh(MeshConfig(), open_topology(name).devices)
    rows = 16 * mesh.size

    def abstract(shape, sharding):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    def function(x, scale, grad, bias=None, kept=None):
        y, pull_norm = jax.vjp(
            lambda x, scale: layer_norm(x, scale, scale, 1e-6, x.dtype), x, scale
        )
        heads = y.reshape(rows, -1, 2, 64).swapaxes(1, 2)
        mask = None if kept is None else lambda _: DropMask(kept, 1.25)
        context, pull = jax.vjp(lambda *qkv: attend(*qkv, bias, mask), heads, heads, heads)
        return context, pull(grad), pull_norm(y)

    for length in (16, 197, 640):
        with jax.set_mesh(mesh):
            x = abstract((rows, length, 128), batch_sharding(mesh))
            grad = abstract((rows, 2, length, 64), batch_sharding(mesh))
            scale = jax.ShapeDtypeStruct((128,), jnp.float32, sharding=replicated(mesh))
            mask = jax.ShapeDtypeStruct((rows, 1, 1, length), jnp.float32, sharding=x.sharding)
            kept = jax.ShapeDtypeStruct((rows, length, 2 * length), bool, sharding=x.sharding)
            arrays = (x, scale, grad, mask, kept) if length == 16 else (x, scale, grad)
            program = str(jax.jit(function).lower(*arrays).compile().as_text())
        kernels = set(re.findall(r'op_name="[^"]*/(\w+)/pallas_call"', program))
        assert kernels == {
            "layer_norm",
            "layer_norm_gradient",
            "attention_forward_kernel",
            "attention_backward_kernel",
        }
        assert "all-gather" not in program
