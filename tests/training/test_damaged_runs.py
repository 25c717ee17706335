"""Run folders that are damaged, cannot be written, or hold something else."""

import re
import shutil
import subprocess
import sys

import pytest

from lit_jax.errors import UserError
from lit_jax.training.workdir import load_run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, r"config.batch_size .*0; .*1"),
        ({"batch_size": 12}, r"config.batch_size=12 .*8 .*16"),
        ({"mesh.data": 3}, "config.mesh.data=-1"),
        ({"duration": "6 stops"}, "config.duration='6 stops'"),
        ({"duration": "8 examples"}, r"config.duration='8 examples'"),
        ({"duration": "1e99 steps"}, r"config.duration='1e99 steps'"),
        ({"checkpoint.every": "0 steps"}, r"config.checkpoint.every='0 steps'"),
        ({"checkpoint.every": "6 hours"}, "config.checkpoint.every='6 hours'.*'10 minutes'"),
        ({"checkpoint.every": "0.5 seconds"}, "config.checkpoint.every='0.5 seconds'"),
        ({"log.every": "6 seconds"}, "config.log.every='6 seconds'"),
        ({"log.profile": "3-4"}, "config.log.profile='3-4'.*'100:110'"),
        ({"log.profile": "4:3"}, "config.log.profile='4:3' .* 1 to 6 "),
        ({"log.profile": "0:3"}, "config.log.profile='0:3' .* 1 to 6 "),
        ({"log.profile": "3:7"}, "config.log.profile='3:7' .* 1 to 6 "),
        ({"checkpoint.keep_every": "8 examples"}, "config.checkpoint.keep_every='8 examples'"),
        ({"log.every": "6 stops"}, "config.log.every='6 stops'"),
        ({"data.train.path": "/no/such"}, "/no/such"),
        (
            {"model.image.model": "an/id", "data.train.path": ""},
            r"config.model.image.model .*'an/id'.*config.model.image.model",
        ),
        ({"data.max_text_length": 33}, "max_text_length"),
        ({"optimizer.clip_norm": 0.0}, "config.optimizer.clip_norm"),
        ({"model.logit_scale_max": 0.0}, r"config.model.logit_scale_max .*0"),
        (
            {"model.logit_scale_max": 100.0, "policy.trainable": (("logit_scale", False),)},
            r"config.model.logit_scale_max=100",
        ),
        ({"data.train.max_examples": 1}, r"config.data.train"),
    ],
)
@pytest.mark.usefixtures("no_cache_of_the_suite")
def test_bad_input_leaves_no_run_folder(train, tiny, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(tiny(**changes), tmp_path / "run", devices=8)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workdir", ["file/run", "/proc/run"])
def test_a_run_folder_that_cannot_be_written(train, tiny, tmp_path, workdir):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run .*\(.*--workdir\.$"):
        train(tiny(), tmp_path / workdir)


def damage_frozen(workdir):
    shutil.rmtree(workdir / "frozen")


def damage_checkpoint(workdir):
    shutil.rmtree(workdir / "checkpoints" / "6" / "state")


def change_model(workdir):
    file = workdir / "model" / "config.json"
    file.write_text(file.read_text().replace('"gelu"', '"relu"'))


def remove_tokenizer(workdir):
    (workdir / "model" / "tokenizer_config.json").unlink()


def damage_model(workdir):
    (workdir / "model" / "config.json").write_text('{"vision_config": ')
    (workdir / "model" / "sums.json").unlink()


def empty_model(workdir):
    (workdir / "model" / "config.json").write_text("{}")
    (workdir / "model" / "sums.json").unlink()


def damage_sums(workdir):
    (workdir / "model" / "sums.json").write_text("[1")


def damage_config(workdir):
    (workdir / "config.json").write_bytes(b"\xff")


def nest_config(workdir):
    (workdir / "config.json").write_text("[" * 100_000)


def put_another_config(workdir):
    (workdir / "config.json").write_text('{"model_type": "vit"}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            damage_frozen,
            r"/frozen .*; .*--workdir\.$",
        ),
        (damage_checkpoint, r"/checkpoints/6 .*, .*4\.$"),
        (change_model, r"model/config\.json .*; .*sums\.json"),
        (remove_tokenizer, r"model/tokenizer_config\.json "),
        (damage_sums, r"model/sums\.json "),
        (damage_model, r"model/config\.json .*config.json"),
        (empty_model, r"model/config\.json .*model_type"),
        (damage_config, r"run/config\.json .*\(.*"),
        (nest_config, r"run/config\.json .*\(.*"),
        (
            put_another_config,
            r"/run .*--model .*--workdir",
        ),
    ],
)
def test_a_damaged_run_folder_is_named(finished, tiny, train, tmp_path, damage, message):
    workdir = shutil.copytree(finished, tmp_path / "run")
    damage(workdir)
    longer = tiny(duration="7 steps")
    for read in (load_run, lambda folder: train(longer, folder, allowed_changes=["duration"])):
        with pytest.raises(UserError, match=message):
            read(workdir)


def test_where_no_checkpoint_folder_can_be_made_the_process_says_so_and_ends(tmp_path):
    """In a process of its own: a thread that waits for the folder would hold its end up for 20 minutes."""
    program = """if True:
        import sys
        from pathlib import Path
        import jax.numpy as jnp
        import optax
        from lit_jax.errors import UserError
        from lit_jax.training.checkpoints import Checkpoints
        from lit_jax.training.train_step import State
        workdir = Path(sys.argv[1])
        state = State(jnp.zeros((), jnp.int32), {"a": jnp.ones(3)}, optax.EmptyState())
        with Checkpoints(workdir, keep_last=1) as checkpoints:
            (workdir / "checkpoints").rmdir()
            (workdir / "checkpoints").write_text("")
            try:
                checkpoints.save(1, state, {}, {})
            except UserError as error:
                print(error)
    """
    process = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    sentence = process.stdout.splitlines()[-1]
    assert re.search(r"cannot be written \(.*choose another --workdir\.$", sentence)


def test_a_file_among_the_checkpoints_is_none(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "checkpoints" / "9").write_text("")
    assert load_run(workdir).step == 6
