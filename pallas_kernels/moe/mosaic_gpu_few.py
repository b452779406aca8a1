"""Few tokens on packed MXFP4 experts, on Hopper: each expert that is needed is read once.

There is no sorting and no tile map.  A program belongs to a tile of rows of the weights and to a
(token, expert) pair; the first pair with an expert works for up to eight tokens, the columns of a
matrix instruction whose rows are weights, and the others have nothing to do.  Results of columns
that no pair asked for are never read.

Up to eight tokens, all are columns for every expert.  With more, a token's row is first copied to
where the first pair with its expert finds it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.moe.mosaic_gpu_many import combine
from pallas_kernels.mosaic_gpu import (
    accumulator,
    bfloat16_transforms,
    decode,
    load_mxfp4,
    words_transforms,
)
from pallas_kernels.words import TILE_COLUMNS, TILE_ROWS, MXFP4Words

COLUMNS = 8  # the narrowest matrix instruction


@dataclasses.dataclass(frozen=True)
class Config:
    """Buffers of the pipelines of gate with up, and of down."""

    up_stages: int
    down_stages: int


def configure(tokens: int) -> Config:
    """What was faster on an H100 (benchmarks/LOG.md)."""
    return Config(4, 4) if tokens <= 4 else Config(6, 6)


def moe(
    x: Float[Array, "P D"],
    weights: Float[Array, "P X"],
    chosen: Int[Array, "P X"],
    gate: MXFP4Words,
    up: MXFP4Words,
    down: MXFP4Words,
    *,
    config: Config | None = None,
    interpret: Any = False,
) -> Float[Array, "P D"]:
    """`reference.moe`; see `mosaic_gpu.moe`."""
    config = config or configure(len(x))
    tokens = len(x)
    _, dim = gate.padded
    leader, row = columns(chosen, gate.words.shape[0])
    if tokens <= COLUMNS:
        x = jnp.pad(x, ((0, COLUMNS - tokens), (0, dim - x.shape[1])))
    else:
        x = jnp.pad(x, ((0, 0), (0, dim - x.shape[1]))) if dim > x.shape[1] else x
        x = spread(x, row, interpret=interpret)
    h = product(x, [gate, up], leader, stages=config.up_stages, interpret=interpret)
    y = product(h, [down], leader, stages=config.down_stages, interpret=interpret)
    return combine(y, weights, row, interpret=interpret)[:, : down.rows]


def columns(
    chosen: Int[Array, "P X"], n_experts: int
) -> tuple[Int[Array, " pairs"], Int[Array, "P X"]]:
    """Which pairs work, and where results lie.

    Returns:
      leader: the expert that a pair works for, or -1.
      row: 8 times the pair that works for a pair plus its column, or -1 if its expert is elsewhere.
    """
    tokens, top_k = chosen.shape
    flat = chosen.reshape(-1)
    index = jnp.arange(tokens * top_k, dtype=jnp.int32)
    here = (flat >= 0) & (flat < n_experts)
    same = flat[:, None] == flat[None, :]
    if tokens == 1:  # Its experts differ.
        first, column = index, 0
    elif tokens <= COLUMNS:
        first = jnp.min(jnp.where(same, index[None, :], len(index)), axis=1)
        column = index // top_k
    else:
        rank = jnp.sum(same & (index[None, :] < index[:, None]), axis=1, dtype=jnp.int32)
        leads = same & (rank[None, :] == (rank // COLUMNS * COLUMNS)[:, None])
        first = jnp.min(jnp.where(leads, index[None, :], len(index)), axis=1)
        column = rank % COLUMNS
    leader = jnp.where(here & (first == index), flat, -1).astype(jnp.int32)
    row = jnp.where(here, first * COLUMNS + column, -1).astype(jnp.int32)
    return leader, row.reshape(chosen.shape)


@functools.partial(jax.jit, static_argnames=("interpret",))
def spread(x: Float[Array, "P D"], row: Int[Array, "P X"], *, interpret: Any = False) -> Array:
    """A token's values at each of its pairs' rows: [8 pairs, D], the other rows undefined."""
    top_k, dim = row.shape[1], x.shape[1]
    layout = plgpu.Layout.WG_STRIDED((dim,), vec_size=math.gcd(dim // 128, 8))

    def body(row_ref: Any, x_ref: Any, out_ref: Any) -> None:
        pair = lax.axis_index("program")
        row = row_ref[pair]

        @pl.when(row >= 0)
        def _() -> None:
            out_ref.at[row][...] = plgpu.load(x_ref.at[lax.div(pair, top_k)], layout=layout)

    call = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((row.size * COLUMNS, dim), x.dtype),
        grid=(row.size,),
        grid_names=("program",),
        kernel_name="moe_spread",
        interpret=interpret or None,
    )
    return call(row.reshape(-1), x)


# Within jit, so that the layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("stages", "interpret"))
def product(
    x: Float[Array, "N C"],
    stacks: list[MXFP4Words],
    leader: Int[Array, " pairs"],
    *,
    stages: int,
    interpret: Any = False,
) -> Float[Array, "pairs*8 F"]:
    """The products of the leaders' experts with eight rows of x each: their own, or the only eight;
    with two stacks, silu of the product with the first times that with the second."""
    swiglu = len(stacks) == 2
    n_experts = stacks[0].words.shape[0]
    n_rows, n_columns = stacks[0].padded
    row_tiles, steps = n_rows // TILE_ROWS, n_columns // TILE_COLUMNS
    blocks = row_tiles if swiglu else row_tiles // 2
    arrays = []
    for stack in stacks:
        arrays.append(stack.words.reshape(n_experts * row_tiles, steps * TILE_ROWS, -1))
        arrays.append(stack.scales.reshape(n_experts * row_tiles, steps, TILE_ROWS))
    shared = len(x) == COLUMNS

    def body(leader_ref: Any, x_ref: Any, *refs: Any, **scratch: Any) -> None:
        *operands, out_ref = refs
        block, pair = lax.axis_index("block"), lax.axis_index("pair")
        expert = leader_ref[pair]

        def work(*sums: Any) -> None:
            def step(_: Any, x_smem: Any, *tiles: Any) -> None:
                for total, words, scales in zip(sums, tiles[0::2], tiles[1::2]):
                    tile = load_mxfp4(words, scales.at[0], interpret=bool(interpret))
                    decoded = decode(*tile, interpret=bool(interpret))
                    if interpret:  # which doesn't know weights in registers
                        scratch["weights"][...] = decoded
                        decoded = scratch["weights"]
                    plgpu.wgmma(total, decoded, x_smem.transpose((1, 0)))
                plgpu.wgmma_wait(0)

            words_spec = plgpu.BlockSpec(
                (TILE_ROWS, TILE_COLUMNS // 4), lambda k: (k, 0), transforms=words_transforms()
            )
            scales_spec = plgpu.BlockSpec((1, TILE_ROWS), lambda k: (k, 0))
            x_spec = plgpu.BlockSpec(
                (COLUMNS, TILE_COLUMNS), lambda k: (0, k), transforms=bfloat16_transforms()
            )
            first = expert * row_tiles + block * (1 if swiglu else 2)
            tiles = []
            for s in range(2):
                words, scales = operands[2 * s : 2 * s + 2] if swiglu else operands
                at = first if swiglu else first + s
                tiles += [words.at[at], scales.at[at]]
            rows = 0 if shared else pl.multiple_of(pair * COLUMNS, COLUMNS)
            plgpu.emit_pipeline(
                step,
                grid=(steps,),
                in_specs=[x_spec, words_spec, scales_spec, words_spec, scales_spec],
                max_concurrent_steps=stages,
            )(x_ref.at[pl.ds(rows, COLUMNS)], *tiles)
            if swiglu:
                g, u = (total[...] for total in sums)
                results = [g * jax.nn.sigmoid(g) * u]
            else:
                results = [total[...] for total in sums]
            for s, y in enumerate(results):
                y = plgpu.layout_cast(y.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
                scratch["out"].at[s].transpose((1, 0))[...] = y
            plgpu.commit_smem()
            for s in range(len(results)):
                column = (block * len(results) + s) * TILE_ROWS
                plgpu.copy_smem_to_gmem(
                    scratch["out"].at[s],
                    out_ref.at[
                        pl.ds(pl.multiple_of(pair * COLUMNS, COLUMNS), COLUMNS),
                        pl.ds(column, TILE_ROWS),
                    ],
                )
            plgpu.wait_smem_to_gmem(0)

        @pl.when(expert >= 0)
        def _() -> None:
            pl.run_scoped(work, accumulator(COLUMNS), accumulator(COLUMNS))

    scratch_types = {
        "out": plgpu.SMEM((2, COLUMNS, TILE_ROWS), jnp.bfloat16, transforms=bfloat16_transforms())
    }
    if interpret:
        scratch_types["weights"] = plgpu.SMEM((TILE_ROWS, TILE_COLUMNS), jnp.bfloat16)
    call = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((len(leader) * COLUMNS, n_rows), jnp.bfloat16),
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        # The last axis varies fastest: while an expert's rows of x are in the L2 cache.
        grid=(len(leader), blocks),
        grid_names=("pair", "block"),
        kernel_name="moe_gate_up_few" if swiglu else "moe_down_few",
        interpret=interpret or None,
    )
    return call(leader, x, *arrays)
