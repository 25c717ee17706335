"""Read the tensors of a Hugging Face folder as NumPy arrays, from any of the file formats."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax import serialization

from lit_jax.errors import UserError
from lit_jax.files import parse_json, refuse_lfs_pointer
from lit_jax.weights import torch_pickle
from lit_jax.weights.names import Layout


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of a folder.

    Attributes:
        values: the tensors by dotted name, in the dtypes of the file.
        layout: whose names and axes the tensors have, PyTorch's or Flax's.
        file: the file, or the index of sharded files.
    """

    values: Mapping[str, np.ndarray]
    layout: Layout
    file: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format: the names of its files, and the function that reads a file."""

    stem: str
    suffix: str
    read: Callable[[pathlib.Path], dict[str, np.ndarray]]

    def file(self, variant: str | None = None) -> str:
        """Return the file's name, with a variant such as 'fp16' in front of the suffix."""
        return f"{self._stem(variant)}{self.suffix}"

    def index(self, variant: str | None = None) -> str:
        """Return the name of the index of a sharded file."""
        return f"{self.stem}{self.suffix}.index" + (f".{variant}" if variant else "") + ".json"

    def shards(self, variant: str | None = None) -> str:
        """Return a glob pattern of the files that the index names."""
        return f"{self._stem(variant)}-*{self.suffix}"

    @property
    def pattern(self) -> str:
        """A regular expression of the names of its files, shards and index, with the group 'variant'."""
        stem, suffix = self.stem, re.escape(self.suffix)
        file = rf"{stem}(\.(?P<variant>\w+))?(-\d{{5}}-of-\d{{5}})?{suffix}"
        return rf"{file}|{stem}{suffix}\.index(\.(?P<variant_of_index>\w+))?\.json"

    def _stem(self, variant: str | None) -> str:
        return f"{self.stem}.{variant}" if variant else self.stem


def read_tensors(folder: str | pathlib.Path, variant: str | None = None) -> Tensors:
    """Read all tensors of the folder's weights: safetensors, else Flax msgpack, else torch's bin.

    Raises UserError if there is no such file, or if the file is damaged or incomplete.
    """
    folder = pathlib.Path(folder)
    for format_ in FORMATS:
        file, index = folder / format_.file(variant), folder / format_.index(variant)
        if file.exists():
            values = _parsed(file, format_.read)
        elif index.exists():
            file, values = index, _read_shards(index, format_)
        else:
            continue
        # A DINOv3 without registers still has a tensor for them, with no elements.
        values = {name: array for name, array in values.items() if array.size}
        # The suffix does not tell the layout: transformers' Flax classes wrote safetensors files, too, with
        # Flax names and axes.
        layout = "flax" if any(name.endswith(".kernel") for name in values) else "torch"
        return Tensors(values, layout, file)
    *others, last = (format_.file(variant) for format_ in FORMATS)
    variants = sorted({name for name in weights_in(folder).values() if name})
    if variants and not variant:
        raise UserError(
            f"{folder} has only weights of the variant {' and '.join(map(repr, variants))}; give "
            f"variant={variants[0]!r} in Python, or rename the files without it."
        )
    raise UserError(
        f"{folder} has no weights{f' of the variant {variant!r}' if variant else ''}; it must hold "
        f"{', '.join(others)} or {last}, or the shards of one and their index "
        f"({FORMATS[0].index(variant)} ...)."
    )


def weights_in(folder: pathlib.Path) -> dict[str, str | None]:
    """Return the names of the files with weights -> their variant, such as 'fp16', or None."""
    found: dict[str, str | None] = {}
    for name in sorted(file.name for file in folder.iterdir()) if folder.is_dir() else ():
        for format_ in FORMATS:
            if match := re.fullmatch(format_.pattern, name):
                found[name] = match["variant"] or match["variant_of_index"]
    return found


def one_line(error: BaseException) -> str:
    """Return an error's class and text on one line, shortened for use in a sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".: ")


def _parsed(file: pathlib.Path, parse: Callable[[pathlib.Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        return parse(file)
    except UserError:
        raise
    # A parser may raise any exception for arbitrary bytes.
    except Exception as error:
        # A clone without Git LFS is the most common cause, so it gets its own message.
        refuse_lfs_pointer(file)
        raise UserError(
            f"{file} is damaged or not what its name says ({one_line(error)}); download it again."
        ) from error


def _read_shards(index: pathlib.Path, format_: Format) -> dict[str, np.ndarray]:
    """Return the tensors of all shards. Raise UserError if a shard is missing or does not fit the index."""
    shard_of = _parsed(index, _read_index)
    values: dict[str, np.ndarray] = {}
    for shard in sorted(set(shard_of.values())):
        file = index.parent / shard
        if not file.is_file():
            raise UserError(f"{file}, which {index.name} names, is missing; download it again.")
        tensors = _parsed(file, format_.read)
        belonging = {name for name, its_shard in shard_of.items() if its_shard == shard}
        # An interrupted update of a folder may mix shards of two versions.
        if belonging != set(tensors):
            odd = sorted(belonging ^ set(tensors))
            raise UserError(
                f"{file} and {index.name} disagree about {len(odd)} tensors ({odd[0]} ...), so they belong "
                "to different versions; download both again."
            )
        values |= tensors
    return values


def _read_index(index: pathlib.Path) -> dict[str, str]:
    """Return tensor name -> file name, with dots in the names of Flax, which writes slashes."""
    shard_of = parse_json(index.read_bytes())["weight_map"]
    for shard in shard_of.values():
        # Shards lie beside the index; a path that leads elsewhere may be an attack.
        if shard != pathlib.PurePath(shard).name:
            raise ValueError(f"{shard!r} is not the name of a file beside it")
    return {name.replace("/", "."): shard for name, shard in shard_of.items()}


def _read_msgpack(file: pathlib.Path) -> dict[str, np.ndarray]:
    tree: Any = serialization.msgpack_restore(file.read_bytes())
    # A model with BatchNorm has two collections: {'params': ..., 'batch_stats': ...}.
    if "params" in tree:
        return {name: array for part in tree.values() for name, array in _flatten(part).items()}
    return _flatten(tree)


def _flatten(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{rest}": array for rest, array in _flatten(value).items()}
        elif isinstance(value, np.ndarray | np.generic):
            flat[name] = np.asarray(value)
        else:
            raise TypeError(f"{name} is a {type(value).__name__}, not an array")
    return flat


def _read_safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    # Checked first, for an error that names the tensor and its dtype.
    with safetensors.safe_open(file, "np") as content:
        dtypes = {name: content.get_slice(name).get_dtype() for name in content.offset_keys()}
        for name, dtype in dtypes.items():
            if dtype not in _SAFETENSORS_DTYPES:
                raise UserError(
                    f"{file} holds {name} as {dtype}, which lit_jax does not read; save the model in "
                    "float32, float16 or bfloat16."
                )
    return safetensors.numpy.load_file(file)


# The format's dtypes of whole bytes, without the 8 bit floats.
_SAFETENSORS_DTYPES = {
    "BOOL",
    "BF16",
    *(f"{kind}{bits}" for kind in "IUF" for bits in (8, 16, 32, 64)),
}
# In the order of preference: safetensors loads fastest, and PyTorch's pickle is the least safe.
FORMATS = (
    Format("model", ".safetensors", _read_safetensors),
    Format("flax_model", ".msgpack", _read_msgpack),
    Format("pytorch_model", ".bin", torch_pickle.read),
)
