"""Reading and writing safetensors files, block-FP8 included.

The library's numpy and flax front ends refuse F8_E4M3 and read whole tensors; this reads any range
of any tensor into memory that the caller has, and writes tensors one at a time.  Format: 8 bytes of
little-endian header length, a JSON header, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import os
import struct
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mimo_jax.checkpoint.errors import Problem

MAX_HEADER = 100_000_000  # the limit of the safetensors library

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its type as the header names it, and where its bytes are.

    `start` and `end` count bytes from the beginning of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    file: SafetensorsFile

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    def read_into(self, first: int, out: np.ndarray) -> None:
        """Fills a contiguous array with the elements from number `first` on.

        Reads at a position and not through a memory map: threads then wait for the disk without
        holding Python's lock, and a file that becomes shorter is an exception and not a signal.

        Raises:
          OSError: the file cannot be read, or ends too early.
        """
        if out.dtype != DTYPES[self.dtype] or not out.flags.c_contiguous:
            raise ValueError(
                f"{self.name}: needs a contiguous array of {DTYPES[self.dtype]}, found {out.dtype}"
            )
        left = memoryview(out.reshape(-1).view(np.uint8))
        position = self.start + first * out.itemsize
        while left:
            count = os.preadv(self.file.descriptor, [left], position)
            if not count:
                raise OSError(f"{self.file.path} ends at byte {position}, inside of {self.name}")
            left = left[count:]
            position += count


@dataclasses.dataclass(frozen=True, eq=False)
class SafetensorsFile:
    """A file whose header has been read; `name` is relative to the checkpoint's folder."""

    path: Path
    name: str
    tensors: dict[str, StoredTensor] = dataclasses.field(default_factory=dict, repr=False)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def descriptor(self) -> int:
        """The open file, as the operating system numbers it; closed with this object."""
        descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor


def open_file(path: Path, name: str) -> tuple[SafetensorsFile, list[Problem]]:
    """Reads the header of a safetensors file and checks it against the file's size.

    Returns:
      The file with the tensors that the header describes soundly, and everything wrong with it.
    """
    file = SafetensorsFile(path, name)
    problems: list[Problem] = []

    def problem(kind: str, found: str, expected: str, tensor: str = "") -> None:
        problems.append(Problem(kind, found, expected, tensor, name))

    size = path.stat().st_size
    with open(path, "rb") as f:
        prefix = f.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if len(prefix) < 8 or 8 + length > size or length > MAX_HEADER:
            problem(
                "truncated or not a safetensors file",
                f"{size} bytes" + (f" and a header of {length}" if len(prefix) == 8 else ""),
                f"a header of at most {MAX_HEADER} bytes that fits in the file",
            )
            return file, problems
        raw = f.read(length)
    try:
        header = loads_unique(raw.decode("utf-8"))
    except ValueError as error:
        problem("broken header", str(error), "JSON without repeated keys")
        return file, problems
    if not isinstance(header, dict):
        problem("broken header", type(header).__name__, "a JSON object")
        return file, problems

    data = 8 + length
    metadata = header.pop("__metadata__", None)
    file.metadata.update(metadata if isinstance(metadata, dict) else {})
    for tensor, entry in header.items():
        stored = _stored(tensor, entry, data, file)
        if isinstance(stored, str):
            problem("broken header", stored, "dtype, shape and data_offsets that agree", tensor)
        else:
            file.tensors[tensor] = stored
    if problems:
        return file, problems

    end = data
    for stored in sorted(file.tensors.values(), key=lambda s: (s.start, s.end)):
        if stored.start != end:
            problem(
                "broken header",
                f"bytes from {stored.start - data}",
                f"bytes from {end - data}, where the tensor before it ends",
                stored.name,
            )
            return file, problems
        end = stored.end
    if end != size:
        kind = "truncated file" if end > size else "trailing bytes"
        problem(kind, f"{size} bytes", f"the {end} bytes that its header describes")
    return file, problems


def _stored(name: str, entry: Any, data: int, file: SafetensorsFile) -> StoredTensor | str:
    """A tensor from its header entry, or what is wrong with the entry."""
    if not isinstance(entry, dict):
        return f"{entry!r}"
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    sound = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not (sound and isinstance(dtype, str) and _is_sizes([*shape, *offsets])):
        return f"{entry!r}"
    start, end = offsets
    if start > end:
        return f"data_offsets {offsets}"
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - start:
        return f"{end - start} bytes for {dtype} {shape}"
    return StoredTensor(name, dtype, tuple(shape), data + start, data + end, file)


def _is_sizes(values: list[Any]) -> bool:
    return all(type(x) is int and x >= 0 for x in values)


def loads_unique(text: str) -> Any:
    """JSON in which no object repeats a key.

    Raises:
      ValueError: not JSON, or a key occurs twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        d = dict(pairs)
        if len(d) != len(pairs):
            counts = collections.Counter(k for k, _ in pairs)
            twice = sorted(k for k, n in counts.items() if n > 1)
            raise ValueError(f"{len(twice)} repeated keys: " + ", ".join(twice[:5]))
        return d

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to write: `read` returns its array, and is called when its bytes are due."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file and waits until it is on the disk.

    Tensors keep the order given, except that wider element types come first, which aligns all of
    them (as the safetensors library does).
    """
    ordered = sorted(entries, key=lambda e: -e.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in ordered:
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(raw)) + raw)
        for entry in ordered:
            array = np.ascontiguousarray(entry.read())
            if array.shape != entry.shape or array.dtype != entry.dtype:
                raise ValueError(
                    f"{entry.name}: announced {entry.dtype} {entry.shape}, "
                    f"got {array.dtype} {array.shape}"
                )
            f.write(array.reshape(-1).view(np.uint8).data)
        f.flush()
        os.fsync(f.fileno())
