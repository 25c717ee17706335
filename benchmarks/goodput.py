"""Goodput under fire: the demo's training is killed again and again, and says where its time went.

    python -m benchmarks.goodput [--kills=40] [--every=60] [--checkpoint="10 seconds"] [--compare]
        [--tiny]

Method: the command of the demo, without evaluations and without an end, is started, and killed by SIGKILL
`every` seconds later, half an interval between checkpoints more or less; then started again at once, `kills`
times. The last start is stopped by SIGTERM. The seconds by kind are those of the run's own last row. A start
can use at most what its start-up and compilation leave, and a kill costs half an interval between checkpoints
on average: `possible` is the share of the time that is left then. `used` is the share of steps and of waiting
for data. `accounted` is the sum of all kinds over the time on the clock outside.

With `--compare` another run then takes as many steps without a kill, and loss and gradient norm of every step
that both have logged are compared, bit for bit.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lit_jax.config_schema import seconds
from lit_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
ENDLESS = ("--config.duration=1000000 steps", "--config.evals={}", "--config.report=none")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two kills")
    parser.add_argument("--checkpoint", default="10 seconds", help="config.checkpoint.every")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="compare with a run that is not killed; as long again",
    )
    parser.add_argument("--tiny", action="store_true", help="one kill, to see that it runs")
    args = parser.parse_args()
    kills, every = (1, 30.0) if args.tiny else (args.kills, args.every)
    interval = seconds(args.checkpoint)
    if interval is None:
        parser.error("--checkpoint must be a time on the clock, such as '10 seconds'")
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        began = time.time()
        chance = random.Random(0)
        for kill in range(kills + 1):
            # Start-ups take equally long, so that equal times would kill at the same place of an interval.
            lifetime = every + interval * (chance.random() - 0.5)
            with live(workdir, args.checkpoint) as process:
                time.sleep(lifetime)
                check_runs(process)
                process.send_signal(signal.SIGKILL if kill < kills else signal.SIGTERM)
                process.wait()
        rows = read_metrics(workdir)
        report(rows[-1], time.time() - began, kills, interval)
        if args.compare:
            compare(rows, Path(folder) / "whole", args.checkpoint)


@contextlib.contextmanager
def live(workdir: Path, checkpoint: str) -> Iterator[subprocess.Popen[bytes]]:
    """Yield the process of a start of the run, which does not end by itself."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "lit_jax.train", "--config=configs/vit_bert.py"),
            *(f"--workdir={workdir}", f"--config.checkpoint.every={checkpoint}", *ENDLESS),
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def check_runs(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        sys.exit(f"The run ended by itself, with exit code {process.returncode}.")


def compare(rows: list[dict[str, float]], workdir: Path, checkpoint: str) -> None:
    """Run without a kill up to the last step of `rows`, and print how many rows of both runs are equal."""
    whole: list[dict[str, float]] = []
    with live(workdir, checkpoint) as process:
        while not whole or whole[-1]["step"] < rows[-1]["step"]:
            time.sleep(5)
            check_runs(process)
            whole = read_metrics(workdir)
    expected = {row["step"]: (row["loss"], row["grad_norm"]) for row in whole}
    common = [row for row in rows if row["step"] in expected]
    equal = sum((row["loss"], row["grad_norm"]) == expected[row["step"]] for row in common)
    print(f"without a kill: {equal} of {len(common)} rows of metrics are equal")


def report(row: dict[str, float], wall: float, kills: int, interval: float) -> None:
    prefix = "seconds/"
    spent = {name.removeprefix(prefix): row[name] for name in row if name.startswith(prefix)}
    for kind, value in spent.items():
        print(f"{kind:12} {value:9.1f} s {value / wall:7.1%}")
    # A start that was killed before its first checkpoint is lost as a whole, with its start-up.
    start = spent["startup"] + spent["compile"]
    possible = 1 - (start + kills * interval / 2) / wall
    used = (spent["step"] + spent["data_wait"]) / wall
    accounted = sum(spent.values()) / wall
    print(f"{row['step']:.0f} steps, {kills} kills, {wall:.1f} s on the clock outside")
    print(f"{'':8} possible     used  used/possible  accounted")
    print(f"{'share':8} {possible:8.3f} {used:8.3f} {used / possible:14.3f} {accounted:10.3f}")


if __name__ == "__main__":
    main()
