"""The paths that commands write to: refused at once where nothing would be found there afterwards."""

from pathlib import Path

import pytest

from lit_jax import embed, evaluate, export, plan, train
from lit_jax.data import convert
from lit_jax.errors import BAD_INPUT, UserError
from lit_jax.files import local_path, output_path

pytestmark = pytest.mark.usefixtures("small_heap")

CONFIG = ["--config=configs/vit_bert.py"]
MEASURED = ["--model=none", "--data=none"]
FLAGS = [
    (train.main, CONFIG, "--workdir"),
    (embed.main, CONFIG, "--output"),
    (export.main, ["--workdir=none"], "--output"),
    (export.main, ["--output=none"], "--workdir"),
    (convert.main, ["--source.path=none"], "--output"),
    (plan.main, [*CONFIG, "--topology=v5e:2x2"], "--output"),
    (evaluate.main, [], "--workdir"),
    *((evaluate.main, MEASURED, f"--{flag}") for flag in ("output", "results", "report", "cache")),
]
VALUES = (
    "",
    "az://bucket/run",
    "file:///tmp/run",
    "s3:/bucket/x",
    "~nobody-is-called-so/x",
    "run[1]",
    "a?b",
    r"C:\run",
)


@pytest.mark.parametrize(
    ("command", "others", "flag", "value"),
    [(*flag, VALUES[1]) for flag in FLAGS] + [(*FLAGS[2], value) for value in VALUES],
)
def test_what_cannot_be_written_is_refused_before_anything_is_read(
    capsys, tmp_path, monkeypatch, command, others, flag, value
):
    monkeypatch.chdir(tmp_path)
    assert command([*others, f"{flag}={value}"]) == BAD_INPUT
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {flag}{f'={value}' if value else ' is empty'}")
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_home_folder_is_written_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_path("--output", "~/run") == tmp_path / "run"
    assert output_path("--output", "a:b/~x") == Path("a:b/~x")


def test_a_pattern_in_a_parent_counts_for_what_is_written_and_not_for_what_is_read(tmp_path):
    (tmp_path / "a[1]").mkdir()
    (tmp_path / "plain").symlink_to(tmp_path / "a[1]")
    with pytest.raises(UserError, match=r"--output=.*/plain/run: .*/a\[1\]/run"):
        output_path("--output", str(tmp_path / "plain" / "run"))
    assert local_path("--x", str(tmp_path / "a[1]")) == tmp_path / "a[1]"
