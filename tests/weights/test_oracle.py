"""Against the installed transformers with PyTorch: what it saves we read, what we save it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.config import ModelConfig, TowerConfig
from lit_jax.models.dual_encoder import build_dual_encoder
from lit_jax.weights import hub, load, save

pytestmark = pytest.mark.oracle

SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def tr():
    import transformers

    transformers.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def torch():
    import torch

    return torch


@pytest.fixture(scope="module")
def configs(tr):
    return {
        "vit": tr.ViTConfig(image_size=8, patch_size=4, **SIZES),
        "bert": tr.BertConfig(vocab_size=20, max_position_embeddings=16, **SIZES),
    }


@pytest.fixture(scope="module")
def batch(outputs):
    names = ("pixel_values", "input_ids", "attention_mask", "token_type_ids")
    return {name: outputs[name] for name in names}


def of_torch(torch, batch):
    """The batch as torch wants it."""
    tensors = {name: torch.tensor(np.asarray(array)) for name, array in batch.items()}
    tensors["pixel_values"] = tensors["pixel_values"].permute(0, 3, 1, 2)
    return tensors


def logits(module, params, batch):
    out = module.apply({"params": params}, batch)
    return np.exp(out.logit_scale) * out.image_embeds @ out.text_embeds.T


def assert_loaded_exactly(info):
    assert not any(info.values()), info


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize(
    "head", ["ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"]
)
def test_vit_of_transformers(tr, torch, configs, tower, batch, tmp_path, head, original):
    model = getattr(tr, head)(configs["vit"]).eval()
    model.save_pretrained(tmp_path, save_original_format=original)
    pooling = "pooler" if head == "ViTModel" else "cls"
    module = tower(tmp_path, pooling)
    params, _ = load.load_tower(tmp_path, module)
    out = module.apply({"params": params}, batch["pixel_values"])
    with torch.no_grad():
        pixel_values = of_torch(torch, batch)["pixel_values"]
        expected = getattr(model, "vit", model)(pixel_values=pixel_values)
    np.testing.assert_allclose(out.last_hidden_state, expected.last_hidden_state, atol=1e-5)
    if pooling == "pooler":
        np.testing.assert_allclose(out.pooled, expected.pooler_output, atol=1e-5)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("head", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_bert_of_transformers(tr, torch, configs, tower, batch, tmp_path, head, original):
    model = getattr(tr, head)(configs["bert"]).eval()
    model.save_pretrained(tmp_path, save_original_format=original)
    module = tower(tmp_path, "mean" if head == "BertForMaskedLM" else "pooler")
    params, _ = load.load_tower(tmp_path, module)
    names = ("input_ids", "attention_mask", "token_type_ids")
    out = module.apply({"params": params}, *(batch[name] for name in names))
    with torch.no_grad():
        inputs = of_torch(torch, batch)
        expected = getattr(model, "bert", model)(**{name: inputs[name] for name in names})
    np.testing.assert_allclose(out.last_hidden_state, expected.last_hidden_state, atol=1e-5)
    if head != "BertForMaskedLM":
        np.testing.assert_allclose(out.pooled, expected.pooler_output, atol=1e-5)


@pytest.mark.parametrize("original", [True, False])
def test_dual_encoder_of_transformers(tr, torch, configs, batch, tmp_path, original):
    model = tr.VisionTextDualEncoderModel(
        vision_model=tr.ViTModel(configs["vit"]), text_model=tr.BertModel(configs["bert"])
    ).eval()
    model.save_pretrained(tmp_path, save_original_format=original)
    module, params, _, _ = load.load_dual_encoder(tmp_path, dtype="float32")
    with torch.no_grad():
        expected = model(**of_torch(torch, batch)).logits_per_image
    np.testing.assert_allclose(logits(module, params, batch), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_torch_bin_of_today(tr, torch, configs, tower, tmp_path, name):
    model = {"vit": tr.ViTModel, "bert": tr.BertModel}[name](configs[name])
    model.save_pretrained(tmp_path)
    expected, _ = load.load_tower(tmp_path, tower(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    params, report = load.load_tower(tmp_path, tower(tmp_path))
    assert report.file.name == "pytorch_model.bin"
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def random_params(module, example):
    shapes = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize(
    ("image", "text", "projection_dim"),
    [
        (("pooler", "linear"), ("pooler", "linear"), 6),
        (("pooler", "none"), ("pooler", "none"), 8),
        (("cls", "linear"), ("cls", "linear"), 6),
        (("cls", "none"), ("cls", "none"), 8),
        (("cls", "linear_bias"), ("cls", "linear_bias"), 6),
        (("cls", "linear"), ("pooler", "linear"), 11),
    ],
)
def test_torch_loads_an_exported_dual_encoder(
    tr, torch, golden, batch, tmp_path, image, text, projection_dim
):
    vision_config = hub.read_config(golden / "vit_torch")
    text_config = hub.read_config(golden / "bert_torch")
    config = ModelConfig(
        image=TowerConfig(pooling=image[0], projection=image[1]),
        text=TowerConfig(pooling=text[0], projection=text[1]),
        projection_dim=projection_dim,
        logit_bias_init=-10.0,
    )
    module = build_dual_encoder(vision_config, text_config, config)
    params = random_params(module, batch)
    hf_config = {
        "model_type": "vision-text-dual-encoder",
        "vision_config": vision_config,
        "text_config": text_config,
    }
    save.save_dual_encoder(tmp_path / "new", hf_config, module, params)

    model, info = tr.VisionTextDualEncoderModel.from_pretrained(
        tmp_path / "new", output_loading_info=True
    )
    assert_loaded_exactly(info)
    with torch.no_grad():
        expected = model.eval()(**of_torch(torch, batch)).logits_per_image
    np.testing.assert_allclose(logits(module, params, batch), expected, atol=1e-4)


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
@pytest.mark.parametrize("name", ["vit_torch", "bert_torch"])
def test_torch_loads_an_exported_tower(tr, torch, golden, tower, batch, tmp_path, name, pooling):
    module = tower(golden / name, pooling)
    params = random_params(module, module.example_input)
    save.save_tower(tmp_path / "new", hub.read_config(golden / name), module, params)
    model, info = tr.AutoModel.from_pretrained(
        tmp_path / "new", output_loading_info=True, add_pooling_layer=pooling == "pooler"
    )
    assert_loaded_exactly(info)
    inputs = ["pixel_values"] if name == "vit_torch" else ["input_ids", "attention_mask"]
    out = module.apply({"params": params}, *(batch[name] for name in inputs))
    with torch.no_grad():
        expected = model.eval()(**{name: of_torch(torch, batch)[name] for name in inputs})
    np.testing.assert_allclose(out.last_hidden_state, expected.last_hidden_state, atol=1e-5)


def test_transformers_loads_the_exported_processor(tr, golden, tmp_path):
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat"])
    )
    processor = tr.VisionTextDualEncoderProcessor(
        tr.ViTImageProcessorPil(size={"height": 8, "width": 8}),
        tr.BertTokenizer(str(tmp_path / "vocab.txt")),
    )
    module, params, hf_config, _ = load.load_dual_encoder(golden / "dual_torch", dtype="float32")
    save.save_dual_encoder(tmp_path / "new", hf_config, module, params, processor)
    again = tr.VisionTextDualEncoderProcessor.from_pretrained(tmp_path / "new")
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    ours, theirs = (p(text=["cat"], images=image, return_tensors="np") for p in (processor, again))
    assert set(ours) == set(theirs)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])
    assert ours["input_ids"].tolist() == [[2, 5, 3]]
    assert jnp.shape(ours["pixel_values"]) == (1, 3, 8, 8)
