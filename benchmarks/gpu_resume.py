"""A run that is killed and resumed against one that is not, with deterministic GPU operations.

    python -m benchmarks.gpu_resume [--steps=60]                                       (requirements-gpu.txt)

Method: the demo of configs/vit_bert.py, with XLA_FLAGS=--xla_gpu_deterministic_ops=true. One run trains
`steps` steps. Another writes a checkpoint every tenth, is killed (SIGKILL) after the second, and runs again
to the end. Prints the step of the checkpoint, the largest difference of a parameter, and whether all are
equal; exits with 1 if they are not.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.flags import read_flags
from lit_jax.training.workdir import load_run
from lit_jax.training.workdir_errors import complete_steps

FLAG = "--xla_gpu_deterministic_ops=true"
EVERY = 10


def main() -> None:
    steps = read_flags(__doc__, steps=60).steps
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        start(whole, steps).wait()
        process = start(killed, steps)
        while len(complete_steps(killed)) < 2 and process.poll() is None:
            time.sleep(0.05)
        process.kill()
        process.wait()
        resumed_from = complete_steps(killed)[-1]
        start(killed, steps).wait()
        params = [load_run(run, dtype="float32").params for run in (whole, killed)]
    differences = jax.tree.leaves(
        jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), *params)
    )
    is_equal = not any(differences)
    print(
        f"resumed from step {resumed_from}; largest difference {max(differences):.1e}; equal: {is_equal}"
    )
    sys.exit(not is_equal)


def start(workdir: Path, steps: int) -> subprocess.Popen[bytes]:
    """Start the training of the demo."""
    options = (
        f"--config.duration={steps} steps",
        f"--config.checkpoint.every={EVERY} steps",
        "--config.evals={}",
        "--config.schedule.warmup=0 steps",
        "--config.report=none",
    )
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "lit_jax.train",
            "--config=configs/vit_bert.py",
            f"--workdir={workdir}",
            *options,
        ],
        env=os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()},
    )


if __name__ == "__main__":
    main()
