"""A student text tower with the teacher text tower that it learns from (AltCLIP, 2211.06679, section 3.2).

Dims: B batch, L tokens, P pooled width.
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
from jaxtyping import Array, Float

from lit_jax.config import TEACHER
from lit_jax.models.dual_encoder import TEXT_INPUTS
from lit_jax.models.tower import Tower


class DistillationOutput(NamedTuple):
    """The pooled outputs of both towers for the same sentences, which may be in two languages."""

    student: Float[Array, "B P"]
    teacher: Float[Array, "B P"]

    @property
    def metrics(self) -> dict[str, Array]:
        """The metrics of a training step besides the loss; there are none."""
        return {}


class TextDistillation(nn.Module):
    """The two towers as `train_step` calls them. The student's parameters have the paths of a text tower."""

    text_model: Tower
    teacher: Tower

    def __call__(
        self,
        batch: Mapping[str, Array],
        *,
        deterministic_image: bool = True,
        deterministic_text: bool = True,
    ) -> DistillationOutput:
        """Encode a batch with inputs of the student ('input_ids') and the teacher ('teacher_input_ids').

        The teacher is always deterministic: its outputs are the targets.
        """
        # The train step calls every forward function with the same arguments.
        del deterministic_image

        def inputs(prefix: str) -> list[Array | None]:
            # An input that a tokenizer does not make, such as token_type_ids, is None.
            return [batch.get(prefix + name) for name in TEXT_INPUTS]

        return DistillationOutput(
            self.text_model(*inputs(""), deterministic=deterministic_text).pooled,
            self.teacher(*inputs(f"{TEACHER}_")).pooled,
        )
