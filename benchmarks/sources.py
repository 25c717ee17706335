"""Samples a second from each kind of source, and images a second of a conversion, against bare loops.

    python -m benchmarks.sources [--samples=2000] [--repeats=5] [--tiny]   (needs requirements-dev.txt)

Data: as in benchmarks/input_pipeline.py, each of 64 JPEGs many times, with a caption, in a temporary folder;
it stays in the page cache. The bytes of an image are read, and nothing is decoded.

Method: one thread reads all samples in one random order. The peer of a source is the least code that gets the
same image and caption at the same position: `read` of a path, `pread` at a known offset of a tar, a record
and msgpack, a row of the Parquet file that lies in memory, a row of `datasets`. The conversion is that of the
folder, in this process, against a loop that reads, decodes with Pillow and writes the same bytes to one
ArrayRecord. In turn, `repeats` times after a first one. Prints median samples/s on the clock, spread (half
the distance between quartiles), and the ratios source / peer of samples per second of processor time and of
samples per second on the clock.
"""

import io
import json
import os
import random
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import datasets
import msgpack
import pyarrow as pa
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image
from pyarrow import parquet

from benchmarks.flags import read_flags
from benchmarks.input_pipeline import make_data
from benchmarks.timing import in_turn
from lit_jax.config import SourceConfig
from lit_jax.data.convert import convert_shard, make_plan
from lit_jax.data.sources import CAPTIONS_FILE, open_source, records

IMAGES = 64
# Rows, as docs/data.md advises.
ROW_GROUP = 100

Read = Callable[[int], tuple[bytes, str]]


def main() -> None:
    args = read_flags(__doc__, samples=2000, repeats=5, tiny=False)
    count = 2 * IMAGES if args.tiny else args.samples
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = root / "pairs"
        folder.mkdir()
        make_data(folder, IMAGES, count)
        lines = (folder / CAPTIONS_FILE).read_text().splitlines()
        pairs = [
            ((folder / row["image"]).read_bytes(), row["caption"]) for row in map(json.loads, lines)
        ]
        print(f"{'':22}  samples/s         ratio of cpu  of clock")
        for name, write in WRITERS.items():
            peer = write(root / name, folder, pairs)
            report(name, count, args.repeats, peer, open_reader(root / name))
        plan = make_plan(source_config(folder), count)
        loop = partial(convert_in_a_loop, folder, lines, root / "loop.array_record")
        compare("conversion", count, args.repeats, loop, partial(convert_shard, plan, root, 0))


def source_config(path: Path) -> SourceConfig:
    """Return the source at `path` with an example for each row, since rows repeat the same few images."""
    return SourceConfig(path=str(path), group_captions=False)


def open_reader(path: Path) -> Read:
    source = open_source(source_config(path))

    def read(index: int) -> tuple[bytes, str]:
        example = source[index]
        image = example["image"]
        return image if isinstance(image, bytes) else image.read_bytes(), example["captions"][0]

    return read


def report(name: str, count: int, repeats: int, peer: Read, ours: Read) -> None:
    order = random.Random(0).sample(range(count), count)
    assert list(map(peer, order[:100])) == list(map(ours, order[:100])), name
    compare(name, count, repeats, partial(read_all, peer, order), partial(read_all, ours, order))


def read_all(read: Read, order: Iterable[int]) -> int:
    """Return the bytes of the images."""
    return sum(len(read(index)[0]) for index in order)


def compare(name: str, count: int, repeats: int, peer: Callable, ours: Callable) -> None:
    times = in_turn({"peer": peer, "lit_jax": ours}, repeats)
    for who, of_contender in times.items():
        ratio, clock_ratio = (
            times["peer"].cpu / of_contender.cpu,
            times["peer"].wall / of_contender.wall,
        )
        label, rate = f"{name}, {who}", count / of_contender.wall
        print(
            f"{label:22} {rate:10.0f} ±{of_contender.spread:4.0%} {ratio:12.2f} {clock_ratio:9.2f}",
            flush=True,
        )


def write_folder(path: Path, folder: Path, pairs: list[tuple[bytes, str]]) -> Read:
    path.symlink_to(folder)
    lines = (path / CAPTIONS_FILE).read_bytes().splitlines()

    def read(index: int) -> tuple[bytes, str]:
        row = json.loads(lines[index])
        return (path / row["image"]).read_bytes(), row["caption"]

    return read


def write_tar(path: Path, folder: Path, pairs: list[tuple[bytes, str]]) -> Read:
    path.mkdir()
    file = path / "00000.tar"
    with tarfile.open(file, "w") as tar:
        for i, (image, caption) in enumerate(pairs):
            for ending, content in (("jpg", image), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{i:09}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with tarfile.open(file) as tar:
        spans = [(member.offset_data, member.size) for member in tar]
    descriptor = os.open(file, os.O_RDONLY)

    def read(index: int) -> tuple[bytes, str]:
        (image, size), (text, length) = spans[2 * index : 2 * index + 2]
        return os.pread(descriptor, size, image), os.pread(descriptor, length, text).decode()

    return read


def write_parquet(path: Path, folder: Path, pairs: list[tuple[bytes, str]]) -> Read:
    path.mkdir()
    images, captions = zip(*pairs, strict=True)
    table = pa.table({"image": images, "caption": captions})
    parquet.write_table(table, path / "all.parquet", row_group_size=ROW_GROUP)
    with parquet.ParquetFile(path / "all.parquet") as opened:
        groups = [opened.read_row_group(group) for group in range(opened.num_row_groups)]

    def read(index: int) -> tuple[bytes, str]:
        group, row = groups[index // ROW_GROUP], index % ROW_GROUP
        return group["image"][row].as_py(), group["caption"][row].as_py()

    return read


def write_datasets(path: Path, folder: Path, pairs: list[tuple[bytes, str]]) -> Read:
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    rows = {"image": [{"bytes": image, "path": None} for image, _ in pairs]}
    rows["caption"] = [caption for _, caption in pairs]
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(path)
    saved = datasets.load_from_disk(path).cast_column("image", datasets.Image(decode=False))

    def read(index: int) -> tuple[bytes, str]:
        row = saved[index]
        return row["image"]["bytes"], row["caption"]

    return read


def write_records(path: Path, folder: Path, pairs: list[tuple[bytes, str]]) -> Read:
    path.mkdir()
    plan = make_plan(source_config(folder), len(pairs))
    convert_shard(plan, path, 0)
    records.write_manifest(path, [records.Shard(plan.shard_name(0), len(pairs))])
    reader = ArrayRecordReader(str(path / plan.shard_name(0)), "readahead_buffer_size:0")

    def read(index: int) -> tuple[bytes, str]:
        (record,) = reader.read([index])
        row = msgpack.unpackb(record)
        return row["image"], row["captions"][0]

    return read


WRITERS = {
    "folder": write_folder,
    "tar": write_tar,
    "parquet": write_parquet,
    "datasets": write_datasets,
    "records": write_records,
}


def convert_in_a_loop(folder: Path, lines: Iterable[str], file: Path) -> None:
    writer = ArrayRecordWriter(str(file), records.WRITER_OPTIONS)
    for line in lines:
        row = json.loads(line)
        content = (folder / row["image"]).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.convert("RGB")
        writer.write(msgpack.packb(row | {"image": content}))
    writer.close()


if __name__ == "__main__":
    main()
