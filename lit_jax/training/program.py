"""What the devices compute in each step of a run, before there is any array: training runs it, planning
compiles it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from lit_jax.config import Config
from lit_jax.data.example import Example
from lit_jax.data.readers import Inputs
from lit_jax.distributed.mesh import batch_sharding, by_slice
from lit_jax.errors import UserError
from lit_jax.models.dual_encoder import POOLED, Side
from lit_jax.precomputed.format import Pooled
from lit_jax.training.from_embeddings import check_locked, embedding_folders, without_towers
from lit_jax.training.gradcache import accumulated, check_accumulation
from lit_jax.training.losses import Loss, make_loss
from lit_jax.training.model_factory import Setup
from lit_jax.training.optimizers import make_optimizer
from lit_jax.training.policy import Policy
from lit_jax.training.state import abstract_state, shardings_of
from lit_jax.training.step import Metrics, State, jit_train_step, train_step
from lit_jax.trees import Tree

AbstractBatch = Mapping[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A model, what it learns from, and how."""

    config: Config
    setup: Setup
    loss: Loss
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation

    @classmethod
    def of(cls, config: Config, setup: Setup, schedule: optax.Schedule) -> "Program":
        """Raises UserError for a loss that cannot be had, or not in micro-batches; for embeddings of a tower
        that trains."""
        check_accumulation(config.accumulate, setup.policy)
        check_logit_scale_max(config.model.logit_scale_max, setup.policy)
        for side in embedding_folders(config):
            check_locked(setup, side, f"config.data.{side}_embeddings")
        return cls(
            config=config,
            setup=setup,
            loss=make_loss(
                config.loss,
                form=config.loss_form,
                label_smoothing=config.label_smoothing,
                slices=len(by_slice(list(setup.mesh.devices.flat))),
            ),
            schedule=schedule,
            optimizer=make_optimizer(config.optimizer, schedule, setup.policy),
        )

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of the state."""
        return abstract_state(self.setup, self.optimizer)

    def abstract_batch(self, batch_size: int) -> AbstractBatch:
        """Those of a global batch, as the reader makes its rows."""
        blank: Example = {
            "key": "",
            "image": np.zeros((8, 8, 3), np.uint8),
            "captions": ("a",),
            "label": None,
        }
        pooled: dict[Side, Inputs] = {
            side: _BlankPooled(POOLED[side], self.setup.pooled_shape(side))
            for side in embedding_folders(self.config)
        }
        reader = self.setup.reader(self.config.data, pooled)
        rows = reader.collate([reader.read(0, blank, np.random.default_rng(0))])
        return {
            name: jax.ShapeDtypeStruct(
                (batch_size, *array.shape[1:]),
                array.dtype,
                sharding=batch_sharding(self.setup.mesh),
            )
            for name, array in rows.items()
        }

    def abstract_frozen(self, batch: AbstractBatch) -> Tree:
        """Those of the locked parameters, without the towers in whose place `batch` brings what they pool."""
        sides: list[Side] = [side for side, name in POOLED.items() if name in batch]
        return without_towers(self.setup.abstract_frozen, sides)

    def compiled_step(self) -> Callable[..., tuple[State, Metrics]]:
        """The train step; it compiles when it is first called."""
        step: Any = functools.partial(
            train_step,
            embed=accumulated(self.setup.embed, self.config.accumulate),
            loss=self.loss,
            optimizer=self.optimizer,
            schedule=self.schedule,
            seed=self.config.seed,
            logit_scale_max=self.config.model.logit_scale_max,
        )
        return jit_train_step(step, shardings_of(self.abstract_state()))


@dataclasses.dataclass(frozen=True)
class _BlankPooled(Pooled):
    """Rows such as those of an embedded tower, where there is no folder of them yet."""

    shape: jax.ShapeDtypeStruct

    def draw(self, index: int, example: Example, rng: np.random.Generator) -> np.ndarray:
        return np.zeros(self.shape.shape[1:], self.shape.dtype)


def check_logit_scale_max(maximum: float | None, policy: Policy) -> None:
    """Raise UserError if the scale of the logits is to be limited, but does not train."""
    if maximum is not None and not any(
        policy.trainable.get(name) for name in ("logit_scale", "temperature")
    ):
        raise UserError(
            f"config.model.logit_scale_max={maximum:g} has no effect, because the logits' scale does not "
            "train; set it to None."
        )


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int) -> None:
    """Raises UserError, naming the next size that does, if a batch does not divide by devices and
    micro-batches."""
    unit = mesh.size * accumulate
    if batch_size % unit:
        times = "" if accumulate == 1 else f" times config.accumulate={accumulate}"
        raise UserError(
            f"config.batch_size={batch_size} does not divide by the {mesh.size} devices of the mesh{times}; "
            f"the next that does is {-(-batch_size // unit) * unit}."
        )
