"""BERT and the text towers that differ little from BERT.

The file has BERT (https://arxiv.org/abs/1810.04805), RoBERTa
(https://arxiv.org/abs/1907.11692), XLM-RoBERTa (https://arxiv.org/abs/1911.02116), CamemBERT
(https://arxiv.org/abs/1911.03894), and the text towers of ALIGN (https://arxiv.org/abs/2102.05918),
Chinese CLIP (https://arxiv.org/abs/2211.01335) and AltCLIP (https://arxiv.org/abs/2211.06679);
numerically Hugging Face's models of these names. distilbert.py and mpnet.py build on this file.

Dims: B batch, Q tokens, D width.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Array, Float

from lit_jax.errors import UserError
from lit_jax.models.layers import DenseAct, LayerNorm, dense
from lit_jax.models.token_embeddings import TokenEmbeddingConfig
from lit_jax.models.tower import BlockFields, TextTransformer
from lit_jax.trees import Tree, flatten, unflatten

PositionIds = Literal["input_ids", "arange"]
# The path of the position embeddings in the tree of parameters.
_POSITIONS = "embeddings/position_embeddings/embedding"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainConfig(BlockFields):
    """The fields of config.json that change a number and that all families of this file share."""

    model_type: str
    vocab_size: int = 30522
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512

    norm_first: ClassVar[bool] = False

    @property
    def mlp_width(self) -> int:
        return self.intermediate_size

    @property
    def embedding(self) -> TokenEmbeddingConfig:
        """The description of the token embeddings."""
        return TokenEmbeddingConfig(
            width=self.hidden_size,
            vocab_size=self.vocab_size,
            max_positions=self.max_position_embeddings,
            init_std=self.initializer_range,
            norm_epsilon=self.layer_norm_eps,
            dropout=self.hidden_dropout_prob,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTypesConfig(PlainConfig):
    """The fields of families whose embeddings have token types."""

    type_vocab_size: int = 2

    @property
    def embedding(self) -> TokenEmbeddingConfig:
        return dataclasses.replace(super().embedding, token_types=self.type_vocab_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(TokenTypesConfig):
    """The fields of BERT."""

    model_type: str = "bert"
    # A token of a decoder attends to itself and to earlier tokens only.
    is_decoder: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignTextConfig(TokenTypesConfig):
    """The fields of ALIGN's text tower."""

    model_type: str = "align_text_model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChineseCLIPTextConfig(TokenTypesConfig):
    """The fields of Chinese CLIP's text tower."""

    model_type: str = "chinese_clip_text_model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountedPositionsConfig(TokenTypesConfig):
    """The fields of RoBERTa and of the families that derive from it.

    Attributes:
        position_ids: a field of lit_jax alone. 'input_ids' counts positions from the padding id, as Hugging
            Face's PyTorch models do. 'arange' counts from 0, as Hugging Face's Flax dual encoders did; a
            checkpoint that was trained there needs this value.
    """

    pad_token_id: int | None = 1
    position_ids: PositionIds = "input_ids"

    @property
    def padding_id(self) -> int | None:
        """The id that positions are counted from; None if config.json has no padding token."""
        return self.pad_token_id

    @property
    def embedding(self) -> TokenEmbeddingConfig:
        padding_id = counted_from(self.position_ids, self.pad_token_id)
        return dataclasses.replace(super().embedding, padding_id=padding_id)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(CountedPositionsConfig):
    """The fields of RoBERTa."""

    model_type: str = "roberta"
    vocab_size: int = 50265
    is_decoder: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class XLMRobertaConfig(RobertaConfig):
    """The fields of XLM-RoBERTa."""

    model_type: str = "xlm-roberta"
    # Hugging Face's default is the size of BERT's vocabulary. The config.json of released models says 250002.
    vocab_size: int = 30522


@dataclasses.dataclass(frozen=True, kw_only=True)
class CamembertConfig(XLMRobertaConfig):
    """The fields of CamemBERT."""

    model_type: str = "camembert"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AltCLIPTextConfig(CountedPositionsConfig):
    """The fields of AltCLIP's text tower."""

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
    # The width of the tokens after the linear map.
    project_dim: int = 768


def counted_from(position_ids: PositionIds, pad_token_id: int | None) -> int | None:
    """Return `TokenEmbeddingConfig.padding_id` of a family that has the option `position_ids`.

    Raises UserError if positions are counted from the padding id and config.json has none.
    """
    if position_ids == "arange":
        return None
    if pad_token_id is None:
        raise UserError(
            "The text tower's config.json has no pad_token_id, from which this family counts positions; "
            "set it in config.model.text.overrides."
        )
    return pad_token_id


def with_counted_positions(config: Any, params: Tree) -> tuple[Any, Tree]:
    """Return config and parameters of an equal tower with `position_ids` 'input_ids' instead of 'arange'.

    Counting starts at the padding id + 1, so the rows of the position table move by that number. The two
    towers differ only for texts with padding on the left, which 'arange' counts. A tower that counts already,
    that has no padding id or whose family lacks the option stays as it is.
    """
    # Configs of families without the option lack the field.
    if getattr(config, "position_ids", None) != "arange":
        return config, params
    if config.padding_id is None:
        return config, params
    first = config.padding_id + 1
    length = config.max_position_embeddings + first
    counted = dataclasses.replace(config, position_ids="input_ids", max_position_embeddings=length)
    flat = flatten(params)
    table = np.asarray(flat[_POSITIONS])
    # The added rows belong to ids up to the padding id, which no position reaches but that of padding itself.
    return counted, unflatten({**flat, _POSITIONS: np.pad(table, ((first, 0), (0, 0)))})


class Bert(TextTransformer):
    """The text tower. Its pooler is a dense layer with tanh on the first token."""

    @property
    def is_causal(self) -> bool:
        # Only BERT's and RoBERTa's configs have the option to be a decoder.
        return getattr(self.config, "is_decoder", False)

    def pooler(self, token_BxD: Float[Array, "B D"]) -> Array:
        block = self.config.block
        # BERT's pooler was trained by next-sentence prediction (1810.04805, section 3.1).
        head = DenseAct(block.width, "tanh", block.init_std, self.dtype, name="pooler")
        return head(token_BxD)


class AltCLIPText(Bert):
    """An XLM-RoBERTa with a linear map of all tokens; the pooled output is the first mapped token."""

    def final_norm(self, x_BxLxD: Float[Array, "B Q D"]) -> Array:
        cfg = self.config
        # AltCLIP normalises before its linear map; Hugging Face's names are kept in the tree.
        x_BxLxD = LayerNorm(cfg.layer_norm_eps, self.dtype, name="pre_LN")(x_BxLxD)
        std = cfg.initializer_range
        linear = dense(cfg.project_dim, name="transformation", init_std=std, dtype=self.dtype)
        return linear(x_BxLxD)

    def pooler(self, token_BxD: Float[Array, "B D"]) -> Array:
        return token_BxD
