"""Caption files of COCO, Flickr, BLIP and Hugging Face as they are spread, and as they get damaged."""

import json
import pickle
import re

import pytest

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError
from lit_jax.data.image import decode
from lit_jax.data.sources import open_source
from lit_jax.errors import UserError

HEADERS = {
    "captions.txt": "image,caption\n",
    "results.csv": "image_name| comment_number| comment\n",
    "Flickr8k.token.txt": "",
    "results_20130124.token": "",
}
TEXTS = ("A dog , wet , runs .", 'A "sign" says hi', "Ein Hund läuft", '"Hi" , said the man')


def write(folder, name, encode, noise, *, quoted=False, images="."):
    """Two images with four captions each, the second of a name that has a blank."""
    lines = []
    for image in ("1.jpg", "2 b.jpg"):
        (folder / images).mkdir(exist_ok=True)
        (folder / images / image).write_bytes(encode(noise(4, 7, 3)))
        for n, text in enumerate(TEXTS):
            cell = '"' + text.replace('"', '""') + '"' if quoted else text
            lines.append(
                {
                    "captions.txt": f"{image},{cell}",
                    "results.csv": f"{image}| {n}| {text}",
                }.get(name, f"{image}#{n}\t{text}")
            )
    (folder / name).write_text(HEADERS[name] + "\n".join(lines) + "\n", encoding="utf-8")


def opened(path, **config):
    source = open_source(SourceConfig(path=str(path), **config))
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("images", [".", "Images", "flickr30k_images"])
def test_flickr_is_read_as_it_is_spread(tmp_path, name, images, encode, noise):
    write(tmp_path, name, encode, noise, images=images)
    for path in (tmp_path, tmp_path / name):
        examples = opened(path)
        assert [example["captions"] for example in examples] == [TEXTS, TEXTS]
        assert [decode(example["image"]).size for example in examples] == [(7, 4)] * 2


def test_quoted_captions_of_flickr_are_the_same(tmp_path, encode, noise):
    write(tmp_path, "captions.txt", encode, noise, quoted=True)
    assert [example["captions"] for example in opened(tmp_path)] == [TEXTS, TEXTS]


@pytest.mark.parametrize("mark", ["\t", "| "])
@pytest.mark.parametrize("header", ["image{}caption\n", "image_name{}comment\n", ""])
def test_names_of_columns_of_flickr_are_no_image(tmp_path, header, mark, encode, noise):
    (tmp_path / "1.jpg").write_bytes(encode(noise(4, 7, 3)))
    number = "" if mark == "\t" else "0| "
    text = header.format(mark) + f"1.jpg{mark}{number}a dog\n1.jpg{mark}{number}wet\n"
    (tmp_path / "captions.txt").write_text(text)
    assert [example["captions"] for example in opened(tmp_path)] == [("a dog", "wet")]


@pytest.mark.parametrize("header", ["", "image_name,comment_number,comment\n"])
def test_other_columns_of_flickr(tmp_path, header, encode, noise):
    (tmp_path / "1.jpg").write_bytes(encode(noise(4, 7, 3)))
    number = "0," if header else ""
    (tmp_path / "captions.txt").write_text(f"{header}1.jpg,{number}A dog , wet .\r\n")
    assert [example["captions"] for example in opened(tmp_path)] == [("A dog , wet .",)]


def test_damaged_lines_of_flickr_are_told(tmp_path, encode, noise, caplog):
    write(tmp_path, "results.csv", encode, noise)
    with (tmp_path / "results.csv").open("a") as file:
        file.write("1.jpg | 4   A dog runs across the grass .\nnonsense\n\n")
    examples = opened(tmp_path)
    assert examples[0]["captions"] == (*TEXTS, "A dog runs across the grass .")
    assert re.search(r" 1 .*results\.csv .*nonsense", caplog.text)


def test_another_results_csv_is_a_table(tmp_path, encode, noise):
    (tmp_path / "1.jpg").write_bytes(encode(noise(4, 7, 3)))
    (tmp_path / "results.csv").write_text("image,caption\n1.jpg,a dog\n")
    assert opened(tmp_path)[0]["captions"] == ("a dog",)


@pytest.fixture
def coco(tmp_path, encode, noise):
    """Writes a caption file with these images and annotations, and the images that it names."""

    def coco(images, annotations, folder="val2017"):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / folder).mkdir(exist_ok=True)
        for image in images:
            if isinstance(image.get("file_name"), str):
                (tmp_path / folder / image["file_name"]).write_bytes(encode(noise(4, 7, 3)))
        content = json.dumps({"images": images, "annotations": annotations})
        (tmp_path / "annotations/captions_val2017.json").write_text(content)
        return tmp_path

    return coco


IMAGES = [{"id": n, "file_name": f"{n}.png"} for n in range(3)]


@pytest.mark.parametrize("caption", [7, 1.5, True, ["a"], {"en": "a"}])
def test_captions_that_are_no_text_are_bad_samples(coco, caption):
    captions = ["good", caption, "good"]
    annotations = [{"image_id": n, "caption": text} for n, text in enumerate(captions)]
    source = open_source(SourceConfig(path=str(coco(IMAGES, annotations))))
    for copy in (source, pickle.loads(pickle.dumps(source))):
        assert [copy[n]["captions"] for n in (0, 2, -1)] == [("good",)] * 3
        with pytest.raises(BadSampleError, match=r"1\.png") as raised:
            copy[1]
        assert raised.value.kind == "no_example"


def test_null_and_half_an_emoji_are_captions_as_in_other_files(coco):
    annotations = [{"image_id": 0, "caption": text} for text in (None, "smile \ud83d", "犬")]
    assert opened(coco(IMAGES[:1], annotations))[0]["captions"] == ("smile \ud83d", "犬")


def test_a_file_that_is_listed_twice_keeps_all_captions(coco):
    images = [{"id": 0, "file_name": "a.png"}, {"id": 1, "file_name": "a.png"}]
    annotations = [{"image_id": n, "caption": f"caption {n}"} for n in range(2)]
    assert [e["captions"] for e in opened(coco(images, annotations))] == [
        ("caption 0", "caption 1")
    ]


@pytest.mark.parametrize("again", ["./1.png", "../{folder}/1.png", "link.png"])
def test_other_spellings_of_a_listed_path_are_the_same_image(tmp_path, again, encode, noise):
    (tmp_path / "1.png").write_bytes(encode(noise(4, 7, 3)))
    (tmp_path / "link.png").symlink_to("1.png")
    again = again.format(folder=tmp_path.name)
    (tmp_path / "results.token").write_text(f"1.png#0\ta\n{again}#1\tb\n")
    assert [example["captions"] for example in opened(tmp_path)] == [("a", "b")]
    sentences = [
        {"filename": name, "split": "test", "sentences": [{"raw": name}]}
        for name in ("1.png", again)
    ]
    (tmp_path / "dataset_x.json").write_text(json.dumps({"images": sentences}))
    assert [example["captions"] for example in opened(tmp_path)] == [("1.png", again)]


def test_an_image_that_is_listed_twice_with_one_id_has_its_captions_once(coco):
    folder = coco([IMAGES[1]] * 2, [{"image_id": 1, "caption": "a"}])
    assert [example["captions"] for example in opened(folder)] == [("a",)]


def test_annotations_of_no_image_are_told(coco, caplog):
    annotations = [{"image_id": n, "caption": "a"} for n in (0, 7, 8, 8)]
    opened(coco(IMAGES, annotations))
    assert "2 image_ids" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        {"images": [{"id": 0, "file_name": 7}], "annotations": []},
        {"images": [{"id": [0], "file_name": "a.png"}], "annotations": []},
        {"images": [7], "annotations": []},
        {"images": 7, "annotations": []},
        {"images": {}, "annotations": [{"caption": "a"}]},
        [],
        None,
        "text",
    ],
)
def test_a_caption_file_with_other_types_is_refused(tmp_path, content):
    (tmp_path / "captions_val2017.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"captions_val2017\.json"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["a.token", "captions.txt", "captions_a.json", "dataset_a.json"])
@pytest.mark.parametrize(
    ("encoding", "told"), [("latin-1", r"'é' .*Latin-1"), ("utf-16", "UTF-16")]
)
def test_caption_files_in_another_encoding_are_refused(tmp_path, name, encoding, told):
    (tmp_path / name).write_bytes("a.png#0\tcafé\n".encode(encoding))
    with pytest.raises(UserError, match=told):
        opened(tmp_path)


def test_one_missing_image_does_not_hide_the_others(coco):
    """The first that is listed may be the one that is missing."""
    folder = coco(IMAGES, [{"image_id": n, "caption": "a"} for n in range(3)])
    (folder / "val2017/0.png").unlink()
    assert len(opened(folder)) == 3
    for image in (folder / "val2017").iterdir():
        image.unlink()
    with pytest.raises(UserError, match=r"'0\.png'"):
        opened(folder)


def test_a_data_set_beside_what_describes_it_is_read(tmp_path, encode, noise):
    (tmp_path / "a.png").write_bytes(encode(noise(4, 7, 3)))
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": "a.png", "caption": "a dog"}))
    for name in ("dataset_info.json", "dataset_infos.json"):
        (tmp_path / name).write_text("{}")
    assert opened(tmp_path)[0]["captions"] == ("a dog",)
    (tmp_path / "captions.jsonl").rename(tmp_path / "pairs.jsonl")
    assert opened(tmp_path)[0]["captions"] == ("a dog",)


@pytest.mark.parametrize("name", ["nocaps_val_4500_captions.json", "val.json"])
def test_cocos_form_is_read_under_any_name(coco, name):
    folder = coco(IMAGES[:2], [{"image_id": n, "caption": f"caption {n}"} for n in (1, 0)])
    (folder / "annotations/captions_val2017.json").rename(folder / name)
    (folder / "val2017").rename(folder / "images")
    for path in (folder, folder / name):
        assert [example["captions"] for example in opened(path)] == [
            ("caption 0",),
            ("caption 1",),
        ]


def test_boxes_in_cocos_form_are_no_captions(tmp_path, encode, noise):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/0.png").write_bytes(encode(noise(4, 7, 3)))
    content = {"images": [{"id": 0, "file_name": "cat/0.png"}], "annotations": [{"image_id": 0}]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    assert [example["label"] for example in opened(tmp_path)] == ["cat"]


def test_an_id_of_coco_may_be_a_text_in_one_of_the_lists(coco, caplog):
    folder = coco(IMAGES[:1], [{"image_id": "0", "caption": "a"}])
    assert [example["captions"] for example in opened(folder)] == [("a",)]
    assert not caplog.text


def test_lines_of_flickr_may_end_with_carriage_returns_alone(tmp_path, encode, noise):
    write(tmp_path, "Flickr8k.token.txt", encode, noise)
    file = tmp_path / "Flickr8k.token.txt"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r"))
    assert [example["captions"] for example in opened(tmp_path)] == [TEXTS, TEXTS]
