"""Tiny runs on the demo's data. Optax itself mixes dtypes, so promotion is not strict in this room."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from lit_jax.config import parse
from lit_jax.configs.vit_bert import get_config
from lit_jax.distributed.mesh import make_mesh
from lit_jax.distributed.preemption import StopSignal
from lit_jax.models.families import build_tower
from lit_jax.precomputed import format as data_embeddings
from lit_jax.training import train_step, trainer
from lit_jax.weights.save import save_tower
from tests.digits import make_digits
from tests.object_store.served import serve
from tests.training.embedded_pairs import BAD, EXAMPLES, WITHOUT_CAPTION, on_devices

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo"
WIDTHS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture(autouse=True, scope="session")
def digits():
    make_digits()


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def one_device(monkeypatch):
    """Runs on one of the eight devices: many on few cores now and then wait for each other for ever."""
    one = functools.partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(trainer, "make_mesh", one)


def stop_after(monkeypatch, step):
    """Sends this process a real SIGTERM in the middle of that step."""
    requested = StopSignal.requested

    def patched(self, now):
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return requested(self, now)

    monkeypatch.setattr(StopSignal, "requested", patched)


@pytest.fixture(scope="session")
def towers(tmp_path_factory) -> dict[str, str]:
    """Folders of a ViT and a BERT with random weights, as from the Hub: {"image": ..., "text": ...}."""
    root = tmp_path_factory.mktemp("towers")
    vit = {"model_type": "vit", "image_size": 32, "patch_size": 16, **WIDTHS}
    bert = json.loads((DEMO / "bert" / "config.json").read_text()) | WIDTHS
    bert["hidden_dropout_prob"] = 0.1
    for name, hf, example in (
        ("image", vit, jnp.zeros((1, 32, 32, 3))),
        ("text", bert, jnp.ones((1, 8), jnp.int32)),
    ):
        module = build_tower(hf, pooling="pooler", dtype=jnp.float32)
        params = jax.jit(module.init)(jax.random.key(len(name)), example)["params"]
        save_tower(root / name, hf, module, params)
    for source, target in (("vit", "image"), ("bert", "text")):
        for file in (DEMO / source).iterdir():
            if file.name not in ("config.json", "model.safetensors"):
                (root / target / file.name).write_bytes(file.read_bytes())
    return {name: str(root / name) for name in ("image", "text")}


@pytest.fixture(scope="session")
def nan_image_tower(towers, tmp_path_factory) -> str:
    """The folder of the ViT, with one NaN in a bias of its second block."""
    folder = shutil.copytree(towers["image"], tmp_path_factory.mktemp("nan") / "image")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("layer.1.output.dense.bias"))
    tensors[name][3] = np.nan
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return str(folder)


@pytest.fixture(scope="session")
def tiny(towers):
    """Makes a config of six steps of batch 16; keywords override dotted keys."""

    def make(**changes):
        raw = get_config("demo")
        raw.model.image.model, raw.model.text.model = towers["image"], towers["text"]
        raw.model.image.pooling = raw.model.text.pooling = "pooler"
        raw.model.projection_dim = 8
        raw.policy.lock = "LU"
        raw.batch_size, raw.duration, raw.seed = 16, "6 steps", 3
        raw.schedule.warmup = "2 steps"
        raw.checkpoint.every, raw.log.every = "2 steps", "1 step"
        raw.log.tensorboard = False
        raw.evals = {}
        raw.report = "none"
        raw.update_from_flattened_dict(changes)
        return parse(raw)

    return make


UNPATCHED_STEP = train_step.train_step


@pytest.fixture
def train(monkeypatch):
    """The real loop on some devices; a second trace of the step in one run is an error.

    One device if not told otherwise: XLA's CPU client now and then lets many simulated devices, on few
    cores, wait for each other for ever.
    """

    def run(config, workdir, *args, devices=1, **kwargs):
        some = functools.partial(make_mesh, devices=jax.devices()[:devices])
        monkeypatch.setattr(trainer, "make_mesh", some)
        step = chex.assert_max_traces(UNPATCHED_STEP, n=1)
        monkeypatch.setattr(train_step, "train_step", step)
        chex.clear_trace_counter()
        return trainer.train(config, workdir, *args, **kwargs)

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, tiny):
    """A run of `tiny()` on one device, and its folder, which no test may change."""
    workdir = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(trainer, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
        return trainer.train(tiny(), workdir), workdir


@pytest.fixture(scope="session")
def finished(finished_run):
    """The folder of a run; copy it to change it."""
    return finished_run[1]


@pytest.fixture(scope="module")
def command(towers):
    """Starts the train command on the tiny towers, on `devices` CPU devices, with `prefix` before it."""
    started = []

    def start(workdir, *flags, devices=1, env=None, prefix=()):
        tiny = {
            "model.image.model": towers["image"],
            "model.image.pooling": "pooler",
            "model.text.model": towers["text"],
            "model.projection_dim": 8,
            "batch_size": 16,
            "duration": "60 steps",
            "schedule.warmup": "5 steps",
            "checkpoint.every": "10 steps",
            "log.every": "1 step",
            "report": "none",
            # The demo's other evaluations read five times as many images.
            "evals": {"unseen16": get_config("demo").evals.unseen16.to_dict()},
        }
        process = subprocess.Popen(
            [
                *prefix,
                *(sys.executable, "-m", "lit_jax.train", "--config=configs/vit_bert.py"),
                f"--workdir={workdir}",
                *(f"--config.{key}={value}" for key, value in tiny.items()),
                *flags,
            ],
            cwd=ROOT,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:  # those that a failed test has left
        process.kill()
        process.communicate()


@pytest.fixture
def store(tmp_path):
    """An empty folder, served as a bucket."""
    with serve(tmp_path / "bucket") as served:
        served.folder.mkdir()
        yield served


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs: a bad image, an example whose captions are blank, and others with one to three."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(EXAMPLES):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(root / f"{i}.png")
        captions = [f"the number {word}" for word in ("two", "three", "forty")[: 1 + i % 3]]
        captions = [" "] if i == WITHOUT_CAPTION else [*captions, " "]
        lines.append(json.dumps({"image": f"{i}.png", "captions": captions}) + "\n")
    (root / f"{BAD}.png").write_bytes(b"no image")
    (root / "captions.jsonl").write_text("".join(lines))
    return root


@pytest.fixture
def make(tiny, folder, monkeypatch):
    """A config of the pairs; everything runs on one device, and a shard has seven examples."""
    monkeypatch.setattr(data_embeddings, "LEAST_SHARD", 7)
    on_devices(monkeypatch, 1)
    path = str(folder)
    return lambda **changes: tiny(
        **{"data.train.path": path, "data.train.split": None, "data.max_bad_fraction": 1.0}
        | changes
    )
