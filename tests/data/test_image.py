"""Decode images, crop and flip them."""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from transformers.image_transforms import convert_to_rgb

from lit_jax.data.example import BadSampleError
from lit_jax.data.image import FORMATS, IMAGE_SUFFIXES, decode, random_box
from lit_jax.data.image_processor import load_image_transform
from lit_jax.errors import UserError
from tests.data.conftest import train
from tests.data.test_image_processor import FAMILIES


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "CMYK", "YCbCr"])
def test_decode_converts_as_pillow_does(noise, encode, mode):
    image = Image.fromarray(noise(6, 7, 3)).convert(mode)
    decoded = decode(encode(image, "TIFF"))
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


def test_decode_puts_transparency_on_white(noise, encode):
    palette = Image.fromarray(noise(6, 7, 3)).quantize(8)
    contents = {
        "RGBA": encode(noise(6, 7, 4)),
        "LA": encode(Image.fromarray(noise(6, 7, 4)).convert("LA")),
        "P": encode(palette, transparency=bytes([0, 99, 255, 255, 0, 255, 255, 255])),
        "RGB": encode(noise(6, 7, 3), transparency=(1, 2, 3)),
    }
    for mode, content in contents.items():
        image = Image.open(io.BytesIO(content))
        assert image.mode == mode
        np.testing.assert_array_equal(
            np.asarray(decode(content)), convert_to_rgb(image, return_numpy=True), err_msg=mode
        )


def test_decode_scales_16_bit_grey(encode):
    grey = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    expected = np.array([[0, 0, 1], [128, 254, 255]], np.uint8)
    assert Image.open(io.BytesIO(encode(grey))).mode == "I;16"
    np.testing.assert_array_equal(np.asarray(decode(encode(grey)))[..., 0], expected)


def test_decode_scales_grey_of_netpbm_with_any_maximum():
    grey = np.array([[0, 400], [800, 1000]], ">u2")
    decoded = decode(b"P5 2 2 1000\n" + grey.tobytes())
    # By the file's maximum to 16 bits, as Pillow has it, and to 8 by leaving out the lower half.
    expected = (np.round(grey / 1000 * 65535).astype(np.uint16) >> 8).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(decoded)[..., 0], expected)


@pytest.mark.parametrize("ending", IMAGE_SUFFIXES)
def test_a_file_with_any_ending_of_images_is_decoded(noise, ending):
    """The ending has to be known to Pillow, for writing and for reading."""
    buffer, pixels = io.BytesIO(), noise(6, 8, 3)
    Image.fromarray(pixels).convert("1" if ending == ".pbm" else "RGB").save(
        buffer, Image.registered_extensions()[ending]
    )
    assert decode(buffer.getvalue()).size == (8, 6)


def test_the_endings_of_a_format_are_those_that_pillow_knows():
    assert {ending: Image.registered_extensions()[ending] for ending in IMAGE_SUFFIXES} == {
        ending: name for name, endings in FORMATS.items() for ending in endings
    }


def test_two_pictures_of_a_camera_in_one_file_are_read(noise, encode):
    """The format MPO is a JPEG with another one behind it."""
    assert decode(encode(noise(6, 8, 3), "MPO")).size == (8, 6)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX", "SGI", "DDS"])
def test_a_format_that_is_not_read_is_named(noise, encode, tmp_path, monkeypatch, kind):
    """Pillow starts Ghostscript for EPS, a program that interprets whatever a stranger wrote."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # not looked for yet
    content = encode(noise(6, 8, 3), kind)
    (tmp_path / "a.jpg").write_bytes(content)
    for image in (content, tmp_path / "a.jpg"):
        with pytest.raises(BadSampleError, match=kind) as error:
            decode(image)
        assert error.value.kind == "not_image"
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"hevc"])
def test_the_photos_of_a_telephone_are_named(brand):
    with pytest.raises(BadSampleError, match="HEIC") as error:
        decode(b"\0\0\0\x18ftyp" + brand + bytes(40))
    assert error.value.kind == "not_image"


def test_a_pointer_of_git_lfs_in_the_place_of_an_image_is_named():
    with pytest.raises(BadSampleError, match="git lfs pull") as error:
        decode(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert error.value.kind == "not_image"


def test_decode_applies_the_exif_orientation(noise, encode):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate clockwise
    pixels = noise(4, 9, 3)
    decoded = decode(encode(pixels, exif=exif))
    np.testing.assert_array_equal(np.asarray(decoded), np.rot90(pixels, -1))


def test_decode_takes_paths_and_pixels(noise, encode, tmp_path):
    (tmp_path / "a.png").write_bytes(encode(noise(3, 4, 3)))
    for image in (tmp_path / "a.png", noise(3, 4, 3)):
        np.testing.assert_array_equal(np.asarray(decode(image)), noise(3, 4, 3))


def test_bad_images_have_a_reason(noise, encode, tmp_path, monkeypatch):
    def reason(image) -> str:
        with pytest.raises(BadSampleError) as error:
            decode(image)
        return str(error.value)

    jpeg = encode(noise(40, 40, 3), "JPEG")
    assert reason(b"") == "0 bytes"
    assert reason(b"<html>404</html>") == "not an image"
    assert "truncated" in reason(jpeg[: len(jpeg) // 2])
    assert str(tmp_path / "missing.png") in reason(tmp_path / "missing.png")
    assert reason(tmp_path / "images\\a.png").endswith("write / in the place of \\")
    assert reason(tmp_path) == "Is a directory"
    assert "null byte" in reason(tmp_path / "a\0.png")
    assert "surrogates not allowed" in reason(tmp_path / "\ud800.png")
    assert "mode F" in reason(encode(Image.fromarray(noise(3, 3)).convert("F"), "TIFF"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "decompression bomb" in reason(jpeg)
    assert "decompression bomb" in reason(encode(noise(80, 80, 3)))
    with warnings.catch_warnings():  # what Pillow only warns of depends on nobody's filters
        warnings.simplefilter("ignore")
        assert "40 x 40 pixels are more than 1000" in reason(jpeg)


def test_what_is_no_regular_file_is_a_bad_sample(noise, encode, tmp_path, monkeypatch):
    """A pipe would block, /dev/zero never end, and a file of the system's wait for a keyboard."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # a socket's name is short
        server.bind("socket.png")
        names = [
            "pipe.png",
            "link.png",
            "socket.png",
            "/dev/zero",
            "/dev/tty",
            "/dev/stdin",
            "loop.png",
        ]
        (tmp_path / "loop.png").symlink_to("loop.png")
        for name in names:
            with pytest.raises(BadSampleError) as raised:
                decode(tmp_path / name)
            assert raised.value.kind == "missing", name
    with pytest.raises(BadSampleError) as raised:
        decode(Path("/proc/self/cmdline"))
    assert raised.value.kind == "empty"
    (tmp_path / "large.png").touch()
    os.truncate(tmp_path / "large.png", 1 << 40)
    with pytest.raises(BadSampleError) as raised:
        decode(tmp_path / "large.png")
    assert raised.value.kind == "too_large"


@settings(max_examples=150)
@given(st.data())
def test_a_broken_file_is_a_bad_sample_or_an_image(noise, encode, data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]))
    content = bytearray(encode(noise(8, 9, 3), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(BadSampleError):
        assert decode(content).mode == "RGB"


def test_train_without_augmentation_is_eval(processor_folder, noise):
    folder = processor_folder(**FAMILIES["dinov2"])
    transform = load_image_transform(folder, image_size=8)
    image = noise(30, 20, 3)
    trained = train(transform, image, np.random.default_rng(0))
    np.testing.assert_array_equal(trained, transform.eval(image))


def test_flip_mirrors_half_of_the_images(processor_folder, noise):
    transform = load_image_transform(processor_folder(**FAMILIES["vit"]), image_size=6, flip=True)
    image, rng = noise(9, 9, 3), np.random.default_rng(0)
    flips = 0
    for _ in range(100):
        result = train(transform, image, rng)
        flipped = not np.array_equal(result, transform.eval(image))
        np.testing.assert_array_equal(result[:, ::-1] if flipped else result, transform.eval(image))
        flips += flipped
    assert 35 <= flips <= 65


@given(
    size=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    min_area=st.floats(0.05, 1),
    seed=st.integers(0, 999),
)
def test_random_box_is_inside_and_large_enough(size, min_area, seed):
    left, top, right, bottom = random_box(size, min_area, np.random.default_rng(seed))
    w, h = right - left, bottom - top
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]
    assert 3 / 4 * (h - 0.5) - 0.5 <= w <= 4 / 3 * (h + 0.5) + 0.5  # up to rounding
    if (
        3 / 4 <= size[0] / size[1] <= 4 / 3 and min_area < 0.5
    ):  # such a crop exists, and is soon found
        assert (w + 0.5) * (h + 0.5) >= min_area * size[0] * size[1]


def test_random_crop_is_a_window_of_what_the_processor_resized(processor_folder, noise):
    folder = processor_folder(**FAMILIES["clip"])
    transform = load_image_transform(folder, image_size=8, random_crop=True)
    whole = load_image_transform(folder, image_size=8)
    image = noise(12, 12, 3)
    # The shorter edge is 8 after resizing, so make room: the window moves in a 12x12 image.
    roomy, still = (dataclasses.replace(t, resize=None) for t in (transform, whole))
    all_windows = {
        roomy.eval(image[top : top + 8, left : left + 8]).tobytes(): (top, left)
        for top in range(5)
        for left in range(5)
    }
    rng = np.random.default_rng(0)
    seen = {all_windows[train(roomy, image, rng).tobytes()] for _ in range(300)}
    assert len(seen) == 25
    assert all_windows[train(still, image, rng).tobytes()] == (2, 2)
    assert all_windows[roomy.eval(image).tobytes()] == (2, 2)


def test_random_crop_needs_a_processor_that_crops(processor_folder):
    with pytest.raises(UserError, match=r"config\.data\.random_crop"):
        load_image_transform(processor_folder(**FAMILIES["vit"]), random_crop=True)


def test_crop_cuts_a_box_out_and_resizes_it(processor_folder, noise):
    folder = processor_folder(**FAMILIES["vit"], resample=0)  # others look beyond the box
    transform = load_image_transform(folder, image_size=10, crop_min_area=0.2)
    image = noise(40, 30, 3)
    box = random_box((30, 40), 0.2, np.random.default_rng(5))
    cut = np.asarray(Image.fromarray(image).crop(box).resize((10, 10), 0))
    np.testing.assert_array_equal(
        train(transform, image, np.random.default_rng(5)), transform.eval(cut)
    )


def test_transform_needs_no_heavy_library_in_a_worker(image_transform, noise, tmp_path):
    (tmp_path / "transform").write_bytes(pickle.dumps(image_transform))
    np.save(tmp_path / "image.npy", noise(9, 8, 3))
    code = """if True:
        import json, pickle, sys, numpy as np
        import lit_jax.data.sources
        transform = pickle.load(open("transform", "rb"))
        print(json.dumps(transform.eval(np.load("image.npy")).tolist()))
        heavy = {"jax", "torch", "transformers", "tensorflow", "tensorflow_datasets", "sklearn"}
        assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
    """
    root = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(json.loads(result.stdout), image_transform.eval(noise(9, 8, 3)))
