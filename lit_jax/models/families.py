"""The model families lit_jax knows, by the `model_type` of their config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lit_jax.config import Pooling
from lit_jax.errors import UserError
from lit_jax.models.bert import Bert, BertConfig
from lit_jax.models.layers import Tower
from lit_jax.models.vit import DeiTConfig, ViT, ViTConfig

# model_type -> (config class, module class)
Families = Mapping[str, tuple[type[Any], type[Tower]]]
VISION: Families = {
    "vit": (ViTConfig, ViT),
    "deit": (DeiTConfig, ViT),
}
TEXT: Families = {
    "bert": (BertConfig, Bert),
}

# Options of config.json that change the numbers and that no tower here has, with the one value that
# means "not used".
_UNUSED_VALUE = {"add_cross_attention": False, "position_embedding_type": "absolute"}


def tower_config(hf: Mapping[str, Any]) -> Any:
    """The config of the tower that `hf`, the content of a config.json, describes.

    Raises UserError for an unknown `model_type`, and for an option that changes the numbers and
    that we do not have.
    """
    config_class, _ = _family(hf)
    for option, unused in _UNUSED_VALUE.items():
        if hf.get(option, unused) != unused:
            raise UserError(
                f"The model's config.json has {option}={hf[option]!r}, which lit_jax does not "
                f"implement; choose a model with {option}={unused!r}."
            )
    names = [field.name for field in dataclasses.fields(config_class)]
    return config_class(**{name: _hashable(hf[name]) for name in names if name in hf})


def build_tower(hf: Mapping[str, Any], *, pooling: Pooling, dtype: Any) -> Tower:
    """The module of the tower that `hf` describes; `dtype` is that of its computation.

    Raises UserError if that family has no such pooling.
    """
    _, module_class = _family(hf)
    if pooling not in module_class.poolings:
        raise UserError(
            f"A model of type {hf['model_type']} has no pooling {pooling!r}; set the tower's pooling to "
            f"{' or '.join(map(repr, module_class.poolings))}."
        )
    return module_class(tower_config(hf), pooling=pooling, dtype=jnp.dtype(dtype))


def _family(hf: Mapping[str, Any]) -> tuple[type[Any], type[Tower]]:
    families = {**VISION, **TEXT}
    model_type = hf.get("model_type")
    if model_type not in families:
        raise UserError(
            f"The model's config.json has model_type {model_type!r}, which lit_jax does not have; "
            f"its image towers are {', '.join(VISION)} and its text towers {', '.join(TEXT)}."
        )
    return families[model_type]


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # JSON knows no tuples
