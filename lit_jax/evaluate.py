"""Measures a model: python -m lit_jax.evaluate --workdir=DIR, or --model=FOLDER_OR_HUB_ID

    --workdir=DIR                       the evaluations of the run's own config, at its latest checkpoint
                                        or that of --step=N
    --data=FOLDER --classes=FILE.json   zero-shot classification of other data, with either model
    --data=FOLDER                       the same if the data has a classnames.txt, else image-text retrieval
    --data=FOLDER --train_data=FOLDER   linear probe on other data; with --shots=1,4,16 few-shot

Prints a table, and writes the numbers to --output as flat JSON, to --results in CLIP_benchmark's layout and
as Markdown, and to --report as a page for a browser. A run's own evaluations at its latest checkpoint go into
its results.json and evals/ if not told otherwise. --cache keeps embeddings for the next time.
Exit codes: 0 done, 2 bad input, 76 another process of the same run is gone.
"""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import jax

from lit_jax.cli import Parser, add_path, command
from lit_jax.config import EvalConfig, MeshConfig, parse
from lit_jax.credentials import split_keys
from lit_jax.data.image_processor import load_image_transform
from lit_jax.data.makers import make_missing
from lit_jax.data.text import load_tokenizer
from lit_jax.display import printable
from lit_jax.distributed import process
from lit_jax.distributed.mesh import make_mesh, replicated
from lit_jax.errors import UserError
from lit_jax.evals.class_files import classes_in
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


@quiet_orbax()
@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    process.initialize()
    evals = _evals_of_flags(args) if args.data else _evals_of_run(args.workdir)
    if args.data:
        make_missing(source for task in evals.values() for source in (task.data, task.train))
    if args.batch_size:
        evals = {
            name: dataclasses.replace(config, batch_size=args.batch_size)
            for name, config in evals.items()
        }
    prepared = open_evals(evals)  # before the weights: its errors should not take minutes
    encoder, params, subject = _load(args)
    check_tokens(prepared, encoder.tokenizer)
    evaluations = run(prepared, encoder, params, cache=args.cache)
    if process.is_primary():
        print(table(flatten_metrics(evaluations)))
        _write(args, evaluations, subject)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("lit_jax.evaluate", __doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    add_path(model, "--workdir", help="folder of a training run")
    model.add_argument("--model", help="folder or Hub id of a dual encoder")
    parser.add_argument(
        "--position_ids",
        choices=get_args(PositionIds),
        help="from where --model counts positions, for a RoBERTa that was trained in Flax: arange",
    )
    parser.add_argument("--step", type=int, help="of the checkpoint; the latest if not given")
    parser.add_argument("--data", help="a data set in any format of docs/data.md")
    parser.add_argument("--split", help="of --data, if it has splits")
    for key in ("image_key", "caption_key", "label_key"):
        parser.add_argument(f"--{key}", help="name of the column, field or feature")
    parser.add_argument("--classes", help="file with class names (see docs/evaluation.md)")
    parser.add_argument("--templates", help="file with templates; else those of --classes")
    parser.add_argument(
        "--labels",
        help="'sorted' if the labels, sorted, are the classes in order; also 'sorted_as_text' and "
        "'sorted_as_numbers'",
    )
    parser.add_argument("--dataset", help="its key in files of many, and its name in results")
    parser.add_argument(
        "--languages", help="en,de,... of the captions; they take the place of {language} in paths"
    )
    parser.add_argument("--train_data", help="what a linear probe learns from")
    parser.add_argument("--train_split", help="of --train_data, if it has splits")
    parser.add_argument("--shots", help="1,2,4,... training images of each class")
    parser.add_argument("--batch_size", type=int, help="over all devices and processes")
    add_path(parser, "--output", help="JSON file to write, flat")
    add_path(parser, "--results", help="folder for CLIP_benchmark's JSON and a table")
    add_path(parser, "--report", help="HTML file to write")
    add_path(parser, "--cache", help="folder that keeps embeddings")
    args = parser.parse(argv)
    _check(args)
    if args.workdir and not args.data and args.step is None:
        args.output = args.output or args.workdir / "results.json"
        args.results = args.results or args.workdir / "evals"
    return args


def _check(args: argparse.Namespace) -> None:
    """Raises UserError where flags that are right one by one do not fit each other."""
    about_data = (*_SOURCE, *_EVALUATION, "train_data", "train_split", "shots")
    if alone := [f"--{name}" for name in about_data if getattr(args, name) and not args.data]:
        raise UserError(f"{' and '.join(alone)} tell about --data, which is missing; give both.")
    if args.model and args.step is not None:
        raise UserError("--step chooses a checkpoint of --workdir; leave it out with --model.")
    if args.workdir and args.position_ids:
        raise UserError(
            "--position_ids is for --model; a run has it in config.model.text.overrides.position_ids."
        )
    if args.model and not args.data:
        raise UserError("--model has no evaluations of its own; give --data (and --classes) too.")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch_size={args.batch_size} is no batch; give 1 or more.")
    if args.classes and args.train_data:
        raise UserError(
            "--classes is for zero-shot classification and --train_data for a probe; give one of them."
        )
    if (args.shots or args.train_split) and not args.train_data:
        raise UserError("--shots and --train_split tell about --train_data, which is missing.")
    for flag in ("output", "report"):
        path = getattr(args, flag)
        if path and not path.parent.is_dir():
            raise UserError(f"--{flag}={path}: there is no folder {path.parent}.")


_SOURCE = ("split", "image_key", "caption_key", "label_key")
_EVALUATION = ("classes", "templates", "labels", "dataset", "languages")


def _evals_of_flags(args: argparse.Namespace) -> dict[str, EvalConfig]:
    source = {"path": args.data} | _given(args, _SOURCE)
    raw = {"data": source, "kind": "zero_shot" if args.classes else "retrieval"}
    raw |= _given(args, _EVALUATION)
    if args.languages is not None:
        raw["languages"] = [language.strip() for language in args.languages.split(",")]
    if args.train_data:
        train = source | {"path": args.train_data, "split": args.train_split or args.split}
        raw |= {"kind": "few_shot" if args.shots else "linear_probe", "train": train}
    if args.shots:
        raw["shots"] = _numbers(args.shots)
    ((name, config),) = parse({"evals": {_name(args): raw}}).evals.items()
    if config.kind == "retrieval" and (file := classes_in(config.data, *config.languages[:1])):
        log.info("%s lies in the data: this is zero-shot classification.", file)
        config = dataclasses.replace(config, kind="zero_shot")
    alone = [f"--{flag}" for flag in ("templates", "labels") if getattr(args, flag)]
    if alone and config.kind != "zero_shot":
        raise UserError(
            f"{' and '.join(alone)} tell about zero-shot classification; give --classes, too."
        )
    return {name: config}


def _name(args: argparse.Namespace) -> str:
    """Of the data set, for results: as it is given, or the last part of the path that says something."""
    path = (
        split_keys(args.data)[0].partition("?")[0]
        if "://" in args.data
        else str(Path(args.data).absolute())
    )
    parts = [part for part in path.split("/") if part and "{" not in part]
    return printable(args.dataset or (parts[-1] if parts else "data"))


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, str]:
    return {name: getattr(args, name) for name in names if getattr(args, name)}


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--shots={text} must be numbers joined by commas, such as 1,4,16."
        ) from None


def _evals_of_run(workdir: Path) -> dict[str, EvalConfig]:
    config = read_config(workdir)
    if config is None:
        raise UserError(f"{workdir} is not a run folder: it has no config.json.")
    if not config.evals:
        raise UserError(f"The config of {workdir} has no evaluations; give --data to choose one.")
    return config.evals


def _load(args: argparse.Namespace) -> tuple[Encoder, Params, EvaluatedModel]:
    if not args.workdir:
        return *load_folder(args.model, args.position_ids), EvaluatedModel(model=args.model)
    trained = load_run(args.workdir, step=args.step)
    subject = EvaluatedModel(model=args.workdir.absolute().name, pretrained=f"step {trained.step}")
    model = trained.model
    encoder = Encoder.from_processors(model.module, model.mesh, model.processors)
    return encoder, trained.params, subject


def load_folder(model: str, position_ids: PositionIds | None = None) -> tuple[Encoder, Params]:
    """Load a dual encoder from a folder or the Hub onto all devices.

    `position_ids` takes the place of the field in its text tower's config.
    """
    folder = local_folder(model, config_key="--model")
    hf_config = read_hf_config(folder)
    if position_ids and "text_config" in hf_config:
        changes = {"position_ids": position_ids}
        hf_config["text_config"] = override(hf_config["text_config"], changes, "--")
    module, params, _, _ = load_dual_encoder(folder, dtype="float32", hf_config=hf_config)
    mesh = make_mesh(MeshConfig())
    encoder = Encoder(
        module=module.pooled_only(),
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
    """As many tokens as the tokenizer was saved with, and no more than the text model has positions."""
    positions = module.text_model.config.embedding.max_length
    try:
        saved = parse_json((folder / "tokenizer_config.json").read_bytes())["model_max_length"]
    except (OSError, ValueError, LookupError, TypeError):  # what is broken, load_tokenizer says
        return positions
    return min(positions, saved or positions)


def _write(
    args: argparse.Namespace, evaluations: Sequence[Evaluation], subject: EvaluatedModel
) -> None:
    with io_errors("give another --output, --results or --report"):
        if args.output:
            write_json(args.output, flatten_metrics(evaluations))
        if args.results:
            write_results(args.results, evaluations, subject)
        if args.report:
            metrics = read_metrics(args.workdir) if args.workdir else ()
            atomic_write(args.report, html_report(evaluations, subject, metrics))


if __name__ == "__main__":
    sys.exit(main())
