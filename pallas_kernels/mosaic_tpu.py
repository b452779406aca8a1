"""What Mosaic TPU kernels with quantised weights share: decoding, accumulation, sizes of blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.backends import Target
from pallas_kernels.columns import CHUNK, Columns, MXFP4Columns

LANES = 128
# Rows of bfloat16 that fill a register tile.
SUBLANES = 16
# Assumed where the device isn't known, as in interpret mode: no generation since v5e has less.
SMALLEST_VMEM = 64 * 2**20

_SIGNS = 0x80008000 - 2**32
_QUARTER = 0x3E003E00  # exponent 124 in both halves
# A quarter of 0.75: the bits that no e2m1 number has stand for 0 (`columns.SCALE_SHIFT`).
_ZERO = 0.1875


def converts_e2m1(target: Target) -> bool:
    """Whether a TPU's vector unit converts float4_e2m1fn, so that `columns.pack` needn't."""
    return target.platform == "tpu" and target.kind.startswith("TPU7")


def vmem_bytes() -> int:
    """On-chip memory of the TPU core that is traced for."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except (ValueError, NotImplementedError):
        return SMALLEST_VMEM


def compiler_params(*semantics: Any) -> pltpu.CompilerParams:
    """All of VMEM but an eighth, which is left to the compiler; the default limit is 16 to 32 MiB.

    Args:
      semantics: of the dimensions of the grid.
    """
    limit = vmem_bytes() * 7 // 8
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=limit)


def block_columns(rows: int, limit: int) -> int:
    """How many rows of a matrix, which are columns of a product, make a block.

    That is all of them if they are at most `limit`, and else the multiple of 128 up to there that
    covers them with the least waste.
    """
    if rows <= limit:
        return rows
    sizes = range(limit // LANES * LANES, max(limit // 2, LANES) - 1, -LANES)
    return min(sizes, key=lambda n: math.ceil(rows / n) * n)


def block_chunks(w: Columns, columns: int, limit: int) -> int:
    """How many chunks of weights to load at a time: a divisor of all, and at most `limit` bytes."""
    chunks, sublanes = w.words.shape[-3:-1]
    each = (sublanes * w.words.dtype.itemsize + 2 * 4) * columns
    fitting = [n for n in range(1, chunks + 1) if chunks % n == 0 and n * each <= limit]
    return max(fitting, default=1)


def dense(w: Columns, words: Array, scales: Array) -> Float[Array, "256 N"]:
    """bfloat16 of a chunk of weights, in a kernel.

    Args:
      w: the weights that it is of, for the format.
      words: its words [sublanes, N].
      scales: its scales [2, N].
    """
    if not isinstance(w, MXFP4Columns):
        halves = (words[: CHUNK // 2], words[CHUNK // 2 :])
        scaled = [h.astype(jnp.float32) * scales[i : i + 1] for i, h in enumerate(halves)]
        return jnp.concatenate(scaled, axis=0).astype(jnp.bfloat16)
    by_place = [_group_scales(scales, j) for j in range(4)]
    if w.native:
        codes = pltpu.bitcast(words, jnp.float4_e2m1fn).astype(jnp.bfloat16)
        return codes * jnp.concatenate(by_place, axis=0)
    return jnp.concatenate([_quarter(words, j) * s for j, s in enumerate(by_place)], axis=0)


def _quarter(words: Int32[Array, "32 N"], j: int) -> Float[Array, "64 N"]:
    """bfloat16 of a quarter of the codes at place j."""
    if j < 3:
        bits = (words << (3 * j)) & (_SIGNS | 0x01C001C0)
    else:
        bits = ((words << 1) & _SIGNS) | ((words >> 3) & 0x01800180) | ((words >> 7) & 0x00400040)
    value = pltpu.bitcast(bits | _QUARTER, jnp.bfloat16)
    return jnp.where(jnp.abs(value) == _ZERO, jnp.bfloat16(0), value)


def _group_scales(scales: Int32[Array, "2 N"], j: int) -> Float[Array, "64 N"]:
    """bfloat16 scales of the columns 64 j .. 64 j + 63 of a chunk."""
    byte = (scales >> (8 * j)) & 0xFF
    both = (byte << 7) | (byte << 23)
    rows = [jnp.broadcast_to(both[i : i + 1], (16, both.shape[1])) for i in range(2)]
    return pltpu.bitcast(jnp.concatenate(rows, axis=0), jnp.bfloat16)


def accumulate(x: Any, products: Sequence[tuple[Columns, Any, Any, Any]]) -> None:
    """Adds products of the same activations, in a kernel.

    Args:
      x: reference of bfloat16 [T, 256 K].
      products: for each, the weights (for the format) and the references of their words
        [K, sublanes, N], their scales [K, 2, N] and a float32 sum [T, N].
    """

    def add_chunk(i: Any, _: None) -> None:
        rows = x[:, pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK)]
        for w, words, scales, total in products:
            weights = dense(w, words[i], scales[i])
            total[...] += jnp.dot(rows, weights, preferred_element_type=jnp.float32)

    jax.lax.fori_loop(0, products[0][1].shape[0], add_chunk, None)


def padded_rows(n: int) -> int:
    """Rows up to whole register tiles."""
    return -(-n // SUBLANES) * SUBLANES
