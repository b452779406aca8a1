"""Quantisation of dense weights into the formats of the MiMo releases (MODEL_SPEC 5.2, 5.3).

The formats themselves are in `pallas_kernels.formats`, the way back in `pallas_kernels.dequantize`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float

from pallas_kernels.dequantize import dequantize as dequantize
from pallas_kernels.formats import BLOCKS as BLOCKS
from pallas_kernels.formats import FP8_BLOCK as FP8_BLOCK
from pallas_kernels.formats import MXFP4_BLOCK as MXFP4_BLOCK
from pallas_kernels.formats import MXFP4_NAN_SCALE as MXFP4_NAN_SCALE
from pallas_kernels.formats import FP8Array as FP8Array
from pallas_kernels.formats import MXFP4Array as MXFP4Array
from pallas_kernels.formats import QuantizedArray as QuantizedArray

FP8_MAX = 448.0


def quantize_fp8(w: Float[jax.Array, "*s R C"]) -> FP8Array:
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


def quantize_mxfp4(w: Float[jax.Array, "*s R C"]) -> MXFP4Array:
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
