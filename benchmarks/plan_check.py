"""The planner's time of computation against the compiler's schedule of the same program; no TPU is needed.

    python -m benchmarks.plan_check [CONFIG ...] [--chips=v5e,v6e] [--results=plan_check.json]
                                                                                   (requirements-tpu.txt)

A CONFIG is the beginning of a name in `CONFIGS`; without one, all are meant, on v4, v5e, v5p and v6e. A cell
of the table takes one to five minutes of two cores. It is written to --results as soon as it is compiled, and
not compiled again as long as it is there. To resume, run the same command again; after a change of the code,
delete the file first.

Method: the train step of each config is compiled as `lit_jax.plan` compiles it, with 256 pairs a chip on four
chips. "Plan" is the forecast of a step without communication, where a Pallas kernel counts by the cost that
its author states. "Compiler" has the same cycles for all other instructions. A kernel has the bundles of its
compiled schedule there, one a cycle, as often as its grid turns; a second process compiles each kernel alone
and counts them. Both cores of a v4 or v5p chip share a parallel grid. Neither has the time in which a kernel
waits for memory. Prints milliseconds of both, and the error of the plan.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.extend import core

from benchmarks.forecast import Row, config_of
from lit_jax.config import Config
from lit_jax.distributed.flags import set_flags
from lit_jax.planning.collectives import parse, runs
from lit_jax.planning.cycles import operations
from lit_jax.planning.planner import abstract_step, compile_step, traced
from lit_jax.planning.topologies import open_topology

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# The cores of a chip that is one device.
CORES = {"v4": 2, "v5p": 2}
PAIRS = 256

_DROPOUT = {
    "model.text.overrides.hidden_dropout_prob": 0.1,
    "model.text.overrides.attention_probs_dropout_prob": 0.1,
}
# Image tower, text tower, whether the image embeddings are precomputed, and other keys.
CONFIGS: Mapping[str, tuple[str, str, bool, Mapping[str, Any]]] = {
    "LU B/32+B": ("B/32", "B", False, {}),
    "LU B/16+B": ("B/16", "B", False, {}),
    "LU L/16+B": ("L/16", "B", False, {}),
    "LU L/16+L": ("L/16", "L", False, {}),
    "LU g/14+B": ("g/14", "B", False, {}),
    "LU g/14+L": ("g/14", "L", False, {}),
    "LU B/16+B, dropout": ("B/16", "B", False, _DROPOUT),
    "LU L/16+L, dropout": ("L/16", "L", False, _DROPOUT),
    "LU B/16+B, sigmoid": ("B/16", "B", False, {"loss": "sigmoid"}),
    "LU B/16+B, 64 tokens": ("B/16", "B", False, {"data.max_text_length": 64}),
    "LU B/16+B, remat none": ("B/16", "B", False, {"remat": "none"}),
    "LU B/16+B, fsdp 4": ("B/16", "B", False, {"mesh.fsdp": 4}),
    "UU B/32+B": ("B/32", "B", False, {"policy.lock": "UU"}),
    "UU B/16+B": ("B/16", "B", False, {"policy.lock": "UU"}),
    "UU L/16+L": ("L/16", "L", False, {"policy.lock": "UU"}),
    "UU B/16+B, remat matmuls": ("B/16", "B", False, {"policy.lock": "UU", "remat": "matmuls"}),
    "UU B/16+B, accumulate 4": ("B/16", "B", False, {"policy.lock": "UU", "accumulate": 4}),
    "precomputed, B/16+B": ("B/16", "B", True, {}),
    "precomputed, L/16+L": ("L/16", "L", True, {}),
    "precomputed, B/16+B, dropout": ("B/16", "B", True, _DROPOUT),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", metavar="CONFIG", default=[""])
    parser.add_argument("--chips", default=",".join(TOPOLOGIES))
    parser.add_argument("--results", type=Path, default=Path("plan_check.json"))
    parser.add_argument("--kernels", metavar="CHIP", help=argparse.SUPPRESS)
    args = parser.parse_args()
    set_flags()
    if args.kernels:
        # The second process, which `schedules` starts.
        print(json.dumps(kernel_cycles(args.configs[0], args.kernels)))
        return
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    for name in (name for name in CONFIGS if name.startswith(tuple(args.configs))):
        for chip in args.chips.split(","):
            if f"{name}, {chip}" not in results:
                print(f"compiling {name} for {chip}", file=sys.stderr, flush=True)
                results[f"{name}, {chip}"] = seconds(name, chip)
                args.results.write_text(json.dumps(results, indent=1))
    print_table(results)


def print_table(results: Mapping[str, tuple[float, float]]) -> None:
    """Print a row for each config and a column for each chip; what was not compiled is empty."""
    print(f"| plan / compiler, ms | {' | '.join(TOPOLOGIES)} |\n|---|{'---|' * len(TOPOLOGIES)}")
    errors = []
    for name in CONFIGS:
        cells = []
        for chip in TOPOLOGIES:
            plan, compiler = results.get(f"{name}, {chip}", (0.0, 0.0))
            if compiler:
                errors.append(plan / compiler - 1)
            text = (
                f"{1e3 * plan:.1f} / {1e3 * compiler:.1f} ({plan / compiler - 1:+.0%})"
                if compiler
                else ""
            )
            cells.append(text)
        if any(cells):
            print(f"| {name} | {' | '.join(cells)} |")
    if errors:
        print(
            f"\n{len(errors)} of {len(CONFIGS) * len(TOPOLOGIES)}, largest error {max(errors, key=abs):+.0%}"
        )


def config(name: str, devices: int) -> Config:
    image, text, precomputed, changes = CONFIGS[name]
    return config_of(Row(image, text, precomputed, 0), PAIRS * devices, changes)


def seconds(name: str, chip: str) -> tuple[float, float]:
    """Return the seconds of a step's computation: by the plan, and by the compiler's schedule."""
    topology = open_topology(TOPOLOGIES[chip])
    of_config = config(name, len(topology.devices))
    step = abstract_step(of_config, topology.devices)
    compiled = compile_step(step, step.abstract_batch(of_config.batch_size))
    found = operations(compiled.hlo, topology.chip)
    kernels = schedules(name, chip)
    computations, entry = parse(compiled.hlo)
    cycles = sum(
        times * kernels[key]
        for computation, times in runs(computations, entry).items()
        for instruction in computations[computation].values()
        if (key := kernel_key(instruction.shape, instruction.rest))
    )
    plan = sum(found.parts.values())
    stated = sum(found.layers[kernel] for kernel in found.kernels)
    return plan, plan - stated + cycles / topology.chip.clock


def kernel_key(shape: str, attributes: str) -> str | None:
    """Return the name and the first result of a Pallas kernel; None for other instructions."""
    name = re.search(r'op_name="[^"]*?(\w+)/pallas_call', attributes)
    result = re.search(r"(\w+)\[([\d,]+)\]", shape)
    if "tpu_custom_call" not in attributes or name is None or result is None:
        return None
    return f"{name[1]} {result[2]}"


def schedules(name: str, chip: str) -> dict[str, float]:
    """Return the cycles of a call of each kernel, counted by a second process, whose compiler writes them."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        command = [sys.executable, "-m", "benchmarks.plan_check", name, f"--kernels={chip}"]
        output = subprocess.check_output(
            command, env=os.environ | {"LIBTPU_INIT_ARGS": flags, "KERNEL_SCHEDULES": folder}
        )
    return json.loads(output.splitlines()[-1])


def kernel_cycles(name: str, chip: str) -> dict[str, float]:
    """Compile each kernel of a config's step alone and return the cycles of a call by `kernel_key`."""
    topology = open_topology(TOPOLOGIES[chip])
    of_config = config(name, len(topology.devices))
    step = abstract_step(of_config, topology.devices)
    with jax.set_mesh(step.model.mesh):
        jaxpr = traced(step, step.abstract_batch(of_config.batch_size)).jaxpr
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    folder, cycles = Path(os.environ["KERNEL_SCHEDULES"]), {}
    for equation in pallas_calls(jaxpr):
        shape = ",".join(map(str, equation.outvars[0].aval.shape))
        kernel = equation.params["name"]
        key = f"{kernel} {shape}"
        if key in cycles:
            continue
        inputs = [
            jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=sharding)
            for v in equation.invars
        ]

        def kernel_alone(*inputs: jax.Array, equation: Any = equation) -> Any:
            return equation.primitive.bind(*inputs, **equation.params)

        before = set(folder.iterdir())
        jax.jit(kernel_alone).lower(*inputs).compile()
        # The instruction has the name of the function. Others copy its operands.
        (file,) = (
            f
            for f in set(folder.iterdir()) - before
            if re.search(r"-kernel_alone\S*-\d+-final_bundles\.txt$", f.name)
        )
        bundles = len(re.findall(r"^\s*0x[0-9a-f]+", file.read_text(), re.MULTILINE))
        turns = math.prod(equation.params["grid_mapping"].grid)
        is_shared = "parallel" in str(equation.params["compiler_params"])
        cycles[key] = bundles * turns / (CORES.get(chip, 1) if is_shared else 1)
    return cycles


def pallas_calls(jaxpr: Any) -> Iterator[Any]:
    """Yield the calls of kernels in a program and the programs inside it."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for inside in core.jaxprs_in_params(equation.params):
            yield from pallas_calls(inside)


if __name__ == "__main__":
    main()
