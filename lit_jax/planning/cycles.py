"""Forecast the time of a compiled program from the cycles that the TPU compiler estimates, in its HLO text.

The compiler writes `estimated_cycles` at most instructions. The forecast sums them: the body of a loop once
for each iteration, and of a conditional only the most expensive branch. Two things have no estimate. A Pallas
kernel counts by the cost that it declares, at the published peaks. Communication counts by its exposed bytes,
as in the bound of `planner.py`.
"""

import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from lit_jax.config import Config
from lit_jax.config_schema import steps
from lit_jax.distributed.chips import Chip
from lit_jax.planning.collectives import Instruction, estimated_cycles, parse, runs

_COST = re.compile(r'"cost_estimate":(\{[^}]*\})')
_NAME = re.compile(r'\bop_name="((?:[^"\\]|\\.)*)"')
# JAX's transformations and loops, and Flax's methods; they are not layers.
_NO_LAYER = re.compile(
    r"\w*\(.*\)|while|body|cond|branch_\d+_fun|closed_call|checkpoint|rematted_computation|\w*\.[\w<>]+"
)
# The parts of a step. The first pattern that an instruction's name contains decides.
_PARTS: Mapping[str, re.Pattern[str]] = {
    "image tower": re.compile(r"vision_model|image_features|project_image"),
    "text tower": re.compile(r"text_model|text_features|project_text|teacher"),
    # The rest of what is differentiated, and then what is not.
    "loss": re.compile(r"jvp\("),
    "optimizer": re.compile(r"jit\(train_step\)"),
    "unnamed": re.compile(""),
}


class Operations(NamedTuple):
    """The seconds that a program computes on one chip.

    Attributes:
        layers: the seconds by layer and operation.
        parts: the seconds by part of the train step.
        kernels: the names of the Pallas kernels among them, which count by their stated cost.
        without_cost: the names of Pallas kernels that state no cost and count nothing.
    """

    layers: Mapping[str, float]
    parts: Mapping[str, float]
    kernels: tuple[str, ...]
    without_cost: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """The time of a run as the compiler's cycles have it; an estimate, unlike a bound.

    Attributes:
        seconds: the seconds of a step.
        pairs_a_second: the pairs that one chip trains in a second.
        mfu: the share of the bfloat16 peak that the matrix products reach. All their passes count, and
            recomputation.
        hours: the hours of `config.duration`; None for a duration in epochs, whose examples are not known.
        chip_hours: the hours of all chips together, or None.
        shares: the share of the step's time by part, with communication that no computation hides.
        operations: the most expensive layers and operations, with their seconds in a step.
        kernels: the names of Pallas kernels, which count by their stated cost.
        without_cost: the names of Pallas kernels that state no cost and count nothing.
    """

    seconds: float
    pairs_a_second: float
    mfu: float
    hours: float | None
    chip_hours: float | None
    shares: Mapping[str, float]
    operations: tuple[tuple[str, float], ...]
    kernels: tuple[str, ...]
    without_cost: tuple[str, ...]


def forecast(
    found: Operations, config: Config, chip: Chip, *, devices: int, flops: int, exposed: float
) -> Forecast:
    """Return the forecast for a run of `config` on `devices` devices.

    Args:
        found: the operations of the compiled step.
        flops: the FLOPs of the matrix products in a step, of one device.
        exposed: the seconds of a step in which a device only communicates.
    """
    parts = {**found.parts, "communication": exposed}
    seconds = sum(parts.values())
    hours = None
    # Planning reads no data, so it does not know how many examples an epoch has.
    if "epoch" not in config.duration:
        count = steps(config.duration, batch_size=config.batch_size, examples_per_epoch=0)
        hours = count * seconds / 3600
    return Forecast(
        seconds=seconds,
        pairs_a_second=config.batch_size / devices / seconds,
        mfu=flops / chip.flops / seconds,
        hours=hours,
        # Clouds sell chips, and on some generations a chip has two devices.
        chip_hours=None if hours is None else hours * devices / chip.cores,
        shares={part: time / seconds for part, time in parts.items()},
        operations=tuple(sorted(found.layers.items(), key=lambda item: -item[1])[:10]),
        kernels=found.kernels,
        without_cost=found.without_cost,
    )


def operations(hlo: str, chip: Chip) -> Operations:
    """Return the seconds of a compiled program without its communication. `hlo` is its text."""
    layers, parts = (defaultdict[str, float](float) for _ in range(2))
    kernels, without_cost = set[str](), set[str]()
    for instruction, times in _instructions(hlo):
        name = _NAME.search(instruction.rest)
        name = name[1] if name else ""
        layer = layer_name(name)
        if (cycles := estimated_cycles(instruction)) is not None:
            seconds = times * cycles / chip.clock
        elif "tpu_custom_call" in instruction.rest:
            cost = _COST.search(instruction.rest)
            (kernels if cost else without_cost).add(layer)
            seconds = times * _kernel_seconds(json.loads(cost[1]), chip) if cost else 0.0
        # Communication has no estimate, and instructions that only rename data take no time.
        else:
            continue
        layers[layer] += seconds
        parts[part_name(name)] += seconds
    return Operations(layers, parts, tuple(sorted(kernels)), tuple(sorted(without_cost)))


def _instructions(hlo: str) -> Iterator[tuple[Instruction, int]]:
    """Yield each instruction with the number of its runs."""
    computations, entry = parse(hlo)
    for name, times in runs(computations, entry).items():
        for instruction in computations[name].values():
            yield instruction, times


def _kernel_seconds(cost: Mapping[str, str], chip: Chip) -> float:
    """Return the time of the slower of a kernel's computation and its traffic with memory."""
    flops, moved = (float(cost.get(key, 0)) for key in ("flops", "bytes_accessed"))
    # A kernel computes on one block while it moves the next.
    return max(flops / chip.flops, moved / chip.hbm_bandwidth)


def part_name(op_name: str) -> str:
    """Return the part of the train step to which an instruction of this name belongs."""
    return next(part for part, pattern in _PARTS.items() if pattern.search(op_name))


def layer_name(op_name: str) -> str:
    """Return the layer and the operation in an instruction's name, without transformations and loops.

    'jit(f)/transpose(jvp(M))/M.text/text_model/encoder/while/body/layer/mlp/fc1/dot_general' is
    'text_model/encoder/layer/mlp/fc1/dot_general, gradient'.
    """
    words = [word for word in op_name.split("/") if word and not _NO_LAYER.fullmatch(word)]
    if not words:
        return "unnamed"
    gradient = ", gradient" if "transpose(" in op_name else ""
    part = part_name(op_name)
    # Loss and optimizer are not modules, so no word of the name says where the operation belongs.
    where = f"{part}: " if part in ("loss", "optimizer") else ""
    return f"{where}{'/'.join(words)}{gradient}"
