"""Embeds the training data once with the locked tower: python -m lit_jax.embed --config=FILE --output=DIR

    --config, --config.KEY=VALUE    those of the training that is to follow
    --side=text                     the text tower, if that is the locked one
    --views=K                       K augmented views of each image; sets config.data.views

Train from it with --config.data.image_embeddings=DIR (text_embeddings), and the same --config.data.views=K.
Given again, the command goes on after the last whole shard, on any devices and any number of processes.
Exit codes: 0 done, 2 bad input, 75 stopped by SIGTERM, 76 another process of the same run is gone; after
the last two run it again to go on.
"""

import dataclasses
import sys
from collections.abc import Sequence

from lit_jax.command_line import Parser
from lit_jax.config_file import load_config, parse_with_config
from lit_jax.console import add_path, command
from lit_jax.data.makers import make_missing, sources_of
from lit_jax.distributed import process
from lit_jax.errors import UserError
from lit_jax.training.embed_data import embed


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("lit_jax.embed", __doc__)
    parser.add_argument("--config", required=True, help="file.py or file.py:argument")
    add_path(parser, "--output", required=True, help="folder to write")
    parser.add_argument("--side", choices=("image", "text"), default="image")
    parser.add_argument("--views", type=int, help="of each image; config.data.views if not given")
    parser.add_argument("--batch_size", type=int, help="rows a step of a process; 64 a device")
    args, overrides = parse_with_config(parser, argv)
    process.initialize()  # first: a config file may ask JAX for its devices
    config = load_config(args.config, overrides)
    if args.views is not None:
        if args.side == "text":
            raise UserError("--views is about images; leave it out with --side=text.")
        data = dataclasses.replace(config.data, views=args.views)
        config = dataclasses.replace(config, data=data)
    for flag in ("views", "batch_size"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UserError(f"--{flag}={value} is none; give 1 or more.")
    make_missing(sources_of(config))
    counts = embed(config, args.output, args.side, batch_size=args.batch_size)
    if process.is_primary():
        data = " and ".join(config.data.mixture) or config.data.train.path
        print(f"{counts.rows} rows of {data} are in {args.output}", end="; ")
        print(f"{counts.bad} examples are bad")


if __name__ == "__main__":
    sys.exit(main())
