"""Training on several sources at once, and the order of the examples.

A mixture is a source that concatenates its parts; only the training order mixes them. Each part is shuffled
on its own, and the parts are interleaved evenly by their weights: after any number of draws each part has had
its share, give or take one for each part before it. The order is arithmetic on the position, so that a run
can resume at any position.
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
    """Open the source in `config.train`, or the sources in `config.mixture`; an epoch covers all examples.

    Raises UserError if both are given, if a weight is 0, and in the cases of `open_source`.
    """
    if not config.mixture:
        return _open(config.train, text_only)
    if config.train.path:
        raise UserError(
            "config.data.train.path and config.data.mixture are both set; set the first to '', and add its "
            "data to the mixture if you want to train on them, too."
        )
    for name, part in config.mixture.items():
        if part.weight == 0:
            raise UserError(
                f"config.data.mixture.{name}.weight is 0; set it above 0, or leave this source out."
            )
    parts = {name: _open(part, text_only) for name, part in config.mixture.items()}
    # A source without a weight keeps the default of `Mixture`, the number of its examples.
    weights = {name: part.weight for name, part in config.mixture.items() if part.weight}
    return Mixture(parts, weights)


def _open(config: SourceConfig, text_only: bool) -> Source:
    return open_source(config, text_only=text_only, labelled=bool(config.templates))


class Mixture:
    """A source that concatenates named sources.

    Attributes:
        parts: the sources by name.
        weights: the relative sampling weight of each source; by default the number of its examples.
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
        # Two sources may have the same keys, so the key names the source, too.
        return {**example, "key": f"{name}/{example['key']}"}

    def span(self, index: int) -> range:
        """Return the positions of all examples of the source that contains position `index`."""
        which = bisect.bisect_right(self._ends, index)
        return range(self._ends[which - 1] if which else 0, self._ends[which])


def part_of(source: Source, index: int) -> range:
    """Return the positions of the examples that may replace the example at `index`."""
    return source.span(index) if isinstance(source, Mixture) else range(len(source))


def training_order(source: Source, seed: int) -> grain.MapDataset[int]:
    """Return the endless sequence of positions in `source` that training reads."""
    if not isinstance(source, Mixture):
        return _shuffled(range(len(source)), seed)
    parts, start = [], 0
    for name, part in source.parts.items():
        # Seeded by the name, so that two sources of the same size do not get the same permutation.
        parts.append(_shuffled(range(start, start + len(part)), seed ^ zlib.crc32(name.encode())))
        start += len(part)
    mixed = grain.MapDataset.select_from_datasets(parts, Interleave(tuple(source.weights.values())))
    # The seed of the random maps behind the mixture.
    return mixed.seed(seed)


def _shuffled(positions: range, seed: int) -> grain.MapDataset[int]:
    dataset = grain.MapDataset.range(positions.start, positions.stop)
    return dataset.seed(seed).shuffle().repeat()


class Interleave(grain.transforms.DatasetSelectionMap):
    """The map from a position in an endless mixture to (number of the part, position within the part).

    Among the first n positions, the parts behind the first get n * (1 - share of the first part), rounded
    down, and the first part gets the rest. The parts behind it divide their positions in the same way. Counts
    are therefore whole numbers that never decrease.
    """

    def __init__(self, weights: tuple[float, ...]):
        # Whole numbers in exactly the same ratios, so that no rounding error grows with the position.
        exact = [Fraction(weight) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * scale) for weight in exact]

    # Grain has no endless dataset: an endless map has the largest length.
    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        before, after, rest = index, index + 1, sum(self._weights)
        for part, weight in enumerate(self._weights):
            others_before = before * (rest - weight) // rest
            others_after = after * (rest - weight) // rest
            # The other parts get nothing at this position, so it belongs to this part.
            if others_before == others_after:
                return part, before - others_before
            before, after, rest = others_before, others_after, rest - weight
        raise AssertionError("the last part takes all that the others leave")
