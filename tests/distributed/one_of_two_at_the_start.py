"""What test_lifeline.py runs where one of two processes never comes, or fails before it has joined."""

import os
import sys

from lit_jax.console import command
from lit_jax.distributed import lifeline, process
from lit_jax.errors import UserError


@command
def main(how: str) -> None:
    if how == "alone":
        lifeline.START_SECONDS = 2
    elif os.environ["JAX_PROCESS_ID"] == "1":
        raise UserError("Mend the config.")
    process.initialize()


sys.exit(main(sys.argv[1]))
