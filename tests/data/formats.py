"""Seven pairs in every format, written by the tools that people use for it."""

import csv
import io
import json
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet

from lit_jax.data.example import Example
from lit_jax.data.sources import records

CAPTIONS = (
    "ein Hund läuft",
    "犬が走る",
    "كلب يجري",
    "कुत्ता दौड़ता है",
    "un cafe\u0301",
    "👩‍👧 and a dog",
    'a "quoted", tall\tdog',
)
N = len(CAPTIONS)
CLASSES = ("cat", "犬")


def flat(caption: str) -> str:
    """What a format without quoting can hold."""
    return caption.replace("\t", " ")


def add(tar: tarfile.TarFile, name: str, content: bytes, **about) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in about.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def write_files(folder: Path, images) -> None:
    for i, image in enumerate(images):
        (folder / f"{i}.png").write_bytes(image)


def write_tars(folder: Path, images) -> None:
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i in range(shard * 4, min(shard * 4 + 4, N)):
                about = {"caption": CAPTIONS[i], "key": f"{i:09}", "status": "success"}
                add(tar, f"{i:09}.jpg", images[i])
                add(tar, f"{i:09}.json", json.dumps(about).encode())
                add(tar, f"{i:09}.txt", CAPTIONS[i].encode())
                add(tar, f"{i:09}.cls", str(i % 2).encode())
        # img2dataset leaves these beside each tar.
        parquet.write_table(pa.table({"key": ["a"]}), folder / f"{shard:05}.parquet")
        (folder / f"{shard:05}_stats.json").write_text("{}")


def write_jsonl(folder: Path, images) -> None:
    write_files(folder, images)
    rows = [{"image": f"{i}.png", "caption": CAPTIONS[i], "label": i % 2} for i in range(N)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(folder: Path, images) -> None:
    write_files(folder, images)
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "label"])
        writer.writerows([f"{i}.png", CAPTIONS[i], i % 2] for i in range(N))


def write_tsv(folder: Path, images) -> None:
    """As Conceptual Captions: no names of columns."""
    write_files(folder, images)
    lines = "".join(f"{flat(CAPTIONS[i])}\t{i}.png\n" for i in range(N))
    (folder / "train.tsv").write_text(lines, encoding="utf-8")


def write_parquet(folder: Path, images) -> None:
    for shard, rows in enumerate((range(4), range(4, N))):
        table = pa.table(
            {
                "image": [{"bytes": images[i], "path": None} for i in rows],
                "caption": [CAPTIONS[i] for i in rows],
                "label": [i % 2 for i in rows],
                "unused": [0] * len(rows),
            }
        )
        parquet.write_table(table, folder / f"train-{shard:05}.parquet", row_group_size=2)


def make_datasets(images) -> datasets.Dataset:
    features = datasets.Features(
        image=datasets.Image(),
        caption=datasets.Value("string"),
        label=datasets.ClassLabel(names=list(CLASSES)),
    )
    rows = {
        "image": [{"bytes": image, "path": None} for image in images],
        "caption": list(CAPTIONS),
        "label": [i % 2 for i in range(N)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def write_datasets(folder: Path, images) -> None:
    make_datasets(images).save_to_disk(folder, num_shards=2)


def write_records(folder: Path, images) -> None:
    shards = []
    for shard, rows in enumerate((range(4), range(4, N))):
        shards.append(records.Shard(f"{shard}.array_record", len(rows)))
        writer = ArrayRecordWriter(str(folder / shards[-1].name), records.WRITER_OPTIONS)
        for i in rows:
            example = Example(
                key=str(i), image=images[i], captions=(CAPTIONS[i],), label=str(i % 2)
            )
            writer.write(records.encode(example))
        writer.close()
    records.write_manifest(folder, shards)


def write_coco(folder: Path, images) -> None:
    for name in ("annotations", "val2017"):
        (folder / name).mkdir()
    write_files(folder / "val2017", images)
    content = {
        "images": [{"id": 100 + i, "file_name": f"{i}.png"} for i in range(N)],
        "annotations": [
            {"id": i, "image_id": 100 + i, "caption": CAPTIONS[i]} for i in reversed(range(N))
        ],
    }
    (folder / "annotations/captions_val2017.json").write_text(json.dumps(content))
    (folder / "annotations/instances_val2017.json").write_text("{}")


def write_karpathy(folder: Path, images) -> None:
    (folder / "flickr30k-images").mkdir()
    write_files(folder / "flickr30k-images", images)
    rows = [
        {"filename": f"{i}.png", "split": "test", "sentences": [{"raw": CAPTIONS[i]}]}
        for i in range(N)
    ]
    other = {"filename": "x.png", "split": "train", "sentences": []}
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": [other, *rows]}))


def write_flickr(folder: Path, images) -> None:
    write_files(folder, images)
    lines = "".join(f"{i}.png#0\t{flat(CAPTIONS[i])}\n" for i in range(N))
    (folder / "results_20130124.token").write_text(lines, encoding="utf-8")


def write_classes(folder: Path, images) -> None:
    for i, image in enumerate(images):
        (folder / "val" / CLASSES[i % 2]).mkdir(parents=True, exist_ok=True)
        (folder / "val" / CLASSES[i % 2] / f"{i}.PNG").write_bytes(image)
    (folder / "val/readme.txt").write_text("no image")


NAMES, IDS = tuple(CLASSES[i % 2] for i in range(N)), tuple(str(i % 2) for i in range(N))
NONE = (None,) * N
FLAT = tuple(map(flat, CAPTIONS))


# name -> (what writes it, split, captions, labels)
FORMATS = {
    "tars": (write_tars, None, CAPTIONS, IDS),
    "jsonl": (write_jsonl, None, CAPTIONS, IDS),
    "csv": (write_csv, None, CAPTIONS, IDS),
    "tsv": (write_tsv, None, FLAT, NONE),
    "parquet": (write_parquet, "train", CAPTIONS, IDS),
    "datasets": (write_datasets, None, CAPTIONS, NAMES),
    "records": (write_records, None, CAPTIONS, IDS),
    "coco": (write_coco, "val2017", CAPTIONS, NONE),
    "karpathy": (write_karpathy, "test", CAPTIONS, NONE),
    "flickr": (write_flickr, None, FLAT, NONE),
    "classes": (write_classes, "val", None, NAMES),
}
