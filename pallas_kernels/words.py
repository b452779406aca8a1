"""Quantised weights repacked for GPU tensor cores: the same bits in another order.

A kernel decodes weights in registers, right before a matrix instruction takes them.  Here every
16-bit word has codes at places from which one shift and one mask bring them to where bfloat16 has
its sign, exponent and mantissa, and a tile of words has, element for element, the register layout
of the bfloat16 tile it becomes, so that nothing moves between threads.

The matrix is cut into tiles of 64 rows and 128 columns, each contiguous in memory.

- `MXFP4Words`: word q of a row of a tile holds the columns 32 j + q, j = 0..3, one of each of the
  row's four groups of scales.
- `FP8Words`: word q holds the columns q (low byte) and 64 + q (high byte).

Packing is exact and `unpack` gives back what was packed.  Rows and columns that are missing from
the last tiles are filled with zeros.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8, UInt16, UInt32

from pallas_kernels.filling import Repacked, cropped, filled, up
from pallas_kernels.formats import MXFP4_BLOCK, FP8Array, MXFP4Array

TILE_ROWS = 64
TILE_COLUMNS = 128
# The byte that stands for scale byte s is s + SCALE_SHIFT: the decoded bits are read as a bfloat16
# of 2^-126 times the value, and the multiplier that repairs this is part of the scale.
SCALE_SHIFT = 126
# So group scales above 2^(128 - 127) have no byte.
MAX_SCALE = 128
# Where a word has the codes 0..3: the sign's bit, and the bits of exponent and mantissa.
SIGN_BIT = (15, 12, 9, 14)
E2M1_BITS = ((8, 7, 6), (5, 4, 3), (2, 1, 0), (11, 10, 13))
GROUPS = 4  # of 32 columns with a scale of their own, in a tile of MXFP4
# PTX that brings the codes j of two words ($1) to their places in two bfloat16 (t).
PTX_PLACE = (
    "and.b32 t, $1, 0x81C081C0;",
    "shl.b32 t, $1, 3; and.b32 t, t, 0x81C081C0;",
    "shl.b32 t, $1, 6; and.b32 t, t, 0x81C081C0;",
    """.reg .b32 u, v;
    shl.b32 t, $1, 1; and.b32 t, t, 0x80008000;
    shr.b32 u, $1, 3; and.b32 u, u, 0x01800180;
    shr.b32 v, $1, 7; and.b32 v, v, 0x00400040;
    or.b32 t, t, u; or.b32 t, t, v;""",
)


class _Words(Repacked):
    """What both formats have: words uint16 [..., row tiles, column tiles, 64, words a row]."""

    MATRIX_AXES = 4
    ROW_AXIS = -4
    COLUMN_AXIS = -3
    PER_ENTRY = (TILE_ROWS, TILE_COLUMNS)


_as_pytree = functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scales"],
    meta_fields=["rows", "columns", "kernels"],
)


@_as_pytree
@dataclasses.dataclass(frozen=True)
class MXFP4Words(_Words):
    """A matrix (or stack) in MXFP4: words [..., R/64, C/128, 64, 32].

    Rows are filled to a multiple of 128, so that a product's padded rows are another's padded
    columns.

    Attributes:
      scales: uint32 [..., R/64, C/128, 64], whose byte j belongs to the columns 32 j + q.
    """

    UNITS = (TILE_COLUMNS, TILE_COLUMNS)


@_as_pytree
@dataclasses.dataclass(frozen=True)
class FP8Words(_Words):
    """A matrix (or stack) in block-FP8: words [..., R/64, C/128, 64, 64].

    Attributes:
      scales: float32 [..., ceil(R/128), C/128], as in `FP8Array`.
    """

    UNITS = (TILE_ROWS, TILE_COLUMNS)


Words = MXFP4Words | FP8Words


def pack(w: FP8Array | MXFP4Array, kernels: tuple[str, ...] = ()) -> Words:
    """The weights as words; call `unpackable` first.

    Works on one device's arrays (or in `shard_map` on each device's part).
    """
    return _pack_mxfp4(w, kernels) if isinstance(w, MXFP4Array) else _pack_fp8(w, kernels)


def unpackable(w: FP8Array | MXFP4Array) -> Array:
    """Whether weights hold what words can't: bool[].

    These are group scales above 2 (MXFP4), and codes that are NaN (FP8).
    """
    if isinstance(w, MXFP4Array):
        return (w.scales > MAX_SCALE).any()
    return jnp.isnan(w.codes.astype(jnp.bfloat16)).any()


def unpack(w: Words) -> FP8Array | MXFP4Array:
    """What was packed, bit for bit."""
    return _unpack_mxfp4(w) if isinstance(w, MXFP4Words) else _unpack_fp8(w)


def _tiles(a: Array, columns: int) -> Array:
    """[..., R, C] as [..., R/64, C/columns, 64, columns]."""
    *lead, r, c = a.shape
    a = a.reshape(*lead, r // TILE_ROWS, TILE_ROWS, c // columns, columns)
    return jnp.swapaxes(a, -3, -2)


def _untiled(a: Array) -> Array:
    *lead, rt, ct, r, c = a.shape
    return jnp.swapaxes(a, -3, -2).reshape(*lead, rt * r, ct * c)


def _pack_mxfp4(w: MXFP4Array, kernels: tuple[str, ...]) -> MXFP4Words:
    rows, columns = w.shape[-2:]
    r, c = up(rows, TILE_COLUMNS), up(columns, TILE_COLUMNS)
    codes = _tiles(filled(w.codes, r, c // 2), TILE_COLUMNS // 2)
    # Byte i of a group of 16 has the columns 2 i and 2 i + 1 of 32.
    codes = codes.reshape(*codes.shape[:-1], 4, MXFP4_BLOCK // 2).astype(jnp.uint16)
    nibbles = jnp.stack([codes & 0xF, codes >> 4], axis=-1)
    nibbles = nibbles.reshape(*codes.shape[:-1], MXFP4_BLOCK)
    words = jnp.zeros(nibbles.shape[:-2] + nibbles.shape[-1:], jnp.uint16)
    for j in range(4):
        for bit, place in zip((3, 2, 1, 0), (SIGN_BIT[j], *E2M1_BITS[j])):
            words |= ((nibbles[..., j, :] >> bit) & 1) << place
    scales = _tiles(filled(w.scales, r, c // MXFP4_BLOCK), 4).astype(jnp.uint32) + SCALE_SHIFT
    packed = sum(scales[..., j] << (8 * j) for j in range(4))
    return MXFP4Words(words, jnp.asarray(packed, jnp.uint32), rows, columns, kernels)


def _unpack_mxfp4(w: MXFP4Words) -> MXFP4Array:
    codes = jnp.zeros((*w.words.shape[:-1], 4, MXFP4_BLOCK), jnp.uint8)
    for j in range(4):
        code = jnp.zeros(w.words.shape, jnp.uint16)
        for bit, place in zip((3, 2, 1, 0), (SIGN_BIT[j], *E2M1_BITS[j])):
            code |= ((w.words >> place) & 1) << bit
        codes = codes.at[..., j, :].set(code.astype(jnp.uint8))
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    packed = _untiled(packed.reshape(*packed.shape[:-2], TILE_COLUMNS // 2))
    scales = jnp.stack([(w.scales >> (8 * j)) & 0xFF for j in range(4)], axis=-1)
    scales = _untiled((scales - SCALE_SHIFT).astype(jnp.uint8))
    return MXFP4Array(
        cropped(packed, w.parts, w.rows, w.columns // 2),
        cropped(scales, w.parts, w.rows, w.columns // MXFP4_BLOCK),
    )


def _pack_fp8(w: FP8Array, kernels: tuple[str, ...]) -> FP8Words:
    rows, columns = w.shape[-2:]
    bits = jax.lax.bitcast_convert_type(w.codes, jnp.uint8)
    bits = filled(bits, up(rows, TILE_ROWS), up(columns, TILE_COLUMNS))
    halves = _tiles(bits, TILE_COLUMNS).astype(jnp.uint16)
    words = halves[..., : TILE_COLUMNS // 2] | (halves[..., TILE_COLUMNS // 2 :] << 8)
    return FP8Words(words, w.scales, rows, columns, kernels)


def _unpack_fp8(w: FP8Words) -> FP8Array:
    bits = jnp.concatenate([w.words & 0xFF, w.words >> 8], axis=-1).astype(jnp.uint8)
    codes = jax.lax.bitcast_convert_type(_untiled(bits), jnp.float8_e4m3fn)
    return FP8Array(cropped(codes, w.parts, w.rows, w.columns), w.scales)


def decode_mxfp4(
    words: UInt16[Array, "*s M 32"], scales: UInt32[Array, "*s M"], j: int
) -> Float[Array, "*s M 32"]:
    """bfloat16 of the columns 32 j .. 32 j + 31 of tiles, by portable bit operations."""
    w = words.astype(jnp.uint32)
    magnitude = sum(
        (((w >> place) & 1) << bit for bit, place in zip((2, 1, 0), E2M1_BITS[j])), jnp.uint32(0)
    )
    # 0 and 0.5 are the codes below the first normal number; from 1.0 on the bits are a float's.
    bits = jnp.where(magnitude < 2, magnitude * 0x3F000000, (magnitude << 22) + 0x3F000000)
    bits |= ((w >> SIGN_BIT[j]) & 1) << 31
    value = jax.lax.bitcast_convert_type(bits, jnp.float32)
    byte = ((scales >> (8 * j)) & 0xFF).astype(jnp.int32) - SCALE_SHIFT
    exponent = jnp.where(byte == 0, 0x00400000, byte << 23)  # 2^-127 is a denormal
    scale = jax.lax.bitcast_convert_type(exponent, jnp.float32)
    return (value * scale[..., None]).astype(jnp.bfloat16)


def decode_fp8(words: UInt16[Array, "*s M 64"], j: int) -> Float[Array, "*s M 64"]:
    """bfloat16 of the codes of the columns 64 j .. 64 j + 63 of tiles, without their scales."""
    byte: UInt8[Array, "*s M 64"] = ((words >> (8 * j)) & 0xFF).astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(byte, jnp.float8_e4m3fn).astype(jnp.bfloat16)
