"""Images a second from JPEG files to the pixels of a tower: python -m benchmarks.decode.

Two photographs (scikit-learn's) at three sizes, to 224 pixels, on one core; decoded in full, and reduced. The
ratio is of the times; the difference is the mean of the pixels', 0 to 255.
"""

import dataclasses
import io
import time

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from lit_jax.data.image import ImageTransform
from lit_jax.models.normalization import Normalization

TARGET = 224
WIDTHS = (640, 1280, 2560)
REPEATS = 15


def seconds(transform: ImageTransform, files: list[bytes]) -> float:
    """Return the seconds of processor time for one image: the least of some rounds."""
    # A disturbance can only add time.
    rounds = []
    for _ in range(REPEATS):
        start = time.process_time()
        for content in files:
            transform.train(content, np.random.default_rng(0))
        rounds.append(time.process_time() - start)
    return min(rounds) / len(files)


def main() -> None:
    reduced = ImageTransform(
        height=TARGET,
        width=TARGET,
        resize=(TARGET, TARGET),
        center_crop=False,
        resample=Image.Resampling.BICUBIC,
        normalization=Normalization((1.0,) * 3, (0.0,) * 3),
        flip=True,
    )
    full = dataclasses.replace(reduced, reduced_jpeg=False)
    print(f"{'photo':>12}{'full/s':>10}{'reduced/s':>11}{'ratio':>8}{'difference':>12}")
    for width in WIDTHS:
        files = []
        for photo in map(Image.fromarray, load_sample_images().images):
            buffer = io.BytesIO()
            photo.resize((width, width * 2 // 3)).save(buffer, "JPEG", quality=90)
            files.append(buffer.getvalue())
        slow, fast = seconds(full, files), seconds(reduced, files)
        pairs = [[t.train(c, np.random.default_rng(0)) for t in (reduced, full)] for c in files]
        differences = [np.abs(np.subtract(*pair, dtype=int)).mean() for pair in pairs]
        size = f"{width}x{width * 2 // 3}"
        row = f"{size:>12}{1 / slow:>10.1f}{1 / fast:>11.1f}{slow / fast:>7.2f}x"
        print(f"{row}{np.mean(differences):>12.2f}")


if __name__ == "__main__":
    main()
