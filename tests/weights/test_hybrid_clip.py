"""Checkpoints of FlaxHybridCLIP, the script that became VisionTextDualEncoder.

The file is put together of what transformers 4 wrote for each tower, and compared with PyTorch.
"""

import json

import jax
import numpy as np
import pytest
from flax import serialization

from lit_jax.weights import load

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
