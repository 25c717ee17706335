"""Kinds of image files: orientation, palettes, CMYK, several frames."""

import io

import numpy as np
import pytest
from PIL import Image

from lit_jax.data.image import decode

# Four colours, of which each kind of file keeps what it can.
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
