"""Dual encoders and towers as Python objects: read, embed, compare, write.

What the documentation of transformers shows for VisionTextDualEncoderModel, CLIPModel, SiglipModel,
AlignModel and AltCLIPModel, in JAX: `module` is a linen module and `params` a tree that can be given call
by call, so that a call can be differentiated (in reverse), vmapped, compiled and sharded as any function
of JAX.

Dims: B images, T texts, L tokens, C channels, HxW pixels, N heads, D width, P pooled width, E embedding.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import AutoConfig, PreTrainedConfig

from lit_jax.config import Pooling
from lit_jax.errors import UserError
from lit_jax.models.dual_encoder import (
    SYSTEMS,
    DualEncoderModule,
    Side,
    build_system,
    check_side,
    normalize,
)
from lit_jax.models.families import build_tower
from lit_jax.models.inputs import dtype_of, images_of, texts_of
from lit_jax.models.layers import Tower, TowerOutput
from lit_jax.models.outputs import ModelOutput, model_output
from lit_jax.training.losses import make_loss
from lit_jax.training.similarity import similarity_logits
from lit_jax.weights import hub, load, save

Dtype = str | type | np.dtype  # "float32", "bfloat16" or "float16", or jnp.bfloat16 ...
Params = Mapping[str, Any]
Pixels = Float[Array | np.ndarray, "B C H W"]
Ids = Int[Array | np.ndarray, "T L"]


class DualEncoderOutput(NamedTuple):
    """What a dual encoder computes. The embeddings have length 1."""

    loss: Float[Array, ""] | None
    logits_per_image: Float[Array, "B T"]
    logits_per_text: Float[Array, "T B"]
    text_embeds: Float[Array, "T E"]
    image_embeds: Float[Array, "B E"]
    text_model_output: ModelOutput
    vision_model_output: ModelOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Model:
    """`config` is transformers' own, `params` what a call takes if it is given no others."""

    config: PreTrainedConfig
    module: Any
    params: Params

    def _run(
        self, compute: Callable[[Any], Any], params: Params | None, dropout_rng: Any, record: bool
    ) -> tuple[Any, Mapping[str, Any]]:
        """What compute(module) returns, and what the blocks recorded on the way if they are to."""
        output, state = self.module.apply(
            {"params": self.params if params is None else params},
            method=compute,
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
            mutable=["intermediates"] if record else [],
        )
        return output, state.get("intermediates", {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TowerModel(_Model):
    """`pooler` is that of the checkpoint, if `module` has no use for it; it is written again."""

    module: Tower
    pooler: Params = dataclasses.field(default_factory=dict)

    _side: ClassVar[Side]

    @classmethod
    def from_config(cls, config: PreTrainedConfig, *, seed: int = 0, dtype: Dtype = "float32"):
        """A tower of random weights."""
        check_side(cls._side, config.to_dict(), "The config")
        module = build_tower(config.to_dict(), pooling="pooler", dtype=dtype_of(dtype))
        return cls(config=config, module=module, params=_draw(module, module.example_input, seed))

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, pooling: Pooling = "pooler", dtype: Dtype = "float32"
    ):
        """The tower of a local folder or Hub id, which may hold a head or a whole dual encoder, too.

        Raises UserError if it cannot be had or is not what its config.json says.
        """
        folder = hub.local_folder(str(model), config_key="model")
        hf = hub.read_tower_config(folder, cls._side)
        check_side(cls._side, hf, str(folder))
        module = build_tower(hf, pooling=pooling, dtype=dtype_of(dtype))
        params, pooler = load.load_tower_and_pooler(folder, module)
        params = jax.tree.map(jnp.asarray, params)
        return cls(config=_config(hf), module=module, params=params, pooler=pooler)

    def save_pretrained(self, folder: str | Path, processor: save.Saveable | None = None) -> None:
        """Writes a folder that transformers loads, with the files of the tokenizer or image processor."""
        hf, params = self.config.to_dict(), dict(self.params)
        save.save_tower(folder, hf, self.module, params, processor, dict(self.pooler))

    def _call(
        self,
        inputs: tuple[Any, ...],
        params: Params | None,
        dropout_rng: Array | None,
        hidden_states: bool,
        attentions: bool,
    ) -> ModelOutput:
        def compute(tower: Any) -> TowerOutput:
            return tower(*inputs, deterministic=dropout_rng is None)

        output, recorded = self._run(compute, params, dropout_rng, hidden_states or attentions)
        return model_output(output, recorded, hidden_states=hidden_states, attentions=attentions)


class VisionModel(_TowerModel):
    """An image tower alone: AlignVisionModel, AltCLIPVisionModel, CLIPVisionModel, ViTModel ..."""

    _side = "image"

    def __call__(
        self,
        pixel_values: Pixels,
        *,
        params: Params | None = None,
        dropout_rng: Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ModelOutput:
        """Encodes images as their processor makes them; with `dropout_rng` as in training."""
        inputs = (images_of(pixel_values),)
        return self._call(inputs, params, dropout_rng, output_hidden_states, output_attentions)


class TextModel(_TowerModel):
    """A text tower alone: AlignTextModel, AltCLIPTextModel, CLIPTextModel, BertModel ..."""

    _side = "text"

    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        token_type_ids: Ids | None = None,
        position_ids: Ids | None = None,
        *,
        params: Params | None = None,
        dropout_rng: Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ModelOutput:
        """Encodes texts as their tokenizer makes them; with `dropout_rng` as in training."""
        rows = self.module.config.rows
        inputs = texts_of(rows, input_ids, attention_mask, token_type_ids, position_ids)
        return self._call(inputs, params, dropout_rng, output_hidden_states, output_attentions)


class DualEncoder(_Model):
    """Two towers that embed into one space."""

    module: DualEncoderModule

    @classmethod
    def from_pretrained(cls, model: str | Path, *, dtype: Dtype = "float32") -> "DualEncoder":
        """The dual encoder of a local folder or Hub id; lit_jax.models.dual_encoder.SYSTEMS lists the kinds.

        Raises UserError if it cannot be had or is not what its config.json says.
        """
        folder = hub.local_folder(str(model), config_key="model")
        module, params, hf, _ = load.load_dual_encoder(folder, dtype=dtype_of(dtype))
        return cls(config=_config(hf), module=module, params=jax.tree.map(jnp.asarray, params))

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, *, seed: int = 0, dtype: Dtype = "float32"
    ) -> "DualEncoder":
        """Random weights for a CLIPConfig, SiglipConfig, AlignConfig, AltCLIPConfig ..."""
        module = build_system(hub.complete(config.to_dict()), dtype=dtype_of(dtype))
        return cls(config=config, module=module, params=_draw(module, module.example_batch, seed))

    @classmethod
    def from_vision_text_configs(
        cls,
        vision_config: PreTrainedConfig,
        text_config: PreTrainedConfig,
        *,
        projection_dim: int = 512,
        logit_scale_init_value: float = 2.6592,
        seed: int = 0,
        dtype: Dtype = "float32",
    ) -> "DualEncoder":
        """A VisionTextDualEncoder of two towers with random weights."""
        hf = _vision_text_config(
            vision_config.to_dict(), text_config.to_dict(), projection_dim, logit_scale_init_value
        )
        return cls.from_config(_config(hf), seed=seed, dtype=dtype)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | Path,
        text: str | Path,
        *,
        image_pooling: Pooling = "pooler",
        text_pooling: Pooling = "pooler",
        projection_dim: int = 512,
        logit_scale_init_value: float = 2.6592,
        seed: int = 0,
        dtype: Dtype = "float32",
    ) -> "DualEncoder":
        """A VisionTextDualEncoder of two pretrained towers; its projections are random, so train them."""
        image_tower = VisionModel.from_pretrained(vision, pooling=image_pooling, dtype=dtype)
        text_tower = TextModel.from_pretrained(text, pooling=text_pooling, dtype=dtype)
        hf = _vision_text_config(
            image_tower.config.to_dict(),
            text_tower.config.to_dict(),
            projection_dim,
            logit_scale_init_value,
        )
        towers = (image_tower.module, text_tower.module)
        module = DualEncoderModule(*towers, projection_dim, logit_scale_init=logit_scale_init_value)
        params = _draw(module, module.example_batch, seed)
        params |= {"vision_model": image_tower.params, "text_model": text_tower.params}
        return cls(config=_config(hf), module=module, params=params)

    def save_pretrained(self, folder: str | Path, processor: save.Saveable | None = None) -> None:
        """Writes a folder that transformers loads, with the files of the processor if one is given."""
        save.save_dual_encoder(
            folder, self.config.to_dict(), self.module, dict(self.params), processor
        )

    def __call__(
        self,
        input_ids: Ids,
        pixel_values: Pixels,
        attention_mask: Ids | None = None,
        token_type_ids: Ids | None = None,
        position_ids: Ids | None = None,
        *,
        params: Params | None = None,
        dropout_rng: Array | None = None,
        return_loss: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> DualEncoderOutput:
        """Compares every image with every text, as their processor makes them.

        `return_loss` is for pairs, B = T: the loss that the kind of model was trained with, over this
        batch. With `dropout_rng` both towers compute as in training. Raises UserError, when traced, for a
        loss of what are no pairs.
        """
        if return_loss and len(input_ids) != len(pixel_values):
            raise UserError(
                f"return_loss wants a text for each image, not {len(input_ids)} texts for "
                f"{len(pixel_values)} images."
            )
        rows = self.module.text_model.config.rows
        texts = texts_of(rows, input_ids, attention_mask, token_type_ids, position_ids)
        images_BxHxWxC, deterministic = images_of(pixel_values), dropout_rng is None

        def compute(module: DualEncoderModule) -> tuple:
            image = module.vision_model(images_BxHxWxC, deterministic=deterministic)
            text = module.text_model(*texts, deterministic=deterministic)
            zimg_BxE = normalize(module.project_image(image.pooled))
            ztxt_TxE = normalize(module.project_text(module.pooled_text(text)))
            return image, text, (zimg_BxE, ztxt_TxE, *module.logit_parameters())

        (image, text, embedded), recorded = self._run(
            compute, params, dropout_rng, output_hidden_states or output_attentions
        )
        outputs = (
            model_output(
                output,
                recorded.get(part, {}),
                hidden_states=output_hidden_states,
                attentions=output_attentions,
            )
            for output, part in ((text, "text_model"), (image, "vision_model"))
        )
        logits_BxT = similarity_logits(*embedded)
        system = SYSTEMS[self.config.model_type]
        loss = make_loss(system.loss, label_smoothing=system.label_smoothing)
        return DualEncoderOutput(
            loss(*embedded) if return_loss else None,
            logits_BxT,
            logits_BxT.T,
            embedded[1],
            embedded[0],
            *outputs,
        )

    def get_image_features(
        self,
        pixel_values: Pixels,
        *,
        params: Params | None = None,
        dropout_rng: Array | None = None,
    ) -> Float[Array, "B E"]:
        """The embeddings of images: projected, not normalised."""
        images_BxHxWxC = images_of(pixel_values)

        def compute(module: DualEncoderModule) -> Array:
            return module.encode_image(images_BxHxWxC, deterministic=dropout_rng is None)

        return self._run(compute, params, dropout_rng, record=False)[0]

    def get_text_features(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        token_type_ids: Ids | None = None,
        position_ids: Ids | None = None,
        *,
        params: Params | None = None,
        dropout_rng: Array | None = None,
    ) -> Float[Array, "T E"]:
        """The embeddings of texts: projected, not normalised."""
        rows = self.module.text_model.config.rows
        texts = texts_of(rows, input_ids, attention_mask, token_type_ids, position_ids)

        def compute(module: DualEncoderModule) -> Array:
            return module.encode_text(*texts, deterministic=dropout_rng is None)

        return self._run(compute, params, dropout_rng, record=False)[0]

    @property
    def vision_model(self) -> VisionModel:
        """The image tower alone, with its part of the parameters."""
        return VisionModel(
            config=self.config.vision_config,
            module=self.module.vision_model,
            params=self.params["vision_model"],
        )

    @property
    def text_model(self) -> TextModel:
        """The text tower alone, with its part of the parameters."""
        return TextModel(
            config=self.config.text_config,
            module=self.module.text_model,
            params=self.params["text_model"],
        )


def _vision_text_config(
    vision: Mapping[str, Any], text: Mapping[str, Any], projection_dim: int, logit_scale: float
) -> dict[str, Any]:
    return hub.complete(
        {
            "model_type": "vision-text-dual-encoder",
            "vision_config": dict(vision),
            "text_config": dict(text),
            "projection_dim": projection_dim,
            "logit_scale_init_value": logit_scale,
        }
    )


def _config(hf: Mapping[str, Any]) -> PreTrainedConfig:
    content = dict(hf)
    return AutoConfig.for_model(content.pop("model_type"), **content)


def _draw(module: Any, example: Any, seed: int) -> dict[str, Any]:
    load.shapes_of(module, example)  # numbers that describe no model are a sentence there
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)
    return dict(jax.jit(module.init)(jax.random.key(seed), zeros)["params"])
