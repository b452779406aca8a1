"""From a fused projection to queries and a cache: the kernels interpreted on a CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_weights import SIMULATED, assert_close

from pallas_kernels import backends
from pallas_kernels import rotate_and_store as operation
from pallas_kernels.rotate_and_store import cases, mosaic_tpu, reference, triton

STATIC = ("heads", "ring")
definition = jax.jit(reference.rotate_and_store, static_argnames=STATIC)
interpreted = {
    kernel: jax.jit(
        functools.partial(kernel.rotate_and_store, interpret=True), static_argnames=STATIC
    )
    for kernel in (triton, mosaic_tpu)
}


def possible(kernel):
    """Cases that a kernel does."""
    for name, case in cases.SMALL.items():
        fused, _, k, _ = cases.shapes(case)
        if kernel.unsupported(fused, k, case.heads, case.ring) is None:
            yield pytest.param(kernel, case, id=f"{kernel.__name__.split('.')[-1]}-{name}")


EVERY = [*possible(triton), *possible(mosaic_tpu)]


@pytest.mark.parametrize(("kernel", "case"), EVERY)
def test_against_the_reference(kernel, case):
    given, options = cases.arrays(case, 1)
    got = interpreted[kernel](*given, **options)
    if kernel is triton:  # which rounds once
        given = [a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in given]
    for a, expected in zip(got, definition(*given, **options)):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize(("kernel", "case"), EVERY)
def test_slots_of_other_tokens_stay_as_they_are(kernel, case):
    given, options = cases.arrays(case, 2)
    _, *caches = interpreted[kernel](*given, **options)
    for before, after in zip(given[2:], caches):
        changed = (np.asarray(before) != np.asarray(after)).any(axis=(2, 3))
        expected = np.zeros_like(changed)
        for row, newest in enumerate(case.newest):
            own = newest - np.arange(case.tokens)
            expected[row, own[own >= 0] % case.slots] = True
        np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("padding", ["before", "after", "beyond the end"])
@pytest.mark.parametrize("name", ["over a long ring's end", "wide heads", "many tokens"])
def test_tpus_store_what_is_there(name, padding):
    """Simulated, with memory that starts as NaN and copies that are watched for races."""
    case = cases.SMALL[name]
    (fused, _, cache, _), _ = cases.arrays(case, 4)
    _, new, _ = reference.split(fused, jnp.zeros(fused.shape[:2], jnp.int32), case.heads)
    positions = np.asarray([[3], [250], [123]]) + np.arange(case.tokens)
    column = np.arange(case.tokens)
    there = {"before": column >= 5, "after": column < 7, "beyond the end": column >= 0}[padding]
    if padding == "beyond the end" and not case.ring:
        positions += case.slots - 260
    positions = jnp.asarray(np.where(there, positions, -1), jnp.int32)
    expected = reference.store(cache, new, positions, ring=case.ring)
    got = mosaic_tpu.store(cache, new, positions, ring=case.ring, interpret=SIMULATED)
    assert_close(got, expected)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("tokens", "slots", "dtype", "message"),
    [
        (17, 64, "bfloat16", "17 tokens a sequence are more than 16"),
        (5, 4, "bfloat16", "5 tokens are more than 4 slots"),
        (1, 64, "float32", "float32 and a cache of float32"),
    ],
)
def test_what_triton_cannot_do(tokens, slots, dtype, message):
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


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("several tokens", {}, "heads of 24 and 16: both must be multiples of 16"),
        ("one token", {}, "40 slots: there must be at least 128"),
        ("over a long ring's end", {"slots": 200}, "200 slots: there must be a multiple of 128"),
        ("over a long ring's end", {"tokens": 150}, "150 tokens are more than 128 of the ring's"),
        (
            "one token",
            {"chunks": 400, "slots": 128},
            "400 KV heads of 48 are more than fit in VMEM",
        ),
    ],
)
def test_what_tpus_cannot_do(case, changes, message):
    case = dataclasses.replace(cases.SMALL[case], **changes)
    given, options = cases.arrays(case, 0)
    with pytest.raises(NotImplementedError, match=message):
        mosaic_tpu.rotate_and_store(*given, **options)


@pytest.mark.parametrize("kernel", [triton, mosaic_tpu], ids=["triton", "mosaic_tpu"])
def test_the_operation_uses_the_kernel(kernel):
    given, options = cases.arrays(cases.SMALL["over a long ring's end"], 3)
    name = kernel.__name__.split(".")[-1]
    with backends.interpreted():
        got = operation.rotate_and_store(*given, **options, kernels=(name,))
    for a, b in zip(got, interpreted[kernel](*given, **options)):
        np.testing.assert_array_equal(a, b)
