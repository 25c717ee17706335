"""The tokenizer of a run's text tower: how many tokens it makes of a text, and if it knows the captions."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_jax.config import DataConfig
from lit_jax.data.example import Source
from lit_jax.data.text import check_vocabulary, load_tokenizer
from lit_jax.data.text_check import check_texts, sample_captions
from lit_jax.errors import UserError
from lit_jax.models.tower import Tower

DEFAULT_LENGTH = 32


def open_tokenizer(
    folder: Path, tower: Tower, config: DataConfig, *, pretrained: bool
) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder as a tower needs it; its `model_max_length` is `text_length`.

    Raises UserError if there is none, or if it does not fit the tower.
    """
    tokenizer = load_tokenizer(
        folder,
        max_length=text_length(tower, config.max_text_length, pretrained=pretrained),
        fixed_length=tower.fixed_length,
        lowercase=config.lowercase,
    )
    check_vocabulary(tokenizer, tower.config.vocab_size, "config.model.text.model")
    return tokenizer


def text_length(tower: Tower, asked: int | None, *, pretrained: bool) -> int:
    """Return the number of tokens that texts are cut to, and padded to: `asked`, or what suits the tower.

    Raises UserError if the tower has no position for so many, or was trained with another number and sees it.
    """
    positions = tower.config.max_length
    kind = tower.config.model_type
    if asked is None:
        own = tower.fixed_length and pretrained
        return positions if own else min(DEFAULT_LENGTH, positions)
    if asked > positions:
        raise UserError(
            f"config.data.max_text_length={asked} is more than the text tower's {positions} positions; lower "
            "it, or set it to None."
        )
    if tower.fixed_length and pretrained and asked != positions:
        raise UserError(
            f"config.data.max_text_length={asked}, but a pretrained {kind} has no mask and pools the last of "
            f"{positions} tokens, be it padding, so that texts of another length get other embeddings; set "
            "it to None."
        )
    return asked


def check_captions(tokenizer: PreTrainedTokenizerBase, source: Source, teacher: Any = None) -> None:
    """Log what a run's tokenizer, and its teacher's, make of the captions in its data.

    Raises UserError if it knows none of their tokens.
    """
    captions, of_teacher = sample_captions(source)
    check_texts(tokenizer, captions, "config.data")
    if teacher is not None:
        check_texts(teacher, of_teacher, "config.data for the teacher")
