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
from lit_jax.models.bert import Bert, BertConfig

TINY = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=9,
)
POOLINGS = ["pooler", "cls", "mean"]
IDS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]], jnp.int32)
MASK = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], jnp.int32)


@pytest.fixture(scope="module", params=POOLINGS)
def bert(request, random_variables):
    """Inputs to TowerOutput."""
    module = Bert(TINY, pooling=request.param)
    variables = random_variables(module, IDS)
    return jax.jit(lambda *inputs: module.apply(variables, *inputs))


@pytest.mark.parametrize("name", ["bert", "bert_unusual", "bert_mean"])
def test_parity_with_pytorch(check_tower, goldens, name):
    check_tower(goldens / name)


@st.composite
def configs(draw):
    """Fields of a BERT's config.json, and a text length that it can encode."""
    # Normalisation over a handful of numbers is singular, so no narrower than this.
    head_size, heads = draw(st.integers(5, 9)), draw(st.integers(1, 4))
    positions = draw(st.integers(1, 12))
    fields = {
        "vocab_size": draw(st.integers(2, 30)),
        "hidden_size": head_size * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(1, 20)),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "quick_gelu", "relu", "silu"])),
        "max_position_embeddings": positions,
        "type_vocab_size": draw(st.integers(1, 3)),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-5, 1e-2])),
        "pad_token_id": None,
        "is_decoder": draw(st.booleans()),
        "use_cache": False,
    }
    return fields, draw(st.integers(1, positions))


@pytest.mark.oracle
# Without shrinking: a failure would try hundreds of models.
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    configs(),
    st.sampled_from(POOLINGS),
    st.sets(st.sampled_from(["token_type_ids", "position_ids"])),
    st.integers(0, 1000),
)
def test_parity_with_live_pytorch(check_tower, reference, config, pooling, optional, seed):
    import transformers

    fields, length = config
    hf = transformers.BertConfig(**fields)
    texts = reference.random_texts(seed, hf, length=length, optional=tuple(sorted(optional)))
    with tempfile.TemporaryDirectory() as folder:
        reference.write_tower(Path(folder), hf, texts, pooling=pooling, seed=seed)
        check_tower(Path(folder))


def test_padding_changes_nothing(bert):
    pad = ((0, 0), (0, 4))
    longer = bert(jnp.pad(IDS, pad, constant_values=7), jnp.pad(MASK, pad)).pooled
    np.testing.assert_allclose(longer, bert(IDS, MASK).pooled, atol=1e-6)


def test_every_attended_token_counts(bert):
    other = bert(IDS.at[:, 2].add(1), MASK).pooled
    assert (np.abs(other - bert(IDS, MASK).pooled).max(1) > 1e-3).all()


@pytest.mark.parametrize("bert", ["pooler"], indirect=True)
def test_left_out_inputs_have_the_defaults_of_pytorch(bert):
    types = jnp.zeros_like(IDS)
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    expected = bert(IDS, jnp.ones_like(IDS), types, positions).pooled
    np.testing.assert_allclose(bert(IDS).pooled, expected, atol=1e-6)
    assert np.abs(bert(IDS, None, types + 1).pooled - expected).max() > 1e-3


def test_a_text_without_tokens_is_finite(bert):
    assert np.isfinite(bert(IDS, jnp.zeros_like(IDS)).pooled).all()


@pytest.mark.parametrize("bert", ["mean"], indirect=True)
def test_mean_pooling_is_over_attended_tokens(bert):
    output = bert(IDS, MASK)
    tokens = np.asarray(output.last_hidden_state)
    expected = np.stack([tokens[0].mean(0), tokens[1, :3].mean(0)])
    np.testing.assert_allclose(output.pooled, expected, atol=1e-6)


def test_too_long_a_text_is_refused_when_traced():
    with pytest.raises(UserError, match=r"10 tokens long.*max_text_length"):
        jax.eval_shape(Bert(TINY).init, jax.random.key(0), jnp.zeros((1, 10), jnp.int32))


def test_heads_that_do_not_divide_the_width_are_refused():
    config = dataclasses.replace(TINY, num_attention_heads=3)
    with pytest.raises(UserError, match="num_attention_heads 3"):
        jax.eval_shape(Bert(config).init, jax.random.key(0), IDS)
