"""Make vit/, the image tower of the demo.

    python -m lit_jax.configs.demo.make_vit (minutes on two cores)

Trains lit_jax's own ViT to name both digits of the composed training images, then throws the two
classifiers away. Like any pretrained image tower it has seen images of all kinds, also of the numbers
that the demo never captions, but no scanned digit of the demo's evaluation.
"""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from transformers import ViTConfig, ViTImageProcessorPil

from lit_jax.configs.demo.make_digits import CANVAS, NUMBERS, UNSEEN, draw_number
from lit_jax.models.families import build_tower
from lit_jax.weights.save import save_tower

FOLDER = Path(__file__).resolve().parent / "vit"
STEPS, BATCH, LEARNING_RATE = 2500, 128, 1e-3
HF_CONFIG = ViTConfig(
    image_size=CANVAS,
    patch_size=8,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=256,
    architectures=["ViTModel"],
).to_dict()


class Namer(nn.Module):
    """The tower with a classifier for the tens digit and one for the units digit."""

    tower: nn.Module

    @nn.compact
    def __call__(self, pixels_BxHxWxC: jax.Array) -> jax.Array:
        features_BxD = self.tower(pixels_BxHxWxC).pooled
        return nn.Dense(20)(features_BxD).reshape(-1, 2, 10)


def main() -> None:
    model = Namer(build_tower(HF_CONFIG, pooling="cls", dtype=jnp.float32))
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, 200, STEPS)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05)
    )
    rng = np.random.default_rng(0)
    params = model.init(jax.random.key(0), examples(NUMBERS, "train", 1, rng)[0])["params"]
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, pixels, digits_Bx2):
        def loss_fn(params):
            logits_Bx2x10 = model.apply({"params": params}, pixels)
            return optax.softmax_cross_entropy_with_integer_labels(logits_Bx2x10, digits_Bx2).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    for i in range(STEPS):
        batch = examples(NUMBERS, "train", BATCH, rng)
        params, opt_state, loss = step(params, opt_state, *batch)
        if (i + 1) % 500 == 0:
            print(f"step {i + 1}: loss {loss:.4f}")
    for name, numbers in (("all", NUMBERS), ("never captioned", UNSEEN)):
        pixels, digits_Bx2 = examples(numbers, "test", 1000, rng)
        right = model.apply({"params": params}, pixels).argmax(-1) == digits_Bx2
        print(f"test images of {name} numbers with both digits right: {right.all(-1).mean():.3f}")
    size, half = {"height": CANVAS, "width": CANVAS}, [0.5, 0.5, 0.5]
    processor = ViTImageProcessorPil(size=size, image_mean=half, image_std=half)
    save_tower(FOLDER, HF_CONFIG, model.tower, params["tower"], processor)


def examples(numbers, part, count, rng) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` random images, normalised, and their two digits."""
    chosen = rng.choice(numbers, count)
    pixels = np.stack([draw_number(number, part, rng) for number in chosen])
    return pixels / np.float32(127.5) - 1, np.stack(np.divmod(chosen, 10), axis=1)


if __name__ == "__main__":
    main()
