"""What a placement costs on a kind of device, by arithmetic: memory, time of a step, collectives.

Small pure functions that know arrays, shardings and devices, and no model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, AxisType

from sharding.devices import Device
from sharding.memory import GIB

Axes = tuple[str, ...]
Kind = Literal["all-reduce", "all-gather", "all-to-all"]


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh in explicit mode whose devices need not be there; sizes by axis."""
    explicit = (AxisType.Explicit,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), explicit)


@dataclasses.dataclass(frozen=True)
class Group:
    """Arrays of one kind.

    Attributes:
      name: what they are.
      per_device: bytes that each device holds of them.
      once: bytes of one copy.
    """

    name: str
    per_device: int
    once: int


def array_bytes(values: Any, shardings: Any) -> tuple[int, int]:
    """Bytes of a tree of arrays (or shapes) on one device, and of one copy of it.

    Args:
      values: anything with shapes and dtypes.
      shardings: the tree of its shardings, whose mesh may be abstract.
    """
    per_device = once = 0
    for array, sharding in zip(jax.tree.leaves(values), jax.tree.leaves(shardings), strict=True):
        itemsize = array.dtype.itemsize
        per_device += math.prod(sharding.shard_shape(array.shape)) * itemsize
        once += math.prod(array.shape) * itemsize
    return per_device, once


def grouped(parts: Iterable[tuple[str, int, int]]) -> tuple[Group, ...]:
    """Groups in order of their first appearance, from (name, bytes a device, bytes once)."""
    found: dict[str, Group] = {}
    for name, per_device, once in parts:
        old = found.get(name, Group(name, 0, 0))
        found[name] = Group(name, old.per_device + per_device, old.once + once)
    return tuple(found.values())


@dataclasses.dataclass(frozen=True)
class Memory:
    """How the memory of one device is spent.

    Attributes:
      spent: (what, bytes).
      usable: bytes there are.
    """

    spent: tuple[tuple[str, int], ...]
    usable: int

    @property
    def needed(self) -> int:
        """Bytes of everything."""
        return sum(n for _, n in self.spent)

    @property
    def left(self) -> int:
        """Bytes left over; negative if it does not fit."""
        return self.usable - self.needed

    @property
    def fits(self) -> bool:
        """Whether there is room for everything."""
        return self.left >= 0


def largest(fits: Callable[[int], bool], most: int, step: int = 1) -> int:
    """The largest multiple of `step` up to `most` that fits, 0 if none does.

    `fits` must be true up to some number and false from there on.
    """
    low, high = 0, most // step + 1  # low fits (or is 0), high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal collectives of a step.

    Attributes:
      kind: what is done.
      count: how many there are.
      nbytes: bytes of one's result on a device; of an all-to-all, bytes that a device sends off.
      ways: devices that exchange with each other.
      direct: an all-reduce in which every device writes its part into the memory of all others,
        each value with a number of its size beside it.
    """

    kind: Kind
    count: int
    nbytes: int
    ways: int
    direct: bool = False

    @property
    def sent(self) -> float:
        """Bytes that one device has to send for one of them: the least there can be, unless it is
        direct."""
        if self.direct:
            return 2.0 * self.nbytes * (self.ways - 1)
        factor = {"all-reduce": 2, "all-gather": 1, "all-to-all": 1}[self.kind]
        return factor * self.nbytes * (self.ways - 1) / self.ways


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time of a step, were nothing but one limit to count; seconds.

    Attributes:
      memory: to read the bytes.
      compute: to do the FLOPs.
    """

    memory: float
    compute: float

    @property
    def seconds(self) -> float:
        """The larger of the two: the step cannot be faster."""
        return max(self.memory, self.compute)

    @property
    def bound(self) -> str:
        """Which of the two it is."""
        return "memory" if self.memory >= self.compute else "compute"


def roofline(nbytes: float, flops: float, device: Device) -> Roofline | None:
    """The roofline of a step that reads these bytes and does these FLOPs on one device.

    None where the device's speed is not known.
    """
    if device.bandwidth is None or device.flops is None:
        return None
    return Roofline(nbytes / device.bandwidth.value, flops / device.flops.value)


def collective_seconds(
    collectives: Iterable[Collective], device: Device, devices: int
) -> float | None:
    """An estimate of the time of a step's collectives, one after the other: for each its latency,
    and its bytes over the interconnect.

    None where that is not known: among more devices than the interconnect reaches, or of a kind
    without figures.

    Args:
      collectives: of one step.
      device: the kind.
      devices: how many there are.
    """
    if not (device.interconnect and device.latency) or devices > (device.domain or 0):
        return None
    speed = device.interconnect.value

    def one(c: Collective) -> float:
        latency = device.direct_latency if c.direct else device.latency
        assert latency is not None
        return latency.value + c.sent / speed

    return float(sum(c.count * one(c) for c in collectives))


def explain(
    used: Mapping[str, Axes],
    shape: Mapping[str, int],
    groups: Sequence[Group] = (),
    *,
    wanted: Mapping[str, Axes] | None = None,
    sizes: Mapping[str, int] | None = None,
    spills: Mapping[str, Axes] | None = None,
) -> str:
    """A table of how logical axes are split, and of the bytes that each device then holds.

    Args:
      used: mesh axes by logical axis, as the rules are in effect.
      shape: sizes by mesh axis.
      groups: bytes of the arrays.
      wanted: the rules before they were fitted to `sizes`; by default they are those in effect.
      sizes: by logical axis, the parts that its arrays can be cut into.
      spills: by logical axis, those that take the mesh axes that do not divide it.
    """
    wanted, sizes, spills = wanted or used, sizes or {}, spills or {}
    rows = [("logical axis", "split over", "ways", "")]
    for logical in sorted({*wanted, *used}):
        axes, asked = used.get(logical, ()), wanted.get(logical, ())
        ways = math.prod(shape[a] for a in axes)
        left = [a for a in asked if a not in axes and shape[a] > 1]
        why = ""
        if left:
            whole = math.prod(shape[a] for a in asked)
            why = f"{sizes.get(logical, 0)} parts, not a multiple of {whole}"
            takers = [k for k in spills.get(logical, ()) if {*left} & {*used.get(k, ())}]
            why += f"; {' x '.join(left)} to {', '.join(takers)}" if takers else ""
        by = " x ".join(f"{a}={shape[a]}" for a in axes) or "whole"
        rows.append((logical, by, str(ways), why))
    lines = table(rows, "<<><")
    if groups:
        total = grouped(("total", g.per_device, g.once) for g in groups)
        rows = [("group", "GiB a device", "GiB in all", "part")]
        rows += [(g.name, gib(g.per_device), gib(g.once), split(g)) for g in (*groups, *total)]
        lines += ["", *table(rows, "<>><")]
    return "\n".join(lines)


def split(group: Group) -> str:
    """The part of a group that a device holds: "1/4", or "whole"."""
    if group.per_device >= group.once:
        return "whole"
    return f"1/{group.once / group.per_device:.3g}"


def gib(nbytes: float | int) -> str:
    """A number of GiB as text: two decimals, four below 10 MiB."""
    return f"{nbytes / GIB:,.2f}" if nbytes >= 10 * 2**20 or not nbytes else f"{nbytes / GIB:.4f}"


def table(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Lines of a table whose columns are as wide as they need to be.

    Args:
      rows: cells.
      align: "<" or ">" a column.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths, strict=True)).rstrip()
        for row in rows
    ]
