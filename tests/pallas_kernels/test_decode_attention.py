"""Attention over a cache: its definition, and the kernels interpreted on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_loop import assert_is_the_loop

from pallas_kernels import backends
from pallas_kernels import decode_attention as operation
from pallas_kernels.decode_attention import cases, reference, triton
from pallas_kernels.decode_attention.triton import Config

BF16_ERROR = 5e-3
definition = jax.jit(reference.decode_attention, static_argnames=("window", "causal"))


def relative_error(got, expected) -> float:
    got = np.asarray(got, np.float32)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def of_float32(given, options):
    q, k, v, positions = given
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    return np.asarray(definition(q, k, v, positions, **options))


@pytest.mark.parametrize("name", [n for n, c in cases.SMALL.items() if c.causal])
def test_the_definition(name):
    case = cases.SMALL[name]
    given, options = cases.arrays(case, 1)
    q, k, v = (np.asarray(a, np.float32) for a in given[:3])
    positions = given[3]
    ring = case.window is not None
    at = reference.slot_positions(positions.max(axis=1), case.slots, ring=ring)
    given_loop = (q, k, v, np.asarray(positions), np.asarray(at))
    assert_is_the_loop(of_float32(given, options), case, given_loop, options.get("sink"))


@pytest.mark.parametrize("case", cases.SMALL.values(), ids=cases.SMALL.keys())
def test_triton(case):
    given, options = cases.arrays(case, 2)
    expected = of_float32(given, options)
    got = triton.decode_attention(*given, **options, interpret=True)
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, expected) < BF16_ERROR
    assert not np.asarray(got)[np.asarray(given[3]) < 0].any()


@pytest.mark.parametrize(
    "name", ["one key", "a verified block", "lengths far apart", "a drafted block", "a great sink"]
)
@pytest.mark.parametrize("splits", [2, 8])
def test_keys_shared_out(name, splits):
    """More shares than blocks among them, so that some are empty."""
    given, options = cases.arrays(cases.SMALL[name], 3)
    config = Config(keys=32, splits=splits)
    got = triton.decode_attention(*given, **options, config=config, interpret=True)
    assert relative_error(got, of_float32(given, options)) < BF16_ERROR


def test_keys_of_a_window_shared_out():
    """One that is otherwise read at once: no program may then read all of it."""
    case = cases.Case((400,), 1, 1, 8, 64, 64, 272, 256, sink=6.0, logits=1.0)
    given, options = cases.arrays(case, 6)
    expected = of_float32(given, options)
    for config in (None, Config(splits=2)):
        got = triton.decode_attention(*given, **options, config=config, interpret=True)
        assert relative_error(got, expected) < BF16_ERROR


@pytest.mark.parametrize("name", ["lengths far apart", "a ring not yet full", "a small window"])
def test_slots_that_are_not_seen_do_not_count(name):
    case = cases.SMALL[name]
    (q, k, v, positions), options = cases.arrays(case, 4)
    sizes = (case.queries, case.slots)
    seen = reference.visible_slots(positions, sizes, window=case.window).any(axis=1)
    assert not seen.all()
    unseen = ~seen[:, :, None, None]
    other = jnp.where(unseen, 1e4, k), jnp.where(unseen, -1e4, v)
    for f in (definition, lambda *a, **o: triton.decode_attention(*a, **o, interpret=True)):
        same = f(q, k, v, positions, **options)
        np.testing.assert_array_equal(f(q, *other, positions, **options), same)


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        ((1, 1, 2, 4, 64, "float32"), (1, 8, 2, 64), "float32, bfloat16 and bfloat16"),
        ((1, 17, 2, 4, 64, "bfloat16"), (1, 8, 2, 64), "17 tokens a sequence are more than 16"),
        ((1, 16, 2, 32, 64, "bfloat16"), (1, 8, 2, 64), "more than 256 rows"),
        ((1, 1, 2, 4, 72, "bfloat16"), (1, 8, 2, 72), "heads of 72 and 72"),
    ],
)
def test_what_it_cannot_do(q, k, message):
    *shape, dtype = q
    q, k = jnp.zeros(shape, dtype), jnp.zeros(k, jnp.bfloat16)
    positions = jnp.zeros(q.shape[:2], jnp.int32)
    with pytest.raises(NotImplementedError, match=message):
        triton.decode_attention(q, k, k, positions)
    with pytest.raises(
        NotImplementedError, match=f"decode_attention with kernels=triton.*{message}"
    ):
        operation.decode_attention(q, k, k, positions, kernels=("triton",))


def test_a_ring_that_is_too_small():
    q, k = jnp.zeros((1, 8, 2, 4, 64), jnp.bfloat16), jnp.zeros((1, 130, 2, 64), jnp.bfloat16)
    assert "130 slots has lost" in (triton.unsupported(q, k, k, 128) or "")
    assert triton.unsupported(q[:, :3], k, k, 128) is None


def test_the_operation():
    given, options = cases.arrays(cases.SMALL["a small window"], 5)
    expected = definition(*given, **options)
    np.testing.assert_array_equal(operation.decode_attention(*given, **options), expected)
    with backends.interpreted():
        got = operation.decode_attention(*given, **options, kernels=("triton",))
    assert relative_error(got, np.asarray(expected, np.float32)) < BF16_ERROR
