"""Checkpoints of a run: asynchronous, complete or not there at all.

    <workdir>/frozen/             the locked parameters, written once
    <workdir>/checkpoints/<step>/ state (trainable parameters, optimizer), data (position in the stream),
                                  meta (resolved config, library versions)

Orbax writes into a temporary folder and renames it when all is on disk, so that a process killed at any
moment leaves the previous checkpoint as the latest.
"""

import contextlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lit_jax.errors import UserError
from lit_jax.training.step import State

LIBRARIES = (
    "lit_jax",
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "numpy",
)


class Checkpoints:
    """The checkpoints of one run folder. Close it, or use it in `with`, to wait for the last save."""

    def __init__(self, workdir: Path, keep_last: int = 1, keep_every: int | None = None):
        self._workdir = workdir
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last, keep_period=keep_every, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(
            _folder(workdir / "checkpoints"), options=options, item_names=("state", "data", "meta")
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        with self._explain_failure():
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: State, data: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        """Starts writing; returns once the arrays are copied, so that the next step may reuse theirs."""
        if step in self._manager.all_steps():
            return
        meta = {"config": config, "versions": versions()}
        with self._explain_failure():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(dict(data)),
                    meta=ocp.args.JsonSave(meta),
                ),
            )

    def wait(self) -> None:
        """Returns when all that was saved is on disk."""
        with self._explain_failure():
            self._manager.wait_until_finished()

    def restore(
        self, abstract_state: State, step: int | None = None
    ) -> tuple[State, dict[str, Any]]:
        """State and data position of a step (the latest), each array onto the sharding asked for.

        Raises UserError if there is no such checkpoint.
        """
        step = self._existing(step)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()
            ),
        )
        return restored["state"], restored["data"]

    def restore_params(
        self, abstract_params: Mapping[str, Any], step: int | None = None
    ) -> tuple[int, Any]:
        """The step (the latest) and its trainable parameters; the optimizer state is not read."""
        step = self._existing(step)
        path = _folder(self._workdir / "checkpoints" / str(step) / "state")
        with ocp.PyTreeCheckpointer() as reader:
            restored = reader.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    item={"params": abstract_params},
                    restore_args=ocp.checkpoint_utils.construct_restore_args(
                        {"params": abstract_params}
                    ),
                    partial_restore=True,
                ),
            )
        return step, restored["params"]

    def _existing(self, step: int | None) -> int:
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(f"{self._workdir} holds no complete checkpoint; train it first.")
        if step is not None and step not in steps:
            raise UserError(f"{self._workdir} has no checkpoint of step {step}; there are {steps}.")
        return steps[-1] if step is None else step

    @contextlib.contextmanager
    def _explain_failure(self) -> Iterator[None]:
        # Orbax and TensorStore raise many types for a full disk or lost rights, some from a thread.
        try:
            yield
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:300]
            raise UserError(
                f"A checkpoint could not be written to {self._workdir} ({reason}); the last good one is "
                f"of step {self.latest}: make room or mend the folder, then run the same command again."
            ) from error


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run has a complete checkpoint; Orbax gives it its step as a name when it is."""
    return any(folder.name.isdigit() for folder in (workdir / "checkpoints").glob("*"))


def save_frozen(workdir: Path, frozen: Mapping[str, Any]) -> None:
    """Writes the locked parameters of a run, unless they are there."""
    path = _folder(workdir / "frozen")
    if path.exists() or not frozen:
        return
    with ocp.StandardCheckpointer() as writer:
        writer.save(path, frozen)


def restore_frozen(workdir: Path, abstract_frozen: Mapping[str, Any]) -> Any:
    """The locked parameters in the dtype and sharding of `abstract_frozen`."""
    if not abstract_frozen:
        return {}
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(_folder(workdir / "frozen"), abstract_frozen)


def versions() -> dict[str, str]:
    """The versions of the libraries that decide the numbers of a run."""
    from lit_jax import __version__

    installed = {name: importlib.metadata.version(name) for name in LIBRARIES if name != "lit_jax"}
    return {"lit_jax": __version__, **installed, "backend": jax.default_backend()}


def _folder(path: Path) -> Path:
    return path if "://" in str(path) else path.resolve()  # Orbax wants absolute paths
