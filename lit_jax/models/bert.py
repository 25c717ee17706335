"""BERT (https://arxiv.org/abs/1810.04805), numerically Hugging Face's BertModel.

Dims: B batch, L tokens, D width, F width of the MLP, P pooled width.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lit_jax.config import Pooling
from lit_jax.distributed.mesh import shard_batch
from lit_jax.errors import UserError
from lit_jax.models.layers import DenseAct, Encoder, LayerNorm, SelfAttention, TowerOutput, dense


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The fields of config.json that change a number; names and defaults are Hugging Face's."""

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


class Bert(nn.Module):
    """The text tower. `pooling`: 'pooler' is the trained head on the first token, 'cls' that token,
    'mean' the mean of the attended tokens.
    """

    config: BertConfig
    pooling: Pooling = "pooler"
    dtype: Any = jnp.float32

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
        make_layer = functools.partial(Layer, cfg, self.dtype)
        x_BxLxD = Encoder(make_layer, cfg.num_hidden_layers, name="encoder")(
            x_BxLxD, _attention_bias(attended_BxL, causal=cfg.is_decoder), deterministic
        )
        if self.pooling == "pooler":
            pooled_BxP = DenseAct(
                cfg.hidden_size, "tanh", cfg.initializer_range, self.dtype, name="pooler"
            )(x_BxLxD[:, 0])
        elif self.pooling == "cls":
            pooled_BxP = x_BxLxD[:, 0]
        else:
            pooled_BxP = _mean_of_attended(x_BxLxD, attended_BxL)
        return TowerOutput(x_BxLxD, pooled_BxP)

    @property
    def example_input(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of an input, to initialise with."""
        return jax.ShapeDtypeStruct((1, 1), jnp.int32)


def _attention_bias(attended_BxL: Bool[Array, "B L"], *, causal: bool) -> Float[Array, "B 1 #L L"]:
    """0 where a token may attend, else float32's lowest number.

    Not -inf: a text without any attended token then attends everywhere, where -inf gives NaN.
    """
    mask_Bx1xLxL = attended_BxL[:, None, None, :]
    if causal:
        mask_Bx1xLxL &= nn.make_causal_mask(attended_BxL, dtype=bool)
    return jnp.where(mask_Bx1xLxL, 0.0, jnp.finfo(jnp.float32).min)


def _mean_of_attended(
    x_BxLxD: Float[Array, "B L D"], attended_BxL: Bool[Array, "B L"]
) -> Float[Array, "B D"]:
    weight_BxLx1 = attended_BxL[..., None].astype(jnp.float32)
    count_Bx1 = jnp.maximum(weight_BxLx1.sum(1), 1)  # an empty text has the embedding 0, not NaN
    return ((x_BxLxD.astype(jnp.float32) * weight_BxLx1).sum(1) / count_Bx1).astype(x_BxLxD.dtype)


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


class Layer(nn.Module):
    """One post-norm transformer block."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x_BxLxD: Float[Array, "B L D"],
        bias_Bx1xLxL: Float[Array, "B 1 #L L"] | None,
        deterministic: bool,
    ) -> Float[Array, "B L D"]:
        cfg = self.config
        x_BxLxD = Attention(cfg, self.dtype, name="attention")(x_BxLxD, bias_Bx1xLxL, deterministic)
        h_BxLxF = DenseAct(
            cfg.intermediate_size,
            cfg.hidden_act,
            cfg.initializer_range,
            self.dtype,
            name="intermediate",
        )(x_BxLxD)
        return Output(cfg, self.dtype, name="output")(h_BxLxF, x_BxLxD, deterministic)


class Attention(nn.Module):
    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x_BxLxD: Float[Array, "B L D"],
        bias_Bx1xLxL: Float[Array, "B 1 #L L"] | None,
        deterministic: bool,
    ) -> Float[Array, "B L D"]:
        cfg = self.config
        context_BxLxD = SelfAttention(
            cfg.num_attention_heads,
            True,
            cfg.attention_probs_dropout_prob,
            cfg.initializer_range,
            self.dtype,
            name="self",
        )(x_BxLxD, bias_Bx1xLxL, deterministic)
        return Output(cfg, self.dtype, name="output")(context_BxLxD, x_BxLxD, deterministic)


class Output(nn.Module):
    """The end of either half of a block: dense, dropout, residual sum, normalisation."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x_BxLxF: Float[Array, "B L F"],
        residual_BxLxD: Float[Array, "B L D"],
        deterministic: bool,
    ) -> Float[Array, "B L D"]:
        cfg = self.config
        x_BxLxD = dense(
            cfg.hidden_size, name="dense", init_std=cfg.initializer_range, dtype=self.dtype
        )(x_BxLxF)
        x_BxLxD = nn.Dropout(cfg.hidden_dropout_prob)(x_BxLxD, deterministic=deterministic)
        return LayerNorm(cfg.layer_norm_eps, self.dtype, name="LayerNorm")(x_BxLxD + residual_BxLxD)
