"""Blocks of a tower that are locked, slowed and trained one by one."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.config import PolicyConfig
from lit_jax.errors import UserError
from lit_jax.models.families import build_tower
from lit_jax.optimizer_config import AdamW
from lit_jax.training.optimizers import make_optimizer
from lit_jax.training.policy import find_cuts, resolve_policy, warn_of_full_rate
from lit_jax.weights.load import parameter_shapes

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
