"""Where one process ends, all end with a sentence: the first, on which JAX itself depends, or another."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lit_jax.errors import BAD_INPUT, FAILED

ROOT = Path(__file__).parents[2]
ENDS = {  # exit code of the launcher, and what each of the others says last
    "kill": (
        128 + signal.SIGKILL,
        "Process {} is gone; run the same command again to go on from the latest checkpoint.",
    ),
    "error": (BAD_INPUT, "error: process {}: Mend the data."),
    "bug": (FAILED, "error: process {}: KeyError: 'no such key'"),
}


@pytest.mark.parametrize(("how", "who"), [("kill", 0), ("kill", 1), ("error", 2), ("bug", 1)])
def test_the_end_of_one_process_is_that_of_all(how, who):
    script = Path(__file__).with_name("one_of_three_processes.py")
    result = subprocess.run(
        [
            ROOT / "launch" / "local.sh",
            "3",
            "--devices=1",
            "--",
            sys.executable,
            script,
            how,
            str(who),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    code, sentence = ENDS[how]
    assert result.returncode == code, result.stderr
    for other in {0, 1, 2} - {who}:
        said = [line for line in result.stderr.splitlines() if line.startswith(f"[{other}] ")]
        # Perhaps not as the last: JAX's own threads may still print what they make of it.
        assert f"[{other}] {sentence.format(who)}" in said
    assert ("Traceback" in result.stderr) == (how == "bug")
