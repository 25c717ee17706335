"""The commands as functions: in a notebook, in a loop over runs, in a thread of a server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

PROGRAM = """
import jax

jax.devices()  # a notebook that has used JAX

import logging, signal, sys, threading, warnings
from lit_jax import evaluate, train

SHORT = ["--config=configs/vit_bert.py", "--config.duration=2 steps", "--config.batch_size=16"]
SHORT += ["--config.schedule.warmup=0 steps", "--config.report=none", "--config.evals={}"]
SHORT += ["--config.log.tensorboard=False"]


def settings():
    own = logging.getLogger("lit_jax")
    signals = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    hooks = sys.unraisablehook, sys.excepthook, sys.stdout, sys.stderr
    return signals, hooks, list(warnings.filters), own.handlers, own.propagate, own.level


before, codes = settings(), []
codes.append(train.main([*SHORT, f"--workdir={sys.argv[1]}/a"]))
thread = threading.Thread(
    target=lambda: codes.append(train.main([*SHORT, f"--workdir={sys.argv[1]}/b", "--config.seed=1"]))
)
thread.start()
thread.join()
codes.append(train.main([*SHORT, f"--workdir={sys.argv[1]}/a", "--config.seed=1"]))
codes.append(evaluate.main([f"--workdir={sys.argv[1]}/a", f"--data={sys.argv[1]}/data"]))
assert codes == [0, 0, 2, 0], codes
assert settings() == before
"""


@pytest.mark.long
def test_commands_can_be_called_again_where_jax_is_in_use(tmp_path):
    (tmp_path / "data").mkdir()
    lines = []
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "data" / f"{colour}.png")
        lines.append(json.dumps({"image": f"{colour}.png", "caption": f"a {colour} square"}))
    (tmp_path / "data" / "captions.jsonl").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("--allow_changes=seed") == 1  # handlers do not pile up
