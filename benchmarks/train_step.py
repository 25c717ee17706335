"""One training step, locked ViT-B/16 + BERT-base, 32 tokens: lit_jax against PyTorch's VisionTextDualEncoder.

    python benchmarks/train_step.py [--batch=16] [--steps=5]        (needs requirements-oracle.txt)

Method: the same shapes, random weights, float32, AdamW, the image tower locked (in PyTorch: no gradient,
eval mode). One warm-up step each, then the median time of `steps` steps, in turn in one process, all cores.
Prints seconds a step of both and the ratio PyTorch / lit_jax: above 1 lit_jax is faster.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers

from lit_jax.config import ModelConfig, PolicyConfig, TowerConfig
from lit_jax.models.dual_encoder import build_dual_encoder
from lit_jax.training.losses import softmax_loss
from lit_jax.training.policy import resolve_policy
from lit_jax.training.step import State, jit_train_step, train_step

TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    batch = {
        "pixel_values": rng.normal(size=(args.batch, 224, 224, 3)).astype(np.float32),
        "input_ids": rng.integers(0, 30000, (args.batch, TOKENS), np.int32),
        "attention_mask": np.ones((args.batch, TOKENS), np.int32),
    }
    runs = {"lit_jax": lit_jax_step(batch), "PyTorch": torch_step(batch)}
    times = {name: [] for name in runs}
    for step in runs.values():
        step()
    for _ in range(args.steps):
        for name, step in runs.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in median.items():
        print(f"{name:8} {seconds:7.3f} s a step, {args.batch / seconds:7.1f} pairs/s")
    print(f"ratio    {median['PyTorch'] / median['lit_jax']:7.2f}")


def lit_jax_step(batch):
    config = ModelConfig(image=TowerConfig(pooling="cls"), projection_dim=512)
    vit, bert = transformers.ViTConfig().to_dict(), transformers.BertConfig().to_dict()
    module = build_dual_encoder(vit, bert, config)
    params = jax.jit(module.init)(jax.random.key(0), batch)["params"]
    trainable, frozen = resolve_policy(PolicyConfig(lock="LU"), params).split(params)
    optimizer = optax.adamw(1e-4)
    state = State(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
    step = jit_train_step(
        functools.partial(
            train_step,
            embed=module.apply,
            loss=softmax_loss,
            optimizer=optimizer,
            schedule=optax.constant_schedule(1e-4),
            seed=0,
        ),
        jax.tree.map(lambda leaf: leaf.sharding, state),
    )

    def run() -> None:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready(metrics)

    return run


def torch_step(batch):
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(), transformers.BertConfig(), projection_dim=512
    )
    model = transformers.VisionTextDualEncoderModel(config).train()
    model.vision_model.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    inputs = {
        "pixel_values": torch.from_numpy(batch["pixel_values"].transpose(0, 3, 1, 2).copy()),
        "input_ids": torch.from_numpy(batch["input_ids"].astype(np.int64)),
        "attention_mask": torch.from_numpy(batch["attention_mask"].astype(np.int64)),
    }

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**inputs, return_loss=True).loss.backward()
        optimizer.step()

    return run


if __name__ == "__main__":
    main()
