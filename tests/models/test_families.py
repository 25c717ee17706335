import dataclasses

import jax
import jax.numpy as jnp
import pytest
import transformers

from lit_jax.errors import UserError
from lit_jax.models.bert import Bert, BertConfig
from lit_jax.models.families import TEXT, VISION, build_tower, tower_config
from lit_jax.models.vit import ViT, ViTConfig


@pytest.mark.parametrize("model_type", [*VISION, *TEXT])
def test_fields_and_defaults_are_those_of_transformers(model_type):
    config_class, _ = {**VISION, **TEXT}[model_type]
    theirs = transformers.AutoConfig.for_model(model_type).to_dict()
    ours = dataclasses.asdict(config_class())
    resolved = {"pooler_output_size", "projection_size", "layer_types", "rope_parameters"}
    for name in resolved & ours.keys():
        assert ours.pop(name) is None  # which transformers resolves at once
    ours.pop("position_ids", None)  # an option of ours
    lists = {name: tuple(theirs[name]) for name in ours if isinstance(theirs[name], list)}
    assert ours == {name: theirs[name] for name in ours} | lists


@pytest.mark.parametrize("model_type", TEXT)
def test_every_text_tower_says_how_long_a_text_may_be(model_type):
    tower = build_tower({"model_type": model_type}, pooling="mean", dtype="float32")
    longest = jnp.zeros((1, tower.config.max_length), jnp.int32)
    jax.eval_shape(tower.init, jax.random.key(0), longest)
    with pytest.raises(UserError, match="max_text_length"):
        jax.eval_shape(tower.init, jax.random.key(0), jnp.pad(longest, ((0, 0), (0, 1))))


def test_a_config_json_becomes_a_hashable_config():
    hf = {"model_type": "vit", "image_size": [32, 64], "encoder_stride": 16, "id2label": {0: "cat"}}
    config = tower_config(hf)
    assert config == ViTConfig(image_size=(32, 64))
    assert isinstance(hash(config), int)


def test_build_tower():
    vit = build_tower({"model_type": "vit", "hidden_size": 24}, pooling="cls", dtype="bfloat16")
    assert vit == ViT(ViTConfig(hidden_size=24), pooling="cls", dtype=jnp.dtype("bfloat16"))
    bert = build_tower({"model_type": "bert"}, pooling="mean", dtype="float32")
    assert bert == Bert(BertConfig(), pooling="mean", dtype=jnp.dtype("float32"))


@pytest.mark.parametrize("model_type", ["resnet", None])
def test_an_unknown_family_is_refused_with_those_we_have(model_type):
    with pytest.raises(UserError, match=rf"{model_type}.*vit.*bert"):
        tower_config({"model_type": model_type})


@pytest.mark.parametrize(
    ("option", "value"),
    [("add_cross_attention", True), ("position_embedding_type", "relative_key")],
)
def test_an_option_that_changes_numbers_is_never_ignored(option, value):
    with pytest.raises(UserError, match=f"{option}={value!r}"):
        tower_config({"model_type": "bert", option: value})
