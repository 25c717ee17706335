"""An image tower or a text tower on its own, as a Python object.

Dims: B images, T texts, L tokens, C channels, HxW pixels.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
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
    split_options,
)
from lit_jax.config import Pooling
from lit_jax.models.dual_encoder import Side, check_side
from lit_jax.models.families import build_tower
from lit_jax.models.tower import Tower
from lit_jax.weights import hub, load, save


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TowerModel(Model):
    """A tower on its own.

    Attributes:
        pooler: the checkpoint's pooler if `module` does not use it, kept so that saving writes it again.
    """

    module: Tower
    pooler: Params = dataclasses.field(default_factory=dict, repr=False)

    side: ClassVar[Side]

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        *,
        pooling: Pooling = "pooler",
        seed: int = 0,
        dtype: Dtype = "float32",
    ):
        """Create a tower with random weights. Raise UserError for a config of the other side."""
        check_side(cls.side, config.to_dict(), "The config")
        module = build_tower(config.to_dict(), pooling=pooling, dtype=as_dtype(dtype))
        return cls(
            config=config, module=module, params=init_params(module, module.example_input, seed)
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        config: Config | None = None,
        pooling: Pooling = "pooler",
        dtype: Dtype = "float32",
        **options: Any,
    ):
        """Load a tower from a local folder or Hub id, which may also hold a head or a whole dual encoder.

        `config` replaces the model's config.json. `options` choose a copy (revision, subfolder, token,
        variant, cache_dir, force_download, local_files_only); all other options change fields of the config,
        such as hidden_dropout_prob=0.0 or position_ids="arange".

        Raises UserError if the tower is not available, or if its weights do not fit its config.json.
        """
        which, changes = split_options(options)
        folder = hub.local_folder(str(model), config_key="model", options=which)
        # The folder of a dual encoder has the tower's config as a part of its own.
        if config is None:
            hf = hub.read_tower_config(folder, cls.side)
        else:
            hf = hub.tower_part(read_given(config), cls.side)
        # Checked before the tower is built, for a clear error about a model of the other side.
        check_side(cls.side, hf, str(folder))
        hf = hub.override(hf, changes, "")
        module = build_tower(hf, pooling=pooling, dtype=as_dtype(dtype))
        # The pooler is read, too, so that a saved tower is complete for transformers.
        params, pooler = load.load_tower_and_pooler(folder, module, variant=which.variant)
        # On the device once, instead of at each call.
        params = jax.tree.map(jnp.asarray, params)
        return cls(config=as_config(hf), module=module, params=params, pooler=pooler)

    def _write(self, folder: str, params: Params, processor: Any) -> None:
        hf, pooler = self.config.to_dict(), dict(self.pooler)
        save.save_tower(
            folder, hf, self.module, dict(params), processor, pooler, beside_others=True
        )

    def _call(self, call: Call, *inputs: Any) -> Any:
        output, recorded = self._run(call, None, *inputs)
        return call.returned(call.model_output(output, recorded))


class VisionModel(_TowerModel):
    """An image tower on its own: AlignVisionModel, AltCLIPVisionModel, CLIPVisionModel, ViTModel ..."""

    side = "image"

    def __call__(
        self,
        pixel_values: Any = None,
        *,
        params: Params | None = None,
        dropout_rng: Any = None,
        train: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Encode images BxCxHxW as their processor makes them.

        With `dropout_rng` the tower computes as in training, unless `train` is False. `return_dict` False
        returns a tuple instead of a `ModelOutput`.
        """
        call = Call(
            params, dropout_rng, train, output_hidden_states, output_attentions, return_dict
        )
        return self._call(call, image_inputs(pixel_values))


class TextModel(_TowerModel):
    """A text tower on its own: AlignTextModel, AltCLIPTextModel, CLIPTextModel, BertModel ..."""

    side = "text"

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        *further: Any,
        token_type_ids: Any = None,
        position_ids: Any = None,
        params: Params | None = None,
        dropout_rng: Any = None,
        train: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Encode texts TxL as their tokenizer makes them.

        With `dropout_rng` the tower computes as in training, unless `train` is False. `return_dict` False
        returns a tuple instead of a `ModelOutput`.
        """
        call = Call(
            params, dropout_rng, train, output_hidden_states, output_attentions, return_dict
        )
        texts = (input_ids, attention_mask, token_type_ids, position_ids)
        return self._call(
            call, *text_inputs(self.module.config.embedding.rows, *texts, further=further)
        )
