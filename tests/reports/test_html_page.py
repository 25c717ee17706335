"""The page that opens from disk: it fetches nothing, no name is markup, and a browser shows all of it."""

import base64
import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from lit_jax.config import EvalConfig, SourceConfig
from lit_jax.evals.classes import Classes
from lit_jax.evals.runner import open_evals, run
from lit_jax.evals.zero_shot import zero_shot
from lit_jax.reports.html_page import _accuracy, _zero_shot, html_report
from lit_jax.reports.matplotlib_figures import curves_figure
from lit_jax.reports.result_files import EvaluatedModel, write_results

NAMES = ["<b>a</b>", "b & 猫 \ud83d\x00", "קוף" + "x" * 300]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
METRICS = [
    {"step": 0, "zero_shot/few/top1": 0.2},
    {"step": 1, "loss": 4.0, "learning_rate": 1e-3},
    {
        "step": 2,
        "loss": 3.0,
        "learning_rate": 5e-4,
        "step_seconds": 0.25,
        "data_wait_seconds": 0.03,
        "mfu": 0.421,
        "peak_memory_gib": 11.3,
    },
    {"step": 2, "zero_shot/few/top1": 0.5, "seconds/data_wait": 10.0, "seconds/step": 30.0},
]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def reported(encoder, params, pictures, tmp_path_factory) -> tuple[str, Path]:
    """The page, and the folder of results beside it. Names and captions are as bad as texts can be."""
    folder = tmp_path_factory.mktemp("data")
    with (folder / "captions.jsonl").open("w") as file:
        for i, example in enumerate(pictures):
            size = (32, 32) if i else (500, 300)
            Image.fromarray(example["image"]).resize(size).save(folder / f"{i}.png")
            bad = f"cut \ude00 \x1b[{i}m\x00\x9b $a$ ${i}$"
            captions = [bad, f"<i>{i}</i>", f"{i} תמונה"]
            row = {"image": f"{i}.png", "captions": captions}
            file.write(json.dumps(row | {"label": example["label"]}) + "\n")
    classes = {"classnames": NAMES, "labels": ["a", "b", "c"], "templates": ["{}"]}
    (folder / "classes.json").write_text(json.dumps(classes))
    data = SourceConfig(path=str(folder))
    evals = {
        "few": EvalConfig(data=data, classes=str(folder / "classes.json")),
        "pairs": EvalConfig(kind="retrieval", data=data),
    }
    evaluations = run(open_evals(evals), encoder, params)
    write_results(folder / "evals", evaluations, EvaluatedModel(model="a \ud83d <model>"))
    return html_report(
        evaluations, EvaluatedModel(model="a \ud83d <model>"), METRICS
    ), folder / "evals"


@pytest.fixture(scope="module")
def page(reported) -> str:
    return reported[0]


def test_the_page_needs_nothing_but_itself(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    sources = [attrs["src"] for tag, attrs in tags.found if tag == "img"]
    assert all(re.match("data:image/(png|jpeg|svg)", source) for source in sources)
    assert {"script", "link", "iframe"}.isdisjoint(tag for tag, _ in tags.found)
    assert "http://" not in page
    assert "url(" not in page
    # 3 pictures, 3 classes x 8 images; 8 images, 8 texts x 8 images; confusions; two maps and the curves
    assert len(sources) >= 3 + 3 * 8 + 8 + 8 * 8 + 3
    assert len(page) < 2_000_000


def test_no_name_is_taken_for_markup(page):
    assert "<b>" not in page
    assert "<i>0" not in page
    assert "&lt;b&gt;a&lt;/b&gt;" in page
    assert "b &amp; 猫" in page
    assert "a \ufffd &lt;model&gt;" in page
    assert "קוף" in page


def test_half_an_emoji_and_control_characters_are_shown_as_replaced(reported):
    page, results = reported
    assert "b &amp; 猫 \ufffd\ufffd" in page
    assert re.search("cut \ufffd \ufffd\\[[0-9]+m\ufffd\ufffd", page)
    assert not set(page) & set(map(chr, (*range(10), *range(11, 32), *range(127, 160))))
    drawings = re.findall('data:image/svg[^,]*,([^"]*)', page)
    texts = [
        "".join(ElementTree.fromstring(base64.b64decode(drawing)).itertext())
        for drawing in drawings
    ]
    assert len(texts) == 3
    assert sum("\ufffd" in text for text in texts) == 2
    with (results / "zero_shot_few_confusion.csv").open(encoding="utf-8", newline="") as file:
        names = {row["class"] for row in csv.DictReader(file)}
    assert names == {NAMES[0], "b & 猫 \ufffd\ufffd", NAMES[2]}
    assert (results / "table.md").read_text(encoding="utf-8").startswith("## a \ufffd <model>\n")
    assert json.loads((results / "retrieval_pairs.json").read_text())["model"] == "a \ufffd <model>"


def test_it_has_all_that_is_promised(page):
    for heading in (
        "Results",
        "What is in the picture?",
        "Which pictures fit the words?",
        "Accuracy of every class",
        "Worst confusions",
        "Which texts fit the picture?",
        "Which pictures fit the text?",
        "Training",
    ):
        assert re.search(rf"<h[23]>{re.escape(heading)}</h[23]>", page), heading
    assert page.count("<h3>Similarity</h3>") == 2
    assert (
        "The loss is 3.000 after 2 steps. The run took 40 s: step 75.0 %, data wait 25.0 %. A step took "
        "250 ms, 30 ms of them to wait for data. The model's products ran at 42.1 % of the peak (MFU). A "
        "device had at most 11.3 GiB in use." in page
    )


def test_ties_are_shown_as_the_numbers_count_them(encoder, params, pictures):
    """Two of three classes have the same texts, so that their images are right in half of all orders."""
    classes = Classes(names=("x", "y", "z"), prompts=(("two",), ("two",), ("one",)))
    label_N = np.arange(len(pictures), dtype=np.int32) % 2
    result = zero_shot(encoder, params, pictures, classes, label_N)
    tied = result.is_tied.sum()
    assert tied
    np.testing.assert_array_equal(result.hit, 0.5 * result.is_tied)
    present, accuracy = _accuracy(result)
    assert present.tolist() == [0, 1]
    expected = [result.hit[label_N == label].mean() for label in (0, 1)]
    np.testing.assert_allclose(accuracy, expected)
    assert result.metrics["mean_per_class_recall"] == pytest.approx(accuracy.mean())
    shown = "".join(_zero_shot(result, classes, lambda *_: ""))
    assert ("tied, right in 50%" in shown) == result.is_tied[:2].any()
    assert f"tied: {tied}." in shown


def test_no_curve_is_left_out():
    names = [f"zero_shot/{n}/top1" for n in range(20)]
    rows = [{"step": step, "loss": 1.0, "learning_rate": 0.1} for step in (1, 2)]
    rows += [{"step": step, **dict.fromkeys(names, 0.1 * step)} for step in (1, 2)]
    lines = curves_figure(rows).axes[2].get_lines()
    assert [line.get_label() for line in lines] == names
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20


@pytest.mark.long
def test_chromium_shows_it(page, tmp_path):
    """All images load, the page is no wider than a telephone, and on a desktop no table is cut."""
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    assert chromium, "This test needs Chromium: apt-get install chromium"
    check = (
        "<script>addEventListener('load', () => { const broken = [...document.images].filter("
        "i => !i.naturalWidth).length; document.title = `images ${document.images.length} broken "
        "${broken} wide ${document.documentElement.scrollWidth <= innerWidth} whole ${[...document."
        "querySelectorAll('.wide')].every(t => t.scrollWidth <= t.clientWidth)}`; })</script></body>"
    )
    file = tmp_path / "report.html"
    file.write_text(page.replace("</body>", check), encoding="utf-8")
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet += ["--disable-background-networking", "--disable-component-update"]

    def headless(*flags, width=500) -> str:
        command = [chromium, "--headless", "--no-sandbox", *quiet]
        command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", *flags]
        done = subprocess.run([*command, file.as_uri()], capture_output=True, timeout=180)
        assert done.returncode == 0
        return done.stdout.decode()

    for width, whole in ((500, "false"), (1280, "true")):
        title = re.search("<title>(.*?)</title>", headless("--dump-dom", width=width))
        assert title
        assert re.fullmatch(rf"images \d+ broken 0 wide true whole {whole}", title[1])
    headless(f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(tmp_path / "page.png") as shot:
        assert np.asarray(shot.convert("L")).std() > 10  # not blank
