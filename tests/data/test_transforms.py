"""Augmentations against formulas in NumPy, kinds of image files, and JPEG decoding at a reduced size."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lit_jax.config import ColorJitterConfig, RandAugmentConfig
from lit_jax.data.augment import JITTER, RAND_AUGMENT, color_jitter, rand_augment
from lit_jax.data.image_processor import load_image_transform

LUMA = np.array([0.299, 0.587, 0.114])


def grey(pixels: np.ndarray) -> np.ndarray:
    """ITU-R 601, rounded as Pillow does: in sixteen bits of fraction."""
    return (pixels.astype(np.int64) @ np.array([19595, 38470, 7471]) + 0x8000) >> 16


def blend(pixels: np.ndarray, other: np.ndarray | float, factor: float) -> np.ndarray:
    """torchvision's: factor of the image and the rest of the other, what is out of range clipped."""
    return np.clip(factor * pixels + (1 - factor) * other, 0, 255)


def smooth(pixels: np.ndarray) -> np.ndarray:
    """The 3x3 kernel of sharpness, which leaves the border as it is."""
    result = pixels.astype(np.float64)
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    height, width, _ = pixels.shape
    result[1:-1, 1:-1] = sum(
        kernel[y, x] * pixels[y : y + height - 2, x : x + width - 2].astype(np.float64)
        for y in range(3)
        for x in range(3)
    )
    return result


def take(pixels: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The pixels that (y, x), in pixels and with centres at halves, fall into; black outside."""
    rows, columns = np.floor(y).astype(int), np.floor(x).astype(int)
    height, width, _ = pixels.shape
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    taken = pixels[np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)]
    return np.where(inside[..., None], taken, 0)


def centres(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    height, width, _ = pixels.shape
    return np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")


def shear_x(pixels: np.ndarray, slope: float) -> np.ndarray:
    y, x = centres(pixels)
    return take(pixels, y, x + slope * y)


def shear_y(pixels: np.ndarray, slope: float) -> np.ndarray:
    y, x = centres(pixels)
    return take(pixels, y + slope * x, x)


def translate_x(pixels: np.ndarray, part: float) -> np.ndarray:
    y, x = centres(pixels)
    return take(pixels, y, x - math.trunc(part * pixels.shape[1]))


def translate_y(pixels: np.ndarray, part: float) -> np.ndarray:
    y, x = centres(pixels)
    return take(pixels, y - math.trunc(part * pixels.shape[0]), x)


def rotate(pixels: np.ndarray, degrees: float) -> np.ndarray:
    """Anticlockwise around the middle."""
    y, x = centres(pixels)
    height, width, _ = pixels.shape
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    dy, dx = y - height / 2, x - width / 2
    return take(pixels, sin * dx + cos * dy + height / 2, cos * dx - sin * dy + width / 2)


def posterize(pixels: np.ndarray, lost_bits: float) -> np.ndarray:
    return pixels >> round(lost_bits) << round(lost_bits)


def solarize(pixels: np.ndarray, part: float) -> np.ndarray:
    return np.where(pixels >= 255 - part, 255 - pixels, pixels)


def auto_contrast(pixels: np.ndarray, _: float) -> np.ndarray:
    least, most = pixels.min((0, 1)).astype(float), pixels.max((0, 1)).astype(float)
    return (pixels - least) * 255 / (most - least)


def equalize(pixels: np.ndarray, _: float) -> np.ndarray:
    """torchvision's: by the histogram of each channel, its last entry left out of the step."""
    result = np.empty_like(pixels)
    for c in range(3):
        histogram = np.bincount(pixels[..., c].ravel(), minlength=256)
        step = (histogram.sum() - histogram[histogram > 0][-1]) // 255
        table = (np.cumsum(histogram) - histogram + step // 2) // max(step, 1)
        result[..., c] = np.clip(table, 0, 255)[pixels[..., c]] if step else pixels[..., c]
    return result


def hue(pixels: np.ndarray, turn: float) -> np.ndarray:
    """By way of hue, saturation and value in floating point."""
    rgb = pixels / 255
    value, least = rgb.max(-1), rgb.min(-1)
    chroma = np.where(value == least, 1, value - least)
    r, g, b = np.moveaxis(rgb, -1, 0)
    sextant = np.select(
        [value == r, value == g], [(g - b) / chroma % 6, (b - r) / chroma + 2], (r - g) / chroma + 4
    )
    angle = (sextant / 6 * 255 + int(turn * 255)) % 256 / 255  # in the steps of Pillow
    saturation = np.where(value == 0, 0, (value - least) / np.where(value == 0, 1, value))
    k = (np.array([5, 3, 1]) + angle[..., None] * 6) % 6
    edge = np.clip(np.minimum(k, 4 - k), 0, 1)
    return 255 * (value[..., None] - value[..., None] * saturation[..., None] * edge)


# Name -> (formula, largest difference): Pillow cuts a blend off where a float is rounded.
ORACLES = {
    "brightness": (lambda p, f: blend(p, 0.0, f), 1),
    "contrast": (lambda p, f: blend(p, math.floor(grey(p).mean() + 0.5), f), 1),
    "saturation": (lambda p, f: blend(p, grey(p)[..., None], f), 1),
    "hue": (hue, 7),  # a hue of Pillow's HSV is 1/255 of the circle: six grey levels
}
OPERATIONS = {
    "identity": (lambda p, _: p, 0),
    "shear_x": (shear_x, 0),
    "shear_y": (shear_y, 0),
    "translate_x": (translate_x, 0),
    "translate_y": (translate_y, 0),
    "rotate": (rotate, 0),
    "brightness": (lambda p, a: blend(p, 0.0, 1 + a), 1),
    "color": (lambda p, a: blend(p, grey(p)[..., None], 1 + a), 1),
    "contrast": (lambda p, a: blend(p, math.floor(grey(p).mean() + 0.5), 1 + a), 1),
    "sharpness": (lambda p, a: blend(p, smooth(p), 1 + a), 1.5),
    "posterize": (posterize, 0),
    "solarize": (solarize, 0),
    "auto_contrast": (auto_contrast, 1),
    "equalize": (equalize, 0),
}


def assert_near(image: Image.Image, expected: np.ndarray, most: float):
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image).astype(np.float64) - expected)
    if most:
        assert difference.max() <= most
    else:  # two floating-point forms of a coordinate may fall on the two sides of an edge
        assert (difference > 0).mean() <= 0.002


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("amount", [0.0, 0.35, 1.0, 1.6])
def test_color_changes_are_those_of_the_formula(noise, name, amount):
    if name == "hue":
        amount = (amount - 0.8) / 1.7
    pixels = noise(40, 31, 3)
    formula, most = ORACLES[name]
    operation, _, _ = JITTER[name]
    assert_near(operation(Image.fromarray(pixels), amount), formula(pixels, amount), most)


@pytest.mark.parametrize("name", RAND_AUGMENT)
@pytest.mark.parametrize("magnitude", [0, 9, 17, 30])
@pytest.mark.parametrize("sign", [1, -1])
def test_operations_are_those_of_the_formula(noise, name, magnitude, sign):
    pixels = noise(47, 36, 3) // 2 + 20  # so that autocontrast has something to do
    operation, strength, signed = RAND_AUGMENT[name]
    amount = (sign if signed else 1) * magnitude / 30 * strength
    formula, most = OPERATIONS[name]
    assert_near(operation(Image.fromarray(pixels), amount), formula(pixels, amount), most)


def test_the_operations_and_their_strengths_are_torchvisions():
    """At magnitude 9 of 30, of an image 331 pixels wide: the table of its RandAugment."""
    at_9 = {name: 0.3 * strength for name, (_, strength, _) in RAND_AUGMENT.items()}
    assert len(at_9) == 14
    assert [at_9["shear_x"], at_9["rotate"]] == pytest.approx([0.09, 9])
    assert at_9["translate_x"] * 331 == pytest.approx(45)
    assert at_9["brightness"] == pytest.approx(0.27)
    assert 8 - round(at_9["posterize"]) == 7
    assert 255 - at_9["solarize"] == pytest.approx(178.5)
    signed = {name for name, (_, _, signed) in RAND_AUGMENT.items() if signed}
    assert {
        "identity",
        "posterize",
        "solarize",
        "auto_contrast",
        "equalize",
    } == at_9.keys() - signed


STRENGTH = st.floats(0, 2)
JITTERS = st.builds(
    ColorJitterConfig,
    brightness=STRENGTH,
    contrast=STRENGTH,
    saturation=STRENGTH,
    hue=st.floats(0, 0.5),
)
AUGMENTS = st.builds(RandAugmentConfig, operations=st.integers(0, 3), magnitude=st.integers(0, 30))


@settings(max_examples=60)
@given(
    jitter=JITTERS,
    augment=AUGMENTS,
    seed=st.integers(0, 99),
    size=st.tuples(*[st.integers(1, 20)] * 2),
)
def test_any_augmentation_gives_the_same_image_for_the_same_seed(
    noise, jitter, augment, seed, size
):
    image = Image.fromarray(noise(*size, 3, seed=seed))

    def augmented() -> Image.Image:
        rng = np.random.default_rng(seed)
        return rand_augment(color_jitter(image, jitter, rng), augment, rng)

    assert (augmented().mode, augmented().size) == ("RGB", image.size)
    assert augmented().tobytes() == augmented().tobytes()


def test_without_strength_nothing_changes(noise):
    image, rng = Image.fromarray(noise(9, 9, 3)), np.random.default_rng(0)
    state = rng.bit_generator.state
    assert color_jitter(image, ColorJitterConfig(), rng) is image
    assert rand_augment(image, RandAugmentConfig(), rng) is image
    assert rng.bit_generator.state == state


def test_jitter_draws_within_its_strength():
    image, rng = Image.new("RGB", (1, 1), (100, 100, 100)), np.random.default_rng(0)
    for strength, least, most in ((0.4, 60, 140), (3.0, 0, 255)):
        config = ColorJitterConfig(brightness=strength)
        values = [color_jitter(image, config, rng).getpixel((0, 0))[0] for _ in range(300)]
        assert least - 1 <= min(values) <= least + 8
        assert most - 8 <= max(values) <= most


def test_rand_augment_draws_every_operation_and_both_directions():
    image, rng = Image.new("RGB", (30, 30)), np.random.default_rng(0)
    image.putpixel((15, 15), (255, 0, 0))
    config = RandAugmentConfig(operations=1, magnitude=10)
    results = {rand_augment(image, config, rng).tobytes() for _ in range(600)}
    assert len(results) >= 10
    places = {np.frombuffer(r, np.uint8).reshape(30, 30, 3)[..., 0].argmax() for r in results}
    shift = int(150 / 331 * 30 / 3)
    assert {15 * 30 + 15 + shift, 15 * 30 + 15 - shift} <= places


def test_train_augments_and_eval_does_not(processor_folder, noise):
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    plain = load_image_transform(processor_folder(**settings))
    image = noise(12, 10, 3)
    for change in (
        {"color_jitter": ColorJitterConfig(saturation=0.9)},
        {"rand_augment": RandAugmentConfig(operations=2)},
    ):
        transform = load_image_transform(processor_folder(**settings), **change)
        np.testing.assert_array_equal(transform.eval(image), plain.eval(image))
        results = [transform.train(image, np.random.default_rng(seed)) for seed in (0, 1, 0)]
        assert results[0].dtype == np.uint8
        assert results[0].shape == (8, 8, 3)
        np.testing.assert_array_equal(results[0], results[2])
        assert not np.array_equal(results[0], results[1])
