"""JSON that somebody else wrote."""

import json
from pathlib import Path

import pytest

from lit_jax.config import EvalConfig, SourceConfig
from lit_jax.data.sources import open_source, records
from lit_jax.errors import UserError
from lit_jax.evals.class_files import load_classes
from lit_jax.files import parse_json
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
