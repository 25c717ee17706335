"""The command lit_jax.evaluate, on a real run and on a real folder."""

import dataclasses
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import portpicker
import pytest
from PIL import Image

from lit_jax.cli import BAD_INPUT
from lit_jax.config import default, parse
from lit_jax.configs.vit_bert import DIGITS
from lit_jax.data.image import decode
from lit_jax.evaluate import main
from lit_jax.training.trainer import train
from lit_jax.weights.save import save_dual_encoder
from tests.digits import make_digits, open_digits
from tests.gloo import after_gloo
from tests.pytorch_evaluation import Embedder, ranks, read_rows, zero_shot

pytestmark = pytest.mark.usefixtures("small_heap")

DEMO = Path(__file__).parents[1] / "configs" / "demo"
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
UNSEEN = [f"--data={DIGITS}", "--split=unseen"]
CLASSES = f"--classes={DEMO / 'unseen16.json'}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps from scratch, both saved, parameters split over fsdp, and its folder."""
    tower = tmp_path_factory.mktemp("vit")
    vit = {"model_type": "vit", "image_size": 32, "patch_size": 16, **TINY}
    (tower / "config.json").write_text(json.dumps(vit))
    shutil.copy(DEMO / "vit" / "preprocessor_config.json", tower)
    config = default()
    config.batch_size = 8
    config.duration = "2 steps"
    config.checkpoint.every = "1 step"
    config.mesh.fsdp = 2
    config.policy.lock = "uu"
    config.model.image.model = str(tower)
    config.model.text.model = str(DEMO / "bert")
    config.model.text.overrides = TINY
    config.model.projection_dim = 8
    config.data.train.path = str(DIGITS)
    config.data.train.split = "train"
    config.data.max_text_length = 16
    config.log.tensorboard = False
    config.evals.unseen = {
        "data": {"path": str(DIGITS), "split": "unseen"},
        "classes": str(DEMO / "unseen16.json"),
    }
    workdir = tmp_path_factory.mktemp("run")
    make_digits()
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 power
        return train(parse(config), workdir), workdir


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    """The trained model as a folder for transformers."""
    trained, workdir = run
    folder = tmp_path_factory.mktemp("exported")
    params = jax.tree.map(np.asarray, trained.params)
    save_dual_encoder(folder, trained.model.hf_config, trained.module, params)
    for file in (workdir / "model").iterdir():
        if file.name != "config.json":
            shutil.copy(file, folder)
    return folder


def test_a_run_is_measured_by_its_own_evaluations(run, capsys):
    _, workdir = run
    assert main([f"--workdir={workdir}"]) == 0
    metrics = json.loads((workdir / "results.json").read_text())
    assert metrics["zero_shot/unseen/n"] == 800
    assert 0 <= metrics["zero_shot/unseen/top1"] <= 1
    assert "zero_shot/unseen/mean_per_class_recall" in capsys.readouterr().out


def test_any_checkpoint_of_a_run_is_measured(run, capsys):
    """Its own numbers, which do not replace those of the run."""
    _, workdir = run
    assert main([f"--workdir={workdir}"]) == 0
    latest, results = capsys.readouterr().out, (workdir / "results.json").read_text()
    assert main([f"--workdir={workdir}", "--step=2"]) == 0
    assert capsys.readouterr().out == latest
    assert main([f"--workdir={workdir}", "--step=1"]) == 0
    assert capsys.readouterr().out != latest
    assert (workdir / "results.json").read_text() == results
    assert main([f"--workdir={workdir}", "--step=3"]) == BAD_INPUT
    assert re.search(rf"{workdir} .*\b3\b.*\[1, 2\]", capsys.readouterr().err)


def test_results_that_cannot_be_written_are_printed_still(run, capsys):
    _, workdir = run
    assert main([f"--workdir={workdir}", "--output=/proc/results.json"]) == BAD_INPUT
    printed = capsys.readouterr()
    assert "zero_shot/unseen/top1" in printed.out
    assert re.search(r"/proc/results\.json .*\(.*--output, --results \w+ --report", printed.err)


def test_results_on_a_full_disk_are_printed_still(run, capsys, tmp_path):
    _, workdir = run
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))  # bytes of a file; Python ignores SIGXFSZ
    try:
        assert main([f"--workdir={workdir}", f"--output={tmp_path / 'all.json'}"]) == BAD_INPUT
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    printed = capsys.readouterr()
    assert "zero_shot/unseen/top1" in printed.out
    assert re.search(rf"{tmp_path}/all\.json .*\(File too large\)", printed.err)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_two_processes_print_what_one_prints(run, capsys):
    """Two processes with four devices each, and one with eight."""
    _, workdir = run
    assert main([f"--workdir={workdir}"]) == 0
    expected = capsys.readouterr().out
    together = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{portpicker.pick_unused_port()}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "lit_jax.evaluate", f"--workdir={workdir}"],
            cwd=DEMO.parents[1],
            env=together | {"JAX_PROCESS_ID": index},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in ("0", "1")
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [after_gloo(output) for output in outputs] == [expected, ""]


def test_an_exported_folder_measures_as_its_run(run, exported, tmp_path):
    _, workdir = run
    for name, model in (("run", f"--workdir={workdir}"), ("folder", f"--model={exported}")):
        output = f"--output={tmp_path / name}.json"
        assert main([model, *UNSEEN, CLASSES, "--eval.batch_size=100", output]) == 0
    of_run = json.loads((tmp_path / "run.json").read_text())
    of_folder = json.loads((tmp_path / "folder.json").read_text())
    assert of_folder == pytest.approx(of_run, abs=2 / 800)  # a near tie may fall either way


def test_without_classes_it_is_retrieval(exported, tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    with (tmp_path / "captions.jsonl").open("w") as file:
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / f"{i}.png")
            file.write(json.dumps({"image": f"{i}.png", "caption": f"the number {i}"}) + "\n")
    monkeypatch.chdir(tmp_path)
    assert main([f"--model={exported}", "--data=."]) == 0
    assert f"retrieval/{tmp_path.name}/text_to_image_recall_at_5" in capsys.readouterr().out


def test_class_names_in_the_data_make_it_zero_shot_classification(exported, tmp_path, capsys):
    """Of CLIP_benchmark's layout, with labels that are numbers; the same as with files that say so."""
    source = open_digits("unseen")
    names = sorted({source[i]["label"] for i in range(0, len(source), 50)}, reverse=True)
    (tmp_path / "test").mkdir()
    with tarfile.open(tmp_path / "test" / "0.tar", "w") as tar:
        for i in range(0, len(source), 40):
            content = io.BytesIO()
            decode(source[i]["image"]).save(content, "PNG")
            label = str(names.index(source[i]["label"])).encode()
            for suffix, part in (("cls", label), ("png", content.getvalue())):
                member = tarfile.TarInfo(f"s{i:07}.{suffix}")
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    (tmp_path / "classnames.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of {c}\n")
    shutil.copy(tmp_path / "classnames.txt", tmp_path / "names.txt")
    (tmp_path / "templates.txt").write_text("a photo of {}\n")
    flags = [f"--model={exported}", f"--data={tmp_path}", "--split=test", "--eval.dataset=numbers"]
    own = [f"--classes={tmp_path / 'names.txt'}", f"--eval.templates={tmp_path / 'templates.txt'}"]
    outputs = []
    for more in ([], own):
        assert main([*flags, *more]) == 0
        outputs.append(capsys.readouterr().out)
    assert "zero_shot/numbers/n " in outputs[0]
    assert outputs[0] == outputs[1]
    (tmp_path / "dataset_type.txt").write_text("retrieval")
    assert main([*flags, "--eval.labels=sorted"]) == BAD_INPUT
    assert re.search("--eval.labels .*zero_shot, .*retrieval", capsys.readouterr().err)


def test_results_report_and_cache_are_written(run, tmp_path):
    """By default those of a run go into it; a second time the cache has the embeddings."""
    _, workdir = run
    flags = [f"--cache={tmp_path / 'cache'}", f"--report={tmp_path / 'report.html'}"]
    assert main([f"--workdir={workdir}", *flags]) == 0
    result = json.loads((workdir / "evals" / "zero_shot_unseen.json").read_text())
    assert (result["dataset"], result["model"], result["pretrained"]) == (
        "unseen",
        workdir.name,
        "step 2",
    )
    assert "unseen" in (workdir / "evals" / "table.md").read_text()
    assert "Worst confusions" in (tmp_path / "report.html").read_text()
    first = (workdir / "results.json").read_text()
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert main([f"--workdir={workdir}", *flags]) == 0
    assert (workdir / "results.json").read_text() == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == files


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """40 images with two captions and a class each."""
    folder = tmp_path_factory.mktemp("pairs")
    source = open_digits("unseen")
    with (folder / "captions.jsonl").open("w") as file:
        for i in range(40):
            example = source[i]
            decode(example["image"]).save(folder / f"{i}.png")
            captions = [f"{example['captions'][0]} {'I' * i}", example["captions"][1]]
            row = {"image": f"{i}.png", "captions": captions, "label": example["label"]}
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.mark.oracle
def test_the_numbers_are_those_of_pytorch(exported, pairs, tmp_path):
    import torch

    embedder, rows = Embedder(exported), read_rows(pairs)
    content = json.loads((DEMO / "unseen16.json").read_text())
    with torch.no_grad():
        images = embedder.images([pairs / row["image"] for row in rows])
        classes = embedder.classes(content["classnames"], content["templates"])
        texts = embedder.texts([text for row in rows for text in row["captions"]])
    labels = [content["classnames"].index(row["label"]) for row in rows]
    fewest, most, of_texts = ranks(images, texts)
    assert (most - fewest).mean() <= 0.5  # of ranks up to 79
    expected = zero_shot(images, classes, labels) | {
        "text_to_image_mean_rank": of_texts.mean(),
        "text_to_image_median_rank": np.median(of_texts),
        "text_to_image_recall_at_10": (of_texts <= 10).mean(),
    }
    actual = {}
    for flags in ([CLASSES], []):
        output = f"--output={tmp_path / 'o'}"
        assert main([f"--model={exported}", f"--data={pairs}", *flags, output]) == 0
        found = json.loads((tmp_path / "o").read_text())
        actual |= {name.rpartition("/")[2]: value for name, value in found.items()}
    assert fewest.mean() <= actual["image_to_text_mean_rank"] <= most.mean()
    recall_at_5 = actual["image_to_text_recall_at_5"]
    assert (most <= 5).mean() <= recall_at_5 <= (fewest <= 5).mean()
    assert {name: actual[name] for name in expected} == pytest.approx(expected, abs=1e-9)


def test_search_finds_a_picture_by_words(exported, tmp_path, capsys):
    from examples.search import main as search

    images = tmp_path / "images" / "deep"
    images.mkdir(parents=True)
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (5, 40, 30, 3), np.uint8)):
        Image.fromarray(image).save(images / f"{i}.png")
    (images / "bad.jpg").write_bytes(b"no image")
    flags = [f"--model={exported}", f"--images={tmp_path / 'images'}", "--query=<b>fünf</b>"]
    flags += [f"--output={tmp_path / 'page.html'}", f"--cache={tmp_path / 'cache'}"]
    assert search(flags) == 0
    printed = capsys.readouterr().out
    lines = [line.split("\t") for line in printed.splitlines()[:-1]]
    assert sorted(Path(path).stem for _, _, path in lines) == list("01234")
    scores = [float(score) for _, score, _ in lines]
    assert scores == sorted(scores, reverse=True)
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;fünf" in page
    assert page.count("<img") == 5
    assert search(flags) == 0
    assert capsys.readouterr().out == printed
    assert search([*flags[:1], f"--images={tmp_path / 'cache'}", *flags[2:]]) == BAD_INPUT
    assert str(tmp_path / "cache") in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"model_max_length": null}'])
def test_a_folder_whose_tokenizer_config_is_damaged(exported, tmp_path, content, capsys):
    folder = shutil.copytree(exported, tmp_path / "model")
    (folder / "tokenizer_config.json").write_text(content)
    assert main([f"--model={folder}", *UNSEEN, CLASSES]) == BAD_INPUT
    assert f" {folder} " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=x"], "--model .*--data"),
        (["--model=x", "--step=1", *UNSEEN], "--step .*--workdir"),
        (["--model=x", "--split=test"], "--eval.data .*--data"),
        (
            ["--model=x", "--split=a", "--classes=b"],
            "--eval.data .*--eval.classes .*--data",
        ),
        (["--model=x", *UNSEEN, "--eval.batch_size=0"], r"eval\.batch_size .*\b0\b"),
        (["--model=x", *UNSEEN, "--eval.every=1 step"], "--eval.every"),
        (
            ["--model=x", *UNSEEN, "--output=/nowhere/a.json"],
            "--output=/nowhere/a.json: .*/nowhere[;.]",
        ),
        (["--model=x", "--data=/nowhere"], "/nowhere"),
        (
            ["--model=x", *UNSEEN, CLASSES, "--train_data=x"],
            "--eval.classes .*zero_shot, .*linear_probe",
        ),
        (["--model=x", *UNSEEN, "--eval.shots=1"], "--eval.shots .*few_shot, .*zero_shot"),
        (
            ["--model=x", *UNSEEN, f"--train_data={DIGITS}", "--eval.shots=a"],
            r"eval\.shots\[0\] .*'a'",
        ),
        (["--model=x", *UNSEEN, CLASSES, "--eval.labels=x"], r"eval\.labels .*'x'"),
        (["--model=x", *UNSEEN, CLASSES, "--labels=x"], r"eval\.labels .*'x'"),
        (
            ["--model=x", *UNSEEN, "--report=/nowhere/a.html"],
            "--report=/nowhere/a.html: .*/nowhere[;.]",
        ),
        (["--model=x", *UNSEEN, "--classes=/nowhere.json"], "/nowhere.json"),
        (["--model=/nowhere", *UNSEEN, CLASSES], "--model"),
        (["--workdir=/nowhere"], "/nowhere .*config.json"),
    ],
)
def test_bad_input_is_one_sentence(flags, message, capsys):
    assert main(flags) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_a_run_without_evaluations_says_so(run, tmp_path, capsys):
    trained, _ = run
    config = dataclasses.asdict(dataclasses.replace(trained.model.config, evals={}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main([f"--workdir={tmp_path}"]) == BAD_INPUT
    assert re.search(rf"{tmp_path} .*--data", capsys.readouterr().err)


def test_one_of_the_two_models_is_required(capsys):
    assert main([]) == BAD_INPUT
    assert "--workdir --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "right"),
    [
        ("--classnames=x", "--classes"),
        ("--batch-size=4", "--eval.batch_size"),
        ("--templates=x", "--eval.templates"),
        ("--label_key=x", "--eval.data.label_key"),
        ("--train_split=x", "--eval.train.split"),
        ("--shots=1", "--eval.shots"),
        ("--data-dir=x", "--data"),
        ("--work-dir=x", "--workdir"),
        ("--class=x", "--classes"),
        ("--train-data", "--train_data"),
    ],
)
def test_a_mistyped_flag_is_answered_by_the_right_one(flag, right, capsys):
    assert main([flag]) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith(f"error: {flag} ")
    assert f"'{right}'" in error
    assert error.count("\n") == 1
