"""Quantised weight formats of the MiMo releases as pytrees (MODEL_SPEC 5.2, 5.3).

Both types hold exactly the bytes of the checkpoint, so saving what was loaded is bit-exact:

- `FP8Array`: float8_e4m3fn codes with one float32 multiplier for each 128 x 128 block.
- `MXFP4Array`: two e2m1 codes a byte with one E8M0 exponent byte for each 32 columns of a row.

`dequantize` turns either (or a plain array, unchanged but for its dtype) into dense weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, UInt8

from sharding.types import entries, sharding

FP8_BLOCK = 128
MXFP4_BLOCK = 32
FP8_MAX = 448.0
MXFP4_NAN_SCALE = 255


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FP8Array:
    """A matrix (or stack) in block-FP8: W[r, c] = codes[r, c] * scales[r // 128, c // 128].

    Attributes:
      codes: float8_e4m3fn [..., R, C].
      scales: float32 [..., ceil(R / 128), ceil(C / 128)]; the checkpoint's `weight_scale_inv`,
        a multiplier despite the name.
    """

    codes: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix that is represented."""
        return tuple(self.codes.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MXFP4Array:
    """A matrix (or stack) in MXFP4: W[r, c] = e2m1(code[r, c]) * 2 ** (scales[r, c // 32] - 127).

    Attributes:
      codes: uint8 [..., R, C / 2]; byte j holds column 2j in its low and 2j + 1 in its high nibble.
      scales: uint8 [..., R, C / 32]; the checkpoint's `weight_scale`, exponents and not numbers.
    """

    codes: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix that is represented."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])


QuantizedArray = FP8Array | MXFP4Array

# Rows and columns of the weights that an element stands for: of the codes, and of the scales.
BLOCKS: dict[type, tuple[tuple[int, int], tuple[int, int]]] = {
    FP8Array: ((1, 1), (FP8_BLOCK, FP8_BLOCK)),
    MXFP4Array: ((1, 2), (1, MXFP4_BLOCK)),
}


def dequantize(w: Any, dtype: Any) -> Array:
    """Dense weights in `dtype` from a plain, FP8 or MXFP4 array.

    MXFP4 values are exact in bfloat16 and float32, but that the platform may flush float32
    denormals (codes below 2 with scale byte 0, below 1 with byte 1) to zero.  FP8 values are
    rounded once, from the float32 product.
    """
    if isinstance(w, FP8Array):
        return _dequantize_fp8(w.codes, w.scales).astype(dtype)
    if isinstance(w, MXFP4Array):
        return _dequantize_mxfp4(w.codes, w.scales).astype(dtype)
    return jnp.asarray(w).astype(dtype)


def _dequantize_fp8(codes: Array, scales: Float[Array, "*s rb cb"]) -> Array:
    rows, cols = codes.shape[-2:]
    placed = sharding(scales, *entries(scales))
    per_row = jnp.repeat(scales, FP8_BLOCK, axis=-2, out_sharding=placed)[..., :rows, :]
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
    return values.reshape(*lead, rows, 2 * half, out_sharding=sharding(codes, *entries(codes)))


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


def quantize_fp8(w: Float[Array, "*s R C"]) -> FP8Array:
    """Block-FP8 of dense weights: each 128 x 128 block scaled so that its largest |w| is 448."""
    *lead, rows, cols = w.shape
    pad = [(0, 0)] * len(lead) + [(0, -rows % FP8_BLOCK), (0, -cols % FP8_BLOCK)]
    w32 = jnp.pad(jnp.asarray(w, jnp.float32), pad)
    blocks = w32.reshape(
        *lead, w32.shape[-2] // FP8_BLOCK, FP8_BLOCK, w32.shape[-1] // FP8_BLOCK, FP8_BLOCK
    )
    largest = jnp.abs(blocks).max(axis=(-3, -1))
    scales = jnp.where(largest > 0, largest / FP8_MAX, 1.0)
    scaled = blocks / scales[..., :, None, :, None]
    codes = jnp.clip(scaled, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn).reshape(w32.shape)
    return FP8Array(codes[..., :rows, :cols], scales)


def quantize_mxfp4(w: Float[Array, "*s R C"]) -> MXFP4Array:
    """MXFP4 of dense weights, by the OCP microscaling rule.

    A block's exponent is floor(log2(max |w|)) - 2; values round to the nearest code, ties to the
    even one, and saturate at 6.

    Raises:
      ValueError: the last dimension is not a multiple of 32.
    """
    *lead, rows, cols = w.shape
    if cols % MXFP4_BLOCK:
        raise ValueError(f"MXFP4 needs a multiple of {MXFP4_BLOCK} columns, found {cols}")
    blocks = jnp.asarray(w, jnp.float32).reshape(*lead, rows, cols // MXFP4_BLOCK, MXFP4_BLOCK)
    largest = jnp.abs(blocks).max(axis=-1)
    _, exponent = jnp.frexp(largest)  # largest = m * 2 ** exponent, 0.5 <= m < 1
    scales = jnp.where(largest > 0, jnp.clip(exponent - 1 - 2 + 127, 1, 254), 127)
    scaled = jnp.ldexp(blocks, 127 - scales[..., None])
    magnitude = jnp.abs(scaled)
    # Codes are 0, .5, 1, 1.5, 2, 3, 4, 6: count the midpoints passed; at a midpoint the even code.
    code = (
        (magnitude > 0.25).astype(jnp.uint8)
        + (magnitude >= 0.75)
        + (magnitude > 1.25)
        + (magnitude >= 1.75)
        + (magnitude > 2.5)
        + (magnitude >= 3.5)
        + (magnitude > 5.0)
    )
    code = code.astype(jnp.uint8) | (jnp.signbit(scaled).astype(jnp.uint8) << 3)
    flat = code.reshape(*lead, rows, cols)
    packed = flat[..., 0::2] | (flat[..., 1::2] << 4)
    return MXFP4Array(packed, scales.astype(jnp.uint8))


def numpy_dequantize(w: Any) -> np.ndarray:
    """float32 weights on the host, computed by ml_dtypes' own conversions: the definition that
    `dequantize` is tested against."""
    if isinstance(w, FP8Array):
        rows, cols = w.shape[-2:]
        scales = np.asarray(w.scales, np.float32).repeat(FP8_BLOCK, -2)[..., :rows, :]
        return np.asarray(w.codes).astype(np.float32) * scales.repeat(FP8_BLOCK, -1)[..., :cols]
    if isinstance(w, MXFP4Array):
        codes = np.asarray(w.codes)
        nibbles = np.stack([codes & 0xF, codes >> 4], axis=-1).reshape(w.shape)
        values = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        scales = np.asarray(w.scales).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        return values * scales.repeat(MXFP4_BLOCK, -1)
    return np.asarray(w).astype(np.float32)
