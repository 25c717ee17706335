import re

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_jax.config import ModelConfig, TowerConfig
from lit_jax.models.dual_encoder import build_dual_encoder
from lit_jax.weights.vision_text_dual_encoder import (
    Settings,
    from_vision_text_dual_encoder,
    to_vision_text_dual_encoder,
    why_not_exportable,
)

WIDTH, DIM = 5, 3  # of a tower, of the embedding
SIDES = ("image", "vision_model", "visual_projection"), ("text", "text_model", "text_projection")

EXPRESSIBLE = [("pooler", "linear"), ("pooler", "none"), ("cls", "linear"), ("cls", "none")]
EXPRESSIBLE += [("cls", "linear_bias")]


def make_params(image, text, projection_dim, rng):
    params = {"logit_scale": np.float32(1)}
    for (pooling, projection), (_, tower, head) in zip((image, text), SIDES, strict=True):
        width = projection_dim if projection == "none" else WIDTH
        params[tower] = {"layernorm": {"scale": rng.normal(size=width).astype(np.float32)}}
        if pooling == "pooler":
            params[tower]["pooler"] = {"dense": dense(width, width, True, rng)}
        if projection != "none":
            params[head] = dense(width, projection_dim, projection == "linear_bias", rng)
    return params


def dense(inputs, outputs, bias, rng):
    kernel = rng.normal(size=(inputs, outputs)).astype(np.float32)
    return {"kernel": kernel} | (
        {"bias": rng.normal(size=outputs).astype(np.float32)} if bias else {}
    )


def settings(image, text):
    return Settings(
        image_pooling=image[0],
        image_projection=image[1],
        text_pooling=text[0],
        text_projection=text[1],
    )


def apply(dense, x):
    return x @ dense["kernel"] + dense.get("bias", np.float32(0))


def embed(params, tower, head, x):
    """The embedding of CLS tokens `x`, with only the parts that there are."""
    if "pooler" in params[tower]:
        x = np.tanh(apply(params[tower]["pooler"]["dense"], x))
    return apply(params[head], x) if head in params else x


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
        jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), a, b)
    )


@given(
    image=st.sampled_from(EXPRESSIBLE),
    text=st.sampled_from(EXPRESSIBLE),
    projection_dim=st.integers(1, WIDTH),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_same_embeddings_in_other_words_and_back(image, text, projection_dim, seed):
    rng = np.random.default_rng(seed)
    params = make_params(image, text, projection_dim, rng)
    expressed = to_vision_text_dual_encoder(params, settings(image, text), projection_dim)
    for _, tower, head in SIDES:
        assert set(expressed[tower]) == {"layernorm", "pooler"}
        assert set(expressed[head]) == {"kernel"}
        width = params[tower]["layernorm"]["scale"].size
        x = rng.normal(size=(4, width)).astype(np.float32)
        np.testing.assert_allclose(
            embed(expressed, tower, head, x), embed(params, tower, head, x), rtol=1e-6, atol=1e-5
        )
    restored = from_vision_text_dual_encoder(expressed, settings(image, text), projection_dim)
    assert restored is not None
    assert same(restored, params)


SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
PLAIN = ("pooler", "linear")


@pytest.mark.parametrize(
    ("vision", "image", "projection_dim", "advice"),
    [
        ("vit", ("mean", "linear"), 6, r"\bmean\b.*config\.model\.image\.pooling='cls'"),
        (
            "vit",
            ("pooler", "linear_bias"),
            6,
            r"config\.model\.image\.projection='linear'",
        ),
        ("vit", ("cls", "linear_bias"), 9, r"projection_dim .*\b8; .*projection='linear'"),
        ("clip_vision_model", ("cls", "linear"), 6, r"\bclip_vision_model; .*='pooler'"),
        ("efficientnet", PLAIN, 6, r"image .*\befficientnet"),
        *[("vit", image, 6, None) for image in EXPRESSIBLE[:1] + EXPRESSIBLE[2:3]],
        ("dinov2", ("cls", "linear"), 6, None),
    ],
)
def test_what_is_in_the_way(vision, image, projection_dim, advice):
    config = ModelConfig(
        image=TowerConfig(pooling=image[0], projection=image[1]), projection_dim=projection_dim
    )
    size = {} if vision == "efficientnet" else SMALL
    found = why_not_exportable(
        build_dual_encoder({"model_type": vision, **size}, {"model_type": "bert", **SMALL}, config)
    )
    if advice is None:
        assert found is None
    else:
        assert re.search(advice, found)


def test_a_pooler_of_another_width_is_in_the_way():
    vision = {"model_type": "vit", **SMALL, "pooler_output_size": 7}
    module = build_dual_encoder(vision, {"model_type": "bert", **SMALL}, ModelConfig())
    assert re.search(r"\b7 .*\b8; .*config\.model\.image\.pooling", why_not_exportable(module))


def test_positions_from_0_are_in_the_way_only_without_a_padding_id():
    """With one, the export has a table of positions that is moved to where PyTorch looks."""
    for padding_id, reason in ((1, None), (None, "pad_token_id")):
        text = {"model_type": "roberta", **SMALL, "pad_token_id": padding_id}
        text["position_ids"] = "arange"
        module = build_dual_encoder({"model_type": "vit", **SMALL}, text, ModelConfig())
        found = why_not_exportable(module)
        assert found is None if reason is None else reason in found


def test_a_first_token_that_is_the_pooler_is_called_so():
    config = ModelConfig(image=TowerConfig(pooling="cls"))
    dinov2 = {"model_type": "dinov2", **SMALL}
    module = build_dual_encoder(dinov2, {"model_type": "bert", **SMALL}, config)
    assert Settings.from_module(module) == Settings()


@pytest.mark.parametrize("image", EXPRESSIBLE[1:])
def test_a_model_that_was_trained_on_is_not_restored(image):
    text = ("pooler", "linear")
    params = make_params(image, text, DIM, np.random.default_rng(0))
    expressed = to_vision_text_dual_encoder(params, settings(image, text), DIM)
    changed = "pooler" if image[0] == "cls" else "visual_projection"
    dense = (
        expressed["vision_model"]["pooler"]["dense"] if changed == "pooler" else expressed[changed]
    )
    dense["kernel"][-1, -1] += np.float32(1e-3)
    assert from_vision_text_dual_encoder(expressed, settings(image, text), DIM) is None
