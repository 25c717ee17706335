"""The tables that `lit_jax.plan` prints."""

from collections.abc import Iterable, Iterator, Mapping

from lit_jax.planning.cycles import Forecast
from lit_jax.planning.planner import Plan

_GIB = 2**30
_TIMES = ("s a step", "pairs/s a chip", "MFU", "hours", "chip-hours")
_COLUMNS = ("config", "topology", "batch", "fits", "GiB a chip", *_TIMES)
BOOK_HEAD = f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}"


def table(plan: Plan) -> str:
    """Return a plan as a text of several lines."""
    return "\n".join(_lines(plan))


def book_line(config: str, plan: Plan) -> str:
    """Return the line of a plan below `BOOK_HEAD`; the figures of time are the forecast's."""
    slices = f"{plan.slices} x " if plan.slices > 1 else ""
    cells = [config, f"{slices}{plan.topology}", f"{plan.batch_size:,}"]
    cells += ["yes" if plan.fits else "no", f"{plan.total / _GIB:.1f} of {plan.hbm / _GIB:g}"]
    time = plan.forecast
    if time is None:
        cells += [""] * len(_TIMES)
    else:
        cells += [f"{time.seconds:.3f}", f"{time.pairs_a_second:,.0f}", f"{time.mfu:.2f}"]
        # A duration in epochs says no hours.
        hours = (time.hours, time.chip_hours)
        cells += ["" if figure is None else f"{figure:,.1f}" for figure in hours]
    return f"| {' | '.join(cells)} |"


def _lines(plan: Plan) -> Iterator[str]:
    slices = f"{plan.slices} slices of " if plan.slices > 1 else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    yield f"{slices}{plan.topology}: {plan.chips} {plan.device}s ({mesh}), batch {plan.batch_size:,}"
    shapes = (f"{name} {'x'.join(map(str, shape))}" for name, shape in plan.inputs.items())
    yield f"of {', '.join(shapes)}"
    yield ("It fits." if plan.fits else "It does NOT fit.")
    yield ""
    yield f"GiB of each {plan.device}"
    for kind, size in plan.bytes.items():
        # The compiler reports the padding of arrays by the chip's layout together with the code.
        kind = {"code": "code and padding"}.get(kind, kind)
        yield f"  {kind:24} {'?' if size is None else f'{size / _GIB:.3f}':>10}"
    limit = f", {plan.limit / _GIB:.2f} for programs" if plan.limit else ""
    yield f"  {'in all':24} {plan.total / _GIB:10.3f}   of {plan.hbm / _GIB:g}{limit}"
    where = "inside its slice" if plan.slices > 1 else ""
    yield from _traffic(f"{plan.device} sends {where}", plan.communicated, plan.exposed)
    to_others = f"{plan.device} sends to other slices"
    yield from _traffic(to_others, plan.network_communicated, plan.network_exposed)
    yield f"TFLOPs of matrix products of each {plan.device} in a step{plan.matmul_flops / 1e12:9.3f}"
    if plan.bound is not None:
        yield "Milliseconds that a step takes at least, at the published peak of (and exposed communication)"
        for resource, seconds in plan.bound.items():
            # The time of the whole step follows as a rate.
            if resource != "step":
                yield f"  {resource:24} {1e3 * seconds:10.2f}"
        if plan.network_communicated is not None and "network" not in plan.bound:
            yield f"  {'network':24} {'?':>10}   not published for this chip; the bound leaves it out"
        rate = plan.batch_size / plan.bound["step"]
        yield f"so it trains at most {rate:,.0f} pairs a second."
    if plan.forecast is not None:
        yield from _forecast(plan.forecast, plan.device)
    if plan.largest_batch is not None:
        beyond = "no larger one was tried"
        if plan.smallest_too_large:
            beyond = f"{plan.smallest_too_large:,} does not"
        yield f"Largest batch seen to fit: {plan.largest_batch:,}; {beyond}."
    for line in plan.advice:
        yield f"- {line}"


def _forecast(forecast: Forecast, device: str) -> Iterator[str]:
    yield "Forecast, by the cycles that the compiler estimates (not measured)"
    yield f"  {'milliseconds of a step':24} {1e3 * forecast.seconds:10.2f}"
    yield f"  {f'pairs/s of a {device}':24} {forecast.pairs_a_second:10,.0f}"
    yield f"  {'MFU':24} {forecast.mfu:10.3f}"
    if forecast.hours is not None and forecast.chip_hours is not None:
        yield f"  {'hours of the run':24} {forecast.hours:10,.2f}"
        yield f"  {'chip-hours of the run':24} {forecast.chip_hours:10,.1f}"
    yield "Shares of the forecast"
    for part, share in sorted(forecast.shares.items(), key=lambda item: -item[1]):
        yield f"  {part:24} {share:10.1%}"
    yield "Milliseconds of the most expensive operations"
    for name, seconds in forecast.operations:
        yield f"  {1e3 * seconds:10.2f}  {name}"
    if forecast.kernels:
        yield f"Pallas kernels count by their stated cost: {_kernels(forecast.kernels)}"
    if forecast.without_cost:
        yield f"Pallas kernels without a stated cost count nothing: {_kernels(forecast.without_cost)}"


def _kernels(layers: Iterable[str]) -> str:
    """Return the names of the kernels that layers call, as LAYER/NAME/pallas_call."""
    return ", ".join(
        sorted({layer.split("/pallas_call")[0].rpartition("/")[2] for layer in layers})
    )


def _traffic(
    sender: str, communicated: Mapping[str, int] | None, exposed: Mapping[str, int] | None
) -> Iterator[str]:
    if communicated is None or exposed is None:
        return
    yield f"{f'MiB that each {sender}':42} in a step   exposed (without computation)"
    for kind, size in communicated.items():
        if size:
            yield f"  {kind:24} {size / 2**20:26.1f} {exposed[kind] / 2**20:9.1f}"
