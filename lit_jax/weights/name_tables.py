"""The names of each family's parameters in Hugging Face's files, as tables for names.py."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

# Pairs (regex, replacement), each applied once, in this order.
Renames = tuple[tuple[str, str], ...]


class FusedWeight(NamedTuple):
    """Parameters that a file stores as one tensor, concatenated along their output features.

    `pattern` matches the name that a parameter would have in the file; its single group is the member.
    """

    pattern: str
    replacement: str
    members: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The names in a file of a tower, or of the part that joins two towers.

    Attributes:
        architecture: the torch class with these names.
        in_flax: whether transformers 4 had a Flax class for a dual encoder.
        holds_any_tower: whether a dual encoder's towers are models of their own, with their own names.
        prefix: the prefix of the tower's names in a file that also has a head.
        modules: replacements from our dotted names to those of the file.
        fused: the parameters that the file stores as one tensor.
        aliases: replacements from other spellings in files to those of `modules`.
        pooler: a regex of the names that only pooling='pooler' uses.
        vectors: scalars that the file stores as vectors of one element.
        placeholders: tensors of size 0 that the file format requires when the tower lacks the parameter, as
            (name, name of the tensor whose other dimensions they copy).
        ignore: regexes of names, without prefix, that no tower uses.
        extra_head_names: a regex of a head's names without prefix that a tower has, too.
    """

    architecture: str
    in_flax: bool = False
    holds_any_tower: bool = False
    prefix: str = ""
    modules: Renames = ()
    fused: tuple[FusedWeight, ...] = ()
    aliases: Renames = ()
    pooler: str = r"(?!)"
    vectors: tuple[str, ...] = ()
    placeholders: tuple[tuple[str, str], ...] = ()
    ignore: tuple[str, ...] = ()
    extra_head_names: str = r"(?!)"


# Matches our query, key and value, of which some files use only the first letter.
_QKV = "(q|k|v)(?:uery|ey|alue)"
# The names of save_pretrained(save_original_format=False) in transformers 5.
_PROJ_ALIASES = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)

_VIT = Family(
    architecture="ViTModel",
    prefix="vit.",
    modules=(
        (r"\.attention\.(query|key|value)\.", r".attention.attention.\1."),
        (r"\.attention\.output\.", ".attention.output.dense."),
        (r"\.attention_norm\.", ".layernorm_before."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"\.mlp_norm\.", ".layernorm_after."),
    ),
    aliases=(
        (r"^layers\.", "encoder.layer."),
        *_PROJ_ALIASES,
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
    pooler=r"pooler\.",
    ignore=(r"classifier\.", r"decoder\.", r"embeddings\.mask_token$"),
)

_BEIT_TABLE = "relative_position_bias.relative_position_bias_table"

_BERT = Family(
    architecture="BertModel",
    prefix="bert.",
    modules=(
        (r"\.attention\.(query|key|value)\.", r".attention.self.\1."),
        (r"\.attention\.output\.", ".attention.output.dense."),
        (r"\.attention_norm\.", ".attention.output.LayerNorm."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"\.mlp_norm\.", ".output.LayerNorm."),
    ),
    # Checkpoints that were converted from TensorFlow in 2018 have TensorFlow's names.
    aliases=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    pooler=r"pooler\.",
    ignore=(
        r"cls\.",
        r"classifier\.",
        r"qa_outputs\.",
        # Buffers of old versions, no parameters.
        r"embeddings\.(position|token_type)_ids$",
    ),
)

_ROBERTA = dataclasses.replace(
    _BERT,
    architecture="RobertaModel",
    prefix="roberta.",
    ignore=(*_BERT.ignore, r"lm_head\."),
)

_DINOV2 = Family(
    architecture="Dinov2Model",
    prefix="dinov2.",
    modules=(
        (r"\.attention\.(query|key|value)\.", r".attention.attention.\1."),
        (r"\.attention\.output\.", ".attention.output.dense."),
        (r"\.attention_norm\.", ".norm1."),
        (r"\.attention_scale\.factor$", ".layer_scale1.lambda1"),
        (r"\.mlp\.down\.", ".mlp.weights_out."),
        (r"\.mlp_norm\.", ".norm2."),
        (r"\.mlp_scale\.factor$", ".layer_scale2.lambda1"),
    ),
    fused=(FusedWeight(r"\.mlp\.(gate|up)\.(\w+)$", r".mlp.weights_in.\2", ("gate", "up")),),
    aliases=(
        *_PROJ_ALIASES,
        (r"\.mlp\.(gate|up)_proj\.", r".mlp.\1."),
        (r"\.mlp\.down_proj\.", ".mlp.weights_out."),
    ),
    ignore=(r"classifier\.",),
)

_NO_REGISTERS = (("embeddings.register_tokens", "embeddings.cls_token"),)

_EFFICIENTNET = Family(
    architecture="EfficientNetModel",
    prefix="efficientnet.",
    modules=(
        (r"^encoder\.layer\.", "encoder.blocks."),
        (r"\.expansion\.convolution\.", ".expansion.expand_conv."),
        (r"\.expansion\.batchnorm\.", ".expansion.expand_bn."),
        (r"\.depthwise\.convolution\.", ".depthwise_conv.depthwise_conv."),
        (r"\.depthwise\.batchnorm\.", ".depthwise_conv.depthwise_norm."),
        (r"\.projection\.convolution\.", ".projection.project_conv."),
        (r"\.projection\.batchnorm\.", ".projection.project_bn."),
        (r"\.top\.convolution\.", ".top_conv."),
        (r"\.top\.batchnorm\.", ".top_bn."),
    ),
    ignore=(r"classifier\.", r".*\.num_batches_tracked$"),
)

_CONVNEXT = Family(
    architecture="ConvNextModel",
    prefix="convnext.",
    modules=(
        (r"\.stages_(\d+)\.layer\.", r".stages.\1.layers."),
        (r"\.stages_(\d+)\.downsampling_layer_(\d)\.", r".stages.\1.downsampling_layer.\2."),
        (r"\.projection\.", "."),
        (r"\.layer_scale\.factor$", ".layer_scale_parameter"),
    ),
    pooler=r"layernorm\.",
    ignore=(r"classifier\.", r"hidden_states_norms\."),
)

# The towers of CLIP and SigLIP as transformers 5 saves them. The `prefix` is only in files of transformers 4,
# and of models with a projection, a classifier or the other tower.
_CLIP_VISION = Family(
    architecture="CLIPVisionModel",
    prefix="vision_model.",
    modules=(
        (r"^embeddings\.patch_embedding\.projection\.", "embeddings.patch_embedding."),
        (r"^encoder\.layer\.(\d+)\.attention\.", r"encoder.layers.\1.self_attn."),
        (r"^encoder\.layer\.", "encoder.layers."),
        (rf"\.self_attn\.{_QKV}\.", r".self_attn.\1_proj."),
        (r"\.attention_norm\.", ".layer_norm1."),
        (r"\.mlp_norm\.", ".layer_norm2."),
        (r"\.(self_attn|attention)\.output\.", r".\1.out_proj."),
    ),
    # transformers 5 saves AltCLIP so.
    aliases=((r"^encoder\.layer\.", "encoder.layers."),),
    pooler=r"post_layernorm\.",
    ignore=(
        # The other tower.
        r"(vision|text)_model\.",
        r"(visual|text)_projection\.",
        r"logit_(scale|bias)$",
        r"classifier\.",
        # A buffer of old versions, no parameter.
        r"embeddings\.position_ids$",
    ),
)

_CLIP_TEXT = dataclasses.replace(
    _CLIP_VISION, architecture="CLIPTextModel", prefix="text_model.", pooler=r"(?!)"
)

# `model_type` in config.json -> names of the tower.
FAMILIES: Mapping[str, Family] = {
    "vit": _VIT,
    "deit": dataclasses.replace(
        _VIT,
        architecture="DeiTModel",
        prefix="deit.",
        ignore=(*_VIT.ignore, r"(cls|distillation)_classifier\."),
    ),
    "efficientnet": _EFFICIENTNET,
    "align_vision_model": dataclasses.replace(
        _EFFICIENTNET, architecture="AlignVisionModel", prefix=""
    ),
    "convnext": _CONVNEXT,
    "convnextv2": dataclasses.replace(
        _CONVNEXT, architecture="ConvNextV2Model", prefix="convnextv2."
    ),
    "clip_vision_model": _CLIP_VISION,
    "altclip_vision_model": dataclasses.replace(_CLIP_VISION, architecture="AltCLIPVisionModel"),
    "chinese_clip_vision_model": dataclasses.replace(
        _CLIP_VISION, architecture="ChineseCLIPVisionModel"
    ),
    "siglip_vision_model": dataclasses.replace(
        _CLIP_VISION,
        architecture="SiglipVisionModel",
        fused=(
            FusedWeight(
                r"^head\.attention\.(query|key|value)\.(\w+)$",
                r"head.attention.in_proj_\2",
                ("query", "key", "value"),
            ),
        ),
        pooler=r"head\.",
    ),
    "clip_text_model": _CLIP_TEXT,
    "siglip_text_model": dataclasses.replace(
        _CLIP_TEXT, architecture="SiglipTextModel", pooler=r"head\."
    ),
    "beit": dataclasses.replace(
        _VIT,
        architecture="BeitModel",
        prefix="beit.",
        modules=(
            *_VIT.modules,
            (r"^position_bias_table$", f"encoder.{_BEIT_TABLE}"),
            (r"\.position_bias_table$", f".attention.{_BEIT_TABLE}"),
            (r"\.attention_scale\.factor$", ".lambda_1"),
            (r"\.mlp_scale\.factor$", ".lambda_2"),
        ),
        aliases=(
            *_VIT.aliases,
            (r"^shared_position_bias\.", "encoder.relative_position_bias."),
            (rf"(\d)\.{_BEIT_TABLE}$", rf"\1.attention.attention.{_BEIT_TABLE}"),
        ),
        ignore=(
            # Buffers of old versions.
            r".*\.relative_position_index$",
            r"(classifier|lm_head|decode_head|auxiliary_head|fpn\d?)\.",
        ),
        # The head for masked patches has a norm of the same name.
        extra_head_names=r"layernorm\.",
    ),
    "dinov2": _DINOV2,
    "dinov2_with_registers": dataclasses.replace(
        _DINOV2,
        architecture="Dinov2WithRegistersModel",
        prefix="dinov2_with_registers.",
        placeholders=_NO_REGISTERS,
    ),
    "dinov3_vit": Family(
        architecture="DINOv3ViTModel",
        modules=(
            (r"^embeddings\.patch_embeddings\.projection\.", "embeddings.patch_embeddings."),
            (r"^encoder\.", ""),
            (r"^layernorm\.", "norm."),
            (rf"\.attention\.{_QKV}\.", r".attention.\1_proj."),
            (r"\.attention\.output\.", ".attention.o_proj."),
            (r"\.attention_norm\.", ".norm1."),
            (r"\.attention_scale\.factor$", ".layer_scale1.lambda1"),
            (r"\.mlp\.gate\.", ".mlp.gate_proj."),
            (r"\.mlp\.(fc1|up)\.", ".mlp.up_proj."),
            (r"\.mlp\.(fc2|down)\.", ".mlp.down_proj."),
            (r"\.mlp_norm\.", ".norm2."),
            (r"\.mlp_scale\.factor$", ".layer_scale2.lambda1"),
        ),
        aliases=((r"^model\.layer\.", "layer."),),  # save_original_format=False
        placeholders=_NO_REGISTERS,
    ),
    "dinov3_convnext": Family(
        architecture="DINOv3ConvNextModel",
        modules=(
            (r"^embeddings\.patch_embeddings\.", "stages.0.downsample_layers.0."),
            (r"^embeddings\.layernorm\.", "stages.0.downsample_layers.1."),
            (
                r"^encoder\.stages_(\d+)\.downsampling_layer_(\d)\.",
                r"stages.\1.downsample_layers.\2.",
            ),
            (r"^encoder\.stages_(\d+)\.layer\.", r"stages.\1.layers."),
            (r"\.projection\.", "."),
            (r"\.dwconv\.", ".depthwise_conv."),
            (r"\.pwconv(\d)\.", r".pointwise_conv\1."),
            (r"\.layer_scale\.factor$", ".gamma"),
            (r"(^|\.)layernorm\.", r"\1layer_norm."),
        ),
        aliases=((r"^model\.stages\.", "stages."),),  # save_original_format=False
    ),
    "bert": _BERT,
    "roberta": _ROBERTA,
    # Both also have the prefix of RoBERTa.
    "xlm-roberta": dataclasses.replace(_ROBERTA, architecture="XLMRobertaModel"),
    "camembert": dataclasses.replace(_ROBERTA, architecture="CamembertModel"),
    "distilbert": Family(
        architecture="DistilBertModel",
        prefix="distilbert.",
        modules=(
            (r"^encoder\.", "transformer."),
            (rf"\.attention\.{_QKV}\.", r".attention.\1_lin."),
            (r"\.attention\.output\.", ".attention.out_lin."),
            (r"\.attention_norm\.", ".sa_layer_norm."),
            (r"\.mlp\.fc1\.", ".ffn.lin1."),
            (r"\.mlp\.fc2\.", ".ffn.lin2."),
            (r"\.mlp_norm\.", ".output_layer_norm."),
        ),
        ignore=(
            *_BERT.ignore,
            r"vocab_(transform|layer_norm|projector)\.",
            r"pre_classifier\.",
        ),
    ),
    "mpnet": Family(
        architecture="MPNetModel",
        prefix="mpnet.",
        modules=(
            (r"^relative_attention_bias\.", "encoder.relative_attention_bias."),
            (rf"\.attention\.{_QKV}\.", r".attention.attn.\1."),
            (r"\.attention\.output\.", ".attention.attn.o."),
            (r"\.attention_norm\.", ".attention.LayerNorm."),
            (r"\.mlp\.fc1\.", ".intermediate.dense."),
            (r"\.mlp\.fc2\.", ".output.dense."),
            (r"\.mlp_norm\.", ".output.LayerNorm."),
        ),
        pooler=_BERT.pooler,
        ignore=_ROBERTA.ignore,
    ),
    "modernbert": Family(
        architecture="ModernBertModel",
        prefix="model.",
        modules=(
            (r"^(encoder\.)?layer\.", "layers."),
            (r"\.attention\.output\.", ".attn.Wo."),
            (r"\.attention_norm\.", ".attn_norm."),
            (r"\.mlp\.down\.", ".mlp.Wo."),
        ),
        fused=(
            FusedWeight(
                r"\.attention\.(query|key|value)\.", ".attn.Wqkv.", ("query", "key", "value")
            ),
            FusedWeight(r"\.mlp\.(gate|up)\.", ".mlp.Wi.", ("gate", "up")),
        ),
        ignore=(r"head\.", r"decoder\.", r"classifier\."),
    ),
    "align_text_model": dataclasses.replace(_BERT, architecture="AlignTextModel", prefix=""),
    "chinese_clip_text_model": dataclasses.replace(
        _BERT, architecture="ChineseCLIPTextModel", prefix=""
    ),
    "altclip_text_model": Family(
        architecture="AltCLIPTextModel",
        # For a text tower alone transformers 5 reads only 'layers', and transformers 4 only 'layer'.
        modules=(
            *_BERT.modules,
            (r"^embeddings\.", "roberta.embeddings."),
            (r"^encoder\.layer\.", "roberta.encoder.layers."),
        ),
        aliases=((r"^roberta\.encoder\.layer\.", "roberta.encoder.layers."),),
        ignore=(r"roberta\.pooler\.", r"roberta\.embeddings\.(position|token_type)_ids$"),
    ),
}

# `model_type` of a dual encoder -> names of the part that joins its towers.
SYSTEMS: Mapping[str, Family] = {
    "vision-text-dual-encoder": Family(
        architecture="VisionTextDualEncoderModel", in_flax=True, holds_any_tower=True
    ),
    "lit_jax": Family(architecture="DualEncoder", holds_any_tower=True),
    "clip": Family(architecture="CLIPModel", in_flax=True),
    "altclip": Family(
        architecture="AltCLIPModel",
        # Within a dual encoder both transformers 4 and 5 read 'layer'.
        modules=(
            (r"^text_model\.roberta\.encoder\.layers\.", "text_model.roberta.encoder.layer."),
        ),
    ),
    "chinese_clip": Family(architecture="ChineseCLIPModel"),
    "siglip": Family(architecture="SiglipModel", vectors=("logit_scale", "logit_bias")),
    "align": Family(architecture="AlignModel"),
}
