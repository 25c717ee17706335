"""The tokenizer and the small image transform of the tests of data."""

from tests.data.conftest import image_transform, tokenizer

__all__ = ["image_transform", "tokenizer"]
