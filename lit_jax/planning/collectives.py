"""Count the bytes that a compiled program communicates between the chips of a slice, from its HLO text.

A computation counts as often as it runs: the body of a loop counts once for each iteration. network.py counts
the bytes that go to other slices.
"""

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

# The bytes that one chip in a group of g chips sends for an operand of one byte, by bandwidth-optimal
# algorithms.
SENT: dict[str, Callable[[int], float]] = {
    "all-gather": lambda g: g - 1,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "reduce-scatter": lambda g: (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "collective-permute": lambda g: 1,
}
KINDS = tuple(SENT)
# The opcodes that keep the chip busy; others only move or rename data.
_COMPUTES = ("convolution", "custom-call", "dot", "fusion", "while")

# The syntax of HLO text, for which XLA has no reader in Python.
_BITS = re.compile(r"[a-z]+(\d+)")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.\-]+))"
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r"%([\w.\-]+)")


class Instruction(NamedTuple):
    """A line of HLO.

    Attributes:
        operands: the names of the operands, or the text of a constant or parameter.
        rest: the attributes, as text.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


Computation = dict[str, Instruction]


class Traffic(NamedTuple):
    """The bytes that one chip sends in a run of the program, for each of `KINDS`.

    Attributes:
        communicated: all bytes.
        exposed: the bytes that are sent while the chip computes nothing.
    """

    communicated: dict[str, int]
    exposed: dict[str, int]


def traffic(hlo: str, devices: int) -> Traffic:
    """Return the traffic inside a slice.

    Args:
        hlo: the text of the compiled, scheduled program.
        devices: the number of chips in the slice, the default size of a group that the text does not give.
    """
    computations, entry = parse(hlo)
    communicated, exposed = (Counter(dict.fromkeys(KINDS, 0)) for _ in range(2))
    seen: set[str] = set()
    for name, times in runs(computations, entry).items():
        for instruction in computations[name].values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in SENT or _is_seen(instruction, seen):
                continue
            # TPU compilers fuse an all-reduce with the slice of its result, which is a reduce-scatter.
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            group = _group_size(instruction.rest, devices)
            # The operands are sent, whose shapes are in the instructions that compute them.
            size = sum(shape_bytes(computations[name][o].shape) for o in instruction.operands)
            size = round(times * size * SENT[kind](group))
            communicated[kind] += size
            exposed[kind] += 0 if _is_overlapped(instruction, computations[name]) else size
    return Traffic(dict(communicated), dict(exposed))


def _is_overlapped(collective: Instruction, inside: Computation) -> bool:
    """Return whether the chip computes during a collective of a scheduled program."""
    # The collective either belongs to a chain of fusions with matrix products, or is split into a start and
    # an end, with computation in between.
    if "chain_id=" in collective.rest:
        return True
    if not collective.opcode.endswith("-start"):
        return False
    return computes_until(lambda i: collective.name in i.operands, collective, inside)


def computes_until(
    end: Callable[[Instruction], bool], start: Instruction, inside: Computation
) -> bool:
    """Return whether anything is computed between `start` and the next instruction that satisfies `end`."""
    between = itertools.dropwhile(lambda i: i.name != start.name, inside.values())
    return any(i.opcode in _COMPUTES for i in itertools.takewhile(lambda i: not end(i), between))


def _is_seen(instruction: Instruction, seen: set[str]) -> bool:
    """Return whether a part of the same collective has been counted, and remember this part."""
    # TPU programs split a collective that overlaps with computation into a chain of parts with one id.
    channel = re.search(r"channel_id=(\d+)", instruction.rest)
    if channel is None or "chain_id=" not in instruction.rest:
        return False
    is_seen = channel[1] in seen
    seen.add(channel[1])
    return is_seen


def parse(hlo: str) -> tuple[dict[str, Computation], str]:
    """Return the computations of a module by name, and the name of the entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            current[match[1]] = _instruction(match[1], match[2])
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    # The shape of a tuple is in parentheses and may contain blanks and further tuples.
    shape = text[: _closing(text)] if text.startswith("(") else text.split(" ", 1)[0]
    call = text[len(shape) :].lstrip()
    opcode = call.split("(", 1)[0]
    inside = call[len(opcode) :]
    end = _closing(inside)
    operands = _NAME.findall(inside[:end]) or [inside[1 : end - 1]]
    return Instruction(name, shape, opcode, tuple(operands), inside[end:])


def _closing(text: str) -> int:
    """Return the position behind the parenthesis that closes the one at the start of `text`."""
    depth = 0
    for position, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return position + 1
    return len(text)


def runs(computations: dict[str, Computation], entry: str) -> dict[str, int]:
    """Return how often each computation runs, including the small ones that only define a reduction.

    A conditional runs its dearest branch.
    """
    counts: defaultdict[str, int] = defaultdict(int)

    def visit(name: str, times: int) -> None:
        counts[name] += times
        for instruction in computations[name].values():
            # A loop multiplies the runs of everything that it calls, also of loops inside.
            is_loop = instruction.opcode == "while"
            trips = trip_count(instruction, computations, name) if is_loop else 1
            for called in _called(instruction, computations):
                visit(called, times * trips)

    visit(entry, 1)
    return counts


def _called(instruction: Instruction, computations: dict[str, Computation]) -> Iterator[str]:
    yield from _CALLED.findall(instruction.rest)
    found = _BRANCHES.findall(instruction.rest)
    branches = [name.strip(" %") for several, one in found for name in (several or one).split(",")]
    if branches:
        yield max(branches, key=lambda name: _cost(name, computations))


def _cost(name: str, computations: dict[str, Computation]) -> tuple[int, int]:
    """Return the estimated cycles of a computation and, for programs without estimates, its instructions."""
    cycles = size = 0
    for called, times in runs(computations, name).items():
        instructions = computations[called].values()
        cycles += times * sum(estimated_cycles(instruction) or 0 for instruction in instructions)
        size += times * len(instructions)
    return cycles, size


def estimated_cycles(instruction: Instruction) -> int | None:
    """Return the cycles that the TPU compiler estimates for one run of an instruction, if it does."""
    match = _CYCLES.search(instruction.rest)
    return int(match[1]) if match else None


def trip_count(loop: Instruction, computations: dict[str, Computation], inside: str) -> int:
    """Return the number of iterations of a while loop.

    Raises ValueError if the program does not contain this number.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    # Without the compiler's annotation, the loop has to count from its first value to a limit.
    condition, body = (
        computations[name]
        for key in ("condition", "body")
        for name in re.findall(rf"\b{key}=%?([\w.\-]+)", loop.rest)
    )
    compare = next(i for i in condition.values() if i.opcode == "compare")
    counter, limit = (condition[name] for name in compare.operands)
    index = re.search(r"index=(\d+)", counter.rest)
    if index is None or limit.opcode != "constant" or "direction=LT" not in compare.rest:
        raise ValueError(f"The loop {loop.name} does not say its number of iterations.")
    start = _constant(computations[inside], _element(computations[inside], loop, int(index[1])))
    root = next(reversed(body.values()))
    step = _constant(body, root.operands[int(index[1])])
    return -(-(int(limit.operands[0]) - start) // max(step, 1))


def _element(computation: Computation, loop: Instruction, index: int) -> str:
    (initial,) = loop.operands
    return computation[initial].operands[index]


def _constant(computation: Computation, name: str, depth: int = 4) -> int:
    """Return the constant that a name stands for, or that is added to it, or 0 if none is found nearby."""
    instruction = computation.get(name)
    if instruction is None or depth == 0:
        return 0
    if instruction.opcode == "constant":
        return int(instruction.operands[0]) if instruction.operands[0].isdecimal() else 0
    if instruction.opcode in ("add", "copy", "bitcast"):
        return sum(_constant(computation, operand, depth - 1) for operand in instruction.operands)
    return 0


def _group_size(attributes: str, devices: int) -> int:
    """Return the number of chips in a group. HLO writes groups by mesh axes, as an iota, or as lists."""
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}", attributes
    ):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(match[1].split(","))
    return devices


def shape_bytes(shape: str) -> int:
    """Return the bytes of an array, or of a tuple of arrays, given as HLO text such as f32[8,128]{1,0}."""
    total = 0
    for dtype, dims in _ARRAY.findall(shape):
        bits = _BITS.match(dtype)
        # A boolean takes a byte, and types such as bf16 and f8e4m3 have their bits in the name.
        width = 8 if dtype == "pred" or bits is None else int(bits[1])
        total += math.prod(int(d) for d in dims.split(",") if d) * width // 8
    return total
