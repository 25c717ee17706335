"""Forecasts by the TPU compiler's cycles against throughputs that papers measured on TPUs; no TPU is needed.

    python -m benchmarks.forecast [ROW ...] [--form=plain|fast|both] [--results=forecasts.json]
                                                                                   (requirements-tpu.txt)

A ROW is the beginning of a row's name, such as L/16+L or "B/32+B, precomputed"; without one, all rows are
meant. A row takes one to ten minutes of two cores. It is written to --results as soon as it is compiled, and
not compiled again as long as it is there. To resume, run the same command again; after a change of the code,
delete the file first. Prints a Markdown table of all rows in the file, and the median and the largest error.

Method: the step of configs/vit_bert.py:base, with towers of these sizes, is compiled for the topology of the
paper, and its time is the forecast of `lit_jax.plan`. "plain" is the form without kernels and chunks
(LIT_JAX_PLAIN_OPS=1), which is nearest to the papers'; "fast" compiles as training does.

- LiT's table 7 (2111.07991, appendix G): images a second of each of eight TPU v3 cores, with and without
  precomputed image embeddings. Its rows are compiled at 128 pairs a core, 1024 if precomputed, or
  the largest power of two that fits.
- LiT's model card: images a second of a TPU v4 core at inference, which is half a chip. Its rows are the
  image tower alone, 1024 images a chip; text tower and data have no part in it.
- SigLiT (2303.15343, section 4.4) trained 65,000 steps of 32,768 pairs from precomputed embeddings on four
  TPU v4 chips in less than a day, so at least 6.2 thousand pairs a second of each chip: an inequality.

Only the rows of table 7 count among the errors.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lit_jax.config import Config, MeshConfig, parse
from lit_jax.configs.vit_bert import get_config
from lit_jax.distributed.flags import set_flags
from lit_jax.distributed.flops import matmul_flops
from lit_jax.distributed.mesh import batch_sharding, make_mesh
from lit_jax.planning.cycles import operations
from lit_jax.planning.planner import make_plan
from lit_jax.planning.topologies import open_topology
from lit_jax.training.model_factory import build_model

DEMO = Path(__file__).parents[1] / "configs" / "demo"
# Width, layers, heads, width of the MLP.
SIZES = {
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "g": (1408, 40, 16, 6144),
    "12 layers of L": (1024, 12, 16, 4096),
}


class Row(NamedTuple):
    """A measured throughput.

    Attributes:
        text: the text tower; empty at inference.
        measured: the pairs, or images at inference, a second of each device, or of a v4 core.
        pairs: the pairs of each device.
    """

    image: str
    text: str
    precomputed: bool
    measured: int
    topology: str = "v3:2x2"
    pairs: int = 128

    @property
    def name(self) -> str:
        if not self.text:
            return f"{self.image}, inference"
        return f"{self.image}+{self.text}{', precomputed' if self.precomputed else ''}"


class Result(NamedTuple):
    """A compiled row: pairs of each device in a step, pairs a second of each device, and MFU."""

    pairs: int
    rate: float
    mfu: float


# (towers, images a second of a core from precomputed embeddings, and from images).
TABLE_7 = (
    (("B/32", "B"), 2439, 893),
    (("L/16", "B"), 2423, 215),
    (("L/16", "L"), 920, 204),
    (("g/14", "B"), 2409, 17),
    (("g/14", "L"), 932, 15),
    (("g/14", "g"), 243, 12),
)
ROWS = (
    *(Row(*towers, True, precomputed, pairs=1024) for towers, precomputed, _ in TABLE_7),
    *(Row(*towers, False, images) for towers, _, images in TABLE_7),
    Row("B/16", "", False, 1200, topology="v4:2x2x1", pairs=1024),
    Row("L/16", "", False, 400, topology="v4:2x2x1", pairs=1024),
    Row("B/8", "12 layers of L", True, 6200, topology="v4:2x2x1", pairs=8192),
)
FORMS = ("plain", "fast")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", default=[""])
    parser.add_argument("--form", choices=(*FORMS, "both"), default="plain")
    parser.add_argument("--results", type=Path, default=Path("forecasts.json"))
    args = parser.parse_args()
    set_flags()
    results = {}
    if args.results.exists():
        results = {key: Result(*r) for key, r in json.loads(args.results.read_text()).items()}
    forms = FORMS if args.form == "both" else (args.form,)
    for row, form in ((row, form) for row in ROWS for form in forms):
        key = f"{row.name}, {form}"
        if key in results or not row.name.startswith(tuple(args.rows)):
            continue
        print(f"compiling {key}", file=sys.stderr, flush=True)
        os.environ["LIT_JAX_PLAIN_OPS"] = "1" if form == "plain" else "0"
        results[key] = train_step(row) if row.text else inference(row)
        args.results.write_text(json.dumps(results, indent=1))
    print_table(results)


def print_table(results: Mapping[str, Result]) -> None:
    """Print the rows that `results` has in one form or both."""
    errors = []
    print("| towers | topology | measured | pairs | plain | error | MFU | pairs | fast | MFU |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in ROWS:
        plain, fast = (results.get(f"{row.name}, {form}") for form in FORMS)
        if plain is None and fast is None:
            continue
        is_bound = row.pairs == 8192
        cells = [row.name, row.topology, f"{'≥ ' if is_bound else ''}{row.measured:,}"]
        for result in (plain, fast):
            cells += (
                [""] * 3
                if result is None
                else [f"{result.pairs}", f"{result.rate:,.0f}", f"{result.mfu:.2f}"]
            )
        error = "" if plain is None or is_bound else f"{plain.rate / row.measured - 1:+.0%}"
        cells.insert(5, error)
        print(f"| {' | '.join(cells)} |")
        if plain is not None and row.topology == "v3:2x2":
            errors.append(abs(plain.rate / row.measured - 1))
    if errors:
        print(f"\nTable 7: median error {statistics.median(errors):.0%}, largest {max(errors):.0%}")


def train_step(row: Row) -> Result:
    """Compile the train step with the row's pairs of a device, or half of them until they fit."""
    topology, pairs = open_topology(row.topology), row.pairs
    while pairs:
        config = config_of(row, pairs * len(topology.devices))
        plan = make_plan(config, topology, compilations=1)
        if plan.forecast is not None:
            return Result(pairs, plan.forecast.pairs_a_second, plan.forecast.mfu)
        pairs //= 2
    sys.exit(f"{row.name} does not fit, even with one pair a device.")


def inference(row: Row) -> Result:
    """Compile the image tower of one chip in evaluation. The rate is that of a core, half a chip."""
    topology = open_topology(row.topology)
    model = build_model(config_of(row, row.pairs), make_mesh(MeshConfig(), topology.devices[:1]))
    mesh = model.mesh
    pixels = jax.ShapeDtypeStruct(
        (row.pairs, *model.processors.image_transform.output_shape),
        jnp.uint8,
        sharding=batch_sharding(mesh),
    )

    def embed(params: Any, pixel_values: jax.Array) -> jax.Array:
        return model.module.apply({"params": params}, pixel_values, method="encode_image")

    with jax.set_mesh(mesh):
        traced = jax.jit(embed).trace(model.abstract, pixels)
        found = operations(traced.lower().compile().as_text(), topology.chip)
    seconds = sum(found.parts.values())
    mfu = matmul_flops(traced.jaxpr) / topology.chip.flops / seconds
    return Result(row.pairs, row.pairs / seconds / 2, mfu)


def config_of(
    row: Row, batch_size: int, changes: Mapping[str, Any] = MappingProxyType({})
) -> Config:
    """Return the config of a row; it names the demo's folders, and no weights are read.

    Args:
        changes: values of other keys, such as {"policy.lock": "UU"}.
    """
    raw = get_config("base")
    raw.model.image.model, raw.model.text.model = str(DEMO / "vit"), str(DEMO / "bert")
    raw.model.image.overrides = {
        **encoder(row.image.partition("/")[0]),
        "image_size": 224,
        "patch_size": int(row.image.partition("/")[2]),
        "num_channels": 3,
    }
    raw.model.text.overrides = {
        **encoder(row.text or "B"),
        "vocab_size": 30522,
        "max_position_embeddings": 512,
    }
    raw.model.text.projection = "linear"
    raw.model.projection_dim = raw.model.image.overrides["hidden_size"]
    raw.data.image_size = 224
    raw.batch_size = batch_size
    if row.precomputed:
        # The folder need not be there: its shapes follow from the tower.
        raw.data.image_embeddings = "precomputed"
    raw.update_from_flattened_dict(dict(changes))
    return parse(raw)


def encoder(size: str) -> dict[str, int]:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip(keys, SIZES[size], strict=True))


if __name__ == "__main__":
    main()
