"""Micro-batches: the gradient of the whole batch, for one more forward pass of what trains."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lit_jax.config import MeshConfig
from lit_jax.distributed.flops import matmul_flops as all_flops
from lit_jax.distributed.mesh import batch_sharding, cut, join, make_mesh
from lit_jax.errors import UserError
from lit_jax.training import trainer
from lit_jax.training.checks import check_accumulation
from lit_jax.training.gradcache import in_micro_batches
from lit_jax.training.losses import make_loss
from lit_jax.training.metrics import read_metrics
from lit_jax.training.model_factory import build_model, example_batch
from lit_jax.training.policy import Policy, merge
from lit_jax.training.train_step import TrainStep
from lit_jax.trees import flatten
from tests.training.test_teacher import demo as teacher_demo

BATCH_SIZE = 16
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SOFTMAX = make_loss("softmax", implementation="dense")
COLLECTIVES = re.compile(r"all-(gather|reduce|to-all)|collective-permute|reduce-scatter")


def random_batch(model):
    rng, example = np.random.default_rng(0), example_batch(model.processors)
    batch = {name: jnp.concatenate([leaf] * BATCH_SIZE) for name, leaf in example.items()}
    pixels, ids = batch["pixel_values"], batch["input_ids"]
    pixels = jnp.asarray(rng.integers(0, 256, pixels.shape, np.uint8))
    ids = jnp.asarray(rng.integers(1, 9, ids.shape, np.int32))
    return {**batch, "pixel_values": pixels, "input_ids": ids}


def prepared(config):
    model = build_model(config, make_mesh(config.mesh))
    batch = random_batch(model)
    params = jax.jit(model.module.init)(jax.random.key(0), batch)["params"]
    return model, *model.policy.split(params), batch


def shapes_of(config):
    """As `prepared`, of shapes alone: nothing is compiled or computed."""
    model = build_model(config, make_mesh(config.mesh))
    batch = jax.eval_shape(lambda: random_batch(model))
    params = jax.eval_shape(model.module.init, jax.random.key(0), batch)["params"]
    return model, *model.policy.split(params), batch


def loss_with(forward, frozen, key=0):
    """As in the train step: a function of the trainable parameters and a batch."""

    def loss(params, batch):
        output, _ = forward(
            {"params": merge(params, frozen)},
            batch,
            deterministic_image="vision_model" not in params,
            deterministic_text="text_model" not in params,
            rngs={"dropout": jax.random.key(key)},
            mutable=["batch_stats"],
        )
        return SOFTMAX(*output)

    return loss


def assert_close(ours, theirs):
    # On the host: nothing is compiled for the shape of each leaf.
    (value, gradients), (expected, expected_gradients) = jax.device_get((ours, theirs))
    assert np.isfinite(expected)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    gradients, expected_gradients = flatten(gradients), flatten(expected_gradients)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(float(np.abs(leaf).max()) for leaf in expected_gradients.values())
    for path, leaf in expected_gradients.items():
        np.testing.assert_allclose(gradients[path], leaf, atol=1e-5 * largest, err_msg=path)


@pytest.mark.long
@pytest.mark.parametrize("lock", ["LU", "UU", "uL"])
def test_the_gradient_is_that_of_the_whole_batch(tiny, lock):
    config = tiny(**{"policy.lock": lock, "model.text.overrides": NO_DROPOUT})
    model, trainable, frozen, batch = prepared(config)
    plain = jax.value_and_grad(loss_with(model.forward, frozen))
    parts = jax.value_and_grad(loss_with(in_micro_batches(model.forward, 2), frozen))
    expected = jax.jit(plain)(trainable, batch)
    assert_close(jax.jit(parts)(trainable, batch), expected)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(x, batch_sharding(mesh)) for name, x in batch.items()}
        assert_close(jax.jit(parts)(trainable, placed), expected)


@pytest.mark.long
def test_both_runs_drop_the_same(tiny):
    """Against the definition: every part by itself, with its key, in one differentiated program."""
    model, trainable, frozen, batch = prepared(tiny())

    def forward_in_parts(variables, batch, *, rngs, **modes):
        halves = [{n: x[i * 8 : (i + 1) * 8] for n, x in batch.items()} for i in range(2)]
        outputs = [
            model.forward(
                variables, half, rngs={"dropout": jax.random.fold_in(rngs["dropout"], i)}, **modes
            )[0]
            for i, half in enumerate(halves)
        ]
        rows = (jnp.concatenate(rows) for rows in zip(*(o[:2] for o in outputs), strict=True))
        return (*rows, *outputs[0][2:]), {}

    def gradients(forward):
        # The key is an argument, so that the program is compiled once for both keys.
        def of_key(key, params, batch):
            return jax.value_and_grad(loss_with(forward, frozen, key))(params, batch)

        compiled = jax.jit(of_key)
        return lambda key: compiled(key, trainable, batch)

    parts = gradients(in_micro_batches(model.forward, 2))
    assert_close(parts(0), gradients(forward_in_parts)(0))
    # There is dropout.
    assert float(parts(1)[0]) != float(parts(0)[0])


def matmul_flops(jaxpr):
    """Of all matrix products, those of loops times their length."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = np.prod([shape[axis] for axis in contracted], dtype=int)
            total += 2 * equation.outvars[0].aval.size * inner
        assert equation.primitive.name not in ("while", "conv_general_dilated")
        inside = [matmul_flops(jaxpr) for jaxpr in jaxprs_in_params(equation.params)]
        if equation.primitive.name == "cond":  # of which the platform chooses one branch
            total += max(inside)
        else:
            total += equation.params.get("length", 1) * sum(inside)
    return total


def gradient_of(forward):
    """The gradient as a function of all its arrays: shapes alone can stand for them."""
    return lambda trainable, frozen, batch: jax.grad(loss_with(forward, frozen))(trainable, batch)


@pytest.mark.parametrize("lock", ["LU", "UU", "uL"])
def test_it_costs_one_more_forward_pass_of_what_trains(tiny, lock):
    model, trainable, frozen, batch = shapes_of(tiny(**{"policy.lock": lock}))

    def cost(forward):
        jaxpr = jax.make_jaxpr(gradient_of(forward))(trainable, frozen, batch)
        return matmul_flops(jaxpr.jaxpr)

    variables = {"params": merge(trainable, frozen)}
    pooled = dict(batch)
    for side, inputs in (("vision_model", "pixel_values"), ("text_model", "input_ids")):
        if side not in trainable:
            name = {"vision_model": "image_features", "text_model": "text_features"}[side]
            pool = functools.partial(model.module.apply, method=name)
            pooled[name] = jax.eval_shape(pool, variables, batch[inputs])
    forward_flops = matmul_flops(jax.make_jaxpr(model.forward)(variables, pooled).jaxpr)
    extra = cost(in_micro_batches(model.forward, 4)) - cost(model.forward)
    # A little less: what a tower pools is kept, so the last product before it is not computed again.
    assert 0.9 * forward_flops < extra <= forward_flops


def test_it_holds_the_activations_of_one_part_alone(tiny):
    # Random numbers take the compiler longest and are no activations.
    config = tiny(**{"policy.lock": "UU", "model.text.overrides": NO_DROPOUT})
    model, trainable, frozen, batch = shapes_of(config)
    many = {n: x.update(shape=(16 * x.shape[0], *x.shape[1:])) for n, x in batch.items()}

    def held(forward):
        compiled = jax.jit(gradient_of(forward)).lower(trainable, frozen, many).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert held(in_micro_batches(model.forward, 16)) < held(model.forward) / 4


@pytest.mark.parametrize("sizes", [(8, 1), (4, 2), (2, 4)])
def test_every_device_keeps_its_rows(sizes):
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1]))
    with jax.set_mesh(mesh):
        x_Bx3 = jax.device_put(jnp.arange(144.0).reshape(48, 3), batch_sharding(mesh))
        split = jax.jit(functools.partial(cut, parts=3)).lower(x_Bx3).compile()
        parts = split(x_Bx3)
        joined = jax.jit(join).lower(parts).compile()
        np.testing.assert_array_equal(joined(parts), x_Bx3)
    for program in (split, joined):
        assert not COLLECTIVES.search(program.as_text())
    assert parts.shape == (3, 16, 3)
    rows = {tuple(np.unique(shard.data)) for shard in parts.addressable_shards}
    assert rows == {tuple(np.unique(shard.data)) for shard in x_Bx3.addressable_shards}


@pytest.mark.long
@pytest.mark.parametrize(
    "changes", [{"accumulate": 2}, {"loss_implementation": "blockwise", "accumulate": 4}]
)
def test_a_run_has_the_losses_of_one_in_whole_batches(tiny, tmp_path, one_device, changes):
    exact = {"model.text.overrides": NO_DROPOUT, "duration": "4 steps"}
    trainer.train(tiny(**exact), tmp_path / "whole")
    trainer.train(tiny(**exact, **changes), tmp_path / "parts")
    ours, theirs = (read_metrics(tmp_path / run) for run in ("parts", "whole"))
    for row, expected in zip(ours, theirs, strict=True):
        for name in ("loss", "logit_scale"):
            np.testing.assert_allclose(row[name], expected[name], rtol=1e-5)
        np.testing.assert_allclose(row["grad_norm"], expected["grad_norm"], rtol=1e-4)


@pytest.mark.long
def test_a_student_learns_in_micro_batches(tmp_path, one_device):
    exact = {"model.text.overrides": NO_DROPOUT}
    trainer.train(teacher_demo(**exact), tmp_path / "whole")
    trainer.train(teacher_demo(**exact, accumulate=4), tmp_path / "parts")
    ours, theirs = (read_metrics(tmp_path / run) for run in ("parts", "whole"))
    for row, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(row["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(row["grad_norm"], expected["grad_norm"], rtol=1e-4)


@pytest.mark.parametrize(
    ("batch_size", "count", "message"),
    [(40, 2, r"=40 .*8 .*config.accumulate=2.*48")],
)
def test_a_batch_that_does_not_divide_is_refused(tiny, tmp_path, batch_size, count, message):
    with pytest.raises(UserError, match=message):
        trainer.train(tiny(batch_size=batch_size, accumulate=count), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_batch_normalisation_that_trains_is_refused():
    def policy(**trainable):
        flat = {path.replace("__", "/"): value for path, value in trainable.items()}
        return Policy(flat, {}, {})

    statistics = {"vision_model__top__batchnorm__mean": False}
    check_accumulation(2, policy(vision_model__top__conv__kernel=False, **statistics))
    trained = policy(vision_model__top__conv__kernel=True, **statistics)
    check_accumulation(1, trained)
    with pytest.raises(UserError, match=r"config.accumulate=2, .*vision_model"):
        check_accumulation(2, trained)


def test_recomputation_is_no_work_of_the_model(tiny):
    def flops(**changes):
        config = tiny(**changes)
        step = TrainStep.build(build_model(config, make_mesh(MeshConfig())), lambda step: 1e-3)
        with jax.set_mesh(step.model.mesh):
            batch = step.abstract_batch(config.batch_size)
            return step.flops(batch), all_flops(step.trace(batch).jaxpr)

    once, traced = flops()
    assert 0 < once == traced
    again, traced = flops(remat="block", accumulate=2)
    assert once == again < traced
