"""Read a zip-format `pytorch_model.bin` without torch, and without running code from the pickle.

A pickle is a program. This reader provides the few functions that a dictionary of tensors needs, and refuses
all others (https://docs.python.org/3/library/pickle.html#restricting-globals). The reader executes only the
opcodes that torch.save writes, and bounds their memory and time by the size of the file. Python's C
implementation cannot be used, because it allocates memory for any index that a memo opcode names.
"""

import collections
import io
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

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
# The number, as pickled with any protocol, at the start of files that torch.save wrote before version 1.6.
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2).removeprefix(b"\x80\x02")
# The bytes from the start in which the number can lie, behind the pickle's protocol and frame.
_LEGACY_HEAD = 32
# The largest pickle that is read: a tensor takes about 150 bytes, so this is enough for 25,000 tensors.
_LONGEST_PROGRAM = 2**22
_SAFE = "save the model as safetensors with PyTorch"


def read(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the tensors of a state dict that torch.save wrote, as read-only arrays.

    Raises UserError for the format of torch before 1.6 and for a file that contains more than tensors, and
    other exceptions for damaged files.
    """
    with file.open("rb") as stream:
        if _LEGACY_MAGIC in stream.read(_LEGACY_HEAD):
            raise UserError(
                f"{file} is not damaged, but has the old format of torch.save before 1.6, which lit_jax does "
                f"not read; convert it where PyTorch is installed, by torch.save(torch.load({file.name!r}, "
                f"weights_only=True), {file.name!r}), or by save_pretrained of transformers, which writes "
                "safetensors."
            )
    with zipfile.ZipFile(file) as archive:
        _check_sizes(archive, file)
        # torch.save names the topmost folder after the saved file, so only the end of the path is known.
        (program,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        state = _Unpickler(archive, program, file).load()
    if not isinstance(state, dict):
        raise UserError(
            f"{file} is not a dictionary of tensors, but a {type(state).__name__}; {_SAFE}."
        )
    # A training checkpoint, with an optimizer's state beside the weights, is refused here.
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise UserError(
                f"{file} is not a dictionary of tensors, {name!r:.100} is a {type(value).__name__}; save the "
                "model as safetensors with save_pretrained."
            )
    return dict(state)


def _check_sizes(archive: zipfile.ZipFile, file: pathlib.Path) -> None:
    """Raise UserError for a compressed archive, or one that claims more bytes than the file has.

    torch.save never compresses, so such an archive is an attack (a zip bomb) or damaged.
    """
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UserError(
            f"{file} is compressed, which torch.save never does, and could unpack to any size; {_SAFE}."
        )
    unpacked, size = sum(member.file_size for member in members), file.stat().st_size
    if unpacked > size:
        raise UserError(
            f"{file} has {size} bytes, but claims to hold {unpacked}; download it again, or {_SAFE}."
        )


class _Instructions(dict[int, Callable[..., None]]):
    """The table of opcodes that are executed; any other opcode is an error."""

    def __missing__(self, code: int) -> Callable[..., None]:
        raise ValueError(
            f"its pickle has the instruction {chr(code)!r}, which torch.save never writes"
        )


class _Unpickler(pickle._Unpickler):
    """Python's pure implementation of unpickling, restricted to the opcodes of a dictionary of tensors."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = _Instructions()
    # The base class sets these two, but its type stubs do not declare them.
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, archive: zipfile.ZipFile, program: str, file: pathlib.Path):
        size = archive.getinfo(program).file_size
        if size > _LONGEST_PROGRAM:
            raise UserError(
                f"{file} has a pickle of {size} bytes, more than any dictionary of tensors; {_SAFE}."
            )
        super().__init__(io.BytesIO(archive.read(program)))
        self._archive = archive
        self._folder = program.removesuffix("data.pkl") + "data/"
        self._file = file
        # Tied weights share a storage, which is read once.
        self._storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGE_DTYPES:
            # `persistent_load` gets this name back. A string is harmless: it cannot be called or changed.
            return name
        known = {
            "collections.OrderedDict": self._new_dictionary,
            "torch._utils._rebuild_tensor_v2": self._rebuild_tensor,
            "torch._utils._rebuild_parameter": self._rebuild_parameter,
        }
        wanted = f"{module}.{name}"
        if wanted not in known:
            raise UserError(
                f"{self._file} asks to run {wanted:.100}, which no dictionary of tensors needs, and lit_jax "
                f"does not run it; if you trust the file, {_SAFE}."
            )
        return known[wanted]

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, storage, key, _, size = pid
        if key not in self._storages:
            data = self._archive.read(self._folder + key)
            self._storages[key] = np.frombuffer(data, _STORAGE_DTYPES[storage], count=size)
        return self._storages[key]

    def set_item(self) -> None:
        """Pop a value and a key, and set the item of the dictionary below them."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], key, value)

    def set_items(self) -> None:
        """Pop all pairs above the mark, and set the items of the dictionary below it."""
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(self.stack[-1], key, value)

    def build(self) -> None:
        """Drop the state of an object: a state dict's attributes are only the versions of its layers."""
        self.stack.pop()

    def _set(self, dictionary: Any, key: Any, value: Any) -> None:
        # Hashing a deeply nested tuple as a key could take exponential time.
        if not isinstance(dictionary, dict) or not isinstance(key, str | int):
            raise UserError(
                f"{self._file} is not a dictionary of tensors, it has a {type(key).__name__} as key; {_SAFE}."
            )
        dictionary[key] = value

    def _new_dictionary(self) -> dict[Any, Any]:
        return collections.OrderedDict()

    def _rebuild_tensor(
        self,
        storage: np.ndarray,
        offset: int,
        shape: Sequence[int],
        strides: Sequence[int],
        *_: Any,
    ) -> np.ndarray:
        """Return a view of a storage; offset and strides count elements.

        Raises ValueError if the view would reach beyond the storage: `as_strided` itself does not check.
        """
        if min((offset, *shape, *strides)) < 0 or len(shape) != len(strides):
            raise ValueError(f"a tensor has offset {offset}, shape {shape} and strides {strides}")
        if 0 in shape:
            return np.empty(shape, storage.dtype)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if last >= storage.size:
            raise ValueError(f"a tensor ends at {last} in a storage of {storage.size} elements")
        # NumPy counts strides in bytes, torch in elements.
        byte_strides = [stride * storage.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(
            storage[offset:], shape, byte_strides, writeable=False
        )

    def _rebuild_parameter(self, tensor: np.ndarray, *_: Any) -> np.ndarray:
        return tensor


# The opcodes that torch.save writes with the protocols 2 to 4, except those with a method above.
_INSTRUCTIONS = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID, pickle.REDUCE),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
)
for (_code,) in _INSTRUCTIONS:
    _Unpickler.dispatch[_code] = pickle._Unpickler.dispatch[_code]
_Unpickler.dispatch[pickle.SETITEM[0]] = _Unpickler.set_item
_Unpickler.dispatch[pickle.SETITEMS[0]] = _Unpickler.set_items
_Unpickler.dispatch[pickle.BUILD[0]] = _Unpickler.build
