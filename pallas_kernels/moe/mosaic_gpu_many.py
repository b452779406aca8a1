"""Many tokens on packed MXFP4 experts, on Hopper: weights decoded into matrix instructions.

Tokens are sorted by expert (`dispatch`) and their rows gathered; then come gate and up with SwiGLU,
down, and the weighted sum.  Weights are the left operand, decoded in registers, tokens the columns:
a tile of tokens may then be any multiple of eight wide, so an expert's group is one tile and little
of it is padding.  The kernels of both products are persistent: one warpgroup fills a ring of
buffers and runs ahead over tiles' ends, two multiply.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.moe.dispatch import Groups, group
from pallas_kernels.mosaic_gpu import (
    GROUPS,
    accumulator,
    bfloat16_transforms,
    decode,
    load_mxfp4,
    words_transforms,
)
from pallas_kernels.words import TILE_COLUMNS, TILE_ROWS, MXFP4Words

PRODUCER = 2  # the warpgroup after the two that compute
PRODUCER_REGISTERS, COMPUTE_REGISTERS = 24, 240


@dataclasses.dataclass(frozen=True)
class Config:
    """Choices of one of the two products.

    Attributes:
      widths: tokens a tile may have, rising multiples of 8; each is a body of the kernel.
      stages: buffers of the ring.
      together: widths up to this decode both of a warpgroup's tiles of weights at once; wider ones
        lack the registers.
      chunk: tokens that are written at a time.
      buffers: how many such writes are under way.
      programs: of a persistent kernel; the multiprocessors of an H100 or H200.
    """

    widths: tuple[int, ...]
    stages: int
    together: int = 112
    chunk: int = 128
    buffers: int = 1
    programs: int = 132


def configure(pairs: int, n_experts: int) -> tuple[Config, Config]:
    """Of gate with up, and of down, by the mean size of a group.

    Measured on an H100 at means of 85 and 171 rows (benchmarks/LOG.md).
    """
    mean = pairs / n_experts
    if mean <= 16:
        return _both((8, 16, 32), 6, 6)
    if mean <= 48:
        return _both((16, 32, 48, 64), 5, 4)
    if mean <= 128:
        return _both((16, 32, 64, 72, 80, 88, 96, 104, 112), 4, 3)
    widths = (32, 64, 112, 144, 160, 168, 176, 184, 192)
    return Config(widths, 3, chunk=64), Config(widths, 3, chunk=64)


def _both(widths: tuple[int, ...], up: int, down: int) -> tuple[Config, Config]:
    return Config(widths, up), Config(widths, down, buffers=2)


def moe(
    x: Float[Array, "P D"],
    weights: Float[Array, "P X"],
    chosen: Int[Array, "P X"],
    gate: MXFP4Words,
    up: MXFP4Words,
    down: MXFP4Words,
    *,
    config: tuple[Config, Config] | None = None,
    interpret: Any = False,
) -> Float[Array, "P D"]:
    """`reference.moe`; see `mosaic_gpu.moe`."""
    n_experts = gate.words.shape[0]
    _, dim = gate.padded
    for_up, for_down = config or configure(chosen.size, n_experts)
    x = jnp.pad(x, ((0, 0), (0, dim - x.shape[1]))) if dim > x.shape[1] else x
    groups = group(chosen, n_experts, for_up.widths)
    rows = gather(x, groups, interpret=interpret)
    h = product(rows, [gate, up], groups, config=for_up, interpret=interpret)
    y = product(h, [down], groups, config=for_down, interpret=interpret)
    return combine(y, weights, groups.row, interpret=interpret)[:, : down.rows]


# Within jit, so that the layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def product(
    x: Float[Array, "R C"],
    stacks: list[MXFP4Words],
    groups: Groups,
    *,
    config: Config,
    interpret: Any = False,
) -> Float[Array, "R F"]:
    """Each row's product with its expert's weights; with two stacks, silu of the product with the
    first times that with the second."""
    swiglu = len(stacks) == 2
    n_experts = stacks[0].words.shape[0]
    n_rows, n_columns = stacks[0].padded
    row_tiles, steps = n_rows // TILE_ROWS, n_columns // TILE_COLUMNS
    # A program's step takes two row tiles of each of two streams: one of gate and one of up, or
    # both of down, for each of the two warpgroups.
    per_block = 2 if swiglu else 4
    blocks = row_tiles // per_block
    arrays = []
    for stack in stacks:
        arrays.append(stack.words.reshape(n_experts * row_tiles, steps * TILE_ROWS, -1))
        arrays.append(stack.scales.reshape(n_experts * row_tiles, steps, TILE_ROWS))

    def body(*refs: Any, **scratch: Any) -> None:
        tiles_ref, expert_ref, row_ref, kind_ref, x_ref, *operands, out_ref = refs
        streams = [(operands[i], operands[i + 1]) for i in ((0, 2) if swiglu else (0, 0))]
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        items = tiles_ref[0] * blocks
        mine = lax.div(items - program + config.programs - 1, config.programs)

        def over_items(act: Callable[..., None]) -> None:
            """For each of the program's items, in the branch of its tile's width."""

            @pl.loop(0, mine)
            def _(i: Any) -> None:
                item = program + i * config.programs
                tile, block = lax.div(item, blocks), lax.rem(item, blocks)
                expert, row = expert_ref[tile], pl.multiple_of(row_ref[tile], 8)
                branches = [
                    functools.partial(act, width, i * steps, expert, block, row)
                    for width in config.widths
                ]
                lax.switch(kind_ref[tile], branches)

        @pl.when(warpgroup == PRODUCER)
        def _() -> None:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def fill(width: int, start: Any, expert: Any, block: Any, row: Any) -> None:
                first = expert * row_tiles + block * per_block

                @pl.loop(0, steps)
                def _(k: Any) -> None:
                    slot = lax.rem(start + k, config.stages)
                    full = scratch["full"].at[slot]

                    @pl.when(start + k >= config.stages)
                    def _() -> None:
                        plgpu.barrier_wait(scratch["empty"].at[slot])

                    for s, (words_ref, scales_ref) in enumerate(streams):
                        tiles = pl.ds(first + (0 if swiglu else 2 * s), 2)
                        plgpu.copy_gmem_to_smem(
                            words_ref.at[tiles, pl.ds(k * TILE_ROWS, TILE_ROWS)],
                            scratch[f"words{s}"].at[slot],
                            full,
                        )
                        plgpu.copy_gmem_to_smem(
                            scales_ref.at[tiles, k], scratch[f"scales{s}"].at[slot], full
                        )
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[pl.ds(row, width), pl.ds(k * TILE_COLUMNS, TILE_COLUMNS)],
                        scratch["x"].at[slot, pl.ds(0, width)],
                        full,
                    )

            over_items(fill)

            # No barrier may be left halfway.
            @pl.loop(lax.max(mine * steps - config.stages, 0), mine * steps)
            def _(step: Any) -> None:
                plgpu.barrier_wait(scratch["empty"].at[lax.rem(step, config.stages)])

        @pl.when(warpgroup != PRODUCER)
        def _() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            turn = scratch["turn"]
            pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))

            def compute(width: int, start: Any, expert: Any, block: Any, row: Any) -> None:
                del expert
                sums = _multiply(scratch, width, start, steps, warpgroup, config, interpret)
                if swiglu:
                    g, u = sums
                    results = [((2 * block + warpgroup), g * jax.nn.sigmoid(g) * u)]
                else:
                    results = [(4 * block + 2 * s + warpgroup, y) for s, y in enumerate(sums)]
                _store(results, out_ref, row, scratch["out"].at[warpgroup], config)

            over_items(compute)
            plgpu.wait_smem_to_gmem(0)
            pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn.at[0]))

    widest = config.widths[-1]
    scratch_types: dict[str, Any] = {
        "x": plgpu.SMEM(
            (config.stages, widest, TILE_COLUMNS), jnp.bfloat16, transforms=bfloat16_transforms()
        ),
        "out": plgpu.SMEM(
            (2, config.buffers, min(config.chunk, widest), TILE_ROWS),
            jnp.bfloat16,
            transforms=bfloat16_transforms(),
        ),
        "full": plgpu.Barrier(num_arrivals=5, num_barriers=config.stages),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
        "turn": plgpu.Barrier(num_arrivals=1, num_barriers=2),
    }
    for s in range(2):
        scratch_types[f"words{s}"] = plgpu.SMEM(
            (config.stages, 2, TILE_ROWS, TILE_COLUMNS // 4),
            jnp.uint16,
            transforms=words_transforms(),
        )
        scratch_types[f"scales{s}"] = plgpu.SMEM((config.stages, 2, TILE_ROWS), jnp.uint32)
    if interpret:
        scratch_types["weights"] = plgpu.SMEM((2, TILE_ROWS, TILE_COLUMNS), jnp.bfloat16)
    call = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((len(x), n_rows), jnp.bfloat16),
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(config.programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="moe_gate_up" if swiglu else "moe_down",
        interpret=interpret or None,
    )
    map_ = (groups.tiles, groups.tile_expert, groups.tile_row, groups.tile_kind)
    return call(*map_, x, *arrays)


def _multiply(
    scratch: dict[str, Any],
    width: int,
    start: Any,
    steps: int,
    warpgroup: Any,
    config: Config,
    interpret: Any,
) -> list[Any]:
    """A warpgroup's two products of 64 rows of weights and a tile of tokens, in float32."""
    # Weights of both products at once where registers allow it; else a tile's halves in turn.
    together = width <= config.together
    halves = 1 if together else 2

    def scope(*sums: Any) -> list[Any]:
        def multiply(slot: Any, decoded: list[tuple[int, int, Any]]) -> None:
            """In turn with the other warpgroup, which decodes in the meantime."""
            plgpu.barrier_wait(scratch["turn"].at[warpgroup])
            for s, half, weights in decoded:
                columns = pl.ds(half * TILE_COLUMNS // halves, TILE_COLUMNS // halves)
                tokens = scratch["x"].at[slot, pl.ds(0, width), columns].transpose((1, 0))
                if interpret:  # which doesn't know weights in registers
                    buffer = scratch["weights"].at[warpgroup, :, columns]
                    buffer[...] = weights
                    weights = buffer
                plgpu.wgmma(sums[s], weights, tokens)
            plgpu.barrier_arrive(scratch["turn"].at[1 - warpgroup])
            plgpu.wgmma_wait(0)

        @pl.loop(0, steps)
        def _(k: Any) -> None:
            slot = lax.rem(start + k, config.stages)
            plgpu.barrier_wait(scratch["full"].at[slot])
            pending: list[tuple[int, int, Any]] = []
            for s in range(2):
                refs = [scratch[f"{a}{s}"].at[slot, warpgroup] for a in ("words", "scales")]
                tile = load_mxfp4(*refs, interpret=bool(interpret))
                for half in range(halves):
                    codes = range(half * GROUPS // halves, (half + 1) * GROUPS // halves)
                    pending.append((s, half, decode(*tile, codes, interpret=bool(interpret))))
                    if not together or s == 1:
                        multiply(slot, pending)
                        pending = []
            plgpu.barrier_arrive(scratch["empty"].at[slot])

        return [total[...] for total in sums]

    return pl.run_scoped(scope, accumulator(width), accumulator(width))


def _store(
    results: list[tuple[Any, Any]], out_ref: Any, row: Any, buffers: Any, config: Config
) -> None:
    """Writes products [64, width] of tiles of rows as rows of tokens, through shared memory."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    width = results[0][1].shape[1]
    pieces = [(*r, at) for r in results for at in range(0, width, config.chunk)]
    for i, (row_tile, y, at) in enumerate(pieces):
        size = min(config.chunk, width - at)
        part = plgpu.layout_cast(
            y[:, at : at + size].astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED
        )
        if i >= config.buffers:
            plgpu.wait_smem_to_gmem(config.buffers - 1, wait_read_only=True)
        buffer = buffers.at[i % config.buffers, pl.ds(0, size)]
        buffer.transpose((1, 0))[...] = part
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            buffer,
            out_ref.at[pl.ds(row + at, size), pl.ds(row_tile * TILE_ROWS, TILE_ROWS)],
        )


ROWS_AT_ONCE = 8


def _strip(dim: int) -> tuple[int, Any]:
    """Columns of a row that a warpgroup loads at once, 16 bytes a thread, and their layout."""
    columns = math.gcd(dim, 1024)
    return columns, plgpu.Layout.WG_STRIDED((columns,), vec_size=columns // 128)


@functools.partial(jax.jit, static_argnames=("interpret",))
def gather(x: Float[Array, "P D"], groups: Groups, *, interpret: Any = False) -> Array:
    """Each row's token; rows that aren't in use are left as they are.

    All rows of some columns, then the next columns: of so few columns all tokens fit the L2 cache,
    from where they are read as often as there are experts a token.
    """
    n_rows, dim = len(groups.token), x.shape[1]
    columns, layout = _strip(dim)

    def body(rows_ref: Any, token_ref: Any, x_ref: Any, out_ref: Any) -> None:
        first = lax.axis_index("rows") * ROWS_AT_ONCE
        at = pl.ds(lax.axis_index("columns") * columns, columns)

        @pl.when(first < rows_ref[0])
        def _() -> None:
            tokens = [token_ref[first + i] for i in range(ROWS_AT_ONCE)]
            values = [plgpu.load(x_ref.at[token, at], layout=layout) for token in tokens]
            for i, value in enumerate(values):
                out_ref.at[first + i, at][...] = value

    call = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((n_rows, dim), x.dtype),
        # The last axis varies fastest.
        grid=(dim // columns, n_rows // ROWS_AT_ONCE),
        grid_names=("columns", "rows"),
        kernel_name="moe_gather",
        interpret=interpret or None,
    )
    return call(groups.rows, groups.token, x)


@functools.partial(jax.jit, static_argnames=("interpret",))
def combine(
    y: Float[Array, "R D"],
    weights: Float[Array, "P X"],
    row: Int[Array, "P X"],
    *,
    interpret: Any = False,
) -> Float[Array, "P D"]:
    """The weighted sum of each token's rows of y (-1 for none), in float32, in the slots' order."""
    tokens, top_k = weights.shape
    dim = y.shape[1]
    columns, layout = _strip(dim)

    def body(row_ref: Any, weights_ref: Any, y_ref: Any, out_ref: Any) -> None:
        token = lax.axis_index("token")
        at = pl.ds(lax.axis_index("columns") * columns, columns)
        slots = [token * top_k + slot for slot in range(top_k)]
        rows = [row_ref[slot] for slot in slots]
        # All loads before the first use, so also of rows that aren't there.
        values = [plgpu.load(y_ref.at[lax.max(row, 0), at], layout=layout) for row in rows]
        total = plgpu.layout_cast(jnp.zeros((columns,), jnp.float32), layout)
        nothing = total
        for slot, row, value in zip(slots, rows, values):
            term = weights_ref[slot] * value.astype(jnp.float32)
            total += lax.select(jnp.broadcast_to(row >= 0, term.shape), term, nothing)
        out_ref.at[token, at][...] = total

    call = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tokens, dim), jnp.float32),
        grid=(dim // columns, tokens),
        grid_names=("columns", "token"),
        kernel_name="moe_combine",
        interpret=interpret or None,
    )
    return call(row.reshape(-1), weights.astype(jnp.float32).reshape(-1), y)
