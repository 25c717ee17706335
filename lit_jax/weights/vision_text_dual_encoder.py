"""Convert other models into a VisionTextDualEncoder that computes the same function, and back.

transformers' VisionTextDualEncoder always computes projection(tanh(pooler(first token))), with no bias in the
projection. lit_jax also trains towers without a pooler, and other projections. If weights exist that compute
the same function, `to_vision_text_dual_encoder` finds them and `from_vision_text_dual_encoder` undoes this;
otherwise `why_not_exportable` returns the reason.

A tower without a pooler (pooling 'cls') gets the pooler z * 2^-14 and a projection that is 2^14 times
as large. tanh(x) = x (1 - x^2 / 3 + ...), so for |z| < 8 the tanh between them is nothing that float32
could resolve, and a power of two loses no bit. A smaller factor would not survive float16, where
2^-14 is the smallest number of full precision. ('pooler_act' 'linear' would be simpler, but only
transformers' PyTorch ViT has it.)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import jax
import numpy as np

from lit_jax.config import Pooling
from lit_jax.errors import UserError
from lit_jax.models.dual_encoder import DualEncoderModule, Projection
from lit_jax.models.tower import Tower

# Nested dicts, whose leaves are arrays.
Params = dict[str, Any]
_SCALE = np.float32(2.0**-14)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings under 'lit_jax' in config.json; the defaults are those of a VisionTextDualEncoder."""

    image_pooling: Pooling = "pooler"
    image_projection: Projection = "linear"
    text_pooling: Pooling = "pooler"
    text_projection: Projection = "linear"

    @classmethod
    def from_module(cls, module: DualEncoderModule) -> "Settings":
        """Return the settings of a module."""
        return cls(
            image_pooling=_pooling(module.vision_model),
            image_projection=module.image_projection,
            text_pooling=_pooling(module.text_model),
            text_projection=module.text_projection,
        )

    @classmethod
    def from_config(cls, hf_config: Mapping[str, Any]) -> "Settings":
        """Return the settings in a config.json. Raise UserError if this version does not know them."""
        given = hf_config.get("lit_jax", {})
        hints = get_type_hints(cls)
        # A later version may have settings that change the function, so an unknown one is an error.
        if not isinstance(given, Mapping) or not all(
            name in hints and value in get_args(hints[name]) for name, value in given.items()
        ):
            raise UserError(
                "The model's config.json was written by another version of lit_jax, with settings that this "
                f"version does not have ({given}); load it with that version."
            )
        return cls(**given)


# model_type -> the kind of pooler, for each tower that VisionTextDualEncoder accepts.
_POOLERS: Mapping[str, Literal["head on the first token", "first token", "own"]] = {
    **dict.fromkeys(
        ("vit", "deit", "bert", "roberta", "xlm-roberta", "camembert", "mpnet"),
        "head on the first token",
    ),
    **dict.fromkeys(("dinov2", "dinov2_with_registers", "dinov3_vit"), "first token"),
    **dict.fromkeys(
        (
            *("beit", "clip_vision_model", "chinese_clip_vision_model", "siglip_vision_model"),
            "clip_text_model",
        ),
        "own",
    ),
}


def _pooling(tower: Tower) -> Pooling:
    # The `pooler_output` of such a tower is its first token, so CLS pooling needs no conversion.
    is_pooler = tower.pooling == "cls" and _POOLERS.get(tower.config.model_type) == "first token"
    return "pooler" if is_pooler else tower.pooling


def why_not_exportable(module: DualEncoderModule) -> str | None:
    """Return why VisionTextDualEncoder cannot compute the same function, with a remedy, or None."""
    settings = Settings.from_module(module)
    for side, tower in (("image", module.vision_model), ("text", module.text_model)):
        key, kind = f"config.model.{side}", tower.config.model_type
        pooling = getattr(settings, f"{side}_pooling")
        has_bias = getattr(settings, f"{side}_projection") == "linear_bias"
        poolers = _POOLERS.get(kind)
        if poolers is None:
            return f"it takes no {side} tower of type {kind}"
        starts_at_0 = getattr(tower.config, "position_ids", None) == "arange"
        if starts_at_0 and tower.config.padding_id is None:
            return f"it counts the positions of a {kind} from its pad_token_id on, and that is None"
        if pooling == "mean":
            return f"it has no mean pooling; train with {key}.pooling='cls' or 'pooler'"
        if pooling == "cls" and poolers == "own":
            return f"it always uses the pooler of a {kind}; train with {key}.pooling='pooler'"
        if pooling == "pooler" and has_bias:
            return f"it has no bias in its projections; train with {key}.projection='linear'"
        width = tower.config.block.width
        # transformers' projection is as wide as the tower, even if the pooler is not.
        pooled_width = getattr(tower.config, "pooler_output_size", None) or width
        if pooling == "pooler" and pooled_width != width:
            return (
                f"it needs a pooler as wide as its tower, and that of the {side} tower is {pooled_width} "
                f"wide, not {width}; train with {key}.pooling='cls'"
            )
        if pooling == "cls" and has_bias and width < module.projection_dim:
            return (
                "it can hold the bias of a projection only where config.model.projection_dim is at most "
                f"the width of the tower, {width}; train with {key}.projection='linear'"
            )
    return None


class _Side(NamedTuple):
    """The names of a side in config keys, and of its tower and projection in parameters."""

    name: str
    tower: str
    head: str


_SIDES = (
    _Side("image", "vision_model", "visual_projection"),
    _Side("text", "text_model", "text_projection"),
)


def to_vision_text_dual_encoder(params: Params, settings: Settings, projection_dim: int) -> Params:
    """Return the parameters of the VisionTextDualEncoder that computes the same embeddings.

    `params` and the result are NumPy trees of an exportable model. In the result both towers have poolers,
    and both projections are without bias.
    """
    result = {"logit_scale": params["logit_scale"]}
    for side in _SIDES:
        tower, head = dict(params[side.tower]), params.get(side.head)
        pooling = getattr(settings, f"{side.name}_pooling")
        if pooling == "cls":
            tower["pooler"], kernel = _pooler_and_kernel(head, projection_dim)
        else:
            kernel = _identity(projection_dim) if head is None else head["kernel"]
        result |= {side.tower: tower, side.head: {"kernel": kernel}}
    return result


def from_vision_text_dual_encoder(
    params: Params, settings: Settings, projection_dim: int
) -> Params | None:
    """Return the parameters from which `to_vision_text_dual_encoder` made these, bit for bit.

    Return None if it cannot have made them, because the model was trained further after the export.
    """
    result = {"logit_scale": params["logit_scale"]}
    for side in _SIDES:
        tower, head = dict(params[side.tower]), params[side.head]
        if getattr(settings, f"{side.name}_pooling") == "cls":
            head = _head(
                getattr(settings, f"{side.name}_projection"), tower.pop("pooler"), head["kernel"]
            )
        elif getattr(settings, f"{side.name}_projection") == "none":
            head = None
        result |= {side.tower: tower} | ({} if head is None else {side.head: head})
    # Converting the result again proves that nothing was lost.
    if not jax.tree.all(
        jax.tree.map(
            np.array_equal, to_vision_text_dual_encoder(result, settings, projection_dim), params
        )
    ):
        return None
    return result


def _pooler_and_kernel(head: Params | None, projection_dim: int) -> tuple[Params, np.ndarray]:
    """Return a pooler and a projection without bias that together compute `head` of a CLS token."""
    if head and "bias" in head:
        # The pooler, which has a bias, projects; the rest of its width is zero, and the projection drops it.
        width = head["kernel"].shape[0]
        dense = {
            "kernel": _padded(head["kernel"], (width, width)),
            "bias": _padded(head["bias"], (width,)),
        }
        kernel = _identity(width)[:, :projection_dim]
    else:
        kernel = _identity(projection_dim) if head is None else head["kernel"]
        width = kernel.shape[0]
        dense = {"kernel": _identity(width), "bias": np.zeros(width, np.float32)}
    return {"dense": {name: array * _SCALE for name, array in dense.items()}}, kernel / _SCALE


def _head(projection: Projection, pooler: Params, kernel: np.ndarray) -> Params | None:
    """Return the inverse of `_pooler_and_kernel`."""
    if projection == "none":
        return None
    if projection == "linear":
        return {"kernel": kernel * _SCALE}
    return {
        "kernel": pooler["dense"]["kernel"][:, : kernel.shape[1]] / _SCALE,
        "bias": pooler["dense"]["bias"][: kernel.shape[1]] / _SCALE,
    }


def _identity(width: int) -> np.ndarray:
    return np.eye(width, dtype=np.float32)


def _padded(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.pad(array, [(0, n - m) for n, m in zip(shape, array.shape, strict=True)])
