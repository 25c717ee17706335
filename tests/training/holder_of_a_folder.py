"""What test_lease.py runs: holds a run folder, and writes a file there for each line that it is given."""

import sys
from pathlib import Path

from lit_jax.cli import command
from lit_jax.training import lease, lease_wait
from lit_jax.training.workdir_errors import workdir_errors


@command
def main(folder: str) -> None:
    lease_wait.GRACE_SECONDS = 1.0
    lease_wait.RENEW_SECONDS = 0.2
    workdir = Path(folder)
    with lease.holding(workdir):
        print("held", flush=True)
        for line in sys.stdin:
            with workdir_errors(workdir):
                (workdir / line.strip()).write_text("")
            print("written", flush=True)


sys.exit(main(sys.argv[1]))
