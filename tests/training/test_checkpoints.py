"""A save that one of two processes cannot write: both end, soon, and the checkpoint before it stays."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lit_jax.distributed import process
from lit_jax.errors import BAD_INPUT, UserError
from lit_jax.training.workdir_errors import complete_steps, workdir_errors

ROOT = Path(__file__).parents[2]
FULL = r"{} .*\(File too large\).*\b1\."


@pytest.mark.parametrize(
    ("full", "how", "sentence"),
    [
        (0, "wait", rf"^\[0\] error: .*{FULL}"),
        pytest.param(1, "wait", rf"^\[1\] error: .*{FULL}", marks=pytest.mark.long),
        # An error of the other comes before it: it waits for the save, but not for ever.
        pytest.param(0, "error", r"^\[1\] error: Fix the data\.$", marks=pytest.mark.long),
    ],
)
def test_a_save_that_one_process_cannot_write_holds_up_nobody(tmp_path, full, how, sentence):
    (tmp_path / "run").mkdir()
    launcher = [ROOT / "launch" / "local.sh", "2", "--devices=1", "--", sys.executable]
    script = Path(__file__).with_name("checkpoint_of_two_processes.py")
    result = subprocess.run(
        [*launcher, script, tmp_path / "run", str(full), how],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,  # Orbax alone waits for 20 minutes
    )
    assert result.returncode == BAD_INPUT
    assert complete_steps(tmp_path / "run") == [1]
    assert re.search(sentence.format(tmp_path / "run"), result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr


def test_a_save_that_fails_but_not_by_the_disk_waits_for_the_verdict_on_the_others(
    tmp_path, monkeypatch
):
    waited = []
    monkeypatch.setattr(process, "await_verdict", lambda: waited.append(True))
    full = "write failed [os_error_code='28']"
    for error in (OSError(28, "No space left on device"), ValueError(full)):
        with pytest.raises(UserError, match="No space left"), workdir_errors(tmp_path, Exception):
            raise error
    assert not waited
    with pytest.raises(UserError, match="Barrier"), workdir_errors(tmp_path, Exception):
        raise RuntimeError("Barrier timed out")
    assert waited == [True]
