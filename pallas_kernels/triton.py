"""What the Triton kernels share: decoding of words, and products with them.

Triton sees no register, but where a tile of 16-bit words is decoded element by element its layout
stays that of the bfloat16 tile a matrix instruction takes, so decoding costs a few integer
instructions for each two weights and no exchange between threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int, UInt16, UInt32

from pallas_kernels.words import GROUPS, PTX_PLACE, TILE_COLUMNS, TILE_ROWS, decode_mxfp4

# Where a kernel itself says what it loads.
ANYWHERE = pl.BlockSpec(memory_space=pl.ANY)
COLUMNS = 8  # of the narrowest matrix instruction
LEAST_HEIGHT = 16  # its rows


def decode(
    words: UInt16[Array, "M 32"], scales: UInt32[Array, " M"], j: int, *, interpret: bool
) -> Float[Array, "M 32"]:
    """bfloat16 weights of the columns 32 j .. 32 j + 31 of a tile of `MXFP4Words`."""
    if interpret:
        return decode_mxfp4(words, scales, j)
    # The scale's byte, twice, where bfloat16 has its exponent.
    exponent = (scales >> (8 * j)) & 0xFF if j else scales & 0xFF
    pair = exponent * jnp.uint32(0x00800080)
    pair = jnp.broadcast_to(pair[:, None], words.shape)
    # As a sum with -0, because GPUs before Hopper have no bfloat16 product without one.
    product = " fma.rn.bf16x2 $0, t, $2, zero; }"
    asm = "{ .reg .b32 t, zero; mov.b32 zero, 0x80008000; " + PTX_PLACE[j] + product
    # Of the two registers that a pair of scales is, the second holds the same.
    [values] = plt.elementwise_inline_asm(
        asm,
        args=[words, pair],
        constraints="=r,r,r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)],
    )
    return values


def load_rows(
    words: Any,
    scales: Any,
    expert: Int[Array, "*m"],
    row: Int[Array, " M"],
    step: Int[Array, "*n"],
    *,
    there: Bool[Array, " M"] | None = None,
) -> tuple[UInt16[Array, "M 32"], UInt32[Array, " M"]]:
    """Words and scales of some rows of a stack at one column tile each.

    Args:
      words, scales: refs of an `MXFP4Words`.
      expert, step: matrix and column tile, of all rows or of each.
      row: which they are.
      there: whether to load a row; the others are zeros.
    """
    # Tiles of rows lie apart, so each row is told where it is.
    which, within = row // TILE_ROWS, row % TILE_ROWS
    expert_2d, step_2d = (i[:, None] if i.ndim else i for i in (expert, step))
    word = jnp.arange(words.shape[-1])[None, :]
    words = words.at[expert_2d, which[:, None], step_2d, within[:, None], word]
    scales = scales.at[expert, which, step, within]
    if there is None:
        return plt.load(words), plt.load(scales)
    of_words = jnp.broadcast_to(there[:, None], (len(row), word.shape[1]))
    return (
        plt.load(words, mask=of_words, other=jnp.uint16(0)),
        plt.load(scales, mask=there, other=jnp.uint32(0)),
    )


def groups(
    tile: Int[Array, ""], height: int, rows: int
) -> tuple[Int[Array, " M"], Int[Array, " M"]]:
    """The group that each row of a tile is in, and the row of the weights that it is."""
    index = jnp.arange(height)
    return index // rows, tile * rows + index % rows


def own_column(y: Float[Array, "M N"], part: Int[Array, " M"]) -> Float[Array, " M"]:
    """Each row's own column of a product, that of its group."""
    return jnp.where(part[:, None] == jnp.arange(y.shape[1])[None, :], y, 0.0).sum(axis=1)


def joined(products: Sequence[Array]) -> Array:
    """The product with one stack of weights; of two, silu of the first times the second."""
    if len(products) == 1:
        return products[0]
    gate, up = products
    return gate * jax.nn.sigmoid(gate) * up


def mxfp4_products(
    tiles: Sequence[Callable[[Any], tuple[UInt16[Array, "M 32"], UInt32[Array, " M"]]]],
    columns_of_x: Callable[[Int[Array, " 32"]], Float[Array, "32 N"]],
    *,
    rows: int,
    tokens: int,
    steps: int,
    unroll: int,
    interpret: bool,
) -> list[Float[Array, "M N"]]:
    """Products of several tiles of rows with the same tokens, over all columns.

    Args:
      tiles: for each, a function that loads its words and scales of a column tile.
      columns_of_x: the tokens' values at some columns, bfloat16.
      rows, tokens: M and N.
      steps: column tiles.
      unroll: column tiles at a time; divides `steps`.
      interpret: decode by portable operations.
    """

    def body(i: Any, sums: list[Array]) -> list[Array]:
        for tile in range(unroll):
            at = i * unroll + tile
            loaded = [load(at) for load in tiles]
            for j in range(GROUPS):
                columns = at * TILE_COLUMNS + 32 * j + jnp.arange(32)
                x = columns_of_x(columns)
                sums = [
                    total + plt.dot(decode(words, scales, j, interpret=interpret), x)
                    for total, (words, scales) in zip(sums, loaded)
                ]
        return sums

    zeros = [jnp.zeros((rows, tokens), jnp.float32) for _ in tiles]
    return jax.lax.fori_loop(0, steps // unroll, body, zeros)
