"""The image processor of a model's folder, read as an `ImageTransform` and compared with the original."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from lit_jax.data.image import ImageTransform
from lit_jax.data.pretrained import read_pretrained, unusable
from lit_jax.errors import UserError
from lit_jax.models.normalization import Normalization

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load_image_transform(
    folder: Path,
    *,
    image_size: int | None = None,
    crop_min_area: float | None = None,
    random_crop: bool = False,
    **augmentations: Any,
) -> ImageTransform:
    """Return the transform that the image processor in `folder` describes.

    Args:
        folder: has preprocessor_config.json (or processor_config.json).
        image_size: overrides the height and width of the result, in pixels.
        augmentations: attributes of the transform that need no check.

    Raises:
        UserError: there is no processor, or it does more than resize, crop, rescale and normalise.
    """
    if crop_min_area is not None and not 0 < crop_min_area <= 1:
        raise UserError(
            f"config.data.crop_min_area is {crop_min_area}; it must be above 0 and at most 1."
        )
    processor = load_processor(folder, image_size=image_size)
    # A processor that does not resize may have null, but `crop_min_area` resizes in any case.
    resample = Image.Resampling.BILINEAR if processor.resample is None else processor.resample
    with _usable(folder):
        # The processor itself maps all values of a byte, so that none of its fields is misunderstood.
        table_3x256 = _table(processor)
        transform = ImageTransform(
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
            "config.data.random_crop moves the crop of the image processor, so it needs a processor that "
            f"crops ({folder} has {'one' if transform.center_crop else 'none'}) and "
            "config.data.crop_min_area=None; set it to False otherwise."
        )
    return transform


def load_processor(folder: Path, *, image_size: int | None = None) -> Any:
    """Load the transformers image processor (PIL backend) of a folder, with its size overridden if given.

    With a centre crop the ratio of the resized to the cropped size is kept. Raises UserError if the folder
    has no processor.
    """
    # Imported here, because the import is slow and worker processes do not need it.
    from transformers import AutoImageProcessor

    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise UserError(
            f"{folder} has no image processor; put the image model's {PROCESSOR_FILES[0]} there."
        )
    with _usable(folder):
        processor = read_pretrained(AutoImageProcessor, folder, *_about(folder), backend="pil")
        # transformers checks most settings only on use, and NumPy only warns about an image_std of 0.
        with np.errstate(divide="raise", invalid="raise"):
            processor(Image.new("RGB", (9, 8)))
    if image_size is None:
        return processor
    # A processor with crop_pct (ConvNeXt) derives its crop from the shorter edge alone, see `_geometry`.
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
    """Return the processor's name and the advice for messages."""
    return (
        f"The image processor in {folder}",
        f"put the image model's own {PROCESSOR_FILES[0]} there.",
    )


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    """Turn any exception that a broken setting causes inside transformers into UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise unusable(error, *_about(folder)) from error


def _geometry(processor: Any, folder: Path) -> dict[str, Any]:
    """Return height, width, resize and center_crop of the transform. Raise UserError if the size varies."""
    size = dict(processor.size or {})
    # transformers describes a size either by the shorter edge or by both edges.
    resize = size.get("shortest_edge") or (size.get("height"), size.get("width"))
    resize = resize if processor.do_resize else None
    crop = dict(processor.crop_size) if processor.do_center_crop else None
    if isinstance(resize, int) and (part := getattr(processor, "crop_pct", None)):
        # ConvNeXt's rule: a target below 384 is cropped from an enlarged image; a larger target is squeezed.
        square = (resize, resize)
        crop = dict(zip(("height", "width"), square, strict=True)) if resize < 384 else None
        resize = int(resize / part) if crop else square
    result = (crop["height"], crop["width"]) if crop else resize
    if not isinstance(result, tuple) or None in result:
        raise UserError(
            f"The image processor in {folder} returns images of different sizes; set config.data.image_size "
            "to the height and width that the model needs."
        )
    height, width = result
    return {"height": height, "width": width, "resize": resize, "center_crop": crop is not None}


def _table(processor: Any) -> Float[np.ndarray, "3 256"]:
    """Return the processor's float32 output for the values 0..255 in each channel."""
    # The ramp as an image: the processor must change neither its size nor its order.
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
    """Raise UserError unless `transform` gives the same pixels as `processor`.

    The two are compared on three noise images, and by `table_3x256` for each value.
    """
    # The affine map was fitted to the table's ends alone; a curve in between (gamma) shows up here.
    ramp_256x3 = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
    difference_3x256 = np.abs(transform.normalization(ramp_256x3).T - table_3x256)
    is_affine = difference_3x256.max() <= 1e-6 * np.abs(table_3x256).max()
    rng = np.random.default_rng(0)
    # Landscape, portrait and too small: each takes another way through resizing, cropping and padding.
    height, width = transform.height, transform.width
    for shape in ((2 * height + 1, width + 4), (height + 3, 2 * width), (height // 2 + 1, width)):
        noise = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        expected = processor(Image.fromarray(noise), return_tensors="np")["pixel_values"][0]
        pixels_HxWx3 = transform.eval(noise)
        channels = [table_3x256[c].take(pixels_HxWx3[..., c]) for c in range(3)]
        if not (is_affine and np.array_equal(np.stack(channels), expected)):
            raise UserError(
                f"The image processor in {folder} ({type(processor).__name__}) does more than resize, crop, "
                "rescale and normalise; use the preprocessor_config.json of a ViT or CLIP processor."
            )
