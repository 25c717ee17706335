"""LiT with a BEiT (2106.08254) and a RoBERTa (1907.11692).

    configs/beit_roberta.py          the demo with a tiny BEiT and a tiny RoBERTa, both from scratch
    configs/beit_roberta.py:base     BEiT-B/16 and RoBERTa-base from the Hugging Face Hub

Differs from vit_bert.py in the towers alone: an image is what BEiT pools, the mean of its patches, and a text
its first token, as RoBERTa was not trained to pool. The demo has no pretrained BEiT, so nothing is locked
there, and it takes many more steps to learn less: it shows that the recipe runs, more than what it can do.
"""

from ml_collections import ConfigDict

from lit_jax.configs import vit_bert


def get_config(arg: str = "") -> ConfigDict:
    return vit_bert.choose(arg, demo=demo, base=base)


def demo() -> ConfigDict:
    config = _poolings(vit_bert.demo())
    config.duration = "1500 steps"
    config.policy.lock = "uu"
    config.model.image.model = str(vit_bert.DEMO / "beit")
    config.model.text.model = str(vit_bert.DEMO / "roberta")
    config.schedule.learning_rate = 1e-3
    config.schedule.warmup = "200 steps"
    return config


def base() -> ConfigDict:
    config = _poolings(vit_bert.base())
    config.model.image.model = "microsoft/beit-base-patch16-224-pt22k-ft22k"
    config.model.text.model = "FacebookAI/roberta-base"
    return config


def _poolings(config: ConfigDict) -> ConfigDict:
    config.model.image.pooling = "pooler"
    config.model.text.pooling = "cls"
    return config
