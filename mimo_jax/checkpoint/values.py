"""Checks of stored values, and dense weights from quantised ones, a piece at a time."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np

from mimo_jax.checkpoint.names import SCALE_SUFFIX
from mimo_jax.quant import (
    FP8_BLOCK,
    MXFP4_NAN_SCALE,
    FP8Array,
    MXFP4Array,
    QuantizedArray,
    numpy_dequantize,
)

# Bytes looked at, and rows dequantised, at a time: temporary copies stay small for any tensor.
PIECE_BYTES = 1 << 25
PIECE_ROWS = 32 * FP8_BLOCK


def bad_values(name: str, array: np.ndarray) -> tuple[str, str] | None:
    """What is wrong with the values of a tensor, and what they should be; None if all is well.

    The name tells what bytes mean: `_scale` are exponents (0 and 255 forbidden), `_scale_inv`
    positive multipliers (MODEL_SPEC 5.2, 5.3).
    """
    flat = array.reshape(-1)
    step = max(1, PIECE_BYTES // array.dtype.itemsize)
    count, first = 0, -1
    for start in range(0, flat.size, step):
        wrong = np.flatnonzero(_wrong(name, flat[start : start + step]))
        if wrong.size and not count:
            first = start + int(wrong[0])
        count += wrong.size
    if not count:
        return None
    at = [int(i) for i in np.unravel_index(first, array.shape)]
    return f"{count} of {array.size} values ({flat[first]} at {at})", _expected(name, array.dtype)


def _wrong(name: str, values: np.ndarray) -> np.ndarray:
    if name.endswith(SCALE_SUFFIX["mxfp4"]) and values.dtype == np.uint8:
        return (values == 0) | (values == MXFP4_NAN_SCALE)
    if name.endswith(SCALE_SUFFIX["fp8"]):
        return ~(np.isfinite(values) & (values > 0))
    if values.dtype.kind == "u":
        return np.zeros(values.shape, np.bool_)
    if values.dtype.itemsize == 1:
        return (values.view(np.uint8) & 0x7F) == 0x7F  # float8_e4m3fn has two NaNs, no infinity
    if values.dtype == ml_dtypes.bfloat16:
        return (values.view(np.uint16) & 0x7F80) == 0x7F80
    return ~np.isfinite(values)


def _expected(name: str, dtype: np.dtype) -> str:
    if name.endswith(SCALE_SUFFIX["mxfp4"]):
        return f"exponent bytes other than 0 and {MXFP4_NAN_SCALE}"
    if name.endswith(SCALE_SUFFIX["fp8"]):
        return "finite positive multipliers"
    return "codes other than NaN" if dtype.itemsize == 1 else "finite numbers"


def dense(w: QuantizedArray, dtype: Any) -> np.ndarray:
    """Dense weights of a quantised array on the host, rounded once to `dtype`."""
    out = np.empty(w.shape, dtype)
    for lead in itertools.product(*map(range, w.shape[:-2])):
        for start in range(0, w.shape[-2], PIECE_ROWS):
            rows = slice(start, start + PIECE_ROWS)
            out[lead][rows] = numpy_dequantize(_rows(w, lead, rows)).astype(dtype)
    return out


def _rows(w: QuantizedArray, lead: tuple[int, ...], rows: slice) -> QuantizedArray:
    if isinstance(w, MXFP4Array):
        return MXFP4Array(w.codes[lead][rows], w.scales[lead][rows])
    in_blocks = slice(rows.start // FP8_BLOCK, -(-rows.stop // FP8_BLOCK))
    return FP8Array(w.codes[lead][rows], w.scales[lead][in_blocks])
