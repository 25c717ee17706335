import builtins
import collections
import os
import pathlib
import pickle
import resource
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from lit_jax.errors import UserError
from lit_jax.weights import torch_pickle
from lit_jax.weights.files import read_tensors


def write(file, program: bytes, *, compression=zipfile.ZIP_STORED, **storages: bytes):
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key.removeprefix('s')}", data)
    return file


def pickled(value) -> bytes:
    """`value` as a part of a larger pickle."""
    return pickle.dumps(value, protocol=2)[2:-1]


def one_tensor(*, offset=0, shape=(2,), strides=(1,), storage="FloatStorage", size=8) -> bytes:
    """The pickle of {'w': a tensor in storage 0}, opcode by opcode, as torch.save writes it."""
    storage = b"(" + pickled("storage") + f"ctorch\n{storage}\n".encode() + pickled("0")
    storage += pickled("cpu") + pickled(size) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
    tensor += b"".join(map(pickled, (offset, shape, strides, False))) + b"tR"
    return b"\x80\x02}" + pickled("w") + tensor + b"s."


def test_views_dtypes_and_shared_storages_are_those_of_torch(golden):
    tensors = torch_pickle.read(golden / "tensors.bin")
    with np.load(golden / "tensors.npz") as expected:
        assert set(tensors) == set(expected)
        for name, array in expected.items():
            dtype = ml_dtypes.bfloat16 if name == "bfloat16" else array.dtype
            assert tensors[name].dtype == dtype
            np.testing.assert_array_equal(tensors[name].astype(array.dtype), array)
    assert np.shares_memory(tensors["whole"], tensors["tied"])
    assert tensors["expanded"].strides[1] == 0
    assert not tensors["whole"].flags.writeable


def test_the_old_format_is_refused_with_advice(golden):
    with pytest.raises(UserError, match=r"1\.6.*torch\.load\('legacy\.bin'"):
        torch_pickle.read(golden / "legacy.bin")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_old_format_is_known_with_any_protocol_of_pickle(tmp_path, protocol):
    file = tmp_path / "pytorch_model.bin"
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=protocol)
    file.write_bytes(magic + pickle.dumps(1001, protocol=protocol) + b"more")
    with pytest.raises(UserError, match=r"1\.6.*'pytorch_model\.bin'"):
        read_tensors(tmp_path)


class Call:
    """Pickled as a call of a function with arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "attack",
    [
        lambda marker: Call(os.system, f"touch {marker}"),
        lambda marker: {"w": Call(os.mkdir, marker)},
        lambda marker: Call(builtins.eval, f"open({marker!r}, 'w')"),
        lambda marker: Call(builtins.getattr, collections.OrderedDict, "__class__"),
        lambda marker: Call(np.memmap, marker, "u1", "w+", 0, (3,)),
    ],
)
def test_nothing_that_a_file_asks_for_is_run(tmp_path, attack):
    marker = tmp_path / "marker"
    program = pickle.dumps(attack(str(marker)), protocol=2)
    with pytest.raises(UserError, match=r"lit_jax"):
        torch_pickle.read(write(tmp_path / "model.bin", program))
    assert not marker.exists()


def test_the_opcodes_of_this_test_are_valid(tmp_path):
    data = np.arange(8, dtype=np.float32)
    program = one_tensor(offset=1, shape=(2, 3), strides=(3, 1))
    tensors = torch_pickle.read(write(tmp_path / "model.bin", program, s0=data.tobytes()))
    np.testing.assert_array_equal(tensors["w"], data[1:7].reshape(2, 3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": 7},
        {"offset": -1},
        {"shape": (9,)},
        {"strides": (8,)},
        {"strides": (-1,)},
        {"shape": (-2,)},
        {"shape": (2, 2)},
        {"shape": (2**40, 2), "strides": (1, 1)},
        {"offset": "1"},
        {"storage": "NoStorage"},
    ],
)
def test_a_tensor_stays_within_its_storage(tmp_path, wrong):
    program = one_tensor(**wrong)
    file = write(tmp_path / "model.bin", program, s0=bytes(32))
    with pytest.raises((ValueError, TypeError, UserError)):
        torch_pickle.read(file)


def test_something_else_than_tensors_is_refused(tmp_path):
    program = pickle.dumps({"epoch": 3}, protocol=2)
    with pytest.raises(UserError, match=r"'epoch' .*int; .*safetensors"):
        torch_pickle.read(write(tmp_path / "model.bin", program))


# b"\x80\x02" is the protocol, "}" a dict, "]" a list, ")" a tuple; "r" remembers an object under 4 bytes.
BOMBS = {
    "a memo of 2 billion places": b"\x80\x02}r\xff\xff\xff\x7fK\x01.",
    "a key whose hash takes for ever": b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s.",
    "lists in lists": b"\x80\x02" + b"]" * 200_000 + b".",
    "tuples in tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "a program of many megabytes": b"\x80\x02" + b"]0" * 2**22 + b"}.",
    "a number of many digits": b"\x80\x02I" + b"9" * 100_000 + b"\n.",
    "an instruction of no tensor": b"\x80\x02}\x93.",
    "a call with arguments": b"\x80\x02ccollections\nOrderedDict\n](K\x01e\x85R.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_costs_no_more_than_its_bytes(tmp_path, name):
    file, limits = (
        write(tmp_path / "model.bin", BOMBS[name]),
        resource.getrlimit(resource.RLIMIT_AS),
    )
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, limits[1]))
    try:
        with pytest.raises((UserError, ValueError, TypeError, IndexError)):
            torch_pickle.read(file)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_an_archive_that_unpacks_to_more_than_it_has_is_refused(tmp_path):
    program = one_tensor()
    file = write(tmp_path / "a.bin", program, compression=zipfile.ZIP_DEFLATED, s0=bytes(10**6))
    with pytest.raises(UserError, match="compressed"):
        torch_pickle.read(file)
    content = bytearray(write(tmp_path / "b.bin", program, s0=bytes(32)).read_bytes())
    entry = content.rfind(b"PK\x01\x02")  # of the central directory; its sizes are bytes 20 to 28
    content[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"\b21474\d+"):
        torch_pickle.read(file)
