"""Images that are a few pixels high: what they become is the processor's, and costs no gigabytes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lit_jax.config import ColorJitterConfig, RandAugmentConfig
from lit_jax.data import image as image_module
from lit_jax.data.example import BadSampleError, Example
from lit_jax.data.image_processor import load_image_transform, load_processor
from lit_jax.data.loader import ImagePreprocessor
from lit_jax.data.resample import FILTERS, enlarge_window
from tests.data.conftest import train

CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 64},
    "crop_size": {"height": 64, "width": 64},
    "do_normalize": False,
    "do_rescale": False,
}
AUGMENTATIONS = {
    "none": {},
    "moved crop": {"random_crop": True},
    "box": {"crop_min_area": 0.2},
    "all": {
        "random_crop": True,
        "flip": True,
        "color_jitter": ColorJitterConfig(brightness=0.5),
        "rand_augment": RandAugmentConfig(operations=2),
    },
}


@settings(max_examples=150)
@given(
    kind=st.sampled_from(list(FILTERS)),
    size=st.tuples(*[st.integers(1, 40)] * 2),
    growth=st.tuples(*[st.integers(1, 200)] * 2),
    window=st.tuples(*[st.integers(-20, 200)] * 2, *[st.integers(1, 40)] * 2),
)
def test_a_part_of_an_enlarged_image_is_pillows_to_the_last_bit(noise, kind, size, growth, window):
    image = Image.fromarray(noise(size[1], size[0], 3))
    target = (size[0] + growth[0], size[1] + growth[1])
    left, top, width, height = window
    box = (left, top, left + width, top + height)
    expected = image.resize(target, kind).crop(box)
    np.testing.assert_array_equal(enlarge_window(image, target, box, kind), expected)


@pytest.mark.parametrize(
    ("height", "width", "resample"), [(1, 1500, 3), (1500, 1, 2), (2, 4000, 1)]
)
def test_thin_images_are_the_processors_to_the_last_bit(
    processor_folder, noise, monkeypatch, height, width, resample
):
    monkeypatch.setattr(image_module, "MAX_RESIZED_PIXELS", 1 << 22)
    folder = processor_folder(**CLIP, resample=resample)
    image = noise(height, width, 3)
    pixels_HxWx3 = load_image_transform(folder).eval(image)
    processed = load_processor(folder)(Image.fromarray(image), return_tensors="np")
    np.testing.assert_array_equal(pixels_HxWx3.transpose(2, 0, 1), processed["pixel_values"][0])


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("crop", [64, 90])
def test_the_limit_changes_no_pixel(processor_folder, noise, monkeypatch, augmentation, crop):
    """In evaluation, training and fixed views; also where the crop is larger than what was resized."""
    folder = processor_folder(**CLIP | {"crop_size": {"height": crop, "width": crop}}, resample=3)
    transform = load_image_transform(folder, **AUGMENTATIONS[augmentation])

    def pixels() -> list[np.ndarray]:
        result = []
        for shape in ((1, 40), (40, 1), (3, 70), (70, 80), (20, 21)):
            example = Example(key="a", image=noise(*shape, 3), captions=(), label=None)
            result += ImagePreprocessor(transform, views=3).variants(0, example)
            result += [train(transform, example["image"], seed) for seed in range(3)]
            result.append(transform.eval(example["image"]))
        return result

    expected = pixels()
    monkeypatch.setattr(image_module, "MAX_RESIZED_PIXELS", 100)
    for one, other in zip(pixels(), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_thin_image_is_too_large_where_its_crop_cannot_be_computed_alone(processor_folder, noise):
    transform = load_image_transform(processor_folder(**CLIP, resample=0))
    assert transform.eval(noise(1, 8000, 3)).shape == (64, 64, 3)
    with pytest.raises(BadSampleError, match=r"9000x1 .*NEAREST.*576000x64") as raised:
        transform.eval(noise(1, 9000, 3))
    assert raised.value.kind == "too_large"


@pytest.mark.long
def test_thin_images_of_every_kind_cost_little_memory():
    """In a process of its own: the most memory that it has ever used only grows."""
    code = """if True:
        import io, resource, sys
        import numpy as np
        from PIL import Image
        from lit_jax.config import RandAugmentConfig
        from lit_jax.data.image import ImageTransform
        from lit_jax.models.normalization import Normalization

        def used():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

        plain = dict(height=224, width=224, resize=224, center_crop=True, resample=3,
                     normalization=Normalization.through(np.zeros(3), np.ones(3)))
        moved = dict(random_crop=True, flip=True, rand_augment=RandAugmentConfig(operations=2))
        augmented = ({}, moved, {"crop_min_area": 0.1})
        transforms = [ImageTransform(**plain, **more) for more in augmented]
        kinds = [("PNG", "RGB", 300_000), ("PNG", "I;16", 65_000), ("PNG", "P", 20_000),
                 ("JPEG", "RGB", 65_000), ("JPEG", "CMYK", 65_000), ("GIF", "P", 65_000),
                 ("TIFF", "L", 300_000), ("TIFF", "I;16", 65_000), ("WEBP", "RGBA", 16_000),
                 ("PNG", "1", 300_000), ("BMP", "RGB", 660)]
        before = used()
        for kind, mode, length in kinds:
            for size in ((length, 1), (1, length)):
                file = io.BytesIO()
                Image.new(mode, size).save(file, kind)
                for transform in transforms:
                    assert transform.eval(file.getvalue()).shape == (224, 224, 3)
                    pixels = transform.train(file.getvalue(), np.random.default_rng(0))
                    assert pixels.shape == (224, 224, 3)
        print(used() - before)
    """
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 200
