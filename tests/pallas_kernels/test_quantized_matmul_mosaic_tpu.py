"""The TPU kernel of quantised products: interpreted, with its memory simulated; and lowered."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_weights import SIMULATED, abstract, assert_close, fp8, mxfp4, with_scales

from pallas_kernels import columns, targets
from pallas_kernels.dequantize import dequantize
from pallas_kernels.quantized_matmul import cases, reference
from pallas_kernels.quantized_matmul.mosaic_tpu import Blocks, quantized_matmul, unsupported

MAKE = {"mxfp4": mxfp4, "fp8": fp8}


pack = jax.jit(columns.pack, static_argnames="native")


@functools.partial(jax.jit, static_argnames="blocks")
def simulated(x, w, blocks=None):
    return quantized_matmul(x, w, interpret=SIMULATED, blocks=blocks)


def check(x, w, native=False, blocks=None):
    expected = reference.quantized_matmul(x.astype(jnp.float32), w)
    packed = pack(w, native=native) if native else pack(w)
    assert_close(simulated(x, packed, blocks=blocks), expected)


def tokens(rows, width, seed=0):
    x = np.random.default_rng(seed).standard_normal((rows, width))
    return jnp.asarray(x, jnp.bfloat16)


@pytest.mark.parametrize("native", [False, True], ids=["bits", "native"])
@pytest.mark.parametrize("case", cases.AWKWARD, ids=lambda c: c.name)
def test_against_the_reference(case, native):
    if native and case.format == "fp8":
        pytest.skip("FP8 has one form")
    w = MAKE[case.format](case.weights, 1)
    for rows in case.rows[-1:] if native else case.rows:
        check(tokens(rows, case.weights[-1]), w, native)


@pytest.mark.parametrize("blocks", [Blocks(16, 128, 1), Blocks(32, 256, 3), Blocks(64, 384, 2)])
def test_blocks_of_any_size(blocks):
    """Several blocks in every dimension; the last ones have less than the others."""
    check(tokens(40, 1536), mxfp4((2, 512, 1536), 2), blocks=blocks)
    check(tokens(40, 1536), fp8((300, 1536), 3), blocks=blocks)


@pytest.mark.parametrize("native", [False, True], ids=["bits", "native"])
@pytest.mark.parametrize("scale", [3, 60, 240])
def test_scales_at_both_ends(scale, native):
    w = with_scales(mxfp4((128, 256), 4), scale)
    check(tokens(8, 256) * 2.0 ** (120 - scale if scale < 200 else -100), w, native)


@pytest.mark.parametrize("native", [False, True], ids=["bits", "native"])
def test_every_code_is_exact(native):
    codes = jnp.tile(jnp.arange(256, dtype=jnp.uint8)[:, None], (1, 128))
    w = dataclasses.replace(with_scales(mxfp4((256, 256)), 127), codes=codes)
    product = simulated(jnp.eye(256, dtype=jnp.bfloat16), pack(w, native=native))
    np.testing.assert_array_equal(product.T, dequantize(w, jnp.bfloat16))


def test_what_it_cannot_do():
    w, x = columns.pack(mxfp4((128, 256))), tokens(1, 256)
    assert unsupported(x, w) is None
    assert "MXFP4Array" in (unsupported(x, mxfp4((128, 256))) or "")
    assert "4 dimensions" in (unsupported(x, columns.pack(mxfp4((1, 2, 3, 32)))) or "")
    with pytest.raises(NotImplementedError, match="float32"):
        quantized_matmul(x.astype(jnp.float32), w)


@pytest.mark.parametrize("tpu", [targets.V5E, targets.TPU7X], ids=lambda t: t.name)
@pytest.mark.parametrize("case", cases.REAL, ids=lambda c: c.name)
def test_lowers(case, tpu):
    w = abstract(case.format, case.weights, tpu)
    for rows in (case.rows[0], case.rows[-1]):
        x = jax.ShapeDtypeStruct((rows, case.weights[-1]), jnp.bfloat16)
        lowered = targets.lower(tpu, lambda x, w: quantized_matmul(x, w), x, w)
        assert "tpu_custom_call" in lowered.as_text()
