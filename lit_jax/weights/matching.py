"""Match the parameters of a module with the tensors of a file, and account for all of both.

Every parameter is filled, and every tensor of the file is used or known to be useless for a tower (heads,
buffers). Otherwise the load fails and lists the differences.
"""

import collections
import dataclasses
import logging
import math
import pathlib
import re
from collections.abc import Iterable, Sequence

import ml_dtypes
import numpy as np

from lit_jax.errors import UserError
from lit_jax.trees import Tree, flatten, unflatten
from lit_jax.weights import files, name_tables, names
from lit_jax.weights.vision_text_dual_encoder import Params

log = logging.getLogger(__name__)

_FLOATS = {np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)}
# The most names that a message lists for each kind of difference.
_LISTED = 6


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """A report of a load; `str()` is a line for the log.

    Attributes:
        tensors: the number of tensors that were used.
        dtypes: the names of the dtypes in the file.
        ignored: the names of tensors that a tower does not use.
        note: a further remark for the log.
    """

    file: pathlib.Path
    layout: names.Layout
    tensors: int
    dtypes: tuple[str, ...]
    ignored: tuple[str, ...]
    note: str = ""

    def __str__(self) -> str:
        text = f"{self.tensors} {'/'.join(self.dtypes)} tensors with {self.layout} names from {self.file}"
        if self.ignored:
            text += f"; not used: {shortened_names(self.ignored)}"
        return f"{text}; {self.note}" if self.note else text


class StateDictMatcher:
    """The tensors of a folder, taken one by one; missing, mismatched or remaining tensors are an error."""

    def __init__(self, tensors: files.Tensors):
        self._tensors = tensors
        self._remaining = set(tensors.values)
        self._used: set[str] = set()
        self._ignored: list[str] = []
        self._mismatched: list[str] = []
        self._not_finite: list[str] = []
        self.missing: list[str] = []

    @property
    def file(self) -> pathlib.Path:
        """The file, or the index of sharded files."""
        return self._tensors.file

    @property
    def used(self) -> int:
        """The number of tensors that have been taken."""
        return len(self._used)

    def remaining(self, prefix: str = "") -> list[str]:
        """Return the names with this prefix that have not been taken."""
        return [name for name in self._remaining if name.startswith(prefix)]

    def ignore(self, names_: Iterable[str]) -> None:
        """Set aside tensors that no parameter needs."""
        self._ignored += names_
        self._remaining -= set(names_)

    def take(
        self,
        shapes: Tree,
        family: name_tables.Family,
        *,
        prefix: str = "",
        has_pooler: bool = True,
    ) -> Params:
        """Return parameters of `shapes`, in float32, from the remaining tensors with this prefix.

        The names without the prefix are those of `family`. A missing tensor leaves zeros and is noted in
        `missing`, so that `close` can report all differences at once.
        """
        layout, wanted = self._tensors.layout, flatten(shapes)
        self._check_size(sum(math.prod(leaf.shape) for leaf in wanted.values()))
        known, ignored = names.recognise(
            (name.removeprefix(prefix) for name in self.remaining(prefix)),
            family,
            has_pooler=has_pooler,
        )
        self.ignore([prefix + name for name in ignored])
        # The file itself shows whether query, key and value are one tensor or three.
        family = names.fused_as_in(known, family)
        params: dict[str, np.ndarray] = {}
        for path, leaf in wanted.items():
            slots, shape = names.target_slots(path, leaf.shape, family, layout)
            # Allocated once for the whole stack and filled layer by layer, without a copy for stacking.
            value = np.zeros((len(slots), *shape), np.float32)
            for i, slot in enumerate(slots):
                if slot.name in known:
                    self._read(value[i : i + 1], path, slot, prefix, prefix + known[slot.name])
                else:
                    self.missing.append(prefix + slot.name)
            params[path] = value.reshape(leaf.shape)
        return unflatten(params)

    def _check_size(self, wanted: int) -> None:
        """Raise UserError, before memory is allocated, for a model much larger than the file."""
        # The bound is generous: it only has to stop an allocation that no such file could fill.
        there = sum(array.size for array in self._tensors.values.values())
        if wanted > 2 * there + 2**20:
            raise UserError(
                f"config.json describes a model of {wanted} parameters, but {self.file} has only {there}; "
                "take both from one model, without overrides that change a shape."
            )

    def _read(self, out: np.ndarray, path: str, slot: names.Slot, prefix: str, name: str) -> None:
        """Fill `out`, of one row, from the tensor `name`; note a mismatch instead of raising."""
        layout, array = self._tensors.layout, self._tensors.values[name]
        self._remaining.discard(name)
        self._used.add(name)
        wanted = names.shape_in_file(path, out.shape[1:], slot, layout)
        # SigLIP's logit_scale is a vector of one element.
        if wanted == () and array.shape == (1,):
            array = array[0]
        if array.dtype in _FLOATS and array.shape == wanted:
            out[0] = names.from_file(path, np.asarray(array), slot, layout)
            if not _all_finite(out):
                nans, infinite = int(np.isnan(out).sum()), int(np.isinf(out).sum())
                self._not_finite.append(f"{name} ({nans} NaN, {infinite} infinite)")
        else:
            found = f"{array.dtype}{[*array.shape]}"
            self._mismatched.append(f"{prefix}{slot.name} is {found}, not float{[*wanted]}")

    def close(self) -> LoadReport:
        """Return the report. Raise UserError if parameters and tensors do not match, with all differences."""
        found = {
            "it lacks": self.missing,
            "it has, beyond that,": self._remaining,
            "of another kind": self._mismatched,
        }
        # All differences in one message: a wrong config usually causes many.
        texts = [f"{what} {shortened_names(names_)}" for what, names_ in found.items() if names_]
        if texts:
            raise UserError(
                f"The weights of {self.file} are not those of the model that config.json describes "
                f"({'; '.join(texts)}); take both from one model, without overrides that change a shape."
            )
        if self._not_finite:
            log.warning(
                "%s has NaN or infinite values, so what the model computes may be NaN, in %s; take another "
                "copy of the weights.",
                self.file,
                _shortened(self._not_finite),
            )
        dtypes = {self._tensors.values[name].dtype.name for name in self._used}
        return LoadReport(
            self.file,
            self._tensors.layout,
            len(self._used),
            tuple(sorted(dtypes)),
            tuple(sorted(self._ignored)),
        )


def _all_finite(values: np.ndarray) -> bool:
    """Return whether no value is NaN or infinite."""
    flat = values.reshape(-1)
    # The inner product is NaN or infinite if any value is; it reads the values once, without a boolean array.
    # Large finite values can overflow the product, and only then are the values tested one by one.
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.vdot(flat, flat)) or np.isfinite(flat).all())


def shortened_names(names_: Iterable[str]) -> str:
    """Return a few of the names for a message; the layers of a stack count as one name."""
    # Without the numbers of layers, twelve times the same mistake is one item of the list.
    groups = collections.Counter(re.sub(r"\.\d+\.", ".*.", name) for name in sorted(names_))
    return _shortened([f"{name} ({n} times)" if n > 1 else name for name, n in groups.items()])


def _shortened(texts: Sequence[str]) -> str:
    more = len(texts) - _LISTED
    return ", ".join(texts[:_LISTED]) + (f" and {more} more" if more > 0 else "")
