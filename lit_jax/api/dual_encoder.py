"""The dual encoder as a Python object: two towers that embed into one space.

Dims: B images, T texts, L tokens, C channels, HxW pixels, E embedding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from transformers import PreTrainedConfig

from lit_jax.api.inputs import as_dtype, image_inputs, text_inputs
from lit_jax.api.model import (
    Call,
    Config,
    Dtype,
    Model,
    Params,
    as_config,
    init_params,
    read_given,
    refuse_unknown,
    split_options,
)
from lit_jax.api.outputs import DualEncoderOutput
from lit_jax.api.towers import TextModel, VisionModel
from lit_jax.config import Pooling
from lit_jax.errors import UserError
from lit_jax.models.dual_encoder import (
    SYSTEMS,
    TOWERS,
    DualEncoderModule,
    build_system,
    normalize,
)
from lit_jax.models.tower import TowerOutput
from lit_jax.training.losses import make_loss, similarity_logits
from lit_jax.weights import hub, load, save


class DualEncoder(Model):
    """Two towers that embed into one space."""

    module: DualEncoderModule

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        config: Config | None = None,
        vision_config: Mapping[str, Any] | None = None,
        text_config: Mapping[str, Any] | None = None,
        dtype: Dtype = "float32",
        **options: Any,
    ) -> "DualEncoder":
        """Load a dual encoder, of a type in `lit_jax.models.dual_encoder.SYSTEMS`, from a folder or Hub id.

        `config` replaces the model's config.json. `vision_config` and `text_config` change fields of the
        towers' configs, as in text_config={"position_ids": "arange"}. `options` choose a copy: revision,
        subfolder, token, variant, cache_dir, force_download, local_files_only.

        Raises UserError if the model is not available, or if its weights do not fit its config.json.
        """
        which, rest = split_options(options)
        refuse_unknown(rest, ("config", "vision_config", "text_config", "dtype"))
        folder = hub.local_folder(str(model), config_key="model", options=which)
        hf = hub.read_config(folder) if config is None else read_given(config)
        for tower, changes in (("vision", vision_config), ("text", text_config)):
            part = f"{tower}_config"
            if changes and part in hf:
                hf[part] = hub.override(hf[part], changes, f"{part}.")
        module, params, hf, _ = load.load_dual_encoder(
            folder, dtype=as_dtype(dtype), hf_config=hf, variant=which.variant
        )
        # Onto the device once: NumPy arrays would be copied there by each call.
        return cls(config=as_config(hf), module=module, params=jax.tree.map(jnp.asarray, params))

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, *, seed: int = 0, dtype: Dtype = "float32"
    ) -> "DualEncoder":
        """Create a model with random weights from a CLIPConfig, SiglipConfig, AlignConfig ..."""
        module = build_system(hub.complete(config.to_dict()), dtype=as_dtype(dtype))
        return cls(
            config=config, module=module, params=init_params(module, module.example_batch, seed)
        )

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
        """Create a VisionTextDualEncoder with random weights from the configs of two towers."""
        hf = _vision_text_config(
            vision_config.to_dict(), text_config.to_dict(), projection_dim, logit_scale_init_value
        )
        return cls.from_config(as_config(hf), seed=seed, dtype=dtype)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str | Path | None = None,
        text_model_name_or_path: str | Path | None = None,
        *,
        vision_model: Any = None,
        text_model: Any = None,
        image_pooling: Pooling | None = None,
        text_pooling: Pooling | None = None,
        projection_dim: int = 512,
        logit_scale_init_value: float = 2.6592,
        seed: int = 0,
        dtype: Dtype | None = None,
        **options: Any,
    ) -> "DualEncoder":
        """Create a VisionTextDualEncoder from two pretrained towers, with random projections to be trained.

        A tower is given by a name that `VisionModel` or `TextModel` reads, or as such an object in
        `vision_model` or `text_model`. `options` that start with `vision_` or `text_` are passed without that
        prefix to the tower's from_pretrained. A pooling of None is "pooler", and a dtype of None "float32".

        Raises UserError for an option that is given twice, or that would not change an object.
        """
        own = {side: _pop_options(options, f"{side}_") for side in TOWERS.values()}
        refuse_unknown(options, ("projection_dim", "logit_scale_init_value", "seed", "dtype"))
        if image_pooling is not None and "pooling" in own["vision"]:
            raise UserError(
                f"image_pooling={image_pooling!r} and vision_pooling={own['vision']['pooling']!r} are two "
                "names of one option; give one of them."
            )
        # An option that is not given leaves the default to the tower's own from_pretrained.
        image_form = _given(pooling=image_pooling, dtype=dtype)
        text_form = _given(pooling=text_pooling, dtype=dtype)
        image = _tower(
            VisionModel, vision_model, vision_model_name_or_path, image_form, own["vision"]
        )
        text = _tower(TextModel, text_model, text_model_name_or_path, text_form, own["text"])
        hf = _vision_text_config(
            image.config.to_dict(), text.config.to_dict(), projection_dim, logit_scale_init_value
        )
        module = DualEncoderModule(
            image.module, text.module, projection_dim, logit_scale_init=logit_scale_init_value
        )
        # Only the projections and the scalars of the logits are drawn at random.
        towers = {"vision_model": image.params, "text_model": text.params}
        params = init_params(module, module.example_batch, seed, given=towers)
        return cls(config=as_config(hf), module=module, params=params)

    def _write(self, folder: str, params: Params, processor: Any) -> None:
        hf = self.config.to_dict()
        save.save_dual_encoder(folder, hf, self.module, dict(params), processor, beside_others=True)

    def __call__(
        self,
        input_ids: Any = None,
        pixel_values: Any = None,
        attention_mask: Any = None,
        *further: Any,
        token_type_ids: Any = None,
        position_ids: Any = None,
        params: Params | None = None,
        dropout_rng: Any = None,
        train: bool | None = None,
        return_loss: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Compare every image BxCxHxW with every text TxL, as their processor makes them.

        `return_loss` needs pairs, B = T, and adds the loss with which this type of model was trained, over
        this batch. With `dropout_rng` both towers compute as in training, unless `train` is False.
        `return_dict` False returns a tuple instead of a `DualEncoderOutput`. Raises UserError, at tracing
        time, for the loss of inputs that are not pairs.
        """
        call = Call(
            params, dropout_rng, train, output_hidden_states, output_attentions, return_dict
        )
        texts = self._text_inputs(
            input_ids, attention_mask, token_type_ids, position_ids, further=further
        )
        images_BxHxWxC = image_inputs(pixel_values)
        # Shapes are known when the call is traced, so this error comes before any computation.
        if return_loss and len(texts[0]) != len(images_BxHxWxC):
            raise UserError(
                f"return_loss=True needs one text for each image, but there are {len(texts[0])} texts and "
                f"{len(images_BxHxWxC)} images; give as many texts as images."
            )
        (image, text, embedded), recorded = self._run(call, _encode, images_BxHxWxC, *texts)
        # One product serves both directions.
        logits_BxT = similarity_logits(*embedded)
        output = DualEncoderOutput(
            loss=self._loss(*embedded) if return_loss else None,
            logits_per_image=logits_BxT,
            logits_per_text=logits_BxT.T,
            text_embeds=embedded[1],
            image_embeds=embedded[0],
            text_model_output=call.model_output(text, recorded.get("text_model", {})),
            vision_model_output=call.model_output(image, recorded.get("vision_model", {})),
        )
        return call.returned(output)

    def _text_inputs(self, *given: Any, further: tuple[Any, ...]) -> tuple[Any, ...]:
        return text_inputs(self.module.text_model.config.embedding.rows, *given, further=further)

    def _loss(self, *embedded: Array | None) -> Array:
        # The table has the loss with which each type of model was trained.
        system = SYSTEMS[self.config.model_type]
        return make_loss(system.loss, label_smoothing=system.label_smoothing)(*embedded)

    def get_image_features(
        self,
        pixel_values: Any = None,
        *,
        params: Params | None = None,
        dropout_rng: Any = None,
        train: bool | None = None,
    ) -> Float[Array, "B E"]:
        """Return the embeddings of images BxCxHxW: projected, but not normalised."""
        call = Call(params, dropout_rng, train)
        return self._run(call, DualEncoderModule.encode_image, image_inputs(pixel_values))[0]

    def get_text_features(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        *further: Any,
        token_type_ids: Any = None,
        position_ids: Any = None,
        params: Params | None = None,
        dropout_rng: Any = None,
        train: bool | None = None,
    ) -> Float[Array, "T E"]:
        """Return the embeddings of texts TxL: projected, but not normalised."""
        call = Call(params, dropout_rng, train)
        texts = self._text_inputs(
            input_ids, attention_mask, token_type_ids, position_ids, further=further
        )
        return self._run(call, DualEncoderModule.encode_text, *texts)[0]

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


def _encode(
    module: DualEncoderModule, images_BxHxWxC: Array, *texts: Array | None, deterministic: bool
) -> tuple[TowerOutput, TowerOutput, tuple[Array | None, ...]]:
    """Return the outputs of both towers, and (image embeddings, text embeddings, scale, bias).

    The embeddings have length 1.
    """
    # The towers are called directly, because `encode_image` would not return their last hidden states.
    image = module.vision_model(images_BxHxWxC, deterministic=deterministic)
    text = module.text_model(*texts, deterministic=deterministic)
    zimg_BxE = normalize(module.project_image(image.pooled))
    ztxt_TxE = normalize(module.project_text(module.text_features_from(text)))
    return image, text, (zimg_BxE, ztxt_TxE, *module.logit_parameters())


def _pop_options(options: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Remove the options with a prefix and return them without it, as transformers does for each tower."""
    names = [name for name in options if name.startswith(prefix)]
    return {name.removeprefix(prefix): options.pop(name) for name in names}


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _tower(
    kind: type[VisionModel] | type[TextModel],
    given: Any,
    name: str | Path | None,
    form: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """Return the tower that is given as an object, or load the tower called `name`.

    `form` holds the pooling and the dtype if they are given, `options` the caller's further options of
    from_pretrained. Raises UserError if there is neither, or if options would not change the given object.
    """
    side = TOWERS[kind.side]
    if isinstance(given, kind):
        unused = [f"{side}_{option}" for option in options]
        unused += [] if name is None else [f"{side}_model_name_or_path"]
        # An option that the object has already is not a mistake.
        if form.get("pooling", given.module.pooling) != given.module.pooling:
            unused.append(f"{kind.side}_pooling={form['pooling']!r}")
        if as_dtype(form.get("dtype", given.module.dtype)) != given.module.dtype:
            unused.append(f"dtype={form['dtype']!r}")
        if unused:
            raise UserError(
                f"{side}_model is an object, so {' and '.join(unused)} would have no effect; leave out one "
                "or the other, or load the tower with these options, by "
                f"lit_jax.{kind.__name__}.from_pretrained."
            )
        return given
    if given is not None:
        raise UserError(
            f"{side}_model is a {type(given).__name__}; give a lit_jax.{kind.__name__}, or the folder of a "
            f"PyTorch model as {side}_model_name_or_path."
        )
    if name is None:
        raise UserError(
            f"There is no {side} tower; give {side}_model_name_or_path, or an object as {side}_model."
        )
    return kind.from_pretrained(name, **(form | options))


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
