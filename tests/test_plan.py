"""The command, with a TPU compiler that is really there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lit_jax import plan
from lit_jax.planning import planner
from lit_jax.planning.planner import Compiled

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
    forecast = content["forecast"]
    assert forecast["seconds"] > bound["compute"] + bound["exposed"]
    assert {"image tower", "text tower", "loss", "optimizer"} < forecast["shares"].keys()
    assert forecast["hours"] == pytest.approx(400 * forecast["seconds"] / 3600)
    at_least = bound["memory"], bound["interconnect"], bound["compute"] + bound["exposed"]
    assert bound["step"] == max(at_least)


def test_a_book_has_a_line_for_each_config_on_each_topology(tmp_path, monkeypatch, capsys):
    compiled = []

    def fake(step, batch):
        compiled.append(step.model.mesh.size)
        return Compiled(fits=False, total=2**34, limit=2**33)

    monkeypatch.setattr(planner, "compile_step", fake)
    configs = [
        f"--config={ROOT / 'configs' / name}" for name in ("vit_bert.py", "vit_bert.py:demo")
    ]
    output = tmp_path / "book.json"
    topologies = ["--topology=v5e:2x2", "--topology=v5e:4x4"]
    sizes = ["--config.batch_size=64", f"--output={output}"]
    # Optax mixes dtypes, which is an error in these tests and nowhere else.
    with jax.numpy_dtype_promotion("standard"):
        assert plan.main(["--book", *configs, *topologies, *sizes]) == 0
    assert compiled == [4, 16, 4, 16]
    rows = [
        line.split("|")[2:5] for line in capsys.readouterr().out.splitlines() if "| v5e" in line
    ]
    assert rows == [[f" v5e:{shape} ", " 64 ", " no "] for shape in ("2x2", "4x4")] * 2
    assert [entry["chips"] for entry in json.loads(output.read_text())] == [4, 16, 4, 16]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--topology=v5e:4x4", "--book"),
        ("--config=configs/siglit.py", "--book"),
        ("--topology=v9:4x4 --book", "--topology=v9:4x4"),
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
    assert plan.main([config, "--topology=v5e:2x2", *argument.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
