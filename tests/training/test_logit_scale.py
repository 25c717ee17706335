"""The limit of the logits' scale is open_clip's: a clamp of the parameter behind the optimizer's step."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lit_jax.models.dual_encoder import limit_logit_scale, logit_scale
from lit_jax.training.losses import objective, softmax_loss
from lit_jax.training.train_step import State, train_step

RATE, MAXIMUM, STEPS = 0.05, 100.0, 12


@pytest.mark.parametrize("scale", [1.0, 99.9, 101.0, 4.9e8])
@pytest.mark.parametrize("name", ["logit_scale", "temperature"])
def test_the_scale_is_cut_and_nothing_else(name, scale):
    first = math.log(scale) if name == "logit_scale" else 1 / scale
    params = {"text_projection": {"kernel": jnp.float32(1e9)}, name: jnp.float32(first)}
    assert limit_logit_scale(params, None) == params
    limited = limit_logit_scale(params, MAXIMUM)
    assert limited["text_projection"] == params["text_projection"]
    np.testing.assert_allclose(math.exp(logit_scale(limited)), min(scale, MAXIMUM), rtol=1e-5)


def test_a_temperature_cannot_pass_zero():
    limited = limit_logit_scale({"temperature": jnp.float32(-0.2)}, MAXIMUM)
    np.testing.assert_allclose(limited["temperature"], 1 / MAXIMUM, rtol=1e-6)


def embeddings() -> tuple[np.ndarray, np.ndarray]:
    """Eight pairs on a circle, each close to its neighbours: the gradient is far from rounding."""
    angles_B = 0.3 * np.arange(8)
    circle_Bx2 = np.stack([np.cos(angles_B), np.sin(angles_B)], axis=1).astype(np.float32)
    return circle_Bx2, circle_Bx2


def texts_at(step: int, texts: np.ndarray) -> np.ndarray:
    """First the right texts, for which the scale grows, then the texts of others, for which it shrinks."""
    return texts if step < STEPS // 2 else texts[::-1].copy()


class Output(NamedTuple):
    images: jax.Array
    texts: jax.Array
    scale: jax.Array

    @property
    def metrics(self) -> dict:
        return {}


def ours(name: str, first: float) -> list[float]:
    def embed(variables, batch, **_):
        return Output(batch["images"], batch["texts"], logit_scale(variables["params"])), {}

    images, texts = embeddings()
    optimizer, params = optax.adam(RATE), {name: jnp.float32(first)}
    state, found = State(jnp.int32(0), params, optimizer.init(params)), []
    for step in range(STEPS):
        with jax.numpy_dtype_promotion("standard"):
            state, _ = train_step(
                state,
                {},
                {"images": jnp.asarray(images), "texts": jnp.asarray(texts_at(step, texts))},
                forward=embed,
                loss=objective(softmax_loss),
                optimizer=optimizer,
                schedule=optax.constant_schedule(RATE),
                seed=0,
                logit_scale_max=MAXIMUM,
            )
        found.append(float(state.params[name]))
    return found


def theirs(name: str, first: float) -> list[float]:
    """Adam in float64, then the clamp; its moments know nothing of the clamp."""
    images, texts = (z.astype(np.float64) for z in embeddings())
    value, mean, square, found = first, 0.0, 0.0, []
    for step in range(STEPS):
        cosines = images @ texts_at(step, texts).T
        scale = math.exp(value) if name == "logit_scale" else 1 / value
        slope = scale if name == "logit_scale" else -(scale**2)
        gradient = 0.0
        for axis in (0, 1):
            weights = np.exp(scale * cosines - scale * cosines.max(axis, keepdims=True))
            weights /= weights.sum(axis, keepdims=True)
            gradient += slope * ((weights * cosines).sum() - np.trace(cosines)) / len(cosines) / 2
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        corrected = square / (1 - 0.999 ** (step + 1))
        value -= RATE * mean / (1 - 0.9 ** (step + 1)) / (math.sqrt(corrected) + 1e-8)
        limit = math.log(MAXIMUM) if name == "logit_scale" else 1 / MAXIMUM
        value = min(value, limit) if name == "logit_scale" else max(value, limit)
        found.append(value)
    return found


@pytest.mark.parametrize(("name", "first"), [("logit_scale", 4.5), ("temperature", 0.1)])
def test_the_limit_lies_behind_the_step_and_out_of_the_gradient(name, first):
    expected = theirs(name, first)
    limit = math.log(MAXIMUM) if name == "logit_scale" else 1 / MAXIMUM
    assert expected.count(limit) > 1
    assert expected[-1] != limit
    np.testing.assert_allclose(ours(name, first), expected, rtol=1e-4)
