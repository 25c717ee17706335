import dataclasses
import json

import pytest

from lit_jax.config import Config
from lit_jax.errors import UserError
from lit_jax.training.workdir import read_config
from lit_jax.weights import files, hub, load

TRANSFORMER = {"path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
DENSE = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
MEAN = {"word_embedding_dimension": 8, "pooling_mode_cls_token": False} | {
    "pooling_mode_mean_tokens": True
}


def sentence_model(folder, modules, pooling):
    """Write the files that sentence-transformers adds to a transformer's."""
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(
    ("modules", "pooling", "chosen", "words"),
    [
        (
            [TRANSFORMER, POOLING, NORMALIZE],
            MEAN,
            "pooler",
            ["'mean'", "config.model.text.pooling"],
        ),
        ([TRANSFORMER, POOLING, NORMALIZE], MEAN, "mean", None),
        ([TRANSFORMER, POOLING], {"pooling_mode": "cls"}, "mean", ["'cls'"]),
        ([TRANSFORMER, POOLING], {"pooling_mode": "cls"}, "cls", None),
        (
            [TRANSFORMER, POOLING],
            {"pooling_mode_lasttoken": True},
            "cls",
            ["'lasttoken'"],
        ),
        ([TRANSFORMER, POOLING], MEAN | {"pooling_mode_max_tokens": True}, "mean", ["'mean+max'"]),
        ([TRANSFORMER, POOLING, DENSE, NORMALIZE], MEAN, "mean", ["Dense"]),
        # Damaged, or without a pooling: nothing is known.
        ("modules", MEAN, "pooler", None),
        ([TRANSFORMER, NORMALIZE], MEAN, "pooler", None),
        ([TRANSFORMER, POOLING], [], "pooler", None),
    ],
)
def test_the_pooling_of_sentence_transformers_is_named(
    copied, tower, caplog, modules, pooling, chosen, words
):
    folder = copied("bert_torch")
    sentence_model(folder, modules, pooling)
    load.load_tower(folder, tower(folder, chosen))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (words is not None)
    assert all(word in said[0] for word in words or ())


def test_a_transformer_in_a_folder_of_its_own_has_the_pooling_beside_it(copied, tower, caplog):
    inner = copied("bert_torch")
    modules = [TRANSFORMER | {"path": inner.name}, POOLING]
    sentence_model(inner.parent, modules, MEAN)
    load.load_tower(inner, tower(inner, "pooler"))
    assert "'mean'" in caplog.text
    with pytest.raises(UserError, match=r"sentence-transformers"):
        hub.read_config(inner.parent)


@pytest.mark.parametrize(
    ("name", "content", "library"),
    [
        ("config.json", {"architecture": "vit_base_patch16_224", "num_classes": 10}, "timm"),
        ("config.json", {"hidden_size": 8}, "model_type"),
        ("open_clip_config.json", {"model_cfg": {}}, "open_clip"),
        ("adapter_config.json", {"peft_type": "LORA"}, "PEFT"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "diffusers"),
    ],
)
def test_a_folder_of_another_library_is_named(tmp_path, name, content, library):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=library) as error:
        hub.read_config(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_a_variant_alone_is_named(copied):
    folder = copied("vit_torch_sharded")
    for file in folder.glob("model-*"):
        file.rename(folder / file.name.replace("model-", "model.fp16-"))
    index = folder / "model.safetensors.index.json"
    content = index.read_text().replace("model-", "model.fp16-")
    (folder / "model.safetensors.index.fp16.json").write_text(content)
    index.unlink()
    with pytest.raises(UserError, match=r"variant='fp16'"):
        files.read_tensors(folder)
    assert files.read_tensors(folder, "fp16").values


def test_the_folders_of_models_and_of_runs_are_told_apart(tmp_path, copied):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(Config())))
    with pytest.raises(UserError, match=r"config\.json is that of a run.*--workdir"):
        hub.read_config(tmp_path)
    folder = copied("bert_torch")
    with pytest.raises(UserError, match=rf"{folder} is the folder of a model.*--model"):
        read_config(folder)
