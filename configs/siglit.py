"""SigLiT: LiT with the sigmoid loss (Zhai et al., 2303.15343, section 4.1).

    configs/siglit.py          the demo of vit_bert.py with this loss
    configs/siglit.py:base     ViT-B/16 and BERT-base from the Hugging Face Hub
    configs/siglit.py:large    ViT-L/16 and BERT-large

Differs from vit_bert.py in this: every pair of image and text is a binary decision; the logits get a
trainable bias that starts at -10 (section 4.8), and their scale starts at 10; the optimizer is Lion, in base
and large with learning rate 1e-4, weight decay 1e-7 and b2 0.95 for 65,000 steps of 32,768 pairs. The paper
locks public ViT-B/8 and g/14 towers in another format; here they are those of vit_bert.py.
"""

import math

from ml_collections import ConfigDict

from lit_jax.configs import vit_bert


def get_config(arg: str = "") -> ConfigDict:
    return vit_bert.choose(arg, demo=demo, base=base, large=large)


def demo() -> ConfigDict:
    config = _sigmoid(vit_bert.demo())
    config.schedule.learning_rate = 2e-4
    return config


def base() -> ConfigDict:
    return _of_the_paper(vit_bert.base())


def large() -> ConfigDict:
    return _of_the_paper(vit_bert.large())


def _of_the_paper(config: ConfigDict) -> ConfigDict:
    config = _sigmoid(config)
    config.batch_size = 32_768
    config.duration = "65000 steps"
    # The paper's 1e-7 has the rate of 1e-4 in it.
    config.optimizer.weight_decay = 1e-3
    config.schedule.learning_rate = 1e-4
    config.schedule.warmup = "6500 steps"
    return config


def _sigmoid(config: ConfigDict) -> ConfigDict:
    config.loss = "sigmoid"
    config.model.logit_scale_init = math.log(10)
    config.model.logit_bias_init = -10.0
    config.optimizer.name = "lion"
    config.optimizer.b2 = 0.95
    return config
