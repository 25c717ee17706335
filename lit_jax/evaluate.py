"""Measures a model: python -m lit_jax.evaluate --workdir=DIR, or --model=FOLDER_OR_HUB_ID

    --workdir=DIR                       the evaluations of the run's own config, at its latest checkpoint
                                        or that of --step=N
    --data=FOLDER --classes=FILE.json   zero-shot classification of other data, with either model
    --data=FOLDER                       image-text retrieval on other data, with either model

Prints a table, and writes the numbers to --output as flat JSON: for a run's own evaluations, at its latest
checkpoint, into its results.json if not told otherwise.
Exit codes: 0 done, 2 bad input.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from lit_jax.config import EvalConfig, MeshConfig, SourceConfig
from lit_jax.console import command, named_folder
from lit_jax.data.image import ImageTransform
from lit_jax.data.text import load_tokenizer
from lit_jax.distributed import process
from lit_jax.distributed.mesh import make_mesh, replicated
from lit_jax.errors import UserError
from lit_jax.evals.encode import Encoder, Params
from lit_jax.evals.runner import Metrics, open_evals, run, table
from lit_jax.files import write_json
from lit_jax.models.dual_encoder import DualEncoderModule
from lit_jax.training.run import load_run, read_config
from lit_jax.weights.hub import local_folder
from lit_jax.weights.load import load_dual_encoder


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    process.initialize()
    evals = _evals_of_flags(args) if args.data else _evals_of_run(args.workdir)
    if args.batch_size:
        evals = {
            name: dataclasses.replace(config, batch_size=args.batch_size)
            for name, config in evals.items()
        }
    prepared = open_evals(evals)  # before the weights: its errors should not take minutes
    encoder, params = (
        _load_run(args.workdir, args.step) if args.workdir else _load_folder(args.model)
    )
    metrics = run(prepared, encoder, params)
    if process.is_primary():
        print(table(metrics))
        if args.output:
            _write(args.output, metrics)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lit_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", type=named_folder, help="folder of a training run")
    model.add_argument("--model", help="folder or Hub id of a dual encoder")
    parser.add_argument("--step", type=int, help="of the checkpoint; the latest if not given")
    parser.add_argument("--data", help="folder with captions.jsonl, or with prepared TFDS data")
    parser.add_argument("--split", help="of --data, if it has splits")
    for key in ("image_key", "caption_key", "label_key"):
        parser.add_argument(f"--{key}", help="name of the feature in prepared TFDS data")
    parser.add_argument("--classes", help='JSON file with "classnames" and "templates"')
    parser.add_argument("--batch_size", type=int, help="over all devices and processes")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    _check(args)
    if args.workdir and not args.data and args.step is None:
        args.output = args.output or args.workdir / "results.json"
    return args


def _check(args: argparse.Namespace) -> None:
    """Raises UserError where flags that are right one by one do not fit each other."""
    about_data = ("split", "image_key", "caption_key", "label_key", "classes")
    if alone := [f"--{name}" for name in about_data if getattr(args, name) and not args.data]:
        raise UserError(f"{' and '.join(alone)} tell about --data, which is missing; give both.")
    if args.model and args.step is not None:
        raise UserError("--step chooses a checkpoint of --workdir; leave it out with --model.")
    if args.model and not args.data:
        raise UserError("--model has no evaluations of its own; give --data (and --classes) too.")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch_size={args.batch_size} is no batch; give 1 or more.")
    if args.output and not args.output.parent.is_dir():
        raise UserError(f"--output={args.output}: there is no folder {args.output.parent}.")


def _evals_of_flags(args: argparse.Namespace) -> dict[str, EvalConfig]:
    given = {key: getattr(args, key) for key in ("split", "image_key", "caption_key", "label_key")}
    source = SourceConfig(path=args.data, **{key: value for key, value in given.items() if value})
    kind = "zero_shot" if args.classes else "retrieval"
    return {
        Path(args.data).absolute().name: EvalConfig(kind=kind, data=source, classes=args.classes)
    }


def _evals_of_run(workdir: Path) -> dict[str, EvalConfig]:
    config = read_config(workdir)
    if config is None:
        raise UserError(f"{workdir} is not a run folder: it has no config.json.")
    if not config.evals:
        raise UserError(f"The config of {workdir} has no evaluations; give --data to choose one.")
    return config.evals


def _load_run(workdir: Path, step: int | None) -> tuple[Encoder, Params]:
    trained = load_run(workdir, step=step)
    return Encoder.of_setup(trained.setup), trained.params


def _load_folder(model: str) -> tuple[Encoder, Params]:
    folder = local_folder(model, config_key="--model")
    module, params, _, _ = load_dual_encoder(folder, dtype="float32")
    mesh = make_mesh(MeshConfig())
    encoder = Encoder(
        module=module,
        mesh=mesh,
        image_transform=ImageTransform.from_folder(folder),
        tokenizer=load_tokenizer(folder, max_length=_text_length(folder, module)),
    )
    return encoder, jax.device_put(params, replicated(mesh))


def _text_length(folder: Path, module: DualEncoderModule) -> int:
    """As many tokens as the tokenizer was saved with, and no more than the text model has positions."""
    positions = module.text_model.config.max_length
    try:
        saved = json.loads((folder / "tokenizer_config.json").read_bytes())["model_max_length"]
    except (OSError, ValueError, LookupError, TypeError):  # what is broken, load_tokenizer says
        return positions
    return min(positions, saved or positions)


def _write(path: Path, metrics: Metrics) -> None:
    try:
        write_json(path, metrics)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); give another --output."
        ) from None


if __name__ == "__main__":
    sys.exit(main())
