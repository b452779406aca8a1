"""Rows sorted by expert and a map of tiles, in plain jnp: what kernels for many tokens start from.

Each expert's (token, expert) pairs are consecutive rows, cut into tiles of equal width.  Widths are
of a fixed list, because a kernel has one body for each, and a group takes the smallest that fits:
so few rows are padding.  All sizes are static; how many rows and tiles are in use is data.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """Where pairs lie, and tiles of rows that share an expert.

    Attributes:
      token: int32[R], the token of each row; of rows that are padding, that of some other row.
      row: int32[P, X], the row of each pair; -1 for pairs whose expert is elsewhere.
      rows: int32[1], how many of the R rows are in use.
      tile_expert, tile_row, tile_kind: int32[N], the expert of a tile, its first row, and which of
        the widths it has; of tiles that are not in use, those of some other tile.
      tiles: int32[1], how many of the N tiles are in use.
    """

    token: Any
    row: Any
    rows: Any
    tile_expert: Any
    tile_row: Any
    tile_kind: Any
    tiles: Any


def sizes(pairs: int, n_experts: int, widths: tuple[int, ...]) -> tuple[int, int]:
    """Rows and tiles that are enough for every routing.

    A group of n rows has ceil(n / widest) tiles, and each wastes less than the largest gap between
    successive widths.
    """
    tiles = pairs // widths[-1] + min(n_experts, pairs)
    gap = max(b - a for a, b in zip((0, *widths), widths))
    rows = min(pairs + tiles * (gap - 1), tiles * widths[-1])
    return -(-rows // widths[0]) * widths[0], tiles


def group(chosen: Int[Array, "P X"], n_experts: int, widths: tuple[int, ...]) -> Groups:
    """Sorts pairs by expert.

    Args:
      chosen: experts; outside of 0..E-1 for experts that are elsewhere.
      n_experts: E.
      widths: rows a tile may have, rising.
    """
    tokens, top_k = chosen.shape
    pairs = tokens * top_k
    n_rows, n_tiles = sizes(pairs, n_experts, widths)
    here = (chosen >= 0) & (chosen < n_experts)
    expert = jnp.where(here, chosen, n_experts).astype(jnp.int32).reshape(-1)
    before, count = _ranks(expert, n_experts)

    width_of = jnp.asarray(widths, jnp.int32)
    parts = -(-count // widths[-1])
    a_part = -(-count // jnp.maximum(parts, 1))
    kind = jnp.sum(a_part[:, None] > width_of[None, :], axis=1, dtype=jnp.int32)
    width = width_of[kind]
    row_end, tile_end = jnp.cumsum(jnp.stack([parts * width, parts]), axis=1, dtype=jnp.int32)
    row_start = row_end - parts * width

    tile = jnp.arange(n_tiles, dtype=jnp.int32)
    tile_expert = jnp.sum(tile_end[None, :] <= tile[:, None], axis=1, dtype=jnp.int32)
    tile_expert = jnp.minimum(tile_expert, n_experts - 1)
    nth = tile - (tile_end - parts)[tile_expert]

    row = row_start[jnp.minimum(expert, n_experts - 1)] + before
    row = jnp.where(expert < n_experts, row, -1)
    nowhere = n_rows + jnp.arange(pairs, dtype=jnp.int32)
    token = jnp.arange(pairs, dtype=jnp.int32) // top_k
    at = jnp.where(row < 0, nowhere, row)
    return Groups(
        token=jnp.zeros(n_rows, jnp.int32).at[at].set(token, unique_indices=True, mode="drop"),
        row=row.reshape(tokens, top_k),
        rows=row_end[-1:],
        tile_expert=tile_expert,
        tile_row=row_start[tile_expert] + nth * width[tile_expert],
        tile_kind=kind[tile_expert],
        tiles=tile_end[-1:],
    )


BLOCK = 128  # pairs that are compared with each other


def _ranks(
    expert: Int[Array, " pairs"], n_experts: int
) -> tuple[Int[Array, " pairs"], Int[Array, " E"]]:
    """How many earlier pairs have the same expert, and how many pairs each expert has.

    Counting in blocks is a few small kernels where a sort is many.
    """
    pairs = len(expert)
    blocks = -(-pairs // BLOCK)
    e = jnp.pad(expert, (0, blocks * BLOCK - pairs), constant_values=n_experts)
    e = e.reshape(blocks, BLOCK)
    in_block = jnp.sum(
        e[:, :, None] == jnp.arange(n_experts, dtype=jnp.int32), axis=1, dtype=jnp.int32
    )
    until = jnp.cumsum(in_block, axis=0)
    earlier = jnp.arange(BLOCK)[:, None] > jnp.arange(BLOCK)[None, :]
    rank = jnp.sum((e[:, :, None] == e[:, None, :]) & earlier, axis=2, dtype=jnp.int32)
    block = jnp.arange(blocks)[:, None]
    before = (until - in_block)[block, jnp.minimum(e, n_experts - 1)] + rank
    return before.reshape(-1)[:pairs], until[-1]
