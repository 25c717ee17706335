import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_jax.errors import UserError
from lit_jax.models.layers import ACTIVATIONS, LayerNorm, activation, attend


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(goldens, name):
    with np.load(goldens / "activations.npz") as values:
        actual = activation(name)(jnp.asarray(values["x"]))
        np.testing.assert_allclose(actual, values[name], rtol=1e-6, atol=1e-6)


def test_an_unknown_activation_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"'gelu_newer'.*'gelu_new'"):
        activation("gelu_newer")


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


def test_attention_drops_probabilities_without_renormalising():
    v = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 3, 4)), jnp.float32)
    half = attend(v, v, v, None, dropout=lambda x: x / 2)
    np.testing.assert_allclose(half, attend(v, v, v, None, dropout=lambda x: x) / 2, rtol=1e-6)


def test_layer_norm_does_not_cancel_far_from_zero():
    x = np.random.default_rng(0).normal(1000, 1, (2, 3, 64)).astype(np.float32)
    actual, _ = LayerNorm(1e-12).init_with_output(jax.random.key(0), jnp.asarray(x))
    x = x.astype(np.float64)
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    np.testing.assert_allclose(actual, expected, atol=1e-3)
