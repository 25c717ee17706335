import logging
import os
import subprocess
import sys
from pathlib import Path

from lit_jax.console import command
from lit_jax.errors import BAD_INPUT, INTERRUPTED, PREEMPTED, Preempted, UserError


@command
def main(error):
    if error:
        raise error


def test_exit_codes_and_one_line_messages(capsys, monkeypatch):
    monkeypatch.delenv("LIT_JAX_TRACEBACK", raising=False)
    assert main(None) == 0
    assert main(UserError("Give more.")) == BAD_INPUT
    assert main(Preempted("Saved.")) == PREEMPTED
    assert main(KeyboardInterrupt()) == INTERRUPTED
    assert capsys.readouterr().err == "error: Give more.\nSaved.\nInterrupted.\n"
    assert main(PermissionError(13, "Permission denied", "/a/b")) == BAD_INPUT
    assert capsys.readouterr().err == (
        "error: There is no permission for /a/b; get it, or give another path.\n"
    )
    assert main(PermissionError(1, "Operation not permitted")) == BAD_INPUT
    assert "permission for something that this command needs;" in capsys.readouterr().err


def test_the_traceback_is_shown_on_request(capsys, monkeypatch):
    monkeypatch.setenv("LIT_JAX_TRACEBACK", "1")
    assert main(UserError("Give more.")) == BAD_INPUT
    assert "Traceback" in capsys.readouterr().err


def test_no_control_character_of_a_text_reaches_the_terminal(capsys):
    assert main(UserError("The caption 'a\x1b[2J\nb' is bad.")) == BAD_INPUT
    assert capsys.readouterr().err == "error: The caption 'a\ufffd[2J b' is bad.\n"
    logging.getLogger("lit_jax").warning("Bad sample %s.\nIt has %s.", "\x9b1m", "\udc80")
    assert capsys.readouterr().err == "Bad sample \ufffd1m.\nIt has \ufffd.\n"


def test_a_terminal_of_ascii_shows_what_it_lacks_by_its_number():
    code = "from lit_jax.console import command; command(lambda: print('pétales 猫'))()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        cwd=Path(__file__).parents[1],
    )
    assert (done.returncode, done.stdout) == (0, rb"p\xe9tales \u732b" + b"\n"), done.stderr
