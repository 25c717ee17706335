"""A locked tower in chunks of the batch, whose intermediate values fit into a TPU's memory on chip.

Dims: B batch, P pooled width.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from lit_jax.distributed.mesh import cut, device_kind, join, mesh_size
from lit_jax.distributed.sharding import fsdp_size
from lit_jax.models.ops import use_tpu_ops

# The images of a chunk on one TPU. With 64 images of a ViT-B/16 the compiler keeps the values of a block on
# chip. With 128 it writes those inside the MLP to HBM and reads them back.
IMAGES = 64
# On v6e with the options of distributed/flags.py, 32 images take 3 % less time than 64.
IMAGES_OF_KIND = {"TPU v6 lite": 32}


def chunk_count(batch: int) -> int:
    """Return the number of chunks of a batch; 1 on a CPU or GPU.

    Chunks were measured for TPUs alone. All chunks are equal, with at most `IMAGES` images on each device, or
    `IMAGES_OF_KIND`. If only chunks of less than half that size divide a device's rows, the batch stays
    whole.
    """
    # Matrices that are split over the mesh would be gathered again for each chunk.
    if not use_tpu_ops(batch) or fsdp_size() > 1:
        return 1
    rows, most = batch // mesh_size(), IMAGES_OF_KIND.get(device_kind(), IMAGES)
    count = next(n for n in range(-(-rows // most), rows + 1) if rows % n == 0)
    return count if 2 * (rows // count) >= most else 1


def in_chunks(
    call: Callable[[Any, Array], Float[Array, "B P"]], tower: nn.Module, inputs_Bx: Array
) -> Float[Array, "B P"]:
    """Return `call(tower, inputs)`, computed in chunks of each device's own rows.

    The result is the same up to rounding: each row of the output depends on its own row of the inputs alone.
    For a gradient, the intermediate values of all chunks would be kept, which gains nothing over the whole
    batch; so only a locked tower should run in chunks.
    """
    chunks = chunk_count(len(inputs_Bx))
    # The values of a single chunk cannot be recorded for the whole batch.
    if chunks == 1 or tower.is_initializing() or tower.is_mutable_collection("intermediates"):
        return call(tower, inputs_Bx)
    # All chunks share the variables of the tower, and there is no carry.
    scan = nn.scan(lambda tower, _, part: (None, call(tower, part)), variable_broadcast=True)
    return join(scan(tower, None, cut(inputs_Bx, chunks))[1])
