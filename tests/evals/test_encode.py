"""Embeddings: the same as one example at a time, whatever the batch, the mesh or the processes."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import portpicker
import pytest

from lit_jax.config import MeshConfig
from lit_jax.data.text import tokenize
from lit_jax.distributed.mesh import make_mesh
from lit_jax.distributed.sharding import parameter_shardings
from lit_jax.errors import UserError
from lit_jax.evals.classes import Classes
from lit_jax.evals.labels import Labels, label_ids
from lit_jax.evals.retrieval import captions_of, evaluate_retrieval
from lit_jax.evals.zero_shot import zero_shot
from lit_jax.precomputed.tower import _outputs
from lit_jax.trees import flatten, unflatten

TEXTS = ["forty two", "a photo of the number twenty", "the number ninety nine written by hand", ""]


@functools.partial(jax.jit, static_argnames=("module", "method"))
def alone(params, *inputs, module, method: str) -> jax.Array:
    """The unit embeddings of examples of one shape, without the Encoder."""
    embeds_BxE = module.apply({"params": params}, *inputs, method=method)
    return embeds_BxE / jnp.linalg.norm(embeds_BxE, axis=1, keepdims=True)


def test_images_embed_as_they_do_alone(encoder, params, pictures):
    embeds_NxE, valid_N = encoder.images(params, pictures)
    assert len(pictures) % encoder.batch_size != 0
    assert embeds_NxE.shape == (len(pictures), 8)
    assert embeds_NxE.dtype == np.float32
    assert valid_N.all()
    for i in (0, 15, 16, 20):
        transform = encoder.image_transform
        pixels = transform.normalization(transform.eval(pictures[i]["image"])[None])
        expected = alone(params, pixels, module=encoder.module, method="encode_image")
        np.testing.assert_allclose(embeds_NxE[i], expected[0], atol=1e-6)


def test_texts_embed_as_they_do_alone(encoder, params):
    texts = TEXTS * 5
    embeds_MxE = encoder.texts(params, texts)
    assert embeds_MxE.shape == (len(texts), 8)
    for i in (0, 1, 2, 3, 18):
        tokens = tokenize(encoder.tokenizer, [texts[i]])
        inputs = (tokens["input_ids"], tokens["attention_mask"], tokens["token_type_ids"])
        expected = alone(params, *inputs, module=encoder.module, method="encode_text")
        np.testing.assert_allclose(embeds_MxE[i], expected[0], atol=1e-6)


def test_an_image_that_cannot_be_decoded_is_not_valid(
    encoder, params, pictures, pictures_with_bad, caplog
):
    embeds_NxE, valid_N = encoder.images(params, pictures_with_bad)
    expected_NxE, _ = encoder.images(params, pictures)
    assert np.flatnonzero(~valid_N).tolist() == [4]
    np.testing.assert_array_equal(embeds_NxE[4], 0)
    np.testing.assert_array_equal(embeds_NxE[valid_N], expected_NxE[valid_N])
    assert "bad" in caplog.text


def test_only_bad_images_are_an_error(encoder, params, pictures_with_bad):
    with pytest.raises(UserError, match=r"\b2 images .*--data"):
        encoder.images(params, type(pictures_with_bad)(pictures_with_bad[4:5] * 2))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["images", "features", "texts"])
def test_embeddings_that_are_not_finite_are_an_error_that_names_tower_and_parameter(
    encoder, params, pictures, method, value
):
    side, tower = ("text", "text_model") if method == "texts" else ("image", "vision_model")
    inputs = TEXTS if method == "texts" else pictures
    leaves = flatten(params)
    (path, *_) = (path for path in leaves if path.startswith(tower) and "query/kernel" in path)
    bad = unflatten(leaves | {path: leaves[path].at[0, 3].set(value)})
    with pytest.raises(UserError, match=rf"{side} .*{path} \(1\)"):
        getattr(encoder, method)(bad, inputs)
    # The other tower does not see it.
    other, inputs = ("images", pictures) if method == "texts" else ("texts", TEXTS)
    getattr(encoder, other)(bad, inputs)


@pytest.mark.parametrize(
    ("side", "name"), [("image", "visual_projection"), ("text", "text_projection")]
)
def test_a_tower_that_tells_nothing_apart_is_named_once_and_has_no_hits(
    encoder, params, pictures, side, name, caplog
):
    """A projection of zeros, whose embeddings all tie."""
    blind = {**params, name: jax.tree.map(jnp.zeros_like, params[name])}
    classes = Classes(names=tuple("abcdefg"), templates=("{}",))
    label_N = np.zeros(len(pictures), np.int32)  # all of the first class, where positions would win
    result = zero_shot(encoder, blind, pictures, classes, label_N)
    assert len(re.findall(rf" {side} ", caplog.text)) == 1
    assert result.metrics["top1"] == pytest.approx(1 / 7)
    assert result.metrics["top5"] == pytest.approx(5 / 7)
    found = evaluate_retrieval(encoder, blind, pictures, captions_of(pictures)).metrics
    assert found["image_to_text_mean_rank"] == 2 * len(pictures) - 1
    assert found["text_to_image_mean_rank"] == len(pictures)
    caplog.clear()
    zero_shot(encoder, params, pictures, classes, label_N)
    assert not caplog.text


@pytest.mark.parametrize(("batch_size", "rows"), [(1, 8), (8, 8), (9, 16), (256, 256)])
def test_batch_size_is_rounded_up_to_the_devices(encoder, batch_size, rows):
    assert encoder.mesh.size == 8
    assert dataclasses.replace(encoder, batch_size=batch_size).rows == rows


@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (2, 1), (2, 4)])
def test_mesh_changes_nothing(encoder, params, pictures, data, fsdp):
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp), jax.devices()[: data * fsdp])
    other = dataclasses.replace(encoder, mesh=mesh, batch_size=5)
    placed = jax.device_put(params, parameter_shardings(params, mesh))
    for expected, actual in (
        (encoder.images(params, pictures)[0], other.images(placed, pictures)[0]),
        (encoder.texts(params, TEXTS), other.texts(placed, TEXTS)),
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_compiles_once_and_transfers_explicitly(encoder, params, pictures):
    encoder.images(params, pictures)
    encoder.texts(params, TEXTS)
    compiled = _outputs._cache_size()
    doubled = jax.tree.map(lambda x: x * 2, params)
    with jax.transfer_guard("disallow"):
        again = dataclasses.replace(encoder)  # the compiled functions outlive an Encoder
        changed, _ = again.images(doubled, type(pictures)(pictures[:3]))
        again.texts(doubled, TEXTS[2:])
    assert _outputs._cache_size() == compiled
    assert not np.allclose(changed, encoder.images(params, pictures)[0][:3], atol=1e-3)


def test_locked_parameters_may_be_bfloat16(encoder, params, pictures):
    towers = {
        "vision_model": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["vision_model"])
    }
    embeds_NxE, _ = encoder.images(params | towers, pictures)
    expected_NxE, _ = encoder.images(params, pictures)
    np.testing.assert_allclose(embeds_NxE, expected_NxE, atol=0.05)
    np.testing.assert_allclose(np.linalg.norm(embeds_NxE, axis=1), 1, atol=1e-6)


@pytest.mark.long
def test_two_processes_agree_with_one(encoder, params, pictures_with_bad, tmp_path):
    """Each of two processes with four devices gets all of what one process with eight gets."""
    classes = Classes(names=tuple("abc"), templates=("{}",))
    label_N = label_ids(Labels(pictures_with_bad), classes)
    expected = zero_shot(encoder, params, pictures_with_bad, classes, label_N)
    captions = captions_of(pictures_with_bad)
    found = evaluate_retrieval(encoder, params, pictures_with_bad, captions)

    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{portpicker.pick_unused_port()}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": "4",
    }
    script = Path(__file__).with_name("one_of_two_processes.py")
    files = [tmp_path / "0.npz", tmp_path / "1.npz"]
    processes = [
        subprocess.Popen(
            [sys.executable, script, file], env=environment | {"JAX_PROCESS_ID": file.stem}
        )
        for file in files
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    for file in files:
        actual = np.load(file)
        assert actual["retrieval"].tolist() == list(found.metrics.values())
        np.testing.assert_allclose(actual["image_embeds"], expected.image_embeds, atol=1e-6)
        np.testing.assert_allclose(actual["class_embeds"], expected.class_embeds, atol=1e-6)
        for name in ("index", "label", "top"):
            np.testing.assert_array_equal(actual[name], getattr(expected, name))
