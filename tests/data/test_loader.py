"""The stream of training batches: order, captions, bad samples, workers."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lit_jax.config import DataConfig
from lit_jax.data import loader
from lit_jax.data.eval_loader import eval_batches
from lit_jax.data.example import BAD_KINDS, Example
from lit_jax.data.loader import (
    ImagePreprocessor,
    PairPreprocessor,
    TeacherPreprocessor,
    TextPreprocessor,
    TrainStream,
)
from lit_jax.data.text import load_tokenizer
from lit_jax.errors import UserError
from tests.data.conftest import EXAMPLES, WORDS, open_folder
from tests.digits import open_digits

NONE_BAD = dict.fromkeys(BAD_KINDS, 0)
CONFIG = DataConfig(threads=2)


@pytest.fixture
def open_stream(image_transform, tokenizer):
    """Opens a TrainStream; all are closed after the test."""
    streams = []

    def open_stream(
        source,
        config=CONFIG,
        seed=0,
        batch_size=4,
        process=0,
        processes=1,
        preprocessor=None,
        **changes,
    ):
        config = dataclasses.replace(config, **changes)
        stream = TrainStream(
            source,
            preprocessor
            or PairPreprocessor(ImagePreprocessor(image_transform), TextPreprocessor(tokenizer)),
            config=config,
            seed=seed,
            batch_size=batch_size,
            process_index=process,
            process_count=processes,
        )
        streams.append(stream)
        return stream

    yield open_stream
    for stream in streams:
        stream.close()


@pytest.fixture
def captions(tokenizer):
    """The captions in batches, as (example, word)."""

    def captions(*batches):
        texts = tokenizer.batch_decode(
            np.concatenate([batch["input_ids"] for batch in batches]), skip_special_tokens=True
        )
        # Digits are tokens of their own, and tokens are joined by blanks.
        return [(int("".join(text.split()[:-1])), text.split()[-1]) for text in texts]

    return captions


def take(stream, count):
    return [next(stream) for _ in range(count)]


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def test_batch_has_what_the_model_takes(source, open_stream):
    batch = next(open_stream(source, batch_size=6))
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "pixel_values": ((6, 6, 5, 3), np.uint8),
        "input_ids": ((6, 24), np.int32),
        "attention_mask": ((6, 24), np.int32),
        "token_type_ids": ((6, 24), np.int32),
    }


def test_text_pairs_have_what_a_student_and_its_teacher_take(demo_folder, open_stream):
    student = load_tokenizer(demo_folder / "xlm_roberta", max_length=24)
    teacher = load_tokenizer(demo_folder / "clip", max_length=20)
    preprocessor = TeacherPreprocessor(student, teacher)
    source = open_digits("parallel", text_only=True)
    batch = next(open_stream(source, preprocessor=preprocessor, batch_size=64))
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "input_ids": ((64, 24), np.int32),
        "attention_mask": ((64, 24), np.int32),
        "teacher_input_ids": ((64, 20), np.int32),
        "teacher_attention_mask": ((64, 20), np.int32),
    }
    said = student.batch_decode(batch["input_ids"], skip_special_tokens=True)
    taught = teacher.batch_decode(batch["teacher_input_ids"], skip_special_tokens=True)
    german_of = {e["teacher_caption"]: e["captions"] for e in (source[i] for i in range(560))}
    pairs = zip(said, taught, strict=True)
    matches = [german_of[english.strip()].index(text) for text, english in pairs]
    assert set(matches) == {0, 1}  # each sentence is one of the two that the teacher's stands for


def test_a_caption_without_a_translation_is_its_own(demo_folder):
    tokenizer = load_tokenizer(demo_folder / "clip", max_length=8)
    preprocessor = TeacherPreprocessor(tokenizer, tokenizer)
    example = Example(key="a", image=None, captions=(" ", "forty two"), label=None)
    element = preprocessor.sample(0, example, np.random.default_rng(0))
    assert element == ("forty two", "forty two")


def test_an_epoch_has_every_example_once_in_a_new_order(source, open_stream, captions):
    stream = open_stream(source, batch_size=EXAMPLES)
    epochs = [[example for example, _ in captions(next(stream))] for _ in range(4)]
    other_seed = [
        example for example, _ in captions(next(open_stream(source, seed=1, batch_size=22)))
    ]
    assert all(sorted(epoch) == list(range(EXAMPLES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, other_seed]}) == 5


def test_each_epoch_draws_one_of_the_captions(source, open_stream, captions):
    drawn = captions(*take(open_stream(source, batch_size=EXAMPLES), 20))
    for i in range(EXAMPLES):
        assert {word for example, word in drawn if example == i} == set(WORDS)


def test_each_epoch_augments_anew(source, open_stream, captions):
    seen = set()
    for batch in take(open_stream(source, batch_size=EXAMPLES), 5):
        index = [example for example, _ in captions(batch)].index(7)
        seen.add(batch["pixel_values"][index].tobytes())
    assert len(seen) > 1


@pytest.mark.parametrize("threads", [0, 1, 8])
def test_threads_change_nothing(source, open_stream, threads):
    assert_equal(take(open_stream(source, threads=threads), 12), take(open_stream(source), 12))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_batches(source, open_stream, processes):
    whole = take(open_stream(source), 12)
    shares = [
        take(open_stream(source, process=p, processes=processes), 12) for p in range(processes)
    ]
    for n, batch in enumerate(whole):
        for p in range(processes):
            assert_equal([shares[p][n]], [{k: array[p::processes] for k, array in batch.items()}])


def test_stream_goes_on_from_every_position(source, open_stream):
    batches, states, stream = [], [], open_stream(source)
    for _ in range(8):
        states.append(stream.get_state())
        batches.append(next(stream))
    other = open_stream(source, threads=1)
    for n in (3, 0, 7, 5, 1, 6, 2, 4):
        other.set_state(states[n])
        assert other.get_state() == states[n]
        assert states[n] == {"next_batch": n, "samples_read": 4 * n, "bad_samples": NONE_BAD}
        assert_equal(take(other, 8 - n), batches[n:])


def test_a_small_data_set_is_repeated_within_a_batch(jsonl_folder, open_stream, captions):
    folder = jsonl_folder({"image": f"{i}.png", "caption": f"{i} one"} for i in range(3))
    examples = [
        example for example, _ in captions(next(open_stream(open_folder(folder), batch_size=8)))
    ]
    assert {i: examples[:6].count(i) for i in range(3)} == {0: 2, 1: 2, 2: 2}


def test_a_batch_that_does_not_divide_is_refused(source, image_transform, open_stream):
    refused = pytest.raises(UserError, match=r"\b6 .*config\.batch_size .*\b4\b")
    with refused:
        open_stream(source, batch_size=6, processes=4)
    batches = eval_batches(source, image_transform, batch_size=6, process_index=0, process_count=4)
    with refused:
        next(batches)


def test_bad_samples_are_replaced_counted_and_logged_once(spoilt, open_stream, captions, caplog):
    stream = open_stream(spoilt, max_bad_fraction=0.9)
    drawn = captions(*take(stream, 18))  # three epochs
    assert len(drawn) == 72
    assert {example for example, _ in drawn} == set(range(24)) - {0, 6, 12, 18}
    met = {kind: count for kind, count in stream.bad_samples.items() if count}
    assert met.keys() == {"missing", "no_caption", "not_image"}
    assert sum(met.values()) >= 12  # a replacement may be bad, too
    told = sorted(record.args[0] for record in caplog.records)
    assert told == ["12.png", "18.png", "6.png", "missing.png"]


def test_replacements_are_the_same_everywhere(spoilt, open_stream):
    whole = take(open_stream(spoilt, max_bad_fraction=0.9), 12)
    for p in range(2):
        share = take(
            open_stream(spoilt, max_bad_fraction=0.9, process=p, processes=2, threads=8), 12
        )
        assert_equal(share, [{k: array[p::2] for k, array in batch.items()} for batch in whole])


def test_too_many_bad_samples_stop_the_run_after_an_epoch(spoilt, open_stream):
    stream = open_stream(spoilt, batch_size=6, max_bad_fraction=0.1)
    take(stream, 3)
    with pytest.raises(UserError, match=r"\d .*\d+ .*max_bad_fraction"):
        next(stream)


def test_bad_samples_are_counted_over_the_whole_run(spoilt, open_stream):
    whole = open_stream(spoilt, max_bad_fraction=0.9)
    take(whole, 9)
    first = open_stream(spoilt, max_bad_fraction=0.9)
    take(first, 5)
    second = open_stream(spoilt, max_bad_fraction=0.9)
    second.set_state(first.get_state())
    take(second, 4)
    assert 0 < sum(first.bad_samples.values()) < sum(second.bad_samples.values())
    assert second.get_state() == whole.get_state()


def test_too_many_bad_samples_before_a_run_is_resumed_stop_it_then(source, open_stream):
    stream = open_stream(source, max_bad_fraction=0.1)
    stream.set_state({"next_batch": 8, "samples_read": 30, "bad_samples": {**NONE_BAD, "empty": 8}})
    with pytest.raises(UserError, match=r"8 .*34 .*\(23\.5%: 8 empty\)"):
        next(stream)


def test_bad_samples_are_judged_early_in_a_large_data_set(spoilt, open_stream, monkeypatch):
    monkeypatch.setattr(loader, "JUDGE_AFTER", 10)
    stream = open_stream(spoilt, batch_size=1, max_bad_fraction=0.0)
    with pytest.raises(UserError, match=r"config\.data\.max_bad_fraction"):
        take(stream, 16)


@pytest.mark.parametrize("threads", [0, 4])
def test_nothing_but_bad_samples_stops_the_run(jsonl_folder, open_stream, threads):
    source = open_folder(jsonl_folder([{"image": "missing.png", "caption": "a"}]))
    with pytest.raises(UserError, match=r"missing\.png"):
        next(open_stream(source, max_bad_fraction=1.0, threads=threads))


@pytest.mark.long
def test_workers_change_nothing_and_outlive_sigterm(spoilt, open_stream):
    expected = take(open_stream(spoilt, max_bad_fraction=0.9), 12)
    stream = open_stream(spoilt, max_bad_fraction=0.9, workers=2)
    # The position is odd, so the workers change their turns.
    stream.set_state({"next_batch": 5, "samples_read": 20, "bad_samples": {**NONE_BAD, "empty": 4}})
    batches = take(stream, 2)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    assert_equal(batches + take(stream, 5), expected[5:])
    stream.close()
    assert not multiprocessing.active_children()


@pytest.mark.long
def test_an_error_of_a_worker_is_the_error_of_the_stream(jsonl_folder, open_stream):
    folder = jsonl_folder({"image": "missing.png", "caption": "a"} for _ in range(3))
    stream = open_stream(open_folder(folder), workers=1)
    with pytest.raises(UserError, match=r"100 samples"):
        next(stream)


@pytest.mark.long
@pytest.mark.parametrize(
    ("end", "advice"),
    [
        (signal.SIGKILL, r"SIGKILL.; .*config.data.workers"),
        (signal.SIGSEGV, r"SIGSEGV.; see its output"),
    ],
)
def test_a_worker_that_is_killed_is_no_riddle(source, open_stream, end, advice):
    stream = open_stream(source, workers=1)
    next(stream)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, end)
    with pytest.raises(UserError, match=advice):
        take(stream, 20)  # what lies ready first


@pytest.mark.long
def test_workers_end_when_training_is_killed(source, demo_folder, tmp_path):
    code = """if True:
        import multiprocessing, os, signal, sys
        from pathlib import Path
        from lit_jax.config import DataConfig, SourceConfig
        from lit_jax.data.image_processor import load_image_transform
        from lit_jax.data.image import ImageTransform
        from lit_jax.data.loader import TrainStream
        from lit_jax.data.loader import TextPreprocessor, PairPreprocessor, ImagePreprocessor
        from lit_jax.data.text import load_tokenizer
        from tests.digits import open_digits
        if __name__ == "__main__":
            demo = Path(sys.argv[1])
            transform = load_image_transform(demo / "vit")
            tokenizer = load_tokenizer(demo / "bert", max_length=24)
            stream = TrainStream(
                open_digits("unseen"),
                PairPreprocessor(ImagePreprocessor(transform), TextPreprocessor(tokenizer)),
                config=DataConfig(workers=1, threads=1),
                seed=0, batch_size=4, process_index=0, process_count=1,
            )
            next(stream)
            (worker,) = multiprocessing.active_children()
            print(worker.pid, stream._slots.folder, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    (tmp_path / "script.py").write_text(code)
    result = subprocess.run(
        [sys.executable, tmp_path / "script.py", demo_folder],
        env=os.environ | {"PYTHONPATH": str(demo_folder.parents[1])},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL
    worker, slots = map(Path, result.stdout.split())
    worker = Path("/proc") / worker
    assert worker.name.isdigit()
    deadline = time.monotonic() + 100
    while worker.exists() and "zombie" not in (worker / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not slots.exists()
