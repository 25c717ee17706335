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
    longest = jnp.zeros((1, tower.config.embedding.max_length), jnp.int32)
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
    with pytest.raises(UserError, match=rf"{option} .*{value!r}"):
        tower_config({"model_type": "bert", option: value})


@pytest.mark.parametrize("model_type", [*VISION, *TEXT])
def test_every_field_refuses_a_value_of_another_type_and_names_it(model_type):
    config_class, _ = {**VISION, **TEXT}[model_type]
    for field in dataclasses.fields(config_class):
        if field.name == "model_type":
            continue
        with pytest.raises(UserError, match=rf"^{field.name} .*config\.json .*b'\?'; "):
            tower_config({"model_type": model_type, field.name: b"?"})


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (
            {"model_type": "bert", "is_decoder": "false"},
            r"^is_decoder .*'false'; .*bool .True .*False",
        ),
        ({"model_type": "bert", "is_decoder": 0}, r"^is_decoder .*0; .* bool"),
        ({"model_type": "bert", "num_hidden_layers": 2.0}, r"^num_hidden_layers .*2.0; .* int"),
        (
            {"model_type": "bert", "num_hidden_layers": True},
            r"^num_hidden_layers .*True; .* int",
        ),
        ({"model_type": "bert", "layer_norm_eps": None}, r"^layer_norm_eps .*None; .* float"),
        (
            {"model_type": "bert", "layer_norm_eps": float("nan")},
            r"^layer_norm_eps .*nan; .* float",
        ),
        ({"model_type": "bert", "layer_norm_eps": -1e-6}, r"^layer_norm_eps .*0"),
        ({"model_type": "bert", "hidden_act": 3}, r"^hidden_act .*3; .* str"),
        ({"model_type": "bert", "hidden_size": -8}, r"^hidden_size .*-8; .*1"),
        ({"model_type": "bert", "hidden_dropout_prob": 1.5}, r"^hidden_dropout_prob .*1"),
        (
            {"model_type": "bert", "num_attention_heads": 7},
            "^num_attention_heads .* 7, .* hidden_size .*8",
        ),
        ({"model_type": "distilbert", "n_heads": 5}, r"^n_heads .* 5, .*dim"),
        (
            {"model_type": "roberta", "pad_token_id": 600},
            "^max_position_embeddings .* pad_token_id .* 600",
        ),
        ({"model_type": "mpnet", "position_ids": "flax"}, "^position_ids .*'input_ids', 'arange'"),
        (
            {"model_type": "vit", "image_size": [224]},
            r"^image_size .* \[224\]; .* tuple\[int, int\]",
        ),
        ({"model_type": "vit", "image_size": [224, 0]}, r"^image_size .*0; .*1"),
        ({"model_type": "vit", "image_size": 8}, r"^image_size .* 8, .*patch_size .* 16"),
        ({"model_type": "convnext", "depths": [1, 2]}, r"^hidden_sizes .*, depths .* 4, 2"),
        (
            {"model_type": "convnext", "hidden_sizes": [4], "depths": [1], "num_stages": 2},
            r"^num_stages .* 2, .*depths .* 1",
        ),
        ({"model_type": "efficientnet", "strides": [1]}, "strides .* 1"),
    ],
)
def test_a_value_that_a_field_cannot_have_is_named(hf, message):
    with pytest.raises(UserError, match=message) as error:
        tower_config(hf)
    assert len(str(error.value).splitlines()) == 1


def test_a_whole_number_may_stand_for_a_float():
    assert tower_config({"model_type": "bert", "layer_norm_eps": 0}).layer_norm_eps == 0.0
    assert tower_config({"model_type": "clip_text_model", "eos_token_id": [1, 2]}).eos_token_id == (
        1,
        2,
    )
