import json
import re
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_jax.errors import UserError
from lit_jax.weights.files import read_tensors


def error_of(folder) -> str:
    with pytest.raises(UserError) as error:
        read_tensors(folder)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_dtypes_of_safetensors_are_kept(tmp_path):
    tensors = {
        "bf16": np.array([1.5, -2], ml_dtypes.bfloat16),
        "f16": np.array([1.5, -2], np.float16),
        "i64": np.array([3]),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    read = read_tensors(tmp_path)
    assert read.layout == "torch"
    for name, array in tensors.items():
        assert read.values[name].dtype == array.dtype
        np.testing.assert_array_equal(read.values[name], array)


@pytest.mark.parametrize(
    "tree", [{"a": {"kernel": np.ones(2)}, "scale": np.float32(2)}, {"a": {"kernel": np.ones(2)}}]
)
def test_msgpack_is_flattened(tmp_path, tree):
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    read = read_tensors(tmp_path)
    assert read.layout == "flax"
    assert set(read.values) == {"a.kernel", "scale"} & ({"a.kernel"} | set(tree))
    np.testing.assert_array_equal(read.values["a.kernel"], np.ones(2))


def test_collections_of_msgpack_are_merged(tmp_path):
    tree = {"params": {"bn": {"scale": np.ones(2)}}, "batch_stats": {"bn": {"mean": np.zeros(2)}}}
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    assert set(read_tensors(tmp_path).values) == {"bn.scale", "bn.mean"}


def test_msgpack_with_something_else_is_an_error(tmp_path):
    for content in ({"a": "text"}, {"a": [np.ones(2)]}, 5, []):
        (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(content))
        assert str(tmp_path) in error_of(tmp_path)


def test_a_dtype_that_is_not_read_is_named(tmp_path):
    tensors = {"a": np.ones(2), "b": np.ones(2, ml_dtypes.float8_e4m3fn)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert re.search(r"\bb \w+ F8_E4M3", error_of(tmp_path))


def test_safetensors_is_preferred_to_msgpack_to_bin(golden, tmp_path):
    names = ["model.safetensors", "flax_model.msgpack", "pytorch_model.bin"]
    shutil.copy(golden / "dual_torch" / names[0], tmp_path)
    shutil.copy(golden / "dual_flax" / names[1], tmp_path)
    shutil.copy(golden / "vit_bin" / names[2], tmp_path)
    for name in names:
        assert read_tensors(tmp_path).file == tmp_path / name
        (tmp_path / name).unlink()
    for folder in (tmp_path, tmp_path / "no_folder"):
        assert re.match(rf"{folder} .*model\.safetensors", error_of(folder))


@pytest.mark.parametrize("name", ["vit_torch_sharded", "vit_flax_sharded", "vit_bin_sharded"])
def test_broken_sets_of_shards_are_an_error(copied, name):
    folder = copied(name)
    (index,) = folder.glob("*.index.json")
    assert read_tensors(folder).file == index
    first, second, _ = sorted(folder.glob("*-of-*"))

    content = first.read_bytes()
    shutil.copy(second, first)
    assert re.search(f"{first} .*{index.name} ", error_of(folder))
    first.write_bytes(content[: len(content) // 2])
    assert f"{first} " in error_of(folder)
    first.unlink()
    assert re.search(f"{first}, .*{index.name}", error_of(folder))


@pytest.mark.parametrize("shard", ["../a.safetensors", "/a.safetensors", "..", "", 3, None])
def test_index_leads_nowhere_else(tmp_path, shard):
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (folder, tmp_path):
        safetensors.numpy.save_file({"a": np.ones(2)}, place / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    assert list(read_tensors(folder).values) == ["a"]
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    assert re.search("index.json |safetensors", error_of(folder))


def header_of_safetensors(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content + bytes(8)


HOSTILE = {
    "a header longer than the file": (0, header_of_safetensors(b"{}", 2**62)),
    "a tensor beyond the end": (
        0,
        header_of_safetensors(b'{"a":{"dtype":"F32","shape":[99],"data_offsets":[0,396]}}'),
    ),
    "a shape that is not its bytes": (
        0,
        header_of_safetensors(
            b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}'
        ),
    ),
    "a nested header": (0, header_of_safetensors(b"[" * 100_000)),
    "an array of 4 billion": (1, b"\xdd\xff\xff\xff\xff"),
    "a map of 4 billion": (1, b"\xdf\xff\xff\xff\xff"),
    "maps in maps": (1, b"\x81\xa1a" * 50_000 + b"\xc0"),
    "an array of another shape": (
        1,
        b"\x81\xa1a\xc7\x12\x01\x93\x92\xce\xff\xff\xff\xff\x02\xa7float32\xc4\x00",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_lies_about_its_size_is_one_sentence(tmp_path, name):
    place, content = HOSTILE[name]
    file = ["model.safetensors", "flax_model.msgpack"][place]
    (tmp_path / file).write_bytes(content)
    assert f"{file} " in error_of(tmp_path)


# --- damaged files ------------------------------------------------------------------------------

DAMAGED = {
    "safetensors": ("vit_torch", "model.safetensors"),
    "msgpack": ("dual_flax", "flax_model.msgpack"),
    "bin": ("vit_bin", "pytorch_model.bin"),
    "index": ("vit_torch_sharded", "model.safetensors.index.json"),
}
fuzzed = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(params=DAMAGED)
def file(request, copied):
    name, file = DAMAGED[request.param]
    return copied(name) / file


def test_a_pointer_of_git_lfs_is_named(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    message = error_of(file.parent)
    assert file.name in message
    assert "git lfs pull" in message


@fuzzed
@given(part=st.floats(0, 1, exclude_max=True))
def test_cut_files_are_a_user_error(file, part):
    content = file.with_suffix(".whole")
    if not content.exists():
        content.write_bytes(file.read_bytes())
    whole = content.read_bytes().rstrip()
    file.write_bytes(whole[: int(part * len(whole))])
    error_of(file.parent)


@fuzzed
@given(data=st.data())
def test_changed_files_are_read_or_a_user_error(file, data):
    """No checksum protects the numbers themselves: other numbers are all that may come out."""
    content = file.with_suffix(".whole")
    if not content.exists():
        content.write_bytes(file.read_bytes())
    damaged = bytearray(content.read_bytes())
    head = min(len(damaged), 3000)  # where the structure of most formats is
    for _ in range(data.draw(st.integers(1, 8))):
        end = data.draw(st.sampled_from([head, len(damaged)]))
        damaged[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(damaged)
    try:
        read = read_tensors(file.parent)
    except UserError:
        return
    assert all(isinstance(array, np.ndarray) for array in read.values.values())


@fuzzed
@given(content=st.binary(max_size=300))
def test_arbitrary_files_are_a_user_error(file, content):
    file.write_bytes(content)
    try:
        read = read_tensors(file.parent)
    except UserError:
        return
    assert not read.values  # an empty msgpack map is a valid file
