"""The tower's outputs on disk: whole, the same on any devices, and as good as the tower itself."""

import os
import shutil
import signal

import jax
import numpy as np
import pytest

from lit_jax.embed import embed
from lit_jax.errors import Preempted, UserError
from lit_jax.precomputed import write
from lit_jax.precomputed.format import MANIFEST, Embeddings
from lit_jax.training import train_step, trainer
from lit_jax.training.metrics import read_metrics
from lit_jax.training.model_factory import first_parameters
from lit_jax.training.workdir import load_run
from lit_jax.trees import flatten
from tests.object_store.served import BUCKET, serve
from tests.training.conftest import stop_after
from tests.training.embedded_pairs import BAD, EXAMPLES, WITHOUT_CAPTION, content, on_devices

AUGMENTED = {"data.flip": True, "data.crop_min_area": 0.3}


def losses(config, workdir):
    """Of each step, with the norm of the gradient, which tells batches apart."""
    trainer.train(config, workdir)
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(workdir)]


def test_training_from_views_of_images_and_from_their_embeddings_is_the_same(
    make, tmp_path, monkeypatch
):
    config = make(**AUGMENTED, **{"data.views": 3})
    counts = embed(config, tmp_path / "cache", "image", batch_size=16)
    assert (counts.rows, counts.bad) == (3 * (EXAMPLES - 1), 1)
    expected = losses(config, tmp_path / "images")
    seen, step = [], train_step.train_step

    def spy(state, frozen, batch, **rest):
        seen.append((frozen, batch))
        return step(state, frozen, batch, **rest)

    monkeypatch.setattr(train_step, "train_step", spy)
    of_cache = make(
        **AUGMENTED, **{"data.views": 3, "data.image_embeddings": str(tmp_path / "cache")}
    )
    found = losses(of_cache, tmp_path / "embedded")
    assert len(found) == 6
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    (frozen, batch), *_ = seen
    assert "vision_model" not in frozen
    assert "pixel_values" not in batch
    # The result is whole: it is saved, and evaluated, with the tower.
    ours, theirs = (flatten(load_run(tmp_path / run).params) for run in ("embedded", "images"))
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        np.testing.assert_allclose(ours[path], value, atol=1e-5, err_msg=path)


def test_a_tower_that_gives_nan_is_named_and_nothing_is_complete(make, nan_image_tower, tmp_path):
    config = make(**{"model.image.model": nan_image_tower})
    with pytest.raises(UserError, match=r"7 .*7 .*layer_1/mlp/fc2/bias \(1\)"):
        embed(config, tmp_path / "cache", "image", batch_size=16)
    assert not list((tmp_path / "cache").glob("*.array_record"))
    assert not (tmp_path / "cache" / MANIFEST).exists()


@pytest.mark.long
def test_training_from_captions_and_from_their_embeddings_is_the_same(make, tmp_path):
    locked = {"policy.lock": "uL"}
    config = make(**locked)
    counts = embed(config, tmp_path / "cache", "text", batch_size=16)
    captions = sum(1 + i % 3 for i in range(EXAMPLES) if i != WITHOUT_CAPTION)
    assert (counts.rows, counts.bad) == (captions, 1)
    found = losses(
        make(**locked, **{"data.text_embeddings": str(tmp_path / "cache")}), tmp_path / "embedded"
    )
    np.testing.assert_allclose(found, losses(config, tmp_path / "texts"), rtol=1e-5)


def test_eight_devices_embed_as_one_does_and_as_the_tower_does(make, tmp_path, monkeypatch):
    embed(make(), tmp_path / "one", "image", batch_size=16)
    on_devices(monkeypatch, 8)
    embed(make(), tmp_path / "eight", "image", batch_size=8)
    one, eight = Embeddings(tmp_path / "one"), Embeddings(tmp_path / "eight")
    assert one.header == eight.header
    plan = trainer.Trainer.prepare(make(), tmp_path / "run")
    model, image_transform = plan.model, plan.model.processors.image_transform
    with jax.set_mesh(model.mesh):
        _, frozen = first_parameters(model)
    pixels = [
        image_transform.eval(plan.data.source[i]["image"]) for i in range(EXAMPLES) if i != BAD
    ]
    expected = jax.jit(model.module.vision_model.apply)(
        {"params": frozen["vision_model"]},
        image_transform.normalization(np.stack(pixels)),
    ).pooled
    for read in (one, eight):
        rows = np.concatenate([read[i] for i in range(EXAMPLES) if i != BAD])
        np.testing.assert_allclose(rows, expected, atol=1e-6)


def test_stopped_and_resumed_gives_the_same_bytes(make, tmp_path, monkeypatch):
    config = make(**AUGMENTED, **{"data.views": 2})
    embed(config, tmp_path / "whole", "image", batch_size=8)
    together, asked = write._together, []

    def stop_at_the_fifth(**kwargs):
        asked.append(1)
        if len(asked) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return together(**kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(write, "_together", stop_at_the_fifth)
        with pytest.raises(Preempted, match="SIGTERM"):
            embed(config, tmp_path / "parts", "image", batch_size=8)
    there = content(tmp_path / "parts")
    assert 1 < len(there) < len(content(tmp_path / "whole"))
    assert MANIFEST not in there
    (tmp_path / "parts" / ".shard-00002-of-00006.array_record.new").write_bytes(b"as kill -9")
    times = {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in there}
    with pytest.raises(UserError, match=r"-m lit_jax\.embed"):
        trainer.Trainer.prepare(
            make(
                **AUGMENTED, **{"data.views": 2, "data.image_embeddings": str(tmp_path / "parts")}
            ),
            tmp_path / "run",
        )
    embed(config, tmp_path / "parts", "image", batch_size=8)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    for name, when in times.items():
        assert (tmp_path / "parts" / name).stat().st_mtime_ns == when


def test_too_many_bad_samples_are_told_and_are_no_embeddings(make, tmp_path, caplog):
    with pytest.raises(UserError, match=r"1 .*40 .*\(2.5%\); .*max_bad_fraction"):
        embed(make(**{"data.max_bad_fraction": 0.02}), tmp_path / "cache", "image", batch_size=8)
    assert f" {BAD}.png " in caplog.text
    assert not (tmp_path / "cache" / MANIFEST).exists()
    embed(make(), tmp_path / "cache", "image", batch_size=8)  # goes on where it stopped
    assert Embeddings(tmp_path / "cache").counts.bad == 1


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny, folder):
    """Two views of each of the pairs' images."""
    path = tmp_path_factory.mktemp("cache") / "cache"
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        on_devices(patch, 1)
        raw = {"data.train.path": str(folder), "data.train.split": None, "data.views": 2}
        raw["data.max_bad_fraction"] = 1.0
        embed(tiny(**raw, **AUGMENTED), path, "image", batch_size=16)
    return path


@pytest.mark.parametrize("scheme", ["s3://nobody:none", "gs://anonymous"])
def test_training_from_embeddings_in_a_bucket_is_the_same_bit_for_bit(
    make, cache, tmp_path, monkeypatch, scheme
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with serve(cache.parent) as store:
        address = store(f"{scheme}@{BUCKET}/{cache.name}")
        found = {
            place: losses(
                make(**AUGMENTED, **{"data.views": 2, "data.image_embeddings": path}),
                tmp_path / place,
            )
            for place, path in (("local", str(cache)), ("bucket", address))
        }
    assert found["bucket"] == found["local"]
    assert len(found["local"]) == 6
    copied = {path.name for path in (tmp_path / "home").rglob("shard-*")}
    assert copied == {path.name for path in cache.glob("shard-*")}


@pytest.mark.parametrize("scheme", ["s3://nobody:none", "gs://anonymous"])
def test_embeddings_that_cannot_be_read_from_a_bucket_are_told(make, cache, tmp_path, scheme):
    with serve(cache.parent) as store:
        incomplete, none = store(f"{scheme}@{BUCKET}/"), store(f"{scheme}@elsewhere/cache")
        for address in (incomplete, none):
            with pytest.raises(UserError, match=f"{scheme[:5]}.*lit_jax.embed"):
                trainer.train(make(**{"data.image_embeddings": address}), tmp_path / "run")
    with pytest.raises(UserError, match=rf"data.image_embeddings: {scheme[:5]}\S*elsewhere/cache"):
        trainer.train(make(**{"data.image_embeddings": none}), tmp_path / "run")


def shorter(folder):
    lines = (folder / "captions.jsonl").read_text().splitlines(keepends=True)
    return lines[:-1]


def renamed(folder):
    lines = (folder / "captions.jsonl").read_text().splitlines(keepends=True)
    return [lines[0], lines[2], lines[1], *lines[3:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.flip": False}, "config.data.image_embeddings: .*augmentation"),
        ({"data.image_size": 16}, "config.data.image_embeddings: .*augmentation"),
        ({"data.views": 3}, r"2 views .*3"),
        ({"data.views": None}, r"config.data.views .*None.*2"),
        ({"model.dtype": "bfloat16"}, r"config.model.dtype"),
        ({"policy.lock": "UU"}, r"vision_model/"),
        (
            {"policy.trainable": ((r"vision_model/layernorm/.*", True),)},
            r"vision_model/layernorm/",
        ),
    ],
)
def test_another_config_than_that_of_the_embeddings_is_refused(
    make, cache, tmp_path, changes, message
):
    with pytest.raises(UserError, match=message):
        trainer.train(
            make(**AUGMENTED | {"data.views": 2, "data.image_embeddings": str(cache)} | changes),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [(shorter, r"40 examples, .*39"), (renamed, "config.data.image_embeddings: .*data")],
)
def test_other_data_than_that_of_the_embeddings_is_refused(
    make, folder, cache, tmp_path, change, message
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "captions.jsonl").write_text("".join(change(folder)))
    changes = {"data.views": 2, "data.image_embeddings": str(cache)}
    with pytest.raises(UserError, match=message):
        trainer.train(
            make(**AUGMENTED, **changes, **{"data.train.path": str(tmp_path / "data")}),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_the_embeddings_of_the_other_side_are_refused(make, cache, tmp_path):
    changes = {"policy.lock": "uL", "data.text_embeddings": str(cache)}
    with pytest.raises(UserError, match=rf"config.data.text_embeddings: {cache} .*image tower"):
        trainer.train(make(**changes), tmp_path / "run")


def test_another_tower_is_refused_and_the_folder_is_not_mixed(make, towers, cache, tmp_path):
    """A bit of one weight is enough."""
    other = tmp_path / "tower"
    shutil.copytree(towers["image"], other)
    weights = other / "model.safetensors"
    bits = bytearray(weights.read_bytes())
    bits[-4] ^= 1
    weights.write_bytes(bits)
    changes = {"data.views": 2, "model.image.model": str(other)}
    with pytest.raises(UserError, match=rf"config.data.image_embeddings: {cache} .*image tower"):
        trainer.train(
            make(**AUGMENTED, **changes, **{"data.image_embeddings": str(cache)}), tmp_path / "run"
        )
    assert not (tmp_path / "run" / "config.json").exists()
    mine = tmp_path / "mine"
    shutil.copytree(cache, mine)
    before = content(mine)
    with pytest.raises(UserError, match=r"/mine .*\btower.*--output"):
        embed(make(**AUGMENTED, **changes), mine, "image")
    assert content(mine) == before


@pytest.mark.long
def test_a_run_goes_on_from_embeddings_and_from_images(make, cache, tmp_path, monkeypatch):
    """They change nothing that counts, so they may change; a resumed run checks its own copy of the tower."""
    both = AUGMENTED | {"data.views": 2}
    of_images, of_cache = make(**both), make(**both, **{"data.image_embeddings": str(cache)})
    expected = losses(of_images, tmp_path / "whole")
    for first, second in ((of_images, of_cache), (of_cache, of_images)):
        workdir = tmp_path / f"run{first.data.image_embeddings == ''}"
        with monkeypatch.context() as patch:
            stop_after(patch, 3)
            with pytest.raises(Preempted):
                trainer.train(first, workdir)
        np.testing.assert_allclose(losses(second, workdir), expected, rtol=1e-5)
