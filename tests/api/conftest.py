"""A tiny model, its inputs and its processor."""

import pytest
import transformers as tr

import lit_jax
from tests.api.tiny_models import CONFIGS, inputs_for


@pytest.fixture(scope="module")
def model():
    return lit_jax.DualEncoder.from_config(CONFIGS["vit-bert"]())


@pytest.fixture(scope="module")
def inputs():
    return inputs_for(CONFIGS["vit-bert"]())


@pytest.fixture
def processor(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return tr.VisionTextDualEncoderProcessor(
        tr.ViTImageProcessorPil(size={"height": 16, "width": 16}),
        tr.BertTokenizer(str(tmp_path / "vocab.txt")),
    )
