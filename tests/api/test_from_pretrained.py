"""Make a model from folders: options, two towers, what is no model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers as tr

import lit_jax
from lit_jax.errors import UserError
from tests.api.tiny_models import assert_same_params


def test_a_model_of_two_pretrained_towers(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    model.vision_model.save_pretrained(tmp_path / "vision")
    pair = lit_jax.DualEncoder.from_vision_text_pretrained(
        tmp_path / "vision", tmp_path / "whole", projection_dim=4, logit_scale_init_value=1.0
    )
    assert_same_params(pair.params["vision_model"], model.params["vision_model"])
    assert_same_params(pair.params["text_model"], model.params["text_model"])
    assert pair.config.projection_dim == 4
    assert pair.params["visual_projection"]["kernel"].shape == (16, 4)
    assert pair.params["logit_scale"] == 1.0
    assert jax.eval_shape(lambda: pair(**inputs)).text_embeds.shape == (2, 4)
    pair.save_pretrained(tmp_path / "pair")
    again = lit_jax.DualEncoder.from_pretrained(tmp_path / "pair")
    assert_same_params(again.params, pair.params)
    # A pooler that is not used is not lost.
    tower = lit_jax.VisionModel.from_pretrained(tmp_path / "vision", pooling="mean")
    assert "pooler" not in tower.params
    tower.save_pretrained(tmp_path / "tower")
    whole = lit_jax.VisionModel.from_pretrained(tmp_path / "tower")
    assert_same_params(whole.params, model.params["vision_model"])


def test_from_pretrained_takes_the_options_of_transformers(model, tmp_path):
    folder = tmp_path / "repository" / "inner"
    model.save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    (folder / "flax_model.msgpack").unlink()
    read = lit_jax.DualEncoder.from_pretrained
    config = tr.VisionTextDualEncoderConfig.from_pretrained(folder)
    config.text_config.hidden_dropout_prob = 0.0
    options = {"revision": "main", "token": None, "subfolder": "inner", "variant": "fp16"}
    again = read(tmp_path / "repository", config=config, **options)
    assert_same_params(again.params, model.params)
    assert again.module.text_model.config.hidden_dropout_prob == 0.0
    changed = read(folder, variant="fp16", text_config={"hidden_dropout_prob": 0.5})
    assert changed.module.text_model.config.hidden_dropout_prob == 0.5
    tower = lit_jax.TextModel.from_pretrained(folder, variant="fp16", hidden_dropout_prob=0.5)
    assert tower.config.hidden_dropout_prob == 0.5
    for options, message in (
        ({}, r"'fp16'; .*variant='fp16'"),
        ({"variant": "fp32"}, r"'fp32'; .*model.fp32.safetensors"),
        ({"subfolder": "outer"}, r"'outer'"),
        ({"revison": "main"}, r"'revision'"),
        (
            {"text_config": {"hiden_size": 3}},
            r"text_config.hiden_size .*'hidden_size'",
        ),
        ({"text_config": {"is_decoder": "no"}}, r"text_config.is_decoder .*'no'; .* bool"),
    ):
        with pytest.raises(UserError, match=message):
            read(folder, **options)


def test_two_towers_are_joined_with_arguments_of_their_own(model, tmp_path):
    model.vision_model.save_pretrained(tmp_path / "vision")
    model.text_model.save_pretrained(tmp_path / "text" / "inner")
    join = lit_jax.DualEncoder.from_vision_text_pretrained
    pair = join(
        str(tmp_path / "vision"),
        str(tmp_path / "text"),
        text_subfolder="inner",
        text_hidden_dropout_prob=0.5,
        vision_config=model.config.vision_config,
        projection_dim=4,
    )
    assert pair.module.text_model.config.hidden_dropout_prob == 0.5
    objects = join(vision_model=model.vision_model, text_model=model.text_model, projection_dim=4)
    assert_same_params(objects.params, pair.params)
    with pytest.raises(UserError, match=r"text_model_name_or_path"):
        join(tmp_path / "vision")
    with pytest.raises(UserError, match=r"text_model .*VisionModel; .*lit_jax\.TextModel"):
        join(tmp_path / "vision", text_model=model.vision_model)
    with pytest.raises(UserError, match=r"image_pooling='pooler' .*vision_pooling='cls'"):
        join(tmp_path / "vision", tmp_path / "text", image_pooling="pooler", vision_pooling="cls")
    # Options that the objects have already change nothing and are no mistake.
    join(
        vision_model=model.vision_model,
        text_model=model.text_model,
        text_pooling="pooler",
        dtype=jnp.float32,
        projection_dim=4,
    )
    with pytest.raises(UserError, match=r"projection_dims .*'projection_dim'"):
        join(tmp_path / "vision", tmp_path / "text", projection_dims=4)


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        ({"text_hidden_dropout_prob": 0.5}, "text_hidden_dropout_prob"),
        ({"vision_model_name_or_path": "somewhere"}, "vision_model_name_or_path"),
        ({"text_pooling": "mean"}, "text_pooling='mean'"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
    ],
)
def test_what_does_not_change_a_tower_that_is_an_object_is_refused(model, given, unused):
    towers = {"vision_model": model.vision_model, "text_model": model.text_model}
    with pytest.raises(UserError, match=rf"_model .*{unused}"):
        lit_jax.DualEncoder.from_vision_text_pretrained(**towers, **given)


def test_its_own_export_is_read_also_where_transformers_has_no_class_for_it(model, tmp_path):
    """Mean pooling is the pooling of most sentence encoders."""
    model.save_pretrained(tmp_path / "whole")
    pair = lit_jax.DualEncoder.from_vision_text_pretrained(
        tmp_path / "whole", tmp_path / "whole", text_pooling="mean", projection_dim=4
    )
    for name in ("once", "twice"):
        pair.save_pretrained(tmp_path / name)
        again = lit_jax.DualEncoder.from_pretrained(tmp_path / name)
        assert again.module.text_model.pooling == "mean"
        assert_same_params(again.params, pair.params)
        pair = again


def test_what_is_no_model_is_refused(model, inputs, tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        lit_jax.DualEncoder.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'no/such'"):
        lit_jax.TextModel.from_pretrained("no/such")
    model.text_model.save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match=r"model_type 'bert'; .*\bvit\b"):
        lit_jax.VisionModel.from_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match=r"model_type 'vit'; .*\bbert\b"):
        lit_jax.TextModel.from_config(model.config.vision_config)
    with pytest.raises(UserError, match=r"\bbert\b.*vision-text-dual-encoder"):
        lit_jax.DualEncoder.from_config(model.config.text_config)
    towers = model.config.vision_config, model.config.text_config
    with pytest.raises(UserError, match=r"projection_dim .*0"):
        lit_jax.DualEncoder.from_vision_text_configs(*towers, projection_dim=0)
    with pytest.raises(UserError, match=r"input_ids .*\[0, 7\]"):
        model.get_text_features(inputs["input_ids"][:0])
    with pytest.raises(UserError, match=r"pixel_values .*\[0, 3, 16, 16\]"):
        model.get_image_features(inputs["pixel_values"][:0])
    assert len(repr(model)) < 10_000
    with pytest.raises(UserError, match=r"1 texts .*2 images"):
        model(inputs["input_ids"][:1], inputs["pixel_values"], return_loss=True)
    with pytest.raises(UserError, match=r"input_ids .*40"):
        model.get_text_features(np.array([[1, 40]]))
    with pytest.raises(UserError, match=r"token_type_ids .*2"):
        model(**inputs, token_type_ids=np.full((2, 7), 2))
    with pytest.raises(UserError, match=r"position_ids .*20"):
        model.text_model(inputs["input_ids"], position_ids=np.full((2, 7), 20))
    with pytest.raises(UserError, match=r"dtype .*'int8'"):
        lit_jax.TextModel.from_pretrained(tmp_path / "text", dtype="int8")
    with pytest.raises(AttributeError, match=r"'Dual'"):
        lit_jax.Dual  # noqa: B018
