import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_jax.models.families import TEXT, VISION, build_tower
from lit_jax.trees import flatten
from lit_jax.weights import name_tables, names
from lit_jax.weights.load import parameter_shapes

shapes = st.lists(st.integers(1, 4), max_size=4).map(tuple)


def test_every_tower_family_has_an_entry():
    assert set(name_tables.FAMILIES) == {*VISION, *TEXT}


@given(
    path=st.sampled_from(["a/kernel", "a/bias", "a/scale", "a/embedding", "cls_token"]),
    shape=shapes,
    layout=st.sampled_from(["torch", "flax"]),
)
def test_axes_of_a_file_and_back(path, shape, layout):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    slot = names.Slot("name")
    in_file = names.to_file(path, array, layout)
    assert in_file.shape == names.shape_in_file(path, shape, slot, layout)
    np.testing.assert_array_equal(names.from_file(path, in_file, slot, layout), array)


def test_axes_of_torch():
    linear_IxO, conv_HxWxIxO = np.zeros((2, 3)), np.zeros((2, 3, 4, 5))
    assert names.to_file("a/kernel", linear_IxO, "torch").shape == (3, 2)
    assert names.to_file("a/kernel", conv_HxWxIxO, "torch").shape == (5, 4, 2, 3)
    assert names.to_file("a/embedding", linear_IxO, "torch").shape == (2, 3)


def name_of(path, family, layout="torch", shape=()):
    (slot, *_), _ = names.target_slots(path, shape, family, layout)
    return slot.name


def test_a_stack_has_a_slot_for_each_layer():
    path = "encoder/layer/mlp/fc2/kernel"
    slots, shape = names.target_slots(path, (2, 5, 6), name_tables.FAMILIES["bert"], "torch")
    assert shape == (5, 6)
    assert [slot.name for slot in slots] == [
        "encoder.layer.0.output.dense.weight",
        "encoder.layer.1.output.dense.weight",
    ]
    assert name_of(path, name_tables.FAMILIES["bert"], "flax", (2, 5, 6)).endswith("dense.kernel")


def test_a_stack_behind_others_counts_on():
    path = "encoder/layer_from_9/projection/batchnorm/var"
    slots, shape = names.target_slots(path, (2, 5), name_tables.FAMILIES["efficientnet"], "torch")
    assert shape == (5,)
    assert [slot.name for slot in slots] == [
        f"encoder.blocks.{layer}.projection.project_bn.running_var" for layer in (9, 10)
    ]
    (alone,), shape = names.target_slots(
        "encoder/layer_9/expansion/batchnorm/mean",
        (5,),
        name_tables.FAMILIES["efficientnet"],
        "torch",
    )
    assert shape == (5,)
    assert alone.name == "encoder.blocks.9.expansion.expand_bn.running_mean"


def test_a_stack_may_be_in_a_stage():
    path = "encoder/stages_2/layer/dwconv/kernel"
    slots, shape = names.target_slots(
        path, (1, 7, 7, 1, 8), name_tables.FAMILIES["convnext"], "torch"
    )
    assert shape == (7, 7, 1, 8)
    assert [slot.name for slot in slots] == ["encoder.stages.2.layers.0.dwconv.weight"]


def test_a_running_variance_has_the_counter_that_torch_wants():
    family = name_tables.FAMILIES["efficientnet"]
    params = {f"embeddings/batchnorm/{leaf}": np.ones(3) for leaf in ("mean", "var")}
    tensors = names.to_tensors(params, family, "torch")
    counter = tensors.pop("embeddings.batchnorm.num_batches_tracked")
    assert counter.shape == ()
    assert counter.dtype == np.int64
    assert set(tensors) == {f"embeddings.batchnorm.running_{leaf}" for leaf in ("mean", "var")}
    flax = names.to_tensors(params, family, "flax")
    assert set(flax) == {f"embeddings.batchnorm.{leaf}" for leaf in ("mean", "var")}


def test_leaves_of_torch():
    vit = name_tables.FAMILIES["vit"]
    assert name_of("layernorm/scale", vit) == "layernorm.weight"
    assert name_of("layernorm/scale", vit, "flax") == "layernorm.scale"
    assert name_of("embeddings/cls_token", vit) == "embeddings.cls_token"
    assert name_of("logit_scale", name_tables.SYSTEMS["clip"]) == "logit_scale"


FUSED = name_tables.Family(
    architecture="",
    fused=(
        name_tables.FusedWeight(
            r"\.(query|key|value)\.(\w+)$", r".qkv.\2", ("query", "key", "value")
        ),
    ),
)


@pytest.mark.parametrize("layout", ["torch", "flax"])
def test_fused_parameters_are_one_tensor_of_the_file(layout):
    rng = np.random.default_rng(0)
    params = {
        f"encoder/layer/{name}/{leaf}": rng.normal(size=(2, *shape))
        for name in ("key", "query", "value")
        for leaf, shape in (("kernel", (4, 3)), ("bias", (3,)))
    }
    tensors = names.to_tensors(params, FUSED, layout)
    weight = "weight" if layout == "torch" else "kernel"
    assert set(tensors) == {
        f"encoder.layer.{i}.qkv.{leaf}" for i in (0, 1) for leaf in (weight, "bias")
    }
    kernels = [params[f"encoder/layer/{name}/kernel"][1] for name in ("query", "key", "value")]
    fused = tensors[f"encoder.layer.1.qkv.{weight}"]
    np.testing.assert_array_equal(fused.T if layout == "torch" else fused, np.hstack(kernels))
    for path, array in params.items():
        slots, shape = names.target_slots(path, array.shape, FUSED, layout)
        for layer, slot in enumerate(slots):
            tensor = tensors[slot.name]
            assert tensor.shape == names.shape_in_file(path, shape, slot, layout)
            np.testing.assert_array_equal(names.from_file(path, tensor, slot, layout), array[layer])


def test_what_a_file_splits_is_not_fused():
    """transformers 5 writes DINOv2's gate and up apart with save_original_format=False."""
    family = name_tables.FAMILIES["dinov2"]
    path, prefix = "encoder/layer/mlp/up/kernel", "encoder.layer.0.mlp."
    for in_file, expected in (
        (["weights_in.weight", "weights_out.weight"], "weights_in.weight"),
        (["gate_proj.weight", "up_proj.weight", "down_proj.weight"], "up.weight"),
    ):
        known = names.recognise([prefix + name for name in in_file], family).names
        name = name_of(path, names.fused_as_in(known, family), shape=(1, 2, 3))
        assert name == prefix + expected
        assert name in known


@pytest.mark.parametrize("name", name_tables.FAMILIES)
def test_usual_names_are_left_alone(name):
    """An alias that touched a usual name would make the usual files unreadable."""
    family = name_tables.FAMILIES[name]
    _, module_class = {**VISION, **TEXT}[name]
    module = build_tower({"model_type": name}, pooling=module_class.poolings[0], dtype="float32")
    shapes = flatten(parameter_shapes(module, module.example_input))
    usual = {
        slot.name
        for path, leaf in shapes.items()
        for slot in names.target_slots(path, leaf.shape, family, "torch")[0]
    }
    recognised = names.recognise(usual, family, has_pooler=True)
    assert recognised.names == {n: n for n in usual}
    assert not recognised.ignored
    assert not any(name.startswith(family.prefix) for name in usual if family.prefix)
