"""Evaluations of a config: names of the metrics, batch sizes, and errors before any model exists."""

import dataclasses
import json
import logging
import os
import re
from pathlib import Path

import jax
import pytest
from PIL import Image

from lit_jax.config import EvalConfig, SourceConfig
from lit_jax.configs.vit_bert import DIGITS
from lit_jax.errors import UserError
from lit_jax.evals.encode import Encoder
from lit_jax.evals.runner import flatten_metrics, open_evals, run, table
from lit_jax.reports.result_files import EvaluatedModel, tables, write_results


@pytest.fixture
def folder(tmp_path, pictures):
    """The first four pictures as a captions.jsonl folder, with a class file."""
    with (tmp_path / "captions.jsonl").open("w") as file:
        for example in pictures[:4]:
            name = f"{example['key']}.png"
            Image.fromarray(example["image"]).save(tmp_path / name)
            row = {"image": name, "captions": example["captions"], "label": example["label"]}
            file.write(json.dumps(row) + "\n")
    classes = {"classnames": ["a", "b", "c"], "templates": ["a photo of the number {}"]}
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    return tmp_path


def evals_of(folder) -> dict[str, EvalConfig]:
    """Of all kinds; zero-shot in two languages, of which the second calls the classes otherwise."""
    data = SourceConfig(path=str(folder))
    (folder / "classes.de.json").write_text(
        json.dumps({"classnames": ["A", "Be", "Ce"], "labels": ["a", "b", "c"]})
    )
    (folder / "classes.en.json").write_text((folder / "classes.json").read_text())
    return {
        "few": EvalConfig(data=data, classes=str(folder / "classes.json")),
        "many": EvalConfig(
            data=data, classes=str(folder / "classes.{language}.json"), languages=("en", "de")
        ),
        "pairs": EvalConfig(kind="retrieval", data=data),
        "shots": EvalConfig(kind="few_shot", data=data, train=data, shots=(1,), draws=2),
    }


@pytest.fixture
def evaluations(encoder, params, folder):
    return run(open_evals(evals_of(folder)), encoder, params)


def test_metrics_have_flat_names(evaluations):
    metrics = flatten_metrics(evaluations)
    assert metrics["zero_shot/few/n"] == metrics["retrieval/pairs/images"] == 4
    assert metrics["retrieval/pairs/texts"] == 8
    assert metrics["zero_shot/many/en/top1"] == metrics["zero_shot/few/top1"]
    assert metrics["retrieval/pairs/image_to_text_recall_at_10"] == 1
    assert metrics["few_shot/shots/top1_1_shot"] > 0.7  # it is tested on what it has learned
    assert table(metrics).splitlines()[0].startswith("zero_shot/few/top1 ")


def test_the_same_images_are_embedded_once(encoder, params, folder, monkeypatch):
    done = []
    embed = Encoder._embed

    def counted(self, side, output, *args):
        done.append((side, output))
        return embed(self, side, output, *args)

    monkeypatch.setattr(Encoder, "_embed", counted)
    run(open_evals(evals_of(folder)), encoder, params)
    images = [("image", "embeddings"), ("image", "features")]
    assert sorted(done) == [*images, *[("text", "embeddings")] * 3]


def test_a_cache_on_disk_gives_back_the_same_and_notices_changes(
    encoder, params, folder, tmp_path, monkeypatch, caplog
):
    cache = tmp_path / "cache"
    evals = {"few": evals_of(folder)["few"]}

    def measure(params=params):
        return flatten_metrics(run(open_evals(evals), encoder, params, cache=cache))

    first = measure()
    files = sorted(cache.iterdir())
    assert len(files) == 2
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "_embed", lambda *_: pytest.fail("embedded again"))
        assert measure() == first
    one = jax.tree.map(lambda x: x, params)
    one["vision_model"]["layernorm"]["bias"] = -params["vision_model"]["layernorm"]["bias"]
    measure(one)
    assert len(list(cache.iterdir())) == 3  # other images, the same classes
    image = folder / "picture0.png"
    image.write_bytes((folder / "picture1.png").read_bytes())
    measure()
    assert len(list(cache.iterdir())) == 4
    files[0].write_bytes(b"damaged")
    files[1].write_bytes(b"")
    assert measure().keys() == first.keys()
    assert str(tmp_path) in caplog.text


def test_an_image_that_could_not_be_read_is_tried_again(encoder, params, folder, tmp_path, caplog):
    """Although nothing about the file says that its content is another one now."""
    evals = {"few": evals_of(folder)["few"]}
    image = folder / "picture2.png"
    content, when = image.read_bytes(), image.stat()

    def measure(content: bytes):
        image.write_bytes(content)
        os.utime(image, ns=(when.st_atime_ns, when.st_mtime_ns))
        caplog.clear()
        return flatten_metrics(run(open_evals(evals), encoder, params, cache=tmp_path / "cache"))

    for _ in range(2):
        assert measure(bytes(len(content)))["zero_shot/few/n"] == 3
        assert "picture2" in caplog.text  # said each time, not only when it is embedded
        assert re.search(r" 1 \w+ 4 ", caplog.text)
    mended = measure(content)
    assert mended == flatten_metrics(run(open_evals(evals), encoder, params))
    assert "picture2" not in caplog.text
    assert measure(bytes(len(content))) == mended  # kept from then on


def test_a_cache_that_cannot_be_written(encoder, params):
    with pytest.raises(UserError, match=r"/proc/cache .*\("):
        run([], encoder, params, cache=Path("/proc/cache"))


def test_each_evaluation_has_its_own_batch_size(encoder, params, folder):
    batch_sizes = []

    def measure(encoder: Encoder, params):
        batch_sizes.append(encoder.batch_size)
        return {}, None

    few = evals_of(folder)["few"]
    evals = {str(n): dataclasses.replace(few, batch_size=n) for n in (24, 8)}
    prepared = [dataclasses.replace(task, measure=measure) for task in open_evals(evals)]
    assert flatten_metrics(run(prepared, encoder, params)) == {}
    assert batch_sizes == [24, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": None}, r"config\.evals\.few\.classes"),
        ({"classes": "nowhere.json"}, r"nowhere\.json"),
        ({"data": SourceConfig(path="nowhere")}, "nowhere"),
        ({"data": SourceConfig(path=str(DIGITS), split="unseen")}, r"'twenty two'"),
        ({"languages": ("en", "")}, r"config\.evals\.few\.languages .*'en,'"),
        ({"languages": ("en", "en")}, r"config\.evals\.few\.languages .*'en,en'"),
        ({"languages": ("en", "de")}, r"config\.evals\.few .* en, de, .*\{language\}"),
        ({"kind": "few_shot", "shots": ()}, r"config\.evals\.few .*shots=\(\)"),
        ({"kind": "linear_probe"}, "''"),
    ],
)
def test_errors_come_before_any_model(folder, changes, message):
    fields = {"data": SourceConfig(path=str(folder)), "classes": str(folder / "classes.json")}
    with pytest.raises(UserError, match=message):
        open_evals({"few": EvalConfig(**(fields | changes))})


def test_results_are_in_clip_benchmarks_layout(evaluations, tmp_path):
    out = tmp_path / "evals"
    write_results(out, evaluations, EvaluatedModel(model="tiny", pretrained="step 3"))
    assert sorted(path.name for path in out.iterdir()) == [
        "few_shot_shots_1_shot.json",
        "retrieval_pairs.json",
        "table.md",
        "zero_shot_few.json",
        "zero_shot_few_confusion.csv",
        "zero_shot_many_de.json",
        "zero_shot_many_de_confusion.csv",
        "zero_shot_many_en.json",
        "zero_shot_many_en_confusion.csv",
    ]
    metrics = flatten_metrics(evaluations)
    assert json.loads((out / "zero_shot_many_de.json").read_text()) == {
        "dataset": "many",
        "model": "tiny",
        "pretrained": "step 3",
        "task": "zeroshot_classification",
        "metrics": {
            "acc1": metrics["zero_shot/many/de/top1"],
            "mean_per_class_recall": metrics["zero_shot/many/de/mean_per_class_recall"],
            "n": 4,
        },
        "language": "de",
    }
    found = json.loads((out / "retrieval_pairs.json").read_text())
    assert found["task"] == "zeroshot_retrieval"
    start = "retrieval/pairs"
    expected = {
        "image_retrieval_recall@1": metrics[f"{start}/text_to_image_recall_at_1"],
        "text_retrieval_recall@5": metrics[f"{start}/image_to_text_recall_at_5"],
        "text_retrieval_mean_rank": metrics[f"{start}/image_to_text_mean_rank"],
    }
    assert expected.items() <= found["metrics"].items()
    shot = json.loads((out / "few_shot_shots_1_shot.json").read_text())
    assert shot["task"] == "linear_probe"
    assert shot["metrics"].keys() == {"acc1", "acc1_std", "fewshot_k"}
    rows = (out / "zero_shot_few_confusion.csv").read_text().splitlines()
    assert rows[0] == "class,predicted,images"
    assert sum(int(row.rpartition(",")[2]) for row in rows[1:]) == 4


def test_a_table_has_a_row_a_language(evaluations):
    by_language = tables(evaluations)[1]
    assert by_language.title == "Zero-shot classification by language: many"
    assert [row[0] for row in by_language.rows] == ["en", "de", "mean"]
    top1 = [e.metrics["top1"] for e in evaluations if e.prepared.key == "many"]
    expected = [f"{100 * value:.1f}" for value in (*top1, sum(top1) / 2)]
    assert [row[1] for row in by_language.rows] == expected
    assert by_language.markdown().splitlines()[2:4] == [
        "| language | top-1 % | mean per class % | images |",
        "| :-- | --: | --: | --: |",
    ]


def test_retrieval_in_several_languages_takes_the_captions_of_each(
    encoder, params, folder, pictures
):
    with (folder / "captions.jsonl").open("w") as file:
        for example in pictures[:4]:
            captions = {"en": [*example["captions"]], "de": "zwei Ziffern"}
            row = {"image": f"{example['key']}.png", "captions": captions}
            file.write(json.dumps(row) + "\n")
    data = SourceConfig(path=str(folder), languages={"fr": 1.0})  # what training would draw
    evals = {
        "both": EvalConfig(kind="retrieval", data=data, languages=("en", "de")),
        "one": EvalConfig(kind="retrieval", data=data, languages=("de",)),
        "all": EvalConfig(kind="retrieval", data=SourceConfig(path=str(folder))),
    }
    evaluations = run(open_evals(evals), encoder, params)
    metrics = flatten_metrics(evaluations)
    assert metrics["retrieval/both/en/texts"] == 8
    assert metrics["retrieval/both/de/texts"] == 4
    assert metrics["retrieval/one/texts"] == 4
    assert metrics["retrieval/all/texts"] == 12
    assert [row[0] for row in tables(evaluations)[0].rows] == ["one", "all"]


@pytest.mark.parametrize("languages", [("fr",), ("de", "fr"), ("DE",)])
def test_a_language_without_captions_is_refused_with_those_there_are(folder, languages):
    row = {"image": "picture0.png", "captions": {"en": "two", "de": ["zwei"], "ja": []}}
    (folder / "captions.jsonl").write_text(json.dumps(row) + "\n")
    config = EvalConfig(kind="retrieval", data=SourceConfig(path=str(folder)), languages=languages)
    with pytest.raises(UserError, match=r"'(fr|DE)'; .*--eval.languages.* de, en\."):
        open_evals({"pairs": config})


def test_a_language_of_data_without_languages_is_refused(folder):
    data = SourceConfig(path=str(folder))
    with pytest.raises(UserError, match=r"picture0.*--eval.languages"):
        open_evals({"pairs": EvalConfig(kind="retrieval", data=data, languages=("en",))})


def test_the_language_in_the_path_of_the_data_chooses_it(folder):
    (folder / "captions.jsonl").rename(folder / "captions.de.jsonl")
    data = SourceConfig(path=str(folder / "captions.{language}.jsonl"))
    (task,) = open_evals({"pairs": EvalConfig(kind="retrieval", data=data, languages=("de",))})
    assert (len(task.source), task.language, task.name) == (4, "de", "retrieval/pairs")
    with pytest.raises(UserError, match=r"captions\.fr\.jsonl"):
        open_evals({"pairs": EvalConfig(kind="retrieval", data=data, languages=("de", "fr"))})


def test_a_line_that_is_no_example_is_left_out_of_every_evaluation(encoder, params, folder):
    with (folder / "captions.jsonl").open("a") as file:
        file.write("not json\n")
    classes, data = str(folder / "classes.json"), SourceConfig(path=str(folder))
    evals = {
        "few": EvalConfig(data=data, classes=classes),
        "pairs": EvalConfig(kind="retrieval", data=data),
        "shots": EvalConfig(kind="few_shot", data=data, train=data, shots=(1,), draws=1),
    }
    metrics = flatten_metrics(run(open_evals(evals), encoder, params))
    assert metrics["zero_shot/few/n"] == metrics["retrieval/pairs/images"] == 4
    assert metrics["few_shot/shots/n"] == 4


def test_a_row_for_each_caption_is_retrieved_as_lists_of_captions(
    encoder, params, tmp_path, pictures
):
    texts = [[f"{word} {i}" for word in ("one", "two", "three")] for i in range(8)]
    for name in ("lists", "rows", "single"):
        (tmp_path / name).mkdir()
        for i in range(8):
            Image.fromarray(pictures[i]["image"]).save(tmp_path / name / f"{i}.png")
    rows = [{"image": f"{i}.png", "captions": of_image} for i, of_image in enumerate(texts)]
    (tmp_path / "lists" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = [f"{i}.png,{of_image[n]}" for n in range(3) for i, of_image in enumerate(texts)]
    for name in ("rows", "single"):
        (tmp_path / name / "a.csv").write_text("\n".join(["image,caption", *table]))

    def measure(name: str, **config) -> dict[str, float]:
        data = SourceConfig(path=str(tmp_path / name), **config)
        evals = {"x": EvalConfig(kind="retrieval", data=data)}
        return flatten_metrics(run(open_evals(evals), encoder, params))

    expected = measure("lists")
    assert (expected["retrieval/x/images"], expected["retrieval/x/texts"]) == (8, 24)
    assert measure("rows") == expected
    assert measure("single", group_captions=False)["retrieval/x/images"] == 24


def test_labels_that_cannot_be_used_leave_out_their_images_alone(folder, encoder, params, caplog):
    lines = (folder / "captions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[1]["label"] = ["a", "b"]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evals = {name: evals_of(folder)[name] for name in ("few", "pairs")}
    metrics = flatten_metrics(run(open_evals(evals), encoder, params))
    assert (metrics["zero_shot/few/n"], metrics["retrieval/pairs/images"]) == (3, 4)
    assert caplog.text.count(": \"label\" is ['a', 'b']") == 1
    for row in rows:
        row["label"] = ["a", "b"]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"\b4 .*\"label\" .*\['a', 'b'\]"):
        open_evals(evals)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.jsonl", '{"image": "%s", "label": null}'),
        ("captions.jsonl", '{"image": "%s", "label": NaN}'),
        ("captions.jsonl", '{"image": "%s", "label": -1}'),
        ("data.csv", "%s,"),
        ("data.csv", "%s,-1"),
    ],
)
def test_an_image_without_a_label_is_left_out_and_named_once(
    encoder, params, folder, caplog, name, content
):
    """As where pandas leaves gaps, or `datasets` writes -1."""
    row = "%s,%d" if name == "data.csv" else '{"image": "%s", "label": %d}'
    rows = [row % (f"picture{i}.png", i % 2) for i in range(4)]
    rows[2] = content % "picture2.png"
    (folder / "captions.jsonl").unlink()
    head = ["image,label"] if name == "data.csv" else []
    (folder / name).write_text("\n".join([*head, *rows]) + "\n")
    data = SourceConfig(path=str(folder))
    evals = {
        "classes": EvalConfig(data=data, classes=str(folder / "classes.json")),
        "shots": EvalConfig(kind="few_shot", data=data, train=data, shots=(1,), draws=1),
    }
    metrics = flatten_metrics(run(open_evals(evals), encoder, params))
    assert metrics["zero_shot/classes/n"] == metrics["few_shot/shots/n"] == 3
    assert len(re.findall(r" 1 \w+ 4 .*picture2", caplog.text)) == 1


def test_classes_without_an_image_are_named(folder, encoder, params, caplog):
    names = ["a", "b", "c", "nobody has this"]
    (folder / "four.json").write_text(json.dumps({"classnames": names, "templates": ["{}"]}))
    config = EvalConfig(data=SourceConfig(path=str(folder)), classes=str(folder / "four.json"))
    caplog.set_level(logging.INFO, logger="lit_jax")
    run(open_evals({"four": config}), encoder, params)
    assert re.search(r"1 of the 4 classes .*nobody has this", caplog.text)
