"""Forecasts by the TPU compiler's cycles against throughputs that papers measured on TPUs; no TPU is needed.

    python -m benchmarks.forecast [--only=B/32+B,...] [--fast]                     (requirements-tpu.txt)

Method: the step of configs/vit_bert.py:base, with towers of these sizes, is compiled for the topology of the
paper, and its time is the forecast of `lit_jax.plan`. LiT's table 7 (2111.07991, appendix G) gives images a
second of each of eight TPU v3 cores, with and without precomputed image embeddings. Its rows are compiled at
128 pairs a core, or 1024 with precomputed embeddings, or the largest power of two that fits, in the plain
form (LIT_JAX_PLAIN_OPS=1), which is nearest to the paper's; with --fast, as training compiles. SigLiT
(2303.15343, section 4.4) trained 65,000 steps of 32,768 pairs from precomputed embeddings on four TPU v4
chips in less than a day, so at least 6.2 thousand pairs a second of each chip; its row is an inequality and
not among the errors. Prints a Markdown table, and the median and the largest error.
"""

import argparse
import os
import statistics
from pathlib import Path
from typing import NamedTuple

from lit_jax.config import parse
from lit_jax.configs.vit_bert import get_config
from lit_jax.distributed.flags import set_flags
from lit_jax.planning.planner import Plan, make_plan
from lit_jax.planning.topologies import open_topology

DEMO = Path(__file__).parents[1] / "configs" / "demo"
# Width, layers, heads, width of the MLP.
SIZES = {
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "g": (1408, 40, 16, 6144),
    "12 layers of L": (1024, 12, 16, 4096),
}
PATCH = {"B/32": 32, "B/8": 8, "L/16": 16, "g/14": 14}


class Row(NamedTuple):
    """A measured throughput: towers, topology, pairs of each device, pairs a second of each device."""

    image: str
    text: str
    precomputed: bool
    measured: float
    topology: str = "v3:2x2"
    pairs: int = 128

    @property
    def name(self) -> str:
        return f"{self.image}+{self.text}{', precomputed' if self.precomputed else ''}"


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
    Row("B/8", "12 layers of L", True, 6200, topology="v4:2x2x1", pairs=8192),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", help="rows that begin with one of these towers, such as B/32+B,L/16+L"
    )
    parser.add_argument(
        "--fast", action="store_true", help="as training compiles, not in plain form"
    )
    args = parser.parse_args()
    os.environ["LIT_JAX_PLAIN_OPS"] = "0" if args.fast else "1"
    set_flags()
    only = tuple(args.only.split(",")) if args.only else ("",)
    errors = []
    print("| towers | topology | pairs a device | measured | forecast | error | MFU |")
    print("|---|---|---|---|---|---|---|")
    for row in ROWS:
        if not row.name.startswith(only):
            continue
        plan = largest_plan(row)
        assert plan.forecast is not None
        error = plan.forecast.pairs_a_second / row.measured - 1
        pairs, is_bound = plan.batch_size // plan.chips, row.topology != "v3:2x2"
        cells = [row.name, row.topology, f"{pairs}", f"{'≥ ' if is_bound else ''}{row.measured:,}"]
        cells += [f"{plan.forecast.pairs_a_second:,.0f}", "" if is_bound else f"{error:+.0%}"]
        print(f"| {' | '.join(cells)} | {plan.forecast.mfu:.2f} |", flush=True)
        errors += [] if is_bound else [abs(error)]
    if errors:
        print(f"\nmedian error {statistics.median(errors):.0%}, largest {max(errors):.0%}")


def largest_plan(row: Row) -> Plan:
    """Return the plan with the row's pairs of a device, or half of them until they fit."""
    topology, pairs = open_topology(row.topology), row.pairs
    while True:
        raw = get_config("base")
        raw.model.image.model, raw.model.text.model = str(DEMO / "vit"), str(DEMO / "bert")
        raw.model.image.overrides = {
            **encoder(row.image.partition("/")[0]),
            "image_size": 224,
            "patch_size": PATCH[row.image],
            "num_channels": 3,
        }
        raw.model.text.overrides = {
            **encoder(row.text),
            "vocab_size": 30522,
            "max_position_embeddings": 512,
        }
        raw.model.text.projection = "linear"
        raw.model.projection_dim = raw.model.image.overrides["hidden_size"]
        raw.data.image_size = 224
        raw.batch_size = pairs * len(topology.devices)
        if row.precomputed:
            # The folder need not be there: its shapes follow from the tower.
            raw.data.image_embeddings = "precomputed"
        plan = make_plan(parse(raw), topology, compilations=1)
        if plan.fits or pairs == 1:
            return plan
        pairs //= 2


def encoder(size: str) -> dict[str, int]:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip(keys, SIZES[size], strict=True))


if __name__ == "__main__":
    main()
