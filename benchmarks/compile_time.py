"""CPU seconds to compile the train step of a locked ViT and a BERT of 12, 24 and 48 layers.

    python -m benchmarks.compile_time [--depths=12,24,48] [--topology=v5e:2x2]

Method: widths of ViT-B/16 and BERT-base, random initialisation, batch 32, --config.remat=block. For this
machine's CPU and, if libtpu is installed, for a TPU topology. Each depth is compiled once, in turn; the size
of the lowered program, in lines, stands beside it. Compile time is not to grow with depth.
"""

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.flags import read_flags
from lit_jax.config import parse
from lit_jax.configs.vit_bert import get_config
from lit_jax.distributed.flags import set_flags
from lit_jax.planning.planner import abstract_step, traced
from lit_jax.planning.topologies import open_topology

DEMO = Path(__file__).parents[1] / "configs" / "demo"
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}


def main() -> None:
    args = read_flags(__doc__, depths="12,24,48", topology="v5e:2x2")
    set_flags()
    targets = {"CPU": jax.devices("cpu")}
    if importlib.util.find_spec("libtpu") is not None:
        targets[args.topology] = open_topology(args.topology).devices
    print(f"{'target':10} {'depth':>6} {'trace':>8} {'compile':>8} {'lines':>8}")
    for target, devices in targets.items():
        for depth in map(int, args.depths.split(",")):
            print_row(target, devices, depth)


def print_row(target: str, devices: Sequence[Any], depth: int) -> None:
    raw = get_config("base")
    raw.model.image.model, raw.model.text.model = str(DEMO / "vit"), str(DEMO / "bert")
    layers = {**BASE, "num_hidden_layers": depth}
    raw.model.image.overrides = {**layers, "image_size": 224, "patch_size": 16}
    raw.model.text.overrides = layers
    raw.data.image_size, raw.batch_size = 224, 32
    step = abstract_step(parse(raw), devices)
    start = time.process_time()
    with jax.set_mesh(step.model.mesh):
        lowered = traced(step, step.abstract_batch(32)).lower()
        traced_at = time.process_time()
        lowered.compile()
    times = (traced_at - start, time.process_time() - traced_at)
    lines = lowered.as_text().count("\n")
    print(f"{target:10} {depth:6} {times[0]:8.1f} {times[1]:8.1f} {lines:8}", flush=True)


if __name__ == "__main__":
    main()
