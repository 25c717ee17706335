"""Trains a dual encoder: python -m lit_jax.train --config=configs/vit_bert.py --workdir=DIR

--config takes a file and its argument (configs/vit_bert.py:base,batch=1024); each key of the config can
be overridden (--config.schedule.learning_rate=3e-4). Given again, the command goes on from the latest
checkpoint. Exit codes: 0 done, 2 bad input, 75 stopped by SIGTERM with all saved (run it again to go on).
"""

import logging
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from lit_jax.config import Config, parse
from lit_jax.distributed import process
from lit_jax.errors import command
from lit_jax.evals import runner
from lit_jax.evals.encode import Encoder
from lit_jax.evals.report import write_demo_report
from lit_jax.training.loop import train
from lit_jax.training.metrics import read_metrics
from lit_jax.training.run import Run, write_json

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file[:argument].")
WORKDIR = flags.DEFINE_string("workdir", None, "Run folder: created, or gone on with.")
ALLOW_CHANGES = flags.DEFINE_list(
    "allow_changes", [], "Config keys that may differ from those that the run was started with."
)
flags.mark_flags_as_required(["config", "workdir"])


@command
def main(_: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    process.initialize()
    config, workdir = parse(CONFIG.value), Path(WORKDIR.value)
    evals = runner.open_evals(
        config.evals
    )  # before training: a mistake there should not cost a run
    run = train(config, workdir, allowed_changes=ALLOW_CHANGES.value)
    finish(config, workdir, run, evals)


def finish(config: Config, workdir: Path, run: Run, evals: list[runner.PreparedEval]) -> None:
    """The final evaluations, results.json, the report, and what the user sees last."""
    encoder = Encoder(
        module=run.module,
        mesh=run.mesh,
        image_transform=run.setup.image_transform,
        tokenizer=run.setup.tokenizer,
    )
    results = runner.run(evals, encoder, run.params)
    if config.report == "demo":
        write_demo_report(workdir / "report", encoder, run.params, read_metrics(workdir))
    if process.is_primary():
        write_json(workdir / "results.json", results)
        print(runner.table(results))
        for path in ("results.json", "metrics.jsonl", "checkpoints", "report"):
            if (workdir / path).exists():
                print(f"{path:14} {workdir / path}")


if __name__ == "__main__":
    app.run(main)
