"""Writes goldens/: tiny random models as Hugging Face saves them, and what PyTorch computes with them.

    python tests/models/make_goldens.py [name ...]     (with the packages of requirements-oracle.txt)

Without names all are written.
goldens/versions.json records what they were made with. The `oracle` tests use the functions here too,
for models that they draw at random.
"""

import copy
import inspect
import json
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import transformers
from transformers.activations import ACT2FN

GOLDENS = pathlib.Path(__file__).parent / "goldens"
SPECIAL_TOKENS = {"deit": 2, "siglip_vision_model": 0}  # in front of the patches, where not one


def write_tower(
    folder: pathlib.Path,
    config: transformers.PreTrainedConfig,
    inputs: Mapping[str, np.ndarray],
    *,
    pooling: str,
    seed: int,
    train: bool = False,
) -> None:
    """Writes a tower with random weights into `folder`, and beside it

    gradients/: a model of the same shape whose "weights" are the gradients of
        (last_hidden_state * its cotangent).sum() + (pooled * its cotangent).sum();
    after/: only with `train`, the model in train mode, with the statistics that this leaves behind;
    arrays.npz: inputs, outputs, cotangents, the gradient of the pixels. Images are BxHxWxC, and a
        last_hidden_state that is a map of features is a sequence.
    """
    torch.manual_seed(seed)
    # By name: AutoModel does not know the towers of some dual encoders.
    kind = getattr(transformers, type(config).__name__.replace("Config", "Model"))
    optional = inspect.signature(kind.__init__).parameters.keys() & {"add_pooling_layer"}
    config._attn_implementation = "eager"
    model = kind(config, **dict.fromkeys(optional, pooling == "pooler")).train(train)
    _draw_parameters(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # it stops a gradient, and changes no output
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    extra = {}
    if "pixel_values" in tensors:
        tensors["pixel_values"].requires_grad_()
        shape = inputs["pixel_values"].shape[1:3]
        if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            extra = {"interpolate_pos_encoding": shape != _pair(config.image_size)}
    model.save_pretrained(folder)
    special_tokens = SPECIAL_TOKENS.get(config.model_type, 1)
    special_tokens += getattr(config, "num_register_tokens", 0)
    outputs = _run_tower(model, tensors, extra, pooling, special_tokens)
    cotangents = {name: torch.randn_like(value) for name, value in outputs.items()}
    sum((outputs[name] * cotangents[name]).sum() for name in outputs).backward()

    if train:
        model.save_pretrained(folder / "after")
    gradients = copy.deepcopy(model)
    for statistic in _running_statistics(gradients).values():
        statistic.zero_()
    for parameter, own in zip(gradients.parameters(), model.parameters(), strict=True):
        # Of a parameter that no output depends on.
        parameter.data = torch.zeros_like(own) if own.grad is None else own.grad
    gradients.save_pretrained(folder / "gradients")
    arrays = {"pooling": np.array(pooling)}
    arrays |= {f"input.{name}": value for name, value in inputs.items()}
    arrays |= {f"output.{name}": value.detach().numpy() for name, value in outputs.items()}
    arrays |= {f"cotangent.{name}": value.numpy() for name, value in cotangents.items()}
    if "pixel_values" in tensors:
        arrays["gradient.pixel_values"] = tensors["pixel_values"].grad.numpy()
    np.savez(folder / "arrays.npz", **arrays)


def write_dual_encoder(
    folder: pathlib.Path,
    vision: transformers.PreTrainedConfig,
    text: transformers.PreTrainedConfig,
    inputs: Mapping[str, np.ndarray],
    *,
    seed: int,
) -> None:
    """Writes a VisionTextDualEncoder with random weights and arrays.npz with inputs and outputs."""
    torch.manual_seed(seed)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, text, projection_dim=8, logit_scale_init_value=1.5
    )
    model = transformers.VisionTextDualEncoderModel(config).eval()
    _draw_parameters(model)
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    tensors["pixel_values"] = tensors["pixel_values"].permute(0, 3, 1, 2)
    with torch.no_grad():
        result = model(**tensors)
    model.save_pretrained(folder)
    arrays = {f"input.{name}": value for name, value in inputs.items()}
    for name in ("image_embeds", "text_embeds", "logits_per_image"):
        arrays[f"output.{name}"] = result[name].numpy()
    np.savez(folder / "arrays.npz", **arrays)


def _pair(size: int | list[int]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _draw_parameters(model: torch.nn.Module) -> None:
    """Random numbers of a size at which no activation is nearly linear and no bias is zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.normal_(0, 0.25)
            is_norm = "norm" in name.lower() or "_bn." in name
            if is_norm and name.endswith("weight"):
                parameter += 1
        for name, statistic in _running_statistics(model).items():
            if name.endswith("mean"):
                statistic.normal_(0, 0.25)
            else:
                statistic.uniform_(0.5, 2)


def _running_statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Those of batch normalisation."""
    return {name: value for name, value in model.named_buffers() if ".running_" in name}


def _run_tower(
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    extra: Mapping,
    pooling: str,
    special_tokens: int,
) -> dict[str, torch.Tensor]:
    given = dict(tensors)
    if "pixel_values" in given:
        given["pixel_values"] = given["pixel_values"].permute(0, 3, 1, 2)
    result = model(**given, **extra)
    hidden = result.last_hidden_state
    if hidden.ndim == 4:  # BxDxYxX
        hidden, special_tokens = hidden.flatten(2).mT, 0
    if pooling == "pooler":
        pooled = result.pooler_output
    elif pooling == "cls":
        pooled = hidden[:, 0]
    elif "pixel_values" in given:
        pooled = hidden[:, special_tokens:].mean(1)
    else:
        weight = given["attention_mask"][..., None].float()
        pooled = (hidden * weight).sum(1) / weight.sum(1)
    return {"last_hidden_state": hidden, "pooled": pooled}


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
    "modernbert": (MODERNBERT, random_texts(16, MODERNBERT, length=9), "cls"),
    "modernbert_unusual": (
        UNUSUAL_MODERNBERT,
        random_texts(17, UNUSUAL_MODERNBERT, length=9, optional=(POSITIONS,)),
        "mean",
    ),
}

INTERPOLATIONS = {
    "bicubic": {"mode": "bicubic"},
    "bilinear": {"mode": "bilinear"},
    "antialiased_bicubic": {"mode": "bicubic", "antialias": True},
}


def main(wanted: Sequence[str]) -> None:
    for seed, (name, (config, inputs, pooling)) in enumerate(TOWERS.items()):
        if not wanted or name in wanted:
            shutil.rmtree(GOLDENS / name, ignore_errors=True)
            train = name.endswith("_training")
            write_tower(GOLDENS / name, config, inputs, pooling=pooling, seed=seed, train=train)
    if not wanted or "dual_encoder" in wanted:
        inputs = random_images(6, 2, 12, 12, 3) | random_texts(7, BERT, length=7, optional=(TYPES,))
        write_dual_encoder(GOLDENS / "dual_encoder", VIT, BERT, inputs, seed=0)
    write_functions()
    versions = {package.__name__: package.__version__ for package in (torch, transformers)}
    (GOLDENS / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def write_functions() -> None:
    """Writes the values of activations, and of a grid that is interpolated to other sizes."""
    x = torch.linspace(-8, 8, 65)
    names = [name for name in ACT2FN if name not in ("prelu", "xielu")]  # those have parameters
    np.savez(GOLDENS / "activations.npz", x=x, **{name: ACT2FN[name](x).numpy() for name in names})
    grid = torch.randn(1, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    for name, options in INTERPOLATIONS.items():
        resized = {
            f"{size[0]}x{size[1]}": torch.nn.functional.interpolate(grid, size, **options)[0, 0]
            for size in ((5, 7), (8, 7), (3, 16), (1, 2))
        }
        np.savez(GOLDENS / f"{name}.npz", grid=grid[0, 0], **resized)


if __name__ == "__main__":
    main(sys.argv[1:])
