"""Values are checked and dequantised a piece at a time, with the same result."""

import ml_dtypes
import numpy as np
import pytest

from mimo_jax.checkpoint import values
from mimo_jax.quant import FP8Array, MXFP4Array, numpy_dequantize


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "PIECE_BYTES", 64)
    monkeypatch.setattr(values, "PIECE_ROWS", 128)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_bad_values_in_several_pieces(dtype: type) -> None:
    array = np.ones((20, 30), dtype)
    assert values.bad_values("w", array) is None
    array[3, 7] = np.inf
    array[3, 8] = np.nan
    array[19, 29] = -np.inf
    expected = "3 of 600 values (inf at [3, 7])", "finite numbers"
    assert values.bad_values("w", array) == expected


@pytest.mark.usefixtures("small_pieces")
def test_every_float8_and_scale_byte() -> None:
    every = np.arange(256, dtype=np.uint8)
    found = values.bad_values("w", every.view(ml_dtypes.float8_e4m3fn))
    assert found == ("2 of 256 values (nan at [127])", "codes other than NaN")
    found = values.bad_values("w_scale", every)
    assert found == ("2 of 256 values (0 at [0])", "exponent bytes other than 0 and 255")
    assert values.bad_values("w", every) is None


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_dense_in_pieces(lead: tuple[int, ...], dtype: type) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 0x7F, (*lead, 300, 160), np.uint8).view(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.1, 9.0, (*lead, 3, 2)).astype(np.float32)
    fp8 = FP8Array(codes, scales)
    mxfp4 = MXFP4Array(
        rng.integers(0, 256, (*lead, 300, 80), np.uint8),
        rng.integers(100, 130, (*lead, 300, 5), np.uint8),
    )
    for w in (fp8, mxfp4):
        dense = values.dense(w, dtype)
        assert dense.dtype == dtype
        np.testing.assert_array_equal(dense, numpy_dequantize(w).astype(dtype))
