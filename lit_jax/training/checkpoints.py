"""The checkpoints of a run: asynchronous, and either complete or absent.

    <workdir>/frozen/             the locked parameters, written once, and their checksums; frozen_from_STEP/
                                  those of later checkpoints, if the choice of what trains has changed there
    <workdir>/checkpoints/<step>/ state (trainable parameters, optimizer), data (position in the stream),
                                  meta (resolved config, library versions), sums.json (checksums of the first
                                  two)

A stack of blocks has one name there, wherever a lock cuts it; see stack_names.py.

Orbax writes into a temporary folder and renames the folder when everything is on disk. In a bucket it writes
into the folder itself, and the file commit_success.txt last. A process that is killed at any moment therefore
leaves the previous checkpoint as the latest.
"""

import contextlib
import importlib.metadata
import logging
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from lit_jax.buckets import AnyPath, BucketPath, subfolders
from lit_jax.distributed.process import is_primary
from lit_jax.errors import UserError
from lit_jax.files import parse_json, write_json
from lit_jax.training.integrity import (
    DamagedError,
    PendingSums,
    check_sums,
    start_sums,
    text_sum,
)
from lit_jax.training.lease import check_lease
from lit_jax.training.orbax_folders import (
    as_saved,
    atomicity,
    check_arrays,
    check_shapes,
    checkpointer,
    teach_s3,
)
from lit_jax.training.stack_names import UncutStacks, cut_stacks, join_stacks
from lit_jax.training.train_step import State
from lit_jax.training.workdir_errors import STEP, complete_steps, reason, workdir_errors

log = logging.getLogger(__name__)
teach_s3()

# The libraries whose versions a checkpoint records, to explain a difference between two runs later.
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
# After an error, one of several processes waits this long for a save that is under way.
SAVE_SECONDS = 60
SUMS_FILE = "sums.json"
# Orbax has this text in the name of an incomplete folder.
_UNFINISHED = ".orbax-checkpoint-tmp"


class Checkpoints:
    """The checkpoints of one run folder. `close`, or the end of a `with`, waits for the last save.

    Args:
        keep_last: the number of newest checkpoints to keep.
        keep_every: checkpoints of steps that this number divides are kept for ever.
        uncut: the stacks of the uncut model, by whose names arrays are saved.
    """

    def __init__(
        self,
        workdir: AnyPath,
        keep_last: int,
        keep_every: int | None = None,
        uncut: UncutStacks = (),
    ):
        self._workdir, self._uncut = workdir, uncut
        # The checksums of the save under way.
        self._sums: PendingSums | None = None
        self._data_sum = 0
        self._step = 0
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last,
            keep_period=keep_every,
            # A killed run leaves incomplete folders behind.
            cleanup_tmp_directories=True,
            # With asynchronous creation, a folder that cannot be created keeps the process alive for 20
            # minutes.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False,
                barrier_sync_fn=_barrier,
                post_finalization_callback=self._before_it_is_complete,
            ),
            atomicity_options=atomicity(workdir),
        )
        _check_names(workdir / "checkpoints")
        with self._writing():
            self._manager = ocp.CheckpointManager(
                (workdir / "checkpoints").resolve(),
                options=options,
                item_names=("state", "data", "meta"),
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # After an error in one process the others may never reach Orbax's barrier, and `close` would wait 20
        # minutes for them. A save that all processes have reached ends within the limit.
        if kind and jax.process_count() > 1:
            latest = time.monotonic() + SAVE_SECONDS
            while self._manager.is_saving_in_progress():
                if time.monotonic() > latest:
                    # This process ends, and the other processes with it. The save is lost, as after a kill.
                    return
                time.sleep(0.05)
        self.close()

    def close(self) -> None:
        """Wait for the last save, and free the resources of Orbax."""
        with self._writing():
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, None without one."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: State, data: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        """Start to write a checkpoint; return when the arrays are copied and the next step may reuse them.

        A step that is already saved stays as it is.

        Args:
            data: the position in the stream of batches, a JSON object.
            config: the resolved config, a JSON object.
        """
        if step in self._manager.all_steps():
            return
        meta = {"config": config, "versions": versions()}
        state = join_stacks(state, self._uncut)
        with self._writing():
            self._manager.wait_until_finished()
            # The previous save must have ended, because its callback reads these attributes.
            self._sums, self._data_sum, self._step = start_sums(state), text_sum(data), step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(dict(data)),
                    meta=ocp.args.JsonSave(meta),
                ),
            )

    def _before_it_is_complete(self) -> None:
        """Check what a save has written and add its checksums, before Orbax completes the checkpoint.

        Orbax calls this method in the first process, in the thread of the save. After an error the folder
        keeps its temporary name.
        """
        # A process that lost the lease while it wrote must not complete a checkpoint of another run.
        check_lease(self._workdir)
        assert self._sums is not None
        arrays = self._sums.fetch()
        for folder in self._unfinished():
            check_arrays(folder / "state", len(arrays))
            write_json(folder / SUMS_FILE, {"arrays": arrays, "data": self._data_sum})

    def _unfinished(self) -> Iterable[AnyPath]:
        """Return the folder of the save under way, as a list."""
        folder = self._workdir / "checkpoints"
        if isinstance(folder, BucketPath):
            return [folder / str(self._step)]
        # Not the folders of other steps: a process that was paused in a save and has lost the lease goes on
        # to write arrays there until its save ends with an error.
        return folder.glob(f"{self._step}{_UNFINISHED}*")

    def wait(self) -> None:
        """Wait until everything that was saved is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def restore(self, abstract_state: State) -> tuple[State, dict[str, Any]]:
        """Read state and data position of the latest step, each array in the dtype and sharding asked for.

        Raises UserError if the checkpoint is damaged or belongs to another model or optimizer.
        """
        step, folder = self.latest, self._workdir / "checkpoints" / str(self.latest)
        with reading_step(self._workdir, step):
            wanted = as_saved(folder / "state", abstract_state, self._uncut)
            check_shapes(folder / "state", wanted)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(wanted), data=ocp.args.JsonRestore()
                ),
            )
            state, data = restored["state"], restored["data"]
            _check_step_sums(folder, state, data)
            # State and position must belong to the same step, or examples would be skipped or repeated.
            if data["next_batch"] != step:
                raise DamagedError(f"its data are at step {data['next_batch']}")
            return cut_stacks(state, self._uncut, abstract_state), data

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        # For a full disk or lost permissions, Orbax and TensorStore raise many types, some from a thread.
        return workdir_errors(self._workdir, Exception)


def _check_names(folder: AnyPath) -> None:
    """Raise UserError at a folder that Orbax takes for a step and `complete_steps` does not, as 'old_4'."""
    for found in sorted(subfolders(folder)):
        ends_in_a_number = found.name.rpartition("_")[2].isdigit()
        if ends_in_a_number and not STEP.fullmatch(found.name):
            raise UserError(
                f"{found} is not the checkpoint of a step, though Orbax would take it for one; move it "
                "elsewhere."
            )


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Wait at Orbax's barrier, unless a thread of Orbax has an error to report.

    A process whose save has failed would wait there for 20 minutes. The other processes wait at another
    barrier, which they leave when this process ends.
    """
    of_orbax = threading.current_thread() is not threading.main_thread()
    if of_orbax and (error := sys.exception()):
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def restore_params(
    workdir: AnyPath,
    abstract_params: Mapping[str, Any],
    step: int | None = None,
    uncut: UncutStacks = (),
) -> tuple[int, Any]:
    """Read the trainable parameters of a checkpoint; return the step and the parameters.

    Nothing is written, because the run may be training. `Checkpoints` would remove incomplete folders.

    Args:
        step: the step of the checkpoint; None is the latest.
        uncut: the stacks of the uncut model.

    Raises UserError if there is no such checkpoint, or if it is damaged or belongs to another model.
    """
    steps = complete_steps(workdir)
    if not steps:
        raise UserError(f"{workdir} holds no complete checkpoint; train it first.")
    if step is not None and step not in steps:
        raise UserError(f"{workdir} has no checkpoint of step {step}; there are {steps}.")
    step = steps[-1] if step is None else step
    folder = (workdir / "checkpoints" / str(step) / "state").resolve()
    with reading_step(workdir, step), ocp.PyTreeCheckpointer() as reader:
        wanted = {"params": as_saved(folder, abstract_params, uncut, part="params")}
        check_shapes(folder, wanted, part="params")
        restored = reader.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                # The state of the optimizer is not read.
                partial_restore=True,
            ),
        )
        _check_step_sums(folder.parent, restored)
        return step, cut_stacks(restored["params"], uncut, abstract_params)


def saved_config(workdir: AnyPath, step: int) -> dict[str, Any]:
    """Return the resolved config, a JSON object, with which the checkpoint of a step was saved."""
    file = workdir / "checkpoints" / str(step) / "meta" / "metadata"
    return parse_json(file.read_bytes())["config"]


def frozen_folder(workdir: AnyPath, step: int = 0) -> AnyPath:
    """Return the folder of the locked parameters that belong to the checkpoint of a step.

    The folder is `frozen`, or `frozen_from_STEP` of the last earlier step at which the choice of what trains
    changed.
    """
    earlier = [start for start in _frozen_starts(workdir) if start < step]
    return workdir / (f"frozen_from_{max(earlier)}" if earlier else "frozen")


def later_frozen_folders(workdir: AnyPath, step: int) -> list[AnyPath]:
    """Return the folders of locked parameters that belong to checkpoints after a step alone."""
    return [workdir / f"frozen_from_{start}" for start in _frozen_starts(workdir) if start >= step]


def _frozen_starts(workdir: AnyPath) -> list[int]:
    found = (re.fullmatch(r"frozen_from_(\d+)", folder.name) for folder in workdir.glob("frozen_*"))
    return [int(match[1]) for match in found if match]


def save_frozen(folder: AnyPath, frozen: Mapping[str, Any], uncut: UncutStacks = ()) -> None:
    """Write the locked parameters of a run, and replace those that an earlier start has left there."""
    if not frozen:
        return
    frozen = join_stacks(frozen, uncut)
    # A run may read them back in bfloat16, so the checksums of the rounded values are stored, too.
    sums = start_sums(frozen, with_rounded=True)
    with workdir_errors(folder.parent, Exception), checkpointer(folder) as writer:
        writer.save(folder.resolve(), frozen, force=True)
        writer.wait_until_finished()
        if is_primary():
            write_json(folder / SUMS_FILE, sums.fetch())


def restore_frozen(
    folder: AnyPath, abstract_frozen: Mapping[str, Any], uncut: UncutStacks = ()
) -> Any:
    """Read the locked parameters in the dtype and sharding of `abstract_frozen`.

    Raises UserError if the parameters are missing, damaged or those of another model.
    """
    if not abstract_frozen:
        return {}
    what_then = "put them back, or start again in another --workdir"
    with _reading(folder, what_then, what_then), checkpointer(folder) as reader:
        wanted = as_saved(folder, abstract_frozen, uncut)
        check_shapes(folder, wanted)
        frozen = reader.restore(folder.resolve(), wanted)
        _compare(frozen, _stored_sums(folder / SUMS_FILE))
        return cut_stacks(frozen, uncut, abstract_frozen)


def _check_step_sums(folder: AnyPath, arrays: Any, data: Any = None) -> None:
    """Raise DamagedError if arrays or data of a checkpoint differ from the checksums in its folder."""
    stored = _stored_sums(folder / SUMS_FILE)
    _compare(arrays, stored and stored["arrays"])
    if stored and data is not None and stored["data"] != text_sum(data):
        raise DamagedError("the position in the data is not as it was saved")


def _compare(arrays: Any, stored: Any) -> None:
    # All processes take part in computing the checksums. Only the first one has read the stored ones.
    check_sums(arrays, stored if is_primary() else None)


def _stored_sums(file: AnyPath) -> dict[str, Any] | None:
    if not is_primary():
        return None
    if not file.exists():
        log.warning("%s is missing, so what is read there is not compared with checksums.", file)
        return None
    return parse_json(file.read_bytes())


@contextlib.contextmanager
def _reading(folder: AnyPath, what_then: str, repair: str) -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        raise UserError(f"{folder} is damaged: {error}; {repair}.") from error
    # For damaged content, Orbax and TensorStore raise many types.
    except Exception as error:
        raise UserError(
            f"{folder} is damaged, or of another model or optimizer than this config ({reason(error)}); "
            f"{what_then}."
        ) from error


def reading_step(workdir: AnyPath, step: int | None) -> contextlib.AbstractContextManager[None]:
    """Turn any error of reading the checkpoint of a step into UserError."""
    earlier = [other for other in complete_steps(workdir) if other != step]
    remove = f"remove that folder to resume from step {earlier[-1]}" if earlier else ""
    what_then = ", or ".join(filter(None, ["undo the change that --allow_changes permits", remove]))
    repair = remove or "restore a copy of it, or start again in another --workdir"
    return _reading(workdir / "checkpoints" / str(step), what_then, repair)


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the numbers of a run."""
    from lit_jax import __version__

    installed = {name: importlib.metadata.version(name) for name in LIBRARIES if name != "lit_jax"}
    return {"lit_jax": __version__, **installed, "backend": jax.default_backend()}
