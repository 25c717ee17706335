"""Every text family with its own tokenizer: trained, exported, evaluated, and read by transformers."""

import json
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer

import lit_jax
from lit_jax import evaluate, export
from lit_jax.configs.vit_bert import DIGITS
from lit_jax.data.text import tokenize
from lit_jax.train import encoder_of
from lit_jax.training import trainer
from tests.tokenizer_files import FAMILIES, TEXTS, write_tokenizer
from tests.training.conftest import DEMO, WIDTHS

QUICK = "siglip"  # the others are long


@pytest.fixture
def train(tiny, tmp_path, one_device):
    """Trains a tower of a family from scratch for one step, and returns the run and its folder."""

    def run(family, **changes):
        folder = tmp_path / "text"
        _, config = write_tokenizer(family, folder)
        # One size of vocabulary, so that towers of one kind are compiled once.
        small = {**WIDTHS, "num_hidden_layers": 1, "max_position_embeddings": 40, "vocab_size": 640}
        if config["model_type"] == "distilbert":
            small = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
            small["vocab_size"] = 640
        (folder / "config.json").write_text(json.dumps(config | small))
        pooling = "cls" if config["model_type"] in ("distilbert", "modernbert") else "pooler"
        changes = {"model.text.model": str(folder), "model.text.pooling": pooling, **changes}
        short = {"duration": "1 step", "schedule.warmup": "0 steps", "batch_size": 8}
        config = tiny(**{"policy.lock": "Lu", **short, "data.max_text_length": None, **changes})
        return trainer.train(config, tmp_path / "run"), tmp_path / "run"

    return run


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name == QUICK else pytest.mark.long) for name in FAMILIES],
)
def test_a_family_is_trained_exported_and_evaluated(train, tmp_path, family):
    run, workdir = train(family)
    out = tmp_path / "out"
    assert export.main([f"--workdir={workdir}", f"--output={out}"]) == 0
    ours = tokenize(run.model.processors.tokenizer, TEXTS, length=32)
    for folder in (workdir / "model", out):
        theirs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding="max_length", truncation=True)
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_array_equal(array, np.array(theirs[name]))
    results = tmp_path / "results.json"
    data = [f"--data={DIGITS}", "--split=unseen", f"--classes={DEMO / 'unseen16.json'}"]
    assert evaluate.main([f"--model={out}", *data, f"--output={results}"]) == 0
    of_model = json.loads(results.read_text())
    if family == QUICK:
        assert evaluate.main([f"--workdir={workdir}", *data, f"--output={results}"]) == 0
    assert of_model == json.loads(results.read_text())


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_pytorch_embeds_the_same_texts_of_a_siglip_in_the_same_way(
    tiny, tmp_path, one_device, family
):
    """As long as its model was trained with, and in the letters."""
    import torch
    from transformers import SiglipConfig, SiglipModel

    folder, out = tmp_path / "siglip", tmp_path / "out"
    _, config = write_tokenizer(family, folder)
    small = {**WIDTHS, "num_hidden_layers": 1}
    text = {**small, "vocab_size": config["vocab_size"], "max_position_embeddings": 48}
    text |= {"bos_token_id": None, "eos_token_id": None}
    image = {**small, "image_size": 32, "patch_size": 16}
    model = lit_jax.DualEncoder.from_config(SiglipConfig(text_config=text, vision_config=image))
    (folder / "config.json").unlink()
    model.save_pretrained(folder)
    shutil.copy(DEMO / "vit" / "preprocessor_config.json", folder)
    own = {"model.image.model": "", "model.text.model": "", "model.projection_dim": 512}
    short = {"duration": "1 step", "schedule.warmup": "0 steps", "loss": "sigmoid"}
    config = tiny(
        **{"model.dual_encoder": str(folder), "data.max_text_length": None, **own, **short}
    )
    run = trainer.train(config, tmp_path / "run")
    assert export.main([f"--workdir={tmp_path / 'run'}", f"--output={out}"]) == 0
    texts = [*TEXTS, "A Photo OF the number " * 20]
    tokens = AutoTokenizer.from_pretrained(out)(
        texts, padding="max_length", truncation=True, return_tensors="pt"
    )
    assert tokens["input_ids"].shape[1] == 48
    with torch.no_grad():
        features = SiglipModel.from_pretrained(out).get_text_features(**tokens)
    theirs = getattr(features, "pooler_output", features).numpy()
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    ours = encoder_of(run).texts(run.params, texts)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    encoder, params = evaluate.load_folder(str(out))
    np.testing.assert_allclose(encoder.texts(params, texts), theirs, atol=1e-5)
