"""Count the bytes that a program sends between slices, through the data-centre network (DCN), from its HLO.

libtpu compiles one program for all slices. Its collectives stay inside a slice. Data for other slices go
through the host: a `send` and a `recv` name the same rendezvous, the kind, and the participating devices.
libtpu 0.0.42.1 writes (slices count from 1; device i of slice s is 100000 s + i):

    _xla_megascale_transfer_type="ALL_REDUCE", _xla_megascale_target="{1,2}x{0:15}"
        each chip with the chips of the same number in the other slices; also ALL_GATHER and REDUCE_SCATTER
    _xla_megascale_transfer_type="ALL_TO_ALL", _xla_megascale_target={{100000,100001,200000,200001}}
    _xla_megascale_transfer_type="ONE_TO_ONE", _xla_megascale_target={{100003->200000},{200003->100000}}

Large sums are hierarchical: a reduce-scatter inside each slice, an all-reduce of each chip's part over the
slices, and an all-gather inside each slice.

The cost model: in a group over n slices a chip sends as much as in a group of n chips, by bandwidth-optimal
algorithms (`collectives.SENT`): 2 (n - 1) / n of its operand in a sum, n - 1 times its operand in a gather. A
permutation lists only the pairs between slices, and only their sources send. The chips of a host share its
network cards, so the host that sends most determines the time. A test with the real compiler covers every
transfer type.
"""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lit_jax.planning.collectives import (
    KINDS,
    SENT,
    Computation,
    Instruction,
    Traffic,
    computes_until,
    parse,
    runs,
    shape_bytes,
)

_TYPE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_PRODUCT = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}x\{([\d,:]+)\}"')
_GROUPS = re.compile(r"_xla_megascale_target=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}")
_PAIRS = re.compile(r"\{(\d+)->(\d+)\}")
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]+)"')
# The difference between the device numbers of consecutive slices.
_OF_SLICE = 100_000


class _Transfer(NamedTuple):
    """A send to other slices.

    Attributes:
        kind: one of `KINDS`.
        senders: the sending devices, by the program's numbers.
        slices: the number of slices in a group.
    """

    kind: str
    senders: frozenset[int]
    slices: int


def network_traffic(hlo: str, devices: Sequence[Any]) -> Traffic:
    """Return the traffic to other slices of the host that sends most, divided by its number of chips.

    Args:
        hlo: the text of the compiled, scheduled program.
        devices: all devices of the program. Their `id` is the number in the program, and their
            `process_index` identifies the host.

    Raises ValueError for a transfer of a type that is not listed above.
    """
    hosts = {device.id: device.process_index for device in devices}
    chips = Counter(hosts.values())
    communicated, exposed = (defaultdict[tuple[int, str], float](float) for _ in range(2))
    computations, entry = parse(hlo)
    for name, times in runs(computations, entry).items():
        inside = computations[name]
        for instruction in inside.values():
            # Only data for other slices go through the host.
            if instruction.opcode != "send" or "is_host_transfer=true" not in instruction.rest:
                continue
            transfer = _transfer(instruction)
            array = inside[instruction.operands[0]]
            size = times * shape_bytes(array.shape) * SENT[transfer.kind](transfer.slices)
            is_overlapped = _is_overlapped(instruction, inside)
            for host, senders in Counter(hosts[device] for device in transfer.senders).items():
                # All chips of a host share its network, including those that send nothing.
                of_chip = size * senders / chips[host]
                communicated[host, transfer.kind] += of_chip
                exposed[host, transfer.kind] += 0 if is_overlapped else of_chip
    # The hosts send at the same time, so all wait for the slowest of them.
    busiest = max(chips, key=lambda host: sum(communicated[host, kind] for kind in KINDS))
    return Traffic(
        {kind: round(communicated[busiest, kind]) for kind in KINDS},
        {kind: round(exposed[busiest, kind]) for kind in KINDS},
    )


def _transfer(send: Instruction) -> _Transfer:
    found = _TYPE.search(send.rest)
    kind = found[1].lower().replace("_", "-") if found else ""
    # A permutation has no groups: each source sends to one other device.
    if kind == "one-to-one" and (pairs := _PAIRS.findall(send.rest)):
        return _Transfer("collective-permute", frozenset(int(source) for source, _ in pairs), 2)
    groups = _groups(send.rest)
    if kind not in KINDS or not groups:
        raise ValueError(f"{send.name} is a transfer between slices of unknown type: {send.rest}")
    # All groups span the same number of slices.
    slices = {device // _OF_SLICE for device in groups[0]}
    return _Transfer(kind, frozenset(itertools.chain(*groups)), len(slices))


def _groups(attributes: str) -> list[list[int]]:
    """Return the groups of devices that exchange data, or [] if the attributes do not give them."""
    if product := _PRODUCT.search(attributes):
        slices, numbers = (list(_numbers(text)) for text in product.groups())
        return [[_OF_SLICE * s + number for s in slices] for number in numbers]
    listed = _GROUPS.search(attributes)
    return [list(_numbers(group)) for group in listed[1][1:-1].split("},{")] if listed else []


def _numbers(text: str) -> Iterator[int]:
    """Yield the numbers in a text such as '1,2', or '0:15' with both ends included."""
    for part in text.split(","):
        first, _, last = part.partition(":")
        yield from range(int(first), int(last or first) + 1)


def _is_overlapped(send: Instruction, inside: Computation) -> bool:
    """Return whether the chip computes between a send and the end of the matching recv."""
    name = _RENDEZVOUS.search(send.rest)
    received = {
        i.name for i in inside.values() if i.opcode == "recv" and name and name[0] in i.rest
    }
    return computes_until(
        lambda i: i.opcode == "recv-done" and i.operands[0] in received, send, inside
    )
