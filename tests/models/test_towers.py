"""Properties of the towers of all families."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lit_jax.distributed.flops import matmul_flops
from lit_jax.models.clip import CLIPText, CLIPVision
from lit_jax.models.families import TEXT, VISION, build_tower
from lit_jax.models.modernbert import ModernBert
from lit_jax.models.siglip import SiglipText, SiglipVision
from lit_jax.models.tower import Tower, TowerOutput
from lit_jax.trees import flatten, is_in_block
from tests.harness import largest

SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "mlp_ratio": 1.5,
    "image_size": 16,
    "patch_size": 8,
    "project_dim": 16,
    "vocab_size": 20,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "attention_dropout": 0.1,
    "eos_token_id": 2,
    "dim": 16,  # these four are DistilBERT's
    "n_heads": 2,
    "hidden_dim": 24,
    "dropout": 0.1,
    "drop_path_rate": 0.5,
    "use_relative_position_bias": True,
    "use_shared_relative_position_bias": True,
    "num_register_tokens": 2,
    "num_stages": 1,  # these two are ConvNeXt's
    "hidden_sizes": [16],
    "width_coefficient": 0.1,  # these are EfficientNet's
    "depth_coefficient": 1.0,
    "depth_divisor": 4,
    "kernel_sizes": [3],
    "in_channels": [40],
    "out_channels": [40],
    "strides": [2],
    "expand_ratios": [2],
    "drop_connect_rate": 0.5,
}
DEPTHS = ("num_hidden_layers", "n_layers")
DEPTHS_OF_STAGES = ("depths", "num_block_repeats")

# See test_clip.py and test_modernbert.py.
OTHER_INITIALISATION = (CLIPVision, CLIPText, SiglipVision, SiglipText, ModernBert)


PARTS = re.compile(
    # Before the blocks, between two stages, shared by all blocks, after the blocks.
    r"(embeddings|pre_layrnorm|encoder/stages_\d+/downsampling_layer_\d"
    r"|position_bias_table|relative_attention_bias"
    r"|encoder/top|(final_|post_)?layer_?norm|final_norm|pre_LN|transformation|head|pooler)(/|$)"
)

# One of each module: those that share one differ in numbers alone.
FAMILIES = {module: name for name, (_, module) in reversed({**VISION, **TEXT}.items())}.values()
# One of each way in which blocks are called.
ONE_OF_EACH_CALL = ("vit", "modernbert", "convnext", "efficientnet")


def build(model_type, *, depth=2, dtype="float32", **changes):
    depths = dict.fromkeys(DEPTHS, depth) | {name: [depth] for name in DEPTHS_OF_STAGES}
    hf = {"model_type": model_type, **depths, **SMALL, **changes}
    _, module_class = {**VISION, **TEXT}[model_type]
    return build_tower(hf, pooling=module_class.poolings[0], dtype=dtype)


def example(tower):
    random = np.random.default_rng(0)
    if tower.example_input.dtype == jnp.float32:
        shape = (2, *tower.example_input.shape[1:])
        return jnp.asarray(random.normal(size=shape), jnp.float32)
    return jnp.asarray(random.integers(0, 20, (2, 5)), jnp.int32)


def key(seed):
    return jax.random.key(seed, impl="rbg")  # the default takes seconds to compile


class Case(NamedTuple):
    model_type: str
    tower: Tower
    x: jax.Array
    variables: dict[str, Any]

    def forward(self) -> TowerOutput:
        return _forward(self.tower, self.variables, self.x)


@functools.partial(jax.jit, static_argnums=0)
def _forward(tower, variables, x):
    return tower.apply(variables, x)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, random_variables):
    tower = build(request.param)
    x = example(tower)
    return Case(request.param, tower, x, random_variables(tower, x))


@pytest.fixture(scope="module")
def trained(case):
    """A function of a key: the gradient of a weighted sum of what is pooled in training, and what is pooled.

    It is compiled once for the tests of a family.
    """
    shape = jax.eval_shape(case.tower.apply, case.variables, case.x).pooled.shape
    weights = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

    def loss(variables, rng):
        pooled = case.tower.apply(
            variables, case.x, deterministic=False, rngs={"dropout": rng}
        ).pooled
        return (pooled * weights).sum(), pooled

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    return lambda rng: gradient(case.variables, rng)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_initialisation_is_hugging_faces(model_type):
    tower = build(model_type, depth=3)
    params = jax.jit(tower.init)(key(0), example(tower))["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.dtype == jnp.float32, name
        if name.endswith("bias"):
            np.testing.assert_array_equal(leaf, 0, err_msg=name)
        elif name.endswith("scale"):
            np.testing.assert_array_equal(leaf, 1, err_msg=name)
        elif leaf.size > 200 and not isinstance(tower, OTHER_INITIALISATION):
            np.testing.assert_allclose(leaf.std(), 0.02, rtol=0.2, err_msg=name)
        if re.search(r"layer(_from_\d+)?/.*kernel$", name) and len(leaf) > 1:
            assert np.abs(leaf[0] - leaf[1]).max() > 5e-3, f"layers are initialised alike: {name}"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_parts_outside_the_blocks_have_the_names_by_which_rules_order_them(model_type):
    tower = build(model_type)
    params = jax.eval_shape(tower.init, key(0), example(tower))["params"]
    outside = {path for path in flatten(params) if not is_in_block(path)}
    unknown = {path for path in outside if not PARTS.match(path)}
    # `unlock_last` and `layer_decay` tell by the name alone whether a part comes before the blocks; see
    # policy.py.
    assert not unknown


def equations_of(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations_of(inner)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("deterministic", [True, False])
def test_gradients_of_bfloat16_are_no_sums_of_bfloat16(model_type, deterministic):
    """A sum over rows or tokens stops growing at 256 times what is added; a product's is float32 in hardware.

    What is put together inside a row (the tokens that are pooled) may be bfloat16.
    """
    tower = build(model_type, dtype="bfloat16", layer_scale_init_value=0.1)
    rows = jnp.repeat(example(tower)[:1], 7, axis=0)
    variables = jax.eval_shape(tower.init, jax.random.key(0), rows)

    def loss(variables):
        output, _ = tower.apply(
            variables,
            rows,
            deterministic=deterministic,
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats"],
        )
        return output.pooled.astype(jnp.float32).sum()

    for equation in equations_of(jax.make_jaxpr(jax.grad(loss))(variables).jaxpr):
        for out in (variable.aval for variable in equation.outvars):
            adds_up = equation.primitive.name == "reduce_sum" or (
                equation.primitive.name == "scatter-add" and out.shape[0] != len(rows)
            )
            assert not (adds_up and out.dtype == jnp.bfloat16), equation


@pytest.mark.parametrize("model_type", ["vit", "bert"])
def test_gradients_of_bfloat16_add_up_over_many_rows(model_type, random_variables):
    """512 equal rows have 512 times the gradient of one."""
    tower = build(model_type, dtype="bfloat16")
    row = example(tower)[:1]
    variables = random_variables(tower, row)
    shape = jax.eval_shape(tower.apply, variables, row).pooled.shape
    weights = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

    def gradient(count):
        def loss(variables):
            pooled = tower.apply(variables, jnp.repeat(row, count, axis=0)).pooled
            return (pooled.astype(jnp.float32) * weights).sum()

        return jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(variables))

    of_one, of_many = gradient(1), gradient(512)
    # Of a key bias the gradient is 0, but for rounding.
    negligible = 1e-3 * max(np.linalg.norm(leaf) for _, leaf in of_one)
    for (path, one), (_, many) in zip(of_one, of_many, strict=True):
        error = np.linalg.norm(many / 512 - one)
        assert error <= 0.02 * np.linalg.norm(one) + negligible, jax.tree_util.keystr(path)


def test_gradients_reach_every_parameter_and_are_finite(trained):
    # With this key no tower drops the whole path to a parameter.
    gradients, _ = trained(key(4))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        # A mask token is only there to be in the files that we write; statistics are not trained.
        is_trained = not name.endswith(("['mask_token']", "['mean']", "['var']"))
        assert (np.abs(leaf).max() > 0) == is_trained, name


def gradient_of(tower, x):
    """A function of variables and a key."""

    def loss(variables, rng):
        output, updated = tower.apply(
            variables, x, deterministic=False, rngs={"dropout": rng}, mutable=["batch_stats"]
        )
        return jnp.sin(output.pooled).sum(), updated

    return jax.jit(jax.grad(loss, has_aux=True))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_rematerialization_computes_again(model_type):
    tower = build(model_type)
    x = example(tower)
    variables = jax.eval_shape(tower.init, jax.random.key(0), x)
    none, matmuls, block = (
        matmul_flops(
            gradient_of(tower.clone(remat=remat), x).trace(variables, jax.random.key(0)).jaxpr
        )
        for remat in ("none", "matmuls", "block")
    )
    assert none <= matmuls < block


@pytest.mark.parametrize(
    ("model_type", "remat"),
    [("vit", "matmuls"), *((name, "block") for name in ONE_OF_EACH_CALL)],
)
def test_a_gradient_that_computes_again_is_the_same(model_type, remat, random_variables):
    """Also the masks of dropout, and the statistics that BatchNorm leaves behind."""
    tower = build(model_type)
    x = example(tower)
    variables = random_variables(tower, x)
    expected = gradient_of(tower, x)(variables, key(0))
    actual = gradient_of(tower.clone(remat=remat), x)(variables, key(0))
    scale = max(largest(expected[0]), 1)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * scale)


def test_dropout_is_on_only_when_asked_for(case, trained):
    plain = case.forward().pooled  # without a key: it could not draw
    (_, first), (_, again), (_, other) = (trained(key(seed)) for seed in (0, 0, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4
    assert np.abs(first - plain).max() > 1e-4


def test_bfloat16_computation_is_close(case):
    """Under strict dtype promotion, with float32 parameters and with those of a locked tower."""
    expected = case.forward().last_hidden_state
    apply = jax.jit(build(case.model_type, dtype="bfloat16").apply)
    for dtype in (jnp.float32, jnp.bfloat16):
        variables = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), case.variables)
        output = apply(variables, case.x)
        assert output.last_hidden_state.dtype == output.pooled.dtype == jnp.bfloat16
        error = np.abs(output.last_hidden_state.astype(jnp.float32) - expected).mean()
        assert 0 < error < 0.02 * np.abs(expected).mean()


@pytest.mark.parametrize(
    ("model_type", "remat"),
    [*((name, "none") for name in FAMILIES), *((name, "block") for name in ONE_OF_EACH_CALL)],
)
def test_the_program_does_not_grow_with_depth(model_type, remat):
    def operations(depth):
        tower = build(model_type, depth=depth).clone(remat=remat)
        x = example(tower)
        variables = jax.eval_shape(tower.init, jax.random.key(0), x)
        gradient = jax.grad(lambda variables, x: tower.apply(variables, x).pooled.sum())
        return sum(1 for _ in equations_of(jax.make_jaxpr(gradient)(variables, x).jaxpr))

    assert operations(3) == operations(8)


def test_what_is_pooled_needs_no_more_tokens_than_it_says(case):
    tower, output = case.tower.clone(all_tokens=False), case.forward()
    features_only = jax.jit(tower.apply)(case.variables, case.x)
    np.testing.assert_allclose(features_only.pooled, output.pooled, rtol=0, atol=1e-5)
    tokens = np.asarray(features_only.last_hidden_state)
    every_token = np.asarray(output.last_hidden_state)
    if tokens.shape == every_token.shape:
        np.testing.assert_allclose(tokens, every_token, rtol=0, atol=1e-5)
    else:  # one of each row
        assert tokens.shape[1] == 1
        assert np.abs(tokens - every_token).max(-1).min(-1).max() < 1e-5


@pytest.mark.parametrize(
    ("model_type", "pooling"),
    [("vit", "cls"), ("clip_text_model", "pooler"), ("siglip_text_model", "pooler")],
)
def test_the_last_block_is_cheap_if_only_one_token_is_wanted(model_type, pooling):
    def flops(**changes):
        tower = build(model_type).clone(pooling=pooling, **changes)
        variables = jax.eval_shape(tower.init, jax.random.key(0), example(tower))
        # One pass: the precision of all other tests takes several, each of which is counted.
        with jax.default_matmul_precision("default"):
            return matmul_flops(jax.make_jaxpr(tower.apply)(variables, example(tower)))

    tower = build(model_type)
    x = example(tower)
    output = jax.eval_shape(tower.init_with_output, jax.random.key(0), x)[0]
    batch, length, width = output.last_hidden_state.shape
    dense = 2 * (width + tower.config.intermediate_size) * width  # query, output, fc1, fc2
    of_attention = 2 * length * width  # query times keys, probabilities times values
    saved = 2 * batch * (length - 1) * (dense + of_attention)
    assert flops() - flops(all_tokens=False) == saved


@pytest.mark.parametrize(
    "model_type", ["vit", "beit", "dinov2_with_registers", "clip_vision_model", "convnext"]
)
def test_interpolating_once_is_interpolating_at_every_call(model_type, random_variables):
    tower = build(model_type)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 24, 3)), jnp.float32)
    params = random_variables(tower, tower.example_input)["params"]
    bigger, bigger_params = tower.interpolated(params, 24)
    assert bigger.example_input.shape == (1, 24, 24, 3)
    expected = jax.jit(tower.apply)({"params": params}, x)
    actual = jax.jit(bigger.apply)({"params": bigger_params}, x)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
