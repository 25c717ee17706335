import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lit_jax.errors import UserError
from lit_jax.models.convnext import (
    ConvNext,
    ConvNextConfig,
    ConvNextV2Config,
    GlobalResponseNorm,
)

pytestmark = pytest.mark.usefixtures("plain_ops")

TINY = {"hidden_sizes": (4, 6), "depths": (1, 3), "num_stages": 2, "patch_size": 2}
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 12, 3)), jnp.float32)


@pytest.mark.parametrize(
    "name",
    ["convnext", "convnext_unusual", "convnextv2", "dinov3_convnext", "dinov3_convnext_mean"],
)
def test_parity_with_pytorch(check_tower, goldens, name, monkeypatch):
    if name == "convnext":  # one of them with the hand-made operations
        monkeypatch.delenv("LIT_JAX_PLAIN_OPS")
    check_tower(goldens / name)


@st.composite
def configs(draw):
    """Fields of the config.json of either version, and an image size."""
    stages = draw(st.integers(1, 3))
    # Normalisation over a handful of numbers is singular, so no narrower than this.
    widths = draw(st.lists(st.integers(5, 20), min_size=stages, max_size=stages))
    patch = draw(st.integers(1, 4))
    smallest = patch * 2 ** (stages - 1)
    shape = draw(st.tuples(*[st.integers(smallest, 3 * smallest)] * 2))
    fields = {
        "num_stages": stages,
        "hidden_sizes": widths,
        "depths": draw(st.lists(st.integers(1, 3), min_size=stages, max_size=stages)),
        "patch_size": patch,
        "num_channels": draw(st.integers(1, 4)),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu", "silu"])),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-6, 1e-2])),
    }
    if draw(st.booleans()):
        fields["layer_scale_init_value"] = draw(st.sampled_from([0.0, 1e-6]))
    return fields, shape


@pytest.mark.oracle
# Without shrinking: a failure would try hundreds of models.
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(configs(), st.sampled_from(["pooler", "mean"]), st.integers(0, 1000))
def test_parity_with_live_pytorch(check_tower, reference, config, pooling, seed):
    import transformers

    fields, shape = config
    kind = "ConvNextConfig" if "layer_scale_init_value" in fields else "ConvNextV2Config"
    images = reference.random_images(seed, 2, *shape, fields["num_channels"])
    with tempfile.TemporaryDirectory() as folder:
        reference.write_tower(
            Path(folder), getattr(transformers, kind)(**fields), images, pooling=pooling, seed=seed
        )
        check_tower(Path(folder))


def test_only_the_pooler_normalises(random_variables):
    """The last hidden state is not normalised, and pooling 'mean' needs no weights of the pooler."""
    tower, mean = (ConvNext(ConvNextConfig(**TINY), pooling=p) for p in ("pooler", "mean"))
    variables = random_variables(tower, IMAGES)
    output = jax.jit(tower.apply)(variables, IMAGES)
    tokens = np.asarray(output.last_hidden_state)
    assert tokens.shape == (2, 2 * 3, 6)
    params = dict(variables["params"])
    scale, bias = (np.asarray(params["layernorm"][leaf]) for leaf in ("scale", "bias"))
    centred = tokens.mean(1) - tokens.mean((1, 2))[:, None]
    normed = centred / centred.std(1, keepdims=True)
    np.testing.assert_allclose(output.pooled, normed * scale + bias, atol=1e-4)
    del params["layernorm"]
    pooled = jax.jit(mean.apply)({"params": params}, IMAGES).pooled
    np.testing.assert_allclose(pooled, tokens.mean(1), atol=1e-6)


def hidden_states(tower, params, compiler_options, **kwargs):
    """The output of the one block of the first stage, and of the three of the second."""
    apply = functools.partial(tower.apply, mutable=["intermediates"], **kwargs)
    _, state = jax.jit(apply, compiler_options=compiler_options)({"params": params}, IMAGES)
    encoder = state["intermediates"]["encoder"]
    return [encoder[stage]["layer"]["hidden_state"][0] for stage in ("stages_0", "stages_1")]


def test_drop_path_leaves_out_whole_rows_of_the_later_blocks(random_variables, usual_emitters):
    tower = ConvNext(ConvNextV2Config(**TINY, drop_path_rate=1 - 1e-6))
    params = random_variables(tower, IMAGES)["params"]
    rngs = {"dropout": jax.random.key(0, impl="rbg")}
    kept, (_, _, last) = hidden_states(tower, params, usual_emitters)
    train, (_, before, after) = hidden_states(
        tower, params, usual_emitters, deterministic=False, rngs=rngs
    )
    np.testing.assert_array_equal(train, kept)  # the first block is never left out
    np.testing.assert_array_equal(after, before)  # the last one, here, always
    assert np.abs(after - last).max() > 1e-3


def test_a_new_factor_is_the_configs_and_0_is_none():
    with_factor = ConvNext(ConvNextConfig(**TINY, layer_scale_init_value=0.25))
    params = jax.jit(with_factor.init)(jax.random.key(0, impl="rbg"), IMAGES)["params"]
    layer = params["encoder"]["stages_1"]["layer"]
    np.testing.assert_array_equal(layer["layer_scale"]["factor"], np.full((3, 6), 0.25))
    without = ConvNext(ConvNextConfig(**TINY, layer_scale_init_value=0.0))
    shapes = jax.eval_shape(without.init, jax.random.key(0), IMAGES)["params"]
    assert "layer_scale" not in shapes["encoder"]["stages_1"]["layer"]


def test_response_norm_of_a_feature_that_is_zero_has_a_gradient():
    """Many features behind a ReLU are such."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4)), jnp.float32)
    x = x.at[0, :, 1].set(0).at[1].set(0)
    norm = GlobalResponseNorm()
    params = jax.tree.map(lambda leaf: leaf + 0.5, norm.init(jax.random.key(0), x))
    value, gradient = jax.jit(jax.value_and_grad(lambda x: norm.apply(params, x).sum()))(x)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 8, 8, 1), "num_channels=3"), ((1, 8, 2, 3), r"config.data.image_size")],
)
def test_unsuitable_images_are_refused(shape, message):
    tower = ConvNext(ConvNextConfig(**TINY))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros(shape))
