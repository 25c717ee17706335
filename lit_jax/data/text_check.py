"""Statistics of a run's tokenized texts, logged once before the work starts."""

import dataclasses
import functools
import logging
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_jax.data.example import BadSampleError, Source, usable_captions
from lit_jax.data.mixture import Mixture
from lit_jax.data.text import BEYOND, token_ids
from lit_jax.display import printable
from lit_jax.distributed import process
from lit_jax.errors import UserError

log = logging.getLogger(__name__)

# The number of texts that are sampled.
SAMPLED = 1000
# The number of consecutive examples that are read together.
NEIGHBOURS = 125
# The share of the texts or tokens above which the log line becomes a warning.
TOO_MANY = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextStatistics:
    """Statistics of sampled texts.

    Attributes:
        texts: the number of texts.
        limit: the number of tokens to which texts are cut, including special tokens.
        cut: the share of the texts that are cut.
        longest: the number of tokens of the longest text, including special tokens.
        tokens: the number of tokens that are kept, without special tokens, and without the separate blank of
            sentencepiece in front of an unknown word.
        unknown: the share of `tokens` that are unknown.
        same: the share of the texts that get the same ids as a different text. Texts that differ only in
            letter case, blanks or Unicode form count as the same text.
    """

    texts: int
    limit: int
    cut: float
    longest: int
    tokens: int
    unknown: float
    same: float


def check_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], what: str) -> None:
    """Log the statistics of texts, in the first process alone; as a warning if a share is above 5 %.

    Args:
        texts: at most `SAMPLED` texts; without texts nothing is logged.
        what: the name of the data in the config.

    Raises UserError if all tokens of all texts are unknown.
    """
    if not texts:
        return
    found = text_statistics(tokenizer, texts)
    if found.tokens and found.unknown == 1:
        raise UserError(
            f"All {found.tokens} tokens of {found.texts} texts of {what} are unknown to the tokenizer "
            f"({type(tokenizer).__name__}), such as those of {printable(texts[0])[:60]!r}; choose a text "
            "tower whose tokenizer knows this language and script."
        )
    # Only the log line is for the first process: the error above has to end every process.
    if process.number():
        return
    advice = _advice(found, texts)
    # Only the start of a long text is tokenized, so a larger number is a lower bound.
    more = "at least " if found.longest > found.limit + BEYOND else ""
    log.log(
        logging.WARNING if advice else logging.INFO,
        "%d texts of %s: %.1f %% are cut at %d tokens (the longest has %s%d), %.1f %% of the tokens are "
        "unknown, %.1f %% of the texts have the same tokens as another text%s.",
        found.texts,
        what,
        100 * found.cut,
        found.limit,
        more,
        found.longest,
        100 * found.unknown,
        100 * found.same,
        "".join(f"; {text}" for text in advice),
    )


def _advice(found: TextStatistics, texts: Sequence[str]) -> list[str]:
    """Return what to do about each share that is too large."""
    known = (
        (
            found.cut,
            "if the text tower has more positions, raise config.data.max_text_length (of an exported folder: "
            "model_max_length in tokenizer_config.json)",
        ),
        (found.unknown, "choose a text tower whose tokenizer knows these texts"),
        (found.same, "the text tower cannot tell these texts apart"),
        (_is_one_text(texts), f"all of them are one text, {printable(texts[0])[:60]!r}"),
    )
    return [text for share, text in known if share > TOO_MANY]


def text_statistics(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> TextStatistics:
    """Return the statistics of one text or more."""
    special = tokenizer.num_special_tokens_to_add()
    room = tokenizer.model_max_length - special
    found = token_ids(tokenizer, texts)
    is_cut_left = tokenizer.truncation_side == "left"
    # A tokenizer may cut texts at either end.
    kept = [tuple(ids[-room:] if is_cut_left else ids[:room]) for ids in found]
    unknown, blank = _unknown_id(tokenizer), _blank_id(tokenizer)
    tokens = sum(len(ids) - ids.count(blank) for ids in kept)
    # Different texts with the same kept ids look alike to the text tower.
    said: dict[tuple[int, ...], set[str]] = defaultdict(set)
    for ids, text in zip(kept, texts, strict=True):
        said[ids].add(_plain(text))
    return TextStatistics(
        texts=len(texts),
        limit=tokenizer.model_max_length,
        cut=sum(len(ids) > room for ids in found) / len(texts),
        longest=max(map(len, found)) + special,
        tokens=tokens,
        unknown=sum(ids.count(unknown) for ids in kept) / max(tokens, 1),
        same=sum(len(said[ids]) > 1 for ids in kept) / len(texts),
    )


def _is_one_text(texts: Sequence[str]) -> bool:
    return len(texts) > 1 and len(set(map(_plain, texts))) == 1


def _plain(text: str) -> str:
    """Return the text without the distinctions that many tokenizers drop on purpose."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the unknown token, or None if that token has another meaning, too.

    CLIP's unknown token is its end-of-text token, for example.
    """
    unknown: Any = tokenizer.unk_token_id
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return None if unknown in others else unknown


def _blank_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of sentencepiece's blank, or None without one."""
    found: Any = tokenizer.convert_tokens_to_ids("▁")
    return None if found == tokenizer.unk_token_id else found


def some(texts: Sequence[str]) -> list[str]:
    """Return at most `SAMPLED` of the texts, evenly spaced."""
    count = min(len(texts), SAMPLED)
    return [texts[i * len(texts) // count] for i in range(count)]


def sample_captions(source: Source) -> tuple[list[str], list[str]]:
    """Return (captions of the source, captions for a text teacher), at most `SAMPLED` of each.

    The choice is deterministic. Each part of a mixture has its share, and consecutive examples are read
    together, so that few row groups of Parquet are decoded.
    """
    # Threads hide the latency of an object store.
    with ThreadPoolExecutor(16) as pool:
        read = [*pool.map(functools.partial(_captions, source), _positions(source))]
    captions = [text for of_example, _ in read for text in of_example]
    return some(captions), some([text for _, of_teacher in read for text in of_teacher])


def _positions(source: Source) -> list[int]:
    """Return the positions of evenly spaced blocks of `NEIGHBOURS` examples in each part of the source."""
    parts = [*source.parts.values()] if isinstance(source, Mixture) else [source]
    positions, start = [], 0
    for part in parts:
        count = min(len(part), max(SAMPLED // len(parts), NEIGHBOURS))
        # The blocks are evenly spaced and do not overlap: the gaps between them share the remaining examples.
        blocks = -(-count // NEIGHBOURS)
        for block in range(blocks):
            first = start + block * (len(part) - count) // max(blocks - 1, 1) + block * NEIGHBOURS
            positions.extend(range(first, first + min(NEIGHBOURS, count - block * NEIGHBOURS)))
        start += len(part)
    return positions


def _captions(source: Source, index: int) -> tuple[list[str], list[str]]:
    try:
        example = source[index]
        captions = usable_captions(example)
    # Bad samples are counted and reported when training reads them.
    except BadSampleError:
        return [], []
    return captions, [example.get("teacher_caption") or captions[0]]
