"""Schedules by their definition, optimizers against a plain NumPy step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lit_jax.config import PolicyConfig, ScheduleConfig
from lit_jax.config_schema import steps
from lit_jax.errors import UserError
from lit_jax.optimizer_config import Adafactor, AdamW, Lamb, Lion
from lit_jax.training.optimizers import make_optimizer, make_schedule
from lit_jax.training.policy import resolve_policy

TO_STEPS = functools.partial(steps, batch_size=10, examples_per_epoch=100)


def rates(name, *, total=100, at, **config):
    schedule = make_schedule(
        ScheduleConfig(name=name, learning_rate=2.0, **config), total=total, steps=TO_STEPS
    )
    return [float(schedule(step)) for step in at]


def test_warm_up_then_cosine_to_zero():
    np.testing.assert_allclose(
        rates("cosine", warmup="1 epoch", at=(0, 5, 10, 55, 100)), [0, 1, 2, 1, 0], atol=1e-6
    )


def test_linear_and_constant_with_cooldown():
    np.testing.assert_allclose(rates("linear", at=(0, 50, 100)), [2, 1, 0], atol=1e-6)
    np.testing.assert_allclose(
        rates("constant", cooldown="200 examples", at=(0, 80, 90, 100)), [2, 2, 1, 0], atol=1e-6
    )


def test_rsqrt():
    np.testing.assert_allclose(
        rates("rsqrt", warmup="10 steps", timescale="30 steps", at=(10, 100)), [2, 1], rtol=1e-6
    )


def test_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match=r"120 steps .*100"):
        rates("cosine", warmup="12 epochs", at=(0,))


PARAMS = {"text_model": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full((3,), 2.0)}}
GRADS = {"text_model": {"kernel": jnp.full((2, 3), 0.3), "bias": jnp.full((3,), -0.4)}}


def one_step(config, *, rate=0.1, **rules):
    policy = resolve_policy(PolicyConfig(lock="uu", **rules), PARAMS)
    optimizer = make_optimizer(config, optax.constant_schedule(rate), policy)
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    return jax.tree.map(lambda u: float(u.reshape(-1)[0]), updates)["text_model"]


def test_adamw_decays_kernels_and_not_biases():
    step = one_step(AdamW(weight_decay=0.5, clip_norm=None))
    # The first Adam direction is the gradient's sign.
    np.testing.assert_allclose(step["kernel"], -0.1 * (1 + 0.5 * 2.0), rtol=1e-5)
    np.testing.assert_allclose(step["bias"], 0.1, rtol=1e-5)


def test_lion():
    step = one_step(Lion(b1=0.9, b2=0.99, weight_decay=0.5))
    np.testing.assert_allclose([step["kernel"], step["bias"]], [-0.2, 0.1], rtol=1e-5)


def test_lamb_is_that_of_optax_layer_by_layer():
    """A stack of two layers moves as the two layers alone do."""
    rng = np.random.default_rng(0)

    def draw(scale):
        return jnp.asarray(rng.normal(size=(2, 3, 4)) * scale, jnp.float32)

    def tree(array):
        return {"text_model": {"layer": {"kernel": array}}}

    stacked = draw(np.array([1.0, 5.0]).reshape(2, 1, 1))
    grads = [draw(1.0) for _ in range(3)]

    def run(params, grads, optimizer):
        state = optimizer.init(params)
        for grad in grads:
            updates, state = optimizer.update(grad, state, params)
            params = optax.apply_updates(params, updates)
        return params

    config = Lamb(eps=1e-6, weight_decay=0.1, clip_norm=None)
    policy = resolve_policy(PolicyConfig(lock="uu"), tree(stacked))
    ours = run(
        tree(stacked),
        map(tree, grads),
        make_optimizer(config, optax.constant_schedule(0.01), policy),
    )
    for layer in range(2):
        reference = optax.lamb(0.01, eps=1e-6, weight_decay=0.1)
        expected = run(stacked[layer], [grad[layer] for grad in grads], reference)
        np.testing.assert_allclose(
            ours["text_model"]["layer"]["kernel"][layer], expected, rtol=1e-5
        )


def test_multipliers_apply_to_the_whole_step():
    step = one_step(
        AdamW(weight_decay=0.5, clip_norm=None),
        learning_rate=((".*/kernel", 0.1),),
        weight_decay=((".*/bias", 1.0),),
    )
    np.testing.assert_allclose(step["kernel"], -0.1 * 0.1 * 2.0, rtol=1e-5)
    np.testing.assert_allclose(step["bias"], -0.1 * (-1 + 0.5 * 2.0), atol=1e-6)


def numpy_adafactor(params, grads_by_step, *, b1=0.9, b2=0.999, rate=0.1):
    """Factored second moment with decay 1 - t^-0.8 capped at b2, then momentum, for one matrix."""
    row, column = np.zeros(params.shape[0]), np.zeros(params.shape[1])
    momentum = np.zeros_like(params)
    for t, grad in enumerate(grads_by_step, start=1):
        decay = min(b2, 1 - t**-0.8)
        square = grad**2 + 1e-30
        row = decay * row + (1 - decay) * square.mean(axis=1)
        column = decay * column + (1 - decay) * square.mean(axis=0)
        direction = grad / np.sqrt(np.outer(row / row.mean(), column))
        momentum = b1 * momentum + (1 - b1) * direction
        params = params - rate * momentum
    return params


def test_adafactor_equals_numpy_over_several_steps():
    rng = np.random.default_rng(0)
    params = {"w": {"kernel": jnp.asarray(rng.normal(size=(32, 40)), jnp.float32)}}
    grads = rng.normal(size=(4, 32, 40)).astype(np.float32)
    policy = resolve_policy(PolicyConfig(lock="uu"), params)
    config = Adafactor(clip_norm=None, momentum_dtype="float32")
    optimizer = make_optimizer(config, optax.constant_schedule(0.1), policy)
    expected = numpy_adafactor(np.asarray(params["w"]["kernel"], np.float64), grads)
    state = optimizer.init(params)
    for grad in grads:
        updates, state = optimizer.update({"w": {"kernel": jnp.asarray(grad)}}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"]["kernel"], expected, atol=2e-5)


def test_adafactor_factors_no_vectors_of_a_deep_stack():
    """A stack of as many layers as a matrix needs rows to be factored moves as the layers alone do."""
    rng = np.random.default_rng(0)

    def tree(**arrays):
        return {"text_model": {"layer": arrays}}

    def draw():
        return tree(kernel=rng.normal(size=(32, 33, 34)), bias=rng.normal(size=(32, 34)))

    def run(params, grads):
        policy = resolve_policy(PolicyConfig(lock="uu"), params)
        config = Adafactor(clip_norm=None, momentum_dtype="float32")
        optimizer = make_optimizer(config, optax.constant_schedule(0.1), policy)
        state = optimizer.init(params)
        for grad in grads:
            updates, state = jax.jit(optimizer.update)(grad, state, params)
            params = optax.apply_updates(params, updates)
        return params["text_model"]

    trees = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), [draw() for _ in range(4)])
    stacked = run(trees[0], trees[1:])["layer"]
    first = [
        {"text_model": {"last": jax.tree.map(lambda x: x[0], tree["text_model"]["layer"])}}
        for tree in trees
    ]
    alone = run(first[0], first[1:])["last"]
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(stacked[name][0], alone[name], rtol=1e-5, atol=1e-6)


def test_adafactor_keeps_no_second_moment_of_the_size_of_a_matrix():
    params = {"w": {"kernel": jnp.zeros((64, 48))}}
    policy = resolve_policy(PolicyConfig(lock="uu"), params)
    config = Adafactor()
    state = make_optimizer(config, optax.constant_schedule(0.1), policy).init(params)
    full = [leaf for leaf in jax.tree.leaves(state) if leaf.size == 64 * 48]
    assert [leaf.dtype for leaf in full] == [jnp.bfloat16]  # the momentum


def test_clipping_uses_the_norm_of_the_whole_gradient():
    policy = resolve_policy(PolicyConfig(lock="uu"), PARAMS)
    norm = float(optax.tree.norm(GRADS))
    for clip, expected in ((norm / 2, 0.5), (norm * 2, 1.0)):
        config = AdamW(b1=0.0, b2=0.0, eps=1e6, clip_norm=clip)
        # With so large an eps the direction is proportional to the clipped gradient.
        optimizer = make_optimizer(config, optax.constant_schedule(1e6), policy)
        updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
        np.testing.assert_allclose(
            updates["text_model"]["kernel"], -expected * GRADS["text_model"]["kernel"], rtol=1e-4
        )
