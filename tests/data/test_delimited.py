"""CSV and TSV: any text, quotes, line breaks, and fields that never end."""

import csv
import io
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_jax.config import SourceConfig
from lit_jax.data import files
from lit_jax.data.files import line_offsets
from lit_jax.data.sources import open_source
from lit_jax.errors import UserError

ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=6), line_break=st.sampled_from(["\n", "\r\n"]))
def test_csv_gives_back_any_text(tmp_path, texts, line_break):
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator=line_break, quoting=csv.QUOTE_ALL)
        writer.writerows([("image", "caption"), *(("a.png", text) for text in texts)])
    source = open_source(SourceConfig(path=str(tmp_path / "a.csv"), group_captions=False))
    assert [source[i]["captions"] for i in range(len(source))] == [(text,) for text in texts]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.lists(st.text('a",\n', max_size=6), min_size=1, max_size=3), min_size=1),
    block_bytes=st.integers(1, 40),
)
def test_csv_lines_end_where_the_reader_of_csv_says(tmp_path, rows, block_bytes):
    def written(field: str) -> str:
        # Minimal: what neither begins with a quote nor has a comma or a line break stands as it is.
        plain = field and not field.startswith('"') and not {",", "\n"} & {*field}
        return field if plain else '"' + field.replace('"', '""') + '"'

    file = tmp_path / "a.csv"
    file.write_text("".join(",".join(map(written, row)) + "\n" for row in rows))
    offsets = line_offsets(file, quoted=True, block_bytes=block_bytes).tolist()
    content = file.read_text()
    lines = [content[a:b] for a, b in itertools.pairwise(offsets)]
    assert [next(csv.reader(io.StringIO(line, newline=""))) for line in lines] == rows


def test_csv_that_never_ends_a_field_is_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_FIELD_BYTES", 1000)
    file = tmp_path / "a.csv"
    file.write_text('image,caption\na.png,5" nails\nb.png,"a\n' + "c.png,c\n" * 1000)
    with pytest.raises(UserError, match=r"a\.csv .*35;"):
        line_offsets(file, quoted=True, block_bytes=64)
    file.write_text('image,caption\na.png,"a' + "\n" * 999 + '"\n')
    assert len(line_offsets(file, quoted=True, block_bytes=64)) == 3


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def test_tsv_keeps_quotes_that_quote_nothing(tmp_path):
    lines = ['5" nails', '"a" and "b"', '"said ""no"""', '"', "'"]
    text = "".join(f"{i}.png\t{line}\n" for i, line in enumerate(lines))
    (tmp_path / "a.tsv").write_text("image\tcaption\n" + text)
    source = open_source(SourceConfig(path=str(tmp_path)))
    got = [source[i]["captions"][0] for i in range(len(source))]
    assert got == ['5" nails', '"a" and "b"', 'said "no"', '"', "'"]
