import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lit_jax.errors import UserError
from lit_jax.models.vit import ViT, ViTConfig

TINY = ViTConfig(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    image_size=8,
    patch_size=4,
)


@pytest.mark.parametrize(
    "name", ["vit", "vit_unusual", "vit_interpolated", "deit", "deit_interpolated"]
)
def test_parity_with_pytorch(check_tower, goldens, name):
    check_tower(goldens / name)


@st.composite
def configs(draw):
    """Fields of a ViT's config.json, and an image size, that transformers accepts."""
    # Normalisation over a handful of numbers is singular, so no narrower than this.
    head_size, heads = draw(st.integers(5, 9)), draw(st.integers(1, 4))
    patch, grid = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    fields = {
        "hidden_size": head_size * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(1, 20)),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "quick_gelu", "relu", "silu"])),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-6, 1e-2])),
        "image_size": patch * grid + draw(st.integers(0, patch - 1)),
        "patch_size": patch,
        "num_channels": draw(st.integers(1, 4)),
        "qkv_bias": draw(st.booleans()),
        "pooler_output_size": draw(st.none() | st.integers(1, 20)),
        "pooler_act": draw(st.sampled_from(["tanh", "linear", "sigmoid"])),
    }
    own_shape = (fields["image_size"],) * 2
    shape = draw(st.just(own_shape) | st.tuples(*[st.integers(patch, 5 * patch)] * 2))
    return fields, shape


@pytest.mark.oracle
# Without shrinking: a failure would try hundreds of models.
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    st.sampled_from(["ViTConfig", "DeiTConfig"]),
    configs(),
    st.sampled_from(["pooler", "cls", "mean"]),
    st.integers(0, 1000),
)
def test_parity_with_live_pytorch(check_tower, reference, kind, config, pooling, seed):
    import transformers

    fields, shape = config
    images = reference.random_images(seed, 2, *shape, fields["num_channels"])
    with tempfile.TemporaryDirectory() as folder:
        reference.write_tower(
            Path(folder), getattr(transformers, kind)(**fields), images, pooling=pooling, seed=seed
        )
        check_tower(Path(folder))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_reads_the_normalised_tokens(pooling, random_variables):
    vit = ViT(TINY, pooling=pooling)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    variables = random_variables(vit, images)
    assert "pooler" not in variables["params"]
    output = jax.jit(vit.apply)(variables, images)
    tokens = np.asarray(output.last_hidden_state)
    expected = tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(1)
    np.testing.assert_allclose(output.pooled, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 8, 8, 1), "num_channels=3"),
        # Images of another library, which the Python interface has turned.
        ((1, 8, 3, 8), r"num_channels=3.*\[images, channels, height, width\]"),
        ((1, 8, 3, 3), "config.data.image_size"),
    ],
)
def test_unsuitable_images_are_refused(shape, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(ViT(TINY).init, jax.random.key(0), jnp.zeros(shape))
