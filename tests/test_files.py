"""JSON that somebody else wrote, and files that are written."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from lit_jax.config import EvalConfig, SourceConfig
from lit_jax.data.sources import open_source, records
from lit_jax.errors import UserError
from lit_jax.evals.classes import load_classes
from lit_jax.files import atomic_write, parse_json
from lit_jax.precomputed.format import Embeddings
from lit_jax.training.workdir import read_config
from lit_jax.weights import hub

DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


def test_json_that_is_nested_too_deep_is_no_json():
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json(DEEP)
    assert parse_json(json.dumps({"a": [[1, "犬"]]}).encode()) == {"a": [[1, "犬"]]}


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("captions.jsonl", lambda folder: open_source(SourceConfig(path=str(folder)))),
        ("captions_x.json", lambda folder: open_source(SourceConfig(path=str(folder)))),
        ("dataset_x.json", lambda folder: open_source(SourceConfig(path=str(folder)))),
        ("state.json", lambda folder: open_source(SourceConfig(path=str(folder)))),
        ("classes.json", lambda f: load_classes(EvalConfig(classes=f"{f}/classes.json"), "x")),
        ("records.json", records.read_manifest),
        ("manifest.json", Embeddings),
        ("config.json", read_config),
        ("config.json", hub.read_config),
    ],
)
def test_json_that_is_nested_too_deep_ends_with_a_sentence(tmp_path: Path, name, read):
    (tmp_path / name).write_text(DEEP + "\n")
    with pytest.raises(UserError, match="nested too deep"):
        read(tmp_path)


def test_a_link_stays_when_the_file_behind_it_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "results.json").symlink_to("there/results.json")
    for text in ("first", "second"):
        atomic_write(tmp_path / "results.json", text)
        assert (tmp_path / "there" / "results.json").read_text() == text
    assert (tmp_path / "results.json").is_symlink()
    assert len([*(tmp_path / "there").iterdir()]) == 1


def test_a_pipe_or_device_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    atomic_write(pipe, "results")
    reader.join(timeout=60)
    assert read == ["results"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
