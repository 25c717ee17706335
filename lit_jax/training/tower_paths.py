"""The folders, local or from the Hub, that the towers of a run come from, and their configs."""

import dataclasses
from pathlib import Path
from typing import Any

from lit_jax.config import ModelConfig, TowerConfig
from lit_jax.errors import UserError
from lit_jax.models.dual_encoder import SYSTEMS, TOWERS, Side
from lit_jax.training.teacher import TeacherFolder, altclip_config, find_teacher
from lit_jax.weights.hub import local_folder, override, read_config, read_tower_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerPaths:
    """The folders of the two towers, and the config.json of the dual encoder that they form.

    Attributes:
        is_whole: whether both folders are the folder of one dual encoder, which brings its projections.
        teacher: the folder of a text teacher; the image folder is then the folder of the teacher's CLIP.
    """

    image_folder: Path
    text_folder: Path
    hf_config: dict[str, Any]
    is_whole: bool = False
    teacher: TeacherFolder | None = None


def find_towers(config: ModelConfig) -> TowerPaths:
    """Find the folders of both towers, with a download from the Hub if needed, and read their configs.

    Raises UserError if a folder is not available, or if keys of `config` contradict each other.
    """
    # The teacher comes first: `_find_student` rejects a config that also names a dual encoder.
    if config.teacher:
        return _find_student(config)
    if config.dual_encoder:
        return _find_dual_encoder(config)
    image = local_folder(config.image.model, config_key="config.model.image.model")
    text = local_folder(config.text.model, config_key="config.model.text.model")
    # This is the config.json of transformers' VisionTextDualEncoder, so that the export needs no other.
    hf_config = {
        "model_type": "vision-text-dual-encoder",
        "projection_dim": config.projection_dim,
        "logit_scale_init_value": config.logit_scale_init,
        "vision_config": _override(read_tower_config(image, "image"), config.image, "image"),
        "text_config": _override(read_tower_config(text, "text"), config.text, "text"),
    }
    return TowerPaths(image_folder=image, text_folder=text, hf_config=hf_config)


def _find_student(config: ModelConfig) -> TowerPaths:
    """Find the CLIP that has the teacher, and the text tower that replaces the CLIP's own."""
    if config.dual_encoder or config.image != TowerConfig():
        raise UserError(
            "config.model.teacher names the CLIP whose image tower is kept; leave config.model.dual_encoder "
            "and config.model.image at the defaults."
        )
    _check_joint(config, "teacher")
    teacher, clip = find_teacher(config.teacher)
    text = local_folder(config.text.model, config_key="config.model.text.model")
    student = _override(read_tower_config(text, "text"), config.text, "text")
    return TowerPaths(
        image_folder=teacher.folder,
        text_folder=text,
        hf_config=altclip_config(clip, student),
        teacher=teacher,
    )


def _find_dual_encoder(config: ModelConfig) -> TowerPaths:
    """Find the folder that holds both towers and their projections."""
    _check_joint(config, "dual_encoder")
    folder = local_folder(config.dual_encoder, config_key="config.model.dual_encoder")
    hf_config = read_config(folder)
    if hf_config["model_type"] not in SYSTEMS:
        raise UserError(
            f"config.model.dual_encoder is {config.dual_encoder!r}, a model of type "
            f"{hf_config['model_type']}; it must be one of {', '.join(SYSTEMS)}."
        )
    sides: tuple[tuple[Side, TowerConfig], ...] = (("image", config.image), ("text", config.text))
    # Everything but the overrides would be without effect, and would mislead a reader of the config.
    for side, tower in sides:
        if dataclasses.replace(tower, overrides={}) != TowerConfig():
            raise UserError(
                "config.model.dual_encoder names both towers and their projections; leave all keys of "
                f"config.model.{side} but overrides at their defaults."
            )
        part = f"{TOWERS[side]}_config"
        hf_config[part] = _override(hf_config[part], tower, side)
    return TowerPaths(image_folder=folder, text_folder=folder, hf_config=hf_config, is_whole=True)


def _check_joint(config: ModelConfig, key: str) -> None:
    """Raise UserError for keys that have no effect together with `key`, which names a whole dual encoder."""
    names = ("projection_dim", "logit_scale_init", "logit_bias_init")
    # A value equal to the default cannot be told from no value, and does no harm.
    without_effect = [
        f"config.model.{name}"
        for name in names
        if getattr(config, name) != getattr(ModelConfig(), name)
    ]
    if without_effect:
        raise UserError(
            f"config.model.{key} also gives the projections and the scale; leave "
            f"{' and '.join(without_effect)} at the default."
        )


def _override(hf_config: dict[str, Any], tower: TowerConfig, side: Side) -> dict[str, Any]:
    return override(hf_config, tower.overrides, f"config.model.{side}.overrides.")
