"""What the Python interface is given, checked, as the towers take it.

Dims: B images, T texts, L tokens, C channels, HxW pixels.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Float

from lit_jax.errors import UserError
from lit_jax.models.dual_encoder import TEXT_INPUTS

Given = Array | np.ndarray  # of the right shape or not

# Of each token input that is looked up in a table: what the rows are, and what to do about one beyond them.
_ROWS: Mapping[str, tuple[str, str]] = {
    "input_ids": ("tokens", "use the model's own tokenizer"),
    "token_type_ids": ("token types", "use the model's own tokenizer, or give none"),
    "position_ids": ("positions", "give smaller ones, or none"),
}
_DTYPES = ("float32", "bfloat16", "float16")


def dtype_of(dtype: Any) -> Any:
    """The dtype of a computation, by name or as JAX's. Raises UserError if no tower computes in it."""
    name = getattr(dtype, "name", getattr(dtype, "__name__", dtype))
    if name not in _DTYPES:
        raise UserError(f"dtype is {name!r}; choose {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}.")
    return jnp.dtype(name)


def images_of(pixel_values_BxCxHxW: Given) -> Float[Array, "B H W C"]:
    """Integers, which a processor that does not normalise gives, as float32. Raises UserError for what is no
    batch of images."""
    shape = np.shape(pixel_values_BxCxHxW)
    if len(shape) != 4:
        raise UserError(
            f"pixel_values has the shape {[*shape]}; give images as their processor makes them, "
            "[images, channels, height, width]."
        )
    images_BxHxWxC = jnp.moveaxis(jnp.asarray(pixel_values_BxCxHxW), 1, -1)
    is_float = jnp.issubdtype(images_BxHxWxC.dtype, jnp.floating)
    return images_BxHxWxC if is_float else images_BxHxWxC.astype(jnp.float32)


def texts_of(rows: Mapping[str, int], *inputs: Given | None) -> tuple[Any, ...]:
    """`TEXT_INPUTS` in their order as int32, as tokenizers give int64; a single row is one for every text.

    `rows` is the `rows` of the tower's config. Raises UserError for inputs that do not belong together or to
    the tower: JAX itself has no error for an index that is out of range.
    """
    given = {name: x for name, x in zip(TEXT_INPUTS, inputs, strict=True) if x is not None}
    shape = np.shape(given["input_ids"])
    if len(shape) != 2:
        raise UserError(
            f"input_ids has the shape {[*shape]}; give texts as their tokenizer makes them with "
            "padding=True, [texts, tokens]."
        )
    for name, x in given.items():
        if np.shape(x) not in (shape, (1, shape[1])):
            raise UserError(
                f"{name} has the shape {[*np.shape(x)]} and input_ids {[*shape]}; give both as the "
                "tokenizer makes them."
            )
        if name in rows and _is_known(x):
            _check_range(name, np.asarray(jax.device_get(x)), rows[name])
    texts = {name: jnp.asarray(x, jnp.int32) for name, x in given.items()}
    return tuple(
        jnp.broadcast_to(texts[name], shape) if name in texts else None for name in TEXT_INPUTS
    )


def _is_known(x: Any) -> bool:
    """Whether this process can look at the numbers: not while it traces, and not at those of others."""
    is_traced = isinstance(x, core.Tracer)
    return not is_traced and (not isinstance(x, jax.Array) or x.is_fully_addressable)


def _check_range(name: str, x: np.ndarray, size: int) -> None:
    if x.size and (x.min() < 0 or x.max() >= size):
        what, remedy = _ROWS[name]
        raise UserError(
            f"{name} has numbers from {x.min()} to {x.max()}, but the text tower has only {size} {what}; "
            f"{remedy}."
        )
