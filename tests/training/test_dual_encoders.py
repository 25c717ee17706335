"""Runs that start from a whole dual encoder: a pretrained CLIP, an ALIGN from scratch."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers

import lit_jax
from lit_jax import export
from lit_jax.errors import UserError
from lit_jax.training import trainer
from lit_jax.training.metrics import read_metrics
from lit_jax.trees import flatten
from lit_jax.weights.load import load_dual_encoder

DEMO = Path(__file__).parents[2] / "configs" / "demo"
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
TEXT = {**SMALL, "vocab_size": 142, "max_position_embeddings": 24}
CONFIGS = {
    "clip": lambda: transformers.CLIPConfig(
        text_config={**TEXT, "eos_token_id": 3},  # [SEP] of the demo's tokenizer
        vision_config={**SMALL, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    ),
    "align": lambda: transformers.AlignConfig(
        text_config=TEXT,
        vision_config={
            "image_size": 32,
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "in_channels": [32, 8],
            "out_channels": [8, 16],
            "kernel_sizes": [3, 3],
            "strides": [1, 2],
            "num_block_repeats": [1, 1],
            "expand_ratios": [1, 2],
            "hidden_dim": 16,
        },
        projection_dim=16,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes a tiny dual encoder with the demo's processors, each once; no test may change it."""
    root = tmp_path_factory.mktemp("dual_encoders")

    def write(name):
        if (root / name).exists():
            return str(root / name)
        model = lit_jax.DualEncoder.from_config(CONFIGS[name]())
        model.save_pretrained(root / name)
        shutil.copy(DEMO / "vit" / "preprocessor_config.json", root / name)
        for file in ("vocab.txt", "tokenizer_config.json"):
            shutil.copy(DEMO / "bert" / file, root / name)
        return str(root / name)

    return write


@pytest.fixture
def train(tiny, tmp_path, one_device):
    """A run of a dual encoder on one device, and the folder of the run."""

    def run(folder, **changes):
        no_towers = {"model.image.model": "", "model.text.model": "", "model.projection_dim": 512}
        config = tiny(**{"model.dual_encoder": folder, **no_towers, **changes})
        return trainer.train(config, tmp_path / "run"), tmp_path / "run"

    return run


def test_a_pretrained_clip_trains_on_and_is_exported_as_a_clip(folder, train, tmp_path):
    source = folder("clip")
    _, before, _, _ = load_dual_encoder(source, dtype="float32")
    run, workdir = train(source, **{"policy.lock": "LU", "duration": "2 steps"})
    before, after = flatten(before), flatten(run.params)
    assert before.keys() == after.keys()
    for path, value in before.items():
        changed = np.abs(np.asarray(after[path]) - value).max() > 0
        assert changed != path.startswith("vision_model/"), path

    arguments = [f"--workdir={workdir}", f"--output={tmp_path / 'out'}"]
    assert export.main(arguments) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "clip"
    _, exported, _, _ = load_dual_encoder(tmp_path / "out", dtype="float32")
    for path, value in flatten(exported).items():
        np.testing.assert_array_equal(value, after[path], err_msg=path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    assert type(processor).__name__ == "CLIPProcessor"


@pytest.mark.parametrize("key", ["projection_dim", "logit_scale_init", "logit_bias_init"])
def test_what_joins_the_towers_is_not_chosen_beside_them(folder, train, key):
    with pytest.raises(UserError, match=rf"dual_encoder .*; .*config\.model\.{key}"):
        train(folder("clip"), **{f"model.{key}": 8})


def test_what_joins_the_towers_is_float32_though_it_is_locked(folder, train):
    rules = ((r"logit_scale|.*_projection/kernel", False),)
    run, _ = train(
        folder("clip"),
        **{"model.dtype": "bfloat16", "policy.trainable": rules, "duration": "2 steps"},
    )
    assert run.model.policy.trainable["logit_scale"] is False
    dtypes = {path: str(leaf.dtype) for path, leaf in flatten(run.params).items()}
    assert dtypes.pop("logit_scale") == "float32"
    assert (
        dtypes.pop("text_projection/kernel") == dtypes.pop("visual_projection/kernel") == "float32"
    )
    locked = {dtypes[path] for path in dtypes if not run.model.policy.trainable[path]}
    assert locked == {"bfloat16"}


@pytest.mark.long
def test_projections_that_came_with_other_towers_start_anew(folder, train):
    source = folder("clip")
    _, before, _, _ = load_dual_encoder(source, dtype="float32")
    run, _ = train(
        source, **{"policy.lock": "Lu", "duration": "1 step", "schedule.warmup": "0 steps"}
    )
    kernel = np.asarray(run.params["visual_projection"]["kernel"])
    assert np.abs(kernel - before["visual_projection"]["kernel"]).max() > 1e-2
    for path, value in flatten(before["vision_model"]).items():
        np.testing.assert_array_equal(flatten(run.params["vision_model"])[path], value)


@pytest.mark.long
def test_align_from_scratch_keeps_running_statistics(folder, train, tmp_path):
    source = folder("align")
    run, workdir = train(
        source, **{"policy.lock": "uu", "duration": "3 steps", "label_smoothing": 0.1}
    )
    params = flatten(run.params)
    statistics = [path for path in params if path.rpartition("/")[2] in ("mean", "var")]
    assert statistics
    for path in statistics:  # drawn as 0 and 1
        start = 0.0 if path.endswith("mean") else 1.0
        assert (np.asarray(params[path]) != start).all(), path
    assert np.asarray(params["temperature"]) != 1.0
    assert all(np.isfinite(row["loss"]) for row in read_metrics(workdir))
    arguments = [f"--workdir={workdir}", f"--output={tmp_path / 'out'}"]
    assert export.main(arguments) == 0
    _, exported, _, _ = load_dual_encoder(tmp_path / "out", dtype="float32")
    for path, value in flatten(exported).items():
        np.testing.assert_array_equal(value, params[path], err_msg=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.image.pooling": "cls"},
            r"config.model.dual_encoder .*config.model.image",
        ),
        (
            {"model.text.model": "some/where"},
            r"config.model.dual_encoder .*config.model.text",
        ),
        ({"model.dual_encoder": str(DEMO / "bert")}, r"bert"),
        (
            {"model.text.overrides": {"hiden_size": 3}},
            r"overrides.hiden_size.*'hidden_size'",
        ),
    ],
)
def test_what_does_not_fit_a_dual_encoder(folder, train, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(folder("clip"), **changes)
    assert not (tmp_path / "run").exists()
