"""Few tokens on packed MXFP4 experts, in Triton: each expert that is needed is read once.

There is no sorting and no table.  A program belongs to a tile of rows of the weights and to a
(token, expert) pair.  It counts the earlier pairs with the same expert: at every eighth it works on
that pair and the up to seven that follow, as the eight columns of a matrix instruction whose rows
are weights, and otherwise it has nothing to do.  Results are stored by pair, so the weighted sum of
a token's experts needs no index.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.moe.combine import weighted_sum
from pallas_kernels.packed import refused
from pallas_kernels.triton import ANYWHERE, COLUMNS, joined, mxfp4_products
from pallas_kernels.words import TILE_COLUMNS, TILE_ROWS, MXFP4Words

MAX_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one of the two products is cut.

    Attributes:
      rows: rows of each weight stack that a program computes: a divisor of 64, or 128.
      splits: programs that share the columns; their sums are added up by XLA.
      unroll: column tiles a step of the loop.
      stages, warps: for Triton.
    """

    rows: int = 64
    splits: int = 1
    unroll: int = 1
    stages: int = 4
    warps: int = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiling of both products: gate with up, and down.

    Attributes:
      together: in one kernel, where down's programs start as up's end; neither product is split
        then, and both have the stages and warps of `up`.
    """

    up: Tiling
    down: Tiling
    together: bool = False


def configure(tokens: int, width: int) -> Config:
    """What was fastest on an H100 (benchmarks/LOG.md)."""
    down = Tiling(warps=2)
    if width >= 1024:
        up = Tiling(stages=5)
        # Waiting costs one token more than a start, and many tokens more than the overlap gives.
        return Config(up, Tiling(), together=True) if 4 <= tokens <= 8 else Config(up, down)
    # A narrow shard has few tiles of rows, whose programs alone would not keep the memory busy.
    return Config(Tiling(rows=32, splits=4, warps=2) if tokens < 4 else Tiling(splits=4), down)


def unsupported(x: Any, chosen: Any, gate: Any) -> str | None:
    """Why these kernels can't do a case; None if they can."""
    if reason := refused(x, gate, MXFP4Words):
        return reason
    if len(chosen) > MAX_TOKENS:
        return f"{len(chosen)} tokens are more than {MAX_TOKENS}"
    return None


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
    """`reference.moe` in one or two kernels and a weighted sum.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(x, chosen, gate):
        raise NotImplementedError(reason)
    tokens, top_k = chosen.shape
    width, dim = gate.padded
    config = config or configure(tokens, width)
    x = jnp.pad(x, ((0, 0), (0, dim - x.shape[1]))) if dim > x.shape[1] else x
    pairs = tokens * top_k
    filled = pl.next_power_of_2(pairs)
    expert = jnp.pad(chosen.reshape(-1), (0, filled - pairs), constant_values=-1)
    if config.together:
        y = _both_products(expert, x, gate, up, down, pairs, config, interpret)
    else:
        h = _product(expert, x, [gate, up], pairs, config.up, interpret)
        y = _product(expert, h, [down], pairs, config.down, interpret)
    return weighted_sum(y.reshape(tokens, top_k, -1)[..., : down.rows], weights, chosen, gate)


def _product(
    expert: Int[Array, " R"],
    x: Float[Array, "N C"],
    stacks: list[MXFP4Words],
    pairs: int,
    tiling: Tiling,
    interpret: bool,
) -> Float[Array, "pairs F"]:
    """For each pair its expert's product with its row of x (a token's pairs may share one), or with
    two stacks of weights silu of the product with the first times that with the second."""
    n_rows, n_columns = stacks[0].padded
    splits = math.gcd(tiling.splits, n_columns // TILE_COLUMNS)
    arrays = _arrays(stacks)
    out = jax.ShapeDtypeStruct((pairs, n_rows), jnp.bfloat16)
    if splits > 1:
        out = jax.ShapeDtypeStruct((splits, len(stacks), pairs, n_rows), jnp.float32)

    def kernel(expert_ref: Any, x_ref: Any, *refs: Any) -> None:
        row_tile, pair, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        mine = _Pair(expert_ref, pair, stacks[0].words.shape[0], interpret)

        @pl.when(mine.leads)
        def work() -> None:
            per_row = pairs // len(x)
            mine.multiply(
                x_ref, refs[:-1], refs[-1], row_tile, tiling, per_row=per_row, split=split
            )

    y = pl.pallas_call(
        kernel,
        out_shape=out,
        grid=(n_rows // tiling.rows, pairs, splits),
        in_specs=[ANYWHERE] * (2 + len(arrays)),
        out_specs=ANYWHERE,
        compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="moe_up" if len(stacks) == 2 else "moe_down",
    )(expert, x, *arrays)
    if splits == 1:
        return y
    return joined(list(y.sum(axis=0))).astype(jnp.bfloat16)


def _both_products(
    expert: Int[Array, " R"],
    x: Float[Array, "N C"],
    gate: MXFP4Words,
    up: MXFP4Words,
    down: MXFP4Words,
    pairs: int,
    config: Config,
    interpret: bool,
) -> Float[Array, "pairs F"]:
    """`_product` with gate and up, and of that with down.

    Programs take their work in order, first all of up's and then down's, and one of down's waits
    until all of up's that it depends on have counted up.  Those were taken before it, so whatever
    order programs are started in, it waits for programs that run.
    """
    width, dim = gate.padded
    up_tiles, down_tiles = width // config.up.rows, dim // config.down.rows
    of_up = pairs * up_tiles
    arrays = _arrays([gate, up, down])

    def kernel(expert_ref: Any, x_ref: Any, *refs: Any) -> None:
        *stacks, _, count_ref, h_ref, y_ref = refs
        item = _add(count_ref, jnp.int32(pairs), 1, interpret)
        is_up = item < of_up
        item = jnp.where(is_up, item, item - of_up)
        pair = jnp.where(is_up, item // up_tiles, item // down_tiles)
        row_tile = jnp.where(is_up, item % up_tiles, item % down_tiles)
        mine = _Pair(expert_ref, pair, gate.words.shape[0], interpret)

        @pl.when(mine.leads & is_up)
        def multiply_up() -> None:
            mine.multiply(x_ref, stacks[:4], h_ref, row_tile, config.up, per_row=pairs // len(x))
            _barrier(interpret)  # before one thread says that all have stored
            _add(count_ref, pair, 1, interpret)

        @pl.when(mine.leads & jnp.logical_not(is_up))
        def multiply_down() -> None:
            if not interpret:  # which runs one program after the other
                count = functools.partial(_add, count_ref, pair, 0, interpret)
                jax.lax.while_loop(lambda n: n < up_tiles, lambda _: count(), count())
            _barrier(interpret)
            mine.multiply(h_ref, stacks[4:], y_ref, row_tile, config.down, per_row=1)

    counts = jnp.zeros(pairs + 1, jnp.int32)  # tiles of up a pair, and items taken
    _, _, y = pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct(counts.shape, counts.dtype),
            jax.ShapeDtypeStruct((pairs, width), jnp.bfloat16),
            jax.ShapeDtypeStruct((pairs, dim), jnp.bfloat16),
        ),
        grid=(of_up + pairs * down_tiles,),
        in_specs=[ANYWHERE] * (3 + len(arrays)),
        out_specs=(ANYWHERE,) * 3,
        input_output_aliases={2 + len(arrays): 0},
        compiler_params=plt.CompilerParams(num_warps=config.up.warps, num_stages=config.up.stages),
        interpret=interpret,
        name="moe_up_down",
    )(expert, x, *arrays, counts)
    return y


def _arrays(stacks: list[MXFP4Words]) -> list[Array]:
    return [a for s in stacks for a in (s.words, s.scales)]


def _add(ref: Any, at: Any, n: int, interpret: bool) -> Int[Array, ""]:
    """Adds to a number in memory and returns what it was; other programs see what the calling
    thread has stored before, and it sees what they have."""
    if not interpret:
        return plt.atomic_add(ref, (at,), jnp.int32(n))
    before = ref[at]
    ref[at] = before + n
    return before


def _barrier(interpret: bool) -> None:
    if not interpret:
        plt.debug_barrier()


@dataclasses.dataclass
class _Pair:
    """In a kernel: a pair, and the others with its expert.

    Attributes:
      expert_ref: experts of all pairs.
      pair: which it is.
      n_experts: of the stacks of weights.
      interpret: the kernel is interpreted.
    """

    expert_ref: Any
    pair: Int[Array, ""]
    n_experts: int
    interpret: bool

    def __post_init__(self) -> None:
        self.expert = plt.load(self.expert_ref.at[self.pair])
        self.same = plt.load(self.expert_ref.at[:]) == self.expert
        self.index = jnp.arange(self.same.shape[0])
        self.earlier = jnp.sum((self.same & (self.index < self.pair)).astype(jnp.int32))
        here = (self.expert >= 0) & (self.expert < self.n_experts)
        self.leads = here & (self.earlier % COLUMNS == 0)

    def columns(self) -> tuple[Int[Array, " 8"], Bool[Array, "1 8"]]:
        """The pairs it works on, and which of the columns there are."""
        column = jnp.arange(COLUMNS)
        rank = jnp.cumsum(self.same.astype(jnp.int32)) - 1 - self.earlier
        hit = self.same[:, None] & (rank[:, None] == column[None, :])
        pair = jnp.sum(jnp.where(hit, self.index[:, None], 0), axis=0)
        there = jnp.sum(hit.astype(jnp.int32), axis=0) > 0
        return pair, there[None, :]

    def multiply(
        self,
        x_ref: Any,
        stacks: Sequence[Any],
        out_ref: Any,
        row_tile: Any,
        tiling: Tiling,
        *,
        per_row: int,
        split: Any = 0,
    ) -> None:
        """Stores a tile of rows of the product for its pairs.

        Args:
          x_ref: tokens [P, C], or pairs.
          stacks: words and scales of the weights, of gate and up or of down.
          out_ref: [pairs, F]; or [splits, stacks, pairs, F], for sums of some columns.
          row_tile, tiling, split: which part to do.
          per_row: pairs a row of x.
        """
        columns, valid = self.columns()
        rows = columns // per_row
        splits = out_ref.shape[0] if len(out_ref.shape) == 4 else 1
        steps = stacks[0].shape[2] // splits

        def tile(words: Any, scales: Any, row: Any, at: Any) -> tuple[Any, Any]:
            which, within = row // TILE_ROWS, row % TILE_ROWS
            step, part = first_step + at, pl.ds(within, min(tiling.rows, TILE_ROWS))
            return (
                plt.load(words.at[self.expert, which, step, part, :]),
                plt.load(scales.at[self.expert, which, step, part]),
            )

        first, first_step = row_tile * tiling.rows, split * steps
        starts = [first + r for r in range(0, tiling.rows, TILE_ROWS)]
        pairs_of_refs = list(zip(stacks[0::2], stacks[1::2]))
        products = mxfp4_products(
            [functools.partial(tile, *refs, row) for refs in pairs_of_refs for row in starts],
            lambda at: plt.load(x_ref.at[rows[None, :], first_step * TILE_COLUMNS + at[:, None]]),
            rows=min(tiling.rows, TILE_ROWS),
            tokens=COLUMNS,
            steps=steps,
            unroll=math.gcd(tiling.unroll, steps),
            interpret=self.interpret,
        )
        # Beyond the end where there is no pair: the interpreter writes there, masked or not.
        to = jnp.where(valid, columns[None, :], out_ref.shape[-2])
        stacked = [products[i : i + len(starts)] for i in range(0, len(products), len(starts))]
        if splits == 1:
            stacked = [[joined(list(parts)) for parts in zip(*stacked)]]
        for which, parts in enumerate(stacked):
            for row, y in zip(starts, parts):
                at = (to, row + jnp.arange(y.shape[0])[:, None])
                into = out_ref.at[at if splits == 1 else (split, which, *at)]
                plt.store(into, y.astype(out_ref.dtype), mask=jnp.broadcast_to(valid, y.shape))
