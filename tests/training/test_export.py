"""A run given away: what lit_jax.export writes computes in PyTorch, and in lit_jax, what the run computes."""

import functools

import jax
import numpy as np
import pytest

from lit_jax import export
from lit_jax.console import BAD_INPUT
from lit_jax.data.demo import DemoSource
from lit_jax.data.image import ImageTransform
from lit_jax.data.text import load_tokenizer, tokenize
from lit_jax.distributed.mesh import make_mesh
from lit_jax.training import loop
from lit_jax.training.run import load_run
from lit_jax.trees import flatten
from lit_jax.weights.load import load_dual_encoder

TEXTS = ["a photo of the number forty two", "thirty", "the handwritten number ninety nine"]


@pytest.fixture
def exported(tiny, tmp_path, monkeypatch):
    """A bfloat16 run with a pooler on one side and CLS on the other, and its export."""
    one = functools.partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(loop, "make_mesh", one)
    config = tiny(**{"duration": "2 steps", "model.dtype": "bfloat16", "model.text.pooling": "cls"})
    loop.train(config, tmp_path / "run")
    arguments = [f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'exported'}"]
    assert export.main(arguments) == 0
    return tmp_path / "run", tmp_path / "exported"


def our_logits(folder):
    module, params, _, _ = load_dual_encoder(folder, dtype="float32")
    tokens = tokenize(load_tokenizer(folder, max_length=24), TEXTS)
    transform = ImageTransform.from_folder(folder)
    source = DemoSource("unseen")
    pixels = np.stack([transform.eval(source[i]["image"]) for i in range(3)])
    output = jax.jit(module.apply)({"params": params}, {"pixel_values": pixels, **tokens})
    return np.exp(output.logit_scale) * output.image_embeds @ output.text_embeds.T


def test_reading_it_back_is_exact(exported):
    run, folder = exported
    _, params, _, _ = load_dual_encoder(folder, dtype="float32")
    ours, theirs = flatten(params), flatten(load_run(run, dtype="float32").params)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)


@pytest.mark.oracle
def test_pytorch_computes_the_same_logits(exported):
    import torch
    from PIL import Image
    from transformers import VisionTextDualEncoderModel, VisionTextDualEncoderProcessor

    _, folder = exported
    model, info = VisionTextDualEncoderModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    processor = VisionTextDualEncoderProcessor.from_pretrained(folder)
    source = DemoSource("unseen")
    images = [Image.fromarray(source[i]["image"]) for i in range(3)]
    inputs = processor(text=TEXTS, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        theirs = model.eval()(**inputs).logits_per_image.numpy()
    np.testing.assert_allclose(our_logits(folder), theirs, atol=1e-4)


def test_what_is_no_run_is_named(tmp_path, capsys):
    arguments = [f"--workdir={tmp_path}", f"--output={tmp_path / 'exported'}"]
    assert export.main(arguments) == BAD_INPUT
    assert "is not a run folder" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()
