"""A command of two processes, one of which never comes, or fails before it has joined the other."""

import os
import sys

from lit_jax.cli import command
from lit_jax.distributed import process, roll_call
from lit_jax.errors import UserError


@command
def main(how: str) -> None:
    if how == "alone":
        roll_call.START_SECONDS = 2
    elif os.environ["JAX_PROCESS_ID"] == "1":
        raise UserError("Correct the config.")
    process.initialize()


sys.exit(main(sys.argv[1]))
