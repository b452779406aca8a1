"""The TPU kernels of attention at the models' sizes compile, and no cache is copied."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import targets
from pallas_kernels.attention import cases as attention_cases
from pallas_kernels.attention.mosaic_tpu import attention
from pallas_kernels.decode_attention import cases as decode_cases
from pallas_kernels.decode_attention.mosaic_tpu import decode_attention
from pallas_kernels.rotate_and_store.mosaic_tpu import store

ShapeDtype = jax.ShapeDtypeStruct
# To another layout, of arrays of four dimensions, which keys and values have and queries don't.
COPIES = re.compile(r"= bf16\[(\d+(?:,\d+){3})\]\S* (?:copy|transpose)\(")


def heads(case, batch, tokens, keys):
    kv = case.kv_heads
    shapes = (
        (batch, tokens, kv, case.group, case.head),
        (batch, keys, kv, case.head),
        (batch, keys, kv, case.value),
    )
    return [ShapeDtype(shape, jnp.bfloat16) for shape in shapes]


def sink(case):
    if case.sink is None:
        return {}
    return {"sink": ShapeDtype((case.kv_heads, case.group), jnp.float32)}


def decode_arguments(case):
    batch, tokens = len(case.lengths), case.queries
    qkv = heads(case, batch, tokens, case.slots)
    return (*qkv, ShapeDtype((batch, tokens), jnp.int32))


def check(program, k, v, temporary):
    """No cache is copied, and there is at most so much temporary memory."""
    for sizes in COPIES.findall(program.as_text()):
        assert math.prod(int(n) for n in sizes.split(",")) < min(k.size, v.size)
    assert program.memory_analysis().temp_size_in_bytes < temporary


def one_copy(q):
    """Of queries, which in a model come from an operation that writes in any layout."""
    return math.prod(q.shape[:-1]) * -(-q.shape[-1] // 128) * 128 * 2 + 2**20


@pytest.mark.parametrize("tpu", targets.TPUS, ids=lambda t: t.name)
@pytest.mark.parametrize("case", attention_cases.REAL.values(), ids=attention_cases.REAL.keys())
def test_many_tokens(case, tpu):
    spans = [ShapeDtype((len(case.spans),), jnp.int32)] * 3
    given = *heads(case, len(case.spans), case.tokens, case.keys), *spans
    f = functools.partial(attention, window=case.window)
    options = sink(case)
    compiled = targets.compile(tpu, lambda o, *a: f(*a, **o), options, *given)
    check(compiled.program, given[1], given[2], one_copy(given[0]))


@pytest.mark.parametrize("tpu", targets.TPUS, ids=lambda t: t.name)
@pytest.mark.parametrize("case", decode_cases.REAL.values(), ids=decode_cases.REAL.keys())
def test_few_tokens(case, tpu):
    f = functools.partial(decode_attention, window=case.window, causal=case.causal)
    given = decode_arguments(case)
    compiled = targets.compile(tpu, lambda o, *a: f(*a, **o), sink(case), *given)
    check(compiled.program, given[1], given[2], one_copy(given[0]))


@pytest.mark.parametrize(
    ("sizes", "tpu"),
    [
        # What a device has of Pro's.
        *[((1, 16, 192, 128), targets.V5E), ((2, 16, 192, 128), targets.TPU7X)],
        *[((3, 5, 128, 128), targets.V5E), ((1, 8, 128, 128), targets.TPU7X)],
        *[((8, 8, 64, 64), targets.V5E), ((6, 2, 256, 256), targets.TPU7X)],
        *[((2, 4, 80, 48), targets.V5E), ((32, 16, 128, 128), targets.TPU7X)],
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_other_heads(sizes, tpu):
    many = attention_cases.Case(1000, 1300, *sizes, spans=((300, 0, 1299),) * 3)
    spans = [ShapeDtype((3,), jnp.int32)] * 3
    targets.compile(tpu, attention, *heads(many, 3, many.tokens, many.keys), *spans)
    few = decode_cases.Case((40, 30), 5, *sizes, slots=1300)
    targets.compile(tpu, decode_attention, *decode_arguments(few))


@pytest.mark.parametrize("tpu", targets.TPUS, ids=lambda t: t.name)
def test_a_loop_that_writes_into_a_cache(tpu):
    case = decode_cases.REAL["16 of 4k x1"]

    def steps(q, k, v, positions):
        def step(_, state):
            q, k, v, positions = state
            k = store(k, q[:, :, :, 0], positions, ring=False)
            v = store(v, q[:, :, :, 0, : case.value], positions, ring=False)
            y = decode_attention(q, k, v, positions)
            q = q.at[..., : case.value].add(y)
            return q, k, v, positions + 1

        return jax.lax.fori_loop(0, 5, step, (q, k, v, positions))

    given = decode_arguments(case)
    compiled = targets.compile(tpu, jax.jit(steps, donate_argnums=(1, 2)), *given)
    check(compiled.program, given[1], given[2], given[1].size // 4)
