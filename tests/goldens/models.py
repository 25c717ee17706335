"""The tiny models that make_towers.py computes with PyTorch, and what is put into them."""

from __future__ import annotations  # transformers 4 has no PreTrainedConfig

import numpy as np
import transformers


def random_images(seed: int, *shape: int) -> dict[str, np.ndarray]:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return {"pixel_values": values}


def random_texts(
    seed: int, config: transformers.PreTrainedConfig, *, length: int, optional: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Two texts, of full and of half length; `optional` names token_type_ids and position_ids.

    The padding token may be among those of a text, too.
    """
    random = np.random.default_rng(seed)
    shape = (2, length)
    mask = np.arange(length) < np.array([[length], [(length + 1) // 2]])
    positions = np.tile(np.arange(config.max_position_embeddings), (2, 1))
    inputs = {
        "input_ids": np.where(
            mask, random.integers(1, config.vocab_size, shape), config.pad_token_id or 0
        ),
        "attention_mask": mask,
        "token_type_ids": random.integers(0, getattr(config, "type_vocab_size", 1), shape),
        "position_ids": random.permuted(positions, axis=1)[:, :length],
    }
    if config.model_type == "clip_text_model":  # the end of the text, and once more behind it
        inputs["input_ids"][[0, 0, 1, 1], [-3, -1, 1, 2]] = config.eos_token_id
    wanted = ("input_ids", "attention_mask", *optional)
    return {name: inputs[name].astype(np.int32) for name in wanted}


SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
VIT = transformers.ViTConfig(**SMALL, image_size=12, patch_size=4)
DEIT = transformers.DeiTConfig(**SMALL, image_size=12, patch_size=4)
UNUSUAL_VIT = transformers.ViTConfig(
    **SMALL,
    image_size=[6, 12],
    patch_size=[2, 3],
    num_channels=1,
    hidden_act="quick_gelu",
    layer_norm_eps=0.1,
    qkv_bias=False,
    pooler_output_size=10,
    pooler_act="sigmoid",
)
BEIT = transformers.BeitConfig(
    **SMALL, image_size=12, patch_size=4, use_relative_position_bias=True
)
INTERPOLATED_BEIT = transformers.BeitConfig(
    **SMALL,
    image_size=12,
    patch_size=4,
    use_absolute_position_embeddings=True,
    use_relative_position_bias=True,
    use_shared_relative_position_bias=True,
    use_mask_token=True,
)
UNUSUAL_BEIT = transformers.BeitConfig(
    **SMALL,
    image_size=[8, 12],
    patch_size=4,
    use_shared_relative_position_bias=True,
    layer_scale_init_value=0.0,
    use_mean_pooling=False,
)
SMALL_DINO = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
DINOV2 = transformers.Dinov2Config(**SMALL_DINO, image_size=12, patch_size=4, mlp_ratio=2)
SWIGLU_DINOV2 = transformers.Dinov2Config(
    **SMALL_DINO,
    image_size=12,
    patch_size=4,
    mlp_ratio=2,
    use_swiglu_ffn=True,
    qkv_bias=False,
    use_mask_token=False,
)
DINOV2_WITH_REGISTERS = transformers.Dinov2WithRegistersConfig(
    **SMALL_DINO, image_size=12, patch_size=4, mlp_ratio=2, num_register_tokens=3
)
DINOV3 = transformers.DINOv3ViTConfig(
    **SMALL, image_size=12, patch_size=4, num_register_tokens=3, rope_theta=10.0
)
UNUSUAL_DINOV3 = transformers.DINOv3ViTConfig(
    **SMALL,
    image_size=[6, 12],
    patch_size=[2, 3],
    num_register_tokens=1,
    use_gated_mlp=True,
    hidden_act="silu",
    query_bias=False,
    key_bias=True,
    value_bias=False,
    proj_bias=False,
    mlp_bias=False,
)
SMALL_BERT = {**SMALL, "vocab_size": 30, "max_position_embeddings": 10}
BERT = transformers.BertConfig(**SMALL_BERT)
UNUSUAL_BERT = transformers.BertConfig(
    **SMALL_BERT,
    hidden_act="gelu_new",
    layer_norm_eps=0.1,
    type_vocab_size=3,
    is_decoder=True,
    use_cache=False,
)
ROBERTA = transformers.RobertaConfig(**SMALL_BERT)
UNUSUAL_ROBERTA = transformers.RobertaConfig(
    **SMALL_BERT, pad_token_id=2, layer_norm_eps=0.1, is_decoder=True, use_cache=False
)
XLM_ROBERTA = transformers.XLMRobertaConfig(**SMALL_BERT, type_vocab_size=1)
ALTCLIP_TEXT = transformers.AltCLIPTextConfig(**SMALL_BERT, project_dim=6)
MPNET = transformers.MPNetConfig(**SMALL | {"vocab_size": 30, "max_position_embeddings": 140})
DISTILBERT = transformers.DistilBertConfig(
    vocab_size=30, max_position_embeddings=10, dim=8, n_layers=2, n_heads=2, hidden_dim=12
)
CLIP_VISION = transformers.CLIPVisionConfig(**SMALL, image_size=12, patch_size=4)
ONE_LAYER = {**SMALL, "num_hidden_layers": 1}
ALTCLIP_VISION = transformers.AltCLIPVisionConfig(**ONE_LAYER, image_size=12, patch_size=4)
CHINESE_CLIP_VISION = transformers.ChineseCLIPVisionConfig(
    **ONE_LAYER, image_size=14, patch_size=4, num_channels=1, layer_norm_eps=0.1, hidden_act="gelu"
)
SMALL_TEXT = {"vocab_size": 30, "max_position_embeddings": 10, "bos_token_id": 0}
CLIP_TEXT = transformers.CLIPTextConfig(**SMALL, **SMALL_TEXT, eos_token_id=7)
OLD_CLIP_TEXT = transformers.CLIPTextConfig(
    **ONE_LAYER, **SMALL_TEXT, eos_token_id=2, layer_norm_eps=0.1
)
SIGLIP_VISION = transformers.SiglipVisionConfig(**SMALL, image_size=12, patch_size=4)
HEADLESS_SIGLIP = transformers.SiglipVisionConfig(
    **ONE_LAYER, image_size=12, patch_size=4, vision_use_head=False
)
SIGLIP_TEXT = transformers.SiglipTextConfig(
    **SMALL, **SMALL_TEXT, eos_token_id=7, projection_size=6
)
SMALL_MODERNBERT = {**SMALL, "vocab_size": 30}
SMALL_MODERNBERT |= {f"{token}_token_id": 0 for token in ("pad", "bos", "eos", "cls", "sep")}
MODERNBERT = transformers.ModernBertConfig(
    **SMALL_MODERNBERT | {"num_hidden_layers": 4}, local_attention=6
)
UNUSUAL_MODERNBERT = transformers.ModernBertConfig(
    **SMALL_MODERNBERT,
    hidden_activation="gelu_new",
    norm_eps=0.1,
    norm_bias=True,
    attention_bias=True,
    mlp_bias=True,
    local_attention=3,
    layer_types=["sliding_attention", "full_attention"],
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
        "full_attention": {"rope_type": "default", "rope_theta": 20.0},
    },
)
SMALL_EFFICIENTNET = {
    "width_coefficient": 0.1,
    "depth_coefficient": 0.5,
    "depth_divisor": 4,
    "kernel_sizes": [3, 5],
    "in_channels": [32, 60],
    "out_channels": [60, 80],
    "strides": [1, 2],
    "num_block_repeats": [1, 5],
    "expand_ratios": [1, 6],
    "drop_connect_rate": 0.0,
}
EFFICIENTNET = transformers.EfficientNetConfig(**SMALL_EFFICIENTNET, hidden_dim=128)
ALIGN_VISION = transformers.AlignVisionConfig(
    **SMALL_EFFICIENTNET,
    num_channels=1,
    depthwise_padding=[1],
    squeeze_expansion_ratio=0.01,
    hidden_act="gelu",
    pooling_type="max",
    batch_norm_eps=0.1,
    batch_norm_momentum=0.3,
)
ALIGN_VISION_BLOCK = transformers.AlignVisionConfig(
    width_coefficient=0.25,
    depth_coefficient=1.0,
    kernel_sizes=[5],
    in_channels=[32],
    out_channels=[24],
    strides=[2],
    num_block_repeats=[1],
    expand_ratios=[3],
)
CONVNEXT = transformers.ConvNextConfig(
    hidden_sizes=[4, 6], depths=[1, 2], num_stages=2, patch_size=3, layer_scale_init_value=0.5
)
UNUSUAL_CONVNEXT = transformers.ConvNextConfig(
    hidden_sizes=[4],
    depths=[1],
    num_stages=1,
    patch_size=[2, 3],
    num_channels=1,
    hidden_act="silu",
    layer_norm_eps=0.1,
    layer_scale_init_value=0.0,
)
CONVNEXT_V2 = transformers.ConvNextV2Config(
    hidden_sizes=[4, 6], depths=[1, 2], num_stages=2, patch_size=3, hidden_act="relu"
)
DINOV3_CONVNEXT = transformers.DINOv3ConvNextConfig(
    hidden_sizes=[4, 6], depths=[1, 2], layer_norm_eps=0.1, layer_scale_init_value=0.5
)
TYPES, POSITIONS = "token_type_ids", "position_ids"
TOWERS = {
    "vit": (VIT, random_images(0, 2, 12, 12, 3), "pooler"),
    "vit_unusual": (UNUSUAL_VIT, random_images(1, 2, 6, 12, 1), "pooler"),
    "vit_interpolated": (VIT, random_images(2, 2, 17, 8, 3), "mean"),
    "bert": (BERT, random_texts(3, BERT, length=7, optional=(TYPES,)), "pooler"),
    "bert_unusual": (
        UNUSUAL_BERT,
        random_texts(4, UNUSUAL_BERT, length=7, optional=(TYPES, POSITIONS)),
        "pooler",
    ),
    "bert_mean": (BERT, random_texts(5, BERT, length=7), "mean"),
    "deit": (DEIT, random_images(8, 2, 12, 12, 3), "pooler"),
    "deit_interpolated": (DEIT, random_images(9, 2, 17, 8, 3), "mean"),
    "roberta": (ROBERTA, random_texts(10, ROBERTA, length=7, optional=(TYPES,)), "pooler"),
    "roberta_unusual": (
        UNUSUAL_ROBERTA,
        random_texts(11, UNUSUAL_ROBERTA, length=7, optional=(TYPES,)),
        "cls",
    ),
    "xlm_roberta": (XLM_ROBERTA, random_texts(12, XLM_ROBERTA, length=8), "mean"),
    "altclip_text": (ALTCLIP_TEXT, random_texts(13, ALTCLIP_TEXT, length=7), "pooler"),
    "mpnet": (MPNET, random_texts(14, MPNET, length=130), "pooler"),
    "distilbert": (DISTILBERT, random_texts(15, DISTILBERT, length=7), "mean"),
    "beit": (BEIT, random_images(20, 2, 12, 12, 3), "pooler"),
    "beit_interpolated": (INTERPOLATED_BEIT, random_images(21, 2, 17, 8, 3), "mean"),
    "beit_unusual": (UNUSUAL_BEIT, random_images(22, 2, 8, 12, 3), "pooler"),
    "dinov2": (DINOV2, random_images(23, 2, 12, 12, 3), "pooler"),
    "dinov2_swiglu": (SWIGLU_DINOV2, random_images(24, 2, 17, 8, 3), "mean"),
    "dinov2_with_registers": (DINOV2_WITH_REGISTERS, random_images(25, 2, 17, 8, 3), "mean"),
    "dinov3": (DINOV3, random_images(26, 2, 17, 8, 3), "mean"),
    "dinov3_unusual": (UNUSUAL_DINOV3, random_images(27, 2, 6, 12, 3), "pooler"),
    "clip_vision": (CLIP_VISION, random_images(30, 2, 12, 12, 3), "pooler"),
    "clip_vision_interpolated": (CLIP_VISION, random_images(31, 2, 17, 8, 3), "mean"),
    "altclip_vision": (ALTCLIP_VISION, random_images(32, 2, 12, 12, 3), "pooler"),
    "chinese_clip_vision": (CHINESE_CLIP_VISION, random_images(33, 2, 12, 12, 1), "cls"),
    "clip_text": (CLIP_TEXT, random_texts(34, CLIP_TEXT, length=7), "pooler"),
    "clip_text_old": (
        OLD_CLIP_TEXT,
        random_texts(35, OLD_CLIP_TEXT, length=7, optional=(POSITIONS,)),
        "pooler",
    ),
    "siglip_vision": (SIGLIP_VISION, random_images(36, 2, 12, 12, 3), "pooler"),
    "siglip_vision_interpolated": (HEADLESS_SIGLIP, random_images(37, 2, 17, 8, 3), "mean"),
    "siglip_text": (SIGLIP_TEXT, random_texts(38, SIGLIP_TEXT, length=7), "pooler"),
    "efficientnet": (EFFICIENTNET, random_images(40, 2, 17, 12, 3), "pooler"),
    "align_vision": (ALIGN_VISION, random_images(42, 2, 18, 13, 1), "pooler"),
    "align_vision_training": (ALIGN_VISION, random_images(43, 3, 16, 16, 1), "mean"),
    "align_vision_block": (ALIGN_VISION_BLOCK, random_images(44, 2, 15, 12, 3), "mean"),
    "convnext": (CONVNEXT, random_images(45, 2, 17, 24, 3), "pooler"),
    "convnext_unusual": (UNUSUAL_CONVNEXT, random_images(46, 2, 13, 12, 1), "pooler"),
    "convnextv2": (CONVNEXT_V2, random_images(47, 2, 12, 17, 3), "mean"),
    "dinov3_convnext": (DINOV3_CONVNEXT, random_images(48, 2, 17, 24, 3), "pooler"),
    "dinov3_convnext_mean": (DINOV3_CONVNEXT, random_images(49, 2, 8, 17, 3), "mean"),
    "modernbert": (MODERNBERT, random_texts(16, MODERNBERT, length=9), "cls"),
    "modernbert_unusual": (
        UNUSUAL_MODERNBERT,
        random_texts(17, UNUSUAL_MODERNBERT, length=9, optional=(POSITIONS,)),
        "mean",
    ),
}

# One of each family of towers: (config, inputs, pooling).
CAMEMBERT = transformers.CamembertConfig(**SMALL_BERT)
ALIGN_TEXT = transformers.AlignTextConfig(**SMALL_BERT)
CHINESE_CLIP_TEXT = transformers.ChineseCLIPTextConfig(**SMALL_BERT)
FAMILIES = {tower[0].model_type: tower for tower in reversed(TOWERS.values())}
FAMILIES |= {
    "camembert": (CAMEMBERT, random_texts(50, CAMEMBERT, length=7), "pooler"),
    "align_text_model": (ALIGN_TEXT, random_texts(51, ALIGN_TEXT, length=7), "pooler"),
    "chinese_clip_text_model": (
        CHINESE_CLIP_TEXT,
        random_texts(52, CHINESE_CLIP_TEXT, length=7),
        "cls",
    ),
}


def vision_text(
    vision: transformers.PreTrainedConfig, text: transformers.PreTrainedConfig
) -> transformers.PreTrainedConfig:
    return transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, text, projection_dim=8, logit_scale_init_value=1.5
    )


def _joined(
    kind: str, vision: transformers.PreTrainedConfig, text: transformers.PreTrainedConfig
) -> transformers.PreTrainedConfig:
    """A CLIPConfig, SiglipConfig ... of two towers."""
    # SigLIP has no projections: its text tower is as wide as its image tower.
    texts = text.to_dict() | ({"projection_size": 8} if kind == "Siglip" else {})
    return getattr(transformers, f"{kind}Config")(
        vision_config=vision.to_dict(), text_config=texts, projection_dim=8
    )


# One of each kind of dual encoder, and one whose image tower has its own names inside.
DUAL_ENCODERS = {
    "vision-text-dual-encoder (vit, bert)": vision_text(VIT, BERT),
    "vision-text-dual-encoder (clip, roberta)": vision_text(CLIP_VISION, ROBERTA),
    "clip": _joined("CLIP", CLIP_VISION, CLIP_TEXT),
    "siglip": _joined("Siglip", SIGLIP_VISION, SIGLIP_TEXT),
    "altclip": _joined("AltCLIP", ALTCLIP_VISION, ALTCLIP_TEXT),
    "chinese_clip": _joined(
        "ChineseCLIP",
        transformers.ChineseCLIPVisionConfig(**ONE_LAYER, image_size=12, patch_size=4),
        CHINESE_CLIP_TEXT,
    ),
    "align": _joined("Align", ALIGN_VISION_BLOCK, ALIGN_TEXT),
}
