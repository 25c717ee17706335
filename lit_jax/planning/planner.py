"""Does the train step of a config fit on a TPU topology, and what bounds its speed there?"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from lit_jax.config import Config
from lit_jax.distributed.mesh import by_slice, make_mesh
from lit_jax.planning.advice import advise
from lit_jax.planning.chips import Topology
from lit_jax.planning.collectives import Traffic, traffic
from lit_jax.planning.flops import matmul_flops
from lit_jax.planning.network import network_traffic
from lit_jax.training.model_factory import find_towers, prepare
from lit_jax.training.program import AbstractBatch, Program, check_batch_size
from lit_jax.training.teacher import check_config

# How the compiler says it, depending on where it finds out. The second leaves out what the chip holds.
_OUT_OF_MEMORY = (
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE),
    re.compile(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of one batch size; bytes are of one chip."""

    fits: bool
    total: int  # that the program needs, its own code among it
    limit: int | None  # of the chip, as far as the compiler says it: where the program does not fit
    temporaries: int | None = None  # None where it does not fit
    code: int | None = None  # the program itself, and what the layout on the chip pads arrays with
    traffic: Traffic | None = None  # inside a slice
    network: Traffic | None = None  # between slices; None where there is one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """`lit_jax.plan`'s answer. Bytes, FLOPs and seconds are those of one chip in one step."""

    topology: str
    slices: int
    chips: int
    mesh: Mapping[str, int]
    batch_size: int
    inputs: Mapping[str, tuple[int, ...]]  # shapes of what is in a row of the batch
    fits: bool
    hbm: int  # what a chip has
    limit: int | None  # what the compiler leaves of it; None where it does not say so
    bytes: Mapping[str, int | None]  # by kind; temporaries and code are None where it does not fit
    total: int
    matmul_flops: int
    sent: Mapping[str, int] | None  # inside a slice, by kind of collective
    waited: Mapping[str, int] | None  # of these, what is sent while nothing is computed
    network_sent: Mapping[str, int] | None  # to other slices; None where there is one slice
    network_waited: Mapping[str, int] | None
    # Seconds: compute, memory, interconnect, network (of several slices, if its speed is published), waiting,
    # and step.
    bound: Mapping[str, float] | None
    largest_batch: int | None  # that was seen to fit; None: not searched, or none did
    smallest_too_large: int | None
    compilations: int
    advice: tuple[str, ...]


def abstract_program(config: Config, devices: Sequence[Any]) -> Program:
    """The program of a config on devices that are not there. Reads configs and tokenizer, but no weights.

    Raises UserError on bad input, as training does.
    """
    check_config(config)
    mesh = make_mesh(config.mesh, devices)
    check_batch_size(config.batch_size, mesh, config.accumulate)
    setup = prepare(config, find_towers(config.model), mesh)
    # The real one depends on the number of examples, and is a handful of scalar operations.
    return Program.of(config, setup, optax.constant_schedule(config.schedule.learning_rate))


def make_plan(
    config: Config, topology: Topology, *, slices: int = 1, compilations: int = 6
) -> Plan:
    """Compiles the step for the batch of the config, and then, with what is left of `compilations`, for
    others, to find the largest batch that fits.
    """
    program = abstract_program(config, topology.devices)
    batch = program.abstract_batch(config.batch_size)
    first = compile_step(program, batch)
    tried = {config.batch_size: first}
    held = held_bytes(program, batch)
    fixed = sum(held[kind] for kind in ("parameters", "optimizer", "frozen"))
    hbm = first.limit or int(topology.chip.hbm_gib * 2**30)
    chips = program.setup.mesh.size
    unit = chips * config.accumulate
    while len(tried) < compilations:
        candidate = next_batch(tried, fixed, hbm, unit)
        if candidate is None:
            break
        tried[candidate] = compile_step(program, program.abstract_batch(candidate))
    fitting = [size for size, compiled in tried.items() if compiled.fits]
    too_large = [size for size, compiled in tried.items() if not compiled.fits]
    searched = compilations > 1
    flops = step_flops(program, batch)
    largest = max(fitting, default=None) if searched else None
    return Plan(
        topology=topology.name,
        slices=slices,
        chips=chips,
        mesh=dict(program.setup.mesh.shape),
        batch_size=config.batch_size,
        inputs={name: array.shape[1:] for name, array in batch.items()},
        fits=first.fits,
        limit=first.limit,
        hbm=int(topology.chip.hbm_gib * 2**30),
        bytes=held | {"temporaries": first.temporaries, "code": first.code},
        total=first.total,
        matmul_flops=flops,
        sent=first.traffic.sent if first.traffic else None,
        waited=first.traffic.waited if first.traffic else None,
        network_sent=first.network.sent if first.network else None,
        network_waited=first.network.waited if first.network else None,
        bound=_bound(first, flops, topology) if first.fits else None,
        largest_batch=largest,
        smallest_too_large=min(too_large, default=None),
        compilations=len(tried),
        advice=() if first.fits else advise(config, program, held, hbm, largest),
    )


def compile_step(program: Program, batch: AbstractBatch) -> Compiled:
    """Compiles the step for the program's mesh. A step too large for the chip is an answer, not an error."""
    mesh = program.setup.mesh
    with jax.set_mesh(mesh):
        lowered: Any = traced(program, batch).lower()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return _too_large(error, program, batch)
    memory = compiled.memory_analysis()
    # The peak, not the size of all temporaries: of those, several may have the same place.
    total = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    temporaries = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    hlo, devices = compiled.as_text(), list(mesh.devices.flat)
    slices = by_slice(devices)
    return Compiled(
        fits=True,
        total=total,
        limit=None,
        temporaries=temporaries,
        code=total - temporaries - sum(held_bytes(program, batch).values()),
        traffic=traffic(hlo, len(slices[0])),
        network=network_traffic(hlo, devices) if len(slices) > 1 else None,
    )


def _too_large(error: Exception, program: Program, batch: AbstractBatch) -> Compiled:
    """What the compiler's error says of memory; any other error goes on."""
    whole, of_temporaries = (pattern.search(str(error)) for pattern in _OUT_OF_MEMORY)
    match = whole or of_temporaries
    if match is None:
        raise error
    needed, limit = (
        int(float(amount) * _UNITS[unit.upper()])
        for amount, unit in (match.group(1, 2), match.group(3, 4))
    )
    if whole:
        return Compiled(fits=False, total=needed, limit=limit)
    total = needed + sum(held_bytes(program, batch).values())
    return Compiled(fits=False, total=total, limit=limit, temporaries=needed)


def step_flops(program: Program, batch: AbstractBatch) -> int:
    """FLOPs of the matrix products of a step on one chip: the batch is split evenly."""
    with jax.set_mesh(program.setup.mesh):
        return matmul_flops(traced(program, batch).jaxpr) // program.setup.mesh.size


def traced(program: Program, batch: AbstractBatch) -> Any:
    """The step for a batch, before it is lowered and compiled; call it under the program's mesh."""
    step: Any = program.compiled_step()
    return step.trace(program.abstract_state(), program.abstract_frozen(batch), batch)


def held_bytes(program: Program, batch: AbstractBatch) -> dict[str, int]:
    """What one chip holds before a step begins, by kind."""
    state = program.abstract_state()
    return {
        "parameters": shard_bytes(state.params),
        "optimizer": shard_bytes(state.opt_state),
        "frozen": shard_bytes(program.abstract_frozen(batch)),
        "batch": shard_bytes(batch),
    }


def shard_bytes(tree: Any) -> int:
    """Of one device's part of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def next_batch(tried: Mapping[int, Compiled], fixed: int, hbm: int, unit: int) -> int | None:
    """The batch size to compile next on the way to the largest one that fits; None: close enough.

    Of what a chip holds, all but `fixed` grows with the batch, nearly in proportion.
    """
    fits = max((size for size, compiled in tried.items() if compiled.fits), default=0)
    too_large = min((size for size, c in tried.items() if not c.fits), default=None)
    size, nearest = max(tried.items()) if too_large is None else (too_large, tried[too_large])
    if fits:
        size, nearest = fits, tried[fits]
    guess = size * (hbm - fixed) / max(nearest.total - fixed, 1)
    if too_large is not None:
        if too_large - fits <= max(unit, too_large // 32):
            return None
        # Not too near to what is known: each compilation has to take away something.
        margin = (too_large - fits) / 8
        guess = min(max(guess, fits + margin), too_large - margin)
    else:
        guess = min(max(guess, 1.05 * fits), 8 * fits)
    candidate = int(guess) // unit * unit
    candidate = max(candidate, fits + unit)
    if candidate in tried or (too_large is not None and candidate >= too_large):
        return None
    return candidate


def _bound(compiled: Compiled, flops: int, topology: Topology) -> dict[str, float]:
    """The least seconds that each resource allows: all FLOPs at the bfloat16 peak; what the chip holds read,
    and its temporaries written and read, once; all that is sent, at the speed of all links, and to other
    slices at the chip's part of its host's network. Waiting is the part of both during which nothing is
    computed, as the program is scheduled. A step takes at least the longest of them, and at least computing
    and waiting together.
    """
    chip, moved = topology.chip, compiled.total + (compiled.temporaries or 0)
    ways = {"interconnect": (compiled.traffic, chip.ici_bandwidth)}
    ways |= {"network": (compiled.network, chip.dcn_bandwidth)}
    seconds = {"compute": flops / chip.flops, "memory": moved / chip.hbm_bandwidth}
    waiting = 0.0
    for way, (sent, bandwidth) in ways.items():
        if sent is not None and bandwidth is not None:
            seconds[way] = sum(sent.sent.values()) / bandwidth
            waiting += sum(sent.waited.values()) / bandwidth
    step = max(*seconds.values(), seconds["compute"] + waiting)
    return seconds | {"waiting": waiting, "step": step}
