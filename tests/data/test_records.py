import json

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_jax.data.example import BadSampleError, Example
from lit_jax.data.sources.records import (
    MANIFEST,
    Shard,
    decode,
    encode,
    read_manifest,
    write_manifest,
)
from lit_jax.errors import UserError

ANY_TEXT = st.text(st.characters(codec=None))  # also halves of surrogate pairs


@given(
    example=st.fixed_dictionaries(
        {
            "key": ANY_TEXT,
            "image": st.none() | st.binary(),
            "captions": st.lists(ANY_TEXT, max_size=3).map(tuple),
            "teacher_caption": st.none() | ANY_TEXT,
            "label": st.none() | ANY_TEXT,
        }
    ),
    language=st.none() | ANY_TEXT,
)
def test_a_record_gives_back_the_example(example, language):
    if language is not None:
        language = tuple(language + text for text in example["captions"])
    example["languages"] = language
    always = {"key", "image", "captions", "label"}
    kept = {k: v for k, v in example.items() if v is not None or k in always}
    assert decode(encode(example)) == kept


def test_an_image_has_to_be_encoded(tmp_path):
    with pytest.raises(TypeError, match="PosixPath"):
        encode(Example(key="a", image=tmp_path, captions=(), label=None))


@pytest.mark.parametrize("record", [b"", b"\xc1", b"\x01", b"\x80"])
def test_a_damaged_record_is_a_bad_sample(record):
    with pytest.raises(BadSampleError, match=r"\((ValueError|FormatError|TypeError|KeyError)\("):
        decode(record)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("captions", None),
        ("captions", "a dog"),
        ("captions", ("a", None)),
        ("captions", {"en": "a"}),
        ("key", 3),
        ("image", "a.png"),
        ("label", 1.0),
        ("teacher_caption", b"a"),
        ("languages", ("en", "de")),
        ("languages", (1,)),
        ("languages", "en"),
    ],
)
def test_a_record_with_another_type_in_a_field_is_a_bad_sample(field, value):
    row = {"key": "a", "image": b"x", "captions": ("a dog",), field: value}
    with pytest.raises(BadSampleError, match=rf'\("{field}'):
        decode(msgpack.packb(row))


def test_a_manifest_gives_back_its_shards(tmp_path):
    shards = (
        Shard("犬-00000-of-00002.array_record", 3),
        Shard("犬-00001-of-00002.array_record", 0),
    )
    write_manifest(tmp_path, shards)
    assert read_manifest(tmp_path) == shards
    assert [file.name for file in tmp_path.iterdir()] == [MANIFEST]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"\(.*Expecting"),
        ("[]", MANIFEST),
        (json.dumps({"version": 1, "shards": [{"name": "a"}]}), r"'count'"),
        (json.dumps({"version": 2, "shards": []}), r"2, .*lit_jax .*1"),
        (json.dumps({"version": 1, "shards": []}), MANIFEST),
    ],
)
def test_a_bad_manifest_is_refused(tmp_path, text, message):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path)
