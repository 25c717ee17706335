"""A tiny dual encoder with random weights, with the demo's tokenizer and image processor."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.config import MeshConfig, ModelConfig
from lit_jax.data.example import Example
from lit_jax.data.image_processor import load_image_transform
from lit_jax.data.text import load_tokenizer
from lit_jax.distributed.mesh import make_mesh, replicated
from lit_jax.evals.encode import Encoder
from lit_jax.models.dual_encoder import build_dual_encoder

DEMO = Path(__file__).parents[2] / "configs" / "demo"
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


class ListSource(list[Example]):
    """A source in memory."""


def make_encoder() -> Encoder:
    tokenizer = load_tokenizer(DEMO / "bert", max_length=32)
    module = build_dual_encoder(
        {"model_type": "vit", "image_size": 32, "patch_size": 16, **TINY},
        {"model_type": "bert", "vocab_size": len(tokenizer), "pad_token_id": 0, **TINY},
        ModelConfig(projection_dim=8),
    )
    return Encoder(
        module=module,
        mesh=make_mesh(MeshConfig()),
        image_transform=load_image_transform(DEMO / "vit"),
        tokenizer=tokenizer,
        batch_size=16,
    )


def make_params(encoder: Encoder):
    """Random numbers everywhere, also where `init` would put zeros; nothing is compiled."""
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    pixels = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    batch = {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids}
    shapes = jax.eval_shape(encoder.module.init, jax.random.key(0), batch)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.3, x.shape)), shapes)
    return jax.device_put(params, replicated(encoder.mesh))


def make_pictures() -> ListSource:
    """21 noise images, two captions each, of the classes "a", "b" and "c" in turn."""
    rng = np.random.default_rng(0)
    return ListSource(
        Example(
            key=f"picture{i}",
            image=rng.integers(0, 256, (32, 32, 3), np.uint8),
            captions=(f"number {i}", f"the handwritten number {i}"),
            label="abc"[i % 3],
        )
        for i in range(21)
    )


def make_pictures_with_bad() -> ListSource:
    """The same, but the fifth cannot be decoded."""
    pictures = make_pictures()
    pictures[4] = Example(key="bad", image=b"no image", captions=("lost",), label="a")
    return pictures


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return make_encoder()


@pytest.fixture(scope="session")
def params(encoder):
    return make_params(encoder)


@pytest.fixture(scope="session")
def pictures() -> ListSource:
    return make_pictures()


@pytest.fixture(scope="session")
def pictures_with_bad() -> ListSource:
    return make_pictures_with_bad()
