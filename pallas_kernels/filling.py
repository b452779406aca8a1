"""Matrices filled with zeros up to whole tiles, and back; also of several parts side by side."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array


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
