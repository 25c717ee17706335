import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_jax.models.attention import attend


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
    attend_all = jax.jit(functools.partial(attend, dropout=lambda x: x))
    actual = attend_all(q, k, v32, bias if masked else None)
    np.testing.assert_allclose(actual, probabilities @ v, atol=1e-5)


def test_attention_survives_large_logits():
    q = jnp.full((1, 1, 2, 4), 1e4)
    assert np.isfinite(attend(q, q, q, None, dropout=lambda x: x)).all()


@pytest.mark.parametrize("width", [64, 72])
def test_attention_in_bfloat16_has_its_temperature(width):
    """1 / sqrt(72) is no bfloat16: as one, it would make all logits 0.15% smaller."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(0.1 * rng.normal(size=(1, 1, 4096, width)), jnp.bfloat16)
    key = jnp.asarray(rng.normal(size=(1, 1, 1, width)), jnp.bfloat16)
    keys = jnp.concatenate([jnp.zeros_like(key), key], axis=2)
    values = jnp.stack([jnp.zeros(width), jnp.ones(width)])[None, None]
    share = np.asarray(attend(q, keys, values, None, lambda x: x), np.float64)[0, 0, :, 0]
    logits = np.log(share / (1 - share))
    exact = np.asarray(q, np.float64)[0, 0] @ np.asarray(key, np.float64)[0, 0, 0] * width**-0.5
    assert abs((logits @ exact) / (exact @ exact) - 1) < 2e-4


def test_attention_drops_probabilities_without_renormalising():
    v = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 3, 4)), jnp.float32)
    half = attend(v, v, v, None, dropout=lambda x: x / 2)
    np.testing.assert_allclose(half, attend(v, v, v, None, dropout=lambda x: x) / 2, rtol=1e-6)
