"""Whole tiny runs: what is written, what resuming gives, what is refused."""

import dataclasses
import functools
import json
import re
import shutil
import time

import jax
import numpy as np
import optax
import pytest

from lit_jax.config import MeshConfig
from lit_jax.distributed.mesh import make_mesh
from lit_jax.errors import Preempted, UserError
from lit_jax.training.checkpoints import Checkpoints
from lit_jax.training.losses import objective, softmax_loss
from lit_jax.training.metrics import read_metrics
from lit_jax.training.model_factory import build_model, example_batch
from lit_jax.training.passed import Passed
from lit_jax.training.restore import first_or_latest_state
from lit_jax.training.train_step import TrainStep
from lit_jax.training.workdir import load_run
from lit_jax.trees import flatten
from lit_jax.weights.load import load_tower
from tests.training.conftest import UNPATCHED_STEP, stop_after


def numbers(workdir):
    """The rows of a run without what depends on the clock."""
    of_time = re.compile(r"pairs_per_second|.*_seconds|time|goodput|seconds/.*")
    return [
        {k: v for k, v in row.items() if not of_time.fullmatch(k)} for row in read_metrics(workdir)
    ]


def assert_same(ours, theirs):
    ours, theirs = flatten(ours), flatten(theirs)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)


def test_a_run_writes_what_it_promises(finished_run):
    run, workdir = finished_run
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == 16
    assert [row["step"] for row in read_metrics(workdir)] == [1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4", "6"]
    assert "vision_model/layernorm/scale" in (workdir / "parameters.txt").read_text()
    row = read_metrics(workdir)[-1]
    assert {"learning_rate", "logit_scale", "pairs_per_second", "grad_norm"} <= row.keys()
    assert row["examples"] == 96
    loaded = load_run(workdir)
    assert loaded.step == run.step == 6
    assert_same(loaded.params, run.params)


def test_stopping_and_going_on_equals_never_stopping(
    train, tiny, finished_run, tmp_path, monkeypatch
):
    whole, folder_of_whole = finished_run
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Preempted, match="after step 3 of 6"):
            train(tiny(), tmp_path)
    # As after kill -9: the log is ahead of the latest checkpoint, its last line cut.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 9}\n{"step": 5, "lo')
    parts = train(tiny(), tmp_path)
    assert numbers(tmp_path) == numbers(folder_of_whole)
    assert_same(parts.params, whole.params)


def test_a_run_is_not_longer_than_its_duration(train, tiny, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    before = (workdir / "config.json").read_text()
    with pytest.raises(UserError, match=r"6 steps.*4 .*config\.duration"):
        train(tiny(duration="4 steps"), workdir, allowed_changes=["duration"])
    assert (workdir / "config.json").read_text() == before


def test_the_locked_tower_is_bit_equal_and_the_rest_moves(finished_run, towers):
    run, _ = finished_run
    before, _ = load_tower(towers["image"], run.module.vision_model)
    assert_same(run.params["vision_model"], before)
    text_before, _ = load_tower(towers["text"], run.module.text_model)
    after = flatten(run.params["text_model"])
    still = [p for p, v in flatten(text_before).items() if np.array_equal(v, after[p])]
    assert still == []


@pytest.mark.parametrize(
    "lock",
    [
        "uL",
        *(pytest.param(lock, marks=pytest.mark.long) for lock in ("Lu", "uu", "Uu", "UU", "UL")),
    ],
)
def test_every_other_preset_trains(train, tiny, tmp_path, lock, caplog):
    """A pretrained image tower that trains at the full rate is told, with the rules to write."""
    run = train(tiny(**{"policy.lock": lock, "duration": "2 steps"}), tmp_path)
    assert np.isfinite(read_metrics(tmp_path)[-1]["loss"])
    assert run.step == 2
    assert (f"lock='{lock}'" in caplog.text) == lock.startswith("U")
    assert ("config.policy.learning_rate=(('vision_model/.*', 0.1),)" in caplog.text) == (
        lock[0] == "U"
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "sigmoid", "model.logit_bias_init": -10.0, "optimizer.name": "lion"},
        {"optimizer.name": "adafactor", "optimizer.momentum_dtype": "bfloat16"},
        {"model.dtype": "bfloat16", "model.image.projection": "linear_bias"},
        {"model.logit_scale_max": 14.0},
    ],
)
def test_other_losses_optimizers_and_dtypes_resume_exactly(
    train, tiny, tmp_path, monkeypatch, changes
):
    whole = train(tiny(**changes), tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Preempted):
            train(tiny(**changes), tmp_path / "parts")
    parts = train(tiny(**changes), tmp_path / "parts")
    assert_same(parts.params, whole.params)
    assert_same(load_run(tmp_path / "parts").params, whole.params)


@pytest.mark.parametrize("fsdp", [pytest.param(2, marks=pytest.mark.long), 4])
def test_parameters_split_over_fsdp_train_the_same(train, tiny, finished, tmp_path, fsdp):
    run = train(tiny(**{"mesh.fsdp": fsdp}), tmp_path, devices=4)
    kernel = run.params["text_model"]["encoder"]["layer"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (1, 16, 32 // fsdp)
    for ours, theirs in zip(numbers(tmp_path), numbers(finished), strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
        np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-4)


def test_non_finite_values_stop_the_run_and_name_the_last_checkpoint(train, tiny, tmp_path):
    config = tiny(**{"schedule.learning_rate": 1e15})
    with pytest.raises(UserError, match=r"non-finite .*[34].*2"):
        train(config, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_locked_weight_that_is_nan_is_named_at_the_load_and_at_the_first_step(
    train, tiny, nan_image_tower, tmp_path, caplog
):
    config = tiny(**{"model.image.model": nan_image_tower})
    path = "vision_model/encoder/layer_1/mlp/fc2/bias"
    with pytest.raises(UserError, match=rf"1, .*{path} \(1\)"):
        train(config, tmp_path)
    assert f"{nan_image_tower}/model.safetensors " in caplog.text
    assert "layer.1.output.dense.bias (1 NaN, 0 infinite)" in caplog.text


def test_checkpoints_are_kept_at_the_steps_that_the_config_says(train, tiny, tmp_path):
    """Though they are no multiples of those at which one is saved anyway."""
    changes = {"checkpoint.every": "2 steps", "checkpoint.keep_every": "3 steps"}
    train(tiny(**changes, **{"checkpoint.keep_last": 1, "duration": "7 steps"}), tmp_path)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"3", "6", "7"}


def test_checkpoints_are_saved_by_the_clock(train, tiny, tmp_path):
    def wait(model):
        time.sleep(0.6)

    changes = {"checkpoint.every": "1 second", "checkpoint.keep_last": 9, "duration": "5 steps"}
    train(tiny(**changes), tmp_path, passed=Passed(callbacks=(("1 step", wait),)))
    assert {5} < {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}


def test_a_run_goes_on_only_with_the_config_it_was_started_with(train, tiny, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"schedule.learning_rate: 0.002 -> 0.1.*--allow_changes="):
        train(tiny(**{"schedule.learning_rate": 0.1, "seed": 4}), tmp_path)
    changed = tiny(**{"schedule.learning_rate": 0.1, "log.every": "3 steps", "seed": 4})
    train(changed, tmp_path, allowed_changes=["schedule.learning_rate", "seed"])
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 4


def test_a_start_without_checkpoint_takes_nothing_from_the_one_before(
    train, tiny, towers, tmp_path, monkeypatch
):
    other = shutil.copytree(towers["image"], tmp_path / "other")
    hf = json.loads((other / "config.json").read_text()) | {"hidden_act": "relu"}
    (other / "config.json").write_text(json.dumps(hf))
    with monkeypatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tiny(**{"model.image.model": str(other)}), tmp_path / "run")
        assert (tmp_path / "run" / "frozen").exists()
    for file in (tmp_path / "run" / "frozen").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    # Locked parameters of a later step, whose checkpoint somebody has removed.
    (tmp_path / "run" / "frozen_from_4").mkdir()
    allowed = ["model.image.model"]
    run = train(tiny(), tmp_path / "run", allowed_changes=allowed)
    assert not (tmp_path / "run" / "frozen_from_4").exists()
    model = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert model["vision_config"]["hidden_act"] == "gelu"
    expected, _ = load_tower(towers["image"], run.module.vision_model)
    assert_same(load_run(tmp_path / "run").params["vision_model"], expected)


@pytest.mark.long
@pytest.mark.usefixtures("no_cache_of_the_suite")
def test_a_restart_reads_the_compiled_programs_of_the_run(train, tiny, tmp_path, monkeypatch):
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    monkeypatch.delenv("LIT_JAX_CACHE", raising=False)
    # Programs in memory are not written again.
    jax.clear_caches()
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Preempted):
            train(tiny(), tmp_path / "run")
    assert len(list((tmp_path / "run" / "compilation_cache").rglob("*train_step*"))) == 1
    jax.clear_caches()
    events.clear()
    run = train(tiny(), tmp_path / "run")
    assert events.count("/jax/compilation_cache/cache_hits") >= 1
    assert run.step == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer.name": "lion", "optimizer.b2": 0.9},
        pytest.param({"policy.lock": "UU"}, marks=pytest.mark.long),
        pytest.param({"model.projection_dim": 4}, marks=pytest.mark.long),
    ],
)
def test_an_allowed_change_that_no_checkpoint_fits_leaves_the_run_as_it_was(
    finished, tiny, train, tmp_path, changes
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(UserError, match=r"--allow_changes"):
        train(tiny(**changes), workdir, allowed_changes=[*changes])
    assert train(tiny(), workdir).step == 6


def test_a_run_with_a_checkpoint_says_that_it_keeps_its_towers(
    finished, tiny, towers, train, tmp_path, caplog
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    elsewhere = shutil.copytree(towers["image"], tmp_path / "elsewhere")
    changes = {"model.image.model": str(elsewhere), "model.text.overrides": {"pad_token_id": 0}}
    with caplog.at_level("WARNING", logger="lit_jax"):
        train(tiny(**changes), workdir, allowed_changes=list(changes))
    assert re.search(rf"{workdir} .*model\.image\.model \w+ model\.text\.overrides", caplog.text)


def test_reading_a_run_leaves_alone_what_it_is_just_saving(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    unfinished = tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert load_run(tmp_path).step == 6
    assert unfinished.exists()


def test_locking_costs_no_gradient_and_no_optimizer_state(tiny):
    """FLOPs of the compiled step, and bytes of its state, with the image tower locked and unlocked."""
    locked, unlocked = (step_costs(tiny(**{"policy.lock": lock})) for lock in ("LU", "UU"))
    image_bytes = unlocked["params"] - locked["params"]
    assert image_bytes > 10_000
    assert unlocked["opt_state"] - locked["opt_state"] == 2 * image_bytes  # Adam's two moments
    # What is saved is the backward pass, about two forward ones; a scan is counted once in all three.
    assert unlocked["flops"] - locked["flops"] > 1.2 * locked["image_forward_flops"]


def step_costs(config):
    model = build_model(config, make_mesh(config.mesh))
    train_step = TrainStep.build(model, optax.constant_schedule(0.1))
    state = train_step.abstract_state()
    step = functools.partial(
        UNPATCHED_STEP,
        forward=model.forward,
        loss=objective(softmax_loss),
        optimizer=train_step.optimizer,
        schedule=optax.constant_schedule(0.1),
        seed=0,
    )
    batch = {
        name: jax.ShapeDtypeStruct((16, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in example_batch(model.processors).items()
    }
    image = functools.partial(model.module.apply, method="encode_image")
    return {
        "params": size(state.params),
        "opt_state": size(state.opt_state),
        "flops": flops(step, state, model.abstract_frozen, batch),
        "image_forward_flops": flops(image, {"params": model.abstract}, batch["pixel_values"]),
    }


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if leaf.ndim)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def test_a_checkpoint_moves_to_other_devices(tiny, tmp_path):
    """From all to some and back, with the parameters split in other ways: (devices, fsdp)."""
    config = tiny(**{"policy.lock": "UU"})
    states = []
    route = [(8, 2), (1, 1), (8, 4), (2, 2), (8, 4), (4, 4), (8, 2), (4, 2), (8, 4)]
    for saved, (devices, fsdp) in enumerate(route):
        mesh = make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:devices])
        step = TrainStep.build(build_model(config, mesh), optax.constant_schedule(0.1))
        with Checkpoints(tmp_path, keep_last=1) as checkpoints:
            state, _, position = first_or_latest_state(step, tmp_path, checkpoints)
            assert position == ({"next_batch": saved} if saved else None)
            resolved = dataclasses.asdict(config)
            checkpoints.save(saved + 1, state, {"next_batch": saved + 1}, resolved)
        assert state.params["logit_scale"].sharding.mesh.size == devices
        states.append(state)
    for state in states[1:]:
        assert_same(state.params, states[0].params)
