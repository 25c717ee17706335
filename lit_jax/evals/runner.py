"""The evaluations that a config names: opened and checked before training, run at any time."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from lit_jax.config import EvalConfig
from lit_jax.data.sources import open_source
from lit_jax.errors import UserError
from lit_jax.evals.encode import Encoder, Params
from lit_jax.evals.retrieval import captions_of, evaluate_retrieval
from lit_jax.evals.zero_shot import label_ids, load_classes, zero_shot

Metrics = dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedEval:
    """An evaluation whose data and classes have been read and checked."""

    name: str  # "zero_shot/unseen": how the names of its metrics start
    batch_size: int
    run: Callable[[Encoder, Params], Metrics]


def open_evals(evals: Mapping[str, EvalConfig]) -> list[PreparedEval]:
    """Opens the data and class files of all `evals`, and checks that they fit each other.

    Raises UserError on what would end an evaluation later: call it before training.
    """
    return [
        PreparedEval(
            name=f"{config.kind}/{name}",
            batch_size=config.batch_size,
            run=_OPEN[config.kind](config, name),
        )
        for name, config in evals.items()
    ]


def run(prepared: Sequence[PreparedEval], encoder: Encoder, params: Params) -> Metrics:
    """Runs the evaluations in order, each with its own batch size.

    Returns all metrics under flat names such as "zero_shot/unseen/top1".
    """
    return {
        f"{task.name}/{metric}": value
        for task in prepared
        for metric, value in task.run(
            dataclasses.replace(encoder, batch_size=task.batch_size), params
        ).items()
    }


def table(metrics: Metrics) -> str:
    """A line for each metric: its name and its value."""
    width = max(map(len, metrics), default=0)
    return "\n".join(f"{name:{width}}  {value:8.4g}" for name, value in metrics.items())


def _open_zero_shot(config: EvalConfig, name: str) -> Callable[[Encoder, Params], Metrics]:
    if config.classes is None:
        raise UserError(f"config.evals.{name}.classes is missing; give the path of a class file.")
    classes, source = load_classes(config.classes), open_source(config.data)
    label_N = label_ids(source, classes)

    return lambda encoder, params: zero_shot(encoder, params, source, classes, label_N).metrics


def _open_retrieval(config: EvalConfig, name: str) -> Callable[[Encoder, Params], Metrics]:
    source = open_source(config.data)
    captions = captions_of(source)
    return lambda encoder, params: evaluate_retrieval(encoder, params, source, captions)


_OPEN = {"zero_shot": _open_zero_shot, "retrieval": _open_retrieval}
