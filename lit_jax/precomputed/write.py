"""The command's side of precomputed features: each process writes its own shards with its own devices."""

import collections
import dataclasses
import json
import logging
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from lit_jax.buckets import PROBE, AnyPath
from lit_jax.data.example import BadSampleError, Source
from lit_jax.data.loader import ImagePreprocessor, TextPreprocessor
from lit_jax.distributed.preemption import StopSignal
from lit_jax.distributed.process import is_primary
from lit_jax.errors import Preempted, UserError
from lit_jax.files import atomic_write, output_errors, parse_json
from lit_jax.models.dual_encoder import DualEncoderModule, Side
from lit_jax.precomputed.format import (
    MANIFEST,
    STARTED,
    Counts,
    Header,
    ShardWriter,
    complete_shards,
    manifest_counts,
    remove_unfinished,
    total_counts,
)
from lit_jax.precomputed.tower import Batch, run_tower
from lit_jax.trees import Tree

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureWriter:
    """A writer of the features of a data set, in one process.

    Attributes:
        inputs: the preprocessor of the tower's inputs.
        params: the parameters of the tower, in the dtype of the computation, and the scalars beside the
            towers, which Flax requires in any call of the module.
        mesh: a mesh over devices of this process alone.
        rows: the number of rows in a batch, a multiple of the number of devices in the mesh.
        threads: the number of threads that read the data.
    """

    source: Source
    inputs: ImagePreprocessor | TextPreprocessor
    module: DualEncoderModule
    params: Tree
    mesh: jax.sharding.Mesh
    side: Side
    rows: int
    threads: int

    def write(self, folder: AnyPath, header: Header, max_bad_fraction: float) -> Counts:
        """Write the shards that `folder` lacks; return when all processes have written theirs.

        Raises UserError if the folder holds other features or if too many samples are bad. Raises Preempted
        after SIGTERM; unfinished shards are then lost.
        """
        _open_folder(folder, header)
        was_complete = _write_missing(self, folder, header)
        # A folder that was finished by an earlier command has its counts in the manifest.
        known = manifest_counts(folder, header) if was_complete else None
        return _close_folder(folder, header, max_bad_fraction, known)

    def records(self, examples: range) -> Iterator[np.ndarray | BadSampleError | None]:
        """Yield the features of each example, in order, or the reason why it has none; None after each batch.

        The caller needs the None to look for a SIGTERM equally often in every process.
        """
        # An entry is the number of rows of an example, or the reason why the example has none. `_batches`
        # fills the queue ahead of the tower, whose batches cut across examples.
        units: collections.deque[int | BadSampleError] = collections.deque()
        ready: list[np.ndarray] = []
        features = run_tower(
            self.module,
            self.params,
            self.mesh,
            map(self._collate, self._batches(examples, units)),
            side=self.side,
            output="features",
        )
        for rows_RxP, _ in features:
            ready.extend(rows_RxP)
            while units and (isinstance(units[0], BadSampleError) or units[0] <= len(ready)):
                unit = units.popleft()
                if isinstance(unit, int):
                    yield np.stack(ready[:unit])
                    del ready[:unit]
                else:
                    yield unit
            yield None
        # Bad examples after the last row belong to no batch.
        yield from (unit for unit in units if isinstance(unit, BadSampleError))

    def _batches(
        self, examples: range, units: collections.deque[int | BadSampleError]
    ) -> Iterator[list[Any]]:
        """Yield the inputs of at most `rows` rows; append an entry for each example read to `units`."""
        options = grain.ReadOptions(
            num_threads=self.threads, prefetch_buffer_size=4 * max(self.threads, 1)
        )
        read = _ReadAll(self.source, self.inputs)
        pending: list[Any] = []
        for unit in grain.MapDataset.source(examples).map(read).to_iter_dataset(options):
            is_bad = isinstance(unit, BadSampleError)
            units.append(unit if is_bad else len(unit))
            pending.extend([] if is_bad else unit)
            while len(pending) >= self.rows:
                yield pending[: self.rows]
                del pending[: self.rows]
        if pending:
            yield pending

    def _collate(self, rows: list[Any]) -> Batch:
        index = np.full(self.rows, -1, np.int32)
        index[: len(rows)] = np.arange(len(rows))
        # A short last batch is padded to full size, because another shape would compile the tower again.
        padded = rows + rows[-1:] * (self.rows - len(rows))
        return {**self.inputs.collate(padded), "index": index}


@dataclasses.dataclass(frozen=True)
class _ReadAll:
    """A function from a position in the source to all rows of the example, or the reason why it has none."""

    source: Source
    inputs: ImagePreprocessor | TextPreprocessor

    def __call__(self, index: int) -> list[Any] | BadSampleError:
        # The log names an example that cannot be read by its position.
        key = f"number {index}"
        try:
            example = self.source[index]
            key = example["key"]
            return self.inputs.variants(index, example)
        except BadSampleError as reason:
            log.warning("Bad sample %s has no embedding: %s.", key, reason)
            return reason


def check_free(folder: AnyPath) -> None:
    """Raise UserError if a folder holds anything else than precomputed features."""
    with output_errors(folder):
        # Another process of the same run may check its access to the bucket at this moment.
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        others = [name for name in names if not name.startswith(PROBE)]
        if others and not (folder / STARTED).exists():
            raise UserError(f"{folder} already holds other files; choose another --output.")


def _open_folder(folder: AnyPath, header: Header) -> None:
    """Create the folder, or accept one with the same header. Raise UserError if its header differs."""
    started = folder / STARTED
    with output_errors(folder):
        if started.exists():
            try:
                found = dict(parse_json(started.read_bytes()))
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{started} is damaged ({error}), so it is unknown what {folder} holds; remove the "
                    "folder or choose another --output."
                ) from error
            changed = [k for k, v in dataclasses.asdict(header).items() if found.get(k) != v]
            if changed:
                raise UserError(
                    f"{folder} holds embeddings that were made with another {', '.join(changed)}; choose "
                    "another --output."
                )
    # Every process must look before the first process writes the header, or the look would prove nothing.
    _together()
    # The header comes before any shard, so that every later start can tell what the shards are.
    with output_errors(folder):
        if is_primary() and not started.exists():
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(started, json.dumps(dataclasses.asdict(header), indent=2) + "\n")


def _close_folder(
    folder: AnyPath, header: Header, max_bad_fraction: float, known: Counts | None = None
) -> Counts:
    """Write the manifest when all shards are complete; return the counts, which may be `known` already.

    Raises UserError if too many samples are bad.
    """
    # The counts come from the folder, because other processes and earlier commands wrote most of the shards.
    with output_errors(folder):
        counts = known or total_counts(folder, header)
    if (fraction := counts.bad / header.examples) > max_bad_fraction:
        raise UserError(
            f"{counts.bad} of {header.examples} samples are bad ({fraction:.1%}); fix the data and choose "
            "another --output, or raise config.data.max_bad_fraction."
        )
    # The manifest comes last, because it marks the folder as complete.
    if is_primary():
        manifest = dataclasses.asdict(header) | dataclasses.asdict(counts)
        with output_errors(folder):
            atomic_write(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
            remove_unfinished(folder)
    return counts


def _together(*, stopped: bool = False, busy: bool = False) -> tuple[bool, bool]:
    """Return whether any process must stop, and whether any has work left.

    The call is a collective operation, so all processes must make it equally often.
    """
    if jax.process_count() == 1:
        return stopped, busy
    all_Nx2 = np.asarray(multihost_utils.process_allgather(np.array([stopped, busy])))
    return bool(all_Nx2[:, 0].any()), bool(all_Nx2[:, 1].any())


def _write_missing(writer: FeatureWriter, folder: AnyPath, header: Header) -> bool:
    """Write this process's share of the missing shards; return when no process has work left.

    The value is whether no shard was missing.
    """
    done = np.zeros(header.shards, bool)
    # The view of the first process decides, because others may see an older listing of the folder, or none
    # before the first process has made it.
    if is_primary():
        with output_errors(folder):
            done = np.array(complete_shards(folder, header))
    if jax.process_count() > 1:
        done = multihost_utils.broadcast_one_to_all(done).astype(bool)
    missing = np.flatnonzero(~done)
    # Missing shards are dealt out in turn, so that all processes have about equally many.
    mine = [int(n) for n in missing[jax.process_index() :: jax.process_count()]]
    already = sum(len(header.shard(int(n))) for n in np.flatnonzero(done))
    bar = tqdm(
        total=header.examples,
        initial=already,
        unit=" examples",
        unit_scale=True,
        desc=f"embed {header.side}",
        disable=not is_primary(),
        mininterval=0.5,
    )
    # Each process computes alone, so JAX's common stop of training does not apply; `_together` agrees on a
    # stop.
    with StopSignal(alone=True) as stop, bar:
        for number in mine:
            _write_shard(
                writer, folder / header.shard_name(number), header.shard(number), stop, bar
            )
        # Slower processes call the collective after each batch, so this process must answer until they end.
        busy = True
        while busy:
            stopped, busy = _together(stopped=stop.received, busy=False)
            _raise_if(stopped)
    return not len(missing)


def _write_shard(
    writer: FeatureWriter, path: AnyPath, examples: range, stop: StopSignal, bar: "tqdm[Any]"
) -> None:
    try:
        with ShardWriter(path) as shard:
            for record in writer.records(examples):
                if record is None:
                    _raise_if(_together(stopped=stop.received, busy=True)[0])
                    continue
                shard.add(record)
                # The bar assumes equal progress in all processes. The bound keeps it from passing the total.
                bar.update(min(jax.process_count(), bar.total - bar.n))
    except jax.errors.JaxRuntimeError as error:
        # XLA says only in the text of its error that memory was too small.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"The devices have too little memory for {writer.rows} rows at once; lower --batch_size."
        ) from error


def _raise_if(stopped: bool) -> None:
    if stopped:
        raise Preempted(
            "Stopped by SIGTERM; complete shards are saved. To resume, run the same command again."
        )
