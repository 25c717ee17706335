import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.models.transformer import BlockConfig, Encoder

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

    def __init__(self, encoder):
        self._encoder = encoder

    def init(self, key, x):
        return self._encoder.init(key, x, None, True)


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
    gate, value = (h @ mlp[name]["kernel"] + mlp[name]["bias"] for name in ("gate", "fc1"))
    h = gate / (1 + np.exp(-gate)) * value
    expected = x + h @ mlp["fc2"]["kernel"] + mlp["fc2"]["bias"]
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_biases_are_left_out_where_told(random_variables):
    encoder = Encoder(dataclasses.replace(CONFIG, without_bias=("key", "fc2")), jnp.float32)
    layer = random_variables(_Call(encoder), X)["params"]["layer"]
    dense = {**layer["attention"], **layer["mlp"]}
    assert {name for name, leaves in dense.items() if "bias" not in leaves} == {"key", "fc2"}


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
