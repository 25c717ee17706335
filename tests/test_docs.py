"""The pages for those who read or extend the code: its files are where a page says, and its examples run."""

import io
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from lit_jax.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "extend.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def test_the_files_that_the_map_names_are_there():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| (.*?) \|", text, re.M)
    assert len(rows) > 20
    for row in rows:
        folder = ""
        for name in re.findall(r"`([\w/]+\.py)`", row):
            folder = name.rpartition("/")[0] or folder
            assert (ROOT / "lit_jax" / folder / name.rpartition("/")[2]).is_file(), name


@pytest.mark.long
def test_a_run_with_source_loss_optimizer_and_callback_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    with sqlite3.connect("pairs.sqlite") as database:
        database.execute("CREATE TABLE pairs (image BLOB, caption TEXT)")
        for index in range(150):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "png")
            caption = None if index == 7 else f"the number {('two', 'three', 'forty')[index % 3]}"
            database.execute("INSERT INTO pairs VALUES (?, ?)", (file.getvalue(), caption))
    names: dict = {"__name__": "extend"}
    # Optax's Muon mixes dtypes, which is an error in these tests and nowhere else.
    with jax.numpy_dtype_promotion("standard"):
        for block in blocks("python"):
            exec(block, names)
    rows = read_metrics(tmp_path / "run")
    assert names["trained"].step == 20
    assert [row["step"] for row in rows if "scale" in row] == [10, 20]
    steps = [row for row in rows if "loss" in row]
    assert steps[-1]["bad_samples/no_caption"] > 0
    assert np.isfinite([row["loss"] for row in steps]).all()
    assert all("hardest_negative" in row for row in steps)


def changed_package(folder: Path, file: str) -> Path:
    """Return a clone of the repository with the change of the page to a file of this name."""
    package = folder / "package"
    subprocess.run(["git", "clone", "--quiet", ROOT, package], check=True)
    (diff,) = (diff for diff in blocks("diff") if file in diff)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, check=True, cwd=package)
    return package


def test_the_optimizer_of_the_page_is_chosen_by_name_and_takes_a_step(tmp_path):
    program = """
import jax.numpy as jnp, optax
from lit_jax.config import PolicyConfig, parse
from lit_jax.training.optimizers import make_optimizer
from lit_jax.training.policy import resolve_policy
config = parse({"optimizer": {"name": "sgd", "momentum": 0.5, "clip_norm": None}}).optimizer
params = {"text_model": {"kernel": jnp.full((2, 2), 1.0)}}
policy = resolve_policy(PolicyConfig(lock="uu"), params)
optimizer = make_optimizer(config, optax.constant_schedule(0.1), policy)
updates, _ = optimizer.update(params, optimizer.init(params), params)
# The first step of Nesterov's momentum is the gradient times 1 + momentum.
print(round(float(updates["text_model"]["kernel"][0, 0]), 6))
"""
    package = changed_package(tmp_path, "optimizer_config.py")
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=package, capture_output=True, text=True, check=False)
    assert result.stdout == "-0.15\n", result.stderr


@pytest.mark.oracle
def test_the_family_of_the_page_equals_pytorch(tmp_path):
    package = changed_package(tmp_path, "ijepa.py")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "oracle", "tests/models/test_ijepa.py"]
    result = subprocess.run(command, cwd=package, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout
