"""Router scores as bfloat16 products, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import moe
from pallas_kernels.moe import reference, split_scores


def test_three_bfloat16_numbers_are_a_float32_number():
    w = jax.random.normal(jax.random.key(0), (64, 96)) * 10.0 ** jnp.arange(-28, 36)[:, None]
    parts = np.asarray(jax.jit(split_scores.thirds)(w), np.float64).reshape(3, 64, 96)
    np.testing.assert_array_equal(parts.sum(axis=0), np.asarray(w, np.float64))


def test_scores_are_as_exact_as_a_float32_product():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((40, 1024)), jnp.bfloat16)
    router = rng.standard_normal((24, 1024)).astype(np.float32) / 32
    exact = 1 / (1 + np.exp(-np.asarray(x, np.float64) @ router.T.astype(np.float64)))
    got = moe.scores(x, jnp.asarray(router), kernels=("mosaic_gpu",))
    of_float32 = reference.scores(x, jnp.asarray(router))
    assert np.abs(got - exact).max() < 2e-7 + np.abs(of_float32 - exact).max()
    rounded = reference.scores(x, jnp.asarray(router, jnp.bfloat16))
    assert np.abs(rounded - exact).max() > 1e-4  # which the test would notice


def test_a_bfloat16_router_is_one_product_and_as_exact():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((40, 1024)), jnp.bfloat16)
    router = jnp.asarray(rng.standard_normal((24, 1024)) / 32, jnp.bfloat16)
    exact = 1 / (1 + np.exp(-np.asarray(x, np.float64) @ np.asarray(router, np.float64).T))
    got = moe.scores(x, router, kernels=("mosaic_gpu",))
    assert np.abs(got - exact).max() < 2e-7 + np.abs(reference.scores(x, router) - exact).max()

    def products(router: jax.Array) -> list[str]:
        equations = jax.make_jaxpr(split_scores.scores)(x, router).jaxpr.eqns
        return [str(e.outvars[0].aval) for e in equations if e.primitive.name == "dot_general"]

    assert products(router) == ["float32[40,24]"]
    assert products(router.astype(jnp.float32)) == ["float32[40,72]"]


def test_float32_activations_take_the_float32_product():
    x, router = jnp.ones((9, 32)), jnp.ones((4, 32))
    assert "float32" in (split_scores.unsupported(x, router) or "")
    with pytest.raises(NotImplementedError, match="not bfloat16"):
        split_scores.scores(x, router)
    expected = reference.scores(x, router)
    np.testing.assert_array_equal(moe.scores(x, router, kernels=("triton",)), expected)
