"""TPU chips: their published figures, and the chip of a device."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A generation of TPU chips. The figures are published peaks; a program reaches less.

    Attributes:
        kinds: the names of its devices in JAX.
        flops: bfloat16 FLOPs per second.
        clock: cycles per second.
        hbm_gib: the memory in GiB.
        hbm_bandwidth: bytes per second.
        ici_bandwidth: bytes per second that a chip sends to its neighbours, over all links.
        dcn_bandwidth: bytes per second, the chip's share of its host's network; None if not published.
        shapes: common shapes of a slice.
        largest: the number of chips in the largest slice.
        longest: the longest side of a slice; None for no limit.
        cores: the number of devices in a chip. If there are several, each counts as a chip, with its share of
            these figures.
        options: options for the compiler.
    """

    kinds: tuple[str, ...]
    flops: float
    clock: float
    hbm_gib: int
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float | None
    shapes: tuple[str, ...]
    largest: int
    longest: int | None = None
    cores: int = 1
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SPACE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x4", "8x8x8", "8x8x16")

# Sources: cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e}, "Key specifications". These pages give the bandwidth
# between chips for both directions together, this table for one. v4 has six links of 50 GB/s and 1.05 GHz, v3
# four links of 70 GB/s and 0.94 GHz (Jouppi et al., 2304.01433). The other clocks follow from the FLOPs: in a
# cycle v5e multiplies 4 matrices of 128 x 128 and v5p 8, v6e 4 of 256 x 256. Data-centre network: the same
# pages give 6.4 Tbps for a pod of 256 v5e (two cards of 100 Gbps for a host of eight), 25.6 Tbps for a pod of
# 256 v6e (four of 200), 50 Gbps for a chip of v5p, and nothing for v3 and v4; "How to Scale Your Model", part
# 2 (jax-ml.github.io/scaling-book/tpus), has the same figures per direction.
CHIPS: Mapping[str, Chip] = {
    "v3": Chip(
        kinds=("TPU v3",),
        flops=61.5e12,
        clock=0.94e9,
        hbm_gib=16,
        hbm_bandwidth=450e9,
        ici_bandwidth=140e9,
        dcn_bandwidth=None,
        shapes=("2x2", "4x4", "8x8", "16x16"),
        largest=1024,
        longest=32,
        cores=2,
    ),
    "v4": Chip(
        kinds=("TPU v4",),
        flops=275e12,
        clock=1.05e9,
        hbm_gib=32,
        hbm_bandwidth=1200e9,
        ici_bandwidth=300e9,
        dcn_bandwidth=None,
        shapes=_SPACE,
        largest=4096,
        # Without this option each of the chip's two cores is a device.
        options={"chip_config_name": "megacore"},
    ),
    "v5e": Chip(
        kinds=("TPU v5 lite", "TPU v5e"),
        flops=197e12,
        clock=1.5e9,
        hbm_gib=16,
        hbm_bandwidth=819e9,
        ici_bandwidth=200e9,
        dcn_bandwidth=3.125e9,
        shapes=_PLANE,
        largest=256,
        longest=16,
    ),
    "v5p": Chip(
        kinds=("TPU v5", "TPU v5p"),
        flops=459e12,
        clock=1.75e9,
        hbm_gib=95,
        hbm_bandwidth=2765e9,
        ici_bandwidth=600e9,
        dcn_bandwidth=6.25e9,
        shapes=_SPACE,
        largest=6144,
    ),
    "v6e": Chip(
        kinds=("TPU v6 lite", "TPU v6e"),
        flops=918e12,
        clock=1.75e9,
        hbm_gib=32,
        hbm_bandwidth=1638e9,
        ici_bandwidth=400e9,
        dcn_bandwidth=12.5e9,
        shapes=_PLANE,
        largest=256,
        longest=16,
    ),
}


def chip_of(device: Any) -> Chip | None:
    """Return the chip of a device of JAX, None if its figures are not in the table."""
    return next((chip for chip in CHIPS.values() if device.device_kind in chip.kinds), None)
