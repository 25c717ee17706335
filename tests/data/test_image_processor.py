"""Preprocessing against transformers' image processors."""

from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, ViTImageProcessorPil

from lit_jax.data.image_processor import load_image_transform, load_processor
from lit_jax.errors import UserError

EDGE = st.integers(1, 40)
THREE = st.lists(st.floats(0.1, 0.9), min_size=3, max_size=3)
SQUARE_OR_NOT = st.fixed_dictionaries({"height": EDGE, "width": EDGE})
PROCESSORS = st.fixed_dictionaries(
    {
        "image_processor_type": st.sampled_from(
            [
                "ViTImageProcessor",
                "CLIPImageProcessor",
                "BeitImageProcessor",
                "SiglipImageProcessor",
            ]
        ),
        "size": SQUARE_OR_NOT | st.fixed_dictionaries({"shortest_edge": EDGE}),
        "crop_size": SQUARE_OR_NOT,
        "do_center_crop": st.booleans(),
        "do_resize": st.booleans(),
        "do_rescale": st.booleans(),
        "do_normalize": st.booleans(),
        "resample": st.sampled_from([0, 1, 2, 3, 4, 5]),
        "rescale_factor": st.sampled_from([1 / 255, 1 / 127.5, 0.01]),
        "image_mean": THREE,
        "image_std": THREE,
    }
).filter(lambda p: p["do_center_crop"] or (p["do_resize"] and "height" in p["size"]))
FAMILIES = {
    "vit": {"image_processor_type": "ViTImageProcessor"},
    "clip": {"image_processor_type": "CLIPImageProcessor"},
    "siglip": {"image_processor_type": "SiglipImageProcessor"},
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
    },
    "deit": {"image_processor_type": "DeiTImageProcessor"},
    "convnext": {"image_processor_type": "ConvNextImageProcessor"},
    "small_convnext": {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 96},
        "crop_pct": 0.875,
    },
    "beit": {"image_processor_type": "BeitImageProcessor"},
    "align": {
        "image_processor_type": "EfficientNetImageProcessor",
        "do_center_crop": True,
        "include_top": False,
        "rescale_factor": 1 / 127.5,
        "rescale_offset": True,
    },
    "efficientnet": {"image_processor_type": "EfficientNetImageProcessor", "include_top": True},
    "old ViT": {"feature_extractor_type": "ViTFeatureExtractor", "size": 224},
    "old CLIP": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224},
}


def assert_equal_to_processor(folder: Path, image: np.ndarray, image_size: int | None = None):
    transform = load_image_transform(folder, image_size=image_size)
    processor = load_processor(folder, image_size=image_size)
    expected_3xHxW = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    pixels_HxWx3 = transform.eval(image)
    assert pixels_HxWx3.dtype == np.uint8
    assert pixels_HxWx3.shape == transform.output_shape
    as_is = {"do_resize": False, "do_center_crop": False}
    same = processor(Image.fromarray(pixels_HxWx3), return_tensors="np", **as_is)
    np.testing.assert_array_equal(same["pixel_values"][0], expected_3xHxW)
    normalised_HxWx3 = np.asarray(jax.jit(transform.normalization)(pixels_HxWx3))
    assert normalised_HxWx3.dtype == np.float32
    black_and_white = transform.normalization(np.array([[0] * 3, [255] * 3], np.uint8))
    difference = np.abs(normalised_HxWx3.transpose(2, 0, 1) - expected_3xHxW).max()
    assert difference <= 1e-6 * np.abs(black_and_white).max()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    processor=PROCESSORS,
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_pixels_are_the_processors_bit_for_bit_and_normalised_to_a_millionth(
    processor_folder, noise, processor, height, width, seed
):
    assert_equal_to_processor(processor_folder(**processor), noise(height, width, 3, seed=seed))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("image_size", [None, 112])
def test_families_of_image_models(processor_folder, noise, family, image_size):
    folder = processor_folder(**FAMILIES[family])
    assert_equal_to_processor(folder, noise(301, 256, 3), image_size)


def test_a_processor_that_does_not_resize_needs_no_resample(processor_folder, noise):
    folder = processor_folder(**FAMILIES["clip"], do_resize=False, resample=None)
    assert_equal_to_processor(folder, noise(61, 301, 3))
    assert load_image_transform(folder).resample == Image.Resampling.BILINEAR


def test_image_size_keeps_the_ratio_of_resize_to_crop(processor_folder):
    transform = load_image_transform(processor_folder(**FAMILIES["dinov2"]), image_size=112)
    assert transform.output_shape == (112, 112, 3)
    assert transform.resize == 128


def test_varying_sizes_are_refused_until_image_size_is_set(processor_folder):
    folder = processor_folder(**FAMILIES["clip"], do_center_crop=False)
    with pytest.raises(UserError, match=r"config\.data\.image_size"):
        load_image_transform(folder)
    assert load_image_transform(folder, image_size=20).output_shape == (20, 20, 3)


def test_a_processor_that_does_more_is_refused(processor_folder):
    folder = processor_folder(
        image_processor_type="ViTImageProcessor",
        size={"height": 4, "width": 4},
        do_pad=True,
        pad_size={"height": 9, "width": 9},
    )
    with pytest.raises(UserError, match=r"ViTImageProcessorPil\)"):
        load_image_transform(folder)


def test_a_processor_that_is_not_affine_is_refused(processor_folder, monkeypatch):
    """It would do more than one multiplication and one addition to a value, a gamma correction say."""

    class Gamma(ViTImageProcessorPil):
        def rescale(self, image, scale, **kwargs):
            return super().rescale(image, scale, **kwargs) ** 2

    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", lambda *_, **__: Gamma())
    with pytest.raises(UserError, match=r"Gamma\)"):
        load_image_transform(processor_folder(**FAMILIES["vit"]))


def test_a_missing_or_broken_processor_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        load_image_transform(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be used"):
        load_image_transform(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": [0.5]},
        {"image_std": [0, 0, 0]},
        {"resample": 99},
        {"resample": "bilinear"},
        {"resample": None},
        {"size": True},
        {"input_data_format": 0},
        {"rescale_factor": "x"},
        {"size": {"height": -3, "width": 5}},
        {"do_center_crop": True, "crop_size": {"shortest_edge": 5}},
    ],
)
def test_a_processor_that_does_not_work_is_refused(processor_folder, settings):
    folder = processor_folder(**FAMILIES["vit"] | settings)
    with pytest.raises(UserError, match=r"\(.*preprocessor_config\.json"):
        load_image_transform(folder)


@pytest.mark.parametrize("area", [0.0, -0.5, 1.5])
def test_crop_min_area_must_be_a_part(processor_folder, area):
    with pytest.raises(UserError, match=r"config\.data\.crop_min_area"):
        load_image_transform(processor_folder(**FAMILIES["vit"]), crop_min_area=area)
