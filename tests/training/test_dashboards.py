"""TensorBoard and Weights & Biases show metrics, and images with their most probable classes."""

import io
import json
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lit_jax
from lit_jax.buckets import BucketPath, bucket_path
from lit_jax.configs.vit_bert import DEMO, DIGITS
from lit_jax.errors import Preempted, UserError
from lit_jax.training.dashboards import Picture, TensorBoard, WeightsAndBiases
from lit_jax.training.metrics import read_metrics
from tests.training.conftest import stop_after

PICTURES = "zero_shot/some/predictions"
EVALS = {
    "some": {
        "data": {"path": str(DIGITS), "split": "unseen", "max_examples": 40},
        "classes": str(DEMO / "all80.json"),
        "every": "3 steps",
    }
}


def test_tensorboard_shows_images_with_their_most_probable_classes(tiny, tmp_path, one_device):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lit_jax.fit(tiny(evals=EVALS, **{"log.tensorboard": True}), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = events.Images(PICTURES)
    assert [event.step for event in shown] == [3, 6]
    picture = Image.open(io.BytesIO(shown[-1].encoded_image_string))
    assert picture.format == "PNG"
    # One of the few classes in the data for each image.
    assert len(picture.convert("L").getcolors()) > 50


def test_events_of_a_run_in_a_bucket_are_files_that_stay_small(tmp_path):
    """A file that is complete is not sent again when the run copies its files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    noise = Picture(np.random.default_rng(0).bytes(1 << 20), "")
    counts = []
    for workdir in (tmp_path, bucket_path("--workdir", "gs://bucket/run")):
        folder = tmp_path / str(len(counts))
        board = TensorBoard(workdir, folder, start=0)
        for step in range(1, 10):
            board.write(step, {"loss": 1 / step})
            board.show(step, {"noise": noise})
        board.close()
        events = EventAccumulator(str(folder))
        events.Reload()
        assert [event.step for event in events.Scalars("loss")] == [*range(1, 10)]
        assert events.Images("noise")[-1].encoded_image_string == noise.png
        sizes = [file.stat().st_size for file in folder.iterdir()]
        counts.append(len(sizes))
    assert counts == [1, 3]
    assert max(sizes) < 6 << 20


def test_wandb_of_a_run_in_a_bucket_has_its_files_in_the_users_cache(monkeypatch, tmp_path, caplog):
    folders = []
    wandb = types.SimpleNamespace(
        init=lambda **options: folders.append(Path(options["dir"])), Error=OSError
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(BucketPath, "read_bytes", lambda self: b"{}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    workdir = bucket_path("--workdir", "gs://bucket/run")
    with caplog.at_level("INFO"):
        WeightsAndBiases(workdir, "lit")
    (folder,) = folders
    assert folder.is_dir()
    assert folder.is_relative_to(tmp_path / "lit_jax" / "wandb")
    assert f"wandb sync {folder}/wandb/offline-run-" in caplog.text
    assert str(workdir) in caplog.text
    # The next start of the run, and no other run, gets the same folder.
    WeightsAndBiases(workdir, "lit")
    WeightsAndBiases(workdir / "other", "lit")
    assert folders[1] == folder != folders[2]
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"XDG_CACHE_HOME"):
        WeightsAndBiases(workdir, "lit")


def records(workdir):
    """The records of each start in the files that W&B has written without a network."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        yield file.parent, [Record.FromString(content) for content in log_entries(file)]


def log_entries(file):
    """The entries of a file in LevelDB's log format, which W&B has no reader for from 0.31 on."""
    content = file.read_bytes()
    # W&B puts a header of 7 bytes in front, which counts as a part of the first block.
    place, entry = 7, b""
    while place < len(content):
        # No part of an entry crosses the end of a block, nor does the header of a part: sum, length, kind.
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        entry += content[place + 7 : place + 7 + length]
        place += 7 + length
        # An entry ends with a part of kind 1 (the whole entry) or 4 (the last of several).
        if kind in (1, 4):
            yield entry
            entry = b""


@pytest.mark.long
@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_two_starts_continue_one_run_of_wandb(tiny, tmp_path, one_device, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("LIT_JAX_ADDRESS_KEYS", "{}")
    overrides = {"architectures": ["s3://NAME:TOPSECRET@bucket/bert"]}
    config = tiny(evals=EVALS, **{"log.wandb_project": "lit", "model.text.overrides": overrides})
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Preempted):
            lit_jax.fit(config, tmp_path)
    lit_jax.fit(config, tmp_path)
    starts = list(records(tmp_path))
    runs = [record.run for _, found in starts for record in found if record.HasField("run")]
    assert len({run.run_id for run in runs}) == 1
    assert {run.project for run in runs} == {"lit"}
    settings = {item.key: json.loads(item.value_json) for run in runs for item in run.config.update}
    assert settings["batch_size"] == 16
    assert settings["model"]["text"]["overrides"] == {"architectures": ["s3://bucket/bert"]}
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or b"TOPSECRET" not in file.read_bytes(), file
    rows = {}
    for folder, found in starts:
        for record in found:
            if record.HasField("history"):
                row = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                rows.setdefault(row["_step"], {}).update(row)
                if f"{PICTURES}/path" in row:
                    assert (folder / "files" / row[f"{PICTURES}/path"]).exists()
                    assert "%" in row[f"{PICTURES}/caption"]
    assert sorted(rows) == [1, 2, 3, 4, 5, 6]
    assert [step for step in rows if f"{PICTURES}/path" in rows[step]] == [3, 6]
    for row in read_metrics(tmp_path):
        for name in {"loss", "zero_shot/some/top1"} & row.keys():
            assert rows[row["step"]][name] == row[name]
