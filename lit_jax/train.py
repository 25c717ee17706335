"""Trains a dual encoder: python -m lit_jax.train --config=configs/vit_bert.py --workdir=DIR

--config takes a file and its argument (configs/vit_bert.py:base,batch=1024); each key of the config can
be overridden (--config.schedule.learning_rate=3e-4). Given again, the command goes on from the latest
checkpoint. Exit codes: 0 done, 2 bad input, 75 stopped by SIGTERM with all saved (run it again to go on).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lit_jax.config import Config
from lit_jax.config_file import load_config, split_overrides
from lit_jax.console import command, named_folder
from lit_jax.distributed import process
from lit_jax.evals import runner
from lit_jax.evals.encode import Encoder
from lit_jax.evals.report import write_demo_report
from lit_jax.files import write_json
from lit_jax.training.disk import writing
from lit_jax.training.loop import train
from lit_jax.training.metrics import read_metrics
from lit_jax.training.run import Run


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lit_jax.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="file.py or file.py:argument")
    parser.add_argument("--workdir", type=named_folder, required=True, help="run folder")
    parser.add_argument(
        "--allow_changes",
        default="",
        help="config keys, joined by commas, that may differ from those the run was started with",
    )
    args, rest = parser.parse_known_args(argv)
    config = load_config(args.config, split_overrides(rest))
    process.initialize()
    # Opened before training: a mistake in an evaluation should not cost a run.
    evals = runner.open_evals(config.evals)
    run = train(config, args.workdir, allowed_changes=args.allow_changes.split(","))
    finish(config, args.workdir, run, evals)


def finish(config: Config, workdir: Path, run: Run, evals: list[runner.PreparedEval]) -> None:
    """The final evaluations, results.json, the report, and what the user sees last."""
    encoder = Encoder.of_setup(run.setup)
    results = runner.run(evals, encoder, run.params)
    with writing(workdir):
        if config.report == "demo":
            write_demo_report(workdir / "report", encoder, run.params, read_metrics(workdir))
        if process.is_primary():
            write_json(workdir / "results.json", results)
    if process.is_primary():
        print(runner.table(results))
        for path in ("results.json", "metrics.jsonl", "checkpoints", "report"):
            if (workdir / path).exists():
                print(f"{path:14} {workdir / path}")


if __name__ == "__main__":
    sys.exit(main())
