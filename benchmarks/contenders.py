"""The training steps that benchmarks/train_step.py and benchmarks/gpu_step.py compare, one to a process.

    python -m benchmarks.contenders PyTorch '{"batch": 16, "size": "B/16"}'

Each builds a ViT and a BERT with random weights and answers every line on its standard input by one step: a
line {"wall": seconds, "cpu": seconds, "peak": GiB}. Only what a contender itself needs is imported, because
the peer in Flax has an environment of its own.
"""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.timing import Sample, Times, once, peak_memory

PROJECTION = 512
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.01, 1.0
WARM_UP = 2  # steps

Step = Callable[[], object]


class Size(NamedTuple):
    """The size of both towers, with heads of 64 numbers (tiny: 16) and patches of 16 x 16 pixels."""

    width: int
    depth: int
    pixels: int = 224
    tokens: int = 32
    vocabulary: int = 30522

    @property
    def heads(self) -> int:
        return max(self.width // 64, 2)


SIZES = {
    "tiny": Size(width=32, depth=2, pixels=32, tokens=8, vocabulary=200),
    "B/16": Size(width=768, depth=12),
    "L/16": Size(width=1024, depth=24),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a step.

    Attributes:
        lock: "LU", or "UU" to train the image tower, too.
        dtype: of the computation; parameters that train are float32.
        dropout: of the text tower.
        device: of PyTorch, which compiles on "cuda".
    """

    batch: int
    size: str = "B/16"
    lock: str = "LU"
    dtype: str = "float32"
    dropout: float = 0.1
    device: str = "cpu"


class Result(NamedTuple):
    times: Times
    peak: float  # GiB


def main() -> None:
    name, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    answers = os.fdopen(os.dup(1), "w")
    # Libraries print to stdout, too; only answers go to the caller.
    os.dup2(2, 1)
    step = CONTENDERS[name](settings)
    for _ in sys.stdin:
        sample = once(step)
        print(json.dumps(sample._asdict() | {"peak": peak_memory()}), file=answers, flush=True)


def compare(pythons: Mapping[str, str], settings: Settings, steps: int) -> dict[str, Result]:
    """Return `steps` samples of each contender, run by the Python given, in turn and after a warm-up."""
    processes = {
        name: subprocess.Popen(
            [python, "-m", "benchmarks.contenders", name, json.dumps(dataclasses.asdict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, python in pythons.items()
    }
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    for _ in range(WARM_UP + steps):
        for name, process in processes.items():
            answers[name].append(_ask(name, process))
    for process in processes.values():
        process.communicate()
    return {
        name: Result(
            Times(tuple(Sample(a["wall"], a["cpu"]) for a in samples[WARM_UP:])),
            samples[-1]["peak"],
        )
        for name, samples in answers.items()
    }


def _ask(name: str, process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write("\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())
    # The contender has ended without an answer.
    except (BrokenPipeError, ValueError):
        sys.exit(f"{name} ended; its output stands above.")


def images_and_texts(settings: Settings) -> dict[str, np.ndarray]:
    """Return a random batch."""
    random = np.random.default_rng(0)
    size = SIZES[settings.size]
    texts = (settings.batch, size.tokens)
    pixels = random.normal(size=(settings.batch, size.pixels, size.pixels, 3))
    return {
        "pixel_values": pixels.astype(np.float32),
        "input_ids": random.integers(0, size.vocabulary, texts, np.int32),
        "attention_mask": np.ones(texts, np.int32),
    }


def tower_configs(name: str, dropout: float = 0.1) -> tuple[Any, Any]:
    """Return transformers' configs of ViT and BERT."""
    import transformers

    size = SIZES[name]
    both = {
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.width,
    }
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return (
        transformers.ViTConfig(**both, image_size=size.pixels),
        transformers.BertConfig(**both, **rates, vocab_size=size.vocabulary),
    )


def lit_jax_step(settings: Settings, *, cached: bool = False) -> Step:
    """Return our step; with `cached` the batch has the features of the image tower, which does not run."""
    # transformers imports PyTorch if it is installed; lit_jax does not need it.
    sys.modules["torch"] = None
    from lit_jax.distributed import process

    process.initialize()

    import jax
    import jax.numpy as jnp

    from lit_jax.config import MeshConfig, PolicyConfig
    from lit_jax.distributed.mesh import make_mesh, replicated
    from lit_jax.training.losses import objective, softmax_loss
    from lit_jax.training.policy import resolve_policy
    from lit_jax.training.train_step import State, jit_train_step, train_step

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    jax.set_mesh(mesh)
    lock: Any = settings.lock
    module, batch = _lit_jax_inputs(settings, cached=cached)
    batch = jax.device_put(batch, replicated(mesh))
    params = jax.jit(module.init)(jax.random.key(0), batch)["params"]
    policy = resolve_policy(PolicyConfig(lock=lock), params)
    trainable, frozen = policy.split(params)
    frozen = jax.tree.map(lambda leaf: leaf.astype(settings.dtype), frozen)
    optimizer, schedule = _lit_jax_optimizer(policy)
    state = State(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
    # Sharded as steps return it, or the second step compiles again.
    state = jax.device_put(state, replicated(mesh))
    # The step takes over the state's buffers.
    del params, trainable
    step = jit_train_step(
        functools.partial(
            train_step,
            forward=module.apply,
            loss=objective(softmax_loss),
            optimizer=optimizer,
            schedule=schedule,
            seed=0,
        ),
        jax.tree.map(lambda leaf: leaf.sharding, state),
    )

    def run() -> None:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))

    return run


def _lit_jax_inputs(settings: Settings, *, cached: bool) -> tuple[Any, dict[str, np.ndarray]]:
    """Return our module and a batch, with the features of the image tower if `cached`."""
    from lit_jax.config import ModelConfig, TowerConfig
    from lit_jax.models.dual_encoder import FEATURES, build_dual_encoder

    dtype: Any = settings.dtype
    config = ModelConfig(image=TowerConfig(pooling="cls"), projection_dim=PROJECTION, dtype=dtype)
    vit, bert = (tower.to_dict() for tower in tower_configs(settings.size, settings.dropout))
    batch = images_and_texts(settings)
    if cached:
        del batch["pixel_values"]
        batch[FEATURES["image"]] = np.ones((settings.batch, vit["hidden_size"]), np.float32)
    return build_dual_encoder(vit, bert, config).features_only(), batch


def _lit_jax_optimizer(policy: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return our AdamW and its schedule."""
    import optax

    from lit_jax.optimizer_config import AdamW
    from lit_jax.training.optimizers import make_optimizer

    schedule = optax.constant_schedule(LEARNING_RATE)
    config = AdamW(clip_norm=CLIP_NORM, weight_decay=WEIGHT_DECAY)
    return make_optimizer(config, schedule, policy), schedule


def torch_step(settings: Settings) -> Step:
    """Return the step of VisionTextDualEncoderModel with scaled_dot_product_attention, its default."""
    import torch
    import transformers

    on_gpu = settings.device == "cuda"
    dtype = getattr(torch, settings.dtype)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        *tower_configs(settings.size, settings.dropout), projection_dim=PROJECTION
    )
    model = transformers.VisionTextDualEncoderModel(config).train().to(settings.device)
    if settings.lock == "LU":
        model.vision_model.requires_grad_(False).eval().to(dtype)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=on_gpu)
    arrays = images_and_texts(settings)
    arrays["pixel_values"] = arrays["pixel_values"].transpose(0, 3, 1, 2).copy()
    batch = {name: torch.from_numpy(array).to(settings.device) for name, array in arrays.items()}
    forward = torch.compile(model) if on_gpu else model

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(settings.device, dtype, enabled=dtype is not torch.float32):
            loss = forward(**batch, return_loss=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, CLIP_NORM)
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()

    return run


def flax_step(settings: Settings) -> Step:
    """Return the step of FlaxVisionTextDualEncoderModel of transformers 4.57.6.

    The image tower has no gradient. Its one switch for dropout is on for both towers; the rate of ViT is 0.
    float32 on CPU alone.
    """
    import jax
    import optax

    batch = images_and_texts(settings)
    positions = np.broadcast_to(np.arange(batch["input_ids"].shape[1]), batch["input_ids"].shape)
    batch |= {"position_ids": positions, "token_type_ids": np.zeros_like(batch["input_ids"])}
    module, trainable = _flax_model(settings, batch["pixel_values"].shape)
    frozen = {"vision_model": trainable.pop("vision_model")}
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    )
    opt_state = optimizer.init(trainable)

    def loss_fn(params, frozen, key):
        logits_BxB = module.apply(
            {"params": params | frozen}, **batch, deterministic=False, rngs={"dropout": key}
        ).logits_per_text
        labels_B = jax.numpy.arange(settings.batch)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return (
            sum(cross_entropy(logits, labels_B).mean() for logits in (logits_BxB, logits_BxB.T)) / 2
        )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, frozen, key):
        value, grads = jax.value_and_grad(loss_fn)(params, frozen, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    count = itertools.count()

    def run() -> None:
        nonlocal trainable, opt_state
        key = jax.random.key(next(count))
        trainable, opt_state, _ = jax.block_until_ready(step(trainable, opt_state, frozen, key))

    return run


def _flax_model(settings: Settings, images: tuple[int, ...]) -> tuple[Any, dict[str, Any]]:
    """Return the module and the parameters of the class in transformers; it would keep the first ones."""
    import transformers

    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        *tower_configs(settings.size, settings.dropout), projection_dim=PROJECTION
    )
    model = transformers.FlaxVisionTextDualEncoderModel(
        config, input_shape=((1, 1), (1, *images[1:])), seed=0
    )
    return model.module, dict(model.params)


CONTENDERS: dict[str, Callable[[Settings], Step]] = {
    "lit_jax": lit_jax_step,
    "cached": functools.partial(lit_jax_step, cached=True),
    "PyTorch": torch_step,
    "Flax": flax_step,
}


if __name__ == "__main__":
    main()
