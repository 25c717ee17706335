"""The command, with a TPU compiler that is really there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_jax import plan

pytestmark = pytest.mark.oracle  # of the TPU compiler

ROOT = Path(__file__).parents[1]
DEMO = ["--config=configs/vit_bert.py", "--topology=v5e:2x2"]


@pytest.mark.long
def test_the_demo_is_planned(tmp_path):
    """In a process of its own: this one compiles with the settings of tests/conftest.py."""
    environment = {name: value for name, value in os.environ.items() if "JAX" not in name}
    output = tmp_path / "plan.json"
    command = [sys.executable, "-m", "lit_jax.plan", *DEMO, "--compilations=2"]
    done = subprocess.run(
        [*command, f"--output={output}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "It fits." in done.stdout
    content = json.loads(output.read_text())
    assert content["fits"]
    assert content["chips"] == 4
    assert content["communicated"]["all-reduce"] > 0
    assert content["largest_batch"] > content["batch_size"]
    assert content["exposed"].keys() == content["communicated"].keys()
    bound = content["bound"]
    at_least = bound["memory"], bound["interconnect"], bound["compute"] + bound["exposed"]
    assert bound["step"] == max(at_least)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--topology=v9:4x4", "--topology=v9:4x4"),
        ("--slices=0", "--slices=0"),
        ("--compilations=0", "--compilations=0"),
        ("--output=missing/plan.json", "--output=missing/plan.json"),
        ("--config.batch_size=130", "config.batch_size=130"),
        ("--config.batchsize=8", "batch_size"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    argument, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    config = f"--config={ROOT / 'configs' / 'vit_bert.py'}"
    assert plan.main([config, "--topology=v5e:2x2", argument]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
