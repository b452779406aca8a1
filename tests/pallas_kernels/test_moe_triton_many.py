"""The Triton kernels of `moe` for many tokens, interpreted, against the reference."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import words
from pallas_kernels.moe import cases, reference, triton_many
from pallas_kernels.moe.triton_many import Config, Tiling

pack = jax.jit(words.pack)
definition = jax.jit(reference.moe)
NARROW = Config(8, Tiling(64), Tiling(128))


interpreted = jax.jit(functools.partial(triton_many.moe, interpret=True), static_argnames="config")


def experts(count: int, width: int, dim: int):
    return cases.experts(cases.Case(1, dim, width, count, 1), 0)


def routing(tokens: int, top_k: int, dim: int, low: int, high: int):
    """Among experts low .. high - 1; a token may have one of them twice."""
    x, weights, _ = cases.tokens(cases.Case(tokens, dim, 32, top_k, top_k), 1)
    chosen = np.random.default_rng(2).integers(low, high, (tokens, top_k))
    return x, weights, jnp.asarray(chosen, jnp.int32)


def packed(stacks) -> list[Any]:
    return [pack(s) for s in stacks]


def check(x, weights, chosen, stacks, config):
    y = interpreted(x, weights, chosen, *packed(stacks), config=config)
    expected = definition(x.astype(jnp.float32), weights, chosen, *stacks)
    assert y.dtype == jnp.float32
    assert y.shape == expected.shape
    assert float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)) < 5e-3


@pytest.mark.parametrize("config", [None, NARROW, Config(16, Tiling(128), Tiling(64))], ids=str)
def test_with_experts_that_are_elsewhere(config):
    check(*routing(20, 3, 256, -1, 6), experts(5, 128, 256), config)


def test_one_expert_gets_all():
    check(*routing(21, 2, 128, 3, 4), experts(5, 128, 128), NARROW)


def test_sizes_off_the_tiles():
    check(*routing(13, 2, 96, 0, 3), experts(3, 160, 96), NARROW)


def test_what_it_cannot_do():
    x, weights, chosen = routing(4, 2, 128, 0, 3)
    stacks = experts(3, 128, 128)
    assert "not packed" in (triton_many.unsupported(x, chosen, stacks[0]) or "")
    with pytest.raises(NotImplementedError, match="float32"):
        triton_many.moe(x.astype(jnp.float32), weights, chosen, *packed(stacks))
