"""Many tokens on packed MXFP4 experts, in Triton: rows sorted by expert, in tiles that share one.

A program multiplies a tile of tokens with rows of their expert's weights, which it decodes in
registers.  What experts put out is stored by row, and each token gathers its own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.moe import dispatch
from pallas_kernels.moe.combine import weighted_sum
from pallas_kernels.packed import refused
from pallas_kernels.triton import joined, load_rows, mxfp4_products
from pallas_kernels.words import TILE_COLUMNS, MXFP4Words


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one of the two products is cut.

    Attributes:
      rows: rows of each weight stack a program, 64 or 128.
      stages, warps: for Triton.
    """

    rows: int = 128
    stages: int = 3
    warps: int = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiling of both products: gate with up, and down.

    Attributes:
      tokens: rows of activations a tile, a power of two of at least 8.
    """

    tokens: int
    up: Tiling
    down: Tiling


def configure(pairs: int, n_experts: int) -> Config:
    """What was fastest on an H100 (benchmarks/LOG.md)."""
    mean = pairs / n_experts
    if mean > 40:
        return Config(128, Tiling(), Tiling(warps=4))
    tokens = min(64, max(8, pl.next_power_of_2(int(mean))))
    return Config(tokens, Tiling(64, warps=4), Tiling(64, warps=4))


def unsupported(x: Any, chosen: Any, gate: Any) -> str | None:
    """Why these kernels can't do a case; None if they can."""
    return refused(x, gate, MXFP4Words)


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
    """`reference.moe` in a sort, two kernels and a weighted sum.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(x, chosen, gate):
        raise NotImplementedError(reason)
    n_experts = gate.shape[0]
    config = config or configure(chosen.size, n_experts)
    groups = dispatch.group(chosen, n_experts, (config.tokens,))
    x = jnp.pad(x, ((0, 0), (0, gate.padded[1] - x.shape[1])))
    call = functools.partial(_product, groups, tokens=config.tokens, interpret=interpret)
    h = call(x, [gate, up], gathered=True, tiling=config.up)
    y = call(h, [down], gathered=False, tiling=config.down)
    mine = y.at[groups.row, : down.rows].get(mode="clip")
    return weighted_sum(mine, weights, chosen, gate)


def _product(
    groups: dispatch.Groups,
    x: Float[Array, "N C"],
    stacks: list[MXFP4Words],
    *,
    gathered: bool,
    tokens: int,
    tiling: Tiling,
    interpret: bool,
) -> Float[Array, "R F"]:
    """Each row's product with its expert's weights: with one stack of weights, or silu of the
    product with the first times that with the second.

    Args:
      x: the rows, or with `gathered` the tokens that rows are of.
    """
    n_rows, n_columns = stacks[0].padded
    kernel = functools.partial(
        _kernel,
        gathered=gathered,
        tokens=tokens,
        rows=tiling.rows,
        steps=n_columns // TILE_COLUMNS,
        interpret=interpret,
    )
    arrays = [a for s in stacks for a in (s.words, s.scales)]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((len(groups.token), n_rows), jnp.bfloat16),
        grid=(n_rows // tiling.rows, len(groups.tile_expert)),
        in_specs=[anywhere] * (5 + len(arrays)),
        out_specs=anywhere,
        compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="moe_many_up" if gathered else "moe_many_down",
    )(groups.tiles, groups.tile_expert, groups.tile_row, groups.token, x, *arrays)


def _kernel(
    tiles_ref: Any,
    expert_ref: Any,
    first_ref: Any,
    token_ref: Any,
    x_ref: Any,
    *refs: Any,
    gathered: bool,
    tokens: int,
    rows: int,
    steps: int,
    interpret: bool,
) -> None:
    *stacks, out_ref = refs
    tile = pl.program_id(1)
    row = pl.program_id(0) * rows + jnp.arange(rows)

    @pl.when(tile < tiles_ref[0])
    def work() -> None:
        expert = plt.load(expert_ref.at[tile])
        first = plt.load(first_ref.at[tile])
        at = first + jnp.arange(tokens)
        source = plt.load(token_ref.at[pl.ds(first, tokens)]) if gathered else at

        products = mxfp4_products(
            [
                lambda step, stack=stack: load_rows(*stack, expert, row, step)
                for stack in zip(stacks[0::2], stacks[1::2])
            ],
            lambda columns: plt.load(x_ref.at[source[None, :], columns[:, None]]),
            rows=rows,
            tokens=tokens,
            steps=steps,
            unroll=1,
            interpret=interpret,
        )
        y = joined(products).astype(out_ref.dtype)
        plt.store(out_ref.at[at[None, :], row[:, None]], y)
