import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_jax.models.families import TEXT, VISION
from lit_jax.weights import names

shapes = st.lists(st.integers(1, 4), max_size=4).map(tuple)


def test_every_tower_family_has_an_entry():
    assert set(names.FAMILIES) == {*VISION, *TEXT}


@given(
    name=st.sampled_from(["a.kernel", "a.bias", "a.scale", "a.embedding", "cls_token"]),
    shape=shapes,
    layout=st.sampled_from(["torch", "flax"]),
)
def test_axes_of_a_file_and_back(name, shape, layout):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    there_and_back = names.from_file(name, names.to_file(name, array, layout), layout)
    np.testing.assert_array_equal(there_and_back, array)


def test_axes_of_torch():
    linear_IxO, conv_HxWxIxO = np.zeros((2, 3)), np.zeros((2, 3, 4, 5))
    assert names.to_file("a.kernel", linear_IxO, "torch").shape == (3, 2)
    assert names.to_file("a.kernel", conv_HxWxIxO, "torch").shape == (5, 4, 2, 3)
    assert names.to_file("a.embedding", linear_IxO, "torch").shape == (2, 3)


def test_parts():
    stacks = ["vision_model/encoder/layer"]
    path = "vision_model/encoder/layer/output/dense/kernel"
    assert names.parts(path, (2, 5, 6), stacks) == (
        ["vision_model.encoder.layer.0.output.dense.kernel",
         "vision_model.encoder.layer.1.output.dense.kernel"],
        (5, 6),
    )  # fmt: skip
    assert names.parts("logit_scale", (), stacks) == (["logit_scale"], ())


def test_spelled():
    assert names.spelled("layernorm.scale", "torch") == "layernorm.weight"
    assert names.spelled("layernorm.scale", "flax") == "layernorm.scale"
    assert names.spelled("logit_scale", "torch") == "logit_scale"
    assert names.spelled("embeddings.cls_token", "torch") == "embeddings.cls_token"


@pytest.mark.parametrize("family", names.FAMILIES.values(), ids=names.FAMILIES)
def test_usual_names_are_left_alone(family):
    """An alias that touched a usual name would make the usual files unreadable."""
    usual = [
        f"{family.stack.replace('/', '.')}.3.attention.output.dense.weight",
        "embeddings.LayerNorm.bias",
        "pooler.dense.weight",
    ]
    assert names.recognise(usual, family, has_pooler=True).names == {n: n for n in usual}
    for pattern in family.ignore:
        assert not any(re.match(pattern, name) for name in usual)
