"""Augmentations against formulas in NumPy, kinds of image files, and JPEG decoding at a reduced size."""

import dataclasses
import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from lit_jax.config import ColorJitterConfig, RandAugmentConfig
from lit_jax.data.augment import JITTER, RAND_AUGMENT, color_jitter, rand_augment
from lit_jax.data.image import ImageTransform, decode, reduce_jpeg
from lit_jax.data.image_processor import load_image_transform
from tests.data.conftest import train

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


# ---- Kinds of files. Four colours, of which each kind of file keeps what it can.

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
QUARTERS = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8).repeat(16, 0).repeat(16, 1)


def quarters(image: Image.Image) -> list[tuple[int, ...]]:
    """The colours in the middle of the quarters, row by row."""
    assert image.mode == "RGB"
    w, h = image.size
    return [image.getpixel((x, y)) for y in (h // 4, 3 * h // 4) for x in (w // 4, 3 * w // 4)]


def assert_quarters(content: bytes, expected, most: int = 0, mode: str | None = None):
    with Image.open(io.BytesIO(content)) as opened:
        assert mode is None or opened.mode == mode
    difference = np.subtract(quarters(decode(content)), expected)
    assert np.abs(difference).max() <= most, quarters(decode(content))


ORIENTATIONS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_every_exif_orientation_is_turned_upright(encode, orientation, kind):
    """A camera writes the picture as `ORIENTATIONS` says, and the number."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    wide = QUARTERS[:20]
    written = Image.fromarray(np.ascontiguousarray(ORIENTATIONS[orientation](wide)))
    content = encode(written, kind, exif=exif, **({"quality": 95} if kind != "PNG" else {}))
    decoded = decode(content)
    assert decoded.size == (32, 20)
    np.testing.assert_allclose(
        np.asarray(decoded)[[4, 4, 18, 18], [8, 24, 8, 24]].astype(int),
        [RED, GREEN, BLUE, WHITE],
        atol=0 if kind in ("PNG", "TIFF") else 8,
    )


def test_grey_and_two_valued_images(encode):
    greys = Image.fromarray(QUARTERS[..., 2])  # what is blue or white
    black_and_white = [(0, 0, 0)] * 2 + [WHITE] * 2
    assert_quarters(encode(greys), black_and_white, mode="L")
    assert_quarters(encode(greys, "JPEG"), black_and_white, 2, mode="L")
    assert_quarters(encode(greys.convert("1")), black_and_white, mode="1")
    assert_quarters(encode(greys.convert("LA")), black_and_white, mode="LA")


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B")])
def test_16_bit_grey(encode, kind, mode):
    values = (QUARTERS[..., 0].astype(np.uint16) * 257 // 2).astype(">u2" if "B" in mode else "<u2")
    image = Image.frombytes(mode, (32, 32), values.tobytes())
    grey_127, black = (127,) * 3, (0,) * 3
    assert_quarters(encode(image, kind), [grey_127, black, black, grey_127])


def test_16_bit_rgb_and_grey_with_alpha(make_png):
    rgb = np.zeros((2, 2, 3), ">u2")
    rgb[0, 0], rgb[1, 1] = (65535, 32768, 255), (255, 256, 65535)
    decoded = np.asarray(decode(make_png(rgb, colour_type=2)))
    np.testing.assert_array_equal(decoded[0, 0], (255, 128, 0))
    np.testing.assert_array_equal(decoded[1, 1], (0, 1, 255))
    grey_alpha = np.array([[[0, 65535], [65535, 0]], [[32768, 65535], [0, 32768]]], ">u2")
    decoded = np.asarray(decode(make_png(grey_alpha, colour_type=4)))
    assert decoded[..., 0].tolist() == [[0, 255], [128, 127]]


@pytest.fixture(scope="session")
def make_png():
    """A PNG file of 16 bits a channel, which Pillow does not write in colour."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    def make_png(pixels: np.ndarray, *, colour_type: int) -> bytes:
        height, width, _ = pixels.shape
        header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
        rows = b"".join(b"\0" + row.tobytes() for row in pixels)
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
        )

    return make_png


def test_palettes_and_transparency(encode):
    image = Image.fromarray(QUARTERS)
    colours = [RED, GREEN, BLUE, WHITE]
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    assert_quarters(encode(palette), colours, mode="P")
    assert_quarters(encode(palette, "GIF"), colours)
    clear = image.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(QUARTERS[..., 1] == 0, 0, 255).astype(np.uint8)))
    # Red and blue are transparent: what is behind them is white.
    assert_quarters(encode(clear), [WHITE, GREEN, WHITE, WHITE], mode="RGBA")
    assert_quarters(encode(clear, "WEBP", lossless=True), [WHITE, GREEN, WHITE, WHITE])
    half = image.convert("RGBA")
    half.putalpha(128)
    assert_quarters(encode(half), [(255, 127, 127), (127, 255, 127), (127, 127, 255), WHITE], 1)
    with_alpha = palette.convert("PA")
    assert quarters(decode(encode(with_alpha, "TIFF"))) == colours


def test_cmyk(encode):
    image = Image.fromarray(QUARTERS).convert("CMYK")
    colours = [RED, GREEN, BLUE, WHITE]
    assert_quarters(encode(image, "TIFF"), colours, mode="CMYK")
    # Adobe's JPEG files have the four inks inverted, and Pillow writes them so.
    content = encode(image, "JPEG", quality=95)
    assert b"Adobe" in content
    assert_quarters(content, colours, 6, mode="CMYK")


def test_ycck(encode):
    """The first three inks as luma and chroma: the file says so in the last byte of Adobe's marker."""
    inks = 255 - np.asarray(Image.fromarray(QUARTERS).convert("CMYK"))  # as Adobe inverts them
    ycc = np.asarray(Image.fromarray(255 - inks[..., :3]).convert("YCbCr"))
    ycck = Image.merge(
        "CMYK", [Image.fromarray(255 - c) for c in (*np.moveaxis(ycc, -1, 0), inks[..., 3])]
    )
    content = bytearray(encode(ycck, "JPEG", quality=95, subsampling=0))
    marker = content.index(b"Adobe")
    assert content[marker + 11] == 0
    content[marker + 11] = 2
    assert_quarters(bytes(content), [RED, GREEN, BLUE, WHITE], 8, mode="CMYK")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames_is_taken(encode, kind):
    first, *others = (Image.fromarray(np.roll(QUARTERS, 16 * n, axis=n % 2)) for n in range(3))
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode(first, kind, save_all=True, append_images=others, **options)
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.n_frames == 3
    assert_quarters(content, [RED, GREEN, BLUE, WHITE])


def test_progressive_jpeg(encode):
    content = encode(Image.fromarray(QUARTERS), "JPEG", progressive=True, quality=95)
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.info["progressive"]
    assert_quarters(content, [RED, GREEN, BLUE, WHITE], 6)


# ---- JPEG files decoded at a reduced size.


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Two photographs, 1280 x 854."""
    return [Image.fromarray(p).resize((1280, 854)) for p in load_sample_images().images]


def transforms(folder, **settings) -> tuple[ImageTransform, ImageTransform]:
    """With an augmentation: without any, training sees what evaluation sees."""
    reduced = load_image_transform(folder, flip=True, **settings)
    assert reduced.reduced_jpeg
    return reduced, dataclasses.replace(reduced, reduced_jpeg=False)


def distance(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    return abs(np.subtract(image, other, dtype=int))


PROCESSORS = {
    "squeezed": {"image_processor_type": "ViTImageProcessor"},
    "cropped": {"image_processor_type": "CLIPImageProcessor"},
}


@pytest.mark.parametrize("size", [64, 112, 224, 320])
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("settings", [{}, {"crop_min_area": 0.3}])
def test_reduced_decoding_is_near_full_decoding(
    processor_folder, photos, encode, size, processor, settings
):
    """In pixel values of 0 to 255: 1.5 on average of an image, 20 in any pixel (measured: 1.3 and 15)."""
    folder = processor_folder(**PROCESSORS[processor])
    reduced, full = transforms(folder, image_size=size, **settings)
    for photo in photos:
        content = encode(photo, "JPEG", quality=90)
        for seed in range(3):
            difference = distance(train(reduced, content, seed), train(full, content, seed))
            assert difference.mean() <= 1.5
            assert difference.max() <= 20


@pytest.mark.parametrize(
    ("size", "factor"), [(428, 1), (427, 2), (285, 2), (142, 4), (71, 8), (20, 8), (1, 8)]
)
def test_reduced_decoding_reduces_as_far_as_the_result_allows(photos, encode, size, factor):
    with Image.open(io.BytesIO(encode(photos[0], "JPEG"))) as opened:
        assert reduce_jpeg(opened, min(1.0, size / 854)) == factor
        assert opened.size == (-(-1280 // factor), -(-854 // factor))
        assert min(opened.size) >= size
        opened.load()
    with Image.open(io.BytesIO(encode(photos[0]))) as opened:
        assert reduce_jpeg(opened, 0.1) == 1
        assert opened.size == (1280, 854)


def test_only_training_and_only_jpeg_is_reduced(processor_folder, photos, encode):
    reduced, full = transforms(processor_folder(**PROCESSORS["squeezed"]), image_size=64)
    jpeg, png = encode(photos[0], "JPEG"), encode(photos[0])
    np.testing.assert_array_equal(reduced.eval(jpeg), full.eval(jpeg))

    np.testing.assert_array_equal(train(reduced, png), train(full, png))
    assert not np.array_equal(train(reduced, jpeg), train(full, jpeg))
    plain = dataclasses.replace(reduced, flip=False)
    np.testing.assert_array_equal(train(plain, jpeg), plain.eval(jpeg))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_reduced_decoding_crops_the_same_place_of_a_turned_photo(
    processor_folder, photos, encode, orientation
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    written = ORIENTATIONS[orientation](np.asarray(photos[1]))
    content = encode(np.ascontiguousarray(written), "JPEG", quality=95, exif=exif)
    folder = processor_folder(**PROCESSORS["squeezed"])
    reduced, full = transforms(folder, image_size=80, crop_min_area=0.2)
    for seed in range(4):
        image = train(reduced, content, seed)
        assert distance(image, train(full, content, seed)).mean() <= 1.5
        assert distance(image, train(full, np.asarray(photos[1]), seed)).mean() <= 3
