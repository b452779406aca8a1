"""The Triton kernels of `quantized_matmul`, interpreted, against the reference."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax import quant
from pallas_kernels import backends, quantized_matmul, words
from pallas_kernels.dequantize import dequantize
from pallas_kernels.formats import FP8Array
from pallas_kernels.quantized_matmul import reference, triton, triton_one
from pallas_kernels.quantized_matmul.cases import AWKWARD, REAL, Case
from pallas_kernels.quantized_matmul.triton import Config

QUANTIZE = {"fp8": jax.jit(quant.quantize_fp8), "mxfp4": jax.jit(quant.quantize_mxfp4)}
pack = jax.jit(words.pack)
definition = jax.jit(reference.quantized_matmul)
interpreted = jax.jit(
    functools.partial(triton.quantized_matmul, interpret=True), static_argnames="config"
)
decoded = jax.jit(functools.partial(triton.dequantize, interpret=True))
of_one = jax.jit(
    functools.partial(triton_one.quantized_matmul, interpret=True), static_argnames="config"
)


def normal(seed: int, *shape: int):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def weights(case: Case):
    return QUANTIZE[case.format](normal(1, *case.weights))


def activations(rows: int, columns: int):
    return normal(2, rows, columns).astype(jnp.bfloat16)


def check(y, x, w):
    assert y.dtype == x.dtype
    expected = definition(x.astype(jnp.float32), w)
    assert y.shape == expected.shape
    error = jnp.linalg.norm(y.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    assert float(error) < 5e-3


@pytest.mark.parametrize("case", AWKWARD, ids=lambda c: c.name)
def test_awkward_shapes(case):
    w = weights(case)
    for rows in case.rows:
        x = activations(rows, w.shape[-1])
        check(interpreted(x, pack(w)), x, w)


@pytest.mark.parametrize(
    "config",
    [
        Config(tokens=16, rows=32),
        Config(tokens=8, rows=128, unroll=2),
        Config(tokens=16, splits=3, warps=2),
        Config(tokens=8, splits=5),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["half-block", "odd-tiles", "stack-mxfp4"])
def test_tilings(name, config):
    [case] = [c for c in AWKWARD if c.name == name]
    w = weights(case)
    x = activations(9, w.shape[-1])
    check(interpreted(x, pack(w), config=config), x, w)


@pytest.mark.parametrize("case", AWKWARD, ids=lambda c: c.name)
def test_dense_weights_are_those_of_dequantize(case):
    w = weights(case)
    packed = pack(w)
    dense = decoded(packed)
    dense = dense.reshape(*w.shape[:-2], *packed.padded)[..., : w.shape[-2], : w.shape[-1]]
    expected = dequantize(w, jnp.bfloat16)
    np.testing.assert_array_equal(dense.astype(jnp.float32), expected.astype(jnp.float32))


# One and three column tiles, which no parts divide, and eight, which all do.
ONE = [
    Case("column-tile", "fp8", (64, 128)),
    Case("off-tiles", "fp8", (70, 300)),
    Case("half-block", "fp8", (3, 192, 384)),
]
PARTS = Case("parts", "fp8", (2, 100, 1000))


@pytest.mark.parametrize(
    ("case", "parts"),
    [*((case, 8) for case in ONE), *((PARTS, parts) for parts in (1, 2, 4, 8))],
    ids=lambda v: v.name if isinstance(v, Case) else str(v),
)
def test_one_row(case, parts):
    w = weights(case)
    x = activations(1, w.shape[-1])
    check(of_one(x, pack(w), config=triton_one.Config(parts, height=32)), x, w)


@pytest.mark.parametrize("height", [16, 64])
def test_heights_of_one_row(height):
    w = weights(PARTS)
    x = activations(1, w.shape[-1])
    for parts in (1, 8):
        check(of_one(x, pack(w), config=triton_one.Config(parts, height)), x, w)


@pytest.mark.parametrize(("rows", "form"), [(1, "quantized_matmul_one"), (2, "quantized_matmul")])
def test_one_row_has_a_kernel_of_its_own(rows, form):
    w = weights(AWKWARD[0])
    x = activations(rows, w.shape[-1])
    packed = words.pack(w, ("triton",))
    with backends.interpreted():
        program = jax.make_jaxpr(quantized_matmul.quantized_matmul)(x, packed)
        check(quantized_matmul.quantized_matmul(x, packed), x, w)
    assert f"name={form}\n" in str(program)


def test_what_is_not_for_the_kernel_of_one_row():
    w = pack(weights(AWKWARD[0]))
    with pytest.raises(NotImplementedError, match="2 rows are more than one"):
        triton_one.quantized_matmul(activations(2, w.shape[-1]), w)
    of_mxfp4 = pack(weights(Case("tile", "mxfp4", (64, 128))))
    with pytest.raises(NotImplementedError, match="MXFP4"):
        triton_one.quantized_matmul(activations(1, 128), of_mxfp4)
    tall = jax.eval_shape(pack, weights(Case("tall", "fp8", (64 * 200, 128))))
    assert triton_one.unsupported(activations(1, 128), tall) == (
        "12800 rows of weights keep a device busy by themselves"
    )


def test_every_code(monkeypatch):
    """All e4m3 codes but NaN, -0 and subnormals among them, and many tokens: decoded to memory."""
    monkeypatch.setattr(triton, "FUSED_TOKENS", 8)
    codes = jnp.tile(jnp.arange(256, dtype=jnp.uint8), 64 * 2).reshape(64, 512)
    codes = jnp.where((codes & 0x7F) == 0x7F, 0x80, codes).astype(jnp.uint8)
    codes = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    w = FP8Array(codes, jnp.asarray([[2.0**-9, 0.75, 1e-4, 3.0]]))
    for rows in (3, 9):
        x = activations(rows, 512)
        check(triton.quantized_matmul(x, pack(w), interpret=True), x, w)


def test_what_it_cannot_do():
    w = weights(AWKWARD[0])
    x = activations(2, 128)
    assert "not packed" in (triton.unsupported(x, w) or "")
    with pytest.raises(NotImplementedError, match="float32"):
        triton.quantized_matmul(x.astype(jnp.float32), pack(w))
    assert triton.unsupported(x, pack(w)) is None


@pytest.mark.parametrize("case", REAL, ids=lambda c: c.name)
def test_configurations_fit_the_shapes(case):
    """Columns are split evenly, and no more than it takes to have enough programs."""
    dense = jax.ShapeDtypeStruct(case.weights, jnp.float32)
    w = jax.eval_shape(lambda dense: pack(QUANTIZE[case.format](dense)), dense)
    row_tiles, steps = math.prod(w.words.shape[:-3]), w.words.shape[-3]
    for rows in (r for r in case.rows if r <= triton.FUSED_TOKENS):
        config = triton.configure(rows, w)
        assert config.tokens >= min(rows, 128)
        assert steps % (config.splits * config.unroll) == 0
        if config.splits > 1:
            assert row_tiles * config.splits < 2 * triton.PROGRAMS


@pytest.mark.parametrize("case", REAL[:-1], ids=lambda c: c.name)
def test_parts_of_one_row_fit_the_shapes(case):
    dense = jax.ShapeDtypeStruct(case.weights, jnp.float32)
    w = jax.eval_shape(lambda dense: pack(QUANTIZE[case.format](dense)), dense)
    row_tiles, steps = math.prod(w.words.shape[:-3]), w.words.shape[-3]
    config = triton_one.configure(w)
    assert steps % config.parts == 0
    assert steps // config.parts >= triton_one.STEPS
    if config.parts > 1:
        assert row_tiles * config.parts < 2 * triton_one.PROGRAMS
