"""The towers of CLIP (https://arxiv.org/abs/2103.00020), numerically Hugging Face's CLIPVisionModel and
CLIPTextModel. The image towers of AltCLIP (https://arxiv.org/abs/2211.06679) and Chinese CLIP
(https://arxiv.org/abs/2211.01335) are CLIP's; SigLIP's towers (siglip.py) share most of it.

Dims: B batch, HxW pixels, C channels, YxX patches, L tokens (of an image Y * X, and one in front of them
if there is a class token), D width, P pooled width.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lit_jax.config import Pooling
from lit_jax.distributed.mesh import shard_batch
from lit_jax.errors import UserError
from lit_jax.models.attention import attention_bias
from lit_jax.models.layers import (
    LayerNorm,
    check_length,
    mean_of_attended,
    to_rows,
)
from lit_jax.models.patches import (
    PatchEmbeddings,
    Size,
    patch_grid,
    resize_positions,
)
from lit_jax.models.tower import ImageTower, Tower, TowerOutput
from lit_jax.models.transformer import BlockConfig, Pick, first_token


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockFields:
    """The fields of config.json that say what the blocks are, in CLIP and in SigLIP.

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
        """Standard deviations of the kernels of a block, by their names."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPFields(BlockFields):
    initializer_factor: float = 1.0  # of every standard deviation

    @property
    def block_init_std(self) -> tuple[tuple[str, float], ...]:
        std = self.initializer_factor * self.hidden_size**-0.5
        narrow = std * (2 * self.num_hidden_layers) ** -0.5
        return (
            *((name, narrow) for name in ("query", "key", "value", "fc2")),
            ("output", std),
            ("fc1", std * 2**-0.5),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig(CLIPFields):
    model_type: str = "clip_vision_model"
    image_size: Size = 224  # pixels; a pair is (height, width)
    patch_size: Size = 32
    num_channels: int = 3
    initializer_range: float = 0.02

    @property
    def patch_init_std(self) -> float:
        return self.initializer_range * self.initializer_factor

    @property
    def position_init_std(self) -> float:
        return self.patch_init_std

    @property
    def class_init_std(self) -> float | None:
        """None: no class token in front of the patches, and a bias in the patch embeddings."""
        return self.initializer_factor * self.hidden_size**-0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class AltCLIPVisionConfig(CLIPVisionConfig):
    model_type: str = "altclip_vision_model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChineseCLIPVisionConfig(CLIPVisionConfig):
    model_type: str = "chinese_clip_vision_model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(CLIPFields):
    model_type: str = "clip_text_model"
    vocab_size: int = 49408
    hidden_size: int = 512
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    max_position_embeddings: int = 77
    eos_token_id: int | tuple[int, ...] | None = 49407

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
        return self.initializer_factor * 0.02


class CLIPVision(ImageTower):
    """The image tower. Its pooler normalises the class token; last_hidden_state is not normalised."""

    config: CLIPVisionConfig

    @nn.compact
    def __call__(
        self, pixel_values_BxHxWxC: Float[Array, "B H W C"], *, deterministic: bool = True
    ) -> TowerOutput:
        """Pixels, normalised by the image processor, to tokens and a pooled vector.

        Images of another size than the config's are encoded with interpolated position embeddings.
        Not `deterministic`: dropout, with the rng 'dropout'.
        """
        cfg = self.config
        x_BxLxD = ImageEmbeddings(cfg, self.dtype, name="embeddings")(pixel_values_BxHxWxC)
        # Hugging Face misspelled the name once, and its files have kept it.
        x_BxLxD = LayerNorm(cfg.layer_norm_eps, self.dtype, name="pre_layrnorm")(x_BxLxD)
        x_BxLxD = self.encoder(cfg.block)(x_BxLxD, None, deterministic)
        if self.pooling == "pooler":
            norm = LayerNorm(cfg.layer_norm_eps, self.dtype, name="post_layernorm")
            pooled_BxD = norm(x_BxLxD[:, :1])[:, 0]
        elif self.pooling == "cls":
            pooled_BxD = x_BxLxD[:, 0]
        else:
            pooled_BxD = x_BxLxD[:, 1:].mean(1)
        return TowerOutput(x_BxLxD, pooled_BxD)


class ImageEmbeddings(nn.Module):
    """Patches with their positions, behind a class token if the family has one."""

    config: Any  # CLIPVisionConfig or SiglipVisionConfig
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
            use_bias=class_std is None,
            name="patch_embedding",
        )(pixel_values_BxHxWxC)
        batch, rows, columns, width = patches_BxYxXxD.shape
        x_BxLxD = patches_BxYxXxD.reshape(batch, rows * columns, width)
        own_grid = patch_grid(cfg.image_size, cfg.patch_size)
        length = own_grid[0] * own_grid[1]
        if class_std is not None:
            class_D = self.param("class_embedding", nn.initializers.normal(class_std), (width,))
            class_Bx1xD = to_rows(class_D, (batch, 1, width), self.dtype)
            x_BxLxD = jnp.concatenate([class_Bx1xD, x_BxLxD], axis=1)
            length += 1
        init = nn.initializers.normal(cfg.position_init_std)
        table = nn.Embed(length, width, embedding_init=init, name="position_embedding")
        positions_LxD = resize_positions(table.embedding, own_grid, (rows, columns))
        return shard_batch(x_BxLxD + to_rows(positions_LxD, x_BxLxD.shape, self.dtype))


class CLIPText(Tower):
    """The text tower: a token attends to itself and to earlier ones, and the last says it all."""

    config: CLIPTextConfig

    # As the first token attends to itself alone, 'cls' would be the same for every text.
    poolings: ClassVar[tuple[Pooling, ...]] = ("pooler", "mean")
    causal: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self,
        input_ids_BxL: Int[Array, "B L"],
        attention_mask_BxL: Int[Array, "B L"] | None = None,
        token_type_ids_BxL: Int[Array, "B L"] | None = None,
        position_ids_BxL: Int[Array, "B L"] | None = None,
        *,
        deterministic: bool = True,
    ) -> TowerOutput:
        """Token ids to tokens and a pooled vector.

        Defaults: every token attended, positions 0 to L - 1. There are no token types: those of a
        tokenizer that makes them change nothing. Not `deterministic`: dropout, with the rng 'dropout'.
        Raises UserError, when traced, for too long a text.
        """
        del token_type_ids_BxL
        cfg = self.config
        if attention_mask_BxL is None:
            attention_mask_BxL = jnp.ones_like(input_ids_BxL)
        attended_BxL = attention_mask_BxL > 0
        x_BxLxD = TextEmbeddings(cfg, self.dtype, name="embeddings")(
            input_ids_BxL, position_ids_BxL
        )
        bias = attention_bias(attended_BxL, causal=self.causal)
        pick = self.pooled_token(input_ids_BxL) if self.pools_one_token else first_token
        x_BxLxD = self.encoder(cfg.block)(x_BxLxD, bias, deterministic, pick=pick)
        x_BxLxD = LayerNorm(cfg.layer_norm_eps, self.dtype, name="final_layer_norm")(x_BxLxD)
        if self.pools_one_token:
            x_Bx1xD = pick(x_BxLxD, 1) if self.all_tokens else x_BxLxD
            pooled_BxP = self.pool(x_Bx1xD[:, 0])
        else:
            pooled_BxP = mean_of_attended(x_BxLxD, attended_BxL)
        return TowerOutput(x_BxLxD, pooled_BxP)

    @property
    def pools_one_token(self) -> bool:
        return self.pooling == "pooler"

    def pool(self, x_BxD: Float[Array, "B D"]) -> Float[Array, "B P"]:
        """What the pooler makes of the pooled token."""
        return x_BxD

    def pooled_token(self, input_ids_BxL: Int[Array, "B L"]) -> Pick:
        """The token that ends the text; the first token of a text without it."""
        eos = self.config.eos_token_id
        if not isinstance(eos, int):
            raise UserError(
                f"The model's config.json has eos_token_id={eos!r}, and CLIP's pooler looks for one "
                "token; set it to the one that ends the texts, or the tower's pooling to 'mean'."
            )
        # Before July 2023 config.json said 2, whatever the token was. In the tokenizers of that time the
        # one that ends the text was the last of the vocabulary.
        is_end_BxL = input_ids_BxL if eos == 2 else input_ids_BxL == eos
        end_B = jnp.argmax(is_end_BxL, axis=1)  # of equal ones the first

        def pick(x: Array, axis: int) -> Array:
            return jnp.take_along_axis(x, end_B.reshape(-1, *(1,) * (x.ndim - 1)), axis)

        return pick

    @property
    def example_input(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, 1), jnp.int32)


class TextEmbeddings(nn.Module):
    """Token and position embeddings, summed."""

    config: Any  # CLIPTextConfig or SiglipTextConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, input_ids_BxL: Int[Array, "B L"], position_ids_BxL: Int[Array, "B L"] | None
    ) -> Float[Array, "B L D"]:
        cfg, length = self.config, input_ids_BxL.shape[1]
        check_length(length, cfg.max_position_embeddings)
        if position_ids_BxL is None:
            position_ids_BxL = jnp.arange(length)[None]

        def embed(name: str, size: int, ids_BxL: Array) -> Array:
            init = nn.initializers.normal(cfg.embedding_init_std)
            rows = nn.Embed(size, cfg.hidden_size, embedding_init=init, name=name)(ids_BxL)
            return to_rows(rows, (*input_ids_BxL.shape, cfg.hidden_size), self.dtype)

        x_BxLxD = embed("token_embedding", cfg.vocab_size, input_ids_BxL)
        x_BxLxD += embed("position_embedding", cfg.max_position_embeddings, position_ids_BxL)
        return shard_batch(x_BxLxD)
