"""Images of any kind to the bytes that go to the devices: decoded, upright, resized, cropped, augmented.

A broken image is a bad sample. For evaluation the pixels equal those that the model's own image processor
(transformers, PIL backend) rescales and normalises, to the last bit. Rescaling and normalising are one
multiplication and one addition, which the device does in front of the tower: on the way there bytes are a
quarter of float32. image_processor.py makes the transform from the processor's file.
"""

import contextlib
import dataclasses
import errno
import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from lit_jax.config import ColorJitterConfig, RandAugmentConfig
from lit_jax.data.augment import NO_JITTER, NO_OPERATIONS, color_jitter, rand_augment
from lit_jax.data.example import BadSampleError
from lit_jax.data.files import File, ObjectPath, find, read_whole
from lit_jax.data.resample import FILTERS, enlarge_window
from lit_jax.models.normalization import Normalization

# An image as a source gives it; None: there is no image.
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


# By EXIF orientation: where width is height, and which ends of a file's rows or columns come first upright.
TURNED = (5, 6, 7, 8)
FROM_RIGHT, FROM_BOTTOM = (2, 3, 6, 7), (3, 4, 7, 8)
# A JPEG file decoded at a reduced size is still so many times as high and wide as what is made of it, so that
# the last resizing averages pixels as it would have: about half a grey level away from decoding in full.
KEPT = 1.5
# An image one pixel high is enlarged to gigabytes before its middle is cut out; of more pixels than these
# only the crop is computed.
MAX_RESIZED_PIXELS = 1 << 25


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """The way from an image to the pixels of the image tower; plain values, which worker processes can get.

    Attributes:
        height, width: of the result, pixels.
        resize: (height, width) to resize to; one number: the shorter edge; None: no resizing.
        center_crop: whether the result is cut out of the middle of what was resized.
        resample: Pillow's number of the interpolation.
        normalization: what the processor makes of a pixel's value; not done here.
        crop_min_area, random_crop, flip, color_jitter, rand_augment, reduced_jpeg: of `train`, see
            `DataConfig`.
    """

    height: int
    width: int
    resize: tuple[int, int] | int | None
    center_crop: bool
    resample: int
    normalization: Normalization
    crop_min_area: float | None = None
    random_crop: bool = False
    flip: bool = False
    color_jitter: ColorJitterConfig = NO_JITTER
    rand_augment: RandAugmentConfig = NO_OPERATIONS
    reduced_jpeg: bool = True

    @property
    def output_shape(self) -> tuple[int, int, int]:
        return self.height, self.width, 3

    @property
    def is_random(self) -> bool:
        """True if `train` augments."""
        augmentations = self.crop_min_area, self.random_crop, self.flip
        return (
            any(augmentations) or self.color_jitter != NO_JITTER or self.rand_augment.operations > 0
        )

    def eval(self, image: ImageFile) -> UInt8[np.ndarray, "H W 3"]:
        """Return the pixels without augmentations; raises BadSampleError."""
        picture = decode(image)
        target = None if self.resize is None else _target(self.resize, picture.size)
        width, height = map(float, picture.size)
        return np.asarray(self._resized(picture, target, (0.0, 0.0, width, height)))

    def train(self, image: ImageFile, rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
        """Return the pixels with the augmentations that the config asks for; raises BadSampleError."""
        with opened(image) as picture:
            width, height = picture.size
            orientation = orientation_of(picture)
            size = (height, width) if orientation in TURNED else (width, height)
            box, target = self._box(size, rng)
            factor = self._reduce(picture, box, target)
            picture = upright_rgb(picture)
        # The last pixel of a reduced row or column may stand for fewer; upright it may be the first.
        x = picture.width - size[0] / factor if orientation in FROM_RIGHT else 0.0
        y = picture.height - size[1] / factor if orientation in FROM_BOTTOM else 0.0
        left, top, right, bottom = (edge / factor for edge in box)
        box = (x + left, y + top, x + right, y + bottom)
        picture = self._resized(picture, target, box, rng)
        if self.flip and rng.random() < 0.5:
            picture = ImageOps.mirror(picture)
        picture = color_jitter(picture, self.color_jitter, rng)
        return np.asarray(rand_augment(picture, self.rand_augment, rng))

    def _resized(
        self,
        picture: Image.Image,
        target: tuple[int, int] | None,
        box: tuple[float, float, float, float],
        rng: np.random.Generator | None = None,
    ) -> Image.Image:
        """Return a box of the picture resized to `target` (height, width), if any, and cropped.

        Args:
            rng: of training: the crop is where the config wants it then, else in the middle.
        """
        size = picture.size if target is None else (target[1], target[0])
        window = self._window(size, rng)
        if target is not None:
            if window and _is_too_long(picture.size, size):
                return self._enlarged(picture, size, window)
            picture = picture.resize(size, self.resample, box=box)
        return picture.crop(window) if window else picture

    def _enlarged(
        self, picture: Image.Image, size: tuple[int, int], window: tuple[int, int, int, int]
    ) -> Image.Image:
        if self.resample not in FILTERS:
            name = Image.Resampling(self.resample).name
            raise BadSampleError(
                f"{picture.width}x{picture.height} pixels, which resizing ({name}) makes {size[0]}x{size[1]}",
                "too_large",
            )
        return enlarge_window(picture, size, window, self.resample)

    def _box(
        self, size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[tuple[int, int, int, int], tuple[int, int] | None]:
        """Return the box to resize (left, top, right, bottom), and its new (height, width) if it changes."""
        if self.crop_min_area is not None:
            return random_box(size, self.crop_min_area, rng), (self.height, self.width)
        return (0, 0, *size), None if self.resize is None else _target(self.resize, size)

    def _reduce(
        self,
        picture: Image.Image,
        box: tuple[int, int, int, int],
        target: tuple[int, int] | None,
    ) -> float:
        """Return the JPEG downscale factor that leaves the box `KEPT` times as large as the target."""
        if not (self.reduced_jpeg and self.is_random) or target is None:
            return 1.0
        left, top, right, bottom = box
        height, width = target
        least = KEPT * max(width / (right - left), height / (bottom - top))
        return reduce_jpeg(picture, min(1.0, least))

    def _window(
        self, size: tuple[int, int], rng: np.random.Generator | None
    ) -> tuple[int, int, int, int] | None:
        """Return the crop (left, top, right, bottom) of an image of this size; None: all of it."""
        if not self.center_crop or (rng is not None and self.crop_min_area is not None):
            return None
        # The larger part of an odd rest goes to the right and the bottom, that of an odd lack to the left
        # and the top (filled with zeros), as the processor does it: // rounds down in both.
        left, top = size[0] - self.width, size[1] - self.height
        if rng is None or not self.random_crop:
            left, top = left // 2, top // 2
        else:
            left, top = (int(rng.integers(min(rest, 0), max(rest, 0) + 1)) for rest in (left, top))
        return left, top, left + self.width, top + self.height


def random_box(
    size: tuple[int, int], min_area: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return Inception's crop (Szegedy et al., 1409.4842, section 6) as (left, top, right, bottom).

    It has at least `min_area` of an image of `size` (width, height) and an aspect ratio of 3/4 to 4/3.

    An image too long for any such crop gives the largest one of the nearest ratio, at a random place.
    """
    width, height = size
    for _ in range(10):
        area = rng.uniform(min_area, 1) * width * height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = min(width, max(1, round(height * 4 / 3)))
        h = min(height, max(1, round(width * 4 / 3)))
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return left, top, left + w, top + h


def _is_too_long(size: tuple[int, int], resized: tuple[int, int]) -> bool:
    """Return whether an image of a few pixels becomes one that costs much memory, most of it cropped away."""
    is_larger = resized[0] > size[0] and resized[1] > size[1]
    return is_larger and resized[0] * resized[1] > MAX_RESIZED_PIXELS


def _target(resize: tuple[int, int] | int, size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) after resizing an image of size (width, height).

    The longer edge is rounded down, as the processor does it.
    """
    if isinstance(resize, tuple):
        return resize
    width, height = size
    if width <= height:
        return int(resize * height / width), resize
    return resize, int(resize * width / height)


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
    # Not a path: it has a null byte, or is no valid Unicode.
    except ValueError as error:
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
        # The start may be too short.
        with contextlib.suppress(Exception):
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
    # An upright one is not copied.
    ImageOps.exif_transpose(image, in_place=True)
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
    # `convert` would do so too, and then copy it.
    image.load()
    return image
