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
from lit_jax.models.bert import AltCLIPText, AltCLIPTextConfig, Bert, BertConfig, RobertaConfig
from lit_jax.models.families import build_tower

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


@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "bert_unusual",
        "bert_mean",
        "roberta",
        "roberta_unusual",
        "xlm_roberta",
        "altclip_text",
    ],
)
def test_parity_with_pytorch(check_tower, goldens, name):
    check_tower(goldens / name)


# transformers' config classes; test_distilbert.py and test_mpnet.py have those of their families.
KINDS = [
    "BertConfig",
    "RobertaConfig",
    "XLMRobertaConfig",
    "CamembertConfig",
    "AlignTextConfig",
    "ChineseCLIPTextConfig",
    "AltCLIPTextConfig",
]


@st.composite
def configs(draw, kind):
    """Fields of a config.json, and a text length that it can encode."""
    # Normalisation over a handful of numbers is singular, so no narrower than this.
    head_size, heads = draw(st.integers(5, 9)), draw(st.integers(1, 4))
    length, vocabulary = draw(st.integers(1, 12)), draw(st.integers(4, 30))
    padding = draw(st.integers(0, 3))
    counted = kind not in ("BertConfig", "AlignTextConfig", "ChineseCLIPTextConfig")
    unused = draw(st.integers(0, 2))
    fields = {
        "vocab_size": vocabulary,
        "hidden_size": head_size * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(1, 20)),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "quick_gelu", "relu", "silu"])),
        "max_position_embeddings": max(length + unused + (padding + 1) * counted, padding + 1),
        "type_vocab_size": draw(st.integers(1, 3)),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-5, 1e-2])),
        "pad_token_id": padding,
    }
    if kind == "AltCLIPTextConfig":
        fields["project_dim"] = draw(st.integers(1, 20))
    elif not kind.startswith(("Align", "ChineseCLIP")):
        fields |= {"is_decoder": draw(st.booleans()), "use_cache": False}
    return fields, length


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
# Without shrinking: a failure would try hundreds of models.
@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.data(), st.integers(0, 1000))
def test_parity_with_live_pytorch(check_tower, reference, kind, data, seed):
    import transformers

    fields, length = data.draw(configs(kind))
    pooling = data.draw(st.sampled_from(POOLINGS))
    optional = data.draw(st.sets(st.sampled_from(["token_type_ids", "position_ids"])))
    hf = getattr(transformers, kind)(**fields)
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
    with pytest.raises(UserError, match=r"10 .*max_text_length"):
        jax.eval_shape(Bert(TINY).init, jax.random.key(0), jnp.zeros((1, 10), jnp.int32))


def test_heads_that_do_not_divide_the_width_are_refused():
    config = dataclasses.replace(TINY, num_attention_heads=3)
    with pytest.raises(UserError, match="num_attention_heads 3"):
        jax.eval_shape(Bert(config).init, jax.random.key(0), IDS)


SIZES = {
    name: getattr(TINY, name)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
}
ROBERTA = RobertaConfig(**SIZES, vocab_size=20, max_position_embeddings=9, pad_token_id=2)
# Of IDS: from 3 on, and 2 for the token 2 in the second text; the mask does not matter.
COUNTED = jnp.array([[3, 4, 5, 6, 7], [3, 2, 4, 5, 6]], jnp.int32)
ARANGE = jnp.broadcast_to(jnp.arange(5), (2, 5))


@pytest.fixture(scope="module")
def roberta(random_variables):
    """Inputs to last hidden state, for a change of the config."""
    variables = random_variables(Bert(ROBERTA), IDS)

    def run(*inputs, **fields):
        module = Bert(dataclasses.replace(ROBERTA, **fields))
        return jax.jit(module.apply)(variables, *inputs).last_hidden_state

    return run


@pytest.mark.parametrize("mask", [MASK, None])
def test_roberta_counts_positions_by_the_ids_whatever_the_mask(roberta, mask):
    own = roberta(IDS, mask)
    np.testing.assert_array_equal(own, roberta(IDS, mask, None, COUNTED))
    assert np.abs(own - roberta(IDS, mask, None, ARANGE)).max() > 1e-2


def test_roberta_of_a_flax_dual_encoder_has_positions_from_0(roberta):
    own = roberta(IDS, MASK, position_ids="arange")
    np.testing.assert_array_equal(own, roberta(IDS, MASK, None, ARANGE))


def test_roberta_has_fewer_positions_than_rows(roberta):
    assert ROBERTA.embedding.max_length == 6
    assert dataclasses.replace(ROBERTA, position_ids="arange").embedding.max_length == 9
    assert np.isfinite(roberta(jnp.full((1, 6), 7, jnp.int32))).all()
    with pytest.raises(UserError, match=r"7 .*6; .*max_text_length"):
        roberta(jnp.full((1, 7), 7, jnp.int32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_ids": "mask"}, r"'mask'; .*'input_ids', 'arange'"),
        ({"pad_token_id": None}, r"pad_token_id"),
    ],
)
def test_unsuitable_positions_are_refused(fields, message):
    config = dict(vars(ROBERTA), **fields)
    with pytest.raises(UserError, match=message):
        build_tower(config, pooling="cls", dtype="float32").config.embedding.max_length  # noqa: B018


def test_altclip_pools_the_first_token_and_has_no_other_pooler(random_variables):
    config = AltCLIPTextConfig(**SIZES, vocab_size=20, max_position_embeddings=9, project_dim=6)
    pooler, cls = (AltCLIPText(config, pooling=pooling) for pooling in ("pooler", "cls"))
    variables = random_variables(pooler, IDS)
    assert jax.tree.structure(variables) == jax.tree.structure(random_variables(cls, IDS))
    output = jax.jit(pooler.apply)(variables, IDS, MASK)
    assert output.last_hidden_state.shape == (2, 5, 6)
    np.testing.assert_array_equal(output.pooled, output.last_hidden_state[:, 0])
