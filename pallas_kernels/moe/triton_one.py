"""One token on packed MXFP4 experts, in Triton: two kernels, the weighted sum in the second.

The narrowest matrix instruction has eight columns, and one token would use one of them.  Here each
column has another part of a sum, and a tile's rows are as many groups as there are parts: a group
wants its own column of the product and the rest is left.

- gate and up: the parts are ranges of the columns of x, so that more programs read at once than
  there are tiles of rows.
- down: the parts are the token's experts, so that a program has all of them for its rows.

Then the groups are added up, in the program and in the same order every time.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.packed import refused
from pallas_kernels.triton import ANYWHERE, COLUMNS, joined, load_rows, mxfp4_products
from pallas_kernels.words import TILE_COLUMNS, MXFP4Words

LEAST_HEIGHT = 16  # rows of a matrix instruction


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one of the two products is cut.

    Attributes:
      height: rows of a tile, of all groups together: a power of two.
      stages, warps: for Triton.
    """

    height: int = 64
    stages: int = 4
    warps: int = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiling of both products: gate with up, and down.

    Attributes:
      splits: ranges of x's columns: a power of two up to COLUMNS.
    """

    up: Tiling
    down: Tiling
    splits: int


def configure(width: int) -> Config:
    """What was fastest on an H100 (benchmarks/LOG.md)."""
    down = Tiling(stages=3, warps=2)
    if width >= 1024:
        return Config(Tiling(stages=5), down, splits=1)
    # A narrow shard has few tiles of rows, whose programs alone would not keep the memory busy.
    return Config(Tiling(), down, splits=4)


def unsupported(x: Any, chosen: Any, gate: Any) -> str | None:
    """Why these kernels can't do a case; None if they can."""
    if reason := refused(x, gate, MXFP4Words):
        return reason
    return None if len(chosen) == 1 else f"{len(chosen)} tokens are more than one"


def moe(
    x: Float[Array, "P D"],
    weights: Float[Array, "P X"],
    chosen: Int[Array, "P X"],
    gate: MXFP4Words,
    up: MXFP4Words,
    down: MXFP4Words,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "P D"]:
    """`reference.moe` in two kernels.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(x, chosen, gate):
        raise NotImplementedError(reason)
    width, dim = gate.padded
    config = config or configure(width)
    expert, x = chosen.reshape(-1), jnp.pad(x.reshape(-1), (0, dim - x.shape[1]))
    h = _gate_and_up(expert, x, gate, up, config, interpret)
    y = _down(expert, weights.reshape(-1), h, down, config.down, interpret)
    return y[None, : down.rows]


def _gate_and_up(
    expert: Int[Array, " X"],
    x: Float[Array, " D"],
    gate: MXFP4Words,
    up: MXFP4Words,
    config: Config,
    interpret: bool,
) -> Float[Array, "X F"]:
    """silu of the products with gate times those with up, for experts that are here."""
    width, dim = gate.padded
    splits = math.gcd(config.splits, dim // TILE_COLUMNS)
    steps = dim // TILE_COLUMNS // splits
    height = config.up.height
    rows = height // splits

    def kernel(expert_ref: Any, x_ref: Any, *refs: Any) -> None:
        *stacks, out_ref = refs
        tile, pair = pl.program_id(0), pl.program_id(1)
        mine = plt.load(expert_ref.at[pair])

        @pl.when((mine >= 0) & (mine < gate.shape[0]))
        def work() -> None:
            part, row = _groups(tile, height, rows)
            first_step = part * steps
            first_column = jnp.arange(COLUMNS) % splits * (steps * TILE_COLUMNS)
            products = mxfp4_products(
                [
                    lambda at, stack=stack: load_rows(*stack, mine, row, first_step + at)
                    for stack in zip(stacks[0::2], stacks[1::2])
                ],
                lambda at: plt.load(x_ref.at[first_column[None, :] + at[:, None]]),
                rows=height,
                tokens=COLUMNS,
                steps=steps,
                unroll=1,
                interpret=interpret,
            )
            h = joined([_own(y, part).reshape(splits, rows).sum(axis=0) for y in products])
            to = out_ref.at[pair, tile * rows + jnp.arange(rows)]
            plt.store(to, h.astype(out_ref.dtype))

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((len(expert), width), jnp.bfloat16),
        grid=(width // rows, len(expert)),
        in_specs=[ANYWHERE] * 6,
        out_specs=ANYWHERE,
        compiler_params=plt.CompilerParams(num_warps=config.up.warps, num_stages=config.up.stages),
        interpret=interpret,
        name="moe_up_one",
    )(expert, x, gate.words, gate.scales, up.words, up.scales)


def _down(
    expert: Int[Array, " X"],
    weights: Float[Array, " X"],
    h: Float[Array, "X F"],
    down: MXFP4Words,
    tiling: Tiling,
    interpret: bool,
) -> Float[Array, " D"]:
    """The weighted sum of the products with down, of experts that are here."""
    dim, width = down.padded
    top_k = len(expert)
    slots = pl.next_power_of_2(top_k)
    height = max(tiling.height, slots, LEAST_HEIGHT)
    rows = height // slots

    def kernel(
        expert_ref: Any, weights_ref: Any, h_ref: Any, words_ref: Any, scales_ref: Any, out_ref: Any
    ) -> None:
        tile = pl.program_id(0)
        part, row = _groups(tile, height, rows)
        pair = jnp.minimum(part, top_k - 1)
        mine, weight = plt.load(expert_ref.at[pair]), plt.load(weights_ref.at[pair])
        here = (part < top_k) & (mine >= 0) & (mine < down.shape[0])
        mine = jnp.where(here, mine, 0)
        # Columns that no group wants repeat a pair.
        column = jnp.minimum(jnp.arange(max(COLUMNS, slots)), top_k - 1)
        [y] = mxfp4_products(
            [lambda at: load_rows(words_ref, scales_ref, mine, row, at, there=here)],
            lambda at: plt.load(h_ref.at[column[None, :], at[:, None]]),
            rows=height,
            tokens=len(column),
            steps=width // TILE_COLUMNS,
            unroll=1,
            interpret=interpret,
        )
        # h of experts that are elsewhere is anything, and may be NaN.
        y = jnp.where(here, _own(y, part) * weight, 0.0)
        y = y.reshape(slots, rows).sum(axis=0)
        plt.store(out_ref.at[tile * rows + jnp.arange(rows)], y)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((dim,), jnp.float32),
        grid=(dim // rows,),
        in_specs=[ANYWHERE] * 5,
        out_specs=ANYWHERE,
        compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="moe_down_one",
    )(expert, weights, h, down.words, down.scales)


def _groups(
    tile: Int[Array, ""], height: int, rows: int
) -> tuple[Int[Array, " M"], Int[Array, " M"]]:
    """The group that each row of a tile is in, and the row of the weights that it is."""
    index = jnp.arange(height)
    return index // rows, tile * rows + index % rows


def _own(y: Float[Array, "M N"], part: Int[Array, " M"]) -> Float[Array, " M"]:
    """Each row's own column."""
    return jnp.where(part[:, None] == jnp.arange(y.shape[1])[None, :], y, 0.0).sum(axis=1)
