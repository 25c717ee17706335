from lit_jax.console import BAD_INPUT, PREEMPTED, command
from lit_jax.errors import Preempted, UserError


@command
def main(error):
    if error:
        raise error


def test_exit_codes_and_one_line_messages(capsys, monkeypatch):
    monkeypatch.delenv("LIT_JAX_TRACEBACK", raising=False)
    assert main(None) == 0
    assert main(UserError("Give more.")) == BAD_INPUT
    assert main(Preempted("Saved.")) == PREEMPTED
    assert capsys.readouterr().err == "error: Give more.\nSaved.\n"


def test_the_traceback_is_shown_on_request(capsys, monkeypatch):
    monkeypatch.setenv("LIT_JAX_TRACEBACK", "1")
    assert main(UserError("Give more.")) == BAD_INPUT
    assert "Traceback" in capsys.readouterr().err
