"""Train a dual encoder.

    python -m lit_jax.train --config=configs/vit_bert.py --workdir=DIR

--config takes a file and its argument (configs/vit_bert.py:base,batch=1024); each key of the config can
be overridden (--config.schedule.learning_rate=3e-4). Given again, the command goes on from the latest
checkpoint. Exit codes: 0 done, 2 bad input, 75 stopped by SIGTERM with all saved, 76 another process of
the run is gone (run it again to go on).
"""

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optax
from ml_collections import ConfigDict

from lit_jax.cli import Parser, add_path, command
from lit_jax.config import Config, Side, parse
from lit_jax.config_file import load_config
from lit_jax.data.example import Source
from lit_jax.data.makers import make_missing, sources_of
from lit_jax.distributed import process
from lit_jax.evals import runner
from lit_jax.evals.encode import Encoder
from lit_jax.files import atomic_write, write_json
from lit_jax.models.tower import Tower
from lit_jax.reports.html_page import html_report
from lit_jax.reports.result_files import EvaluatedModel, write_results
from lit_jax.training.losses import Objective
from lit_jax.training.metrics import read_metrics
from lit_jax.training.model_factory import OwnTowers, TrainedModel
from lit_jax.training.passed import Callback, Passed
from lit_jax.training.trainer import Evaluations, train
from lit_jax.training.workdir_errors import quiet_orbax, workdir_errors
from lit_jax.trees import Tree


@quiet_orbax()
@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("lit_jax.train", __doc__)
    parser.add_argument("--config", required=True, help="file.py or file.py:argument")
    add_path(parser, "--workdir", required=True, help="run folder")
    parser.add_argument(
        "--allow_changes",
        default="",
        help="config keys, joined by commas, that may differ from those the run was started with",
    )
    args, overrides = parser.parse_with_keys(argv)
    process.initialize()  # first: a config file may ask JAX for its devices
    config = load_config(args.config, overrides)
    fit(config, args.workdir, allowed_changes=args.allow_changes.split(","))


def fit(
    config: Config | ConfigDict,
    workdir: str | Path,
    *,
    source: Source | None = None,
    loss: Objective | None = None,
    optimizer: optax.GradientTransformation | None = None,
    towers: Mapping[Side, Tower | tuple[Tower, Tree]] = MappingProxyType({}),
    callbacks: Sequence[tuple[str, Callback]] = (),
    allowed_changes: Collection[str] = (),
) -> TrainedModel:
    """Train a model as the command does, or go on from the latest checkpoint in `workdir`.

    Objects that are passed are described in config.json, by module, qualified name and fields: a run goes
    on only with the same objects.

    Args:
        config: of the run; the ConfigDict of a recipe is parsed.
        source: training data in the place of config.data.train and config.data.mixture: anything with
            `len(source)` and `source[i]`, which returns an `Example` (lit_jax.data.example).
        loss: takes the output of the model (`DualEncoderOutput`) and the batch, and returns the value to
            minimise, a float32 scalar, and a dict of metrics. It sees the whole batch of all devices.
        optimizer: of optax, in the place of config.optimizer and config.schedule: clipping, weight decay and
            learning rate are its own. config.policy.learning_rate still multiplies its updates.
        towers: by their side, "image" or "text": modules of a subclass of lit_jax.models.tower.Tower, in the
            place of those in the folders of config.model, which still have the processors. A pretrained one
            comes as (module, parameters). Such a model cannot be exported, and only `lit_jax.load_run` with
            the same towers reads it.
        callbacks: pairs of a duration such as "1000 steps" and a function, which is called with the
            `TrainedModel` each time that many steps have been taken, on all processes. Its result, a
            dict of numbers or None, is reported with the metrics. If the run is stopped between a checkpoint
            and a call, the resumed run does not make the call.
        allowed_changes: keys of the config that may differ from those the run was started with; also
            "source", "loss", "optimizer" and "towers", and "data" for other examples.

    Returns the trained model. Raises UserError on bad input, and Preempted after SIGTERM, once a checkpoint
    of the last step is on disk.
    """
    if not isinstance(config, Config):
        config = parse(config)
    make_missing(sources_of(config))
    # Opened before training: a mistake in an evaluation should not cost a run.
    evaluations = ConfiguredEvaluations(config, Path(workdir), runner.open_evals(config.evals))
    own: OwnTowers = {
        side: tower if isinstance(tower, tuple) else (tower, None) for side, tower in towers.items()
    }
    passed = Passed(
        source=source, loss=loss, optimizer=optimizer, towers=own, callbacks=tuple(callbacks)
    )
    return train(config, Path(workdir), evaluations, passed=passed, allowed_changes=allowed_changes)


class ConfiguredEvaluations(Evaluations):
    """The evaluations of a config; those of the last step are kept, since the end needs them again."""

    def __init__(self, config: Config, workdir: Path, prepared: Sequence[runner.PreparedEval]):
        self._config, self._workdir = config, workdir
        self._prepared = prepared
        self._done: dict[str, runner.Evaluation] = {}
        self._step = -1

    def check(self, tokenizer: Any) -> None:
        runner.check_tokens(self._prepared, tokenizer)

    def measure(self, trained: TrainedModel, names: Collection[str]) -> runner.Metrics:
        chosen = [task for task in self._prepared if task.key in names]
        return runner.flatten_metrics(self._evaluate(trained, chosen))

    def finish(self, trained: TrainedModel) -> None:
        finish(self._config, self._workdir, trained, self._finally(trained))

    def _finally(self, trained: TrainedModel) -> list[runner.Evaluation]:
        """Return the evaluations at the end of a run, of which only those that are not done yet are run."""
        chosen = [task for task in self._prepared if task.config.at_end]
        done = self._done if self._step == trained.step else {}
        self._evaluate(trained, [task for task in chosen if task.name not in done])
        return [self._done[task.name] for task in chosen]

    def _evaluate(
        self, trained: TrainedModel, tasks: Sequence[runner.PreparedEval]
    ) -> Sequence[runner.Evaluation]:
        done = runner.run(tasks, encoder_of(trained), trained.params)
        earlier = self._done if self._step == trained.step else {}
        self._done, self._step = earlier | {e.prepared.name: e for e in done}, trained.step
        return done


def encoder_of(trained: TrainedModel) -> Encoder:
    """Return the encoder that evaluates a trained model."""
    model = trained.model
    return Encoder.from_processors(model.module, model.mesh, model.processors)


def finish(
    config: Config, workdir: Path, trained: TrainedModel, evaluations: Sequence[runner.Evaluation]
) -> None:
    """Write results.json, evals/ and the report, and print what the user sees last."""
    if not process.is_primary():
        return
    results = runner.flatten_metrics(evaluations)
    model = EvaluatedModel(model=workdir.absolute().name, pretrained=f"step {trained.step}")
    with workdir_errors(workdir):
        write_json(workdir / "results.json", results)
        if evaluations:
            write_results(workdir / "evals", evaluations, model)
        if config.report != "none":
            (workdir / "report").mkdir(exist_ok=True)
            page = html_report(evaluations, model, read_metrics(workdir))
            atomic_write(workdir / "report" / "index.html", page)
    print(runner.table(results))
    for path in ("results.json", "evals", "metrics.jsonl", "checkpoints", "report"):
        if (workdir / path).exists():
            print(f"{path:14} {workdir / path}")


if __name__ == "__main__":
    sys.exit(main())
