"""What a source yields: an `Example`, or the reason why there is none."""

from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np


class Example(TypedDict):
    """One image with what is known about it, or captions alone."""

    key: str  # names the example in messages and reports
    image: Path | bytes | np.ndarray | None  # a file, its content, or pixels: uint8 HxWx3
    captions: tuple[str, ...]
    teacher_caption: NotRequired[str | None]  # what they say, in the language of a text teacher
    label: str | None  # name of its class


class BadSampleError(Exception):
    """One example cannot be used; the run goes on without it. Its text is the reason, in a few words."""
