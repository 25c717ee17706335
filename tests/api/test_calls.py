"""lit_jax.DualEncoder and its towers as the documentation of transformers uses theirs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers as tr
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

import lit_jax
from lit_jax.api.inputs import as_dtype
from lit_jax.config import MeshConfig
from lit_jax.distributed.mesh import batch_sharding, make_mesh, replicated
from lit_jax.errors import UserError
from tests.api.tiny_models import inputs_for


def test_calls_are_functions_of_jax(model, inputs):
    ids, mask, pixels = (
        jnp.asarray(inputs[key]) for key in ("input_ids", "attention_mask", "pixel_values")
    )
    output = model(ids, pixels, mask, return_loss=True)
    assert output.logits_per_image.shape == (2, 2)
    np.testing.assert_array_equal(output.logits_per_text, output.logits_per_image.T)

    jitted = jax.jit(lambda params: model(ids, pixels, mask, params=params, return_loss=True))
    np.testing.assert_allclose(jitted(model.params).loss, output.loss, rtol=1e-5)

    features = model.get_image_features(pixels)
    one_by_one = jax.vmap(lambda image: model.get_image_features(image[None])[0])
    np.testing.assert_allclose(jax.jit(one_by_one)(pixels), features, atol=1e-5)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, output.image_embeds, atol=1e-6)

    grads = jax.jit(jax.grad(lambda params: jitted(params).loss))(model.params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads["visual_projection"]))
    # Gradient of the log of the scale: against a difference.
    moved = model.params | {"logit_scale": model.params["logit_scale"] + 1e-2}
    difference = (jitted(moved).loss - output.loss) / 1e-2
    np.testing.assert_allclose(grads["logit_scale"], difference, rtol=5e-2)


def test_on_a_mesh_the_numbers_are_the_same(model):
    inputs = inputs_for(model.config)
    expected = model(**inputs)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:2])
    params = jax.device_put(model.params, replicated(mesh))
    batch = {
        key: jax.device_put(jnp.asarray(value), batch_sharding(mesh))
        for key, value in inputs.items()
    }
    with jax.set_mesh(mesh):
        output = jax.jit(lambda params, batch: model(**batch, params=params))(params, batch)
    np.testing.assert_allclose(output.logits_per_image, expected.logits_per_image, atol=1e-5)


def test_on_a_mesh_of_other_axes_the_caller_says_what_lies_where(model):
    inputs = inputs_for(model.config)
    expected = model(**inputs)
    mesh = jax.make_mesh((2,), ("mine",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = NamedSharding(mesh, PartitionSpec("mine"))
    batch = {key: jax.device_put(jnp.asarray(value), split) for key, value in inputs.items()}
    with jax.set_mesh(mesh):
        output = jax.jit(lambda batch: model(**batch, return_loss=True))(batch)
    np.testing.assert_allclose(output.logits_per_image, expected.logits_per_image, atol=1e-5)
    assert output.text_embeds.sharding.is_equivalent_to(split, 2)


def test_optional_inputs_count(model, inputs):
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    plain = model(ids, pixels).text_embeds
    for extra in (
        {"attention_mask": inputs["attention_mask"]},
        {"token_type_ids": np.ones_like(ids)},
        {"position_ids": np.arange(7)[None].repeat(2, 0) + 1},
    ):
        assert np.abs(model(ids, pixels, **extra).text_embeds - plain).max() > 1e-4, extra
        same = model.get_text_features(ids, **extra)
        unit = same / np.linalg.norm(same, axis=1, keepdims=True)
        np.testing.assert_allclose(unit, model(ids, pixels, **extra).text_embeds, atol=1e-6)


def test_dropout_is_on_when_a_key_is_given(model, inputs):
    ids = inputs["input_ids"]
    key = jax.random.key(0, impl="rbg")
    plain, dropped = (model.get_text_features(ids, dropout_rng=rng) for rng in (None, key))
    assert np.abs(plain - dropped).max() > 1e-4


@pytest.mark.parametrize(("dtype", "atol"), [("bfloat16", 0.03), (jnp.float16, 0.004)])
def test_half_precision_is_close(model, inputs, tmp_path, dtype, atol):
    model.save_pretrained(tmp_path)
    half = lit_jax.DualEncoder.from_pretrained(tmp_path, dtype=dtype)
    half, full = jax.jit(functools.partial(half, **inputs))(), model(**inputs)
    assert half.vision_model_output.pooler_output.dtype == jnp.dtype(dtype)
    assert half.text_model_output.last_hidden_state.dtype == jnp.dtype(dtype)
    assert half.image_embeds.dtype == jnp.float32
    assert 0 < np.abs(half.image_embeds - full.image_embeds).max() < atol


@pytest.mark.oracle
def test_a_dtype_of_pytorch_means_the_same():
    import torch

    assert as_dtype(torch.bfloat16) == jnp.bfloat16
    with pytest.raises(UserError, match="float64"):
        as_dtype(torch.float64)


def test_other_parameters_of_a_call_fit_the_model_or_are_named(model, inputs):
    with pytest.raises(UserError, match=r"logit_scale .*\{'params'"):
        model(**inputs, params={"params": model.params})
    params = {name: part for name, part in model.params.items() if name != "logit_scale"}
    with pytest.raises(UserError, match=r"logit_scale is missing"):
        jax.jit(lambda params: model(**inputs, params=params))(params)


def test_the_example_of_the_documentation(model, tmp_path):
    """Two images, two texts, softmax over logits_per_image, all from one local folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    processor = tr.VisionTextDualEncoderProcessor(
        tr.ViTImageProcessorPil(size={"height": 16, "width": 16}),
        tr.BertTokenizer(str(tmp_path / "vocab.txt")),
    )
    model.save_pretrained(tmp_path / "vit-bert", processor)

    folder = str(tmp_path / "vit-bert")
    model = lit_jax.DualEncoder.from_pretrained(folder)
    processor = tr.VisionTextDualEncoderProcessor.from_pretrained(folder)
    images = [Image.new("RGB", (40, 30), color) for color in ("orange", "brown")]
    texts = ["a photo of a cat", "a photo of a dog"]
    inputs = processor(text=texts, images=images, return_tensors="np", padding=True)
    outputs = model(**inputs, return_loss=True)
    probabilities = jax.nn.softmax(outputs.logits_per_image, axis=1)
    assert probabilities.shape == (2, 2)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    assert np.isfinite(outputs.loss)


def test_outputs_are_read_as_those_of_transformers(model, inputs):
    output = model(**inputs)
    keys = ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]
    towers = ["text_model_output", "vision_model_output"]
    assert list(output) == list(output.keys()) == keys + towers
    assert "loss" not in output
    assert output.loss is None
    with pytest.raises(KeyError):
        output["loss"]
    for i, key in enumerate(keys):
        np.testing.assert_array_equal(output[key], getattr(output, key))
        np.testing.assert_array_equal(output[i], output[key])
        np.testing.assert_array_equal(output.to_tuple()[i], output[key])
    assert isinstance(output.to_tuple()[-1], tuple)
    assert len(output[:2]) == 2
    as_tuple = model(**inputs, return_dict=False, return_loss=True)
    assert isinstance(as_tuple, tuple)
    assert [x.shape for x in as_tuple[:2]] == [(), (2, 2)]
    np.testing.assert_array_equal(as_tuple[1], output.logits_per_image)
    text = model.text_model(inputs["input_ids"], inputs["attention_mask"])
    np.testing.assert_array_equal(text[1], output.text_model_output["pooler_output"])


def test_outputs_are_pytrees(model, inputs):
    """They leave jit whole, with names that JAX's own tools show."""
    mean = jax.jit(lambda inputs: jax.tree.map(lambda x: x.mean(), model(**inputs)))(inputs)
    assert type(mean) is type(model(**inputs))
    assert mean.loss is None
    assert mean.vision_model_output["last_hidden_state"].shape == ()
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(mean)]
    assert ".vision_model_output.pooler_output" in names


@pytest.mark.parametrize("call", ["__call__", "get_text_features", "text_model"])
def test_a_fourth_argument_by_position_is_refused(model, inputs, call):
    """It is position_ids for some models of transformers and token_type_ids for others."""
    ids, pixels, mask = inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
    positional = (ids, pixels, mask) if call == "__call__" else (ids, mask)
    with pytest.raises(UserError, match=r"token_type_ids=... .*position_ids=..."):
        getattr(model, call)(*positional, np.arange(7)[None])


def test_train_says_whether_there_is_dropout(model, inputs):
    ids, key = inputs["input_ids"], jax.random.key(0, impl="rbg")
    plain, off, on = (
        model.get_text_features(ids, **train)
        for train in ({}, {"train": False, "dropout_rng": key}, {"train": True, "dropout_rng": key})
    )
    np.testing.assert_array_equal(plain, off)
    assert np.abs(plain - on).max() > 1e-4
    with pytest.raises(UserError, match=r"train=True .* dropout_rng="):
        model(**inputs, train=True)
