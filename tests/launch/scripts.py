"""What tests of the launch scripts share."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
README = (LAUNCH / "README.md").read_text()


def launch(*words, **options):
    return subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300, **options
    )


def with_tools(folder=Path(sys.executable).parent):
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


def examples():
    """The commands of the README, as they would be typed."""
    blocks = re.sub(r"\\\n\s*", "", README)
    return re.findall(r"^    ((?:python|\w+=\S+ |launch/\S+\.sh)\b.*?)(?:\s+#.*)?$", blocks, re.M)


def of_script(name):
    return [shlex.split(line) for line in examples() if line.startswith(f"launch/{name}")]


def dry(words):
    """What an example says it would run, a list of words a line."""
    at = words.index("--") if "--" in words else len(words)
    result = launch(*words[:at], "--dry-run", *words[at:])
    assert result.returncode == 0, result.stderr
    return result.stdout


def stand_in(folder, gcloud):
    """Programs for the path: this gcloud, and a sleep that is short."""
    for name, body in (("gcloud", gcloud), ("sleep", "exec /bin/sleep 0.2")):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)


def until(condition):
    latest = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < latest
        time.sleep(0.1)


def is_running(number):
    """Not of one that has ended and that nobody has asked for its exit code."""
    status = Path(f"/proc/{number}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
