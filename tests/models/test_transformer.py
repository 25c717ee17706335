import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.models.transformer import Attention, BlockConfig, Encoder, Rotary, first_token

CONFIG = BlockConfig(
    depth=2,
    width=6,
    num_heads=2,
    mlp_width=5,
    activation="silu",
    norm_epsilon=1e-6,
    norm_first=True,
)
X = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 6)), jnp.float32)


@pytest.fixture
def run(random_variables):
    """(variables, output) of an encoder; `change` edits the variables' random parameters."""

    def run(change=lambda params: None, deterministic=True, seed=0, x=X, **fields):
        encoder = Encoder(dataclasses.replace(CONFIG, **fields), jnp.float32)
        params = jax.tree.map(
            np.array, random_variables(_Call(encoder), x)["params"], is_leaf=lambda _: False
        )
        change(params["layer"])
        rngs = {"dropout": jax.random.key(seed, impl="rbg")}
        return params["layer"], np.asarray(
            encoder.apply({"params": params}, x, None, deterministic, rngs=rngs)
        )

    return run


class _Call:
    """An encoder that is initialised with its tokens alone."""

    def __init__(self, encoder, bias=None):
        self._encoder, self._bias = encoder, bias

    def init(self, key, x):
        return self._encoder.init(key, x, self._bias, True)


def each_block_adds_one(params):
    for leaf in jax.tree.leaves(params):
        leaf[...] = 0
    params["mlp"]["fc2"]["bias"][...] = 1


def test_dropout_differs_between_blocks(run):
    _, output = run(each_block_adds_one, deterministic=False, mlp_dropout=0.5)
    # Each adds 0 or 2; one mask for both blocks would give 0 and 4 alone.
    np.testing.assert_allclose(np.unique(np.round(output - X, 4)), [0, 2, 4])


def test_drop_path_leaves_out_whole_rows_of_the_later_blocks(run):
    x = jnp.zeros((500, 2, 6))
    _, output = run(each_block_adds_one, deterministic=False, drop_path=0.75, x=x)
    added = output[:, 0, 0]
    np.testing.assert_array_equal(output, np.broadcast_to(added[:, None, None], output.shape))
    # The first block always adds 1, the last one adds 4 to a quarter of the rows.
    assert set(np.unique(added)) == {1, 5}
    assert abs((added == 5).mean() - 0.25) < 0.08
    _, output = run(each_block_adds_one, drop_path=0.75, x=x)
    np.testing.assert_array_equal(output, 2)


def test_drop_path_may_be_alike_in_all_blocks(run):
    x = jnp.zeros((500, 2, 6))
    _, output = run(
        each_block_adds_one, deterministic=False, drop_path=0.75, drop_path_rises=False, x=x
    )
    # Each block, drawing for itself, adds 4 to a quarter of the rows.
    assert set(np.unique(output)) == {0, 4, 8}
    assert abs((output[:, 0, 0] > 0).mean() - 7 / 16) < 0.08


def test_each_block_makes_its_bias_of_its_own_table(random_variables):
    def of_table(table_RxH):  # the bias of each key is a row of the table
        return jnp.broadcast_to(table_RxH.T[None, :, None], (1, 2, 4, 4))

    encoder = Encoder(dataclasses.replace(CONFIG, bias_rows=4), jnp.float32)
    params = random_variables(_Call(encoder, of_table), X)["params"]
    keys = np.array([[1, 2], [3, 0]])  # to which each head of each block is to attend
    params["layer"]["attention"]["position_bias_table"] = jnp.where(
        np.arange(4)[None, :, None] == keys[:, None], 200.0, 0.0
    )
    _, state = encoder.apply({"params": params}, X, of_table, True, mutable=["intermediates"])
    (probability_NxBxHxLxL,) = state["intermediates"]["layer"]["attention"]["probability"]
    expected = np.eye(4)[keys][:, None, :, None]
    np.testing.assert_allclose(
        probability_NxBxHxLxL, np.broadcast_to(expected, (2, 3, 2, 4, 4)), atol=1e-6
    )


def test_rotary_positions_are_relative(random_variables):
    def rotary(angle_LxI):
        angle_LxK = jnp.tile(jnp.asarray(angle_LxI, jnp.float32), (1, 2))
        return Rotary(jnp.cos(angle_LxK), jnp.sin(angle_LxK))

    encoder = Encoder(dataclasses.replace(CONFIG, width=8), jnp.float32)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 8)), jnp.float32)
    variables = random_variables(_Call(encoder), x)

    def run(*rotary):
        return np.asarray(encoder.apply(variables, x, None, True, *rotary))

    without, angle_LxI = run(), np.random.default_rng(3).normal(size=(4, 2))
    np.testing.assert_array_equal(run(rotary(np.zeros((4, 2)))), without)
    turned = run(rotary(angle_LxI))
    assert np.abs(turned - without).max() > 1e-2
    np.testing.assert_allclose(run(rotary(angle_LxI + np.array([1.5, -0.3]))), turned, atol=1e-5)


def test_layer_scale_multiplies_what_is_added(run):
    def change(params):
        factors = [params[f"{part}_scale"]["factor"].copy() for part in ("attention", "mlp")]
        each_block_adds_one(params)
        params["attention_scale"]["factor"][...], params["mlp_scale"]["factor"][...] = factors

    params, output = run(change, layer_scale=1e-5)
    np.testing.assert_allclose(
        output - X, np.broadcast_to(params["mlp_scale"]["factor"].sum(0), X.shape), atol=1e-6
    )


def test_a_gated_mlp_is_swiglu(run):
    def change(params):
        params["attention"]["output"]["kernel"][...] = 0
        params["attention"]["output"]["bias"][...] = 0

    params, output = run(change, depth=1, gated_mlp=True)
    norm, mlp = (jax.tree.map(lambda leaf: leaf[0], params[name]) for name in ("mlp_norm", "mlp"))
    x = np.asarray(X, np.float64)
    h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    h = h * norm["scale"] + norm["bias"]
    gate, value = (h @ mlp[name]["kernel"] + mlp[name]["bias"] for name in ("gate", "up"))
    h = gate / (1 + np.exp(-gate)) * value
    expected = x + h @ mlp["down"]["kernel"] + mlp["down"]["bias"]
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_biases_are_left_out_where_told(random_variables):
    config = dataclasses.replace(CONFIG, without_bias=("key", "fc2", "norm"))
    layer = random_variables(_Call(Encoder(config, jnp.float32)), X)["params"]["layer"]
    parts = {**layer["attention"], **layer["mlp"], **layer}
    without = {name for name, leaves in parts.items() if not {"bias", "query", "fc1"} & {*leaves}}
    assert without == {"key", "fc2", "attention_norm", "mlp_norm"}


def test_hidden_dropout_is_of_the_wide_features(run):
    def change(params):
        each_block_adds_one(params)
        params["mlp"]["fc1"]["bias"][...] = 100  # of which silu makes as much
        params["mlp"]["fc2"]["kernel"][...] = 0.01

    _, output = run(change, depth=1, deterministic=False, hidden_dropout=0.5)
    # 2 for each of the 5 features that is kept.
    added = {round(float(added), 3) for added in (output - X).flatten()}
    assert added <= {1, 3, 5, 7, 9, 11}
    assert len(added) > 2
    _, output = run(change, depth=1, hidden_dropout=0.5)
    np.testing.assert_allclose(output - X, 6, atol=1e-4)


def test_attention_may_read_the_tokens_as_they_are(run):
    def change(params):
        params["mlp"]["fc2"]["kernel"][...] = 0
        params["mlp"]["fc2"]["bias"][...] = 0

    params, output = run(change, depth=1, norm_attention=False)
    assert {name for name in params if name.endswith("norm")} == {"mlp_norm"}
    own = {"params": jax.tree.map(lambda leaf: leaf[0], params["attention"])}
    expected = Attention(CONFIG, jnp.float32).apply(own, X, deterministic=True)
    np.testing.assert_allclose(output - X, expected, atol=1e-5)


def test_a_block_has_the_bias_and_the_rotary_positions_of_its_kind(random_variables):
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(3, 4, 8)), jnp.float32)
    bias_TxBxHxLxL = jnp.asarray(rng.normal(size=(2, 3, 2, 4, 4)), jnp.float32)
    rotary = Rotary(*jnp.asarray(rng.normal(size=(2, 2, 3, 4, 4)), jnp.float32))
    encoder = Encoder(dataclasses.replace(CONFIG, width=8, depth=3), jnp.float32)
    variables = random_variables(_Call(encoder), x)
    actual = encoder.apply(variables, x, bias_TxBxHxLxL, True, rotary, jnp.array([1, 0, 1]))
    block = Encoder(dataclasses.replace(CONFIG, width=8, depth=1), jnp.float32)
    for i, kind in enumerate([1, 0, 1]):
        own = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], variables)
        own_rotary = Rotary(rotary.cos[kind], rotary.sin[kind])
        x = block.apply(own, x, bias_TxBxHxLxL[kind], True, own_rotary)
    np.testing.assert_allclose(actual, x, atol=1e-5)


def test_a_stack_is_named_by_the_number_of_its_first_block(random_variables):
    params = random_variables(_Call(Encoder(CONFIG, jnp.float32, first=3)), X)["params"]
    assert set(params) == {"layer_from_3"}


def test_intermediates_are_the_states_and_probabilities_of_each_block(random_variables):
    encoder = Encoder(CONFIG, jnp.float32)
    variables = random_variables(_Call(encoder), X)
    bias = jnp.where(jnp.arange(4) < 3, 0.0, jnp.finfo(jnp.float32).min)[None, None, None]
    output, state = encoder.apply(variables, X, bias, True, mutable=["intermediates"])
    layer = state["intermediates"]["layer"]
    (hidden,), (attention,) = layer["hidden_state"], layer["attention"]["probability"]
    assert hidden.shape == (2, 3, 4, 6)
    np.testing.assert_array_equal(state["intermediates"]["input"][0], X)
    np.testing.assert_array_equal(hidden[-1], output)
    assert attention.shape == (2, 3, 2, 4, 4)
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(attention[..., 3], 0)
    np.testing.assert_array_equal(encoder.apply(variables, X, bias, True), output)


def test_attention_of_other_queries_is_as_that_of_the_tokens(random_variables):
    module = Attention(CONFIG, jnp.float32)
    init = functools.partial(module.init, deterministic=True)
    variables = random_variables(types.SimpleNamespace(init=init), X)
    expected = module.apply(variables, X, deterministic=True)[:, 1:3]
    actual = module.apply(variables, X, X[:, 1:3], deterministic=True)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_kernels_are_initialised_as_told():
    config = dataclasses.replace(CONFIG, width=64, mlp_width=64, own_init_std=(("fc1", 0.5),))
    init = jax.jit(_Call(Encoder(config, jnp.float32)).init)
    params = init(jax.random.key(0, impl="rbg"), jnp.zeros((1, 1, 64)))["params"]
    mlp = params["layer"]["mlp"]
    np.testing.assert_allclose(mlp["fc1"]["kernel"].std(), 0.5, rtol=0.05)
    np.testing.assert_allclose(mlp["fc2"]["kernel"].std(), 0.02, rtol=0.05)
    config = dataclasses.replace(config, init_cutoff=1.5)
    init = jax.jit(_Call(Encoder(config, jnp.float32)).init)
    params = init(jax.random.key(0, impl="rbg"), jnp.zeros((1, 1, 64)))["params"]
    assert 0.7 < np.abs(params["layer"]["mlp"]["fc1"]["kernel"]).max() <= 0.75


@pytest.mark.parametrize(
    ("fields", "remat", "index_B"),
    [
        ({"norm_first": True}, "block", (0, 0)),
        ({"norm_first": True}, "none", (3, 1)),
        ({"norm_first": False}, "none", (3, 1)),
        ({"depth": 1, "layer_scale": 0.5}, "none", (3, 1)),
    ],
)
def test_the_last_block_can_be_computed_for_one_token_alone(
    random_variables, fields, remat, index_B
):
    def token(x, axis):
        return jnp.stack(
            [row.take(jnp.array([i]), axis - 1) for row, i in zip(x, index_B, strict=True)]
        )

    config = dataclasses.replace(CONFIG, width=8, **fields)
    angle = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4)), jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 8)), jnp.float32)
    bias = jnp.asarray(np.random.default_rng(2).normal(size=(2, 1, 4, 4)), jnp.float32)
    whole, one_only = (
        Encoder(config, jnp.float32, remat, last_block) for last_block in ("outside", "one token")
    )
    variables = random_variables(_Call(whole), x)
    assert set(variables["params"]) == {"layer", f"layer_{config.depth - 1}"} - (
        {"layer"} if config.depth == 1 else set()
    )

    def gradient_of(encoder, of_output, **chosen):
        def loss(variables, x):
            rotary = Rotary(jnp.cos(angle), jnp.sin(angle))
            tokens_BxQxD = encoder.apply(variables, x, bias, True, rotary, **chosen)
            picked_Bx1xD = of_output(tokens_BxQxD, 1)
            return jnp.sin(picked_Bx1xD).sum(), (tokens_BxQxD.shape[1], picked_Bx1xD)

        gradient = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        return gradient(variables, x)

    chosen = {"select": token} if any(index_B) else {}  # without it: the first
    (_, (one, actual)), gradients = gradient_of(one_only, first_token, **chosen)
    (_, (four, expected)), expected_gradients = gradient_of(whole, token)
    assert (one, four) == (1, 4)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5),
        (actual, gradients),
        (expected, expected_gradients),
    )


def test_a_block_apart_computes_what_it_does_in_the_stack(random_variables):
    scanned = Encoder(CONFIG, jnp.float32)
    params = random_variables(_Call(scanned), X)["params"]["layer"]
    stack, last = (jax.tree.map(part, params) for part in (lambda x: x[:-1], lambda x: x[-1]))
    apart = Encoder(CONFIG, jnp.float32, last_block="outside")
    name = f"layer_{CONFIG.depth - 1}"
    actual = apart.apply({"params": {"layer": stack, name: last}}, X, None, True)
    expected = scanned.apply({"params": {"layer": params}}, X, None, True)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
