"""The arguments of the Python interface, checked and in the form that the towers take.

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

# An array of JAX or NumPy, or lists and tensors of PyTorch, of which NumPy makes an array.
Given = Any

# Token inputs that are looked up in a table: (name of its rows, remedy for a number beyond them).
_ROWS: Mapping[str, tuple[str, str]] = {
    "input_ids": ("tokens", "use the model's own tokenizer"),
    "token_type_ids": ("token types", "use the model's own tokenizer, or give none"),
    "position_ids": ("positions", "give smaller ones, or none"),
}
_DTYPES = ("float32", "bfloat16", "float16")


def as_dtype(dtype: Any) -> Any:
    """Return the dtype of a computation, given by name or as JAX's.

    Raise UserError if no tower computes in it.
    """
    name = getattr(dtype, "name", getattr(dtype, "__name__", dtype))
    if name not in _DTYPES:
        raise UserError(f"dtype is {name!r}; choose {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}.")
    return jnp.dtype(name)


def _refuse_positional(further: tuple[Any, ...]) -> None:
    """Raise UserError for positional arguments after attention_mask.

    In transformers the next one is position_ids in some models and token_type_ids in others: no order is
    right for the code of both.
    """
    if further:
        raise UserError(
            f"{len(further)} positional arguments stand after attention_mask, where models of transformers "
            "differ in their order; write them by name, token_type_ids=... or position_ids=... (and "
            "return_loss=...)."
        )


def is_deterministic(train: bool | None, dropout_rng: Any) -> bool:
    """Return whether a call computes without dropout: `train` decides, and else whether there is a key."""
    if train and dropout_rng is None:
        raise UserError(
            "train=True needs random numbers for dropout; give dropout_rng=jax.random.key(...), too."
        )
    return dropout_rng is None if train is None else not train


def image_inputs(pixel_values_BxCxHxW: Given) -> Float[Array, "B H W C"]:
    """Return images with their channels last; integers, of a processor that does not normalise, as float32.

    Raise UserError for anything but a batch of images.
    """
    pixels = _array("pixel_values", pixel_values_BxCxHxW)
    if pixels.ndim != 4 or 0 in pixels.shape:
        raise UserError(
            f"pixel_values has the shape {[*pixels.shape]}; give images as their processor makes them, "
            "[images, channels, height, width]."
        )
    images_BxHxWxC = jnp.moveaxis(jnp.asarray(pixels), 1, -1)
    is_float = jnp.issubdtype(images_BxHxWxC.dtype, jnp.floating)
    return images_BxHxWxC if is_float else images_BxHxWxC.astype(jnp.float32)


def text_inputs(
    rows: Mapping[str, int], *inputs: Given | None, further: tuple[Any, ...] = ()
) -> tuple[Any, ...]:
    """Return `TEXT_INPUTS` in their order as int32; a single row is used for all texts.

    `rows` is the `rows` of the tower's config, `further` the positional arguments after the mask.
    Raise UserError for inputs that do not belong together or to the tower: JAX itself has no error for an
    index that is out of range.
    """
    _refuse_positional(further)
    named = dict(zip(TEXT_INPUTS, inputs, strict=True))
    given = {name: _array(name, x) for name, x in named.items() if x is not None}
    if "input_ids" not in given:
        raise UserError("input_ids is missing; give texts as their tokenizer makes them.")
    shape = given["input_ids"].shape
    if len(shape) != 2 or 0 in shape:
        raise UserError(
            f"input_ids has the shape {[*shape]}; give texts as their tokenizer makes them with "
            "padding=True, [texts, tokens]."
        )
    for name, x in given.items():
        if x.shape not in (shape, (1, shape[1])):
            raise UserError(
                f"{name} has the shape {[*x.shape]} and input_ids {[*shape]}; give both as the "
                "tokenizer makes them."
            )
        _check_numbers(name, x, rows.get(name))
    texts = {name: jnp.asarray(x).astype(jnp.int32) for name, x in given.items()}
    return tuple(
        jnp.broadcast_to(texts[name], shape) if name in texts else None for name in TEXT_INPUTS
    )


def _array(name: str, x: Given) -> Array | np.ndarray:
    """Return `x` as an array of numbers. Raise UserError if it is not one."""
    if x is None:
        raise UserError(f"{name} is missing; give the output of the model's processor.")
    if isinstance(x, jax.Array | np.ndarray):
        array = x
    else:
        try:
            array = np.asarray(x)
        # NumPy refuses ragged lists; the class of `x` may raise anything.
        except Exception as error:
            remedy = "give an array of NumPy"
            if isinstance(x, list | tuple):
                remedy = "give rows of equal length"
            raise UserError(
                f"{name} cannot become an array ({_shortened(error)}); {remedy}, as the processor makes it "
                "with padding=True and return_tensors='np'."
            ) from error
    if array.dtype == bool or jnp.issubdtype(array.dtype, jnp.number):
        return array
    raise UserError(
        f"{name} holds values of dtype {array.dtype}; give numbers, as the processor makes them with "
        "return_tensors='np'."
    )


def _shortened(error: Exception) -> str:
    return " ".join(str(error).split())[:120].rstrip(". ")


def _check_numbers(name: str, x: Array | np.ndarray, size: int | None) -> None:
    """Raise UserError for a token input of another dtype, or with numbers that mean something else."""
    is_known = _is_known(x)
    numbers = np.asarray(jax.device_get(x)) if is_known else None
    if name == "attention_mask":
        # A float may be a bias of the attention logits, and only its numbers tell.
        odd = not _is_whole(x) if numbers is None else not np.isin(numbers, (0, 1)).all()
        if odd:
            found = f"dtype {x.dtype}" if numbers is None else f"numbers {_extent(numbers)}"
            raise UserError(
                f"attention_mask has {found}; give an integer 1 for each token that is attended to and 0 for "
                "padding, not a bias of the attention logits."
            )
    elif not _is_whole(x):
        raise UserError(f"{name} has the dtype {x.dtype}; give integers.")
    elif numbers is not None and size is not None:
        _check_range(name, numbers, size)


def _is_whole(x: Array | np.ndarray) -> bool:
    return x.dtype == bool or bool(jnp.issubdtype(x.dtype, jnp.integer))


def _is_known(x: Any) -> bool:
    """Return whether this process can look at the numbers: not while it traces, nor at those of others."""
    is_traced = isinstance(x, core.Tracer)
    return not is_traced and (not isinstance(x, jax.Array) or x.is_fully_addressable)


def _extent(x: np.ndarray) -> str:
    return f"from {x.min()} to {x.max()}"


def _check_range(name: str, x: np.ndarray, size: int) -> None:
    if x.size and (x.min() < 0 or x.max() >= size):
        what, remedy = _ROWS[name]
        raise UserError(
            f"{name} has numbers {_extent(x)}, but the text tower has only {size} {what}; {remedy}."
        )
