"""How many tokens a run makes of a text, and in which letters: by the tower, the lock and the config."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from lit_jax.config import MeshConfig
from lit_jax.distributed.mesh import make_mesh
from lit_jax.embed import embed
from lit_jax.errors import UserError
from lit_jax.training import trainer
from lit_jax.training.loop import Evaluations
from lit_jax.training.model_factory import build_model
from tests.tokenizer_files import write_tokenizer
from tests.training.conftest import WIDTHS


@pytest.fixture
def prepared(tiny, tmp_path):
    """The model of a config with a text tower of a family that has some positions; no weights are read."""

    def make(family, positions=40, **changes):
        folder = tmp_path / family
        _, config = write_tokenizer(family, folder)
        small = {**WIDTHS, "max_position_embeddings": positions}
        (folder / "config.json").write_text(json.dumps(config | small))
        changes = {"data.max_text_length": None, "model.text.model": str(folder), **changes}
        config = tiny(**changes)
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        return build_model(config, mesh).processors

    return make


@pytest.mark.parametrize(
    ("family", "lock", "positions", "asked", "length"),
    [
        ("siglip", "LU", 40, None, 40),
        ("siglip2", "UL", 64, None, 64),
        ("siglip", "UU", 24, 24, 24),
        ("siglip", "Lu", 40, None, 32),
        ("siglip", "Lu", 40, 12, 12),
        ("siglip", "uu", 24, None, 24),
        ("clip", "LU", 40, None, 32),
        ("clip", "LU", 40, 12, 12),
        ("bert", "LU", 24, None, 24),
    ],
)
def test_the_length_of_texts(prepared, family, lock, positions, asked, length):
    changes = {"policy.lock": lock, "data.max_text_length": asked}
    processors = prepared(family, positions, **changes)
    assert processors.tokenizer.model_max_length == length
    batch = processors.of_tower("text", None).collate(["a photo", "number " * 80])
    assert batch["input_ids"].shape == (2, length)


@pytest.mark.parametrize(("family", "asked"), [("siglip", 24), ("siglip2", 39), ("clip", 41)])
def test_a_length_that_the_tower_was_not_trained_with_is_refused(prepared, family, asked):
    with pytest.raises(UserError, match=rf"max_text_length={asked}.*40.*None"):
        prepared(family, **{"data.max_text_length": asked})


@pytest.fixture
def thai(tmp_path):
    """A data set whose captions BERT's tokenizer does not know."""
    rows = [{"image": f"{i}.png", "caption": caption} for i, caption in enumerate(["สุนัข", "แมว"])]
    for row in rows:
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / row["image"])
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_captions_of_unknown_tokens_alone_end_a_run_before_it_starts(tiny, thai, one_device):
    data = {"data.train.path": str(thai), "data.train.split": None, "batch_size": 2}
    with pytest.raises(UserError, match=r"config\.data"):
        trainer.train(tiny(**data), thai / "run")
    assert not (thai / "run").exists()
    with pytest.raises(UserError, match=r"config\.data"):
        embed(tiny(**data, **{"policy.lock": "UL"}), thai / "embedded", "text")
    assert not (thai / "embedded").exists()


def test_evaluations_are_checked_before_the_first_step(tiny, tmp_path, one_device):
    checked = []

    class Refused(Evaluations):
        def check(self, tokenizer):
            checked.append(tokenizer.model_max_length)
            raise UserError("zero_shot/x")

    with pytest.raises(UserError, match="zero_shot/x"):
        trainer.train(tiny(), tmp_path / "run", Refused())
    assert checked == [24]
    assert not (tmp_path / "run").exists()
