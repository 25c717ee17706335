"""What a source yields: an `Example`, or the reason why there is none."""

from pathlib import Path
from typing import TypedDict

import numpy as np


class Example(TypedDict):
    """One image with what is known about it."""

    key: str  # names the example in messages and reports
    image: Path | bytes | np.ndarray  # an image file, its content, or pixels: uint8 HxWx3
    captions: tuple[str, ...]
    label: str | None  # name of its class


class BadSampleError(Exception):
    """One example cannot be used; the run goes on without it. Its text is the reason, in a few words."""
