"""lit_jax.DualEncoder and its towers as the documentation of transformers uses theirs."""

import functools
import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers as tr
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

import lit_jax
from lit_jax.api.inputs import as_dtype
from lit_jax.config import MeshConfig
from lit_jax.distributed.mesh import batch_sharding, make_mesh, replicated
from lit_jax.errors import UserError

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
TEXT = {**SMALL, "vocab_size": 40, "max_position_embeddings": 20}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 8}
CLIP_TEXT = {**TEXT, "eos_token_id": 39}
EFFICIENTNET = {
    "image_size": 32,
    "depth_coefficient": 0.5,
    "in_channels": [32, 8],
    "out_channels": [8, 16],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "num_block_repeats": [1, 2],
    "expand_ratios": [1, 2],
    "hidden_dim": 16,
    "depthwise_padding": [],
    "width_coefficient": 1.0,
}


def vision_text(vision, text):
    return tr.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=8)


# By name: the config of a tiny dual encoder of its kind.
CONFIGS = {
    "vit-bert": lambda: vision_text(tr.ViTConfig(**IMAGE), tr.BertConfig(**TEXT)),
    "clip-roberta": lambda: vision_text(
        tr.CLIPVisionConfig(**IMAGE), tr.RobertaConfig(**TEXT, pad_token_id=1)
    ),
    "clip": lambda: tr.CLIPConfig(text_config=CLIP_TEXT, vision_config=IMAGE, projection_dim=8),
    "siglip": lambda: tr.SiglipConfig(text_config=TEXT, vision_config=IMAGE),
    "altclip": lambda: tr.AltCLIPConfig(
        text_config={**TEXT, "project_dim": 12}, vision_config=IMAGE, projection_dim=8
    ),
    "chinese_clip": lambda: tr.ChineseCLIPConfig(
        text_config=TEXT, vision_config=IMAGE, projection_dim=8
    ),
    "align": lambda: tr.AlignConfig(
        text_config=TEXT, vision_config=EFFICIENTNET, projection_dim=16
    ),
}


def inputs_for(config, pairs=2):
    """What a processor makes of pairs: NumPy, int64, channels first, texts of different lengths.

    As many and as long ones as in the example of the documentation: what is not compiled as a whole is then
    compiled once for all tests.
    """
    random = np.random.default_rng(0)
    length = 7
    mask = np.arange(length) < np.arange(length, length - pairs, -1)[:, None]
    ids = np.where(mask, random.integers(3, 39, (pairs, length)), 1)
    ids[np.arange(pairs), mask.sum(1) - 1] = 39  # end of text
    size = config.vision_config.image_size
    pixels = random.normal(size=(pairs, 3, size, size)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": mask.astype(int), "pixel_values": pixels}


@pytest.fixture(scope="module")
def model():
    return lit_jax.DualEncoder.from_config(CONFIGS["vit-bert"]())


@pytest.fixture(scope="module")
def inputs():
    return inputs_for(CONFIGS["vit-bert"]())


def assert_same_params(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.oracle
@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_computes_what_pytorch_computes_and_goes_back(tmp_path, name):
    import torch

    torch.manual_seed(0)
    config = CONFIGS[name]()
    theirs = tr.AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lit_jax.DualEncoder.from_pretrained(tmp_path / "theirs")
    inputs = inputs_for(config)
    asked = {"return_loss": True, "output_hidden_states": True, "output_attentions": True}
    output = ours(**inputs, **asked)
    with torch.no_grad():
        expected = theirs(**{key: torch.tensor(value) for key, value in inputs.items()}, **asked)
    for key in ("loss", "logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        np.testing.assert_allclose(output[key], expected[key], atol=1e-4, err_msg=key)
    for key in ("text_model_output", "vision_model_output"):
        # Theirs of a whole CLIP says pooler_output to the embedding.
        compare_towers(output[key], expected[key], pooled=False)

    ours.save_pretrained(tmp_path / "ours")
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    written, original = (
        safetensors.numpy.load_file(tmp_path / folder / "model.safetensors")
        for folder in ("ours", "theirs")
    )
    for key in original.keys() & written.keys():
        np.testing.assert_array_equal(written[key], original[key], err_msg=key)
    with torch.no_grad():
        after = again(**{key: torch.tensor(value) for key, value in inputs.items()})
    np.testing.assert_allclose(after.logits_per_image, expected.logits_per_image, atol=1e-5)
    read_back = lit_jax.DualEncoder.from_pretrained(tmp_path / "ours")
    assert_same_params(read_back.params, ours.params)
    assert ours.config.to_dict().keys() <= read_back.config.to_dict().keys()


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta", "Camembert", "MPNet"])
def test_positions_from_0_are_exported_as_a_moved_table(tmp_path, kind):
    """They are PyTorch's with position_ids given, and those of the export without."""
    import torch

    text = getattr(tr, f"{kind}Config")(**TEXT, pad_token_id=1)
    config = vision_text(tr.ViTConfig(**IMAGE), text)
    plain = lit_jax.DualEncoder.from_config(config)
    params = jax.tree.map(lambda leaf: leaf * 9 if leaf.ndim else leaf, plain.params)
    plain.save_pretrained(tmp_path / "plain", params=params)
    inputs = inputs_for(config)
    batch = {key: torch.tensor(value) for key, value in inputs.items()}

    def torch_logits(folder, **more):
        read = tr.VisionTextDualEncoderModel.from_pretrained
        theirs, info = read(folder, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            return theirs.eval()(**batch, **more).logits_per_image

    # Large weights make large logits, whose float32 numbers lie further apart.
    close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
    expected = torch_logits(tmp_path / "plain", position_ids=torch.arange(7)[None].repeat(2, 1))
    assert (torch_logits(tmp_path / "plain") - expected).abs().max() > 1e-2
    ours = lit_jax.DualEncoder.from_pretrained(
        tmp_path / "plain", text_config={"position_ids": "arange"}
    )
    close(ours(**inputs).logits_per_image, expected)
    ours.save_pretrained(tmp_path / "moved")
    close(torch_logits(tmp_path / "moved"), expected)
    again = lit_jax.DualEncoder.from_pretrained(tmp_path / "moved")
    close(again(**inputs).logits_per_image, expected)
    tower = lit_jax.TextModel.from_pretrained(tmp_path / "plain", position_ids="arange")
    tower.save_pretrained(tmp_path / "tower")
    alone = tr.AutoModel.from_pretrained(tmp_path / "tower").eval()
    with torch.no_grad():
        theirs = alone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    ours = tower(inputs["input_ids"], inputs["attention_mask"])
    np.testing.assert_allclose(ours.pooler_output, theirs.pooler_output, atol=1e-5)


def compare_towers(ours, theirs, *, pooled=True):
    hidden = theirs.last_hidden_state
    if hidden.ndim == 4:  # a map of features
        hidden = hidden.flatten(2).mT
    np.testing.assert_allclose(ours.last_hidden_state, hidden, atol=1e-4)
    if pooled and theirs.pooler_output is not None:
        np.testing.assert_allclose(ours.pooler_output, theirs.pooler_output, atol=1e-4)
    recorded = [output.get("hidden_states") or () for output in (ours, theirs)]
    for ours_, theirs_ in zip(*recorded, strict=True):
        expected = theirs_.flatten(2).mT if theirs_.ndim == 4 else theirs_
        np.testing.assert_allclose(ours_, expected, atol=1e-4)
    recorded = [output.get("attentions") or () for output in (ours, theirs)]
    for ours_, theirs_ in zip(*recorded, strict=True):
        np.testing.assert_allclose(ours_, theirs_, atol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "text_class", "vision_class"),
    [
        ("align", "AlignTextModel", "AlignVisionModel"),
        ("altclip", "AltCLIPTextModel", "AltCLIPVisionModel"),
        ("clip", "CLIPTextModel", "CLIPVisionModel"),
        ("siglip", "SiglipTextModel", "SiglipVisionModel"),
    ],
)
def test_towers_alone_compute_what_pytorch_computes(tmp_path, name, text_class, vision_class):
    """Read from the folder of the whole, and from a folder of their own."""
    import torch

    config = CONFIGS[name]()
    whole = tr.AutoModel.from_config(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    inputs = inputs_for(config)
    pixels = {"pixel_values": inputs.pop("pixel_values")}
    for ours, theirs, class_, batch in (
        (lit_jax.TextModel, whole.text_model, text_class, inputs),
        (lit_jax.VisionModel, whole.vision_model, vision_class, pixels),
    ):
        with torch.no_grad():
            expected = theirs(**{key: torch.tensor(value) for key, value in batch.items()})
        compare_towers(ours.from_pretrained(tmp_path / "whole")(**batch), expected)
        alone = getattr(tr, class_)(theirs.config)
        alone.load_state_dict(theirs.state_dict())
        alone.save_pretrained(tmp_path / class_)
        compare_towers(ours.from_pretrained(tmp_path / class_)(**batch), expected)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["convnext", "efficientnet", "modernbert"])
def test_states_of_towers_whose_blocks_differ(tmp_path, name):
    import torch

    configs = {
        "convnext": tr.ConvNextConfig(
            hidden_sizes=[4, 6], depths=[1, 2], num_stages=2, image_size=16
        ),
        "efficientnet": tr.EfficientNetConfig(**EFFICIENTNET | {"hidden_dim": 1280}),
        "modernbert": tr.ModernBertConfig(
            **TEXT | {"num_hidden_layers": 4, "max_position_embeddings": 20, "local_attention": 4},
            **{f"{token}_token_id": 0 for token in ("pad", "bos", "eos", "cls", "sep")},
        ),
    }
    torch.manual_seed(0)
    theirs = tr.AutoModel.from_config(configs[name], attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path)
    batch = {"pixel_values": np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype("f4")}
    ours = lit_jax.VisionModel
    if name == "modernbert":
        batch, ours = {"input_ids": np.arange(14).reshape(2, 7)}, lit_jax.TextModel
    pooling = "cls" if name == "modernbert" else "pooler"
    asked = {"output_hidden_states": True, "output_attentions": name == "modernbert"}
    with torch.no_grad():
        expected = theirs(**{key: torch.tensor(value) for key, value in batch.items()}, **asked)
    if name == "modernbert":  # theirs ends with the state after the last normalisation
        blocks = list(expected.hidden_states[:-1])
        with torch.no_grad():
            states = []
            theirs.layers[-1].register_forward_hook(lambda *args: states.append(args[-1]))
            theirs(**{key: torch.tensor(value) for key, value in batch.items()})
        expected["hidden_states"] = (*blocks, states[0])
    output = ours.from_pretrained(tmp_path, pooling=pooling)(**batch, **asked)
    assert len(output.hidden_states) > 2
    compare_towers(output, expected, pooled=False)


def test_every_tower_gives_its_states_when_asked():
    config = CONFIGS["align"]()
    model = lit_jax.DualEncoder.from_config(config)
    call = functools.partial(model, **inputs_for(config))
    asked = jax.jit(lambda: call(output_hidden_states=True, output_attentions=True))()
    states = asked.vision_model_output.hidden_states
    assert [state.shape for state in states] == [(2, 256, 32), (2, 256, 8), (2, 64, 16)]
    np.testing.assert_array_equal(states[-1], asked.vision_model_output.last_hidden_state)
    assert asked.vision_model_output.attentions is None
    assert len(asked.text_model_output.attentions) == 2
    assert jax.eval_shape(call).vision_model_output.hidden_states is None


def test_calls_are_functions_of_jax(model, inputs):
    ids, mask, pixels = (
        jnp.asarray(inputs[key]) for key in ("input_ids", "attention_mask", "pixel_values")
    )
    output = model(ids, pixels, mask, return_loss=True)
    assert output.logits_per_image.shape == (2, 2)
    np.testing.assert_array_equal(output.logits_per_text, output.logits_per_image.T)

    jitted = jax.jit(lambda params: model(ids, pixels, mask, params=params, return_loss=True))
    np.testing.assert_allclose(jitted(model.params).loss, output.loss, rtol=1e-5)

    features = model.get_image_features(pixels)
    one_by_one = jax.vmap(lambda image: model.get_image_features(image[None])[0])
    np.testing.assert_allclose(jax.jit(one_by_one)(pixels), features, atol=1e-5)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, output.image_embeds, atol=1e-6)

    grads = jax.jit(jax.grad(lambda params: jitted(params).loss))(model.params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads["visual_projection"]))
    # Gradient of the log of the scale: against a difference.
    moved = model.params | {"logit_scale": model.params["logit_scale"] + 1e-2}
    difference = (jitted(moved).loss - output.loss) / 1e-2
    np.testing.assert_allclose(grads["logit_scale"], difference, rtol=5e-2)


def test_on_a_mesh_the_numbers_are_the_same(model):
    inputs = inputs_for(model.config)
    expected = model(**inputs)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:2])
    params = jax.device_put(model.params, replicated(mesh))
    batch = {
        key: jax.device_put(jnp.asarray(value), batch_sharding(mesh))
        for key, value in inputs.items()
    }
    with jax.set_mesh(mesh):
        output = jax.jit(lambda params, batch: model(**batch, params=params))(params, batch)
    np.testing.assert_allclose(output.logits_per_image, expected.logits_per_image, atol=1e-5)


def test_on_a_mesh_of_other_axes_the_caller_says_what_lies_where(model):
    inputs = inputs_for(model.config)
    expected = model(**inputs)
    mesh = jax.make_mesh((2,), ("mine",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = NamedSharding(mesh, PartitionSpec("mine"))
    batch = {key: jax.device_put(jnp.asarray(value), split) for key, value in inputs.items()}
    with jax.set_mesh(mesh):
        output = jax.jit(lambda batch: model(**batch, return_loss=True))(batch)
    np.testing.assert_allclose(output.logits_per_image, expected.logits_per_image, atol=1e-5)
    assert output.text_embeds.sharding.is_equivalent_to(split, 2)


def test_optional_inputs_count(model, inputs):
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    plain = model(ids, pixels).text_embeds
    for extra in (
        {"attention_mask": inputs["attention_mask"]},
        {"token_type_ids": np.ones_like(ids)},
        {"position_ids": np.arange(7)[None].repeat(2, 0) + 1},
    ):
        assert np.abs(model(ids, pixels, **extra).text_embeds - plain).max() > 1e-4, extra
        same = model.get_text_features(ids, **extra)
        unit = same / np.linalg.norm(same, axis=1, keepdims=True)
        np.testing.assert_allclose(unit, model(ids, pixels, **extra).text_embeds, atol=1e-6)


def test_dropout_is_on_when_a_key_is_given(model, inputs):
    ids = inputs["input_ids"]
    key = jax.random.key(0, impl="rbg")
    plain, dropped = (model.get_text_features(ids, dropout_rng=rng) for rng in (None, key))
    assert np.abs(plain - dropped).max() > 1e-4


def test_a_model_of_two_pretrained_towers(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    model.vision_model.save_pretrained(tmp_path / "vision")
    pair = lit_jax.DualEncoder.from_vision_text_pretrained(
        tmp_path / "vision", tmp_path / "whole", projection_dim=4, logit_scale_init_value=1.0
    )
    assert_same_params(pair.params["vision_model"], model.params["vision_model"])
    assert_same_params(pair.params["text_model"], model.params["text_model"])
    assert pair.config.projection_dim == 4
    assert pair.params["visual_projection"]["kernel"].shape == (16, 4)
    assert pair.params["logit_scale"] == 1.0
    assert jax.eval_shape(lambda: pair(**inputs)).text_embeds.shape == (2, 4)
    pair.save_pretrained(tmp_path / "pair")
    again = lit_jax.DualEncoder.from_pretrained(tmp_path / "pair")
    assert_same_params(again.params, pair.params)
    # A pooler that is not used is not lost.
    tower = lit_jax.VisionModel.from_pretrained(tmp_path / "vision", pooling="mean")
    assert "pooler" not in tower.params
    tower.save_pretrained(tmp_path / "tower")
    whole = lit_jax.VisionModel.from_pretrained(tmp_path / "tower")
    assert_same_params(whole.params, model.params["vision_model"])


@pytest.mark.parametrize(("dtype", "atol"), [("bfloat16", 0.03), (jnp.float16, 0.004)])
def test_half_precision_is_close(model, inputs, tmp_path, dtype, atol):
    model.save_pretrained(tmp_path)
    half = lit_jax.DualEncoder.from_pretrained(tmp_path, dtype=dtype)
    half, full = jax.jit(functools.partial(half, **inputs))(), model(**inputs)
    assert half.vision_model_output.pooler_output.dtype == jnp.dtype(dtype)
    assert half.text_model_output.last_hidden_state.dtype == jnp.dtype(dtype)
    assert half.image_embeds.dtype == jnp.float32
    assert 0 < np.abs(half.image_embeds - full.image_embeds).max() < atol


@pytest.mark.oracle
def test_a_dtype_of_pytorch_means_the_same():
    import torch

    assert as_dtype(torch.bfloat16) == jnp.bfloat16
    with pytest.raises(UserError, match="float64"):
        as_dtype(torch.float64)


def test_other_parameters_of_a_call_fit_the_model_or_are_named(model, inputs):
    with pytest.raises(UserError, match=r"logit_scale .*\{'params'"):
        model(**inputs, params={"params": model.params})
    params = {name: part for name, part in model.params.items() if name != "logit_scale"}
    with pytest.raises(UserError, match=r"logit_scale is missing"):
        jax.jit(lambda params: model(**inputs, params=params))(params)


def test_the_example_of_the_documentation(model, tmp_path):
    """Two images, two texts, softmax over logits_per_image, all from one local folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    processor = tr.VisionTextDualEncoderProcessor(
        tr.ViTImageProcessorPil(size={"height": 16, "width": 16}),
        tr.BertTokenizer(str(tmp_path / "vocab.txt")),
    )
    model.save_pretrained(tmp_path / "vit-bert", processor)

    folder = str(tmp_path / "vit-bert")
    model = lit_jax.DualEncoder.from_pretrained(folder)
    processor = tr.VisionTextDualEncoderProcessor.from_pretrained(folder)
    images = [Image.new("RGB", (40, 30), color) for color in ("orange", "brown")]
    texts = ["a photo of a cat", "a photo of a dog"]
    inputs = processor(text=texts, images=images, return_tensors="np", padding=True)
    outputs = model(**inputs, return_loss=True)
    probabilities = jax.nn.softmax(outputs.logits_per_image, axis=1)
    assert probabilities.shape == (2, 2)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    assert np.isfinite(outputs.loss)


def test_outputs_are_read_as_those_of_transformers(model, inputs):
    output = model(**inputs)
    keys = ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]
    towers = ["text_model_output", "vision_model_output"]
    assert list(output) == list(output.keys()) == keys + towers
    assert "loss" not in output
    assert output.loss is None
    with pytest.raises(KeyError):
        output["loss"]
    for i, key in enumerate(keys):
        np.testing.assert_array_equal(output[key], getattr(output, key))
        np.testing.assert_array_equal(output[i], output[key])
        np.testing.assert_array_equal(output.to_tuple()[i], output[key])
    assert isinstance(output.to_tuple()[-1], tuple)
    assert len(output[:2]) == 2
    as_tuple = model(**inputs, return_dict=False, return_loss=True)
    assert isinstance(as_tuple, tuple)
    assert [x.shape for x in as_tuple[:2]] == [(), (2, 2)]
    np.testing.assert_array_equal(as_tuple[1], output.logits_per_image)
    text = model.text_model(inputs["input_ids"], inputs["attention_mask"])
    np.testing.assert_array_equal(text[1], output.text_model_output["pooler_output"])


def test_outputs_are_pytrees(model, inputs):
    """They leave jit whole, with names that JAX's own tools show."""
    mean = jax.jit(lambda inputs: jax.tree.map(lambda x: x.mean(), model(**inputs)))(inputs)
    assert type(mean) is type(model(**inputs))
    assert mean.loss is None
    assert mean.vision_model_output["last_hidden_state"].shape == ()
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(mean)]
    assert ".vision_model_output.pooler_output" in names


@pytest.mark.parametrize("call", ["__call__", "get_text_features", "text_model"])
def test_a_fourth_argument_by_position_is_refused(model, inputs, call):
    """It is position_ids for some models of transformers and token_type_ids for others."""
    ids, pixels, mask = inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
    positional = (ids, pixels, mask) if call == "__call__" else (ids, mask)
    with pytest.raises(UserError, match=r"token_type_ids=... .*position_ids=..."):
        getattr(model, call)(*positional, np.arange(7)[None])


def test_train_says_whether_there_is_dropout(model, inputs):
    ids, key = inputs["input_ids"], jax.random.key(0, impl="rbg")
    plain, off, on = (
        model.get_text_features(ids, **train)
        for train in ({}, {"train": False, "dropout_rng": key}, {"train": True, "dropout_rng": key})
    )
    np.testing.assert_array_equal(plain, off)
    assert np.abs(plain - on).max() > 1e-4
    with pytest.raises(UserError, match=r"train=True .* dropout_rng="):
        model(**inputs, train=True)


@pytest.fixture
def processor(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return tr.VisionTextDualEncoderProcessor(
        tr.ViTImageProcessorPil(size={"height": 16, "width": 16}),
        tr.BertTokenizer(str(tmp_path / "vocab.txt")),
    )


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


def test_from_pretrained_takes_the_options_of_transformers(model, tmp_path):
    folder = tmp_path / "repository" / "inner"
    model.save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    (folder / "flax_model.msgpack").unlink()
    read = lit_jax.DualEncoder.from_pretrained
    config = tr.VisionTextDualEncoderConfig.from_pretrained(folder)
    config.text_config.hidden_dropout_prob = 0.0
    options = {"revision": "main", "token": None, "subfolder": "inner", "variant": "fp16"}
    again = read(tmp_path / "repository", config=config, **options)
    assert_same_params(again.params, model.params)
    assert again.module.text_model.config.hidden_dropout_prob == 0.0
    changed = read(folder, variant="fp16", text_config={"hidden_dropout_prob": 0.5})
    assert changed.module.text_model.config.hidden_dropout_prob == 0.5
    tower = lit_jax.TextModel.from_pretrained(folder, variant="fp16", hidden_dropout_prob=0.5)
    assert tower.config.hidden_dropout_prob == 0.5
    for options, message in (
        ({}, r"'fp16'; .*variant='fp16'"),
        ({"variant": "fp32"}, r"'fp32'; .*model.fp32.safetensors"),
        ({"subfolder": "outer"}, r"'outer'"),
        ({"revison": "main"}, r"'revision'"),
        (
            {"text_config": {"hiden_size": 3}},
            r"text_config.hiden_size .*'hidden_size'",
        ),
        ({"text_config": {"is_decoder": "no"}}, r"text_config.is_decoder .*'no'; .* bool"),
    ):
        with pytest.raises(UserError, match=message):
            read(folder, **options)


def test_two_towers_are_joined_with_arguments_of_their_own(model, tmp_path):
    model.vision_model.save_pretrained(tmp_path / "vision")
    model.text_model.save_pretrained(tmp_path / "text" / "inner")
    join = lit_jax.DualEncoder.from_vision_text_pretrained
    pair = join(
        str(tmp_path / "vision"),
        str(tmp_path / "text"),
        text_subfolder="inner",
        text_hidden_dropout_prob=0.5,
        vision_config=model.config.vision_config,
        projection_dim=4,
    )
    assert pair.module.text_model.config.hidden_dropout_prob == 0.5
    objects = join(vision_model=model.vision_model, text_model=model.text_model, projection_dim=4)
    assert_same_params(objects.params, pair.params)
    with pytest.raises(UserError, match=r"text_model_name_or_path"):
        join(tmp_path / "vision")
    with pytest.raises(UserError, match=r"text_model .*VisionModel; .*lit_jax\.TextModel"):
        join(tmp_path / "vision", text_model=model.vision_model)
    with pytest.raises(UserError, match=r"image_pooling='pooler' .*vision_pooling='cls'"):
        join(tmp_path / "vision", tmp_path / "text", image_pooling="pooler", vision_pooling="cls")
    # Options that the objects have already change nothing and are no mistake.
    join(
        vision_model=model.vision_model,
        text_model=model.text_model,
        text_pooling="pooler",
        dtype=jnp.float32,
        projection_dim=4,
    )
    with pytest.raises(UserError, match=r"projection_dims .*'projection_dim'"):
        join(tmp_path / "vision", tmp_path / "text", projection_dims=4)


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        ({"text_hidden_dropout_prob": 0.5}, "text_hidden_dropout_prob"),
        ({"vision_model_name_or_path": "somewhere"}, "vision_model_name_or_path"),
        ({"text_pooling": "mean"}, "text_pooling='mean'"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
    ],
)
def test_what_does_not_change_a_tower_that_is_an_object_is_refused(model, given, unused):
    towers = {"vision_model": model.vision_model, "text_model": model.text_model}
    with pytest.raises(UserError, match=rf"_model .*{unused}"):
        lit_jax.DualEncoder.from_vision_text_pretrained(**towers, **given)


def test_its_own_export_is_read_also_where_transformers_has_no_class_for_it(model, tmp_path):
    """Mean pooling is the pooling of most sentence encoders."""
    model.save_pretrained(tmp_path / "whole")
    pair = lit_jax.DualEncoder.from_vision_text_pretrained(
        tmp_path / "whole", tmp_path / "whole", text_pooling="mean", projection_dim=4
    )
    for name in ("once", "twice"):
        pair.save_pretrained(tmp_path / name)
        again = lit_jax.DualEncoder.from_pretrained(tmp_path / name)
        assert again.module.text_model.pooling == "mean"
        assert_same_params(again.params, pair.params)
        pair = again


def test_what_is_no_model_is_refused(model, inputs, tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        lit_jax.DualEncoder.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'no/such'"):
        lit_jax.TextModel.from_pretrained("no/such")
    model.text_model.save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match=r"model_type 'bert'; .*\bvit\b"):
        lit_jax.VisionModel.from_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match=r"model_type 'vit'; .*\bbert\b"):
        lit_jax.TextModel.from_config(model.config.vision_config)
    with pytest.raises(UserError, match=r"\bbert\b.*vision-text-dual-encoder"):
        lit_jax.DualEncoder.from_config(model.config.text_config)
    towers = model.config.vision_config, model.config.text_config
    with pytest.raises(UserError, match=r"projection_dim .*0"):
        lit_jax.DualEncoder.from_vision_text_configs(*towers, projection_dim=0)
    with pytest.raises(UserError, match=r"input_ids .*\[0, 7\]"):
        model.get_text_features(inputs["input_ids"][:0])
    with pytest.raises(UserError, match=r"pixel_values .*\[0, 3, 16, 16\]"):
        model.get_image_features(inputs["pixel_values"][:0])
    assert len(repr(model)) < 10_000
    with pytest.raises(UserError, match=r"1 texts .*2 images"):
        model(inputs["input_ids"][:1], inputs["pixel_values"], return_loss=True)
    with pytest.raises(UserError, match=r"input_ids .*40"):
        model.get_text_features(np.array([[1, 40]]))
    with pytest.raises(UserError, match=r"token_type_ids .*2"):
        model(**inputs, token_type_ids=np.full((2, 7), 2))
    with pytest.raises(UserError, match=r"position_ids .*20"):
        model.text_model(inputs["input_ids"], position_ids=np.full((2, 7), 20))
    with pytest.raises(UserError, match=r"dtype .*'int8'"):
        lit_jax.TextModel.from_pretrained(tmp_path / "text", dtype="int8")
    with pytest.raises(AttributeError, match=r"'Dual'"):
        lit_jax.Dual  # noqa: B018
