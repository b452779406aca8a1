"""An array on the host whose dimensions have names."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class NamedArray:
    """A numpy array whose dimensions have names; numpy's functions take it as the array it holds.

    Attributes:
      values: the array.
      axes: a name a dimension.
    """

    values: np.ndarray
    axes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.axes) != self.values.ndim or len(set(self.axes)) != len(self.axes):
            raise ValueError(
                f"axes {self.axes} for an array {self.values.shape}: give each dimension one name"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """How long each axis is."""
        return dict(zip(self.axes, self.values.shape, strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the array."""
        return self.values.dtype

    def at(self, **where: Any) -> NamedArray:
        """The part at these indices: a number (which drops the axis), a slice or several indices.

        Raises:
          ValueError: there is no such axis.
        """
        values, axes = self.values, self.axes
        for name, index in where.items():
            dimension = self._dimension(name, axes)
            if isinstance(index, slice):
                values = values[(slice(None),) * dimension + (index,)]
                continue
            values = np.take(values, index, axis=dimension)
            if np.ndim(index) == 0:
                axes = (*axes[:dimension], *axes[dimension + 1 :])
        return NamedArray(values, axes)

    def mean(self, *names: str) -> NamedArray:
        """float32 means over these axes; over all if none is named.

        Raises:
          ValueError: there is no such axis.
        """
        return self._reduced(np.mean, names)

    def sum(self, *names: str) -> NamedArray:
        """float32 sums over these axes; over all if none is named.

        Raises:
          ValueError: there is no such axis.
        """
        return self._reduced(np.sum, names)

    def _reduced(self, reduce: Any, names: tuple[str, ...]) -> NamedArray:
        names = names or self.axes
        over = tuple(self._dimension(name, self.axes) for name in names)
        left = tuple(a for a in self.axes if a not in names)
        return NamedArray(np.asarray(reduce(self.values.astype(np.float32), axis=over)), left)

    @staticmethod
    def _dimension(name: str, axes: tuple[str, ...]) -> int:
        if name not in axes:
            raise ValueError(
                f"there is no axis {name!r}; the array has {', '.join(axes) or 'none'}"
            )
        return axes.index(name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        return f"NamedArray({self.dtype} {sizes or 'scalar'})"
