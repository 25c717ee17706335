"""A run folder: its format, its name, what is stored in it and compared, and whose it is."""

import json
import shutil

import jax
import numpy as np
import pytest

import lit_jax
from lit_jax.config import MeshConfig
from lit_jax.distributed.mesh import make_mesh, replicated
from lit_jax.errors import UserError
from lit_jax.training import loop
from lit_jax.training.checkpoints import Checkpoints
from lit_jax.training.disk import complete_steps
from lit_jax.training.run import FORMAT, load_run
from lit_jax.training.step import State


@pytest.mark.parametrize(
    ("header", "named"),
    [({}, r"lit_jax 0\.1\.0"), ({"format": 9, "version": "7.8.9"}, r"lit_jax 7\.8\.9")],
)
def test_a_run_of_another_format_is_read_but_not_continued(
    finished, train, tiny, tmp_path, header, named
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    file = workdir / "config.json"
    content = json.loads(file.read_text())
    assert content.pop("format") == FORMAT
    assert content.pop("version") == lit_jax.__version__
    file.write_text(json.dumps(header | content))
    with pytest.raises(UserError, match=rf"Finish the run with {named}"):
        train(tiny(duration="7 steps"), workdir, allowed_changes=["duration"])
    assert load_run(workdir).step == 6
    assert json.loads(file.read_text()) == header | content


def save_once(workdir, state):
    with Checkpoints(workdir, keep_last=1) as checkpoints:
        checkpoints.save(1, state, {"next_batch": 1}, {})


def test_a_folder_that_orbax_takes_for_a_pattern_gets_no_checkpoint(tiny, tmp_path):
    """Its name is refused where it is given; here it is not, and the save itself finds out."""
    workdir = tmp_path / "run[1]"
    workdir.mkdir()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    leaf = jax.device_put(np.arange(4, dtype=np.int32), replicated(mesh))
    with pytest.raises(UserError, match=r"of 2 arrays 0 can be read back"):
        save_once(workdir, State(leaf, {"kernel": leaf}, ()))
    assert complete_steps(workdir) == []
    with pytest.raises(UserError, match=r"has the character \["):
        loop.train(tiny(), workdir)
