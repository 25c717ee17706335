"""The benchmarks run. What they measure is asserted nowhere: see benchmarks/RESULTS.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import plan_check

ROOT = Path(__file__).parents[1]
# Script, options, and what a line of its table starts with.
SCRIPTS = [
    pytest.param("layers", ("--repeats=1",), "dense", marks=pytest.mark.oracle),
    pytest.param("train_step", ("--batch=4", "--steps=1"), "PyTorch", marks=pytest.mark.oracle),
    pytest.param(
        "gpu_step", ("--batch=4", "--steps=1"), "tiny  UU   PyTorch", marks=pytest.mark.oracle
    ),
    pytest.param("gpu_program", ("--batch=8",), "tiny  UU", marks=pytest.mark.gpu),
    pytest.param("gpu_clock", ("--batch=4", "--steps=1"), "tiny  UU", marks=pytest.mark.long),
    pytest.param("input_pipeline", ("--repeats=1",), "1 workers", marks=pytest.mark.long),
    pytest.param("goodput", (), "share", marks=pytest.mark.long),
    pytest.param("sources", ("--repeats=1",), "records, lit_jax", marks=pytest.mark.long),
    pytest.param("retrieval", ("--widths=64",), "3000 of 64", marks=pytest.mark.long),
    pytest.param("zero_shot", ("--batch=4", "--repeats=1"), "evaluation", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("script", "options", "row"), SCRIPTS)
def test_a_benchmark_prints_figures_and_ratios(script, options, row):
    result = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", "--tiny", *options],
        cwd=ROOT,
        env=os.environ | {"TPU_SKIP_MDS_QUERY": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith(row))
    figures = line.removeprefix(row).replace("±", " ").replace("%", " ").split()
    assert len([float(figure) for figure in figures]) >= 4


@pytest.mark.long
def test_a_session_on_a_gpu_goes_on_after_a_part_that_fails(tmp_path):
    """The tests of programs for GPUs fail where there is no compiler for GPUs."""
    file = tmp_path / "session.md"
    command = ["benchmarks.gpu_session", "--tiny", "--only=tests,loss,resume", f"--output={file}"]
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False)
    rows = dict(re.findall(r"^\| (\w+) \| ([^|]+) \|", file.read_text(), re.MULTILINE))
    assert rows.pop("part") == "outcome"
    is_gpu_compiler_there = rows.pop("tests") == "done"
    assert result.returncode == (not is_gpu_compiler_there)
    assert rows == {"loss": "done", "resume": "done"}
    assert "equal: True" in file.read_text()


@pytest.mark.parametrize("name", plan_check.CONFIGS)
def test_the_configs_of_the_plan_check_are_configs(name):
    config = plan_check.config(name, devices=4)
    assert config.batch_size == 4 * plan_check.PAIRS
    assert bool(config.data.image_embeddings) == name.startswith("precomputed")
