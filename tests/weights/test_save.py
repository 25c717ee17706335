import functools
import json
import os
import pathlib
import re
import resource

import jax
import numpy as np
import pytest
import safetensors.numpy
import transformers
from flax import serialization

from lit_jax.config import ModelConfig, TowerConfig
from lit_jax.errors import UserError
from lit_jax.models.dual_encoder import build_dual_encoder, build_system
from lit_jax.weights import files, hub, load, save

TESTS = pathlib.Path(__file__).parents[1]
# Pooling and projection of the image tower, of the text tower, projection_dim.
EXPRESSIBLE = [
    (("pooler", "linear"), ("pooler", "linear"), 6),
    (("cls", "linear"), ("cls", "linear"), 6),
    (("cls", "none"), ("cls", "none"), 8),
    (("cls", "linear_bias"), ("cls", "linear_bias"), 6),
    (("pooler", "none"), ("cls", "linear"), 8),
]


@pytest.fixture(scope="session")
def make_dual(golden):
    """A dual encoder of the golden towers with random parameters, and its config.json."""

    def make(image, text, projection_dim, logit_bias=None):
        hf_config = {
            "model_type": "vision-text-dual-encoder",
            "vision_config": hub.read_config(golden / "vit_torch"),
            "text_config": hub.read_config(golden / "bert_torch"),
        }
        config = ModelConfig(
            image=TowerConfig(pooling=image[0], projection=image[1]),
            text=TowerConfig(pooling=text[0], projection=text[1]),
            projection_dim=projection_dim,
            logit_bias_init=logit_bias,
        )
        module = build_dual_encoder(hf_config["vision_config"], hf_config["text_config"], config)
        batch = {"pixel_values": jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)}
        batch |= dict.fromkeys(
            ["input_ids", "attention_mask"], jax.ShapeDtypeStruct((1, 4), np.int32)
        )
        shapes = jax.eval_shape(module.init, jax.random.key(0), batch)["params"]
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(np.float32), shapes
        )
        return module, params, hf_config

    return make


@pytest.fixture
def dual(make_dual):
    return make_dual(*EXPRESSIBLE[0])


def assert_same_tree(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), actual, expected)


@pytest.mark.parametrize("name", ["vit_torch", "bert_torch"])
def test_a_tower_is_written_as_transformers_writes_it(golden, tower, tmp_path, name):
    module = tower(golden / name)
    params, _ = load.load_tower(golden / name, module)
    save.save_tower(tmp_path / "new", hub.read_config(golden / name), module, params)
    ours = safetensors.numpy.load_file(tmp_path / "new/model.safetensors")
    theirs = safetensors.numpy.load_file(golden / name / "model.safetensors")
    assert set(ours) == set(theirs)
    for key, array in theirs.items():
        np.testing.assert_array_equal(ours[key], array, strict=True)
    theirs = json.loads((golden / name / "config.json").read_text())
    ours = json.loads((tmp_path / "new/config.json").read_text())
    del theirs["transformers_version"]
    assert theirs.pop("torch_dtype", "float32") == ours["dtype"]
    assert theirs.items() <= ours.items()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_tower_without_pooler_is_read_back(golden, tower, tmp_path, pooling):
    module = tower(golden / "bert_torch", pooling)
    params, _ = load.load_tower(golden / "bert_torch", module)
    save.save_tower(tmp_path / "new", hub.read_config(golden / "bert_torch"), module, params)
    again, report = load.load_tower(tmp_path / "new", module)
    assert_same_tree(again, params)
    assert not report.ignored


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("goldens/files/vit_torch", "cls"),
        ("goldens/files/bert_torch", "mean"),
        ("goldens/files/clip_vision_torch", "mean"),
        ("goldens/files/siglip_vision_torch", "mean"),
        ("goldens/files/siglip_text_torch", "mean"),
        ("goldens/towers/convnext", "mean"),
    ],
)
def test_a_pooler_that_is_not_used_is_written_again(tower, tmp_path, name, pooling, caplog):
    folder = TESTS / name
    module = tower(folder, pooling)
    params, pooler = load.load_tower_and_pooler(folder, module)
    assert_same_tree(params, load.load_tower(folder, module)[0])
    hf = hub.read_config(folder)
    save.save_tower(tmp_path / "new", hf, module, params, pooler=pooler)
    ours, theirs = (files.read_tensors(path).values for path in (tmp_path / "new", folder))
    assert set(ours) == set(theirs)
    for key, array in theirs.items():
        np.testing.assert_array_equal(ours[key], array)
    written = hub.read_config(tmp_path / "new")
    assert written.get("vision_use_head") == hf.get("vision_use_head")
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("goldens/files/bert_torch", "pooler.dense.weight"),
        ("goldens/towers/convnext", "layernorm.weight"),
        ("goldens/towers/dinov2", None),
    ],
)
def test_what_transformers_will_draw_at_random_is_said(tower, tmp_path, name, lacking, caplog):
    folder = TESTS / name
    module = tower(folder, "mean")
    params, _ = load.load_tower(folder, module)
    save.save_tower(tmp_path / "new", hub.read_config(folder), module, params)
    assert [lacking in record.getMessage() for record in caplog.records] == [True] * bool(lacking)


@pytest.mark.parametrize(("image", "text", "projection_dim"), EXPRESSIBLE)
def test_a_dual_encoder_is_read_back_bit_by_bit(make_dual, tmp_path, image, text, projection_dim):
    module, params, hf_config = make_dual(image, text, projection_dim, logit_bias=-10.0)
    save.save_dual_encoder(tmp_path / "new", hf_config, module, params)
    again, again_params, read_config, report = load.load_dual_encoder(
        tmp_path / "new", dtype="float32"
    )
    assert report.layout == "torch"
    assert_same_tree(again_params, params)
    for field in ("vision_model", "text_model", "image_projection", "text_projection"):
        assert getattr(again, field) == getattr(module, field)

    # The Flax file of a second round trip, with the config that was read.
    save.save_dual_encoder(tmp_path / "twice", read_config, again, again_params)
    (tmp_path / "twice/model.safetensors").unlink()
    _, twice_params, twice_config, report = load.load_dual_encoder(
        tmp_path / "twice", dtype="float32"
    )
    assert report.layout == "flax"
    assert_same_tree(twice_params, params)
    assert twice_config == read_config


def test_a_dual_encoder_is_written_as_transformers_writes_it(golden, tmp_path):
    """PyTorch's file, and the file of the last transformers with Flax."""
    module, params, hf_config, _ = load.load_dual_encoder(golden / "dual_torch", dtype="float32")
    save.save_dual_encoder(tmp_path / "new", hf_config, module, params)
    ours, theirs = (
        safetensors.numpy.load_file(folder / "model.safetensors")
        for folder in (tmp_path / "new", golden / "dual_torch")
    )
    assert_same_tree(ours, theirs)
    ours, theirs = (
        serialization.msgpack_restore((folder / "flax_model.msgpack").read_bytes())
        for folder in (tmp_path / "new", golden / "dual_flax")
    )
    assert_same_tree(ours, theirs)
    assert {type(leaf) for leaf in jax.tree.leaves(ours)} == {np.ndarray}


def test_bfloat16_parameters_are_written_as_float32(dual, tmp_path):
    module, params, hf_config = dual
    half = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, jax.numpy.bfloat16), params)
    save.save_dual_encoder(tmp_path / "new", hf_config, module, half)
    again = load.load_dual_encoder(tmp_path / "new", dtype="bfloat16")[1]
    assert_same_tree(again, jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), half))


def test_the_config_says_what_dtype_the_file_has(dual, tmp_path):
    module, params, hf_config = dual
    half = dict(hf_config)
    for part in ("vision_config", "text_config"):
        half[part] = half[part] | {"dtype": "bfloat16"}
    save.save_dual_encoder(tmp_path / "new", half, module, params)
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert [config["dtype"], config["vision_config"]["dtype"], config["text_config"]["dtype"]] == [
        "float32"
    ] * 3


def test_settings_of_another_version_are_a_user_error(dual, tmp_path):
    save.save_dual_encoder(tmp_path / "new", dual[2], dual[0], dual[1])
    file = tmp_path / "new/config.json"
    config = json.loads(file.read_text())
    config["lit_jax"]["audio_pooling"] = "cls"
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lit_jax.*audio_pooling"):
        load.load_dual_encoder(tmp_path / "new", dtype="float32")


def test_a_model_that_torch_trained_on_is_read_as_it_is_now(make_dual, tmp_path):
    module, params, hf_config = make_dual(("cls", "linear"), ("cls", "linear"), 6)
    save.save_dual_encoder(tmp_path / "new", hf_config, module, params)
    file = tmp_path / "new/model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["text_model.pooler.dense.bias"] = tensors["text_model.pooler.dense.bias"] + 1
    safetensors.numpy.save_file(tensors, file)
    module, params, _, report = load.load_dual_encoder(tmp_path / "new", dtype="float32")
    assert module.vision_model.pooling == module.text_model.pooling == "pooler"
    np.testing.assert_array_equal(params["text_model"]["pooler"]["dense"]["bias"], np.ones(8))
    assert "trained on after its export" in str(report)


@pytest.mark.parametrize("image", [("mean", "linear"), ("pooler", "linear_bias")])
def test_what_cannot_be_expressed_is_for_lit_jax_alone(make_dual, tmp_path, caplog, image):
    module, params, hf_config = make_dual(image, ("mean", "none"), 8, logit_bias=-3.0)
    save.save_dual_encoder(tmp_path / "new", hf_config, module, params)
    assert f"{tmp_path}" in caplog.text
    assert "config.model.image" in caplog.text
    with pytest.raises(ValueError, match="lit_jax"):
        transformers.AutoConfig.from_pretrained(tmp_path / "new")
    again, again_params, again_config, _ = load.load_dual_encoder(tmp_path / "new", dtype="float32")
    assert_same_tree(again_params, params)
    assert again.clone(logit_bias_init=None) == module.clone(logit_bias_init=None)
    save.save_dual_encoder(tmp_path / "new", again_config, again, again_params)
    assert_same_tree(load.load_dual_encoder(tmp_path / "new", dtype="float32")[1], params)


class Processor:
    """Stands for transformers' processors, which write some files."""

    def __init__(self, fail=False):
        self.fail = fail

    def save_pretrained(self, folder):
        if self.fail:
            raise OSError("no space left on device")
        (save.pathlib.Path(folder) / "processor_config.json").write_text("{}")


def test_files_of_a_dual_encoder_with_processor(dual, tmp_path):
    save.save_dual_encoder(tmp_path / "a/b/new", dual[2], dual[0], dual[1], Processor())
    files = {file.name for file in (tmp_path / "a/b/new").iterdir()}
    assert files == {
        "config.json",
        "model.safetensors",
        "flax_model.msgpack",
        "processor_config.json",
    }
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["new"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a/b/new").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_former_export_is_replaced(dual, tmp_path):
    module, params, hf_config = dual
    for scale in (1, 2):
        params["logit_scale"] = np.float32(scale)
        save.save_dual_encoder(tmp_path / "new", hf_config, module, params)
    assert load.load_dual_encoder(tmp_path / "new", dtype="float32")[1]["logit_scale"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_an_empty_folder_is_used(dual, tmp_path):
    (tmp_path / "new").mkdir()
    save.save_dual_encoder(tmp_path / "new", dual[2], dual[0], dual[1])
    assert (tmp_path / "new/config.json").exists()


def assert_refused(dual, folder, match, processor=None):
    with pytest.raises(UserError, match=match) as error:
        save.save_dual_encoder(folder, dual[2], dual[0], dual[1], processor)
    assert len(str(error.value).splitlines()) == 1


def test_a_folder_with_other_files_is_left_alone(dual, tmp_path):
    save.save_dual_encoder(tmp_path / "new", dual[2], dual[0], dual[1])
    (tmp_path / "new/README.md").write_text("mine")
    assert_refused(dual, tmp_path / "new", rf"{tmp_path / 'new'} \w+ README\.md")
    assert (tmp_path / "new/README.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_model_of_another_maker_is_left_alone(dual, golden, copied):
    folder = copied("vit_torch")
    assert_refused(dual, folder, rf"{folder} \w+ a model")
    for file in folder.iterdir():
        assert file.read_bytes() == (golden / "vit_torch" / file.name).read_bytes()


def test_a_file_in_the_place_is_a_user_error(dual, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_refused(dual, tmp_path / "file", str(tmp_path / "file"))
    assert_refused(dual, tmp_path / "file/new", str(tmp_path / "file"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("limit", [100, 10_000])
def test_a_full_disk_is_a_user_error_and_leaves_nothing(dual, tmp_path, limit):
    """At config.json, and at the weights: files of this process may grow to `limit` bytes only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert_refused(dual, tmp_path / "new", rf"{tmp_path / 'new'} .*\(")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_processor_that_fails_leaves_the_former_export(dual, tmp_path):
    save.save_dual_encoder(tmp_path / "new", dual[2], dual[0], dual[1])
    before = (tmp_path / "new/model.safetensors").stat().st_mtime_ns
    assert_refused(dual, tmp_path / "new", "no space left", Processor(fail=True))
    assert (tmp_path / "new/model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 4,
    "vocab_size": 20,
    "max_position_embeddings": 9,
}
# By their name in goldens/files/names.json: model_type of the whole and of its towers, and more fields.
DUAL_ENCODERS = {
    "vision-text-dual-encoder (vit, bert)": ("vision-text-dual-encoder", "vit", "bert", {}),
    "vision-text-dual-encoder (clip, roberta)": (
        *("vision-text-dual-encoder", "clip_vision_model", "roberta"),
        {},
    ),
    "clip": ("clip", "clip_vision_model", "clip_text_model", {}),
    "siglip": ("siglip", "siglip_vision_model", "siglip_text_model", {}),
    "altclip": ("altclip", "altclip_vision_model", "altclip_text_model", {"project_dim": 6}),
    "chinese_clip": (
        *("chinese_clip", "chinese_clip_vision_model", "chinese_clip_text_model"),
        {},
    ),
}


@pytest.mark.parametrize("name", DUAL_ENCODERS)
def test_a_dual_encoder_has_the_names_of_transformers_4(golden, tmp_path, name):
    """Those of the last version with Flax; see goldens/make_files.py. Version 5 reads them, too."""
    whole, vision, text, more = DUAL_ENCODERS[name]
    hf_config = hub.complete(
        {
            "model_type": whole,
            "vision_config": {"model_type": vision, **SMALL},
            "text_config": {"model_type": text, **SMALL, **more},
            "projection_dim": 8,
        }
    )
    module = build_system(hf_config, dtype="float32")
    shapes = load.parameter_shapes(module, module.example_batch)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    save.save_dual_encoder(tmp_path / "new", hf_config, module, params)
    leaves = json.loads((golden / "names.json").read_text())[name]
    tensors = files.read_tensors(tmp_path / "new").values
    assert {re.sub(r"\.\d+\.", ".*.", key) for key in tensors} == leaves.keys()
    in_flax = {f"{key.rpartition('.')[0]}.{leaf}".lstrip(".") for key, leaf in leaves.items()}
    if None in leaves.values():
        assert not (tmp_path / "new" / "flax_model.msgpack").exists()
        return
    (tmp_path / "new" / "model.safetensors").unlink()
    tensors = files.read_tensors(tmp_path / "new").values
    assert {re.sub(r"\.\d+\.", ".*.", key) for key in tensors} == in_flax
