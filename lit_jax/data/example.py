"""What a source is, and what it yields: an `Example`, or the reason why there is none."""

from pathlib import Path
from typing import NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np


class Example(TypedDict):
    """One image with what is known about it, or captions alone."""

    key: str  # names the example in messages and reports
    image: Path | bytes | np.ndarray | None  # a file, its content, or pixels: uint8 HxWx3
    captions: tuple[str, ...]
    languages: NotRequired[tuple[str, ...] | None]  # of the captions, one by one, where it is known
    caption_weights: NotRequired[tuple[float, ...]]  # how often each is drawn; without: all alike
    teacher_caption: NotRequired[str | None]  # what they say, in the language of a text teacher
    label: str | None  # name of its class


class BadSampleError(Exception):
    """One example cannot be used; the run goes on without it. Its text is the reason, in a few words."""


@runtime_checkable
class Source(Protocol):
    """A data set as a sequence; reading an image may wait until the image is decoded."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...
