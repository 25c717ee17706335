"""Compiled programs come back from disk, and nothing on that disk can spoil a run."""

import logging

import jax
import jax.numpy as jnp
import pytest

from lit_jax.distributed.compilation_cache import compilation_cache

_EVENTS: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def _listener():
    jax.monitoring.register_event_listener(lambda event, **_: _EVENTS.append(event))


@pytest.fixture(autouse=True)
def _no_other_cache(no_cache_of_the_suite, monkeypatch):
    monkeypatch.delenv("LIT_JAX_CACHE", raising=False)


def compiled_sum(folder):
    """Compile one and the same program anew; return its result and whether it came from the disk."""
    _EVENTS.clear()
    with compilation_cache(folder):
        result = jax.jit(lambda x: (x * 3).sum())(jnp.arange(5.0))
    return float(result), "/jax/compilation_cache/cache_hits" in _EVENTS


def entries(folder):
    return list(folder.rglob("*-cache"))


def test_a_program_is_read_by_the_next_start(tmp_path):
    assert compiled_sum(tmp_path) == (30.0, False)
    assert entries(tmp_path)
    assert compiled_sum(tmp_path) == (30.0, True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: (
            data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        ),
        lambda data: b"no cache",
    ],
)
def test_a_damaged_entry_is_compiled_and_written_again(tmp_path, damage, recwarn):
    compiled_sum(tmp_path)
    for path in entries(tmp_path):
        path.write_bytes(damage(path.read_bytes()))
    assert compiled_sum(tmp_path) == (30.0, False)
    assert compiled_sum(tmp_path) == (30.0, True)
    assert not [str(warning.message) for warning in recwarn]


def test_a_variable_names_the_folder_of_all_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_JAX_CACHE", str(tmp_path / "shared"))
    assert compiled_sum(tmp_path / "run") == (30.0, False)
    assert compiled_sum(tmp_path / "other") == (30.0, True)
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_the_users_own_cache_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    with compilation_cache(tmp_path / "run"):
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "mine")
    assert not (tmp_path / "run").exists()


def test_the_settings_of_jax_come_back(tmp_path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [jax.config.values[name] for name in names]
    with compilation_cache(tmp_path):
        assert [jax.config.values[name] for name in names] != before
    assert [jax.config.values[name] for name in names] == before


def test_a_folder_that_cannot_be_used_gets_one_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lit_jax"), "propagate", True)
    (tmp_path / "file").write_text("")
    assert compiled_sum(tmp_path / "file") == (30.0, False)
    (record,) = caplog.records
    assert str(tmp_path / "file") in record.getMessage()
    assert "LIT_JAX_CACHE" in record.getMessage()
