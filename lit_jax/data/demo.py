"""The embedded demo: handwritten two-digit numbers and their names.

scikit-learn's 1,797 scanned digits, joined two by two on a 32x32 canvas, show the numbers 20 to 99.
Sixteen of them are never captioned: to name them, a model has to have understood the other 64.
A scanned digit is used for training or for evaluation, never for both.

The captions are English. For text towers that learn a second language there are also the sentences of
both languages without images ("parallel"), and the training images with captions in both ("bilingual").
"""

import functools
import zlib

import numpy as np
from PIL import Image

from lit_jax.data.example import Example
from lit_jax.errors import UserError

CANVAS = 32  # pixels, height and width

NUMBERS = tuple(range(20, 100))
# Two of every ten, such that each tens digit and each units digit stays among the captioned numbers.
UNSEEN = tuple(sorted(10 * t + (3 * t + k) % 10 for t in range(2, 10) for k in (1, 6)))
SEEN = tuple(n for n in NUMBERS if n not in UNSEEN)

# split -> (which scanned digits, which numbers, images of each number, languages of the captions)
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
    """The name of a number from 20 to 99: "forty two", in German "zweiundvierzig"."""
    tens, units = TENS[language][number // 10 - 2], UNITS[language][number % 10]
    if language == "de":
        return f"{units}und{tens}" if units else tens
    return f"{tens} {units}".strip()


def captions(number: int, language: str) -> tuple[str, ...]:
    """All sentences of a language about a number; those of two languages match one by one."""
    words = number_words(number, language)
    return tuple(caption.format(words) for caption in CAPTIONS[language])


@functools.cache
def digit_images(part: str) -> tuple[np.ndarray, ...]:
    """The scanned digits of a part, "train" (four of five) or "test": by digit 0..9, uint8 Nx8x8."""
    from sklearn.datasets import load_digits  # slow to import, and nothing but the demo needs it

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
    """Both digits side by side, each at a random place and scale: uint8 32x32x3, white on black."""
    canvas = np.zeros((CANVAS, CANVAS), np.uint8)
    half = CANVAS // 2
    for left, digit_8x8 in ((0, tens_8x8), (half, units_8x8)):
        width, height = int(rng.integers(12, half + 1)), int(rng.integers(15, 24))
        x, y = left + rng.integers(half - width + 1), rng.integers(CANVAS - height + 1)
        scaled = Image.fromarray(digit_8x8).resize((width, height), Image.Resampling.BICUBIC)
        canvas[y : y + height, x : x + width] = np.asarray(scaled)
    return np.repeat(canvas[:, :, None], 3, axis=2)


def draw_number(number: int, part: str, rng: np.random.Generator) -> np.ndarray:
    """A random picture of a number from 20 to 99, of the scanned digits of `part`: uint8 32x32x3."""
    tens, units = (digit_images(part)[digit] for digit in divmod(number, 10))
    return compose(tens[rng.integers(len(tens))], units[rng.integers(len(units))], rng)


@functools.cache
def split_images(split: str) -> np.ndarray:
    """All images of a split, the numbers in turn: uint8 Nx32x32x3. Drawn once, in about a second."""
    part, numbers, images_each, _ = SPLITS[split]
    rng = np.random.default_rng(zlib.crc32(split.encode()))
    return np.stack([draw_number(number, part, rng) for number in numbers * images_each])


class DemoSource:
    """The demo's split "train", "bilingual", "seen" or "unseen"; always the same images.

    Raises UserError if there is no such split.
    """

    def __init__(self, split: str | None):
        if split not in SPLITS:
            raise UserError(
                f"The demo has no split {split!r} with images; its splits are {', '.join(SPLITS)}, and "
                f"{PARALLEL} for a text tower that learns from a teacher."
            )
        self._split = split
        _, self._numbers, _, self._languages = SPLITS[split]
        self._images_Nx32x32x3 = split_images(split)

    def __len__(self) -> int:
        return len(self._images_Nx32x32x3)

    def __getitem__(self, index: int) -> Example:
        number = self._numbers[index % len(self._numbers)]
        return Example(
            key=f"{self._split}/{index}",
            image=self._images_Nx32x32x3[index],
            captions=tuple(text for lang in self._languages for text in captions(number, lang)),
            languages=tuple(lang for lang in self._languages for _ in CAPTIONS[lang]),
            label=number_words(number),
        )


class ParallelDemoSource:
    """Every sentence about every number, also the uncaptioned ones, in English and German: no images."""

    def __len__(self) -> int:
        return len(NUMBERS) * len(CAPTIONS["en"])

    def __getitem__(self, index: int) -> Example:
        number, sentence = NUMBERS[index % len(NUMBERS)], index // len(NUMBERS)
        english, german = (captions(number, language)[sentence] for language in ("en", "de"))
        return Example(
            key=f"{PARALLEL}/{index}",
            image=None,
            captions=(english, german),
            languages=("en", "de"),
            teacher_caption=english,
            label=number_words(number),
        )
