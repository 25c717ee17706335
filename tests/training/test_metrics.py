import json
import math
import re
import resource
import time

import jax.numpy as jnp
import pytest

from lit_jax.config import LogConfig
from lit_jax.errors import UserError
from lit_jax.training import reporter
from lit_jax.training.goodput import Stopwatch
from lit_jax.training.metrics import read_metrics
from lit_jax.training.reporter import Reporter, check_finite


def report(workdir, steps, *, start=0, total=6, every=2, **config):
    with Reporter(
        workdir,
        LogConfig(**config),
        Stopwatch({}),
        every=every,
        batch_size=4,
        start=start,
        total=total,
        last_saved=lambda: None,
    ) as ours:
        for step in steps:
            ours.add(step, {"loss": jnp.float32(step / 10)}, bad_samples={"missing": 2, "empty": 0})
        ours.flush()


def test_a_large_scale_of_the_logits_is_told_once(tmp_path, caplog):
    for limit, said in ((100.0, 1), (math.inf, 0)):
        caplog.clear()
        with Reporter(
            tmp_path,
            LogConfig(),
            Stopwatch({}),
            every=1,
            batch_size=4,
            start=0,
            total=4,
            scale_limit=limit,
            last_saved=lambda: None,
        ) as reporter:
            for step, scale in enumerate((99.0, 100.0, 4.9e8, 5e8), start=1):
                metrics = {"loss": jnp.float32(1), "logit_scale": jnp.float32(scale)}
                reporter.add(step, metrics, bad_samples={})
            reporter.flush()
        assert len(caplog.records) == said
        assert ("4.9e+08 " in caplog.text) == bool(said)
        assert ("config.model.logit_scale_max=100" in caplog.text) == bool(said)


def test_first_last_and_every_nth_step_are_written(tmp_path):
    report(tmp_path, range(1, 7), every=4)
    assert [(row["step"], round(row["loss"], 6)) for row in read_metrics(tmp_path)] == [
        (1, 0.1),
        (4, 0.4),
        (6, 0.6),
    ]


def test_rows_say_the_time_of_a_step_its_share_of_the_peak_and_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(reporter, "peak_memory", lambda: 3 << 29)
    stopwatch = Stopwatch({})
    with Reporter(
        tmp_path,
        LogConfig(tensorboard=False),
        stopwatch,
        every=2,
        batch_size=4,
        start=0,
        total=4,
        least_seconds=0.01,
        last_saved=lambda: None,
    ) as ours:
        stopwatch.switch("step")
        for step in (1, 2, 3, 4):
            time.sleep(0.02)
            with stopwatch.timing("data_wait"):
                time.sleep(0.03)
            ours.add(step, {"loss": jnp.float32(1)}, bad_samples={})
            with stopwatch.timing("checkpoint"):
                time.sleep(0.05)
        ours.flush()
    row = read_metrics(tmp_path)[1]
    assert row["step"] == 2
    assert 0.03 <= row["data_wait_seconds"] <= row["step_seconds"] - 0.02
    # A checkpoint takes time from training, but not from a step.
    assert row["step_seconds"] < 4 / row["pairs_per_second"] - 0.05
    assert row["mfu"] == pytest.approx(0.01 / row["step_seconds"])
    assert row["peak_memory_gib"] == 1.5


def test_without_a_peak_or_a_count_there_is_no_figure(tmp_path):
    report(tmp_path, [1, 2])
    assert not {"mfu", "peak_memory_gib"} & read_metrics(tmp_path)[-1].keys()


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    report(tmp_path, range(1, 6), every=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    report(tmp_path, range(4, 7), start=3, every=1)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "line",
    [
        b"garbage",
        b'{"loss": 1}',
        b"[1]",
        b"null",
        b"\0\0",
        b"\xff\xfe",
        b'{"step": "2"}',
        b'{"step": -1}',
        b'{"step": 1e400}',
        b'{"step": true}',
        b'{"step": 2, "loss": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_a_line_that_is_no_row_is_left_out_and_named(tmp_path, caplog, line):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2, "loss": 3.0}\n{"step": 3, "l')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2, "loss": 3.0}]
    assert re.search(rf" 1 \w+ \w+ {file} .* line 2: ", caplog.text)
    report(tmp_path, [3], start=2, total=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_of_a_row_only_finite_numbers_are_read_and_nothing_is_lost(tmp_path):
    line = (
        '{"step": 1, "loss": NaN, "note": "a", "grad_norm": null, "x": [1], "y": Infinity, "z": 1e999,'
        f' "big": {10**400}, "ok": 2.5, "yes": true}}\n'
    )
    (tmp_path / "metrics.jsonl").write_text(line)
    assert read_metrics(tmp_path) == [{"step": 1, "ok": 2.5}]
    report(tmp_path, [2], start=1, total=2)
    assert (tmp_path / "metrics.jsonl").read_text().startswith(line)


def test_tensorboard_shows_each_value(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report(tmp_path, range(1, 4), every=1, total=3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert "pairs_per_second" in events.Tags()["scalars"]


def test_tensorboard_forgets_what_a_killed_run_wrote_after_its_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report(tmp_path, range(1, 6), every=1)
    (old,) = (tmp_path / "tensorboard").iterdir()
    old.rename(old.with_name(old.name.replace("tfevents.", "tfevents.0")))  # of an earlier second
    report(tmp_path, range(4, 7), start=3, every=1)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("tensorboard", [True, False])
def test_a_full_disk_is_one_sentence(tmp_path, tensorboard):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # bytes
    try:
        with pytest.raises(UserError, match=r"\(File too large\)"):
            report(tmp_path, range(1, 100), every=1, tensorboard=tensorboard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(read_metrics(tmp_path)) > 10


def test_non_finite_values_are_named():
    check_finite({"loss": 1.0}, 3, None)
    with pytest.raises(UserError, match=r"non-finite .*3 \(no"):
        check_finite({"loss": float("nan"), "grad_norm": 1.0}, 3, None)
    with pytest.raises(UserError, match=r"grad_norm .*2"):
        check_finite({"loss": float("nan"), "grad_norm": float("inf")}, 3, 2)


def test_wandb_is_asked_for_but_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match=r"config\.log\.wandb_project"):
        report(tmp_path, [], wandb_project="lit")


def test_rows_are_json(tmp_path):
    report(tmp_path, [1], total=1)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["examples"] == 4
