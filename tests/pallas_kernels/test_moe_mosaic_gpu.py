"""The Mosaic GPU kernels of `moe`, simulated on a CPU with its detection of races."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import words
from pallas_kernels.moe import cases, mosaic_gpu, mosaic_gpu_few, mosaic_gpu_many, reference
from pallas_kernels.moe.mosaic_gpu_many import Config

pack = jax.jit(words.pack)
definition = jax.jit(reference.moe)
columns = jax.jit(mosaic_gpu_few.columns, static_argnums=1)
FINDING_RACES = plgpu.InterpretGPUParams(detect_races=True)
# Two programs with several tiles each, rings that are reused, results in pieces.
TOGETHER = Config((8, 16), stages=2, chunk=16, programs=2)
IN_PIECES = Config((8, 16), stages=2, chunk=8, buffers=2, programs=2)
BY_HALVES = Config((8, 16), stages=3, together=8, chunk=8, programs=1)


simulated = {
    form: jax.jit(form, static_argnames=("config", "interpret"))
    for form in (mosaic_gpu.moe, mosaic_gpu_many.moe)
}


def experts(count: int, width: int, dim: int):
    return cases.experts(cases.Case(1, dim, width, count, 1), 0)


def routing(tokens: int, top_k: int, dim: int, low: int, high: int):
    """Among experts low .. high - 1; a token may have one of them twice."""
    x, weights, _ = cases.tokens(cases.Case(tokens, dim, 32, top_k, top_k), 1)
    chosen = np.random.default_rng(2).integers(low, high, (tokens, top_k))
    return x, weights, jnp.asarray(chosen, jnp.int32)


def check(form, given_, stacks, config=None):
    x, weights, chosen = given_
    expected = definition(x.astype(jnp.float32), weights, chosen, *stacks)
    packed: list[Any] = [pack(s) for s in stacks]
    got = simulated[form](x, weights, chosen, *packed, config=config, interpret=FINDING_RACES)
    got.block_until_ready()
    assert not gpu_callbacks.get_races().races_found
    assert got.dtype == jnp.float32
    assert float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)) < 5e-3


@pytest.mark.parametrize("tokens", [1, 5, 12], ids="{} tokens".format)
def test_few_tokens(tokens):
    check(mosaic_gpu.moe, routing(tokens, 2, 640, -1, 4), experts(3, 128, 640))


def test_few_tokens_more_than_eight_of_one_expert():
    check(mosaic_gpu.moe, routing(11, 2, 256, 0, 2), experts(2, 128, 256))


@pytest.mark.parametrize("configs", [(TOGETHER, IN_PIECES), (BY_HALVES, TOGETHER)], ids=str)
def test_many_tokens(configs):
    check(mosaic_gpu_many.moe, routing(20, 2, 512, -1, 4), experts(3, 128, 512), configs)


def test_many_tokens_of_an_odd_size():
    check(mosaic_gpu_many.moe, routing(9, 2, 224, 0, 3), experts(3, 96, 224), (TOGETHER, TOGETHER))


@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 30])
@given(st.data())
def test_columns_of_few_tokens(tokens, data):
    n_experts, top_k = data.draw(st.sampled_from([(1, 1), (3, 2), (4, 4), (9, 3)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    # A token's experts differ; two of them are elsewhere.
    chosen = rng.random((tokens, n_experts + 2)).argsort(axis=1)[:, :top_k].astype(np.int32) - 1
    leader, row = map(np.asarray, columns(jnp.asarray(chosen), n_experts))
    flat, row = chosen.reshape(-1), row.reshape(-1)
    here = (flat >= 0) & (flat < n_experts)
    assert (row[~here] == -1).all()
    # A pair's results come from a pair that works for the same expert,
    np.testing.assert_array_equal(leader[row[here] // 8], flat[here])
    # and of its eight columns a pair has one for itself, or shares a token's.
    token = np.nonzero(here)[0] // top_k
    of_column = {}
    for r, t, e in zip(row[here], token, flat[here]):
        assert of_column.setdefault(r, (t, e)) == (t, e)
    if tokens <= 8:
        np.testing.assert_array_equal(row[here] % 8, token)
    # No expert is read more often than its tokens need.
    for e in range(n_experts):
        pairs = int((flat == e).sum())
        assert int((leader == e).sum()) == (min(pairs, 1) if tokens <= 8 else -(-pairs // 8))


def test_what_they_cannot_do():
    x, weights, chosen = routing(4, 2, 128, 0, 3)
    stacks = experts(3, 128, 128)
    assert "not packed" in (mosaic_gpu.unsupported(x, chosen, stacks[0]) or "")
    packed: list[Any] = [pack(s) for s in stacks]
    with pytest.raises(NotImplementedError, match="float32"):
        mosaic_gpu.moe(x.astype(jnp.float32), weights, chosen, *packed)
    x, weights, chosen = routing(65, 2, 128, 0, 3)
    with pytest.raises(NotImplementedError, match="multiple of 256"):
        mosaic_gpu.moe(x, weights, chosen, *packed)
