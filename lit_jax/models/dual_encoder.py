"""Two towers, their projections and the logit scale: VisionTextDualEncoder, CLIP, SigLIP, ALIGN, AltCLIP.

Dims: B batch, HxW pixels, C channels, L tokens, P width of a tower's features, E width of an embedding.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt8

from lit_jax.config import ModelConfig, Pooling, Remat, Side
from lit_jax.distributed.mesh import shard_batch
from lit_jax.errors import UserError
from lit_jax.models.chunks import in_chunks
from lit_jax.models.families import TEXT, VISION, build_tower
from lit_jax.models.layers import Dense
from lit_jax.models.normalization import Normalization
from lit_jax.models.tower import Tower, TowerOutput

Images = Float[Array, "B H W C"] | UInt8[Array, "B H W C"]
Projection = Literal["none", "linear", "linear_bias"]
# The names of the towers in keys such as vision_model and vision_config.
TOWERS: Mapping[Side, str] = {"image": "vision", "text": "text"}


def tower_name(side: Side) -> str:
    """Return the tower's key in the tree of parameters."""
    return f"{TOWERS[side]}_model"


# The inputs of a text tower in a batch, in the order of its arguments.
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")

# The keys under which a batch may have features, float BxP, instead of a tower's inputs. A locked tower
# computes its features only once.
FEATURES: Mapping[Side, str] = {"image": "image_features", "text": "text_features"}


class DualEncoderOutput(NamedTuple):
    """The embeddings of a batch of pairs, and the parameters of its logits.

    The logits are exp(logit_scale) * image_embeds @ text_embeds.T + (logit_bias or 0).

    Attributes:
        image_embeds: float32, each row of length 1.
        text_embeds: float32, each row of length 1.
        logit_scale: the logarithm of the scale, float32.
        logit_bias: float32; None for a model without a bias.
    """

    image_embeds: Float[Array, "B E"]
    text_embeds: Float[Array, "B E"]
    logit_scale: Float[Array, ""]
    logit_bias: Float[Array, ""] | None

    @property
    def metrics(self) -> dict[str, Array]:
        """The metrics of a training step besides the loss; 'logit_scale' is the scale, not its logarithm."""
        return {"logit_scale": jnp.exp(self.logit_scale)}


class DualEncoderModule(nn.Module):
    """An image tower and a text tower that embed into one space.

    The towers compute in their own dtype. The projections compute in float32: they cost next to nothing, and
    rounding an embedding to bfloat16 would show in the logits.

    Attributes:
        text_first_token: whether the features of a text are its first token instead of the tower's pooled
            output. ALIGN's text tower has a pooler that ALIGN does not use.
        logit_scale_init: the initial logarithm of the scale.
        temperature_init: if a number, the parameter `temperature` replaces `logit_scale`, as in ALIGN.
        logit_bias_init: if a number, there is a parameter `logit_bias`, as in SigLIP.
        normalization: applied to images given as bytes, uint8. Images given as floats come normalised.
    """

    vision_model: Tower
    text_model: Tower
    projection_dim: int
    image_projection: Projection = "linear"
    text_projection: Projection = "linear"
    text_first_token: bool = False
    logit_scale_init: float = 2.6592
    temperature_init: float | None = None
    logit_bias_init: float | None = None
    normalization: Normalization | None = None

    def setup(self):
        # `setup` makes the parameters, because there are several entry points: `__call__`, `encode_image`,
        # `encode_text`.
        self.image_head = self._make_head(self.image_projection, "visual_projection")
        self.text_head = self._make_head(self.text_projection, "text_projection")
        constant = nn.initializers.constant
        if self.temperature_init is None:
            name, first = "logit_scale", self.logit_scale_init
        else:
            name, first = "temperature", self.temperature_init
        self.scale = {name: self.param(name, constant(first), ())}
        if self.logit_bias_init is not None:
            self.bias = self.param("logit_bias", constant(self.logit_bias_init), ())

    @property
    def towers(self) -> dict[str, Tower]:
        """The towers by their names in the tree of parameters."""
        return {"vision_model": self.vision_model, "text_model": self.text_model}

    def with_remat(self, remat: Remat) -> "DualEncoderModule":
        """Return the module with towers that recompute what `remat` says; see `layers.rematerialized`."""
        image, text = (tower.clone(remat=remat) for tower in self.towers.values())
        return self.clone(vision_model=image, text_model=text)

    def features_only(self) -> "DualEncoderModule":
        """Return the module with towers that compute only the pooled output; see `tower.Tower.all_tokens`."""
        image, text = (tower.clone(all_tokens=False) for tower in self.towers.values())
        return self.clone(vision_model=image, text_model=text)

    def with_cuts(self, cuts: Mapping[str, tuple[str, ...]]) -> "DualEncoderModule":
        """Return the module with towers whose stacks are cut as `cuts`, by tower name, says."""
        image, text = (tower.clone(cuts=cuts.get(name, ())) for name, tower in self.towers.items())
        return self.clone(vision_model=image, text_model=text)

    def with_dtype(self, dtype: Any) -> "DualEncoderModule":
        """Return the module with towers that compute in `dtype`."""
        # jnp.dtype makes 'bfloat16' and jnp.bfloat16 equal, and equal modules share compiled programs.
        image, text = (tower.clone(dtype=jnp.dtype(dtype)) for tower in self.towers.values())
        return self.clone(vision_model=image, text_model=text)

    @property
    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and dtypes of the smallest batch, to initialise with."""
        # The shapes of parameters do not depend on the number of rows or tokens.
        tokens = self.text_model.example_input
        return {
            "pixel_values": self.vision_model.example_input,
            "input_ids": tokens,
            "attention_mask": tokens,
        }

    def __call__(
        self,
        batch: Mapping[str, Array],
        *,
        deterministic_image: bool = True,
        deterministic_text: bool = True,
    ) -> DualEncoderOutput:
        """Embed the pairs of a batch.

        Args:
            batch: 'pixel_values' uint8 or float32 BxHxWxC, 'input_ids' and 'attention_mask' int32 BxL,
                optionally 'token_type_ids' and 'position_ids' int32 BxL. Features of a side (`FEATURES`) may
                replace its inputs; the tower of that side is then not called.
            deterministic_image: whether the image tower computes without dropout. If not, the rng 'dropout'
                is needed.
            deterministic_text: the same for the text tower.
        """
        image_BxP, text_BxP = (batch.get(name) for name in FEATURES.values())
        if image_BxP is None:
            image_BxP = self.image_features(
                batch["pixel_values"], deterministic=deterministic_image
            )
        if text_BxP is None:
            texts = {name: batch[name] for name in TEXT_INPUTS if name in batch}
            text_BxP = self.text_features(**texts, deterministic=deterministic_text)
        # The checkpoint policy of gradcache.py saves the features by these names, so that a locked tower does
        # not run again in the backward pass.
        image_BxP = checkpoint_name(image_BxP, FEATURES["image"])
        text_BxP = checkpoint_name(text_BxP, FEATURES["text"])
        return DualEncoderOutput(
            normalize(self.project_image(image_BxP)),
            normalize(self.project_text(text_BxP)),
            *self.logit_parameters(),
        )

    def image_features(
        self, pixel_values: Images, *, deterministic: bool = True
    ) -> Float[Array, "B P"]:
        """Return the pooled image features, before the projection, in the tower's dtype."""
        normalization = None
        if pixel_values.dtype == jnp.uint8:
            if self.normalization is None:
                raise ValueError("Images given as bytes need a normalization.")
            normalization = self.normalization

        def pooled(tower: Tower, pixels: Images) -> Float[Array, "B P"]:
            pixels = pixels if normalization is None else normalization(pixels)
            return tower(pixels, deterministic=deterministic).pooled

        # A tower that trains is not deterministic. Chunks would gain it nothing.
        if deterministic:
            return in_chunks(pooled, self.vision_model, pixel_values)
        return pooled(self.vision_model, pixel_values)

    def text_features(
        self,
        input_ids: Int[Array, "B L"],
        attention_mask: Int[Array, "B L"] | None = None,
        token_type_ids: Int[Array, "B L"] | None = None,
        position_ids: Int[Array, "B L"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B P"]:
        """Return the pooled text features, before the projection, in the tower's dtype."""
        output = self.text_model(
            input_ids, attention_mask, token_type_ids, position_ids, deterministic=deterministic
        )
        return self.text_features_from(output)

    def text_features_from(self, output: TowerOutput) -> Float[Array, "B P"]:
        """Return the features of a text, BxP, from the output of the text tower."""
        return output.last_hidden_state[:, 0] if self.text_first_token else output.pooled

    def encode_image(
        self, pixel_values: Images, *, deterministic: bool = True
    ) -> Float[Array, "B E"]:
        """Return the embeddings of images, float32: projected, but not scaled to length 1."""
        return self.project_image(self.image_features(pixel_values, deterministic=deterministic))

    def encode_text(
        self, input_ids: Int[Array, "B L"], *texts: Array | None, deterministic: bool = True
    ) -> Float[Array, "B E"]:
        """Return the embeddings of texts, float32: projected, but not scaled to length 1."""
        return self.project_text(self.text_features(input_ids, *texts, deterministic=deterministic))

    def project_image(self, pooled_BxP: Float[Array, "B P"]) -> Float[Array, "B E"]:
        """Return the embeddings of image features, float32, not scaled to length 1."""
        return self._project(pooled_BxP, self.image_head, "image")

    def project_text(self, pooled_BxP: Float[Array, "B P"]) -> Float[Array, "B E"]:
        """Return the embeddings of text features, float32, not scaled to length 1."""
        return self._project(pooled_BxP, self.text_head, "text")

    def logit_parameters(self) -> tuple[Float[Array, ""], Float[Array, ""] | None]:
        """Return logit_scale, the logarithm of the scale, and logit_bias, both float32."""
        bias = None if self.logit_bias_init is None else jnp.asarray(self.bias, jnp.float32)
        return logit_scale(self.scale), bias

    def _make_head(self, kind: Projection, name: str) -> Dense | None:
        if kind == "none":
            return None
        # Hugging Face's FlaxVisionTextDualEncoderModel has the same initialisation.
        init, bias = nn.initializers.normal(0.02), kind == "linear_bias"
        return Dense(self.projection_dim, init, jnp.float32, bias, name=name)

    def _project(
        self, pooled_BxP: Float[Array, "B P"], head: Dense | None, side: Side
    ) -> Float[Array, "B E"]:
        # The tower may compute in bfloat16; see the docstring of the class.
        embeds_BxE = pooled_BxP.astype(jnp.float32)
        if head is not None:
            embeds_BxE = head(embeds_BxE)
        elif pooled_BxP.shape[1] != self.projection_dim:
            raise UserError(
                f"config.model.{side}.projection is 'none', but the tower is {pooled_BxP.shape[1]} wide and "
                f"config.model.projection_dim is {self.projection_dim}; make the two equal, or set the "
                "projection to 'linear'."
            )
        return shard_batch(embeds_BxE)


def logit_scale(params: Mapping[str, Any]) -> Float[Array, ""]:
    """Return the logarithm of the logits' scale, float32, from the parameters of a dual encoder."""
    if "logit_scale" in params:
        return jnp.asarray(params["logit_scale"], jnp.float32)
    # ALIGN divides the logits by a temperature: the scale is its inverse.
    return -jnp.log(jnp.asarray(params["temperature"], jnp.float32))


def limit_logit_scale(params: Mapping[str, Any], maximum: float | None) -> dict[str, Any]:
    """Return the parameters of a dual encoder with the logits' scale limited to `maximum`; None: no limit."""
    limits = (
        {}
        if maximum is None
        else {
            "logit_scale": lambda log_scale: jnp.minimum(log_scale, math.log(maximum)),
            # The temperature is the inverse of the scale, so its limit is from below.
            "temperature": lambda temperature: jnp.maximum(temperature, 1 / maximum),
        }
    )
    return {name: limits.get(name, lambda leaf: leaf)(leaf) for name, leaf in params.items()}


def normalize(embeds_BxE: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Scale every row to length 1; a row of zeros stays zero and has a finite gradient."""
    squared_Bx1 = jnp.square(embeds_BxE).sum(-1, keepdims=True)
    # The gradient of rsqrt has the factor floor ** -1.5, which overflows float32 for a floor of 1e-26.
    return embeds_BxE * jax.lax.rsqrt(jnp.maximum(squared_Bx1, 1e-24))


def check_side(side: Side, hf: Mapping[str, Any], what: str) -> None:
    """Raise UserError, which names `what`, if a config.json is not that of a tower for this side."""
    families = VISION if side == "image" else TEXT
    if hf.get("model_type") not in families:
        raise UserError(
            f"{what} is of model_type {hf.get('model_type')!r}; choose one of lit_jax's {side} towers: "
            f"{', '.join(families)}."
        )


def build_dual_encoder(
    vision_hf: Mapping[str, Any], text_hf: Mapping[str, Any], config: ModelConfig
) -> DualEncoderModule:
    """Return the dual encoder of two towers, given by their config.json after `overrides` are applied.

    Raises UserError if a tower is not of a family for its side.
    """
    check_side("image", vision_hf, "config.model.image.model")
    check_side("text", text_hf, "config.model.text.model")
    return DualEncoderModule(
        build_tower(vision_hf, pooling=config.image.pooling, dtype=config.dtype),
        build_tower(text_hf, pooling=config.text.pooling, dtype=config.dtype),
        config.projection_dim,
        image_projection=config.image.projection,
        text_projection=config.text.projection,
        logit_scale_init=config.logit_scale_init,
        logit_bias_init=config.logit_bias_init,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """The properties that all dual encoders of one `model_type` share and their config.json does not say."""

    image_projection: Projection = "linear"
    text_projection: Projection = "linear"
    text_pooling: Pooling = "pooler"
    text_first_token: bool = False
    has_temperature: bool = False
    has_logit_bias: bool = False
    loss: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = 0.0


# By the `model_type` of config.json.
SYSTEMS: Mapping[str, System] = {
    "vision-text-dual-encoder": System(),
    # This type is a VisionTextDualEncoder with poolings or towers that transformers does not have.
    "lit_jax": System(),
    "clip": System(),
    "altclip": System(),
    # Chinese CLIP projects the first token of its text tower, which has no pooler.
    "chinese_clip": System(text_pooling="cls"),
    "siglip": System(
        image_projection="none", text_projection="none", has_logit_bias=True, loss="sigmoid"
    ),
    "align": System(
        image_projection="none",
        text_projection="linear_bias",
        text_first_token=True,
        has_temperature=True,
        label_smoothing=0.1,
    ),
}


def build_system(hf_config: Mapping[str, Any], *, dtype: Any) -> DualEncoderModule:
    """Return the dual encoder that `hf_config`, the content of a config.json, describes.

    Raises UserError if `model_type` is not a dual encoder or a tower is not of a family for its side.
    """
    if hf_config["model_type"] not in SYSTEMS:
        raise UserError(
            f"A model of type {hf_config['model_type']} is not a dual encoder; lit_jax has "
            f"{', '.join(SYSTEMS)}."
        )
    system = SYSTEMS[hf_config["model_type"]]
    # `read_fields` checks the fields of the towers, but not those of the whole model.
    if (width := hf_config.get("projection_dim")) is not None and width < 1:
        raise UserError(f"projection_dim is {width}; it must be at least 1.")
    vision, text = hf_config["vision_config"], hf_config["text_config"]
    check_side("image", vision, "The vision_config of the model's config.json")
    check_side("text", text, "The text_config of the model's config.json")
    return DualEncoderModule(
        build_tower(vision, pooling="pooler", dtype=dtype),
        build_tower(text, pooling=system.text_pooling, dtype=dtype),
        # Without projections, an embedding is as wide as the image tower.
        hf_config.get("projection_dim") or vision["hidden_size"],
        image_projection=system.image_projection,
        text_projection=system.text_projection,
        text_first_token=system.text_first_token,
        # SigLIP's config.json has no initial scale. Its weights bring the scale and the bias.
        logit_scale_init=hf_config.get("logit_scale_init_value", 0.0),
        temperature_init=hf_config["temperature_init_value"] if system.has_temperature else None,
        logit_bias_init=0.0 if system.has_logit_bias else None,
    )
