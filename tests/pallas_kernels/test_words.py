import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jax.quant import numpy_dequantize
from pallas_kernels import words
from pallas_kernels.dequantize import dequantize
from pallas_kernels.formats import FP8Array, MXFP4Array

pack, unpack = jax.jit(words.pack), jax.jit(words.unpack)
SHAPES = [(64, 128), (3, 128, 256), (2, 96, 96), (5, 200, 160), (1, 32)]


def random_mxfp4(seed: int, shape: tuple[int, ...], least: int = 0, most: int = 128) -> MXFP4Array:
    rng = np.random.default_rng(seed)
    *lead, rows, columns = shape
    codes = rng.integers(0, 256, (*lead, rows, columns // 2))
    scales = rng.integers(least, most + 1, (*lead, rows, columns // 32))
    return MXFP4Array(jnp.asarray(codes, jnp.uint8), jnp.asarray(scales, jnp.uint8))


def random_fp8(seed: int, shape: tuple[int, ...]) -> FP8Array:
    rng = np.random.default_rng(seed)
    *lead, rows, columns = shape
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x80  # a NaN becomes -0
    scales = rng.uniform(1e-4, 1e-3, (*lead, -(-rows // 128), -(-columns // 128)))
    return FP8Array(
        jnp.asarray(codes.view(ml_dtypes.float8_e4m3fn)), jnp.asarray(scales, jnp.float32)
    )


def same_bits(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", [random_mxfp4, random_fp8])
def test_unpack_gives_back_the_bytes(make, shape):
    w = make(1, shape)
    packed = pack(w)
    assert packed.shape == shape
    assert packed.ndim == len(shape)
    assert same_bits(unpack(packed), w)
    np.testing.assert_array_equal(dequantize(packed, jnp.float32), dequantize(w, jnp.float32))


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 70), blocks=st.integers(1, 5))
def test_any_size_round_trips(seed, rows, blocks):
    w = random_mxfp4(seed, (rows, 32 * blocks))
    assert same_bits(unpack(pack(w)), w)


def test_parts_round_trip_as_a_whole():
    """On a mesh each device packs its part, and a checkpoint gets the whole."""
    w = random_mxfp4(2, (2, 192, 128))
    parts = [MXFP4Array(w.codes[:, r : r + 96], w.scales[:, r : r + 96]) for r in (0, 96)]
    packed = [pack(part) for part in parts]
    together = words.MXFP4Words(
        jnp.concatenate([p.words for p in packed], axis=1),
        jnp.concatenate([p.scales for p in packed], axis=1),
        96,
        128,
    )
    assert together.parts == (2, 1)
    assert together.shape == (2, 192, 128)
    assert same_bits(unpack(together), w)


def test_a_word_has_the_codes_where_the_docstring_says():
    """Four columns of a row, each with another code, by bit arithmetic of this test's own."""
    codes = np.zeros((1, 128), np.uint8)
    codes[0, [5, 37, 69, 101]] = [0b1011, 0b0110, 0b1101, 0b1011]
    w = MXFP4Array(
        jnp.asarray(codes[:, 0::2] | codes[:, 1::2] << 4), jnp.full((1, 4), 120, jnp.uint8)
    )
    word = int(words.pack(w).words[0, 0, 0, 5])
    assert word & 0x81C0 == 1 << 15 | 0b011 << 6
    assert (word << 3) & 0x81C0 == 0b110 << 6
    assert (word << 6) & 0x81C0 == 1 << 15 | 0b101 << 6
    last = (word << 1 & 0x8000) | (word >> 3 & 0x0180) | (word >> 7 & 0x0040)
    assert last == 1 << 15 | 0b011 << 6
    assert int(words.pack(w).scales[0, 0, 0]) == 0x01010101 * (120 + 126)


@pytest.mark.parametrize("j", range(4))
def test_portable_decode(j):
    w = random_mxfp4(3, (64, 128), least=2)
    packed = pack(w)
    got = words.decode_mxfp4(packed.words[0, 0], packed.scales[0, 0], j)
    expected = numpy_dequantize(w)[:, 32 * j : 32 * j + 32]
    np.testing.assert_array_equal(got.astype(jnp.float32), expected)


def test_portable_decode_keeps_the_sign_of_zero():
    w = MXFP4Array(jnp.full((64, 64), 0x88, jnp.uint8), jnp.full((64, 4), 120, jnp.uint8))
    packed = pack(w)
    assert np.signbit(words.decode_mxfp4(packed.words[0, 0], packed.scales[0, 0], 3)).all()


def test_what_words_cannot_hold():
    largest = random_mxfp4(4, (64, 128), most=128)
    assert not words.unpackable(largest)
    scales = largest.scales.at[3, 2].set(129)
    assert words.unpackable(MXFP4Array(largest.codes, scales))
    fp8 = random_fp8(5, (64, 128))
    assert not words.unpackable(fp8)
    codes = fp8.codes.at[1, 1].set(jnp.nan)
    assert words.unpackable(FP8Array(codes, fp8.scales))
