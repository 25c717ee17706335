"""What test_encode.py runs in each of two processes: evaluations with a cache, the results into argv[1]."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
from conftest import make_encoder, make_params, make_pictures_with_bad

from lit_jax.config import MeshConfig
from lit_jax.distributed import process
from lit_jax.distributed.mesh import make_mesh
from lit_jax.evals.cache import EmbeddingCache
from lit_jax.evals.classes import Classes
from lit_jax.evals.labels import Labels, label_ids
from lit_jax.evals.retrieval import captions_of, evaluate_retrieval
from lit_jax.evals.zero_shot import zero_shot

process.initialize()
assert [device.process_index for device in jax.devices()] == [0] * 4 + [1] * 4
# Neighbours in the mesh belong to different processes, as they may on a pod.
interleaved = [
    device for pair in zip(jax.devices()[:4], jax.devices()[4:], strict=True) for device in pair
]
encoder = dataclasses.replace(make_encoder(), mesh=make_mesh(MeshConfig(), interleaved))
source = make_pictures_with_bad()
classes = Classes(names=tuple("abc"), templates=("{}",))
params = make_params(encoder)
folder = (
    Path(sys.argv[1]).parent / f"cache{jax.process_index()}"
)  # a disk that the other does not see
for _ in range(2):  # computed, then read by the first process alone
    cached = dataclasses.replace(encoder, cache=EmbeddingCache(folder))
    result = zero_shot(cached, params, source, classes, label_ids(Labels(source), classes))
    found = evaluate_retrieval(cached, params, source, captions_of(source))
arrays = dataclasses.asdict(result)
del arrays["metrics"]
np.savez(sys.argv[1], retrieval=list(found.metrics.values()), **arrays)
