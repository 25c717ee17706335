"""Every config of configs/: its demo trains, stops, goes on, is measured, and PyTorch computes its export."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from lit_jax import evaluate, export
from lit_jax.config import parse
from lit_jax.data.image import decode
from lit_jax.data.image_processor import load_image_transform
from lit_jax.data.text import load_tokenizer, tokenize
from lit_jax.errors import Preempted, UserError
from lit_jax.training import trainer
from lit_jax.training.metrics import read_metrics
from lit_jax.training.workdir import load_run
from lit_jax.trees import flatten
from lit_jax.weights.load import load_dual_encoder
from tests.digits import open_digits
from tests.training.conftest import stop_after

ROOT = Path(__file__).parents[2]
# config -> (argument, model_type of the export)
RECIPES = {
    "vit_bert": ("", "vision-text-dual-encoder"),
    "siglit": ("", "vision-text-dual-encoder"),
    "beit_roberta": ("", "vision-text-dual-encoder"),
    "clip_xlmr": ("", "vision-text-dual-encoder"),
    "align": ("", "align"),
    "altclip": ("", "altclip"),
    "altclip_stage2": ("demo_contrastive", "altclip"),
}
TEXTS = ["a photo of the number forty two", "thirty", "the handwritten number ninety nine"]


def config_of(name, **changes):
    """The demo of a recipe, but for its length."""
    module, _, _ = name.partition("_stage2")
    raw = importlib.import_module(f"configs.{module}").get_config(RECIPES[name][0])
    small = {
        "batch_size": 16,
        "duration": "4 steps",
        "schedule.warmup": "1 step",
        "checkpoint.every": "2 steps",
        "log.every": "1 step",
        "log.tensorboard": False,
        "report": "none",
    }
    raw.update_from_flattened_dict(small | changes)
    return parse(raw)


def train_and_export(name, folder, monkeypatch, **changes):
    """Stops after step 3 and goes on; returns the export."""
    config = config_of(name, **changes)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Preempted, match="after step 3 of 4"):
            trainer.train(config, folder / "run")
    trainer.train(config, folder / "run")
    exported = folder / "exported"
    assert export.main([f"--workdir={folder / 'run'}", f"--output={exported}"]) == 0
    return exported


@pytest.mark.oracle
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_from_training_to_pytorch(name, tmp_path, monkeypatch, one_device):
    changes = {}
    if name == "altclip_stage2":
        stage1 = train_and_export("altclip", tmp_path / "stage1", monkeypatch)
        changes = {"model.dual_encoder": str(stage1)}
    folder = train_and_export(name, tmp_path, monkeypatch, **changes)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert len(losses) == 4
    assert np.isfinite(losses).all()

    assert evaluate.main([f"--workdir={tmp_path / 'run'}"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["zero_shot/unseen16/n"] == 800

    module, params, hf_config, _ = load_dual_encoder(folder, dtype="float32")
    assert hf_config["model_type"] == RECIPES[name][1]
    ours, theirs = flatten(params), flatten(load_run(tmp_path / "run", dtype="float32").params)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)
    np.testing.assert_allclose(logits(module, params, folder), pytorch_logits(folder), atol=1e-4)


def logits(module, params, folder):
    source, transform = open_digits("unseen"), load_image_transform(folder)
    tokens = tokenize(load_tokenizer(folder, max_length=24), TEXTS)
    pixels = transform.normalization(
        np.stack([transform.eval(source[i]["image"]) for i in range(3)])
    )
    output = jax.jit(module.apply)({"params": params}, {"pixel_values": pixels, **tokens})
    values = np.exp(output.logit_scale) * output.image_embeds @ output.text_embeds.T
    return values if output.logit_bias is None else values + output.logit_bias


def pytorch_logits(folder):
    import torch
    import transformers

    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    processor_class = export.PROCESSORS.get(
        config["model_type"], transformers.VisionTextDualEncoderProcessor
    )
    processor = processor_class.from_pretrained(folder)
    images = [decode(open_digits("unseen")[i]["image"]) for i in range(3)]
    inputs = processor(
        text=TEXTS, images=images, return_tensors="pt", padding="max_length", max_length=24
    )
    with torch.no_grad():
        values = model.eval()(**inputs).logits_per_image.numpy()
    return values + config.get("logit_bias", 0.0)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_tested_and_says_how_it_differs(path):
    if path.stem == "__init__":
        return
    assert path.stem in RECIPES
    if path.stem != "vit_bert":
        text = importlib.import_module(f"configs.{path.stem}").__doc__
        assert "Differs from vit_bert.py" in " ".join(text.split())


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("siglit", "base"),
        ("siglit", "large"),
        ("beit_roberta", "base"),
        ("clip_xlmr", "base"),
        ("align", "base"),
        ("altclip", "teacher"),
        ("altclip", "contrastive"),
    ],
)
def test_real_variants_are_whole_configs(name, variant):
    module = importlib.import_module(f"configs.{name}")
    config = parse(module.get_config(f"{variant},data=/some/where,batch=512"))
    assert (config.data.train.path, config.batch_size) == ("/some/where", 512)
    with pytest.raises(UserError, match="known are"):
        module.get_config("nothing")
