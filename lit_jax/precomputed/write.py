"""The features of a locked tower written to disk: each process on its own devices, with shards of its own."""

import collections
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

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
    remove_unfinished,
    shard_counts,
)
from lit_jax.precomputed.tower import Batch, run_tower
from lit_jax.trees import Tree

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureWriter:
    """A writer of the features of a data set, in one process.

    Attributes:
        inputs: the maker of the tower's inputs.
        params: those of the tower, in the dtype of the computation, and the scalars beside the towers, which
            Flax asks for whatever is computed.
        mesh: over devices of this process alone.
        rows: the rows of a batch, a multiple of the mesh's devices.
        threads: that read the data.
    """

    source: Source
    inputs: ImagePreprocessor | TextPreprocessor
    module: DualEncoderModule
    params: Tree
    mesh: jax.sharding.Mesh
    side: Side
    rows: int
    threads: int

    def write(self, folder: Path, header: Header, max_bad_fraction: float) -> Counts:
        """Write the shards that are not in `folder` yet; return when all processes have written theirs.

        Raises UserError on a folder of other embeddings and where too many samples are bad, and Preempted
        after SIGTERM; shards that are not whole are then lost.
        """
        _open_folder(folder, header)
        _write_missing(self, folder, header)
        return _close_folder(folder, header, max_bad_fraction)

    def records(self, examples: range) -> Iterator[np.ndarray | BadSampleError | None]:
        """Yield the features of each example, in order, or why it has none; None after each batch."""
        # For each example the number of rows that are still to come, or the reason why it has none.
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
        # Bad examples behind the last row.
        yield from (unit for unit in units if isinstance(unit, BadSampleError))

    def _batches(
        self, examples: range, units: collections.deque[int | BadSampleError]
    ) -> Iterator[list[Any]]:
        """Yield the inputs of at most `rows` rows; fill `units` with the examples they belong to."""
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
        padded = rows + rows[-1:] * (self.rows - len(rows))
        return {**self.inputs.collate(padded), "index": index}


@dataclasses.dataclass(frozen=True)
class _ReadAll:
    """A map from a position in the source to all rows of the example, or to the reason why it has none."""

    source: Source
    inputs: ImagePreprocessor | TextPreprocessor

    def __call__(self, index: int) -> list[Any] | BadSampleError:
        # The key, until the example tells its own.
        key = f"number {index}"
        try:
            example = self.source[index]
            key = example["key"]
            return self.inputs.variants(index, example)
        except BadSampleError as reason:
            log.warning("Bad sample %s has no embedding: %s.", key, reason)
            return reason


def check_free(folder: Path) -> None:
    """Raise UserError if a folder holds something else than embeddings."""
    with output_errors(folder):
        if folder.exists() and any(folder.iterdir()) and not (folder / STARTED).exists():
            raise UserError(f"{folder} holds something else; choose another --output.")


def _open_folder(folder: Path, header: Header) -> None:
    """Make the folder, or find it with the same header. Raise UserError if it has another one."""
    started = folder / STARTED
    with output_errors(folder):
        if started.exists():
            try:
                found = dict(parse_json(started.read_bytes()))
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{started} is damaged ({error}), and nothing else says what {folder} holds; remove the "
                    "folder or choose another --output."
                ) from error
            changed = [k for k, v in dataclasses.asdict(header).items() if found.get(k) != v]
            if changed:
                raise UserError(
                    f"{folder} holds embeddings that differ in {', '.join(changed)}; choose another --output."
                )
    # All processes have looked before one writes.
    _together()
    with output_errors(folder):
        if is_primary() and not started.exists():
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(started, json.dumps(dataclasses.asdict(header), indent=2) + "\n")


def _close_folder(folder: Path, header: Header, max_bad_fraction: float) -> Counts:
    """Write the manifest, when all shards are there."""
    counts = sum((shard_counts(folder, header, n) for n in range(header.shards)), Counts())
    if (fraction := counts.bad / header.examples) > max_bad_fraction:
        raise UserError(
            f"{counts.bad} of {header.examples} samples are bad ({fraction:.1%}); fix the data and choose "
            "another --output, or raise config.data.max_bad_fraction."
        )
    if is_primary():
        manifest = dataclasses.asdict(header) | dataclasses.asdict(counts)
        with output_errors(folder):
            atomic_write(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
            remove_unfinished(folder)
    return counts


def _together(*, stopped: bool = False, busy: bool = False) -> tuple[bool, bool]:
    """Return whether any process is to stop, and whether any has work left; all must ask equally often."""
    if jax.process_count() == 1:
        return stopped, busy
    all_Nx2 = np.asarray(multihost_utils.process_allgather(np.array([stopped, busy])))
    return bool(all_Nx2[:, 0].any()), bool(all_Nx2[:, 1].any())


def _write_missing(writer: FeatureWriter, folder: Path, header: Header) -> None:
    done = np.array(complete_shards(folder, header))
    if jax.process_count() > 1:
        # The other processes may see an older state of the folder.
        done = multihost_utils.broadcast_one_to_all(done).astype(bool)
    missing = np.flatnonzero(~done)
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
    with StopSignal(alone=True) as stop, bar:
        for number in mine:
            _write_shard(
                writer, folder / header.shard_name(number), header.shard(number), stop, bar
            )
        # Other processes may still ask each other after each batch, and wait for this one's answer.
        busy = True
        while busy:
            stopped, busy = _together(stopped=stop.received, busy=False)
            _raise_if(stopped)


def _write_shard(
    writer: FeatureWriter, path: Path, examples: range, stop: StopSignal, bar: "tqdm[Any]"
) -> None:
    with output_errors(path.parent):
        shard = ShardWriter(path)
    complete = False
    try:
        for record in writer.records(examples):
            if record is None:
                _raise_if(_together(stopped=stop.received, busy=True)[0])
                continue
            with output_errors(path.parent):
                shard.add(record)
            # The others are about as far, but their shards may be shorter.
            bar.update(min(jax.process_count(), bar.total - bar.n))
        complete = True
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"The devices have too little memory for {writer.rows} rows at once; give a smaller --batch_size."
        ) from error
    finally:
        with output_errors(path.parent):
            shard.close(complete=complete)


def _raise_if(stopped: bool) -> None:
    if stopped:
        raise Preempted(
            "Stopped by SIGTERM; whole shards are saved, run the same command again to go on."
        )
