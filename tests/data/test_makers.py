"""A source whose path is a script: who runs it, and what is there afterwards."""

import subprocess
import sys
from pathlib import Path

import pytest

from lit_jax.config import SourceConfig, parse
from lit_jax.configs.vit_bert import get_config
from lit_jax.data import makers
from lit_jax.data.makers import make_missing, sources_of
from lit_jax.data.sources import open_source
from lit_jax.errors import UserError

SCRIPT = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
(folder / "train").mkdir(parents=True)
(folder / "train" / "captions.jsonl").write_text(json.dumps({"caption": "one"}))
"""


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "make_it.py"
    file.write_text(SCRIPT)
    return file


def open_made(script):
    return open_source(SourceConfig(path=str(script), split="train"), text_only=True)


def test_opening_runs_nothing_and_says_what_does(script, tmp_path):
    with pytest.raises(UserError) as refused:
        open_made(script)
    assert not (tmp_path / "cache").exists()
    command = str(refused.value).split()
    subprocess.run(command[command.index(sys.executable) :], check=True)
    assert open_made(script)[0]["captions"] == ("one",)


def test_a_folder_is_made_once_and_anew_by_another_script(script, tmp_path):
    make_missing([SourceConfig(path=str(script)), SourceConfig(path="elsewhere")])
    (first,) = (tmp_path / "cache" / "lit_jax").iterdir()
    times = first.stat().st_mtime_ns
    make_missing([SourceConfig(path=str(script))])
    assert first.stat().st_mtime_ns == times
    script.write_text(SCRIPT.replace("one", "two"))
    make_missing([SourceConfig(path=str(script))])
    assert open_made(script)[0]["captions"] == ("two",)
    assert first.is_dir()


def test_two_at_once_leave_one_whole_folder(script, tmp_path):
    script.write_text("import time\ntime.sleep(1)\n" + SCRIPT)
    code = "import sys\nfrom lit_jax.data.makers import *\nmake_missing([SourceConfig(path=sys.argv[1])])"
    both = [subprocess.Popen([sys.executable, "-c", code, script]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert len(list((tmp_path / "cache" / "lit_jax").iterdir())) == 1
    assert open_made(script)[0]["captions"] == ("one",)


def test_the_slower_of_two_keeps_what_is_there(tmp_path):
    for name in ("new", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    makers._move(tmp_path / "new", tmp_path / "there")
    assert (tmp_path / "there" / "a").read_text() == "there"


@pytest.mark.parametrize(
    ("content", "problem"),
    [("raise SystemExit(3)", "exit code 3"), ("", r"\.py"), (None, "No such file")],
)
def test_a_script_that_fails_is_named_and_leaves_nothing(script, tmp_path, content, problem):
    script.unlink() if content is None else script.write_text(content)
    with pytest.raises(UserError, match=problem) as refused:
        make_missing([SourceConfig(path=str(script))])
    assert str(script) in str(refused.value)
    assert not [*tmp_path.glob("cache/lit_jax/*")]


def test_a_cache_that_cannot_be_written_is_told_with_its_variable(script, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        make_missing([SourceConfig(path=str(script))])


def test_the_sources_of_a_config_are_those_of_training_and_evaluation():
    raw = get_config()
    raw.data.mixture = {"more": {"path": "b"}}
    raw.evals = {"probe": {"data": {"path": "c"}, "train": {"path": "d"}}}
    raw.data.train.path = "a"
    assert [source.path for source in sources_of(parse(raw))] == ["a", "b", "c", "d"]
