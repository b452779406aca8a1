"""Arrays on devices from sources: every process reads, in pieces and in parallel, what its devices
hold.

Host memory stays bounded whatever the sizes are: a thread reads one piece at a time into a buffer
of its own and copies it to its place on the device.  Where the devices' memory is the host's,
pieces are read into their place at once and jax uses that memory as it is.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from mimo_jax.checkpoint.sources import (
    RUN,
    Index,
    Source,
    cut,
    extent,
    inside,
    intersection,
    run_from,
    whole,
)
from mimo_jax.checkpoint.values import NO_MESH

# Bytes read at a time, and bytes of the host's memory that may hold pieces on their way to devices.
# A piece is there twice, in a thread's buffer and where jax copies it to for the transfer.
PIECE = 32 << 20
BUDGET = 2 << 30
ALIGNMENT = 64  # bytes; jax on the CPU uses memory of others without copying it if it has this

Device = Any
Progress = Callable[[int, int], None]


def stream(
    wanted: Sequence[tuple[Source, Sharding | None]], progress: Progress | None = None
) -> list[jax.Array]:
    """The arrays of sources, each with its sharding, or without one on jax's default device.

    Args:
      wanted: what to read, and where it goes.
      progress: called after every piece with the bytes of files read so far and in all, from one
        thread at a time.

    Raises:
      OSError: a file cannot be read.
    """
    default = default_device()
    arrays = [_Incoming(source, sharding, default) for source, sharding in wanted]
    _run([piece for array in arrays for piece in array.pieces()], default, progress)
    with jax.set_mesh(NO_MESH):
        return [array.result() for array in arrays]


def memory_needed(arrays: Iterable[tuple[Any, Sharding | None]]) -> dict[Device, int]:
    """The bytes that arrays will take on each of this process's devices.

    Of devices that share the host's memory, those with the same part of an array share that too.
    """
    default, needed = default_device(), collections.Counter[Device]()
    for array, sharding in arrays:
        for part, devices in holders(local_parts(array.shape, sharding, default)).items():
            size = math.prod(extent(part)) * np.dtype(array.dtype).itemsize
            for device in devices[:1] if shares_memory(devices[0]) else devices:
                needed[device] += size
    return dict(needed)


def default_device() -> Device:
    """Where jax puts arrays if nothing is said."""
    with jax.set_mesh(NO_MESH):
        return next(iter(jax.device_put(np.zeros(1, np.uint8)).devices()))


def shares_memory(device: Device) -> bool:
    """Whether a device uses the host's memory."""
    return device.platform == "cpu"


def local_parts(
    shape: Sequence[int], sharding: Sharding | None, default: Device
) -> dict[Device, Index]:
    """The rectangle of an array that each of this process's devices holds."""
    if sharding is None:
        return {default: whole(shape)}
    placed = sharding.addressable_devices_indices_map(tuple(shape))
    return {
        device: tuple(slice(*s.indices(n)[:2]) for s, n in zip(index or (), shape, strict=True))
        for device, index in placed.items()
    }


def holders(parts: Mapping[Device, Index]) -> dict[Index, list[Device]]:
    """The devices that hold each part."""
    found: dict[Index, list[Device]] = collections.defaultdict(list)
    for device, part in parts.items():
        found[part].append(device)
    return dict(found)


def together(parts: Iterable[Index], shape: Sequence[int], itemsize: int) -> list[list[Index]]:
    """Parts of an array in groups that are best read as one rectangle.

    That is where parts have the same rows and so short pieces of them that whole rows would be read
    for each, if together they are all of a rectangle.
    """
    groups: dict[Any, list[Index]] = collections.defaultdict(list)
    for part in parts:
        run = math.prod(extent(part)[run_from(part, shape) :]) * itemsize
        groups[(part[0].start, part[0].stop) if run < RUN else part].append(part)
    found = []
    for group in groups.values():
        volume = sum(math.prod(extent(part)) for part in group)
        fills = volume == math.prod(extent(_around(group)))
        found += [group] if fills else [[part] for part in group]
    return found


def _around(parts: Sequence[Index]) -> Index:
    """The smallest rectangle with all the parts in it."""
    return tuple(slice(min(s.start for s in d), max(s.stop for s in d)) for d in zip(*parts))


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Something to read by one thread at a time, and the bytes of files that it takes."""

    read: Callable[[], None]
    file_bytes: int


class _Incoming:
    """An array that is being read."""

    def __init__(self, source: Source, sharding: Sharding | None, default: Device):
        self.source = source
        self.sharding = sharding
        self.devices = local_parts(source.shape, sharding, default)
        committed = sharding is not None
        self.parts: dict[Index, _HostPart | _DevicePart] = {
            part: (_HostPart if shares_memory(devices[0]) else _DevicePart)(
                part, source.dtype, devices, committed=committed
            )
            for part, devices in holders(self.devices).items()
        }

    def pieces(self) -> Iterator[_Piece]:
        """What has to be read; the parts in turn, so that all devices are busy."""
        itemsize = self.source.dtype.itemsize
        groups = together(self.parts, self.source.shape, itemsize)
        in_turn = itertools.zip_longest(
            *([(g, piece) for piece in cut(_around(g), itemsize, PIECE)] for g in groups)
        )
        for group, index in filter(None, itertools.chain.from_iterable(in_turn)):
            share = math.prod(extent(index)) / max(1, math.prod(self.source.shape))

            def read(index: Index = index, group: Sequence[Index] = group) -> None:
                self._read(index, [self.parts[part] for part in group])

            yield _Piece(read, round(self.source.file_bytes * share))

    def _read(self, index: Index, parts: Sequence[_HostPart | _DevicePart]) -> None:
        if len(parts) == 1:
            block = parts[0].room(index)
            self.source.read_into(index, block)
            parts[0].put(index, block)
            return
        block = scratch(extent(index), self.source.dtype)
        self.source.read_into(index, block)
        for part in parts:
            own = intersection(index, part.index)
            if own is not None:
                part.put(own, block[inside(own, index)])

    def result(self) -> jax.Array:
        """The array; to be called when all its pieces have been read."""
        held: dict[Device, jax.Array] = {}
        for part in self.parts.values():
            held |= part.arrays()
        if self.sharding is None:
            return next(iter(held.values()))
        arrays = [held[device] for device in self.devices]
        return jax.make_array_from_single_device_arrays(self.source.shape, self.sharding, arrays)


class _HostPart:
    """A part of an array in the host's memory; devices that hold the same part share it."""

    def __init__(
        self, index: Index, dtype: np.dtype, devices: Sequence[Device], *, committed: bool
    ):
        self.index = index
        self.devices = devices
        self.committed = committed
        self.values = aligned(extent(index), dtype)

    def room(self, index: Index) -> np.ndarray:
        """The place of a piece."""
        return self.values[inside(index, self.index)]

    def put(self, index: Index, block: np.ndarray) -> None:
        """Copies a piece to its place, if it wasn't read there."""
        room = self.room(index)
        if not np.may_share_memory(room, block):
            room[...] = block

    def arrays(self) -> dict[Device, jax.Array]:
        """The part on each device."""
        if not self.committed:
            return {self.devices[0]: jax.device_put(self.values)}
        return {device: jax.device_put(self.values, device) for device in self.devices}


class _DevicePart:
    """A part of an array in the memory of devices, each of which has a copy."""

    def __init__(
        self, index: Index, dtype: np.dtype, devices: Sequence[Device], *, committed: bool
    ):
        self.index = index
        self.dtype = dtype
        self.devices = devices
        self.committed = committed
        self.lock = threading.Lock()
        self.values: dict[Device, jax.Array] = {}

    def room(self, index: Index) -> np.ndarray:
        """Memory for a piece on its way."""
        return scratch(extent(index), self.dtype)

    def put(self, index: Index, block: np.ndarray) -> None:
        """Copies a piece to the devices, and returns when `block` is free again."""
        places = [device if self.committed else None for device in self.devices]
        # Once over the host's bus, and from there to the devices that hold the same.
        first = put(np.ascontiguousarray(block), places[0])
        pieces = [first, *(jax.device_put(first, place) for place in places[1:])]
        if index == self.index:
            self.values = dict(zip(self.devices, pieces, strict=True))
        else:
            begin = [s.start for s in inside(index, self.index)]
            with self.lock:  # each update consumes the array before it
                for device, place, piece in zip(self.devices, places, pieces, strict=True):
                    if device not in self.values:
                        shape = extent(self.index)
                        self.values[device] = jax.numpy.zeros(shape, self.dtype, device=place)
                    self.values[device] = _update(self.values[device], piece, begin)
        jax.block_until_ready(pieces)

    def arrays(self) -> dict[Device, jax.Array]:
        """The part on each device."""
        return self.values


def put(block: np.ndarray, device: Device | None) -> jax.Array:
    """A block on a device, or for None on the default one."""
    return jax.device_put(block, device)


@jax.jit(donate_argnums=0)
def _update(array: jax.Array, piece: jax.Array, begin: Sequence[Any]) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, piece, begin)


def _run(pieces: Sequence[_Piece], device: Device, progress: Progress | None) -> None:
    """Reads all pieces; the first exception ends it."""
    total, done, lock = sum(p.file_bytes for p in pieces), 0, threading.Lock()

    def work(piece: _Piece) -> None:
        nonlocal done
        with jax.set_mesh(NO_MESH), jax.default_device(device):
            piece.read()
        if progress is not None:
            with lock:
                done += piece.file_bytes
                progress(done, total)

    with concurrent.futures.ThreadPoolExecutor(threads()) as pool:
        futures = [pool.submit(work, piece) for piece in pieces]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def threads() -> int:
    """Threads that read: as many as processors, and as pieces fit in the budget."""
    return max(1, min(os.cpu_count() or 1, BUDGET // (2 * PIECE)))


_of_thread = threading.local()


def scratch(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Memory for a piece that is this thread's until it asks again.

    One buffer a thread, used again and again: fresh memory costs as much as reading does.
    """
    size = math.prod(shape) * dtype.itemsize
    if not hasattr(_of_thread, "buffer") or _of_thread.buffer.size < size:
        _of_thread.buffer = aligned((max(size, PIECE),), np.dtype(np.uint8))
    return _of_thread.buffer[:size].view(dtype).reshape(shape)


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array whose memory begins where jax wants it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)
