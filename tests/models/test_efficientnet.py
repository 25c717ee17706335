import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lit_jax.errors import UserError
from lit_jax.models.efficientnet import AlignVisionConfig, EfficientNet, EfficientNetConfig
from lit_jax.models.families import tower_config
from lit_jax.trees import flatten

pytestmark = pytest.mark.usefixtures("plain_ops")

TINY = {
    "width_coefficient": 0.1,
    "depth_coefficient": 1.0,
    "depth_divisor": 4,
    "kernel_sizes": (3, 3),
    "in_channels": (40, 40),
    "out_channels": (40, 80),
    "strides": (2, 1),
    "num_block_repeats": (3, 1),
    "expand_ratios": (1, 2),
}
STATISTICS = ("/mean", "/var")
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 9, 3)), jnp.float32)


@pytest.mark.parametrize(
    "name", ["efficientnet", "align_vision", "align_vision_training", "align_vision_block"]
)
def test_parity_with_pytorch(check_tower, goldens, name, monkeypatch):
    if name == "align_vision":  # one of them with the hand-made operations
        monkeypatch.delenv("LIT_JAX_PLAIN_OPS")
    check_tower(goldens / name)


@st.composite
def configs(draw):
    """Fields of the config.json of either tower, without dropout."""
    stages = draw(st.integers(1, 3))

    def of_stages(values):
        return draw(st.lists(values, min_size=stages, max_size=stages))

    widths = of_stages(st.integers(20, 120))
    return {
        "width_coefficient": draw(st.sampled_from([0.05, 0.1])),
        "depth_coefficient": draw(st.sampled_from([0.6, 1.0])),
        "depth_divisor": draw(st.integers(4, 8)),
        "kernel_sizes": of_stages(st.sampled_from([3, 5])),
        "in_channels": [32, *widths[:-1]],
        "out_channels": widths,
        "depthwise_padding": draw(st.lists(st.integers(0, 5), max_size=3)),
        "strides": of_stages(st.integers(1, 2)),
        "num_block_repeats": of_stages(st.integers(1, 3)),
        "expand_ratios": of_stages(st.integers(1, 4)),
        "squeeze_expansion_ratio": draw(st.sampled_from([0.01, 0.25, 0.5])),
        "hidden_act": draw(st.sampled_from(["swish", "gelu", "quick_gelu"])),
        "pooling_type": draw(st.sampled_from(["mean", "max"])),
        "batch_norm_eps": draw(st.sampled_from([1e-3, 0.1])),
        "batch_norm_momentum": draw(st.sampled_from([0.99, 0.2])),
        "num_channels": draw(st.integers(1, 4)),
        "drop_connect_rate": 0.0,
    }


@pytest.mark.oracle
@pytest.mark.parametrize("train", [False, True])
# Without shrinking: a failure would try hundreds of models.
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    configs(),
    st.booleans(),
    st.tuples(*[st.integers(8, 24)] * 2),
    st.sampled_from(["pooler", "mean"]),
    st.integers(0, 1000),
)
def test_parity_with_live_pytorch(
    check_tower, reference, train, fields, has_top, shape, pooling, seed
):
    import transformers

    if has_top:
        top = tower_config({"model_type": "efficientnet", **fields}).channels(1280)
        hf = transformers.EfficientNetConfig(**fields, hidden_dim=top)
    else:
        hf = transformers.AlignVisionConfig(**fields)
    images = reference.random_images(seed, 4, *shape, fields["num_channels"])
    with tempfile.TemporaryDirectory() as folder:
        reference.write_tower(Path(folder), hf, images, pooling=pooling, seed=seed, train=train)
        check_tower(Path(folder))


@pytest.mark.parametrize(
    ("width", "base", "expected"),
    [
        (2.0, 32, 64),
        (2.0, 1280, 2560),
        (1.1, 40, 48),  # 44 is as near to 40, and goes up
        (1.8, 24, 40),  # 43.2 goes down to 40, which is no less than 0.9 of it
        (0.35, 32, 16),  # 11.2 would go down to 8, which is less
        (0.1, 32, 8),  # at least one multiple
    ],
)
def test_widths_are_multiples_of_the_divisor(width, base, expected):
    assert EfficientNetConfig(width_coefficient=width).channels(base) == expected


def test_the_default_is_b7():
    assert EfficientNetConfig().depths == (4, 7, 7, 10, 10, 13, 4)
    tower = EfficientNet(EfficientNetConfig())
    shapes = flatten(jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3))))
    trained = [leaf.size for name, leaf in shapes.items() if not name.endswith(STATISTICS)]
    assert sum(trained) == 63_786_960  # as Keras counts them, without the classifier


def test_padding_of_strided_convolutions():
    """One more row and column at the end, unless the block is said to be padded alike on all sides."""
    config = EfficientNetConfig(depthwise_padding=(5,))  # the first block of the third stage is 11
    assert config.first_block(0).padding == (1, 1)
    assert config.first_block(1).padding == (0, 1)
    assert config.first_block(2).padding == (1, 2)
    same = EfficientNetConfig(depthwise_padding=(4, 11))
    assert same.first_block(1).padding == (1, 1)
    assert same.first_block(2).padding == (2, 2)
    assert same.first_block(2).following.padding == (2, 2)


def train(tower, variables, seed=0):
    rngs = {"dropout": jax.random.key(seed, impl="rbg")}
    apply = functools.partial(tower.apply, deterministic=False, mutable=["batch_stats"])
    return jax.jit(apply)(variables, IMAGES, rngs=rngs)


def test_dropout_is_of_single_values_and_rises_with_the_index_of_the_block(random_variables):
    """The second and the third of four blocks are not the first of a stage."""
    tower = EfficientNet(AlignVisionConfig(**TINY, drop_connect_rate=0.8))
    params = random_variables(tower, IMAGES)["params"]
    norm = params["encoder"]["layer_from_1"]["projection"]["batchnorm"]
    norm["scale"], norm["bias"] = jnp.zeros((2, 4)), jnp.full((2, 4), 0.5)  # these blocks add 0.5
    images = jnp.asarray(np.random.default_rng(0).normal(size=(8, 96, 96, 3)), jnp.float32)

    @jax.jit
    def blocks(rng):
        _, state = tower.apply(
            {"params": params},
            images,
            deterministic=False,
            rngs={"dropout": rng},
            mutable=["intermediates"],
        )
        return state["intermediates"]["encoder"]

    state = blocks(jax.random.key(0, impl="rbg"))
    (first,), (others,) = (state[name]["hidden_state"] for name in ("layer_0", "layer_from_1"))
    for added, rate in ((others[0] - first, 0.8 * 1 / 4), (others[1] - others[0], 0.8 * 2 / 4)):
        np.testing.assert_allclose((np.abs(added) < 1e-4).mean(), rate, atol=0.02)
        np.testing.assert_allclose(added.max(), 0.5 / (1 - rate), rtol=1e-3)


def test_the_first_block_of_a_stage_replaces_the_map(random_variables):
    tower = EfficientNet(AlignVisionConfig(**{**TINY, "strides": (1, 1)}))
    params = random_variables(tower, IMAGES)["params"]
    norm = params["encoder"]["layer_0"]["projection"]["batchnorm"]
    norm["scale"], norm["bias"] = jnp.zeros(4), jnp.zeros(4)
    apply = jax.jit(functools.partial(tower.apply, mutable=["intermediates"]))
    _, state = apply({"params": params}, IMAGES)
    blocks = state["intermediates"]["encoder"]
    assert np.abs(blocks["input"][0]).max() > 0.1
    np.testing.assert_array_equal(blocks["layer_0"]["hidden_state"][0], 0)


def test_momentum_is_torchs_and_that_of_an_expansion_is_not_the_configs(random_variables):
    tower = EfficientNet(AlignVisionConfig(**TINY, drop_connect_rate=0.0))
    params = random_variables(tower, IMAGES)["params"]
    for leaf in ("embeddings", "encoder"):
        params[leaf] = jax.tree_util.tree_map_with_path(
            lambda path, value: jnp.full_like(value, 1e4) if path[-1].key == "mean" else value,
            params[leaf],
        )
    _, state = train(tower, {"params": params})
    for name, mean in flatten(state["batch_stats"]).items():
        if name.endswith("mean"):
            share = 0.9 if "expansion" in name else 0.01  # of the old one
            np.testing.assert_allclose(mean, share * 1e4, atol=30, err_msg=name)


def test_a_locked_tower_is_normalised_by_its_running_statistics(random_variables):
    """An example is encoded alike whatever others there are in its batch, and nothing is written."""
    tower = EfficientNet(EfficientNetConfig(**TINY))
    variables = random_variables(tower, IMAGES)
    both, state = jax.jit(functools.partial(tower.apply, mutable=["batch_stats"]))(
        variables, IMAGES
    )
    assert not state
    one = jax.jit(tower.apply)(variables, IMAGES[:1])
    np.testing.assert_allclose(both.pooled[:1], one.pooled, atol=1e-5)
    (trained, state) = train(tower, variables)
    assert np.abs(trained.pooled - both.pooled).max() > 1e-2
    statistics = {name for name in flatten(variables["params"]) if name.endswith(STATISTICS)}
    assert set(flatten(state["batch_stats"])) == statistics


@pytest.mark.parametrize(
    ("config_class", "width"), [(EfficientNetConfig, 128), (AlignVisionConfig, 8)]
)
def test_only_efficientnet_has_a_top_convolution(config_class, width, random_variables):
    tower = EfficientNet(config_class(**TINY))
    variables = random_variables(tower, IMAGES)
    assert jax.eval_shape(tower.apply, variables, IMAGES).pooled.shape == (2, width)
    assert ("top" in variables["params"]["encoder"]) == (width == 128)


@pytest.mark.parametrize("pooling_type", ["mean", "max"])
@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_pooling_reads_the_last_map(pooling_type, pooling, random_variables):
    tower = EfficientNet(AlignVisionConfig(**TINY, pooling_type=pooling_type), pooling=pooling)
    output = jax.jit(tower.apply)(random_variables(tower, IMAGES), IMAGES)
    tokens = np.asarray(output.last_hidden_state)
    assert tokens.shape == (2, 2 * 2, 8)
    largest = (pooling, pooling_type) == ("pooler", "max")
    np.testing.assert_allclose(
        output.pooled, tokens.max(1) if largest else tokens.mean(1), atol=1e-6
    )


@pytest.mark.parametrize(
    ("fields", "channels", "message"),
    [
        ({}, 1, "num_channels=3"),
        ({"pooling_type": "sum"}, 3, r"pooling_type 'sum'.*'mean' .*'max'"),
        ({"in_channels": (40, 80)}, 3, r"in_channels=\[40, 80\], .*\[32,"),
    ],
)
def test_what_does_not_fit_is_refused(fields, channels, message):
    tower = EfficientNet(AlignVisionConfig(**{**TINY, **fields}))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 8, 8, channels)))
