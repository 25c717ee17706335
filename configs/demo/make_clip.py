"""Make the weights of clip/, the demo's teacher.

    python -m lit_jax.configs.demo.make_clip (in minutes)

Trains both towers of a tiny CLIP from scratch on the demo's images and their English captions. It has seen no
caption of the sixteen numbers that the demo leaves out, and no scanned digit of its evaluation.
"""

import shutil
import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from lit_jax import export
from lit_jax.config import default, parse
from lit_jax.configs import vit_bert
from lit_jax.data.makers import make_missing, sources_of
from lit_jax.evals import runner
from lit_jax.train import encoder_of
from lit_jax.training.trainer import train

FOLDER = Path(__file__).resolve().parent / "clip"


def config() -> ConfigDict:
    config = default()
    config.batch_size = 128
    config.duration = "1500 steps"
    config.policy.lock = "uu"
    config.model.dual_encoder = str(FOLDER)
    config.model.logit_scale_max = 100.0
    config.optimizer.weight_decay = 0.05
    config.schedule.learning_rate = 1e-3
    config.schedule.warmup = "200 steps"
    config.data.train.path = str(vit_bert.DIGITS)
    config.data.train.split = "train"
    config.data.max_text_length = 24
    for split, classes in (("seen", "all80"), ("unseen", "unseen16"), ("unseen", "all80")):
        config.evals[f"{classes}_on_{split}"] = {
            "kind": "zero_shot",
            "data": {"path": str(vit_bert.DIGITS), "split": split},
            "classes": str(vit_bert.DEMO / f"{classes}.json"),
        }
    return config


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        workdir, exported = Path(folder) / "run", Path(folder) / "clip"
        trained = parse(config())
        make_missing(sources_of(trained))
        run = train(trained, workdir)
        export.main([f"--workdir={workdir}", f"--output={exported}"])
        shutil.copyfile(exported / "model.safetensors", FOLDER / "model.safetensors")
        encoder = encoder_of(run)
        print(runner.table(runner.run(runner.open_evals(trained.evals), encoder, run.params)))


if __name__ == "__main__":
    main()
