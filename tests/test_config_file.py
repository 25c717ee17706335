import os
import sys

import pytest

from lit_jax.cli import CONFIG, Parser
from lit_jax.config_file import load_config
from lit_jax.errors import UserError

FILE = "configs/vit_bert.py"


@pytest.mark.parametrize(
    ("text", "value"),
    [("((r'.*/bias', False),)", ((".*/bias", False),)), ("()", ())],
)
def test_a_value_on_the_command_line_is_a_python_literal(text, value):
    config = load_config(FILE, CONFIG.split([f"--config.policy.trainable={text}"])[0])
    assert config.policy.trainable == value


def test_a_file_without_get_config_is_named(tmp_path):
    (tmp_path / "config.py").write_text("x = 1")
    with pytest.raises(UserError, match=r"config.py .*get_config"):
        load_config(str(tmp_path / "config.py"), [])


@pytest.mark.parametrize("text", ["{[]: 1}", "((", "a b", "-" * 100_000 + "1"])
def test_what_is_no_literal_is_a_text_of_the_wrong_type(text):
    with pytest.raises(UserError, match=r"tuple"):
        load_config(FILE, [("policy.trainable", text)])


@pytest.mark.parametrize(
    ("text", "values"),
    [("en,de", ("en", "de")), ("en", ("en",)), ("('en', 'de')", ("en", "de")), ("()", ())],
)
def test_a_list_may_be_joined_by_commas(text, values):
    pairs = [("evals.a.languages", text), ("evals.a.shots", "4"), ("evals.b.shots", "1,4")]
    evals = load_config(FILE, pairs).evals
    assert (evals["a"].languages, evals["a"].shots, evals["b"].shots) == (values, (4,), (1, 4))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.optimizer.learning_rate=1"], "'config.schedule.learning_rate'"),
        (["--config.rand_augment.magnitude=3"], "'config.data.rand_augment.magnitude'"),
        (["--config.data.rand_augmnt.magnitude=3"], "'rand_augment'"),
        (["--config.evals.a.data.pth=x"], "'path'"),
        (["--learning-rate=3"], "'--config.schedule.learning_rate'"),
        (["--work_dir=x"], "'--workdir'"),
        (["--config.batch_size", "64"], "--config.batch_size=VALUE"),
        (["64"], "--FLAG=VALUE"),
        (["--config.batch_size=1e20"], r"config.batch_size .*1e"),
        ([f"--config.batch_size={10**20}"], r"config.batch_size .*1000.*2147483647"),
        (["--config.schedule.learning_rate=1e999"], r"config.schedule.learning_rate .*inf"),
        (["--config.schedule.learning_rate=nan"], r"config.schedule.learning_rate .*'nan'"),
    ],
)
def test_a_mistyped_flag_or_key_is_answered_by_the_right_one(words, message):
    parser = Parser("lit_jax.train", "")
    parser.add_argument("--workdir")
    parser.add_argument("--config")
    with pytest.raises(UserError, match=message):
        load_config(FILE, parser.parse_with_keys(words)[1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "get.py",
            "def get_config(a):\n c = default()\n c.optimizer.learning_rate *= 2",
            "'config.schedule",
        ),
        ("lock.py", "def get_config(a):\n c = default().lock()\n c.data.seed = 2", "'config.seed'"),
        ("exits.py", "import sys; sys.exit(3)", "exits.py .*3"),
        ("latin.py", "x = '\udce9'", r"latin.py .*utf-8"),
        ("folder.py", None, r"folder.py"),
        ("none.py:base", "", r"none.py .*get_config"),
        ("x" * 256, "", "x{256} .*--config=FILE"),
    ],
)
def test_whatever_a_config_file_is_or_does_is_one_sentence(tmp_path, name, content, message):
    path = list(sys.path)
    file = tmp_path / name.partition(":")[0]
    if content is None:
        file.mkdir()
    elif len(name) < 256:
        file.write_bytes(os.fsencode(f"from lit_jax.config import default\n{content}\n"))
    with pytest.raises(UserError, match=message) as error:
        load_config(f"{tmp_path}/{name}", [])
    assert "\n" not in str(error.value)
    assert sys.path == path


def test_a_folder_with_a_colon_is_no_argument(tmp_path):
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "c.py").write_text(
        "from lit_jax.config import default\n"
        "def get_config(arg):\n    return default() if arg == 'd:e' else None\n"
    )
    load_config(f"{folder}/c.py:d:e", [])
