"""Mixtures, and what a source's config makes of its captions."""

import dataclasses
import itertools
import json
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from grain._src.python.testing.experimental import assert_equal_output_after_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from lit_jax.config import DataConfig, SourceConfig, default, parse
from lit_jax.data.example import BadSampleError, Example, Source, sample_caption
from lit_jax.data.loader import TrainStream
from lit_jax.data.mixture import Interleave, Mixture, open_training_data, part_of, training_order
from lit_jax.data.sources import open_source
from lit_jax.errors import UserError
from lit_jax.evals.retrieval import captions_of


class Numbers:
    """Captions "NAME 0", "NAME 1" ... without images; those at `bad` are empty."""

    def __init__(self, name: str, count: int, bad: tuple[int, ...] = ()):
        self._name, self._count, self._bad = name, count, bad

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        text = "" if index in self._bad else f"{self._name} {index}"
        return Example(key=str(index), image=None, captions=(text,), label=None)


@dataclasses.dataclass(frozen=True)
class CaptionPreprocessor:
    """A batch is its captions."""

    def sample(self, index: int, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        return {"caption": f"{sample_caption(example, rng)} {rng.integers(1000)}"}

    def collate(self, elements) -> dict[str, np.ndarray]:
        return {"caption": np.array([element["caption"] for element in elements])}


@pytest.fixture
def mixture() -> Mixture:
    parts = {"a": Numbers("a", 7), "b": Numbers("b", 5, bad=(1, 3)), "c": Numbers("c", 11)}
    return Mixture(parts, {"a": 1.0, "b": 0.5, "c": 2.1})


@pytest.fixture
def open_stream():
    streams = []

    def open_stream(source, seed=3, process=0, processes=1, **settings) -> TrainStream:
        config = DataConfig(**{"threads": 1, "max_bad_fraction": 1.0} | settings)
        stream = TrainStream(
            source,
            CaptionPreprocessor(),
            config=config,
            seed=seed,
            batch_size=6,
            process_index=process,
            process_count=processes,
        )
        streams.append(stream)
        return stream

    yield open_stream
    for stream in streams:
        stream.close()


def captions(stream: TrainStream, batches: int) -> list[str]:
    return [text for _ in range(batches) for text in next(stream)["caption"].tolist()]


WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5)


@given(weights=WEIGHTS, start=st.integers(0, 10**15))
def test_each_part_always_has_its_share(weights, start):
    interleave = Interleave(tuple(weights))
    total = sum(map(Fraction, weights))
    for n in range(start, start + 40):
        part, within = interleave[n]
        # So many of its own came before; at most one fewer than its share for each part before it.
        assert -part <= within - n * Fraction(weights[part]) / total < 1


@given(weights=WEIGHTS)
def test_no_part_leaves_an_example_out(weights):
    drawn = [Interleave(tuple(weights))[n] for n in range(300)]
    for part in range(len(weights)):
        assert [within for p, within in drawn if p == part] == list(
            range(sum(p == part for p, _ in drawn))
        )


def test_two_to_one():
    assert [Interleave((2.0, 1.0))[n][0] for n in range(6)] == [0, 0, 1] * 2
    assert Counter(Interleave((2.0, 1.0))[n][0] for n in range(3000)) == {0: 2000, 1: 1000}


def test_a_mixture_is_its_parts_one_behind_the_other(mixture):
    assert isinstance(mixture, Source)
    assert len(mixture) == 23
    keys = [mixture[i]["key"] for i in range(23)]
    names = [("a", 7), ("b", 5), ("c", 11)]
    assert keys == [f"{name}/{i}" for name, count in names for i in range(count)]
    for start, stop in itertools.pairwise((0, 7, 12, 23)):
        assert {part_of(mixture, i) for i in range(start, stop)} == {range(start, stop)}
    with pytest.raises(IndexError):
        mixture[23]


def test_each_part_is_shuffled_anew_in_every_epoch_of_its_own(mixture):
    order = training_order(mixture, 0)
    drawn = [order[n] for n in range(400)]
    for start, stop in ((0, 7), (7, 12), (12, 23)):
        size = stop - start
        of_part = [i for i in drawn if start <= i < stop]
        epochs = [tuple(of_part[n : n + size]) for n in range(0, len(of_part) - size, size)]
        assert len(epochs) >= 8
        assert all(sorted(epoch) == list(range(start, stop)) for epoch in epochs)
        assert len(set(epochs)) > 1


def test_sources_of_one_size_are_in_different_orders():
    order = training_order(Mixture({"a": Numbers("a", 50), "b": Numbers("b", 50)}, {}), 0)
    drawn = [order[n] for n in range(100)]
    assert [i for i in drawn if i < 50] != [i - 50 for i in drawn if i >= 50]


def test_without_weights_an_epoch_is_every_example_once():
    mixture = Mixture({"a": Numbers("a", 7), "b": Numbers("b", 70)}, {})
    order = training_order(mixture, 5)
    assert sorted(order[n] for n in range(77)) == list(range(77))


def test_the_order_depends_on_the_seed(mixture):
    orders = [[training_order(mixture, seed)[n] for n in range(40)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_restoring_at_every_position_continues_exactly(mixture, open_stream):
    """Grain's own checker, on the stream of all that a process reads."""

    class Batches:
        def __iter__(self):
            return Limited(open_stream(mixture), 9)

    class Limited:
        def __init__(self, stream, limit):
            self._stream, self._limit = stream, limit

        def __iter__(self):
            return self

        def __next__(self):
            if self._stream.get_state()["next_batch"] >= self._limit:
                raise StopIteration
            return next(self._stream)

        def get_state(self):
            return self._stream.get_state()

        def set_state(self, state):
            self._stream.set_state(state)

    assert_equal_output_after_checkpoint(Batches())


@pytest.mark.parametrize("threads", [0, 4])
def test_threads_change_nothing(mixture, open_stream, threads):
    assert captions(open_stream(mixture, threads=threads), 10) == captions(open_stream(mixture), 10)


def test_processes_share_the_batches(mixture, open_stream):
    whole = captions(open_stream(mixture), 10)
    for p in range(3):
        assert captions(open_stream(mixture, process=p, processes=3), 10) == whole[p::3]


@pytest.mark.long
def test_workers_change_nothing(mixture, open_stream):
    assert captions(open_stream(mixture, workers=2), 10) == captions(open_stream(mixture), 10)


def test_a_bad_sample_is_replaced_by_one_of_its_source(mixture, open_stream):
    stream = open_stream(mixture)
    drawn = Counter(text.split()[0] for text in captions(stream, 60))
    assert sum(stream.bad_samples.values()) > 10
    expected = {"a": 360 / 3.6, "b": 180 / 3.6, "c": 756 / 3.6}
    for name, count in expected.items():
        assert abs(drawn[name] - count) < 3


@pytest.fixture
def write_folders(jsonl_folder, tmp_path):
    """A data set of three images and one of two, as config.data.mixture."""
    jsonl_folder({"image": f"{i}.png", "caption": f"{i}"} for i in range(3))
    other = tmp_path / "other"
    other.mkdir()
    rows = [json.dumps({"image": f"../{i}.png", "label": "dog"}) for i in range(2)]
    (other / "captions.jsonl").write_text("\n".join(rows))
    return {"all": {"path": str(tmp_path)}, "labels": {"path": str(other), "weight": 2}}


def open_config(**data) -> Source:
    raw = default().to_dict()
    raw["data"] |= data
    return open_training_data(parse(raw).data)


def test_a_mixture_is_written_in_the_config(write_folders):
    write_folders["labels"]["templates"] = ("a photo of a {}", "{}!")
    mixture = open_config(mixture=write_folders)
    assert isinstance(mixture, Mixture)
    assert mixture.weights == {"all": 3, "labels": 2.0}
    assert [example["captions"] for example in (mixture[i] for i in range(5))] == [
        ("0",),
        ("1",),
        ("2",),
        ("a photo of a dog", "dog!"),
        ("a photo of a dog", "dog!"),
    ]


def test_bad_mixtures_are_refused(write_folders):
    with pytest.raises(UserError, match=r"train\.path .*config\.data\.mixture"):
        open_config(mixture=write_folders, train={"path": "nowhere"})
    write_folders["labels"]["weight"] = 0
    with pytest.raises(UserError, match=r"mixture\.labels\.weight .*0"):
        open_config(mixture=write_folders)
    with pytest.raises(UserError, match=r"config\.data\.mixture\.labels\.wieght"):
        open_config(mixture={"labels": {"wieght": 1}})


def test_only_the_first_examples(write_folders):
    source = open_config(train={**write_folders["all"], "max_examples": 2})
    assert len(source) == 2
    assert [example["key"] for example in source] == ["0.png", "1.png"]


@pytest.fixture
def multilingual(jsonl_folder):
    folder = jsonl_folder(
        [
            {
                "image": "a.png",
                "captions": {"en": ["a taxi", "taxi"], "de": "taxi", "ar": "سيارة أجرة"},
            },
            {"image": "b.png", "captions": {"th": ["แท็กซี่คันหนึ่ง"], "en": [" "]}},
        ]
    )

    def open_languages(**languages: float) -> Source:
        return open_source(
            SourceConfig(path=str(folder), languages={k: float(v) for k, v in languages.items()})
        )

    return open_languages


def test_languages_are_drawn_by_their_weights(multilingual):
    example = multilingual(en=3.0, de=1.0, fr=9.0)[0]
    assert example["captions"] == ("a taxi", "taxi", "taxi")
    assert example["languages"] == ("en", "en", "de")
    assert np.allclose(example["caption_weights"], (1.5, 1.5, 1.0))
    rng = np.random.default_rng(0)
    drawn = Counter(sample_caption(example, rng) for _ in range(4000))
    assert abs(drawn["a taxi"] / 4000 - 3 / 8) < 0.03


def test_text_in_any_script_comes_out_as_it_went_in(multilingual):
    assert multilingual()[0]["captions"] == ("a taxi", "taxi", "taxi", "سيارة أجرة")
    assert multilingual(ar=1.0)[0]["captions"] == ("سيارة أجرة",)
    assert multilingual(th=1.0)[1]["captions"] == ("แท็กซี่คันหนึ่ง",)


def test_without_a_caption_in_the_language_there_is_none(multilingual):
    assert multilingual(en=1.0)[1]["captions"] == ()
    assert multilingual(de=0.0, th=1.0)[0]["captions"] == ()
    with pytest.raises(BadSampleError, match=r" en, de, ar$"):
        sample_caption(multilingual(de=0.0, th=1.0)[0], np.random.default_rng(0))
    with pytest.raises(BadSampleError, match=r" th$"):  # the English one is blank
        sample_caption(multilingual(en=1.0)[1], np.random.default_rng(0))
    with pytest.raises(UserError, match=r"--eval\.languages.* ar, de, en, th\."):
        captions_of(multilingual(xx=1.0))


def test_bad_languages_are_refused(multilingual, jsonl_folder):
    with pytest.raises(UserError, match=r"\(de, en\) .*\b0\b"):
        multilingual(de=0.0, en=0.0)
    folder = jsonl_folder([{"image": "a.png", "caption": "a"}])
    source = open_source(SourceConfig(path=str(folder), languages={"en": 1.0}))
    with pytest.raises(UserError, match=r"a\.png"):
        source[0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"captions": {"en": 3}}, r"'en': 3"),
        ({"captions": {"en": ["a", 3]}}, r'"captions"'),
        ({"captions": {"en": "a"}, "caption": "b"}, r'"caption"'),
    ],
)
def test_bad_captions_by_language_are_refused(jsonl_folder, row, reason):
    with pytest.raises(UserError, match=reason):
        open_source(SourceConfig(path=str(jsonl_folder([{"image": "a.png"} | row]))))


def test_a_template_takes_the_label_where_it_stands(write_folders):
    with pytest.raises(UserError, match=r"'a photo' .*\{\}"):
        open_config(train={**write_folders["all"], "templates": ("a photo",)})
    captioned = open_config(train={**write_folders["all"], "templates": ("{}",)})
    assert captioned[0]["captions"] == ("0",)  # it has one of its own
