"""Stacks of blocks that are cut where training and locked ones meet."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lit_jax import export
from lit_jax.errors import Preempted, UserError
from lit_jax.models.families import build_tower
from lit_jax.training.checkpoints import Checkpoints
from lit_jax.training.workdir import load_run
from lit_jax.trees import flatten, restack, unflatten
from lit_jax.weights.load import parameter_shapes
from lit_jax.weights.name_tables import FAMILIES
from lit_jax.weights.names import to_tensors
from tests.training.conftest import stop_after
from tests.training.test_blocks import CONVNEXT, VIT

DEPTH_3 = {
    "convnext": {**CONVNEXT, "depths": [1, 3], "image_size": 16},
    "modernbert": {
        "model_type": "modernbert",
        "vocab_size": 11,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 6,
        "num_hidden_layers": 4,
    },
    "vit": VIT,
}


@pytest.mark.parametrize(
    ("model_type", "cuts"),
    [
        ("vit", ("encoder/layer_1", "encoder/layer_2")),
        ("modernbert", ("encoder/layer_2",)),
        ("convnext", ("encoder/stages_1/layer_2",)),
    ],
)
def test_a_tower_computes_the_same_wherever_it_is_cut(model_type, cuts, usual_emitters):
    """Its output, its gradient and the tensors of its files."""
    tower = build_tower(
        DEPTH_3[model_type],
        pooling={"modernbert": "mean"}.get(model_type, "pooler"),
        dtype="float32",
    )
    random = np.random.default_rng(0)
    whole = jax.tree.map(
        lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32),
        parameter_shapes(tower, tower.example_input),
    )
    x = jnp.asarray(random.integers(0, 11, tower.example_input.shape)).astype(
        tower.example_input.dtype
    )
    cut = tower.clone(cuts=cuts)
    parts = restack(whole, parameter_shapes(cut, x))
    assert flatten(parts).keys() != flatten(whole).keys()

    def gradient(tower, params):
        def loss(params):
            pooled = tower.apply({"params": params}, x).pooled
            return jnp.sin(pooled).sum(), pooled

        both = jax.grad(loss, has_aux=True)
        return jax.jit(both, compiler_options=usual_emitters)(params)

    (expected, pooled), (actual, pooled_of_cut) = gradient(tower, whole), gradient(cut, parts)
    np.testing.assert_array_equal(pooled_of_cut, pooled)
    back = restack(jax.tree.map(np.asarray, actual), whole)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * scale), back, expected
    )
    family = FAMILIES[tower.config.model_type]
    tensors = [to_tensors(flatten(params), family, "torch") for params in (whole, parts)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        np.testing.assert_array_equal(tensor, tensors[1][name], err_msg=name)


def test_stacks_are_cut_and_joined_without_loss():
    whole = {"encoder": {"layer": {"bias": np.arange(8.0).reshape(4, 2)}}, "scale": np.ones(2)}
    cut = {
        "encoder/layer/bias": (2, 2),
        "encoder/layer_from_2/bias": (1, 2),
        "encoder/layer_3/bias": (2,),
        "scale": (2,),
        "drawn": (5,),
    }
    cut = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in cut.items()}
    parts = restack(whole, unflatten(cut))
    assert {path: leaf.shape for path, leaf in flatten(parts).items()} == {
        path: leaf.shape for path, leaf in cut.items() if path != "drawn"
    }
    assert flatten(parts)["scale"] is whole["scale"]
    jax.tree.map(np.testing.assert_array_equal, restack(parts, whole), whole)


@pytest.mark.long
def test_a_run_trains_the_last_block_alone_resumes_and_exports(
    train, tiny, towers, tmp_path, monkeypatch
):
    config = tiny(**{"policy.unlock_last": 1, "model.image.pooling": "mean", "duration": "3 steps"})
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Preempted):
            train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    resumed = load_run(tmp_path / "run", dtype="float32").params
    train(config, tmp_path / "at_once")
    at_once = load_run(tmp_path / "at_once", dtype="float32").params
    jax.tree.map(np.testing.assert_array_equal, resumed, at_once)
    fc1 = "vision_model/encoder/layer/mlp/fc1/kernel"
    for folder, path in (("frozen", fc1), ("checkpoints/3", f"params/{fc1}")):
        sums = (tmp_path / "run" / folder / "sums.json").read_text()
        assert path in sums
        assert "layer_from" not in sums

    folders = [f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'exported'}"]
    assert export.main(folders) == 0
    first = safetensors.numpy.load_file(f"{towers['image']}/model.safetensors")
    last = safetensors.numpy.load_file(tmp_path / "exported" / "model.safetensors")
    moved = {
        name
        for name, tensor in first.items()
        if not name.startswith("pooler") and (last[f"vision_model.{name}"] != tensor).any()
    }
    blocks = {name for name in first if name.startswith("encoder.layer.1.")}
    assert moved == blocks | {"layernorm.weight", "layernorm.bias"}

    table = (tmp_path / "run" / "parameters.txt").read_text().splitlines()
    fc1 = {line.split()[0]: line for line in table if "vision" in line and "fc1/kernel" in line}
    assert fc1["vision_model/encoder/layer_0/mlp/fc1/kernel"].endswith("locked")
    assert "lr x1" in fc1["vision_model/encoder/layer_1/mlp/fc1/kernel"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["policy"]["unlock_last"] == 1


@pytest.mark.long
def test_a_run_goes_on_with_fewer_trained_blocks_and_not_with_more(
    train, tiny, tmp_path, monkeypatch
):
    """The blocks that stop keep what they have learned; each step is read as it was trained."""
    image = {"model.image.pooling": "mean", "checkpoint.keep_last": 9}
    config = tiny(**image, **{"policy.unlock_last": 2, "duration": "4 steps"})
    workdir = tmp_path / "run"
    train(config, workdir)
    before = {step: flatten(load_run(workdir, step=step).params) for step in (2, 4)}
    fewer = tiny(**image, **{"policy.unlock_last": 1, "duration": "8 steps"})
    allowed = ["policy.unlock_last", "duration"]
    # Killed before the first save, and started again.
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(fewer, workdir, allowed_changes=allowed)
    train(fewer, workdir, allowed_changes=allowed)
    for step, expected in before.items():
        found = flatten(load_run(workdir, step=step).params)
        assert found.keys() == expected.keys()
        for path, leaf in expected.items():
            np.testing.assert_array_equal(found[path], leaf, err_msg=f"{step} {path}")
    last = flatten(restack(load_run(workdir).params, unflatten(before[4])))
    fc1 = "vision_model/encoder/layer/mlp/fc1/kernel"
    assert (before[2][fc1][0] != before[4][fc1][0]).any()
    np.testing.assert_array_equal(last[fc1][0], before[4][fc1][0])
    assert (last[fc1][1] != before[4][fc1][1]).any()
    sums = json.loads((workdir / "checkpoints" / "8" / "sums.json").read_text())["arrays"]
    assert fc1 in json.loads((workdir / "frozen_from_4" / "sums.json").read_text())
    assert f"params/{fc1}" in sums
    # The blocks that begin to train have no moments, whichever the policy of now is.
    for policy in ({"policy.unlock_last": 2}, {"policy.lock": "UU", "policy.unlock_last": 0}):
        more = tiny(**image, **policy, duration="9 steps")
        with pytest.raises(UserError, match=r"checkpoints/8 .*--allow_changes"):
            train(more, workdir, allowed_changes=[*policy, "policy.unlock_last", "duration"])
    assert (
        train(tiny(**image, **{"policy.unlock_last": 1, "duration": "8 steps"}), workdir).step == 8
    )


@pytest.mark.long
def test_stacks_that_differ_in_their_blocks_alone_are_told_apart(train, tiny, tmp_path):
    """Block 0 and block 1 have the same names and shapes in a checkpoint."""
    rules = [((f"vision_model/encoder/layer_{n}/.*", True),) for n in (0, 1)]
    options = {"model.image.pooling": "mean", "duration": "2 steps"}
    train(tiny(**options, **{"policy.trainable": rules[0]}), tmp_path / "run")
    with pytest.raises(UserError, match=r"checkpoints/2 .*--allow_changes"):
        train(
            tiny(**options, **{"policy.trainable": rules[1]}),
            tmp_path / "run",
            allowed_changes=["policy.trainable"],
        )
