"""The towers of CLIP (https://arxiv.org/abs/2103.00020).

Numerically they are Hugging Face's CLIPVisionModel and CLIPTextModel. The image towers of AltCLIP
(https://arxiv.org/abs/2211.06679) and Chinese CLIP (https://arxiv.org/abs/2211.01335) are CLIP's. SigLIP's
towers (siglip.py) share most of this file.

Dims: B batch, HxW pixels, C channels, YxX patches, L tokens (an image has Y * X, and one more if there is a
class token), Q tokens that are computed, D width.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lit_jax.config import Pooling
from lit_jax.distributed.mesh import shard_batch
from lit_jax.errors import UserError
from lit_jax.models.layers import LayerNorm, broadcast_float32
from lit_jax.models.patches import (
    Matrix,
    PatchEmbeddings,
    Size,
    bicubic_matrix,
    patch_grid,
    resize_positions,
)
from lit_jax.models.token_embeddings import TokenEmbeddingConfig, check_length
from lit_jax.models.tower import ImageTransformer, TextTransformer
from lit_jax.models.transformer import BlockConfig, TokenSelector


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPBlockFields:
    """The fields of config.json that describe the blocks, in CLIP and in SigLIP.

    Names and defaults are Hugging Face's, here and in the configs made from it.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0

    @property
    def block(self) -> BlockConfig:
        """The description of the blocks."""
        return BlockConfig(
            depth=self.num_hidden_layers,
            width=self.hidden_size,
            num_heads=self.num_attention_heads,
            mlp_width=self.intermediate_size,
            activation=self.hidden_act,
            norm_epsilon=self.layer_norm_eps,
            norm_first=True,
            own_init_std=self.block_init_std,
            attention_dropout=self.attention_dropout,
        )

    @property
    def block_init_std(self) -> tuple[tuple[str, float], ...]:
        """The standard deviations of the kernels of a block, by their names."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPFields(CLIPBlockFields):
    """The fields that both towers of CLIP share."""

    # Multiplies every standard deviation of the initialisation.
    initializer_factor: float = 1.0

    @property
    def block_init_std(self) -> tuple[tuple[str, float], ...]:
        std = self.initializer_factor * self.hidden_size**-0.5
        # Hugging Face narrows query, key and value by the depth. OpenAI's code narrows the attention's output
        # instead.
        narrow = std * (2 * self.num_hidden_layers) ** -0.5
        return (
            *((name, narrow) for name in ("query", "key", "value", "fc2")),
            ("output", std),
            # This deviation is (2 * hidden_size) ** -0.5.
            ("fc1", std * 2**-0.5),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig(CLIPFields):
    """The fields of CLIP's image tower."""

    model_type: str = "clip_vision_model"
    # Pixels; a pair is (height, width).
    image_size: Size = 224
    patch_size: Size = 32
    num_channels: int = 3
    initializer_range: float = 0.02

    @property
    def patch_init_std(self) -> float:
        """The standard deviation of the kernel of the patch embeddings."""
        return self.initializer_range * self.initializer_factor

    @property
    def position_init_std(self) -> float:
        """The standard deviation of the position embeddings."""
        return self.patch_init_std

    @property
    def class_init_std(self) -> float | None:
        """The standard deviation of the class token; None for a family without one (SigLIP)."""
        return self.initializer_factor * self.hidden_size**-0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class AltCLIPVisionConfig(CLIPVisionConfig):
    """The fields of AltCLIP's image tower."""

    model_type: str = "altclip_vision_model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChineseCLIPVisionConfig(CLIPVisionConfig):
    """The fields of Chinese CLIP's image tower."""

    model_type: str = "chinese_clip_vision_model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(CLIPFields):
    """The fields of CLIP's text tower."""

    model_type: str = "clip_text_model"
    vocab_size: int = 49408
    hidden_size: int = 512
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    max_position_embeddings: int = 77
    eos_token_id: int | tuple[int, ...] | None = 49407

    @property
    def embedding(self) -> TokenEmbeddingConfig:
        """The description of the token embeddings."""
        return clip_embedding(self, self.initializer_factor * 0.02)


def clip_embedding(config: Any, init_std: float) -> TokenEmbeddingConfig:
    """Return the config of the token embeddings of a text tower of CLIP or SigLIP."""
    return TokenEmbeddingConfig(
        width=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        init_std=init_std,
        word_name="token_embedding",
        position_name="position_embedding",
        norm_name=None,
    )


class CLIPVision(ImageTransformer):
    """The image tower. The pooler normalises the class token; the last hidden state is not normalised."""

    config: CLIPVisionConfig

    @property
    def leading(self) -> int:
        return 0 if self.config.class_init_std is None else 1

    @property
    def position_matrix(self) -> Matrix:
        return bicubic_matrix

    def embed(self, pixel_values_BxHxWxC: Array, deterministic: bool) -> Float[Array, "B L D"]:
        cfg = self.config
        x_BxLxD = CLIPImageEmbeddings(cfg, self.dtype, name="embeddings")(pixel_values_BxHxWxC)
        # Hugging Face misspelt this name once, and its files have kept the misspelling.
        return LayerNorm(cfg.layer_norm_eps, self.dtype, name="pre_layrnorm")(x_BxLxD)

    def final_norm(self, x_BxLxD: Float[Array, "B L D"]) -> Array:
        return x_BxLxD

    def pooler(self, x_BxLxD: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        norm = LayerNorm(self.config.layer_norm_eps, self.dtype, name="post_layernorm")
        return norm(x_BxLxD[:, 0])


class CLIPImageEmbeddings(nn.Module):
    """The patches with their positions, after a class token if the family has one.

    Attributes:
        config: a CLIPVisionConfig or a SiglipVisionConfig.
    """

    config: Any
    dtype: Any

    @nn.compact
    def __call__(self, pixel_values_BxHxWxC: Float[Array, "B H W C"]) -> Float[Array, "B L D"]:
        cfg, class_std = self.config, self.config.class_init_std
        patches_BxYxXxD = PatchEmbeddings(
            cfg.hidden_size,
            cfg.patch_size,
            cfg.num_channels,
            cfg.patch_init_std,
            self.dtype,
            # CLIP's patch embeddings have no bias, SigLIP's do. The class token tells the families apart.
            use_bias=class_std is None,
            name="patch_embedding",
        )(pixel_values_BxHxWxC)
        batch, rows, columns, width = patches_BxYxXxD.shape
        x_BxLxD = patches_BxYxXxD.reshape(batch, rows * columns, width)
        own_grid = patch_grid(cfg.image_size, cfg.patch_size)
        length = own_grid[0] * own_grid[1]
        if class_std is not None:
            class_D = self.param("class_embedding", nn.initializers.normal(class_std), (width,))
            class_Bx1xD = broadcast_float32(class_D, (batch, 1, width), self.dtype)
            x_BxLxD = jnp.concatenate([class_Bx1xD, x_BxLxD], axis=1)
            length += 1
        init = nn.initializers.normal(cfg.position_init_std)
        table = nn.Embed(length, width, embedding_init=init, name="position_embedding")
        # Images of another size than the config's get interpolated positions.
        positions_LxD = resize_positions(table.embedding, own_grid, (rows, columns))
        return shard_batch(x_BxLxD + broadcast_float32(positions_LxD, x_BxLxD.shape, self.dtype))


class CLIPText(TextTransformer):
    """The text tower. Its attention is causal, and its pooler takes the token that ends the text."""

    config: CLIPTextConfig

    # The first token attends to itself alone, so the pooling 'cls' would be the same for every text.
    poolings: ClassVar[tuple[Pooling, ...]] = ("pooler", "mean")
    is_causal: ClassVar[bool] = True

    def token_selector(self, input_ids_BxL: Int[Array, "B L"]) -> TokenSelector:
        """Return the function that selects the token that ends a text, or the first token if no token does.

        Raises UserError if config.json names no single such token.
        """
        eos = self.config.eos_token_id
        if not isinstance(eos, int):
            raise UserError(
                f"The model's config.json has eos_token_id={eos!r}, but CLIP's pooler needs a single token; "
                "set it to the token that ends the texts, or set the tower's pooling to 'mean'."
            )
        # Before July 2023 config.json said 2, whatever the token was. The tokenizers of that time had the
        # token that ends a text at the end of the vocabulary, so the largest id marks it.
        is_end_BxL = input_ids_BxL if eos == 2 else input_ids_BxL == eos
        # argmax returns the first of equal values. Padding may repeat the token after the end.
        end_B = jnp.argmax(is_end_BxL, axis=1)

        def select(x: Array, axis: int) -> Array:
            # The index needs as many axes as `x`, which may be tokens or a bias of the attention.
            return jnp.take_along_axis(x, end_B.reshape(-1, *(1,) * (x.ndim - 1)), axis)

        return select

    def encode(self, x_BxLxD: Float[Array, "B L D"], *args: Any) -> Float[Array, "B Q D"]:
        # transformers checks the length even where the caller gives positions.
        check_length(x_BxLxD.shape[1], self.config.embedding.max_length)
        return super().encode(x_BxLxD, *args)

    def final_norm(self, x_BxLxD: Float[Array, "B Q D"]) -> Array:
        return LayerNorm(self.config.layer_norm_eps, self.dtype, name="final_layer_norm")(x_BxLxD)
