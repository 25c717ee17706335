"""The hand-made operations and their plain forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_jax.models import ops
from lit_jax.models.attention import attend
from lit_jax.models.layer_norm import layer_norm
from lit_jax.models.layers import activation
from tests.models.test_towers import build, example

RANDOM = np.random.default_rng(0)


def draw(*shape, scale=1.0):
    return jnp.asarray(scale * RANDOM.normal(size=shape), jnp.float32)


def value_and_gradients(function, arrays):
    """The result, and the gradients of its sum with weights that differ."""

    def weighted(*arrays):
        y = function(*arrays)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum(), y

    gradient = jax.value_and_grad(weighted, tuple(range(len(arrays))), has_aux=True)
    (_, value), gradients = jax.jit(gradient)(*arrays)
    return value, gradients


def assert_alike(ours, theirs, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), ours, theirs)


@pytest.fixture
def in_both_forms(monkeypatch):
    """A function's value and gradients with the hand-made and with the plain operations."""

    def run(function, *arrays):
        results = []
        for plain in ("0", "1"):
            monkeypatch.setenv("LIT_JAX_PLAIN_OPS", plain)
            # A new function, or JAX would take what it has traced before.
            results.append(value_and_gradients(lambda *arrays: function(*arrays), arrays))
        return results

    return run


def clip(updates):
    return ops.clip_by_global_norm({"a": updates[:2], "b": updates[2:]}, 1.5)["b"]


OPERATIONS = {
    "layer norm": (
        lambda x, scale, bias: layer_norm(x, scale, bias, 1e-6),
        [(2, 3, 64), (64,), (64,)],
    ),
    **{
        name: (activation(name), [(40,)])
        for name in ("gelu", "gelu_10", "gelu_new", "quick_gelu", "silu", "mish")
    },
    "depthwise convolution": (
        lambda x, kernel: ops.depthwise_conv(x, kernel, 2, (1, 2)),
        [(2, 7, 6, 3), (3, 3, 1, 3)],
    ),
    "clipping of a long gradient": (clip, [(5,)]),
    "clipping of a short gradient": (lambda updates: clip(updates * 1e-3), [(5,)]),
    "attention": (attend, [(2, 3, 5, 4)] * 3),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_both_forms_have_the_same_values_and_gradients(in_both_forms, name):
    function, shapes = OPERATIONS[name]
    ours, plain = in_both_forms(function, *(draw(*shape) for shape in shapes))
    assert_alike(ours, plain, 1e-5)


@pytest.mark.parametrize("model_type", ["vit", "convnext"])
def test_a_tower_computes_the_same_with_plain_operations(
    in_both_forms, random_variables, model_type
):
    tower = build(model_type)
    x = example(tower)
    leaves, tree = jax.tree.flatten(random_variables(tower, x))
    ours, plain = in_both_forms(
        lambda *leaves: tower.apply(jax.tree.unflatten(tree, leaves), x).pooled, *leaves
    )
    assert_alike(ours, plain, 2e-5)


def test_gelu_of_every_bfloat16_number_is_the_nearest_or_its_neighbour():
    x = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
    x = x[np.isfinite(x.astype(np.float32))]
    wide = x.astype(np.float64)
    below = np.array([math.erfc(-v / 2**0.5) / 2 for v in wide])
    slope = below + wide * np.exp(-(wide**2) / 2) / (2 * np.pi) ** 0.5
    found, found_slope = (
        np.asarray(y) for y in jax.jit(lambda x: jax.jvp(ops.gelu, (x,), (jnp.ones_like(x),)))(x)
    )
    nearest = (wide * below).astype(jnp.bfloat16)
    steps = np.abs(found.view(np.int16).astype(int) - nearest.view(np.int16).astype(int))
    # The logits of a tower do not see a change of 1e-7 in an activation.
    counts = np.abs(wide * below) > 1e-5
    assert steps[counts].max() == 1
    assert (steps[counts] > 0).sum() < 10
    assert np.abs(found.astype(np.float64) - wide * below)[~counts].max() < 1e-7
    np.testing.assert_allclose(found_slope.astype(np.float64), slope, rtol=2**-8, atol=1e-5)
    assert found.dtype == found_slope.dtype == jnp.bfloat16


def test_the_plain_forms_are_only_used_where_the_variable_says_so(monkeypatch):
    def kernels():
        """The hand-made gradients in a program."""
        x, kernel = jnp.ones((1, 4, 8)), jnp.ones((3, 3, 1, 8))

        def function(x):
            y = layer_norm(ops.gelu(x), jnp.ones(8), None, 1e-6)
            return ops.depthwise_conv(y[None], kernel, 1, (1, 1))

        return str(jax.make_jaxpr(lambda x: function(x))(x)).count("custom_")

    for value, has_kernels in ((None, True), ("0", True), ("1", False)):
        monkeypatch.delenv("LIT_JAX_PLAIN_OPS", raising=False)
        if value is not None:
            monkeypatch.setenv("LIT_JAX_PLAIN_OPS", value)
        assert (kernels() > 0) == has_kernels, value


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(4, 9), st.integers(4, 9)),
    st.integers(1, 4),
    st.integers(1, 3),
    st.tuples(st.integers(-1, 3), st.integers(0, 3)),
)
def test_both_forms_of_a_depthwise_convolution_agree(size, kernel_size, stride, padding):
    """Also where the padding is negative, as EfficientNet's is of a strided 1x1 kernel."""
    arrays = draw(2, *size, 3), draw(kernel_size, kernel_size, 1, 3)
    ours, plain = (
        value_and_gradients(lambda x, kernel, form=form: form(x, kernel, stride, padding), arrays)
        for form in (ops.depthwise_conv_by_shifts, ops.plain_depthwise_conv)
    )
    assert_alike(ours, plain, 1e-4)


def test_half_precision_does_not_add_up_in_half_precision():
    x, kernel = jnp.ones((1, 31, 31, 1), jnp.bfloat16), jnp.ones((31, 31, 1, 1), jnp.bfloat16)
    total = ops.depthwise_conv_by_shifts(x, kernel, 1, (0, 0))
    assert total.dtype == jnp.bfloat16
    np.testing.assert_allclose(total.astype(jnp.float32), 31 * 31, rtol=1e-2)  # else 256


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "quick_gelu", "silu", "mish"])
def test_the_gradient_of_an_activation_keeps_one_array(name):
    x = jnp.linspace(-1, 1, 12)
    _, pull = jax.vjp(activation(name), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(pull)) == x.size
