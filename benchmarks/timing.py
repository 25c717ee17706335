"""Times of several contenders, measured in turn, so that a noisy machine is noisy for all of them."""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Sample(NamedTuple):
    """Seconds of one call: on the clock, and of processor time over all threads of the process."""

    wall: float
    cpu: float


class Times(NamedTuple):
    """The samples of all calls of one contender."""

    samples: tuple[Sample, ...]

    @property
    def wall(self) -> float:
        """Median seconds on the clock."""
        return statistics.median(sample.wall for sample in self.samples)

    @property
    def cpu(self) -> float:
        """Median seconds of processor time."""
        return statistics.median(sample.cpu for sample in self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles of the seconds on the clock, relative to their median."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(sample.wall for sample in self.samples)
        return (high - low) / 2 / self.wall


def in_turn(
    contenders: Mapping[str, Callable[[], object]], repeats: int, uncounted: int = 0
) -> dict[str, Times]:
    """Call each contender once to warm up, then `repeats` times, in turn; return their times.

    Before each call that counts there are `uncounted` ones. Calls of milliseconds need as many as it takes
    until the threads of the contender before no longer wait for work: OpenMP's keep a core busy meanwhile.
    """
    for call in contenders.values():
        call()
    samples = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            for _ in range(uncounted):
                call()
            samples[name].append(once(call))
    return {name: Times(tuple(of_contender)) for name, of_contender in samples.items()}


def once(call: Callable[[], object]) -> Sample:
    """Return the times of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


def in_own_process(*command: str) -> list[float]:
    """Return the figures that `python -m COMMAND` prints as JSON, on CPU."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return json.loads(subprocess.check_output([sys.executable, "-m", *command], env=environment))


def peak_memory() -> float:
    """Return the most memory that this process ever had in RAM, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
