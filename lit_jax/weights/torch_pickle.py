"""Reads a zip-format `pytorch_model.bin` without torch and without running what the pickle asks for.

A pickle is a program. Of what it may call we provide the few functions that a dictionary of tensors
needs, and refuse the rest (https://docs.python.org/3/library/pickle.html#restricting-globals).
"""

import collections
import io
import pathlib
import pickle
import zipfile
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lit_jax.errors import UserError

_STORAGE_DTYPES = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "BoolStorage": np.dtype("?"),
    "ByteStorage": np.dtype("u1"),
    "CharStorage": np.dtype("i1"),
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "IntStorage": np.dtype("<i4"),
    "LongStorage": np.dtype("<i8"),
    "ShortStorage": np.dtype("<i2"),
}
# The number that files of torch.save before version 1.6 begin with, pickled.
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


def read(file: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict that torch.save wrote, as read-only arrays.

    Raises UserError for the format of torch before 1.6 and for a pickle that asks for more than
    tensors, and other exceptions for damaged files.
    """
    with file.open("rb") as stream:
        if stream.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC:
            raise UserError(
                f"{file} has the format of torch before 1.6; load the model with PyTorch and save "
                "it as safetensors with save_pretrained."
            )
    with zipfile.ZipFile(file) as archive:
        (program,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        state = _Unpickler(archive, program, file).load()
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise UserError(
                f"{file} is no dictionary of tensors, {name!r} is a {type(value).__name__}; save the "
                "model as safetensors with save_pretrained."
            )
    return dict(state)


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, program: str, file: pathlib.Path):
        super().__init__(io.BytesIO(archive.read(program)))
        self._archive = archive
        self._folder = program.removesuffix("data.pkl") + "data/"
        self._file = file
        self._storages: dict[str, np.ndarray] = {}  # tied weights share one

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGE_DTYPES:
            return name  # persistent_load gets it back; a string cannot be called or changed
        known = {
            "collections.OrderedDict": collections.OrderedDict,
            "torch._utils._rebuild_tensor_v2": self._rebuild_tensor,
            "torch._utils._rebuild_parameter": self._rebuild_parameter,
        }
        wanted = f"{module}.{name}"
        if wanted not in known:
            raise UserError(
                f"{self._file} asks to run {wanted}, which no dictionary of tensors needs, and lit_jax "
                "does not run it; if you trust the file, save the model as safetensors with PyTorch."
            )
        return known[wanted]

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, storage, key, _, size = pid
        if key not in self._storages:
            data = self._archive.read(self._folder + key)
            self._storages[key] = np.frombuffer(data, _STORAGE_DTYPES[storage], count=size)
        return self._storages[key]

    def _rebuild_tensor(
        self,
        storage: np.ndarray,
        offset: int,
        shape: Sequence[int],
        strides: Sequence[int],
        *_: Any,
    ) -> np.ndarray:
        """A view of a storage; offset and strides count elements."""
        if min((offset, *shape, *strides)) < 0 or len(shape) != len(strides):
            raise ValueError(f"a tensor has offset {offset}, shape {shape} and strides {strides}")
        if 0 in shape:
            return np.empty(shape, storage.dtype)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if last >= storage.size:
            raise ValueError(f"a tensor ends at {last} in a storage of {storage.size} elements")
        byte_strides = [stride * storage.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(
            storage[offset:], shape, byte_strides, writeable=False
        )

    def _rebuild_parameter(self, tensor: np.ndarray, *_: Any) -> np.ndarray:
        return tensor
