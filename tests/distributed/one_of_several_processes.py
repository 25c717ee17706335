"""What test_lifeline.py runs in each of several processes: collectives without end, and an end of its own."""

import os
import signal
import sys

import numpy as np
from jax.experimental import multihost_utils

from lit_jax.console import command
from lit_jax.distributed import process
from lit_jax.errors import UserError


@command
def main(how: str, who: int) -> None:
    process.initialize()
    for step in range(10_000):
        multihost_utils.process_allgather(np.ones(3))
        if step == 3 and process.number() == who:
            if how == "error":
                raise UserError("Mend the data.")
            if how == "bug":
                raise KeyError("no such key")
            os.kill(os.getpid(), signal.SIGKILL)


sys.exit(main(sys.argv[1], int(sys.argv[2])))
