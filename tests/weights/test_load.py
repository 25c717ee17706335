"""Read towers from every format and under every name that transformers has written."""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lit_jax.errors import UserError
from lit_jax.models.dual_encoder import build_system
from lit_jax.models.families import build_tower
from lit_jax.weights import files, hub, load, save
from tests.weights.conftest import in_one_stack

VIT_FOLDERS = [
    "vit_torch_sharded",
    "vit_bin",
    "vit_bin_sharded",
    "vit_flax_sharded",
    "vit_flax_safetensors",
]


BERT_FOLDERS = ["bert_head_torch", "bert_head_flax"]


# What transformers 5 calls them with save_original_format=False.
NEW_NAMES = {
    "encoder.layer.": "layers.",
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
}


def renamed(names: dict[str, str], under: str = ""):
    def new_name(name: str) -> str:
        for old, new in names.items() if name.startswith(under) else ():
            name = name.replace(old, new)
        return name

    return lambda tensors: {new_name(name): array for name, array in tensors.items()}


def without(pattern: str):
    return lambda tensors: {n: a for n, a in tensors.items() if not re.search(pattern, n)}


def assert_same_tree(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture(scope="module")
def vit(golden, tower):
    return load.load_tower(golden / "vit_torch", tower(golden / "vit_torch"))[0]


@pytest.fixture(scope="module")
def bert(golden, tower):
    return load.load_tower(golden / "bert_torch", tower(golden / "bert_torch"))[0]


def test_vit_computes_what_torch_computes(golden, tower, vit, outputs):
    module = tower(golden / "vit_torch")
    pooled = module.apply({"params": vit}, outputs["pixel_values"]).pooled
    np.testing.assert_allclose(pooled, outputs["vit"], atol=1e-5)


def test_bert_computes_what_torch_computes(golden, tower, bert, outputs):
    inputs = [outputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")]
    pooled = tower(golden / "bert_torch").apply({"params": bert}, *inputs).pooled
    np.testing.assert_allclose(pooled, outputs["bert"], atol=1e-5)


@pytest.mark.parametrize("name", ["dual_torch", "dual_flax"])
def test_dual_encoder_computes_what_torch_computes(golden, outputs, name):
    module, params, hf_config, report = load.load_dual_encoder(golden / name, dtype="float32")
    out = module.apply({"params": params}, outputs)
    logits = np.exp(out.logit_scale) * out.image_embeds @ out.text_embeds.T
    np.testing.assert_allclose(logits, outputs["dual"], atol=1e-4)
    assert hf_config["projection_dim"] == 6
    assert report.tensors == 82
    assert not report.ignored


def test_layers_are_stacked_and_kernels_transposed(golden, vit):
    tensors = safetensors.numpy.load_file(golden / "vit_torch/model.safetensors")
    encoder = vit["encoder"]
    kernel_1xFxD, last_FxD = (
        encoder[name]["mlp"]["fc2"]["kernel"] for name in ("layer", "layer_1")
    )
    assert kernel_1xFxD.shape == (1, 12, 8)
    np.testing.assert_array_equal(kernel_1xFxD[0], tensors["encoder.layer.0.output.dense.weight"].T)
    np.testing.assert_array_equal(last_FxD, tensors["encoder.layer.1.output.dense.weight"].T)
    patches = vit["embeddings"]["patch_embeddings"]["projection"]["kernel"]
    weight_OxIxHxW = tensors["embeddings.patch_embeddings.projection.weight"]
    np.testing.assert_array_equal(patches, weight_OxIxHxW.transpose(2, 3, 1, 0))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(vit))


@pytest.mark.parametrize("name", VIT_FOLDERS)
def test_every_format_of_vit_is_the_same_tree(golden, tower, vit, name):
    params, report = load.load_tower(golden / name, tower(golden / name))
    assert_same_tree(params, vit)
    assert report.tensors == 40
    assert report.layout == ("flax" if "flax" in name else "torch")


@pytest.mark.parametrize("name", BERT_FOLDERS)
def test_every_format_of_bert_is_the_same_tree(golden, tower, bert, name):
    params, report = load.load_tower(golden / name, tower(golden / name))
    assert_same_tree(params, bert)
    assert report.ignored
    assert all(ignored.startswith("cls.") for ignored in report.ignored)


def test_names_of_transformers_5(changed, tower, vit):
    folder = changed("vit_torch", renamed(NEW_NAMES))
    assert "layers.0.mlp.fc2.weight" in safetensors.numpy.load_file(folder / "model.safetensors")
    assert_same_tree(load.load_tower(folder, tower(folder))[0], vit)


def test_names_of_2018(changed, tower, bert):
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    folder = changed("bert_torch", renamed(names))
    assert_same_tree(load.load_tower(folder, tower(folder))[0], bert)


def test_buffers_are_ignored(changed, tower, bert):
    buffer = {"embeddings.position_ids": np.arange(16)[None]}
    folder = changed("bert_torch", lambda tensors: tensors | buffer)
    params, report = load.load_tower(folder, tower(folder))
    assert_same_tree(params, bert)
    assert report.ignored == ("embeddings.position_ids",)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_head_model_without_pooler(changed, tower, vit, pooling):
    def with_head(tensors):
        tower = {f"vit.{n}": a for n, a in tensors.items() if not n.startswith("pooler.")}
        return tower | {"classifier.weight": np.zeros((2, 8)), "classifier.bias": np.zeros(2)}

    folder = changed("vit_torch", with_head)
    params, report = load.load_tower(folder, tower(folder, pooling))
    expected = {name: part for name, part in vit.items() if name != "pooler"}
    assert_same_tree(params, in_one_stack(expected) if pooling == "mean" else expected)
    assert report.ignored == ("classifier.bias", "classifier.weight")

    with pytest.raises(UserError, match=r"\(config\.model\.image\.pooling\) .*'cls'"):
        load.load_tower(folder, tower(folder, "pooler"))


def test_pooler_that_is_not_wanted_is_named_in_the_report(golden, tower):
    folder = golden / "bert_head_torch"
    params, report = load.load_tower(folder, tower(folder, "mean"))
    assert "pooler" not in params
    assert "bert.pooler.dense.weight" in report.ignored
    line = str(report)
    assert line.startswith(f"37 float32 tensors with torch names from {folder}/model.safetensors; ")
    assert "bert.pooler.dense.bias" in line


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_float_dtypes_become_float32(changed, tower, vit, dtype):
    folder = changed("vit_torch", lambda tensors: {n: a.astype(dtype) for n, a in tensors.items()})
    params, report = load.load_tower(folder, tower(folder))
    assert_same_tree(params, jax.tree.map(lambda a: a.astype(dtype).astype(np.float32), vit))
    assert report.dtypes == (np.dtype(dtype).name,)


@pytest.mark.parametrize(("side", "part"), [("image", "vision_model"), ("text", "text_model")])
@pytest.mark.parametrize("name", ["dual_torch", "dual_flax"])
def test_a_tower_of_a_dual_encoder_is_a_tower(golden, name, side, part):
    hf = hub.read_tower_config(golden / name, side)
    module = build_tower(hf, pooling="cls", dtype="float32")
    params, report = load.load_tower(golden / name, module)
    whole = load.load_dual_encoder(golden / name, dtype="float32")[1]
    expected = {name: tree for name, tree in whole[part].items() if name != "pooler"}
    assert_same_tree(params, expected)
    assert "logit_scale" in report.ignored


def test_dual_encoder_accounts_for_both_sides(changed):
    names = {"text_projection": "text_head", "vision_model.layernorm": "vision_model.norm"}
    folder = changed("dual_torch", renamed(names))
    with pytest.raises(UserError) as error:
        load.load_dual_encoder(folder, dtype="float32")
    for name in (
        "text_projection.weight",
        "text_head.weight",
        "vision_model.layernorm.bias",
        "vision_model.norm.bias",
    ):
        assert name in str(error.value)


def test_dual_encoder_with_names_of_transformers_5(changed, golden):
    folder = changed("dual_torch", renamed(NEW_NAMES, under="vision_model."))
    content = safetensors.numpy.load_file(folder / "model.safetensors")
    assert "vision_model.layers.1.mlp.fc1.bias" in content
    assert "text_model.encoder.layer.1.output.dense.bias" in content
    params = load.load_dual_encoder(folder, dtype="float32")[1]
    assert_same_tree(params, load.load_dual_encoder(golden / "dual_torch", dtype="float32")[1])


def test_the_computation_has_the_dtype_that_was_asked_for(golden):
    module, params, _, _ = load.load_dual_encoder(golden / "dual_torch", dtype="bfloat16")
    assert module.vision_model.dtype == module.text_model.dtype == "bfloat16"
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("kind", ["eva02", "swin"])
@pytest.mark.parametrize("part", ["", "vision_config", "text_config"])
def test_a_kind_of_model_that_is_none_of_ours_is_named_with_those_that_are(golden, kind, part):
    """Also one that transformers does not have."""
    content = json.loads((golden / "dual_torch/config.json").read_text())
    described = content[part] if part else content
    described["model_type"] = kind
    with pytest.raises(UserError, match=rf"model_type '{kind}'.* towers .*vit, .* towers bert"):
        hub.complete(content)


def test_the_towers_of_a_dual_encoder_are_each_on_their_side(golden):
    content = json.loads((golden / "dual_torch/config.json").read_text())
    content["vision_config"], content["text_config"] = (
        content["text_config"],
        content["vision_config"],
    )
    with pytest.raises(UserError, match=r"vision_config .*model_type 'bert'"):
        load.dual_encoder_module(hub.complete(content), dtype="float32")


@pytest.mark.parametrize("part", ["text", "vision"])
def test_a_tower_without_pooler_in_a_dual_encoder_is_told_which_pooling_to_set(changed, part):
    folder = changed("dual_torch", without(rf"^{part}_model\.pooler\."))
    side = {"text": "text", "vision": "image"}[part]
    module = build_tower(hub.read_tower_config(folder, side), pooling="pooler", dtype="float32")
    with pytest.raises(UserError, match=rf"config\.model\.{side}\.pooling\) .*'cls'"):
        load.load_tower(folder, module)


def test_the_text_tower_of_chinese_clip_has_no_pooler_and_says_so(tmp_path):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    vision = {**small, "image_size": 8, "patch_size": 4}
    hf = {"model_type": "chinese_clip", "text_config": small, "vision_config": vision}
    hf = hub.complete(hf | {"projection_dim": 8})
    module = build_system(hf, dtype="float32")
    shapes = load.parameter_shapes(module, module.example_batch)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    save.save_dual_encoder(tmp_path / "new", hf, module, params)
    text = build_tower(hf["text_config"], pooling="pooler", dtype="float32")
    with pytest.raises(UserError, match=r"config\.model\.text\.pooling\) .*'cls' .*'mean'"):
        load.load_tower(tmp_path / "new", text)
    load.load_tower(tmp_path / "new", text.clone(pooling="cls"))


def test_only_a_pooler_that_is_not_there_is_left_out(changed, tower):
    """A pooler that cannot be used is an error also where this pooling does not need it."""

    def with_odd_pooler(tensors):
        return tensors | {"pooler.dense.bias": np.zeros(3, np.float32)}

    folder = changed("bert_torch", with_odd_pooler)
    with pytest.raises(UserError, match=r"pooler\.dense\.bias .*float32\[3\]"):
        load.load_tower_and_pooler(folder, tower(folder, "mean"))


def test_weights_are_read_once(golden, tower, monkeypatch):
    read, calls = files.read_tensors, []
    monkeypatch.setattr(files, "read_tensors", lambda *a: calls.append(a) or read(*a))
    load.load_tower_and_pooler(golden / "bert_torch", tower(golden / "bert_torch", "mean"))
    assert len(calls) == 1


class OfAList(nn.Module):
    """As a user may write a tower: a field that has no hash."""

    widths: list[int]

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.Dense(width)(x)
        return x


def test_a_module_that_cannot_be_hashed_has_shapes():
    shapes = load.parameter_shapes(OfAList([3, 2]), jnp.zeros((1, 4)))
    assert shapes["Dense_1"]["kernel"].shape == (3, 2)


def test_a_mistake_in_a_towers_code_is_not_blamed_on_its_config():
    class Mistaken(nn.Module):
        @nn.compact
        def __call__(self, x):
            return missing(x)  # noqa: F821  # pyright: ignore[reportUndefinedVariable]

    with pytest.raises(NameError, match="missing"):
        load.parameter_shapes(Mistaken(), jnp.zeros((1, 2)))
