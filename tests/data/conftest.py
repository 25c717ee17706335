"""The demo's tower folders, and data sets on disk in every format that the sources read."""

import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lit_jax.config import SourceConfig
from lit_jax.data.example import Source
from lit_jax.data.image import ImageTransform
from lit_jax.data.image_processor import load_image_transform
from lit_jax.data.sources import open_source
from lit_jax.data.text import load_tokenizer
from tests.data.formats import FORMATS, N
from tests.object_store.served import serve

DEMO = Path(__file__).parents[2] / "configs/demo"
MAX_TEXT_LENGTH = 24
# The number of examples of `source`, and the second word of their captions.
EXAMPLES = 22
WORDS = ("one", "two", "three")


def train(transform: ImageTransform, image: Any, seed: int | np.random.Generator = 0) -> np.ndarray:
    """uint8 HxWx3."""
    return transform.train(image, np.random.default_rng(seed))


def open_folder(folder: Path) -> Source:
    return open_source(SourceConfig(path=str(folder)))


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


@pytest.fixture(scope="session")
def images(noise, encode) -> list[bytes]:
    return [encode(noise(4, 7, 3, seed=i)) for i in range(N)]


@pytest.fixture(scope="session")
def data(tmp_path_factory, images) -> Path:
    root = tmp_path_factory.mktemp("formats")
    for name, (write, *_) in FORMATS.items():
        (root / name).mkdir()
        write(root / name, images)
    return root


@pytest.fixture(scope="session")
def served(data):
    with serve(data) as address:
        yield address


@pytest.fixture(scope="session")
def image(noise, encode) -> bytes:
    return encode(noise(4, 7, 3))


@pytest.fixture
def source(jsonl_folder) -> Source:
    """Example i has the captions "i one", "i two" and "i three"."""
    return open_folder(
        jsonl_folder(
            {"image": f"{i}.png", "captions": [f"{i} {word}" for word in WORDS]}
            for i in range(EXAMPLES)
        )
    )


@pytest.fixture
def spoilt(jsonl_folder) -> Source:
    """24 examples, four of them bad: 0, 6, 12, 18."""
    rows = [{"image": f"{i}.png", "caption": f"{i} one"} for i in range(24)]
    rows[0] = {"image": "missing.png", "caption": "0 one"}
    rows[6] = {"image": "6.png", "captions": ["", " \n"]}
    rows[12] = {"image": "12.png"}
    folder = jsonl_folder(rows)
    (folder / "18.png").write_bytes(b"<html>404</html>")
    return open_folder(folder)
