"""What a training batch is made of: images with texts, or texts with a teacher's texts."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_jax.config import TEACHER, Side
from lit_jax.data.example import Example, sample_caption, usable_captions
from lit_jax.data.image import ImageTransform
from lit_jax.data.text import tokenize

Batch = dict[str, np.ndarray]


@runtime_checkable
class Reader(Protocol):
    """Plain values, so that it can be sent to worker processes."""

    def read(self, index: int, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        """One element of a batch, from the example at `index` of the source; of several captions a random
        one. Raises BadSampleError.
        """
        ...

    def collate(self, elements: Sequence[dict[str, Any]]) -> Batch: ...


@runtime_checkable
class Inputs(Protocol):
    """What one tower gets of an example."""

    def draw(self, index: int, example: Example, rng: np.random.Generator) -> Any:
        """The row of a training batch. Raises BadSampleError."""
        ...

    def collate(self, rows: Sequence[Any]) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class Pixels:
    """'pixel_values' uint8 (rows, height, width, 3).

    With `views` an image is not augmented anew each time: of this many fixed views one is drawn. They depend
    on its position in the source alone, so that runs of all seeds share them.
    """

    transform: ImageTransform
    views: int | None = None

    def draw(self, index: int, example: Example, rng: np.random.Generator) -> np.ndarray:
        if self.views is None:
            return self.transform.train(example["image"], rng)
        return self._view(index, example, int(rng.integers(self.views)))

    def all(self, index: int, example: Example) -> list[np.ndarray]:
        """Each view once."""
        return [self._view(index, example, view) for view in range(self.views or 1)]

    def collate(self, rows: Sequence[np.ndarray]) -> Batch:
        return {"pixel_values": np.stack(rows)}

    def _view(self, index: int, example: Example, view: int) -> np.ndarray:
        return self.transform.train(example["image"], np.random.default_rng((index, view)))


@dataclasses.dataclass(frozen=True)
class Captions:
    """The inputs of a text tower: int32 (rows, the tokenizer's model_max_length) 'input_ids', and of
    'attention_mask' and 'token_type_ids' those that the tokenizer makes.
    """

    tokenizer: PreTrainedTokenizerBase

    def draw(self, index: int, example: Example, rng: np.random.Generator) -> str:
        return sample_caption(example, rng)

    def all(self, index: int, example: Example) -> list[str]:
        """Each caption once."""
        return usable_captions(example)

    def collate(self, rows: Sequence[str]) -> Batch:
        return tokenize(self.tokenizer, rows, length=self.tokenizer.model_max_length)


@dataclasses.dataclass(frozen=True)
class Processors:
    """The image transform and the tokenizer of a model, and the tokenizer of its teacher if it has one."""

    image_transform: ImageTransform
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None = None

    def inputs(self, side: Side, views: int | None) -> "Pixels | Captions":
        """Return the maker of one tower's inputs; `views` are fixed views of each image, None: any number."""
        return Pixels(self.image_transform, views) if side == "image" else Captions(self.tokenizer)


def make_reader(
    processors: Processors,
    views: int | None,
    precomputed: Mapping[Side, Inputs] = MappingProxyType({}),
) -> Reader:
    """Return the reader of training batches; `precomputed` takes the place of a tower's own inputs."""
    if processors.teacher_tokenizer is not None:
        return TextPairReader(processors.tokenizer, processors.teacher_tokenizer)
    image, text = (
        precomputed.get(side) or processors.inputs(side, views) for side in ("image", "text")
    )
    return ImageTextReader(image, text)


@dataclasses.dataclass(frozen=True)
class ImageTextReader:
    """Makes the inputs of an image tower and those of a text tower."""

    images: Inputs
    texts: Inputs

    def read(self, index: int, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        text = self.texts.draw(index, example, rng)
        return {"image": self.images.draw(index, example, rng), "text": text}

    def collate(self, elements: Sequence[dict[str, Any]]) -> Batch:
        return {
            **self.images.collate([element["image"] for element in elements]),
            **self.texts.collate([element["text"] for element in elements]),
        }


@dataclasses.dataclass(frozen=True)
class TextPairReader:
    """Makes the inputs of a text tower as above, and those of its teacher, 'teacher_input_ids' and so on: the
    caption in the teacher's language, or where there is none the same caption.
    """

    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase

    def read(self, index: int, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        caption = sample_caption(example, rng)
        return {"caption": caption, "teacher_caption": example.get("teacher_caption") or caption}

    def collate(self, elements: Sequence[dict[str, Any]]) -> Batch:
        captions = [element["caption"] for element in elements]
        teacher_captions = [element["teacher_caption"] for element in elements]
        of_teacher = tokenize(
            self.teacher_tokenizer,
            teacher_captions,
            length=self.teacher_tokenizer.model_max_length,
        )
        return {
            **tokenize(self.tokenizer, captions, length=self.tokenizer.model_max_length),
            **{f"{TEACHER}_{name}": array for name, array in of_teacher.items()},
        }
