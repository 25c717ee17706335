"""AltCLIP: a CLIP gets a multilingual text tower, in two stages (Chen et al., 2211.06679).

    configs/altclip.py                   stage one of the demo, in English and German
    configs/altclip.py:demo_contrastive  stage two of the demo
    configs/altclip.py:teacher           stage one: CLIP's ViT-L/14 and XLM-RoBERTa-large
    configs/altclip.py:contrastive       stage two

Stage one, teacher learning, needs no images: XLM-RoBERTa learns what CLIP's text tower returns for the same
sentence, by mean squared error. data= is a folder with captions.jsonl: parallel text as
{"caption": "ein Hund", "teacher_caption": "a dog"}, and English as {"caption": "a dog"}. Its export is a
whole AltCLIP.
Stage two, contrastive learning, starts from that export, in runs/altclip_stage1 if config.model.dual_encoder
does not say otherwise, and trains the text tower on images with texts in all languages; the image tower stays
locked.

    python -m lit_jax.train --config=configs/altclip.py --workdir=runs/altclip
    python -m lit_jax.export --workdir=runs/altclip --output=runs/altclip_stage1
    python -m lit_jax.train --config=configs/altclip.py:demo_contrastive --workdir=runs/altclip_stage2

Differs from vit_bert.py in all of this. Towers, stages and locks are the paper's; learning rates and numbers
of steps are ours.
"""

from ml_collections import ConfigDict

from lit_jax.config import default
from lit_jax.configs import clip_xlmr, vit_bert


def get_config(arg: str = "") -> ConfigDict:
    return vit_bert.choose(
        arg,
        demo=demo,
        demo_contrastive=demo_contrastive,
        teacher=teacher,
        contrastive=contrastive,
    )


def demo() -> ConfigDict:
    # With its evaluations in both languages.
    config = clip_xlmr.demo()
    config.model = default().model
    config.model.teacher = str(vit_bert.DEMO / "clip")
    config.model.text.model = str(vit_bert.DEMO / "xlm_roberta")
    config.loss = "mse"
    config.duration = "500 steps"
    config.data.train.split = "parallel"
    return config


def demo_contrastive() -> ConfigDict:
    config = clip_xlmr.demo()
    config.model = default().model
    config.model.dual_encoder = "runs/altclip_stage1"
    config.model.logit_scale_max = 100.0
    config.policy.lock = "LU"
    config.duration = "200 steps"
    config.schedule.learning_rate = 2e-4
    return config


def teacher() -> ConfigDict:
    config = _large()
    config.model.teacher = "openai/clip-vit-large-patch14"
    config.model.text.model = "FacebookAI/xlm-roberta-large"
    config.loss = "mse"
    config.duration = "10 epochs"
    config.schedule.learning_rate = 1e-4
    return config


def contrastive() -> ConfigDict:
    config = _large()
    config.model.dual_encoder = "runs/altclip_stage1"
    config.model.logit_scale_max = 100.0
    config.policy.lock = "LU"
    config.duration = "1 epoch"
    config.schedule.learning_rate = 2e-6
    return config


def _large() -> ConfigDict:
    config = default()
    config.batch_size = 1024
    config.model.dtype = "bfloat16"
    config.optimizer.weight_decay = 0.1
    config.schedule.warmup = "500 steps"
    config.data.max_text_length = 77
    config.data.workers = 16
    return config
