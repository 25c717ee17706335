import errno
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lit_jax.cli import command
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
        "error: There is no permission for /a/b; change its permissions, or give another path.\n"
    )
    assert main(PermissionError(1, "Operation not permitted")) == BAD_INPUT
    assert "permission" in capsys.readouterr().err


def test_the_traceback_is_shown_on_request(capsys, monkeypatch):
    monkeypatch.setenv("LIT_JAX_TRACEBACK", "1")
    assert main(UserError("Give more.")) == BAD_INPUT
    assert "Traceback" in capsys.readouterr().err


def test_no_control_character_of_a_text_reaches_the_terminal(capsys):
    assert main(UserError("The caption 'a\x1b[2J\nb' is bad.")) == BAD_INPUT
    assert capsys.readouterr().err == "error: The caption 'a\ufffd[2J b' is bad.\n"
    log = logging.getLogger("lit_jax")
    command(lambda: log.warning("Bad sample %s.\nIt has %s.", "\x9b1m", "\udc80"))()
    assert capsys.readouterr().err == "Bad sample \ufffd1m.\nIt has \ufffd.\n"


def test_a_terminal_of_ascii_shows_what_it_lacks_by_its_number():
    code = "from lit_jax.cli import command; command(lambda: print('pétales 猫'))()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        cwd=Path(__file__).parents[1],
    )
    assert (done.returncode, done.stdout) == (0, rb"p\xe9tales \u732b" + b"\n"), done.stderr


# A command that speaks in every way there is, and leaves a file as its result.
SPEAKING = """
import logging, pathlib, sys, time
from tqdm import tqdm
from lit_jax.cli import command

@command
def main():
    bar = tqdm(total=9, mininterval=0)
    for step in range(9):
        bar.update()
        print('step é', step, flush=True)
        logging.getLogger('lit_jax').info('step \\udce9 %d', step)
        time.sleep(0.01)
    pathlib.Path(sys.argv[1]).write_text('done')

sys.exit(main())
"""


@pytest.mark.parametrize(
    ("shell", "codes"),
    [
        ("{} | head -n 1", [0]),
        ("{} 2>&1 | head -n 1", [0]),
        ("{} > /dev/full", [BAD_INPUT]),
        ("{} > /dev/full 2> /dev/full", [BAD_INPUT]),
        ("{} >&- 2>&-", [0]),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONIOENCODING=ascii {}", [0]),
    ],
)
def test_the_result_is_safe_whatever_becomes_of_the_output(tmp_path, shell, codes):
    result = tmp_path / "result"
    script = tmp_path / "speaking.py"
    script.write_text(SPEAKING, encoding="utf-8")
    words = [sys.executable, str(script), str(result)]
    line = "set -o pipefail; " + shell.format(shlex.join(words))
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=100,
    )
    assert result.read_text() == "done"
    assert done.returncode in codes, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert ("error: stdout cannot be written" in done.stderr) == (shell == "{} > /dev/full")


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.ENOSPC])
def test_what_a_path_cannot_be_is_one_sentence(number, capsys):
    assert main(OSError(number, os.strerror(number), "/a/b")) == BAD_INPUT
    assert re.search(rf"/a/b .*\({os.strerror(number)}\)", capsys.readouterr().err)


def test_exit_codes_are_returned_and_nothing_is_left_behind(capsys):
    def settings():
        own = logging.getLogger("lit_jax")
        return own.level, own.propagate, own.handlers, sys.stdout, sys.stderr, sys.stdout.errors

    before = settings()
    assert main(SystemExit(0)) == 0
    assert main(SystemExit(3)) == 3
    with pytest.raises(KeyError):
        main(KeyError("a bug"))
    assert settings() == before


@pytest.mark.parametrize(
    ("word", "environment", "remedy"),
    [
        (b"--workdir=r\xe9n", {}, "rename"),
        ("--workdir=r\u00e9n".encode(), {"LC_ALL": "C", "PYTHONUTF8": "0"}, "PYTHONUTF8=1"),
    ],
)
def test_a_path_that_is_no_text_is_refused(word, environment, remedy):
    code = "import sys; from lit_jax.cli import Parser; from lit_jax.cli import command\n"
    code += "sys.exit(command(lambda: Parser('m', '').parse(None))())"
    done = subprocess.run(
        [sys.executable, "-c", code, word],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == BAD_INPUT
    assert remedy in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["lit_jax.export", "lit_jax export"])
@pytest.mark.parametrize(
    ("variable", "value"), [("JAX_ENABLE_X64", "maybe"), ("JAX_DEFAULT_MATMUL_PRECISION", "foo")]
)
def test_a_variable_that_jax_refuses_is_one_sentence(command, variable, value):
    words = [sys.executable, "-m", *command.split(), "--help"]
    ended = subprocess.run(
        words, env=os.environ | {variable: value}, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(rf"error: .*{variable}.*{value}.*\n", ended.stderr)
