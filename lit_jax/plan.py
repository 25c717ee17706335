"""Plan a run: compile the train step of a config for TPUs that you need not have.

    python -m lit_jax.plan --config=configs/vit_bert.py:base --topology=v5e:4x4

The table says whether the step fits and what bounds its speed. The flags --config and --config.KEY=VALUE are
those of training. The command reads no weights and no data: config.json, tokenizer and image processor of a
model suffice. It needs libtpu (requirements-tpu.txt), but no TPU.
Exit codes: 0 with an answer, also if the step does not fit; 2 bad input.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from lit_jax.cli import Parser, add_path, command
from lit_jax.config_file import load_config
from lit_jax.distributed.flags import set_flags
from lit_jax.errors import UserError
from lit_jax.files import io_errors, write_json
from lit_jax.planning.chips import open_topology
from lit_jax.planning.planner import make_plan
from lit_jax.planning.table import table


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process."""
    parser = Parser("lit_jax.plan", __doc__)
    parser.add_argument("--config", required=True, help="file.py or file.py:argument")
    parser.add_argument("--topology", required=True, help="such as v5e:16x16")
    parser.add_argument(
        "--slices", type=int, default=1, help="number of slices of that topology (default: 1)"
    )
    parser.add_argument(
        "--compilations",
        type=int,
        default=6,
        help="largest number of compilations; all but the first search for the largest batch that fits "
        "(default: 6)",
    )
    add_path(
        parser,
        "--output",
        default=Path("plan.json"),
        help="JSON file to write (default: plan.json)",
    )
    args, overrides = parser.parse_with_keys(argv)
    if args.compilations < 1:
        raise UserError(f"--compilations={args.compilations} must be at least 1.")
    if not args.output.parent.is_dir() or args.output.is_dir():
        raise UserError(f"--output={args.output} must name a file in a folder that exists.")
    set_flags()
    # First, because it restricts JAX to the CPU, whatever JAX_PLATFORMS says, and a config file may ask JAX
    # for its devices.
    topology = open_topology(args.topology, slices=args.slices)
    config = load_config(args.config, overrides)
    plan = make_plan(config, topology, slices=args.slices, compilations=args.compilations)
    # Printed first, so that the answer is not lost if the file cannot be written.
    print(table(plan), flush=True)
    with io_errors("give another --output"):
        write_json(args.output, dataclasses.asdict(plan))
    print(f"\n{args.output}")


if __name__ == "__main__":
    sys.exit(main())
