"""A locked CLIP image tower and a multilingual text tower, XLM-RoBERTa (1911.02116).

    configs/clip_xlmr.py          the demo with captions in English and German and a tiny, trained CLIP
    configs/clip_xlmr.py:base     CLIP's ViT-B/32 and XLM-RoBERTa-base from the Hugging Face Hub

Differs from vit_bert.py in this: the image tower was trained with texts, so its pooled output (not projected)
already says what texts say; texts may be in a hundred languages; 32 tokens instead of 16, as other scripts
take more. Its temperature starts where CLIP's did, and the
logits' scale is at most 100, as CLIP's. Compare altclip.py, which needs no images at first.
"""

from ml_collections import ConfigDict

from lit_jax.configs import vit_bert


def get_config(arg: str = "") -> ConfigDict:
    return vit_bert.choose(arg, demo=demo, base=base)


def demo() -> ConfigDict:
    config = vit_bert.demo()
    config.data.train.split = "bilingual"
    config.model.image.model = str(vit_bert.DEMO / "clip")
    config.model.image.pooling = "pooler"
    config.model.text.model = str(vit_bert.DEMO / "xlm_roberta")
    config.model.text.pooling = "cls"
    config.model.logit_scale_max = 100.0
    for name in ("unseen16", "all80_on_unseen"):
        german = config.evals[name].to_dict()
        german["classes"] = german["classes"].replace(".json", ".de.json")
        config.evals[f"{name}_de"] = german
    return config


def base() -> ConfigDict:
    config = vit_bert.base()
    config.model.image.model = "openai/clip-vit-base-patch32"
    config.model.image.pooling = "pooler"
    config.model.text.model = "FacebookAI/xlm-roberta-base"
    config.model.text.pooling = "cls"
    config.model.logit_scale_max = 100.0
    return config
