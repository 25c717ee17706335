"""Train a dual encoder.

    python -m lit_jax.train --config=configs/vit_bert.py --workdir=DIR

--config takes a file and its argument (configs/vit_bert.py:base,batch=1024); each key of the config can
be overridden (--config.schedule.learning_rate=3e-4). To resume an interrupted run from its latest
checkpoint, run the same command again. Exit codes: 0 done, 2 bad input, 75 stopped by SIGTERM with all work
saved, 76 another process of the run is gone; after 75 or 76 run the same command again.
"""

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import optax
from ml_collections import ConfigDict

from lit_jax.buckets import AnyPath
from lit_jax.cli import Parser, add_path, command
from lit_jax.config import Config, Side, parse
from lit_jax.config_file import load_config
from lit_jax.data.example import Source
from lit_jax.data.makers import make_missing, sources_of
from lit_jax.distributed import process
from lit_jax.evals import runner
from lit_jax.evals.encode import Encoder
from lit_jax.files import atomic_write, output_path, write_json
from lit_jax.models.tower import Tower
from lit_jax.reports.result_files import EvaluatedModel, write_results
from lit_jax.training.dashboards import Picture
from lit_jax.training.loop import Evaluations
from lit_jax.training.losses import Objective
from lit_jax.training.metrics import read_metrics
from lit_jax.training.model_factory import OwnTowers, TrainedModel
from lit_jax.training.passed import Callback, Passed
from lit_jax.training.passed_checks import check_arguments, check_objects
from lit_jax.training.trainer import train
from lit_jax.training.workdir_errors import quiet_orbax, workdir_errors
from lit_jax.trees import Tree

log = logging.getLogger(__name__)


@quiet_orbax()
@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process."""
    parser = Parser("lit_jax.train", __doc__)
    parser.add_argument("--config", required=True, help="file.py or file.py:argument")
    add_path(parser, "--workdir", required=True, help="run folder")
    parser.add_argument(
        "--allow_changes",
        default="",
        help="config keys, joined by commas, that may differ from those the run was started with",
    )
    args, overrides = parser.parse_with_keys(argv)
    # First, because a config file may ask JAX for its devices.
    process.initialize()
    config = load_config(args.config, overrides)
    fit(config, args.workdir, allowed_changes=args.allow_changes.split(","))


def fit(
    config: Config | ConfigDict,
    workdir: str | AnyPath,
    *,
    source: Source | None = None,
    loss: Objective | None = None,
    optimizer: optax.GradientTransformation | None = None,
    towers: Mapping[Side, Tower | tuple[Tower, Tree]] = MappingProxyType({}),
    callbacks: Sequence[tuple[str, Callback]] = (),
    allowed_changes: Collection[str] = (),
) -> TrainedModel:
    """Train a model as the command does, or resume from the latest checkpoint in `workdir`.

    Passed objects are described in config.json by module, qualified name and fields, and a run resumes only
    with the same objects.

    Args:
        config: the config of the run; the ConfigDict of a recipe is parsed.
        source: training data that take the place of config.data.train and config.data.mixture: anything with
            `len(source)` and `source[i]`, which returns an `Example` (lit_jax.data.example).
        loss: a function of the model's output (`DualEncoderOutput`) and the batch over all devices,
            which returns the value to minimise, a float32 scalar, and a dict of metrics.
        optimizer: an optax optimizer that replaces config.optimizer and config.schedule, and does its own
            clipping, weight decay and learning rate. config.policy.learning_rate still scales its updates.
        towers: modules by side, "image" or "text", of a subclass of lit_jax.models.tower.Tower; the folders
            of config.model still provide the processors. A pretrained tower is a pair (module, parameters).
            Such a model cannot be exported, and only `lit_jax.load_run` with the same towers reads it.
        callbacks: pairs of a duration such as "1000 steps" and a function that is called with the
            `TrainedModel` after every such number of steps, on all processes. The result of a call, a dict of
            numbers or None, is reported with the metrics. If the run stops between a checkpoint and a call,
            the resumed run does not make that call.
        allowed_changes: config keys that may differ from those with which the run was started; also "source",
            "loss", "optimizer" and "towers", and "data" for other examples.

    Returns the trained model. Raises UserError for bad input, and Preempted after SIGTERM, when a checkpoint
    of the last step is on disk.
    """
    check_arguments(config, workdir, allowed_changes)
    check_objects(loss=loss, optimizer=optimizer, towers=towers, callbacks=callbacks)
    config = config if isinstance(config, Config) else parse(config)
    config = config if source is None else _without_training_data(config)
    make_missing(sources_of(config))
    folder = output_path("--workdir", str(workdir))
    # Opened before training, so that a mistake in an evaluation does not cost a run.
    evaluations = ConfiguredEvaluations(config, folder, runner.open_evals(config.evals))
    own = _with_parameters(towers)
    passed = Passed(
        source=source, loss=loss, optimizer=optimizer, towers=own, callbacks=tuple(callbacks)
    )
    return train(config, folder, evaluations, passed=passed, allowed_changes=allowed_changes)


def _with_parameters(towers: Mapping[Side, Tower | tuple[Tower, Tree]]) -> OwnTowers:
    """Return each tower with its parameters, None for a tower that is not pretrained."""
    return {side: own if isinstance(own, tuple) else (own, None) for side, own in towers.items()}


def _without_training_data(config: Config) -> Config:
    """Return the config without the training data that it names, which a passed source replaces."""
    data = config.data
    # config.json must not name data that the run never reads, nor may a script make them.
    named = [data.train.path, *(part.path for part in data.mixture.values())]
    if any(named):
        log.info(
            "The source that was passed to fit replaces the data of the config: %s.",
            ", ".join(filter(None, named)),
        )
    train_data = dataclasses.replace(data.train, path="")
    return dataclasses.replace(config, data=dataclasses.replace(data, train=train_data, mixture={}))


class ConfiguredEvaluations(Evaluations):
    """The evaluations of a config. The latest results are kept, because the end of a run needs them again."""

    def __init__(self, config: Config, workdir: AnyPath, prepared: Sequence[runner.PreparedEval]):
        self._config, self._workdir = config, workdir
        self._prepared = prepared
        self._done: dict[str, runner.Evaluation] = {}
        self._step = -1

    def check(self, tokenizer: Any) -> None:
        """Check the texts of all evaluations with the run's tokenizer; see `runner.check_tokens`."""
        runner.check_tokens(self._prepared, tokenizer)

    def measure(self, trained: TrainedModel, names: Collection[str]) -> runner.Metrics:
        """Run the evaluations with these keys of config.evals, and return their metrics under flat names."""
        chosen = [task for task in self._prepared if task.key in names]
        return runner.flatten_metrics(self._evaluate(trained, chosen))

    def pictures(self, names: Collection[str]) -> Mapping[str, Picture]:
        """Return a picture of images with their most probable classes for each zero-shot evaluation."""
        # Imported here, because matplotlib would delay the start of every run.
        from lit_jax.reports.predictions import predictions_picture

        done = [one for one in self._done.values() if one.prepared.key in names]
        drawn = {f"{one.prepared.name}/predictions": predictions_picture(one) for one in done}
        return {name: picture for name, picture in drawn.items() if picture}

    def finish(self, trained: TrainedModel) -> None:
        """Run the evaluations for the end of the run, and write all results."""
        finish(self._config, self._workdir, trained, self._finally(trained))

    def _finally(self, trained: TrainedModel) -> list[runner.Evaluation]:
        """Return the evaluations for the end of a run; those done at this step already are not repeated."""
        chosen = [task for task in self._prepared if task.config.at_end]
        done = self._done if self._step == trained.step else {}
        self._evaluate(trained, [task for task in chosen if task.name not in done])
        return [self._done[task.name] for task in chosen]

    def _evaluate(
        self, trained: TrainedModel, tasks: Sequence[runner.PreparedEval]
    ) -> Sequence[runner.Evaluation]:
        done = runner.run(tasks, encoder_of(trained), trained.params)
        # Results of an earlier step describe other parameters.
        earlier = self._done if self._step == trained.step else {}
        self._done, self._step = earlier | {e.prepared.name: e for e in done}, trained.step
        return done


def encoder_of(trained: TrainedModel) -> Encoder:
    """Return the encoder for the evaluations of a trained model."""
    model = trained.model
    return Encoder.from_processors(model.module, model.mesh, model.processors)


def finish(
    config: Config,
    workdir: AnyPath,
    trained: TrainedModel,
    evaluations: Sequence[runner.Evaluation],
) -> None:
    """Write results.json, evals/ and the report, and print the metrics and the paths of the results."""
    if not process.is_primary():
        return
    results = runner.flatten_metrics(evaluations)
    model = EvaluatedModel(model=workdir.absolute().name, pretrained=f"step {trained.step}")
    # results.json comes first, because the report reads images again and takes longest.
    with workdir_errors(workdir):
        write_json(workdir / "results.json", results)
        if evaluations:
            write_results(workdir / "evals", evaluations, model)
        if config.report != "none":
            # Imported here, because matplotlib would delay the start of every run.
            from lit_jax.reports.html_page import html_report

            (workdir / "report").mkdir(exist_ok=True)
            page = html_report(evaluations, model, read_metrics(workdir))
            atomic_write(workdir / "report" / "index.html", page)
    print(runner.table(results))
    for path in ("results.json", "evals", "metrics.jsonl", "checkpoints", "report"):
        if (workdir / path).exists():
            print(f"{path:14} {workdir / path}")


if __name__ == "__main__":
    process.begin_command()
    # Threads of Orbax that wait for a store may fail after the command has.
    with quiet_orbax():
        process.end_command(main())
