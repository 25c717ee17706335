"""Stage one of AltCLIP (2211.06679, section 3.2): a new text tower replaces the text tower of a CLIP.

The student, an XLM-RoBERTa with a linear map on top, learns the output of the CLIP's text tower, the teacher,
for the same sentence, before the projection. Training needs no images. The CLIP's image tower, projections
and logit scale fit the student afterwards, and all parts together are an AltCLIP.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lit_jax.config import TEACHER
from lit_jax.data.text import check_vocabulary, load_tokenizer
from lit_jax.errors import UserError
from lit_jax.models.families import build_tower
from lit_jax.models.tower import Tower
from lit_jax.weights.hub import local_folder, read_config, read_tower_config
from lit_jax.weights.load import load_dual_encoder, load_tower

log = logging.getLogger(__name__)

STUDENTS = ("xlm-roberta", "roberta", "altclip_text_model")
CONFIG_KEY = "config.model.teacher"

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherFolder:
    """The folder of the teacher's tokenizer and weights, and the teacher's config.

    A run folder's copy has no weights, because frozen/ has them.
    """

    folder: Path
    hf_config: dict[str, Any]


def find_teacher(model: str) -> tuple[TeacherFolder, dict[str, Any]]:
    """Return the teacher that config.model.teacher names, and the config.json of the whole CLIP.

    Raises UserError if the model is not a CLIP.
    """
    folder = local_folder(model, config_key=CONFIG_KEY)
    hf_config = read_config(folder)
    if hf_config["model_type"] != "clip":
        raise UserError(
            f"{CONFIG_KEY} is {model!r}, a model of type {hf_config['model_type']}; it must be a CLIP."
        )
    return TeacherFolder(folder=folder, hf_config=read_tower_config(folder, "text")), hf_config


def altclip_config(clip: dict[str, Any], student: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of the AltCLIP that a CLIP and a student form.

    Raises UserError if the student's family has no place in an AltCLIP.
    """
    if student["model_type"] not in STUDENTS:
        raise UserError(
            f"config.model.text.model is of model_type {student['model_type']}; with a teacher it must be "
            f"one of {', '.join(STUDENTS)}."
        )
    # The student's linear map must reach the width of the teacher, so that the CLIP's projection fits.
    width = clip["text_config"]["hidden_size"]
    altclip = {"model_type": "altclip_text_model", "project_dim": width, "pooler_fn": "cls"}
    return {
        "model_type": "altclip",
        "projection_dim": clip["projection_dim"],
        "logit_scale_init_value": clip["logit_scale_init_value"],
        # The same tower: AltCLIP has only another name for CLIP's.
        "vision_config": {**clip["vision_config"], "model_type": "altclip_vision_model"},
        "text_config": {**student, **altclip},
    }


def load_teacher(
    teacher: TeacherFolder, dtype: Dtype, text_length: int
) -> tuple[Tower, PreTrainedTokenizerBase]:
    """Build the teacher's module and load its tokenizer, without reading weights.

    Args:
        text_length: the student's number of tokens. The teacher uses the same number, up to the number of its
            positions.
    """
    module = build_tower(teacher.hf_config, pooling="pooler", dtype=dtype)
    # Only the pooled output of the teacher is a target.
    module = module.clone(all_tokens=False)
    length = min(text_length, module.config.embedding.max_length)
    tokenizer = load_tokenizer(teacher.folder, max_length=length)
    check_vocabulary(tokenizer, teacher.hf_config["vocab_size"], CONFIG_KEY)
    return module, tokenizer


def pretrained_parameters(
    clip: Path,
    student: Path | None,
    text_config: dict[str, Any],
    dtype: Dtype,
) -> dict[str, Any]:
    """Read the CLIP, whose text tower is the teacher, and the student if it has a folder.

    Returns a partial tree of parameters, float32: a student without a folder starts random.
    """
    _, params, _, report = load_dual_encoder(clip, dtype=dtype)
    # The key of the text tower is now free for the student.
    params[TEACHER] = params.pop("text_model")
    log.info("%s", report)
    if student is not None:
        # The folder may be a plain XLM-RoBERTa, whose files lack the linear map of an AltCLIP.
        model_type = read_tower_config(student, "text")["model_type"]
        # The linear map of an AltCLIP is its pooler.
        pooling = "pooler" if model_type == "altclip_text_model" else "cls"
        module = build_tower(
            {**text_config, "model_type": model_type}, pooling=pooling, dtype=dtype
        )
        params["text_model"], report = load_tower(student, module)
        log.info("%s", report)
    return params
