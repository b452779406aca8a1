"""A mixture of experts on TPUs: SwiGLU experts whose weights are decoded where they are used.

Few tokens: all of them go through each expert that any of them chose, and what an expert computes
of the others is weighted with zero.  The matrix unit has time for that, and so each expert is read
once, nothing is sorted or gathered, and the weighted sum is formed in place.

Many tokens: (token, expert) pairs are sorted by expert and cut into tiles (`moe.dispatch`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import mosaic_tpu
from pallas_kernels.columns import CHUNK, Columns, FP8Columns, MXFP4Columns
from pallas_kernels.filling import filled
from pallas_kernels.moe.combine import weighted_sum
from pallas_kernels.moe.dispatch import group
from pallas_kernels.packed import refused

# Up to this many tokens all go through all chosen experts.
FEW_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks of the two products.

    Attributes:
      rows: of activations, which have one expert; 0 for all tokens (a case of few tokens).
      up_columns, up_chunks: of gate and up: columns of the product, and chunks of 256 summed ones.
      down_columns, down_chunks: of down.
    """

    rows: int
    up_columns: int
    up_chunks: int
    down_columns: int
    down_chunks: int


def choose_blocks(tokens: int, top_k: int, gate: Columns, down: Columns) -> Blocks:
    """Blocks that fit in VMEM twice, so that one is loaded while another is used."""
    vmem = mosaic_tpu.vmem_bytes()
    few = tokens <= FEW_TOKENS
    up_columns = mosaic_tpu.block_columns(gate.words.shape[-1], 512)
    down_columns = mosaic_tpu.block_columns(down.words.shape[-1], 2048 if few else 1024)
    rows = 0
    if not few:
        # Weights are decoded once for each tile, and that takes longer than a few padded rows.
        mean = max(1, tokens * top_k // gate.words.shape[0])
        rows = min(512, max(64, 1 << (mean - 1).bit_length()))
    return Blocks(
        rows,
        up_columns,
        mosaic_tpu.block_chunks(gate, up_columns, vmem // 32),
        down_columns,
        mosaic_tpu.block_chunks(down, down_columns, vmem // 16),
    )


def unsupported(x: Any, chosen: Any, gate: Any) -> str | None:
    """Why these kernels can't do a case; None if they can."""
    if reason := refused(x, gate, FP8Columns, MXFP4Columns):
        return reason
    if gate.padded[0] % CHUNK:
        return f"experts are {gate.rows} wide, and FP8 experts must be multiples of {CHUNK}"
    return None


def moe(
    x: Float[Array, "P D"],
    weights: Float[Array, "P X"],
    chosen: Int[Array, "P X"],
    gate: Any,
    up: Any,
    down: Any,
    *,
    interpret: Any = False,
    blocks: Blocks | None = None,
) -> Float[Array, "P D"]:
    """Sum of each token's experts, as `reference.moe`.

    Args:
      x: tokens, bfloat16.
      weights, chosen: mixing weights and experts; experts outside of 0..E-1 add nothing.
      gate, up: `Columns` [E, F, D].
      down: `Columns` [E, D, F].
      interpret: False, True, or `pltpu.InterpretParams`.
      blocks: None for those of `choose_blocks`.

    Returns:
      float32.

    Raises:
      NotImplementedError: `unsupported` says why.
    """
    reason = unsupported(x, chosen, gate)
    if reason is not None:
        raise NotImplementedError(reason)
    tokens, dim = x.shape
    blocks = blocks or choose_blocks(tokens, chosen.shape[1], gate, down)
    x = filled(x, tokens, gate.padded[1])
    compute = _many if blocks.rows else _few
    y = compute(x, weights.astype(jnp.float32), chosen, gate, up, down, blocks, interpret)
    return y[:, :dim]


def _few(
    x: Array,
    weights: Array,
    chosen: Array,
    gate: Any,
    up: Any,
    down: Any,
    b: Blocks,
    interpret: Any,
) -> Array:
    tokens = x.shape[0]
    n_experts = gate.words.shape[0]
    n_active = min(n_experts, chosen.size)
    rows = mosaic_tpu.padded_rows(tokens)
    picked = chosen[..., None] == jnp.arange(n_experts)  # [P, X, E]
    experts = jnp.flatnonzero(picked.any((0, 1)), size=n_active, fill_value=0).astype(jnp.int32)
    count = picked.any((0, 1)).sum(dtype=jnp.int32)[None]
    mixing = jnp.where(picked, weights[..., None], 0).sum(1)[:, experts].T  # [active, P]
    routed = picked.any(1)[:, experts].T
    x = filled(x, rows, x.shape[1])
    h = _gate_up(experts, count, x[None], gate, up, b, interpret)
    return _mixed_down(experts, count, h, *_as_rows(mixing, routed, rows), down, b, interpret)[
        :tokens
    ]


def _as_rows(
    mixing: Float[Array, "A P"], routed: Bool[Array, "A P"], rows: int
) -> tuple[Float[Array, "A R 1"], Float[Array, "A R 1"]]:
    """Mixing weights, and 1 for tokens that chose the expert, for rows of padded tokens."""
    more = ((0, 0), (0, rows - mixing.shape[1]))
    padded = (jnp.pad(a.astype(jnp.float32), more)[..., None] for a in (mixing, routed))
    return tuple(padded)  # pyright: ignore[reportReturnType]


def _many(
    x: Array,
    weights: Array,
    chosen: Array,
    gate: Any,
    up: Any,
    down: Any,
    b: Blocks,
    interpret: Any,
) -> Array:
    groups = group(chosen, gate.words.shape[0], (b.rows,))
    tiles = -(-groups.token.shape[0] // b.rows)
    token = jnp.pad(groups.token, (0, tiles * b.rows - groups.token.shape[0]))
    expert = groups.tile_expert[:tiles]
    rows = x[token].reshape(tiles, b.rows, -1)
    h = _gate_up(expert, groups.tiles, rows, gate, up, b, interpret)
    y = _down(expert, groups.tiles, h, down, b, interpret)
    y = y.reshape(tiles * b.rows, -1)[jnp.maximum(groups.row, 0)]
    return weighted_sum(y, weights, chosen, gate)


def _used(t: Any, k: Any, count: Any, steps: int) -> tuple[Any, Any]:
    """Tile and step to have in memory: past the last tile in use, what is there already."""
    return jnp.minimum(t, jnp.maximum(count[0] - 1, 0)), jnp.where(t < count[0], k, steps - 1)


def _weights(sublanes: int, columns: int, chunks: int, steps: int) -> pl.BlockSpec:
    """Blocks of the weights of a tile's expert, on a grid of columns, tiles and steps."""

    def block(j: Any, t: Any, k: Any, experts: Any, count: Any) -> tuple[Any, ...]:
        t, k = _used(t, k, count, steps)
        return experts[t], k, 0, j

    return pl.BlockSpec((None, chunks, sublanes, columns), block)


def _tile(rows: int, columns: int, steps: int, *, summed: bool, tiles: int) -> pl.BlockSpec:
    """Blocks [rows, columns] of a tile: of a summed dimension, or of the product's columns.

    Where there is one tile of activations, every expert has it.
    """

    def block(j: Any, t: Any, k: Any, experts: Any, count: Any) -> tuple[Any, ...]:
        t, k = _used(t, k, count, steps)
        return (t if tiles > 1 else 0), 0, (k if summed else j)

    return pl.BlockSpec((None, rows, columns), block)


def _gate_up(
    experts: Array, count: Array, x: Array, gate: Any, up: Any, b: Blocks, interpret: Any
) -> Array:
    """silu(x gate^T) * (x up^T), bfloat16 [N, R, F] of the first `count` of N tiles.

    Args:
      experts: of each of the N tiles.
      count: tiles that are in use: int32[1].
      x: activations [N, R, D], or [1, R, D] for the same of all tiles.
      gate, up: weights [E, F, D].
      b: sizes of blocks.
      interpret: see `moe`.
    """
    tiles, rows = experts.shape[0], x.shape[1]
    _, chunks, sublanes, width = gate.words.shape
    columns, steps = b.up_columns, chunks // b.up_chunks

    def kernel(
        _: Any, count: Any, x: Any, gw: Any, gs: Any, uw: Any, us: Any, h: Any, g: Any, u: Any
    ) -> None:
        step = pl.program_id(2)

        @pl.when(pl.program_id(1) < count[0])
        def _() -> None:
            @pl.when(step == 0)
            def _() -> None:
                g[...] = jnp.zeros_like(g)
                u[...] = jnp.zeros_like(u)

            mosaic_tpu.accumulate(x, [(gate, gw, gs, g), (up, uw, us, u)])

            @pl.when(step == steps - 1)
            def _() -> None:
                h[...] = (jax.nn.silu(g[...]) * u[...]).astype(h.dtype)

    words = _weights(sublanes, columns, b.up_chunks, steps)
    scales = _weights(2, columns, b.up_chunks, steps)
    x_tiles = _tile(rows, b.up_chunks * CHUNK, steps, summed=True, tiles=x.shape[0])
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(width, columns), tiles, steps),
            in_specs=[x_tiles, words, scales, words, scales],
            out_specs=_tile(rows, columns, steps, summed=False, tiles=tiles),
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)] * 2,
        ),
        out_shape=jax.ShapeDtypeStruct((tiles, rows, width), x.dtype),
        compiler_params=mosaic_tpu.compiler_params("parallel", "arbitrary", "arbitrary"),
        interpret=interpret,
        name="moe_gate_up",
    )(experts, count, x, gate.words, gate.scales, up.words, up.scales)


def _down(experts: Array, count: Array, h: Array, down: Any, b: Blocks, interpret: Any) -> Array:
    """h down^T, bfloat16 [N, R, D] of the first `count` of N tiles; see `_gate_up`."""
    tiles, rows, _ = h.shape
    _, chunks, sublanes, width = down.words.shape
    columns, steps = b.down_columns, chunks // b.down_chunks

    def kernel(_: Any, count: Any, h: Any, words: Any, scales: Any, y: Any, total: Any) -> None:
        step = pl.program_id(2)

        @pl.when(pl.program_id(1) < count[0])
        def _() -> None:
            @pl.when(step == 0)
            def _() -> None:
                total[...] = jnp.zeros_like(total)

            mosaic_tpu.accumulate(h, [(down, words, scales, total)])

            @pl.when(step == steps - 1)
            def _() -> None:
                y[...] = total[...].astype(y.dtype)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(width, columns), tiles, steps),
            in_specs=[
                _tile(rows, b.down_chunks * CHUNK, steps, summed=True, tiles=tiles),
                _weights(sublanes, columns, b.down_chunks, steps),
                _weights(2, columns, b.down_chunks, steps),
            ],
            out_specs=_tile(rows, columns, steps, summed=False, tiles=tiles),
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((tiles, rows, width), h.dtype),
        compiler_params=mosaic_tpu.compiler_params("parallel", "arbitrary", "arbitrary"),
        interpret=interpret,
        name="moe_down",
    )(experts, count, h, down.words, down.scales)


def _mixed_down(
    experts: Array,
    count: Array,
    h: Array,
    mixing: Array,
    routed: Array,
    down: Any,
    b: Blocks,
    interpret: Any,
) -> Array:
    """Sum over experts of mixing * (h down^T): float32 [R, D].

    Args:
      experts, count, down, b, interpret: see `_gate_up`.
      h: of all tokens, for each expert: [N, R, F].
      mixing, routed: float32 [N, R, 1], the second 0 where what the expert computed is not looked
        at, however large.
    """
    tiles, rows, _ = h.shape
    _, chunks, sublanes, width = down.words.shape
    columns, steps = b.down_columns, chunks // b.down_chunks

    def kernel(
        _: Any, count: Any, h: Any, words: Any, scales: Any, mix: Any, on: Any, y: Any, total: Any
    ) -> None:
        tile, step = pl.program_id(1), pl.program_id(2)

        @pl.when((tile == 0) & (step == 0))
        def _() -> None:
            y[...] = jnp.zeros_like(y)

        @pl.when(tile < count[0])
        def _() -> None:
            @pl.when(step == 0)
            def _() -> None:
                total[...] = jnp.zeros_like(total)

            mosaic_tpu.accumulate(h, [(down, words, scales, total)])

            @pl.when(step == steps - 1)
            def _() -> None:
                y[...] += jnp.where(on[...] > 0, mix[...] * total[...], 0)

    of_rows = pl.BlockSpec(
        (None, rows, 1), lambda j, t, k, experts, count: (_used(t, k, count, steps)[0], 0, 0)
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(width, columns), tiles, steps),
            in_specs=[
                _tile(rows, b.down_chunks * CHUNK, steps, summed=True, tiles=tiles),
                _weights(sublanes, columns, b.down_chunks, steps),
                _weights(2, columns, b.down_chunks, steps),
                of_rows,
                of_rows,
            ],
            out_specs=pl.BlockSpec((rows, columns), lambda j, t, k, experts, count: (0, j)),
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, width), jnp.float32),
        compiler_params=mosaic_tpu.compiler_params("parallel", "arbitrary", "arbitrary"),
        interpret=interpret,
        name="moe_mixed_down",
    )(experts, count, h, down.words, down.scales, mixing, routed)
