"""Files of the towers of CLIP, SigLIP, AltCLIP and Chinese CLIP: alone, with heads, and in a whole model."""

import re

import jax
import numpy as np
import pytest

from lit_jax.errors import UserError
from lit_jax.weights import files, hub, load, save
from tests.weights.conftest import in_one_stack

TOWERS = ["clip_vision", "clip_text", "siglip_vision", "siglip_text"]
PREFIX = r"^(vision|text)_model\."  # as transformers 4 wrote them
PROJECTIONS = {
    "visual_projection.weight": np.zeros((6, 8), np.float32),
    "text_projection.weight": np.zeros((6, 8), np.float32),
    "logit_scale": np.zeros((), np.float32),
}


def renamed(*renames):
    def change(tensors):
        for pattern, replacement in renames:
            tensors = {re.sub(pattern, replacement, name): a for name, a in tensors.items()}
        return tensors

    return change


def assert_same_tree(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture
def load_params(tower):
    return lambda folder, pooling="pooler": load.load_tower(folder, tower(folder, pooling))


@pytest.fixture
def of_golden(golden, load_params):
    return lambda name, pooling="pooler": load_params(golden / f"{name}_torch", pooling)[0]


@pytest.mark.parametrize("name", TOWERS)
def test_towers_of_transformers_4(golden, tower, load_params, name):
    params, report = load_params(golden / f"{name}_torch")
    assert not report.ignored
    with np.load(golden / "clip_outputs.npz") as arrays:
        module = tower(golden / f"{name}_torch")
        x = arrays["pixel_values" if name.endswith("vision") else "input_ids"]
        pooled = jax.jit(module.apply)({"params": params}, x).pooled
        np.testing.assert_allclose(pooled, arrays[name], atol=1e-5)


@pytest.mark.parametrize("name", ["clip_vision", "clip_text"])
def test_flax_files_are_the_same_tree(golden, load_params, of_golden, name):
    params, report = load_params(golden / f"{name}_flax")
    assert report.layout == "flax"
    assert_same_tree(params, of_golden(name))


@pytest.mark.parametrize("name", TOWERS)
def test_towers_of_transformers_5(changed, load_params, of_golden, name):
    folder = changed(f"{name}_torch", renamed((PREFIX, "")))
    assert "encoder.layers.0.self_attn.q_proj.bias" in files.read_tensors(folder).values
    assert_same_tree(load_params(folder)[0], of_golden(name))


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_altclip_of_transformers_5(changed, load_params, of_golden, prefix):
    folder = changed(
        "clip_vision_torch",
        renamed((PREFIX, prefix), (r"encoder\.layers\.", "encoder.layer.")),
        model_type="altclip_vision_model",
    )
    assert_same_tree(load_params(folder)[0], of_golden("clip_vision"))


@pytest.mark.parametrize("name", TOWERS)
def test_the_weights_of_a_whole_model_have_both_towers(
    changed, golden, load_params, of_golden, name
):
    other = name.replace("vision", "other").replace("text", "vision").replace("other", "text")
    more = PROJECTIONS | {
        **files.read_tensors(golden / f"{other}_torch").values,
        f"{name.split('_')[1]}_model.embeddings.position_ids": np.arange(9)[None],
    }
    if name.startswith("siglip"):
        more |= {"logit_bias": np.zeros(1, np.float32)}
    params, report = load_params(changed(f"{name}_torch", lambda tensors: tensors | more))
    assert_same_tree(params, of_golden(name))
    assert set(report.ignored) == set(more)


def test_a_classifier_is_ignored(changed, load_params, of_golden):
    head = {"classifier.weight": np.zeros((2, 8)), "classifier.bias": np.zeros(2)}
    params, report = load_params(changed("siglip_vision_torch", lambda tensors: tensors | head))
    assert_same_tree(params, of_golden("siglip_vision"))
    assert report.ignored == tuple(sorted(head))


@pytest.mark.parametrize(
    ("name", "head"),
    [("clip_vision", "post_layernorm"), ("siglip_vision", "head"), ("siglip_text", "head")],
)
def test_only_the_pooler_needs_its_weights(changed, load_params, of_golden, name, head):
    whole, part = of_golden(name), of_golden(name, "mean")
    assert_same_tree(part, in_one_stack({key: tree for key, tree in whole.items() if key != head}))

    def without(tensors):
        return {n: a for n, a in tensors.items() if f"_model.{head}." not in n}

    folder = changed(f"{name}_torch", without)
    assert_same_tree(load_params(folder, "mean")[0], part)
    with pytest.raises(UserError, match=rf"\({head}"):
        load_params(folder)


def test_query_key_and_value_of_siglips_pooler_are_one_tensor(golden, of_golden):
    attention = of_golden("siglip_vision")["head"]["attention"]
    tensors = files.read_tensors(golden / "siglip_vision_torch").values
    in_proj = "vision_model.head.attention.in_proj"
    for i, name in enumerate(("query", "key", "value")):
        rows = slice(8 * i, 8 * i + 8)
        np.testing.assert_array_equal(
            attention[name]["kernel"].T, tensors[f"{in_proj}_weight"][rows]
        )
        np.testing.assert_array_equal(attention[name]["bias"], tensors[f"{in_proj}_bias"][rows])


KINDS = [
    "CLIPVision",
    "AltCLIPVision",
    "ChineseCLIPVision",
    "SiglipVision",
    "CLIPText",
    "SiglipText",
]


@pytest.fixture(scope="module")
def tr():
    import transformers

    transformers.logging.disable_progress_bar()
    return transformers


def tower_fields(kind):
    fields = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
    }
    if kind.endswith("Vision"):
        return fields | {"image_size": 8, "patch_size": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 7}
    return fields | {"vocab_size": 20, "max_position_embeddings": 9, **ends}


def make(tr, kind, class_name="Model"):
    """A model in which no parameter is as it is at first."""
    import torch

    torch.manual_seed(0)
    config = getattr(tr, f"{kind}Config")(**tower_fields(kind))
    return with_noise(getattr(tr, kind + class_name)(config).eval())


def with_noise(model):
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def compare(model, module, params):
    import torch

    random = np.random.default_rng(0)
    if type(model).__name__.endswith("VisionModel"):
        x = random.normal(size=(2, 8, 8, 3)).astype(np.float32)
        inputs = {"pixel_values": torch.tensor(x).permute(0, 3, 1, 2)}
    else:
        x = random.integers(0, 20, (2, 6)).astype(np.int32)
        x[:, 4] = 7
        inputs = {"input_ids": torch.tensor(x)}
    out = jax.jit(module.apply)({"params": params}, x)
    with torch.no_grad():
        expected = model(**inputs)
    np.testing.assert_allclose(out.last_hidden_state, expected.last_hidden_state, atol=1e-5)
    np.testing.assert_allclose(out.pooled, expected.pooler_output, atol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_towers_of_todays_transformers(tr, tower, load_params, tmp_path, kind, original):
    model = make(tr, kind)
    model.save_pretrained(tmp_path, save_original_format=original)
    params, report = load_params(tmp_path)
    assert not report.ignored
    compare(model, tower(tmp_path), params)


@pytest.mark.oracle
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("kind", ["CLIPVision", "CLIPText"])
def test_models_with_projection(tr, tower, load_params, tmp_path, kind, original):
    model = make(tr, kind, "ModelWithProjection")
    model.save_pretrained(tmp_path, save_original_format=original)
    params, report = load_params(tmp_path)
    assert len(report.ignored) == 1
    compare(model.base_model, tower(tmp_path), params)


@pytest.mark.oracle
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_whole_models(tr, tower, load_params, tmp_path, kind, original):
    """With the config.json of the tower alone."""
    family, side = re.fullmatch(r"(.*)(Vision|Text)", kind).groups()
    parts = {
        f"{part.lower()}_config": getattr(tr, f"{family}{part}Config")(
            **tower_fields(f"{family}{part}")
        )
        for part in ("Vision", "Text")
    }
    whole = with_noise(getattr(tr, f"{family}Model")(getattr(tr, f"{family}Config")(**parts)))
    whole.save_pretrained(tmp_path, save_original_format=original)
    model = getattr(whole.eval(), f"{side.lower()}_model")
    model.config.save_pretrained(tmp_path)
    params, report = load_params(tmp_path)
    assert "logit_scale" in report.ignored
    compare(model, tower(tmp_path), params)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_an_exported_tower(tr, tower, load_params, tmp_path, kind):
    make(tr, kind).save_pretrained(tmp_path / "old")
    module, (params, _) = tower(tmp_path / "old"), load_params(tmp_path / "old")
    save.save_tower(tmp_path / "new", hub.read_config(tmp_path / "old"), module, params)
    # By its own class: AutoModel does not know all of these towers.
    model, info = getattr(tr, f"{kind}Model").from_pretrained(
        tmp_path / "new", output_loading_info=True
    )
    assert not any(info.values()), info
    compare(model.eval(), module, params)


@pytest.mark.oracle
def test_transformers_loads_an_exported_siglip_without_a_head(tr, tower, load_params, tmp_path):
    make(tr, "SiglipVision").save_pretrained(tmp_path / "old")
    module, (params, _) = tower(tmp_path / "old", "mean"), load_params(tmp_path / "old", "mean")
    save.save_tower(tmp_path / "new", hub.read_config(tmp_path / "old"), module, params)
    model, info = tr.SiglipVisionModel.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values()), info
    assert not any("head" in name for name, _ in model.named_parameters())
    assert_same_tree(load_params(tmp_path / "new", "mean")[0], params)
