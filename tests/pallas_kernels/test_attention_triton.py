"""Attention of many tokens: its definition, and the Triton kernel interpreted on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_loop import assert_is_the_loop

from pallas_kernels import attention as operation
from pallas_kernels import backends
from pallas_kernels.attention import cases, reference, triton
from pallas_kernels.attention.triton import Config

BF16_ERROR = 5e-3
definition = jax.jit(reference.attention, static_argnames="window")


def of_float32(given, options):
    given = (a.astype(jnp.float32) if a.ndim > 1 else a for a in given)
    return np.asarray(definition(*given, **options))


def relative_error(got, expected) -> float:
    got = np.asarray(got, np.float32)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("case", cases.SMALL.values(), ids=cases.SMALL.keys())
def test_the_definition(case):
    given, options = cases.arrays(case, 1)
    q, k, v, first_query, first_key, newest = (np.asarray(a, np.float32) for a in given)
    own = first_query[:, None] + np.arange(case.tokens)
    own = np.where(own <= newest[:, None], own, -1)
    at = first_key[:, None] + np.arange(case.keys)
    assert_is_the_loop(of_float32(given, options), case, (q, k, v, own, at), options.get("sink"))


@pytest.mark.parametrize("case", cases.SMALL.values(), ids=cases.SMALL.keys())
@pytest.mark.parametrize("config", [None, Config(32, 64, 2, 4)], ids=str)
def test_against_the_reference(case, config):
    given, options = cases.arrays(case, 2)
    got = triton.attention(*given, **options, config=config, interpret=True)
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, of_float32(given, options)) < BF16_ERROR


@pytest.mark.parametrize(
    ("q", "message"),
    [
        ((1, 5, 2, 4, 64, "float32"), "float32, bfloat16 and bfloat16"),
        ((1, 5, 2, 4, 72, "bfloat16"), "heads of 72 and 72"),
    ],
)
def test_what_it_cannot_do(q, message):
    *shape, dtype = q
    q, k = jnp.zeros(shape, dtype), jnp.zeros((1, 5, 2, shape[-1]), jnp.bfloat16)
    zero = jnp.zeros(1, jnp.int32)
    with pytest.raises(NotImplementedError, match=message):
        triton.attention(q, k, k, zero, zero, zero + 4)
    with pytest.raises(NotImplementedError, match=f"attention with .*triton.*{message}"):
        operation.attention(q, k, k, zero, zero, zero + 4, kernels=("triton",))


def test_the_operation():
    given, options = cases.arrays(cases.SMALL["a small window"], 3)
    expected = definition(*given, **options)
    np.testing.assert_array_equal(operation.attention(*given, **options), expected)
    with backends.interpreted():
        got = operation.attention(*given, **options, kernels=("triton",))
    assert relative_error(got, np.asarray(expected, np.float32)) < BF16_ERROR
