"""Files of BEiT, DINOv2 and DINOv3: names of several versions, heads, and both ways to transformers."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from lit_jax.errors import UserError
from lit_jax.weights import files, hub, load, save

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens/towers"
SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.3,
}
# transformers' class -> what its config has beside SMALL
BASE_MODELS = {
    "beit": ("BeitModel", {"use_relative_position_bias": True}),
    "beit_shared": (
        "BeitModel",
        {
            "use_shared_relative_position_bias": True,
            "use_absolute_position_embeddings": True,
            "use_mask_token": True,
            "use_mean_pooling": False,
        },
    ),
    "dinov2": ("Dinov2Model", {"use_mask_token": False}),
    "dinov2_swiglu": ("Dinov2Model", {"use_swiglu_ffn": True}),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", {"num_register_tokens": 3}),
    "dinov3": ("DINOv3ViTModel", {"num_register_tokens": 4}),
    "dinov3_without_registers": ("DINOv3ViTModel", {"num_register_tokens": 0}),
    "dinov3_gated": (
        "DINOv3ViTModel",
        {"num_register_tokens": 1, "use_gated_mlp": True, "mlp_bias": False},
    ),
}
HEAD_MODELS = {
    "BeitForImageClassification": ({"use_relative_position_bias": True}, "pooler"),
    "BeitForMaskedImageModeling": ({"use_mask_token": True, "use_mean_pooling": False}, "cls"),
    "BeitForSemanticSegmentation": (
        {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3], "patch_size": 2},
        "mean",
    ),
    "Dinov2ForImageClassification": ({}, "pooler"),
    "Dinov2WithRegistersForImageClassification": ({}, "mean"),
}


def save_renamed(folder, golden, *renames, **more):
    """A copy of a golden tower whose tensors have other names, and some more."""
    tensors = files.read_tensors(GOLDENS / golden).values
    for pattern, replacement in renames:
        tensors = {re.sub(pattern, replacement, name): array for name, array in tensors.items()}
    safetensors.numpy.save_file(dict(tensors) | more, folder / "model.safetensors")
    (folder / "config.json").write_bytes((GOLDENS / golden / "config.json").read_bytes())
    return folder


def load_params(folder, tower, pooling="pooler"):
    return load.load_tower(folder, tower(folder, pooling))


def assert_same_tree(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


BEIT_NAMES_OF_TRANSFORMERS_5 = (
    (r"^encoder\.layer\.(\d+)\.attention\.attention\.relative", r"layers.\1.relative"),
    (r"^encoder\.relative_position_bias\.", "shared_position_bias."),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(q|k|v)\w+\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
DINOV2_NAMES_OF_TRANSFORMERS_5 = (
    (r"\.attention\.attention\.(q|k|v)\w+\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)


@pytest.mark.parametrize(
    ("golden", "renames", "name"),
    [
        ("beit_interpolated", BEIT_NAMES_OF_TRANSFORMERS_5, "layers.1.lambda_1"),
        ("dinov2", DINOV2_NAMES_OF_TRANSFORMERS_5, "encoder.layer.1.attention.k_proj.bias"),
        ("dinov3", ((r"^layer\.", "model.layer."),), "model.layer.1.mlp.up_proj.bias"),
    ],
)
def test_names_of_transformers_5(tower, tmp_path, golden, renames, name):
    folder = save_renamed(tmp_path, golden, *renames)
    assert name in files.read_tensors(folder).values
    assert_same_tree(
        load_params(folder, tower, "cls")[0], load_params(GOLDENS / golden, tower, "cls")[0]
    )


def test_the_norm_of_a_head_of_beit_is_not_that_of_the_tower(tower, tmp_path):
    head = {"layernorm.weight": np.zeros(8), "layernorm.bias": np.ones(8)}
    folder = save_renamed(tmp_path, "beit_unusual", ("^", "beit."), **head)
    params, report = load_params(folder, tower)
    assert_same_tree(params, load_params(GOLDENS / "beit_unusual", tower)[0])
    assert report.ignored == ("layernorm.bias", "layernorm.weight")


def test_buffers_of_old_beits_are_ignored(tower, tmp_path):
    name = "encoder.layer.0.attention.attention.relative_position_bias.relative_position_index"
    folder = save_renamed(tmp_path, "beit", **{name: np.zeros((10, 10), np.int64)})
    params, report = load_params(folder, tower)
    assert_same_tree(params, load_params(GOLDENS / "beit", tower)[0])
    assert report.ignored == (name,)


def test_a_beit_without_pooler_weights_is_refused_only_as_pooler(tower, tmp_path):
    folder = save_renamed(tmp_path, "beit", (r"^pooler\.layernorm\.\w+$", "lm_head.weight"))
    with pytest.raises(UserError, match=r"'cls' .*'mean'"):
        load_params(folder, tower)
    assert "pooler" not in load_params(folder, tower, "mean")[0]


def test_the_halves_of_swiglu(tower):
    params, _ = load_params(GOLDENS / "dinov2_swiglu", tower)
    tensors = files.read_tensors(GOLDENS / "dinov2_swiglu").values
    mlp = params["encoder"]["layer_1"]["mlp"]
    weight_2FxD = tensors["encoder.layer.1.mlp.weights_in.weight"]
    np.testing.assert_array_equal(mlp["gate"]["kernel"].T, weight_2FxD[:16])
    np.testing.assert_array_equal(mlp["up"]["kernel"].T, weight_2FxD[16:])


@pytest.mark.parametrize("golden", ["dinov3_unusual", "dinov2_with_registers"])
def test_a_dino_may_have_a_tensor_of_no_registers(tower, tmp_path, golden):
    folder = save_renamed(tmp_path, golden, **{"embeddings.register_tokens": np.zeros((1, 0, 8))})
    config = hub.read_config(folder) | {"num_register_tokens": 0}
    (folder / "config.json").write_text(json.dumps(config))
    params, report = load_params(folder, tower)
    assert "register_tokens" not in params["embeddings"]
    assert not report.ignored
    # transformers misses it in a file without.
    save.save_tower(tmp_path / "new", config, tower(folder), params)
    written = safetensors.numpy.load_file(tmp_path / "new/model.safetensors")
    assert written["embeddings.register_tokens"].shape == (1, 0, 8)


@pytest.fixture(scope="module")
def tr():
    import transformers

    transformers.logging.disable_progress_bar()
    return transformers


def torch_model(tr, class_name, **fields):
    import torch

    config_class = getattr(tr, class_name).config_class
    intermediate = {"intermediate_size": 12} if hasattr(config_class, "intermediate_size") else {}
    torch.manual_seed(0)
    model = getattr(tr, class_name)(config_class(**SMALL | intermediate | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # many of those of BEiT are 0 at first
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def compare(model, module, params):
    import torch

    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    out = jax.jit(module.apply)({"params": params}, images)
    with torch.no_grad():
        expected = model(pixel_values=torch.tensor(images).permute(0, 3, 1, 2))
    np.testing.assert_allclose(out.last_hidden_state, expected.last_hidden_state, atol=1e-5)
    if module.pooling == "pooler":
        np.testing.assert_allclose(out.pooled, expected.pooler_output, atol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("name", BASE_MODELS)
def test_base_models_of_transformers(tr, tower, tmp_path, name, original):
    class_name, fields = BASE_MODELS[name]
    model = torch_model(tr, class_name, **fields)
    model.save_pretrained(tmp_path, save_original_format=original)
    params, report = load_params(tmp_path, tower)
    assert not report.ignored
    compare(model, tower(tmp_path), params)


@pytest.mark.oracle
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("class_name", HEAD_MODELS)
def test_head_models_of_transformers(tr, tower, tmp_path, class_name, original):
    fields, pooling = HEAD_MODELS[class_name]
    model = torch_model(tr, class_name, **fields)
    model.save_pretrained(tmp_path, save_original_format=original)
    params, report = load_params(tmp_path, tower, pooling)
    assert report.ignored
    compare(model.base_model, tower(tmp_path, pooling), params)


@pytest.mark.oracle
@pytest.mark.parametrize("name", BASE_MODELS)
def test_transformers_loads_an_exported_tower(tr, tower, tmp_path, name):
    class_name, fields = BASE_MODELS[name]
    torch_model(tr, class_name, **fields).save_pretrained(tmp_path / "old")
    module = tower(tmp_path / "old")
    params, _ = load.load_tower(tmp_path / "old", module)
    save.save_tower(tmp_path / "new", hub.read_config(tmp_path / "old"), module, params)
    model, info = tr.AutoModel.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values()), info
    compare(model.eval(), module, params)
