"""BERT (https://arxiv.org/abs/1810.04805) and what differs little from it: RoBERTa
(https://arxiv.org/abs/1907.11692), XLM-RoBERTa (https://arxiv.org/abs/1911.02116), CamemBERT
(https://arxiv.org/abs/1911.03894), and the text towers of ALIGN (https://arxiv.org/abs/2102.05918),
Chinese CLIP (https://arxiv.org/abs/2211.01335) and AltCLIP (https://arxiv.org/abs/2211.06679);
numerically Hugging Face's models of these names. distilbert.py and mpnet.py build on this file.

Dims: B batch, L tokens, D width, H heads, P pooled width.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lit_jax.distributed.mesh import shard_batch
from lit_jax.errors import UserError
from lit_jax.models.attention import attention_bias
from lit_jax.models.layers import (
    DenseAct,
    Dropout,
    LayerNorm,
    check_length,
    dense,
    mean_of_attended,
    to_rows,
)
from lit_jax.models.tower import Tower, TowerOutput
from lit_jax.models.transformer import BlockConfig
from lit_jax.trees import Tree, flatten, unflatten

PositionIds = Literal["input_ids", "arange"]
_POSITIONS = "embeddings/position_embeddings/embedding"  # in the tree of parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """What tokens are embedded with, in the same way as `BlockConfig` for the blocks."""

    vocab_size: int
    positions: int  # rows of the table
    dropout: float
    token_types: int = 0
    # Positions count the tokens other than this one, from its id + 1 on; None: all tokens, from 0 on.
    padding_id: int | None = None
    sinusoidal: bool = False  # at the start; they are trained like others

    @property
    def rows(self) -> dict[str, int]:
        """Of the tables that token inputs are looked up in."""
        rows = {"input_ids": self.vocab_size, "position_ids": self.positions}
        return rows | ({"token_type_ids": self.token_types} if self.token_types else {})

    @property
    def max_length(self) -> int:
        return self.positions - (0 if self.padding_id is None else self.padding_id + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainConfig:
    """The fields of config.json that change a number, without those of some families only.

    Names and defaults are Hugging Face's, here and in all that derives from this.
    """

    model_type: str
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12

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

    @property
    def embedding(self) -> EmbeddingConfig:
        return EmbeddingConfig(
            vocab_size=self.vocab_size,
            positions=self.max_position_embeddings,
            dropout=self.hidden_dropout_prob,
        )

    @property
    def rows(self) -> dict[str, int]:
        """Of the tables that token inputs are looked up in."""
        return self.embedding.rows

    @property
    def max_length(self) -> int:
        """The most tokens that a text can have."""
        return self.embedding.max_length


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTypesConfig(PlainConfig):
    type_vocab_size: int = 2

    @property
    def embedding(self) -> EmbeddingConfig:
        return dataclasses.replace(super().embedding, token_types=self.type_vocab_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(TokenTypesConfig):
    model_type: str = "bert"
    is_decoder: bool = False  # a token then attends to itself and to earlier tokens only


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignTextConfig(TokenTypesConfig):
    model_type: str = "align_text_model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChineseCLIPTextConfig(TokenTypesConfig):
    model_type: str = "chinese_clip_text_model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountedPositionsConfig(TokenTypesConfig):
    """Of RoBERTa and its like.

    Attributes:
        position_ids: no field of Hugging Face's. 'input_ids' is what its PyTorch models compute. With
            'arange' positions are 0 to L - 1, as its Flax dual encoders computed them; a checkpoint
            that was trained so needs it.
    """

    pad_token_id: int | None = 1
    position_ids: PositionIds = "input_ids"

    @property
    def padding_id(self) -> int | None:
        """The id that positions are counted from."""
        return self.pad_token_id

    @property
    def embedding(self) -> EmbeddingConfig:
        padding_id = counted_from(self.position_ids, self.pad_token_id)
        return dataclasses.replace(super().embedding, padding_id=padding_id)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(CountedPositionsConfig):
    model_type: str = "roberta"
    vocab_size: int = 50265
    is_decoder: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class XLMRobertaConfig(RobertaConfig):
    model_type: str = "xlm-roberta"
    vocab_size: int = 30522


@dataclasses.dataclass(frozen=True, kw_only=True)
class CamembertConfig(XLMRobertaConfig):
    model_type: str = "camembert"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AltCLIPTextConfig(CountedPositionsConfig):
    model_type: str = "altclip_text_model"
    vocab_size: int = 250002
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    attention_probs_dropout_prob: float = 0.0
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    project_dim: int = 768  # width of the tokens that come out


def counted_from(position_ids: PositionIds, pad_token_id: int | None) -> int | None:
    """Return `EmbeddingConfig.padding_id` of a family that has the option `position_ids`."""
    if position_ids == "arange":
        return None
    if pad_token_id is None:
        raise UserError(
            "The text tower's config.json has no pad_token_id, from which this family counts positions; "
            "set it in config.model.text.overrides."
        )
    return pad_token_id


def with_counted_positions(config: Any, params: Tree) -> tuple[Any, Tree]:
    """Return the config and parameters of a tower that counts positions and computes the same.

    Counting starts at the padding id + 1, so the rows of the table move there. The two towers differ in
    padding on the left alone, which 'arange' counts. A tower that counts already, that has no padding id
    or whose family has no such option stays as it is.
    """
    if getattr(config, "position_ids", None) != "arange":
        return config, params
    if config.padding_id is None:
        return config, params
    first = config.padding_id + 1
    length = config.max_position_embeddings + first
    counted = dataclasses.replace(config, position_ids="input_ids", max_position_embeddings=length)
    flat = flatten(params)
    table = np.asarray(flat[_POSITIONS])
    return counted, unflatten({**flat, _POSITIONS: np.pad(table, ((first, 0), (0, 0)))})


class Bert(Tower):
    """The text tower. Its pooler is a trained head on the first token."""

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

        Defaults: every token attended, token type 0, positions as the config says. A family without
        token types ignores them. Not `deterministic`: dropout, with the rng 'dropout'. Raises
        UserError, when traced, for too long a text.
        """
        cfg = self.config
        if attention_mask_BxL is None:
            attention_mask_BxL = jnp.ones_like(input_ids_BxL)
        attended_BxL = attention_mask_BxL > 0
        x_BxLxD = Embeddings(cfg.embedding, cfg.block, self.dtype, name="embeddings")(
            input_ids_BxL, token_type_ids_BxL, position_ids_BxL, deterministic
        )
        # Only BERT's and RoBERTa's configs have the option to be a decoder.
        bias = attention_bias(attended_BxL, causal=getattr(cfg, "is_decoder", False))
        bias = self.with_learned_bias(bias, input_ids_BxL.shape[1])
        x_BxLxD = self.encoder(cfg.block)(x_BxLxD, bias, deterministic)
        x_BxLxD = self.transform(x_BxLxD)
        if self.pooling == "pooler":
            pooled_BxP = self.pool_first(x_BxLxD[:, 0])
        elif self.pooling == "cls":
            pooled_BxP = x_BxLxD[:, 0]
        else:
            pooled_BxP = mean_of_attended(x_BxLxD, attended_BxL)
        return TowerOutput(x_BxLxD, pooled_BxP)

    def with_learned_bias(self, bias: Array, length: int) -> Array:
        """What is added to the attention logits; here the mask alone."""
        del length
        return bias

    def transform(self, x_BxLxD: Float[Array, "B L D"]) -> Array:
        """From the last block's tokens to the last hidden state; here the same."""
        return x_BxLxD

    def pool_first(self, first_BxD: Float[Array, "B D"]) -> Array:
        block = self.config.block
        pooler = DenseAct(block.width, "tanh", block.init_std, self.dtype, name="pooler")
        return pooler(first_BxD)

    @property
    def example_input(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, 1), jnp.int32)


class AltCLIPText(Bert):
    """XLM-RoBERTa with a linear map of all its tokens; the pooled output is the first of these."""

    def transform(self, x_BxLxD: Float[Array, "B L D"]) -> Array:
        cfg = self.config
        x_BxLxD = LayerNorm(cfg.layer_norm_eps, self.dtype, name="pre_LN")(x_BxLxD)
        std = cfg.initializer_range
        linear = dense(cfg.project_dim, name="transformation", init_std=std, dtype=self.dtype)
        return linear(x_BxLxD)

    def pool_first(self, first_BxD: Float[Array, "B D"]) -> Array:
        return first_BxD


class Embeddings(nn.Module):
    """Token, token type and position embeddings, summed and normalised."""

    config: EmbeddingConfig
    block: BlockConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        input_ids_BxL: Int[Array, "B L"],
        token_type_ids_BxL: Int[Array, "B L"] | None,
        position_ids_BxL: Int[Array, "B L"] | None,
        deterministic: bool,
    ) -> Float[Array, "B L D"]:
        cfg, width = self.config, self.block.width
        normal = nn.initializers.normal(self.block.init_std)
        if token_type_ids_BxL is None:
            token_type_ids_BxL = jnp.zeros_like(input_ids_BxL)
        if position_ids_BxL is None:
            check_length(input_ids_BxL.shape[1], cfg.max_length)
            position_ids_BxL = _positions(input_ids_BxL, cfg.padding_id)

        def embed(name: str, size: int, ids_BxL: Array, init: Any = normal) -> Array:
            rows = nn.Embed(size, width, embedding_init=init, name=name)(ids_BxL)
            return to_rows(rows, (*input_ids_BxL.shape, width), self.dtype)

        x_BxLxD = embed("word_embeddings", cfg.vocab_size, input_ids_BxL)
        if cfg.token_types:
            x_BxLxD += embed("token_type_embeddings", cfg.token_types, token_type_ids_BxL)
        init = _sinusoids if cfg.sinusoidal else normal
        x_BxLxD += embed("position_embeddings", cfg.positions, position_ids_BxL, init)
        x_BxLxD = LayerNorm(self.block.norm_epsilon, self.dtype, name="LayerNorm")(x_BxLxD)
        x_BxLxD = Dropout(cfg.dropout)(x_BxLxD, deterministic=deterministic)
        return shard_batch(x_BxLxD)


def _positions(input_ids_BxL: Int[Array, "B L"], padding_id: int | None) -> Int[Array, "#B L"]:
    """See `EmbeddingConfig.padding_id`, which is also the position of the tokens that do not count.

    What counts is the id, not the attention mask: fairseq, where RoBERTa comes from, has no mask.
    """
    if padding_id is None:
        return jnp.arange(input_ids_BxL.shape[1])[None]
    counts_BxL = (input_ids_BxL != padding_id).astype(jnp.int32)
    return jnp.cumsum(counts_BxL, axis=1) * counts_BxL + padding_id


def _sinusoids(key: jax.Array, shape: tuple[int, int], dtype: Any) -> Array:
    """Section 3.5 of https://arxiv.org/abs/1706.03762."""
    del key
    length, width = shape
    pairs_D = np.arange(width) // 2
    angle_LxD = np.arange(length)[:, None] / 10000 ** (2 * pairs_D / width)
    even_D = np.arange(width) % 2 == 0
    return jnp.asarray(np.where(even_D, np.sin(angle_LxD), np.cos(angle_LxD)), dtype)
