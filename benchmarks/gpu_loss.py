"""Time and memory of the blockwise losses on one GPU, value and gradients.

    python -m benchmarks.gpu_loss [--batch=65536] [--width=768] [--steps=10] [--tiny]   (requirements-gpu.txt)

Method: float32 embeddings of length 1, products in three bfloat16 passes as in training; one call to warm
up, then the median of `steps` in milliseconds. Memory is the compiler's: the temporaries, beyond the
embeddings and their gradients. "peak" is the time that the products need at --peak-tflops: two FLOPs for each
multiplication, three passes, and four products for the softmax, three for the sigmoid.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.flags import read_flags
from benchmarks.timing import in_turn
from lit_jax.config import MeshConfig
from lit_jax.distributed.flags import set_flags
from lit_jax.distributed.mesh import batch_sharding, make_mesh
from lit_jax.training.losses import make_loss

# The products of a tile; the softmax computes its logits twice.
PRODUCTS = {"softmax": 4, "sigmoid": 3}


def main() -> None:
    args = read_flags(__doc__, batch=65_536, width=768, steps=10, peak_tflops=989.0, tiny=False)
    set_flags()
    batch = 256 if args.tiny else args.batch
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    random = np.random.default_rng(0)
    z_2xBxD = random.normal(size=(2, batch, args.width)).astype(np.float32)
    z_2xBxD /= np.linalg.norm(z_2xBxD, axis=-1, keepdims=True)
    zimg, ztxt = (jax.device_put(z_BxD, batch_sharding(mesh)) for z_BxD in z_2xBxD)
    print(f"{'loss':8} {'ms':>9} {'MiB':>9} {'peak, ms':>9}")
    with jax.set_mesh(mesh):
        arrays = zimg, ztxt, jnp.float32(2.6592), jnp.float32(-10)
        for name, products in PRODUCTS.items():
            loss = make_loss(name, implementation="blockwise")
            gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
            compiled = gradients.lower(*arrays).compile()

            def run(compiled=compiled):
                jax.block_until_ready(compiled(*arrays))

            seconds = in_turn({name: run}, args.steps)[name].wall
            memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
            peak = products * 3 * 2 * batch**2 * args.width / (args.peak_tflops * 1e12)
            print(f"{name:8} {1e3 * seconds:9.2f} {memory:9.0f} {1e3 * peak:9.2f}", flush=True)


if __name__ == "__main__":
    main()
