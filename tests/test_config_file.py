import pytest

from lit_jax.config_file import load_config, split_overrides
from lit_jax.errors import UserError

FILE = "configs/vit_bert.py"


@pytest.mark.parametrize(
    ("text", "value"),
    [("((r'.*/bias', False),)", ((".*/bias", False),)), ("()", ())],
)
def test_a_value_on_the_command_line_is_a_python_literal(text, value):
    config = load_config(FILE, split_overrides([f"--config.policy.trainable={text}"]))
    assert config.policy.trainable == value


def test_a_file_without_get_config_is_named(tmp_path):
    (tmp_path / "config.py").write_text("x = 1")
    with pytest.raises(UserError, match=r"config.py has no function get_config"):
        load_config(str(tmp_path / "config.py"), [])


@pytest.mark.parametrize("text", ["{[]: 1}", "((", "a b", "-" * 100_000 + "1"])
def test_what_is_no_literal_is_a_text_of_the_wrong_type(text):
    with pytest.raises(UserError, match="must be of type tuple"):
        load_config(FILE, [("policy.trainable", text)])
