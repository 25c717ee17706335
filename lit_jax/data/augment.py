"""Random changes of an image's colours and shape: colour jitter and RandAugment.

Names, strengths and meaning are torchvision's, so that a recipe written for torchvision carries over:
ColorJitter, and RandAugment with 31 magnitudes, nearest-neighbour interpolation and black outside the image.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from lit_jax.config import ColorJitterConfig, RandAugmentConfig

Operation = Callable[[Image.Image, float], Image.Image]

NO_JITTER = ColorJitterConfig()
NO_OPERATIONS = RandAugmentConfig()

# The largest magnitude of RandAugment: torchvision counts 31 magnitudes, 0 to 30.
STRONGEST = 30


def color_jitter(
    image: Image.Image, config: ColorJitterConfig, rng: np.random.Generator
) -> Image.Image:
    """Return an RGB image with brightness, contrast, saturation and hue changed at random, in a random order.

    A change whose strength is 0 is left out.
    """
    active = [name for name in JITTER if getattr(config, name)]
    # The changes do not commute, so torchvision permutes them anew for each image.
    for i in rng.permutation(len(active)):
        operation, neutral, least = JITTER[active[i]]
        strength = getattr(config, active[i])
        image = operation(image, rng.uniform(max(least, neutral - strength), neutral + strength))
    return image


def rand_augment(
    image: Image.Image, config: RandAugmentConfig, rng: np.random.Generator
) -> Image.Image:
    """Return an RGB image after `config.operations` random operations of strength `config.magnitude`.

    An operation with two directions gets a random sign.
    """
    part = config.magnitude / STRONGEST
    for _ in range(config.operations):
        operation, strength, signed = RAND_AUGMENT[NAMES[rng.integers(len(NAMES))]]
        # The sign is drawn even if it is not used: every operation consumes the same amount of randomness.
        sign = -1 if rng.integers(2) and signed else 1
        image = operation(image, sign * part * strength)
    return image


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """Return a darker or brighter image; a factor of 0 makes the image black."""
    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """Return an image with less or more contrast; a factor of 0 makes every pixel the mean grey."""
    return ImageEnhance.Contrast(image).enhance(factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    """Return an image with paler or stronger colours; a factor of 0 makes the image greyscale."""
    return ImageEnhance.Color(image).enhance(factor)


def sharpness(image: Image.Image, factor: float) -> Image.Image:
    """Return a smoother or sharper image; a factor of 0 smooths the most."""
    return ImageEnhance.Sharpness(image).enhance(factor)


def hue(image: Image.Image, turn: float) -> Image.Image:
    """Return an image whose hue is rotated by `turn`, a fraction of the colour circle from -0.5 to 0.5."""
    channel, *others = image.convert("HSV").split()
    # torchvision scales by 255, too, although the circle has 256 steps, and truncates towards 0.
    shift = int(turn * 255)
    turned = channel.point([(value + shift) % 256 for value in range(256)])
    return Image.merge("HSV", (turned, *others)).convert("RGB")


def _shear(image: Image.Image, x: float, y: float) -> Image.Image:
    return _affine(image, (1.0, x, 0.0, y, 1.0, 0.0))


def _translate(image: Image.Image, x: float, y: float) -> Image.Image:
    """Move an image by fractions of its size, truncated to whole pixels."""
    right, down = int(x * image.width), int(y * image.height)
    # The matrix maps a pixel of the result to the pixel of the source, so the signs are reversed.
    return _affine(image, (1.0, 0.0, -float(right), 0.0, 1.0, -float(down)))


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Take the pixel at (x, y) from (ax + by + c, dx + ey + f) for `matrix` (a, b, c, d, e, f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _one_more(operation: Operation) -> Operation:
    return lambda image, amount: operation(image, 1 + amount)


# Key of the config -> (operation, the argument that changes nothing, the smallest argument allowed).
JITTER: dict[str, tuple[Operation, float, float]] = {
    "brightness": (brightness, 1.0, 0.0),
    "contrast": (contrast, 1.0, 0.0),
    "saturation": (saturation, 1.0, 0.0),
    "hue": (hue, 0.0, -0.5),
}

# Name -> (operation, the argument at the largest magnitude, whether the argument has a random sign).
# Torchvision translates by at most 150 of 331 pixels, and scales this distance to the image's size.
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
