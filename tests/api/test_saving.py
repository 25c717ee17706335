"""Save a model beside its processor, over another model, and in place."""

import json
import resource

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers as tr

import lit_jax
from lit_jax.errors import UserError
from tests.api.tiny_models import CONFIGS, assert_same_params


@pytest.mark.parametrize("kind", ["vit-bert", "clip"])
def test_a_model_is_saved_beside_its_processor_again_and_again(tmp_path, processor, kind):
    model, folder = lit_jax.DualEncoder.from_config(CONFIGS[kind]()), tmp_path / "saved"
    processor.save_pretrained(folder)
    (folder / "notes.md").write_text("mine")
    files = {file.name for file in folder.iterdir()}
    for epoch in range(2):
        params = model.params | {"logit_scale": jnp.float32(epoch)}
        model.save_pretrained(folder, params=params)
        processor.save_pretrained(folder)
        assert lit_jax.DualEncoder.from_pretrained(folder).params["logit_scale"] == epoch
        written = {"config.json", "model.safetensors", "flax_model.msgpack"}
        assert {file.name for file in folder.iterdir()} == files | written
    tr.VisionTextDualEncoderProcessor.from_pretrained(folder)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def as_transformers_writes_it(model, folder):
    """Save a model as transformers does with a small max_shard_size."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("lit_jax")
    (folder / "config.json").write_text(json.dumps(config))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for file in ("model.safetensors", "flax_model.msgpack"):
        (folder / file).unlink(missing_ok=True)
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shard_of = {name: shards[i % 2] for i, name in enumerate(tensors)}
    for shard in shards:
        part = {name: array for name, array in tensors.items() if shard_of[name] == shard}
        safetensors.numpy.save_file(part, folder / shard, {"format": "pt"})
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": shard_of})
    (folder / "model.safetensors.index.json").write_text(index)


def test_a_model_of_the_same_class_is_replaced_in_every_format(model, tmp_path, caplog):
    """It is the idiom of fine-tuning in place; no older weights may be loaded instead of the new ones."""
    as_transformers_writes_it(model, tmp_path)
    for name in ("flax_model.msgpack", "pytorch_model.bin", "model.fp16.safetensors", "vocab.txt"):
        (tmp_path / name).write_text("old")
    again = lit_jax.DualEncoder.from_pretrained(tmp_path)
    assert_same_params(again.params, model.params)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # a disk that is full
    try:
        with pytest.raises(UserError, match=str(tmp_path)):
            again.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before

    again.save_pretrained(tmp_path, params=again.params | {"logit_scale": jnp.float32(3)})
    written = {"config.json", "flax_model.msgpack", "model.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == written | {
        "model.fp16.safetensors",
        "vocab.txt",
    }
    assert "(model.fp16.safetensors)" in caplog.text
    for name in ("model.safetensors", "flax_model.msgpack"):
        assert lit_jax.DualEncoder.from_pretrained(tmp_path).params["logit_scale"] == 3
        (tmp_path / name).unlink()


@pytest.mark.oracle
def test_shards_of_transformers_are_fine_tuned_in_place(tmp_path):
    import torch

    theirs = tr.CLIPModel(CONFIGS["clip"]()).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    ours = lit_jax.DualEncoder.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path, params=ours.params | {"logit_scale": jnp.float32(0.5)})
    assert not list(tmp_path.glob("*-of-*")) + list(tmp_path.glob("*.index.json"))
    again, info = tr.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert again.logit_scale.item() == 0.5
    with torch.no_grad():
        theirs.logit_scale.fill_(0.5)
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({}, "model"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, r"BertForMaskedLM"),
        ({"model_type": "clip"}, r"clip"),
    ],
)
def test_a_model_of_another_class_is_not_overwritten(model, tmp_path, config, named):
    """A head, or a second tower, would be lost."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"{named} .*lit_jax .*BertModel"):
        model.text_model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == config
    with pytest.raises(UserError, match=r"dict.*params="):
        model.save_pretrained(tmp_path / "new", dict(model.params))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": {"params": {}}}, r"logit_scale .*\{'params'"),
        ({"params": {"logit_scale": np.zeros(3)}}, r"logit_scale .*\[3\], .*\[\]"),
        ({"params": {"more": np.zeros(())}}, r"\(more .*model\.params"),
        ({"safe_serialization": True}, r"safe_serialization .*save_pretrained"),
        ({"commit_message": "epoch 1"}, "commit_message .* push_to_hub=True"),
    ],
)
def test_what_cannot_be_saved_is_said_before_anything_is_written(model, tmp_path, options, message):
    if "more" in options.get("params", ()) or "logit_scale" in options.get("params", ()):
        options = {"params": {**model.params, **options["params"]}}
    with pytest.raises(UserError, match=message):
        model.save_pretrained(tmp_path / "new", **options)
    assert not list(tmp_path.iterdir())


def test_a_model_is_saved_to_the_working_folder_and_through_a_link(model, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    model.save_pretrained(".")
    assert (tmp_path / "real/config.json").exists()
    model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "real"]
