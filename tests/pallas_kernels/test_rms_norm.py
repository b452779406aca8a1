"""The norm's kernel, interpreted on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backends
from pallas_kernels import rms_norm as operation
from pallas_kernels.rms_norm import reference, triton

definition = jax.jit(reference.rms_norm, static_argnames="eps")
interpreted = jax.jit(functools.partial(triton.rms_norm, interpret=True), static_argnames="eps")


def arrays(*shape: int, dtype="bfloat16"):
    rng = np.random.default_rng(sum(shape))
    x = rng.standard_normal(shape, np.float32) * 10.0 ** rng.integers(-3, 3, (*shape[:-1], 1))
    weight = 1 + 0.1 * rng.standard_normal(shape[-1:], np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(weight, dtype)


@pytest.mark.parametrize("shape", [(1, 1, 6144), (3, 96), (2, 5, 64), (1, 17)], ids=str)
def test_against_the_reference(shape):
    x, weight = arrays(*shape)
    got = interpreted(x, weight, eps=1e-5)
    assert got.dtype == x.dtype
    exact = definition(x.astype(jnp.float32), weight.astype(jnp.float32), eps=1e-5)
    error = jnp.linalg.norm(got.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert float(error) < 5e-3
    # The sums' order is all that differs from what is defined.
    defined = definition(x, weight, eps=1e-5).astype(jnp.float32)
    np.testing.assert_allclose(got.astype(jnp.float32), defined, rtol=1e-2)


def test_rows_of_zeros_stay_zeros():
    x, weight = arrays(2, 64)
    x = x.at[1].set(0)
    assert not interpreted(x, weight, eps=1e-6)[1].any()


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((2, 64), "float32", "float32"), ((257, 8), "bfloat16", "257 rows of 8 are more than 256")],
)
def test_what_it_cannot_do(shape, dtype, message):
    x, weight = arrays(*shape, dtype=dtype)
    with pytest.raises(NotImplementedError, match=message):
        triton.rms_norm(x, weight, eps=1e-5)
    # The operation does it, by the definition.
    got = operation.rms_norm(x, weight, eps=1e-5, kernels=("triton",))
    np.testing.assert_array_equal(got, reference.rms_norm(x, weight, eps=1e-5))


def test_the_operation_uses_the_kernel():
    x, weight = arrays(3, 96)
    with backends.interpreted():
        got = operation.rms_norm(x, weight, eps=1e-5, kernels=("triton",))
    np.testing.assert_array_equal(got, interpreted(x, weight, eps=1e-5))
