"""Tiny dual encoders of every kind, by their configs of transformers."""

import jax
import numpy as np
import transformers as tr

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
TEXT = {**SMALL, "vocab_size": 40, "max_position_embeddings": 20}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 8}
CLIP_TEXT = {**TEXT, "eos_token_id": 39}
EFFICIENTNET = {
    "image_size": 32,
    "depth_coefficient": 0.5,
    "in_channels": [32, 8],
    "out_channels": [8, 16],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "num_block_repeats": [1, 2],
    "expand_ratios": [1, 2],
    "hidden_dim": 16,
    "depthwise_padding": [],
    "width_coefficient": 1.0,
}


def vision_text(vision, text):
    return tr.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=8)


# By name: the config of a tiny dual encoder of its kind.
CONFIGS = {
    "vit-bert": lambda: vision_text(tr.ViTConfig(**IMAGE), tr.BertConfig(**TEXT)),
    "clip-roberta": lambda: vision_text(
        tr.CLIPVisionConfig(**IMAGE), tr.RobertaConfig(**TEXT, pad_token_id=1)
    ),
    "clip": lambda: tr.CLIPConfig(text_config=CLIP_TEXT, vision_config=IMAGE, projection_dim=8),
    "siglip": lambda: tr.SiglipConfig(text_config=TEXT, vision_config=IMAGE),
    "altclip": lambda: tr.AltCLIPConfig(
        text_config={**TEXT, "project_dim": 12}, vision_config=IMAGE, projection_dim=8
    ),
    "chinese_clip": lambda: tr.ChineseCLIPConfig(
        text_config=TEXT, vision_config=IMAGE, projection_dim=8
    ),
    "align": lambda: tr.AlignConfig(
        text_config=TEXT, vision_config=EFFICIENTNET, projection_dim=16
    ),
}


def inputs_for(config, pairs=2):
    """What a processor makes of pairs: NumPy, int64, channels first, texts of different lengths.

    As many and as long ones as in the example of the documentation: what is not compiled as a whole is then
    compiled once for all tests.
    """
    random = np.random.default_rng(0)
    length = 7
    mask = np.arange(length) < np.arange(length, length - pairs, -1)[:, None]
    ids = np.where(mask, random.integers(3, 39, (pairs, length)), 1)
    ids[np.arange(pairs), mask.sum(1) - 1] = 39  # end of text
    size = config.vision_config.image_size
    pixels = random.normal(size=(pairs, 3, size, size)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": mask.astype(int), "pixel_values": pixels}


def assert_same_params(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
