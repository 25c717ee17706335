import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.api.inputs import as_dtype, image_inputs, text_inputs
from lit_jax.errors import UserError
from lit_jax.models.families import TEXT

ROWS = {"input_ids": 20, "position_ids": 9, "token_type_ids": 2}
IDS = np.arange(6).reshape(2, 3)
MASK = np.ones((2, 3), int)


@pytest.mark.parametrize("dtype", ["float16", jnp.float16, np.dtype("float16"), np.float16])
def test_a_dtype_is_a_name_or_jaxs_own(dtype):
    assert as_dtype(dtype) == jnp.float16


@pytest.mark.parametrize("dtype", ["int8", "half", jnp.float64, None])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(UserError, match=r"float32, bfloat16 .*float16"):
        as_dtype(dtype)


def test_images_get_their_channels_last():
    pixels = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(image_inputs(pixels), pixels.transpose(0, 2, 3, 1))


def test_images_that_are_not_normalised_are_numbers_still():
    """So they come from a processor with do_rescale and do_normalize false."""
    pixels = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    images = image_inputs(pixels)
    assert images.dtype == jnp.float32
    np.testing.assert_array_equal(images, pixels.transpose(0, 2, 3, 1))


def test_one_image_is_no_batch():
    with pytest.raises(UserError, match=r"pixel_values .*\[3, 4, 5\]"):
        image_inputs(np.zeros((3, 4, 5), np.float32))


def test_texts_are_int32_and_one_row_is_for_all():
    ids, mask, types, positions = text_inputs(ROWS, IDS, None, MASK, IDS[:1])
    assert mask is None
    assert ids.dtype == types.dtype == positions.dtype == jnp.int32
    np.testing.assert_array_equal(ids, IDS)
    np.testing.assert_array_equal(positions, IDS[[0, 0]])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((IDS[0],), r"input_ids .*\[3\].*padding=True"),
        ((IDS, MASK[:, :2]), r"attention_mask .*\[2, 2\] .*input_ids \[2, 3\]"),
        ((IDS, None, MASK[0]), r"token_type_ids .*\[3\]"),
        ((IDS, None, None, np.zeros((3, 3), int)), r"position_ids .*\[3, 3\]"),
        ((IDS + 17,), r"input_ids .*17 .*22, .*20"),
        ((IDS - 1,), r"input_ids .*-1 .*4"),
        ((IDS, None, IDS), r"token_type_ids .*0 .*5, .*2"),
        ((IDS, None, None, IDS + 9), r"position_ids .*9 .*14, .*9"),
        ((IDS * 1.0,), r"input_ids .*float32"),
        ((IDS, None, IDS * 1.0), r"token_type_ids .*float32"),
        (
            (IDS, (MASK - 1) * 1e4 - 1),
            r"attention_mask .*-1.0 .*-1.0; .* 1 .*0",
        ),
        ((IDS, MASK * 2), r"attention_mask .*2 .*2"),
    ],
)
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_texts_that_do_not_fit_are_refused(inputs, message, kind):
    inputs = [
        None if x is None else kind(x, np.float32 if x.dtype == float else None) for x in inputs
    ]
    with pytest.raises(UserError, match=message):
        text_inputs(ROWS, *inputs, *[None] * (4 - len(inputs)))


def test_numbers_are_looked_at_only_where_there_is_a_table_and_they_are_known():
    text_inputs({"input_ids": 6}, IDS, None, None, IDS + 100)
    traced = jax.jit(lambda ids: text_inputs({"input_ids": 3}, ids, None, None, None)[0])
    np.testing.assert_array_equal(traced(IDS), IDS)


@pytest.mark.parametrize("family", TEXT)
def test_rows_are_those_of_the_tables(family):
    """A family has no other table of a token input than those that its config speaks of."""
    config_class, module_class = TEXT[family]
    tower = module_class(config_class(), pooling=module_class.poolings[0])
    tables = {
        path[-2].key: leaf.shape[0]
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            jax.eval_shape(tower.init, jax.random.key(0), tower.example_input)
        )
        if path[-1].key == "embedding" and path[-2].key != "relative_attention_bias"
    }
    assert sorted(tables.values()) == sorted(tower.config.embedding.rows.values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_ids", [[1, 2, 3], [4, 5]], r"input_ids .*padding=True"),
        ("input_ids", [["a", "b"]], r"input_ids .*<U1"),
        ("attention_mask", [[1, 1, 1], [1]], "attention_mask .*padding=True"),
        ("input_ids", None, r"input_ids"),
    ],
)
def test_what_makes_no_array_is_named(name, value, message):
    inputs = {"input_ids": IDS, "attention_mask": None} | {name: value}
    with pytest.raises(UserError, match=message):
        text_inputs(ROWS, *inputs.values(), None, None)


def test_images_of_different_sizes_make_no_array():
    with pytest.raises(UserError, match=r"pixel_values .*return_tensors='np'"):
        image_inputs([np.zeros((3, 4, 5)), np.zeros((3, 5, 4))])
    with pytest.raises(UserError, match=r"pixel_values"):
        image_inputs(None)


def test_lists_and_truth_values_and_float_masks_of_0_and_1_are_taken():
    for mask in (MASK.astype(bool), MASK.astype(np.float32), MASK.tolist()):
        ids, taken, _, _ = text_inputs(ROWS, IDS.tolist(), mask, None, None)
        np.testing.assert_array_equal(ids, IDS)
        np.testing.assert_array_equal(taken, MASK)


def test_a_float_mask_whose_numbers_nobody_knows_is_refused():
    """It may be additive: 0 would then mean attended."""
    with pytest.raises(UserError, match=r"attention_mask .*dtype float32"):
        jax.jit(lambda mask: text_inputs(ROWS, IDS, mask, None, None)[1])(MASK.astype(np.float32))
