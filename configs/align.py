"""ALIGN: an EfficientNet and a BERT, both from scratch (Jia et al., 2102.05918).

    configs/align.py          the demo with a tiny EfficientNet and a tiny BERT
    configs/align.py:base     EfficientNet-B7 and BERT-base, as in kakaobrain/align-base

Differs from vit_bert.py in this: nothing is pretrained or locked; the softmax loss has label smoothing 0.1
and a temperature that starts at 1 (section 4.1); BatchNorm takes its statistics over the global batch; images
are resized to 346 pixels, and 289 of them cropped at a random place for training, in the middle for
evaluation; texts have up to 64 tokens. base is section 5.1's: LAMB with learning rate 1e-3, 10,000 steps of
warm-up, linear decay over 1.2M steps of 16,384 pairs. The paper's largest towers are EfficientNet-L2 and
BERT-large.
"""

from ml_collections import ConfigDict

from lit_jax.config import default
from lit_jax.configs import vit_bert


def get_config(arg: str = "") -> ConfigDict:
    return vit_bert.choose(arg, demo=demo, base=base)


def demo() -> ConfigDict:
    config = vit_bert.demo()
    config.model = default().model
    config.model.dual_encoder = str(vit_bert.DEMO / "align")
    config.duration = "600 steps"
    _from_scratch(config)
    return config


def base() -> ConfigDict:
    config = default()
    config.batch_size = 16_384
    config.duration = "1200000 steps"
    config.model.dual_encoder = "kakaobrain/align-base"
    # Hugging Face's 0.99 is the share of the old statistics, as in TensorFlow; torch and we take the new.
    config.model.image.overrides = {"batch_norm_momentum": 0.01}
    config.model.dtype = "bfloat16"
    config.optimizer.name = "lamb"
    config.optimizer.weight_decay = 1e-5
    config.schedule.name = "linear"
    config.schedule.learning_rate = 1e-3
    config.schedule.warmup = "10000 steps"
    config.data.max_text_length = 64
    config.data.flip = True
    config.data.workers = 16
    _from_scratch(config)
    return config


def _from_scratch(config: ConfigDict) -> None:
    config.policy.lock = "uu"
    config.label_smoothing = 0.1
    config.data.random_crop = True
