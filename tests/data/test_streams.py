"""Streams of every format: they resume at every position, and processes and workers share them."""

import numpy as np
import pytest
from grain._src.python.testing.experimental import assert_equal_output_after_checkpoint

from lit_jax.config import DataConfig, SourceConfig
from lit_jax.data.loader import ImagePreprocessor, PairPreprocessor, TextPreprocessor, TrainStream
from lit_jax.data.sources import open_source
from tests.data.formats import FORMATS


@pytest.fixture
def open_stream(data, image_transform, tokenizer):
    def open_stream(name, *, process=0, processes=1, **config):
        config = DataConfig(threads=2, **config)
        return TrainStream(
            open_source(SourceConfig(path=str(data / name), split=FORMATS[name][1])),
            PairPreprocessor(ImagePreprocessor(image_transform), TextPreprocessor(tokenizer)),
            config=config,
            seed=0,
            batch_size=4,
            process_index=process,
            process_count=processes,
        )

    return open_stream


class Limited:
    """The first batches of a stream, as Grain's checker takes them: an iterator with a state."""

    def __init__(self, stream, batches=5):
        self._stream, self._batches = stream, batches

    def __iter__(self):
        return self

    def __next__(self):
        if self.get_state()["next_batch"] == self._batches:
            raise StopIteration
        return next(self._stream)

    def get_state(self):
        return self._stream.get_state()

    def set_state(self, state):
        self._stream.set_state(state)


CAPTIONED = [name for name in FORMATS if name != "classes"]


@pytest.mark.parametrize("name", CAPTIONED)
def test_every_source_goes_on_from_every_position(open_stream, name):
    stream = open_stream(name)
    assert_equal_output_after_checkpoint(Limited(stream))
    stream.close()


@pytest.mark.parametrize("name", CAPTIONED)
def test_two_processes_share_every_source(open_stream, name):
    streams = [open_stream(name, process=p, processes=2) for p in range(2)]
    whole = open_stream(name)
    for _ in range(4):
        expected, *shares = (next(stream) for stream in (whole, *streams))
        for key, array in expected.items():
            for p, share in enumerate(shares):
                np.testing.assert_array_equal(share[key], array[p::2])
    for stream in (whole, *streams):
        stream.close()


@pytest.mark.long
@pytest.mark.parametrize("name", CAPTIONED)
def test_workers_do_not_change_the_order_of_any_source(open_stream, name):
    streams = [open_stream(name, workers=workers) for workers in (0, 1, 2)]
    batches = [[next(stream) for _ in range(4)] for stream in streams]
    for stream in streams:
        stream.close()
    for others in batches[1:]:
        for batch, other in zip(batches[0], others, strict=True):
            for key in batch:
                np.testing.assert_array_equal(batch[key], other[key])
