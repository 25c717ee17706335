"""What a source is, and what it yields: an `Example`, or the reason why there is none."""

from typing import Literal, NotRequired, Protocol, TypedDict, get_args, runtime_checkable

import numpy as np

from lit_jax.data.files import File

BadKind = Literal[
    "missing",  # no image, or none where it should be
    "empty",  # 0 bytes
    "not_image",  # a file of another type
    "damaged",  # truncated, or broken in another way
    "too_large",  # a decompression bomb
    "no_caption",
    "not_utf8",
    "hostile_path",  # of a tar's member: a link, or a name that leads out of the folder
    "no_example",  # a line or row that does not say what it should
]
BAD_KINDS: tuple[BadKind, ...] = get_args(BadKind)


class Example(TypedDict):
    """One image with what is known about it, or captions alone."""

    key: str  # names the example in messages and reports
    # A file here or in an object store, its content, or pixels: uint8 HxWx3.
    image: File | bytes | np.ndarray | None
    captions: tuple[str, ...]
    languages: NotRequired[tuple[str, ...] | None]  # of the captions, one by one, where it is known
    left_out: NotRequired[
        tuple[str, ...]
    ]  # languages of captions that were not wanted, if no other was
    caption_weights: NotRequired[tuple[float, ...]]  # how often each is drawn; without: all alike
    teacher_caption: NotRequired[str | None]  # what they say, in the language of a text teacher
    label: str | None  # name of its class
    # Whether the label is the name of the folder that the image is in.
    label_is_folder: NotRequired[bool]
    # Why the label that is there cannot be used; a task without labels does not mind.
    label_problem: NotRequired[str]


class BadSampleError(Exception):
    """One example cannot be used; the run goes on without it. Its text is the reason, in a few words."""

    def __init__(self, reason: str, kind: BadKind = "damaged"):
        super().__init__(reason)
        self.kind: BadKind = kind


def usable_label(example: Example) -> str | None:
    """Return the label. Raise BadSampleError if there is one that cannot be used."""
    if problem := example.get("label_problem"):
        raise BadSampleError(problem, "no_example")
    return example["label"]


@runtime_checkable
class Source(Protocol):
    """A data set as a sequence; reading an image may wait until the image is decoded.

    An example that cannot be read raises BadSampleError.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...
