"""The product of one row with packed FP8 weights that have few rows, in Triton.

The narrowest matrix instruction has eight columns, and one row would use one of them.  Here, as in
`moe.triton_one`, each column has another part of the sum: x's values in one of several ranges of
its columns.  A tile's rows are as many groups as there are parts, of the same rows of the weights:
a group reads its range, wants its own column of the product, and the groups are added up in the
program.  So columns are shared out without a second kernel for the sum of the shares.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.formats import FP8_BLOCK
from pallas_kernels.quantized_matmul import triton
from pallas_kernels.quantized_matmul.triton import HALF, decode_halves
from pallas_kernels.triton import ANYWHERE, COLUMNS, groups, own_column
from pallas_kernels.words import TILE_COLUMNS, TILE_ROWS, FP8Words, Words

# Two for each of an H100's 132 multiprocessors keep its memory busy.
PROGRAMS = 2 * 132
STEPS = 4  # of a program, at least: fewer are over before its pipeline is full


@dataclasses.dataclass(frozen=True)
class Config:
    """How the product is cut.

    Attributes:
      parts: ranges of x's columns: a power of two up to COLUMNS.
      height: rows of a tile, of all groups together: a power of two up to 64, and at least 16.
      stages, warps: for Triton.
    """

    parts: int
    height: int = 64
    stages: int = 3
    warps: int = 4


def configure(w: Words) -> Config:
    """As few parts as give every multiprocessor work, each of several steps."""
    row_tiles, steps = triton.tile_counts(w)
    parts = 1
    while parts < COLUMNS and row_tiles * parts < PROGRAMS and steps >= 2 * parts * STEPS:
        parts *= 2
    return Config(parts)


def unsupported(x: Any, w: Any) -> str | None:
    """Why this kernel can't do a case, or why the other one does it better."""
    if reason := triton.unsupported(x, w):
        return reason
    if not isinstance(w, FP8Words):
        return "MXFP4 weights of few rows are read faster in shares"
    if len(x) > 1:
        return f"{len(x)} rows are more than one"
    row_tiles, _ = triton.tile_counts(w)
    if row_tiles >= triton.PROGRAMS:
        return f"{row_tiles * TILE_ROWS} rows of weights keep a device busy by themselves"
    return None


def quantized_matmul(
    x: Float[Array, "T D"],
    w: Words,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "T ..."]:
    """`reference.quantized_matmul`; FP8 weights aren't rounded to bfloat16.

    Args:
      x: activations, bfloat16.
      w: packed FP8 weights [F, D] or [C, R, D].
      config: how the product is cut.
      interpret: run on any device, slowly.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(x, w):
        raise NotImplementedError(reason)
    config = config or configure(w)
    per_matrix, dim = w.padded
    row_tiles, steps = triton.tile_counts(w)
    parts = math.gcd(config.parts, steps)
    steps //= parts
    rows = config.height // parts
    tiles_of_matrix = per_matrix // rows

    def kernel(x_ref: Any, words_ref: Any, scales_ref: Any, out_ref: Any) -> None:
        program = pl.program_id(0)
        matrix, tile = program // tiles_of_matrix, program % tiles_of_matrix
        part, row = groups(tile, config.height, rows)
        which, within = tile * rows // TILE_ROWS, (row % TILE_ROWS)[:, None]
        word, block = jnp.arange(HALF)[None, :], tile * rows // FP8_BLOCK
        column_part = jnp.arange(COLUMNS) % parts
        first = column_part * (steps * TILE_COLUMNS)

        def scales(at: Any) -> Array:
            # Of each column's part, since a row wants its own part's column.
            at = column_part * steps + jnp.minimum(at, steps - 1)
            return plt.load(scales_ref.at[matrix, block, at])

        def body(at: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            total, scale = carry
            # One step ahead, because Triton doesn't fetch a few numbers early by itself.
            following = scales(at + 1)
            step, y = (part * steps + at)[:, None], jnp.zeros_like(total)
            codes = plt.load(words_ref.at[matrix, which, step, within, word])
            for j in range(2):
                column = at * TILE_COLUMNS + HALF * j + jnp.arange(HALF)
                x = plt.load(x_ref.at[first[None, :] + column[:, None]])
                y += plt.dot(decode_halves(codes, j, interpret=interpret), x)
            return total + y * scale[None, :], following

        zeros = jnp.zeros((config.height, COLUMNS), jnp.float32)
        y = jax.lax.fori_loop(0, steps, body, (zeros, scales(0)))[0]
        y = own_column(y, part).reshape(parts, rows).sum(axis=0)
        plt.store(out_ref.at[program * rows + jnp.arange(rows)], y.astype(out_ref.dtype))

    y = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((row_tiles * TILE_ROWS,), x.dtype),
        grid=(row_tiles * TILE_ROWS // rows,),
        in_specs=[ANYWHERE] * 3,
        out_specs=ANYWHERE,
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="quantized_matmul_one",
    )(
        jnp.pad(x[0], (0, dim - x.shape[1])),
        w.words.reshape(-1, *w.words.shape[-4:]),
        w.scales.reshape(-1, *w.scales.shape[w.words.ndim - 4 :]),
    )
    return y.reshape(1, *w.shape[:-2], per_matrix)[..., : w.shape[-2]]
