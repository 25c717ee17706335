"""The digits of the demos, for the tests of all rooms: made once on a machine, as for a user."""

from lit_jax.config import SourceConfig
from lit_jax.configs.vit_bert import DIGITS
from lit_jax.data.example import Source
from lit_jax.data.makers import make_missing
from lit_jax.data.sources import open_source


def make_digits() -> None:
    make_missing([SourceConfig(path=str(DIGITS))])


def open_digits(split: str, *, text_only: bool = False) -> Source:
    make_digits()
    return open_source(SourceConfig(path=str(DIGITS), split=split), text_only=text_only)
