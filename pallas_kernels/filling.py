"""Matrices filled with zeros up to whole tiles, and back; also of several parts side by side."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Repacked:
    """A quantised matrix (or stack) in an order that kernels want, filled up to whole tiles.

    Attributes:
      words: the codes; see the formats.
      scales: see the formats.
      rows: of the matrix that was packed; on a mesh, of each device's part of it.
      columns: likewise.
      kernels: the backends that may be used (`pallas_kernels.backends.resolve`).
    """

    # Of `words`: how many of the last axes are a matrix; those that rows and columns are cut along;
    # how many of them an entry stands for.
    MATRIX_AXES: ClassVar[int]
    ROW_AXIS: ClassVar[int]
    COLUMN_AXIS: ClassVar[int]
    PER_ENTRY: ClassVar[tuple[int, int]]
    # What rows and columns are filled to multiples of.
    UNITS: ClassVar[tuple[int, int]]

    words: Any
    scales: Any
    rows: int
    columns: int
    kernels: tuple[str, ...] = ()

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns that are stored."""
        shape, (rows, columns) = self.words.shape, self.PER_ENTRY
        return shape[self.ROW_AXIS] * rows, shape[self.COLUMN_AXIS] * columns

    @property
    def parts(self) -> tuple[int, int]:
        """Into how many parts the rows and the columns were cut before they were packed."""
        (r, c), (row_unit, column_unit) = self.padded, self.UNITS
        return r // up(self.rows, row_unit), c // up(self.columns, column_unit)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix that is represented."""
        rows, columns = self.parts
        lead = self.words.shape[: -self.MATRIX_AXES]
        return (*lead, rows * self.rows, columns * self.columns)

    @property
    def ndim(self) -> int:
        """Number of dimensions of the matrix that is represented."""
        return len(self.words.shape) - self.MATRIX_AXES + 2

    def with_arrays(self, words: Any, scales: Any) -> Any:
        """The same with other things in the place of the arrays."""
        return dataclasses.replace(self, words=words, scales=scales)


def up(n: int, unit: int) -> int:
    """The next multiple of a unit."""
    return -(-n // unit) * unit


def filled(a: Array, rows: int, columns: int) -> Array:
    """An array [..., R, C] with zeros up to these sizes."""
    more = [(0, 0)] * (a.ndim - 2) + [(0, rows - a.shape[-2]), (0, columns - a.shape[-1])]
    return jnp.pad(a, more) if any(n for _, n in more) else a


def cropped(a: Array, parts: tuple[int, int], rows: int, columns: int) -> Array:
    """An array [..., R, C] without what fills it.

    Args:
      a: the filled array.
      parts: into how many parts R and C are cut, each of which was filled by itself.
      rows, columns: of a part.
    """
    *lead, r, c = a.shape
    a = a.reshape(*lead, parts[0], r // parts[0], parts[1], c // parts[1])
    a = a[..., :rows, :, :columns]
    return a.reshape(*lead, parts[0] * rows, parts[1] * columns)
