"""test_clip.py has what CLIP and SigLIP share: the comparison with a live PyTorch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.errors import UserError
from lit_jax.models.families import build_tower
from lit_jax.models.siglip import SiglipText, SiglipTextConfig, SiglipVision, SiglipVisionConfig

SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
VISION = SiglipVisionConfig(**SMALL, image_size=8, patch_size=4)
TEXT = SiglipTextConfig(**SMALL, vocab_size=20, max_position_embeddings=9, projection_size=6)
IDS = jnp.array([[3, 7, 19, 1, 1], [4, 1, 19, 7, 19]], jnp.int32)
MASK = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], jnp.int32)


@pytest.mark.parametrize("name", ["siglip_vision", "siglip_vision_interpolated", "siglip_text"])
def test_parity_with_pytorch(check_tower, goldens, name):
    check_tower(goldens / name)


@pytest.fixture(scope="module")
def text(random_variables):
    """Inputs to TowerOutput, and the parameters."""
    tower = SiglipText(TEXT)
    variables = random_variables(tower, IDS)
    return jax.jit(lambda *inputs: tower.apply(variables, *inputs)), variables["params"]


@pytest.mark.parametrize("mask", [None, MASK])
def test_the_pooled_text_is_its_last_token_even_if_that_is_padding(text, mask):
    run, params = text
    output = run(IDS, mask)
    last_BxD = np.asarray(output.last_hidden_state)[:, -1]
    expected = last_BxD @ params["head"]["kernel"] + params["head"]["bias"][None]
    assert expected.shape == (2, 6)
    np.testing.assert_allclose(output.pooled, expected, atol=1e-5)


def test_a_token_knows_of_later_ones(text):
    run, _ = text
    change = run(IDS.at[:, 4].set(9)).last_hidden_state - run(IDS).last_hidden_state
    assert np.abs(change).max(2).min() > 1e-4


def test_a_mask_is_honoured_and_none_is_all_tokens(text):
    run, _ = text
    np.testing.assert_array_equal(run(IDS).pooled, run(IDS, jnp.ones_like(IDS)).pooled)
    expected, actual = (
        run(ids, MASK).last_hidden_state for ids in (IDS, IDS.at[0, 3].set(9).at[0, 4].set(8))
    )
    np.testing.assert_allclose(actual[0, :3], expected[0, :3], atol=1e-6)
    assert np.abs(actual[0, 3:] - expected[0, 3:]).max() > 1e-3


@pytest.mark.parametrize("model_type", ["siglip_vision_model", "siglip_text_model"])
def test_there_is_no_class_token_to_pool(model_type):
    with pytest.raises(UserError, match=r"pooling 'cls'.*'pooler' .*'mean'"):
        build_tower({"model_type": model_type}, pooling="cls", dtype="float32")


@pytest.mark.parametrize("use_head", [True, False])
def test_mean_pooling_needs_no_head(use_head, random_variables):
    tower = SiglipVision(dataclasses.replace(VISION, vision_use_head=use_head), pooling="mean")
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    variables = random_variables(tower, images)
    assert set(variables["params"]) == {"embeddings", "encoder", "post_layernorm"}
    output = jax.jit(tower.apply)(variables, images)
    assert output.last_hidden_state.shape == (2, 4, 8)
    np.testing.assert_allclose(output.pooled, output.last_hidden_state.mean(1), atol=1e-6)


def test_the_pooler_of_a_model_without_head_is_refused():
    tower = SiglipVision(dataclasses.replace(VISION, vision_use_head=False))
    with pytest.raises(UserError, match=r"vision_use_head=False.*pooling.*'mean'"):
        jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_the_attention_of_the_pooler_can_be_looked_at(random_variables):
    tower = SiglipVision(VISION)
    images = jnp.zeros((2, 8, 8, 3))
    apply = jax.jit(functools.partial(tower.apply, mutable=["intermediates"]))
    _, state = apply(random_variables(tower, images), images)
    (probability,) = state["intermediates"]["head"]["attention"]["probability"]
    assert probability.shape == (2, 2, 1, 4)
    np.testing.assert_allclose(probability.sum(-1), 1, rtol=1e-5)
