"""The format: what is written comes back, and what is damaged is refused."""

import contextlib
import dataclasses
import functools
import json
import pickle
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_jax.buckets import PROBE
from lit_jax.data.example import BadSampleError, Example
from lit_jax.data.loader import ImagePreprocessor, TextPreprocessor
from lit_jax.errors import UserError
from lit_jax.precomputed import write as writer
from lit_jax.precomputed.fingerprint import (
    SAMPLED,
    WITH_IMAGES,
    data_fingerprint,
    sampled_at_start,
    sampled_examples,
)
from lit_jax.precomputed.format import (
    LEAST_SHARD,
    MANIFEST,
    MOST_SHARDS,
    Counts,
    Embeddings,
    Header,
    PooledImages,
    PooledTexts,
    ShardWriter,
    complete_shards,
    manifest_counts,
    shard_size,
    total_counts,
)

WIDTH = 5


def write(folder, records, dtype="float32", shard=3, views=2):
    header = Header(
        side="image",
        tower="t",
        preprocessing="p",
        data="d",
        views=views,
        examples=len(records),
        width=WIDTH,
        dtype=dtype,
        shard_size=shard,
    )
    for number in range(header.shards):
        with ShardWriter(folder / header.shard_name(number)) as writer:
            for index in header.shard(number):
                writer.add(records[index])
    manifest = dataclasses.asdict(header) | dataclasses.asdict(total_counts(folder, header))
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return header


def rows(count, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(dtype)


@pytest.fixture
def records():
    return [
        rows(2, 0),
        BadSampleError("not an image: 犬 ⛄", "not_image"),
        rows(2, 1),
        rows(2, 2),
        BadSampleError(""),
        rows(2, 3),
        rows(2, 4),
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sent", [False, True])
def test_what_is_written_comes_back_bit_for_bit(tmp_path, dtype, sent):
    kind = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    # Texts have any number of captions, and what looks like the byte of a bad one may end a row.
    records = [rows(n, n, kind) for n in (1, 3, 2, 7)] + [BadSampleError("no caption")]
    records[0].view(np.uint8)[-1, -1] = 1
    write(tmp_path, records, dtype, views=0)
    read = Embeddings(tmp_path)
    if sent:
        read = pickle.loads(pickle.dumps(read))
    assert len(read) == 5
    assert read.counts.rows == 13
    assert read.counts.bad == 1
    for index, expected in enumerate(records[:4]):
        assert read[index].dtype == expected.dtype
        assert read[index].tobytes() == expected.tobytes()
    with pytest.raises(BadSampleError, match="no caption"):
        read[4]


def test_bad_examples_keep_their_reasons(tmp_path, records):
    write(tmp_path, records)
    read = Embeddings(tmp_path)
    with pytest.raises(BadSampleError, match="not an image: 犬 ⛄") as raised:
        read[1]
    assert raised.value.kind == "not_image"
    with pytest.raises(BadSampleError):
        read[4]
    assert read.counts == Counts(rows=10, bad=2, bytes=read.counts.bytes)


def test_a_shard_that_is_not_whole_has_no_name(tmp_path):
    path = tmp_path / "shard"
    with contextlib.suppress(KeyError), ShardWriter(path) as writer:
        writer.add(rows(1))
        assert not path.exists()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def damage_name(folder):
    sorted(folder.glob("shard*"))[1].unlink()


def damage_length(folder):
    shard = sorted(folder.glob("shard*"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def damage_manifest(folder):
    (folder / MANIFEST).write_text("{")


def change(folder, **fields):
    manifest = json.loads((folder / MANIFEST).read_text()) | fields
    kept = {name: value for name, value in manifest.items() if value is not None}
    (folder / MANIFEST).write_text(json.dumps(kept))


CHANGES = ({"width": None}, {"shard_size": 0}, {"views": "2"}, {"examples": 6.0}, {"dtype": "int"})
DAMAGES = [
    damage_name,
    damage_length,
    damage_manifest,
    *(functools.partial(change, **fields) for fields in CHANGES),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_when_it_is_opened(tmp_path, records, damage):
    write(tmp_path, records)
    damage(tmp_path)
    with pytest.raises(UserError, match=r"-m lit_jax\.embed"):
        Embeddings(tmp_path)


def test_damaged_numbers_are_refused_when_they_are_read(tmp_path, records):
    write(tmp_path, records)
    shard = sorted(tmp_path.glob("shard*"))[0]
    content = bytearray(shard.read_bytes())
    place = content.index(records[0].tobytes())
    content[place] ^= 1
    shard.write_bytes(content)
    read = Embeddings(tmp_path)
    with pytest.raises(UserError, match=r"-m lit_jax\.embed"):
        read[0]


def test_other_views_than_the_manifest_says_are_damage(tmp_path, records):
    write(tmp_path, records)
    change(tmp_path, views=3)
    with pytest.raises(UserError, match=r"shard-00000\S* .*\(2 .*3"):
        Embeddings(tmp_path)[0]


def test_without_a_manifest_it_is_no_cache(tmp_path, records):
    write(tmp_path, records)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"-m lit_jax\.embed"):
        Embeddings(tmp_path)


@given(st.integers(1, 10**10))
def test_shards_are_neither_too_many_nor_too_small(examples):
    size = shard_size(examples)
    assert size >= LEAST_SHARD
    assert -(-examples // size) <= MOST_SHARDS


@given(st.integers(1, 5000), st.integers(1, 700))
def test_every_example_is_in_one_shard(examples, size):
    header = Header(
        side="text",
        tower="",
        preprocessing="",
        data="",
        views=0,
        examples=examples,
        width=1,
        dtype="float32",
        shard_size=size,
    )
    found = [index for number in range(header.shards) for index in header.shard(number)]
    assert found == list(range(examples))


def example(index, image=None, captions=("a", "b")):
    return Example(key=f"{index}", image=image, captions=tuple(captions), label=None)


def test_the_same_draws_choose_the_same_rows(tmp_path, image_transform, tokenizer):
    """As from pixels and captions: same row, same state of the generator afterwards."""
    picture = np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    one = example(0, picture, ("a", " ", "b", "c"))
    pixels, captions = ImagePreprocessor(image_transform, views=4), TextPreprocessor(tokenizer)
    views, texts = pixels.variants(0, one), captions.variants(0, one)
    assert len(views) == 4
    assert texts == ["a", "b", "c"]
    assert not np.array_equal(views[0], views[1])
    (tmp_path / "image").mkdir()
    (tmp_path / "text").mkdir()
    write(tmp_path / "image", [np.full((4, WIDTH), np.arange(4)[:, None], np.float32)], views=4)
    write(tmp_path / "text", [np.full((3, WIDTH), np.arange(3)[:, None], np.float32)], views=0)
    images = PooledImages("image_features", Embeddings(tmp_path / "image"), views=4)
    pooled = PooledTexts("text_features", Embeddings(tmp_path / "text"))
    for seed in range(20):
        ours, theirs = np.random.default_rng(seed), np.random.default_rng(seed)
        view, text = images.sample(0, one, ours)[0], pooled.sample(0, one, ours)[0]
        np.testing.assert_array_equal(pixels.sample(0, one, theirs), views[int(view)])
        assert captions.sample(0, one, theirs) == texts[int(text)]
        assert ours.random() == theirs.random()


def test_views_differ_between_images_and_are_those_of_the_position(image_transform):
    picture = np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    pixels = ImagePreprocessor(image_transform, views=2)
    first, second = pixels.variants(0, example(0, picture)), pixels.variants(1, example(1, picture))
    assert not np.array_equal(first[0], second[0])
    np.testing.assert_array_equal(pixels.variants(1, example(7, picture)), second)
    more = ImagePreprocessor(image_transform, views=3).variants(1, example(1, picture))
    np.testing.assert_array_equal(more[:2], second)  # so a folder of more views serves fewer


def test_the_fingerprint_of_data_tells_changes():
    source = [example(i, bytes([i]), (f"{i}",)) for i in range(5)]

    def of(source, side):
        return data_fingerprint(source, sampled_examples(source), side)

    renamed = [*source[:3], source[3] | {"key": "other"}, source[4]]
    repainted = [*source[:3], source[3] | {"image": b"other"}, source[4]]
    reworded = [*source[:3], source[3] | {"captions": ("other",)}, source[4]]
    for side, changed in (("image", repainted), ("text", reworded)):
        for other in (source[:4], renamed, changed, source[::-1]):
            assert of(other, side) != of(source, side)
    assert of(reworded, "image") == of(source, "image")
    assert of(list(source), "text") == of(source, "text")


def test_of_a_large_source_the_ends_and_what_is_between_are_sampled():
    class Large:
        def __len__(self):
            return 10**8

        def __getitem__(self, index):
            return example(index)

    keys = [int(one["key"]) for one in sampled_examples(Large())]
    assert len(keys) == SAMPLED
    assert (keys[0], keys[-1]) == (0, 10**8 - 1)
    assert max(np.diff(keys)) < 10**8 / SAMPLED * 1.01


@pytest.mark.parametrize(("image", "count"), [(Path("a.png"), SAMPLED), (b"content", WITH_IMAGES)])
def test_a_start_reads_few_examples_where_each_comes_with_its_image(image, count):
    class Large:
        def __len__(self):
            return 10**8

        def __getitem__(self, index):
            return example(index, image)

    keys = [int(one["key"]) for one in sampled_at_start(Large())]
    assert len(keys) == count
    assert (keys[0], keys[-1]) == (0, 10**8 - 1)
    few = [example(i, image) for i in range(7)]
    assert [int(one["key"]) for one in sampled_at_start(few)] == list(range(7))


def test_a_bad_example_among_the_sampled_ones_is_part_of_the_fingerprint():
    class Source:
        def __init__(self, bad):
            self.bad = bad

        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == self.bad:
                raise BadSampleError("no example", "no_example")
            return Example(key=str(index), image=None, captions=("a",), label=None)

    prints = {
        data_fingerprint(s, sampled_examples(s), "text") for s in map(Source, (None, 1, 1, 2))
    }
    assert len(prints) == 3


def test_a_folder_without_hidden_counts_is_complete_and_counted_again(tmp_path, records):
    header = write(tmp_path, records)
    counts = total_counts(tmp_path, header)
    for file in tmp_path.glob(".shard-*"):
        file.unlink()
    assert complete_shards(tmp_path, header) == [True] * header.shards
    assert total_counts(tmp_path, header) == counts
    assert counts.bad == sum(isinstance(record, BadSampleError) for record in records)
    assert manifest_counts(tmp_path, header) == counts
    assert manifest_counts(tmp_path, dataclasses.replace(header, tower="another")) is None
    (tmp_path / header.shard_name(1)).unlink()
    assert complete_shards(tmp_path, header)[:2] == [True, False]


def test_a_process_that_comes_before_the_first_has_made_the_folder_lists_nothing(
    tmp_path, monkeypatch
):
    header = write(tmp_path, [rows(2)] * 4)
    started = []
    monkeypatch.setattr(writer, "is_primary", lambda: False)
    monkeypatch.setattr(writer.jax, "process_count", lambda: 2)
    monkeypatch.setattr(writer.jax, "process_index", lambda: 1)
    monkeypatch.setattr(writer, "_together", lambda **_: (False, False))
    monkeypatch.setattr(writer, "_write_shard", lambda _, path, *others: started.append(path.name))
    # The first process finds no shard.
    monkeypatch.setattr(writer.multihost_utils, "broadcast_one_to_all", np.zeros_like)
    assert not writer._write_missing(mock.Mock(spec=writer.FeatureWriter), tmp_path / "new", header)
    assert started == [header.shard_name(1)]


def test_a_folder_is_free_while_another_process_checks_its_access(tmp_path):
    (tmp_path / f"{PROBE}1").write_bytes(b"lit_jax")
    writer.check_free(tmp_path)
    (tmp_path / "other").touch()
    with pytest.raises(UserError, match="--output"):
        writer.check_free(tmp_path)
