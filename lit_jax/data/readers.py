"""What a training batch is made of: images with texts, or texts with a teacher's texts."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_jax.config import TEACHER
from lit_jax.data.example import BadSampleError, Example
from lit_jax.data.image import ImageTransform
from lit_jax.data.text import tokenize

Batch = dict[str, np.ndarray]


@runtime_checkable
class Reader(Protocol):
    """Plain values, so that it can be sent to worker processes."""

    def read(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        """One element of a batch; of several captions a random one. Raises BadSampleError."""
        ...

    def collate(self, elements: Sequence[dict[str, Any]]) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class ImageTextReader:
    """Makes 'pixel_values' float32 (rows, height, width, 3), and int32 (rows, max_text_length) 'input_ids',
    'attention_mask' and, if the tokenizer makes them, 'token_type_ids'.
    """

    image_transform: ImageTransform
    tokenizer: PreTrainedTokenizerBase
    max_text_length: int

    def read(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        caption = draw_caption(example, rng)
        pixels = self.image_transform.train(example["image"], rng)
        return {"pixel_values": pixels, "caption": caption}

    def collate(self, elements: Sequence[dict[str, Any]]) -> Batch:
        captions = [element["caption"] for element in elements]
        return {
            "pixel_values": np.stack([element["pixel_values"] for element in elements]),
            **tokenize(self.tokenizer, captions, length=self.max_text_length),
        }


@dataclasses.dataclass(frozen=True)
class TextPairReader:
    """Makes the inputs of a text tower as above, and those of its teacher, 'teacher_input_ids' and so on: the
    caption in the teacher's language, or where there is none the same caption.
    """

    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase
    max_text_length: int

    def read(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        caption = draw_caption(example, rng)
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
            **tokenize(self.tokenizer, captions, length=self.max_text_length),
            **{f"{TEACHER}_{name}": array for name, array in of_teacher.items()},
        }


def draw_caption(example: Example, rng: np.random.Generator) -> str:
    weights = example.get("caption_weights") or (1.0,) * len(example["captions"])
    pairs = [
        (text, w) for text, w in zip(example["captions"], weights, strict=True) if text.strip()
    ]
    if not pairs:
        raise BadSampleError("no caption")
    texts, weights = zip(*pairs, strict=True)
    if len(set(weights)) == 1:
        return texts[rng.integers(len(texts))]
    return texts[rng.choice(len(texts), p=np.divide(weights, sum(weights)))]
