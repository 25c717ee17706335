"""Texts to token ids, with the text model's own tokenizer."""

import copy
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_jax.errors import UserError
from lit_jax.printable import valid_unicode


def load_tokenizer(folder: Path, *, max_length: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; `tokenize` cuts texts to its `model_max_length`, here `max_length`.

    Raises UserError if there is none, if it cannot pad, or if it leaves no room for words.
    """
    try:
        # Encoders count positions from the left, so whatever is not text has to be on the right.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, model_max_length=max_length, padding_side="right"
        )
    except Exception as error:  # of a broken file transformers lets through whatever it raises
        raise UserError(
            f"The tokenizer in {folder} cannot be loaded ({textwrap.shorten(str(error), 150)}); "
            "put the text model's own tokenizer files there."
        ) from error
    # Of a folder with a config but no vocabulary transformers makes a tokenizer that knows no word.
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((folder / name).is_file() for name in names):
        raise UserError(
            f"{folder} has no tokenizer; put the text model's there ({', '.join(sorted(names))})."
        )
    if tokenizer.pad_token is None:
        raise UserError(
            f"The tokenizer in {folder} has no padding token; set pad_token in tokenizer_config.json."
        )
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise UserError(
            f"config.data.max_text_length={max_length} leaves no room for words beside the {special} special "
            "tokens of every text; raise it."
        )
    try:
        # The first call sets truncation and padding inside the tokenizer. As `tokenize` always asks for
        # the same, later calls change nothing there, and threads can share the tokenizer. The text is
        # one that needs the unknown token, should the vocabulary lack it.
        tokenize(tokenizer, ["a ⛄"])
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(
            f"The tokenizer in {folder} does not work ({textwrap.shorten(str(error), 150)}); "
            "put the text model's own tokenizer files there."
        ) from error
    return tokenizer


def without_state(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy to save for others: what `tokenize` asked for last would go into tokenizer.json, too."""
    plain = copy.deepcopy(tokenizer)
    backend: Any = plain.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return plain


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, length: int | None = None
) -> dict[str, np.ndarray]:
    """Token ids of N texts, each cut to `tokenizer.model_max_length` with its special tokens kept.

    Args:
        length: of the result, at least that of the longest text (`model_max_length` always is).
            None: that of the longest text, rounded up to a multiple of 8.

    Returns:
        int32 arrays, N x length: 'input_ids', and of 'attention_mask' and 'token_type_ids' those that the
        tokenizer makes for its model.
    """
    tokens = tokenizer(
        [valid_unicode(text) for text in texts],
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
    )
    # Not by return_tensors: that takes longer than to find the tokens.
    arrays = {name: np.array(rows, np.int32) for name, rows in tokens.items()}
    if length is None:
        # A model without a mask (SigLIP) sees the padding, too: always as much as it was trained with.
        mask_NxL = arrays.get("attention_mask", np.ones_like(arrays["input_ids"]))
        length = -(-int(mask_NxL.sum(axis=1).max()) // 8) * 8
    return {name: np.ascontiguousarray(array[:, :length]) for name, array in arrays.items()}


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, config_key: str) -> None:
    """Raises UserError if the tokenizer makes ids for which a model of `vocab_size` has no embedding."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(
            f"The tokenizer makes token ids up to {largest} but the text model knows only {vocab_size} "
            f"tokens; point {config_key} to a folder whose tokenizer and weights belong together."
        )
