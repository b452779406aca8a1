"""Products of bfloat16 activations with packed FP8 and MXFP4 weights, in Triton.

For few tokens one kernel decodes tiles of weights in registers and multiplies them as the rows of a
matrix instruction whose columns are tokens: weights are read once, and nothing else is of any size.
For many tokens the weights are decoded to memory, which costs little then, and the product is
XLA's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int, UInt16

from pallas_kernels.packed import refused
from pallas_kernels.triton import GROUPS, decode, mxfp4_products
from pallas_kernels.words import TILE_COLUMNS, TILE_ROWS, FP8Words, MXFP4Words, Words, decode_fp8

HALF = TILE_COLUMNS // 2  # columns that a word's low bytes have, and its high bytes
# Above this many tokens weights are decoded to memory (measured on an H100, benchmarks/LOG.md).
FUSED_TOKENS = 384
# About 1.5 for each multiprocessor of an H100: fewer don't keep its memory busy.
PROGRAMS = 200
MANY_PROGRAMS = 400  # from here on deeper pipelines don't help


@dataclasses.dataclass(frozen=True)
class Config:
    """How the fused product is cut.

    Attributes:
      tokens: tokens a program, a power of two of at least 8.
      rows: rows of the weights a program: a power of two that divides 64, or tiles of 64.
      splits: programs that share a product's columns; their sums are added by another kernel.
      unroll: column tiles a step of the loop.
      stages, warps: for Triton.
    """

    tokens: int = 8
    rows: int = 64
    splits: int = 1
    unroll: int = 1
    stages: int = 4
    warps: int = 4


def configure(tokens: int, w: Words) -> Config:
    """What was fastest on an H100 (benchmarks/LOG.md)."""
    row_tiles, steps = tile_counts(w)
    width = min(128, max(8, pl.next_power_of_2(tokens)))
    programs = row_tiles * pl.cdiv(tokens, width)
    if programs < PROGRAMS:
        # As few splits as give every multiprocessor work, each of several steps.
        divisors = [n for n in range(1, max(1, steps // 4) + 1) if steps % n == 0]
        splits = next((n for n in divisors if n * programs >= PROGRAMS), divisors[-1])
        return Config(width, splits=splits, stages=4 if width <= 16 else 3)
    if isinstance(w, MXFP4Words):
        return Config(width)
    stages = 4 if width <= 8 and programs < MANY_PROGRAMS else 3
    return Config(width, rows=128 if width == 64 else 64, stages=stages)


def unsupported(x: Any, w: Any) -> str | None:
    """Why these kernels can't do a case; None if they can."""
    if reason := refused(x, w, FP8Words, MXFP4Words):
        return reason
    if w.ndim not in (2, 3):
        return f"weights have {w.ndim} dimensions and not 2 or 3"
    return None


def quantized_matmul(
    x: Float[Array, "T D"],
    w: Words,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "T ..."]:
    """`reference.quantized_matmul`; FP8 weights aren't rounded to bfloat16 where they are fused.

    Args:
      x: activations, bfloat16.
      w: packed weights [F, D] or [C, R, D].
      config: of the fused product, which is then used for any number of tokens.
      interpret: run on any device, slowly.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(x, w):
        raise NotImplementedError(reason)
    if config is None and len(x) <= FUSED_TOKENS:
        config = configure(len(x), w)
    x = jnp.pad(x, ((0, 0), (0, w.padded[1] - x.shape[1])))
    if config is None:
        dense = dequantize(w, interpret=interpret)
        # Summed in float32, and stored once: with a float32 result it would take 15% longer.
        y = jnp.einsum("td,fd->tf", x, dense, preferred_element_type=x.dtype)
    else:
        y = _fused(x, w, config, interpret)
    y = y.reshape(len(x), *w.shape[:-2], w.padded[0])
    return y[..., : w.shape[-2]]


def _fused(x: Float[Array, "T C"], w: Words, config: Config, interpret: bool) -> Array:
    """The product with all tiles of rows, [T, tiles * 64]."""
    row_tiles, steps = tile_counts(w)
    n_rows = row_tiles * TILE_ROWS
    splits = math.gcd(config.splits, steps)
    steps //= splits
    kernel = functools.partial(
        _fused_kernel,
        per_stack=w.words.shape[-4],
        row_tiles=row_tiles,
        steps=steps,
        config=dataclasses.replace(config, unroll=math.gcd(config.unroll, steps)),
        products=_fp8_products if isinstance(w, FP8Words) else _mxfp4_products,
        interpret=interpret,
    )
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    y = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(
            (splits, len(x), n_rows), jnp.float32 if splits > 1 else x.dtype
        ),
        grid=(pl.cdiv(len(x), config.tokens), pl.cdiv(n_rows, config.rows), splits),
        in_specs=[anywhere] * 3,
        out_specs=anywhere,
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="quantized_matmul",
    )(x, *_stacked(w))
    return y.sum(axis=0).astype(x.dtype) if splits > 1 else y[0]


def tile_counts(w: Words) -> tuple[int, int]:
    """Tiles of rows, those of a stack's matrices one after the other, and of columns."""
    return math.prod(w.words.shape[:-3]), w.words.shape[-3]


def _stacked(w: Words) -> tuple[Array, Array]:
    """Words [row tiles, column tiles, 64, .], and scales [matrices, ...]."""
    return (
        w.words.reshape(-1, *w.words.shape[-3:]),
        w.scales.reshape(-1, *w.scales.shape[w.words.ndim - 4 :]),
    )


def _fused_kernel(
    x_ref: Any,
    words_ref: Any,
    scales_ref: Any,
    out_ref: Any,
    *,
    per_stack: int,
    row_tiles: int,
    steps: int,
    config: Config,
    products: Callable[..., list[Array]],
    interpret: bool,
) -> None:
    n_tokens = x_ref.shape[0]
    split = pl.program_id(2)
    first_step = split * steps
    first_row = pl.program_id(1) * config.rows
    token = pl.program_id(0) * config.tokens + jnp.arange(config.tokens)
    # Tokens that aren't there repeat the last one, and aren't stored.
    source = jnp.minimum(token, n_tokens - 1)

    def columns_of_x(columns: Int[Array, " K"]) -> Float[Array, "K N"]:
        columns = columns + first_step * TILE_COLUMNS
        return plt.load(x_ref.at[source[None, :], columns[:, None]])

    starts = [first_row + r for r in range(0, config.rows, TILE_ROWS)]
    tiles = [jnp.minimum(row // TILE_ROWS, row_tiles - 1) for row in starts]
    sums = products(
        words_ref,
        scales_ref,
        [
            (tile, tile // per_stack, tile % per_stack, row % TILE_ROWS)
            for tile, row in zip(tiles, starts)
        ],
        columns_of_x,
        first_step=first_step,
        rows=min(config.rows, TILE_ROWS),
        tokens=config.tokens,
        steps=steps,
        unroll=config.unroll,
        interpret=interpret,
    )
    for row, y in zip(starts, sums):
        at = row + jnp.arange(y.shape[0])
        there = (token < n_tokens)[None, :] & (at < row_tiles * TILE_ROWS)[:, None]
        into = out_ref.at[split, token[None, :], at[:, None]]
        plt.store(into, y.astype(out_ref.dtype), mask=there)


def _mxfp4_products(
    words_ref: Any,
    scales_ref: Any,
    tiles: list[tuple[Any, Any, Any, Any]],
    columns_of_x: Callable[[Any], Any],
    *,
    first_step: Any,
    rows: int,
    **options: Any,
) -> list[Array]:
    def tile(index: Any, matrix: Any, row_tile: Any, row: Any, at: Any) -> tuple[Any, Any]:
        step, within = first_step + at, pl.ds(row, rows)
        return (
            plt.load(words_ref.at[index, step, within, :]),
            plt.load(scales_ref.at[matrix, row_tile, step, within]),
        )

    loaders = [functools.partial(tile, *t) for t in tiles]
    return mxfp4_products(loaders, columns_of_x, rows=rows, **options)


def _fp8_products(
    words_ref: Any,
    scales_ref: Any,
    tiles: list[tuple[Any, Any, Any, Any]],
    columns_of_x: Callable[[Any], Any],
    *,
    first_step: Any,
    rows: int,
    tokens: int,
    steps: int,
    unroll: int,
    interpret: bool,
) -> list[Array]:
    """Products of tiles of rows with the same tokens; a block's scale multiplies its sum."""

    def scales(at: Any) -> list[Array]:
        # One step ahead, because Triton doesn't fetch single numbers early by itself.
        at = first_step + jnp.minimum(at, steps - 1)
        return [plt.load(scales_ref.at[m, r * TILE_ROWS // 128, at]) for _, m, r, _ in tiles]

    def body(i: Any, carry: tuple[list[Array], list[Array]]) -> tuple[list[Array], list[Array]]:
        sums, scale = carry
        for at in [i * unroll + u for u in range(unroll)]:
            following = scales(at + 1)
            words = [
                plt.load(words_ref.at[index, first_step + at, pl.ds(row, rows), :])
                for index, _, _, row in tiles
            ]
            parts = [jnp.zeros((rows, tokens), jnp.float32) for _ in tiles]
            for j in range(2):
                x = columns_of_x(at * TILE_COLUMNS + HALF * j + jnp.arange(HALF))
                parts = [
                    part + plt.dot(decode_halves(w, j, interpret=interpret), x)
                    for part, w in zip(parts, words)
                ]
            sums = [total + part * s for total, part, s in zip(sums, parts, scale)]
            scale = following
        return sums, scale

    zeros = [jnp.zeros((rows, tokens), jnp.float32) for _ in tiles]
    return jax.lax.fori_loop(0, steps // unroll, body, (zeros, scales(0)))[0]


def decode_halves(words: UInt16[Array, "M 64"], j: int, *, interpret: bool) -> Float[Array, "M 64"]:
    """bfloat16 of the codes of the columns 64 j .. 64 j + 63 of a tile of `FP8Words`.

    The bits are placed where bfloat16 has them, which gives 2^-120 times the value.
    """
    if interpret:
        return decode_fp8(words, j)
    place = (
        "shl.b32 s, $1, 8; shl.b32 t, $1, 4;",
        "mov.b32 s, $1; shr.b32 t, $1, 4;",
    )[j]
    asm = (
        "{ .reg .b32 s, t; " + place + " and.b32 s, s, 0x80008000; and.b32 t, t, 0x07F007F0;"
        " or.b32 t, t, s; mov.b32 s, 0x80008000; fma.rn.bf16x2 $0, t, $2, s; }"
    )
    # 2^120, in each half.  Ampere has no mul of this type, hence the addend -0.
    factor = jnp.full(words.shape, 0x7B80, jnp.uint16)
    [values] = plt.elementwise_inline_asm(
        asm,
        args=[words, factor],
        constraints="=r,r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)],
    )
    return values


def dequantize(w: Words, *, interpret: bool = False) -> Float[Array, "rows C"]:
    """Dense bfloat16 weights of all tiles, a stack's matrices one after the other.

    They are those of `pallas_kernels.dequantize`.
    """
    row_tiles, column_tiles = tile_counts(w)
    kernel = functools.partial(
        _dequantize_fp8_kernel if isinstance(w, FP8Words) else _dequantize_mxfp4_kernel,
        per_stack=w.words.shape[-4],
        interpret=interpret,
    )
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    shape = (row_tiles * TILE_ROWS, column_tiles * TILE_COLUMNS)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        grid=(column_tiles, row_tiles),
        in_specs=[anywhere] * 2,
        out_specs=anywhere,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="dequantize",
    )(*_stacked(w))


def _dequantize_fp8_kernel(
    words_ref: Any, scales_ref: Any, out_ref: Any, *, per_stack: int, interpret: bool
) -> None:
    at, tile = pl.program_id(0), pl.program_id(1)
    scale_row = tile % per_stack * TILE_ROWS // 128
    scale = plt.load(scales_ref.at[tile // per_stack, scale_row, at])
    words = plt.load(words_ref.at[tile, at, :, :])
    for j in range(2):
        values = decode_halves(words, j, interpret=interpret).astype(jnp.float32) * scale
        columns = pl.ds(at * TILE_COLUMNS + HALF * j, HALF)
        plt.store(
            out_ref.at[pl.ds(tile * TILE_ROWS, TILE_ROWS), columns], values.astype(jnp.bfloat16)
        )


def _dequantize_mxfp4_kernel(
    words_ref: Any, scales_ref: Any, out_ref: Any, *, per_stack: int, interpret: bool
) -> None:
    at, tile = pl.program_id(0), pl.program_id(1)
    scales = plt.load(scales_ref.at[tile // per_stack, tile % per_stack, at, :])
    words = plt.load(words_ref.at[tile, at, :, :])
    for j in range(GROUPS):
        columns = pl.ds(at * TILE_COLUMNS + 32 * j, 32)
        values = decode(words, scales, j, interpret=interpret)
        plt.store(out_ref.at[pl.ds(tile * TILE_ROWS, TILE_ROWS), columns], values)
