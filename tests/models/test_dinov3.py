import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lit_jax.errors import UserError
from lit_jax.models.dinov3 import Dinov3, Dinov3Config, centres

TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 4,
}
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)


@pytest.mark.parametrize("name", ["dinov3", "dinov3_unusual"])
def test_parity_with_pytorch(check_tower, goldens, name):
    check_tower(goldens / name)


@st.composite
def configs(draw):
    """Fields of a DINOv3's config.json, and an image size, that transformers accepts."""
    heads, patch = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    gated = draw(st.booleans())
    fields = {
        "hidden_size": heads * draw(st.sampled_from([8, 12])),
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(1, 20)),
        "hidden_act": draw(st.sampled_from(["silu"] if gated else ["gelu", "quick_gelu"])),
        "use_gated_mlp": gated,
        "layer_norm_eps": draw(st.sampled_from([1e-5, 1e-2])),
        "image_size": patch * draw(st.integers(1, 4)),
        "patch_size": patch,
        "num_channels": draw(st.integers(1, 4)),
        "num_register_tokens": draw(st.integers(1, 4)),
        "rope_theta": draw(st.sampled_from([1.0, 10.0, 100.0])),
    }
    for name in ("query", "key", "value", "proj", "mlp"):
        fields[f"{name}_bias"] = draw(st.booleans())
    return fields, draw(st.tuples(*[st.integers(patch, 5 * patch)] * 2))


@pytest.mark.oracle
# Without shrinking: a failure would try hundreds of models.
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(configs(), st.sampled_from(["pooler", "cls", "mean"]), st.integers(0, 1000))
def test_parity_with_live_pytorch(check_tower, reference, config, pooling, seed):
    import transformers

    fields, shape = config
    images = reference.random_images(seed, 2, *shape, fields["num_channels"])
    with tempfile.TemporaryDirectory() as folder:
        reference.write_tower(
            Path(folder), transformers.DINOv3ViTConfig(**fields), images, pooling=pooling, seed=seed
        )
        check_tower(Path(folder))


def test_centres_of_patches():
    expected = [[-0.5, -2 / 3], [-0.5, 0], [-0.5, 2 / 3], [0.5, -2 / 3], [0.5, 0], [0.5, 2 / 3]]
    np.testing.assert_allclose(centres((2, 3)), expected, atol=1e-7)


def test_only_patches_have_positions(random_variables):
    tower = Dinov3(Dinov3Config(**TINY, num_register_tokens=2))
    variables = random_variables(tower, IMAGES)
    rotary = tower.bind(variables).rotary((2, 2), True)
    np.testing.assert_array_equal(rotary.cos[:3], 1)
    np.testing.assert_array_equal(rotary.sin[:3], 0)
    assert rotary.cos.shape == (7, 4)
    assert np.abs(rotary.sin[3:]).min() > 0
    assert rotary.cos.dtype == jnp.float32


def moved(seed, **fields):
    """Return the coordinates of a grid, moved as in training."""
    none = dict.fromkeys(("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"))
    tower = Dinov3(Dinov3Config(**TINY, **none | fields))
    rngs = {"dropout": jax.random.key(seed, impl="rbg")}
    return np.asarray(tower.apply({}, centres((3, 4)), method="_moved", rngs=rngs))


def test_training_shifts_coordinates():
    shifts = np.stack([moved(seed, pos_embed_shift=0.25) - centres((3, 4)) for seed in range(20)])
    np.testing.assert_allclose(shifts, np.broadcast_to(shifts[:, :1], shifts.shape), atol=1e-6)
    assert 0.2 < np.abs(shifts).max() < 0.25
    assert np.abs(shifts[:, 0, 0] - shifts[:, 0, 1]).max() > 0.1


@pytest.mark.parametrize("field", ["pos_embed_jitter", "pos_embed_rescale"])
def test_training_scales_coordinates(field):
    own = np.asarray(centres((3, 4)))[[0, -1]]  # none of them in the middle
    scales = np.stack([moved(seed, **{field: 2.0})[[0, -1]] / own for seed in range(20)])
    np.testing.assert_allclose(scales, np.broadcast_to(scales[:, :1], scales.shape), rtol=1e-5)
    assert 0.5 < scales.min() < 0.6
    assert 1.7 < scales.max() < 2
    assert np.allclose(scales[..., 0], scales[..., 1]) == (field == "pos_embed_rescale")


@pytest.mark.parametrize("rescale", [2.0, None])
def test_coordinates_move_in_training_alone(random_variables, rescale):
    tower = Dinov3(Dinov3Config(**TINY, pos_embed_rescale=rescale))
    variables = random_variables(tower, IMAGES)
    rngs = {"dropout": jax.random.key(0, impl="rbg")}
    trained = tower.apply(variables, IMAGES, deterministic=False, rngs=rngs).pooled
    difference = np.abs(trained - tower.apply(variables, IMAGES).pooled).max()
    assert difference > 1e-4 if rescale else difference == 0


def test_a_head_that_cannot_be_turned_is_refused():
    tower = Dinov3(Dinov3Config(**TINY | {"hidden_size": 12}))
    with pytest.raises(UserError, match=r"hidden_size .*num_attention_heads"):
        jax.eval_shape(tower.init, jax.random.key(0), IMAGES)
