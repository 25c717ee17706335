"""Two towers, their projections and the logit scale: transformers' VisionTextDualEncoder.

Dims: B batch, HxW pixels, C channels, L tokens, P pooled width of a tower, E embedding.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lit_jax.config import ModelConfig
from lit_jax.distributed.mesh import shard_batch
from lit_jax.errors import UserError
from lit_jax.models.families import TEXT, VISION, build_tower
from lit_jax.models.layers import Tower

Projection = Literal["none", "linear", "linear_bias"]


class DualEncoderOutput(NamedTuple):
    """The logits are exp(logit_scale) * image_embeds @ text_embeds.T + (logit_bias or 0)."""

    image_embeds: Float[Array, "B E"]  # float32, of length 1
    text_embeds: Float[Array, "B E"]  # float32, of length 1
    logit_scale: Float[Array, ""]  # a logarithm
    logit_bias: Float[Array, ""] | None


class DualEncoder(nn.Module):
    """An image tower and a text tower that embed into one space.

    The towers compute in their own dtype. The projections compute in float32: they cost next to
    nothing, and rounding an embedding to bfloat16 would show in the logits.
    """

    vision_model: Tower
    text_model: Tower
    projection_dim: int
    image_projection: Projection = "linear"
    text_projection: Projection = "linear"
    logit_scale_init: float = 2.6592
    logit_bias_init: float | None = None

    def setup(self):
        self.image_head = self._make_head(self.image_projection, "visual_projection")
        self.text_head = self._make_head(self.text_projection, "text_projection")
        constant = nn.initializers.constant
        self.scale = self.param("logit_scale", constant(self.logit_scale_init), ())
        if self.logit_bias_init is not None:
            self.bias = self.param("logit_bias", constant(self.logit_bias_init), ())

    def __call__(
        self,
        batch: Mapping[str, Array],
        *,
        deterministic_image: bool = True,
        deterministic_text: bool = True,
    ) -> DualEncoderOutput:
        """Embeds the pairs of a batch: 'pixel_values' float32 BxHxWxC, 'input_ids' and
        'attention_mask' int32 BxL, optionally 'token_type_ids' int32 BxL.

        A tower that is not deterministic has dropout, with the rng 'dropout'.
        """
        image_embeds_BxE = self.encode_image(
            batch["pixel_values"], deterministic=deterministic_image
        )
        text_embeds_BxE = self.encode_text(
            batch["input_ids"],
            batch["attention_mask"],
            batch.get("token_type_ids"),
            deterministic=deterministic_text,
        )
        return DualEncoderOutput(
            normalize(image_embeds_BxE),
            normalize(text_embeds_BxE),
            self.scale.astype(jnp.float32),
            None if self.logit_bias_init is None else self.bias.astype(jnp.float32),
        )

    def encode_image(
        self, pixel_values_BxHxWxC: Float[Array, "B H W C"], *, deterministic: bool = True
    ) -> Float[Array, "B E"]:
        """The embeddings of images: projected, not normalised, float32."""
        pooled_BxP = self.vision_model(pixel_values_BxHxWxC, deterministic=deterministic).pooled
        return self._project(pooled_BxP, self.image_head, "image")

    def encode_text(
        self,
        input_ids_BxL: Int[Array, "B L"],
        attention_mask_BxL: Int[Array, "B L"] | None = None,
        token_type_ids_BxL: Int[Array, "B L"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B E"]:
        """The embeddings of texts: projected, not normalised, float32."""
        pooled_BxP = self.text_model(
            input_ids_BxL, attention_mask_BxL, token_type_ids_BxL, deterministic=deterministic
        ).pooled
        return self._project(pooled_BxP, self.text_head, "text")

    def _make_head(self, kind: Projection, name: str) -> nn.Dense | None:
        if kind == "none":
            return None
        return nn.Dense(
            self.projection_dim,
            use_bias=kind == "linear_bias",
            dtype=jnp.float32,
            kernel_init=nn.initializers.normal(0.02),
            name=name,
        )

    def _project(
        self, pooled_BxP: Float[Array, "B P"], head: nn.Dense | None, tower: str
    ) -> Float[Array, "B E"]:
        embeds_BxE = pooled_BxP.astype(jnp.float32)
        if head is not None:
            embeds_BxE = head(embeds_BxE)
        elif pooled_BxP.shape[1] != self.projection_dim:
            raise UserError(
                f"config.model.{tower}.projection is 'none', but the tower is "
                f"{pooled_BxP.shape[1]} wide and config.model.projection_dim is "
                f"{self.projection_dim}; make the two equal or choose the projection 'linear'."
            )
        return shard_batch(embeds_BxE)


def normalize(embeds_BxE: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Scales every row to length 1; a row of zeros stays zero and has a finite gradient."""
    squared_Bx1 = jnp.square(embeds_BxE).sum(-1, keepdims=True)
    # A smaller floor than the square of 1e-12 would overflow in the gradient, floor ** -1.5.
    return embeds_BxE * jax.lax.rsqrt(jnp.maximum(squared_Bx1, 1e-24))


def build_dual_encoder(
    vision_hf: Mapping[str, Any], text_hf: Mapping[str, Any], config: ModelConfig
) -> DualEncoder:
    """The dual encoder of two config.json contents, `config.*.overrides` applied to them before.

    Raises UserError if one is not of a tower family for its side.
    """
    for side, families, hf in (("image", VISION, vision_hf), ("text", TEXT, text_hf)):
        if hf.get("model_type") not in families:
            raise UserError(
                f"config.model.{side}.model is of model_type {hf.get('model_type')!r}; "
                f"as {side} tower lit_jax has {', '.join(families)}."
            )
    return DualEncoder(
        build_tower(vision_hf, pooling=config.image.pooling, dtype=config.dtype),
        build_tower(text_hf, pooling=config.text.pooling, dtype=config.dtype),
        config.projection_dim,
        image_projection=config.image.projection,
        text_projection=config.text.projection,
        logit_scale_init=config.logit_scale_init,
        logit_bias_init=config.logit_bias_init,
    )
