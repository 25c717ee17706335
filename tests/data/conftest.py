"""The demo's tower folders, and data sets on disk in every format that the sources read."""

import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lit_jax.data.image import ImageTransform
from lit_jax.data.image_processor import load_image_transform
from lit_jax.data.text import load_tokenizer

DEMO = Path(__file__).parents[2] / "configs/demo"
MAX_TEXT_LENGTH = 24


def train(transform: ImageTransform, image: Any, seed: int | np.random.Generator = 0) -> np.ndarray:
    """uint8 HxWx3."""
    return transform.train(image, np.random.default_rng(seed))


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    return DEMO


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(DEMO / "bert", max_length=MAX_TEXT_LENGTH)


@pytest.fixture
def processor_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes preprocessor_config.json with the given settings."""

    def write(**settings: Any) -> Path:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        return tmp_path

    return write


@pytest.fixture(scope="session")
def image_transform(tmp_path_factory: pytest.TempPathFactory) -> ImageTransform:
    """To 6x5 pixels, with random crop and flip."""
    folder = tmp_path_factory.mktemp("processor")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 6, "width": 5}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return load_image_transform(folder, crop_min_area=0.3, flip=True)


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """An image file's content."""

    def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def noise() -> Callable[..., np.ndarray]:
    """uint8 noise, always the same for the same shape and seed."""

    def noise(*shape: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

    return noise


@pytest.fixture
def jsonl_folder(tmp_path: Path, noise, encode) -> Callable[..., Path]:
    """A folder with captions.jsonl of the given rows, and every image they name that is not there."""

    def write(rows: Iterable[Mapping[str, Any]]) -> Path:
        rows = list(rows)
        for i, row in enumerate(rows):
            path = tmp_path / row["image"]
            if not path.exists() and not path.name.startswith("missing"):
                path.write_bytes(encode(noise(4, 7, 3, seed=i)))
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / "captions.jsonl").write_text(lines, encoding="utf-8")
        return tmp_path

    return write
