"""Tokenize texts with the text model's own tokenizer; load, save and check tokenizers."""

import copy
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lit_jax.data.pretrained import read_pretrained, unusable
from lit_jax.display import valid_unicode
from lit_jax.errors import UserError

log = logging.getLogger(__name__)

# Only the start of a long text is tokenized, at first this many characters for each required token: the
# tokens that are kept, and BEYOND more. See `_start`.
CHARACTERS_PER_TOKEN = 16
BEYOND = 128
# The fewest tokens of a vocabulary. CamemBERT's has three beside the special ones that stand for nothing.
FEWEST_WORDS = 4

# Texts that reveal a change in a saved tokenizer: letter case, accents, scripts, symbols and spaces.
_PROBES = (
    "Two dogs, and it's a PHOTO of 3 of them!",
    "ein Fluß in der STRASSE, un été à Noël",
    "ΟΔΟΣ İstanbul собака бежит",
    "犬が公園を走る。 một con chó  chạy",
    "😀 @someone http://a.b/c e\u0301 ﬁ",
)
# Capitals of several scripts, some with an unusual lower case, which show whether a tokenizer lowers letters.
_CASES = "AÉÑẞİΣЖ"


def load_tokenizer(
    folder: Path, *, max_length: int, fixed_length: bool = False, lowercase: bool | None = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, with `max_length` tokens as its `model_max_length`.

    Args:
        fixed_length: whether the text tower sees the padding, as SigLIP's does; then there is no mask.
        lowercase: whether texts are lower-cased first. None: only for SigLIP 2, whose model was trained on
            lower-case texts although its tokenizer (Gemma's) keeps capitals.

    Raises UserError if the folder has no tokenizer, or one that cannot pad or leaves no room for words.
    """
    about = f"The tokenizer in {folder}", "put the text model's own tokenizer files there."
    options: dict[str, Any] = {"model_input_names": ["input_ids"]} if fixed_length else {}
    # Encoders number positions from the left, so padding has to be on the right.
    tokenizer = read_pretrained(
        AutoTokenizer,
        folder,
        *about,
        model_max_length=max_length,
        padding_side="right",
        **options,
    )
    _check(tokenizer, folder, max_length)
    if not fixed_length and "attention_mask" not in tokenizer.model_input_names:
        # A tower with a mask would attend to the padding, whose length depends on the other texts.
        tokenizer.model_input_names = [*tokenizer.model_input_names, "attention_mask"]
    is_siglip2 = fixed_length and _is_gemma(tokenizer)
    if is_siglip2 and lowercase is None:
        # The export of a run that keeps capitals has `do_lower_case` set to False.
        lowercase = tokenizer.init_kwargs.get("do_lower_case") is not False
    elif is_siglip2:
        tokenizer.init_kwargs["do_lower_case"] = lowercase
    if lowercase and not _lowers(tokenizer):
        tokenizer = _lowercased(tokenizer, folder)
    try:
        # The first call sets truncation and padding inside the tokenizer. `tokenize` always asks for the
        # same, so later calls change nothing, and threads can share the tokenizer. The snowman needs the
        # unknown token, which a broken vocabulary may lack.
        tokenize(tokenizer, ["a ⛄"])
    # The tokenizers library raises bare Exceptions.
    except Exception as error:
        raise unusable(error, *about) from error
    return tokenizer


def _check(tokenizer: PreTrainedTokenizerBase, folder: Path, max_length: int) -> None:
    # transformers makes a tokenizer without words from a folder that has a config but no vocabulary.
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((folder / name).is_file() for name in names):
        raise UserError(
            f"{folder} has no tokenizer; put the text model's tokenizer files there "
            f"({', '.join(sorted(names))})."
        )
    # The stubs of transformers know a tokenizer's own methods by other types.
    of_class: Any = tokenizer
    words = of_class.get_vocab().keys() - of_class.get_added_vocab().keys()
    # transformers reads some damaged vocabularies as empty ones, which make every word unknown.
    if len(words) < FEWEST_WORDS:
        raise UserError(
            f"The tokenizer in {folder} has only {len(words)} tokens beside the special ones; its vocabulary "
            "is damaged: download it again."
        )
    if tokenizer.pad_token is None:
        raise UserError(
            f"The tokenizer in {folder} has no padding token; set pad_token in tokenizer_config.json."
        )
    # BERTweet's tokenizer replaces emojis by words, but keeps them silently if this package is missing.
    if getattr(tokenizer, "normalization", False) and getattr(tokenizer, "demojizer", True) is None:
        log.warning(
            "The tokenizer in %s needs the package emoji for texts with emojis; run pip install "
            "emoji==0.6.0.",
            folder,
        )
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise UserError(
            f"config.data.max_text_length={max_length} leaves no room for words beside the {special} special "
            "tokens of every text; raise it."
        )


def _is_gemma(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer is Gemma's, which SigLIP 2 uses under several class names."""
    if not tokenizer.is_fast:
        return False
    model: Any = _backend(tokenizer).model
    names = (tokenizer.eos_token, tokenizer.pad_token)
    return bool(getattr(model, "byte_fallback", False)) and names == ("<eos>", "<pad>")


def _lowers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer lower-cases texts by itself."""
    if not tokenizer.is_fast:
        return bool(getattr(tokenizer, "do_lower_case", False))
    lower = normalizers.Lowercase().normalize_str(_CASES)
    normalizer = _backend(tokenizer).normalizer
    return normalizer is not None and normalizer.normalize_str(_CASES) == normalizer.normalize_str(
        lower
    )


def _lowercased(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer with a lower-casing step in front.

    The step lowers letter by letter, as Siglip2Tokenizer does: a sigma at the end of a word does not become
    a final sigma. Raises UserError for a tokenizer without a Rust backend.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"The tokenizer in {folder} exists only in Python ({type(tokenizer).__name__}), so an export "
            "could not contain the step that lower-cases texts; set config.data.lowercase to None, and "
            "lower-case the captions in the data."
        )
    backend = copy.deepcopy(_backend(tokenizer))
    own = [backend.normalizer] if backend.normalizer is not None else []
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    # The generic class, because Gemma's own class rebuilds its steps on loading and ignores tokenizer.json.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        model_input_names=tokenizer.model_input_names,
        **tokenizer.special_tokens_map,
    )


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the Rust backend of a fast tokenizer."""
    fast: Any = tokenizer
    return fast.backend_tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the files of a tokenizer into a folder."""
    without_state(tokenizer).save_pretrained(folder)
    finish_saving(tokenizer, folder)


def without_state(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy for saving, without the truncation and padding of `tokenize`.

    Both would otherwise be stored in tokenizer.json and applied by whoever loads the tokenizer.
    """
    if not tokenizer.is_fast:
        return tokenizer
    plain = copy.deepcopy(tokenizer)
    backend = _backend(plain)
    backend.no_truncation()
    backend.no_padding()
    return plain


def finish_saving(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Correct the files that `save_pretrained` of a tokenizer or processor has written into a folder."""
    if tokenizer.is_fast:
        # transformers 5 has renamed the generic class, and transformers 4 does not know the new name.
        file = folder / "tokenizer_config.json"
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), "utf-8")
        return
    # BERTweet's class writes a file of merges that it does not read back correctly; the original is right.
    for attribute, name in tokenizer.vocab_files_names.items():
        original = getattr(tokenizer, attribute, None)
        if original and Path(original).is_file() and Path(original) != folder / name:
            shutil.copyfile(original, folder / name)


def check_saved(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise UserError unless transformers reads the saved tokenizer back with the same tokens."""
    what, advice = (
        f"The tokenizer saved in {folder}",
        "save it there with its own class of transformers.",
    )
    again = read_pretrained(AutoTokenizer, folder, what, advice)
    ours, theirs = tokenize(tokenizer, _PROBES), tokenize(again, _PROBES)
    if ours.keys() != theirs.keys() or any((ours[key] != theirs[key]).any() for key in ours):
        raise UserError(
            f"{type(tokenizer).__name__} of transformers cannot read back what it saves: some texts get "
            f"other tokens afterwards ({folder}); use a tokenizer of another class."
        )


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, length: int | None = None
) -> dict[str, np.ndarray]:
    """Return the token ids of N texts, each cut to `tokenizer.model_max_length` with its special tokens kept.

    Args:
        length: the number of columns, at least the length of the longest text; `model_max_length` always
            suffices. None: the length of the longest text, rounded up to a multiple of 8.

    Returns:
        int32 arrays, N x length: 'input_ids', and 'attention_mask' and 'token_type_ids' if the tokenizer
        makes them for its model.
    """
    tokens = _call(tokenizer, [_start(tokenizer, valid_unicode(text)) for text in texts])
    # Converted here, because `return_tensors` takes longer than tokenizing.
    arrays = {name: np.array(rows, np.int32) for name, rows in tokens.items()}
    if length is None:
        # Without a mask (SigLIP) the model sees the padding, which must be as long as in training.
        mask_NxL = arrays.get("attention_mask", np.ones_like(arrays["input_ids"]))
        length = -(-int(mask_NxL.sum(axis=1).max()) // 8) * 8
    return {name: np.ascontiguousarray(array[:, :length]) for name, array in arrays.items()}


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return all token ids of each text, uncut and without special tokens.

    For a long text only the ids of its start are returned, which are more than `tokenize` keeps.
    """
    return _whole(tokenizer, [_start(tokenizer, valid_unicode(text)) for text in texts])


def _call(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Any:
    """Call the tokenizer with fixed settings: other settings would change state that threads share."""
    return tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length
    )


def _whole(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not tokenizer.is_fast:
        # A tokenizer in Python keeps no state between calls. `verbose` would warn about long texts.
        return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    # Turning truncation off would change a setting that other threads use, so the parts that were cut off
    # are collected from `overflowing`.
    # The part next to the kept one comes first.
    direction = -1 if tokenizer.truncation_side == "left" else 1
    return [
        [
            token
            for part in (encoding, *encoding.overflowing)[::direction]
            for token, special in zip(part.ids, part.special_tokens_mask, strict=True)
            if not special
        ]
        for encoding in _call(tokenizer, texts).encodings
    ]


def _start(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return the part of a long text that determines which tokens are kept.

    Cutting a text changes only the tokens near the cut: at most the hundred letters of a word that is spelt
    out. A part with `BEYOND` tokens more than are kept is therefore enough. The number of characters alone
    does not tell, since megabytes of blanks or one long word may be a single token or none, so the part grows
    until it has enough tokens.
    """
    needed = tokenizer.model_max_length + BEYOND
    size = CHARACTERS_PER_TOKEN * needed
    while size < len(text):
        start = text[:size] if tokenizer.truncation_side == "right" else text[-size:]
        if len(_whole(tokenizer, [start])[0]) >= needed:
            return start
        size *= 4
    return text


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, config_key: str) -> None:
    """Raise UserError if the tokenizer makes ids for which a model of `vocab_size` has no embedding."""
    # Checked in advance, because JAX raises no error for an index that is out of range.
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(
            f"The tokenizer returns token ids up to {largest}, but the text model has only {vocab_size} "
            f"tokens; set {config_key} to a folder whose tokenizer and weights belong together."
        )
