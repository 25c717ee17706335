"""The package as `pip install .` leaves it: its recipes and its command, from any folder."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lit_jax.__main__ import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.long
def test_the_installed_package_trains_a_recipe_by_name_from_any_folder(tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={site}"]
    # From a copy: the build leaves its files beside pyproject.toml.
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", ROOT, source], check=True)
    subprocess.run([*install, source], check=True)
    assert not (site / "configs").exists()
    environment = os.environ | {"PYTHONPATH": str(site)}
    words = [
        "train",
        "--config=siglit",
        "--workdir=run",
        "--config.duration=2 steps",
        "--config.evals={}",
    ]
    result = subprocess.run(
        [
            site / "bin" / "lit-jax",
            *words,
            "--config.report=none",
            "--config.schedule.warmup=0 steps",
        ],
        env=environment,
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (elsewhere / "run" / "checkpoints" / "2").is_dir()


def test_one_command_has_all_commands(capsys):
    assert main(["export", "--help"]) == 0
    assert "lit_jax.export" in capsys.readouterr().out
    assert main([]) == 0
    assert "evaluate" in capsys.readouterr().out


def test_the_reader_of_the_help_may_stop_after_a_line():
    command = f"{sys.executable} -m lit_jax --help"
    reader = f"set -o pipefail; {command} | sleep 0 && echo done"
    result = subprocess.run(["bash", "-c", reader], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("done\n", "")


def test_a_mistyped_command_is_answered_with_the_nearest(capsys):
    assert main(["evalute"]) == 2
    assert "'evaluate'" in capsys.readouterr().err


def test_the_environment_of_beam_has_all_that_the_converter_imports():
    """Beam's own environment has no more than its file names."""
    show = "import sys, lit_jax.data.convert; print(*(n for n in sys.modules if 'lit_jax' in n))"
    shown = subprocess.run(
        [sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = set()
    for module in shown.stdout.split():
        file = ROOT / module.replace(".", "/")
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    imported -= {"lit_jax", *sys.stdlib_module_names}
    assert {"jax", "etils", "array_record"} <= imported
    lines = (ROOT / "requirements-beam.txt").read_text().splitlines()
    there = {re.split("[^a-z_-]", line)[0] for line in lines}
    other_names = {"PIL": "pillow", "absl": "absl-py"}
    assert {other_names.get(name, name) for name in imported} <= there
