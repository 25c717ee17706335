"""Images per second of zero-shot classification, against the jitted image tower alone.

    python -m benchmarks.zero_shot [--images=64] [--batch=16] [--classes=10] [--repeats=3] [--tiny]

Model: ViT-B/16 + BERT-base with random weights, float32. Data: JPEGs as in benchmarks/input_pipeline.py.

Method: the peer is the image tower, jitted, on one batch of random pixels that lies on the device already, as
many times as there are batches. The evaluation (lit_jax.evals.zero_shot) reads, decodes and resizes every
image, embeds it, embeds the class texts (one template each), classifies and counts. Both in turn on all
cores, after a first time of each that compiles. Prints median images/s on the clock, spread (half the
distance between quartiles), and two ratios evaluation / tower: of images/s, and of images per second of
processor time.
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contenders import tower_configs
from benchmarks.flags import read_flags
from benchmarks.input_pipeline import DEMO, make_data
from benchmarks.timing import in_turn
from lit_jax.config import MeshConfig, ModelConfig, SourceConfig
from lit_jax.data.image_processor import load_image_transform
from lit_jax.data.sources import open_source
from lit_jax.data.text import load_tokenizer
from lit_jax.distributed.flags import set_flags
from lit_jax.distributed.mesh import make_mesh, replicated
from lit_jax.evals.encode import Encoder
from lit_jax.evals.zero_shot import Classes, zero_shot
from lit_jax.models.dual_encoder import build_dual_encoder


def main() -> None:
    args = read_flags(__doc__, images=64, batch=16, classes=10, repeats=3, tiny=False)
    set_flags()
    images = 2 * args.batch if args.tiny else args.images
    encoder = make_encoder(args.batch, args.tiny)
    params = random_parameters(encoder)
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), images, images)
        source = open_source(SourceConfig(path=folder))
        names = tuple(f"number {i}" for i in range(args.classes))
        classes = Classes(names=names, templates=("a photo of the {}",))
        label_N = np.arange(images, dtype=np.int32) % args.classes
        tower = bare_tower(encoder, params, -(-images // encoder.rows))
        times = in_turn(
            {
                "tower": tower,
                "evaluation": lambda: zero_shot(encoder, params, source, classes, label_N),
            },
            args.repeats,
        )
    base = times["tower"]
    print(f"{'':10}  images/s         ratio  ratio of processor time")
    for name, of_contender in times.items():
        print(
            f"{name:10} {images / of_contender.wall:9.2f} ±{of_contender.spread:4.0%} "
            f"{base.wall / of_contender.wall:8.2f} {base.cpu / of_contender.cpu:12.2f}"
        )


def make_encoder(batch: int, tiny: bool) -> Encoder:
    vit, bert = (tower.to_dict() for tower in tower_configs("tiny" if tiny else "B/16"))
    tokenizer = load_tokenizer(DEMO / "bert", max_length=32)
    bert["vocab_size"] = max(bert["vocab_size"], len(tokenizer))
    return Encoder(
        module=build_dual_encoder(vit, bert, ModelConfig()).features_only(),
        mesh=make_mesh(MeshConfig()),
        image_transform=load_image_transform(DEMO / "vit", image_size=vit["image_size"]),
        tokenizer=tokenizer,
        batch_size=batch,
    )


def random_parameters(encoder: Encoder) -> Any:
    pixels = jnp.zeros((1, *encoder.image_transform.output_shape))
    batch = {"pixel_values": pixels, "input_ids": jnp.ones((1, 8), jnp.int32)}
    init = jax.jit(encoder.module.init, out_shardings=replicated(encoder.mesh))
    return init(jax.random.key(0), batch)["params"]


def bare_tower(encoder: Encoder, params: Any, count: int) -> Any:
    shape = (encoder.rows, *encoder.image_transform.output_shape)
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    embed = jax.jit(lambda p, x: encoder.module.apply({"params": p}, x, method="image_features"))

    def run() -> None:
        for _ in range(count):
            jax.block_until_ready(embed(params, pixels))

    return run


if __name__ == "__main__":
    main()
