"""Ctrl-C is neither lost nor shown as another error, wherever it comes."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_jax import interrupts
from lit_jax.cli import command
from lit_jax.errors import INTERRUPTED

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def interruptible():
    """Where a shell runs the tests in the background, they and what they start ignore SIGINT."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_an_interrupt_that_the_garbage_collector_drops_is_raised_again():
    def interrupted(phase, info):
        gc.callbacks.remove(interrupted)
        signal.raise_signal(signal.SIGINT)

    @interrupts.raised()
    def collect_and_sleep():
        gc.callbacks.append(interrupted)
        gc.collect()
        time.sleep(60)

    hook, began = sys.unraisablehook, time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        collect_and_sleep()
    assert time.monotonic() - began < 30
    assert sys.unraisablehook is hook


def test_an_interrupt_that_a_module_shows_as_its_own_error_is_an_interrupt(capsys):
    @command
    def main(reason):
        try:
            raise reason
        except BaseException as error:
            raise ImportError("cannot be initialised") from error

    assert main(KeyboardInterrupt()) == INTERRUPTED
    assert capsys.readouterr().err == "Interrupted.\n"
    with pytest.raises(ImportError):
        main(ValueError())


@pytest.mark.parametrize("words", [["-m", "lit_jax.train"], ["-m", "lit_jax.evaluate"]])
def test_an_interrupt_among_the_imports_ends_the_command_at_once(words):
    process = subprocess.Popen(
        [sys.executable, *words, "--help"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "jaxlib" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == ""
    # A shell shows this as 130.
    assert process.returncode == -signal.SIGINT


def test_a_process_that_ignores_interrupts_goes_on_to_do_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupts.end_at_once()
    with interrupts.raised():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
