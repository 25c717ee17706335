"""A locked tower over a whole data set: each process on its own devices, each with shards of its own."""

import collections
import dataclasses
import functools
import itertools
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from lit_jax.config import Config
from lit_jax.data.example import BadSampleError, Source
from lit_jax.data.mixture import open_training_data
from lit_jax.data.readers import Captions, Pixels
from lit_jax.distributed.finite import check_rows
from lit_jax.distributed.mesh import BATCH, global_batch, make_mesh
from lit_jax.distributed.process import is_primary
from lit_jax.errors import Preempted, UserError
from lit_jax.files import parse_json, write_whole, writing_output
from lit_jax.models.dual_encoder import DualEncoderModule, Side, tower_name
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
from lit_jax.training.from_embeddings import check_locked, describe, tower_fingerprint
from lit_jax.training.model_factory import Setup, find_towers, first_parameters, prepare
from lit_jax.training.policy import merge
from lit_jax.training.preemption import StopSignal
from lit_jax.training.tokenizing import check_captions
from lit_jax.trees import Tree

log = logging.getLogger(__name__)

ROWS_PER_DEVICE = 64


def embed(config: Config, folder: Path, side: Side, *, batch_size: int | None = None) -> Counts:
    """Embeds config.data.train with the locked tower of that side into `folder`, or goes on there.

    All processes work on shards of their own, with a copy of the tower each: no process waits for another
    one's images, and any number of them may go on.

    Args:
        batch_size: rows a step of this process; 64 for each of its devices if not given.

    Raises UserError on bad input, also where too many samples are bad, and Preempted after SIGTERM; shards
    that are not whole are then lost.
    """
    _check_free(folder)  # before the weights: this error should not take minutes
    # Only the tower's own axis is asked for, as far as it fits into this process.
    devices = jax.local_devices()
    fsdp = math.gcd(config.mesh.fsdp, len(devices))
    mesh = make_mesh(dataclasses.replace(config.mesh, data=-1, fsdp=fsdp), devices)
    source = open_training_data(config.data)
    towers = find_towers(config.model)
    setup = prepare(config, towers, mesh)
    check_locked(setup, side, "python -m lit_jax.embed")
    if side == "text":
        check_captions(setup.tokenizer, source)
    if side == "image" and config.data.views is None and setup.image_transform.is_random:
        raise UserError(
            "The config augments the images; say with --views=K how many views of each are to be embedded."
        )
    header = describe(config, setup, source, side, config.data.views or 1)
    with jax.set_mesh(mesh):
        params = _tower(setup, side, merge(*first_parameters(config, setup, towers)))
        header = dataclasses.replace(header, tower=tower_fingerprint(setup, side, params))
    _open_folder(folder, header)
    rows = -(-(batch_size or ROWS_PER_DEVICE * mesh.size) // mesh.size) * mesh.size
    sweep = _Sweep(
        source=source,
        inputs=setup.inputs(config.data)[side],
        module=setup.module,
        params=params,
        mesh=mesh,
        side=side,
        rows=rows,
        threads=config.data.threads,
    )
    _embed_missing(sweep, folder, header)
    return _close_folder(folder, header, config.data.max_bad_fraction)


def _tower(setup: Setup, side: Side, params: Tree) -> dict[str, Any]:
    """The tower's parameters in the dtype in which the train step has them, and the scalars, which Flax asks
    for whatever is computed.
    """
    needed = {k: v for k, v in params.items() if k == tower_name(side) or isinstance(v, jax.Array)}
    abstract = {name: setup.abstract[name] for name in needed}
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), needed, abstract)


def _check_free(folder: Path) -> None:
    with writing_output(folder):
        if folder.exists() and any(folder.iterdir()) and not (folder / STARTED).exists():
            raise UserError(f"{folder} holds something else; choose another --output.")


def _open_folder(folder: Path, header: Header) -> None:
    """Makes the folder that of these embeddings, unless it is that of others."""
    started = folder / STARTED
    with writing_output(folder):
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
    _together()  # all have looked before one writes
    with writing_output(folder):
        if is_primary() and not started.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(started, json.dumps(dataclasses.asdict(header), indent=2) + "\n")


def _close_folder(folder: Path, header: Header, max_bad_fraction: float) -> Counts:
    """Writes the manifest when all shards are there."""
    counts = sum((shard_counts(folder, header, n) for n in range(header.shards)), Counts())
    if (fraction := counts.bad / header.examples) > max_bad_fraction:
        raise UserError(
            f"{counts.bad} of {header.examples} samples are bad ({fraction:.1%}); fix the data and choose "
            "another --output, or raise config.data.max_bad_fraction."
        )
    if is_primary():
        manifest = dataclasses.asdict(header) | dataclasses.asdict(counts)
        with writing_output(folder):
            write_whole(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
            remove_unfinished(folder)
    return counts


def _together(*, stopped: bool = False, busy: bool = False) -> tuple[bool, bool]:
    """Whether any process is to stop, and whether any has work left; all must ask equally often."""
    if jax.process_count() == 1:
        return stopped, busy
    all_Nx2 = np.asarray(multihost_utils.process_allgather(np.array([stopped, busy])))
    return bool(all_Nx2[:, 0].any()), bool(all_Nx2[:, 1].any())


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sweep:
    """What a process needs to embed a range of examples."""

    source: Source
    inputs: Pixels | Captions
    module: DualEncoderModule
    params: Tree
    mesh: jax.sharding.Mesh
    side: Side
    rows: int
    threads: int

    def records(self, examples: range) -> Iterator[np.ndarray | BadSampleError | None]:
        """The rows of each example, in order, or why it has none; None after each batch.

        A batch is fetched when the next one has been started, so that the devices do not wait for the host.
        """
        units: collections.deque[int | BadSampleError] = (
            collections.deque()
        )  # rows still to come, or a reason
        ready: list[np.ndarray] = []
        outputs = ((self._pool(batch), len(batch)) for batch in self._batches(examples, units))
        pairs = itertools.pairwise(itertools.chain(outputs, [None]))
        for output, _ in pairs:
            assert output is not None
            (pooled_BxP, finite_B), count = jax.device_get(output[0]), output[1]
            with jax.set_mesh(self.mesh):
                check_rows(finite_B[:count], self.side, self.params)
            ready.extend(pooled_BxP[:count])
            while units and (isinstance(units[0], BadSampleError) or units[0] <= len(ready)):
                unit = units.popleft()
                if isinstance(unit, int):
                    yield np.stack(ready[:unit])
                    del ready[:unit]
                else:
                    yield unit
            yield None
        yield from (
            unit for unit in units if isinstance(unit, BadSampleError)
        )  # behind the last row

    def _batches(
        self, examples: range, units: collections.deque[int | BadSampleError]
    ) -> Iterator[list[Any]]:
        """The inputs of at most `rows` rows; `units` gets what they belong to."""
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

    def _pool(self, rows: list[Any]) -> tuple[jax.Array, jax.Array]:
        padded = rows + rows[-1:] * (self.rows - len(rows))
        with jax.set_mesh(self.mesh):
            batch = global_batch(self.inputs.collate(padded), self.mesh)
            return _pool(self.params, batch, self.module, f"pool_{self.side}")


@functools.partial(jax.jit, static_argnames=("module", "method"))
def _pool(
    params: Tree, batch: dict[str, jax.Array], module: DualEncoderModule, method: str
) -> tuple[jax.Array, jax.Array]:
    """Compute what the tower pools of each row, and whether it is finite."""
    inputs: dict[str, Any] = batch
    pooled_BxP: Any = module.apply({"params": params}, **inputs, method=method)
    finite_B = jnp.isfinite(pooled_BxP).all(axis=1)
    return jax.lax.with_sharding_constraint((pooled_BxP, finite_B), BATCH)


@dataclasses.dataclass(frozen=True)
class _ReadAll:
    """From a position in the source to all rows of the example, or the reason why it has none."""

    source: Source
    inputs: Pixels | Captions

    def __call__(self, index: int) -> list[Any] | BadSampleError:
        key = f"number {index}"  # until it is known
        try:
            example = self.source[index]
            key = example["key"]
            return self.inputs.all(index, example)
        except BadSampleError as reason:
            log.warning("Bad sample %s has no embedding: %s.", key, reason)
            return reason


def _embed_missing(sweep: _Sweep, folder: Path, header: Header) -> None:
    """Writes the shards that are not there; returns when all processes have written theirs."""
    done = np.array(complete_shards(folder, header))
    if jax.process_count() > 1:  # what the others see may be older
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
            _write_shard(sweep, folder / header.shard_name(number), header.shard(number), stop, bar)
        busy = True
        while busy:  # others are asking, too
            stopped, busy = _together(stopped=stop.received, busy=False)
            _raise_if(stopped)


def _write_shard(
    sweep: _Sweep, path: Path, examples: range, stop: StopSignal, bar: "tqdm[Any]"
) -> None:
    with writing_output(path.parent):
        writer = ShardWriter(path)
    complete = False
    try:
        for record in sweep.records(examples):
            if record is None:
                _raise_if(_together(stopped=stop.received, busy=True)[0])
                continue
            with writing_output(path.parent):
                writer.add(record)
            # The others are about as far, but their shards may be shorter.
            bar.update(min(jax.process_count(), bar.total - bar.n))
        complete = True
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"The devices have too little memory for {sweep.rows} rows at once; give a smaller --batch_size."
        ) from error
    finally:
        with writing_output(path.parent):
            writer.close(complete=complete)


def _raise_if(stopped: bool) -> None:
    if stopped:
        raise Preempted(
            "Stopped by SIGTERM; whole shards are saved, run the same command again to go on."
        )
