"""Goodput under fire: the demo's training is killed again and again, and says where its time went.

    python -m benchmarks.goodput [--kills=40] [--every=60] [--checkpoint="10 seconds"] [--tiny]

Method: the command of the demo, without evaluations and without an end, is started, and killed by SIGKILL
`every` seconds later, half an interval between checkpoints more or less; then started again at once, `kills`
times. The last start is stopped by SIGTERM. The seconds by kind are those of the run's own last row. A start
can use at most what its start-up and compilation leave, and a kill costs half an interval between checkpoints
on average: `possible` is the share of the time that is left then. `used` is the share of steps and of waiting
for data. `accounted` is the sum of all kinds over the time on the clock outside.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
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
            live(
                workdir,
                args.checkpoint,
                lifetime,
                signal.SIGKILL if kill < kills else signal.SIGTERM,
            )
        report(read_metrics(workdir)[-1], time.time() - began, kills, interval)


def live(workdir: Path, checkpoint: str, lifetime: float, end: signal.Signals) -> None:
    """Start the run, and send its process a signal after `lifetime` seconds; wait for its end."""
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
    time.sleep(lifetime)
    if process.poll() is not None:
        sys.exit(f"The run ended by itself, with exit code {process.returncode}.")
    process.send_signal(end)
    process.wait()


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
