"""The transformer that all families share: blocks of attention and MLP, stacked and scanned.

A family describes its blocks by a `BlockConfig`. The parameters of a block have the same names in every
family; lit_jax/weights/names.py maps them to the names in each family's files.

Dims: B batch, L tokens (Q as queries), D width, H heads, K width of a head, F width of the MLP, R rows of a
table of attention biases, T layer types, N depth.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lit_jax.config import Remat
from lit_jax.distributed.mesh import shard_batch
from lit_jax.errors import UserError
from lit_jax.models.attention import attend
from lit_jax.models.layers import (
    Dense,
    Dropout,
    LayerNorm,
    activation,
    dense,
    drop,
    rematerialized,
    scale_float32,
    stacks,
)

Bias = Float[Array, "#B #H #L L"]
BiasOfTable = Callable[[Float[Array, "R H"]], Bias]
BiasByLayerType = Float[Array, "T #B #H #L L"]
Tokens = Float[Array, "B L D"]
# The place of the last block: in the scan with the other blocks; outside the scan, with parameters of its own
# in the tree; or outside and computed for the pooled token alone.
LastBlock = Literal["in scan", "outside", "one token"]
# Selects one token of each row along an axis, which stays with length 1.
TokenSelector = Callable[[Array, int], Array]


def first_token(x: Array, axis: int) -> Array:
    """Select the first token, such as CLS, along an axis, which stays with length 1."""
    return jax.lax.slice_in_dim(x, 0, 1, axis=axis)


class Rotary(NamedTuple):
    """The positions of the tokens as angles (2104.09864), float32.

    A token of angle 0 has no position. The two halves of K are equal, because the features i and i + K/2 form
    a pair.
    """

    cos: Float[Array, "*B L K"]
    sin: Float[Array, "*B L K"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The description of the blocks of an `Encoder`, which has `depth` equal blocks."""

    depth: int
    width: int
    num_heads: int
    mlp_width: int
    activation: str
    norm_epsilon: float
    # True normalises before attention and MLP, as in ViT; False after the residual sum, as in BERT.
    norm_first: bool
    init_std: float = 0.02
    # Kernels, by name, whose initial standard deviation is not `init_std`.
    own_init_std: tuple[tuple[str, float], ...] = ()
    # The cutoff of the normal distribution, in standard deviations.
    init_cutoff: float | None = None
    # The layers without a bias: names among query, key, value, output, norm and the layers of the MLP.
    without_bias: tuple[str, ...] = ()
    # False means that attention reads the tokens without normalisation.
    norm_attention: bool = True
    # True means down(activation(gate(x)) * up(x)) instead of fc2(activation(fc1(x))).
    gated_mlp: bool = False
    # The rows of each block's table, from which a function makes the bias of the attention logits.
    bias_rows: int = 0
    # The dropout rates of the attention probabilities, of the wide features inside the MLP, of the
    # attention's output and of the MLP's output, in this order.
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    output_dropout: float = 0.0
    mlp_dropout: float = 0.0
    # The initial value of a trained factor for each feature of the outputs of attention and MLP.
    layer_scale: float | None = None
    # The probability that the last block adds nothing to an example (stochastic depth, 1603.09382).
    drop_path: float = 0.0
    # True raises the probability linearly from 0 at the first block; False gives all blocks the same.
    drop_path_rises: bool = True


class Encoder(nn.Module):
    """The blocks as a scanned stack `layer`, whose parameters have a leading depth axis.

    The last block may lie outside the stack, such as `layer_11` of 12. At each of `cuts` another stack
    begins, such as `layer_from_10`. Neither the time to compile nor the size of the program grows with depth.

    If the collection 'intermediates' is mutable, it gets 'input' BxLxD, 'layer/hidden_state' NxBxLxD (the
    output of each block) and 'layer/attention/probability' NxBxHxLxL. The records of a block outside the
    scan lack the axis N.

    Attributes:
        first: the number of the first block in the tower.
    """

    config: BlockConfig
    dtype: Any
    remat: Remat = "none"
    last_block: LastBlock = "in scan"
    first: int = 0
    cuts: tuple[int, ...] = ()

    @nn.compact
    def __call__(
        self,
        x_BxLxD: Tokens,
        bias: Bias | BiasOfTable | BiasByLayerType | None,
        deterministic: bool,
        rotary: Rotary | None = None,
        layer_types_N: Int[Array, " N"] | None = None,
        select: TokenSelector = first_token,
    ) -> Float[Array, "B Q D"]:
        """Return all tokens, or the token of each row that `select` takes, as `last_block` says.

        Args:
            bias: added to the attention logits: a mask of 0 and the lowest float32, or learned numbers. With
                `bias_rows` it is a function that makes the bias from the table of each block.
            layer_types_N: the layer type of each block. With it `bias` and `rotary` have a leading axis of
                types, and a block of type i uses their entry i.
        """
        cfg = self.config
        self.sow("intermediates", "input", x_BxLxD)

        step = functools.partial(_call_block, bias=bias, rotary=rotary, deterministic=deterministic)

        def part(index: int | slice) -> tuple[Array, Array | None]:
            return jax.tree.map(lambda x: x[index], of_blocks)

        # Rates and types are scanned along with the parameters, because all blocks share one compiled body.
        first_rate = 0.0 if cfg.drop_path_rises else cfg.drop_path
        of_blocks = (jnp.linspace(first_rate, cfg.drop_path, cfg.depth), layer_types_N)
        scanned = cfg.depth if self.last_block == "in scan" else cfg.depth - 1
        for name, blocks in stacks(self.first, scanned, self.cuts):
            scan = nn.scan(
                rematerialized(step, self.remat, prevent_cse=False),
                variable_axes={"params": 0, "intermediates": 0},
                # Each block of a stack draws its own parameters and its own dropout.
                split_rngs={"params": True, "dropout": True},
                length=blocks.stop - blocks.start,
            )
            x_BxLxD, _ = scan(Block(cfg, self.dtype, name=name), x_BxLxD, part(blocks))
        if scanned < cfg.depth:
            block = Block(cfg, self.dtype, name=f"layer_{self.first + scanned}")
            if self.last_block == "one token":
                step = functools.partial(step, select=select)
            # prevent_cse would cost two more gathers of split matrices. If the compiler merges the
            # recomputation with the original, the activations of one block stay in memory, which is little.
            last_step = rematerialized(step, self.remat, prevent_cse=False)
            x_BxLxD, _ = last_step(block, x_BxLxD, part(scanned))
        return x_BxLxD


def _call_block(
    block: "Block",
    x_BxLxD: Tokens,
    of_block: tuple[Array, Array | None],
    *,
    bias: Bias | BiasOfTable | BiasByLayerType | None,
    rotary: Rotary | None,
    deterministic: bool,
    select: TokenSelector | None = None,
) -> tuple[Float[Array, "B Q D"], None]:
    """Return the tokens after a block, as the (carry, output) of a step of a scan.

    `of_block` has the probability of drop path, and the layer type or None.
    """
    drop_path, layer_type = of_block
    if layer_type is not None:
        bias, rotary = jax.tree.map(lambda x: x[layer_type], (bias, rotary))
    return shard_batch(block(x_BxLxD, bias, rotary, drop_path, deterministic, select)), None


class Block(nn.Module):
    """A block of attention and an MLP, whose outputs are added to the tokens.

    With `select` only the selected token is computed; its attention reads all tokens as keys and values.
    """

    config: BlockConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x_BxLxD: Tokens,
        bias: Bias | BiasOfTable | None,
        rotary: Rotary | None,
        drop_path: Float[Array, ""],
        deterministic: bool,
        select: TokenSelector | None = None,
    ) -> Float[Array, "B Q D"]:
        cfg = self.config
        attention = functools.partial(
            Attention(cfg, self.dtype, name="attention"),
            bias=bias,
            deterministic=deterministic,
            rotary=rotary,
            select=select,
        )
        mlp = functools.partial(Mlp(cfg, self.dtype, name="mlp"), deterministic=deterministic)
        for part, name, dropout in (
            (attention, "attention", cfg.output_dropout),
            (mlp, "mlp", cfg.mlp_dropout),
        ):
            norm = LayerNorm(
                cfg.norm_epsilon, self.dtype, "norm" not in cfg.without_bias, name=f"{name}_norm"
            )
            # Only attention may go without a normalisation; see `BlockConfig.norm_attention`.
            norm_first = cfg.norm_first and (name != "attention" or cfg.norm_attention)
            h_BxLxD = norm(x_BxLxD) if norm_first else x_BxLxD
            if select is not None and name == "attention":
                # L is 1 from here on. Keys and values of all tokens are needed only inside attention.
                h_BxLxD, x_BxLxD = part(h_BxLxD, select(h_BxLxD, 1)), select(x_BxLxD, 1)
            else:
                h_BxLxD = part(h_BxLxD)
            h_BxLxD = Dropout(dropout)(h_BxLxD, deterministic=deterministic)
            if cfg.layer_scale is not None:
                h_BxLxD = LayerScale(cfg.layer_scale, name=f"{name}_scale")(h_BxLxD)
            if cfg.drop_path and not deterministic:
                # Stochastic depth drops or keeps a whole row (1603.09382).
                row_shape = (len(h_BxLxD), 1, 1)
                h_BxLxD = drop(h_BxLxD, drop_path, self.make_rng("dropout"), row_shape)
            x_BxLxD = x_BxLxD + h_BxLxD
            if not cfg.norm_first:
                x_BxLxD = norm(x_BxLxD)
        self.sow("intermediates", "hidden_state", x_BxLxD)
        return x_BxLxD


class Attention(nn.Module):
    """A multi-head attention of the tokens to each other, or of `queries_BxQxD` to the tokens.

    `bias` and `rotary` describe all tokens; `select` takes the part that belongs to the query.
    """

    config: BlockConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x_BxLxD: Tokens,
        queries_BxQxD: Float[Array, "B Q D"] | None = None,
        *,
        bias: Bias | BiasOfTable | None = None,
        deterministic: bool,
        rotary: Rotary | None = None,
        select: TokenSelector | None = None,
    ) -> Float[Array, "B Q D"]:
        cfg = self.config
        if cfg.width % cfg.num_heads:
            raise UserError(
                f"The model's config.json has hidden_size {cfg.width}, which is not a multiple of its "
                f"num_attention_heads {cfg.num_heads}; correct it."
            )

        query, key, value, output = (
            _dense(cfg, cfg.width, name, self.dtype) for name in ("query", "key", "value", "output")
        )
        queries_BxQxD = x_BxLxD if queries_BxQxD is None else queries_BxQxD
        query_BxHxQxK = _split_heads(query(queries_BxQxD), cfg.num_heads)
        key_BxHxLxK = _split_heads(key(x_BxLxD), cfg.num_heads)
        value_BxHxLxK = _split_heads(value(x_BxLxD), cfg.num_heads)
        if rotary is not None:
            of_queries = Rotary(*(select(x, x.ndim - 2) for x in rotary)) if select else rotary
            query_BxHxQxK = _rotate(query_BxHxQxK, of_queries)
            key_BxHxLxK = _rotate(key_BxHxLxK, rotary)
        if callable(bias):
            shape = (cfg.bias_rows, cfg.num_heads)
            bias = bias(self.param("position_bias_table", nn.initializers.zeros, shape))
        # A bias with one row is the same for all queries, so there is nothing to select.
        if select and bias is not None and bias.shape[2] > 1:
            bias = select(bias, 2)

        drops = cfg.attention_dropout and not deterministic
        context_BxHxQxK = attend(
            query_BxHxQxK,
            key_BxHxLxK,
            value_BxHxLxK,
            bias,
            Dropout(cfg.attention_dropout).draw_mask if drops else None,
            functools.partial(self.sow, "intermediates", "probability")
            if self.is_mutable_collection("intermediates")
            else None,
        )
        context_BxQxHxK = context_BxHxQxK.swapaxes(1, 2)
        context_BxQxD = context_BxQxHxK.reshape(*context_BxQxHxK.shape[:2], cfg.width)
        return output(context_BxQxD)


def _split_heads(x_BxLxD: Array, num_heads: int) -> Float[Array, "B H L K"]:
    return x_BxLxD.reshape(*x_BxLxD.shape[:2], num_heads, -1).swapaxes(1, 2)


def _rotate(x_BxHxLxK: Array, rotary: Rotary) -> Array:
    """Rotate the pairs (i, i + K/2) of a head's features by the angles of each token, in float32."""
    x = x_BxHxLxK.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    # The angles become Bx1xLxK; B is 1 if all rows share them.
    cos, sin = (table.reshape(-1, 1, *table.shape[-2:]) for table in rotary)
    return (x * cos + turned * sin).astype(x_BxHxLxK.dtype)


class Mlp(nn.Module):
    """An MLP: fc2(activation(fc1(x))), or down(activation(gate(x)) * up(x)) as in SwiGLU (2002.05202)."""

    config: BlockConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BxLxD: Tokens, *, deterministic: bool = True) -> Tokens:
        cfg, act = self.config, activation(self.config.activation)
        wide = functools.partial(_dense, cfg, cfg.mlp_width, dtype=self.dtype)
        # A gated MLP has other parameter names, because a family may have both kinds, and its files name them
        # differently.
        if cfg.gated_mlp:
            h_BxLxF = act(wide("gate")(x_BxLxD)) * wide("up")(x_BxLxD)
        else:
            h_BxLxF = act(wide("fc1")(x_BxLxD))
        h_BxLxF = Dropout(cfg.hidden_dropout)(h_BxLxF, deterministic=deterministic)
        return _dense(cfg, cfg.width, "down" if cfg.gated_mlp else "fc2", self.dtype)(h_BxLxF)


class LayerScale(nn.Module):
    """A trained factor for each feature (2103.17239, section 2)."""

    first: float

    @nn.compact
    def __call__(self, x_BxLxD: Tokens) -> Tokens:
        factor_D = self.param("factor", nn.initializers.constant(self.first), x_BxLxD.shape[-1:])
        return scale_float32(x_BxLxD, factor_D)


def _dense(cfg: BlockConfig, features: int, name: str, dtype: Any) -> Dense:
    return dense(
        features,
        name=name,
        init_std=dict(cfg.own_init_std).get(name, cfg.init_std),
        init_cutoff=cfg.init_cutoff,
        dtype=dtype,
        use_bias=name not in cfg.without_bias,
    )
