"""The train step: one pure function of the state, the locked parameters and a batch.

`train_step` is the function. `TrainStep` has the parts that a config chooses.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lit_jax.config import Side
from lit_jax.data.example import Example
from lit_jax.data.loader import Preprocessor, make_preprocessor
from lit_jax.distributed.flags import step_options
from lit_jax.distributed.flops import matmul_flops
from lit_jax.distributed.mesh import batch_sharding, group_by_slice, replicated
from lit_jax.distributed.sharding import optimizer_shardings
from lit_jax.models.dual_encoder import FEATURES, limit_logit_scale
from lit_jax.precomputed.match import blank_features, embedding_folders
from lit_jax.precomputed.tower import without_towers
from lit_jax.training.checks import check_accumulation, check_locked, check_logit_scale_max
from lit_jax.training.gradcache import in_micro_batches
from lit_jax.training.losses import Objective, make_objective
from lit_jax.training.model_factory import Model, named_key
from lit_jax.training.optimizers import make_optimizer, scale_by_multipliers
from lit_jax.training.passed import Passed
from lit_jax.training.passed_checks import checked_loss, checked_optimizer
from lit_jax.training.policy import merge
from lit_jax.trees import Tree, flatten, unflatten

Batch = Mapping[str, jax.Array]
AbstractBatch = Mapping[str, jax.ShapeDtypeStruct]
Metrics = dict[str, jax.Array]

_NOTHING_PASSED = Passed()


class State(NamedTuple):
    """The state that training changes.

    Attributes:
        step: the number of steps taken, int32.
        params: the trainable parameters, a nested dict of float32 arrays.
        opt_state: the state of the optimizer.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState


def train_step(
    state: State,
    frozen: Tree,
    batch: Batch,
    *,
    forward: Callable[..., Any],
    loss: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule | None,
    seed: int,
    logit_scale_max: float | None = None,
) -> tuple[State, Metrics]:
    """Take one step on the global batch: gradient of the trainable parameters, update, metrics.

    `forward` is `Model.forward`, or the same in micro-batches. A tower without trainable parameters is a
    constant to the gradient, and computes as in evaluation: no dropout, BatchNorm by running statistics.
    """
    # The key depends on seed and step alone, so a resumed run draws the same dropout.
    dropout_key = named_key(seed, "dropout", state.step)

    def loss_fn(params: Tree) -> tuple[jax.Array, tuple[Metrics, Tree]]:
        output, updated = forward(
            {"params": merge(params, frozen)},
            batch,
            # The trainable part has the key of a tower only if some of its parameters train.
            deterministic_image="vision_model" not in params,
            deterministic_text="text_model" not in params,
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        value, more = loss(output, batch)
        metrics = {"loss": value} | output.metrics | more
        return value, (metrics, updated.get("batch_stats", {}))

    grads, (metrics, statistics) = jax.grad(loss_fn, has_aux=True)(state.params)
    # Some optimizers, such as optax.polyak_sgd, also need the value; the others ignore it.
    updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params, value=metrics["loss"]
    )
    # Running statistics of BatchNorm get zero gradients. The forward pass has computed their new values.
    params = _replace(optax.apply_updates(state.params, updates), statistics)
    # CLIP clips the scale after the update as well (2103.00020, section 2.5).
    params = limit_logit_scale(params, logit_scale_max)
    # The norm is reported before clipping.
    metrics["grad_norm"] = optax.tree.norm(grads)
    if schedule is not None:
        metrics["learning_rate"] = schedule(state.step)
    return State(state.step + 1, params, opt_state), metrics


def _replace(params: Any, statistics: Tree) -> Tree:
    """Return the parameters with the new running statistics of BatchNorm, which have no gradient."""
    flat = flatten(params)
    # A rule may lock the statistics of a tower that trains. These are not in `params` and stay as they are.
    new = {path: value for path, value in flatten(statistics).items() if path in flat}
    return unflatten(flat | new)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStep:
    """The parts of a run's train step, before there are any arrays.

    Training runs the step, and planning only compiles it.

    Attributes:
        schedule: the learning rate that metrics report; None if the optimizer has a schedule of its own.
    """

    model: Model
    loss: Objective
    schedule: optax.Schedule | None
    optimizer: optax.GradientTransformationExtraArgs

    @classmethod
    def build(
        cls, model: Model, schedule: optax.Schedule | None, passed: Passed = _NOTHING_PASSED
    ) -> "TrainStep":
        """Make loss and optimizer as the config says, unless they are passed.

        Args:
            schedule: the learning rate by step; None where an optimizer is passed.

        Raises UserError for an unknown loss, for batch normalisation in micro-batches, and for precomputed
        features of a tower that trains.
        """
        config = model.config
        check_accumulation(config.accumulate, model.policy)
        check_logit_scale_max(config.model.logit_scale_max, model.policy)
        for side in embedding_folders(config.data):
            check_locked(model, side, f"config.data.{side}_embeddings")
        # Only the devices know which of them share a fast network.
        slices = len(group_by_slice(list(model.mesh.devices.flat)))
        loss = make_objective(config, slices) if passed.loss is None else checked_loss(passed.loss)
        if passed.optimizer is None:
            assert schedule is not None
            optimizer = make_optimizer(config.optimizer, schedule, model.policy)
            return cls(model=model, loss=loss, schedule=schedule, optimizer=optimizer)
        # The policy's multipliers of the learning rate still apply. The user's optimizer decides the rest.
        own = checked_optimizer(passed.optimizer)
        optimizer = optax.chain(own, scale_by_multipliers(model.policy))
        return cls(model=model, loss=loss, schedule=None, optimizer=optimizer)

    def abstract_state(self) -> State:
        """Return shapes, dtypes and shardings of the state."""
        params = self.model.abstract_trainable
        opt_state = jax.eval_shape(self.optimizer.init, params)
        # eval_shape returns no shardings, so they are derived from those of the parameters.
        shardings = optimizer_shardings(opt_state, params, self.model.mesh)
        step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(self.model.mesh))
        return State(
            step=step,
            params=params,
            opt_state=jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=sharding
                ),
                opt_state,
                shardings,
            ),
        )

    def abstract_batch(self, batch_size: int) -> AbstractBatch:
        """Return shapes, dtypes and shardings of a global batch, made by the run's own preprocessor."""
        # A tiny image is enough, because the transform resizes every image to the size of the model.
        blank: Example = {
            "key": "",
            "image": np.zeros((8, 8, 3), np.uint8),
            "captions": ("a",),
            "label": None,
        }
        data, module = self.model.config.data, self.model.module
        precomputed: dict[Side, Preprocessor] = {
            side: blank_features(module, side) for side in embedding_folders(data)
        }
        preprocessor = make_preprocessor(self.model.processors, data.views, precomputed)
        element = preprocessor.sample(0, blank, np.random.default_rng(0))
        rows = preprocessor.collate([element])
        return {
            name: jax.ShapeDtypeStruct(
                (batch_size, *array.shape[1:]),
                array.dtype,
                sharding=batch_sharding(self.model.mesh),
            )
            for name, array in rows.items()
        }

    def abstract_frozen(self, batch: AbstractBatch) -> Tree:
        """Return the abstract locked parameters, without the towers whose features `batch` brings."""
        sides: list[Side] = [side for side, name in FEATURES.items() if name in batch]
        return without_towers(self.model.abstract_frozen, sides)

    def first_state(self, params: Tree) -> State:
        """Return the state of step 0 for trainable parameters on the mesh."""
        abstract = self.abstract_state()
        # With out_shardings each device allocates only its own part of the moments.
        init = jax.jit(self.optimizer.init, out_shardings=shardings_of(abstract.opt_state))
        # The callback also works on a mesh whose devices belong to several processes.
        step = jax.make_array_from_callback(
            (), abstract.step.sharding, lambda index: np.zeros((), np.int32)[index]
        )
        return State(step, params, init(params))

    def trace(self, batch: AbstractBatch) -> jax.stages.Traced:
        """Return the traced step for a batch, before lowering and compilation; call under the mesh."""
        return self.jitted().trace(self.abstract_state(), self.abstract_frozen(batch), batch)

    def flops(self, batch: AbstractBatch) -> int:
        """Return the FLOPs of a step's matrix products over all devices; call under the mesh.

        Recomputation does not count: neither that of config.remat nor that of micro-batches.
        """
        model = self.model
        config = dataclasses.replace(model.config, remat="none", accumulate=1)
        once = dataclasses.replace(model, config=config, module=model.module.with_remat("none"))
        return matmul_flops(dataclasses.replace(self, model=once).trace(batch).jaxpr)

    def jitted(self) -> jax.stages.Wrapped:
        """Return the jitted step, which compiles at the first call."""
        config = self.model.config
        step: Any = functools.partial(
            train_step,
            forward=in_micro_batches(self.model.forward, config.accumulate),
            loss=self.loss,
            optimizer=self.optimizer,
            schedule=self.schedule,
            seed=config.seed,
            logit_scale_max=config.model.logit_scale_max,
        )
        state = self.abstract_state()
        # Only a locked image tower, which runs in chunks, gains by the options. Other steps would compile for
        # minutes longer.
        has_chunks = "vision_model" not in state.params and not config.data.image_embeddings
        options = step_options(self.model.mesh.devices.flat[0].device_kind) if has_chunks else {}
        return jit_train_step(step, shardings_of(state), options)


def jit_train_step(
    step: Callable[[State, Tree, Batch], tuple[State, Metrics]],
    state_shardings: State,
    compiler_options: dict[str, str] | None = None,
) -> jax.stages.Wrapped:
    """Return the jitted step; this function is the only place that compiles the step.

    The new state reuses the buffers of the old state (donation) and keeps its shardings. The inputs carry
    their own shardings.
    """
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(state_shardings, None),
        compiler_options=compiler_options,
    )


def shardings_of(tree: Any) -> Any:
    """Return the sharding of each array of a tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
