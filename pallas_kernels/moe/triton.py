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
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.moe.combine import weighted_sum
from pallas_kernels.triton import mxfp4_products
from pallas_kernels.words import TILE_COLUMNS, TILE_ROWS, MXFP4Words

MAX_TOKENS = 64
COLUMNS = 8  # tokens a program: the narrowest matrix instruction


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
    """Tiling of both products: gate with up, and down."""

    up: Tiling
    down: Tiling


def configure(tokens: int, width: int, dim: int) -> Config:
    """What was fastest on an H100 (benchmarks/LOG.md)."""
    del dim
    down = Tiling(warps=2)
    if width >= 1024:
        return Config(Tiling(stages=5), down)
    # A narrow shard has few tiles of rows, whose programs alone would not keep the memory busy.
    return Config(Tiling(rows=32, splits=4, warps=2) if tokens < 4 else Tiling(splits=4), down)


def unsupported(x: Any, chosen: Any, gate: Any) -> str | None:
    """Why these kernels can't do a case; None if they can."""
    if not isinstance(gate, MXFP4Words):
        return f"the experts are not packed MXFP4 but {type(gate).__name__}"
    if x.dtype != jnp.bfloat16:
        return f"activations are {x.dtype}, and tensor cores take bfloat16 here"
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
    """`reference.moe` in two kernels and a weighted sum.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(x, chosen, gate):
        raise NotImplementedError(reason)
    tokens, top_k = chosen.shape
    width, dim = gate.padded
    config = config or configure(tokens, width, dim)
    x = jnp.pad(x, ((0, 0), (0, dim - x.shape[1]))) if dim > x.shape[1] else x
    pairs = tokens * top_k
    filled = pl.next_power_of_2(pairs)
    expert = jnp.pad(chosen.reshape(-1), (0, filled - pairs), constant_values=-1)
    call = functools.partial(
        _product, expert, pairs=pairs, one_token=tokens == 1, interpret=interpret
    )
    h = call(x, [gate, up], per_row=top_k, tiling=config.up)
    y = call(h, [down], per_row=1, tiling=config.down)
    return weighted_sum(y.reshape(tokens, top_k, -1)[..., : down.rows], weights, chosen, gate)


def _product(
    expert: Int[Array, " R"],
    x: Float[Array, "N C"],
    stacks: list[MXFP4Words],
    *,
    pairs: int,
    per_row: int,
    one_token: bool,
    tiling: Tiling,
    interpret: bool,
) -> Float[Array, "pairs F"]:
    """For each pair its expert's product with row pair // per_row of x: with one stack of weights,
    or silu of the product with the first times that with the second."""
    n_rows, n_columns = stacks[0].padded
    n_experts = stacks[0].words.shape[0]
    splits = math.gcd(tiling.splits, n_columns // TILE_COLUMNS)
    steps = n_columns // TILE_COLUMNS // splits
    kernel = functools.partial(
        _kernel,
        n_experts=n_experts,
        per_row=per_row,
        one_token=one_token,
        steps=steps,
        tiling=dataclasses.replace(tiling, splits=splits, unroll=math.gcd(tiling.unroll, steps)),
        interpret=interpret,
    )
    arrays = [a for s in stacks for a in (s.words, s.scales)]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    out = jax.ShapeDtypeStruct((1, 1, pairs, n_rows), jnp.bfloat16)
    if splits > 1:
        out = jax.ShapeDtypeStruct((splits, len(stacks), pairs, n_rows), jnp.float32)
    y = pl.pallas_call(
        kernel,
        out_shape=out,
        grid=(n_rows // tiling.rows, pairs, splits),
        in_specs=[anywhere] * (2 + len(arrays)),
        out_specs=anywhere,
        compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="moe_up" if len(stacks) == 2 else "moe_down",
    )(expert, x, *arrays)
    if splits == 1:
        return y[0, 0]
    return _joined(list(y.sum(axis=0))).astype(jnp.bfloat16)


def _joined(products: list[Array]) -> Array:
    """The product with one stack; of two, silu of the first times the second."""
    if len(products) == 1:
        return products[0]
    gate, up = products
    return gate * jax.nn.sigmoid(gate) * up


def _kernel(
    expert_ref: Any,
    x_ref: Any,
    *refs: Any,
    n_experts: int,
    per_row: int,
    one_token: bool,
    steps: int,
    tiling: Tiling,
    interpret: bool,
) -> None:
    *stacks, out_ref = refs
    row_tile, pair, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    mine = plt.load(expert_ref.at[pair])
    same = plt.load(expert_ref.at[:]) == mine
    index = jnp.arange(same.shape[0])
    earlier = jnp.zeros((), jnp.int32)
    if not one_token:  # which has its experts to itself
        earlier = jnp.sum((same & (index < pair)).astype(jnp.int32))

    @pl.when((mine >= 0) & (mine < n_experts) & (earlier % COLUMNS == 0))
    def work() -> None:
        if one_token:
            first_column = jnp.arange(COLUMNS) == 0
            columns, valid = jnp.where(first_column, pair, 0), first_column[None, :]
        else:
            columns, valid = _columns(same, index, earlier)
        token = columns // per_row

        def tile(words: Any, scales: Any, row: Any) -> tuple[Any, Any]:
            which, within = row // TILE_ROWS, row % TILE_ROWS
            rows = pl.ds(within, min(tiling.rows, TILE_ROWS))
            return (
                lambda at: words.at[mine, which, first_step + at, rows, :],
                lambda at: scales.at[mine, which, first_step + at, rows],
            )

        first, first_step = row_tile * tiling.rows, split * steps
        starts = [first + r for r in range(0, tiling.rows, TILE_ROWS)]
        pairs_of_refs = list(zip(stacks[0::2], stacks[1::2]))
        products = mxfp4_products(
            [tile(words, scales, row) for words, scales in pairs_of_refs for row in starts],
            lambda at: plt.load(x_ref.at[token[None, :], first_step * TILE_COLUMNS + at[:, None]]),
            rows=min(tiling.rows, TILE_ROWS),
            tokens=COLUMNS,
            steps=steps,
            unroll=tiling.unroll,
            interpret=interpret,
        )
        # Beyond the end where there is no pair: the interpreter writes there, masked or not.
        to = jnp.where(valid, columns[None, :], out_ref.shape[2])
        stacked = [products[i : i + len(starts)] for i in range(0, len(products), len(starts))]
        if tiling.splits == 1:
            stacked = [[_joined(list(parts)) for parts in zip(*stacked)]]
        for which, parts in enumerate(stacked):
            for row, y in zip(starts, parts):
                into = out_ref.at[split, which, to, row + jnp.arange(y.shape[0])[:, None]]
                plt.store(into, y.astype(out_ref.dtype), mask=jnp.broadcast_to(valid, y.shape))


def _columns(
    same: Bool[Array, " R"], index: Int[Array, " R"], first: Int[Array, ""]
) -> tuple[Int[Array, " 8"], Bool[Array, "1 8"]]:
    """Of the pairs with the same expert those of rank first .. first + 7, and which there are."""
    rank = jnp.cumsum(same.astype(jnp.int32)) - 1 - first
    column = jnp.arange(COLUMNS)
    hit = same[:, None] & (rank[:, None] == column[None, :])
    pair = jnp.sum(jnp.where(hit, index[:, None], 0), axis=0)
    there = jnp.sum(hit.astype(jnp.int32), axis=0) > 0
    return pair, there[None, :]
