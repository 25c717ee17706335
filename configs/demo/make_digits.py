"""Make the demos' data folder.

    python configs/demo/make_digits.py FOLDER (a few seconds)

scikit-learn's 1,797 scanned digits, joined two by two on a 32x32 canvas, show the numbers 20 to 99.
Sixteen of them are never captioned: to name them, a model has to have understood the other 64.
A scanned digit is used for training or for evaluation, never for both.

    FOLDER/SPLIT/captions.jsonl    "train" and "bilingual" to train on, "seen" and "unseen" to evaluate on
    FOLDER/SPLIT/images/*.png
    FOLDER/parallel/captions.jsonl sentences without images, also about the uncaptioned numbers

The captions are English. "bilingual" has captions in German, too, and "parallel" says each sentence in both
languages, for text towers that learn a second one.
"""

import functools
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Pixels, height and width.
CANVAS = 32

NUMBERS = tuple(range(20, 100))
# Two of every ten, such that each tens digit and each units digit stays among the captioned numbers.
UNSEEN = tuple(sorted(10 * t + (3 * t + k) % 10 for t in range(2, 10) for k in (1, 6)))
SEEN = tuple(n for n in NUMBERS if n not in UNSEEN)

# Split -> (which scanned digits, which numbers, images of each number, languages of the captions).
SPLITS = {
    "train": ("train", SEEN, 160, ("en",)),
    "bilingual": ("train", SEEN, 160, ("en", "de")),
    "seen": ("test", SEEN, 50, ("en",)),
    "unseen": ("test", UNSEEN, 50, ("en",)),
}
PARALLEL = "parallel"

CAPTIONS = {
    "en": (
        "a photo of the number {}",
        "a picture of the number {}",
        "the handwritten number {}",
        "the number {} written by hand",
        "two digits that read {}",
        "{} in white on black",
        "{}",
    ),
    "de": (
        "ein Foto der Zahl {}",
        "ein Bild der Zahl {}",
        "die handgeschriebene Zahl {}",
        "die Zahl {} von Hand geschrieben",
        "zwei Ziffern, die {} ergeben",
        "{} in Weiß auf Schwarz",
        "{}",
    ),
}

# The texts that stand for a number in zero-shot classification.
TEMPLATES = {
    "en": ("a photo of the number {}", "the handwritten number {}", "{}"),
    "de": ("ein Foto der Zahl {}", "die handgeschriebene Zahl {}", "{}"),
}

UNITS = {
    "en": ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "de": ("", "ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"),
}
TENS = {
    "en": ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"),
    "de": (
        "zwanzig",
        "dreißig",
        "vierzig",
        "fünfzig",
        "sechzig",
        "siebzig",
        "achtzig",
        "neunzig",
    ),
}


def number_words(number: int, language: str = "en") -> str:
    """Return the name of a number from 20 to 99: "forty two", in German "zweiundvierzig"."""
    tens, units = TENS[language][number // 10 - 2], UNITS[language][number % 10]
    if language == "de":
        return f"{units}und{tens}" if units else tens
    return f"{tens} {units}".strip()


def captions(number: int, language: str) -> tuple[str, ...]:
    """Return all sentences of a language about a number; those of two languages match one by one."""
    words = number_words(number, language)
    return tuple(caption.format(words) for caption in CAPTIONS[language])


@functools.cache
def digit_images(part: str) -> tuple[np.ndarray, ...]:
    """Return the scanned digits of a part, "train" (four of five) or "test": by digit 0..9, uint8 Nx8x8."""
    # Slow to import, and the names of the numbers do without.
    from sklearn.datasets import load_digits

    pixels_Nx64, labels_N = load_digits(return_X_y=True)
    shuffle = np.random.default_rng(0).permutation(len(labels_N))
    pixels_Nx64, labels_N = pixels_Nx64[shuffle], labels_N[shuffle]
    images_Nx8x8 = np.round(pixels_Nx64 * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    groups = [images_Nx8x8[labels_N == digit] for digit in range(10)]
    return tuple(
        group[len(group) // 5 :] if part == "train" else group[: len(group) // 5]
        for group in groups
    )


def compose(tens_8x8: np.ndarray, units_8x8: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return both digits side by side, each at a random place and scale: uint8 32x32x3, white on black."""
    canvas = np.zeros((CANVAS, CANVAS), np.uint8)
    half = CANVAS // 2
    for left, digit_8x8 in ((0, tens_8x8), (half, units_8x8)):
        width, height = int(rng.integers(12, half + 1)), int(rng.integers(15, 24))
        x, y = left + rng.integers(half - width + 1), rng.integers(CANVAS - height + 1)
        scaled = Image.fromarray(digit_8x8).resize((width, height), Image.Resampling.BICUBIC)
        canvas[y : y + height, x : x + width] = np.asarray(scaled)
    return np.repeat(canvas[:, :, None], 3, axis=2)


def draw_number(number: int, part: str, rng: np.random.Generator) -> np.ndarray:
    """Return a random picture of a number from 20 to 99, of the scanned digits of `part`: uint8 32x32x3."""
    tens, units = (digit_images(part)[digit] for digit in divmod(number, 10))
    return compose(tens[rng.integers(len(tens))], units[rng.integers(len(units))], rng)


def split_images(split: str) -> np.ndarray:
    """Draw all images of a split, the numbers in turn: uint8 Nx32x32x3."""
    part, numbers, images_each, _ = SPLITS[split]
    rng = np.random.default_rng(zlib.crc32(split.encode()))
    return np.stack([draw_number(number, part, rng) for number in numbers * images_each])


def image_rows(split: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of a split's captions.jsonl, one an image."""
    _, numbers, images_each, languages = SPLITS[split]
    for index, number in enumerate(numbers * images_each):
        yield {
            "image": f"images/{index:05}.png",
            "captions": {language: captions(number, language) for language in languages},
            "label": number_words(number),
        }


def parallel_rows() -> Iterator[dict[str, Any]]:
    """Yield the lines without images: every sentence about every number, in English and German."""
    for sentence in range(len(CAPTIONS["en"])):
        for number in NUMBERS:
            english, german = (captions(number, language)[sentence] for language in ("en", "de"))
            yield {
                "captions": {"en": [english], "de": [german]},
                "teacher_caption": english,
                "label": number_words(number),
            }


def write(folder: Path) -> None:
    """Write the whole data folder; its splits are always the same, to the last byte."""
    for split in SPLITS:
        _write_lines(folder / split / "captions.jsonl", image_rows(split))
        (folder / split / "images").mkdir()
        for index, image_32x32x3 in enumerate(split_images(split)):
            # All three channels are the same: a grey file is a third as large.
            picture = Image.fromarray(image_32x32x3[:, :, 0])
            picture.save(folder / split / "images" / f"{index:05}.png", compress_level=1)
    _write_lines(folder / PARALLEL / "captions.jsonl", parallel_rows())


def _write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
