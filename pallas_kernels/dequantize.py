"""Dense weights from every form that weights have in memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from pallas_kernels.formats import (
    FP8_BLOCK,
    MXFP4_BLOCK,
    MXFP4_NAN_SCALE,
    FP8Array,
    MXFP4Array,
)
from pallas_kernels.packed import Packed, unpack


def dequantize(w: Any, dtype: Any) -> Array:
    """Dense weights in `dtype` from a plain, FP8 or MXFP4 array, or from repacked ones.

    MXFP4 values are exact in bfloat16 and float32, but that the platform may flush float32
    denormals (codes below 2 with scale byte 0, below 1 with byte 1) to zero.  FP8 values are
    rounded once, from the float32 product.
    """
    if isinstance(w, Packed):
        w = unpack(w)
    if isinstance(w, FP8Array):
        return _dequantize_fp8(w.codes, w.scales).astype(dtype)
    if isinstance(w, MXFP4Array):
        return _dequantize_mxfp4(w.codes, w.scales).astype(dtype)
    return jnp.asarray(w).astype(dtype)


def _dequantize_fp8(codes: Array, scales: Float[Array, "*s rb cb"]) -> Array:
    rows, cols = codes.shape[-2:]
    placed = _sharding(scales)
    per_row = jnp.repeat(scales, FP8_BLOCK, axis=-2, out_sharding=placed)[..., :rows, :]
    if placed is not None:
        # Devices whose parts share blocks have all scales: they are not expanded for all rows.
        where = (*_entries(codes)[:-1], _entries(scales)[-1])
        placed = NamedSharding(placed.mesh, PartitionSpec(*where))
        per_row = jax.reshard(per_row, placed)
    per_element = jnp.repeat(per_row, FP8_BLOCK, axis=-1, out_sharding=placed)[..., :cols]
    return codes.astype(jnp.float32) * per_element


def _dequantize_mxfp4(
    codes: UInt8[Array, "*s R half"], scales: UInt8[Array, "*s R blocks"]
) -> Array:
    *lead, rows, half = codes.shape
    by_block = codes.reshape(*lead, rows, 2 * half // MXFP4_BLOCK, MXFP4_BLOCK // 2)
    nibbles = jnp.stack([by_block & 0xF, by_block >> 4], axis=-1)
    # Byte 0 is 2 ** -127, a denormal that platforms flush to zero: halve and take 2 ** -126.
    halved = jnp.where(scales == 0, jnp.float32(0.5), jnp.float32(1.0))[..., None, None]
    scale = _decode_e8m0(jnp.maximum(scales, 1))[..., None, None]
    values = _decode_e2m1(nibbles) * halved * scale
    return values.reshape(*lead, rows, 2 * half, out_sharding=_sharding(codes))


def _decode_e2m1(code: UInt8[Array, "*s"]) -> Float[Array, "*s"]:
    """float32 of e2m1 codes 0..15 by bit placement (a table look-up is slow on every backend)."""
    c = code.astype(jnp.uint32)
    magnitude = c & 7
    # 0 and 0.5 are the codes below the first normal number; from 1.0 on the bits are a float's.
    bits = jnp.where(magnitude < 2, magnitude * 0x3F000000, (magnitude << 22) + 0x3F000000)
    return jax.lax.bitcast_convert_type(bits | ((c & 8) << 28), jnp.float32)


def _decode_e8m0(scale: UInt8[Array, "*s"]) -> Float[Array, "*s"]:
    """float32 of E8M0 bytes 1..255: 2 ** (s - 127), NaN for 255."""
    value = jax.lax.bitcast_convert_type(scale.astype(jnp.uint32) << 23, jnp.float32)
    return jnp.where(scale == MXFP4_NAN_SCALE, jnp.nan, value)


def _entries(x: Array) -> tuple[Any, ...]:
    """The mesh axes of each dimension of an array on a mesh."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def _sharding(x: Array) -> NamedSharding | None:
    """Of an array on a mesh in explicit mode, for results that are split like it; else None."""
    placed = jax.typeof(x).sharding
    return placed if AxisType.Explicit in placed.mesh.axis_types else None
