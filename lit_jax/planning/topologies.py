"""Topologies of TPU chips, to compile for without having the hardware."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from lit_jax.distributed.chips import CHIPS, Chip
from lit_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices to compile for, which cannot run a program."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]


def open_topology(name: str, *, slices: int = 1) -> Topology:
    """Return `slices` slices of the topology `name`, such as 'v5e:4x4', joined by the data-centre network.

    Raises UserError if libtpu, the TPU compiler, is not installed, or does not know the topology.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    if match is None or match[1] not in CHIPS:
        raise UserError(_unknown(name))

    chip, sides = CHIPS[match[1]], [int(side) for side in match[2].split("x")]
    if (
        len(sides) != chip.shapes[0].count("x") + 1
        or math.prod(sides) > chip.largest
        or max(sides) > (chip.longest or chip.largest)
    ):
        raise UserError(_unknown(name))
    if slices < 1:
        raise UserError(f"--slices={slices} must be at least 1.")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "The TPU compiler is not installed; run: pip install -c requirements.lock -r requirements-tpu.txt"
        )
    _compile_only()
    options: dict[str, Any] = dict(chip.options)
    # By default libtpu assumes four chips for each host, which a single chip cannot fill.
    if math.prod(sides) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        options["num_slices"] = slices
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(_unknown(name)) from error
    return Topology(name=name, chip=chip, devices=tuple(description.devices))


def _unknown(name: str) -> str:
    known = "; ".join(
        f"{generation}: {', '.join(chip.shapes)}" for generation, chip in CHIPS.items()
    )
    return f"--topology={name} is not a TPU topology; write GENERATION:SHAPE, of {known}."


def _compile_only() -> None:
    """Keep libtpu from searching for a TPU, from locking out other processes, and from logging."""
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }.items():
        # A value that the user has set stays.
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
