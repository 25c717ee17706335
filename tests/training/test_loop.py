"""Whole tiny runs: what is written, what resuming gives, what is refused."""

import functools
import json
import os
import signal

import chex
import jax
import numpy as np
import optax
import pytest

from lit_jax.config import MeshConfig
from lit_jax.distributed.mesh import make_mesh
from lit_jax.errors import Preempted, UserError
from lit_jax.training import loop
from lit_jax.training.checkpoints import Checkpoints
from lit_jax.training.losses import LOSSES
from lit_jax.training.metrics import read_metrics
from lit_jax.training.optimizer import make_optimizer
from lit_jax.training.preemption import StopSignal
from lit_jax.training.run import load_run
from lit_jax.training.setup import example_batch, find_towers, prepare
from lit_jax.training.state import abstract_state, first_or_latest_state
from lit_jax.trees import flatten
from lit_jax.weights.load import load_tower


@pytest.fixture
def train(monkeypatch):
    """The real loop on some devices; a second trace of the step in one run is an error.

    One device if not told otherwise: XLA's CPU client now and then lets many simulated devices, on few
    cores, wait for each other for ever.
    """

    def run(config, workdir, *, devices=1, **kwargs):
        some = functools.partial(make_mesh, devices=jax.devices()[:devices])
        monkeypatch.setattr(loop, "make_mesh", some)
        step = chex.assert_max_traces(UNPATCHED_STEP, n=1)
        monkeypatch.setattr(loop, "train_step", step)
        chex.clear_trace_counter()
        return loop.train(config, workdir, **kwargs)

    return run


UNPATCHED_STEP = loop.train_step


def stop_after(monkeypatch, step):
    """Sends this process a real SIGTERM in the middle of that step."""
    requested = StopSignal.requested

    def patched(self, now):
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return requested(self, now)

    monkeypatch.setattr(StopSignal, "requested", patched)


def numbers(workdir):
    timeless = {"pairs_per_second"}
    return [{k: v for k, v in row.items() if k not in timeless} for row in read_metrics(workdir)]


def assert_same(ours, theirs):
    ours, theirs = flatten(ours), flatten(theirs)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)


def test_a_run_writes_what_it_promises(train, tiny, tmp_path):
    run = train(tiny(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 16
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    assert "vision_model/layernorm/scale" in (tmp_path / "parameters.txt").read_text()
    row = read_metrics(tmp_path)[-1]
    assert {"learning_rate", "logit_scale", "pairs_per_second", "update_norm"} <= row.keys()
    assert row["examples"] == 96
    loaded = load_run(tmp_path)
    assert loaded.step == run.step == 6
    assert_same(loaded.params, run.params)


def test_stopping_and_going_on_equals_never_stopping(train, tiny, tmp_path, monkeypatch):
    whole = train(tiny(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Preempted, match="after step 3 of 6"):
            train(tiny(), tmp_path / "parts")
    parts = train(tiny(), tmp_path / "parts")
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    assert_same(parts.params, whole.params)


def test_rows_after_the_checkpoint_are_written_again(train, tiny, tmp_path, monkeypatch):
    """As after kill -9: the log is ahead of the latest checkpoint, its last line cut."""
    train(tiny(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Preempted):
            train(tiny(), tmp_path / "parts")
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 9}\n{"step": 5, "lo')
    train(tiny(), tmp_path / "parts")
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


def test_the_locked_tower_is_bit_equal_and_the_rest_moves(train, tiny, towers, tmp_path):
    run = train(tiny(), tmp_path)
    before, _ = load_tower(towers["image"], run.module.vision_model)
    assert_same(run.params["vision_model"], before)
    text_before, _ = load_tower(towers["text"], run.module.text_model)
    after = flatten(run.params["text_model"])
    still = [p for p, v in flatten(text_before).items() if np.array_equal(v, after[p])]
    assert still == []


@pytest.mark.parametrize("lock", ["Lu", "uu", "Uu", "UU", "uL", "UL"])
def test_every_other_preset_trains(train, tiny, tmp_path, lock):
    run = train(tiny(**{"policy.lock": lock, "duration": "2 steps"}), tmp_path)
    assert np.isfinite(read_metrics(tmp_path)[-1]["loss"])
    assert run.step == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "sigmoid", "model.logit_bias_init": -10.0, "optimizer.name": "lion"},
        {"optimizer.name": "adafactor", "optimizer.momentum_dtype": "bfloat16"},
        {"model.dtype": "bfloat16", "model.image.projection": "linear_bias"},
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


@pytest.mark.parametrize("fsdp", [2, 4])
def test_parameters_split_over_fsdp_train_the_same(train, tiny, tmp_path, fsdp):
    train(tiny(), tmp_path / "1")
    run = train(tiny(**{"mesh.fsdp": fsdp}), tmp_path / "split", devices=4)
    kernel = run.params["text_model"]["encoder"]["layer"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 16, 32 // fsdp)
    for ours, theirs in zip(numbers(tmp_path / "split"), numbers(tmp_path / "1"), strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
        np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-4)


def test_non_finite_values_stop_the_run_and_name_the_last_checkpoint(train, tiny, tmp_path):
    config = tiny(**{"schedule.learning_rate": 1e15})
    with pytest.raises(UserError, match=r"non-finite at step [34].*checkpoint of step 2"):
        train(config, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_run_goes_on_only_with_the_config_it_was_started_with(train, tiny, tmp_path):
    train(tiny(), tmp_path)
    with pytest.raises(UserError, match=r"schedule.learning_rate: 0.002 -> 0.1.*--allow_changes="):
        train(tiny(**{"schedule.learning_rate": 0.1, "seed": 4}), tmp_path)
    changed = tiny(**{"schedule.learning_rate": 0.1, "log.every": "3 steps", "seed": 4})
    train(changed, tmp_path, allowed_changes=["schedule.learning_rate", "seed"])
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 12}, "config.batch_size=12 does not divide by the 8 devices.* is 16"),
        ({"mesh.data": 3}, "config.mesh.data=-1"),
        ({"duration": "6 stops"}, "'6 stops' is no duration"),
        ({"duration": "8 examples"}, "config.duration='8 examples' is less than one step"),
        ({"checkpoint.every": "0 steps"}, "config.checkpoint.every='0 steps' is less than one"),
        ({"checkpoint.keep_every": "8 examples"}, "config.checkpoint.keep_every='8 examples'"),
        ({"log.every": "6 stops"}, "'6 stops' is no duration"),
        ({"data.train.path": "/no/such"}, "/no/such"),
        ({"model.image.model": "/no/such"}, "config.model.image.model"),
        ({"data.max_text_length": 33}, "max_text_length"),
    ],
)
def test_bad_input_leaves_no_run_folder(train, tiny, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(tiny(**changes), tmp_path / "run", devices=8)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workdir", ["file/run", "/proc/run"])
def test_a_run_folder_that_cannot_be_written(train, tiny, tmp_path, workdir):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run cannot be written \(.*choose another --workdir\.$"):
        train(tiny(), tmp_path / workdir)


def test_reading_a_run_leaves_alone_what_it_is_just_saving(train, tiny, tmp_path):
    train(tiny(duration="2 steps"), tmp_path)
    unfinished = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert load_run(tmp_path).step == 2
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
    setup = prepare(config, find_towers(config.model), make_mesh(config.mesh))
    optimizer = make_optimizer(config.optimizer, optax.constant_schedule(0.1), setup.policy)
    state = abstract_state(setup, optimizer)
    step = functools.partial(
        UNPATCHED_STEP,
        embed=setup.module.apply,
        loss=LOSSES["softmax"],
        optimizer=optimizer,
        schedule=optax.constant_schedule(0.1),
        seed=0,
    )
    batch = {
        name: jax.ShapeDtypeStruct((16, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in example_batch(setup.image_transform, setup.tokenizer).items()
    }
    image = functools.partial(setup.module.apply, method="encode_image")
    return {
        "params": size(state.params),
        "opt_state": size(state.opt_state),
        "flops": flops(step, state, setup.abstract_frozen, batch),
        "image_forward_flops": flops(image, {"params": setup.abstract}, batch["pixel_values"]),
    }


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if leaf.ndim)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(("first", "second"), [(8, 1), (8, 2), (8, 4), (1, 8), (2, 8), (4, 8)])
def test_a_checkpoint_moves_to_other_devices(tiny, tmp_path, first, second):
    config = tiny(**{"policy.lock": "UU"})
    states = []
    for devices, fsdp in ((first, min(first, 2)), (second, min(second, 4))):
        mesh = make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:devices])
        setup = prepare(config, find_towers(config.model), mesh)
        optimizer = make_optimizer(config.optimizer, optax.constant_schedule(0.1), setup.policy)
        with Checkpoints(tmp_path) as checkpoints:
            state, _, position = first_or_latest_state(
                config, setup, find_towers(config.model), optimizer, tmp_path, checkpoints
            )
            if position is None:
                checkpoints.save(1, state, {"next_batch": 1}, {})
        states.append(state)
    assert position == {"next_batch": 1}
    assert states[1].params["logit_scale"].sharding.mesh.size == second
    assert_same(states[1].params, states[0].params)
