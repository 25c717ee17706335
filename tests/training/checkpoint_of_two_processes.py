"""What test_checkpoints.py runs in each of two processes: the second save is one that `full` cannot write."""

import resource
import sys
from pathlib import Path

import numpy as np
from jax.experimental import multihost_utils

from lit_jax.cli import command
from lit_jax.config import MeshConfig
from lit_jax.distributed import process
from lit_jax.distributed.mesh import global_batch, make_mesh
from lit_jax.errors import UserError
from lit_jax.training import checkpoints
from lit_jax.training.train_step import State
from lit_jax.training.workdir_errors import quiet_orbax


@quiet_orbax()  # as the command that trains
@command
def main(workdir: str, full: int, how: str) -> None:
    process.initialize()
    rows = {"step": np.zeros(1), "kernel": np.random.default_rng(0).normal(size=(1, 50_000))}
    arrays = global_batch(rows, make_mesh(MeshConfig()))
    state = State(step=arrays["step"], params={"kernel": arrays["kernel"]}, opt_state=())
    with checkpoints.Checkpoints(Path(workdir), keep_last=1) as saved:
        saved.save(1, state, {}, {})
        saved.wait()
        checkpoints.SAVE_SECONDS = 2
        if process.number() == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        saved.save(2, state, {}, {})
        if how == "error" and process.number() != full:
            raise UserError("Fix the data.")
        if how == "error":
            multihost_utils.process_allgather(np.ones(1))  # as a train step waits for the other


sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
