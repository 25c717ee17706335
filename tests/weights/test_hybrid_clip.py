"""Checkpoints of FlaxHybridCLIP, the script that became VisionTextDualEncoder.

The file is put together of what transformers 4 wrote for each tower, and compared with PyTorch.
"""

import json

import jax
import numpy as np
import pytest
from flax import serialization

from lit_jax.models.dual_encoder import build_system
from lit_jax.models.families import build_tower
from lit_jax.weights import hub, load, save

RANDOM = np.random.default_rng(0)
PROJECTIONS = {
    name: {"kernel": RANDOM.normal(size=(8, 6)).astype(np.float32)}
    for name in ("visual_projection", "text_projection")
}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def params_of(folder):
    return serialization.msgpack_restore((folder / "flax_model.msgpack").read_bytes())


@pytest.mark.parametrize("whole_clip", [False, True])
def test_a_hybrid_clip(golden, outputs, tmp_path, whole_clip):
    vision_config = config_of(golden / "clip_vision_flax")
    if whole_clip:  # the script took the image tower out of it
        vision_config = {"model_type": "clip", "vision_config": vision_config, "text_config": {}}
    content = {
        "model_type": "hybrid-clip",
        "architectures": ["HybridCLIP"],
        "projection_dim": 6,
        "vision_config": vision_config,
        "text_config": config_of(golden / "bert_torch"),
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    tree = PROJECTIONS | {
        "vision_model": params_of(golden / "clip_vision_flax"),
        "text_model": params_of(golden / "dual_flax")["text_model"],
        "logit_scale": np.ones((), np.float32),
    }
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))

    module, params, _, report = load.load_dual_encoder(tmp_path, dtype="float32")
    assert not report.ignored
    assert params["logit_scale"] == 1
    with np.load(golden / "clip_outputs.npz") as arrays:
        pixels, pooled = arrays["pixel_values"], arrays["clip_vision"]
    images = jax.jit(module.apply, static_argnames="method")(
        {"params": params}, pixels, method="encode_image"
    )
    texts = jax.jit(module.apply, static_argnames="method")(
        {"params": params},
        *(outputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")),
        method="encode_text",
    )
    visual, textual = (PROJECTIONS[name]["kernel"] for name in PROJECTIONS)
    np.testing.assert_allclose(images, pooled @ visual, atol=1e-5)
    np.testing.assert_allclose(texts, outputs["bert"] @ textual, atol=1e-5)


@pytest.fixture
def flax_roberta(tmp_path):
    """A dual encoder of the Flax classes with a RoBERTa, read from msgpack alone."""

    def make(model_type="vision-text-dual-encoder"):
        small = {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
        }
        hf = hub.complete(
            {
                "model_type": "vision-text-dual-encoder",
                "vision_config": {"model_type": "vit", "image_size": 8, "patch_size": 4, **small},
                "text_config": {
                    "model_type": "roberta",
                    "vocab_size": 9,
                    "pad_token_id": 1,
                    **small,
                },
                "projection_dim": 4,
            }
        )
        module = build_system(hf, dtype="float32")
        shapes = load.parameter_shapes(module, module.example_batch)
        params = jax.tree.map(lambda leaf: RANDOM.normal(size=leaf.shape).astype("f4"), shapes)
        save.save_dual_encoder(tmp_path / "flax", hf, module, params)
        (tmp_path / "flax" / "model.safetensors").unlink()
        content = config_of(tmp_path / "flax") | {"model_type": model_type}
        del content["lit_jax"]
        (tmp_path / "flax" / "config.json").write_text(json.dumps(content))
        return tmp_path / "flax"

    return make


def test_a_flax_roberta_warns_until_its_positions_are_chosen(flax_roberta, caplog):
    folder = flax_roberta()
    module, _, hf, _ = load.load_dual_encoder(folder, dtype="float32")
    assert module.text_model.config.position_ids == "input_ids"
    (record,) = caplog.records
    assert "text_config={'position_ids': 'arange'}" in record.getMessage()
    assert "config.model.text.overrides.position_ids" in record.getMessage()
    caplog.clear()
    text = hf["text_config"]
    for position_ids, said in (("input_ids", 1), ("arange", 0)):  # the tower alone, taken out
        tower = build_tower(text | {"position_ids": position_ids}, pooling="cls", dtype="float32")
        load.load_tower(folder, tower)
        assert len(caplog.records) == said
        caplog.clear()
    for choice in ("arange", "input_ids"):
        chosen = hf | {"text_config": hf["text_config"] | {"position_ids": choice}}
        module, _, _, _ = load.load_dual_encoder(folder, dtype="float32", hf_config=chosen)
        assert module.text_model.config.position_ids == choice
    assert not caplog.records


def test_a_hybrid_clip_counts_positions_from_0(flax_roberta, caplog):
    module, _, _, _ = load.load_dual_encoder(flax_roberta("hybrid-clip"), dtype="float32")
    assert module.text_model.config.position_ids == "arange"
    assert not caplog.records
