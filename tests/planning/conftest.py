"""Compiles for TPUs as the commands do: without what tests/conftest.py sets for tests on CPU devices."""

from pathlib import Path

import jax
import pytest

from lit_jax.config import parse
from lit_jax.configs.vit_bert import get_config

DEMO = Path(__file__).parents[2] / "configs" / "demo"
BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
# ViT-g/14 (2106.04560, table 2), 1 billion parameters.
GIANT = {
    "hidden_size": 1408,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "intermediate_size": 6144,
    "patch_size": 14,
}


@pytest.fixture(autouse=True)
def as_in_the_commands():
    """Also of the promotion of dtypes: Optax itself mixes them."""
    settings = {
        "jax_disable_most_optimizations": False,
        "jax_default_matmul_precision": None,
        "jax_numpy_dtype_promotion": "standard",
        "jax_numpy_rank_promotion": "allow",
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def config_of():
    """A config of configs/vit_bert.py with towers of these sizes; it names the demo's folders."""

    def make(image, text, batch_size, variant="base", **changes):
        raw = get_config(variant)
        raw.model.image.model, raw.model.text.model = str(DEMO / "vit"), str(DEMO / "bert")
        raw.model.image.overrides = {"patch_size": 16, "image_size": 224, **image}
        raw.model.text.overrides = {
            "vocab_size": 30522,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "max_position_embeddings": 512,
            **text,
        }
        raw.model.projection_dim = image["hidden_size"]
        raw.data.image_size = 224
        raw.batch_size = batch_size
        raw.update_from_flattened_dict(changes)
        return parse(raw)

    return make
