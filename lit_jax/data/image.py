"""Image files to the bytes that go to the devices, and how those are normalised there.

For evaluation the pixels equal those that the model's own image processor (transformers, PIL backend)
rescales and normalises, to the last bit. Rescaling and normalising are one multiplication and one addition,
which the device does in front of the tower: on the way there bytes are a quarter of float32.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from lit_jax.config import ColorJitterConfig, RandAugmentConfig
from lit_jax.data.augment import NO_JITTER, NO_OPERATIONS, color_jitter, rand_augment
from lit_jax.data.decode import ImageFile, decode, opened, orientation_of, reduce_jpeg, upright_rgb
from lit_jax.data.example import BadSampleError
from lit_jax.data.pretrained import read_pretrained, unusable
from lit_jax.data.resample import FILTERS, enlarge_window
from lit_jax.errors import UserError
from lit_jax.models.normalization import Normalization

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
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
    """Pixels for the image tower; plain values, so that it can be sent to worker processes.

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

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        image_size: int | None = None,
        crop_min_area: float | None = None,
        random_crop: bool = False,
        **augmentations: Any,
    ) -> "ImageTransform":
        """Return the transform that the image processor in `folder` describes.

        Args:
            folder: has preprocessor_config.json (or processor_config.json).
            image_size: overrides the height and width of the result.
            augmentations: attributes of the transform that need no check.

        Raises:
            UserError: no such processor, or one that does more than resize, crop, rescale, normalise.
        """
        if crop_min_area is not None and not 0 < crop_min_area <= 1:
            raise UserError(
                f"config.data.crop_min_area is {crop_min_area}; it must be above 0 and at most 1."
            )
        processor = load_processor(folder, image_size=image_size)
        # null, where the processor does not resize; a random crop does, as transformers' own default.
        resample = Image.Resampling.BILINEAR if processor.resample is None else processor.resample
        with _usable(folder):
            table_3x256 = _table(processor)
            transform = cls(
                **_geometry(processor, folder),
                resample=int(resample),
                normalization=Normalization.through(table_3x256[:, 0], table_3x256[:, 255]),
                crop_min_area=crop_min_area,
                random_crop=random_crop,
                **augmentations,
            )
            _check(transform, table_3x256, processor, folder)
        if random_crop and (not transform.center_crop or crop_min_area is not None):
            raise UserError(
                "config.data.random_crop moves the crop of the image processor: it needs a processor that "
                f"crops ({folder} has {'one' if transform.center_crop else 'none'}), and no crop_min_area."
            )
        return transform

    @property
    def output_shape(self) -> tuple[int, int, int]:
        return self.height, self.width, 3

    @property
    def is_random(self) -> bool:
        """Whether `train` augments."""
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
        # Of an odd rest the larger part goes to the right and the bottom, of an odd lack to the left
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


def load_processor(folder: Path, *, image_size: int | None = None) -> Any:
    """Load the transformers image processor (PIL backend) of a folder, with its size overridden.

    With a centre crop the ratio of resized to cropped size is kept. Raises UserError if there is none.
    """
    # Slow to import, and worker processes do not need it.
    from transformers import AutoImageProcessor

    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise UserError(
            f"{folder} has no image processor; put the image model's {PROCESSOR_FILES[0]} there."
        )
    with _usable(folder):
        processor = read_pretrained(AutoImageProcessor, folder, *_about(folder), backend="pil")
        # Most settings are first checked when they are used; an image_std of 0 would only be a warning.
        with np.errstate(divide="raise", invalid="raise"):
            processor(Image.new("RGB", (9, 8)))
    if image_size is None:
        return processor
    square = {"height": image_size, "width": image_size}
    if processor.do_center_crop:
        crop = processor.crop_size["height"]
        size = {
            name: round(edge * image_size / crop) for name, edge in dict(processor.size).items()
        }
        processor.size, processor.crop_size = size, square
    elif getattr(processor, "crop_pct", None):
        processor.size = {"shortest_edge": image_size}
    else:
        processor.size = square
    return processor


def _about(folder: Path) -> tuple[str, str]:
    """Return what messages call the processor of a folder, and what they advise."""
    return (
        f"The image processor in {folder}",
        f"put the image model's own {PROCESSOR_FILES[0]} there.",
    )


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    """Raise UserError for whatever transformers lets through where a setting of a processor is broken."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise unusable(error, *_about(folder)) from error


def _geometry(processor: Any, folder: Path) -> dict[str, Any]:
    size = dict(processor.size or {})
    resize = size.get("shortest_edge") or (size.get("height"), size.get("width"))
    resize = resize if processor.do_resize else None
    crop = dict(processor.crop_size) if processor.do_center_crop else None
    if isinstance(resize, int) and (part := getattr(processor, "crop_pct", None)):
        # ConvNeXt: small images are cut out of the middle of larger ones, large ones are squeezed.
        square = (resize, resize)
        crop = dict(zip(("height", "width"), square, strict=True)) if resize < 384 else None
        resize = int(resize / part) if crop else square
    result = (crop["height"], crop["width"]) if crop else resize
    if not isinstance(result, tuple) or None in result:
        raise UserError(
            f"The image processor in {folder} gives images of different sizes; "
            "set config.data.image_size to the height and width that the model is to get."
        )
    height, width = result
    return {"height": height, "width": width, "resize": resize, "center_crop": crop is not None}


def _table(processor: Any) -> Float[np.ndarray, "3 256"]:
    """Return the processor's results for the values 0..255 in each channel, float32."""
    ramp_16x16x3 = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    as_is = {"do_resize": False, "do_center_crop": False, "do_pad": False}
    result = processor(ramp_16x16x3, **as_is, return_tensors="np")
    return result["pixel_values"].reshape(3, 256).astype(np.float32)


def _check(
    transform: ImageTransform,
    table_3x256: Float[np.ndarray, "3 256"],
    processor: Any,
    folder: Path,
) -> None:
    """Raise UserError unless `transform` does on three noise images what `processor` does, and normalises
    every value as `table_3x256` says."""
    ramp_256x3 = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
    difference_3x256 = np.abs(transform.normalization(ramp_256x3).T - table_3x256)
    is_affine = difference_3x256.max() <= 1e-6 * np.abs(table_3x256).max()
    rng = np.random.default_rng(0)
    height, width = transform.height, transform.width
    for shape in ((2 * height + 1, width + 4), (height + 3, 2 * width), (height // 2 + 1, width)):
        noise = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        expected = processor(Image.fromarray(noise), return_tensors="np")["pixel_values"][0]
        pixels_HxWx3 = transform.eval(noise)
        channels = [table_3x256[c].take(pixels_HxWx3[..., c]) for c in range(3)]
        if not (is_affine and np.array_equal(np.stack(channels), expected)):
            raise UserError(
                f"The image processor in {folder} ({type(processor).__name__}) does more than to resize, "
                "crop, rescale and normalise; use the preprocessor_config.json of a ViT or CLIP processor."
            )


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
