"""A run folder: its format, its name, what is stored in it and compared, and whose it is."""

import json
import shutil

import pytest

import lit_jax
from lit_jax.errors import UserError
from lit_jax.training.run import FORMAT, load_run


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
