"""Random changes of an image's colours and shape: colour jitter and RandAugment.

Names, strengths and meaning are torchvision's (ColorJitter, RandAugment with its 31 magnitudes, nearest
neighbour and black outside), so that a recipe written for it can be taken over.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from lit_jax.config import ColorJitterConfig, RandAugmentConfig

Operation = Callable[[Image.Image, float], Image.Image]

NO_JITTER = ColorJitterConfig()
NO_OPERATIONS = RandAugmentConfig()

# The largest magnitude of RandAugment.
STRONGEST = 30


def color_jitter(
    image: Image.Image, config: ColorJitterConfig, rng: np.random.Generator
) -> Image.Image:
    """Return an RGB image with brightness, contrast, saturation and hue changed at random, in a random order.

    A change without a strength is left out.
    """
    active = [name for name in JITTER if getattr(config, name)]
    for i in rng.permutation(len(active)):
        operation, neutral, least = JITTER[active[i]]
        strength = getattr(config, active[i])
        image = operation(image, rng.uniform(max(least, neutral - strength), neutral + strength))
    return image


def rand_augment(
    image: Image.Image, config: RandAugmentConfig, rng: np.random.Generator
) -> Image.Image:
    """Return an RGB image after so many random operations, each in either direction if it has two."""
    part = config.magnitude / STRONGEST
    for _ in range(config.operations):
        operation, strength, signed = RAND_AUGMENT[NAMES[rng.integers(len(NAMES))]]
        sign = -1 if rng.integers(2) and signed else 1
        image = operation(image, sign * part * strength)
    return image


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """Return a darker or brighter image; a factor of 0 makes it black."""
    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """Return an image of another contrast; a factor of 0 makes it its mean grey."""
    return ImageEnhance.Contrast(image).enhance(factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    """Return an image of paler or stronger colours; a factor of 0 makes it grey."""
    return ImageEnhance.Color(image).enhance(factor)


def sharpness(image: Image.Image, factor: float) -> Image.Image:
    """Return a smoother or sharper image; a factor of 0 smooths most."""
    return ImageEnhance.Sharpness(image).enhance(factor)


def hue(image: Image.Image, turn: float) -> Image.Image:
    """Return an image whose colours are turned by a part of the colour circle, -0.5 to 0.5."""
    channel, *others = image.convert("HSV").split()
    shift = int(turn * 255)
    turned = channel.point([(value + shift) % 256 for value in range(256)])
    return Image.merge("HSV", (turned, *others)).convert("RGB")


def _shear(image: Image.Image, x: float, y: float) -> Image.Image:
    return _affine(image, (1.0, x, 0.0, y, 1.0, 0.0))


def _translate(image: Image.Image, x: float, y: float) -> Image.Image:
    """Move an image by parts of its size, rounded to whole pixels."""
    right, down = int(x * image.width), int(y * image.height)
    return _affine(image, (1.0, 0.0, -float(right), 0.0, 1.0, -float(down)))


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Take the pixel at (x, y) from (ax + by + c, dx + ey + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _one_more(operation: Operation) -> Operation:
    return lambda image, amount: operation(image, 1 + amount)


# Key of the config -> (operation, its argument that changes nothing, the least argument).
JITTER: dict[str, tuple[Operation, float, float]] = {
    "brightness": (brightness, 1.0, 0.0),
    "contrast": (contrast, 1.0, 0.0),
    "saturation": (saturation, 1.0, 0.0),
    "hue": (hue, 0.0, -0.5),
}

# Name -> (operation, its argument at the largest magnitude, whether the argument has a random sign).
RAND_AUGMENT: dict[str, tuple[Operation, float, bool]] = {
    "identity": (lambda image, _: image, 0.0, False),
    "shear_x": (lambda image, slope: _shear(image, slope, 0.0), 0.3, True),
    "shear_y": (lambda image, slope: _shear(image, 0.0, slope), 0.3, True),
    "translate_x": (lambda image, part: _translate(image, part, 0.0), 150 / 331, True),
    "translate_y": (lambda image, part: _translate(image, 0.0, part), 150 / 331, True),
    "rotate": (lambda image, degrees: image.rotate(degrees), 30.0, True),
    "brightness": (_one_more(brightness), 0.9, True),
    "color": (_one_more(saturation), 0.9, True),
    "contrast": (_one_more(contrast), 0.9, True),
    "sharpness": (_one_more(sharpness), 0.9, True),
    "posterize": (lambda image, bits: ImageOps.posterize(image, 8 - round(bits)), 4.0, False),
    "solarize": (lambda image, part: ImageOps.solarize(image, math.ceil(255 - part)), 255.0, False),
    "auto_contrast": (lambda image, _: ImageOps.autocontrast(image), 0.0, False),
    "equalize": (lambda image, _: ImageOps.equalize(image), 0.0, False),
}
NAMES = tuple(RAND_AUGMENT)
