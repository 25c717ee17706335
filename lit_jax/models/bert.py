"""BERT (https://arxiv.org/abs/1810.04805), numerically Hugging Face's BertModel.

Dims: B batch, L tokens, D width, P pooled width.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lit_jax.distributed.mesh import shard_batch
from lit_jax.errors import UserError
from lit_jax.models.layers import (
    DenseAct,
    LayerNorm,
    Tower,
    TowerOutput,
    attention_bias,
    mean_of_attended,
)
from lit_jax.models.transformer import BlockConfig, Encoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The fields of config.json that change a number; names and defaults are Hugging Face's."""

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    is_decoder: bool = False  # a token then attends to itself and to earlier tokens only

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(
            depth=self.num_hidden_layers,
            width=self.hidden_size,
            num_heads=self.num_attention_heads,
            mlp_width=self.intermediate_size,
            activation=self.hidden_act,
            norm_epsilon=self.layer_norm_eps,
            norm_first=False,
            init_std=self.initializer_range,
            attention_dropout=self.attention_probs_dropout_prob,
            output_dropout=self.hidden_dropout_prob,
            mlp_dropout=self.hidden_dropout_prob,
        )


class Bert(Tower):
    """The text tower. Its pooler is a trained head on the first token."""

    config: BertConfig

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

        Defaults: every token attended, token type 0, positions 0 to L - 1. Not `deterministic`:
        dropout, with the rng 'dropout'. Raises UserError, when traced, for too long a text.
        """
        cfg = self.config
        if attention_mask_BxL is None:
            attention_mask_BxL = jnp.ones_like(input_ids_BxL)
        attended_BxL = attention_mask_BxL > 0
        x_BxLxD = Embeddings(cfg, self.dtype, name="embeddings")(
            input_ids_BxL, token_type_ids_BxL, position_ids_BxL, deterministic
        )
        bias = attention_bias(attended_BxL, causal=cfg.is_decoder)
        x_BxLxD = Encoder(cfg.block, self.dtype, name="encoder")(x_BxLxD, bias, deterministic)
        if self.pooling == "pooler":
            pooled_BxP = DenseAct(
                cfg.hidden_size, "tanh", cfg.initializer_range, self.dtype, name="pooler"
            )(x_BxLxD[:, 0])
        elif self.pooling == "cls":
            pooled_BxP = x_BxLxD[:, 0]
        else:
            pooled_BxP = mean_of_attended(x_BxLxD, attended_BxL)
        return TowerOutput(x_BxLxD, pooled_BxP)

    @property
    def example_input(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, 1), jnp.int32)


class Embeddings(nn.Module):
    """Token, token type and position embeddings, summed and normalised."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        input_ids_BxL: Int[Array, "B L"],
        token_type_ids_BxL: Int[Array, "B L"] | None,
        position_ids_BxL: Int[Array, "B L"] | None,
        deterministic: bool,
    ) -> Float[Array, "B L D"]:
        cfg, length = self.config, input_ids_BxL.shape[1]
        if token_type_ids_BxL is None:
            token_type_ids_BxL = jnp.zeros_like(input_ids_BxL)
        if position_ids_BxL is None:
            if length > cfg.max_position_embeddings:
                raise UserError(
                    f"The texts are {length} tokens long and the text tower has only positions for "
                    f"{cfg.max_position_embeddings}; set config.data.max_text_length lower."
                )
            position_ids_BxL = jnp.arange(length)[None]

        def embed(name: str, size: int, ids_BxL: Array) -> Array:
            init = nn.initializers.normal(cfg.initializer_range)
            return nn.Embed(
                size, cfg.hidden_size, dtype=self.dtype, embedding_init=init, name=name
            )(ids_BxL)

        x_BxLxD = embed("word_embeddings", cfg.vocab_size, input_ids_BxL)
        x_BxLxD += embed("token_type_embeddings", cfg.type_vocab_size, token_type_ids_BxL)
        x_BxLxD += embed("position_embeddings", cfg.max_position_embeddings, position_ids_BxL)
        x_BxLxD = LayerNorm(cfg.layer_norm_eps, self.dtype, name="LayerNorm")(x_BxLxD)
        x_BxLxD = nn.Dropout(cfg.hidden_dropout_prob)(x_BxLxD, deterministic=deterministic)
        return shard_batch(x_BxLxD)
