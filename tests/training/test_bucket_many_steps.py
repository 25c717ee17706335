"""A long run in a bucket takes no more descriptors and memory from step to step."""

import contextlib
import os
import time
from pathlib import Path

import numpy as np
import pytest

from tests.training.commands import finish, saved_steps

pytestmark = pytest.mark.long
# From the early steps to the late ones, a batch that stays in memory at each step makes 100 MB, and a
# connection that stays at each save 12 descriptors. The tolerances are less.
FLAGS = (
    "--config.duration=1000 steps",
    "--config.batch_size=64",
    "--config.checkpoint.every=40 steps",
)
EARLY, LATE = range(250, 500), range(750, 1000)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_descriptors_and_memory_stay_flat_over_many_steps(command, store, scheme):
    process = command(f"{scheme}://bucket/run", *FLAGS, env=store.environment)
    seen: dict[int, tuple[int, int]] = {}
    while process.poll() is None:
        step = max(saved_steps(store.folder / "run"), default=0)
        if step not in seen:
            with contextlib.suppress(OSError):
                seen[step] = use(process.pid)
        time.sleep(0.05)
    finish(process)
    early, late = (
        np.max([use for step, use in seen.items() if step in steps], axis=0)
        for steps in (EARLY, LATE)
    )
    # Connections are opened as they are needed, up to a limit of each client.
    assert late[0] <= early[0] + 8, seen
    assert late[1] <= 1.05 * early[1], seen


def use(process):
    """The open descriptors of a process, and its memory in KiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return len(os.listdir(f"/proc/{process}/fd")), int(status.partition("VmRSS:")[2].split()[0])
