"""A command of several processes: endless collectives, until the process `who` ends in a way of its own."""

import os
import signal
import sys

import numpy as np
from jax.experimental import multihost_utils

from lit_jax.cli import command
from lit_jax.distributed import process
from lit_jax.errors import UserError


@command
def main(how: str, who: int, heartbeat_seconds: int) -> None:
    process.HEARTBEAT_SECONDS = heartbeat_seconds
    process.initialize()
    for step in range(1_000_000):
        multihost_utils.process_allgather(np.ones(3))
        if step == 3 and process.number() == who:
            if how == "error":
                raise UserError("Correct the data.")
            if how == "bug":
                raise KeyError("no such key")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])


sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
