"""Compiles both blockwise losses and their gradients for TPU: argv is a topology and a global batch.

Prints {loss: (bytes that a chip holds at most, the precision of each product)}.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from lit_jax.config import MeshConfig
from lit_jax.distributed.mesh import batch_sharding, make_mesh, replicated
from lit_jax.training.losses import make_loss

topology, batch = sys.argv[1], int(sys.argv[2])
chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
mesh, found = make_mesh(MeshConfig(), chips), {}
with jax.set_mesh(mesh):
    z = jax.ShapeDtypeStruct((batch, 768), jnp.float32, sharding=batch_sharding(mesh))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    for name in ("softmax", "sigmoid"):
        gradients = jax.value_and_grad(make_loss(name), argnums=(0, 1, 2, 3))
        compiled = jax.jit(gradients).lower(z, z, scalar, scalar).compile()
        products = [line for line in compiled.as_text().splitlines() if " convolution(" in line]
        precisions = [re.findall(r"operand_precision=\{(\w+),(\w+)\}", line) for line in products]
        found[name] = compiled.memory_analysis().peak_memory_in_bytes, precisions
print(json.dumps(found))
