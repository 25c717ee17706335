"""Training on several sources at once, and the order in which examples come.

A mixture is a source like any other, its parts one behind the other; what makes it one is the order. Each
part is shuffled on its own and the parts are interleaved by their weights, evenly: after any number of draws
each part has had its share, give or take one for each of the parts before it. All of it is arithmetic on the
position, so a run goes on from any.
"""

import bisect
import itertools
import math
import sys
import zlib
from collections.abc import Mapping
from fractions import Fraction

import grain

from lit_jax.config import DataConfig, SourceConfig
from lit_jax.data.example import Example, Source
from lit_jax.data.sources import open_source
from lit_jax.errors import UserError


def open_training_data(config: DataConfig, *, text_only: bool = False) -> Source:
    """Open what `config.train` or `config.mixture` names; an epoch is all of it once.

    Raises UserError if both are given, if a weight is 0, or as `open_source`.
    """
    if not config.mixture:
        return _open(config.train, text_only)
    if config.train.path:
        raise UserError(
            "config.data.train.path and config.data.mixture are both set; move the first into the mixture, "
            "or set it to ''."
        )
    for name, part in config.mixture.items():
        if part.weight == 0:
            raise UserError(
                f"config.data.mixture.{name}.weight is 0; make it larger, or leave this source out."
            )
    parts = {name: _open(part, text_only) for name, part in config.mixture.items()}
    weights = {name: part.weight for name, part in config.mixture.items() if part.weight}
    return Mixture(parts, weights)


def _open(config: SourceConfig, text_only: bool) -> Source:
    return open_source(config, text_only=text_only, labelled=bool(config.templates))


class Mixture:
    """A source made of named sources, the examples of each behind those of the one before.

    Attributes:
        parts: the sources by name.
        weights: of each source its share of what is drawn, relative to the others; without one it is the
            number of its examples.
    """

    def __init__(self, parts: Mapping[str, Source], weights: Mapping[str, float]):
        self.parts = dict(parts)
        self.weights = {name: weights.get(name, float(len(part))) for name, part in parts.items()}
        self._ends = list(itertools.accumulate(len(part) for part in parts.values()))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        span = self.span(index)
        name = list(self.parts)[bisect.bisect_right(self._ends, index)]
        example = self.parts[name][index - span.start]
        return {**example, "key": f"{name}/{example['key']}"}

    def span(self, index: int) -> range:
        """Return the positions of all examples of the source that has the one at `index`."""
        which = bisect.bisect_right(self._ends, index)
        return range(self._ends[which - 1] if which else 0, self._ends[which])


def part_of(source: Source, index: int) -> range:
    """Return the positions of the examples that may stand in for the one at `index`."""
    return source.span(index) if isinstance(source, Mixture) else range(len(source))


def training_order(source: Source, seed: int) -> grain.MapDataset[int]:
    """Return the endless sequence of positions in `source` that training reads."""
    if not isinstance(source, Mixture):
        return _shuffled(range(len(source)), seed)
    parts, start = [], 0
    for name, part in source.parts.items():
        # By its name, so that two sources of the same size are not in the same order.
        parts.append(_shuffled(range(start, start + len(part)), seed ^ zlib.crc32(name.encode())))
        start += len(part)
    mixed = grain.MapDataset.select_from_datasets(parts, Interleave(tuple(source.weights.values())))
    return mixed.seed(seed)


def _shuffled(positions: range, seed: int) -> grain.MapDataset[int]:
    dataset = grain.MapDataset.range(positions.start, positions.stop)
    return dataset.seed(seed).shuffle().repeat()


class Interleave(grain.transforms.DatasetSelectionMap):
    """The way from a position in an endless mixture to (which part, position within that part).

    The other parts get n * (1 - share) of the first n positions, rounded down, and the first part gets the
    rest; the others divide theirs in the same way. So counts are whole and never go down.
    """

    def __init__(self, weights: tuple[float, ...]):
        # Whole numbers of exactly the same ratios: no share is rounded, at no length.
        exact = [Fraction(weight) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * scale) for weight in exact]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        before, after, rest = index, index + 1, sum(self._weights)
        for part, weight in enumerate(self._weights):
            others_before = before * (rest - weight) // rest
            others_after = after * (rest - weight) // rest
            # The position belongs to this part.
            if others_before == others_after:
                return part, before - others_before
            before, after, rest = others_before, others_after, rest - weight
        raise AssertionError("the last part takes all that the others leave")
