"""Files of EfficientNet, ALIGN's image tower and ConvNeXt: heads, and both ways to transformers."""

import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from lit_jax.errors import UserError
from lit_jax.trees import flatten
from lit_jax.weights import files, hub, load, save

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens/towers"
EFFICIENTNET = {
    "width_coefficient": 0.1,
    "depth_coefficient": 1.0,
    "depth_divisor": 4,
    "kernel_sizes": [3, 5],
    "in_channels": [32, 40],
    "out_channels": [40, 80],
    "strides": [1, 2],
    "num_block_repeats": [1, 3],
    "expand_ratios": [1, 2],
    "initializer_range": 0.3,
}
CONVNEXT = {
    "hidden_sizes": [4, 6],
    "depths": [1, 2],
    "num_stages": 2,
    "patch_size": 2,
    "initializer_range": 0.3,
}
BASE_MODELS = {
    "EfficientNetModel": EFFICIENTNET | {"hidden_dim": 128},
    "AlignVisionModel": EFFICIENTNET,
    "ConvNextModel": CONVNEXT | {"layer_scale_init_value": 0.5},
    "ConvNextV2Model": CONVNEXT,
}
HEAD_MODELS = {
    "EfficientNetForImageClassification": (EFFICIENTNET | {"hidden_dim": 128}, "pooler"),
    "ConvNextForImageClassification": (CONVNEXT, "pooler"),
    "ConvNextV2ForImageClassification": (CONVNEXT, "mean"),
    "ConvNextBackbone": (CONVNEXT, "mean"),
}


def test_running_statistics_are_read_and_their_counters_are_not(tower):
    folder = GOLDENS / "align_vision"
    tensors = files.read_tensors(folder).values
    params, report = load.load_tower(folder, tower(folder))
    norm = params["encoder"]["layer_from_2"]["expansion"]["batchnorm"]
    for leaf in ("mean", "var"):
        for i in range(2):
            expected = tensors[f"encoder.blocks.{2 + i}.expansion.expand_bn.running_{leaf}"]
            np.testing.assert_array_equal(norm[leaf][i], expected)
    assert len(report.ignored) == sum(name.endswith("/var") for name in names_of_layers(params))
    assert all(name.endswith("num_batches_tracked") for name in report.ignored)


def names_of_layers(params):
    """The paths of all parameters, those of a stack once a layer."""
    for path, leaf in flatten(params).items():
        yield from [path] * (len(leaf) if "layer_from" in path else 1)


@pytest.mark.parametrize(
    "name", ["efficientnet", "align_vision", "convnext", "convnextv2", "dinov3_convnext"]
)
def test_what_is_written_is_what_was_read(tower, tmp_path, name):
    module = tower(GOLDENS / name, "pooler" if name != "convnextv2" else "mean")
    params, _ = load.load_tower(GOLDENS / name, module)
    save.save_tower(tmp_path / "new", hub.read_config(GOLDENS / name), module, params)
    again, _ = load.load_tower(tmp_path / "new", module)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    theirs, ours = (
        files.read_tensors(folder).values for folder in (GOLDENS / name, tmp_path / "new")
    )
    pooler = set() if name != "convnextv2" else {"layernorm.weight", "layernorm.bias"}
    assert set(ours) == set(theirs) - pooler
    for key, array in ours.items():
        np.testing.assert_array_equal(array, theirs[key], err_msg=key)


def test_a_convnext_without_its_last_norm_is_refused_only_as_pooler(tower, tmp_path):
    tensors = dict(files.read_tensors(GOLDENS / "convnext").values)
    del tensors["layernorm.weight"], tensors["layernorm.bias"]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((GOLDENS / "convnext/config.json").read_bytes())
    with pytest.raises(UserError, match=r"'mean'\.$"):
        load.load_tower(tmp_path, tower(tmp_path))
    assert "layernorm" not in load.load_tower(tmp_path, tower(tmp_path, "mean"))[0]


@pytest.fixture(scope="module")
def tr():
    import transformers

    transformers.logging.disable_progress_bar()
    return transformers


def torch_model(tr, class_name, fields):
    """A model with random weights, and running statistics of some images."""
    import torch

    torch.manual_seed(0)
    model = getattr(tr, class_name)(getattr(tr, class_name).config_class(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.train()(pixel_values=torch.randn(4, 3, 16, 16))
    return model.eval()


def compare(model, module, params):
    import torch

    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    out = jax.jit(module.apply)({"params": params}, images)
    with torch.no_grad():
        expected = model(pixel_values=torch.tensor(images).permute(0, 3, 1, 2))
    hidden = expected.last_hidden_state.flatten(2).mT
    np.testing.assert_allclose(out.last_hidden_state, hidden, atol=1e-5)
    if module.pooling == "pooler":
        np.testing.assert_allclose(out.pooled, expected.pooler_output, atol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("class_name", BASE_MODELS)
def test_base_models_of_transformers_and_back(tr, tower, tmp_path, class_name, original):
    model = torch_model(tr, class_name, BASE_MODELS[class_name])
    model.save_pretrained(tmp_path / "old", save_original_format=original)
    module = tower(tmp_path / "old")
    params, _ = load.load_tower(tmp_path / "old", module)
    compare(model, module, params)

    save.save_tower(tmp_path / "new", hub.read_config(tmp_path / "old"), module, params)
    again, info = getattr(tr, class_name).from_pretrained(
        tmp_path / "new", output_loading_info=True
    )
    assert not any(info.values()), info
    compare(again.eval(), module, params)


@pytest.mark.oracle
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("class_name", HEAD_MODELS)
def test_head_models_of_transformers(tr, tower, tmp_path, class_name, original):
    fields, pooling = HEAD_MODELS[class_name]
    model = torch_model(tr, class_name, fields)
    model.save_pretrained(tmp_path, save_original_format=original)
    module = tower(tmp_path, pooling)
    params, report = load.load_tower(tmp_path, module)
    assert report.ignored
    if class_name != "ConvNextBackbone":  # which returns other maps
        compare(model.base_model, module, params)
