"""Image preprocessing: decode, rotate upright, resize, crop and augment into uint8 pixels.

A broken image is a bad sample. In evaluation the pixels equal, bit for bit, the pixels that the model's own
image processor (transformers, PIL backend) rescales and normalises. The device rescales and normalises in
front of the tower, by one multiplication and one addition, because uint8 takes a quarter of the bandwidth of
float32. image_processor.py makes the transform from the processor's file.
"""

import contextlib
import dataclasses
import errno
import io
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from lit_jax.config import ColorJitterConfig, RandAugmentConfig
from lit_jax.data.augment import NO_JITTER, NO_OPERATIONS, color_jitter, rand_augment
from lit_jax.data.example import BadSampleError
from lit_jax.data.files import File, ObjectPath, find, read_whole, readable
from lit_jax.data.resample import FILTERS, enlarge_window
from lit_jax.files import is_lfs_pointer
from lit_jax.models.normalization import Normalization

# An image as a source gives it: a path, the file's content, pixels, or None without an image.
ImageFile = File | bytes | np.ndarray | None
WHITE = (255, 255, 255, 255)
# The formats that are read, by Pillow's names, with the suffixes of their files in every kind of source.
# Pillow knows more formats, and starts Ghostscript for one of them (EPS). The table does not depend on the
# installed Pillow, since the suffixes decide which samples a source has; whoever changes the suffixes raises
# VERSION in tar_index.py. TGA stands last, because its files have no magic number.
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

# The photos of a telephone, which Pillow does not know without a plugin.
_HEIC = re.compile(rb"....ftyp(hei[cmsx]|hevc|mif1|msf1)", re.DOTALL)

# EXIF orientations that swap width and height, and those that start from the right or the bottom of the file.
TURNED = (5, 6, 7, 8)
FROM_RIGHT, FROM_BOTTOM = (2, 3, 6, 7), (3, 4, 7, 8)
# A JPEG that is decoded at a reduced size stays at least this many times as large as the target, so that the
# last resizing still averages pixels: the result is about half a grey level away from decoding in full.
KEPT = 1.5
# Above this number of pixels only the crop of a resized image is computed: resizing an image that is one
# pixel high by its shorter edge could take gigabytes, of which the crop keeps little.
MAX_RESIZED_PIXELS = 1 << 25


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """The preprocessing of images for the image tower. Only plain values, so that it can be pickled.

    Attributes:
        height, width: of the result, in pixels.
        resize: (height, width) to resize to, one number for the shorter edge, or None to leave the size.
        center_crop: whether the result is cropped from the centre of the resized image.
        resample: Pillow's number of the interpolation.
        normalization: the map from a pixel's value to the tower's input; applied on the device, not here.
        crop_min_area, random_crop, flip, color_jitter, rand_augment, reduced_jpeg: settings of `train`, see
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
        """The shape of the result: (height, width, 3)."""
        return self.height, self.width, 3

    @property
    def is_random(self) -> bool:
        """True if `train` augments."""
        augmentations = self.crop_min_area, self.random_crop, self.flip
        return (
            any(augmentations) or self.color_jitter != NO_JITTER or self.rand_augment.operations > 0
        )

    def eval(self, image: ImageFile) -> UInt8[np.ndarray, "H W 3"]:
        """Return the pixels without augmentations. Raise BadSampleError if the image cannot be used."""
        picture = decode(image)
        # Evaluation resizes the whole picture and crops afterwards, as the processor does.
        target = None if self.resize is None else _target(self.resize, picture.size)
        width, height = map(float, picture.size)
        return np.asarray(self._resized(picture, target, (0.0, 0.0, width, height)))

    def train(self, image: ImageFile, rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
        """Return the pixels with the configured augmentations. Raise BadSampleError for an unusable image."""
        with opened(image) as picture:
            # The crop is chosen in upright coordinates before decoding, since it decides the JPEG downscale
            # factor, and Pillow can downscale only a picture that is not loaded yet.
            width, height = picture.size
            orientation = orientation_of(picture)
            size = (height, width) if orientation in TURNED else (width, height)
            box, target = self._box(size, rng)
            factor = self._reduce(picture, box, target)
            picture = upright_rgb(picture)
        # A reduced size is rounded up, so the last pixel of a row or column may cover fewer original pixels.
        # In an image that is rotated or mirrored to be upright, this pixel comes first and shifts the box.
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
        """Return the box of the picture, resized to `target` (height, width) if given, and cropped.

        Args:
            rng: generator in training, where the crop may be random. None: crop the centre.
        """
        size = picture.size if target is None else (target[1], target[0])
        window = self._window(size, rng)
        if target is not None:
            # The result is the same bit for bit; only the memory differs.
            if window and _is_too_long(picture.size, size):
                return self._enlarged(picture, size, window)
            picture = picture.resize(size, self.resample, box=box)
        return picture.crop(window) if window else picture

    def _enlarged(
        self, picture: Image.Image, size: tuple[int, int], window: tuple[int, int, int, int]
    ) -> Image.Image:
        # Only NEAREST is missing there: it picks pixels instead of weighing them.
        if self.resample not in FILTERS:
            name = Image.Resampling(self.resample).name
            raise BadSampleError(
                f"{picture.width}x{picture.height} pixels, which resizing ({name}) would make "
                f"{size[0]}x{size[1]}",
                "too_large",
            )
        return enlarge_window(picture, size, window, self.resample)

    def _box(
        self, size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[tuple[int, int, int, int], tuple[int, int] | None]:
        """Return the box to resize (left, top, right, bottom), and the target (height, width) if any."""
        if self.crop_min_area is not None:
            return random_box(size, self.crop_min_area, rng), (self.height, self.width)
        return (0, 0, *size), None if self.resize is None else _target(self.resize, size)

    def _reduce(
        self,
        picture: Image.Image,
        box: tuple[int, int, int, int],
        target: tuple[int, int] | None,
    ) -> float:
        """Set and return the JPEG downscale factor that leaves the box `KEPT` times the target's size."""
        # Without augmentations `train` and `eval` give the same pixels, so the file is decoded in full.
        if not (self.reduced_jpeg and self.is_random) or target is None:
            return 1.0
        left, top, right, bottom = box
        height, width = target
        least = KEPT * max(width / (right - left), height / (bottom - top))
        return reduce_jpeg(picture, min(1.0, least))

    def _window(
        self, size: tuple[int, int], rng: np.random.Generator | None
    ) -> tuple[int, int, int, int] | None:
        """Return the crop (left, top, right, bottom) of an image of `size`, or None to keep all of it."""
        if not self.center_crop or (rng is not None and self.crop_min_area is not None):
            return None
        # Rounding down matches the processor: an odd surplus loses more at the right and bottom, and an image
        # that is too small gets more zeros at the left and top.
        left, top = size[0] - self.width, size[1] - self.height
        if rng is None or not self.random_crop:
            left, top = left // 2, top // 2
        # An image that is smaller than the crop gets a random place within the padding.
        else:
            left, top = (int(rng.integers(min(rest, 0), max(rest, 0) + 1)) for rest in (left, top))
        return left, top, left + self.width, top + self.height


def random_box(
    size: tuple[int, int], min_area: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return Inception's crop (Szegedy et al., 1409.4842, section 6) as (left, top, right, bottom).

    The crop covers at least the fraction `min_area` of an image of `size` (width, height), and has an aspect
    ratio from 3/4 to 4/3. If no such crop fits, the result is the largest crop of the nearest ratio, at a
    random place.
    """
    width, height = size
    # Ten tries and a log-uniform ratio are those of torchvision's RandomResizedCrop.
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
    """Return whether resizing in full would cost much memory, most of which the crop throws away.

    Args:
        size, resized: (width, height) before and after.
    """
    is_larger = resized[0] > size[0] and resized[1] > size[1]
    return is_larger and resized[0] * resized[1] > MAX_RESIZED_PIXELS


def _target(resize: tuple[int, int] | int, size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) after resizing an image of size (width, height).

    The longer edge is rounded down, as in the processor.
    """
    if isinstance(resize, tuple):
        return resize
    width, height = size
    if width <= height:
        return int(resize * height / width), resize
    return resize, int(resize * width / height)


def decode(image: ImageFile) -> Image.Image:
    """Return the first frame of an image as upright RGB.

    The EXIF orientation is applied, transparency is blended with white, and 16-bit grey is scaled to 8 bits.

    Raises:
        BadSampleError: the file does not exist, or holds no complete image of a sane size.
    """
    with opened(image) as picture:
        return upright_rgb(picture)


def file_content(path: File) -> bytes:
    """Return the bytes of an image file. Raise BadSampleError if the file cannot be read."""
    try:
        return read_whole(find(path))
    # The whole path, because the most frequent cause is a list in another folder than its images.
    except FileNotFoundError as error:
        separator = "; write / in the place of \\" if "\\" in path.name else ""
        raise BadSampleError(
            f"there is no file {readable(str(path))}{separator}", "missing"
        ) from error
    except OSError as error:
        kind = "too_large" if error.errno == errno.EFBIG else "missing"
        raise BadSampleError(error.strerror or str(error), kind) from error
    # The name is not a path: it contains a null byte or invalid Unicode.
    except ValueError as error:
        raise BadSampleError(str(error), "missing") from error


@contextlib.contextmanager
def opened(image: ImageFile) -> Iterator[Image.Image]:
    """Open an image and read only its header. Any error inside the block becomes BadSampleError."""
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
    # The warning is an exception only if the caller's filters turn it into one.
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadSampleError(str(error), "too_large") from error
    except Exception as error:
        # Pillow's parsers let through whatever a broken file makes them raise.
        raise BadSampleError(str(error) or type(error).__name__) from error


def _other_file(content: bytes) -> str:
    """Return a description of a file that is in none of `FORMATS`, by its first bytes alone."""
    if is_lfs_pointer(content):
        return "a Git LFS pointer without the image; run `git lfs pull` where it lies"
    # Pillow registers most of its formats only in `init`.
    Image.init()
    for name, (_, accepts) in Image.OPEN.items():
        if name not in FORMATS and _begins_as(content, accepts):
            return _other_format(name)
    return _other_format("HEIC") if _HEIC.match(content) else "not an image"


def _other_format(name: str) -> str:
    return f"an image in {name} format; only {', '.join(FORMATS)} are read"


def _begins_as(content: bytes, accepts: Callable[[bytes], bool | str] | None) -> bool:
    # A format's test may fail if the content is shorter than its magic number.
    with contextlib.suppress(Exception):
        return bool(accepts and accepts(content[:16]))
    return False


def _check_size(picture: Image.Image) -> None:
    """Raise BadSampleError for a picture with so many pixels that Pillow would warn about it."""
    # Pillow raises only above twice this size, and a warnings filter would affect the whole process.
    width, height = picture.size
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        reason = f"{width} x {height} pixels are more than {Image.MAX_IMAGE_PIXELS}"
        raise BadSampleError(f"{reason}: could be a decompression bomb", "too_large")


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return the image in RGB with its EXIF orientation applied. May change `image` in place."""
    # In place, because the other mode copies even an image that is upright already.
    ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 (upright) to 8."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def reduce_jpeg(image: Image.Image, part: float) -> float:
    """Set a JPEG file to be decoded at the smallest of 1, 1/2, 1/4 and 1/8 that is at least `part`.

    The decoder then computes only the low frequencies of each block of 8x8 pixels, which saves time and
    averages the pixels. Returns the factor by which the size is divided; 1 for files of other formats.
    """
    width, height = image.size
    drafted = image.draft(None, (math.ceil(width * part), math.ceil(height * part)))
    if drafted is None:
        return 1.0
    # The decoder rounds a reduced size up, and Pillow's box gives the size before rounding.
    _, (_, _, reduced_width, _) = drafted
    return width / reduced_width


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips 16-bit grey at 255 instead of scaling it.
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "I" and image.format == "PPM":
        # Pillow scales grey of more than 8 bits in PGM and PNM files to 0 ... 65535, for any maximum.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadSampleError(f"pixels of mode {image.mode} have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    if image.mode != "RGB":
        return image.convert("RGB")
    # `convert` would load the image, too, but then copy it.
    image.load()
    return image
