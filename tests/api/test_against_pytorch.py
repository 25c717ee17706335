"""Models and towers compute what PyTorch's compute, and go back to PyTorch."""

import functools

import jax
import numpy as np
import pytest
import safetensors.numpy
import transformers as tr

import lit_jax
from tests.api.tiny_models import (
    CONFIGS,
    EFFICIENTNET,
    IMAGE,
    TEXT,
    assert_same_params,
    inputs_for,
    vision_text,
)


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
