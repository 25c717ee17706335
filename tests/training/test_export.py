"""A run given away: what lit_jax.export writes computes in PyTorch, and in lit_jax, what the run computes."""

import json
import shutil
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from lit_jax import evaluate, export
from lit_jax.cli import BAD_INPUT
from lit_jax.data.image import decode
from lit_jax.data.image_processor import load_image_transform
from lit_jax.data.text import load_tokenizer, tokenize
from lit_jax.errors import UserError
from lit_jax.models.families import build_tower
from lit_jax.training import trainer
from lit_jax.training.workdir import load_run
from lit_jax.trees import flatten
from lit_jax.weights.load import load_dual_encoder, parameter_shapes
from lit_jax.weights.save import save_tower
from tests.digits import open_digits

TEXTS = ["a photo of the number forty two", "thirty", "the handwritten number ninety nine"]


@pytest.fixture
def train_and_export(tiny, tmp_path, one_device):
    """Trains with changes of the config, exports, and returns the folders of both."""

    def run(**changes):
        trainer.train(tiny(**changes), tmp_path / "run")
        arguments = [f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'exported'}"]
        assert export.main(arguments) == 0
        return tmp_path / "run", tmp_path / "exported"

    return run


@pytest.fixture
def exported(train_and_export):
    """A bfloat16 run with a pooler on one side and CLS on the other, and its export."""
    changes = {"model.dtype": "bfloat16", "model.text.pooling": "cls"}
    return train_and_export(duration="2 steps", **changes)


def our_logits(folder):
    module, params, _, _ = load_dual_encoder(folder, dtype="float32")
    tokens = tokenize(load_tokenizer(folder, max_length=24), TEXTS)
    return compute_logits(module, params, tokens, load_image_transform(folder))


def compute_logits(module, params, tokens, transform):
    source = open_digits("unseen")
    pixels = transform.normalization(
        np.stack([transform.eval(source[i]["image"]) for i in range(3)])
    )
    output = jax.jit(module.apply)({"params": params}, {"pixel_values": pixels, **tokens})
    return np.exp(output.logit_scale) * output.image_embeds @ output.text_embeds.T


@pytest.mark.parametrize("command", [export, evaluate])
def test_a_run_that_cannot_be_read_is_one_sentence(tmp_path, command, monkeypatch, capsys):
    """Without what Orbax's threads print about the arrays that they give up after the first."""
    printed = []

    def load(*_, **__):
        given_up = RuntimeError("Event loop is closed")
        sys.unraisablehook(types.SimpleNamespace(exc_value=given_up))
        raise UserError("The run is damaged.")

    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    monkeypatch.setattr(command, "load_run", load)
    data = tmp_path / "captions.jsonl"
    rows = ('{"image": "a.jpg", "caption": "a dog"}', '{"image": "b.jpg", "caption": "a cat"}')
    data.write_text("\n".join(rows))
    flags = [f"--data={data}"] if command is evaluate else [f"--output={tmp_path / 'exported'}"]
    assert command.main([f"--workdir={tmp_path}", *flags]) == BAD_INPUT
    assert capsys.readouterr().err == "error: The run is damaged.\n"
    assert not printed


def test_reading_it_back_is_exact(exported):
    run, folder = exported
    _, params, _, _ = load_dual_encoder(folder, dtype="float32")
    ours, theirs = flatten(params), flatten(load_run(run, dtype="float32").params)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)


def torch_logits(folder):
    import torch
    from transformers import VisionTextDualEncoderModel, VisionTextDualEncoderProcessor

    model, info = VisionTextDualEncoderModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    processor = VisionTextDualEncoderProcessor.from_pretrained(folder)
    source = open_digits("unseen")
    images = [decode(source[i]["image"]) for i in range(3)]
    inputs = processor(text=TEXTS, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.eval()(**inputs).logits_per_image.numpy()


@pytest.mark.oracle
def test_pytorch_computes_the_same_logits(exported):
    _, folder = exported
    np.testing.assert_allclose(our_logits(folder), torch_logits(folder), atol=1e-4)


BEIT = {
    "model_type": "beit",
    "use_absolute_position_embeddings": True,
    "use_relative_position_bias": True,
    "use_shared_relative_position_bias": True,
}


@pytest.fixture
def beit(towers, tmp_path):
    """The folder of a BEiT with all the positions it can have, as wide as the ViT and with random weights."""
    vit = Path(towers["image"])
    hf = json.loads((vit / "config.json").read_text()) | BEIT
    module = build_tower(hf, pooling="pooler", dtype="float32")
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32),
        parameter_shapes(module, module.example_input),
    )
    save_tower(tmp_path / "beit", hf, module, params)
    shutil.copy(vit / "preprocessor_config.json", tmp_path / "beit")
    return str(tmp_path / "beit")


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["vit", "beit"])
def test_an_export_has_the_image_size_of_the_run(train_and_export, towers, request, family):
    """PyTorch needs no interpolate_pos_encoding then."""
    image_tower = towers["image"] if family == "vit" else request.getfixturevalue("beit")
    changes = {"model.image.model": image_tower, "data.image_size": 48}
    workdir, folder = train_and_export(duration="2 steps", **changes)
    config = json.loads((folder / "config.json").read_text())
    assert config["vision_config"]["image_size"] == 48
    run = load_run(workdir, dtype="float32")
    tokens = tokenize(run.model.processors.tokenizer, TEXTS)
    expected = compute_logits(run.module, run.params, tokens, run.model.processors.image_transform)
    np.testing.assert_allclose(our_logits(folder), expected, atol=1e-4)
    np.testing.assert_allclose(torch_logits(folder), expected, atol=1e-4)


@pytest.mark.parametrize(("pooling", "said"), [("mean", True), ("cls", False)])
def test_an_export_for_lit_jax_alone_is_said_before_the_training(
    tiny, tmp_path, one_device, caplog, pooling, said
):
    trainer.Trainer.prepare(tiny(**{"model.text.pooling": pooling}), tmp_path / "run")
    sentences = [record.getMessage() for record in caplog.records]
    found = [text for text in sentences if "VisionTextDualEncoder" in text]
    assert len(found) == said
    assert all("config.model.text.pooling" in text for text in found)


def test_what_is_no_run_is_named(tmp_path, capsys):
    arguments = [f"--workdir={tmp_path}", f"--output={tmp_path / 'exported'}"]
    assert export.main(arguments) == BAD_INPUT
    assert f"{tmp_path} " in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()
