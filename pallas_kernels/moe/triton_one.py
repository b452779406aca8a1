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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.moe import triton_route
from pallas_kernels.packed import refused
from pallas_kernels.triton import (
    ANYWHERE,
    COLUMNS,
    LEAST_HEIGHT,
    groups,
    joined,
    load_rows,
    mxfp4_products,
    own_column,
)
from pallas_kernels.words import TILE_COLUMNS, MXFP4Words


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


def unsupported_routed(x: Any, scores: Any, gate: Any) -> str | None:
    """Why they can't do a case from its scores on; None if they can."""
    return unsupported(x, scores, gate) or triton_route.unsupported(scores)


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
    config = config or configure(gate.padded[0])

    def expert_of(chosen_ref: Any, tile: Any, pair: Any) -> Array:
        del tile
        return plt.load(chosen_ref.at[pair])

    top_k = chosen.size
    given = [chosen.reshape(-1)]
    [h] = _gate_and_up(x, gate, up, given, [], expert_of, top_k, config, interpret)
    return _down(chosen, weights, h, down, None, None, config.down, interpret)


def routed_moe(
    x: Float[Array, "P D"],
    scores: Float[Array, "P E"],
    bias: Float[Array, " E"],
    first: Int[Array, ""] | None,
    residual: Float[Array, "P D"] | None,
    gate: MXFP4Words,
    up: MXFP4Words,
    down: MXFP4Words,
    *,
    top_k: int,
    normalize: bool,
    scale: float | None,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "P D"], Float[Array, "P X"], Int[Array, "P X"]]:
    """`moe.routed_moe` in two kernels: every program of the first chooses for itself.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported_routed(x, scores, gate):
        raise NotImplementedError(reason)
    config = config or configure(gate.padded[0])

    def expert_of(*refs: Any) -> Array:
        scores_ref, bias_ref, *optional, weights_ref, chosen_ref, tile, pair = refs
        token = jnp.int32(0)
        sizes = {"n_experts": scores.shape[1], "top_k": top_k}
        chosen = triton_route.choice(scores_ref, bias_ref, token, **sizes)

        @pl.when((tile == 0) & (pair == 0))
        def _() -> None:
            options = {"normalize": normalize, "scale": scale}
            triton_route.mix(scores_ref, token, chosen, weights_ref, chosen_ref, **options)

        mine = jnp.int32(0)
        for k, expert in enumerate(chosen):
            mine = jnp.where(pair == k, expert, mine)
        return mine if first is None else mine - plt.load(optional[0].at[jnp.int32(0)])

    results = [jax.ShapeDtypeStruct((1, top_k), dtype) for dtype in (jnp.float32, jnp.int32)]
    given = [scores, bias] if first is None else [scores, bias, first.reshape(1)]
    h, weights, chosen = _gate_and_up(
        x, gate, up, given, results, expert_of, top_k, config, interpret
    )
    y = _down(chosen, weights, h, down, first, residual, config.down, interpret)
    return y, weights, chosen


def _gate_and_up(
    x: Float[Array, "1 D"],
    gate: MXFP4Words,
    up: MXFP4Words,
    given: list[Array],
    results: list[jax.ShapeDtypeStruct],
    expert_of: Callable[..., Int[Array, ""]],
    top_k: int,
    config: Config,
    interpret: bool,
) -> tuple[Array, ...]:
    """silu of the products with gate times those with up, of experts that are here: [X, F].

    Args:
      x: the token.
      gate, up: weights of the experts here.
      given, results: arrays and shapes of results that `expert_of` needs.
      expert_of: in the kernel, which of the experts here a pair has, from the refs of these, a tile
        of rows and the pair.
      top_k: pairs.
      config, interpret: as for `moe`.

    Returns:
      the products, and what `expert_of` has stored.
    """
    width, dim = gate.padded
    splits = math.gcd(config.splits, dim // TILE_COLUMNS)
    steps = dim // TILE_COLUMNS // splits
    height = config.up.height
    rows = height // splits
    x = jnp.pad(x.reshape(-1), (0, dim - x.shape[1]))

    def kernel(x_ref: Any, *refs: Any) -> None:
        stacks, out_ref = refs[:4], refs[4 + len(given)]
        tile, pair = pl.program_id(0), pl.program_id(1)
        mine = expert_of(*refs[4 : 4 + len(given)], *refs[5 + len(given) :], tile, pair)

        @pl.when((mine >= 0) & (mine < gate.shape[0]))
        def work() -> None:
            part, row = groups(tile, height, rows)
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
            h = joined([own_column(y, part).reshape(splits, rows).sum(axis=0) for y in products])
            to = out_ref.at[pair, tile * rows + jnp.arange(rows)]
            plt.store(to, h.astype(out_ref.dtype))

    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((top_k, width), jnp.bfloat16), *results],
        grid=(width // rows, top_k),
        in_specs=[ANYWHERE] * (5 + len(given)),
        out_specs=[ANYWHERE] * (1 + len(results)),
        compiler_params=plt.CompilerParams(num_warps=config.up.warps, num_stages=config.up.stages),
        interpret=interpret,
        name="moe_up_one",
    )(x, gate.words, gate.scales, up.words, up.scales, *given)


def _down(
    chosen: Int[Array, "1 X"],
    weights: Float[Array, "1 X"],
    h: Float[Array, "X F"],
    down: MXFP4Words,
    first: Int[Array, ""] | None,
    residual: Float[Array, "1 D"] | None,
    tiling: Tiling,
    interpret: bool,
) -> Float[Array, "1 D"]:
    """The weighted sum of the products with down, of experts that are here, and the residual."""
    padded, width = down.padded
    top_k = chosen.size
    slots = pl.next_power_of_2(top_k)
    height = max(tiling.height, slots, LEAST_HEIGHT)
    rows = height // slots

    def kernel(
        chosen_ref: Any, weights_ref: Any, h_ref: Any, words_ref: Any, scales_ref: Any, *refs: Any
    ) -> None:
        *optional, out_ref = refs
        tile = pl.program_id(0)
        part, row = groups(tile, height, rows)
        pair = jnp.minimum(part, top_k - 1)
        mine, weight = plt.load(chosen_ref.at[pair]), plt.load(weights_ref.at[pair])
        if first is not None:
            mine = mine - plt.load(optional[0].at[jnp.int32(0)])
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
        y = jnp.where(here, own_column(y, part) * weight, 0.0)
        y = y.reshape(slots, rows).sum(axis=0)
        at = tile * rows + jnp.arange(rows)
        there = at < down.rows
        if residual is not None:
            y = y + plt.load(optional[-1].at[at], mask=there, other=0.0).astype(y.dtype)
        plt.store(out_ref.at[at], y.astype(out_ref.dtype), mask=there)

    optional = [] if first is None else [first.reshape(1)]
    optional += [] if residual is None else [residual.reshape(-1)]
    dtype = jnp.float32 if residual is None else residual.dtype
    y = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((down.rows,), dtype),
        grid=(padded // rows,),
        in_specs=[ANYWHERE] * (5 + len(optional)),
        out_specs=ANYWHERE,
        compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="moe_down_one",
    )(chosen.reshape(-1), weights.reshape(-1), h, down.words, down.scales, *optional)
    return y[None]
