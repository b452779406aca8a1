"""TPU kernels of attention: interpreted, with their memory simulated; and lowered."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_weights import SIMULATED, assert_close

from pallas_kernels import targets
from pallas_kernels.attention import cases as attention_cases
from pallas_kernels.attention import mosaic_tpu as attention
from pallas_kernels.attention import mosaic_tpu_parts as parts
from pallas_kernels.attention import reference as attention_reference
from pallas_kernels.attention.mosaic_tpu_parts import Blocks
from pallas_kernels.decode_attention import cases as decode_cases
from pallas_kernels.decode_attention import mosaic_tpu as decode
from pallas_kernels.decode_attention import reference as decode_reference

LANES = 128


def float32(given):
    return [a.astype(jnp.float32) if a.ndim > 2 else a for a in given]


@functools.partial(jax.jit, static_argnames="window")
def defined_attention(*given, **options):
    return attention_reference.attention(*float32(given), **options)


@functools.partial(jax.jit, static_argnames=("window", "causal"))
def defined_decode(*given, **options):
    return decode_reference.decode_attention(*float32(given), **options)


@functools.partial(jax.jit, static_argnames=("window", "blocks", "interpret"))
def computed_attention(*given, interpret=SIMULATED, **options):
    return attention.attention(*given, **options, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("window", "causal", "keys", "interpret"))
def computed_decode(*given, interpret=SIMULATED, **options):
    return decode.decode_attention(*given, **options, interpret=interpret)


def simulated(blocks):
    """Simulating memory takes half as long again, and says little where there is one block."""
    return SIMULATED if blocks > 1 else True


def check(got, expected, interpret):
    assert got.dtype == jnp.bfloat16
    assert np.isfinite(got).all()
    if interpret is SIMULATED:
        assert_close(got, expected)
    else:
        assert jnp.linalg.norm(got - expected) < 5e-3 * jnp.linalg.norm(expected)


def check_attention(case, blocks=None, interpret: Any = SIMULATED):
    given, options = attention_cases.arrays(case, 1)
    got = computed_attention(*given, **options, blocks=blocks, interpret=interpret)
    check(got, defined_attention(*given, **options), interpret)


@pytest.mark.parametrize("case", attention_cases.SMALL.values(), ids=attention_cases.SMALL.keys())
def test_many_tokens_against_the_reference(case):
    """Several blocks of tokens and of keys; the last ones have less than the others."""
    blocks = Blocks(min(32, case.tokens), min(LANES, case.keys))
    check_attention(case, blocks, simulated(case.keys / LANES))


@pytest.mark.parametrize("case", decode_cases.SMALL.values(), ids=decode_cases.SMALL.keys())
def test_few_tokens_against_the_reference(case):
    given, options = decode_cases.arrays(case, 2)
    keys, interpret = min(LANES, case.slots), simulated(case.slots / LANES)
    got = computed_decode(*given, **options, keys=keys, interpret=interpret)
    check(got, defined_decode(*given, **options), interpret)
    assert not got[given[3] < 0].any()


def test_blocks_as_chosen():
    check_attention(attention_cases.SMALL["a window after earlier keys"])


def test_an_odd_number_of_heads_and_of_keys():
    """An odd number of KV heads, and a block of keys that is no multiple of 128."""
    case = attention_cases.Case(140, 140, 3, 4, 128, 128, ((0, 0, 139),), sink=0.5)
    check_attention(case)


def test_no_tokens_at_all():
    """One of two sequences has none."""
    given, _ = decode_cases.arrays(decode_cases.SMALL["lengths far apart"], 4)
    q, k, v, positions = given
    got = computed_decode(q, k, v, positions.at[1].set(-1))
    assert got[0].any()
    assert not got[1].any()
    spans = jnp.array([[-5, 0, -1]] * 2, jnp.int32).T
    q = jnp.broadcast_to(q, (2, 3, *q.shape[2:]))
    assert not computed_attention(q, k, v, *spans).any()


@pytest.mark.parametrize("name", ["lengths far apart", "a small window"])
def test_slots_that_are_not_seen_do_not_count(name):
    case = decode_cases.SMALL[name]
    (q, k, v, positions), options = decode_cases.arrays(case, 5)
    sizes = (case.queries, case.slots)
    seen = decode_reference.visible_slots(positions, sizes, window=case.window)
    unseen = ~seen.any(axis=1)[:, :, None, None]
    assert unseen.any()
    other = jnp.where(unseen, 1e4, k), jnp.where(unseen, -1e4, v)
    same = computed_decode(q, k, v, positions, **options)
    np.testing.assert_array_equal(computed_decode(q, *other, positions, **options), same)


def test_blocks_of_keys_that_no_token_sees_are_left_out():
    case = attention_cases.Case(20, 500, 2, 2, 64, 128, ((300, 0, 310),), window=60)
    (q, k, v, *spans), options = attention_cases.arrays(case, 6)
    touched = (jnp.arange(case.keys) // LANES == 1) | (jnp.arange(case.keys) // LANES == 2)
    bad = [jnp.where(touched[:, None, None], a, jnp.nan) for a in (k, v)]
    got = computed_attention(q, *bad, *spans, **options, blocks=Blocks(20, LANES))
    assert_close(got, defined_attention(q, k, v, *spans, **options))


def zeros(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (zeros(1, 5, 2, 4, 64, dtype=jnp.float32), (2, 64), (2, 64), "float32, bfloat16 and bf"),
        (zeros(1, 5, 2, 4, 72), (2, 72), (2, 64), "heads of 72 and 64: both must be multiples"),
        (zeros(1, 5, 2, 4, 64), (2, 64), (2, 40), "heads of 64 and 40"),
        (zeros(1, 5, 64, 1, 128), (64, 128), (64, 128), "64 KV heads of 128 and 128 are more than"),
    ],
)
def test_what_they_cannot_do(q, k, v, message):
    k, v = zeros(1, 8, *k), zeros(1, 8, *v)
    for module in (attention, decode):
        assert (module.unsupported(q, k, v) or "").startswith(message.split(":")[0])
    one, several = zeros(1, dtype=jnp.int32), zeros(1, 5, dtype=jnp.int32)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(attention.attention, q, k, v, one, one, one)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(decode.decode_attention, q, k, v, several)


def test_too_many_tokens_or_too_small_a_ring():
    q, k = zeros(1, 17, 2, 4, 64), zeros(1, 130, 2, 64)
    assert "17 tokens a sequence are more than 16" in (decode.unsupported(q, k, k) or "")
    q = zeros(1, 8, 2, 4, 64)
    assert "130 slots has lost" in (decode.unsupported(q, k, k, 128) or "")
    assert decode.unsupported(zeros(1, 3, 2, 4, 64), k, k, 128) is None


def test_blocks_fit_in_memory():
    pro = zeros(1, 8192, 8, 16, 192), zeros(1, 8192, 8, 192), zeros(1, 8192, 8, 128)
    assert attention.choose_blocks(*pro, None) == Blocks(64, 512)
    assert attention.choose_blocks(*pro, 128) == Blocks(64, 128)
    kv = zeros(1, 8192, 32, 128)
    assert attention.choose_blocks(zeros(1, 8192, 32, 16, 128), kv, kv, None) == Blocks(16, 128)
    few = zeros(1, 5, 8, 16, 192), zeros(1, 40, 8, 192), zeros(1, 40, 8, 128)
    assert attention.choose_blocks(*few, None) == Blocks(5, 40)
    assert parts.key_block(*few[1:], 512) == 40


def attention_shapes(case):
    batch, kv = len(case.spans), case.kv_heads
    return (
        zeros(batch, case.tokens, kv, case.group, case.head),
        zeros(batch, case.keys, kv, case.head),
        zeros(batch, case.keys, kv, case.value),
        *(zeros(batch, dtype=jnp.int32) for _ in range(3)),
    )


def decode_shapes(case):
    batch, kv = len(case.lengths), case.kv_heads
    return (
        zeros(batch, case.queries, kv, case.group, case.head),
        zeros(batch, case.slots, kv, case.head),
        zeros(batch, case.slots, kv, case.value),
        zeros(batch, case.queries, dtype=jnp.int32),
    )


@pytest.mark.parametrize("tpu", [targets.V5E, targets.TPU7X], ids=lambda t: t.name)
def test_lowers(tpu):
    many = attention_cases.REAL["pro window 2048"]
    f = functools.partial(attention.attention, window=many.window)
    text = targets.lower(tpu, f, *attention_shapes(many)).as_text()
    assert text.count("tpu_custom_call") == 1
    few = decode_cases.REAL["16 ragged x8"]
    text = targets.lower(tpu, decode.decode_attention, *decode_shapes(few)).as_text()
    assert text.count("tpu_custom_call") == 1
