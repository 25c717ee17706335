import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lit_jax.errors import UserError
from lit_jax.models.families import tower_config
from lit_jax.models.mpnet import MPNet, MPNetConfig, distance_buckets

TINY = MPNetConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=9,
)
POOLINGS = ["pooler", "cls", "mean"]


def test_parity_with_pytorch(check_tower, goldens):
    check_tower(goldens / "mpnet")


@st.composite
def configs(draw):
    """Fields of a config.json, and a text length that it can encode."""
    # Normalisation over a handful of numbers is singular, so no narrower than this.
    head_size, heads = draw(st.integers(5, 9)), draw(st.integers(1, 4))
    length = draw(st.integers(1, 40))
    fields = {
        "vocab_size": draw(st.integers(2, 30)),
        "hidden_size": head_size * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(1, 20)),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu", "silu"])),
        "max_position_embeddings": length + 2 + draw(st.integers(0, 2)),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-5, 1e-2])),
        "relative_attention_num_buckets": draw(st.integers(32, 40)),
        "pad_token_id": draw(st.integers(0, 1)),  # the model takes 1 whatever this is
    }
    return fields, length


@pytest.mark.oracle
# Without shrinking: a failure would try hundreds of models.
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(configs(), st.sampled_from(POOLINGS), st.sets(st.just("position_ids")), st.integers(0, 1000))
def test_parity_with_live_pytorch(check_tower, reference, config, pooling, optional, seed):
    import transformers

    fields, length = config
    hf = transformers.MPNetConfig(**fields)
    texts = reference.random_texts(seed, hf, length=length, optional=tuple(optional))
    with tempfile.TemporaryDirectory() as folder:
        reference.write_tower(Path(folder), hf, texts, pooling=pooling, seed=seed)
        check_tower(Path(folder))


def test_buckets_are_of_single_distances_and_then_of_ranges():
    ahead, behind = distance_buckets(200)[0], distance_buckets(200)[-1, ::-1]
    np.testing.assert_array_equal(behind[:8], np.arange(8))
    starts = np.flatnonzero(np.diff(behind)) + 1
    # From 8 on a range is the square root of 2 times as long as the one before.
    np.testing.assert_array_equal(starts[7:], [8, 12, 16, 23, 32, 46, 64, 91])
    assert behind[-1] == 15
    np.testing.assert_array_equal(ahead[1:], behind[1:] + 16)


@pytest.mark.oracle
def test_buckets_are_those_of_pytorch():
    import torch
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    positions = torch.arange(600)
    expected = MPNetEncoder.relative_position_bucket(positions[None] - positions[:, None])
    np.testing.assert_array_equal(distance_buckets(600), expected.numpy())


def test_all_blocks_share_one_table(random_variables):
    module = MPNet(dataclasses.replace(TINY, num_hidden_layers=3))
    params = random_variables(module, jnp.ones((1, 1), jnp.int32))["params"]
    assert params["relative_attention_bias"]["embedding"].shape == (32, 2)
    assert "position_bias_table" not in params["encoder"]["layer"]["attention"]


def test_positions_begin_after_1_whatever_the_padding_token_of_the_config():
    config = tower_config(vars(TINY) | {"pad_token_id": 5})
    assert config == TINY
    assert config.embedding.max_length == 7


def test_too_small_a_table_is_refused():
    module = MPNet(dataclasses.replace(TINY, relative_attention_num_buckets=31))
    with pytest.raises(UserError, match="relative_attention_num_buckets=31"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
