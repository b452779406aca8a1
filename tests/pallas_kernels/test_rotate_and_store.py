"""From a fused projection to queries and a cache: the kernel interpreted on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backends
from pallas_kernels import rotate_and_store as operation
from pallas_kernels.rotate_and_store import cases, reference, triton

STATIC = ("heads", "ring")
definition = jax.jit(reference.rotate_and_store, static_argnames=STATIC)
interpreted = jax.jit(
    functools.partial(triton.rotate_and_store, interpret=True), static_argnames=STATIC
)


@pytest.mark.parametrize("case", cases.SMALL.values(), ids=cases.SMALL.keys())
def test_against_the_reference(case):
    given, options = cases.arrays(case, 1)
    exact = (a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in given)
    for got, expected in zip(interpreted(*given, **options), definition(*exact, **options)):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got, expected.astype(jnp.bfloat16))


def test_slots_of_other_tokens_stay_as_they_are():
    case = cases.SMALL["over a ring's end"]
    given, options = cases.arrays(case, 2)
    _, *caches = interpreted(*given, **options)
    for before, after in zip(given[2:], caches):
        changed = (np.asarray(before) != np.asarray(after)).any(axis=(2, 3))
        expected = np.zeros_like(changed)
        for row, newest in enumerate(case.newest):
            expected[row, (newest - np.arange(case.tokens)) % case.slots] = True
        np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("name", ["several tokens", "over a ring's end", "padding"])
def test_slices_are_as_good_as_a_scatter(name):
    (fused, positions, k, _), options = cases.arrays(cases.SMALL[name], 4)
    _, new, _ = reference.split(fused, positions, options["heads"])
    slot = jnp.where(positions >= 0, positions % k.shape[1], k.shape[1])
    expected = reference.store(k, new, positions, ring=options["ring"])
    np.testing.assert_array_equal(reference._sliced(k, slot, new), expected)


@pytest.mark.parametrize(
    ("tokens", "slots", "dtype", "message"),
    [
        (17, 64, "bfloat16", "17 tokens a sequence are more than 16"),
        (5, 4, "bfloat16", "5 tokens are more than 4 slots"),
        (1, 64, "float32", "float32 and a cache of float32"),
    ],
)
def test_what_it_cannot_do(tokens, slots, dtype, message):
    heads = cases.SMALL["one token"].heads
    fused = jnp.zeros((1, tokens, 1, sum(heads.rows)), dtype)
    k, v = (jnp.zeros((1, slots, 1, n), dtype) for n in (heads.head, heads.value))
    positions = jnp.arange(tokens)[None]
    with pytest.raises(NotImplementedError, match=message):
        triton.rotate_and_store(fused, positions, k, v, heads=heads, ring=True)
    # The operation does it, by the definition.
    args = (fused, positions, k, v)
    got = operation.rotate_and_store(*args, heads=heads, ring=True, kernels=("triton",))
    np.testing.assert_array_equal(got[1], definition(*args, heads=heads, ring=True)[1])


def test_the_operation_uses_the_kernel():
    given, options = cases.arrays(cases.SMALL["several tokens"], 3)
    with backends.interpreted():
        got = operation.rotate_and_store(*given, **options, kernels=("triton",))
    for a, b in zip(got, interpreted(*given, **options)):
        np.testing.assert_array_equal(a, b)
