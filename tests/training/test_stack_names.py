"""Cut stacks have the names of uncut ones in a run folder, and come back bit for bit, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lit_jax.config import MeshConfig, PolicyConfig
from lit_jax.distributed.mesh import make_mesh
from lit_jax.distributed.sharding import optimizer_shardings, parameter_shardings
from lit_jax.optimizer_config import Adafactor, AdamW, Lamb, Lion
from lit_jax.training.checkpoints import Checkpoints, restore_params
from lit_jax.training.integrity import by_path
from lit_jax.training.optimizers import make_optimizer
from lit_jax.training.policy import resolve_policy
from lit_jax.training.restore import rearrange_state
from lit_jax.training.stack_names import cut_stacks, join_stacks, uncut_stacks
from lit_jax.training.train_step import State, shardings_of
from lit_jax.trees import flatten, unflatten

RNG = np.random.default_rng(0)
# A stack that is cut and has locked blocks, a block outside the stack, and stages with stacks of their own.
SHAPES = {
    "text_model/encoder/layer/mlp/kernel": (2, 36, 40),
    "text_model/encoder/layer/mlp/bias": (2, 40),
    "text_model/encoder/layer_from_5/mlp/kernel": (1, 36, 40),
    "text_model/encoder/layer_from_5/mlp/bias": (1, 40),
    "text_model/encoder/layer_from_6/mlp/kernel": (3, 36, 40),
    "text_model/encoder/layer_from_6/mlp/bias": (3, 40),
    "text_model/encoder/layer_9/mlp/kernel": (36, 40),
    "vision_model/encoder/layer_from_2/kernel": (1, 8),
    "vision_model/encoder/layer_from_4/kernel": (2, 8),
    "vision_model/encoder/layer_from_7/kernel": (1, 8),
    "logit_scale": (),
}
UNCUT = frozenset(
    {
        "text_model/encoder/layer",
        "vision_model/encoder/layer_from_1",
        "vision_model/encoder/layer_from_4",
    }
)
JOINED = {
    "text_model/encoder/layer/mlp/kernel": (6, 36, 40),
    "text_model/encoder/layer/mlp/bias": (6, 40),
    "text_model/encoder/layer_9/mlp/kernel": (36, 40),
    # Only renamed: the first stage has a single part here.
    "vision_model/encoder/layer_from_1/kernel": (1, 8),
    "vision_model/encoder/layer_from_4/kernel": (3, 8),
    "logit_scale": (),
}


def params_on(mesh, shapes=SHAPES):
    params = unflatten({path: RNG.normal(size=s).astype(np.float32) for path, s in shapes.items()})
    return jax.device_put(params, parameter_shardings(params, mesh))


def abstract_of(tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_parts_have_the_name_of_the_uncut_stack_and_come_back():
    params = params_on(make_mesh(MeshConfig(fsdp=4), jax.devices()[:4]))
    joined = join_stacks(params, UNCUT)
    flat = flatten(joined)
    assert {path: leaf.shape for path, leaf in flat.items()} == JOINED
    kernel = flat["text_model/encoder/layer/mlp/kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (6, 36, 10)
    parts = [flatten(params)[f"text_model/encoder/{name}/mlp/kernel"] for name in (
        "layer", "layer_from_5", "layer_from_6"
    )]  # fmt: skip
    np.testing.assert_array_equal(kernel, np.concatenate(parts))
    assert {
        p: leaf.shape for p, leaf in flatten(join_stacks(abstract_of(params), UNCUT)).items()
    } == JOINED
    assert_same(cut_stacks(joined, UNCUT, abstract_of(params)), params)
    # What has the model's names already stays as it is, as do uncut models.
    assert_same(cut_stacks(params, UNCUT, abstract_of(params)), params)
    assert join_stacks(joined, UNCUT) is joined
    assert uncut_stacks(joined) == UNCUT


def test_a_part_on_its_own_is_not_copied():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    part = jax.device_put(
        np.ones((3, 8), np.float32), parameter_shardings({"x": np.ones(3)}, mesh)["x"]
    )
    params = {"text_model": {"encoder": {"layer_from_5": {"bias": part}}}}
    joined = join_stacks(params, UNCUT)
    assert joined["text_model"]["encoder"]["layer"]["bias"] is part
    assert (
        cut_stacks(joined, UNCUT, abstract_of(params))["text_model"]["encoder"]["layer_from_5"][
            "bias"
        ]
        is part
    )


OPTIMIZERS = {
    "adamw": AdamW(),
    "lamb": Lamb(),
    "lion": Lion(momentum_dtype="bfloat16"),
    "adafactor": Adafactor(),
    "labels": optax.multi_transform(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)},
        lambda params: jax.tree.map(lambda leaf: "a" if leaf.ndim > 2 else "b", params),
    ),
}


def state_on(mesh, name, shapes=SHAPES):
    params = params_on(mesh, shapes)
    optimizer = OPTIMIZERS[name]
    if not isinstance(optimizer, optax.GradientTransformation):
        policy = resolve_policy(PolicyConfig(lock="uu"), params)
        optimizer = make_optimizer(optimizer, optax.constant_schedule(0.1), policy)
    shapes = jax.eval_shape(optimizer.init, abstract_of(params))
    shardings = optimizer_shardings(shapes, abstract_of(params), mesh)

    def trained():
        return jax.tree.map(
            lambda leaf, sharding: jax.device_put(
                RNG.integers(-99, 99, leaf.shape).astype(leaf.dtype), sharding
            ),
            shapes,
            shardings,
        )

    step = jax.device_put(jnp.int32(3), shardings_of(params)["logit_scale"])
    return State(step, params, trained())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_is_saved_under_uncut_names_and_restored_on_another_mesh(tmp_path, name):
    one, four = (make_mesh(MeshConfig(fsdp=n), jax.devices()[:n]) for n in (1, 4))
    state = state_on(four, name)
    with Checkpoints(tmp_path, keep_last=1, uncut=UNCUT) as checkpoints:
        checkpoints.save(3, state, {"next_batch": 3}, {})
        checkpoints.wait()
        sums = (tmp_path / "checkpoints" / "3" / "sums.json").read_text()
        assert "layer_from_5" not in sums
        assert "layer_from_6" not in sums
        assert_same(checkpoints.restore(abstract_of(state))[0], state)
        elsewhere = abstract_of(state_on(one, name))
        restored, _ = checkpoints.restore(elsewhere)
    for found, expected, like in zip(
        *map(jax.tree.leaves, (restored, state, elsewhere)), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
        assert found.sharding.is_equivalent_to(like.sharding, found.ndim)
    _, params = restore_params(tmp_path, abstract_of(state.params), uncut=UNCUT)
    assert_same(params, state.params)


def test_a_checkpoint_of_before_with_the_names_of_cut_stacks_is_read(tmp_path):
    state = state_on(make_mesh(MeshConfig(), jax.devices()[:1]), "adamw")
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(3, state, {"next_batch": 3}, {})
        checkpoints.wait()
    assert "layer_from_5" in (tmp_path / "checkpoints" / "3" / "sums.json").read_text()
    with Checkpoints(tmp_path, keep_last=1, uncut=UNCUT) as checkpoints:
        assert_same(checkpoints.restore(abstract_of(state))[0], state)
    _, params = restore_params(tmp_path, abstract_of(state.params), uncut=UNCUT)
    assert_same(params, state.params)


# Block 4 stops, and so does one of the two blocks of a stack.
FEWER = {
    **{path: shape for path, shape in SHAPES.items() if "/layer_from_" not in path},
    "text_model/encoder/layer_from_7/mlp/kernel": (2, 36, 40),
    "text_model/encoder/layer_from_7/mlp/bias": (2, 40),
    "vision_model/encoder/layer_from_5/kernel": (1, 8),
}


@pytest.mark.parametrize("name", ["adamw", "lion", "labels"])
def test_fewer_blocks_keep_their_part_of_the_state_sharded(name):
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    state = state_on(mesh, name)
    wanted = abstract_of(state_on(mesh, name, FEWER))
    found = by_path(rearrange_state(state, wanted))
    old = by_path(state)
    for path, leaf in by_path(wanted).items():
        assert found[path].sharding.is_equivalent_to(leaf.sharding, len(leaf.shape)), path
        source = path.replace("layer_from_7", "layer_from_6").replace(
            "layer_from_5", "layer_from_4"
        )
        expected = old[source][1:] if source != path else old[path]
        np.testing.assert_array_equal(found[path], expected, err_msg=path)
    with pytest.raises(ValueError, match=r"layer_from_\d/mlp/\w+ "):
        rearrange_state(state_on(mesh, name, FEWER), abstract_of(state))


def test_moments_that_are_not_of_single_blocks_are_refused():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = state_on(mesh, "adafactor")
    with pytest.raises(ValueError, match=r"^\S+/\S+ "):
        rearrange_state(state, abstract_of(state_on(mesh, "adafactor", FEWER)))
    assert_same(rearrange_state(state, abstract_of(state)), state)
