"""The text towers: head models with prefixes, and both ways between transformers 5 and lit_jax."""

import inspect
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import serialization, traverse_util

from lit_jax.models.families import TEXT, build_tower
from lit_jax.trees import flatten
from lit_jax.weights import hub, load, name_tables, names, save

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "towers"
SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 30,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
TOKENS = ("pad", "bos", "eos", "cls", "sep")
# model_type: (fields of its config, the start of its classes' names, its heads)
FAMILIES = {
    "roberta": (SIZES, "Roberta", ("ForMaskedLM", "ForSequenceClassification")),
    "xlm-roberta": (SIZES, "XLMRoberta", ("ForMaskedLM", "ForQuestionAnswering")),
    "camembert": (SIZES, "Camembert", ("ForMaskedLM",)),
    "mpnet": (SIZES, "MPNet", ("ForMaskedLM", "ForTokenClassification")),
    "distilbert": (
        {
            "dim": 8,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 12,
            "vocab_size": 30,
            "max_position_embeddings": 16,
            "initializer_range": 0.3,
        },
        "DistilBert",
        ("ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering"),
    ),
    "modernbert": (
        SIZES | dict.fromkeys((f"{token}_token_id" for token in TOKENS), 0),
        "ModernBert",
        ("ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering"),
    ),
    "align_text_model": (SIZES, "AlignText", ()),
    "chinese_clip_text_model": (SIZES, "ChineseCLIPText", ()),
    "altclip_text_model": (SIZES | {"project_dim": 6}, "AltCLIPText", ()),
}
HEADS = [(model_type, head) for model_type, (_, _, heads) in FAMILIES.items() for head in heads]
IDS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]], jnp.int32)
MASK = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], jnp.int32)


# Folders of goldens, the prefix of a model with a head, and tensors that no tower has a use for.
@pytest.mark.parametrize("layout", ["torch", "flax"])
@pytest.mark.parametrize(
    ("golden", "prefix", "useless"),
    [
        ("modernbert", "model.", ["decoder.bias", "head.norm.weight"]),
        ("roberta", "roberta.", ["lm_head.bias", "roberta.embeddings.position_ids"]),
        ("xlm_roberta", "roberta.", ["lm_head.layer_norm.bias", "roberta.pooler.dense.bias"]),
        ("mpnet", "mpnet.", ["mpnet.embeddings.position_ids", "qa_outputs.bias"]),
        ("distilbert", "distilbert.", ["pre_classifier.bias", "vocab_projector.bias"]),
    ],
)
def test_a_model_with_a_head(tower, tmp_path, golden, prefix, useless, layout):
    module = tower(GOLDENS / golden, "mean")
    params, _ = load.load_tower(GOLDENS / golden, module)
    tensors = names.to_tensors(
        flatten(params), name_tables.FAMILIES[module.config.model_type], layout
    )
    tensors = {prefix + name: np.ascontiguousarray(array) for name, array in tensors.items()}
    tensors |= {name: np.zeros(3, np.float32) for name in useless}
    shutil.copy(GOLDENS / golden / "config.json", tmp_path)
    if layout == "torch":
        safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    else:
        tree = traverse_util.unflatten_dict(tensors, sep=".")
        (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    again, report = load.load_tower(tmp_path, module)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert report.ignored == tuple(useless)


def test_altclip_of_transformers_4(tower, tmp_path):
    module = tower(GOLDENS / "altclip_text")
    params, _ = load.load_tower(GOLDENS / "altclip_text", module)
    tensors = safetensors.numpy.load_file(GOLDENS / "altclip_text" / "model.safetensors")
    old = {name.replace(".layers.", ".layer."): array for name, array in tensors.items()}
    assert "roberta.encoder.layer.1.output.dense.weight" in old
    shutil.copy(GOLDENS / "altclip_text" / "config.json", tmp_path)
    safetensors.numpy.save_file(old, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load.load_tower(tmp_path, module)[0], params)


def test_a_config_json_of_transformers_4_modernbert(tmp_path):
    hf = {
        "model_type": "modernbert",
        "num_hidden_layers": 5,
        "global_attn_every_n_layers": 2,
        "global_rope_theta": 70.0,
        "local_rope_theta": 20.0,
        "position_embedding_type": "absolute",
    }
    (tmp_path / "config.json").write_text(json.dumps(hf))
    config = build_tower(hub.read_config(tmp_path), pooling="cls", dtype="float32").config
    assert config.type_indices == (1, 0, 1, 0, 1)
    assert config.thetas == (20, 70)


def test_the_option_of_ours_comes_back_from_config_json(tmp_path):
    hf = json.loads((GOLDENS / "roberta" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hf | {"position_ids": "arange"}))
    module = build_tower(hub.read_config(tmp_path), pooling="cls", dtype="float32")
    assert module.config.position_ids == "arange"


@pytest.fixture(scope="module")
def tr():
    import transformers

    transformers.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def config_of(tr):
    def make(model_type):
        fields, _, _ = FAMILIES[model_type]
        return tr.AutoConfig.for_model(model_type, **fields)

    return make


def assert_computes_the_same(module, params, model):
    import torch

    out = module.apply({"params": params}, IDS, MASK)
    with torch.no_grad():
        expected = model.eval()(
            input_ids=torch.tensor(np.asarray(IDS)), attention_mask=torch.tensor(np.asarray(MASK))
        )
    # Without padding, whose embedding transformers 5 sets to 0 when it reads a Chinese CLIP.
    ours, theirs = (hidden[MASK > 0] for hidden in (out.last_hidden_state, expected[0].numpy()))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    if module.pooling == "pooler":
        np.testing.assert_allclose(out.pooled, expected.pooler_output, rtol=0, atol=1e-5)


def redraw(model):
    import torch

    # Biases and scales are 0 and 1 at the start; no parameter may be like another one.
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.oracle
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_base_model_of_transformers(tr, config_of, tower, tmp_path, model_type, original):
    _, start, _ = FAMILIES[model_type]
    _, module_class = TEXT[model_type]
    model = redraw(getattr(tr, f"{start}Model")(config_of(model_type)))
    model.save_pretrained(tmp_path, save_original_format=original)
    module = tower(tmp_path, module_class.poolings[0])
    params, report = load.load_tower(tmp_path, module)
    assert not report.ignored
    assert_computes_the_same(module, params, model)


@pytest.mark.oracle
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize(("model_type", "head"), HEADS)
def test_a_head_model_of_transformers(tr, config_of, tower, tmp_path, model_type, head, original):
    _, start, _ = FAMILIES[model_type]
    model = redraw(getattr(tr, start + head)(config_of(model_type)))
    model.save_pretrained(tmp_path, save_original_format=original)
    module = tower(tmp_path, "cls")
    params, report = load.load_tower(tmp_path, module)
    assert report.ignored
    assert_computes_the_same(module, params, model.base_model)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("model_type", "pooling"),
    [
        (model_type, pooling)
        for model_type in FAMILIES
        for pooling in ("pooler", "cls")
        if pooling in TEXT[model_type][1].poolings
    ],
)
def test_transformers_loads_what_we_save(tr, config_of, tmp_path, model_type, pooling):
    hf = config_of(model_type).to_dict() | {"model_type": model_type}
    module = build_tower(hf, pooling=pooling, dtype="float32")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32),
        load.parameter_shapes(module, module.example_input),
    )
    save.save_tower(tmp_path / "new", hf, module, params)
    kind = getattr(tr, name_tables.FAMILIES[model_type].architecture)
    optional = inspect.signature(kind.__init__).parameters.keys() & {"add_pooling_layer"}
    model, info = kind.from_pretrained(
        tmp_path / "new",
        output_loading_info=True,
        **dict.fromkeys(optional, pooling == "pooler"),
    )
    assert not any(info.values()), info
    assert_computes_the_same(module, params, model)
