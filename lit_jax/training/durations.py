"""The durations of a config, converted to steps."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from lit_jax.buckets import AnyPath
from lit_jax.config import Config, EvalConfig
from lit_jax.config_schema import MOST, seconds, step_range, steps
from lit_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Durations:
    """The last step of a run, and the steps between saves, rows of the log, evaluations and callbacks.

    Attributes:
        save_every, save_seconds: the steps, or the seconds, between two saves; the other is None.
        profile: the steps of the profile.
    """

    total: int
    save_every: int | None
    save_seconds: float | None
    keep_every: int | None
    log_every: int
    profile: range
    # The steps between two runs of each repeated evaluation, by name.
    eval_every: Mapping[str, int]
    # The steps between two calls of each callback, in their order.
    callback_every: Sequence[int] = ()

    @classmethod
    def of(cls, config: Config, examples: int, callbacks: Sequence[str] = ()) -> "Durations":
        """Return the durations of `config` in steps.

        Args:
            examples: the number of examples in an epoch.
            callbacks: the duration between two calls of each callback.

        Raises UserError for a duration of less than one step or second, for a run with too many steps, and
        for a profile that is not within the run.
        """
        count = functools.partial(_at_least_one, config, examples)
        keep_every = config.checkpoint.keep_every
        total = count("duration", config.duration)
        # The step is an int32 on the device.
        if total >= MOST:
            raise UserError(
                f"config.duration={config.duration!r} is more than {MOST - 1} steps; make it shorter."
            )
        save_seconds = seconds(config.checkpoint.every)
        if save_seconds is not None and save_seconds < 1:
            raise UserError(
                f"config.checkpoint.every={config.checkpoint.every!r} is less than one second; make it "
                "longer."
            )
        return cls(
            total=total,
            save_every=None if save_seconds else count("checkpoint.every", config.checkpoint.every),
            save_seconds=save_seconds,
            keep_every=count("checkpoint.keep_every", keep_every) if keep_every else None,
            log_every=count("log.every", config.log.every),
            profile=_profile(config.log.profile, total),
            eval_every={
                name: count(f"evals.{name}.every", one.every)
                for name, one in config.evals.items()
                if one.every is not None
            },
            callback_every=[
                _at_least_one(config, examples, f"callbacks[{i}]", every)
                for i, every in enumerate(callbacks)
            ],
        )

    def check_steps_done(self, workdir: AnyPath, steps_done: Sequence[int]) -> None:
        """Raise UserError if a run has taken more steps already than it is to take."""
        if steps_done and steps_done[-1] > self.total:
            raise UserError(
                f"{workdir} has already trained {steps_done[-1]} steps, more than the {self.total} of "
                "config.duration; make it longer, or choose another --workdir."
            )

    def saves_at(self, step: int) -> bool:
        """Return whether the run saves its state after this step, whatever the clock says."""
        # A checkpoint to keep must be saved, even if it lies between two regular saves. So must the last.
        intervals = filter(None, (self.save_every, self.keep_every))
        return step == self.total or any(step % steps == 0 for steps in intervals)

    def evals_due(self, evals: Mapping[str, EvalConfig], step: int) -> list[str]:
        """Return the names of the evaluations that are due after `step` steps."""
        return [
            name
            for name, config in evals.items()
            if (config.at_start and step == 0)
            or (config.at_end and step == self.total)
            or (step > 0 and name in self.eval_every and step % self.eval_every[name] == 0)
        ]


def steps_of(config: Config, examples: int, duration: str) -> int:
    """Return the number of steps of a duration, rounded down, where an epoch has `examples` examples."""
    return steps(duration, batch_size=config.batch_size, examples_per_epoch=examples)


def _profile(steps: str | None, total: int) -> range:
    if steps is None:
        return range(0)
    profile = step_range(steps)
    if not profile or profile[0] < 1 or profile[-1] > total:
        raise UserError(
            f"config.log.profile={steps!r} is not a range within the steps 1 to {total} of the run; write "
            "the first and the last step, such as '100:110'."
        )
    return profile


def _at_least_one(config: Config, examples: int, key: str, duration: str) -> int:
    count = steps_of(config, examples, duration)
    if count < 1:
        raise UserError(f"config.{key}={duration!r} is less than one step; make it longer.")
    return count
