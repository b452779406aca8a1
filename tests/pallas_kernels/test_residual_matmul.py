"""The product added to a residual: its kernel, interpreted on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backends
from pallas_kernels import residual_matmul as operation
from pallas_kernels.residual_matmul import cases, reference, triton
from pallas_kernels.residual_matmul.triton import Config

definition = jax.jit(reference.residual_matmul)


def interpreted(config=None):
    return jax.jit(functools.partial(triton.residual_matmul, config=config, interpret=True))


def error(got, expected) -> float:
    difference = got.astype(jnp.float32) - expected
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected))


def exact(*given):
    return definition(*(a.astype(jnp.float32) for a in given))


@pytest.mark.parametrize("case", cases.SMALL.values(), ids=cases.SMALL.keys())
@pytest.mark.parametrize(
    "config",
    [
        None,
        Config(rows=16, parts=1),
        Config(rows=8, parts=2, block=64),
        Config(rows=2, parts=8, block=16),
    ],
    ids=lambda c: f"{c.rows} {c.parts} {c.block}" if c else "default",
)
def test_against_the_reference(case, config):
    given = cases.arrays(case, seed=1)
    got = interpreted(config)(*given)
    assert got.dtype == jnp.bfloat16
    assert error(got, exact(*given)) < 5e-3
    # Where the definition rounds product and sum, the kernel rounds the sum.
    defined = np.asarray(definition(*given), np.float32)
    ulp = 2.0 ** (np.floor(np.log2(np.abs(defined).max())) - 7)
    assert np.abs(np.asarray(got, np.float32) - defined).max() <= ulp


def test_the_product_is_not_rounded_before_the_sum():
    # 1 + 2^-9 is 1 in bfloat16, and -1 makes the difference visible.
    x = jnp.zeros((1, 128), jnp.bfloat16).at[0, :2].set(jnp.asarray([1.0, 2.0**-9], jnp.bfloat16))
    w = jnp.ones((16, 128), jnp.bfloat16)
    residual = jnp.full((1, 16), -1.0, jnp.bfloat16)
    got = interpreted()(x, w, residual)
    np.testing.assert_array_equal(np.asarray(got, np.float32), 2.0**-9)


@pytest.mark.parametrize("name", ["off the tiles", "three rows, off the tiles"])
def test_without_a_residual_it_is_not_rounded(name):
    x, w, _ = cases.arrays(cases.SMALL[name], seed=6)
    got = interpreted()(x, w)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact(x, w), atol=1e-5)


def test_a_float32_residual_stays_so():
    x, w, residual = cases.arrays(cases.SMALL["wide"], seed=7)
    got = interpreted()(x, w, residual.astype(jnp.float32))
    np.testing.assert_allclose(got, exact(x, w, residual), rtol=1e-5, atol=1e-5)


def refused_cases():
    x, w, residual = cases.arrays(cases.Case(2, 32, 128), seed=2)
    yield "float32 activations", (x.astype("float32"), w, residual), "activations are float32"
    yield "float32 weights", (x, w.astype("float32"), residual), "weights are float32"
    yield "nine rows", cases.arrays(cases.Case(9, 32, 128), seed=2), "9 rows are not 1 to 8"
    yield "no rows", (x[:0], w, residual[:0]), "0 rows are not"
    yield "columns", cases.arrays(cases.Case(1, 32, 192), seed=2), "192 columns .* multiple of 128"


REFUSED = {name: case for name, *case in refused_cases()}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_it_cannot_do(given, message):
    with pytest.raises(NotImplementedError, match=message):
        triton.residual_matmul(*given)
    # The operation does it, by the definition.
    got = operation.residual_matmul(*given, kernels=("triton",))
    np.testing.assert_array_equal(got, reference.residual_matmul(*given))
    assert got.dtype == given[2].dtype


@pytest.mark.parametrize(("rows", "parts"), [(8, 1), (1, 8), (16, 16)])
def test_tiles_that_no_matrix_instruction_has(rows, parts):
    given = cases.arrays(cases.SMALL["narrow"], seed=3)
    with pytest.raises(ValueError, match=f"{parts} parts of {rows} rows"):
        interpreted(Config(rows=rows, parts=parts))(*given)


@pytest.mark.parametrize("name", ["wide", "eight rows"])
def test_the_operation_uses_the_kernel(name):
    given = cases.arrays(cases.SMALL[name], seed=4)
    call = functools.partial(operation.residual_matmul, kernels=("triton",))
    with backends.interpreted():
        assert "pallas_call" in str(jax.make_jaxpr(call)(*given))
        got = call(*given)
    np.testing.assert_array_equal(got, interpreted()(*given))


def test_the_reference_is_the_default():
    given = cases.arrays(cases.SMALL["wide"], seed=5)
    with backends.interpreted():
        assert "pallas_call" not in str(jax.make_jaxpr(operation.residual_matmul)(*given))
