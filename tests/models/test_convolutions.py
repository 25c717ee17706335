import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.config import MeshConfig
from lit_jax.distributed.mesh import batch_sharding, make_mesh
from lit_jax.errors import UserError
from lit_jax.models.convolutions import (
    BatchNorm,
    DepthwiseConv,
    PointwiseConv,
)

RANDOM = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def test_a_depthwise_convolution_is_one_convolution_but_on_cpu():
    module = DepthwiseConv(3, 1, (1, 1), 0.02, jnp.float32)
    x = draw(1, 4, 4, 2)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda variables, x: module.apply(variables, x).sum()))
    counts = {
        platform: gradient.trace(variables, x)
        .lower(lowering_platforms=(platform,))
        .as_text()
        .count("stablehlo.convolution")
        for platform in ("cpu", "cuda", "tpu")
    }
    assert counts["cpu"] == 0
    assert counts["tpu"] == counts["cuda"] > 0


def test_a_pointwise_convolution():
    x, module = draw(2, 3, 4, 5), PointwiseConv(6, 0.5, jnp.float32, use_bias=True)
    params = {"kernel": draw(1, 1, 5, 6), "bias": draw(6)}
    expected = jax.lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    actual = module.apply({"params": params}, x)
    np.testing.assert_allclose(actual, expected + params["bias"][None, None, None], atol=1e-5)
    shapes = jax.tree.map(jnp.shape, module.init(jax.random.key(0), x)["params"])
    assert shapes == {"kernel": (1, 1, 5, 6), "bias": (6,)}


NORM = BatchNorm(1e-3, 0.25, jnp.float32)
MAPS = 2 + 3 * draw(8, 3, 4, 5)
PARAMS = {"scale": draw(5), "bias": draw(5), "mean": draw(5), "var": 1 + draw(5) ** 2}


def normed(x, mean, var):
    x, mean, var, scale, bias = (
        np.asarray(value, np.float64) for value in (x, mean, var, PARAMS["scale"], PARAMS["bias"])
    )
    return (x - mean) / np.sqrt(var + 1e-3) * scale + bias


def test_a_deterministic_map_is_normalised_by_the_running_statistics():
    actual, state = NORM.apply({"params": PARAMS}, MAPS, True, mutable=["batch_stats"])
    np.testing.assert_allclose(actual, normed(MAPS, PARAMS["mean"], PARAMS["var"]), atol=1e-5)
    assert not state


def test_a_training_map_is_normalised_by_its_own():
    x = np.asarray(MAPS, np.float64)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    actual, state = NORM.apply({"params": PARAMS}, MAPS, False, mutable=["batch_stats"])
    np.testing.assert_allclose(actual, normed(MAPS, mean, var), atol=1e-5)
    unbiased = x.var((0, 1, 2), ddof=1)
    for name, of_batch in (("mean", mean), ("var", unbiased)):
        expected = 0.75 * PARAMS[name] + 0.25 * of_batch
        np.testing.assert_allclose(state["batch_stats"][name], expected, atol=1e-5)
    np.testing.assert_array_equal(NORM.apply({"params": PARAMS}, MAPS, False), actual)


@pytest.mark.parametrize("deterministic", [True, False])
def test_running_statistics_have_no_gradient(deterministic):
    gradient = jax.grad(
        lambda params: (NORM.apply({"params": params}, MAPS, deterministic) ** 2).sum()
    )(PARAMS)
    for name, leaf in gradient.items():
        assert bool(leaf.any()) == (name in ("scale", "bias")), name


def test_normalisation_is_in_float32_whatever_the_dtypes_are():
    """Also the new statistics, which would stand still in bfloat16."""
    norm = BatchNorm(1e-3, 0.25, jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    x = (1000 + draw(8, 3, 4, 5)).astype(jnp.bfloat16)  # rounded to multiples of 4
    actual, state = norm.apply({"params": params}, x, False, mutable=["batch_stats"])
    assert actual.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in state["batch_stats"].values()} == {np.dtype("float32")}
    exact = np.asarray(x, np.float64)
    expected = 0.75 * np.asarray(params["mean"], np.float64) + 0.25 * exact.mean((0, 1, 2))
    np.testing.assert_allclose(state["batch_stats"]["mean"], expected, rtol=1e-6)


def test_the_statistics_of_a_sharded_batch_are_those_of_the_whole():
    # Parts of the batch with means of their own: their statistics would differ from those of all.
    x = MAPS + jnp.arange(8.0)[:, None, None, None]

    @jax.jit
    def run(params, x):
        def loss(params, x):
            y, state = NORM.apply({"params": params}, x, False, mutable=["batch_stats"])
            return jnp.cos(y).sum(), state

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    expected = run(PARAMS, x)
    mesh = make_mesh(MeshConfig(fsdp=2))
    with jax.set_mesh(mesh):
        actual = run(PARAMS, jax.device_put(x, batch_sharding(mesh)))
    assert len(actual[1][1].sharding.device_set) == 8
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5),
        actual,
        expected,
    )


def test_one_value_of_a_channel_has_no_statistics():
    with pytest.raises(UserError, match=r"batch_size .*config\.data\.image_size"):
        NORM.apply({"params": PARAMS}, MAPS[:1, :1, :1], False)
