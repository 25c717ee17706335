"""Check the arguments of the Python interface, and convert them into the towers' inputs.

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

# An array of JAX or NumPy, or anything that NumPy converts, such as lists and tensors of PyTorch.
Given = Any

# Inputs that index an embedding table -> (what its rows are, remedy for an index out of range).
_ROWS: Mapping[str, tuple[str, str]] = {
    "input_ids": ("tokens", "use the model's own tokenizer"),
    "token_type_ids": ("token types", "use the model's own tokenizer, or leave it out"),
    "position_ids": ("positions", "give smaller values, or leave it out"),
}
_DTYPES = ("float32", "bfloat16", "float16")


def as_dtype(dtype: Any) -> Any:
    """Return the dtype of a computation, given by its name or as a dtype of JAX or PyTorch.

    Raises UserError if no tower computes in this dtype.
    """
    name = getattr(dtype, "name", getattr(dtype, "__name__", str(dtype).removeprefix("torch.")))
    if name not in _DTYPES:
        raise UserError(f"dtype is {name!r}; choose {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}.")
    return jnp.dtype(name)


def _refuse_positional(further: tuple[Any, ...]) -> None:
    """Raise UserError for positional arguments after attention_mask.

    The next argument is position_ids in some models of transformers and token_type_ids in others, so no order
    fits the code written for both.
    """
    if further:
        raise UserError(
            f"{len(further)} positional arguments follow attention_mask, and the models of transformers "
            "differ in their order; pass them by name, as token_type_ids=... or position_ids=... (and "
            "return_loss=...)."
        )


def is_deterministic(train: bool | None, dropout_rng: Any) -> bool:
    """Return whether a call computes without dropout: `train` decides or, if it is None, a missing key."""
    if train and dropout_rng is None:
        raise UserError(
            "train=True needs random numbers for dropout; also give dropout_rng=jax.random.key(...)."
        )
    return dropout_rng is None if train is None else not train


def image_inputs(pixel_values_BxCxHxW: Given) -> Float[Array, "B H W C"]:
    """Return images with the channels last, and integers as float32.

    Integers come from a processor that does not normalise. Raises UserError unless the argument is a batch of
    images.
    """
    pixels = _array("pixel_values", pixel_values_BxCxHxW)
    if pixels.ndim != 4 or 0 in pixels.shape:
        raise UserError(
            f"pixel_values has the shape {[*pixels.shape]}; give it as the image processor returns it, "
            "[images, channels, height, width]."
        )
    # Processors of transformers put channels first, and Flax's convolutions take channels last.
    images_BxHxWxC = jnp.moveaxis(jnp.asarray(pixels), 1, -1)
    is_float = jnp.issubdtype(images_BxHxWxC.dtype, jnp.floating)
    return images_BxHxWxC if is_float else images_BxHxWxC.astype(jnp.float32)


def text_inputs(
    rows: Mapping[str, int], *inputs: Given | None, further: tuple[Any, ...] = ()
) -> tuple[Any, ...]:
    """Return `TEXT_INPUTS` in order as int32 TxL, None for those not given; a single row serves all texts.

    `rows` holds the sizes of the tower's embedding tables, `further` the positional arguments after the mask.
    Raises UserError for inputs that do not fit together or do not fit the tower: JAX itself raises no error
    for an index that is out of range.
    """
    _refuse_positional(further)
    named = dict(zip(TEXT_INPUTS, inputs, strict=True))
    given = {name: _array(name, x) for name, x in named.items() if x is not None}
    if "input_ids" not in given:
        raise UserError("input_ids is missing; give it as the tokenizer returns it.")
    shape = given["input_ids"].shape
    if len(shape) != 2 or 0 in shape:
        raise UserError(
            f"input_ids has the shape {[*shape]}; give it as the tokenizer returns it with padding=True, "
            "[texts, tokens]."
        )
    for name, x in given.items():
        # A single row, such as the positions of all texts, may stand for every text.
        if x.shape not in (shape, (1, shape[1])):
            raise UserError(
                f"{name} has the shape {[*x.shape]} and input_ids {[*shape]}; give both as the tokenizer "
                "returns them."
            )
        _check_numbers(name, x, rows.get(name))
    # One dtype for the output of every tokenizer, so that a compiled call serves all of them.
    texts = {name: jnp.asarray(x).astype(jnp.int32) for name, x in given.items()}
    return tuple(
        jnp.broadcast_to(texts[name], shape) if name in texts else None for name in TEXT_INPUTS
    )


def _array(name: str, x: Given) -> Array | np.ndarray:
    """Return `x` as an array of numbers. Raise UserError if it cannot become one."""
    if x is None:
        raise UserError(f"{name} is missing; give it as the model's processor returns it.")
    if isinstance(x, jax.Array | np.ndarray):
        array = x
    else:
        try:
            array = np.asarray(x)
        # NumPy refuses ragged lists, and the class of `x` may raise any exception in its conversion.
        except Exception as error:
            remedy = "give a NumPy array"
            if isinstance(x, list | tuple):
                remedy = "give rows of equal length"
            padding = "" if name == "pixel_values" else "padding=True and "
            raise UserError(
                f"{name} cannot be converted to an array ({_shortened(error)}); {remedy}, as the processor "
                f"returns it with {padding}return_tensors='np'."
            ) from error
    if array.dtype == bool or jnp.issubdtype(array.dtype, jnp.number):
        return array
    raise UserError(
        f"{name} has the dtype {array.dtype}; give numbers, as the processor returns them with "
        "return_tensors='np'."
    )


def _shortened(error: Exception) -> str:
    return " ".join(str(error).split())[:120].rstrip(". ")


def _check_numbers(name: str, x: Array | np.ndarray, size: int | None) -> None:
    """Raise UserError for a token input of a wrong dtype, or with values out of its range."""
    is_known = _is_known(x)
    numbers = np.asarray(jax.device_get(x)) if is_known else None
    if name == "attention_mask":
        # A float mask may be 0 and 1, which is fine, or a bias of the attention logits: only values tell.
        odd = not _is_whole(x) if numbers is None else not np.isin(numbers, (0, 1)).all()
        if odd:
            found = f"dtype {x.dtype}" if numbers is None else f"numbers {_extent(numbers)}"
            raise UserError(
                f"attention_mask has {found}; give the integer 1 for each token to attend to and 0 for "
                "padding, not a bias for the attention logits."
            )
    elif not _is_whole(x):
        raise UserError(f"{name} has the dtype {x.dtype}; give integers.")
    elif numbers is not None and size is not None:
        _check_range(name, numbers, size)


def _is_whole(x: Array | np.ndarray) -> bool:
    return x.dtype == bool or bool(jnp.issubdtype(x.dtype, jnp.integer))


def _is_known(x: Any) -> bool:
    """Return whether this process can read the values: not of a tracer, nor of other processes' shards."""
    is_traced = isinstance(x, core.Tracer)
    return not is_traced and (not isinstance(x, jax.Array) or x.is_fully_addressable)


def _extent(x: np.ndarray) -> str:
    return f"from {x.min()} to {x.max()}"


def _check_range(name: str, x: np.ndarray, size: int) -> None:
    if x.size and (x.min() < 0 or x.max() >= size):
        what, remedy = _ROWS[name]
        raise UserError(
            f"{name} has values {_extent(x)}, but the text tower has only {size} {what}; {remedy}."
        )
