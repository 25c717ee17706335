"""The dashboards that show the metrics of a run: TensorBoard, Weights & Biases."""

import io
import logging
import math
import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from lit_jax.buckets import AnyPath
from lit_jax.display import printable
from lit_jax.errors import UserError
from lit_jax.files import cache_folder, parse_json
from lit_jax.training.workdir_errors import workdir_errors

log = logging.getLogger(__name__)


class Picture(NamedTuple):
    """A picture for dashboards: a file in PNG, and its text for those that show one."""

    png: bytes
    caption: str


# In a bucket a file that grows is written whole again and again, so it may not grow for ever.
_MOST_BYTES_IN_BUCKET = 1 << 22


class TensorBoard:
    """The TensorBoard events of a run, in a local folder, to which each step is written at once.

    For a run in a bucket a new file follows one that has grown to a few MiB; TensorBoard reads them in turn.
    tensorboardX's own SummaryWriter writes in a thread. When a full disk ends that thread, training waits for
    ever.
    """

    def __init__(self, workdir: AnyPath, folder: Path, start: int):
        self._workdir, self._folder = workdir, folder
        self._most_bytes = math.inf if isinstance(workdir, Path) else _MOST_BYTES_IN_BUCKET
        # The import takes more than a second, so runs without TensorBoard skip it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        folder.mkdir(exist_ok=True)
        self._open: Any = EventsWriter
        self._event: Any = event_pb2
        self._files = 0
        self._open_file()
        # A START event hides what an earlier file of the run has after `start`.
        self._write(step=start + 1, session_log={"status": self._event.SessionLog.START})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        points = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self._write(step=step, summary={"value": points})

    def show(self, step: int, pictures: Mapping[str, Picture]) -> None:
        """Write pictures after a step."""
        images = [
            {"tag": name, "image": {"encoded_image_string": picture.png}}
            for name, picture in pictures.items()
        ]
        self._write(step=step, summary={"value": images})

    def _open_file(self) -> None:
        # The name begins with the second; the number keeps the files of one second apart, in order.
        self._files += 1
        self._events = self._open(str(self._folder / "events"), f".{self._files:04d}")
        self._bytes = 0

    def _write(self, **fields: Any) -> None:
        with workdir_errors(self._workdir, Exception):
            if self._bytes >= self._most_bytes:
                self._events.close()
                self._open_file()
            event = self._event.Event(wall_time=time.time(), **fields)
            self._events.write_event(event)
            self._events.flush()
            self._bytes += event.ByteSize()

    def close(self) -> None:
        """Close the file."""
        self._events.close()


class WeightsAndBiases:
    """A run of Weights & Biases. A resumed run of the same folder continues it.

    Raises UserError if wandb is not installed or W&B does not accept the run.
    """

    def __init__(self, workdir: AnyPath, project: str):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(
                "config.log.wandb_project is set but wandb is not installed; run pip install wandb, or set "
                "the key to None."
            ) from None
        self._wandb = wandb
        # The id includes the whole path, so that a resumed run continues the W&B run of this folder and not
        # that of another folder with the same name.
        folder = zlib.crc32(os.fsencode(str(workdir.resolve())))
        name = f"{printable(workdir.resolve().name)}-{folder:08x}"
        try:
            self._run = wandb.init(
                project=project,
                dir=str(workdir if isinstance(workdir, Path) else _local_folder(workdir, name)),
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
                f"W&B cannot start ({error}); log in, set WANDB_MODE=offline, or set "
                "config.log.wandb_project to None."
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        self._run.log(dict(values), step=step)

    def show(self, step: int, pictures: Mapping[str, Picture]) -> None:
        """Write pictures after a step."""
        images = {
            name: self._wandb.Image(Image.open(io.BytesIO(picture.png)), caption=picture.caption)
            for name, picture in pictures.items()
        }
        self._run.log(images, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _local_folder(workdir: AnyPath, name: str) -> Path:
    """Make and return the folder on this machine for W&B's own files of a run in a bucket."""
    folder = cache_folder() / "wandb" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"W&B cannot write its files to {folder} ({error.strerror}); set XDG_CACHE_HOME to a folder that "
            "can be written, or config.log.wandb_project to None."
        ) from error
    log.info(
        "W&B cannot write into the bucket of %s, so its files are in %s. A run with WANDB_MODE=offline "
        "is sent from there: wandb sync %s/wandb/offline-run-*",
        workdir,
        folder,
        folder,
    )
    return folder
