"""Runs the train command as a process of another machine would run it: no lock or mark of this one tells.

python on_another_host.py [stale=SECONDS] python -m lit_jax.train FLAGS
"""

import sys

from lit_jax import train
from lit_jax.training import lease_object, lease_wait

lease_object._kernel = lambda: None
first, *rest = sys.argv[1:]
if first.startswith("stale="):
    lease_wait.STALE_SECONDS = float(first.partition("=")[2])
    lease_wait.RENEW_SECONDS = lease_wait.STALE_SECONDS / 6
    rest = rest[1:]
sys.exit(train.main(rest[2:]))
