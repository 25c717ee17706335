"""LiT: a locked ViT and a BERT text tower (Zhai et al., 2111.07991).

    configs/vit_bert.py          the demo: everything is in this repository, two CPU cores suffice
    configs/vit_bert.py:base     ViT-B/16 and BERT-base from the Hugging Face Hub, the paper's recipe
    configs/vit_bert.py:large    ViT-L/16 and BERT-large

base and large take data=FOLDER (captions.jsonl or prepared TFDS data) and batch=N:
`--config=configs/vit_bert.py:base,data=/data/cc12m,batch=4096`.
"""

from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from lit_jax.config import default
from lit_jax.config_file import parse_arg

DEMO = Path(__file__).resolve().parent / "demo"
# The data of all demos: a script, which makes a folder of digits when they are first needed.
DIGITS = DEMO / "make_digits.py"


def get_config(arg: str = "") -> ConfigDict:
    return choose(arg, demo=demo, base=base, large=large)


def choose(arg: str, **variants: Callable[[], ConfigDict]) -> ConfigDict:
    """Return the variant that `arg` names, by default the first, with the data and batch size of `arg`."""
    variant, options = parse_arg(arg, variants=tuple(variants), options={"data": str, "batch": int})
    config = variants[variant]()
    config.data.train.path = options.get("data", config.data.train.path)
    config.batch_size = options.get("batch", config.batch_size)
    return config


def demo() -> ConfigDict:
    """Return the demo: two-digit numbers of handwritten digits; 16 of the 80 never appear in a caption."""
    config = default()
    config.batch_size = 128
    config.duration = "400 steps"
    config.policy.lock = "Lu"
    config.model.image.model = str(DEMO / "vit")
    config.model.image.pooling = "cls"
    config.model.text.model = str(DEMO / "bert")
    config.model.text.pooling = "cls"
    config.model.projection_dim = 64
    config.optimizer.weight_decay = 0.01
    config.schedule.learning_rate = 2e-3
    config.schedule.warmup = "50 steps"
    config.data.train.path = str(DIGITS)
    config.data.train.split = "train"
    config.data.max_text_length = 24
    config.checkpoint.every = "100 steps"
    config.log.every = "5 steps"
    for name, split, classes in (
        ("unseen16", "unseen", "unseen16"),
        ("all80_on_unseen", "unseen", "all80"),
        ("all80_on_seen", "seen", "all80"),
    ):
        config.evals[name] = {
            "kind": "zero_shot",
            "data": {"path": str(DIGITS), "split": split},
            "classes": str(DEMO / f"{classes}.json"),
        }
    config.report = "html"
    return config


def base() -> ConfigDict:
    """Return the recipe of section 4 and the appendix: no image head, Adafactor, 901M pairs by 16,384."""
    config = default()
    config.batch_size = 16_384
    config.duration = "901e6 examples"
    config.policy.lock = "LU"
    config.model.image.model = "google/vit-base-patch16-224-in21k"
    config.model.image.pooling = "cls"
    config.model.image.projection = "none"
    config.model.text.model = "google-bert/bert-base-uncased"
    config.model.projection_dim = 768
    config.model.dtype = "bfloat16"
    config.remat = "block"
    config.optimizer.name = "adafactor"
    config.optimizer.momentum_dtype = "bfloat16"
    # The paper's 1e-4 is not multiplied by the rate of 1e-3.
    config.optimizer.weight_decay = 0.1
    config.schedule.learning_rate = 1e-3
    config.schedule.warmup = "10000 steps"
    # As in LiT. A pretrained SigLIP text tower needs None, because it takes only texts of one length.
    config.data.max_text_length = 16
    config.data.crop_min_area = 0.5
    config.data.flip = True
    config.data.workers = 16
    return config


def large() -> ConfigDict:
    config = base()
    config.model.image.model = "google/vit-large-patch16-224-in21k"
    config.model.text.model = "google-bert/bert-large-uncased"
    config.model.projection_dim = 1024
    return config
