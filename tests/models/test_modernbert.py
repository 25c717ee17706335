import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lit_jax.errors import UserError
from lit_jax.models.families import tower_config
from lit_jax.models.modernbert import ModernBert, ModernBertConfig

LOCAL, GLOBAL = "sliding_attention", "full_attention"
TINY = ModernBertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    local_attention=4,
    max_position_embeddings=12,
)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 12)), jnp.int32)


@pytest.fixture(scope="module")
def run(random_variables):
    """(config, inputs) to TowerOutput."""

    def run(config, *inputs):
        module = ModernBert(config, pooling="cls")
        return jax.jit(module.apply)(random_variables(module, IDS), *inputs)

    return run


@pytest.mark.parametrize("name", ["modernbert", "modernbert_unusual"])
def test_parity_with_pytorch(check_tower, goldens, name):
    check_tower(goldens / name)


@st.composite
def configs(draw):
    """Fields of a config.json, and a text length that it can encode."""
    # Normalisation over a handful of numbers is singular, so no narrower than this.
    head_size, heads = 2 * draw(st.integers(3, 5)), draw(st.integers(1, 4))
    depth = draw(st.integers(1, 4))
    fields = {
        "vocab_size": draw(st.integers(2, 30)),
        "hidden_size": head_size * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": depth,
        "intermediate_size": draw(st.integers(1, 20)),
        "hidden_activation": draw(st.sampled_from(["gelu", "gelu_new", "relu", "silu"])),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-2])),
        "norm_bias": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "local_attention": draw(st.integers(1, 20)),
        "layer_types": draw(
            st.lists(st.sampled_from([LOCAL, GLOBAL]), min_size=depth, max_size=depth)
        ),
    }
    fields |= {f"{token}_token_id": 0 for token in ("pad", "bos", "eos", "cls", "sep")}
    return fields, draw(st.integers(1, 30))


@pytest.mark.oracle
# Without shrinking: a failure would try hundreds of models.
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    configs(),
    st.sampled_from(["cls", "mean"]),
    st.sets(st.just("position_ids")),
    st.integers(0, 1000),
)
def test_parity_with_live_pytorch(check_tower, reference, config, pooling, optional, seed):
    fields, length = config
    hf = transformers.ModernBertConfig(**fields)
    texts = reference.random_texts(seed, hf, length=length, optional=tuple(optional))
    with tempfile.TemporaryDirectory() as folder:
        reference.write_tower(Path(folder), hf, texts, pooling=pooling, seed=seed)
        check_tower(Path(folder))


@pytest.mark.parametrize(("types", "reach"), [((LOCAL, LOCAL), 4), ((LOCAL, GLOBAL), 11)])
def test_a_local_block_attends_two_tokens_to_each_side(run, types, reach):
    config = dataclasses.replace(TINY, layer_types=types)
    change = run(config, IDS.at[:, 0].add(1)).last_hidden_state
    change -= run(config, IDS).last_hidden_state
    moved = np.abs(change).max(-1) > 1e-6
    np.testing.assert_array_equal(moved, np.broadcast_to(np.arange(12) <= reach, moved.shape))


def test_positions_are_relative_and_token_types_ignored(run):
    expected = run(TINY, IDS).pooled
    positions = jnp.broadcast_to(jnp.arange(100, 112), IDS.shape)
    actual = run(TINY, IDS, None, jnp.ones_like(IDS), positions).pooled
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    other = run(TINY, IDS, None, None, positions[:, ::-1]).pooled
    assert np.abs(other - expected).max() > 1e-3


def test_the_first_block_does_not_normalise_what_is_normalised_already(random_variables):
    params = random_variables(ModernBert(TINY, pooling="cls"), IDS)["params"]
    assert set(params["layer_0"]) == {"attention", "mlp", "mlp_norm"}
    assert "attention_norm" in params["encoder"][f"layer_{TINY.num_hidden_layers - 1}"]
    single = dataclasses.replace(TINY, num_hidden_layers=1)
    assert "encoder" not in random_variables(ModernBert(single, pooling="cls"), IDS)["params"]


def test_blocks_and_angles_are_by_default_those_of_transformers():
    hf = transformers.AutoConfig.for_model("modernbert").to_dict()
    config = tower_config(hf)
    assert isinstance(hash(config), int)
    assert config.type_indices == ModernBertConfig().type_indices == (1, 0, 0) * 7 + (1,)
    assert config.thetas == ModernBertConfig().thetas == (10_000, 160_000)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 2, "layer_types": [GLOBAL]}, r"layer_types.*2"),
        ({"num_hidden_layers": 1, "layer_types": ["causal"]}, r"sliding_attention"),
        ({"rope_parameters": {GLOBAL: {"rope_type": "yarn"}}}, "rope_type='yarn'"),
    ],
)
def test_unsuitable_configs_are_refused(fields, message):
    module = ModernBert(tower_config({"model_type": "modernbert", **fields}), pooling="cls")
    with pytest.raises(UserError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), IDS)


def test_dropout_of_the_mlp_is_inside_it():
    block = ModernBertConfig(mlp_dropout=0.2, attention_dropout=0.3).block
    assert (block.attention_dropout, block.output_dropout) == (0.3, 0.3)
    assert (block.hidden_dropout, block.mlp_dropout) == (0.2, 0)


def test_too_long_a_text_is_refused_when_traced():
    assert TINY.embedding.max_length == 12
    with pytest.raises(UserError, match=r"13 .*max_text_length"):
        jax.eval_shape(
            ModernBert(TINY, pooling="cls").init, jax.random.key(0), jnp.zeros((1, 13), int)
        )


def test_initialisation_is_hugging_faces():
    config = ModernBertConfig(
        vocab_size=500,
        hidden_size=64,
        num_attention_heads=2,
        intermediate_size=64,
        num_hidden_layers=8,
    )
    init = jax.jit(ModernBert(config, pooling="cls").init)
    params = init(jax.random.key(0, impl="rbg"), IDS)["params"]
    layer = params["encoder"]["layer_from_1"]
    inner = [params["embeddings"]["tok_embeddings"]["embedding"], layer["mlp"]["gate"]["kernel"]]
    outer = [layer["attention"]["output"]["kernel"], layer["mlp"]["down"]["kernel"]]
    # A normal distribution that is cut off at two standard deviations has 0.88 of its own.
    for leaves, std in ((inner, 0.02), (outer, 0.02 / 4)):
        for leaf in leaves:
            np.testing.assert_allclose(leaf.std(), 0.88 * std, rtol=0.02)
            np.testing.assert_allclose(np.abs(leaf).max(), 2 * std, rtol=0.01)
