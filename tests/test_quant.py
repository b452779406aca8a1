import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mimo_jax.quant import (
    FP8Array,
    MXFP4Array,
    dequantize,
    numpy_dequantize,
    quantize_fp8,
    quantize_mxfp4,
)

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
jit_dequantize = jax.jit(dequantize, static_argnums=1)
jit_fp8, jit_mxfp4 = jax.jit(quantize_fp8), jax.jit(quantize_mxfp4)


def assert_exact(got, exact: np.ndarray, dtype: str = "float32") -> None:
    """`exact`, a float32 product, rounded to `dtype`: equal bit for bit, the sign of zero included,
    but that denormal products may be flushed to zero."""
    with np.errstate(over="ignore"):
        expected = exact.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    got, expected = np.asarray(got).astype(np.float32), expected.astype(np.float32)
    denormal = (exact != 0) & (np.abs(exact) < SMALLEST_NORMAL)
    expected = np.where(denormal & (got == 0), np.copysign(np.float32(0), exact), expected)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got[~nan].view(np.uint32), expected[~nan].view(np.uint32))


def pack(codes: np.ndarray) -> jax.Array:
    return jnp.asarray(codes[..., 0::2] | codes[..., 1::2] << 4, jnp.uint8)


def unpack(w: MXFP4Array) -> np.ndarray:
    codes = np.asarray(w.codes)
    return np.stack([codes & 0xF, codes >> 4], axis=-1).reshape(w.shape)


def bits(w: FP8Array) -> np.ndarray:
    return np.asarray(w.codes).view(np.uint8)


def float8(bits: np.ndarray) -> jax.Array:
    return jnp.asarray(bits.astype(np.uint8).view(ml_dtypes.float8_e4m3fn))


# -- decoding -------------------------------------------------------------------------------------


def every_mxfp4() -> tuple[MXFP4Array, np.ndarray]:
    """Each of the 16 codes (row r: twice each) with each of the 256 scale bytes, and its value."""
    codes = np.broadcast_to(np.arange(32) % 16, (256, 32)).astype(np.uint8)
    scales = np.arange(256, dtype=np.uint8)[:, None]
    e2m1 = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    e8m0 = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    with np.errstate(over="ignore"):  # 6 * 2 ** 127
        expected = (e2m1 * e8m0).astype(np.float32)
    return MXFP4Array(pack(codes), jnp.asarray(scales)), expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("decode", [dequantize, jit_dequantize], ids=["eager", "jit"])
def test_mxfp4_every_code_and_scale(decode, dtype):
    w, expected = every_mxfp4()
    assert_exact(decode(w, dtype), expected)  # no rounding in either dtype
    assert np.isnan(expected[255]).all()


def test_mxfp4_table():
    """The values as MODEL_SPEC 5.3 lists them, at scale 1."""
    w = MXFP4Array(pack(np.arange(32)[None] % 16), jnp.full((1, 1), 127, jnp.uint8))
    half = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    np.testing.assert_array_equal(dequantize(w, "float32")[0, :16], [*half, *(-x for x in half)])


def test_trap_3_low_nibble_is_the_even_column():
    codes = np.zeros((1, 16), np.uint8)
    codes[0, :3] = 0x21, 0x43, 0x0F
    w = MXFP4Array(jnp.asarray(codes), jnp.full((1, 1), 127, jnp.uint8))
    values = np.asarray(dequantize(w, "float32"))[0, :6]
    np.testing.assert_array_equal(values, [0.5, 1.0, 1.5, 2.0, -6.0, 0.0])


def test_trap_3_scale_bytes_are_exponents():
    codes = np.full((1, 64), 2, np.uint8)
    w = MXFP4Array(pack(codes), jnp.asarray([[0x76, 0x7D]], jnp.uint8))
    values = np.asarray(dequantize(w, "float32"))[0]
    np.testing.assert_array_equal(values, [2.0**-9] * 32 + [2.0**-2] * 32)


@pytest.mark.parametrize("scale", [1.0, 2.0**-10, 0.0013, 448.0, 3e35, 1e-36, 2e-38])
@pytest.mark.parametrize("decode", [dequantize, jit_dequantize], ids=["eager", "jit"])
def test_fp8_every_code(decode, scale):
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    w = FP8Array(float8(codes), jnp.full((1, 1), scale, jnp.float32))
    decoded = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    exact = (decoded * np.float64(np.float32(scale))).astype(np.float32)
    for dtype in ("float32", "bfloat16"):
        assert_exact(decode(w, dtype), exact, dtype)
    assert np.isnan(exact).sum() == 2  # 0x7f and 0xff; e4m3fn has no infinities


def test_fp8_each_block_has_its_scale():
    """Partial blocks at both ends, and leading dimensions."""
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.5, 2, (2, 3, 2, 3)).astype(np.float32)
    codes = rng.integers(0, 0x7F, (2, 3, 200, 300))
    w = FP8Array(float8(codes), jnp.asarray(scales))
    got = np.asarray(dequantize(w, "float32"))
    decoded = codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert got.shape == w.shape == (2, 3, 200, 300)
    for r in range(0, 200, 128):
        for c in range(0, 300, 128):
            block = np.s_[..., r : r + 128, c : c + 128]
            scale = scales[..., r // 128, c // 128, None, None]
            np.testing.assert_array_equal(got[block], decoded[block] * scale)


def test_numpy_definition_agrees():
    w, expected = every_mxfp4()
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(numpy_dequantize(w), expected)
    rng = np.random.default_rng(1)
    fp8 = FP8Array(
        float8(rng.integers(0, 0x7F, (2, 130, 257))),
        jnp.asarray(rng.uniform(0.1, 3, (2, 2, 3)), jnp.float32),
    )
    np.testing.assert_array_equal(numpy_dequantize(fp8), dequantize(fp8, "float32"))
    plain = jnp.asarray([1.5, -2.0], jnp.bfloat16)
    np.testing.assert_array_equal(numpy_dequantize(plain), [1.5, -2.0])


def test_plain_arrays_change_only_their_dtype():
    w = jnp.asarray([[1.0, 1 / 3]], jnp.float32)
    assert dequantize(w, "float32").dtype == jnp.float32
    np.testing.assert_array_equal(dequantize(w, "bfloat16"), w.astype(jnp.bfloat16))


def test_shapes_and_tree():
    w = quantize_mxfp4(jnp.ones((3, 4, 64)))
    assert (w.shape, w.codes.shape, w.scales.shape) == ((3, 4, 64), (3, 4, 32), (3, 4, 2))
    second = jax.tree.map(lambda a: a[1], w)
    assert isinstance(second, MXFP4Array)
    assert second.shape == (4, 64)
    f = quantize_fp8(jnp.ones((3, 130, 10)))
    assert (f.shape, f.scales.shape) == ((3, 130, 10), (3, 2, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        f.scales = None  # type: ignore[misc]


# -- encoding -------------------------------------------------------------------------------------

# Magnitudes that keep a block's products away from denormals and infinity.
VALUES = st.floats(-1e4, 1e4, width=32).map(lambda x: x if abs(x) > 1e-4 else 0.0)


@given(hnp.arrays(np.float32, (2, 64), elements=VALUES))
def test_mxfp4_rounds_to_the_nearest_code(w):
    q = jit_mxfp4(jnp.asarray(w))
    blocks = w.reshape(2, 2, 32).astype(np.float64)
    largest = np.abs(blocks).max(-1)
    exponent = np.floor(np.log2(np.where(largest > 0, largest, 4.0))) - 2
    np.testing.assert_array_equal(np.asarray(q.scales), exponent + 127)
    scaled = blocks / 2 ** exponent[..., None]
    # ml_dtypes rounds to the nearest code, ties to the even one, and saturates at 6.
    expected = scaled.astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(unpack(q).reshape(2, 2, 32), expected.view(np.uint8))
    error = np.abs(expected.astype(np.float64) - scaled)
    table = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    np.testing.assert_array_equal(error, np.abs(scaled[..., None] - table).min(-1))


def test_mxfp4_ties_go_to_the_even_code_and_large_values_saturate():
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    even = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    w = np.zeros((1, 32), np.float32)
    w[0, :7], w[0, 7:14], w[0, 14:17] = ties, np.negative(ties), (6.0, 7.99, -7.99)
    got = np.asarray(dequantize(quantize_mxfp4(jnp.asarray(w)), "float32"))[0]
    np.testing.assert_array_equal(got[:7], even)
    np.testing.assert_array_equal(got[7:14], np.negative(even))
    np.testing.assert_array_equal(got[14:17], [6.0, 6.0, -6.0])


@given(
    hnp.arrays(np.uint8, (2, 64), elements=st.integers(0, 15)),
    hnp.arrays(np.uint8, (2, 2), elements=st.integers(8, 245)),
)
def test_mxfp4_of_representable_values_is_exact(codes, scales):
    w = MXFP4Array(pack(codes), jnp.asarray(scales))
    values = dequantize(w, "float32")
    again = jit_mxfp4(values)
    assert_exact(dequantize(again, "float32"), np.asarray(values))
    # Where a block uses one of the two largest magnitudes, the very same bytes come back.
    full = ((codes.reshape(2, 2, 32) & 7) >= 6).any(-1)
    np.testing.assert_array_equal(np.asarray(again.scales)[full], scales[full])
    assert (unpack(again).reshape(2, 2, 32)[full] == codes.reshape(2, 2, 32)[full]).all()


@given(st.integers(0, 2**32 - 1), st.floats(-30, 30))
def test_fp8_of_representable_values_is_exact(seed, log2_size):
    w = 2**log2_size * np.random.default_rng(seed).standard_normal((150, 260))
    once = jit_fp8(jnp.asarray(w, jnp.float32))
    again = jit_fp8(dequantize(once, "float32"))
    np.testing.assert_array_equal(bits(again), bits(once))
    np.testing.assert_allclose(again.scales, once.scales, rtol=2**-23)


@given(st.integers(0, 2**32 - 1), st.floats(-30, 30))
def test_fp8_rounds_to_the_nearest_code(seed, log2_size):
    w = (2**log2_size * np.random.default_rng(seed).standard_normal((150, 260))).astype(np.float32)
    q = jit_fp8(jnp.asarray(w))
    scales = np.asarray(q.scales).repeat(128, 0)[:150].repeat(128, 1)[:, :260]
    largest = np.abs(w[:128, :128]).max()
    np.testing.assert_allclose(q.scales[0, 0] * 448, largest, rtol=1e-6)
    # XLA multiplies by reciprocals, so a value may land on the other side of a tie, not further.
    error = np.abs(numpy_dequantize(q).astype(np.float64) - w)
    nearest = (w / scales).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scales
    assert (error <= np.abs(nearest - w) + 1e-6 * np.abs(w)).all()


def test_fp8_ties_go_to_the_even_code():
    w = np.zeros((1, 128), np.float32)
    w[0, :5] = 448.0, 1 + 1 / 16, 1 + 3 / 16, -(1 + 1 / 16), 432.0
    got = np.asarray(dequantize(quantize_fp8(jnp.asarray(w)), "float32"))[0, :5]
    np.testing.assert_array_equal(got, [448.0, 1.0, 1.25, -1.0, 448.0])


def test_zero_blocks_stay_zero():
    w = jnp.zeros((130, 64)).at[0, 0].set(448.0)
    for q in (quantize_fp8(w), quantize_mxfp4(w)):
        np.testing.assert_array_equal(dequantize(q, "float32") == 0, w == 0)
    assert (np.asarray(quantize_mxfp4(w).scales)[1:] == 127).all()
    assert np.asarray(quantize_fp8(w).scales)[1, 0] == 1.0


def test_fp8_partial_blocks_do_not_see_the_padding():
    w = np.full((129, 130), 1e-3, np.float32)
    w[128, 129] = 448.0
    q = quantize_fp8(jnp.asarray(w))
    assert (q.codes.shape, q.scales.shape) == ((129, 130), (2, 2))
    np.testing.assert_allclose(
        np.asarray(q.scales), [[1e-3 / 448] * 2, [1e-3 / 448, 1.0]], rtol=1e-6
    )


@pytest.mark.parametrize("shape", [(3, 16), (3, 33), (2, 2, 48)])
def test_mxfp4_refuses_partial_blocks(shape):
    with pytest.raises(ValueError, match=f"multiple of 32 columns, found {shape[-1]}"):
        quantize_mxfp4(jnp.ones(shape))


def test_compiled_equals_eager():
    w = jnp.asarray(np.random.default_rng(3).standard_normal((2, 140, 160)), jnp.float32)
    for eager, compiled in ((quantize_fp8, jit_fp8), (quantize_mxfp4, jit_mxfp4)):
        a, b = eager(w), compiled(w)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for dtype in ("float32", "bfloat16"):
            x, y = dequantize(a, dtype), jit_dequantize(a, dtype)
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
