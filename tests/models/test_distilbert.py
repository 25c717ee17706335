import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lit_jax.models.distilbert import DistilBert, DistilBertConfig

TINY = DistilBertConfig(
    vocab_size=20, max_position_embeddings=9, n_layers=1, n_heads=2, dim=8, hidden_dim=12
)
IDS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]], jnp.int32)
SINUSOIDAL = {"sinusoidal_pos_embds": True, "max_position_embeddings": 40, "dim": 12}


def test_parity_with_pytorch(check_tower, goldens):
    check_tower(goldens / "distilbert")


@st.composite
def configs(draw):
    """Fields of a config.json, and a text length that it can encode."""
    # Normalisation over a handful of numbers is singular, so no narrower than this.
    head_size, heads = draw(st.integers(5, 9)), draw(st.integers(1, 4))
    positions = draw(st.integers(1, 12))
    fields = {
        "vocab_size": draw(st.integers(2, 30)),
        "dim": head_size * heads,
        "n_heads": heads,
        "n_layers": draw(st.integers(1, 4)),
        "hidden_dim": draw(st.integers(1, 20)),
        "activation": draw(st.sampled_from(["gelu", "gelu_new", "relu", "silu"])),
        "max_position_embeddings": positions,
    }
    return fields, draw(st.integers(1, positions))


@pytest.mark.oracle
# Without shrinking: a failure would try hundreds of models.
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    configs(),
    st.sampled_from(["cls", "mean"]),
    st.sets(st.just("position_ids")),
    st.integers(0, 1000),
)
def test_parity_with_live_pytorch(check_tower, reference, config, pooling, optional, seed):
    import transformers

    fields, length = config
    hf = transformers.DistilBertConfig(**fields)
    texts = reference.random_texts(seed, hf, length=length, optional=tuple(optional))
    with tempfile.TemporaryDirectory() as folder:
        reference.write_tower(Path(folder), hf, texts, pooling=pooling, seed=seed)
        check_tower(Path(folder))


def test_token_types_are_ignored(random_variables):
    module = DistilBert(TINY, pooling="cls")
    variables = random_variables(module, IDS)
    run = jax.jit(lambda *inputs: module.apply(variables, *inputs).pooled)
    np.testing.assert_array_equal(run(IDS, None, jnp.ones_like(IDS)), run(IDS))


def test_dropout_is_not_of_what_attention_adds():
    block = DistilBertConfig(dropout=0.2, attention_dropout=0.3).block
    assert (block.attention_dropout, block.output_dropout, block.mlp_dropout) == (0.3, 0, 0.2)


def sinusoids() -> np.ndarray:
    """The position embeddings that training starts with."""
    module = DistilBert(DistilBertConfig(**SINUSOIDAL, n_layers=1, n_heads=2), pooling="cls")
    params = jax.jit(module.init)(jax.random.key(0, impl="rbg"), IDS)["params"]
    return np.asarray(params["embeddings"]["position_embeddings"]["embedding"])


def test_sinusoids_are_of_one_frequency_for_each_pair():
    sin, cos = sinusoids()[:, 0::2], sinusoids()[:, 1::2]
    np.testing.assert_allclose(sin**2 + cos**2, 1, atol=1e-6)
    angles = np.unwrap(np.arctan2(sin, cos), axis=0)
    np.testing.assert_allclose(angles[39], 39 * 10000.0 ** (-np.arange(6) / 6), rtol=1e-4)


@pytest.mark.oracle
def test_sinusoids_are_those_of_pytorch():
    import transformers

    model = transformers.DistilBertModel(transformers.DistilBertConfig(**SINUSOIDAL, n_layers=1))
    expected = model.embeddings.position_embeddings.weight.detach().numpy()
    np.testing.assert_allclose(sinusoids(), expected, atol=1e-6)
