"""Takes the tensors of a file one by one, and accounts for all of them.

Every parameter that is asked for is filled and every tensor of the file is used, or is known to be of no
use to a tower (heads, buffers); otherwise the load fails and says what differs.
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
from lit_jax.weights.dual_encoder_form import Params

log = logging.getLogger(__name__)

_FLOATS = {np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)}
_LISTED = 6  # of every kind of difference


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """A report of what was read; `str()` is a line for the log."""

    file: pathlib.Path
    layout: names.Layout
    tensors: int  # that were used
    dtypes: tuple[str, ...]  # in the file
    ignored: tuple[str, ...]  # tensors of no use to a tower
    note: str = ""

    def __str__(self) -> str:
        text = f"{self.tensors} {'/'.join(self.dtypes)} tensors with {self.layout} names from {self.file}"
        if self.ignored:
            text += f"; not used: {listed(self.ignored)}"
        return f"{text}; {self.note}" if self.note else text


class StateDictMatcher:
    """The tensors of a folder, taken one by one; what is missing, unfit or left at the end is an error."""

    def __init__(self, tensors: files.Tensors):
        self._tensors = tensors
        self._left = set(tensors.values)
        self._used: set[str] = set()
        self._ignored: list[str] = []
        self._unfit: list[str] = []
        self._not_finite: list[str] = []
        self.missing: list[str] = []

    @property
    def file(self) -> pathlib.Path:
        return self._tensors.file

    @property
    def used(self) -> int:
        """The number of tensors that have been taken."""
        return len(self._used)

    def left(self, under: str = "") -> list[str]:
        """Return what of the names that start with `under` has not been taken."""
        return [name for name in self._left if name.startswith(under)]

    def ignore(self, names_: Iterable[str]) -> None:
        """Put tensors aside that nobody needs."""
        self._ignored += names_
        self._left -= set(names_)

    def take(
        self,
        shapes: Tree,
        family: name_tables.Family,
        inside: Iterable[str],
        *,
        under: str = "",
        has_pooler: bool = True,
    ) -> Params:
        """Fill `shapes` with the tensors named `inside`, whose names without `under` are of `family`."""
        layout, wanted = self._tensors.layout, flatten(shapes)
        self._check_size(sum(math.prod(leaf.shape) for leaf in wanted.values()))
        known, ignored = names.recognise(
            (name.removeprefix(under) for name in inside), family, has_pooler=has_pooler
        )
        self.ignore([under + name for name in ignored])
        family = names.as_joined_in(known, family)
        params: dict[str, np.ndarray] = {}
        for path, leaf in wanted.items():
            places, shape = names.places(path, leaf.shape, family, layout)
            value = np.zeros((len(places), *shape), np.float32)
            for i, place in enumerate(places):
                if place.name in known:
                    self._read(value[i : i + 1], path, place, under, under + known[place.name])
                else:
                    self.missing.append(under + place.name)
            params[path] = value.reshape(leaf.shape)
        return unflatten(params)

    def _check_size(self, wanted: int) -> None:
        """Raise UserError, before memory is asked for it, for a model that the file cannot hold."""
        there = sum(array.size for array in self._tensors.values.values())
        if wanted > 2 * there + 2**20:
            raise UserError(
                f"config.json describes a model of {wanted} parameters, and {self.file} has only {there}; "
                "take both from one model, without overrides that change a shape."
            )

    def _read(self, out: np.ndarray, path: str, place: names.Place, under: str, name: str) -> None:
        """Fill the one row of `out` with what the tensor `name` has for it."""
        layout, array = self._tensors.layout, self._tensors.values[name]
        self._left.discard(name)
        self._used.add(name)
        wanted = names.in_file(path, out.shape[1:], place, layout)
        if wanted == () and array.shape == (1,):  # how SigLIP has its logit_scale
            array = array[0]
        if array.dtype in _FLOATS and array.shape == wanted:
            out[0] = names.from_file(path, np.asarray(array), place, layout)
            if not _all_finite(out):
                nans, infinite = int(np.isnan(out).sum()), int(np.isinf(out).sum())
                self._not_finite.append(f"{name} ({nans} NaN, {infinite} infinite)")
        else:
            found = f"{array.dtype}{[*array.shape]}"
            self._unfit.append(f"{under}{place.name} is {found}, not float{[*wanted]}")

    def close(self) -> LoadReport:
        """Return what was read. Raises UserError if the tensors were not those that were asked for."""
        found = {
            "it lacks": self.missing,
            "it has, beyond that,": self._left,
            "of another kind": self._unfit,
        }
        texts = [f"{what} {listed(names_)}" for what, names_ in found.items() if names_]
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
    # One product reads the values once and makes no array of truths; only what overflows is looked at again.
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.vdot(flat, flat)) or np.isfinite(flat).all())


def listed(names_: Iterable[str]) -> str:
    """Return at most a few names; the layers of a stack count as one."""
    groups = collections.Counter(re.sub(r"\.\d+\.", ".*.", name) for name in sorted(names_))
    return _shortened([f"{name} ({n} times)" if n > 1 else name for name, n in groups.items()])


def _shortened(texts: Sequence[str]) -> str:
    more = len(texts) - _LISTED
    return ", ".join(texts[:_LISTED]) + (f" and {more} more" if more > 0 else "")
