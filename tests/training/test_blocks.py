"""Blocks of a tower that are locked, slowed and trained one by one."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lit_jax import export
from lit_jax.config import PolicyConfig
from lit_jax.errors import Preempted, UserError
from lit_jax.models.families import build_tower
from lit_jax.optimizer_config import AdamW
from lit_jax.training.checkpoints import Checkpoints
from lit_jax.training.optimizers import make_optimizer
from lit_jax.training.policy import find_cuts, resolve_policy, warn_of_full_rate
from lit_jax.training.workdir import load_run
from lit_jax.trees import flatten, restack, unflatten
from lit_jax.weights.load import parameter_shapes
from lit_jax.weights.name_tables import FAMILIES
from lit_jax.weights.names import to_tensors
from tests.training.conftest import stop_after

EXTEND = Path(__file__).parents[2] / "docs" / "extend.md"
VIT = {
    "model_type": "vit",
    "hidden_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 6,
    "image_size": 8,
    "patch_size": 4,
}
CONVNEXT = {"model_type": "convnext", "hidden_sizes": [4, 8], "depths": [2, 3], "num_stages": 2}


def shapes(hf=VIT, cuts=(), pooling="pooler"):
    tower = build_tower(hf, pooling=pooling, dtype="float32").clone(cuts=cuts)
    projection = {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    return {
        "vision_model": parameter_shapes(tower, tower.example_input),
        "visual_projection": projection,
        "logit_scale": jax.ShapeDtypeStruct((), jnp.float32),
    }


def resolved(hf=VIT, pooling="pooler", **fields):
    """The cuts of the image tower, and the policy of the tower that is cut there."""
    config = PolicyConfig(**fields)
    cuts = find_cuts(config, shapes(hf, pooling=pooling)).get("vision_model", ())
    return cuts, resolve_policy(config, shapes(hf, cuts, pooling))


def trained(policy):
    """What trains of the image tower, to the stack or the layer."""
    paths = (path.split("/") for path, yes in policy.trainable.items() if yes)
    return {"/".join(path[1:3]) for path in paths if path[0] == "vision_model"}


@pytest.mark.parametrize(
    ("pooling", "last", "cuts", "stacks"),
    [
        ("pooler", 1, (), {"encoder/layer_3"}),
        ("pooler", 2, ("encoder/layer_2",), {"encoder/layer_from_2", "encoder/layer_3"}),
        ("mean", 1, ("encoder/layer_3",), {"encoder/layer_from_3"}),
        ("mean", 4, (), {"encoder/layer"}),
    ],
)
def test_the_last_blocks_of_a_locked_tower_train_with_what_follows_them(
    pooling, last, cuts, stacks
):
    found, policy = resolved(pooling=pooling, unlock_last=last)
    assert found == cuts
    after = {"layernorm/scale", "layernorm/bias"} | (
        {"pooler/dense"} if pooling == "pooler" else set()
    )
    assert trained(policy) == stacks | after


@pytest.mark.parametrize(
    ("rule", "cuts", "stacks"),
    [
        ("encoder/layer_(2|3)/.*", ("encoder/layer_2",), {"layer_from_2", "layer_3"}),
        ("encoder/layer_1/.*", ("encoder/layer_1", "encoder/layer_2"), {"layer_from_1"}),
        ("encoder/layer/.*", (), {"layer", "layer_3"}),
        (
            "encoder/layer_[12]/mlp/fc1/.*",
            ("encoder/layer_1",),
            {"layer_from_1"},
        ),
    ],
)
def test_rules_name_blocks_by_number_or_all_of_them(rule, cuts, stacks):
    found, policy = resolved(trainable=((f"vision_model/{rule}", True),))
    assert found == cuts
    assert trained(policy) == {f"encoder/{stack}" for stack in stacks}


def test_a_rule_for_rates_cuts_nothing():
    rules = (
        ("vision_model/encoder/layer_[13]/mlp/.*", 0.5),
        ("vision_model/encoder/layer/.*", 0.1),
    )
    cuts, policy = resolved(lock="UU", learning_rate=rules, weight_decay=rules[:1])
    assert cuts == ()
    of_stack = policy.learning_rate["vision_model/encoder/layer/mlp/fc1/kernel"]
    np.testing.assert_allclose(of_stack, np.reshape([0.1, 0.5, 0.1], (3, 1, 1)))
    assert policy.learning_rate["vision_model/encoder/layer_3/mlp/fc1/kernel"] == 0.5
    assert policy.learning_rate["vision_model/encoder/layer_3/attention/key/bias"] == 0.1
    decay = policy.weight_decay["vision_model/encoder/layer/mlp/fc1/bias"]
    np.testing.assert_allclose(decay, np.reshape([0, 0.5, 0], (3, 1)))


def beit_scale(name, depth, decay):
    """Of unilm's BEiT: optim_factory.get_num_layer_for_vit and LayerDecayValueAssigner."""
    values = [decay ** (depth + 1 - i) for i in range(depth + 2)]
    if name.startswith("embeddings"):
        return values[0]
    if "layer_" in name:
        return values[int(name.split("layer_")[1].split("/")[0]) + 1]
    return values[-1]


def test_layer_decay_is_beits():
    rule = (("vision_model/.*", 0.5),)
    _, policy = resolved(lock="UU", layer_decay={"vision_model": 0.8}, learning_rate=rule)
    for path, rate in policy.learning_rate.items():
        tower, _, name = path.partition("/")
        if tower != "vision_model":
            assert rate == 1.0, path
            continue
        names = [name.replace("layer/", f"layer_{i}/") for i in range(3)]
        expected = [0.5 * beit_scale(n, 4, 0.8) for n in (names if names[0] != name else [name])]
        np.testing.assert_allclose(np.ravel(rate), expected, rtol=1e-6, err_msg=path)


def test_layer_decay_counts_blocks_over_all_stages():
    _, policy = resolved(CONVNEXT, lock="UU", layer_decay={"vision_model": 0.5})
    rates = {path.removeprefix("vision_model/"): r for path, r in policy.learning_rate.items()}
    kernel = rates["encoder/stages_1/layer/pwconv1/kernel"]
    np.testing.assert_allclose(kernel.ravel(), [0.5**3, 0.5**2, 0.5])
    np.testing.assert_allclose(
        rates["encoder/stages_0/layer/pwconv1/bias"].ravel(), [0.5**5, 0.5**4]
    )
    assert rates["encoder/stages_1/downsampling_layer_1/projection/kernel"] == 0.5**3
    assert rates["embeddings/layernorm/scale"] == 0.5**6
    assert rates["layernorm/scale"] == 1.0


def test_blocks_of_a_stage_are_locked_one_by_one():
    cuts, policy = resolved(CONVNEXT, unlock_last=2)
    assert cuts == ("encoder/stages_1/layer_1",)
    paths = {path for path, yes in policy.trainable.items() if yes and "stages" in path}
    assert {path.split("/")[3] for path in paths} == {"layer_from_1"}


def test_the_layer_between_two_unlocked_stages_trains():
    _, policy = resolved(CONVNEXT, unlock_last=4)
    trains = {
        path.split("/")[3]
        for path, yes in policy.trainable.items()
        if yes and path.startswith("vision_model/encoder/stages_1/")
    }
    assert trains == {"downsampling_layer_0", "downsampling_layer_1", "layer"}


def test_the_table_calls_blocks_as_rules_do():
    sharding = jax.NamedSharding(jax.make_mesh((1,), ("data",)), jax.P())
    cuts, policy = resolved(unlock_last=2, layer_decay={"vision_model": 0.5})
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes(cuts=cuts),
    )
    lines = {line.split()[0]: line for line in policy.table(abstract).splitlines()}
    fc1 = "vision_model/encoder/layer_{}/mlp/fc1/kernel"
    assert lines[fc1.format("0-1")].split()[-1] == "locked"
    assert lines[fc1.format("2")].endswith("lr x0.25  decay x1")
    assert lines[fc1.format("3")].endswith("lr x0.5  decay x1")
    _, policy = resolved(lock="UU", layer_decay={"vision_model": 0.5})
    whole = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes()
    )
    assert "lr x0.0625 to x0.25  decay x1" in policy.table(whole)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"lock": "UU", "unlock_last": 1}, "unlock_last=1"),
        ({"unlock_last": 5}, r"unlock_last .*5\b.*\b4"),
        ({"layer_decay": {"vision_model": 0.5}}, "layer_decay.vision_model"),
        ({"lock": "UU", "layer_decay": {"image": 0.5}}, "layer_decay.image"),
        ({"trainable": (("vision_model/encoder/layer_4/.*", True),)}, "layer_4/.*' matches no"),
    ],
)
def test_keys_without_effect_are_refused(fields, key):
    with pytest.raises(UserError, match=key.replace("/.*'", r"/\.\*'")):
        resolved(**fields)


def test_unlocked_blocks_at_the_full_rate_are_told(caplog):
    for fields, is_told in (
        ({"unlock_last": 1}, True),
        ({"unlock_last": 1, "learning_rate": ((".*/layer_3/.*", 0.1),)}, False),
        ({"unlock_last": 1, "layer_decay": {"vision_model": 0.1}}, False),
    ):
        caplog.clear()
        config = PolicyConfig(**fields)
        warn_of_full_rate(config, resolve_policy(config, shapes()), shapes())
        assert len(caplog.records) == is_told, fields


def test_each_block_moves_at_its_own_rate():
    params = {"text_model": {"layer": {"kernel": jnp.full((3, 2, 2), 2.0)}}}
    config = PolicyConfig(
        lock="uu",
        learning_rate=((r"text_model/layer_1/.*", 0.5),),
        weight_decay=((r"text_model/layer_2/.*", 0.0),),
    )
    optimizer = make_optimizer(
        AdamW(weight_decay=0.5, clip_norm=None),
        lambda _: 0.1,
        resolve_policy(config, params),
    )
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    moved = updates["text_model"]["layer"]["kernel"][:, 0, 0]
    # Adam's first direction is 1, the decay adds 0.5 * 2.
    np.testing.assert_allclose(moved, [-0.1 * 2, -0.05 * 2, -0.1], rtol=1e-5)


def test_muon_covers_all_blocks_in_a_stack_or_not(usual_emitters):
    """As docs/extend.md has it: its update of a matrix has singular values of one size."""
    (code,) = re.findall(r"^```python\n(import optax.*?)^```$", EXTEND.read_text(), re.M | re.S)
    names: dict = {}
    exec(code, names)
    random = np.random.default_rng(0)
    kernel = jnp.asarray(random.normal(size=(4, 6)), jnp.float32)
    grad = jnp.asarray(random.normal(size=(4, 6)), jnp.float32)

    def tree(leaf):
        blocks = {"layer": {"kernel": jnp.stack([leaf] * 3)}, "layer_3": {"kernel": leaf}}
        return {"text_model": {**blocks, "pooler": {"kernel": leaf}}}

    optimizer = names["muon"](1.0)
    params = tree(kernel)
    update = jax.jit(optimizer.update, compiler_options=usual_emitters)
    updates, _ = update(tree(grad), optimizer.init(params), params)
    moved = updates["text_model"]
    for block in (*moved["layer"]["kernel"], moved["layer_3"]["kernel"]):
        np.testing.assert_allclose(block, moved["layer"]["kernel"][0], rtol=1e-5, atol=1e-6)
        singular = np.linalg.svd(block, compute_uv=False)
        assert singular.max() < 2 * singular.min()
    # The first step of Adam, which moves all that is in no block, is equally long for every number.
    assert np.ptp(np.abs(moved["pooler"]["kernel"])) < 1e-3


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
