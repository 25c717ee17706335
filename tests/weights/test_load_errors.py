"""Weights that do not fit are named: missing, unexpected, of other shapes, not finite."""

import jax
import numpy as np
import pytest

from lit_jax.errors import UserError
from lit_jax.weights import load
from tests.weights.test_load import renamed, without


@pytest.mark.parametrize(
    "numbers",
    [
        {"num_attention_heads": 0},
        {"hidden_size": -4},
        {"patch_size": 0},
    ],
)
def test_numbers_that_describe_no_model_are_refused(changed, tower, numbers):
    folder = changed("vit_torch", **numbers)
    with pytest.raises(UserError, match=rf"{next(iter(numbers))} .*; .*1"):
        load.load_tower(folder, tower(folder))


def bad_weights(changed, tower, name, change, **config) -> str:
    folder = changed(name, change, **config)
    with pytest.raises(UserError) as error:
        load.load_tower(folder, tower(folder))
    return str(error.value)


def test_missing_and_unexpected_weights_are_one_error(changed, tower):
    names = {"output.dense.weight": "output.dense.w", "layernorm.bias": "norm.bias"}
    message = bad_weights(changed, tower, "vit_torch", renamed(names))
    assert "lacks encoder.layer.*.attention.output.dense.weight (2 times)" in message
    assert "layernorm.bias" in message
    assert "has, beyond that, encoder.layer.*.attention.output.dense.w (2 times)" in message
    assert "norm.bias" in message
    assert len(message.splitlines()) == 1


def test_a_long_list_is_cut(changed, tower):
    message = bad_weights(changed, tower, "vit_torch", without(r"^encoder\."))
    assert " and 10 more" in message
    assert len(message) < 1000


def test_other_shapes_are_an_error(changed, tower):
    message = bad_weights(changed, tower, "vit_torch", lambda tensors: tensors, image_size=12)
    assert "embeddings.position_embeddings is float32[1, 5, 8], not float[1, 10, 8]" in message


def test_shapes_are_those_of_the_file(changed, tower):
    message = bad_weights(
        changed, tower, "bert_torch", lambda tensors: tensors, intermediate_size=9
    )
    assert "encoder.layer.*.intermediate.dense.weight is float32[12, 8], not float[9, 8]" in message


@pytest.mark.parametrize("depth", [1, 3])
def test_another_depth_is_an_error(changed, tower, depth):
    message = bad_weights(
        changed, tower, "bert_torch", lambda tensors: tensors, num_hidden_layers=depth
    )
    assert ("it lacks" in message) == (depth == 3)
    assert ("beyond that" in message) == (depth == 1)


def test_quantised_weights_are_an_error(changed, tower):
    message = bad_weights(
        changed,
        tower,
        "bert_torch",
        lambda tensors: tensors | {"pooler.dense.weight": np.zeros((8, 8), np.int8)},
    )
    assert "pooler.dense.weight is int8[8, 8], not float[8, 8]" in message


def test_two_names_of_one_parameter_are_an_error(changed, tower):
    message = bad_weights(
        changed,
        tower,
        "bert_torch",
        lambda tensors: tensors | {"embeddings.LayerNorm.gamma": np.ones(8, np.float32)},
    )
    assert "embeddings.LayerNorm.gamma and embeddings.LayerNorm.weight, two names" in message


def test_wrong_family_is_an_error(golden, tower):
    module = tower(golden / "vit_torch")
    with pytest.raises(UserError, match=r"bert, .*config\.model\.image\.model .*vit\."):
        load.load_tower(golden / "bert_torch", module)
    with pytest.raises(UserError, match=r"vit\b.*vision-text-dual-encoder.*clip"):
        load.load_dual_encoder(golden / "vit_torch", dtype="float32")


@pytest.mark.parametrize(
    ("value", "counts"), [(np.nan, "(1 NaN, 0 infinite)"), (-np.inf, "(0 NaN, 1 infinite)")]
)
def test_weights_that_are_not_finite_are_counted_and_named(changed, tower, caplog, value, counts):
    name = "encoder.layer.1.output.dense.weight"

    def spoil(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][0, 0] = value
        return tensors

    folder = changed("vit_torch", spoil)
    params, _ = load.load_tower(folder, tower(folder))
    assert f"{name} {counts}" in caplog.text
    assert sum(int((~np.isfinite(leaf)).sum()) for leaf in jax.tree.leaves(params)) == 1


def test_large_weights_are_finite(changed, tower, caplog):
    """Their squares are not."""
    name = "encoder.layer.1.output.dense.weight"
    folder = changed("vit_torch", lambda tensors: tensors | {name: tensors[name] + 3e38})
    load.load_tower(folder, tower(folder))
    assert "NaN" not in caplog.text


@pytest.mark.parametrize("numbers", [{"num_hidden_layers": 10**9}, {"hidden_size": 2**40}])
def test_a_config_of_a_larger_model_than_the_file_asks_for_no_memory(changed, tower, numbers):
    folder = changed("vit_torch", **numbers)
    with pytest.raises(UserError, match=r"config\.json .*\d{9,}"):
        load.load_tower(folder, tower(folder))


@pytest.mark.parametrize(
    ("name", "head", "architecture"),
    [
        ("clip_vision_torch", "visual_projection.weight", "CLIPVisionModelWithProjection"),
        ("siglip_vision_torch", "classifier.weight", "SiglipForImageClassification"),
        ("bert_torch", "classifier.bias", "BertForSequenceClassification"),
    ],
)
def test_a_head_that_a_tower_has_no_place_for_is_named(
    changed, tower, caplog, name, head, architecture
):
    def with_head(tensors):
        return tensors | {head: np.zeros((2, 2), np.float32)}

    folder = changed(name, with_head, architectures=[architecture])
    load.load_tower(folder, tower(folder))
    (record,) = caplog.records
    assert head in record.getMessage()
    assert architecture in record.getMessage()
