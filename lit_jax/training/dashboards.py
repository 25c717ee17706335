"""The dashboards that show the metrics of a run: TensorBoard, Weights & Biases."""

import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_jax.buckets import AnyPath
from lit_jax.display import printable
from lit_jax.errors import UserError
from lit_jax.files import parse_json


class TensorBoard:
    """A TensorBoard events file, to which each step is written at once.

    tensorboardX's own SummaryWriter writes in a thread. When a full disk ends that thread, training waits for
    ever.
    """

    def __init__(self, folder: Path, start: int):
        # The import takes more than a second, so runs without TensorBoard skip it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        self._event: Any = event_pb2
        # A START event hides what an earlier file of the run has after `start`.
        self._write(step=start + 1, session_log={"status": self._event.SessionLog.START})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        points = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self._write(step=step, summary={"value": points})

    def _write(self, **fields: Any) -> None:
        self._events.write_event(self._event.Event(wall_time=time.time(), **fields))
        self._events.flush()

    def close(self) -> None:
        """Close the file."""
        self._events.close()


def start_wandb(workdir: AnyPath, project: str) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "config.log.wandb_project is set but wandb is not installed; run pip install wandb, or set the "
            "key to None."
        ) from None
    # The id includes the whole path, so that a resumed run continues the W&B run of this folder and not that
    # of another folder with the same name.
    folder = zlib.crc32(os.fsencode(workdir.resolve()))
    name = f"{printable(workdir.resolve().name)}-{folder:08x}"
    try:
        return wandb.init(
            project=project,
            dir=str(workdir),
            id=name,
            name=name,
            resume="allow",
            config=parse_json((workdir / "config.json").read_bytes()),
            # A resumed run may change some keys of the config.
            allow_val_change=True,
        )
    # The usual causes are a missing login and a missing network.
    except wandb.Error as error:
        raise UserError(
            f"W&B cannot start ({error}); log in, set WANDB_MODE=offline, or set config.log.wandb_project to "
            "None."
        ) from error
