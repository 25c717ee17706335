"""Plan a run: compile the train step of a config for TPUs that you need not have.

    python -m lit_jax.plan --config=configs/vit_bert.py:base --topology=v5e:4x4
    python -m lit_jax.plan --book --config=CONFIG --config=CONFIG ... --topology=TOPOLOGY ...

The table says whether the step fits, what bounds its speed, and how long it takes as the compiler estimates.
With --book the table has a line for each --config on each --topology: fits, time, chip-hours. The flags
--config and --config.KEY=VALUE are those of training; the keys apply to each config. The command reads no
weights and no data: config.json, tokenizer and image processor of a model suffice. The compiler is in libtpu
(requirements-tpu.txt), and needs no TPU.
Exit codes: 0 with an answer, also if the step does not fit; 2 bad input.
"""

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_jax.buckets import AnyPath, check_access
from lit_jax.cli import Parser, add_path, command
from lit_jax.config import Config
from lit_jax.config_file import load_config
from lit_jax.distributed.flags import set_flags
from lit_jax.errors import UserError
from lit_jax.files import io_errors, write_json
from lit_jax.planning.planner import abstract_step, make_plan
from lit_jax.planning.table import BOOK_HEAD, book_line, table
from lit_jax.planning.topologies import Topology, open_topology


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process."""
    args, overrides = _parser().parse_with_keys(argv)
    if args.compilations < 1:
        raise UserError(f"--compilations={args.compilations} must be at least 1.")
    folder = args.output.parent
    check_access(folder)
    if (isinstance(folder, Path) and not folder.is_dir()) or args.output.is_dir():
        raise UserError(f"--output={args.output} must name a file in a folder that exists.")
    if not args.book and len(args.config) + len(args.topology) > 2:
        raise UserError("A plan has one --config and one --topology; add --book for several.")
    set_flags()
    # First, because it restricts JAX to the CPU, whatever JAX_PLATFORMS says, and a config file may ask JAX
    # for its devices.
    topologies = [open_topology(name, slices=args.slices) for name in args.topology]
    configs = {name: load_config(name, overrides) for name in args.config}
    if args.book:
        _write_book(configs, topologies, args.slices, args.output)
    else:
        ((config,), (topology,)) = configs.values(), topologies
        plan = make_plan(config, topology, slices=args.slices, compilations=args.compilations)
        # Printed first, so that the answer is not lost if the file cannot be written.
        print(table(plan), flush=True)
        _write(args.output, dataclasses.asdict(plan))
    print(f"\n{args.output}")


def _parser() -> Parser:
    parser = Parser("lit_jax.plan", __doc__)
    parser.add_argument(
        "--config", required=True, action="append", help="file.py or file.py:argument"
    )
    parser.add_argument("--topology", required=True, action="append", help="such as v5e:16x16")
    parser.add_argument(
        "--book",
        action="store_true",
        help="print one line for each --config on each --topology; both may be given several times",
    )
    parser.add_argument(
        "--slices", type=int, default=1, help="number of slices of that topology (default: 1)"
    )
    parser.add_argument(
        "--compilations",
        type=int,
        default=6,
        help="largest number of compilations; all but the first search for the largest batch that fits "
        "(default: 6; 1 for each line of a book)",
    )
    add_path(
        parser,
        "--output",
        default=Path("plan.json"),
        help="JSON file to write (default: plan.json)",
    )
    return parser


def _write_book(
    configs: Mapping[str, Config], topologies: Sequence[Topology], slices: int, output: AnyPath
) -> None:
    """Print the line of each config on each topology as it is known, and write all plans up to then."""
    pairs = list(itertools.product(configs.items(), topologies))
    # A config that does not fit one of the topologies is refused before the hours of compilation.
    for (_, config), topology in pairs:
        abstract_step(config, topology.devices)
    print(BOOK_HEAD, flush=True)
    plans = []
    for (name, config), topology in pairs:
        plan = make_plan(config, topology, slices=slices, compilations=1)
        print(book_line(name, plan), flush=True)
        plans.append({"config": name, **dataclasses.asdict(plan)})
        _write(output, plans)


def _write(output: AnyPath, content: Any) -> None:
    with io_errors("give another --output"):
        write_json(output, content)


if __name__ == "__main__":
    sys.exit(main())
