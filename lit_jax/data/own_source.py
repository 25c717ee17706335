"""A source that a user passes, with the checks that the package's own sources do not need."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lit_jax.data.example import BadSampleError, Example, Source
from lit_jax.data.files import ObjectPath
from lit_jax.data.mixture import Mixture
from lit_jax.display import kind_of
from lit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class CheckedSource:
    """A source whose examples are checked when they are read.

    An example of another kind would fail far from its cause, or train without an error: each letter of a
    caption that is not in a tuple counts as a caption.
    """

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        name = f"source[{index}] of the {type(self.source).__name__} that was passed"
        try:
            example = self.source[index]
        except (BadSampleError, UserError):
            raise
        except Exception as error:
            # The traceback leads into the user's own code, which only lacks the position.
            error.add_note(
                f"{name} raised this error; raise lit_jax.data.example.BadSampleError to leave it out."
            )
            raise
        if problem := _problem(example):
            raise UserError(f"{name} {problem}.")
        return example


def open_passed(source: Any) -> Source:
    """Return a source that was passed, which is checked. Raise UserError if it is empty or not a source."""
    kind = type(source).__name__
    if isinstance(source, type | str | bytes | Mapping) or not isinstance(source, Source):
        raise UserError(
            f"The source that was passed to fit is {kind_of(source)}; pass an object with len(source) and "
            "source[i], which returns an Example (lit_jax.data.example)."
        )
    try:
        length = len(source)
    except TypeError as error:
        raise UserError(
            f"The source that was passed to fit, a {kind}, has no usable length ({error}); let __len__ "
            "return the number of examples, an int."
        ) from error
    if not length:
        raise UserError(
            f"The source that was passed to fit, a {kind}, has no examples; pass one that has."
        )
    # The examples of a mixture come from the sources that it names.
    return source if isinstance(source, Mixture) else CheckedSource(source)


def _problem(example: Any) -> str:
    """Return what is wrong with an example and what to do, '' for a good one."""
    if not isinstance(example, Mapping):
        return f"is {kind_of(example)}; return an Example, a dict with key, image, captions, label"
    if missing := [key for key in ("key", "image", "captions") if key not in example]:
        return f"lacks {' and '.join(missing)}; return all keys of an Example"
    key, image, captions = example["key"], example["image"], example["captions"]
    if not isinstance(key, str):
        return f"has the key {key!r}; make it a string"
    if not isinstance(captions, tuple | list) or not all(isinstance(one, str) for one in captions):
        return (
            f"has the captions {captions!r:.80}; make them a tuple of strings, even for one caption"
        )
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            return (
                f"has an image of dtype {image.dtype} and shape {image.shape}; make it uint8, with the shape "
                "(height, width, 3)"
            )
    elif image is not None and not isinstance(image, bytes | Path | ObjectPath):
        return (
            f"has an image {kind_of(image)}; make it the bytes of a file, a pathlib.Path, or a uint8 NumPy "
            "array of the shape (height, width, 3)"
        )
    return ""
