"""Quantised weights repacked for TPUs: the same bits in another order.

A TPU's vector unit holds 8 sublanes by 128 lanes, and its matrix unit takes weights with the
summed dimension along sublanes.  So matrices are stored transposed, in chunks of 256 of their
columns, with rows along lanes: [..., chunks, sublanes, R].  A scale then belongs to one lane and a
range of sublanes, and is applied without moving anything between lanes.

- `MXFP4Columns`: 8 codes a 32-bit word.  Each 16-bit half has four codes at the places of
  `pallas_kernels.words`, so that one shift and one mask bring a code of either half to where
  bfloat16 has its sign, exponent and mantissa; the two halves of a sublane are two sublanes of
  bfloat16.  Where the vector unit converts float4_e2m1fn itself (`native`), the codes stay as they
  are, 8 successive columns a word.
- `FP8Columns`: float8_e4m3fn, transposed.

Packing is exact and `unpack` gives back what was packed.  In products, weights below 2^-126 count
as zero, as float32's denormals do on TPUs.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.filling import Repacked, cropped, filled, up
from pallas_kernels.formats import FP8_BLOCK, MXFP4_BLOCK, FP8Array, MXFP4Array
from pallas_kernels.words import E2M1_BITS, SIGN_BIT

CHUNK = 256
WORD_ROWS = 32
# Rows of MXFP4 are filled up to whole chunks, so that a product's padded rows are another's padded
# columns; those of FP8 to whole registers, or XLA keeps the array in another order of dimensions.
MXFP4_ROWS = CHUNK
FP8_ROWS = 128
# Codes are decoded as a quarter of their value, and scale bytes are stored with 2 added to them.
SCALE_SHIFT = 2
# So group scales above 2^(252 - 127) have no byte.
MAX_SCALE = 252


class _Columns(Repacked):
    """What both formats have: words [..., chunks, sublanes, R] and scales [..., chunks, 2, R]."""

    MATRIX_AXES = 3
    ROW_AXIS = -1
    COLUMN_AXIS = -3
    PER_ENTRY = (1, CHUNK)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scales"],
    meta_fields=["rows", "columns", "kernels", "native"],
)
@dataclasses.dataclass(frozen=True)
class MXFP4Columns(_Columns):
    """A matrix (or stack) in MXFP4: words int32 [..., ceil(C/256), 32, R].

    Word r of a chunk holds the columns 64 j + 2 r (low half) and 64 j + 2 r + 1 (high half) for
    j = 0..3; or the columns 8 r .. 8 r + 7, from the lowest bits on, if `native`.

    Attributes:
      scales: int32 [..., ceil(C/256), 2, R]; byte j of word i has the chunk's columns 32 (2 j + i)
        and on.
      native: codes are e2m1, and scale bytes those of the checkpoint.
    """

    UNITS = (MXFP4_ROWS, CHUNK)

    native: bool = False


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scales"],
    meta_fields=["rows", "columns", "kernels"],
)
@dataclasses.dataclass(frozen=True)
class FP8Columns(_Columns):
    """A matrix (or stack) in block-FP8: words float8_e4m3fn [..., ceil(C/256), 256, R].

    Attributes:
      scales: float32 [..., ceil(C/256), 2, R], those of the checkpoint, repeated for each row.
    """

    UNITS = (FP8_ROWS, CHUNK)


Columns = MXFP4Columns | FP8Columns


def pack(
    w: FP8Array | MXFP4Array, kernels: tuple[str, ...] = (), *, native: bool = False
) -> Columns:
    """The weights as columns; call `unpackable` first.

    Works on one device's arrays (or in `shard_map` on each device's part).

    Args:
      w: the weights.
      kernels: goes to the result.
      native: MXFP4 for vector units that convert float4_e2m1fn (`mosaic_tpu.converts_e2m1`).
    """
    return _pack_mxfp4(w, kernels, native) if isinstance(w, MXFP4Array) else _pack_fp8(w, kernels)


def unpackable(w: FP8Array | MXFP4Array) -> Array:
    """Whether weights hold what columns can't, which are MXFP4 scales above 2^125: bool[]."""
    return (w.scales > MAX_SCALE).any() if isinstance(w, MXFP4Array) else jnp.zeros((), bool)


def unpack(w: Columns) -> FP8Array | MXFP4Array:
    """What was packed, bit for bit."""
    return _unpack_mxfp4(w) if isinstance(w, MXFP4Columns) else _unpack_fp8(w)


def _chunked(a: Array, chunks: int) -> Array:
    """[..., R, C] as [..., chunks, C / chunks, R]."""
    a = jnp.swapaxes(a, -1, -2)
    return a.reshape(*a.shape[:-2], chunks, a.shape[-2] // chunks, a.shape[-1])


def _unchunked(a: Array) -> Array:
    a = a.reshape(*a.shape[:-3], a.shape[-3] * a.shape[-2], a.shape[-1])
    return jnp.swapaxes(a, -1, -2)


def _joined(parts: Array, bits: int) -> Array:
    """int32 of unsigned parts [..., n], the lowest bits first."""
    parts = parts.astype(jnp.uint32)
    joined = functools.reduce(
        jnp.bitwise_or, [parts[..., i] << (bits * i) for i in range(parts.shape[-1])]
    )
    return jax.lax.bitcast_convert_type(joined, jnp.int32)


def _split(words: Array, bits: int) -> Array:
    w = jax.lax.bitcast_convert_type(words, jnp.uint32)[..., None]
    return (w >> jnp.arange(0, 32, bits, dtype=jnp.uint32)) & (2**bits - 1)


def _placed(code: Array, j: int) -> Array:
    """The 16-bit half that has one code at place j; magnitudes 0 and 1 change places."""
    code = code.astype(jnp.uint32)
    code = code ^ ((code & 7) < 2)
    places = zip((3, 2, 1, 0), (SIGN_BIT[j], *E2M1_BITS[j]))
    return functools.reduce(jnp.bitwise_or, [((code >> bit) & 1) << p for bit, p in places])


def _taken(half: Array, j: int) -> Array:
    places = zip((3, 2, 1, 0), (SIGN_BIT[j], *E2M1_BITS[j]))
    code = functools.reduce(jnp.bitwise_or, [((half >> p) & 1) << bit for bit, p in places])
    return code ^ ((code & 7) < 2)


def _pack_mxfp4(w: MXFP4Array, kernels: tuple[str, ...], native: bool) -> MXFP4Columns:
    rows, columns = w.shape[-2:]
    r, c = up(rows, MXFP4_ROWS), up(columns, CHUNK)
    codes = filled(w.codes, r, c // 2)
    if native:
        words = _joined(codes.reshape(*codes.shape[:-1], c // 8, 4), 8)
    else:
        # Byte 32 j + r of a chunk's 128 has the columns 64 j + 2 r and 64 j + 2 r + 1.
        by_place = codes.reshape(*codes.shape[:-1], c // CHUNK, 4, WORD_ROWS)
        low, high = (
            functools.reduce(jnp.bitwise_or, [_placed(n[..., j, :], j) for j in range(4)])
            for n in (by_place & 0xF, by_place >> 4)
        )
        words = _joined(jnp.stack([low, high], axis=-1), 16).reshape(*codes.shape[:-1], c // 8)
    scales = filled(w.scales, r, c // MXFP4_BLOCK) + jnp.uint8(0 if native else SCALE_SHIFT)
    by_byte = jnp.swapaxes(scales.reshape(*scales.shape[:-1], c // CHUNK, 4, 2), -1, -2)
    joined = _joined(by_byte, 8).reshape(*scales.shape[:-1], c // CHUNK * 2)
    words, joined = (_chunked(a, c // CHUNK) for a in (words, joined))
    return MXFP4Columns(words, joined, rows, columns, kernels, native)


def _unpack_mxfp4(w: MXFP4Columns) -> MXFP4Array:
    words = _unchunked(w.words)
    *lead, r, _ = words.shape
    if w.native:
        codes = _split(words, 8).reshape(*lead, r, -1)
    else:
        halves = _split(words.reshape(*lead, r, -1, WORD_ROWS), 16)
        places = jnp.stack([_taken(halves, j) for j in range(4)], axis=-3)
        codes = (places[..., 0] | (places[..., 1] << 4)).reshape(*lead, r, -1)
    by_byte = _split(_unchunked(w.scales).reshape(*lead, r, -1, 2), 8)
    scales = jnp.swapaxes(by_byte, -1, -2).reshape(*lead, r, -1)
    scales = scales - (0 if w.native else SCALE_SHIFT)
    return MXFP4Array(
        cropped(codes.astype(jnp.uint8), w.parts, w.rows, w.columns // 2),
        cropped(scales.astype(jnp.uint8), w.parts, w.rows, w.columns // MXFP4_BLOCK),
    )


def _pack_fp8(w: FP8Array, kernels: tuple[str, ...]) -> FP8Columns:
    rows, columns = w.shape[-2:]
    r, c = up(rows, FP8_ROWS), up(columns, CHUNK)
    bits = filled(jax.lax.bitcast_convert_type(w.codes, jnp.uint8), r, c)
    codes = jax.lax.bitcast_convert_type(_chunked(bits, c // CHUNK), jnp.float8_e4m3fn)
    scales = jnp.repeat(w.scales, FP8_BLOCK, axis=-2)
    scales = _chunked(filled(scales, r, c // FP8_BLOCK), c // CHUNK)
    return FP8Columns(codes, scales, rows, columns, kernels)


def _unpack_fp8(w: FP8Columns) -> FP8Array:
    bits = _unchunked(jax.lax.bitcast_convert_type(w.words, jnp.uint8))
    blocks = up(w.rows, FP8_BLOCK) // FP8_BLOCK, up(w.columns, FP8_BLOCK) // FP8_BLOCK
    scales = cropped(_unchunked(w.scales)[..., ::FP8_BLOCK, :], w.parts, *blocks)
    bits = cropped(bits, w.parts, w.rows, w.columns)
    return FP8Array(jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn), scales)
