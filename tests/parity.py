"""Measures how far lit_jax is from PyTorch, for every family and every spelling of its files.

make parity     writes docs/parity.md
"""

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from flax import serialization, traverse_util

from lit_jax.models.families import TEXT, VISION
from tests.harness import largest, run_dual_encoder, run_tower

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "parity.md"
BOUND = 1e-4
SPELLINGS = ("transformers 4", "transformers 5", "msgpack")
# Of every family: what transformers 4 calls its parameters, and what Flax does. See goldens/make_files.py.
NAMES: dict[str, dict[str, str | None]] = json.loads(
    (HERE / "goldens/files/names.json").read_text()
)
# Families in whose files transformers 5 renamed what is not the inside of a block.
RENAMED_SINCE_4 = (
    (r"(clip|altclip|chinese_clip|siglip)_vision_model", r"^", "vision_model."),
    (r"(clip|siglip)_text_model", r"^", "text_model."),
    (r"altclip_text_model", r"\.layers\.", ".layer."),
    (r"altclip", r"^vision_model\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"vision-text-dual-encoder \(clip, .*\)", r"^vision_model\.", "vision_model.vision_model."),
)
TEXT_OF_PAGE = """\
# Parity with PyTorch

The differences between lit_jax {lit_jax} (JAX {jax}) and transformers {transformers} (PyTorch {torch}), on \
CPU, in float32. Both compute the same tiny model of one layer to six, with random weights, on the same \
inputs. `make parity` measures all of it again and writes this page. A test of `make test-all` measures it, \
too. The test fails if a figure is above {bound}, or if the page does not list all families.

- **forward** is the largest absolute difference of any output: the last hidden state and the pooled output \
of a tower, embeddings and logits of a dual encoder.
- **gradient** is the largest difference in the gradient of any parameter, and of the pixels, divided by \
the largest gradient of the model. The gradient is that of all outputs, weighted at random and summed.
- The three pairs of columns are for weights from three kinds of files: model.safetensors of transformers \
4.57.6, model.safetensors of transformers 5 (`save_original_format=False`), and flax_model.msgpack of \
transformers 4.57.6. A dash means that transformers 4 had no Flax class.
- Only one transformers can be installed. So the files of 4.57.6 are made from PyTorch's tensors, with the \
names that 4.57.6 wrote (tests/goldens/files/names.json).

{table}
"""


class Errors(NamedTuple):
    forward: float
    gradient: float  # relative to the largest gradient of the model


class Case(NamedTuple):
    """A row of the page."""

    name: str
    reference: Any  # make_towers.Reference
    is_whole: bool  # a dual encoder


def cases() -> Iterator[Case]:
    # Here, as it needs PyTorch: the tests read this module without it, too.
    from tests.goldens import make_towers
    from tests.goldens import models as golden_models

    for i, family in enumerate((*VISION, *TEXT)):
        config, inputs, pooling = golden_models.FAMILIES[family]
        yield Case(
            family, make_towers.compute_tower(config, inputs, pooling=pooling, seed=i), False
        )
    for i, (name, config) in enumerate(golden_models.DUAL_ENCODERS.items()):
        vision = config.vision_config
        images = golden_models.random_images(i, 2, 12, 12, vision.num_channels)
        texts = golden_models.random_texts(i, config.text_config, length=7)
        yield Case(name, make_towers.compute_dual_encoder(config, images | texts, seed=i), True)


def spellings_of(case: Case) -> list[str]:
    in_flax = None not in NAMES[case.name].values()
    return [spelling for spelling in SPELLINGS if in_flax or spelling != "msgpack"]


def measure(case: Case, spelling: str) -> Errors:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), case.reference.model, case.name, spelling)
        write(Path(folder, "gradients"), case.reference.gradients, case.name, spelling)
        run = run_dual_encoder if case.is_whole else run_tower
        computed = run(Path(folder), case.reference.arrays)
    forward = difference(computed.outputs, computed.expected_outputs)
    gradient = difference(computed.gradients, computed.expected_gradients)
    return Errors(forward, gradient / largest(computed.expected_gradients))


def difference(ours: Any, theirs: Any) -> float:
    return largest(jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), ours, theirs))


def write(folder: Path, model: Any, name: str, spelling: str) -> None:
    """Writes a model of PyTorch with the names that `spelling` has for its weights."""
    model.save_pretrained(folder, save_original_format=spelling != "transformers 5")
    if spelling == "transformers 5":
        return
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    for family, pattern, replacement in RENAMED_SINCE_4:
        if re.fullmatch(family, name):
            tensors = {re.sub(pattern, replacement, key): array for key, array in tensors.items()}
    leaves = NAMES[name]
    odd = {re.sub(r"\.\d+\.", ".*.", key) for key in tensors} ^ leaves.keys()
    # Which a model without pooler lacks.
    assert not {key for key in odd if not key.startswith("pooler.")}, odd
    if spelling == "transformers 4":
        safetensors.numpy.save_file(tensors, file)
        return
    file.unlink()
    flat = {}
    for key, array in tensors.items():
        leaf = leaves[re.sub(r"\.\d+\.", ".*.", key)]
        if leaf == "kernel":  # (in, out) where torch has (out, in), HWIO where it has OIHW
            array = array.transpose((2, 3, 1, 0) if array.ndim == 4 else (1, 0))
        flat[".".join([*key.split(".")[:-1], str(leaf)])] = array
    tree = traverse_util.unflatten_dict(flat, sep=".")
    (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))


def table(errors: dict[str, dict[str, Errors]]) -> str:
    """The rows and columns of the page; errors[row][spelling]."""
    kinds = [f"{spelling}, {kind}" for spelling in SPELLINGS for kind in Errors._fields]
    lines = [["family", *kinds], ["---"] + ["---:"] * len(kinds)]
    for name, measured in errors.items():
        cells = [measured.get(spelling, ("-", "-")) for spelling in SPELLINGS]
        figures = (x if isinstance(x, str) else f"{x:.1e}" for cell in cells for x in cell)
        lines.append([name, *figures])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    import torch
    import transformers

    import lit_jax

    transformers.logging.disable_progress_bar()
    errors = {}
    for case in cases():
        errors[case.name] = {spelling: measure(case, spelling) for spelling in spellings_of(case)}
        print(case.name, *errors[case.name].values(), file=sys.stderr)
    page = TEXT_OF_PAGE.format(
        table=table(errors),
        bound=BOUND,
        lit_jax=lit_jax.__version__,
        jax=jax.__version__,
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
    )
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
