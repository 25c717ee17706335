"""Every image tower takes a step of training with every text tower, locked and unlocked.

The pairs are pictures of the demo with captions in four scripts. All of it is the real train step, which
here is not compiled as one: each tower is, once for all pairs, and what is around the towers runs operation
by operation, which saves more than 300 compilations.
"""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from lit_jax.config import PolicyConfig
from lit_jax.configs.demo.make_digits import draw_number
from lit_jax.data.text import load_tokenizer, tokenize
from lit_jax.models.dual_encoder import DualEncoderModule
from lit_jax.models.families import TEXT, VISION
from lit_jax.optimizer_config import AdamW
from lit_jax.training.losses import make_loss, objective
from lit_jax.training.optimizers import make_optimizer
from lit_jax.training.policy import resolve_policy
from lit_jax.training.train_step import State, train_step
from lit_jax.trees import flatten
from tests.models.test_towers import build

E = 6
TOKENIZER = Path(__file__).parents[2] / "configs/demo/roberta"  # of bytes: it knows every script
CAPTIONS = {
    42: "a photo of the number forty two",
    57: "фотография числа пятьдесят семь",
    63: "数字六十三的照片",
    88: "صورة للرقم ثمانية وثمانين",
}


@pytest.fixture(scope="module")
def pictures():
    random = np.random.default_rng(0)
    drawn = (Image.fromarray(draw_number(number, "train", random)) for number in CAPTIONS)
    pixels = [np.asarray(image.resize((16, 16)), np.float32) / 127.5 - 1 for image in drawn]
    return {"pixel_values": jnp.asarray(np.stack(pixels))}


@pytest.fixture(scope="module")
def texts():
    tokenizer = load_tokenizer(TOKENIZER, max_length=48)
    tokens = tokenize(tokenizer, list(CAPTIONS.values()))
    assert tokenizer.unk_token_id not in tokens["input_ids"]
    assert tokens["attention_mask"].min() == 0
    return {name: jnp.asarray(array) for name, array in tokens.items()}


@pytest.fixture(scope="module")
def tower(random_variables, pictures, texts):
    """A tower of a family that is compiled once, its parameters and the width of its output."""

    @functools.cache
    def make(family):
        no_drop = {"drop_path_rate": 0.0, "drop_connect_rate": 0.0}
        plain = build(family, depth=1, vocab_size=500, pad_token_id=1, **no_drop)
        inputs = pictures if family in VISION else texts
        variables = random_variables(plain, *inputs.values())
        width = jax.eval_shape(plain.apply, variables, *inputs.values()).pooled.shape[1]
        kind = nn.jit(type(plain), static_argnames=("deterministic",))
        compiled = kind(plain.config, pooling=plain.pooling, dtype=plain.dtype)
        return compiled, variables["params"], width

    return make


@pytest.mark.long
@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("image", VISION)
def test_a_step_locked_and_unlocked(tower, pictures, texts, image, text):
    vision, vision_params, vision_width = tower(image)
    language, text_params, text_width = tower(text)
    module = DualEncoderModule(vision, language, E)
    random = np.random.default_rng(0)
    params = {
        "vision_model": vision_params,
        "text_model": text_params,
        "visual_projection": {"kernel": jnp.float32(random.normal(size=(vision_width, E)))},
        "text_projection": {"kernel": jnp.float32(random.normal(size=(text_width, E)))},
        "logit_scale": jnp.float32(1.0),
    }
    for lock in ("LU", "UU"):
        check_step(module, params, pictures | texts, lock)


def check_step(module, params, batch, lock):
    policy = resolve_policy(PolicyConfig(lock=lock), params)
    trainable, frozen = policy.split(params)
    assert ("vision_model" in frozen) == (lock == "LU")
    before = jax.tree.map(np.array, frozen)
    schedule = optax.constant_schedule(0.01)
    optimizer = make_optimizer(AdamW(), schedule, policy)
    state = State(jnp.int32(0), trainable, optimizer.init(trainable))
    with jax.numpy_dtype_promotion("standard"):  # Optax itself mixes dtypes
        new, metrics = train_step(
            state,
            frozen,
            batch,
            forward=module.apply,
            loss=objective(make_loss("softmax")),
            optimizer=optimizer,
            schedule=schedule,
            seed=0,
        )
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(metrics["grad_norm"])
    after, momentum = flatten(new.params), flatten(optax.tree.get(new.opt_state, "mu"))
    old = flatten(trainable)
    assert after.keys() == momentum.keys() == old.keys()
    for path, value in old.items():
        leaf = path.rpartition("/")[2]
        # Running statistics change without a gradient.
        has_gradient = leaf not in ("mask_token", "mean", "var")
        assert (np.abs(momentum[path]).max() > 0) == has_gradient, path
        assert np.isfinite(after[path]).all(), path
        # A mask token is only there for the files.
        assert leaf == "mask_token" or np.abs(after[path] - value).max() > 0, path
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
