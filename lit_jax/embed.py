"""Embed the training data once with the locked tower.

    python -m lit_jax.embed --config=FILE --output=DIR

    --config, --config.KEY=VALUE    the config of the training run that follows
    --side=text                     embed texts, if the text tower is the locked one
    --views=K                       K augmented views of each image; sets config.data.views

Train from DIR with --config.data.image_embeddings=DIR (text_embeddings), and the same --config.data.views=K.
To resume an interrupted command, run it again: it continues after the last complete shard, on any devices and
any number of processes. Exit codes: 0 done, 2 bad input, 75 stopped by SIGTERM, 76 another process of the
same run is gone; after 75 or 76 run the same command again.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence

import jax

from lit_jax.buckets import AnyPath, check_access
from lit_jax.cli import Parser, add_path, command
from lit_jax.config import Config, Side
from lit_jax.config_file import load_config
from lit_jax.data.makers import make_missing, sources_of
from lit_jax.data.mixture import open_training_data
from lit_jax.distributed import process
from lit_jax.distributed.mesh import make_mesh
from lit_jax.errors import UserError
from lit_jax.models.dual_encoder import tower_name
from lit_jax.precomputed.fingerprint import tower_fingerprint
from lit_jax.precomputed.format import Counts
from lit_jax.precomputed.match import describe
from lit_jax.precomputed.write import FeatureWriter, check_free
from lit_jax.training.checks import check_captions, check_locked
from lit_jax.training.model_factory import Model, build_model, first_parameters
from lit_jax.training.policy import merge
from lit_jax.trees import Tree

# The default batch size of a device.
ROWS_PER_DEVICE = 64


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process."""
    parser = Parser("lit_jax.embed", __doc__)
    parser.add_argument("--config", required=True, help="file.py or file.py:argument")
    add_path(parser, "--output", required=True, help="folder to write")
    parser.add_argument("--side", choices=("image", "text"), default="image")
    parser.add_argument(
        "--views", type=int, help="number of views of each image (default: config.data.views)"
    )
    parser.add_argument(
        "--batch_size", type=int, help="rows in a step of a process (default: 64 for each device)"
    )
    args, overrides = parser.parse_with_keys(argv)
    # First, because a config file may ask JAX for its devices.
    process.initialize()
    config = load_config(args.config, overrides)
    if args.views is not None:
        if args.side == "text":
            raise UserError("--views applies only to images; leave it out with --side=text.")
        # The number is recorded with the features, where training compares it with its own.
        data = dataclasses.replace(config.data, views=args.views)
        config = dataclasses.replace(config, data=data)
    for flag in ("views", "batch_size"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UserError(f"--{flag}={value} is too small; give 1 or more.")
    make_missing(sources_of(config))
    counts = embed(config, args.output, args.side, batch_size=args.batch_size)
    if process.is_primary():
        # A mixture is known by the names of its parts.
        data = " and ".join(config.data.mixture) or config.data.train.path
        print(f"Wrote {counts.rows} rows of {data} to {args.output}; bad examples: {counts.bad}")


def embed(config: Config, folder: AnyPath, side: Side, *, batch_size: int | None = None) -> Counts:
    """Embed the training data with the locked tower of that side into `folder`, or resume there.

    Each process works on shards of its own, with its own copy of the tower: no process waits for the images
    of another, and a resumed command may have any number of processes.

    Args:
        batch_size: the rows of a step in this process, by default 64 for each of its devices.

    Returns the numbers of rows and of bad examples. Raises UserError for bad input, including too many bad
    samples, and Preempted after SIGTERM; incomplete shards are then lost.
    """
    # Checked before the weights are read, so that this error does not take minutes.
    check_access(folder)
    check_free(folder)
    # Only devices of this process; parameters are sharded over as much of the config's axis as these allow.
    devices = jax.local_devices()
    fsdp = math.gcd(config.mesh.fsdp, len(devices))
    mesh = make_mesh(dataclasses.replace(config.mesh, data=-1, fsdp=fsdp), devices)
    source = open_training_data(config.data)
    model = build_model(config, mesh)
    check_locked(model, side, "python -m lit_jax.embed")
    if side == "text":
        check_captions(model.processors.tokenizer, source)
    if side == "image" and config.data.views is None and model.processors.image_transform.is_random:
        raise UserError(
            "The config augments the images; set --views=K, the number of views of each image to embed."
        )
    header = describe(model.module, model.processors, source, side, config.data.views)
    with jax.set_mesh(mesh):
        params = _tower_parameters(model, side)
        tower = tower_fingerprint(model.module, side, params)
    writer = FeatureWriter(
        source=source,
        inputs=model.processors.of_tower(side, config.data.views),
        module=model.module,
        params=params,
        mesh=mesh,
        side=side,
        rows=-(-(batch_size or ROWS_PER_DEVICE * mesh.size) // mesh.size) * mesh.size,
        threads=config.data.threads,
    )
    header = dataclasses.replace(header, tower=tower)
    return writer.write(folder, header, config.data.max_bad_fraction)


def _tower_parameters(model: Model, side: Side) -> Tree:
    """Return the tower's parameters in the dtypes of the train step, and the scalar parameters.

    Flax requires the scalars in every call, whatever is computed.
    """
    params = merge(*first_parameters(model))
    needed = {k: v for k, v in params.items() if k == tower_name(side) or isinstance(v, jax.Array)}
    abstract = {name: model.abstract[name] for name in needed}
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), needed, abstract)


if __name__ == "__main__":
    sys.exit(main())
