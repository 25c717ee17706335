"""Advice for a train step that does not fit: the config keys that reduce its memory."""

from collections.abc import Mapping

from jax.sharding import Mesh

from lit_jax.config import Config
from lit_jax.distributed.mesh import group_by_slice
from lit_jax.models.dual_encoder import TOWERS, tower_name
from lit_jax.precomputed.match import embedding_folders
from lit_jax.training.checks import normalized_by_batch
from lit_jax.training.train_step import TrainStep

# Pairs (whether the advice applies, sentence).
_Advice = tuple[tuple[bool, str], ...]


def advise(
    config: Config,
    step: TrainStep,
    resident: Mapping[str, int],
    hbm: int,
    largest_batch: int | None,
) -> tuple[str, ...]:
    """Return sentences about ways to reduce a step's memory, the cheapest first.

    `resident` (by kind) and `hbm` are bytes of one chip. `largest_batch` is the largest batch that fits.
    """
    known: _Advice = (
        *_about_towers(config, step),
        *_about_state(config, step, resident, hbm),
        (largest_batch is not None, f"--config.batch_size={largest_batch} fits here."),
        (True, "A topology with more chips gives each of them a smaller part of the batch."),
    )
    return tuple(text for applies, text in known if applies)


def _about_towers(config: Config, step: TrainStep) -> _Advice:
    """Return (whether it helps here, sentence) for each key that changes the memory of the towers."""
    policy = step.model.policy
    trained = {path.split("/")[0] for path, trains in policy.trainable.items() if trains}
    trains_a_tower = bool(trained & {"vision_model", "text_model"})
    return (
        (
            config.model.dtype == "float32",
            "--config.model.dtype=bfloat16 halves activations and locked parameters.",
        ),
        (
            config.remat != "block" and trains_a_tower,
            "--config.remat=block keeps only the inputs of a tower's blocks for the gradient; it costs one "
            "more forward pass of the towers that train.",
        ),
        *(
            (
                not config.model.teacher
                and side not in embedding_folders(config.data)
                and tower_name(side) not in trained,
                f"python -m lit_jax.embed --side={side}, and then --config.data.{side}_embeddings=FOLDER (of "
                f"images with views, if the config augments) take the locked {side} tower out of the step.",
            )
            for side in TOWERS
        ),
        (
            # Not with BatchNorm, whose statistics would be those of a micro-batch.
            config.batch_size % (2 * config.accumulate * step.model.mesh.size) == 0
            and trains_a_tower
            and not normalized_by_batch(policy),
            f"--config.accumulate={2 * config.accumulate} computes the towers in smaller parts; the gradient "
            "stays that of the whole batch, for one more forward pass of the towers that train.",
        ),
    )


def _about_state(config: Config, step: TrainStep, resident: Mapping[str, int], hbm: int) -> _Advice:
    """Return (whether it helps here, sentence) for each key about parameters or optimizer state."""
    mesh = step.model.mesh
    # The batch is resident, too, but is split over all chips already.
    state = resident["parameters"] + resident["optimizer"] + resident["frozen"]
    return (
        (
            state > hbm / 4 and mesh.shape["fsdp"] < mesh.size,
            f"--config.mesh.fsdp={_next_fsdp(mesh)} splits parameters and optimizer "
            f"state, now {state / 2**30:.1f} GiB a chip, over more chips.",
        ),
        (
            # Not every optimizer has a momentum.
            getattr(config.optimizer, "momentum_dtype", None) == "float32"
            and resident["optimizer"] > hbm / 10,
            "--config.optimizer.momentum_dtype=bfloat16 makes the optimizer's state smaller.",
        ),
    )


def _next_fsdp(mesh: Mesh) -> int:
    """Return the next fsdp size that `make_mesh` accepts: at least four times as large, or all devices."""
    # The axis has to lie inside a slice, or to span whole slices.
    now, of_slice = mesh.shape["fsdp"], mesh.size // len(group_by_slice(list(mesh.devices.flat)))
    sizes = (
        size
        for size in range(4 * now, mesh.size)
        if mesh.size % size == 0 and (of_slice % size == 0 or size % of_slice == 0)
    )
    return next(sizes, mesh.size)
