"""Batches of an evaluation: every image once, masked where it is padding or bad."""

import logging

import numpy as np
import pytest

from lit_jax.data.eval_loader import eval_batches
from tests.data.conftest import EXAMPLES


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 8, 40])
def test_eval_batches_have_every_image_once(source, image_transform, processes, batch_size):
    shares = [
        list(
            eval_batches(
                source,
                image_transform,
                batch_size=batch_size,
                process_index=p,
                process_count=processes,
            )
        )
        for p in range(processes)
    ]
    assert {len(share) for share in shares} == {-(-EXAMPLES // batch_size)}
    index = np.concatenate([[b["index"] for b in share] for share in shares], axis=1)
    assert index.dtype == np.int32
    assert index.shape[1] == batch_size
    assert index.ravel().tolist() == list(range(EXAMPLES)) + [-1] * (index.size - EXAMPLES)
    for batch in (batch for share in shares for batch in share):
        assert batch["pixel_values"].shape == (batch_size // processes, 6, 5, 3)
        for pixels, i in zip(batch["pixel_values"], batch["index"], strict=True):
            expected = image_transform.eval(source[int(i)]["image"]) if i >= 0 else 0
            np.testing.assert_array_equal(pixels, expected)


def test_eval_batches_mask_and_report_bad_images(spoilt, image_transform, caplog):
    caplog.set_level(logging.WARNING)
    batches = list(
        eval_batches(spoilt, image_transform, batch_size=10, process_index=0, process_count=1)
    )
    index = np.concatenate([batch["index"] for batch in batches])
    # Examples 6 and 12 lack no more than a caption, which an image's embedding does not need.
    assert set(range(24)) - set(index.tolist()) == {0, 18}
    missing, other, together = (record.args for record in caplog.records)
    assert missing[0] == "missing.png"
    assert "/missing.png" in missing[1]
    assert other[0] == "18.png"
    assert together == (2, 24)
