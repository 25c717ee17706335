import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.config import MeshConfig, ModelConfig, TowerConfig
from lit_jax.distributed.mesh import BATCH, batch_sharding, make_mesh
from lit_jax.errors import UserError
from lit_jax.models.dual_encoder import DualEncoderModule, build_dual_encoder, normalize
from lit_jax.models.normalization import Normalization
from lit_jax.weights.load import load_dual_encoder

SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
VIT = {"model_type": "vit", "image_size": 8, "patch_size": 4, **SMALL}
BERT = {"model_type": "bert", "vocab_size": 20, "hidden_dropout_prob": 0.5, **SMALL}
RANDOM = np.random.default_rng(0)
BATCH_OF_8 = {
    "pixel_values": jnp.asarray(RANDOM.normal(size=(8, 8, 8, 3)), jnp.float32),
    "input_ids": jnp.asarray(RANDOM.integers(0, 20, (8, 5)), jnp.int32),
    "attention_mask": jnp.ones((8, 5), jnp.int32),
}


def build(**changes) -> DualEncoderModule:
    return build_dual_encoder(VIT, BERT, ModelConfig(projection_dim=6, **changes))


def encode_image(module, variables):
    encode = jax.jit(functools.partial(module.apply, method="encode_image"))
    return encode(variables, BATCH_OF_8["pixel_values"])


def with_projection(kind, **changes) -> DualEncoderModule:
    tower = TowerConfig(projection=kind)
    return build(image=tower, text=tower, **changes)


@pytest.fixture(scope="module")
def model(random_variables):
    """A module with all the parameters that there can be, its variables, its output for the batch."""
    module = with_projection("linear_bias", logit_bias_init=-10.0)
    variables = random_variables(module, BATCH_OF_8)
    return module, variables, jax.jit(module.apply)(variables, BATCH_OF_8)


def test_parity_with_pytorch(goldens):
    folder = goldens / "dual_encoder"
    with np.load(folder / "arrays.npz") as arrays:
        expected = {name: arrays[name] for name in arrays.files}
    module, params, _, _ = load_dual_encoder(folder, dtype="float32")
    batch = {
        name.removeprefix("input."): jnp.asarray(value)
        for name, value in expected.items()
        if name.startswith("input.")
    }
    output = jax.jit(module.apply)({"params": params}, batch)
    logits = np.exp(output.logit_scale) * (output.image_embeds @ output.text_embeds.T)
    for name, actual in {
        "image_embeds": output.image_embeds,
        "text_embeds": output.text_embeds,
        "logits_per_image": logits,
    }.items():
        np.testing.assert_allclose(actual, expected[f"output.{name}"], rtol=0, atol=1e-5)


def test_parameters_have_the_names_of_vision_text_dual_encoder(model):
    _, variables, _ = model
    params = jax.tree.map(jnp.shape, variables["params"])
    assert set(params) == {
        *("vision_model", "text_model", "visual_projection", "text_projection"),
        *("logit_scale", "logit_bias"),
    }
    assert params["visual_projection"] == {"kernel": (8, 6), "bias": (6,)}
    assert params["text_projection"] == {"kernel": (8, 6), "bias": (6,)}
    assert params["logit_scale"] == params["logit_bias"] == ()


def test_initial_logit_scale_and_bias(model):
    module, _, _ = model

    @jax.jit  # compiles what is returned, not the towers
    def initial():
        params = module.init(jax.random.key(0), BATCH_OF_8)["params"]
        return params["logit_scale"], params["logit_bias"]

    scale, bias = initial()
    np.testing.assert_allclose(scale, np.log(1 / 0.07), atol=1e-4)
    assert bias == -10


@pytest.mark.parametrize("kind", ["none", "linear"])
def test_parameters_that_are_not_asked_for_are_not_there(kind):
    module = dataclasses.replace(with_projection(kind), projection_dim=8)
    params = jax.eval_shape(module.init, jax.random.key(0), BATCH_OF_8)["params"]
    assert ("visual_projection" in params) == ("text_projection" in params) == (kind == "linear")
    assert "logit_bias" not in params
    if kind == "linear":
        assert set(params["text_projection"]) == {"kernel"}


def test_encoders_give_the_embeddings_before_normalisation(model):
    module, variables, output = model
    image = encode_image(module, variables)
    text = jax.jit(functools.partial(module.apply, method="encode_text"))(
        variables, BATCH_OF_8["input_ids"], BATCH_OF_8["attention_mask"]
    )
    for embeds, normalized in ((image, output.image_embeds), (text, output.text_embeds)):
        lengths = np.linalg.norm(embeds, axis=1, keepdims=True)
        assert (np.abs(lengths - 1) > 1e-2).any()
        np.testing.assert_allclose(embeds / lengths, normalized, atol=1e-6)


def test_without_projection_an_embedding_is_the_pooled_output(random_variables):
    module = dataclasses.replace(with_projection("none"), projection_dim=8)
    variables = random_variables(module, BATCH_OF_8)
    tower = {"params": variables["params"]["vision_model"]}
    pooled = jax.jit(module.vision_model.apply)(tower, BATCH_OF_8["pixel_values"]).pooled
    np.testing.assert_allclose(encode_image(module, variables), pooled, atol=1e-6)


def test_bytes_are_normalised_before_the_tower(model):
    module, variables, _ = model
    pixels = RANDOM.integers(0, 256, (2, 8, 8, 3), np.uint8)
    normalization = Normalization((0.01, 0.02, 0.03), (-1.0, -2.0, 0.5))
    exact = pixels * np.array([0.01, 0.02, 0.03]) + np.array([-1.0, -2.0, 0.5])
    pixels, normalised = jnp.asarray(pixels), jnp.asarray(exact, jnp.float32)

    def pooled(module, images):
        return jax.jit(functools.partial(module.apply, method="image_features"))(variables, images)

    expected = pooled(module, normalised)
    of_bytes = module.clone(normalization=normalization)
    np.testing.assert_allclose(pooled(of_bytes, pixels), expected, atol=1e-5)
    np.testing.assert_array_equal(pooled(of_bytes, normalised), expected)
    with pytest.raises(ValueError, match="normalization"):
        module.apply(variables, pixels, method="image_features")


@pytest.mark.parametrize("side", ["image", "text"])
def test_without_projection_the_widths_must_agree(side):
    module = build(**{side: TowerConfig(projection="none")})
    with pytest.raises(UserError, match=rf"model\.{side}\.projection.*8 .*6"):
        jax.eval_shape(module.init, jax.random.key(0), BATCH_OF_8)


def test_a_tower_on_the_wrong_side_is_refused():
    with pytest.raises(UserError, match=r"config\.model\.image\.model.*'bert'.*vit"):
        build_dual_encoder(BERT, BERT, ModelConfig())
    with pytest.raises(UserError, match=r"config\.model\.text\.model.*'vit'.*bert"):
        build_dual_encoder(VIT, VIT, ModelConfig())


def test_each_tower_has_its_own_dropout_switch(model):
    module, variables, off = model
    apply = jax.jit(functools.partial(module.apply, deterministic_text=False))
    key = jax.random.key(0, impl="rbg")  # the default takes seconds to compile
    on = apply(variables, BATCH_OF_8, rngs={"dropout": key})
    np.testing.assert_array_equal(on.image_embeds, off.image_embeds)
    assert np.abs(on.text_embeds - off.text_embeds).max() > 1e-2


def test_embeddings_of_bfloat16_towers_are_float32():
    output, _ = jax.eval_shape(
        build(dtype="bfloat16").init_with_output, jax.random.key(0), BATCH_OF_8
    )
    assert output.image_embeds.dtype == output.text_embeds.dtype == jnp.float32


def test_a_mesh_changes_no_number_and_keeps_the_batch_sharded(model):
    module, variables, expected = model
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    with jax.set_mesh(mesh):
        batch = jax.device_put(BATCH_OF_8, batch_sharding(mesh))
        output = jax.jit(module.apply)(variables, batch)
    for name in ("image_embeds", "text_embeds"):
        actual = getattr(output, name)
        assert actual.sharding.spec == BATCH
        np.testing.assert_allclose(actual, getattr(expected, name), atol=1e-6)


def test_normalize_leaves_zero_and_its_gradient_finite():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(normalize(x), [[0, 0], [0.6, 0.8]], atol=1e-7)
    assert np.isfinite(jax.grad(lambda x: normalize(x).sum())(x)).all()
