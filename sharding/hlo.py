"""The collectives of a compiled program, read from its HLO text: what a test of a budget counts.

    compiled = jax.jit(step).lower(...).compile()
    summarize(collectives(compiled.as_text()))["all-reduce"].count

Reads what XLA prints for CPU, GPU and TPU.  Communication inside a kernel (a custom call) is not in
the text.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (.*)")
_OPCODE = re.compile(rf"({'|'.join(KINDS)})(-start|-done)?\((.*)")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\]")
# The last operand of a -done, which has only one: a name, after its shape in verbose texts.
_OPERAND = re.compile(r".*?%?([\w.-]+)\)(?:,|$)")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of KINDS.
      arrays: (dtype as XLA spells it, shape) of each result, as one device holds them; several
        when XLA has combined operations into one.
      bytes: of all results on one device, dtypes below a byte counted as packed.
      group_size: devices that exchange with each other; None for collective-permute, which has
        pairs of devices instead of groups.
      op_name: where it comes from in the JAX program, "" where XLA doesn't say.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    bytes: int
    group_size: int | None
    op_name: str


class Total(NamedTuple):
    """How many collectives, and the bytes of their results on one device."""

    count: int
    bytes: int


def collectives(hlo_text: str) -> list[Collective]:
    """The collectives of a program in the order of its text.

    One in the body of a loop counts once, whatever the number of iterations, and so does one in a
    branch that may not be taken.  An asynchronous pair of -start and -done counts once.

    Args:
      hlo_text: `compiled.as_text()`.

    Raises:
      ValueError: if a -start or -done lacks its other half, or replica groups are in a notation
        that this module doesn't know.
    """
    n_devices = _devices(hlo_text)
    found: list[Collective] = []
    started: dict[str, str] = {}
    for line in hlo_text.splitlines():
        instruction = _OPCODE.search(line) and _INSTRUCTION.match(_COMMENT.sub("", line))
        if not instruction:
            continue
        name, text = instruction.groups()
        shape, operation = _split_shape(text)
        opcode = _OPCODE.match(operation)
        if not opcode:
            continue
        kind, phase, arguments = opcode.groups()
        if phase == "-start":
            started[name] = arguments
            continue
        if phase == "-done":
            # The result is the shape of -done: that of -start has operands and contexts in it, in
            # an arrangement that differs between kinds and backends.  The groups are with -start.
            operand = _OPERAND.match(arguments)
            if not operand or operand[1] not in started:
                raise ValueError(f"{kind}-done {name} has no {kind}-start before it in this text.")
            arguments = started.pop(operand[1])
        found.append(_collective(kind, shape, arguments, n_devices))
    if started:
        raise ValueError(f"These collectives start and are never done: {', '.join(started)}.")
    return found


def summarize(found: Iterable[Collective]) -> dict[str, Total]:
    """Count and bytes of the collectives of each kind that occurs."""
    totals: dict[str, Total] = {}
    for collective in found:
        count, size = totals.get(collective.kind, Total(0, 0))
        totals[collective.kind] = Total(count + 1, size + collective.bytes)
    return totals


def _collective(kind: str, shape: str, arguments: str, n_devices: int) -> Collective:
    arrays = tuple(
        (dtype, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(shape)
    )
    op_name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', arguments)
    return Collective(
        kind=kind,
        arrays=arrays,
        bytes=sum(-(-_bits(dtype) * math.prod(sizes) // 8) for dtype, sizes in arrays),
        group_size=None if kind == "collective-permute" else _group_size(arguments, n_devices),
        op_name=op_name[1] if op_name else "",
    )


def _split_shape(text: str) -> tuple[str, str]:
    """The shape that an instruction begins with, and the rest: cut at the first space outside
    brackets, since shapes nest (tuples, layouts such as {1,0:T(8,128)})."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == " " and depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _bits(dtype: str) -> int:
    """Bits of an element: the first number in a name (bf16, s4, f8e4m3fn); none in a token."""
    if dtype == "pred":
        return 8
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0


def _devices(hlo_text: str) -> int:
    header = hlo_text.lstrip().partition("\n")[0]
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)
    return math.prod(int(count) for count in counts)


def _group_size(arguments: str, n_devices: int) -> int:
    """Devices of a replica group, in the four notations of XLA."""
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", arguments):  # {{0,1},{2,3}}
        return len(groups[1].split(","))
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]<=", arguments):  # [4,2]<=[2,4]T(1,0)
        return int(groups[1])
    # mesh['data'=2,'expert'=4] {'expert'}; a part of an axis of 4 is 'expert':(1)2.
    if groups := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", arguments):
        sizes = dict(re.findall(r"'?(\w+)'?=(\d+)", groups[1]))
        axes = re.findall(r"'?(\w+)'?(?::\(\d+\)(\d+))?", groups[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if "replica_groups={}" in arguments:  # all devices
        return n_devices
    raise ValueError(f"Cannot read the replica groups of a collective: {arguments[:200]}")
