"""Stage one of AltCLIP: a text tower learns from a CLIP's, without images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.config import parse
from lit_jax.configs import altclip
from lit_jax.data.text import load_tokenizer, tokenize
from lit_jax.distributed.mesh import make_mesh
from lit_jax.errors import UserError
from lit_jax.models.families import build_tower
from lit_jax.training import trainer
from lit_jax.training.losses import mse_loss
from lit_jax.training.metrics import read_metrics
from lit_jax.training.model_factory import build_model, first_parameters
from lit_jax.training.workdir import load_run
from lit_jax.trees import flatten, unflatten
from lit_jax.weights.load import load_dual_encoder, parameter_shapes
from lit_jax.weights.save import save_tower

DEMO = Path(__file__).parents[2] / "configs" / "demo"
SHORT = {
    "batch_size": 16,
    "duration": "3 steps",
    "schedule.warmup": "1 step",
    "log.every": "1 step",
    "log.tensorboard": False,
    "evals": {},
    "report": "none",
}


def demo(**changes):
    raw = altclip.get_config()
    raw.update_from_flattened_dict({**SHORT, **changes})
    return parse(raw)


def test_mse_is_the_mean_over_texts_and_numbers():
    student = jnp.array([[1.0, 2.0], [3.0, 5.0]], jnp.bfloat16)
    teacher = jnp.array([[1.0, 0.0], [2.0, 2.0]], jnp.float32)
    assert float(mse_loss(student, teacher)) == (0 + 4 + 1 + 9) / 4


@pytest.mark.long
def test_only_the_text_tower_changes(tmp_path, one_device):
    run = trainer.train(demo(), tmp_path)
    _, clip, _, _ = load_dual_encoder(DEMO / "clip", dtype="float32")
    after = flatten(run.params)
    assert not [path for path in after if path.startswith("teacher")]
    for path, value in flatten(clip).items():
        if not path.startswith("text_model/"):
            np.testing.assert_array_equal(after[path], value, err_msg=path)
    table = (tmp_path / "parameters.txt").read_text().splitlines()
    assert {line.split("/")[0] for line in table if " lr x" in line} == {"text_model"}
    trained = {path for path, trains in run.model.policy.trainable.items() if trains}
    assert trained == {path for path in after if path.startswith("text_model/")}
    assert any(path.startswith("teacher/") for path in (line.split()[0] for line in table))
    assert "logit_scale" not in read_metrics(tmp_path)[-1]
    # A run is read back without the folders it came from.
    again = flatten(load_run(tmp_path).params)
    assert again.keys() == after.keys()


def test_the_first_loss_is_the_distance_of_what_both_towers_return(tmp_path, one_device):
    """Computed by hand from the two folders' own towers, for a student that starts from weights."""
    student_folder = pretrained_student(tmp_path / "student")
    sentence = {"caption": "einundzwanzig", "teacher_caption": "twenty one"}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "captions.jsonl").write_text(json.dumps(sentence))
    changes = {
        "model.text.model": str(student_folder),
        "policy.lock": "LU",
        "data.train.path": str(tmp_path / "data"),
        "data.train.split": None,
    }
    run = trainer.train(demo(**changes), tmp_path / "run")
    clip, clip_params, _, _ = load_dual_encoder(DEMO / "clip", dtype="float32")
    taught = pooled(clip.text_model, clip_params["text_model"], DEMO / "clip", "twenty one")
    first = read_metrics(tmp_path / "run")[0]["loss"]
    start = first_parameters_of(demo(**changes))
    said = pooled(run.module.text_model, start["text_model"], student_folder, "einundzwanzig")
    assert first == pytest.approx(float(np.square(said - taught).mean()), rel=1e-5)


def first_parameters_of(config):
    model = build_model(config, make_mesh(config.mesh, jax.devices()[:1]))
    trainable, _ = first_parameters(model)
    return trainable


def pooled(tower, params, folder, text):
    tokens = tokenize(load_tokenizer(folder, max_length=24), [text])
    inputs = [jnp.asarray(tokens[name]) for name in ("input_ids", "attention_mask")]
    return np.asarray(tower.apply({"params": params}, *inputs).pooled)


def pretrained_student(folder):
    """A tiny XLM-RoBERTa with random weights, as from the Hub."""
    hf_config = json.loads((DEMO / "xlm_roberta" / "config.json").read_text())
    module = build_tower(hf_config, pooling="cls", dtype=jnp.float32)
    rng = np.random.default_rng(0)
    shapes = flatten(parameter_shapes(module, module.example_input))
    params = unflatten(
        {path: rng.normal(0, 0.1, leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    )
    save_tower(
        folder, hf_config, module, params, load_tokenizer(DEMO / "xlm_roberta", max_length=32)
    )
    return folder


@pytest.mark.long
def test_german_finds_images_that_no_german_text_was_seen_with(tmp_path):
    """The student has seen no image at all; the CLIP has seen images with English captions only."""
    arguments = ["--config=configs/altclip.py", f"--workdir={tmp_path}", "--config.report=none"]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    subprocess.run(
        [sys.executable, "-m", "lit_jax.train", *arguments],
        env=environment,
        cwd=DEMO.parents[1],
        check=True,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    # Of 16 numbers that the CLIP was never told, among them alone and among all 80.
    assert results["zero_shot/unseen16_de/top1"] > 0.85
    assert results["zero_shot/all80_on_unseen_de/top1"] > 0.6
    english = results["zero_shot/all80_on_unseen/top1"]
    assert results["zero_shot/all80_on_unseen_de/top1"] == pytest.approx(english, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "softmax"}, r"config.loss='mse' .*config.model.teacher"),
        ({"model.teacher": ""}, r"config.loss='mse' .*config.model.teacher"),
        ({"policy.lock": "UL"}, r"config.policy.lock .*'UL'.*'LU' .*'Lu'"),
        ({"model.image.model": "a"}, r"config.model.dual_encoder .*config.model.image"),
        ({"model.teacher": str(DEMO / "vit")}, r"vit; .*CLIP"),
        (
            {"model.text.model": str(DEMO / "bert")},
            r"model_type bert",
        ),
        ({"model.teacher": "no/where"}, r"config.model.teacher .*'no/where'"),
        ({"data.train.split": "german"}, r"'german'"),
    ],
)
def test_what_does_not_fit_a_teacher_is_one_sentence(changes, message, tmp_path, one_device):
    with pytest.raises(UserError, match=message):
        trainer.train(demo(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
