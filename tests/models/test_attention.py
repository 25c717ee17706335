import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_jax.distributed import mesh
from lit_jax.models.attention import attend
from lit_jax.models.layers import DropMask


@settings(max_examples=10, deadline=None, derandomize=True)
@given(shape=st.tuples(*[st.integers(1, 5)] * 5), masked=st.booleans(), seed=st.integers(0, 1000))
def test_attention_is_softmax_attention(shape, masked, seed):
    batch, heads, queries, keys, width = shape
    random = np.random.default_rng(seed)
    q, k, v = (random.normal(size=(batch, heads, n, width)) for n in (queries, keys, keys))
    bias = np.zeros((batch, 1, 1, keys))
    if masked:
        bias[..., 1:] = np.where(random.random(bias[..., 1:].shape) < 0.5, -1e30, 0)
    logits = q @ k.swapaxes(2, 3) / np.sqrt(width) + bias
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    q, k, v32, bias = (jnp.asarray(x, jnp.float32) for x in (q, k, v, bias))
    attend_all = jax.jit(attend)
    actual = attend_all(q, k, v32, bias if masked else None)
    np.testing.assert_allclose(actual, probabilities @ v, atol=1e-5)


def test_attention_survives_large_logits():
    q = jnp.full((1, 1, 2, 4), 1e4)
    assert np.isfinite(attend(q, q, q)).all()


@pytest.mark.parametrize("width", [64, 72])
def test_attention_in_bfloat16_has_its_temperature(width):
    """1 / sqrt(72) is no bfloat16: as one, it would make all logits 0.15% smaller."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(0.1 * rng.normal(size=(1, 1, 4096, width)), jnp.bfloat16)
    key = jnp.asarray(rng.normal(size=(1, 1, 1, width)), jnp.bfloat16)
    keys = jnp.concatenate([jnp.zeros_like(key), key], axis=2)
    values = jnp.stack([jnp.zeros(width), jnp.ones(width)])[None, None]
    share = np.asarray(attend(q, keys, values), np.float64)[0, 0, :, 0]
    logits = np.log(share / (1 - share))
    exact = np.asarray(q, np.float64)[0, 0] @ np.asarray(key, np.float64)[0, 0, 0] * width**-0.5
    assert abs((logits @ exact) / (exact @ exact) - 1) < 2e-4


def test_attention_drops_probabilities_without_renormalising():
    v = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 3, 4)), jnp.float32)
    half = attend(v, v, v, draw_mask=lambda shape: DropMask(jnp.ones(shape, bool), 0.5))
    np.testing.assert_allclose(half, attend(v, v, v) / 2, rtol=1e-6)


@pytest.mark.parametrize("length", [1, 4, 7])
def test_the_call_for_cudnn_means_the_same(monkeypatch, length):
    """In values and gradients: JAX's own attention is called as on a GPU, but computed by XLA."""
    random = np.random.default_rng(0)
    shape = (2, 3, length, 8)
    q, k, v, grad = (jnp.asarray(random.normal(size=shape), jnp.bfloat16) for _ in range(4))

    def both_ways():
        def compute(q, k, v):
            context, pull = jax.vjp(attend, q, k, v)
            return attend(q, k, v), context, *pull(grad)

        return jax.jit(compute)(q, k, v)

    expected = both_ways()
    of_jax = jax.nn.dot_product_attention
    called = []

    def by_xla(*args, implementation, **kwargs):
        called.append(implementation)
        return of_jax(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    monkeypatch.setattr(mesh, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    with jax.numpy_dtype_promotion("standard"):  # JAX mixes dtypes there
        actual = both_ways()
    assert called == ["cudnn"] * 2
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=0.03, rtol=0.02
        )


class CudnnIsAskedError(Exception):
    pass


@pytest.fixture
def attend_on(monkeypatch):
    """`attend` on devices of a kind; to ask for cuDNN is an error."""

    def refuse(*_, **__):
        raise CudnnIsAskedError

    def on(kind, *args):
        monkeypatch.setattr(mesh, "device_kind", lambda: kind)
        return attend(*args)

    monkeypatch.setattr(jax.nn, "dot_product_attention", refuse)
    return on


@pytest.mark.parametrize(
    ("dtype", "keys", "width", "bias", "draw_mask"),
    [
        (jnp.float32, 4, 8, None, None),
        (jnp.bfloat16, 4, 8, jnp.zeros((1, 1, 1, 4)), None),
        (jnp.bfloat16, 4, 8, None, lambda shape: DropMask(jnp.ones(shape, bool), 1.0)),
        (jnp.bfloat16, 4, 12, None, None),
        (jnp.bfloat16, 4, 136, None, None),
        (jnp.bfloat16, 5, 8, None, None),
    ],
)
def test_cudnn_is_not_asked_for_what_it_does_not_have(
    attend_on, dtype, keys, width, bias, draw_mask
):
    q, k = (jnp.ones((1, 1, length, width), dtype) for length in (4, keys))
    assert attend_on("NVIDIA H100 80GB HBM3", q, k, k, bias, draw_mask).dtype == dtype


@pytest.mark.parametrize(
    ("kind", "is_asked"),
    {
        "": False,
        "AMD Instinct MI300X": False,
        "Tesla V100-SXM2-16GB": False,
        "Quadro RTX 8000": False,
        "NVIDIA GeForce RTX 2080 Ti": False,
        "NVIDIA GeForce GTX 1660": False,
        "NVIDIA TITAN RTX": False,
        "NVIDIA T1000": False,
        "NVIDIA A100-SXM4-40GB": True,
        "NVIDIA L4": True,
        "NVIDIA GeForce RTX 3090": True,
        "NVIDIA RTX 6000 Ada Generation": True,
        "NVIDIA H100 80GB HBM3": True,
        "NVIDIA B200": True,
    }.items(),
)
def test_cudnn_is_asked_from_ampere_on(attend_on, kind, is_asked):
    q = jnp.ones((1, 1, 4, 8), jnp.bfloat16)
    with pytest.raises(CudnnIsAskedError) if is_asked else contextlib.nullcontext():
        attend_on(kind, q, q, q)
