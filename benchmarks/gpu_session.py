"""All that is measured on a GPU, in one session of about 20 minutes, as one Markdown file.

    python -m benchmarks.gpu_session [--output=gpu_session.md] [--peak-tflops=989] [--only=loss,...] [--tiny]
                                                       (requirements-gpu.txt, requirements-oracle.txt,
                                                        requirements-dev.txt)

Method: each part is a command in a process of its own, one after the other; what it prints goes into the
file as it is. A part that fails, or takes longer than its limit, does not stop the others; the table at the
head of the file names it. The file is written anew after each part. With --tiny all parts run on CPU with
small sizes, which says only that they run; the tests need the compiler for GPUs there, too. Exits with 1 if a
part failed.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple


class Part(NamedTuple):
    """A part of the session.

    Attributes:
        command: the module and its options.
        limit: the seconds after which it is stopped.
        tiny: the options for small sizes on CPU.
        has_peak: whether the command takes --peak-tflops.
    """

    title: str
    command: tuple[str, ...]
    limit: int
    tiny: tuple[str, ...] = ("--tiny",)
    has_peak: bool = False


PARTS = {
    "tests": Part(
        "Tests of what the compiler makes for GPUs",
        ("pytest", "-q", "-m", "gpu"),
        300,
        tiny=("-k", "layer_norm_is_one_kernel"),
    ),
    "step": Part(
        "The step against PyTorch with torch.compile and scaled_dot_product_attention",
        ("benchmarks.gpu_step",),
        600,
        tiny=("--tiny", "--batch=4", "--steps=1"),
        has_peak=True,
    ),
    "loss": Part("The loss alone", ("benchmarks.gpu_loss",), 120, has_peak=True),
    "clock": Part(
        "The plan against the clock",
        ("benchmarks.gpu_clock",),
        240,
        tiny=("--tiny", "--batch=4", "--steps=1"),
        has_peak=True,
    ),
    "resume": Part("Killed and resumed", ("benchmarks.gpu_resume",), 240, tiny=("--steps=40",)),
}


class Outcome(NamedTuple):
    """The outcome of a part: a word for the table, the seconds that it took, and what it printed."""

    word: str
    seconds: float
    output: str


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("gpu_session.md"))
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="small sizes on CPU: does it run?")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := sorted(set(names) - set(PARTS)):
        parser.error(f"--only={args.only}: {unknown[0]} is not one of {', '.join(PARTS)}")
    outcomes: dict[str, Outcome] = {}
    for name in names:
        part = PARTS[name]
        options = part.tiny if args.tiny else ()
        if part.has_peak:
            options = (*options, f"--peak-tflops={args.peak_tflops}")
        outcomes[name] = run((*part.command, *options), part.limit, on_cpu=args.tiny)
        args.output.write_text(markdown(outcomes))
        print(f"{name}: {outcomes[name].word}, {outcomes[name].seconds:.0f} s", flush=True)
    sys.exit(any(outcome.word != "done" for outcome in outcomes.values()))


def run(command: tuple[str, ...], limit: int, *, on_cpu: bool) -> Outcome:
    """Run `python -m COMMAND` for at most `limit` seconds."""
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if on_cpu else {})
    start = time.monotonic()
    # A session of its own, so that the processes that a part starts end with it.
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        word = "done" if process.returncode == 0 else f"failed, exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        word = f"stopped after {limit} s"
    return Outcome(word, time.monotonic() - start, output)


def markdown(outcomes: dict[str, Outcome]) -> str:
    """Return the file: the GPU, a table of the parts, and what each printed."""
    lines = ["# GPU session", "", gpu(), "", "| part | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {o.word} | {o.seconds:.0f} |" for name, o in outcomes.items()]
    for name, outcome in outcomes.items():
        command = " ".join(PARTS[name].command)
        # A failure may print much; its end has the reason.
        lines += ["", f"## {PARTS[name].title}", "", f"`python -m {command}`", "", "```"]
        lines += [*outcome.output.rstrip().splitlines()[-60:], "```"]
    return "\n".join(lines) + "\n"


def gpu() -> str:
    """Return the name, memory and driver of each GPU, or a sentence if there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(query, text=True).strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "No NVIDIA GPU was found."


if __name__ == "__main__":
    main()
