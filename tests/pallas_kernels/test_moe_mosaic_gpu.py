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

from mimo_jax.quant import quantize_mxfp4
from pallas_kernels.moe import mosaic_gpu, mosaic_gpu_few, mosaic_gpu_many, reference
from pallas_kernels.moe.mosaic_gpu_many import Config
from pallas_kernels.words import pack

FINDING_RACES = plgpu.InterpretGPUParams(detect_races=True)
# Two programs with several tiles each, rings that are reused, results in pieces.
TOGETHER = Config((8, 16), stages=2, chunk=16, programs=2)
IN_PIECES = Config((8, 16), stages=2, chunk=8, buffers=2, programs=2)
BY_HALVES = Config((8, 16), stages=3, together=8, chunk=8, programs=1)


def experts(count: int, width: int, dim: int):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((count, width, dim), (count, width, dim), (count, dim, width))
    return [quantize_mxfp4(jax.random.normal(k, s) * 0.1) for k, s in zip(keys, shapes)]


def routing(tokens: int, top_k: int, dim: int, low: int, high: int):
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (tokens, dim), jnp.bfloat16)
    weights = jax.random.uniform(keys[1], (tokens, top_k))
    return x, weights, jax.random.randint(keys[2], (tokens, top_k), low, high)


def check(form, given_, stacks, config=None):
    x, weights, chosen = given_
    expected = reference.moe(x.astype(jnp.float32), weights, chosen, *stacks)
    packed: list[Any] = [pack(s) for s in stacks]
    got = form(x, weights, chosen, *packed, config=config, interpret=FINDING_RACES)
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
    n_experts, top_k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    # A token's experts differ; two of them are elsewhere.
    n_experts = max(n_experts, top_k)
    chosen = rng.random((tokens, n_experts + 2)).argsort(axis=1)[:, :top_k].astype(np.int32) - 1
    leader, row = map(np.asarray, mosaic_gpu_few.columns(jnp.asarray(chosen), n_experts))
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
