"""Batches that are passed in shared memory arrive whole, and their memory is used again."""

import gc
import resource
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest

from lit_jax.data.shared_batches import SlotReader, SlotWriter
from lit_jax.errors import UserError


@pytest.fixture
def reader():
    reader = SlotReader()
    yield reader
    reader.close()


def batch(value, rows=5):
    return {
        "pixel_values": np.full((rows, 3, 7), value, np.uint8),
        "input_ids": np.arange(rows * 2, dtype=np.int32).reshape(rows, 2) + value,
        "features": np.full((rows, 3), value, ml_dtypes.bfloat16),
        "number": np.int64(value).reshape(()),
        "skipped": (("a", "empty", "0 bytes"),),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert found["skipped"] == expected["skipped"]
    for name in expected.keys() - {"skipped"}:
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_batch_arrives_as_it_was_sent(reader):
    assert_same(reader.read(SlotWriter(reader.folder).write(batch(3))), batch(3))
    # Its memory has no name left that somebody would have to remove.
    assert not [*reader.folder.iterdir()]


def test_a_slot_is_used_again_only_when_all_of_its_arrays_are_gone(reader):
    writer = SlotWriter(reader.folder)
    held = reader.read(writer.write(batch(1)))["input_ids"][1:]
    sent = [writer.write(batch(value)) for value in (2, 3)]
    received = [reader.read(one) for one in sent]
    assert_same(received[0], batch(2))
    np.testing.assert_array_equal(held, batch(1)["input_ids"][1:])
    del received
    slots = {writer.write(batch(value)).file for value in (4, 5)}
    assert slots == {one.file for one in sent}
    np.testing.assert_array_equal(held, batch(1)["input_ids"][1:])
    del held
    assert writer.write(batch(6)).file not in slots


def test_a_slot_stays_taken_while_jax_has_its_arrays(reader):
    """JAX on a CPU takes an aligned array without a copy."""
    writer = SlotWriter(reader.folder)
    first = writer.write(batch(1, rows=64))
    arrays = {
        name: jax.device_put(array)
        for name, array in reader.read(first).items()
        if name in ("pixel_values", "input_ids")
    }
    for value in (2, 3, 4):
        reader.read(writer.write(batch(value, rows=64)))
        gc.collect()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, batch(1, rows=64)[name])


def test_a_larger_batch_gets_a_slot_of_its_own(reader):
    writer = SlotWriter(reader.folder)
    small = writer.write(batch(1))
    reader.read(small)
    large = writer.write(batch(2, rows=500))
    assert large.file != small.file
    assert_same(reader.read(large), batch(2, rows=500))


def test_arrays_outlive_the_reader_and_nothing_else_does():
    reader = SlotReader()
    writer = SlotWriter(reader.folder)
    received = reader.read(writer.write(batch(1)))
    gone = weakref.ref(received["pixel_values"].base)
    writer.write(batch(2))
    assert len([*reader.folder.iterdir()]) == 1
    reader.close()
    assert not reader.folder.exists()
    assert_same(received, batch(1))
    with pytest.raises(UserError, match="No such file"):
        writer.write(batch(3))
    del received
    assert gone() is None


def test_values_that_are_no_plain_arrays_arrive_too(reader):
    others = {
        "texts": np.array(["a", None], object),
        "strings": np.array(["a", "b"], np.dtypes.StringDType()),
        "masked": np.ma.masked_array([1, 2], [True, False]),
        "number": 3,
    }
    sent = SlotWriter(reader.folder).write(others | {"ids": np.arange(2)})
    assert sent.others == others
    assert sent.arrays.keys() == {"ids"}


def test_memory_that_is_full_is_one_sentence(reader):
    writer = SlotWriter(reader.folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(UserError) as caught:
            writer.write({"pixel_values": np.zeros(1 << 17, np.uint8)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # The part that there was room for is free again.
    assert_same(reader.read(writer.write(batch(1))), batch(1))
    for part in (str(reader.folder), "131,136 bytes", "--shm-size", "config.data.workers"):
        assert part in str(caught.value)
