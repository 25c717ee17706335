import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.errors import UserError
from lit_jax.models.layers import (
    ACTIVATIONS,
    Dropout,
    LayerNorm,
    activation,
    drop,
    scale_float32,
)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(goldens, name):
    with np.load(goldens / "activations.npz") as values:
        actual = activation(name)(jnp.asarray(values["x"]))
        np.testing.assert_allclose(actual, values[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_activations_are_their_slopes(name):
    function = activation(name)
    x = np.linspace(-4.1, 4.1, 50)  # not at a kink
    with jax.enable_x64(True):
        step = 1e-5
        slope = (function(jnp.asarray(x + step)) - function(jnp.asarray(x - step))) / (2 * step)
    actual = jax.vmap(jax.grad(function))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(actual, slope, atol=1e-5)


def test_the_gradient_of_a_factor_keeps_no_factor_for_each_row():
    x, factor = jnp.ones((4, 3, 8), jnp.bfloat16), jnp.full(8, 2.0)
    product, pull = jax.vjp(scale_float32, x, factor)
    assert sum(leaf.size for leaf in jax.tree.leaves(pull)) == x.size + factor.size
    of_x, of_factor = pull(product)
    assert (of_x.dtype, of_factor.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(of_x, 4)
    np.testing.assert_array_equal(of_factor, 4 * 3 * 2)


def test_an_unknown_activation_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"'gelu_newer'.*'gelu_new'"):
        activation("gelu_newer")


def test_layer_norm_does_not_cancel_far_from_zero():
    x = np.random.default_rng(0).normal(1000, 1, (2, 3, 64)).astype(np.float32)
    actual, _ = LayerNorm(1e-12).init_with_output(jax.random.key(0), jnp.asarray(x))
    x = x.astype(np.float64)
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    np.testing.assert_allclose(actual, expected, atol=1e-3)


@pytest.mark.parametrize("use_bias", [True, False])
def test_the_gradient_of_layer_norm_is_that_of_its_formula(use_bias):
    random = np.random.default_rng(0)
    x, out = random.normal(5, 3, (2, 3, 64)), random.normal(size=(2, 3, 64))
    params = {"scale": random.normal(size=64)}
    if use_bias:
        params["bias"] = random.normal(size=64)

    def formula(params, x):
        normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 0.1)
        return (normed * params["scale"][None, None] * out).sum()

    with jax.enable_x64(True):
        expected = jax.grad(formula, argnums=(0, 1))(*jax.tree.map(jnp.asarray, (params, x)))
    norm = LayerNorm(0.1, use_bias=use_bias)
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x, out))
    actual = jax.grad(lambda p, x: (norm.apply({"params": p}, x) * single[2]).sum(), (0, 1))(
        *single[:2]
    )
    bias = {"bias": out.sum((0, 1))} if use_bias else {}
    expected = (expected[0] | bias, expected[1])
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), actual, expected)


def test_the_gradient_of_layer_norm_keeps_its_input_as_it_came():
    x = jnp.ones((2, 3, 64), jnp.bfloat16)
    norm = LayerNorm(1e-6, jnp.bfloat16)
    params = norm.init(jax.random.key(0), x)
    _, pull = jax.vjp(norm.apply, params, x)
    wide = [leaf for leaf in jax.tree.leaves(pull) if leaf.size == x.size]
    assert [leaf.dtype for leaf in wide] == [jnp.bfloat16]


@pytest.fixture(params=["here", "elsewhere"])
def where(request, monkeypatch):
    """Dropout draws on CPUs in another way than on TPUs and GPUs, where it uses the plain form."""
    monkeypatch.setenv("LIT_JAX_PLAIN_OPS", "1" if request.param == "elsewhere" else "0")


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate):
    x = jnp.ones((64, 32, 101))
    actual = Dropout(rate).apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    assert actual.shape == x.shape
    kept = np.asarray(actual) > 0
    deviation = (rate * (1 - rate) / x.size) ** 0.5
    assert abs((1 - kept.mean()) - rate) < 4 * deviation
    np.testing.assert_allclose(np.asarray(actual)[kept], 1 / (1 - rate), rtol=1e-4)
    # The two draws of one random number know nothing of each other, nor do neighbours.
    for other in (np.roll(kept, 51, axis=-1), np.roll(kept, 1, axis=-1), np.roll(kept, 1, axis=0)):
        assert abs(np.corrcoef(kept.ravel(), other.ravel())[0, 1]) < 5 / x.size**0.5


@pytest.mark.usefixtures("where")
def test_dropout_at_its_ends():
    x = jnp.linspace(-1, 1, 7).reshape(1, 7)
    key = jax.random.key(0)
    np.testing.assert_array_equal(drop(x, jnp.float32(0), key, x.shape), x)
    np.testing.assert_array_equal(drop(x, jnp.float32(1), key, x.shape), 0 * x)
    rows = drop(jnp.ones((200, 3, 5)), jnp.float32(0.3), key, (200, 1, 1))
    assert {len(np.unique(row)) for row in np.asarray(rows)} == {1}
    assert 40 < (np.asarray(rows)[:, 0, 0] == 0).sum() < 80


@pytest.mark.usefixtures("where")
def test_dropout_draws_the_same_on_any_mesh():
    x = jnp.ones((16, 6, 10))
    dropped = jax.jit(lambda x: drop(x, jnp.float32(0.5), jax.random.key(3), x.shape))
    sharding = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))
    np.testing.assert_array_equal(dropped(jax.device_put(x, sharding)), dropped(x))


@pytest.mark.parametrize(("platform", "halves"), [("cpu", 1), ("tpu", 0), ("cuda", 0)])
def test_only_cpus_put_halves_of_random_numbers_side_by_side(platform, halves):
    x = jnp.ones((2, 4))
    dropped = jax.jit(lambda x, key: drop(x, jnp.float32(0.5), key, x.shape))
    traced = dropped.trace(x, jax.random.key(3))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.concatenate") == halves
