"""Image files of any kind to RGB pixels the right way up; a broken one is a bad sample."""

import contextlib
import errno
import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from lit_jax.data.example import BadSampleError
from lit_jax.data.files import File, ObjectPath, find, read_whole

# What a source gives; None: there is no image.
ImageFile = File | bytes | np.ndarray | None
WHITE = (255, 255, 255, 255)
# Formats that are read, by Pillow's names, and the endings of their files in every kind of source. Pillow
# knows more, and starts Ghostscript for one of them (EPS). The table stays the same whatever Pillow is
# installed, since the endings decide which samples a source has; an index of tar files is made again when
# they change (VERSION there). TGA stands last: it has no mark at its start.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "QOI": (".qoi",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "TGA": (".tga",),
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)


def decode(image: ImageFile) -> Image.Image:
    """Return the first frame of an image as upright RGB.

    The EXIF orientation is applied, transparency is put on white and 16-bit grey is scaled to 8 bits.

    Raises:
        BadSampleError: there is no such file, or it holds no complete image of a sane size.
    """
    with opened(image) as picture:
        return upright_rgb(picture)


def file_content(path: File) -> bytes:
    """Return the bytes of an image file; raises BadSampleError if it cannot be read."""
    try:
        return read_whole(find(path))
    except OSError as error:
        kind = "too_large" if error.errno == errno.EFBIG else "missing"
        raise BadSampleError(error.strerror or str(error), kind) from error
    except ValueError as error:  # no path at all: it has a null byte, or is no valid Unicode
        raise BadSampleError(str(error), "missing") from error


@contextlib.contextmanager
def opened(image: ImageFile) -> Iterator[Image.Image]:
    """Open an image and read no more than its header; what goes wrong inside the block is a bad sample."""
    if image is None:
        raise BadSampleError("no image", "missing")
    if isinstance(image, np.ndarray):
        yield Image.fromarray(image)
        return
    content = file_content(image) if isinstance(image, Path | ObjectPath) else image
    if not content:
        raise BadSampleError("0 bytes", "empty")
    try:
        with Image.open(io.BytesIO(content), formats=[*FORMATS]) as picture:
            _check_size(picture)
            yield picture
    except BadSampleError:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadSampleError(_other_file(content), "not_image") from error
    # The warning is an exception only where the caller's filters make it one.
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadSampleError(str(error), "too_large") from error
    except Exception as error:
        # Pillow's parsers let through whatever a broken file makes them raise.
        raise BadSampleError(str(error) or type(error).__name__) from error


def _other_file(content: bytes) -> str:
    """Return what a file is that is in none of `FORMATS`, by its first bytes alone."""
    Image.init()
    for name, (_, accepts) in Image.OPEN.items():
        with contextlib.suppress(Exception):  # the start may be too short
            if name not in FORMATS and accepts and accepts(content[:16]):
                return f"an image in {name} format, and only {', '.join(FORMATS)} are read"
    return "not an image"


def _check_size(picture: Image.Image) -> None:
    """Raise BadSampleError for a picture of more pixels than Pillow takes without a warning."""
    # Pillow itself raises only above twice this size. A warnings filter would hold for the whole process.
    width, height = picture.size
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        reason = f"{width} x {height} pixels are more than {Image.MAX_IMAGE_PIXELS}"
        raise BadSampleError(f"{reason}: could be a decompression bomb", "too_large")


def upright_rgb(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)  # an upright one is not copied
    return _to_rgb(image)


def orientation_of(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def reduce_jpeg(image: Image.Image, part: float) -> float:
    """Have a JPEG file decoded at 1/2, 1/4 or 1/8 of its size, the smallest that is at least `part` of it.

    The decoder computes only the low frequencies of each block of 8x8 pixels, which saves time and averages
    the pixels. Returns the factor that the size is divided by; 1 for files of other formats.
    """
    width, height = image.size
    drafted = image.draft(None, (math.ceil(width * part), math.ceil(height * part)))
    if drafted is None:
        return 1.0
    _, (_, _, reduced_width, _) = drafted
    return width / reduced_width


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "I" and image.format == "PPM":
        # Pillow scales grey of more than 8 bits in PGM and PNM files to 0 ... 65535, whatever their maximum.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadSampleError(f"pixels of mode {image.mode} have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()  # `convert` would do so too, and then copy it
    return image
