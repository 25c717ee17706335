"""Caption files of COCO, Karpathy and Flickr as they are spread, and as they get damaged."""

import json
import pickle

import pytest

from lit_jax.config import SourceConfig
from lit_jax.data.decode import decode
from lit_jax.data.example import BadSampleError
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
    assert "1 lines of" in caplog.text
    assert "nonsense" in caplog.text


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
    with pytest.raises(UserError, match="is no caption file of its kind"):
        opened(tmp_path)


def test_one_missing_image_does_not_hide_the_others(coco):
    """The first that is listed may be the one that is missing."""
    folder = coco(IMAGES, [{"image_id": n, "caption": "a"} for n in range(3)])
    (folder / "val2017/0.png").unlink()
    assert len(opened(folder)) == 3
    for image in (folder / "val2017").iterdir():
        image.unlink()
    with pytest.raises(UserError, match=r"'0\.png' that .* is in none of the folders"):
        opened(folder)


def test_a_data_set_beside_what_describes_it_is_read(tmp_path, encode, noise):
    (tmp_path / "a.png").write_bytes(encode(noise(4, 7, 3)))
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": "a.png", "caption": "a dog"}))
    for name in ("dataset_info.json", "dataset_infos.json"):
        (tmp_path / name).write_text("{}")
    assert opened(tmp_path)[0]["captions"] == ("a dog",)
    (tmp_path / "captions.jsonl").rename(tmp_path / "pairs.jsonl")
    assert opened(tmp_path)[0]["captions"] == ("a dog",)
