"""The towers of SigLIP (https://arxiv.org/abs/2303.15343).

Numerically they are Hugging Face's SiglipVisionModel and SiglipTextModel. Blocks and embeddings are those of
CLIP, without a class token and without a causal mask.

Dims: B batch, L tokens, D width, P pooled width.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from lit_jax.config import Pooling
from lit_jax.errors import UserError
from lit_jax.models.clip import (
    CLIPBlockFields,
    CLIPImageEmbeddings,
    CLIPText,
    CLIPVision,
    clip_embedding,
)
from lit_jax.models.layers import LayerNorm, broadcast_float32, dense
from lit_jax.models.patches import Size, pair
from lit_jax.models.token_embeddings import TokenEmbeddingConfig
from lit_jax.models.transformer import Attention, Mlp, TokenSelector


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipFields(CLIPBlockFields):
    """The fields that both towers of SigLIP share."""

    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    @property
    def block_init_std(self) -> tuple[tuple[str, float], ...]:
        # The deviations are Glorot's. Hugging Face draws from a uniform distribution, and lit_jax from a
        # normal one with the same variance.
        width, mlp_width = self.hidden_size, self.intermediate_size
        return (
            *((name, width**-0.5) for name in ("query", "key", "value", "output")),
            *((name, (2 / (width + mlp_width)) ** 0.5) for name in ("fc1", "fc2")),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipVisionConfig(SiglipFields):
    """The fields of config.json that change a number; names and defaults are Hugging Face's."""

    model_type: str = "siglip_vision_model"
    # Pixels; a pair is (height, width).
    image_size: Size = 224
    patch_size: Size = 16
    num_channels: int = 3
    vision_use_head: bool = True

    @property
    def patch_init_std(self) -> float:
        """The standard deviation of the kernel of the patch embeddings."""
        height, width = pair(self.patch_size)
        return (height * width * self.num_channels) ** -0.5

    @property
    def position_init_std(self) -> float:
        """The standard deviation of the position embeddings."""
        return self.hidden_size**-0.5

    @property
    def class_init_std(self) -> None:
        """There is no class token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipTextConfig(SiglipFields):
    """The fields of config.json that change a number; names and defaults are Hugging Face's."""

    model_type: str = "siglip_text_model"
    vocab_size: int = 32000
    max_position_embeddings: int = 64
    # None means hidden_size.
    projection_size: int | None = None

    @property
    def embedding(self) -> TokenEmbeddingConfig:
        """The description of the token embeddings."""
        return clip_embedding(self, self.hidden_size**-0.5)


class SiglipVision(CLIPVision):
    """The image tower. Its pooler is an attention of one trained query to the patches."""

    config: SiglipVisionConfig

    # Without a class token there is nothing for the pooling 'cls' to take.
    poolings: ClassVar[tuple[Pooling, ...]] = ("pooler", "mean")

    def embed(self, pixel_values_BxHxWxC: Array, deterministic: bool) -> Float[Array, "B L D"]:
        # A tower without a head is valid with another pooling, so only this combination is an error.
        if self.pooling == "pooler" and not self.config.vision_use_head:
            raise UserError(
                "The model's config.json has vision_use_head=False, so it has no pooler; set the image "
                "tower's pooling (config.model.image.pooling) to 'mean'."
            )
        embeddings = CLIPImageEmbeddings(self.config, self.dtype, name="embeddings")
        return embeddings(pixel_values_BxHxWxC)

    def final_norm(self, x_BxLxD: Float[Array, "B L D"]) -> Array:
        return LayerNorm(self.config.layer_norm_eps, self.dtype, name="post_layernorm")(x_BxLxD)

    def pooler(self, x_BxLxD: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        return AttentionPooling(self.config, self.dtype, name="head")(x_BxLxD)


class AttentionPooling(nn.Module):
    """An attention of a trained query to the patches, followed by an MLP (1810.00825, section 3.2)."""

    config: SiglipVisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BxLxD: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        cfg, batch, width = self.config, len(x_BxLxD), self.config.hidden_size
        # torch's MultiheadAttention holds these three as one (3 * width, width) matrix, hence another Glorot
        # deviation.
        own_init_std = [(name, (2 * width) ** -0.5) for name in ("query", "key", "value")]
        attention = dataclasses.replace(
            cfg.block,
            # The head has no dropout in transformers.
            attention_dropout=0.0,
            # Later entries win.
            own_init_std=(*cfg.block.own_init_std, *own_init_std),
        )
        probe_1x1xD = self.param("probe", nn.initializers.normal(width**-0.5), (1, 1, width))
        probe_Bx1xD = broadcast_float32(probe_1x1xD, (batch, 1, width), self.dtype)
        x_Bx1xD = Attention(attention, self.dtype, name="attention")(
            x_BxLxD, probe_Bx1xD, deterministic=True
        )
        h_Bx1xD = LayerNorm(cfg.layer_norm_eps, self.dtype, name="layernorm")(x_Bx1xD)
        x_Bx1xD = x_Bx1xD + Mlp(cfg.block, self.dtype, name="mlp")(h_Bx1xD)
        return x_Bx1xD[:, 0]


class SiglipText(CLIPText):
    """The text tower. Its pooler is a linear map of the last token, even if that token is padding.

    SigLIP was trained with texts padded to `max_position_embeddings` tokens and without an attention mask.
    Only texts in this form get the embeddings that the model was trained to give.
    """

    config: SiglipTextConfig

    is_causal: ClassVar[bool] = False
    fixed_length: ClassVar[bool] = True

    def token_selector(self, input_ids_BxL: Int[Array, "B L"]) -> TokenSelector:
        return lambda x, axis: jax.lax.slice_in_dim(x, -1, None, axis=axis)

    def pooler(self, token_BxD: Float[Array, "B D"]) -> Float[Array, "B P"]:
        cfg = self.config
        width = cfg.projection_size or cfg.hidden_size
        head = dense(width, name="head", init_std=cfg.hidden_size**-0.5, dtype=self.dtype)
        return head(token_BxD)
