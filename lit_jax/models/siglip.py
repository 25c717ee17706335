"""The towers of SigLIP (https://arxiv.org/abs/2303.15343), numerically Hugging Face's SiglipVisionModel
and SiglipTextModel. Their blocks and embeddings are CLIP's, without a class token and a causal mask.

Dims: B batch, HxW pixels, C channels, L tokens, D width, P pooled width.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from lit_jax.config import Pooling
from lit_jax.errors import UserError
from lit_jax.models.clip import BlockFields, CLIPText, ImageEmbeddings
from lit_jax.models.layers import LayerNorm, dense, to_rows
from lit_jax.models.patches import Size, pair
from lit_jax.models.tower import ImageTower, TowerOutput
from lit_jax.models.transformer import Attention, Mlp, Pick


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipFields(BlockFields):
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    @property
    def block_init_std(self) -> tuple[tuple[str, float], ...]:
        # Glorot's; where he draws uniformly (and Hugging Face with him) we draw normally.
        width, mlp_width = self.hidden_size, self.intermediate_size
        return (
            *((name, width**-0.5) for name in ("query", "key", "value", "output")),
            *((name, (2 / (width + mlp_width)) ** 0.5) for name in ("fc1", "fc2")),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipVisionConfig(SiglipFields):
    """The fields of config.json that change a number; names and defaults are Hugging Face's."""

    model_type: str = "siglip_vision_model"
    image_size: Size = 224  # pixels; a pair is (height, width)
    patch_size: Size = 16
    num_channels: int = 3
    vision_use_head: bool = True

    @property
    def patch_init_std(self) -> float:
        height, width = pair(self.patch_size)
        return (height * width * self.num_channels) ** -0.5

    @property
    def position_init_std(self) -> float:
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
    projection_size: int | None = None  # None: hidden_size

    @property
    def rows(self) -> dict[str, int]:
        """Of the tables that token inputs are looked up in."""
        return {"input_ids": self.vocab_size, "position_ids": self.max_position_embeddings}

    @property
    def max_length(self) -> int:
        """The most tokens that a text can have."""
        return self.max_position_embeddings

    @property
    def embedding_init_std(self) -> float:
        return self.hidden_size**-0.5


class SiglipVision(ImageTower):
    """The image tower. Its pooler is an attention of one trained query to the patches."""

    config: SiglipVisionConfig

    poolings: ClassVar[tuple[Pooling, ...]] = ("pooler", "mean")  # there is no first token to take

    @nn.compact
    def __call__(
        self, pixel_values_BxHxWxC: Float[Array, "B H W C"], *, deterministic: bool = True
    ) -> TowerOutput:
        """Pixels, normalised by the image processor, to tokens and a pooled vector.

        Images of another size than the config's are encoded with interpolated position embeddings.
        Not `deterministic`: dropout, with the rng 'dropout'.
        Raises UserError, when traced, for the pooling 'pooler' of a model without one.
        """
        cfg = self.config
        if self.pooling == "pooler" and not cfg.vision_use_head:
            raise UserError(
                "The model's config.json has vision_use_head=False, so it has no pooler; set the image "
                "tower's pooling (config.model.image.pooling) to 'mean'."
            )
        x_BxLxD = ImageEmbeddings(cfg, self.dtype, name="embeddings")(pixel_values_BxHxWxC)
        x_BxLxD = self.encoder(cfg.block)(x_BxLxD, None, deterministic)
        x_BxLxD = LayerNorm(cfg.layer_norm_eps, self.dtype, name="post_layernorm")(x_BxLxD)
        if self.pooling == "pooler":
            pooled_BxD = AttentionPooling(cfg, self.dtype, name="head")(x_BxLxD)
        else:
            pooled_BxD = x_BxLxD.mean(1)
        return TowerOutput(x_BxLxD, pooled_BxD)


class AttentionPooling(nn.Module):
    """A trained query attends to the patches, then an MLP (1810.00825, section 3.2)."""

    config: SiglipVisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BxLxD: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        cfg, batch, width = self.config, len(x_BxLxD), self.config.hidden_size
        own_init_std = [(name, (2 * width) ** -0.5) for name in ("query", "key", "value")]
        attention = dataclasses.replace(
            cfg.block,
            attention_dropout=0.0,
            own_init_std=(*cfg.block.own_init_std, *own_init_std),  # the later ones win
        )
        probe_1x1xD = self.param("probe", nn.initializers.normal(width**-0.5), (1, 1, width))
        probe_Bx1xD = to_rows(probe_1x1xD, (batch, 1, width), self.dtype)
        x_Bx1xD = Attention(attention, self.dtype, name="attention")(
            x_BxLxD, probe_Bx1xD, deterministic=True
        )
        h_Bx1xD = LayerNorm(cfg.layer_norm_eps, self.dtype, name="layernorm")(x_Bx1xD)
        x_Bx1xD = x_Bx1xD + Mlp(cfg.block, self.dtype, name="mlp")(h_Bx1xD)
        return x_Bx1xD[:, 0]


class SiglipText(CLIPText):
    """The text tower. Its pooler is a linear map of the last token, be it padding.

    SigLIP was trained with texts padded to `max_position_embeddings` tokens and without an attention
    mask, so only texts given in this way have the embeddings they should have.
    """

    config: SiglipTextConfig

    causal: ClassVar[bool] = False
    fixed_length: ClassVar[bool] = True

    def pooled_token(self, input_ids_BxL: Int[Array, "B L"]) -> Pick:
        del input_ids_BxL
        return lambda x, axis: jax.lax.slice_in_dim(x, -1, None, axis=axis)

    def pool(self, x_BxD: Float[Array, "B D"]) -> Float[Array, "B P"]:
        cfg = self.config
        width = cfg.projection_size or cfg.hidden_size
        head = dense(width, name="head", init_std=cfg.hidden_size**-0.5, dtype=self.dtype)
        return head(x_BxD)
