"""Turn any source into sharded ArrayRecord.

    python -m lit_jax.data.convert --source.path=DATA --output=DIR

DIR is then itself a source. Images keep their bytes; bad samples are left out and listed in DIR/bad.jsonl.
To resume an interrupted conversion, run the same command again. Exit codes: 0 done, 2 bad input.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import io
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image
from tqdm import tqdm

from lit_jax.buckets import AnyPath, check_access
from lit_jax.cli import KeyFlags, Parser, add_path, command, get_words, set_key, unknown_flag
from lit_jax.config import SourceConfig, parse_as
from lit_jax.data.example import BadSampleError, Example, Source
from lit_jax.data.image import decode, file_content
from lit_jax.data.makers import make_missing
from lit_jax.data.sources import open_source, records
from lit_jax.data.workers import start_worker
from lit_jax.errors import UserError
from lit_jax.files import atomic_path, atomic_write, output_errors, parse_json

SOURCE = KeyFlags("source", SourceConfig)
PLAN_FILE = "convert.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The parameters of a conversion, which determine every byte of the output and can be pickled."""

    # The SourceConfig as JSON: the text is hashable, so it can key the cache of `_source`.
    source: str
    # True if examples may lack an image.
    text_only: bool
    examples: int
    # Positions of the source in a shard. Bad samples count, so that the shards' bounds are known in advance.
    shard_size: int

    @property
    def shards(self) -> int:
        """The number of shards."""
        return math.ceil(self.examples / self.shard_size)

    def shard_name(self, shard: int) -> str:
        """Return the file name of a shard, numbered from 0."""
        return f"data-{shard:05}-of-{self.shards:05}.array_record"

    def positions(self, shard: int) -> range:
        """Return the positions of the source that a shard covers."""
        return range(self.examples)[shard * self.shard_size : (shard + 1) * self.shard_size]


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process."""
    parser = Parser("lit_jax.data.convert", __doc__)
    add_path(parser, "--output", required=True, help="folder to write")
    parser.add_argument(
        "--text_only", action="store_true", help="texts for teacher learning, without images"
    )
    parser.add_argument(
        "--shard_size", type=int, default=10_000, help="examples per file (default: 10000)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument(
        "--runner",
        help="runner of Apache Beam, used instead of --workers; it gets the flags that are "
        "not listed here",
    )
    pairs, words = SOURCE.split(get_words(argv))
    args, beam_flags = parser.parse_known(words)
    if beam_flags and not args.runner:
        raise UserError(unknown_flag(beam_flags[0], parser.flags, SOURCE))
    for name in ("shard_size", "workers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1.")
    raw: dict[str, Any] = {}
    for key, text in pairs:
        set_key(raw, SOURCE, key, text)
    source = parse_as(SourceConfig, raw, SOURCE.name)
    if source.weight is not None:
        raise UserError("source.weight has a meaning only in a mixture; leave it out.")
    make_missing([source])
    # Checked before the source is opened, which may list millions of files.
    check_access(args.output)
    plan = make_plan(source, args.shard_size, text_only=args.text_only)
    with output_errors(args.output):
        _enter(args.output, plan)
        there = {file.name for file in args.output.iterdir()}
    todo = [n for n in range(plan.shards) if not _is_done(args.output / plan.shard_name(n), there)]
    if args.runner:
        _run_beam(plan, args.output, todo, args.runner, beam_flags)
    else:
        _run_processes(plan, args.output, todo, args.workers)
    with output_errors(args.output):
        summary = _finish(plan, args.output)
    print(summary)


def make_plan(source: SourceConfig, shard_size: int, *, text_only: bool = False) -> Plan:
    """Open the source, count its examples, and return the plan of its conversion."""
    text = json.dumps(dataclasses.asdict(source))
    examples = len(_source(text, text_only))
    return Plan(source=text, text_only=text_only, examples=examples, shard_size=shard_size)


@functools.lru_cache(maxsize=1)
def _source(text: str, text_only: bool) -> Source:
    """Open the source, once in each process.

    An open source holds its index, which may be larger than a shard, so the source is not sent with each.
    """
    source = parse_as(SourceConfig, parse_json(text), SOURCE.name)
    return open_source(source, text_only=text_only)


def _enter(folder: AnyPath, plan: Plan) -> None:
    """Create the output folder with its plan, or check that the folder belongs to the same conversion."""
    file = folder / PLAN_FILE
    wanted = json.dumps(dataclasses.asdict(plan), indent=1)
    if not file.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(
                f"{folder} already holds other files; give an empty folder as --output."
            )
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(file, wanted)
    # Shards of two different plans would mix two data sets, or repeat examples.
    elif file.read_text(encoding="utf-8") != wanted:
        raise UserError(
            f"{folder} was started with another source or shard size (see {file}); give the same again, or "
            "choose another --output."
        )


def _is_done(shard: AnyPath, there: Collection[str]) -> bool:
    """Return whether both a shard and its list of bad samples are among the names `there`.

    A shard gets its name only when it is complete, so it is not opened again. A shard without its list, as a
    copy by `cp out/* copy` leaves it, has an unknown number of records, and the reasons of its bad samples
    are lost, so it is converted again.
    """
    return shard.name in there and _bad_file(shard).name in there


def convert_shard(plan: Plan, folder: AnyPath, shard: int) -> int:
    """Write one shard, as a whole or not at all, and return the number of positions that it covers.

    The shard's list of bad samples is written before the shard, so that an existing shard always has one.
    """
    source, bad, good = _source(plan.source, plan.text_only), [], 0
    file = folder / plan.shard_name(shard)
    with output_errors(folder), atomic_path(file) as new:
        writer = ArrayRecordWriter(str(new), records.WRITER_OPTIONS)
        for position in plan.positions(shard):
            key = f"{position}"
            try:
                example = source[position]
                key = example["key"]
                record = records.encode(_self_contained(example))
            except BadSampleError as reason:
                row = {"position": position, "key": key, "kind": reason.kind}
                bad.append(json.dumps({**row, "reason": str(reason)}))
            else:
                writer.write(record)
                good += 1
        writer.close()
        # The file is read back before it gets its name, so that a shard is never short of records.
        if (found := _count(new)) != good:
            raise UserError(
                f"{file} holds {found} of the {good} records that were written; check the disk of --output, "
                "and run the same command again, which resumes."
            )
        # Written even if it is empty, since an interrupted attempt may have left a list although the data
        # have been repaired since. The list is replaced and never removed, since `_finish` of another process
        # may read it now.
        atomic_write(_bad_file(file), "".join(f"{line}\n" for line in bad))
    return len(plan.positions(shard))


def _self_contained(example: Example) -> Example:
    """Return the example with the bytes of its image in the place of a path. Pixels become a PNG.

    Raises BadSampleError if the image cannot be decoded, or if there is neither an image nor a caption.
    """
    image = example["image"]
    if image is None:
        if not any(map(str.strip, example["captions"])):
            raise BadSampleError("neither an image nor a caption", "missing")
        return example
    # Pixels come without a file, and PNG stores them without loss.
    if isinstance(image, np.ndarray):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        return {**example, "image": buffer.getvalue()}
    # A JPEG keeps its bytes: encoding it again would lose quality and time.
    content = image if isinstance(image, bytes) else file_content(image)
    # The pixels are thrown away: an image that cannot be decoded must not reach the shard.
    decode(content)
    return {**example, "image": content}


def _run_processes(plan: Plan, folder: AnyPath, todo: Sequence[int], workers: int) -> None:
    done = plan.examples - sum(len(plan.positions(shard)) for shard in todo)
    convert = functools.partial(convert_shard, plan, folder)
    with tqdm(total=plan.examples, initial=done, unit=" examples", unit_scale=True) as progress:
        for count in _each(convert, todo, min(workers, len(todo))):
            progress.update(count)


def _each(convert: Callable[[int], int], todo: Sequence[int], workers: int) -> Iterator[int]:
    if workers <= 1:
        yield from map(convert, todo)
        return
    # Spawned, because a forked process could inherit a lock that another thread holds.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=start_worker
    ) as pool:
        futures = [pool.submit(convert, shard) for shard in todo]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BaseException:
            # The pool would otherwise finish every shard before the error or Ctrl-C takes effect. A killed
            # worker loses only its unfinished shard, which the next attempt writes anew.
            for future in futures:
                future.cancel()
            for process in multiprocessing.active_children():
                process.kill()
            raise


def _run_beam(
    plan: Plan, folder: AnyPath, todo: Sequence[int], runner: str, flags: Sequence[str]
) -> None:
    """Convert the shards on a cluster whose machines see the source and the folder under the same paths."""
    try:
        import apache_beam as beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options import pipeline_options  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise UserError(
            "--runner needs Apache Beam; run pip install -r requirements-beam.txt in a separate "
            "environment."
        ) from error
    with beam.Pipeline(runner, pipeline_options.PipelineOptions(list(flags))) as pipeline:
        # The reshuffle keeps Beam from fusing both steps, which would put all shards on one machine.
        shards = pipeline | beam.Create(todo) | beam.Reshuffle()
        _ = shards | beam.Map(functools.partial(convert_shard, plan, folder.absolute()))


def _finish(plan: Plan, folder: AnyPath) -> str:
    """Write bad.jsonl and the manifest, remove temporary files, and return a summary for the user."""
    files = [folder / plan.shard_name(shard) for shard in range(plan.shards)]
    # Each shard has a list of its own, since the shards are written by different processes. A bucket takes
    # long for one answer, but gives many at a time.
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        reports = [*pool.map(_lines, map(_bad_file, files))]
    # All positions of a shard but the bad ones are in it, as `convert_shard` has checked.
    shards = [
        records.Shard(file.name, len(plan.positions(shard)) - len(report))
        for shard, (file, report) in enumerate(zip(files, reports, strict=True))
    ]
    bad = [line for report in reports for line in report]
    good = sum(shard.count for shard in shards)
    atomic_write(folder / records.BAD_FILE, "".join(f"{line}\n" for line in bad))
    if not good:
        raise UserError(
            f"None of the {plan.examples} examples can be used; see {folder / records.BAD_FILE} for the "
            "reasons."
        )
    # The manifest comes last among the outputs: a folder with a manifest is a complete source.
    records.write_manifest(folder, shards)
    # Interrupted attempts leave temporary files behind.
    for rest in folder.glob(".*.new"):
        rest.unlink()
    kinds = collections.Counter(parse_json(line)["kind"] for line in bad)
    lines = [f"Wrote {good} examples in {len(shards)} shards to {folder}"]
    if bad:
        lines.append(
            f"{len(bad)} bad samples were left out, listed in {folder / records.BAD_FILE}:"
        )
        lines += [f"{count:8}  {kind}" for kind, count in kinds.most_common()]
    return "\n".join(lines)


def _lines(file: AnyPath) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def _count(file: Path) -> int:
    reader = ArrayRecordReader(str(file))
    try:
        return reader.num_records()
    finally:
        reader.close()


def _bad_file(shard: AnyPath) -> AnyPath:
    return shard.with_name(f".{shard.name}.bad")


if __name__ == "__main__":
    sys.exit(main())
