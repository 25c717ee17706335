"""The tower families of lit_jax, by the `model_type` of their config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lit_jax.config import Pooling
from lit_jax.errors import UserError
from lit_jax.models.beit import Beit, BeitConfig
from lit_jax.models.bert import (
    AlignTextConfig,
    AltCLIPText,
    AltCLIPTextConfig,
    Bert,
    BertConfig,
    CamembertConfig,
    ChineseCLIPTextConfig,
    RobertaConfig,
    XLMRobertaConfig,
)
from lit_jax.models.clip import (
    AltCLIPVisionConfig,
    ChineseCLIPVisionConfig,
    CLIPText,
    CLIPTextConfig,
    CLIPVision,
    CLIPVisionConfig,
)
from lit_jax.models.convnext import (
    ConvNext,
    ConvNextConfig,
    ConvNextV2Config,
    Dinov3ConvNext,
    Dinov3ConvNextConfig,
)
from lit_jax.models.dinov2 import Dinov2, Dinov2Config, Dinov2WithRegistersConfig
from lit_jax.models.dinov3 import Dinov3, Dinov3Config
from lit_jax.models.distilbert import DistilBert, DistilBertConfig
from lit_jax.models.efficientnet import AlignVisionConfig, EfficientNet, EfficientNetConfig
from lit_jax.models.fields import Named, check_sizes, in_config_json, read_fields
from lit_jax.models.modernbert import ModernBert, ModernBertConfig
from lit_jax.models.mpnet import MPNet, MPNetConfig
from lit_jax.models.siglip import SiglipText, SiglipTextConfig, SiglipVision, SiglipVisionConfig
from lit_jax.models.tower import Tower
from lit_jax.models.vit import DeiTConfig, ViT, ViTConfig

# model_type -> (config class, module class)
Families = Mapping[str, tuple[type[Any], type[Tower]]]
VISION: Families = {
    "vit": (ViTConfig, ViT),
    # DeiT differs from ViT in its embeddings alone, which its config describes.
    "deit": (DeiTConfig, ViT),
    "beit": (BeitConfig, Beit),
    "dinov2": (Dinov2Config, Dinov2),
    "dinov2_with_registers": (Dinov2WithRegistersConfig, Dinov2),
    "dinov3_vit": (Dinov3Config, Dinov3),
    "dinov3_convnext": (Dinov3ConvNextConfig, Dinov3ConvNext),
    "efficientnet": (EfficientNetConfig, EfficientNet),
    "align_vision_model": (AlignVisionConfig, EfficientNet),
    "convnext": (ConvNextConfig, ConvNext),
    "convnextv2": (ConvNextV2Config, ConvNext),
    "clip_vision_model": (CLIPVisionConfig, CLIPVision),
    "altclip_vision_model": (AltCLIPVisionConfig, CLIPVision),
    "chinese_clip_vision_model": (ChineseCLIPVisionConfig, CLIPVision),
    "siglip_vision_model": (SiglipVisionConfig, SiglipVision),
}
TEXT: Families = {
    "bert": (BertConfig, Bert),
    "roberta": (RobertaConfig, Bert),
    "xlm-roberta": (XLMRobertaConfig, Bert),
    "camembert": (CamembertConfig, Bert),
    "distilbert": (DistilBertConfig, DistilBert),
    "mpnet": (MPNetConfig, MPNet),
    "modernbert": (ModernBertConfig, ModernBert),
    "align_text_model": (AlignTextConfig, Bert),
    "chinese_clip_text_model": (ChineseCLIPTextConfig, Bert),
    "altclip_text_model": (AltCLIPTextConfig, AltCLIPText),
    "clip_text_model": (CLIPTextConfig, CLIPText),
    "siglip_text_model": (SiglipTextConfig, SiglipText),
}

# Options of config.json that change the numbers and that no tower here implements, each with the only value
# that is accepted.
_UNUSED_VALUE = {"add_cross_attention": False, "position_embedding_type": "absolute"}


def tower_config(hf: Mapping[str, Any], named: Named = in_config_json) -> Any:
    """Return the config of the tower that `hf`, the content of a config.json, describes.

    Raises UserError for an unknown `model_type`, for a value that a field cannot have, and for an option
    that changes the numbers and is not implemented.

    Args:
        named: returns the name of a field in error messages.
    """
    config_class, _ = _family(hf)
    # An ignored option would give wrong numbers without an error.
    for option, unused in _UNUSED_VALUE.items():
        if hf.get(option, unused) != unused:
            raise UserError(
                f"{named(option)} is {hf[option]!r}, which lit_jax does not implement; choose a model with "
                f"{option}={unused!r}."
            )
    # Fields that config.json lacks keep Hugging Face's defaults, as transformers itself reads the file.
    config = config_class(**read_fields(config_class, hf, named))
    check_sizes(config, named)
    return config


def tower_fields(hf: Mapping[str, Any]) -> list[str]:
    """Return the fields of config.json that the family of `hf` knows, including those of lit_jax alone."""
    return [field.name for field in dataclasses.fields(_family(hf)[0])]


def build_tower(hf: Mapping[str, Any], *, pooling: Pooling, dtype: Any) -> Tower:
    """Return the module of the tower that `hf` describes, which computes in `dtype`.

    Raises UserError if the family does not have this pooling, or as `tower_config` does.
    """
    _, module_class = _family(hf)
    if pooling not in module_class.poolings:
        raise UserError(
            f"A model of type {hf['model_type']} has no pooling {pooling!r}; set the tower's pooling to "
            f"{' or '.join(map(repr, module_class.poolings))}."
        )
    # jnp.dtype makes 'bfloat16' and jnp.bfloat16 equal, and equal modules share compiled programs.
    return module_class(tower_config(hf), pooling=pooling, dtype=jnp.dtype(dtype))


def _family(hf: Mapping[str, Any]) -> tuple[type[Any], type[Tower]]:
    families = {**VISION, **TEXT}
    model_type = hf.get("model_type")
    if model_type not in families:
        raise UserError(f"{unknown(model_type)}.")
    return families[model_type]


def unknown(model_type: Any) -> str:
    """Return the error message about an unknown `model_type`, without a full stop."""
    return (
        f"The model's config.json has model_type {model_type!r}, which lit_jax does not have; "
        f"its image towers are {', '.join(VISION)} and its text towers {', '.join(TEXT)}"
    )
