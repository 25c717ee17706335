import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lit_jax.models.dinov2 import Dinov2, Dinov2Config, Dinov2WithRegistersConfig

TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "image_size": 8,
    "patch_size": 4,
}
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)


@pytest.mark.parametrize("name", ["dinov2", "dinov2_swiglu", "dinov2_with_registers"])
def test_parity_with_pytorch(check_tower, goldens, name):
    check_tower(goldens / name)


@st.composite
def configs(draw):
    """Fields of a DINOv2's config.json, and an image size, that transformers accepts."""
    # Normalisation over a handful of numbers is singular, so no narrower than this.
    head_size, heads = draw(st.integers(5, 9)), draw(st.integers(1, 4))
    patch, grid = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    fields = {
        "hidden_size": head_size * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "mlp_ratio": draw(st.integers(1, 4)),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "quick_gelu"])),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-6, 1e-2])),
        "image_size": patch * grid + draw(st.integers(0, patch - 1)),
        "patch_size": patch,
        "num_channels": draw(st.integers(1, 4)),
        "qkv_bias": draw(st.booleans()),
        "use_swiglu_ffn": draw(st.booleans()),
    }
    own = draw(
        st.fixed_dictionaries({"use_mask_token": st.booleans()})
        | st.fixed_dictionaries({"num_register_tokens": st.integers(1, 3)})
    )
    own_shape = (fields["image_size"],) * 2
    shape = draw(st.just(own_shape) | st.tuples(*[st.integers(patch, 5 * patch)] * 2))
    return fields | own, shape


@pytest.mark.oracle
# Without shrinking: a failure would try hundreds of models.
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(configs(), st.sampled_from(["pooler", "cls", "mean"]), st.integers(0, 1000))
def test_parity_with_live_pytorch(check_tower, reference, config, pooling, seed):
    import transformers

    fields, shape = config
    kind = "Dinov2WithRegistersConfig" if "num_register_tokens" in fields else "Dinov2Config"
    images = reference.random_images(seed, 2, *shape, fields["num_channels"])
    with tempfile.TemporaryDirectory() as folder:
        reference.write_tower(
            Path(folder), getattr(transformers, kind)(**fields), images, pooling=pooling, seed=seed
        )
        check_tower(Path(folder))


@pytest.mark.parametrize("config_class", [Dinov2Config, Dinov2WithRegistersConfig])
@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
def test_there_is_no_pooler_and_registers_are_not_pooled(random_variables, config_class, pooling):
    tower = Dinov2(config_class(**TINY), pooling=pooling)
    variables = random_variables(tower, IMAGES)
    assert set(variables["params"]) == {"embeddings", "encoder", "layernorm"}
    output = jax.jit(tower.apply)(variables, IMAGES)
    tokens = np.asarray(output.last_hidden_state)
    assert tokens.shape[1] == (5 if config_class is Dinov2Config else 9)
    expected = tokens[:, -4:].mean(1) if pooling == "mean" else tokens[:, 0]
    np.testing.assert_allclose(output.pooled, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("hidden_size", "mlp_ratio", "expected"),
    [(8, 2, 16), (8, 4, 24), (1536, 4, 4096)],  # the last one is DINOv2's giant
)
def test_the_width_of_swiglu_is_two_thirds_to_a_multiple_of_8(hidden_size, mlp_ratio, expected):
    config = Dinov2Config(hidden_size=hidden_size, mlp_ratio=mlp_ratio, use_swiglu_ffn=True)
    assert config.block.mlp_width == expected


def train(tower, params):
    rngs = {"dropout": jax.random.key(0, impl="rbg")}
    apply = jax.jit(functools.partial(tower.apply, deterministic=False))
    return apply({"params": params}, IMAGES, rngs=rngs).last_hidden_state


def test_every_block_may_be_dropped(random_variables):
    tower = Dinov2(Dinov2Config(**TINY, drop_path_rate=1 - 1e-6))
    params = random_variables(tower, IMAGES)["params"]
    without = {**params, "encoder": jax.tree.map(jnp.zeros_like, params["encoder"])}
    np.testing.assert_array_equal(train(tower, params), train(tower, without))


def test_dropout_is_of_the_embeddings_alone(random_variables):
    tower = Dinov2(Dinov2Config(**TINY, hidden_dropout_prob=0.5))
    params = random_variables(tower, IMAGES)["params"]
    expected = jax.jit(tower.apply)({"params": params}, IMAGES).last_hidden_state
    assert np.abs(train(tower, params) - expected).max() > 1e-3
    params = {**params, "embeddings": jax.tree.map(jnp.zeros_like, params["embeddings"])}
    expected = jax.jit(tower.apply)({"params": params}, IMAGES).last_hidden_state
    np.testing.assert_allclose(train(tower, params), expected, atol=1e-6)
