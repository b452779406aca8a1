"""Arrays that are read by rectangles: what a parameter's array in memory is made of in files.

A `Source` stands for a whole array as it will be in memory, and reads any rectangle of it, so that
a process needs to read only what its devices hold.  Few kinds of them, one inside another, express
every layout: tensors that are seen in another shape, joined, cut, cast or dequantised.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mimo_jax.checkpoint.safetensors_file import DTYPES, StoredTensor
from mimo_jax.checkpoint.values import any_wrong
from mimo_jax.quant import BLOCKS, numpy_dequantize

Shape = tuple[int, ...]
# A rectangle: the first index of each dimension, and the one after the last.
Index = tuple[slice, ...]

# Bytes read, checked or converted at a time: small enough for a processor's cache, so that checks
# cost little, and large enough that threads seldom wait for Python's lock.
STEP = 4 << 20
# Adjacent bytes below which whole rows are read instead of parts of them.  A disk reads pages of 4
# kB anyway, and a call of the operating system costs as much as copying several of them.
RUN = 32 << 10


def whole(shape: Sequence[int]) -> Index:
    """The rectangle that is all of an array."""
    return tuple(slice(0, n) for n in shape)


def extent(index: Index) -> Shape:
    """The shape of what a rectangle holds."""
    return tuple(s.stop - s.start for s in index)


def inside(part: Index, index: Index) -> Index:
    """A part of a rectangle, counted from the rectangle's beginning."""
    pairs = zip(part, index, strict=True)
    return tuple(slice(p.start - i.start, p.stop - i.start) for p, i in pairs)


def intersection(one: Index, other: Index) -> Index | None:
    """What two rectangles have in common; None for nothing."""
    pairs = zip(one, other, strict=True)
    both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in pairs)
    return both if all(s.start < s.stop for s in both) else None


def cut(index: Index, itemsize: int, limit: int) -> Iterator[Index]:
    """A rectangle in pieces of at most `limit` bytes, or of one element: by its first dimension,
    and by the next where an item of that is too large."""
    if not index or math.prod(extent(index)) * itemsize <= limit:
        yield index
        return
    first, rest = index[0], index[1:]
    size = itemsize * math.prod(extent(rest))
    step = max(1, limit // size)
    for begin in range(first.start, first.stop, step):
        head = slice(begin, min(begin + step, first.stop))
        for tail in cut(rest, itemsize, limit) if size > limit else (rest,):
            yield (head, *tail)


def run_from(index: Index, shape: Sequence[int]) -> int:
    """The dimension from which on the elements of a rectangle are adjacent in the whole array."""
    d = len(index)
    while d > 0 and index[d - 1] == slice(0, shape[d - 1]):
        d -= 1
    return max(0, d - 1)


class Source:
    """An array that can be read by rectangles.

    Attributes:
      shape, dtype: of the whole array.
      file_bytes: what all of it takes in files.
    """

    def __init__(self, shape: Sequence[int], dtype: Any, file_bytes: int):
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.file_bytes = file_bytes

    def read_into(self, index: Index, out: np.ndarray) -> None:
        """Fills an array of the rectangle's shape.

        Raises:
          OSError: a file cannot be read.
        """
        raise NotImplementedError

    def read(self, index: Index | None = None) -> np.ndarray:
        """A rectangle as a new array; everything by default."""
        index = whole(self.shape) if index is None else index
        out = np.empty(extent(index), self.dtype)
        self.read_into(index, out)
        return out


class Held(Source):
    """An array that is in memory already."""

    def __init__(self, array: np.ndarray):
        super().__init__(array.shape, array.dtype, 0)
        self.array = array

    def read_into(self, index: Index, out: np.ndarray) -> None:
        """Copies."""
        out[...] = self.array[index]


class Tensor(Source):
    """A tensor of a file, seen in a shape that has its elements in the same order.

    Reads only the rectangle, or whole rows of it where its adjacent elements are few.
    """

    def __init__(self, stored: StoredTensor, shape: Sequence[int], damaged: set[StoredTensor]):
        """`damaged` gets the tensor if bad values are read."""
        super().__init__(shape, DTYPES[stored.dtype], stored.nbytes)
        self.stored = stored
        self.damaged = damaged

    def read_into(self, index: Index, out: np.ndarray) -> None:
        """Reads and checks values."""
        d = run_from(index, self.shape)
        sizes = extent(index)
        runs, size = math.prod(sizes[:d]), math.prod(sizes[d:])
        if runs > 1 and size * self.dtype.itemsize < RUN:
            self._read_wider(index, d, out)
            return
        for outer in itertools.product(*map(range, sizes[:d])):
            target = out[outer]
            flat = target.reshape(-1) if target.flags.c_contiguous else np.empty(size, self.dtype)
            self._read_run(self._number(index, outer), flat)
            if not target.flags.c_contiguous:
                target[...] = flat.reshape(target.shape)

    def _number(self, index: Index, outer: Sequence[int]) -> int:
        """The number, in the whole array, of an element of a rectangle."""
        at = [s.start for s in index]
        for i, more in enumerate(outer):
            at[i] += more
        strides = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        return sum(a * s for a, s in zip(at, strides, strict=True))

    def _read_wider(self, index: Index, d: int, out: np.ndarray) -> None:
        wider = (*index[:d], *whole(self.shape[d:]))
        for part in cut(wider, self.dtype.itemsize, STEP):
            wanted = intersection(part, index)
            if wanted is not None:
                out[inside(wanted, index)] = self.read(part)[inside(wanted, part)]

    def _read_run(self, first: int, flat: np.ndarray) -> None:
        step = STEP // self.dtype.itemsize
        for begin in range(0, flat.size, step):
            part = flat[begin : begin + step]
            self.stored.read_into(first + begin, part)
            if any_wrong(self.stored.name, part):
                self.damaged.add(self.stored)


class Joined(Source):
    """Sources one after another along one dimension."""

    def __init__(self, parts: Sequence[Source], axis: int):
        shape = list(parts[0].shape)
        sizes = [p.shape[axis] for p in parts]
        shape[axis] = sum(sizes)
        super().__init__(shape, parts[0].dtype, sum(p.file_bytes for p in parts))
        self.parts = tuple(parts)
        self.axis = axis
        self.ends = list(itertools.accumulate(sizes))

    def read_into(self, index: Index, out: np.ndarray) -> None:
        """Reads those parts that the rectangle touches."""
        before, along, after = index[: self.axis], index[self.axis], index[self.axis + 1 :]
        begin = along.start
        for i in range(bisect.bisect_right(self.ends, begin), len(self.parts)):
            if begin >= along.stop:
                break
            end, part = min(along.stop, self.ends[i]), self.parts[i]
            first = self.ends[i] - part.shape[self.axis]
            there = (*before, slice(begin - first, end - first), *after)
            here = (slice(None),) * self.axis + (slice(begin - along.start, end - along.start),)
            part.read_into(there, out[here])
            begin = end


class Window(Source):
    """A rectangle of another source."""

    def __init__(self, source: Source, place: Index):
        share = math.prod(extent(place)) / max(1, math.prod(source.shape))
        super().__init__(extent(place), source.dtype, round(source.file_bytes * share))
        self.source = source
        self.place = place

    def read_into(self, index: Index, out: np.ndarray) -> None:
        """Reads the rectangle where it is in the other source."""
        pairs = zip(index, self.place, strict=True)
        there = tuple(slice(p.start + i.start, p.start + i.stop) for i, p in pairs)
        self.source.read_into(there, out)


class Cast(Source):
    """A source in another type."""

    def __init__(self, source: Source, dtype: Any):
        super().__init__(source.shape, dtype, source.file_bytes)
        self.source = source

    def read_into(self, index: Index, out: np.ndarray) -> None:
        """Converts a few rows at a time."""
        for part in cut(index, self.source.dtype.itemsize, STEP):
            out[inside(part, index)] = self.source.read(part).astype(self.dtype)


class Dense(Source):
    """Dense weights of quantised ones, rounded once to a type."""

    def __init__(self, kind: type, codes: Source, scales: Source, dtype: Any):
        """`kind` is FP8Array or MXFP4Array, of whose `codes` and `scales` these are sources."""
        shape = kind(codes, scales).shape
        super().__init__(shape, dtype, codes.file_bytes + scales.file_bytes)
        self.kind, self.codes, self.scales = kind, codes, scales
        self.units = tuple(math.lcm(*sizes) for sizes in zip(*BLOCKS[kind], strict=True))

    def read_into(self, index: Index, out: np.ndarray) -> None:
        """Dequantises whole blocks, a few rows at a time, and keeps the rectangle's part."""
        *lead, rows, columns = index
        first, last = self._blocks(rows, -2), self._blocks(columns, -1)
        unit = self.units[0]
        step = max(unit, STEP // 4 // self.shape[-1] // unit * unit)
        for at in itertools.product(*(range(s.start, s.stop) for s in lead)):
            one = tuple(slice(i, i + 1) for i in at)
            for begin in range(first.start, first.stop, step):
                end = min(begin + step, first.stop)
                part = (*one, slice(begin, end), last)
                wanted = intersection(part, index)
                if wanted is not None:
                    out[inside(wanted, index)] = self._dense(part)[inside(wanted, part)]

    def _blocks(self, wanted: slice, axis: int) -> slice:
        """A range made longer so that it has whole blocks."""
        unit = self.units[axis]
        begin = wanted.start // unit * unit
        return slice(begin, min(-(-wanted.stop // unit) * unit, self.shape[axis]))

    def _dense(self, part: Index) -> np.ndarray:
        *lead, rows, columns = part
        arrays = []
        for source, (r, c) in zip((self.codes, self.scales), BLOCKS[self.kind], strict=True):
            blocks = (slice(s.start // n, -(-s.stop // n)) for s, n in ((rows, r), (columns, c)))
            arrays.append(source.read((*lead, *blocks)))
        return numpy_dequantize(self.kind(*arrays)).astype(self.dtype)
