"""ModernBERT (https://arxiv.org/abs/2412.13663), numerically Hugging Face's ModernBertModel.

Rotary positions, a gated MLP, blocks whose attention is local and some whose attention is global.

Dims: B batch, L tokens, D width, K width of a head, I = K / 2 pairs of it, T kinds of block (local and
global).
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lit_jax.config import Pooling
from lit_jax.distributed.mesh import shard_batch
from lit_jax.errors import UserError
from lit_jax.models.attention import attention_bias
from lit_jax.models.layers import (
    Dropout,
    LayerNorm,
    check_length,
    mean_of_attended,
    normal,
    rematerialized,
)
from lit_jax.models.tower import Tower, TowerOutput
from lit_jax.models.transformer import Block, BlockConfig, Rotary

# What config.json calls the kinds of block, and the base of the frequencies of each (2104.09864).
_THETAS = {"sliding_attention": 10_000.0, "full_attention": 160_000.0}
_KINDS = tuple(_THETAS)

Pairs = tuple[tuple[str, Any], ...]  # a dict, but hashable


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModernBertConfig:
    """The fields of config.json that change a number; names and defaults are Hugging Face's."""

    model_type: str = "modernbert"
    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    hidden_activation: str = "gelu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    layer_types: tuple[str, ...] | None = None  # None: the first of every three blocks is global
    rope_parameters: Pairs | None = None  # by kind of block
    local_attention: int = 128  # as many tokens around one, half of them on each side
    embedding_dropout: float = 0.0
    mlp_bias: bool = False
    mlp_dropout: float = 0.0

    @property
    def block(self) -> BlockConfig:
        biases = {
            ("query", "key", "value", "output"): self.attention_bias,
            ("gate", "up", "down"): self.mlp_bias,
            ("norm",): self.norm_bias,
        }
        output_std = self.initializer_range / (2 * self.num_hidden_layers) ** 0.5
        return BlockConfig(
            depth=self.num_hidden_layers,
            width=self.hidden_size,
            num_heads=self.num_attention_heads,
            mlp_width=self.intermediate_size,
            activation=self.hidden_activation,
            norm_epsilon=self.norm_eps,
            norm_first=True,
            init_std=self.initializer_range,
            own_init_std=(("output", output_std), ("down", output_std)),
            init_cutoff=self.initializer_cutoff_factor,
            without_bias=sum((names for names, has in biases.items() if not has), ()),
            gated_mlp=True,
            attention_dropout=self.attention_dropout,
            hidden_dropout=self.mlp_dropout,
            output_dropout=self.attention_dropout,
        )

    @property
    def rows(self) -> dict[str, int]:
        """Of the tables that token inputs are looked up in: positions are turned into angles."""
        return {"input_ids": self.vocab_size}

    @property
    def max_length(self) -> int:
        """The most tokens that a text can have."""
        return self.max_position_embeddings

    @property
    def kinds(self) -> tuple[int, ...]:
        """Of each block, its place in `_KINDS`."""
        depth = self.num_hidden_layers
        types = self.layer_types or [
            "sliding_attention" if i % 3 else "full_attention" for i in range(depth)
        ]
        if len(types) != depth or not set(types) <= set(_KINDS):
            raise UserError(
                f"The text tower's config has layer_types={list(types)}, where each of its {depth} blocks "
                f"needs one of {' and '.join(_KINDS)}; correct it."
            )
        return tuple(_KINDS.index(kind) for kind in types)

    @property
    def thetas(self) -> tuple[float, ...]:
        """Of each kind in `_KINDS`, the base of the frequencies."""
        given = dict(self.rope_parameters or ())
        thetas = []
        for kind, default in _THETAS.items():
            parameters = dict(given.get(kind) or ())
            rope_type = parameters.get("rope_type", "default")
            if rope_type != "default":
                raise UserError(
                    f"The text tower's config has rope_type={rope_type!r}, which lit_jax does not "
                    "implement; choose a model with rope_type='default'."
                )
            thetas.append(parameters.get("rope_theta", default))
        return tuple(thetas)


class ModernBert(Tower):
    """The text tower."""

    config: ModernBertConfig

    poolings: ClassVar[tuple[Pooling, ...]] = ("cls", "mean")

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

        Defaults: every token attended, positions 0 to L - 1. Token types are ignored, as the family has
        none. Not `deterministic`: dropout, with the rng 'dropout'. Raises UserError, when traced, for
        too long a text.
        """
        del token_type_ids_BxL
        cfg = self.config
        if attention_mask_BxL is None:
            attention_mask_BxL = jnp.ones_like(input_ids_BxL)
        attended_BxL = attention_mask_BxL > 0
        if position_ids_BxL is None:
            check_length(input_ids_BxL.shape[1], cfg.max_length)
            position_ids_BxL = jnp.arange(input_ids_BxL.shape[1])[None]
        x_BxLxD = Embeddings(cfg, self.dtype, name="embeddings")(input_ids_BxL, deterministic)
        x_BxLxD = self.encode(
            x_BxLxD, _bias(cfg, attended_BxL), _rotary(cfg, position_ids_BxL), deterministic
        )
        norm = LayerNorm(cfg.norm_eps, self.dtype, cfg.norm_bias, name="final_norm")
        x_BxLxD = norm(x_BxLxD)
        if self.pooling == "cls":
            return TowerOutput(x_BxLxD, x_BxLxD[:, 0])
        return TowerOutput(x_BxLxD, mean_of_attended(x_BxLxD, attended_BxL))

    def encode(
        self,
        x_BxLxD: Float[Array, "B L D"],
        bias: Float[Array, "T B 1 L L"],
        rotary: Rotary,
        deterministic: bool,
    ) -> Array:
        """The first block, which has parameters of its own, and then the others as one scan.

        The collection 'intermediates', where it is mutable, gets 'input', and of the blocks what those of
        any `Encoder` record.
        """
        self.sow("intermediates", "input", x_BxLxD)
        block = self.config.block
        kind, *other_kinds = self.config.kinds
        # Its tokens are normalised already.
        first = Block(dataclasses.replace(block, norm_attention=False), self.dtype, name="layer_0")
        own_bias, own_rotary = jax.tree.map(lambda x: x[kind], (bias, rotary))

        def call(block: nn.Module, x_BxLxD: Array) -> Array:
            return block(x_BxLxD, own_bias, jnp.zeros(()), deterministic, own_rotary)

        x_BxLxD = rematerialized(call, self.remat, prevent_cse=True)(first, x_BxLxD)
        x_BxLxD = shard_batch(x_BxLxD)
        if not other_kinds:
            return x_BxLxD
        others = dataclasses.replace(block, depth=len(other_kinds))
        encoder = self.encoder(others, first=1)
        return encoder(x_BxLxD, bias, deterministic, rotary, jnp.array(other_kinds))

    @property
    def example_input(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, 1), jnp.int32)


class Embeddings(nn.Module):
    """Token embeddings, normalised; positions come into attention alone."""

    config: ModernBertConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, input_ids_BxL: Int[Array, "B L"], deterministic: bool
    ) -> Float[Array, "B L D"]:
        cfg = self.config
        x_BxLxD = nn.Embed(
            cfg.vocab_size,
            cfg.hidden_size,
            embedding_init=normal(cfg.initializer_range, cfg.initializer_cutoff_factor),
            name="tok_embeddings",
        )(input_ids_BxL).astype(self.dtype)  # after the look-up: see `to_rows`
        x_BxLxD = LayerNorm(cfg.norm_eps, self.dtype, cfg.norm_bias, name="norm")(x_BxLxD)
        x_BxLxD = Dropout(cfg.embedding_dropout)(x_BxLxD, deterministic=deterministic)
        return shard_batch(x_BxLxD)


def _bias(cfg: ModernBertConfig, attended_BxL: Bool[Array, "B L"]) -> Float[Array, "T B 1 L L"]:
    """Local: half of `local_attention` to each side, and the token itself. Global: everywhere."""
    place_L = np.arange(attended_BxL.shape[1])
    near_LxL = np.abs(place_L[:, None] - place_L[None]) <= cfg.local_attention // 2
    everywhere_Bx1x1xL = attention_bias(attended_BxL)
    lowest = jnp.finfo(jnp.float32).min
    local_Bx1xLxL = jnp.where(near_LxL[None, None], everywhere_Bx1x1xL, lowest)
    return jnp.stack([local_Bx1xLxL, jnp.broadcast_to(everywhere_Bx1x1xL, local_Bx1xLxL.shape)])


def _rotary(cfg: ModernBertConfig, position_ids_BxL: Int[Array, "#B L"]) -> Rotary:
    """Angles with the kinds of block in front, TxBxLxK; they are float32 in the reference, too."""
    head_width = cfg.hidden_size // cfg.num_attention_heads
    exponent_I = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    theta_Tx1 = np.array(cfg.thetas, np.float32)[:, None]
    frequency_TxI = 1 / theta_Tx1 ** exponent_I[None]
    position_1xBxLx1 = position_ids_BxL[None, ..., None].astype(jnp.float32)
    angle_TxBxLxI = position_1xBxLx1 * jnp.asarray(frequency_TxI)[:, None, None]
    angle_TxBxLxK = jnp.concatenate([angle_TxBxLxI, angle_TxBxLxI], axis=-1)
    return Rotary(jnp.cos(angle_TxBxLxK), jnp.sin(angle_TxBxLxK))
