"""The source of a user's own: what is refused, and how an error in it is told."""

import threading
from pathlib import Path

import numpy as np
import pytest

from lit_jax.data.example import BadSampleError
from lit_jax.data.own_source import open_passed
from lit_jax.data.workers import worker_errors
from lit_jax.errors import UserError

PIXELS = np.zeros((4, 4, 3), np.uint8)
GOOD = {"key": "a", "image": PIXELS, "captions": ("one",), "label": None}


class Words:
    """A source whose second example cannot be used, and whose third raises an error."""

    def __init__(self, length=4):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index == 1:
            raise BadSampleError("no caption", "no_caption")
        if index == 2:
            raise LookupError("the table is gone")
        return GOOD


class Picture:
    """An image of another library."""


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (Words, "class Words"),
        ({"a": GOOD}, "dict"),
        ("/data/pairs", "str"),
        (iter([GOOD]), "iterator"),
        (Words(length="4"), "__len__"),
        ([], "list"),
    ],
    ids=["class", "dict", "path", "iterator", "length", "empty"],
)
def test_what_is_no_source_is_refused(source, named):
    with pytest.raises(UserError, match=named):
        open_passed(source)


@pytest.mark.parametrize(
    ("example", "named"),
    [
        (("cat.jpg", "a cat"), "tuple"),
        ({"image": PIXELS, "captions": ("one",)}, "key"),
        (GOOD | {"key": 3}, "3"),
        # Each letter would be a caption.
        (GOOD | {"captions": "the number two"}, "captions .*'the number two'"),
        (GOOD | {"captions": (None,)}, "captions"),
        (GOOD | {"image": "cat.jpg"}, "str.*pathlib.Path"),
        (GOOD | {"image": Picture()}, "Picture"),
        (GOOD | {"image": np.zeros((4, 4, 3), np.float32)}, "float32"),
        (GOOD | {"image": np.zeros(4, np.uint8)}, r"\(4,\)"),
    ],
    ids=["pair", "no_key", "key", "text", "none", "path", "picture", "float", "vector"],
)
def test_an_example_of_another_kind_is_refused_by_its_position(example, named):
    with pytest.raises(UserError, match=rf"source\[1\] of the list .*{named}"):
        open_passed([GOOD, example])[1]


def test_good_examples_and_errors_of_the_source_pass():
    others = [{"image": image} for image in (b"", Path("a.jpg"), None, PIXELS[..., 0])]
    for example in (GOOD, *(GOOD | other for other in others), GOOD | {"captions": ["one"]}):
        assert open_passed([example])[0] is example
    source = open_passed(Words())
    with pytest.raises(BadSampleError):
        source[1]
    with pytest.raises(LookupError) as error:
        source[2]
    assert "source[2] of the Words" in error.value.__notes__[0]


def test_a_source_that_cannot_be_sent_to_workers_is_told():
    def send():
        with worker_errors():
            threading.Lock().__reduce_ex__(4)

    with pytest.raises(UserError, match=r"config.data.workers .*'_thread.lock'"):
        send()


def test_a_worker_that_ends_by_itself_is_told():
    with pytest.raises(UserError, match=r"config.data.workers .*\b3\b"), worker_errors():
        raise RuntimeError("Worker process was terminated unexpectedly with exit code 3. Search")
