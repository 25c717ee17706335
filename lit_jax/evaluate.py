"""Measure a model.

    python -m lit_jax.evaluate --workdir=DIR, or --model=FOLDER_OR_HUB_ID

    --workdir=DIR                       the evaluations in the run's own config, at its latest checkpoint
                                        or at the checkpoint of --step=N
    --data=FOLDER --classes=FILE.json   zero-shot classification of other data, with either model
    --data=FOLDER                       the same if the data has a classnames.txt, else image-text retrieval
    --data=FOLDER --train_data=FOLDER   linear probe on other data; with --eval.shots=1,4,16 few-shot
    --eval.KEY=VALUE                    any key of an evaluation: --eval.templates=FILE.json,
                                        --eval.data.caption_key=text ... --split, --labels and
                                        --languages have a short form, too

The command prints a table, and writes the numbers to --output as flat JSON, to --results in CLIP_benchmark's
layout and as Markdown, and to --report as an HTML page. By default a run's own evaluations at its latest
checkpoint are written to its results.json and evals/. --cache=FOLDER keeps embeddings for later commands.
Exit codes: 0 done, 2 bad input, 76 another process of the same run is gone.
"""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax

from lit_jax.buckets import AnyPath, check_access
from lit_jax.cli import KeyFlags, Parser, add_path, command, set_key
from lit_jax.config import EvalConfig, MeshConfig, parse_as
from lit_jax.credentials import split_keys
from lit_jax.data.image_processor import load_image_transform
from lit_jax.data.makers import make_missing
from lit_jax.data.text import load_tokenizer
from lit_jax.display import printable
from lit_jax.distributed import process
from lit_jax.distributed.mesh import make_mesh, replicated
from lit_jax.errors import UserError
from lit_jax.evals.classes import classes_in
from lit_jax.evals.encode import Encoder, Params
from lit_jax.evals.runner import Evaluation, check_tokens, flatten_metrics, open_evals, run, table
from lit_jax.files import atomic_write, io_errors, parse_json, write_json
from lit_jax.models.bert import PositionIds
from lit_jax.models.dual_encoder import DualEncoderModule
from lit_jax.reports.html_page import html_report
from lit_jax.reports.result_files import EvaluatedModel, write_results
from lit_jax.training.metrics import read_metrics
from lit_jax.training.workdir import load_run, read_config
from lit_jax.training.workdir_errors import quiet_orbax
from lit_jax.weights.hub import local_folder, override
from lit_jax.weights.hub import read_config as read_hf_config
from lit_jax.weights.load import load_dual_encoder

log = logging.getLogger(__name__)


EVAL = KeyFlags("eval", EvalConfig)
# Flag -> the key of an evaluation that it abbreviates.
SHORT = {
    "data": "data.path",
    "split": "data.split",
    "classes": "classes",
    "labels": "labels",
    "languages": "languages",
    "train_data": "train.path",
}
# Key -> the kinds of evaluation that use it; other keys are for all kinds.
_KINDS_OF = {
    "classes": ("zero_shot",),
    "templates": ("zero_shot",),
    "labels": ("zero_shot",),
    "train": ("linear_probe", "few_shot"),
    "shots": ("few_shot",),
    "draws": ("few_shot",),
}
# The keys that matter only during training.
_IN_TRAINING = ("every", "at_start", "at_end")


@quiet_orbax()
@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process."""
    args, given = _parse(argv)
    process.initialize()
    if _names_data(given):
        evals = _evals_of_flags(given)
        make_missing(source for task in evals.values() for source in (task.data, task.train))
    else:
        evals = _evals_of_run(args.workdir)
        if given:
            evals = {name: dataclasses.replace(task, **given) for name, task in evals.items()}
    # Opened before the weights are loaded, so that its errors do not take minutes.
    prepared = open_evals(evals)
    encoder, params, model = _load(args)
    check_tokens(prepared, encoder.tokenizer)
    evaluations = run(prepared, encoder, params, cache=args.cache)
    if process.is_primary():
        print(table(flatten_metrics(evaluations)))
        _write(args, evaluations, model)


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the values of the flags, and the values of the keys, nested as in EvalConfig."""
    parser = Parser("lit_jax.evaluate", __doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    add_path(model, "--workdir", help="folder of a training run")
    model.add_argument("--model", help="folder or Hub id of a dual encoder")
    parser.add_argument(
        "--position_ids",
        choices=get_args(PositionIds),
        help="how the text tower of --model counts positions; arange for a RoBERTa that was trained in "
        "Flax",
    )
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the latest)")
    for flag, key in SHORT.items():
        parser.add_argument(f"--{flag}", help=f"short for --{EVAL.name}.{key}")
    add_path(parser, "--output", help="JSON file to write, one number for each name")
    add_path(parser, "--results", help="folder for CLIP_benchmark's JSON and a table")
    add_path(parser, "--report", help="HTML file to write")
    add_path(parser, "--cache", help="folder that keeps embeddings for the next evaluation")
    args, pairs = parser.parse_with_keys(argv, EVAL)
    short = [(key, getattr(args, flag)) for flag, key in SHORT.items() if getattr(args, flag)]
    given: dict[str, Any] = {}
    for key, text in [*short, *pairs]:
        set_key(given, EVAL, key, text)
    # Parsed only for its errors, which would otherwise come after the devices are set up.
    parse_as(EvalConfig, given, EVAL.name)
    _check(args, given)
    # Other data or another step must not replace the results of the run.
    if args.workdir and not given and args.step is None:
        args.output = args.output or args.workdir / "results.json"
        args.results = args.results or args.workdir / "evals"
    return args, given


def _names_data(given: Mapping[str, Any]) -> bool:
    return "path" in given.get("data", {})


def _check(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Raise UserError if flags that are valid on their own do not fit together."""
    # The batch size does not change a result, so it may be given for a run's own evaluations, too.
    about_data = [f"--eval.{key}" for key in given if key != "batch_size"]
    if about_data and not _names_data(given):
        raise UserError(f"{' and '.join(about_data)} can only be used with data; also give --data.")
    if unused := [f"--eval.{key}" for key in _IN_TRAINING if key in given]:
        raise UserError(f"{' and '.join(unused)} can only be used during training; leave it out.")
    if args.model and args.step is not None:
        raise UserError("--step chooses a checkpoint of --workdir; leave it out with --model.")
    if args.workdir and args.position_ids:
        raise UserError(
            "--position_ids is for --model; a run has it in config.model.text.overrides.position_ids."
        )
    if args.model and not _names_data(given):
        raise UserError("--model has no evaluations of its own; also give --data (and --classes).")
    for folder in (
        args.cache,
        args.results,
        args.output and args.output.parent,
        args.report and args.report.parent,
    ):
        check_access(folder)
    for flag in ("output", "report"):
        path = getattr(args, flag)
        if isinstance(path, Path) and not path.parent.is_dir():
            raise UserError(
                f"--{flag}={path}: there is no folder {path.parent}; create it, or give another path."
            )


def _evals_of_flags(given: Mapping[str, Any]) -> dict[str, EvalConfig]:
    """Return the evaluation that the flags describe, by the name of its data."""
    raw = dict(given)
    if "train" in raw:
        # The training data of a probe are read with the same keys as the test data.
        raw["train"] = raw["data"] | raw["train"]
    if "kind" not in raw:
        probe = "few_shot" if "shots" in raw else "linear_probe"
        raw["kind"] = probe if "train" in raw else "zero_shot" if "classes" in raw else "retrieval"
    config = parse_as(EvalConfig, raw, EVAL.name)
    # Data with class names in their folder are meant for classification, unless a flag says otherwise.
    is_chosen = "kind" in given or config.kind != "retrieval"
    if not is_chosen and (file := classes_in(config.data, *config.languages[:1])):
        log.info("%s is part of the data, so this is zero-shot classification.", file)
        config = dataclasses.replace(config, kind="zero_shot")
    for key in given:
        kinds = _KINDS_OF.get(key, (config.kind,))
        if config.kind not in kinds:
            raise UserError(
                f"--eval.{key} is for {' and '.join(kinds)}, and this is {config.kind}; leave it out, or "
                "choose the kind: --classes makes it zero_shot, --train_data makes it linear_probe, and "
                "few_shot with --eval.shots."
            )
    return {_name(config): config}


def _name(config: EvalConfig) -> str:
    """Return the data set's name in results, by default the last part of its path without a placeholder."""
    path = config.data.path
    path = split_keys(path)[0].partition("?")[0] if "://" in path else str(Path(path).absolute())
    parts = [part for part in path.split("/") if part and "{" not in part]
    return printable(config.dataset or (parts[-1] if parts else "data"))


def _evals_of_run(workdir: AnyPath) -> dict[str, EvalConfig]:
    config = read_config(workdir)
    if config is None:
        raise UserError(
            f"{workdir} is not a run folder, because it has no config.json; give the --workdir of a training."
        )
    if not config.evals:
        raise UserError(f"The config of {workdir} has no evaluations; give --data to choose one.")
    return config.evals


def _load(args: argparse.Namespace) -> tuple[Encoder, Params, EvaluatedModel]:
    if not args.workdir:
        return *load_folder(args.model, args.position_ids), EvaluatedModel(model=args.model)
    trained = load_run(args.workdir, step=args.step)
    model = trained.model
    encoder = Encoder.from_processors(model.module, model.mesh, model.processors)
    name = args.workdir.absolute().name
    return encoder, trained.params, EvaluatedModel(model=name, pretrained=f"step {trained.step}")


def load_folder(model: str, position_ids: PositionIds | None = None) -> tuple[Encoder, Params]:
    """Load a dual encoder from a folder or the Hub onto all devices.

    `position_ids` replaces the field in the config of the text tower.
    """
    folder = local_folder(model, config_key="--model")
    hf_config = read_hf_config(folder)
    if position_ids and "text_config" in hf_config:
        changes = {"position_ids": position_ids}
        hf_config["text_config"] = override(hf_config["text_config"], changes, "--")
    module, params, _, _ = load_dual_encoder(folder, dtype="float32", hf_config=hf_config)
    mesh = make_mesh(MeshConfig())
    encoder = Encoder(
        module=module.features_only(),
        mesh=mesh,
        image_transform=load_image_transform(folder),
        tokenizer=load_tokenizer(
            folder,
            max_length=_text_length(folder, module),
            fixed_length=module.text_model.fixed_length,
            lowercase=None,
        ),
    )
    return encoder, jax.device_put(params, replicated(mesh))


def _text_length(folder: Path, module: DualEncoderModule) -> int:
    """Return the length with which the tokenizer was saved, at most the positions of the text model."""
    positions = module.text_model.config.embedding.max_length
    try:
        saved = parse_json((folder / "tokenizer_config.json").read_bytes())["model_max_length"]
    # `load_tokenizer` raises a better error about a broken file.
    except (OSError, ValueError, LookupError, TypeError):
        return positions
    return min(positions, saved or positions)


def _write(
    args: argparse.Namespace, evaluations: Sequence[Evaluation], model: EvaluatedModel
) -> None:
    with io_errors("give another --output, --results or --report"):
        if args.output:
            write_json(args.output, flatten_metrics(evaluations))
        if args.results:
            write_results(args.results, evaluations, model)
        if args.report:
            metrics = read_metrics(args.workdir) if args.workdir else ()
            atomic_write(args.report, html_report(evaluations, model, metrics))


if __name__ == "__main__":
    sys.exit(main())
