import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lit_jax.models.beit import Beit, BeitConfig, position_bias

TINY = BeitConfig(
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    image_size=8,
    patch_size=4,
)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)


@pytest.mark.parametrize("name", ["beit", "beit_interpolated", "beit_unusual"])
def test_parity_with_pytorch(check_tower, goldens, name):
    check_tower(goldens / name)


@st.composite
def configs(draw):
    """Fields of a BEiT's config.json, and an image size, that transformers accepts."""
    # Normalisation over a handful of numbers is singular, so no narrower than this.
    head_size, heads = draw(st.integers(5, 9)), draw(st.integers(1, 4))
    patch = draw(st.integers(1, 5))
    absolute = draw(st.booleans())
    size = st.integers(1, 4).map(lambda patches: patches * patch + patch // 2)
    # transformers takes the grid of absolute positions for a square one.
    image_size = draw(size if absolute else st.lists(size, min_size=2, max_size=2))
    fields = {
        "hidden_size": head_size * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(1, 20)),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "quick_gelu"])),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-6, 1e-2])),
        "image_size": image_size,
        "patch_size": patch,
        "use_mask_token": draw(st.booleans()),
        "use_absolute_position_embeddings": absolute,
        "use_relative_position_bias": draw(st.booleans()),
        "use_shared_relative_position_bias": draw(st.booleans()),
        "layer_scale_init_value": draw(st.sampled_from([0.0, 0.1])),
        "use_mean_pooling": draw(st.booleans()),
    }
    own_shape = (image_size, image_size) if absolute else tuple(image_size)
    shape = draw(st.just(own_shape) | st.tuples(*[st.integers(patch, 5 * patch)] * 2))
    return fields, shape


@pytest.mark.oracle
# Without shrinking: a failure would try hundreds of models.
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(configs(), st.sampled_from(["pooler", "cls", "mean"]), st.integers(0, 1000))
def test_parity_with_live_pytorch(check_tower, reference, config, pooling, seed):
    import transformers

    fields, shape = config
    images = reference.random_images(seed, 2, *shape, 3)
    with tempfile.TemporaryDirectory() as folder:
        reference.write_tower(
            Path(folder), transformers.BeitConfig(**fields), images, pooling=pooling, seed=seed
        )
        check_tower(Path(folder))


def test_rows_of_the_table_for_a_grid_of_two_by_two():
    table_RxH = jnp.arange(12.0)[:, None]
    expected_LxL = [  # of CLS and the patches, by what attends
        [11, 9, 9, 9, 9],
        [10, 4, 3, 1, 0],
        [10, 5, 4, 2, 1],
        [10, 7, 6, 4, 3],
        [10, 8, 7, 5, 4],
    ]
    np.testing.assert_array_equal(position_bias(table_RxH, (2, 2), (2, 2))[0, 0], expected_LxL)


def test_a_bias_of_another_grid_is_interpolated_between_offsets_and_kept_for_cls():
    table_RxH = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)), jnp.float32)
    bias_HxLxL = np.asarray(position_bias(table_RxH, (2, 2), (3, 5))[0])
    assert bias_HxLxL.shape == (3, 16, 16)
    for row, key in ((-3, (0, 1)), (-2, (1, 0)), (-1, (0, 0))):
        np.testing.assert_array_equal(bias_HxLxL[:, *key], table_RxH[row])
    # No offset is the middle of the table, before as after.
    np.testing.assert_allclose(bias_HxLxL[:, 7, 7], table_RxH[4], atol=1e-6)
    # The same offset, one to the right, between other patches.
    np.testing.assert_array_equal(bias_HxLxL[:, 2, 1], bias_HxLxL[:, 15, 14])


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
@pytest.mark.parametrize("use_mean_pooling", [True, False])
def test_tokens_are_normalised_in_one_place(random_variables, use_mean_pooling, pooling):
    tower = Beit(dataclasses.replace(TINY, use_mean_pooling=use_mean_pooling), pooling=pooling)
    variables = random_variables(tower, IMAGES)
    params = variables["params"]
    assert ("layernorm" in params) == (not use_mean_pooling)
    assert ("pooler" in params) == (use_mean_pooling and pooling == "pooler")
    output = jax.jit(tower.apply)(variables, IMAGES)
    tokens = np.asarray(output.last_hidden_state)
    if pooling == "mean":
        expected = tokens[:, 1:].mean(1)
    elif pooling == "cls" or not use_mean_pooling:
        expected = tokens[:, 0]
    else:
        mean, norm = tokens[:, 1:].mean(1), params["pooler"]["layernorm"]
        expected = (mean - mean.mean(1, keepdims=True)) / mean.std(1, keepdims=True)
        expected = expected * norm["scale"][None] + norm["bias"][None]
    np.testing.assert_allclose(output.pooled, expected, atol=1e-5)


def test_tables_are_one_for_each_block_and_one_for_all(random_variables):
    both = dataclasses.replace(
        TINY, use_relative_position_bias=True, use_shared_relative_position_bias=True
    )
    params = random_variables(Beit(both), IMAGES)["params"]
    attention = params["encoder"]["layer"]["attention"]
    assert attention["position_bias_table"].shape == (2, 12, 2)
    assert params["position_bias_table"].shape == (12, 2)
    assert "bias" in attention["query"]
    assert "bias" not in attention["key"]


def test_the_first_block_is_never_dropped(random_variables):
    tower = Beit(dataclasses.replace(TINY, drop_path_rate=1 - 1e-6))
    params = random_variables(tower, IMAGES)["params"]

    @jax.jit
    def run(encoder):
        rngs = {"dropout": jax.random.key(0, impl="rbg")}
        variables = {"params": {**params, "encoder": encoder}}
        return tower.apply(variables, IMAGES, deterministic=False, rngs=rngs).last_hidden_state

    def without(layer):
        return jax.tree.map(lambda leaf: leaf.at[layer].set(0), params["encoder"])

    output = run(params["encoder"])
    np.testing.assert_array_equal(run(without(1)), output)
    assert np.abs(run(without(0)) - output).max() > 1e-3
