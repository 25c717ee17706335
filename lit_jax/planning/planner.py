"""Plan a train step on a TPU topology: whether the step fits, what bounds its speed, and a forecast."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import optax

from lit_jax.config import Config
from lit_jax.distributed.flops import matmul_flops
from lit_jax.distributed.mesh import group_by_slice, make_mesh
from lit_jax.planning.advice import advise
from lit_jax.planning.collectives import Traffic, traffic
from lit_jax.planning.cycles import Forecast, forecast, operations
from lit_jax.planning.network import network_traffic
from lit_jax.planning.topologies import Topology
from lit_jax.training.checks import check_batch_size, check_teacher
from lit_jax.training.model_factory import build_model
from lit_jax.training.train_step import AbstractBatch, TrainStep

# The compiler's two messages, which depend on the pass that fails. The second does not count the arguments.
_OUT_OF_MEMORY = (
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE),
    re.compile(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """The compiler's result for one batch size, in bytes of one chip. If it does not fit, most are None.

    Attributes:
        total: the program's memory, including its code.
        limit: the chip's memory, which the compiler reports only if the program does not fit.
        temporaries: the peak of the memory beyond the arguments.
        code: the program itself, and the padding of arrays by the chip's layout.
        traffic: the communication inside a slice.
        network: the communication between slices; None for one slice.
        hlo: the text of the compiled program.
    """

    fits: bool
    total: int
    limit: int | None
    temporaries: int | None = None
    code: int | None = None
    traffic: Traffic | None = None
    network: Traffic | None = None
    hlo: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The result of `lit_jax.plan`. Bytes, FLOPs and seconds are those of one chip in one step.

    Attributes:
        chips: the number of devices.
        device: the kind of a device, a chip or, on a v3, a core. "Chip" means that device everywhere else.
        inputs: the shapes of the arrays in one row of the batch.
        hbm: the chip's memory.
        limit: the part of `hbm` that the compiler leaves to programs; None if it is not reported.
        bytes: the memory by kind; temporaries and code are None if the step does not fit.
        communicated: the bytes sent inside a slice, by kind of collective.
        exposed: the part of `communicated` that is sent while nothing is computed.
        network_communicated, network_exposed: the same for bytes to other slices; None for one slice.
        bound: the least seconds for compute, memory, interconnect, network (of several slices, if its speed
            is published), exposed communication, and the whole step.
        matmul_flops: the FLOPs of the matrix products, each counted once for each pass of its precision.
        forecast: the time by the compiler's estimates; None if the step does not fit.
        largest_batch: the largest batch that fits among those compiled; None if none fits or none was tried.
        smallest_too_large: the smallest batch that does not fit among those compiled, or None.
        compilations: the number of batches compiled.
    """

    topology: str
    slices: int
    chips: int
    device: Literal["chip", "core"]
    mesh: Mapping[str, int]
    batch_size: int
    inputs: Mapping[str, tuple[int, ...]]
    fits: bool
    hbm: int
    limit: int | None
    bytes: Mapping[str, int | None]
    total: int
    matmul_flops: int
    communicated: Mapping[str, int] | None
    exposed: Mapping[str, int] | None
    network_communicated: Mapping[str, int] | None
    network_exposed: Mapping[str, int] | None
    bound: Mapping[str, float] | None
    forecast: Forecast | None
    largest_batch: int | None
    smallest_too_large: int | None
    compilations: int
    advice: tuple[str, ...]


def abstract_step(config: Config, devices: Sequence[Any]) -> TrainStep:
    """Return the train step of a config on devices that need not exist.

    Configs and tokenizers are read, but no weights. Raises UserError for bad input, as training does.
    """
    check_teacher(config)
    mesh = make_mesh(config.mesh, devices)
    check_batch_size(config.batch_size, mesh, config.accumulate)
    # The real schedule depends on the number of examples, which is unknown here, and is only a handful of
    # scalar operations.
    schedule = optax.constant_schedule(config.schedule.learning_rate)
    return TrainStep.build(build_model(config, mesh), schedule)


def make_plan(
    config: Config, topology: Topology, *, slices: int = 1, compilations: int = 6
) -> Plan:
    """Compile the step for the config's batch, then for others to find the largest batch that fits.

    `compilations` is the largest total number of compilations.
    """
    step = abstract_step(config, topology.devices)
    batch = step.abstract_batch(config.batch_size)
    first = compile_step(step, batch)
    resident = resident_bytes(step, batch)
    hbm = int(topology.chip.hbm_gib * 2**30)
    tried = _try_batches(step, first, resident, first.limit or hbm, compilations)
    fitting = [size for size, compiled in tried.items() if compiled.fits]
    too_large = [size for size, compiled in tried.items() if not compiled.fits]
    # A single compilation is not a search.
    largest = max(fitting, default=None) if compilations > 1 else None
    chips, flops = step.model.mesh.size, step_flops(step, batch)
    bound = _bound(first, flops, topology) if first.fits else None
    return Plan(
        topology=topology.name,
        slices=slices,
        chips=chips,
        device="chip" if topology.chip.cores == 1 else "core",
        mesh=dict(step.model.mesh.shape),
        batch_size=config.batch_size,
        inputs={name: array.shape[1:] for name, array in batch.items()},
        fits=first.fits,
        limit=first.limit,
        hbm=hbm,
        bytes=resident | {"temporaries": first.temporaries, "code": first.code},
        total=first.total,
        matmul_flops=flops,
        communicated=first.traffic.communicated if first.traffic else None,
        exposed=first.traffic.exposed if first.traffic else None,
        network_communicated=first.network.communicated if first.network else None,
        network_exposed=first.network.exposed if first.network else None,
        bound=bound,
        forecast=_forecast(first, config, topology, chips, flops, bound) if bound else None,
        largest_batch=largest,
        smallest_too_large=min(too_large, default=None),
        compilations=len(tried),
        advice=() if first.fits else advise(config, step, resident, first.limit or hbm, largest),
    )


def _forecast(
    compiled: Compiled,
    config: Config,
    topology: Topology,
    chips: int,
    flops: int,
    bound: Mapping[str, float],
) -> Forecast:
    return forecast(
        operations(compiled.hlo, topology.chip),
        config,
        topology.chip,
        devices=chips,
        flops=flops,
        exposed=bound["exposed"],
    )


def _try_batches(
    step: TrainStep,
    first: Compiled,
    resident: Mapping[str, int],
    limit: int,
    compilations: int,
) -> dict[int, Compiled]:
    """Return the results by batch size: `first`, that of the config's batch, and those of a search."""
    config = step.model.config
    tried = {config.batch_size: first}
    fixed = sum(resident[kind] for kind in ("parameters", "optimizer", "frozen"))
    # The batch has to be divisible among the devices and the micro-batches.
    unit = step.model.mesh.size * config.accumulate
    while len(tried) < compilations:
        candidate = next_batch(tried, fixed, limit, unit)
        if candidate is None:
            break
        tried[candidate] = compile_step(step, step.abstract_batch(candidate))
    return tried


def compile_step(step: TrainStep, batch: AbstractBatch) -> Compiled:
    """Compile the step for the program's mesh; a step too large for the chip is a result, not an error."""
    mesh = step.model.mesh
    with jax.set_mesh(mesh):
        lowered: Any = traced(step, batch).lower()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return _too_large(error, step, batch)
    memory = compiled.memory_analysis()
    # The peak instead of the sum of all temporaries, because several of them may share memory.
    total = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    temporaries = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    hlo, devices = compiled.as_text(), list(mesh.devices.flat)
    slices = group_by_slice(devices)
    return Compiled(
        fits=True,
        total=total,
        limit=None,
        temporaries=temporaries,
        code=total - temporaries - sum(resident_bytes(step, batch).values()),
        traffic=traffic(hlo, len(slices[0])),
        network=network_traffic(hlo, devices) if len(slices) > 1 else None,
        hlo=hlo,
    )


def _too_large(error: Exception, step: TrainStep, batch: AbstractBatch) -> Compiled:
    """Return the memory that the compiler's out-of-memory error reports; raise any other error again."""
    whole, of_temporaries = (pattern.search(str(error)) for pattern in _OUT_OF_MEMORY)
    match = whole or of_temporaries
    if match is None:
        raise error
    needed, limit = (
        int(float(amount) * _UNITS[unit.upper()])
        for amount, unit in (match.group(1, 2), match.group(3, 4))
    )
    # The first message already counts the arguments.
    if whole:
        return Compiled(fits=False, total=needed, limit=limit)
    total = needed + sum(resident_bytes(step, batch).values())
    return Compiled(fits=False, total=total, limit=limit, temporaries=needed)


def step_flops(step: TrainStep, batch: AbstractBatch) -> int:
    """Return the FLOPs of the matrix products of a step on one chip."""
    with jax.set_mesh(step.model.mesh):
        # The batch, and with it the work, is split evenly among the devices.
        return matmul_flops(traced(step, batch).jaxpr) // step.model.mesh.size


def traced(step: TrainStep, batch: AbstractBatch) -> Any:
    """Return the traced step for a batch, before lowering and compilation. Call it under the step's mesh."""
    return step.trace(batch)


def resident_bytes(step: TrainStep, batch: AbstractBatch) -> dict[str, int]:
    """Return the bytes that are resident on one chip before a step starts, by kind."""
    state = step.abstract_state()
    return {
        "parameters": shard_bytes(state.params),
        "optimizer": shard_bytes(state.opt_state),
        "frozen": shard_bytes(step.abstract_frozen(batch)),
        "batch": shard_bytes(batch),
    }


def shard_bytes(tree: Any) -> int:
    """Return the bytes of one device's shard of a tree of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def next_batch(tried: Mapping[int, Compiled], fixed: int, hbm: int, unit: int) -> int | None:
    """Return the batch size to compile next in the search for the largest that fits, or None at the end.

    The search interpolates: a chip's bytes apart from `fixed` grow nearly in proportion to the batch. Batches
    are multiples of `unit`.
    """
    fits = max((size for size, compiled in tried.items() if compiled.fits), default=0)
    too_large = min((size for size, c in tried.items() if not c.fits), default=None)
    # The line through `fixed` and the result nearest to the limit gives the guess.
    size, nearest = max(tried.items()) if too_large is None else (too_large, tried[too_large])
    if fits:
        size, nearest = fits, tried[fits]
    guess = size * (hbm - fixed) / max(nearest.total - fixed, 1)
    if too_large is not None:
        if too_large - fits <= max(unit, too_large // 32):
            return None
        # The guess keeps away from both known sizes, so that each compilation narrows the range.
        margin = (too_large - fits) / 8
        guess = min(max(guess, fits + margin), too_large - margin)
    else:
        # A far extrapolation is unreliable, so the batch grows at most 8 times at once.
        guess = min(max(guess, 1.05 * fits), 8 * fits)
    candidate = int(guess) // unit * unit
    candidate = max(candidate, fits + unit)
    if candidate in tried or (too_large is not None and candidate >= too_large):
        return None
    return candidate


def _bound(compiled: Compiled, flops: int, topology: Topology) -> dict[str, float]:
    """Return the least seconds for each resource, and for the whole step.

    All FLOPs run at the bfloat16 peak. The program's memory is read once, and its temporaries are written and
    read once. Communication uses all links or, between slices, the chip's share of its host's network.
    Exposed communication is the part during which the scheduled program computes nothing. A step takes at
    least as long as each resource, and at least as long as compute and exposed communication together.
    """
    chip, moved = topology.chip, compiled.total + (compiled.temporaries or 0)
    # Each kind of traffic with its bandwidth, which is not published for every network.
    ways = {"interconnect": (compiled.traffic, chip.ici_bandwidth)}
    ways |= {"network": (compiled.network, chip.dcn_bandwidth)}
    seconds = {"compute": flops / chip.flops, "memory": moved / chip.hbm_bandwidth}
    exposed = 0.0
    for way, (sent, bandwidth) in ways.items():
        if sent is not None and bandwidth is not None:
            seconds[way] = sum(sent.communicated.values()) / bandwidth
            # Only communication without computation beside it adds to the time of a step.
            exposed += sum(sent.exposed.values()) / bandwidth
    step = max(*seconds.values(), seconds["compute"] + exposed)
    return seconds | {"exposed": exposed, "step": step}
