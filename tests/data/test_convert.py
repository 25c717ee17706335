"""The command as a user runs it: on real files, killed, resumed, and on Apache Beam."""

import functools
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from lit_jax.config import SourceConfig
from lit_jax.configs.vit_bert import DIGITS
from lit_jax.data.convert import convert_shard, main, make_plan
from lit_jax.data.example import Example
from lit_jax.data.sources import open_source, records
from lit_jax.errors import UserError
from lit_jax.files import atomic_write
from tests.object_store.served import BUCKET, serve

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(jsonl_folder) -> Path:
    """23 examples, of which 4 (no file), 9 (no image) and 17 (damaged) are bad."""
    rows = [
        {"image": f"{i}.png", "captions": {"en": f"{i}", "ar": "قطة", "th": "แมว"}}
        for i in range(23)
    ]
    rows[4] = {"image": "missing.png", "caption": "4"}
    rows[12] |= {"label": "cat", "teacher_caption": "a cat"}
    rows[13] = {"image": "13.png"}  # an image alone
    folder = jsonl_folder(rows)
    (folder / "9.png").write_bytes(b"<html>404</html>")
    (folder / "17.png").write_bytes((folder / "17.png").read_bytes()[:60])
    return folder


def convert(source: Path | str, output: Path, *flags: str) -> int:
    arguments = [f"--source.path={source}", f"--output={output}", "--workers=1", *flags]
    return main(arguments)


def read(output: Path) -> list[Example]:
    examples = []
    for shard in records.read_manifest(output):
        reader = ArrayRecordReader(str(output / shard.name))
        examples += [records.decode(record) for record in reader.read_all()]
        assert reader.num_records() == shard.count
        reader.close()
    return examples


def contents(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in output.iterdir()}


def test_every_good_example_comes_out_as_it_went_in(folder, tmp_path, capsys):
    output = tmp_path / "out"
    assert convert(folder, output, "--shard_size=10") == 0
    examples = read(output)
    good = [i for i in range(23) if i not in (4, 9, 17)]
    assert [example["key"] for example in examples] == [f"{i}.png" for i in good]
    assert all(e["image"] == (folder / e["key"]).read_bytes() for e in examples)
    assert examples[11 - 2 + 1]["captions"] == ("12", "قطة", "แมว")
    assert examples[10]["languages"] == ("en", "ar", "th")
    assert (examples[10]["label"], examples[10].get("teacher_caption")) == ("cat", "a cat")
    assert examples[11]["captions"] == ()
    bad = [json.loads(line) for line in (output / "bad.jsonl").read_text().splitlines()]
    assert [(row["position"], row["key"]) for row in bad] == [
        (4, "missing.png"),
        (9, "9.png"),
        (17, "17.png"),
    ]
    assert str(folder / "missing.png") in bad[0]["reason"]
    assert bad[1]["reason"] == "not an image"
    said = capsys.readouterr()
    assert re.search(rf"\b20 .*\b3 .*{output}", said.out)
    assert re.search(rf"\b3 .*{output}/bad\.jsonl", said.out)
    assert "       1  not_image" in said.out
    assert "23.0/23.0" in said.err  # the progress bar


def test_texts_without_images_and_pixels_without_files(tmp_path):
    assert convert(DIGITS, tmp_path / "texts", "--source.split=parallel", "--text_only") == 0
    texts = read(tmp_path / "texts")
    assert len(texts) == 560
    assert all(example["image"] is None and len(example["captions"]) == 2 for example in texts)
    assert {example["languages"] for example in texts} == {("en", "de")}


def test_given_again_it_does_nothing_new(folder, tmp_path, capsys):
    output = tmp_path / "out"
    assert convert(folder, output, "--shard_size=10") == 0
    first = contents(output)
    times = {file: file.stat().st_mtime_ns for file in output.glob("data-*")}
    assert convert(folder, output, "--shard_size=10") == 0
    assert contents(output) == first
    assert {file: file.stat().st_mtime_ns for file in output.glob("data-*")} == times


def test_what_is_missing_is_made_again(folder, tmp_path):
    assert convert(folder, tmp_path / "whole", "--shard_size=4") == 0
    plan = make_plan(SourceConfig(path=str(folder)), 4)
    output = tmp_path / "part"
    assert convert(folder, output, "--shard_size=4") == 0
    (output / plan.shard_name(2)).unlink()
    (output / records.MANIFEST).unlink()
    (output / f".{plan.shard_name(2)}.0.new").write_bytes(b"half a shard")
    assert convert(folder, output, "--shard_size=4") == 0
    assert contents(output) == contents(tmp_path / "whole")


def test_a_shard_whose_list_of_bad_samples_was_not_copied_is_converted_again(folder, tmp_path):
    output, copy = tmp_path / "out", tmp_path / "copy"
    assert convert(folder, output, "--shard_size=10") == 0
    copy.mkdir()
    for file in output.glob("[!.]*"):
        (copy / file.name).write_bytes(file.read_bytes())
    assert convert(folder, copy, "--shard_size=10") == 0
    assert len(read(copy)) == 20
    assert contents(copy) == contents(output)


def test_the_manifest_is_right_while_another_attempt_replaces_a_list_of_bad_samples(
    folder, tmp_path, monkeypatch
):
    output, counts = tmp_path / "out", []
    assert convert(folder, output, "--shard_size=10") == 0

    def finish_first(path, content):
        # Once: the command that runs here writes files, too.
        monkeypatch.setattr("lit_jax.data.convert.atomic_write", atomic_write)
        assert convert(folder, output, "--shard_size=10") == 0
        counts.extend(shard.count for shard in records.read_manifest(output))
        atomic_write(path, content)

    monkeypatch.setattr("lit_jax.data.convert.atomic_write", finish_first)
    # The command removes the temporary file of the other attempt, which says so.
    with pytest.raises(UserError, match="--output"):
        convert_shard(make_plan(SourceConfig(path=str(folder)), 10), output, 0)
    assert counts == [8, 9, 3]
    assert len(read(output)) == 20


def test_a_shard_without_a_good_sample_is_empty(folder, tmp_path):
    assert convert(folder, tmp_path / "out", "--shard_size=1") == 0
    shards = records.read_manifest(tmp_path / "out")
    assert [n for n, shard in enumerate(shards) if not shard.count] == [4, 9, 17]
    assert len(read(tmp_path / "out")) == 20


def test_the_list_of_bad_samples_is_no_data_beside_the_records(folder, tmp_path, caplog):
    assert convert(folder, tmp_path / "out") == 0
    assert (tmp_path / "out/bad.jsonl").exists()
    caplog.clear()
    assert len(open_source(SourceConfig(path=str(tmp_path / "out")))) == 20
    assert not caplog.text


def command(folder: Path, output: Path, *flags: str) -> list[str]:
    module = ("-m", "lit_jax.data.convert")
    return [sys.executable, *module, f"--source.path={folder}", f"--output={output}", *flags]


@pytest.mark.long
def test_killed_and_resumed_it_writes_the_same_bytes(jsonl_folder, tmp_path):
    folder = jsonl_folder({"image": f"{i % 50}.png", "caption": f"{i}"} for i in range(3000))
    flags = ("--shard_size=50", "--workers=2", "--source.group_captions=False")
    whole, output = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(folder, whole, *flags), cwd=ROOT, check=True, capture_output=True)
    rng, kills = random.Random(0), 0
    for _ in range(3):
        process = subprocess.Popen(
            command(folder, output, *flags), cwd=ROOT, stderr=subprocess.DEVNULL
        )
        before = len(list(output.glob("data-*")))
        more = rng.randrange(1, 15)
        while process.poll() is None and len(list(output.glob("data-*"))) < before + more:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert not (output / records.MANIFEST).exists()
    assert kills == 3
    subprocess.run(command(folder, output, *flags), cwd=ROOT, check=True, capture_output=True)
    # A worker ends with its parent, but a moment later: what it was writing may still be there.
    assert {n: c for n, c in contents(output).items() if not n.endswith(".new")} == contents(whole)


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_killed_while_a_bucket_fails_it_writes_the_bytes_of_a_local_folder(
    jsonl_folder, tmp_path, scheme, monkeypatch
):
    rows = [{"image": f"{i % 50}.png", "caption": f"{i}"} for i in range(600)]
    folder = jsonl_folder([*rows, {"image": "missing.png", "caption": "x"}])
    flags = ("--shard_size=20", "--workers=2", "--source.group_captions=False")
    subprocess.run(command(folder, tmp_path / "whole", *flags), cwd=ROOT, check=True)
    with serve(tmp_path / "bucket") as store:
        store.folder.mkdir()
        output, environment = store.folder / "out", os.environ | store.environment
        start = functools.partial(
            subprocess.Popen,
            command(folder, f"{scheme}://{BUCKET}/out", *flags),
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        with store.faults(errors=0.03, lost=0.02, cut=0.05, delay=0.02, where="out"):
            for more in (1, 9):
                process = start()
                while len(list(output.glob("data-*"))) < more:
                    assert process.poll() is None, process.communicate()
                    time.sleep(0.01)
                process.kill()
                process.communicate()
                assert not (output / records.MANIFEST).exists()
            process = start()
            _, errors = process.communicate()
            assert process.returncode == 0, errors
        assert contents(output) == contents(tmp_path / "whole")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        user = {"gs": "anonymous", "s3": "nobody:none"}[scheme]
        path = store(f"{scheme}://{user}@{BUCKET}/out")
        source, local = (open_source(SourceConfig(path=str(p))) for p in (path, tmp_path / "whole"))
        assert len(source) == 600
        assert [source[i] for i in range(600)] == [local[i] for i in range(600)]


@pytest.mark.long
def test_workers_write_what_one_process_writes(folder, tmp_path):
    assert convert(folder, tmp_path / "one", "--shard_size=4") == 0
    assert convert(folder, tmp_path / "two", "--shard_size=4", "--workers=2") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def said(capsys) -> str:
    return capsys.readouterr().err


def test_bad_input_is_refused(folder, tmp_path, capsys):
    output = tmp_path / "out"
    assert convert(folder, output, "--shard_size=0") == 2
    assert re.search("--shard_size .*0", said(capsys))
    assert convert(folder, output, "--max_size=3") == 2
    assert "--max_size=3" in said(capsys)
    assert convert(tmp_path / "no_such", output) == 2
    assert "no_such" in said(capsys)
    assert not output.exists()  # nothing half-written
    assert convert(folder, folder) == 2
    assert "--output" in said(capsys)
    assert convert(folder, folder / "0.png") == 2
    assert "0.png cannot be written" in said(capsys)
    assert convert(folder, output) == 0
    said(capsys)
    assert convert(folder, output, "--shard_size=7") == 2
    assert "convert.json" in said(capsys)


def test_nothing_but_bad_samples_is_refused(jsonl_folder, tmp_path, capsys):
    folder = jsonl_folder({"image": f"missing{i}.png", "caption": "a"} for i in range(3))
    assert convert(folder, tmp_path / "out") == 2
    assert "bad.jsonl" in said(capsys)
    assert not (tmp_path / "out" / records.MANIFEST).exists()


def test_a_folder_that_cannot_be_written_is_refused(folder, tmp_path):
    plan = make_plan(SourceConfig(path=str(folder)), 10)
    with pytest.raises(UserError, match=r"no/such .*--output"):
        convert_shard(plan, tmp_path / "no/such", 0)


def test_a_shard_that_is_short_of_records_is_named_with_both_numbers(folder, tmp_path, monkeypatch):
    class LosingWriter(ArrayRecordWriter):
        """Loses the records of one image, as a faulty disk might."""

        def write(self, record):
            if records.decode(record)["key"] != "3.png":
                super().write(record)

    output = tmp_path / "out"
    output.mkdir()
    plan = make_plan(SourceConfig(path=str(folder)), 10)
    monkeypatch.setattr("lit_jax.data.convert.ArrayRecordWriter", LosingWriter)
    with pytest.raises(UserError, match=r"00000-of-00003\.array_record .*7 .*8 .*--output"):
        convert_shard(plan, output, 0)
    assert not list(output.iterdir())


def test_without_beam_a_runner_is_refused(folder, tmp_path, capsys):
    if importlib.util.find_spec("apache_beam"):  # its own test runs it
        return
    assert convert(folder, tmp_path / "out", "--runner=DirectRunner") == 2
    assert "requirements-beam.txt" in said(capsys)


# Apache Beam does not install beside the versions that are tested here, so it has an environment of its own:
# python -m venv DIR; DIR/bin/pip install -r requirements-beam.txt; LIT_JAX_BEAM_PYTHON=DIR/bin/python
BEAM = os.environ.get("LIT_JAX_BEAM_PYTHON")


@pytest.mark.long
@pytest.mark.skipif(not BEAM, reason="LIT_JAX_BEAM_PYTHON names no Python with apache-beam")
def test_beam_writes_what_processes_write(folder, tmp_path):
    assert convert(folder, tmp_path / "processes", "--shard_size=4") == 0
    flags = ("--shard_size=4", "--runner=DirectRunner", "--direct_num_workers=1")
    _, *rest = command(folder, tmp_path / "beam", *flags)
    subprocess.run([BEAM, *rest], cwd=ROOT, check=True)
    assert contents(tmp_path / "beam") == contents(tmp_path / "processes")
